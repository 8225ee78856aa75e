//! Reads of the state, from any number of threads. A reader never changes anything, never waits for
//! consensus, and sees each revision either whole or not at all. Methods that may read the disk say
//! so; they belong on a blocking thread.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use kelson_api::etcdserverpb::{
    AlarmMember, AlarmType, Member, RangeRequest, RangeResponse, TxnRequest, TxnResponse,
};
use kelson_api::mvccpb::KeyValue;
use kelson_api::mvccpb::event::EventType;
use kelson_api::{Error, Message};
use tokio::sync::watch;

use crate::feed::{Feed, deletion};
use crate::mvcc::apply::ticket;
use crate::mvcc::compact::Pin;
use crate::mvcc::range::{self, range};
use crate::mvcc::row;
use crate::mvcc::span::Span;
use crate::mvcc::state::{Failure, State, count};
use crate::mvcc::txn;
use crate::mvcc::walk::{Walk, count_keys, find};
use crate::times::StoreTimes;
use crate::types::{
    Changes, CompactionTicket, Fatal, FeedEvent, LeaseRow, LogId, Revised, RevisionKey, Row, Sizes,
    Stats,
};

/// A range of more keys than this goes to a blocking thread: it takes about 100 us.
const QUICK_KEYS: u64 = 1000;
/// Rows of history read from disk at a time.
const SCAN_ROWS: usize = 1000;

/// Reads the state; cheap to clone.
#[derive(Clone)]
pub struct Reader {
    pub(crate) state: Arc<State>,
}

impl Reader {
    pub(crate) fn new(state: Arc<State>) -> Self {
        Self { state }
    }

    /// The store revision.
    pub fn revision(&self) -> i64 {
        self.state.current()
    }

    /// The compaction revision: reads below it fail. -1 = never compacted.
    pub fn compacted(&self) -> i64 {
        self.state.compaction.compacted()
    }

    /// The last log entry applied.
    pub fn applied(&self) -> LogId {
        *self.state.applied.read()
    }

    /// The position at which the state last came from another member; (0, 0) if it never did.
    pub fn installed(&self) -> LogId {
        *self.state.installed.read()
    }

    /// The hash chain right after the entry at `index`: depends on all entries up to it and on what
    /// they changed. `None` if it is not one of the last 4096 that this member applied since its
    /// start. Members with equal `chain_since` that answer differently have different states.
    pub fn chain_at(&self, index: u64) -> Option<u64> {
        self.state.chains.read().at(index)
    }

    /// Index of the entry behind which the hash chain began: 0, unless an older version wrote the
    /// state. Chains that began elsewhere cannot be compared.
    pub fn chain_since(&self) -> u64 {
        self.state.chains.read().newest().since
    }

    /// The last log entry whose changes are on disk, and a signal each time it moves.
    pub fn durable_applied(&self) -> watch::Receiver<LogId> {
        self.state.persister().durable_watch()
    }

    /// Answers a range, and tells the store revision when it was read. May read the disk and take
    /// long unless `is_quick`.
    ///
    /// # Errors
    /// `Compacted`, `FutureRevision`; `Stopped` if this member is failing.
    pub fn range(&self, request: &RangeRequest) -> Result<(RangeResponse, i64), Error> {
        count(&self.state.counters.ranges, 1);
        self.at_newest(request.revision, |current| range(&self.state, request, current))
    }

    /// Reads at the newest revision. A compaction may overtake the read; one that asked for no
    /// revision of its own then starts again, for its client cannot know what was compacted.
    fn at_newest<T>(
        &self,
        asked: i64,
        read: impl Fn(i64) -> Result<T, Failure>,
    ) -> Result<(T, i64), Error> {
        loop {
            let current = self.revision();
            match read(current) {
                Ok(answer) => return Ok((answer, current)),
                Err(Failure::Refused(Error::Compacted))
                    if asked <= 0 && current < self.compacted() => {}
                Err(failure) => return Err(refusal(failure)),
            }
        }
    }

