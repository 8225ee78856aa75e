//! One revision of the source becomes one transaction of the target: the same changes in the same
//! order, so that it gets the same number. Anything else ends the mirror, since from then on no
//! revision would mean the same on both sides.

use std::time::Instant;

use kelson_api::etcdserverpb::{
    DeleteRangeRequest, PutRequest, RequestOp, TxnRequest, request_op::Request as Op,
};
use kelson_api::mvccpb::{Event, event::EventType};
use tonic::Code;

use super::door::Door;

/// Deletions of one revision beyond which neighbors are deleted as a range: clients of the source may
/// delete thousands of keys by one call.
const MANY: usize = 64;

/// Carries out what happened at a revision of the source.
///
/// # Errors
/// The target did not take it, or gave it another number.
pub(super) async fn apply(
    target: &mut Door,
    revision: i64,
    events: &[Event],
) -> Result<(), String> {
    let request =
        TxnRequest { success: operations(target, events).await?, ..TxnRequest::default() };
    let since = Instant::now();
    loop {
        let status = match target.kv().txn(Door::timed(request.clone())).await {
            Ok(reply) => {
                let became = reply.into_inner().header.map_or(0, |header| header.revision);
                return expect(target, became, revision);
            }
            Err(status) => status,
        };
        if let Some(fix) = fix(status.message()) {
            return Err(target.text(&format!(
                "does not take revision {revision} ({} changes): {}; {fix}",
                events.len(),
                status.message()
            )));
        }
        let is_unknown = status.code() != Code::Unauthenticated;
        target.again(&status, since).await?;
        // It may have been carried out although the answer was lost.
        if is_unknown {
            let stands = target.revision().await?;
            if stands != revision - 1 {
                return expect(target, stands, revision);
            }
        }
    }
}

fn expect(target: &Door, became: i64, revision: i64) -> Result<(), String> {
    if became == revision {
        return Ok(());
    }
    Err(target.text(&format!(
        "revision {revision} of the source became {became}: somebody else writes to the target. \
         Restore a snapshot of the source into it and begin again"
    )))
}

/// What the operator can do about limits of the target.
fn fix(message: &str) -> Option<&'static str> {
    let limits = [
        ("too many operations", "start its members with a larger --max-txn-ops"),
        ("request is too large", "start its members with a larger --max-request-bytes"),
        ("space exceeded", "start its members with a larger --quota-backend-bytes"),
    ];
    limits.iter().find(|(text, _)| message.contains(text)).map(|(_, fix)| *fix)
}

async fn operations(target: &mut Door, events: &[Event]) -> Result<Vec<RequestOp>, String> {
    let mut operations = Vec::new();
    let mut rest = events;
    while let Some(event) = rest.first() {
        let deletions = rest.iter().take_while(|event| is_deletion(event)).count();
        if deletions > MANY {
            let (run, behind) = rest.split_at(deletions);
            operations.extend(deletions_of(target, run).await?);
            rest = behind;
        } else {
            operations.push(operation(event));
            rest = &rest[1..];
        }
    }
    Ok(operations)
}

fn is_deletion(event: &Event) -> bool {
    event.r#type() == EventType::Delete
}

fn key(event: &Event) -> &[u8] {
    event.kv.as_ref().map_or(&[], |kv| &kv.key)
}

fn operation(event: &Event) -> RequestOp {
    let kv = event.kv.clone().unwrap_or_default();
    let op = if is_deletion(event) {
        Op::RequestDeleteRange(DeleteRangeRequest { key: kv.key, ..DeleteRangeRequest::default() })
    } else {
        let (key, value, lease) = (kv.key, kv.value, kv.lease);
        Op::RequestPut(PutRequest { key, value, lease, ..PutRequest::default() })
    };
    RequestOp { request: Some(op) }
}

/// Deletions in as few ranges as hold these keys and no other.
async fn deletions_of(target: &mut Door, events: &[Event]) -> Result<Vec<RequestOp>, String> {
    let mut operations = Vec::new();
    // Parts that wait, the next one last; halved until one is a range.
    let mut parts = vec![events];
    while let Some(part) = parts.pop() {
        let [first, .., last] = part else {
            operations.extend(part.iter().map(operation));
            continue;
        };
        // A range deletes in the order of keys, which must be the order of the source.
        let ascends = part.windows(2).all(|pair| key(&pair[0]) < key(&pair[1]));
        let end = [key(last), b"\0"].concat();
        if ascends && target.count(key(first), &end).await? == part.len() as i64 {
            let range = DeleteRangeRequest {
                key: key(first).to_vec().into(),
                range_end: end.into(),
                ..DeleteRangeRequest::default()
            };
            operations.push(RequestOp { request: Some(Op::RequestDeleteRange(range)) });
        } else {
            let (front, back) = part.split_at(part.len() / 2);
            parts.extend([back, front]);
        }
    }
    Ok(operations)
}
