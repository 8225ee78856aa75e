//! The obvious store: a full copy of all keys for every revision. Slow, and hard to get wrong.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use kelson_api::Error;
use kelson_api::command::command::Op;
use kelson_api::etcdserverpb::compare::TargetUnion;
use kelson_api::etcdserverpb::request_op::Request;
use kelson_api::etcdserverpb::response_op::Response;
use kelson_api::etcdserverpb::{
    Compare, DeleteRangeRequest, DeleteRangeResponse, PutRequest, PutResponse, RangeRequest,
    RangeResponse, ResponseHeader, ResponseOp, TxnRequest, TxnResponse,
};
use kelson_api::mvccpb::KeyValue;
use kelson_api::mvccpb::event::EventType;
use kelson_storage::{FeedEvent, Revised};

pub type Keys = BTreeMap<Bytes, KeyValue>;

/// What a command answers, without the parts that only the real store has.
#[derive(Clone, Debug, PartialEq)]
pub enum Answer {
    Put(PutResponse),
    Delete(DeleteRangeResponse),
    Txn(TxnResponse),
    Done,
}

pub struct Model {
    /// All keys as of each revision, from revision 1.
    pub states: Vec<Keys>,
    pub events: BTreeMap<i64, Vec<FeedEvent>>,
    pub leases: BTreeSet<i64>,
    pub compacted: i64,
}

/// A revision in the making.
struct Draft {
    before: Keys,
    keys: Keys,
    revision: i64,
    events: Vec<FeedEvent>,
}

pub fn in_span(key: &[u8], start: &[u8], end: &[u8]) -> bool {
    match end {
        [] => key == start,
        [0] => key >= start,
        _ => key >= start && key < end,
    }
}

impl Model {
    pub fn new() -> Self {
        Self {
            states: vec![Keys::new(), Keys::new()],
            events: BTreeMap::new(),
            leases: BTreeSet::new(),
            compacted: -1,
        }
    }

    pub fn revision(&self) -> i64 {
        self.states.len() as i64 - 1
    }

    fn keys(&self) -> &Keys {
        self.states.last().expect("never empty")
    }

    pub fn apply(&mut self, op: &Op) -> Result<Answer, Error> {
        let (answer, keys, events) = {
            let mut draft = Draft {
                before: self.keys().clone(),
                keys: self.keys().clone(),
                revision: self.revision() + 1,
                events: Vec::new(),
            };
            let mut revoked = None;
            let mut granted = None;
            let mut compacted = None;
            let answer = match op {
                Op::Put(request) => {
                    self.check_lease(request)?;
                    self.check_kept(request)?;
                    Answer::Put(draft.put(request))
                }
                Op::DeleteRange(request) => Answer::Delete(draft.delete(request)),
                Op::Txn(request) => {
                    self.check_txn(request)?;
                    Answer::Txn(self.run_txn(&mut draft, request))
                }
                Op::Compaction(request) => {
                    if request.revision <= self.compacted {
                        return Err(Error::Compacted);
                    }
                    if request.revision > self.revision() {
                        return Err(Error::FutureRevision);
                    }
                    compacted = Some(request.revision);
                    Answer::Done
                }
                Op::LeaseGrant(request) => {
                    if self.leases.contains(&request.id) {
                        return Err(Error::LeaseExists);
                    }
                    granted = Some(request.id);
                    Answer::Done
                }
                Op::LeaseRevoke(request) => {
                    if !self.leases.contains(&request.id) {
                        return Err(Error::LeaseNotFound);
                    }
                    for (key, kv) in self.keys() {
                        if kv.lease == request.id {
                            draft.remove(key);
                        }
                    }
                    revoked = Some(request.id);
                    Answer::Done
                }
                other => panic!("the model does not know {other:?}"),
            };
            self.compacted = compacted.unwrap_or(self.compacted);
            let (keys, events) = (draft.keys, draft.events);
            self.leases.extend(granted);
            if let Some(id) = revoked {
                self.leases.remove(&id);
            }
            (answer, keys, events)
        };
        if !events.is_empty() {
            self.states.push(keys);
            self.events.insert(self.revision(), events);
        }
        Ok(answer)
    }

    fn check_lease(&self, request: &PutRequest) -> Result<(), Error> {
        let known = request.lease == 0 || self.leases.contains(&request.lease);
        if known { Ok(()) } else { Err(Error::LeaseNotFound) }
    }

