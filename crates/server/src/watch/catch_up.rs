//! Reads a piece of history and picks from it what some watchers of one stream want. It blocks, so
//! it runs outside the async workers; it has no state of its own and sends nothing.

use std::collections::BTreeMap;
use std::sync::Arc;

use kelson_api::Error;
use kelson_storage::{FeedEvent, Revised};

use super::event::is_creation;
use super::watchers::{Filter, Interest};
use super::{IntervalIndex, SharedRevision, Slot, Source, Tuning};

/// What one read of history found.
pub(super) enum Slice {
    /// Events, and how far the read came.
    Read {
        /// Per watcher its events in order. Watchers without events are absent.
        found: BTreeMap<Slot, Vec<Found>>,
        /// First revision that was not covered.
        next: i64,
    },
    /// The revisions asked for are gone; this is the compaction revision.
    Compacted(i64),
    /// The store could not be read.
    Failed(Error),
}

/// One event for one watcher.
pub(super) struct Found {
    pub(super) revision: Arc<SharedRevision>,
    pub(super) event: u32,
}

/// An entry of the index that routes events to watchers.
#[derive(Clone, Copy)]
struct Wanted {
    slot: Slot,
    filter: Filter,
    prev_kv: bool,
    next: i64,
}

impl PartialEq for Wanted {
    fn eq(&self, other: &Self) -> bool {
        self.slot == other.slot
    }
}

impl Eq for Wanted {}

impl PartialOrd for Wanted {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Wanted {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.slot.cmp(&other.slot)
    }
}

/// Picks the events of revisions for watchers, each from its own `next` on.
pub(super) struct Picker {
    index: IntervalIndex<Wanted>,
    found: BTreeMap<Slot, Vec<Found>>,
    hits: usize,
    bytes: usize,
    compacted: i64,
}

impl Picker {
    /// A picker for these watchers. The state before an event at exactly revision `compacted` is
    /// taken for gone even if memory still has it, so that all members tell the same.
    pub(super) fn new<'a>(
        interests: impl IntoIterator<Item = &'a Interest>,
        compacted: i64,
    ) -> Self {
        let mut index = IntervalIndex::new();
        for interest in interests {
            let Interest { slot, filter, prev_kv, next, .. } = *interest;
            index.insert(&interest.range, Wanted { slot, filter, prev_kv, next });
        }
        Picker { index, found: BTreeMap::new(), hits: 0, bytes: 0, compacted }
    }

    /// Adds what the watchers want of one revision. `fill` may complete the revision with states
    /// before its events, which the watchers at the given places asked for; `None` gives up.
    pub(super) fn pick(
        &mut self,
        revised: &Arc<Revised>,
        fill: impl FnOnce(&Arc<Revised>, &[usize]) -> Option<Arc<Revised>>,
    ) -> Option<()> {
        let mut hits = Vec::new();
        let mut incomplete = Vec::new();
        for (place, event) in revised.events.iter().enumerate() {
            let mut lacks_prev_kv = false;
            self.index.visit(&event.kv.key, |wanted| {
                if revised.revision >= wanted.next && wanted.filter.passes(event.kind) {
                    hits.push((wanted.slot, place as u32));
                    lacks_prev_kv |= wanted.prev_kv;
                }
            });
            if lacks_prev_kv && event.prev_kv.is_none() && !is_creation(event) {
                incomplete.push(place);
            }
        }
        if hits.is_empty() {
            return Some(());
        }
        let complete = if revised.revision == self.compacted {
            without_prev_kv(revised)
        } else if incomplete.is_empty() {
            revised.clone()
        } else {
            fill(revised, &incomplete)?
        };
        self.hits += hits.len();
        let revision = Arc::new(SharedRevision::new(complete));
        self.bytes += revision.bytes();
        for (slot, event) in hits {
            let found = Found { revision: revision.clone(), event };
            self.found.entry(slot).or_default().push(found);
        }
        Some(())
    }

    /// Whether enough was picked for one go.
    pub(super) fn is_full(&self, tuning: &Tuning) -> bool {
        self.hits >= tuning.slice_hits || self.bytes >= tuning.slice_bytes
    }

    pub(super) fn finish(self) -> BTreeMap<Slot, Vec<Found>> {
        self.found
    }
}

/// Reads history from `from` up to `before` (exclusive) for these watchers, as far as the bounds
/// of `tuning` let it. A revision is never split.
pub(super) fn read_slice<S: Source>(
    source: &S,
    interests: &[Interest],
    from: i64,
    before: i64,
    tuning: &Tuning,
) -> Slice {
    let span = usize::try_from(before.saturating_sub(from)).unwrap_or(0).max(1);
    let max_revisions = tuning.slice_revisions.min(span);
    let changes = match source.changes(from, max_revisions, tuning.slice_bytes) {
        Ok(changes) => changes,
        Err(Error::Compacted) => return Slice::Compacted(source.compacted()),
        Err(error) => return Slice::Failed(error),
    };
    let mut picker = Picker::new(interests, source.compacted());
    let mut next = changes.next.min(before);
    for revised in changes.batches.iter().filter(|revised| revised.revision < before) {
        let revised = &without_compacted_states(revised, source.compacted());
        if picker.pick(revised, |revised, places| with_prev_kv(source, revised, places)).is_none() {
            return Slice::Compacted(source.compacted());
        }
        if picker.is_full(tuning) {
            next = revised.revision + 1;
            break;
        }
    }
    if next <= from && changes.store_revision >= from {
        // Asking again would go on for ever.
        tracing::error!(from, next, "reading history for a watch does not get on");
        return Slice::Failed(Error::Corrupt);
    }
    Slice::Read { found: picker.finish(), next }
}

/// At the compaction revision itself the states before are gone, even if memory still has them: a
/// watcher gets the same answer on every member and after every restart.
fn without_compacted_states(revised: &Arc<Revised>, compacted: i64) -> Arc<Revised> {
    if revised.revision > compacted {
        return revised.clone();
    }
    let mut events = revised.events.clone();
    events.iter_mut().for_each(|event| event.prev_kv = None);
    Arc::new(Revised { revision: revised.revision, events })
}

/// Completes the events at `places` with the states before them. `None`: a compaction went beyond
/// this revision meanwhile, so those states are gone and the watchers are overtaken. At exactly the
/// compaction revision the event is told without the state before it.
fn with_prev_kv<S: Source>(
    source: &S,
    revised: &Arc<Revised>,
    places: &[usize],
) -> Option<Arc<Revised>> {
    if revised.revision == source.compacted() {
        return Some(revised.clone());
    }
    let mut events: Vec<FeedEvent> = revised.events.clone();
    let mut is_missing = false;
    for place in places {
        let event = &mut events[*place];
        event.prev_kv = source.kv_before(&event.kv.key, revised.revision);
        is_missing |= event.prev_kv.is_none();
    }
    // A delete of a key that the same revision created has no state before it either.
    if is_missing && revised.revision < source.compacted() {
        return None;
    }
    Some(Arc::new(Revised { revision: revised.revision, events }))
}

fn without_prev_kv(revised: &Revised) -> Arc<Revised> {
    let mut events = revised.events.clone();
    for event in &mut events {
        event.prev_kv = None;
    }
    Arc::new(Revised { revision: revised.revision, events })
}
