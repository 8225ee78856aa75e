//! What a run does: its operations, the state that each must leave, and the steps around them
//! (votes, purges, restarts and so on). All of it follows from the seed and the number of operations,
//! so every process of an enumeration makes the same plan. It does no I/O.

use bytes::Bytes;
use kelson_api::Message;
use kelson_api::command::command::Op;
use kelson_api::command::{Batch, Command};
use kelson_api::etcdserverpb::compare::{CompareResult, CompareTarget, TargetUnion};
use kelson_api::etcdserverpb::request_op::Request;
use kelson_api::etcdserverpb::{
    CompactionRequest, Compare, DeleteRangeRequest, LeaseGrantRequest, LeaseRevokeRequest,
    PutRequest, RequestOp, TxnRequest,
};

use crate::model::{Model, State};
use crate::rng::Rng;

/// Keys that operations draw from.
const KEYS: u64 = 40;
/// Bytes of a large value: a segment of the log takes few of them.
const LARGE_VALUE: usize = 40_000;
/// Operations that a received state is ahead.
const JUMP: usize = 20;
/// A plan with fewer operations has no large values and no received state.
const FULL_PLAN: usize = 100;
/// Large values before a rewrite of the state: it must free more than 4 MiB.
const BULK: usize = 150;

/// Size of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scale {
    /// Decides everything that is drawn.
    pub seed: u64,
    /// Number of operations.
    pub operations: usize,
}

/// One step of a run. Operations are numbered from 1, as entries of the log are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Operations from the first to the last, proposed together.
    Operations(usize, usize),
    /// A vote for another term.
    Vote,
    /// So many entries that never become part of the state, and are cut off again.
    Strangers(usize),
    /// Everything applied is to be on disk.
    Settle,
    /// The head of the log goes, up to what is on disk.
    Purge,
    /// The state is rewritten if that is worth it.
    Rewrite,
    /// A state with the operations from the first to the last arrives from elsewhere.
    Install(usize, usize),
    /// The member stops in good order and starts again.
    Restart,
    /// The process ends without warning and another one starts.
    Die,
}

/// What a run does and what it must lead to.
pub struct Plan {
    /// The operations; the first one is number 1.
    pub operations: Vec<Op>,
    /// The state after each operation, from none on.
    pub states: Vec<State>,
    /// All revisions.
    pub model: Model,
    /// In order.
    pub steps: Vec<Step>,
}

impl Plan {
    /// The plan of a seed.
    pub fn new(scale: Scale) -> Self {
        let mut rng = Rng::fork(scale.seed, 1);
        let mut model = Model::default();
        let mut plan = Self {
            operations: Vec::new(),
            states: vec![model.state().clone()],
            model: Model::default(),
            steps: Vec::new(),
        };
        let bulk = bulk_range(scale.operations);
        for number in 1..=scale.operations {
            let op = if bulk.contains(&number) {
                large_put(&mut rng, number)
            } else if number == bulk.end && !bulk.is_empty() {
                compaction(model.state().revision)
            } else {
                draw(&mut rng, number, model.state())
            };
            model.apply(&op);
            plan.operations.push(op);
            plan.states.push(model.state().clone());
        }
        plan.model = model;
        plan.steps = steps(&mut Rng::fork(scale.seed, 2), scale.operations);
        plan
    }

    /// What the log carries of an operation.
    pub fn payload(&self, number: usize) -> Bytes {
        payload(self.operations[number - 1].clone())
    }
}

/// What the log carries of an operation.
pub fn payload(op: Op) -> Bytes {
    Batch { commands: vec![command(op)] }.encode_to_vec().into()
}

/// An operation that nobody waits for.
pub fn command(op: Op) -> Command {
    Command { op: Some(op), ..Command::default() }
}

/// Where large values are put, over and over, so that the state has much to free.
fn bulk_range(operations: usize) -> std::ops::Range<usize> {
    let start = operations / 2;
    if operations < 4 * BULK { 0..0 } else { start..start + BULK }
}

fn key(number: u64) -> Bytes {
    format!("key/{:02}", number % KEYS).into()
}

/// A value that no other operation writes, and that does not compress.
fn value(rng: &mut Rng, number: usize, len: usize) -> Bytes {
    let mut bytes = format!("{number}:").into_bytes();
    while bytes.len() < len {
        bytes.extend(rng.draw().to_le_bytes());
    }
    bytes.into()
}

fn put(rng: &mut Rng, number: usize, lease: i64) -> PutRequest {
    let len = match rng.below(20) {
        0 => 3_000 + rng.below(12_000),
        _ => 4 + rng.below(200),
    };
    let (key, value) = (key(rng.draw()), value(rng, number, len as usize));
    PutRequest { key, value, lease, ..PutRequest::default() }
}

fn large_put(rng: &mut Rng, number: usize) -> Op {
    let value = value(rng, number, LARGE_VALUE);
    Op::Put(PutRequest { key: key(rng.below(4)), value, ..PutRequest::default() })
}

fn compaction(revision: i64) -> Op {
    Op::Compaction(CompactionRequest { revision, physical: false })
}

