//! Keeps the store within its quota: what a request costs, whether it still fits, and the alarm
//! that stops further writes when it does not. The alarm is a command like any other; whether it
//! refuses a write is decided where the write is applied.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use kelson_api::Error;
use kelson_api::command::command::Op;
use kelson_api::etcdserverpb::alarm_request::AlarmAction;
use kelson_api::etcdserverpb::request_op::Request;
use kelson_api::etcdserverpb::{AlarmRequest, AlarmType, PutRequest, RequestOp, TxnRequest};
use kelson_raft::Node;
use kelson_storage::Reader;

/// What a key needs beside its own bytes. Unit: bytes.
const KEY_OVERHEAD: usize = 256;

/// What a lease needs. Unit: bytes.
pub const LEASE_COST: i64 = 64;

/// How old the size on disk may be when a request is measured against it: finding it out walks a
/// directory, and the files grow in steps of a checkpoint anyway. Unit: milliseconds.
const SAMPLE_MS: u64 = 500;

/// How often a member looks at its own disk.
const GUARD_INTERVAL: Duration = Duration::from_secs(2);

/// Bytes that a put adds.
#[must_use]
pub fn put_cost(request: &PutRequest) -> i64 {
    let bytes = KEY_OVERHEAD + request.key.len() + request.value.len();
    i64::try_from(bytes).unwrap_or(i64::MAX)
}

/// Bytes that a transaction adds at most: the dearer of its branches.
#[must_use]
pub fn txn_cost(request: &TxnRequest) -> i64 {
    branch_cost(&request.success).max(branch_cost(&request.failure))
}

fn branch_cost(ops: &[RequestOp]) -> i64 {
    let costs = ops.iter().map(|op| match &op.request {
        Some(Request::RequestPut(request)) => put_cost(request),
        Some(Request::RequestTxn(request)) => txn_cost(request),
        Some(Request::RequestRange(_) | Request::RequestDeleteRange(_)) | None => 0,
    });
    costs.fold(0, i64::saturating_add)
}

/// The quota of this member.
pub struct Quota {
    node: Node,
    reader: Reader,
    limit: i64,
    size: Sampled,
}

impl Quota {
    /// A quota of `limit` bytes on disk; 0 or less means none.
    #[must_use]
    pub fn new(node: Node, reader: Reader, limit: i64) -> Self {
        Self { node, reader, limit, size: Sampled::new() }
    }

    /// Lets a request of this cost pass, or raises this member's alarm.
    ///
    /// # Errors
    /// `NoSpace` when the request does not fit; why the alarm could not be raised, if so.
    pub async fn admit(&self, cost: i64) -> Result<(), Error> {
        let look = || self.reader.sizes().total;
        if self.limit <= 0 || fits(self.limit, self.size.get(look), cost) {
            return Ok(());
        }
        // A defragmentation may have made room since the last look.
        if !is_raised(&self.node, &self.reader) && fits(self.limit, self.size.renew(look), cost) {
            return Ok(());
        }
        raise(&self.node, &self.reader).await?;
        Err(Error::NoSpace)
    }

    /// Looks again at a request that has been agreed on and applied: others may have used the room
    /// that it was let in for. It stays applied; the caller learns that the store is full, as with
    /// etcd.
    ///
    /// # Errors
    /// `NoSpace` when the request does not fit any more.
    pub async fn admit_applied(&self, cost: i64) -> Result<(), Error> {
        self.admit(cost).await.map_err(|_| Error::NoSpace)
    }
}

/// A number that is dear to find out and may be a little old.
struct Sampled {
    start: Instant,
    /// When the next caller looks again. Unit: milliseconds after `start`.
    due: AtomicU64,
    value: OnceLock<AtomicI64>,
}

impl Sampled {
    fn new() -> Self {
        Self { start: Instant::now(), due: AtomicU64::new(SAMPLE_MS), value: OnceLock::new() }
    }

    fn get(&self, look: impl Fn() -> i64) -> i64 {
        let value = self.value.get_or_init(|| AtomicI64::new(look()));
        let now = u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX);
        let due = self.due.load(Ordering::Relaxed);
        // Whoever moves the time looks; the others go on with the old value.
        let next = now.saturating_add(SAMPLE_MS);
        let moved =
            |next| self.due.compare_exchange(due, next, Ordering::Relaxed, Ordering::Relaxed);
        if now >= due && moved(next).is_ok() {
            value.store(look(), Ordering::Relaxed);
        }
        value.load(Ordering::Relaxed)
    }

    fn renew(&self, look: impl Fn() -> i64) -> i64 {
        let size = look();
        self.value.get_or_init(|| AtomicI64::new(size)).store(size, Ordering::Relaxed);
        size
    }
}

