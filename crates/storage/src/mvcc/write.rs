//! The writer's pen: records puts and deletes of one command under one new revision, in the index,
//! the feed and the entry's delta alike. It checks nothing; who calls it has.

use bytes::Bytes;
use kelson_api::Error;
use kelson_api::mvccpb::KeyValue;
use kelson_api::mvccpb::event::EventType;

use super::index::Entry;
use super::row::{self, Fields, Held, Parsed};
use super::span::Span;
use super::state::{Failure, State, count};
use super::walk::{Found, Walk};
use crate::feed::deletion;
use crate::sabotage::{self, Variant};
use crate::types::{Delta, FeedEvent, RevisionKey, Row};

/// Memory of a queued row beside its bytes.
const ROW_COST: usize = 96;
/// Keys that a range deletion looks up at a time.
const STEP: usize = 256;

/// What a put sets; `None` keeps what the key has.
pub(crate) struct Put<'a> {
    pub(crate) value: Option<&'a [u8]>,
    pub(crate) lease: Option<i64>,
}

/// Writes on behalf of one command.
pub(crate) struct Writer<'a> {
    pub(crate) state: &'a State,
    pub(crate) delta: &'a mut Delta,
    scratch: &'a mut Vec<u8>,
    /// Store revision before the command.
    before: i64,
    /// Changes so far.
    changes: i64,
}

impl<'a> Writer<'a> {
    pub(crate) fn new(state: &'a State, delta: &'a mut Delta, scratch: &'a mut Vec<u8>) -> Self {
        Self { state, delta, scratch, before: state.current(), changes: 0 }
    }

    /// The revision as of now: the new one as soon as anything changed.
    pub(crate) fn revision(&self) -> i64 {
        self.before + i64::from(self.changes > 0)
    }

    /// The store revision before the command.
    pub(crate) fn before(&self) -> i64 {
        self.before
    }

    pub(crate) fn has_changed(&self) -> bool {
        self.changes > 0
    }

    /// Makes the changes visible, if there are any. Returns the store revision.
    pub(crate) fn publish(self) -> i64 {
        if self.changes == 0 {
            return self.before;
        }
        count(&self.state.counters.events, self.changes.cast_unsigned());
        self.state.feed.publish()
    }

    /// Puts a key and returns what it was before.
    pub(crate) fn put(&mut self, key: &[u8], put: &Put<'_>) -> Option<KeyValue> {
        count(&self.state.counters.puts, 1);
        let at = self.next();
        let (old, parsed, own) = self.look_up(key);
        let old_value = old.as_ref().map_or(&[][..], |row| &row[parsed.value.clone()]);
        let lease = put.lease.unwrap_or(parsed.lease);
        let fields = Fields {
            key,
            value: put.value.unwrap_or(old_value),
            create_revision: if old.is_some() { parsed.create_revision } else { at.main },
            mod_revision: at.main,
            version: parsed.version + 1 + noise(),
            lease,
        };
        count(&self.state.counters.put_bytes, (key.len() + fields.value.len()) as u64);
        let row = row::encode(self.scratch, &fields);
        let bytes = row::share(&row);
        let kv = row::key_value_of(&bytes).expect("encoded above");
        let prev_kv = old.as_ref().map(row::key_value);
        let event = FeedEvent { kind: EventType::Put, kv, prev_kv: prev_kv.clone() };
        self.record(at, (row, bytes), event, own);
        if lease != parsed.lease {
            self.state.leases.write().reattach(key, parsed.lease, lease);
        }
        prev_kv
    }

