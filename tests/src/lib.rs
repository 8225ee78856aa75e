//! Test harness: starts members as processes, speaks gRPC to them and runs golden scripts. It looks
//! at Kelson only from outside, through the same doors that any client of etcd uses, so that every
//! check can be pointed at a real etcd as well.

pub mod client;
pub mod cluster;
pub mod contest;
pub mod forge;
pub mod format;
pub mod image;
pub mod json;
pub mod ledger;
pub mod parse;
pub mod pings;
pub mod script;
pub mod server;
pub mod tools;
pub mod users;
pub mod watch;

/// A runtime of two threads, for tests that start and stop members between their calls.
///
/// # Panics
///
/// If the system gives no threads.
pub fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("a runtime")
}

/// Runs a test on a runtime of its own.
pub fn run<T>(test: impl Future<Output = T>) -> T {
    runtime().block_on(test)
}
