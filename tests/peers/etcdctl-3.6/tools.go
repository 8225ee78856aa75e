//go:build tools

// Package etcdctl pins the etcdctl of etcd 3.6, whose libraries are not those of the programs next door.
package etcdctl

import _ "go.etcd.io/etcd/etcdctl/v3"
