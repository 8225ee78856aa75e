//! Clients of one member: each does one thing after the other on a handful of keys, through the member's
//! own door, and writes down what it asked and what it was told. No value is written twice. It judges
//! nothing.

use std::sync::Arc;
use std::time::Duration;

use kelson_api::Error;
use kelson_api::command::command::Op;
use kelson_api::etcdserverpb::compare::{CompareResult, CompareTarget, TargetUnion};
use kelson_api::etcdserverpb::request_op::Request;
use kelson_api::etcdserverpb::{
    CompactionRequest, Compare, DeleteRangeRequest, LeaseGrantRequest, LeaseRevokeRequest,
    PutRequest, RangeRequest, RequestOp, TxnRequest,
};
use kelson_raft::Node;
use kelson_storage::{Reader, Reply};
use parking_lot::Mutex;

use super::history::{Changes, History, Outcome, Read, Write};
use crate::rng::Rng;

/// Keys that are written.
const KEYS: u64 = 6;
/// Pause before something that must succeed is tried again.
const AGAIN: Duration = Duration::from_millis(50);
/// Longest wait for an answer.
const PATIENCE: Duration = Duration::from_secs(2);
/// Revisions that a compaction leaves.
const KEPT_REVISIONS: i64 = 30;

/// One client.
pub(super) struct Client {
    pub(super) name: String,
    pub(super) rng: Rng,
    pub(super) node: Node,
    pub(super) reader: Reader,
    pub(super) history: Arc<Mutex<History>>,
    /// Planted: reads do not ask whether they are the newest.
    pub(super) reads_locally: bool,
    pub(super) lease: Option<i64>,
}

fn key(number: u64) -> Vec<u8> {
    format!("k{number}").into_bytes()
}

/// Errors after which a write may have been made or not.
fn is_unknown(error: Error) -> bool {
    matches!(error, Error::Timeout | Error::TimeoutLeaderFailure | Error::Stopped)
}

impl Client {
    /// Until the member ends, or the history says that there was enough.
    pub(super) async fn run(mut self, until: u64) {
        loop {
            let pause = 5 + self.rng.below(60);
            tokio::time::sleep(Duration::from_millis(pause)).await;
            if self.history.lock().now >= until {
                return;
            }
            match self.rng.below(20) {
                0..=6 => self.put().await,
                7..=12 => self.read().await,
                13 | 14 => self.swap().await,
                15 | 16 => self.put_two().await,
                17 => self.delete().await,
                18 => self.lease().await,
                _ => self.compact().await,
            }
        }
    }

    fn value(&mut self, id: u64) -> Vec<u8> {
        // Some are long, so that segments and checkpoints turn over.
        let len = if self.rng.below(8) == 0 { 2_000 } else { 10 };
        format!("{id}:{}", "x".repeat(len)).into_bytes()
    }

    fn next_id(&self) -> u64 {
        let mut history = self.history.lock();
        history.operations += 1;
        history.operations
    }

    async fn put(&mut self) {
        let (id, key) = (self.next_id(), key(self.rng.below(KEYS)));
        let value = self.value(id);
        let changes = vec![(key.clone(), Some(value.clone()))];
        let put = PutRequest { key: key.into(), value: value.into(), ..PutRequest::default() };
        self.write(id, "put", changes, Op::Put(put)).await;
    }

    async fn put_two(&mut self) {
        let (id, first) = (self.next_id(), self.rng.below(KEYS));
        let mut changes = Vec::new();
        let mut success = Vec::new();
        for (part, number) in [first, (first + 1) % KEYS].into_iter().enumerate() {
            let mut value = self.value(id);
            value.extend(format!("/{part}").bytes());
            changes.push((key(number), Some(value.clone())));
            let (key, value) = (key(number).into(), value.into());
            let put = PutRequest { key, value, ..PutRequest::default() };
            success.push(RequestOp { request: Some(Request::RequestPut(put)) });
        }
        let txn = TxnRequest { success, ..TxnRequest::default() };
        self.write(id, "txn", changes, Op::Txn(txn)).await;
    }

    /// Writes only if the key is as this member has it.
    async fn swap(&mut self) {
        let (id, key) = (self.next_id(), key(self.rng.below(KEYS)));
        let value = self.value(id);
        let range = RangeRequest { key: key.clone().into(), ..RangeRequest::default() };
        let Ok((found, _)) = self.reader.range(&range) else { return };
        let revision = found.kvs.first().map_or(0, |kv| kv.mod_revision);
        let compare = Compare {
            result: CompareResult::Equal.into(),
            target: CompareTarget::Mod.into(),
            key: key.clone().into(),
            target_union: Some(TargetUnion::ModRevision(revision)),
            ..Compare::default()
        };
        let changes = vec![(key.clone(), Some(value.clone()))];
        let put = PutRequest { key: key.into(), value: value.into(), ..PutRequest::default() };
        let success = vec![RequestOp { request: Some(Request::RequestPut(put)) }];
        let txn = TxnRequest { compare: vec![compare], success, failure: Vec::new() };
        self.write(id, "swap", changes, Op::Txn(txn)).await;
    }

    async fn delete(&mut self) {
        let (id, key) = (self.next_id(), key(self.rng.below(KEYS)));
        let changes = vec![(key.clone(), None)];
        let delete = DeleteRangeRequest { key: key.into(), ..DeleteRangeRequest::default() };
        self.write(id, "delete", changes, Op::DeleteRange(delete)).await;
    }

