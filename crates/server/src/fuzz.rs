//! The bodies of the fuzz targets `wire_to_command` and `gateway_json`: bytes of a client as a request,
//! and what becomes of it before it is agreed on. They promise that no bytes make the checks panic,
//! that what passes them survives the way through the log, and that what the JSON gateway reads it
//! shows in a form that it reads again.

use kelson_api::Message;
use kelson_api::command::command::Op;
use kelson_api::command::{Batch, Command};
use kelson_api::etcdserverpb::{
    AlarmRequest, CompactionRequest, DeleteRangeRequest, LeaseGrantRequest, LeaseRevokeRequest,
    PutRequest, RangeRequest, TxnRequest,
};

use crate::callers;
use crate::gateway::values::Values;
use crate::gateway::{json, read, routes};
use crate::housekeeping::quota;
use crate::jwt;
use crate::limits::Limits;
use crate::validate;

/// Reads bytes as the request that the first of them names, and gives the command that a member
/// would propose for it; `None` if it is refused or only reads.
///
/// # Panics
/// A promise above is broken.
#[must_use]
pub fn wire_to_command(data: &[u8]) -> Option<Command> {
    let (&kind, bytes) = data.split_first()?;
    let op = op(kind % 8, bytes)?;
    let command = Command { op: Some(op), ..Command::default() };
    let batch = Batch { commands: vec![command] };
    assert_eq!(Batch::decode(batch.encode_to_vec().as_slice()).as_ref(), Ok(&batch), "as logged");
    batch.commands.into_iter().next()
}

/// Reads bytes as the credentials of a call: as a header, as a token of each kind, and as the files
/// with keys that signed tokens are checked by.
///
/// # Panics
/// Something was believed that nobody has signed.
pub fn auth_token(data: &[u8]) {
    let Some((&kind, bytes)) = data.split_first() else { return };
    let name = if kind % 2 == 0 { "token" } else { "authorization" };
    if let Ok(value) = tonic::metadata::AsciiMetadataValue::try_from(bytes) {
        let mut metadata = tonic::metadata::MetadataMap::new();
        metadata.insert(name, value);
        let token = callers::token_in(&metadata);
        assert!(token.is_some(), "a header is a token");
        let token = token.unwrap_or_default();
        let index = callers::index_in(&token);
        assert!(index.is_none() || token.contains('.'), "an index stands behind a point");
    }
    jwt::fuzz(bytes);
}

/// Longest JSON value that [`gateway_json`] takes.
const VALUE_BYTES_MAX: usize = 1 << 20;

/// Reads bytes as the body of a request to the JSON gateway: the first names the path, the second
/// how the body is cut. Gives the number of requests that were read out of it.
///
/// # Panics
/// A promise above is broken.
#[must_use]
pub fn gateway_json(data: &[u8]) -> usize {
    let [path, size, body @ ..] = data else { return 0 };
    let message = &routes::nth(usize::from(*path)).input;
    let values = values_of(body, usize::from(*size) + 1);
    assert_eq!(values, values_of(body, body.len().max(1)), "however the body is cut");
    let mut requests = 0;
    for value in values {
        let is_json = serde_json::from_slice::<serde::de::IgnoredAny>(&value);
        assert!(is_json.is_ok(), "no JSON was let through: {value:?}");
        let Ok(bytes) = read::to_protobuf(message, &value) else { continue };
        let shown = json::to_json(message, bytes.clone()).expect("what was read can be shown");
        let again =
            read::to_protobuf(message, shown.as_bytes()).expect("what is shown can be read");
        assert_eq!(again, bytes, "nothing is lost");
        requests += 1;
    }
    requests
}

fn values_of(body: &[u8], size: usize) -> Vec<bytes::Bytes> {
    let mut values = Values::new(VALUE_BYTES_MAX);
    let mut found = Vec::new();
    for piece in body.chunks(size) {
        values.push(piece);
        loop {
            match values.next() {
                Ok(Some(value)) => found.push(value),
                Ok(None) => break,
                Err(_) => return found,
            }
        }
    }
    found.extend(values.end().ok().flatten());
    found
}

fn op(kind: u8, bytes: &[u8]) -> Option<Op> {
    Some(match kind {
        0 => {
            let request = PutRequest::decode(bytes).ok()?;
            assert!(quota::put_cost(&request) > 0);
            validate::put(&request).ok()?;
            Op::Put(request)
        }
        1 => {
            let request = DeleteRangeRequest::decode(bytes).ok()?;
            validate::delete_range(&request).ok()?;
            Op::DeleteRange(request)
        }
        2 => {
            let request = TxnRequest::decode(bytes).ok()?;
            let cost = quota::txn_cost(&request);
            validate::txn(&request, Limits::default().max_txn_ops).ok()?;
            if validate::is_read_only(&request) {
                assert_eq!(cost, 0, "reading costs nothing");
                return None;
            }
            Op::Txn(request)
        }
        3 => {
            let request = RangeRequest::decode(bytes).ok()?;
            let streams = validate::range_stream(&request).is_ok();
            assert!(!streams || validate::range(&request).is_ok(), "streams are stricter");
            return None;
        }
        4 => Op::Compaction(CompactionRequest::decode(bytes).ok()?),
        5 => Op::LeaseGrant(LeaseGrantRequest::decode(bytes).ok()?),
        6 => Op::LeaseRevoke(LeaseRevokeRequest::decode(bytes).ok()?),
        _ => Op::Alarm(AlarmRequest::decode(bytes).ok()?),
    })
}