fn delete(rng: &mut Rng) -> DeleteRangeRequest {
    let from = rng.below(KEYS);
    let range_end = if rng.below(3) == 0 { key(from + 3) } else { Bytes::new() };
    // A range that wraps around is empty.
    DeleteRangeRequest { key: key(from), range_end, prev_kv: false }
}

fn draw(rng: &mut Rng, number: usize, state: &State) -> Op {
    let leases: Vec<i64> = state.leases.iter().copied().collect();
    let some_lease = |rng: &mut Rng| match leases.as_slice() {
        [] => 0,
        leases => leases[rng.below(leases.len() as u64) as usize],
    };
    match rng.below(100) {
        0..55 => {
            let lease = if rng.below(4) == 0 { some_lease(rng) } else { 0 };
            Op::Put(put(rng, number, lease))
        }
        55..67 => Op::DeleteRange(delete(rng)),
        67..85 => Op::Txn(txn(rng, number, state)),
        85..91 => Op::LeaseGrant(LeaseGrantRequest { id: number as i64, ttl: 1_000 }),
        91..94 => Op::LeaseRevoke(LeaseRevokeRequest { id: some_lease(rng) }),
        // Refused: that lease was never granted.
        94..96 => Op::Put(put(rng, number, -7)),
        _ => {
            let from = state.compacted.max(1);
            let span = (state.revision - from).max(0) as u64;
            compaction(from + 1 + rng.below(span + 1) as i64)
        }
    }
}

fn txn(rng: &mut Rng, number: usize, state: &State) -> TxnRequest {
    let compared = key(rng.draw());
    let found = state.keys.get(&compared).map_or(0, |kv| kv.mod_revision);
    let wanted = if rng.below(4) == 0 { found + 1 } else { found };
    let compare = Compare {
        result: CompareResult::Equal as i32,
        target: CompareTarget::Mod as i32,
        key: compared,
        target_union: Some(TargetUnion::ModRevision(wanted)),
        ..Compare::default()
    };
    let op = |request| RequestOp { request: Some(request) };
    // A key may be put only once in a transaction: each put has a range of keys of its own.
    let puts = (0..1 + rng.below(3)).map(|part| {
        let mut put = put(rng, number, 0);
        put.key = format!("txn/{part}/{}", rng.below(10)).into();
        op(Request::RequestPut(put))
    });
    let mut success: Vec<_> = puts.collect();
    if rng.below(2) == 0 {
        success.push(op(Request::RequestDeleteRange(delete(rng))));
    }
    let failure = vec![op(Request::RequestPut(put(rng, number, 0)))];
    TxnRequest { compare: vec![compare], success, failure }
}

fn steps(rng: &mut Rng, operations: usize) -> Vec<Step> {
    let mut steps = vec![Step::Vote];
    let bulk = bulk_range(operations);
    let jump_at = if operations >= FULL_PLAN { operations / 3 } else { usize::MAX };
    let mut next = 1;
    let mut has_jumped = false;
    while next <= operations {
        if next >= jump_at && !has_jumped {
            has_jumped = true;
            steps.extend([Step::Install(next, next + JUMP - 1), Step::Vote]);
            next += JUMP;
            continue;
        }
        let last = (next + rng.below(4) as usize).min(operations);
        steps.push(Step::Operations(next, last));
        if (next..=last).contains(&bulk.end) && !bulk.is_empty() {
            steps.extend([Step::Settle, Step::Purge, Step::Rewrite, Step::Settle]);
        }
        next = last + 1;
        steps.extend(between(rng));
    }
    steps.extend([Step::Settle, Step::Rewrite, Step::Purge, Step::Restart]);
    steps
}

/// What may come between two groups of operations.
fn between(rng: &mut Rng) -> Vec<Step> {
    match rng.below(60) {
        0..4 => vec![Step::Vote],
        4..10 => vec![Step::Settle],
        10..14 => vec![Step::Purge],
        14..16 => vec![Step::Settle, Step::Purge],
        16 => vec![Step::Strangers(1 + rng.below(5) as usize), Step::Vote],
        17 => vec![Step::Restart],
        18 => vec![Step::Die],
        19 => vec![Step::Settle, Step::Die],
        _ => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_gives_the_same_plan_and_each_operation_once() {
        let scale = Scale { seed: 3, operations: 700 };
        let (plan, again) = (Plan::new(scale), Plan::new(scale));
        assert_eq!(plan.operations, again.operations);
        assert_eq!(plan.steps, again.steps);
        let mut next = 1;
        for step in &plan.steps {
            if let Step::Operations(from, to) | Step::Install(from, to) = step {
                assert_eq!(*from, next);
                next = to + 1;
            }
        }
        assert_eq!(next, 701);
        let kinds: std::collections::HashSet<_> =
            plan.steps.iter().map(std::mem::discriminant).collect();
        assert_eq!(kinds.len(), 9, "every kind of step");
        assert!(plan.states.last().is_some_and(|state| state.compacted > 1));
    }
}
