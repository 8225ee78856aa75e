//! The rules of the key space one by one: what etcd answers where a reader of its documentation would
//! guess otherwise. Each test is named after its rule.

mod support;

use kelson_api::Error;
use kelson_api::command::command::Op;
use kelson_api::command::{ClusterVersionSet, MemberPublish, MembersChange};
use kelson_api::etcdserverpb::compare::{CompareResult, CompareTarget, TargetUnion};
use kelson_api::etcdserverpb::range_request::{SortOrder, SortTarget};
use kelson_api::etcdserverpb::request_op::Request;
use kelson_api::etcdserverpb::response_op::Response;
use kelson_api::etcdserverpb::{
    AlarmMember, AlarmRequest, AlarmType, CompactionRequest, Compare, LeaseCheckpoint,
    LeaseCheckpointRequest, LeaseGrantRequest, Member, PutRequest, RangeRequest, RequestOp,
    ResponseHeader, TxnRequest,
};
use kelson_api::mvccpb::event::EventType;
use kelson_storage::{LeaseRow, LogId, Recent, Reply};
use support::{
    Fixture, bytes, compact_op, delete, delete_op, get, grant_op, put, put_op, revoke_op,
};

fn op(request: Request) -> RequestOp {
    RequestOp { request: Some(request) }
}

fn put_in(key: &str, value: &str) -> RequestOp {
    op(Request::RequestPut(put(key, value)))
}

fn delete_in(key: &str) -> RequestOp {
    op(Request::RequestDeleteRange(delete(key, "")))
}

fn range_in(key: &str, revision: i64) -> RequestOp {
    op(Request::RequestRange(RangeRequest { revision, ..get(key, "") }))
}

fn txn(success: Vec<RequestOp>) -> TxnRequest {
    TxnRequest { compare: Vec::new(), success, failure: Vec::new() }
}

fn nested(success: Vec<RequestOp>) -> RequestOp {
    op(Request::RequestTxn(txn(success)))
}

fn value_is(key: &str, range_end: &str, value: &str) -> Compare {
    Compare {
        result: CompareResult::Equal as i32,
        target: CompareTarget::Value as i32,
        key: bytes(key),
        range_end: bytes(range_end),
        target_union: Some(TargetUnion::Value(bytes(value))),
    }
}

fn names(response: &kelson_api::etcdserverpb::RangeResponse) -> Vec<String> {
    response.kvs.iter().map(|kv| String::from_utf8_lossy(&kv.key).into_owned()).collect()
}

#[test]
fn an_empty_store_is_at_revision_one_and_never_compacted() {
    let fixture = Fixture::new();
    assert_eq!((fixture.reader.revision(), fixture.reader.compacted()), (1, -1));
    assert_eq!(fixture.range(get("\0", "\0")).count, 0);
}

#[test]
fn what_changes_nothing_raises_nothing() {
    let mut fixture = Fixture::new();
    assert_eq!(fixture.ok(put_op("a", "1")), 2);
    assert_eq!(fixture.ok(put_op("a", "1")), 3, "a put of the same value counts");
    assert_eq!(fixture.ok(delete_op("x", "")), 3);
    assert_eq!(fixture.ok(grant_op(5)), 3);
    assert_eq!(fixture.ok(revoke_op(5)), 3);
    assert_eq!(fixture.ok(Op::Txn(txn(vec![range_in("a", 0), delete_in("x")]))), 3);
    assert_eq!(fixture.ok(compact_op(2)), 3);
    assert_eq!(fixture.ok(delete_op("a", "")), 4);
    let kv = fixture.range(RangeRequest { revision: 3, ..get("a", "") }).kvs.remove(0);
    assert_eq!((kv.create_revision, kv.mod_revision, kv.version), (2, 3, 2));
    assert_eq!(fixture.range(RangeRequest { revision: 4, ..get("a", "") }).count, 0);
    fixture.ok(put_op("a", "1"));
    let kv = fixture.range(get("a", "")).kvs.remove(0);
    assert_eq!((kv.create_revision, kv.mod_revision, kv.version), (5, 5, 1), "starts anew");
}

#[test]
fn a_range_that_ends_before_it_starts_is_empty() {
    let mut fixture = Fixture::new();
    fixture.ok(put_op("b", ""));
    for end in ["a", "b"] {
        assert_eq!(fixture.range(get("b", end)).count, 0);
        assert_eq!(fixture.ok(delete_op("b", end)), 2);
    }
}

