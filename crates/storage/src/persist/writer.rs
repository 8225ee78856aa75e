//! The writing thread: drains the queue into the database, removes compacted rows, makes checkpoints
//! and rewrites the database on request. It owns the only writing handle.
//!
//! The database never lets go of a leaf that was written since it was opened: its eviction passes over
//! each leaf that has ever waited for a flush. A process would hold in memory all the history that it
//! wrote. So once enough was written, and right after a checkpoint, the database is closed and opened.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{CHECKPOINT_SAMPLES, CutRequest, DurableLog, PersistConfig, Shared, Signals, Slice};
use super::{Place, Start, cost, die};
use crate::chain::Chain;
use crate::engine::watchdog::Watchdog;
use crate::engine::{Backend, EngineError};
use crate::failpoint;
use crate::keys::{self, Pair, Tables, Tally};
use crate::recover;
use crate::sabotage::{self, Variant};
use crate::types::{Delta, Fatal, LogId, MetaChange};

/// Rows in one call into the database; it locks all the leaves they touch. One delta is never split.
const BATCH_ROWS: usize = 5_000;
/// Bytes in one call into the database.
const BATCH_BYTES: usize = 8 << 20;
/// Most rows that come into memory with one row: a leaf of the database.
const LEAF_ROWS: u64 = 128;
/// Memory of a row in a leaf beside its value. Unit: bytes.
const ROW_COST: u64 = 64;
/// Part of the files that may be held in memory before the database is opened anew, since opening
/// takes time in proportion to the files.
const HELD_PART: u64 = 16;

/// Pause after the last checkpoint after which a writer without work gives memory back.
const REST: Duration = Duration::from_secs(1);
/// Share of the cache's bound that is worth a reopening when there is nothing else to do ...
const REST_PART: u64 = 2;
/// ... if it is this part of the files, too.
const REST_HELD_PART: u64 = 64;

/// The thread's own things.
pub(super) struct Writer<D> {
    shared: Arc<Shared>,
    /// `None` only while a rewrite or a reopening swaps it.
    backend: Option<Box<dyn Backend>>,
    watchdog: Watchdog,
    config: PersistConfig,
    durable: D,
    applied: LogId,
    /// Newest revision written.
    revision: i64,
    tally: Tally,
    chain: Chain,
    /// Newest compaction that was written to be in force.
    scheduled: i64,
    dirty_bytes: u64,
    /// When the oldest write since the last checkpoint happened.
    dirty_since: Option<Instant>,
    /// About how much the database holds in memory for writes since it was opened.
    held_bytes: u64,
    /// Held memory from which a pause is looked at again.
    rest_from: u64,
}

/// What the queue asks for next.
enum Task {
    Deltas(Vec<Delta>),
    Slice(Slice),
    /// Nothing, for a while.
    Rest,
    Cut(CutRequest),
    Checkpoint,
    Rewrite(Vec<std::sync::mpsc::SyncSender<Result<bool, Fatal>>>),
    Stop,
}

impl<D: DurableLog> Writer<D> {
    pub(super) fn new(
        shared: Arc<Shared>,
        (backend, watchdog): (Box<dyn Backend>, Watchdog),
        config: PersistConfig,
        durable: D,
        at: &Start,
    ) -> Self {
        Self {
            shared,
            backend: Some(backend),
            watchdog,
            config,
            durable,
            applied: at.applied,
            revision: at.revision,
            tally: at.tally,
            chain: at.chain,
            scheduled: at.scheduled,
            dirty_bytes: 0,
            dirty_since: None,
            held_bytes: 0,
            rest_from: 0,
        }
    }

