//! Random histories against the obvious model: every answer, every old revision, every event and every
//! lease must agree, whatever was compacted, forgotten by the ring or read back after a restart.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use kelson_api::Error;
use kelson_api::command::command::Op;
use kelson_api::etcdserverpb::compare::TargetUnion;
use kelson_api::etcdserverpb::request_op::Request;
use kelson_api::etcdserverpb::{
    CompactionRequest, Compare, DeleteRangeRequest, PutRequest, RangeRequest, RequestOp, TxnRequest,
};
use kelson_storage::{Outcome, Recent, Reply};
use proptest::prelude::*;
use support::model::{Answer, Model, in_span};
use support::{Fixture, bytes, grant_op, revoke_op};

const KEYS: [&str; 9] = ["a", "aa", "ab", "b", "ba", "c", "c\0", "\u{7f}", "\0"];
const ENDS: [&str; 7] = ["", "\0", "b", "c", "ab", "a", "\u{7f}\u{7f}"];

fn key() -> impl Strategy<Value = bytes::Bytes> {
    prop::sample::select(&KEYS[..]).prop_map(bytes)
}

fn end() -> impl Strategy<Value = bytes::Bytes> {
    prop_oneof![2 => Just(""), 3 => prop::sample::select(&ENDS[..])].prop_map(bytes)
}

fn lease() -> impl Strategy<Value = i64> {
    prop_oneof![3 => Just(0_i64), 1 => Just(7), 1 => Just(-8), 1 => Just(9)]
}

fn put() -> impl Strategy<Value = PutRequest> {
    (key(), "[xyz]{0,3}", lease(), any::<bool>(), 0..8_u8).prop_map(
        |(key, value, lease, prev_kv, keep)| {
            let (ignore_value, ignore_lease) = (keep == 1, keep == 2);
            PutRequest { key, value: bytes(value), lease, prev_kv, ignore_value, ignore_lease }
        },
    )
}

fn delete() -> impl Strategy<Value = DeleteRangeRequest> {
    (key(), end(), any::<bool>()).prop_map(|(key, range_end, prev_kv)| DeleteRangeRequest {
        key,
        range_end,
        prev_kv,
    })
}

fn range(revision: impl Strategy<Value = i64>) -> impl Strategy<Value = RangeRequest> {
    let filter = || prop_oneof![6 => Just(0_i64), 1 => 0..30_i64, 1 => Just(-1)];
    (
        (key(), end(), revision, -1..5_i64),
        (0..3_i32, 0..5_i32, any::<bool>(), prop::bool::weighted(0.1)),
        (filter(), filter(), filter(), filter()),
    )
        .prop_map(
            |((key, range_end, revision, limit), (order, target, keys_only, count_only), f)| {
                RangeRequest {
                    key,
                    range_end,
                    limit,
                    revision,
                    sort_order: order,
                    sort_target: target,
                    serializable: false,
                    keys_only,
                    count_only,
                    min_mod_revision: f.0,
                    max_mod_revision: f.1,
                    min_create_revision: f.2,
                    max_create_revision: f.3,
                }
            },
        )
}

fn compare() -> impl Strategy<Value = Compare> {
    let union = prop_oneof![
        (0..4_i64).prop_map(TargetUnion::Version),
        (0..30_i64).prop_map(TargetUnion::CreateRevision),
        (0..30_i64).prop_map(TargetUnion::ModRevision),
        "[xyz]{0,2}".prop_map(|value| TargetUnion::Value(bytes(value))),
        lease().prop_map(TargetUnion::Lease),
    ];
    (0..5_i32, 0..6_i32, key(), end(), prop::option::weighted(0.9, union)).prop_map(
        |(result, target, key, range_end, target_union)| Compare {
            result,
            target,
            key,
            range_end,
            target_union,
        },
    )
}