#[test]
fn count_is_before_limit_and_filters_and_more_after_them() {
    let mut fixture = Fixture::new();
    for key in ["a", "b", "c", "d"] {
        fixture.ok(put_op(key, key));
    }
    let all = get("\0", "\0");
    let limited = fixture.range(RangeRequest { limit: 2, ..all.clone() });
    assert_eq!(
        (names(&limited), limited.more, limited.count),
        (vec!["a".into(), "b".into()], true, 4)
    );
    let filtered = RangeRequest { limit: 2, min_mod_revision: 4, ..all.clone() };
    let filtered = fixture.range(filtered);
    assert_eq!(
        (names(&filtered), filtered.more, filtered.count),
        (vec!["c".into(), "d".into()], false, 4)
    );
    let counted = fixture.range(RangeRequest {
        limit: 1,
        count_only: true,
        min_mod_revision: 4,
        ..all.clone()
    });
    assert_eq!((counted.kvs.len(), counted.more, counted.count), (0, false, 4));
    let unlimited = fixture.range(RangeRequest { limit: -3, ..all });
    assert_eq!((unlimited.kvs.len(), unlimited.more), (4, false));
}

#[test]
fn no_order_with_another_target_cuts_first_and_sorts_then() {
    let mut fixture = Fixture::new();
    for (key, value) in [("a", "9"), ("b", "5"), ("c", "1"), ("d", "0")] {
        fixture.ok(put_op(key, value));
    }
    let sorted = |order: SortOrder, limit| RangeRequest {
        limit,
        sort_order: order as i32,
        sort_target: SortTarget::Value as i32,
        keys_only: true,
        ..get("\0", "\0")
    };
    let cut_first = fixture.range(sorted(SortOrder::None, 2));
    assert_eq!(names(&cut_first), ["c", "b"], "of the first three keys");
    assert!(cut_first.more && cut_first.kvs.iter().all(|kv| kv.value.is_empty()));
    assert_eq!(names(&fixture.range(sorted(SortOrder::Ascend, 2))), ["d", "c"]);
    assert_eq!(names(&fixture.range(sorted(SortOrder::Descend, 1))), ["a"]);
    let descend =
        RangeRequest { sort_target: SortTarget::Key as i32, ..sorted(SortOrder::Descend, 2) };
    assert_eq!(names(&fixture.range(descend)), ["d", "c"]);
}

#[test]
fn the_compaction_revision_itself_stays_readable() {
    let mut fixture = Fixture::new();
    for value in ["1", "2", "3"] {
        fixture.ok(put_op("a", value));
    }
    fixture.ok(delete_op("a", ""));
    fixture.ok(compact_op(3));
    let at = |revision| RangeRequest { revision, ..get("a", "") };
    let check = |fixture: &Fixture| {
        assert_eq!(fixture.reader.range(&at(2)).expect_err("refused"), Error::Compacted);
        assert_eq!(fixture.range(at(3)).kvs[0].value, "2");
        assert_eq!(fixture.range(at(4)).kvs[0].value, "3");
        assert_eq!(fixture.range(at(5)).count, 0);
        assert_eq!(fixture.reader.range(&at(6)).expect_err("refused"), Error::FutureRevision);
    };
    check(&fixture);
    fixture.wait_for_compaction();
    check(&fixture);
    fixture.reopen();
    check(&fixture);
}

#[test]
fn zero_can_be_compacted_once_on_a_fresh_store() {
    let mut fixture = Fixture::new();
    assert_eq!(fixture.refused(compact_op(-1)), Error::Compacted);
    fixture.ok(compact_op(0));
    assert_eq!(fixture.refused(compact_op(0)), Error::Compacted);
    assert_eq!(fixture.refused(compact_op(2)), Error::FutureRevision);
    fixture.ok(compact_op(1));
    fixture.reopen();
    assert_eq!(fixture.reader.compacted(), 1);
    assert_eq!(fixture.refused(compact_op(1)), Error::Compacted);
}

#[test]
fn only_physical_compactions_have_a_ticket() {
    let mut fixture = Fixture::new();
    fixture.ok(put_op("a", ""));
    let logical = CompactionRequest { revision: 1, physical: false };
    assert!(matches!(fixture.reply(Op::Compaction(logical)), Reply::Compact(None)));
    let Reply::Compact(Some(ticket)) = fixture.reply(compact_op(2)) else { panic!("no ticket") };
    fixture.wait_for_compaction();
    assert!(ticket.is_finished());
}

