//go:build tools

// This file is never compiled: it makes go.mod and go.sum cover the unmodified kube-apiserver, which
// `cargo xtask kube` builds from this module.
package kube

import _ "k8s.io/kubernetes/cmd/kube-apiserver"
