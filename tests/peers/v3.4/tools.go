//go:build tools

// Package peers pins the etcd 3.4 whose data directories Kelson takes over in tests. It is never
// compiled: it exists so that go.mod and go.sum list everything `cargo xtask peers` builds.
package peers

import _ "go.etcd.io/etcd"