fn operation(depth: u32) -> BoxedStrategy<RequestOp> {
    let revision = prop_oneof![5 => Just(0_i64), 1 => 0..30_i64, 1 => Just(-1), 1 => Just(-5)];
    let leaf = prop_oneof![
        5 => put().prop_map(Request::RequestPut),
        2 => delete().prop_map(Request::RequestDeleteRange),
        3 => range(revision).prop_map(Request::RequestRange),
    ];
    let request = if depth == 0 {
        leaf.boxed()
    } else {
        prop_oneof![8 => leaf, 2 => txn(depth - 1).prop_map(Request::RequestTxn)].boxed()
    };
    prop::option::weighted(0.98, request).prop_map(|request| RequestOp { request }).boxed()
}

fn txn(depth: u32) -> BoxedStrategy<TxnRequest> {
    let branch = || prop::collection::vec(operation(depth), 0..4);
    (prop::collection::vec(compare(), 0..3), branch(), branch())
        .prop_map(|(compare, success, failure)| TxnRequest { compare, success, failure })
        .boxed()
}

#[derive(Clone, Debug)]
enum Step {
    Entry(Vec<Op>),
    Reads(Vec<RangeRequest>),
    ReadOnly(TxnRequest),
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        10 => put().prop_map(Op::Put),
        3 => delete().prop_map(Op::DeleteRange),
        6 => txn(2).prop_map(Op::Txn),
        1 => (-1..40_i64, any::<bool>()).prop_map(|(revision, physical)| {
            Op::Compaction(CompactionRequest { revision, physical })
        }),
        1 => prop::sample::select(vec![7_i64, -8, 9]).prop_map(grant_op),
        1 => prop::sample::select(vec![7_i64, -8, 9]).prop_map(revoke_op),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    let only_reads = txn(0).prop_map(|mut txn| {
        let reads = |op: &RequestOp| matches!(op.request, Some(Request::RequestRange(_)));
        txn.success.retain(reads);
        txn.failure.retain(reads);
        txn
    });
    prop_oneof![
        5 => prop::collection::vec(op(), 1..4).prop_map(Step::Entry),
        2 => prop::collection::vec(range(0..40_i64), 1..6).prop_map(Step::Reads),
        1 => only_reads.prop_map(Step::ReadOnly),
    ]
}

fn answer(outcome: Outcome) -> Result<Answer, Error> {
    outcome.result.map(|reply| match reply {
        Reply::Put(response) => Answer::Put(response),
        Reply::DeleteRange(response) => Answer::Delete(response),
        Reply::Txn(response) => Answer::Txn(response),
        _ => Answer::Done,
    })
}

fn check_entry(fixture: &mut Fixture, model: &mut Model, ops: Vec<Op>) {
    let mut expected = Vec::new();
    for op in &ops {
        expected.push((model.apply(op), model.revision()));
    }
    let outcomes = fixture.entry(ops.clone());
    for ((outcome, (result, revision)), op) in outcomes.into_iter().zip(expected).zip(ops) {
        assert_eq!(outcome.revision, revision, "after {op:?}");
        assert_eq!(answer(outcome), result, "answer to {op:?}");
    }
    assert_eq!(fixture.reader.revision(), model.revision());
    assert_eq!(fixture.reader.compacted(), model.compacted);
}

fn check_range(fixture: &Fixture, model: &Model, request: &RangeRequest) {
    let found = fixture.reader.range(request).map(|(response, revision)| {
        assert_eq!(revision, model.revision());
        response
    });
    assert_eq!(found, model.range(request), "{request:?}");
}

fn check_stream(fixture: &Fixture, model: &Model, revision: i64, limit: i64, chunk: usize) {
    let request = RangeRequest {
        key: bytes("\0"),
        range_end: bytes("\0"),
        revision,
        limit,
        ..RangeRequest::default()
    };
    let expected = model.range(&request);
    let streamed = fixture.reader.range_chunks(&request).and_then(|mut stream| {
        let mut kvs = Vec::new();
        loop {
            let part = stream.next_chunk(chunk)?;
            assert!(part.kvs.len() <= chunk);
            kvs.extend(part.kvs);
            if part.is_last {
                return Ok((kvs, stream.count(), stream.more()));
            }
        }
    });
    assert_eq!(streamed, expected.map(|response| (response.kvs, response.count, response.more)));
}

