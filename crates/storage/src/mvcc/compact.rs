//! Compaction: in force for readers at once, carried out in the background. A thread of its own walks
//! the index in small steps, drops what is no longer retained and hands the rows to the persister in
//! slices with pauses. Pins hold the removal back while somebody scans an old revision.
//!
//! The walk is in key order, the rows lie on disk in revision order. They are sorted before they are
//! cut into slices: a slice in key order would touch nearly every leaf of the database, and each leaf
//! would be read and written again for a handful of rows, slice after slice.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, Instant};

use kelson_api::Error;
use parking_lot::{Condvar, Mutex};

use super::index::Doomed;
use super::state::{State, count};
use crate::persist::Persister;
use crate::sabotage::{self, Variant};
use crate::types::RevisionKey;

/// Keys per hold of the index lock.
const STEP: usize = 256;
/// Rows that are sorted together: 24 MiB of row names.
const SORTED_ROWS: usize = 1 << 20;

/// The compaction revision, the work that is left, and who holds it back.
pub(crate) struct Compaction {
    compacted: AtomicI64,
    work: Mutex<Work>,
    changed: Condvar,
}

struct Work {
    /// Revision up to which rows should go; never beyond `compacted`.
    wanted: i64,
    /// Revision up to which rows have been handed to the persister.
    done: i64,
    /// Readers of old revisions by revision.
    pins: BTreeMap<i64, usize>,
    stop: bool,
    /// How often the state was replaced.
    epoch: u64,
}

impl Work {
    /// There is a compaction that nobody holds back.
    fn is_due(&self) -> bool {
        let is_free = self.pins.first_key_value().is_none_or(|(&pin, _)| pin >= self.wanted);
        self.wanted > self.done && is_free
    }
}

impl Compaction {
    /// `scheduled` and `finished` are -1 if there never was a compaction.
    pub(crate) fn new(scheduled: i64, finished: i64) -> Self {
        let work = Work {
            wanted: scheduled,
            done: finished,
            pins: BTreeMap::new(),
            stop: false,
            epoch: 0,
        };
        Self {
            compacted: AtomicI64::new(scheduled),
            work: Mutex::new(work),
            changed: Condvar::new(),
        }
    }

    /// Reads below this revision fail; -1 = never compacted.
    pub(crate) fn compacted(&self) -> i64 {
        let compacted = self.compacted.load(Ordering::Acquire);
        compacted - i64::from(sabotage::is(Variant::ReadBelowCompaction))
    }

    /// Puts a compaction in force and wakes the thread.
    pub(crate) fn schedule(&self, revision: i64) {
        let mut work = self.work.lock();
        self.compacted.store(revision, Ordering::Release);
        work.wanted = revision;
        self.changed.notify_all();
    }

    /// Takes over from a replaced state; a compaction of the old one that is under way is given up.
    /// The caller holds the index lock.
    pub(crate) fn restart(&self, scheduled: i64, finished: i64) {
        let mut work = self.work.lock();
        self.compacted.store(scheduled, Ordering::Release);
        (work.wanted, work.done) = (scheduled, finished);
        work.epoch += 1;
        self.changed.notify_all();
    }

    /// Ends the thread after its current slice; what is left resumes at the next start.
    pub(crate) fn stop(&self) {
        self.work.lock().stop = true;
        self.changed.notify_all();
    }

    fn pin(&self, revision: i64) -> Result<(), Error> {
        let mut work = self.work.lock();
        if revision < self.compacted() {
            return Err(Error::Compacted);
        }
        *work.pins.entry(revision).or_default() += 1;
        Ok(())
    }

    /// Pins that live.
    pub(crate) fn open_pins(&self) -> usize {
        self.work.lock().pins.values().sum()
    }

    fn unpin(&self, revision: i64) {
        let mut work = self.work.lock();
        if let Some(holders) = work.pins.get_mut(&revision) {
            *holders -= 1;
            if *holders == 0 {
                work.pins.remove(&revision);
                self.changed.notify_all();
            }
        }
    }