    async fn lease(&mut self) {
        let id = self.next_id();
        if let Some(lease) = self.lease.take() {
            self.history.lock().revoked.insert(lease);
            let revoke = LeaseRevokeRequest { id: lease };
            let outcome = self.propose(id, "revoke", Op::LeaseRevoke(revoke)).await;
            if let Some(Err(())) = outcome {
                self.history.lock().revoked.remove(&lease);
            }
            return;
        }
        let lease = id.cast_signed();
        let grant = LeaseGrantRequest { ttl: 60, id: lease };
        let outcome = self.propose(id, "grant", Op::LeaseGrant(grant)).await;
        if !matches!(outcome, Some(Ok(_))) {
            return;
        }
        self.lease = Some(lease);
        let (id, key) = (self.next_id(), key(self.rng.below(KEYS)));
        let value = self.value(id);
        let changes = vec![(key.clone(), Some(value.clone()))];
        let put =
            PutRequest { key: key.into(), value: value.into(), lease, ..PutRequest::default() };
        self.write(id, "put-leased", changes, Op::Put(put)).await;
    }

    async fn compact(&mut self) {
        let id = self.next_id();
        let revision = self.reader.revision() - KEPT_REVISIONS;
        if revision > self.reader.compacted() {
            let compaction = CompactionRequest { revision, physical: false };
            self.propose(id, "compact", Op::Compaction(compaction)).await;
        }
    }

    /// Says whether it was acknowledged.
    async fn write(&mut self, id: u64, what: &str, changes: Changes, op: Op) -> bool {
        let lease = match &op {
            Op::Put(put) => Some(put.lease).filter(|lease| *lease != 0),
            _ => None,
        };
        self.history.lock().writes.insert(id, Write { changes, lease, outcome: None });
        let outcome = match self.propose(id, what, op).await {
            None => return false,
            Some(Err(())) => Outcome::Failed,
            Some(Ok((reply, revision))) => {
                let has_changed = match reply {
                    Reply::Txn(txn) => txn.succeeded,
                    Reply::DeleteRange(deleted) => deleted.deleted > 0,
                    _ => true,
                };
                if has_changed {
                    Outcome::Done(revision)
                } else {
                    // It was applied and wrote nothing, so its value must not be there.
                    let is_delete = what == "delete";
                    if is_delete { Outcome::Done(0) } else { Outcome::Failed }
                }
            }
        };
        if let Some(write) = self.history.lock().writes.get_mut(&id) {
            write.outcome = Some(outcome);
        }
        matches!(outcome, Outcome::Done(_))
    }

    /// `None`: nobody knows; an error: surely not.
    async fn propose(&mut self, id: u64, what: &str, op: Op) -> Option<Result<(Reply, i64), ()>> {
        let answer = tokio::time::timeout(PATIENCE, self.node.propose(op)).await;
        let (text, result) = match answer {
            Err(_) => ("unknown".to_owned(), None),
            Ok(Err(error)) if is_unknown(error) => (format!("unknown: {error}"), None),
            Ok(Err(error)) => (format!("failed: {error}"), Some(Err(()))),
            Ok(Ok(outcome)) => match outcome.result {
                Ok(reply) => {
                    (format!("done {}", outcome.revision), Some(Ok((reply, outcome.revision))))
                }
                Err(error) => (format!("refused: {error}"), Some(Err(()))),
            },
        };
        let mut history = self.history.lock();
        match &result {
            None => history.unknown += 1,
            Some(Ok((_, revision))) => history.told = history.told.max(*revision),
            Some(Err(())) => {}
        }
        history.say(&format!("{} {what} {id} {text}", self.name));
        result
    }

    async fn read(&mut self) {
        let key = key(self.rng.below(KEYS));
        self.read_key(key).await;
    }

    /// A linearizable read. Says whether it was answered.
    async fn read_key(&mut self, key: Vec<u8>) -> bool {
        let id = self.next_id();
        let floor = self.history.lock().told;
        if !self.reads_locally {
            let barrier = tokio::time::timeout(PATIENCE, self.node.read_barrier()).await;
            if !matches!(barrier, Ok(Ok(_))) {
                self.history.lock().say(&format!("{} read {id} failed", self.name));
                return false;
            }
        }
        let range = RangeRequest { key: key.clone().into(), ..RangeRequest::default() };
        // Nothing may come between the look at the store and the word of it.
        let answer = self.reader.range(&range);
        let mut history = self.history.lock();
        let (response, revision) = match answer {
            Ok(answer) => answer,
            Err(error) => {
                history.violate(format!("{} cannot read its own state: {error}", self.name));
                return false;
            }
        };
        history.say(&format!("{} read {id} done {revision}", self.name));
        let value = response.kvs.first().map(|kv| kv.value.to_vec());
        history.answer(Read { floor, revision, key, value });
        true
    }

    /// What every member must still do in the end: a write that is acknowledged, and a linearizable
    /// read.
    pub(super) async fn finish(mut self) {
        let key = b"end".to_vec();
        while !self.write_end(key.clone()).await {
            tokio::time::sleep(AGAIN).await;
        }
        while !self.read_key(key.clone()).await {
            tokio::time::sleep(AGAIN).await;
        }
    }

    async fn write_end(&mut self, key: Vec<u8>) -> bool {
        let id = self.next_id();
        let value = self.value(id);
        let changes = vec![(key.clone(), Some(value.clone()))];
        let put = PutRequest { key: key.into(), value: value.into(), ..PutRequest::default() };
        self.write(id, "end", changes, Op::Put(put)).await
    }
}
