//! Shared workload shapes of the benches: keys, values and batches as kube-apiserver makes them.

pub mod state;