    /// Waits for a compaction that nobody holds back, and tells its epoch. `None` = stop.
    fn next(&self) -> Option<(i64, u64)> {
        let mut work = self.work.lock();
        loop {
            if work.stop {
                return None;
            }
            if work.is_due() {
                return Some((work.wanted, work.epoch));
            }
            self.changed.wait(&mut work);
        }
    }

    fn finish(&self, revision: i64, epoch: u64) {
        let mut work = self.work.lock();
        if work.epoch == epoch {
            work.done = work.done.max(revision);
            self.changed.notify_all();
        }
    }

    /// Waits until nothing is left that nobody holds back.
    pub(crate) fn settle(&self) {
        let mut work = self.work.lock();
        while work.is_due() && !work.stop {
            self.changed.wait(&mut work);
        }
    }

    fn epoch(&self) -> u64 {
        self.work.lock().epoch
    }

    /// Sleeps between slices; returns false if it is time to stop.
    fn pause(&self, length: Duration) -> bool {
        let until = Instant::now() + length;
        let mut work = self.work.lock();
        while !work.stop {
            if self.changed.wait_until(&mut work, until).timed_out() {
                break;
            }
        }
        !work.stop
    }
}

/// Keeps the rows of one revision on disk while it lives, whatever is compacted meanwhile.
pub struct Pin {
    state: Arc<State>,
    revision: i64,
}

impl Pin {
    pub(crate) fn new(state: Arc<State>, revision: i64) -> Result<Self, Error> {
        state.compaction.pin(revision)?;
        Ok(Self { state, revision })
    }

    /// The revision that stays readable on disk.
    pub fn revision(&self) -> i64 {
        self.revision
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        self.state.compaction.unpin(self.revision);
    }
}

/// How the thread spreads its work. Limits: etcd's own, changeable by flag.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pace {
    /// Rows per slice.
    pub(crate) batch_limit: usize,
    /// Pause after a full slice.
    pub(crate) sleep: Duration,
}

/// Runs compactions until told to stop.
pub(crate) fn run(state: &State, pace: Pace) {
    while let Some((revision, epoch)) = state.compaction.next() {
        count(&state.counters.compactions, 1);
        if !compact(state, revision, epoch, pace) {
            return;
        }
        state.compaction.finish(revision, epoch);
    }
}

/// Returns false if it was stopped before the end. It gives up when the state is replaced.
fn compact(state: &State, revision: i64, epoch: u64, pace: Pace) -> bool {
    let start = Instant::now();
    let mut doomed = Doomed::new();
    let mut after: Option<Box<[u8]>> = None;
    loop {
        let persister = {
            let mut index = state.index.write();
            if state.compaction.epoch() != epoch {
                return true;
            }
            let step = Instant::now();
            let too_far = i64::from(sabotage::is(Variant::CompactionTooFar));
            after = index.compact(revision + too_far, after.as_deref(), STEP, &mut doomed);
            state.times.index_compaction.add(step.elapsed());
            // The one that holds the rows of this very index.
            state.persister()
        };
        let is_last = after.is_none();
        if is_last || doomed.len() >= SORTED_ROWS {
            doomed.sort_unstable();
            if !hand_over(state, &persister, &doomed, (revision, is_last), pace) {
                return false;
            }
            doomed.clear();
        }
        if is_last {
            state.times.compacted(start);
            return true;
        }
    }
}

/// Gives sorted rows to the persister, slice by slice; `is_last` ends the compaction to `revision`.
/// Returns false if it was stopped on the way.
fn hand_over(
    state: &State,
    persister: &Persister,
    doomed: &[(RevisionKey, bool)],
    (revision, is_last): (i64, bool),
    pace: Pace,
) -> bool {
    let mut rest = doomed;
    loop {
        let (slice, behind) = rest.split_at(rest.len().min(pace.batch_limit.max(1)));
        rest = behind;
        let ends = is_last && rest.is_empty();
        count(&state.counters.compacted_rows, slice.len() as u64);
        persister.remove_rows(slice.to_vec(), revision, ends);
        if ends {
            return true;
        }
        if !state.compaction.pause(pace.sleep) {
            return false;
        }
        if rest.is_empty() {
            return true;
        }
    }
}
