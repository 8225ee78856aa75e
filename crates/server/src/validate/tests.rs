//! Tables of requests and the error that etcd gives for each.

use bytes::Bytes;
use kelson_api::Message;
use kelson_api::command::command::Op;
use kelson_api::command::{Batch, Command};
use kelson_api::etcdserverpb::Compare;

use super::*;

fn op(request: Request) -> RequestOp {
    RequestOp { request: Some(request) }
}

fn get(key: &str) -> RequestOp {
    op(Request::RequestRange(RangeRequest { key: bytes(key), ..Default::default() }))
}

fn set(key: &str) -> RequestOp {
    op(Request::RequestPut(PutRequest { key: bytes(key), ..Default::default() }))
}

fn del(key: &str, range_end: &str) -> RequestOp {
    op(Request::RequestDeleteRange(DeleteRangeRequest {
        key: bytes(key),
        range_end: bytes(range_end),
        prev_kv: false,
    }))
}

fn nest(success: Vec<RequestOp>, failure: Vec<RequestOp>) -> RequestOp {
    op(Request::RequestTxn(TxnRequest { compare: Vec::new(), success, failure }))
}

fn bytes(text: &str) -> Bytes {
    Bytes::copy_from_slice(text.as_bytes())
}

fn then(success: Vec<RequestOp>) -> TxnRequest {
    TxnRequest { compare: Vec::new(), success, failure: Vec::new() }
}

fn many(from: usize, count: usize) -> Vec<RequestOp> {
    (from..from + count).map(|n| set(&format!("k{n:04}"))).collect()
}

#[test]
fn a_level_counts_its_widest_list() {
    let compare = Compare { key: bytes("k"), ..Default::default() };
    assert_eq!(txn(&then(many(0, 128)), 128), Ok(()));
    assert_eq!(txn(&then(many(0, 129)), 128), Err(Error::TooManyOps));
    let wide = TxnRequest { compare: vec![compare.clone(); 129], ..Default::default() };
    assert_eq!(txn(&wide, 128), Err(Error::TooManyOps));
    let three_lists =
        TxnRequest { compare: vec![compare; 128], success: many(0, 128), failure: many(0, 128) };
    assert_eq!(txn(&three_lists, 128), Ok(()));
}

#[test]
fn a_nested_level_may_use_what_its_parent_leaves() {
    let with_nested = |outer: usize, inner: usize| {
        let mut ops = many(0, outer);
        ops.push(nest(many(1000, inner), Vec::new()));
        txn(&then(ops), 128)
    };
    assert_eq!(with_nested(63, 64), Ok(()));
    assert_eq!(with_nested(63, 65), Err(Error::TooManyOps));
    assert_eq!(with_nested(127, 0), Ok(()));
    assert_eq!(with_nested(127, 1), Err(Error::TooManyOps));
    assert_eq!(with_nested(126, 1), Ok(()));
}

/// Transactions within one another, with an operation of each kind in the innermost.
fn deep(levels: usize) -> TxnRequest {
    let compare = vec![Compare { key: bytes("k"), ..Default::default() }];
    let innermost = TxnRequest { compare, ..then(many(0, 1)) };
    (1..levels).fold(innermost, |inner, _| then(vec![op(Request::RequestTxn(inner))]))
}

#[test]
fn what_is_let_through_can_be_read_back_from_the_log() {
    assert_eq!(txn(&deep(LEVELS_MAX), 128), Ok(()));
    assert_eq!(txn(&deep(LEVELS_MAX + 1), 128), Err(Error::TooManyOps));
    let command = Command { op: Some(Op::Txn(deep(LEVELS_MAX))), ..Command::default() };
    let batch = Batch { commands: vec![command] };
    assert_eq!(Batch::decode(batch.encode_to_vec().as_slice()), Ok(batch));
}

#[test]
fn the_first_fault_in_order_wins() {
    let empty_compare = Compare::default();
    let ignoring = op(Request::RequestPut(PutRequest {
        key: bytes("k"),
        value: bytes("v"),
        ignore_value: true,
        ..Default::default()
    }));
    let nothing = RequestOp { request: None };
    let cases: Vec<(TxnRequest, Error)> = vec![
        (
            TxnRequest {
                compare: vec![empty_compare],
                success: vec![nothing.clone()],
                failure: vec![],
            },
            Error::EmptyKey,
        ),
        (then(vec![nothing.clone(), set("")]), Error::KeyNotFound),
        (then(vec![set(""), nothing.clone()]), Error::EmptyKey),
        (then(vec![ignoring.clone(), nothing.clone()]), Error::ValueProvided),
        (then(vec![set("a"), set("a"), nothing.clone()]), Error::KeyNotFound),
        (
            TxnRequest {
                compare: vec![],
                success: vec![set("a"), set("a")],
                failure: vec![del("", "")],
            },
            Error::EmptyKey,
        ),
        (then(vec![nest(vec![get("")], vec![])]), Error::EmptyKey),
        (then(vec![nest(vec![nothing], vec![])]), Error::KeyNotFound),
    ];
    for (number, (request, error)) in cases.into_iter().enumerate() {
        assert_eq!(txn(&request, 128), Err(error), "case {number}");
    }
}

