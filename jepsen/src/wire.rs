//! Recorded calls as messages of the protocol, and answers back as plain data. It opens no
//! connection and decides nothing.

use kelson_api::etcdserverpb as pb;
use kelson_api::mvccpb;
use pb::compare::{CompareResult, CompareTarget, TargetUnion};
use pb::range_request::{SortOrder, SortTarget};
use pb::{request_op, response_op};

use crate::call::{Compare, Field, Is, MemberRow, Operand, Part, Range, Txn, TxnOp};
use crate::history::{Event, Row};

/// Values up to this length are recorded as they are.
const LONG: usize = 1024;

/// A value of this many bytes that a record can name in a few: it is sent with filling.
pub(crate) fn long_value(name: &str, len: usize) -> String {
    format!("{name}~{len}~")
}

/// A recorded value as it is sent.
pub(crate) fn bytes_of(value: &str) -> Vec<u8> {
    let mut bytes = value.as_bytes().to_vec();
    if let Some(len) = length(value) {
        bytes.resize(len.max(bytes.len()), b'x');
    }
    bytes
}

/// The length in a value that ends like those of `long_value`.
fn length(value: &str) -> Option<usize> {
    value.strip_suffix('~')?.rsplit_once('~')?.1.parse().ok()
}

/// A value as it is recorded. One that was sent with filling and came back with all of it gets its
/// short name again; anything else stays as it is, so that damage shows.
fn text_of(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes).into_owned();
    if bytes.len() <= LONG {
        return text;
    }
    let name = text.trim_end_matches('x');
    if bytes_of(name) == bytes { name.to_owned() } else { text }
}

pub(crate) fn row(kv: &mvccpb::KeyValue) -> Row {
    Row {
        key: String::from_utf8_lossy(&kv.key).into_owned(),
        value: text_of(&kv.value),
        create: kv.create_revision,
        modified: kv.mod_revision,
        version: kv.version,
        lease: kv.lease,
    }
}

pub(crate) fn event(event: &mvccpb::Event) -> Event {
    let kv = event.kv.clone().unwrap_or_default();
    let deleted = event.r#type == mvccpb::event::EventType::Delete as i32;
    Event {
        revision: kv.mod_revision,
        key: String::from_utf8_lossy(&kv.key).into_owned(),
        put: (!deleted).then(|| row(&kv)),
        before: event.prev_kv.as_ref().map(row),
    }
}

pub(crate) fn put(key: &str, value: &str, lease: i64) -> pb::PutRequest {
    pb::PutRequest {
        key: key.to_owned().into(),
        value: bytes_of(value).into(),
        lease,
        ..Default::default()
    }
}

pub(crate) fn range(range: &Range) -> pb::RangeRequest {
    let (order, target) = range.sort.map_or((SortOrder::None, Field::Key), |(field, down)| {
        (if down { SortOrder::Descend } else { SortOrder::Ascend }, field)
    });
    let target = match target {
        Field::Key => SortTarget::Key,
        Field::Version => SortTarget::Version,
        Field::Create => SortTarget::Create,
        Field::Mod => SortTarget::Mod,
        Field::Value => SortTarget::Value,
    };
    pb::RangeRequest {
        key: range.key.clone().into(),
        range_end: range.end.clone().into(),
        limit: range.limit,
        revision: range.revision,
        sort_order: order as i32,
        sort_target: target as i32,
        serializable: range.serializable,
        keys_only: range.keys_only,
        count_only: range.count_only,
        min_mod_revision: range.modified.0,
        max_mod_revision: range.modified.1,
        min_create_revision: range.created.0,
        max_create_revision: range.created.1,
    }
}

pub(crate) fn txn(txn: &Txn) -> pb::TxnRequest {
    pb::TxnRequest {
        compare: txn.compare.iter().map(compare).collect(),
        success: txn.success.iter().map(step).collect(),
        failure: txn.failure.iter().map(step).collect(),
    }
}

fn compare(compare: &Compare) -> pb::Compare {
    let (target, operand) = match &compare.to {
        Operand::Version(number) => (CompareTarget::Version, TargetUnion::Version(*number)),
        Operand::Create(number) => (CompareTarget::Create, TargetUnion::CreateRevision(*number)),
        Operand::Mod(number) => (CompareTarget::Mod, TargetUnion::ModRevision(*number)),
        Operand::Lease(number) => (CompareTarget::Lease, TargetUnion::Lease(*number)),
        Operand::Value(text) => (CompareTarget::Value, TargetUnion::Value(bytes_of(text).into())),
    };
    let result = match compare.is {
        Is::Equal => CompareResult::Equal,
        Is::Unequal => CompareResult::NotEqual,
        Is::Greater => CompareResult::Greater,
        Is::Less => CompareResult::Less,
    };
    pb::Compare {
        result: result as i32,
        target: target as i32,
        key: compare.key.clone().into(),
        range_end: compare.end.clone().into(),
        target_union: Some(operand),
    }
}

fn step(step: &TxnOp) -> pb::RequestOp {
    use request_op::Request;
    let request = match step {
        TxnOp::Put { key, value, lease } => Request::RequestPut(put(key, value, *lease)),
        TxnOp::Delete { key, end } => Request::RequestDeleteRange(pb::DeleteRangeRequest {
            key: key.clone().into(),
            range_end: end.clone().into(),
            prev_kv: true,
        }),
        TxnOp::Range(asked) => Request::RequestRange(range(asked)),
        TxnOp::Txn(inner) => Request::RequestTxn(txn(inner)),
    };
    pb::RequestOp { request: Some(request) }
}

pub(crate) fn part(response: &pb::ResponseOp) -> Part {
    use response_op::Response;
    match &response.response {
        Some(Response::ResponseDeleteRange(deleted)) => {
            Part::Delete { rows: deleted.prev_kvs.iter().map(row).collect() }
        }
        Some(Response::ResponseRange(range)) => Part::Range {
            rows: range.kvs.iter().map(row).collect(),
            count: range.count,
            more: range.more,
        },
        Some(Response::ResponseTxn(inner)) => Part::Txn {
            succeeded: inner.succeeded,
            parts: inner.responses.iter().map(part).collect(),
        },
        Some(Response::ResponsePut(_)) => Part::Put,
        // No step answers with nothing; a transaction of nothing fits no request that is sent.
        None => Part::Txn { succeeded: false, parts: Vec::new() },
    }
}

pub(crate) fn members(members: &[pb::Member]) -> Vec<MemberRow> {
    let member = |member: &pb::Member| MemberRow {
        id: member.id,
        url: member.peer_ur_ls.join(","),
        learner: member.is_learner,
    };
    members.iter().map(member).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_value_comes_back_under_its_name_only_when_whole() {
        let value = long_value("7.3", 60_000);
        let mut bytes = bytes_of(&value);
        assert_eq!(bytes.len(), 60_000);
        assert_eq!(text_of(&bytes), value);
        bytes.pop();
        assert_ne!(text_of(&bytes), value);
        assert_eq!(bytes_of("7.3"), b"7.3");
    }
}