    /// Deletes a key and returns what it was, or `None` if there was nothing to delete.
    pub(crate) fn delete(&mut self, key: &[u8]) -> Option<KeyValue> {
        let at = self.next();
        let (old, parsed, own) = self.look_up(key);
        let old = old?;
        count(&self.state.counters.deletes, 1);
        let row = row::encode_tombstone(self.scratch, key, at.main);
        let bytes = row::share(&row);
        let kv = deletion(bytes.slice(row.len() - key.len()..), at.main);
        let prev_kv = Some(row::key_value(&old));
        let event = FeedEvent { kind: EventType::Delete, kv, prev_kv: prev_kv.clone() };
        self.record(at, (row, bytes), event, own);
        if parsed.lease != 0 {
            self.state.leases.write().reattach(key, parsed.lease, 0);
        }
        prev_kv
    }

    /// Deletes all keys of a span in key order. Returns how many, and what they were if `prev_kvs`.
    pub(crate) fn delete_range(
        &mut self,
        span: Span,
        wants_prev: bool,
    ) -> Result<(i64, Vec<KeyValue>), Failure> {
        let mut prev_kvs = Vec::new();
        if let Some(key) = span.single() {
            let prev = self.delete(key);
            let deleted = i64::from(prev.is_some());
            prev_kvs.extend(prev.filter(|_| wants_prev));
            return Ok((deleted, prev_kvs));
        }
        let mut deleted = 0;
        let mut walk = Walk::new(span, self.before + 1);
        let mut found = Vec::new();
        while !walk.is_done() {
            walk.step(self.state, STEP, &mut found)?;
            for found in found.drain(..) {
                let Found::Newest(row) = found else { continue };
                let parsed = row::parse(&row).expect("a row is checked before it enters the index");
                if let Some(prev) = self.delete(&row[parsed.key]) {
                    deleted += 1;
                    prev_kvs.extend(wants_prev.then_some(prev));
                }
            }
        }
        Ok((deleted, prev_kvs))
    }

    /// Ends a lease: its keys go in key order, then the lease.
    pub(crate) fn revoke(&mut self, lease: i64) -> Result<(), Error> {
        if !self.state.leases.read().contains(lease) {
            return Err(Error::LeaseNotFound);
        }
        let mut last: Option<Bytes> = None;
        while !sabotage::is(Variant::KeysOutliveLease) {
            let next = self.state.leases.read().next_key(lease, last.as_deref());
            let Some(key) = next else { break };
            self.delete(&key);
            last = Some(key);
        }
        self.state.leases.write().remove(lease);
        Ok(())
    }

    fn next(&self) -> RevisionKey {
        RevisionKey { main: self.before + 1, sub: self.changes }
    }

    /// The live row of a key with its fields (all zero if there is none), and whether this command
    /// has already changed the key.
    fn look_up(&self, key: &[u8]) -> (Option<Held>, Parsed, bool) {
        let index = self.state.index.read();
        let Some(entry) = index.get(key) else { return (None, Parsed::default(), false) };
        let own = entry.main() > self.before;
        if !entry.is_live() {
            return (None, Parsed::default(), own);
        }
        let parsed = row::parse(entry.row()).expect("a row is checked before it enters the index");
        (Some(entry.row().clone()), parsed, own)
    }

    /// Enters one change everywhere. Index and feed change under the index lock, so that a count can
    /// rely on both telling the same story.
    fn record(&mut self, at: RevisionKey, (row, kv): (Held, Bytes), event: FeedEvent, own: bool) {
        let tombstone = event.kind == EventType::Delete;
        let mut index = self.state.index.write();
        index.record(Entry::new(row, at.sub, tombstone));
        self.state.feed.stage(event, own);
        drop(index);
        self.delta.bytes += kv.len() + ROW_COST;
        self.delta.rows.push(Row { key: at, tombstone, kv });
        self.changes += 1;
        if sabotage::is(Variant::RevisionPerChange) {
            (self.before, self.changes) = (self.state.feed.publish(), 0);
        }
    }
}

/// Nothing, unless sabotage lets the clock have a say.
fn noise() -> i64 {
    i64::from(sabotage::is(Variant::ApplyReadsClock) && sabotage::coin())
}