#[test]
fn a_key_is_changed_once() {
    let refused: Vec<Vec<RequestOp>> = vec![
        vec![set("a"), set("a")],
        vec![set("a"), del("a", "")],
        vec![del("a", ""), set("a")],
        vec![set("b"), del("a", "c")],
        vec![del("a", "b"), del("aa", "c"), set("bb")],
        vec![set("a"), nest(vec![set("a")], vec![])],
        vec![nest(vec![], vec![set("a")]), set("a")],
        vec![set("a"), nest(vec![del("a", "")], vec![])],
        vec![del("a", ""), nest(vec![set("a")], vec![])],
        vec![nest(vec![set("a")], vec![]), nest(vec![set("a")], vec![])],
        vec![nest(vec![set("a")], vec![]), nest(vec![], vec![set("a")])],
        // A sibling's delete is seen by the transactions after it.
        vec![nest(vec![del("k", "")], vec![]), nest(vec![set("k")], vec![])],
        vec![nest(vec![nest(vec![set("x")], vec![])], vec![]), set("x")],
        vec![nest(vec![set("x"), set("x")], vec![])],
    ];
    for (number, ops) in refused.into_iter().enumerate() {
        assert_eq!(txn(&then(ops.clone()), 128), Err(Error::DuplicateKey), "success {number}");
        let failure = TxnRequest { failure: ops, ..Default::default() };
        assert_eq!(txn(&failure, 128), Err(Error::DuplicateKey), "failure {number}");
    }
}

#[test]
fn harmless_overlaps_pass() {
    let accepted: Vec<Vec<RequestOp>> = vec![
        vec![set("a"), set("b"), del("c", "d")],
        vec![del("a", "z"), del("b", "c"), del("b", "")],
        vec![get("a"), set("a"), get("a")],
        vec![set("c"), del("a", "c")],
        vec![nest(vec![set("a")], vec![set("a")])],
        // The put comes first: only deletes known by then are looked at.
        vec![nest(vec![set("k")], vec![]), nest(vec![del("k", "")], vec![])],
        // The two branches of one nested transaction exclude each other.
        vec![nest(vec![set("k")], vec![del("k", "")])],
        vec![nest(vec![del("k", "")], vec![set("k")])],
        // An inverted range deletes nothing.
        vec![set("b"), del("c", "a")],
        // An open end is the smallest end for this check.
        vec![set("b"), del("a", "\0")],
    ];
    for (number, ops) in accepted.into_iter().enumerate() {
        assert_eq!(txn(&then(ops), 128), Ok(()), "case {number}");
    }
    let both = TxnRequest {
        compare: Vec::new(),
        success: vec![set("a")],
        failure: vec![set("a"), del("b", "")],
    };
    assert_eq!(txn(&both, 128), Ok(()));
}

#[test]
fn only_ranges_make_a_read_only_transaction() {
    let local = op(Request::RequestRange(RangeRequest {
        key: bytes("k"),
        serializable: true,
        ..Default::default()
    }));
    let nothing = TxnRequest::default();
    assert!(is_read_only(&nothing) && is_serializable(&nothing));
    let mixed = TxnRequest { success: vec![local.clone()], failure: vec![get("a")], ..nothing };
    assert!(is_read_only(&mixed) && !is_serializable(&mixed));
    assert!(is_serializable(&then(vec![local.clone(), local.clone()])));
    assert!(!is_read_only(&then(vec![local.clone(), set("a")])));
    assert!(!is_read_only(&then(vec![nest(vec![local], vec![])])));
}

#[test]
fn single_requests_are_checked_in_order() {
    let put_of = |key: &str, value: &str, lease, ignore_value, ignore_lease| {
        put(&PutRequest {
            key: bytes(key),
            value: bytes(value),
            lease,
            prev_kv: false,
            ignore_value,
            ignore_lease,
        })
    };
    assert_eq!(put_of("", "v", 1, true, true), Err(Error::EmptyKey));
    assert_eq!(put_of("k", "v", 1, true, true), Err(Error::ValueProvided));
    assert_eq!(put_of("k", "", 1, true, true), Err(Error::LeaseProvided));
    assert_eq!(put_of("k", "", 0, true, true), Ok(()));
    assert_eq!(delete_range(&DeleteRangeRequest::default()), Err(Error::EmptyKey));
}

#[test]
fn a_range_knows_its_sort_options() {
    let range_of = |key: &str, sort_order, sort_target| RangeRequest {
        key: bytes(key),
        sort_order,
        sort_target,
        ..Default::default()
    };
    assert_eq!(range(&range_of("", 9, 0)), Err(Error::EmptyKey));
    assert_eq!(range(&range_of("k", 3, 0)), Err(Error::InvalidSortOption));
    assert_eq!(range(&range_of("k", 0, 5)), Err(Error::InvalidSortOption));
    assert_eq!(range(&range_of("k", 2, 4)), Ok(()));
    assert_eq!(range_stream(&range_of("k", 1, 0)), Ok(()));
    assert_eq!(range_stream(&range_of("k", 2, 0)), Err(Error::StreamSort));
    assert_eq!(range_stream(&range_of("k", 1, 3)), Err(Error::StreamSort));
    assert_eq!(range_stream(&range_of("k", 7, 3)), Err(Error::InvalidSortOption));
    let filtered = RangeRequest { max_create_revision: 1, ..range_of("k", 0, 0) };
    assert_eq!(range_stream(&filtered), Err(Error::StreamFilter));
}