#[test]
fn a_compacted_deletion_frees_its_rows_unless_it_is_exactly_there() {
    let mut fixture = Fixture::new();
    fixture.ok(put_op("a", "1"));
    fixture.ok(delete_op("a", ""));
    fixture.ok(compact_op(3));
    fixture.wait_for_compaction();
    let kept = fixture.reader.changes(3, 10, 1000).expect("3 is readable");
    assert_eq!(kept.batches[0].events[0].kind, EventType::Delete);
    let in_use = fixture.reader.sizes().in_use;
    assert!(in_use > 0);
    fixture.ok(put_op("b", ""));
    fixture.ok(compact_op(4));
    fixture.wait_for_compaction();
    let b_alone = fixture.reader.sizes().in_use;
    fixture.ok(delete_op("b", ""));
    fixture.ok(put_op("c", ""));
    fixture.ok(compact_op(6));
    fixture.wait_for_compaction();
    assert_eq!(fixture.reader.sizes().in_use, b_alone, "only c is left, as large as b");
}

#[test]
fn a_stream_with_a_target_and_no_order_sorts_each_chunk_and_loses_nothing() {
    let mut fixture = Fixture::new();
    for (key, value) in [("a", "5"), ("b", "3"), ("c", "4"), ("d", "1"), ("e", "2")] {
        fixture.ok(put_op(key, value));
    }
    let chunks = |request: RangeRequest| {
        let mut stream = fixture.reader.range_chunks(&request).expect("readable");
        let next = || {
            let chunk = stream.next_chunk(2).expect("readable");
            let keys = chunk.kvs.iter().map(|kv| String::from_utf8_lossy(&kv.key).into_owned());
            keys.collect::<String>()
        };
        std::iter::repeat_with(next).take(3).collect::<Vec<_>>()
    };
    let by_value = RangeRequest { sort_target: SortTarget::Value as i32, ..get("a", "z") };
    assert_eq!(chunks(by_value.clone()), ["ba", "dc", "e"]);
    assert_eq!(chunks(RangeRequest { keys_only: true, ..by_value }), ["ba", "dc", "e"]);
    assert_eq!(chunks(get("a", "z")), ["ab", "cd", "e"]);
}

#[test]
fn put_checks_the_lease_then_the_key() {
    let mut fixture = Fixture::new();
    let keep = PutRequest { ignore_value: true, lease: 9, ..put("a", "") };
    assert_eq!(fixture.refused(Op::Put(keep.clone())), Error::LeaseNotFound);
    fixture.ok(grant_op(9));
    assert_eq!(fixture.refused(Op::Put(keep.clone())), Error::KeyNotFound);
    fixture.ok(put_op("a", "1"));
    fixture.ok(Op::Put(keep));
    let kv = fixture.range(get("a", "")).kvs.remove(0);
    assert_eq!((kv.value.as_ref(), kv.lease, kv.version), (&b"1"[..], 9, 2));
    let keep_lease = PutRequest { ignore_lease: true, prev_kv: true, ..put("a", "2") };
    let Reply::Put(response) = fixture.reply(Op::Put(keep_lease)) else { panic!("a put") };
    assert_eq!(response.prev_kv, Some(kv));
    assert_eq!(fixture.range(get("a", "")).kvs[0].lease, 9);
    fixture.ok(put_op("a", "3"));
    assert!(fixture.reader.lease_keys(9).is_empty(), "lease 0 detaches");
}

#[test]
fn headers_inside_a_transaction() {
    let mut fixture = Fixture::new();
    fixture.ok(put_op("a", "1"));
    let response = fixture.txn(txn(vec![
        range_in("a", 0),
        delete_in("missing"),
        put_in("b", "2"),
        range_in("b", 0),
        delete_in("missing"),
        nested(vec![range_in("a", 0)]),
    ]));
    let mut seen = Vec::new();
    for response in &response.responses {
        seen.push(match response.response.as_ref().expect("each has an answer") {
            Response::ResponseRange(response) => response.header,
            Response::ResponsePut(response) => response.header,
            Response::ResponseDeleteRange(response) => response.header,
            Response::ResponseTxn(response) => response.header,
        });
    }
    let only = |revision| Some(ResponseHeader { revision, ..ResponseHeader::default() });
    assert_eq!(seen, [only(2), only(2), only(3), only(3), only(3), only(0)]);
    assert_eq!(response.header, None, "the caller writes it");
}