    /// Whether a range needs no disk and so few keys that it may run on an async thread.
    pub fn is_quick(&self, request: &RangeRequest) -> bool {
        let is_recent = request.revision <= 0 || request.revision + 1 >= self.state.feed.first();
        if !is_recent || request.count_only || request.range_end.is_empty() {
            return is_recent;
        }
        let limit = u64::try_from(request.limit).unwrap_or(0);
        let is_plain = request.sort_order == 0 && !range::has_filters(request);
        if is_plain && limit > 0 && limit <= QUICK_KEYS {
            return true;
        }
        let span = Span::new(&request.key, &request.range_end);
        self.state.index.read().is_at_most(&span, QUICK_KEYS)
    }

    /// Starts a range that is read in chunks, all of one revision. The caller has refused sorting and
    /// filters.
    ///
    /// # Errors
    /// As `range`.
    pub fn range_chunks(&self, request: &RangeRequest) -> Result<StreamedRange, Error> {
        count(&self.state.counters.ranges, 1);
        let span = Span::new(&request.key, &request.range_end);
        let ((revision, count), started) = self.at_newest(request.revision, |current| {
            let revision = range::at(&self.state, request, current)?;
            Ok((revision, count_keys(&self.state, &span, revision)?))
        })?;
        let limit = usize::try_from(request.limit).ok().filter(|limit| *limit > 0);
        Ok(StreamedRange {
            state: self.state.clone(),
            walk: Walk::new(span, revision),
            revision,
            started,
            request: request.clone(),
            left: if request.count_only { 0 } else { limit.unwrap_or(usize::MAX) },
            more: !request.count_only && request.limit > 0 && count > request.limit,
            count,
        })
    }

    /// Answers a transaction that only reads, and tells the store revision when it was read. May read
    /// the disk if an operation names an old revision.
    ///
    /// # Errors
    /// As `range`.
    pub fn txn_read_only(&self, request: &TxnRequest) -> Result<(TxnResponse, i64), Error> {
        count(&self.state.counters.txns, 1);
        self.at_newest(0, |revision| {
            let choice = txn::choose(&self.state, request, revision)?;
            txn::check(&self.state, request, &choice, revision)?;
            txn::run_read_only(&self.state, request, &choice, revision)
        })
    }

    /// History from a revision on: up to `max_revisions` revisions or about `max_bytes`, at least one
    /// if there is any. Reads the disk if the feed does not go back so far.
    ///
    /// # Errors
    /// `Compacted` if `from` is below the compaction revision; `Stopped` if this member is failing.
    pub fn changes(
        &self,
        from: i64,
        max_revisions: usize,
        max_bytes: usize,
    ) -> Result<Changes, Error> {
        let store_revision = self.revision();
        if let Some(batches) = self.state.feed.slice(from, max_revisions, max_bytes) {
            self.check_compaction(from)?;
            let next = batches.last().map_or(from, |last| last.revision + 1);
            return Ok(Changes { batches, next, store_revision });
        }
        self.check_compaction(from)?;
        let until = self.state.feed.first();
        let (batches, next) =
            self.history(from, until, max_revisions.max(1), max_bytes).map_err(refusal)?;
        self.check_compaction(from)?;
        Ok(Changes { batches, next, store_revision })
    }

    fn check_compaction(&self, revision: i64) -> Result<(), Error> {
        if revision < self.compacted() { Err(Error::Compacted) } else { Ok(()) }
    }

    /// Reads revisions from `from` up to but without `until`, all of which the persister has.
    fn history(
        &self,
        from: i64,
        until: i64,
        max_revisions: usize,
        max_bytes: usize,
    ) -> Result<(Vec<Arc<Revised>>, i64), Failure> {
        let persister = self.state.persister();
        count(&self.state.counters.disk_reads, 1);
        let mut batches: Vec<Arc<Revised>> = Vec::new();
        let mut open: Option<Revised> = None;
        let mut at = RevisionKey { main: from.max(0), sub: 0 };
        let mut bytes = 0;
        loop {
            let rows = persister.scan(at, SCAN_ROWS, max_bytes)?;
            let Some(last) = rows.last() else { break };
            at = RevisionKey { main: last.key.main, sub: last.key.sub + 1 };
            let is_past_end = last.key.main >= until;
            for row in rows.iter().filter(|row| row.key.main < until) {
                if open.as_ref().is_some_and(|open| open.revision != row.key.main) {
                    batches.extend(open.take().map(Arc::new));
                    if batches.len() >= max_revisions || bytes >= max_bytes {
                        return Ok((batches, row.key.main));
                    }
                }
                bytes += row.kv.len();
                let event = self.event(row)?;
                let fresh = || Revised { revision: row.key.main, events: Vec::new() };
                open.get_or_insert_with(fresh).events.push(event);
            }
            if is_past_end {
                break;
            }
        }
        batches.extend(open.map(Arc::new));
        Ok((batches, until))
    }

