//! How many puts per second pass one member's log, consensus and state, without gRPC? One element
//! is one put of 256 bytes, from proposal to applied and durable result.
//!
//! Ceiling: one writer waits for one fdatasync per put (60-150 us on a good disk, so 6-15k/s); many
//! writers share one, so the ceiling is CPU, a few microseconds per put.

use std::time::{Duration, Instant};

use bytes::Bytes;
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use kelson_api::command::command::Op;
use kelson_api::etcdserverpb::PutRequest;
use kelson_raft::{Node, NodeConfig};
use tokio::runtime::Runtime;

const VALUE_BYTES: usize = 256;
/// Distinct keys, so that state does not grow without end while criterion repeats.
const KEYS: u64 = 10_000;

fn put(i: u64) -> Op {
    Op::Put(PutRequest {
        key: format!("/registry/pods/bench/{:08}", i % KEYS).into(),
        value: Bytes::from_static(&[b'v'; VALUE_BYTES]),
        ..PutRequest::default()
    })
}

/// Time for `puts` puts by `writers` tasks.
async fn run(node: &Node, writers: u64, puts: u64) -> Duration {
    let start = Instant::now();
    let mut tasks = Vec::new();
    for writer in 0..writers {
        let node = node.clone();
        tasks.push(tokio::spawn(async move {
            for i in (writer..puts).step_by(writers as usize) {
                node.propose(put(i)).await.expect("one member accepts").result.expect("a put");
            }
        }));
    }
    for task in tasks {
        task.await.expect("no writer panics");
    }
    start.elapsed()
}

fn propose(criterion: &mut Criterion) {
    let runtime = Runtime::new().expect("make a runtime");
    let dir = tempfile::tempdir().expect("make a directory");
    let config = NodeConfig::with_defaults(dir.path().join("data"));
    let (node, _reader) = runtime.block_on(Node::start(config)).expect("start a member");
    let mut group = criterion.benchmark_group("propose");
    group.throughput(Throughput::Elements(1)).measurement_time(Duration::from_secs(5));
    for writers in [1, 64, 512] {
        group.bench_with_input(BenchmarkId::new("writers", writers), &writers, |b, writers| {
            b.iter_custom(|puts| runtime.block_on(run(&node, *writers, puts)));
        });
    }
    group.finish();
    runtime.block_on(node.shutdown());
}

criterion_group!(benches, propose);
criterion_main!(benches);
