//! Question: what does the state cost per command, once consensus has agreed? A put of 256 bytes into
//! a store of many keys should stay near 5 us: three searches in a tree of that size (about 1 us
//! each), one allocation for the row, one for the event. At 5 us one thread applies 200k puts/s, far
//! above what consensus and the wire deliver, so a number near 10 us is still no bottleneck.
//!
//! The persister writes to a temporary directory beside the measurement; on a machine with two cores
//! it competes for them. Compare numbers of one run only.

use criterion::{BatchSize, Criterion, criterion_group, criterion_main};
use kelson_api::command::command::Op;
use kelson_api::etcdserverpb::compare::{CompareResult, CompareTarget, TargetUnion};
use kelson_api::etcdserverpb::request_op::Request;
use kelson_api::etcdserverpb::{Compare, DeleteRangeRequest, PutRequest, RequestOp, TxnRequest};
use kelson_benches::state::{Loaded, key, put, value};

const KEYS: u64 = 300_000;

/// What kube-apiserver sends for an update: put if the key is still as it was read.
fn update(number: u64, version: i64) -> Op {
    let compare = Compare {
        result: CompareResult::Greater as i32,
        target: CompareTarget::Version as i32,
        key: key(number),
        target_union: Some(TargetUnion::Version(version)),
        ..Compare::default()
    };
    let put = PutRequest { key: key(number), value: value(number), ..PutRequest::default() };
    let success = vec![RequestOp { request: Some(Request::RequestPut(put)) }];
    Op::Txn(TxnRequest { compare: vec![compare], success, failure: Vec::new() })
}

fn apply(criterion: &mut Criterion) {
    let mut store = Loaded::with_keys(KEYS);
    let mut next = 0_u64;
    let mut spread = move || {
        next = next.wrapping_add(0x9e37_79b9_7f4a_7c15);
        (next >> 20) % KEYS
    };
    criterion.bench_function("apply/put_256_existing_key", |bencher| {
        bencher.iter_batched(|| put(spread()), |op| store.apply(vec![op]), BatchSize::SmallInput);
    });
    criterion.bench_function("apply/entry_of_64_puts", |bencher| {
        bencher.iter_batched(
            || (0..64).map(|_| put(spread())).collect::<Vec<_>>(),
            |ops| store.apply(ops),
            BatchSize::SmallInput,
        );
    });
    criterion.bench_function("apply/compare_and_put", |bencher| {
        let mut number = 0;
        bencher.iter_batched(
            || {
                number = (number + 7919) % KEYS;
                update(number, 0)
            },
            |op| store.apply(vec![op]),
            BatchSize::SmallInput,
        );
    });
    let mut fresh = KEYS;
    criterion.bench_function("apply/create_and_delete", |bencher| {
        bencher.iter_batched(
            || {
                fresh += 1;
                let request = DeleteRangeRequest { key: key(fresh), ..Default::default() };
                vec![put(fresh), Op::DeleteRange(request)]
            },
            |ops| store.apply(ops),
            BatchSize::SmallInput,
        );
    });
}

criterion_group!(benches, apply);
criterion_main!(benches);