    fn event(&self, row: &Row) -> Result<FeedEvent, Failure> {
        let revision = row.key.main;
        let damaged = || Fatal(format!("row {revision}.{} is damaged on disk", row.key.sub));
        let kv = row::key_value_of(&row.kv).ok_or_else(damaged)?;
        if row.tombstone {
            let prev_kv = self.before(&kv.key, revision)?;
            return Ok(FeedEvent {
                kind: EventType::Delete,
                kv: deletion(kv.key, revision),
                prev_kv,
            });
        }
        let is_new = kv.version == 1;
        let prev_kv = if is_new { None } else { self.before(&kv.key, revision)? };
        Ok(FeedEvent { kind: EventType::Put, kv, prev_kv })
    }

    fn before(&self, key: &[u8], revision: i64) -> Result<Option<KeyValue>, Failure> {
        if revision <= self.compacted() {
            return Ok(None);
        }
        match find(&self.state, key, revision - 1) {
            Err(Failure::Refused(Error::Compacted)) => Ok(None),
            other => other,
        }
    }

    /// The state of a key just before a revision: what a watcher of that revision calls `prev_kv`.
    /// `None` if the key was absent, that state is compacted, or this member is failing. May read the
    /// disk.
    pub fn kv_before(&self, key: &[u8], revision: i64) -> Option<KeyValue> {
        self.before(key, revision).unwrap_or_else(|failure| {
            let error = refusal(failure);
            tracing::warn!(%error, revision, "cannot read a previous value");
            None
        })
    }

    /// The recent revisions.
    pub fn feed(&self) -> &Feed {
        &self.state.feed
    }

    /// One lease.
    pub fn lease(&self, id: i64) -> Option<LeaseRow> {
        self.state.leases.read().get(id)
    }

    /// All leases by ascending id.
    pub fn leases(&self) -> Vec<LeaseRow> {
        self.state.leases.read().rows()
    }

    /// The keys attached to a lease, in key order.
    pub fn lease_keys(&self, id: i64) -> Vec<Bytes> {
        self.state.leases.read().keys(id)
    }

    /// A signal each time a lease is granted or revoked.
    pub fn lease_changes(&self) -> watch::Receiver<u64> {
        self.state.lease_moves.subscribe()
    }

    /// All active alarms.
    pub fn alarms(&self) -> Vec<AlarmMember> {
        self.state.cluster.read().alarms(AlarmType::None as i32)
    }

    /// All members by ascending id.
    pub fn members(&self) -> Vec<Member> {
        self.state.cluster.read().members()
    }

    /// Ids that were members once and never can be again.
    pub fn removed_members(&self) -> Vec<u64> {
        self.state.cluster.read().removed.iter().copied().collect()
    }

    /// Identity of a member's data directory, if it has published one.
    pub fn storage_uuid(&self, member: u64) -> Option<Bytes> {
        self.state.cluster.read().uuids.get(&member).cloned()
    }

    /// The raft membership last applied and where it was agreed.
    pub fn membership(&self) -> Option<(LogId, Bytes)> {
        self.state.cluster.read().membership.clone()
    }

    /// The agreed cluster version.
    pub fn cluster_version(&self) -> Option<String> {
        self.state.cluster.read().version.clone()
    }