#[test]
fn nested_compares_see_the_state_before_the_transaction() {
    let mut fixture = Fixture::new();
    fixture.ok(put_op("a", "old"));
    let inner = TxnRequest {
        compare: vec![value_is("a", "", "old")],
        success: vec![put_in("b", "seen old")],
        failure: vec![put_in("b", "seen new")],
    };
    fixture.txn(txn(vec![put_in("a", "new"), op(Request::RequestTxn(inner))]));
    assert_eq!(fixture.range(get("b", "")).kvs[0].value, "seen old");
    let kvs = fixture.range(get("a", "c")).kvs;
    assert!(kvs.iter().all(|kv| kv.mod_revision == 3), "one revision for all");
}

#[test]
fn compares_of_missing_keys_and_ranges() {
    let mut fixture = Fixture::new();
    let mut holds = |compare: Compare| {
        let request = TxnRequest { compare: vec![compare], ..TxnRequest::default() };
        fixture.txn(request).succeeded
    };
    let zero = |target: CompareTarget, union| Compare {
        result: CompareResult::Equal as i32,
        target: target as i32,
        key: bytes("x"),
        range_end: bytes(""),
        target_union: union,
    };
    assert!(holds(zero(CompareTarget::Version, Some(TargetUnion::Version(0)))));
    assert!(holds(zero(CompareTarget::Lease, None)), "a missing operand is 0");
    assert!(holds(zero(CompareTarget::Create, Some(TargetUnion::Version(7)))), "so is a wrong one");
    for result in 0..4 {
        assert!(!holds(Compare { result, ..value_is("x", "", "") }), "a missing value");
        assert!(!holds(Compare { result, ..value_is("x", "z", "") }), "an empty range");
    }
    fixture.ok(put_op("x1", "v"));
    fixture.ok(put_op("x2", "v"));
    let mut holds = |compare: Compare| {
        let request = TxnRequest { compare: vec![compare], ..TxnRequest::default() };
        fixture.txn(request).succeeded
    };
    assert!(holds(value_is("x", "y", "v")), "every key of the range");
    assert!(!holds(value_is("x", "y", "w")));
    assert!(holds(Compare { result: 17, ..value_is("x1", "", "w") }), "an unknown result");
}

#[test]
fn a_failed_check_refuses_the_whole_transaction() {
    let mut fixture = Fixture::new();
    fixture.ok(put_op("a", "1"));
    fixture.ok(compact_op(2));
    let cases = [
        (op(Request::RequestPut(PutRequest { lease: 4, ..put("c", "") })), Error::LeaseNotFound),
        (
            op(Request::RequestPut(PutRequest { ignore_value: true, ..put("b", "") })),
            Error::KeyNotFound,
        ),
        (range_in("a", 3), Error::FutureRevision),
        (range_in("a", 1), Error::Compacted),
        (range_in("a", -5), Error::Compacted),
    ];
    for (operation, error) in cases {
        let request = txn(vec![put_in("b", "x"), nested(vec![operation])]);
        assert_eq!(fixture.refused(Op::Txn(request)), error);
    }
    assert_eq!(fixture.reader.revision(), 2);
    assert_eq!(fixture.range(get("b", "")).count, 0);
}

#[test]
fn a_negative_revision_is_free_until_the_first_compaction() {
    let mut fixture = Fixture::new();
    fixture.ok(put_op("a", "1"));
    let read = || txn(vec![range_in("a", -1)]);
    assert!(fixture.reader.txn_read_only(&read()).is_ok());
    let too_low = txn(vec![range_in("a", -5)]);
    assert_eq!(fixture.reader.txn_read_only(&too_low).expect_err("refused"), Error::Compacted);
    fixture.ok(compact_op(1));
    assert_eq!(fixture.reader.txn_read_only(&read()).expect_err("refused"), Error::Compacted);
    assert_eq!(fixture.range(RangeRequest { revision: -7, ..get("a", "") }).count, 1);
}