    /// Works until told to stop. Never returns with an error: it ends the process.
    pub(super) fn run(mut self) {
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| self.work()));
        match result {
            Ok(Ok(())) => {}
            Ok(Err(error)) => die(&error),
            // The panic hook has already said where.
            Err(_) => die(&Fatal("the state writer panicked".to_owned())),
        }
    }

    fn work(&mut self) -> Result<(), EngineError> {
        loop {
            self.reopen_if_due()?;
            match self.next() {
                Task::Rest => self.rest()?,
                Task::Deltas(deltas) => {
                    let last = deltas.last().map_or(0, |delta| delta.id.index);
                    if !self.durable.wait_for(last) {
                        // The log is closed: the rest of the queue comes back from it at the start.
                        return self.finish();
                    }
                    self.write(deltas)?;
                    self.checkpoint_if_due()?;
                }
                Task::Slice(slice) => self.remove(slice)?,
                Task::Cut(request) => {
                    let tables = self.tables()?;
                    // An asker that gave up takes no answer, which is fine.
                    let _ = request.answer.send((tables, self.revision));
                }
                Task::Checkpoint => self.checkpoint()?,
                Task::Rewrite(askers) => {
                    let rewritten = self.rewrite()?;
                    for asker in askers {
                        // An asker that gave up takes no answer, which is fine.
                        let _ = asker.send(Ok(rewritten));
                    }
                }
                Task::Stop => return self.finish(),
            }
        }
    }

    fn next(&self) -> Task {
        let mut queue = self.shared.queue.lock();
        loop {
            if queue.is_stopping && queue.deltas.is_empty() {
                return Task::Stop;
            }
            if queue.is_retired {
                self.shared.work.wait(&mut queue);
                continue;
            }
            if !queue.rewrites.is_empty() {
                return Task::Rewrite(std::mem::take(&mut queue.rewrites));
            }
            if self
                .dirty_since
                .is_some_and(|since| since.elapsed() >= self.config.checkpoint_interval)
            {
                return Task::Checkpoint;
            }
            // Slices before younger deltas: otherwise a busy member would never get rid of rows.
            let written = queue.written;
            if queue.cuts.front().is_some_and(|cut| cut.after <= written) {
                return Task::Cut(queue.cuts.pop_front().expect("it was just looked at"));
            }
            // Rows go only after the entry that says so: a state without it would still offer them.
            let may_go = |slice: &Slice| slice.after <= written && slice.revision <= self.scheduled;
            let is_free = queue.holds == 0 && !queue.is_stopping;
            if is_free && queue.slices.front().is_some_and(may_go) {
                queue.is_removing = true;
                let slice = queue.slices.pop_front().expect("it was just looked at");
                self.shared.room.notify_all();
                return Task::Slice(slice);
            }
            let (mut rows, mut bytes, mut count) = (0, 0, 0);
            // A cut falls between two batches, never into one.
            let most = queue.cuts.front().map_or(u64::MAX, |cut| cut.after - written);
            for delta in &queue.deltas {
                rows += delta.rows.len() + delta.meta.len();
                bytes += cost(delta);
                let is_full = rows > BATCH_ROWS || bytes > BATCH_BYTES || count as u64 >= most;
                if count > 0 && is_full {
                    break;
                }
                count += 1;
            }
            if count > 0 {
                let deltas: Vec<_> = queue.deltas.drain(..count).collect();
                return Task::Deltas(deltas);
            }
            queue.is_idle = true;
            self.shared.room.notify_all();
            match self.dirty_since {
                Some(since) => {
                    self.shared
                        .work
                        .wait_until(&mut queue, since + self.config.checkpoint_interval);
                }
                None if self.is_worth_a_rest() => {
                    if self.shared.work.wait_for(&mut queue, REST).timed_out() {
                        return Task::Rest;
                    }
                }
                None => self.shared.work.wait(&mut queue),
            }
        }
    }

    fn backend(&mut self) -> &mut dyn Backend {
        self.backend.as_mut().expect("whoever takes the handle puts one back").as_mut()
    }

    fn write(&mut self, deltas: Vec<Delta>) -> Result<(), EngineError> {
        let mut puts: Vec<Pair> = Vec::new();
        for delta in &deltas {
            for row in &delta.rows {
                let (key, value) = keys::encode_row(row);
                self.tally.add(&key, &value);
                puts.push((key, value));
            }
            for change in &delta.meta {
                self.write_meta(change, &mut puts)?;
            }
        }
        let is_first = self.dirty_since.is_none();
        if is_first {
            failpoint::hit("beforeStartDBTxn");
        }
        self.write_puts(puts)?;
        if is_first {
            failpoint::hit("afterStartDBTxn");
        }
        if let Some(last) = deltas.last() {
            (self.applied, self.chain) = (last.id, last.chain);
        }
        let newest = deltas.iter().rev().find_map(|delta| delta.rows.last());
        self.revision = newest.map_or(self.revision, |row| row.key.main);
        let bytes: usize = deltas.iter().map(cost).sum();
        self.note_dirty(bytes);
        let mut tail = self.shared.tail.write();
        for row in deltas.iter().flat_map(|delta| &delta.rows) {
            tail.remove(&row.key);
        }
        drop(tail);
        let mut queue = self.shared.queue.lock();
        queue.bytes -= bytes;
        queue.written += deltas.len() as u64;
        self.shared.room.notify_all();
        Ok(())
    }

    /// Queues the puts of a change; before a removal all earlier puts are carried out.
    fn write_meta(&mut self, change: &MetaChange, puts: &mut Vec<Pair>) -> Result<(), EngineError> {
        if let MetaChange::ScheduledCompaction(revision) = change {
            self.scheduled = self.scheduled.max(*revision);
        }
        let writes = keys::encode_meta(change);
        puts.extend(writes.puts);
        if !writes.removes.is_empty() {
            self.write_puts(std::mem::take(puts))?;
            for key in writes.removes {
                self.backend().remove(&key)?;
            }
        }
        Ok(())
    }

    fn write_puts(&mut self, puts: Vec<Pair>) -> Result<(), EngineError> {
        if puts.is_empty() { Ok(()) } else { self.backend().write(puts) }
    }

    fn note_dirty(&mut self, bytes: usize) {
        self.dirty_bytes += bytes as u64;
        self.held_bytes += bytes as u64;
        self.dirty_since.get_or_insert_with(Instant::now);
    }

    fn checkpoint_if_due(&mut self) -> Result<(), EngineError> {
        if self.dirty_bytes >= self.config.checkpoint_bytes { self.checkpoint() } else { Ok(()) }
    }

    /// Reads all tables as they stand.
    fn tables(&mut self) -> Result<Tables, EngineError> {
        let mut tables = Tables::default();
        let mut range = keys::tables_range();
        loop {
            let pairs = self.backend().scan(range.clone(), BATCH_ROWS, BATCH_BYTES)?;
            let Some((last, _)) = pairs.last() else { break };
            range.start = [last.as_ref(), &[0]].concat();
            for (key, value) in &pairs {
                tables.take(key, value).map_err(|malformed| EngineError {
                    doing: "read a table",
                    cause: format!("{malformed} at {key:02x?}"),
                })?;
            }
        }
        // The rows on disk are those of the last checkpoint.
        (tables.applied, tables.chain) = (self.applied, Some(self.chain));
        Ok(tables)
    }

    /// Makes everything written so far durable together with the position that it amounts to.
    fn checkpoint(&mut self) -> Result<(), EngineError> {
        let begun = Instant::now();
        failpoint::hit("commitBeforePreCommitHook");
        let mut told = self.applied;
        if sabotage::is(Variant::AppliedBehind) {
            told.index = told.index.saturating_sub(3);
        }
        let closing = keys::encode_checkpoint(told, self.chain, self.tally).to_vec();
        self.backend().write(closing)?;
        failpoint::hit("commitAfterPreCommitHook");
        failpoint::hit("beforeCommit");
        self.backend().flush()?;
        failpoint::hit("afterCommit");
        (self.dirty_bytes, self.dirty_since) = (0, None);
        let applied = self.applied;
        self.announce(|signals| signals.durable_applied.send_replace(applied));
        self.record(begun.elapsed());
        Ok(())
    }

    /// Tells those who wait, unless a successor has the word.
    fn announce<T>(&self, tell: impl FnOnce(&Signals) -> T) {
        let queue = self.shared.queue.lock();
        if !queue.is_retired {
            tell(&self.shared.signals);
        }
    }

    fn record(&self, duration: Duration) {
        let mut checkpoints = self.shared.checkpoints.lock();
        if checkpoints.samples.len() == CHECKPOINT_SAMPLES {
            checkpoints.samples.pop_front();
        }
        checkpoints.samples.push_back(duration);
    }

    /// Removes the rows of one slice. Its leaves come into memory whole and stay there until a flush,
    /// so they count as dirty bytes, and enough of them make a checkpoint, as writes do. The end of a
    /// compaction is written with the last rows or after them, and told once it is on disk.
    fn remove(&mut self, slice: Slice) -> Result<(), EngineError> {
        if !slice.last {
            failpoint::hit("compactBeforeCommitBatch");
        }
        let (mut bytes, count) = (0, slice.rows.len() as u64);
        let ends = slice.rows.first().zip(slice.rows.last());
        let span = ends.map_or(0, |(first, last)| first.0.main.abs_diff(last.0.main) + 1);
        for (revision, tombstone) in slice.rows {
            let key = keys::row_key(revision, tombstone);
            if let Some(value) = self.backend().remove(&key)? {
                bytes += value.len() as u64 + ROW_COST;
                self.tally.subtract(&key, &value);
            }
        }
        if slice.last {
            failpoint::hit("compactBeforeSetFinishedCompact");
            let finished = keys::encode_meta(&MetaChange::FinishedCompaction(slice.revision));
            self.write_puts(finished.puts)?;
        }
        // The neighbors of a removed row come into memory with it.
        let touched = span.clamp(count, count * LEAF_ROWS);
        let each = bytes / count.max(1);
        self.note_dirty(usize::try_from(each * touched).unwrap_or(usize::MAX));
        self.held_bytes = self.held_bytes.saturating_sub(bytes);
        if slice.last {
            self.checkpoint()?;
            failpoint::hit("compactAfterSetFinishedCompact");
            self.announce(|signals| signals.finished_compaction.send_replace(slice.revision));
        } else {
            failpoint::hit("compactAfterCommitBatch");
            self.checkpoint_if_due()?;
        }
        self.shared.queue.lock().is_removing = false;
        self.shared.room.notify_all();
        Ok(())
    }

    /// Gives back the memory that the database holds for what was written. Only right after a
    /// checkpoint: closing flushes, and nothing but a checkpoint may do so.
    fn reopen_if_due(&mut self) -> Result<(), EngineError> {
        let Some(place) = &self.config.place else { return Ok(()) };
        if self.dirty_since.is_some() || self.held_bytes < place.cache_bytes {
            return Ok(());
        }
        let dir = self.shared.generation_dir.lock().clone();
        let Some(dir) = dir else { return Ok(()) };
        if self.held_bytes < crate::disk::used_bytes(&dir) / HELD_PART {
            return Ok(());
        }
        self.reopen()
    }

    fn is_worth_a_rest(&self) -> bool {
        let place = self.config.place.as_ref();
        let least = |place: &Place| (place.cache_bytes / REST_PART).max(self.rest_from).max(1);
        place.is_some_and(|place| self.held_bytes >= least(place))
    }

    /// Uses a pause to give memory back.
    fn rest(&mut self) -> Result<(), EngineError> {
        let dir = self.shared.generation_dir.lock().clone();
        let files = dir.as_deref().map_or(0, crate::disk::used_bytes);
        if self.held_bytes < files / REST_HELD_PART {
            // Not before there is more: the files are not measured again for the same answer.
            self.rest_from = files / REST_HELD_PART;
            return Ok(());
        }
        self.reopen()
    }

    /// As above, whatever is held.
    fn reopen(&mut self) -> Result<(), EngineError> {
        let Some(place) = &self.config.place else { return Ok(()) };
        let cache_bytes = place.cache_bytes;
        let dir = self.shared.generation_dir.lock().clone();
        let Some(dir) = dir else { return Ok(()) };
        let begun = Instant::now();
        let give = self.shared.reads.pause();
        if let Some(old) = self.backend.take() {
            old.close();
        }
        let fresh = self.watchdog.wrap(Box::new(recover::open_patiently(&dir, cache_bytes)?));
        // A reader that is gone leaves with the process.
        let _ = give.send(Some(fresh.reader()));
        self.backend = Some(fresh);
        self.rest_from = 0;
        tracing::debug!(held_bytes = self.held_bytes, took = ?begun.elapsed(), "opened the state anew");
        self.held_bytes = 0;
        Ok(())
    }

    /// Copies the database into a new generation if that is worth it.
    fn rewrite(&mut self) -> Result<bool, EngineError> {
        self.checkpoint()?;
        let Some(place) = self.config.place.clone() else { return Ok(false) };
        // While another state is received this one is not worth the work.
        let Some(_claim) = place.claim() else { return Ok(false) };
        let fresh = recover::rewrite(&place, self.backend())?;
        let Some((dir, fresh)) = fresh else { return Ok(false) };
        let fresh = self.watchdog.wrap(fresh);
        let give = self.shared.reads.pause();
        if let Some(old) = self.backend.replace(fresh) {
            old.close();
        }
        let reader = self.backend().reader();
        *self.shared.generation_dir.lock() = Some(dir);
        recover::remove_other_generations(&place);
        // A reader that is gone leaves with the process.
        let _ = give.send(Some(reader));
        self.held_bytes = 0;
        Ok(true)
    }

    fn finish(&mut self) -> Result<(), EngineError> {
        if self.dirty_since.is_some() && !self.shared.queue.lock().is_retired {
            self.checkpoint()?;
        }
        // The reader closes first: the writer's handle must be the last.
        let _ = self.shared.reads.pause().send(None);
        let backend = self.backend.take().expect("whoever takes the handle puts one back");
        backend.close();
        let mut queue = self.shared.queue.lock();
        queue.is_stopping = true;
        queue.rewrites.clear();
        queue.cuts.clear();
        queue.is_removing = false;
        self.shared.room.notify_all();
        Ok(())
    }
}