    fn check_kept(&self, request: &PutRequest) -> Result<(), Error> {
        let keeps = request.ignore_value || request.ignore_lease;
        if keeps && !self.keys().contains_key(&request.key) {
            return Err(Error::KeyNotFound);
        }
        Ok(())
    }

    fn succeeded(&self, txn: &TxnRequest) -> bool {
        txn.compare.iter().all(|compare| holds(self.keys(), compare))
    }

    fn check_txn(&self, txn: &TxnRequest) -> Result<(), Error> {
        let branch = if self.succeeded(txn) { &txn.success } else { &txn.failure };
        for op in branch {
            match op.request.as_ref() {
                Some(Request::RequestPut(put)) => {
                    self.check_kept(put)?;
                    self.check_lease(put)?;
                }
                Some(Request::RequestRange(range)) if range.revision > self.revision() => {
                    return Err(Error::FutureRevision);
                }
                Some(Request::RequestRange(range))
                    if range.revision != 0 && range.revision < self.compacted =>
                {
                    return Err(Error::Compacted);
                }
                Some(Request::RequestTxn(inner)) => self.check_txn(inner)?,
                _ => {}
            }
        }
        Ok(())
    }

    fn run_txn(&self, draft: &mut Draft, txn: &TxnRequest) -> TxnResponse {
        let succeeded = self.succeeded(txn);
        let branch = if succeeded { &txn.success } else { &txn.failure };
        let mut responses = Vec::new();
        for op in branch {
            let response = op.request.as_ref().map(|request| match request {
                Request::RequestPut(put) => {
                    let mut response = draft.put(put);
                    response.header = draft.header();
                    Response::ResponsePut(response)
                }
                Request::RequestDeleteRange(delete) => {
                    let mut response = draft.delete(delete);
                    response.header = draft.header();
                    Response::ResponseDeleteRange(response)
                }
                Request::RequestRange(range) => {
                    let past = usize::try_from(range.revision).ok().filter(|past| *past > 0);
                    let keys = past
                        .map_or(&draft.keys, |past| self.states.get(past).unwrap_or(&draft.keys));
                    let mut response = range_in(keys, range);
                    response.header = draft.header();
                    Response::ResponseRange(response)
                }
                Request::RequestTxn(inner) => {
                    let mut response = self.run_txn(draft, inner);
                    response.header = Some(ResponseHeader::default());
                    Response::ResponseTxn(response)
                }
            });
            responses.push(ResponseOp { response });
        }
        TxnResponse { header: None, succeeded, responses }
    }

    pub fn range(&self, request: &RangeRequest) -> Result<RangeResponse, Error> {
        let revision = if request.revision <= 0 { self.revision() } else { request.revision };
        if revision > self.revision() {
            return Err(Error::FutureRevision);
        }
        if revision < self.compacted {
            return Err(Error::Compacted);
        }
        Ok(range_in(&self.states[revision as usize], request))
    }

    /// All revisions from `from` on. Previous values that may be compacted are left out.
    pub fn changes(&self, from: i64) -> Vec<Revised> {
        let later = self.events.range(from..);
        later.map(|(&revision, events)| Revised { revision, events: events.clone() }).collect()
    }

    pub fn lease_keys(&self, id: i64) -> Vec<Bytes> {
        let attached = self.keys().iter().filter(|(_, kv)| kv.lease == id);
        attached.map(|(key, _)| key.clone()).collect()
    }
}

impl Draft {
    fn header(&self) -> Option<ResponseHeader> {
        let revision = self.revision - i64::from(self.events.is_empty());
        Some(ResponseHeader { revision, ..ResponseHeader::default() })
    }

    fn event(&mut self, kind: EventType, kv: KeyValue) {
        let is_creation = kind == EventType::Put && kv.version == 1;
        let prev_kv = self.before.get(&kv.key).cloned().filter(|_| !is_creation);
        self.events.push(FeedEvent { kind, kv, prev_kv });
    }

    fn put(&mut self, request: &PutRequest) -> PutResponse {
        let prev = self.keys.get(&request.key).cloned();
        let old = prev.clone().unwrap_or_default();
        let kv = KeyValue {
            key: request.key.clone(),
            create_revision: if prev.is_some() { old.create_revision } else { self.revision },
            mod_revision: self.revision,
            version: old.version + 1,
            value: if request.ignore_value { old.value } else { request.value.clone() },
            lease: if request.ignore_lease { old.lease } else { request.lease },
        };
        self.keys.insert(request.key.clone(), kv.clone());
        self.event(EventType::Put, kv);
        PutResponse { header: None, prev_kv: prev.filter(|_| request.prev_kv) }
    }