#[test]
fn siblings_may_put_and_delete_one_key_in_one_revision() {
    let mut fixture = Fixture::new();
    fixture.ok(put_op("k", "old"));
    fixture.txn(txn(vec![nested(vec![put_in("k", "new")]), nested(vec![delete_in("k")])]));
    let check = |fixture: &Fixture| {
        let changes = fixture.reader.changes(3, 10, 1000).expect("readable");
        let events = &changes.batches[0].events;
        let kinds: Vec<_> = events.iter().map(|event| event.kind).collect();
        assert_eq!(kinds, [EventType::Put, EventType::Delete]);
        for event in events {
            let prev = event.prev_kv.as_ref().expect("the state one revision earlier");
            assert_eq!(prev.value, "old");
        }
        assert_eq!(fixture.range(get("k", "")).count, 0);
        assert_eq!(fixture.range(RangeRequest { revision: 2, ..get("k", "") }).kvs[0].value, "old");
    };
    check(&fixture);
    fixture.reopen();
    check(&fixture);
}

#[test]
fn an_empty_operation_never_panics() {
    let mut fixture = Fixture::new();
    let response = fixture.txn(txn(vec![RequestOp { request: None }, put_in("", "empty key")]));
    assert_eq!(response.responses.len(), 2);
    assert!(response.responses[0].response.is_none());
    assert_eq!(fixture.range(get("", "\0")).count, 1);
    fixture.reopen();
    assert_eq!(fixture.range(get("", "\0")).kvs[0].value, "empty key");
}

#[test]
fn revoking_deletes_all_keys_in_one_revision_and_in_key_order() {
    let mut fixture = Fixture::new();
    fixture.ok(grant_op(-3));
    for key in ["c", "a", "b"] {
        fixture.ok(Op::Put(PutRequest { lease: -3, ..put(key, "v") }));
    }
    fixture.reopen();
    assert_eq!(fixture.reader.lease_keys(-3), ["a", "b", "c"], "attachments come from the keys");
    assert_eq!(fixture.ok(revoke_op(-3)), 5);
    let Recent::Batches(batches) = fixture.reader.feed().recent(4) else { panic!("just made") };
    let keys: Vec<_> = batches[0].events.iter().map(|event| event.kv.key.clone()).collect();
    assert_eq!((batches.len(), keys), (1, vec![bytes("a"), bytes("b"), bytes("c")]));
    assert!(batches[0].events.iter().all(|event| event.prev_kv.is_some()));
    assert_eq!(fixture.refused(revoke_op(-3)), Error::LeaseNotFound);
}

#[test]
fn grants_and_checkpoints() {
    let mut fixture = Fixture::new();
    let mut changes = fixture.reader.lease_changes();
    let Reply::LeaseGrant(response) = fixture.reply(grant_op(7)) else { panic!("a grant") };
    assert_eq!((response.id, response.ttl), (7, 60));
    assert!(changes.has_changed().expect("open"));
    changes.mark_unchanged();
    assert_eq!(fixture.refused(grant_op(7)), Error::LeaseExists);
    assert_eq!(fixture.refused(grant_op(0)), Error::LeaseNotFound);
    let long = LeaseGrantRequest { id: 8, ttl: 9_000_000_001 };
    assert_eq!(fixture.refused(Op::LeaseGrant(long)), Error::LeaseTtlTooLarge);
    assert!(!changes.has_changed().expect("open"), "refusals are no change");
    let points =
        [(7, 22), (99, 5)].map(|(id, remaining_ttl)| LeaseCheckpoint { id, remaining_ttl });
    fixture.ok(Op::LeaseCheckpoint(LeaseCheckpointRequest { checkpoints: points.into() }));
    fixture.reopen();
    assert_eq!(fixture.reader.leases(), [LeaseRow { id: 7, ttl: 60, remaining_ttl: 22 }]);
}

fn alarm_op(action: i32, member_id: u64, alarm: AlarmType) -> Op {
    Op::Alarm(AlarmRequest { action, member_id, alarm: alarm as i32 })
}

