//! The obvious store: what every operation of a plan must have done, kept for each operation. It
//! shares no code with the real one and knows no disk.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use bytes::Bytes;
use kelson_api::command::command::Op;
use kelson_api::etcdserverpb::compare::TargetUnion;
use kelson_api::etcdserverpb::request_op::Request;
use kelson_api::etcdserverpb::{DeleteRangeRequest, PutRequest, TxnRequest};
use kelson_api::mvccpb::KeyValue;

/// All keys at one revision.
pub type Keys = BTreeMap<Bytes, KeyValue>;

/// One change of one key; of a deletion only key and revision are kept.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// Whether the key was deleted.
    pub is_delete: bool,
    /// The key as it was left.
    pub kv: KeyValue,
}

/// The state after an operation.
#[derive(Clone, Debug)]
pub struct State {
    /// Store revision.
    pub revision: i64,
    /// Compaction revision, -1 = never compacted.
    pub compacted: i64,
    /// What exists.
    pub keys: Arc<Keys>,
    /// Leases that were granted and not revoked.
    pub leases: Arc<BTreeSet<i64>>,
}

/// A store in memory.
pub struct Model {
    state: State,
    /// Keys at each revision that there was.
    pub at: BTreeMap<i64, Arc<Keys>>,
    /// All changes by revision.
    pub events: BTreeMap<i64, Vec<Event>>,
}

impl Default for Model {
    fn default() -> Self {
        let keys: Arc<Keys> = Arc::default();
        let leases = Arc::default();
        let state = State { revision: 1, compacted: -1, keys: keys.clone(), leases };
        Self { state, at: BTreeMap::from([(1, keys)]), events: BTreeMap::new() }
    }
}

impl Model {
    /// The newest state.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// Carries out an operation; one that is refused changes nothing.
    pub fn apply(&mut self, op: &Op) {
        let mut keys = (*self.state.keys).clone();
        let mut events = Vec::new();
        match op {
            Op::Put(put) => self.put(put, &mut keys, &mut events),
            Op::DeleteRange(delete) => self.delete(delete, &mut keys, &mut events),
            Op::Txn(txn) => self.txn(txn, &mut keys, &mut events),
            Op::LeaseGrant(grant) => {
                Arc::make_mut(&mut self.state.leases).insert(grant.id);
            }
            Op::LeaseRevoke(revoke) => {
                if Arc::make_mut(&mut self.state.leases).remove(&revoke.id) {
                    let attached: Vec<_> =
                        keys.values().filter(|kv| kv.lease == revoke.id).cloned().collect();
                    attached.iter().for_each(|kv| self.remove(&kv.key, &mut keys, &mut events));
                }
            }
            Op::Compaction(compaction) => {
                let allowed = self.state.compacted + 1..=self.state.revision;
                if allowed.contains(&compaction.revision) {
                    self.state.compacted = compaction.revision;
                }
            }
            other => unreachable!("a plan has no {other:?}"),
        }
        if !events.is_empty() {
            self.state.revision += 1;
            self.state.keys = Arc::new(keys);
            self.at.insert(self.state.revision, self.state.keys.clone());
            self.events.insert(self.state.revision, events);
        }
    }

    fn put(&self, put: &PutRequest, keys: &mut Keys, events: &mut Vec<Event>) {
        if put.lease != 0 && !self.state.leases.contains(&put.lease) {
            return;
        }
        let revision = self.state.revision + 1;
        let old = keys.get(&put.key);
        let kv = KeyValue {
            key: put.key.clone(),
            value: put.value.clone(),
            create_revision: old.map_or(revision, |old| old.create_revision),
            mod_revision: revision,
            version: old.map_or(0, |old| old.version) + 1,
            lease: put.lease,
        };
        keys.insert(put.key.clone(), kv.clone());
        events.push(Event { is_delete: false, kv });
    }

    fn remove(&self, key: &Bytes, keys: &mut Keys, events: &mut Vec<Event>) {
        keys.remove(key);
        let mod_revision = self.state.revision + 1;
        let kv = KeyValue { key: key.clone(), mod_revision, ..KeyValue::default() };
        events.push(Event { is_delete: true, kv });
    }

    fn delete(&self, delete: &DeleteRangeRequest, keys: &mut Keys, events: &mut Vec<Event>) {
        let is_hit = |key: &&Bytes| {
            if delete.range_end.is_empty() {
                **key == delete.key
            } else {
                **key >= delete.key && **key < delete.range_end
            }
        };
        let hit: Vec<_> = keys.keys().filter(is_hit).cloned().collect();
        hit.iter().for_each(|key| self.remove(key, keys, events));
    }

    fn txn(&self, txn: &TxnRequest, keys: &mut Keys, events: &mut Vec<Event>) {
        let holds = txn.compare.iter().all(|compare| {
            let found = self.state.keys.get(&compare.key).map_or(0, |kv| kv.mod_revision);
            matches!(compare.target_union, Some(TargetUnion::ModRevision(wanted)) if wanted == found)
        });
        for op in if holds { &txn.success } else { &txn.failure } {
            match &op.request {
                Some(Request::RequestPut(put)) => self.put(put, keys, events),
                Some(Request::RequestDeleteRange(delete)) => self.delete(delete, keys, events),
                other => unreachable!("a plan has no {other:?}"),
            }
        }
    }
}