    /// Bytes on disk and in use: those of the rows of keys and of the members.
    pub fn sizes(&self) -> Sizes {
        let on_disk = self.state.persister().disk_bytes();
        let members = self.members().iter().map(Message::encoded_len).sum::<usize>();
        let members = i64::try_from(members).unwrap_or(i64::MAX);
        let in_use = self.state.index.read().in_use().saturating_add(members);
        Sizes { total: i64::try_from(on_disk).unwrap_or(i64::MAX), in_use }
    }

    /// Number of keys that exist at the store revision.
    pub fn key_count(&self) -> u64 {
        self.state.index.read().live()
    }

    /// Keeps the rows of a revision on disk while the pin lives.
    ///
    /// # Errors
    /// `Compacted` if they may be gone already.
    pub fn pin(&self, revision: i64) -> Result<Pin, Error> {
        Pin::new(self.state.clone(), revision)
    }

    /// A ticket for everything that is compacted by now.
    pub fn compaction_ticket(&self) -> CompactionTicket {
        ticket(&self.state, self.compacted())
    }

    /// Readers that hold an old revision on disk at this moment.
    pub fn open_pins(&self) -> usize {
        self.state.compaction.open_pins()
    }

    /// How long commands and compactions took since the start.
    pub fn times(&self) -> StoreTimes {
        self.state.times.read()
    }

    /// Counts of what happened since the start.
    pub fn stats(&self) -> Stats {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let counters = &self.state.counters;
        Stats {
            puts: read(&counters.puts),
            put_bytes: read(&counters.put_bytes),
            deletes: read(&counters.deletes),
            ranges: read(&counters.ranges),
            txns: read(&counters.txns),
            events: read(&counters.events),
            compactions: read(&counters.compactions),
            compacted_rows: read(&counters.compacted_rows),
            disk_reads: read(&counters.disk_reads),
        }
    }
}

/// What a client is told when a read stops. A failing member says that it is stopping, so that the
/// client asks another one.
fn refusal(failure: Failure) -> Error {
    match failure {
        Failure::Refused(error) => error,
        Failure::Storage(fatal) => {
            tracing::error!(%fatal, "a read failed");
            Error::Stopped
        }
    }
}

/// A range that is read in chunks. Later writes are not visible in it.
pub struct StreamedRange {
    state: Arc<State>,
    walk: Walk,
    revision: i64,
    started: i64,
    request: RangeRequest,
    /// Keys that the limit still allows.
    left: usize,
    more: bool,
    count: i64,
}

/// A part of a streamed range.
#[derive(Clone, PartialEq, Debug)]
pub struct StreamChunk {
    /// The next keys in key order; among themselves sorted by the target of the request.
    pub kvs: Vec<KeyValue>,
    /// Nothing comes after this chunk.
    pub is_last: bool,
}

impl StreamedRange {
    /// The store revision when the range was started, for the header of the last message.
    pub fn started_revision(&self) -> i64 {
        self.started
    }

    /// Keys in the whole range at its revision.
    pub fn count(&self) -> i64 {
        self.count
    }

    /// Whether the limit cuts the range.
    pub fn more(&self) -> bool {
        self.more
    }

    /// The next chunk of up to `keys` keys (at least one). May read the disk and block. After the
    /// last chunk it answers with empty ones.
    ///
    /// # Errors
    /// `Compacted` if a compaction has passed the revision; `Stopped` if this member is failing.
    pub fn next_chunk(&mut self, keys: usize) -> Result<StreamChunk, Error> {
        let wanted = keys.max(1).min(self.left);
        let mut found = Vec::new();
        while found.len() < wanted && !self.walk.is_done() {
            self.walk.step(&self.state, wanted - found.len(), &mut found)?;
        }
        let mut kvs = Vec::with_capacity(found.len());
        for found in found {
            kvs.push(found.resolve(&self.state, self.revision).map_err(refusal)?);
        }
        range::sort(&self.request, &mut kvs);
        kvs.iter_mut().for_each(|kv| range::shorten(&self.request, kv));
        if self.state.compaction.compacted() > self.revision {
            return Err(Error::Compacted);
        }
        self.left -= kvs.len();
        Ok(StreamChunk { kvs, is_last: self.left == 0 || self.walk.is_done() })
    }
}