#[test]
fn alarms_refuse_what_they_should_and_no_more() {
    let mut fixture = Fixture::new();
    fixture.ok(put_op("a", "1"));
    fixture.ok(put_op("b", "1"));
    fixture.ok(grant_op(4));
    fixture.ok(alarm_op(1, 11, AlarmType::Nospace));
    fixture.reopen();
    let nospace = AlarmMember { member_id: 11, alarm: AlarmType::Nospace as i32 };
    assert_eq!(fixture.reader.alarms(), [nospace]);
    assert_eq!(fixture.refused(put_op("a", "2")), Error::NoSpace);
    assert_eq!(fixture.refused(grant_op(5)), Error::NoSpace);
    let mut puts_on_failure = txn(vec![]);
    puts_on_failure.failure = vec![nested(vec![put_in("a", "2")])];
    assert_eq!(fixture.refused(Op::Txn(puts_on_failure)), Error::NoSpace, "either branch counts");
    fixture.ok(Op::Txn(txn(vec![delete_in("b")])));
    fixture.ok(delete_op("a", ""));
    fixture.ok(compact_op(3));
    fixture.ok(alarm_op(1, 12, AlarmType::Corrupt));
    for op in [put_op("a", ""), delete_op("a", ""), compact_op(4), grant_op(6), revoke_op(4)] {
        assert_eq!(fixture.refused(op), Error::Corrupt);
    }
    assert_eq!(fixture.refused(Op::Txn(txn(vec![range_in("a", 0)]))), Error::Corrupt);
    assert!(fixture.reader.txn_read_only(&txn(vec![range_in("a", 0)])).is_ok());
    let Reply::Alarm(listed) = fixture.reply(alarm_op(0, 0, AlarmType::None)) else {
        panic!("alarms")
    };
    assert_eq!(listed.alarms.len(), 2);
    let Reply::Alarm(off) = fixture.reply(alarm_op(2, 12, AlarmType::Corrupt)) else {
        panic!("alarms")
    };
    assert_eq!(off.alarms.len(), 1);
    let Reply::Alarm(off) = fixture.reply(alarm_op(2, 12, AlarmType::Corrupt)) else {
        panic!("alarms")
    };
    assert!(off.alarms.is_empty(), "it was off");
    fixture.ok(alarm_op(2, 11, AlarmType::Nospace));
    fixture.ok(put_op("a", "3"));
}

#[test]
fn members_are_added_published_and_never_come_back() {
    let mut fixture = Fixture::new();
    let member =
        |id: u64| Member { id, peer_ur_ls: vec![format!("http://{id}")], ..Member::default() };
    let change = MembersChange { put: vec![member(2), member(1)], remove: vec![] };
    let id = LogId { term: 1, index: 1 };
    let store = fixture.store.as_mut().expect("open");
    store.apply_membership(id, bytes("raft's own"), Some(&change)).expect("applies");
    fixture.index = 1;
    let publish = |id: u64| {
        Op::MemberPublish(MemberPublish {
            id,
            name: format!("m{id}"),
            client_urls: vec!["http://c".into()],
            storage_uuid: bytes("uuid"),
        })
    };
    fixture.ok(publish(1));
    fixture.ok(publish(77));
    fixture.ok(Op::ClusterVersionSet(ClusterVersionSet { version: "3.6.0".into() }));
    let removal = MembersChange { put: vec![], remove: vec![2] };
    let Reply::Members(left) = fixture.reply(Op::MembersChange(removal)) else { panic!("members") };
    assert_eq!(left.iter().map(|member| member.id).collect::<Vec<_>>(), [1]);
    let back = MembersChange { put: vec![member(2)], remove: vec![] };
    fixture.ok(Op::MembersChange(back));
    fixture.reopen();
    let members = fixture.reader.members();
    assert_eq!((members.len(), members[0].name.as_str()), (1, "m1"));
    assert_eq!(fixture.reader.removed_members(), [2]);
    assert_eq!(fixture.reader.storage_uuid(1), Some(bytes("uuid")));
    assert_eq!(fixture.reader.cluster_version().as_deref(), Some("3.6.0"));
    assert_eq!(fixture.reader.membership(), Some((id, bytes("raft's own"))));
    assert_eq!(fixture.reader.revision(), 1, "none of it touches the keys");
}

#[test]
fn entries_apply_once_and_in_order() {
    let mut fixture = Fixture::new();
    fixture.entry(vec![]);
    assert_eq!(fixture.reader.applied(), LogId { term: 1, index: 1 });
    let store = fixture.store.as_mut().expect("open");
    assert!(store.apply(LogId { term: 2, index: 1 }, &[]).is_err(), "index 1 is applied");
    assert!(store.apply(LogId { term: 2, index: 2 }, &[]).is_ok());
}
