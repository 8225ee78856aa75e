//! What the log knows without touching a file: the tail of entries and the places of all others.
//!
//! One mutex guards it. Callers of [`super::Log`] change it at once (so that entries are readable
//! when `append` returns), the writer thread follows later; the operation numbers tell which of
//! its entries the files already hold. It never does I/O.

use std::collections::VecDeque;

use crate::types::LogId;

use super::segment::{Segment, Slot};
use super::{Entry, LogError};

/// An entry in the tail with the number of the operation that brought it.
struct Held {
    entry: Entry,
    operation: u64,
}

/// A change to the places of entries, in the order of the records in the files.
#[derive(Clone, Copy)]
pub(super) enum Place {
    Entry(u64, Slot),
    TruncateAfter(u64),
    /// The purge went beyond the last entry: nothing that was written is alive.
    Reset,
}

/// Invariants:
/// - an index in `(purged, last]` is in the tail or has a slot in a segment that is valid for it;
/// - the tail is dense, ends at `last`, and holds everything that is not yet written;
/// - slots above `last`, or of truncated entries that the writer has still to truncate, exist but
///   are never looked at, because the tail or the bound `last` comes first.
pub(super) struct Memory {
    tail: VecDeque<Held>,
    tail_bytes: usize,
    tail_bytes_max: usize,
    pub(super) segments: VecDeque<Segment>,
    pub(super) purged: LogId,
    pub(super) last: LogId,
    /// The newest committed position that raft told us; the writer notes it now and then.
    pub(super) committed: LogId,
    pub(super) has_vote: bool,
    pub(super) closed: bool,
    /// Number of the newest append or truncation, and of the newest one that is in the files.
    operation: u64,
    written: u64,
    /// Truncations that are not in the files yet: no earlier append may publish beyond them.
    truncations: VecDeque<(u64, u64)>,
}

/// Where a run of entries must be read from.
pub(super) enum Source {
    /// Already here.
    Tail(Vec<Entry>),
    /// One read from one file covers these entries.
    File(FileRun),
}

/// Consecutive entries of one segment.
pub(super) struct FileRun {
    pub(super) path: std::path::PathBuf,
    pub(super) file: std::sync::Arc<dyn super::disk::LogFile>,
    pub(super) seed: super::record::Seed,
    pub(super) from: u64,
    pub(super) slots: Vec<Slot>,
}

impl Memory {
    pub(super) fn new(
        segments: VecDeque<Segment>,
        (purged, last): (LogId, LogId),
        has_vote: bool,
        tail_bytes_max: usize,
    ) -> Memory {
        Memory {
            tail: VecDeque::new(),
            tail_bytes: 0,
            tail_bytes_max,
            segments,
            purged,
            last,
            committed: LogId::default(),
            has_vote,
            closed: false,
            operation: 0,
            written: 0,
            truncations: VecDeque::new(),
        }
    }

    /// Adds entries at the end and numbers the operation.
    pub(super) fn append(&mut self, entries: &[Entry]) -> Result<u64, LogError> {
        let mut last = self.last;
        for entry in entries {
            if entry.id.index != last.index + 1 || entry.id.term < last.term {
                return Err(LogError::OutOfOrder { last, entry: entry.id });
            }
            last = entry.id;
        }
        self.operation += 1;
        for entry in entries {
            self.tail_bytes += entry.payload.len();
            self.tail.push_back(Held { entry: entry.clone(), operation: self.operation });
        }
        self.last = last;
        Ok(self.operation)
    }

    /// Drops all entries behind `index` and returns the operation number with the new last id.
    pub(super) fn truncate_after(&mut self, index: u64) -> Result<(u64, LogId), LogError> {
        if index < self.purged.index {
            return Err(LogError::Purged { index, purged: self.purged });
        }
        self.operation += 1;
        if index < self.last.index {
            self.last = self.id_at(index).expect("an index between purged and last has an id");
            while self.tail.back().is_some_and(|held| held.entry.id.index > index) {
                self.pop(VecDeque::pop_back);
            }
        }
        self.truncations.push_back((self.operation, index));
        Ok((self.operation, self.last))
    }

    /// Drops all entries up to `upto`, or everything if the log ends before it.
    pub(super) fn purge(&mut self, upto: LogId) {
        if upto.index <= self.purged.index {
            return;
        }
        self.purged = upto;
        while self.tail.front().is_some_and(|held| held.entry.id.index <= upto.index) {
            self.pop(VecDeque::pop_front);
        }
        if upto.index >= self.last.index {
            self.last = upto;
        }
    }