    fn remove(&mut self, key: &Bytes) -> Option<KeyValue> {
        let prev = self.keys.remove(key)?;
        let kv = KeyValue { key: key.clone(), mod_revision: self.revision, ..KeyValue::default() };
        self.event(EventType::Delete, kv);
        Some(prev)
    }

    fn delete(&mut self, request: &DeleteRangeRequest) -> DeleteRangeResponse {
        let keys: Vec<_> = self.keys.keys().cloned().collect();
        let mut prev_kvs = Vec::new();
        for key in keys.iter().filter(|key| in_span(key, &request.key, &request.range_end)) {
            prev_kvs.extend(self.remove(key));
        }
        let deleted = prev_kvs.len() as i64;
        if !request.prev_kv {
            prev_kvs.clear();
        }
        DeleteRangeResponse { header: None, deleted, prev_kvs }
    }
}

fn holds(keys: &Keys, compare: &Compare) -> bool {
    let is_value = compare.target == 3;
    let mut hit = false;
    for kv in keys.values().filter(|kv| in_span(&kv.key, &compare.key, &compare.range_end)) {
        hit = true;
        if !matches(compare, kv) {
            return false;
        }
    }
    hit || (!is_value && matches(compare, &KeyValue::default()))
}

fn matches(compare: &Compare, kv: &KeyValue) -> bool {
    use TargetUnion as T;
    let union = compare.target_union.clone();
    let number = |actual: i64, operand: Option<i64>| actual.cmp(&operand.unwrap_or(0)) as i32;
    let sign = match (compare.target, union) {
        (0, union) => {
            number(kv.version, if let Some(T::Version(n)) = union { Some(n) } else { None })
        }
        (1, union) => number(
            kv.create_revision,
            if let Some(T::CreateRevision(n)) = union { Some(n) } else { None },
        ),
        (2, union) => number(
            kv.mod_revision,
            if let Some(T::ModRevision(n)) = union { Some(n) } else { None },
        ),
        (3, union) => {
            let operand = if let Some(T::Value(value)) = union { value } else { Bytes::new() };
            kv.value.cmp(&operand) as i32
        }
        (4, union) => number(kv.lease, if let Some(T::Lease(n)) = union { Some(n) } else { None }),
        _ => 0,
    };
    match compare.result {
        0 => sign == 0,
        1 => sign > 0,
        2 => sign < 0,
        3 => sign != 0,
        _ => true,
    }
}

fn range_in(keys: &Keys, request: &RangeRequest) -> RangeResponse {
    let hit = |kv: &&KeyValue| in_span(&kv.key, &request.key, &request.range_end);
    let all: Vec<KeyValue> = keys.values().filter(hit).cloned().collect();
    let count = all.len() as i64;
    if request.count_only {
        return RangeResponse { count, ..RangeResponse::default() };
    }
    let filters = [
        (request.min_mod_revision, true, false),
        (request.max_mod_revision, false, false),
        (request.min_create_revision, true, true),
        (request.max_create_revision, false, true),
    ];
    let filtered = filters.iter().any(|(bound, ..)| *bound != 0);
    let limit = request.limit.max(0) as usize;
    let mut kvs = all;
    if request.sort_order == 0 && !filtered && limit > 0 {
        kvs.truncate(limit + 1);
    }
    for (bound, is_min, is_create) in filters {
        kvs.retain(|kv| {
            let revision = if is_create { kv.create_revision } else { kv.mod_revision };
            bound == 0 || if is_min { revision >= bound } else { revision <= bound }
        });
    }
    let field = |kv: &KeyValue| match request.sort_target {
        1 => (kv.version, Bytes::new()),
        2 => (kv.create_revision, Bytes::new()),
        3 => (kv.mod_revision, Bytes::new()),
        4 => (0, kv.value.clone()),
        _ => (0, kv.key.clone()),
    };
    match request.sort_order {
        2 => kvs.sort_by_key(|kv| std::cmp::Reverse(field(kv))),
        _ => kvs.sort_by_key(field),
    }
    let more = limit > 0 && kvs.len() > limit;
    if more {
        kvs.truncate(limit);
    }
    if request.keys_only {
        let keeps_lease = request.sort_target == 4;
        for kv in &mut kvs {
            kv.value = Bytes::new();
            kv.lease = if keeps_lease { kv.lease } else { 0 };
        }
    }
    RangeResponse { header: None, kvs, more, count }
}
