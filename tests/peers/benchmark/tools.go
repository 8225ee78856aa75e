//go:build tools

// Package benchmark pins etcd's load generator. It has a module of its own because its newest
// release needs older libraries than the server and etcdctl next door.
package benchmark

import _ "go.etcd.io/etcd/v3/tools/benchmark"
