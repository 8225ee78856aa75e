//go:build tools

// Package peers pins the programs of the etcd world that Kelson is compared with. It is never
// compiled: it exists so that go.mod and go.sum list everything `cargo xtask peers` builds.
package peers

import (
	_ "go.etcd.io/etcd/etcdctl/v3"
	_ "go.etcd.io/etcd/etcdutl/v3"
	_ "go.etcd.io/etcd/server/v3"
)