/// Everything that can be read, at every revision that can be read.
fn check_all(fixture: &Fixture, model: &Model) {
    for revision in 0..=model.revision() + 1 {
        for (key, range_end) in [("\0", "\0"), ("a", "b"), ("ab", "\0"), ("c", "")] {
            let request = RangeRequest {
                key: bytes(key),
                range_end: bytes(range_end),
                revision,
                ..RangeRequest::default()
            };
            check_range(fixture, model, &request);
            check_range(fixture, model, &RangeRequest { limit: 1, ..request.clone() });
            check_range(fixture, model, &RangeRequest { count_only: true, ..request });
        }
        check_stream(fixture, model, revision, revision % 4, 2);
    }
    for id in [7, -8, 9] {
        assert_eq!(fixture.reader.lease(id).is_some(), model.leases.contains(&id));
        assert_eq!(fixture.reader.lease_keys(id), model.lease_keys(id));
    }
    assert_eq!(fixture.reader.key_count(), model.states.last().unwrap().len() as u64);
    check_history(fixture, model);
}

/// Reads the history in small pieces, from every revision on.
fn check_history(fixture: &Fixture, model: &Model) {
    for from in 0..=model.revision() {
        if from < model.compacted {
            assert_eq!(fixture.reader.changes(from, 10, 1 << 20).unwrap_err(), Error::Compacted);
            continue;
        }
        let mut batches = Vec::new();
        let mut next = from;
        while next <= model.revision() {
            let changes = fixture.reader.changes(next, 3, 40).unwrap();
            assert_eq!(changes.store_revision, model.revision());
            assert!(changes.next > next, "no progress at {next}");
            next = changes.next;
            batches.extend(changes.batches.iter().map(|revised| (**revised).clone()));
        }
        assert!(batches.iter().all(|revised| revised.revision >= from));
        // What a compaction took away within its own revision is nobody's business any more.
        batches.retain(|revised| revised.revision > model.compacted);
        assert_eq!(batches, model.changes(from.max(model.compacted + 1)));
    }
    let after = model.revision();
    let recent = fixture.reader.feed().recent(after);
    assert!(matches!(recent, Recent::Batches(batches) if batches.is_empty()));
    for (&revision, events) in model.events.range(model.compacted + 2..) {
        for event in events.iter().filter(|event| event.kv.version != 1) {
            let before = fixture.reader.kv_before(&event.kv.key, revision);
            assert_eq!(before, event.prev_kv, "{:?} before {revision}", event.kv.key);
        }
    }
}

fn run(steps: Vec<Step>, recent_bytes: usize) {
    let mut fixture = Fixture::with(|options| {
        options.recent_bytes = recent_bytes;
        options.compaction_batch_limit = 2;
        options.compaction_sleep = std::time::Duration::from_micros(10);
    });
    let mut model = Model::new();
    for step in steps {
        match step {
            Step::Entry(ops) => check_entry(&mut fixture, &mut model, ops),
            Step::Reads(requests) => {
                requests.iter().for_each(|request| check_range(&fixture, &model, request));
            }
            Step::ReadOnly(request) => check_read_only(&fixture, &mut model, request),
        }
    }
    check_all(&fixture, &model);
    fixture.wait_for_compaction();
    check_all(&fixture, &model);
    fixture.reopen();
    check_all(&fixture, &model);
}

fn check_read_only(fixture: &Fixture, model: &mut Model, request: TxnRequest) {
    let revision = model.revision();
    let expected = model.apply(&Op::Txn(request.clone()));
    assert_eq!(model.revision(), revision, "the model agrees that it only reads");
    let found = fixture.reader.txn_read_only(&request).map(|(response, read_at)| {
        assert_eq!(read_at, revision);
        Answer::Txn(response)
    });
    assert_eq!(found, expected, "{request:?}");
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 200,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn random_histories_agree(steps in prop::collection::vec(step(), 1..40)) {
        run(steps, 1 << 20);
    }

    #[test]
    fn random_histories_agree_with_hardly_a_ring(steps in prop::collection::vec(step(), 1..40)) {
        run(steps, 300);
    }
}

#[test]
fn spans_of_the_model_are_etcds() {
    assert!(in_span(b"a", b"a", b"") && !in_span(b"b", b"b", b"a") && in_span(b"z", b"\0", b"\0"));
}