    /// Takes over what the writer has put into the files, up to and with `operation`.
    pub(super) fn written(&mut self, operation: u64, places: &[Place]) {
        for place in places {
            match *place {
                Place::Entry(index, slot) => {
                    let active = self.segments.back_mut().expect("there is an active segment");
                    active.push(index, slot);
                }
                Place::TruncateAfter(index) => truncate_segments(&mut self.segments, index),
                Place::Reset => truncate_segments(&mut self.segments, 0),
            }
        }
        self.written = operation;
        while self.truncations.front().is_some_and(|&(number, _)| number <= operation) {
            self.truncations.pop_front();
        }
        self.evict();
    }

    /// The highest index that may be published as durable when the files end at `last`.
    pub(super) fn durable_index(&self, last: u64) -> u64 {
        self.truncations.iter().fold(last, |bound, &(_, index)| bound.min(index))
    }

    /// Takes out the oldest segments that hold no live entry; the active one always stays.
    pub(super) fn retire(&mut self) -> Vec<Segment> {
        let purged = self.purged.index;
        let mut retired = Vec::new();
        while self.segments.len() > 1
            && self.segments[0].last_index().is_none_or(|last| last <= purged)
        {
            retired.extend(self.segments.pop_front());
        }
        retired
    }

    /// Position of an entry, of the purge mark or of the beginning of all logs.
    pub(super) fn id_at(&self, index: u64) -> Option<LogId> {
        if index == self.purged.index {
            return Some(self.purged);
        }
        if index < self.purged.index || index > self.last.index {
            return None;
        }
        if index == self.last.index {
            return Some(self.last);
        }
        let term = match self.held(index) {
            Some(held) => held.entry.id.term,
            None => self.slot(index)?.1.term,
        };
        Some(LogId { term, index })
    }

    /// Finds the next entries of `from..to`, at least one and then up to `bytes_max` of payload.
    /// The caller guarantees `purged < from < to <= last + 1`.
    pub(super) fn locate(&self, from: u64, to: u64, bytes_max: usize) -> Option<Source> {
        if self.held(from).is_some() {
            return Some(Source::Tail(self.held_entries(from, to, bytes_max)));
        }
        let (segment, _) = self.slot(from)?;
        let first_held = self.tail.front().map_or(u64::MAX, |held| held.entry.id.index);
        let mut slots: Vec<Slot> = Vec::new();
        let mut bytes = 0;
        for index in from..to.min(first_held) {
            let Some(slot) = segment.slot(index) else { break };
            bytes += slot.payload_bytes as usize;
            if bytes > bytes_max && !slots.is_empty() {
                break;
            }
            // A truncation leaves dead records between live ones: the read must not grow by them.
            let start = slots.first().map_or(slot.position, |first| first.position);
            let span = (slot.position - start) as usize + slot.payload_bytes as usize;
            if span > bytes_max.saturating_mul(2) && !slots.is_empty() {
                break;
            }
            slots.push(slot);
        }
        let (path, file) = (segment.path.clone(), segment.file.clone());
        Some(Source::File(FileRun { path, file, seed: segment.seed, from, slots }))
    }

    fn held_entries(&self, from: u64, to: u64, bytes_max: usize) -> Vec<Entry> {
        let front = self.tail.front().map_or(0, |held| held.entry.id.index);
        let mut entries = Vec::new();
        let mut bytes = 0;
        for held in self.tail.range((from - front) as usize..) {
            bytes += held.entry.payload.len();
            if held.entry.id.index >= to || (bytes > bytes_max && !entries.is_empty()) {
                break;
            }
            entries.push(held.entry.clone());
        }
        entries
    }

    fn held(&self, index: u64) -> Option<&Held> {
        let front = self.tail.front()?.entry.id.index;
        self.tail.get(usize::try_from(index.checked_sub(front)?).ok()?)
    }

    /// Newest segments first: after a truncation an index may have stood in an older one too.
    fn slot(&self, index: u64) -> Option<(&Segment, Slot)> {
        self.segments.iter().rev().find_map(|segment| Some((segment, segment.slot(index)?)))
    }

    /// Gives back memory of the oldest entries; what is not in the files yet must stay.
    fn evict(&mut self) {
        while self.tail_bytes > self.tail_bytes_max
            && self.tail.front().is_some_and(|held| held.operation <= self.written)
        {
            self.pop(VecDeque::pop_front);
        }
    }

    fn pop(&mut self, end: fn(&mut VecDeque<Held>) -> Option<Held>) {
        if let Some(held) = end(&mut self.tail) {
            self.tail_bytes -= held.entry.payload.len();
        }
    }
}

/// Forgets the places of all entries behind `index`.
pub(super) fn truncate_segments(segments: &mut VecDeque<Segment>, index: u64) {
    for segment in segments.iter_mut().rev() {
        if segment.last_index().is_some_and(|last| last > index) {
            segment.truncate_after(index);
        }
    }
}