fn fits(limit: i64, size: i64, cost: i64) -> bool {
    limit <= 0 || cost == 0 || size.saturating_add(cost) < limit
}

/// Whether the alarm of this member is on.
fn is_raised(node: &Node, reader: &Reader) -> bool {
    let (member_id, alarm) = (node.status().member_id, AlarmType::Nospace as i32);
    reader.alarms().iter().any(|on| on.member_id == member_id && on.alarm == alarm)
}

/// Raises the alarm of this member unless it is on already.
async fn raise(node: &Node, reader: &Reader) -> Result<(), Error> {
    if is_raised(node, reader) {
        return Ok(());
    }
    let (member_id, alarm) = (node.status().member_id, AlarmType::Nospace as i32);
    tracing::warn!(
        "raising the NOSPACE alarm: the store has reached its quota or the disk is full"
    );
    let action = AlarmAction::Activate as i32;
    let request = AlarmRequest { action, member_id, alarm };
    node.propose_urgent(Op::Alarm(request)).await?.result.map(drop)
}

/// Raises the alarm while there is still room to agree on it: when the disk is nearly full or the
/// log cannot be extended. Clearing it is the operator's decision.
pub(super) async fn guard(node: Node, reader: Reader) {
    let mut tick = tokio::time::interval(GUARD_INTERVAL);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        if node.log().can_grow() && !reader.disk_low() {
            continue;
        }
        if let Err(error) = raise(&node, &reader).await {
            tracing::warn!(%error, "the NOSPACE alarm could not be raised");
        }
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    fn put(key: &'static str, value: &'static str) -> PutRequest {
        PutRequest {
            key: Bytes::from_static(key.as_bytes()),
            value: Bytes::from_static(value.as_bytes()),
            ..Default::default()
        }
    }

    fn op(request: Request) -> RequestOp {
        RequestOp { request: Some(request) }
    }

    #[test]
    fn a_put_costs_its_bytes_and_a_fixed_share() {
        assert_eq!(put_cost(&put("", "")), 256);
        assert_eq!(put_cost(&put("abc", "12345")), 264);
    }

    #[test]
    fn a_transaction_costs_its_dearer_branch() {
        let nested = TxnRequest {
            failure: vec![op(Request::RequestPut(put("k", "v")))],
            ..Default::default()
        };
        let request = TxnRequest {
            compare: Vec::new(),
            success: vec![op(Request::RequestPut(put("a", "1"))), op(Request::RequestTxn(nested))],
            failure: vec![op(Request::RequestDeleteRange(Default::default()))],
        };
        assert_eq!(txn_cost(&request), 2 * 258);
        let reading = TxnRequest {
            success: vec![op(Request::RequestRange(Default::default()))],
            ..Default::default()
        };
        assert_eq!(txn_cost(&reading), 0);
    }

    #[test]
    fn the_size_is_looked_up_once_per_interval() {
        let looked = std::cell::Cell::new(0);
        let look = || {
            looked.set(looked.get() + 1);
            looked.get()
        };
        let mut sampled = Sampled::new();
        assert_eq!((sampled.get(look), sampled.get(look)), (1, 1));
        // As if the interval were over.
        sampled.due = AtomicU64::new(0);
        assert_eq!(sampled.get(look), 2);
        assert!(sampled.due.load(Ordering::Relaxed) >= SAMPLE_MS);
    }

    #[test]
    fn a_size_that_refuses_is_looked_up_again() {
        let sampled = Sampled::new();
        assert_eq!(sampled.get(|| 900), 900);
        assert_eq!(sampled.get(|| 100), 900, "not old enough");
        assert_eq!(sampled.renew(|| 100), 100);
        assert_eq!(sampled.get(|| 500), 100, "what was found stays known");
    }

    #[test]
    fn a_request_must_leave_the_size_below_the_quota() {
        assert!(fits(1000, 742, 257));
        assert!(!fits(1000, 743, 257));
        assert!(fits(1000, 5000, 0), "what adds nothing always fits");
        assert!(fits(0, i64::MAX, 257), "no quota");
        assert!(fits(-1, i64::MAX, 257), "no quota");
        assert!(!fits(1000, i64::MAX, 257));
    }
}
