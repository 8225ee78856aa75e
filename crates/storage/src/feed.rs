//! The recent past, for watchers and for readers at a slightly old revision: a bounded ring of the
//! last revisions, and one number that moves when there is something new. The feed pushes nothing to
//! anybody; whoever listens reads the ring at its own pace.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use bytes::Bytes;
use kelson_api::mvccpb::KeyValue;
use kelson_api::mvccpb::event::EventType;
use parking_lot::RwLock;
use tokio::sync::watch;

use crate::mvcc::span::Span;
use crate::types::{FeedEvent, Recent, Revised, RevisionKey};

/// Revisions that the ring remembers; beyond it a slow watcher reads history from disk.
const REVISIONS_MAX: usize = 10_000;
/// Changes of one revision for which room is kept for the next one.
const STAGED_KEPT: usize = 128;

/// The recent revisions of the store.
pub struct Feed {
    ring: RwLock<Ring>,
    revision: AtomicI64,
    moved: watch::Sender<i64>,
}

struct Ring {
    batches: VecDeque<Arc<Revised>>,
    bytes: usize,
    /// Bytes that the ring remembers, same consequence as `REVISIONS_MAX`.
    bytes_max: usize,
    /// Newest revision in the ring, or the store's revision when it was opened.
    last: i64,
    /// Revisions up to here are in the persister's hands; younger ones may not leave the ring.
    handed_over: i64,
    /// Changes of the revision in the making, `last + 1`.
    staged: Vec<FeedEvent>,
}

impl Ring {
    /// First revision that the ring holds, or will hold if it is empty.
    fn first(&self) -> i64 {
        self.last + 1 - len(&self.batches)
    }

    fn events(&self, revision: i64) -> Option<&[FeedEvent]> {
        if revision == self.last + 1 {
            return Some(&self.staged);
        }
        let place = usize::try_from(revision.checked_sub(self.first())?).ok()?;
        self.batches.get(place).map(|revised| revised.events.as_slice())
    }

    fn shrink(&mut self) {
        while self.batches.len() > REVISIONS_MAX || self.bytes > self.bytes_max {
            if self.first() > self.handed_over {
                return;
            }
            let Some(oldest) = self.batches.pop_front() else { return };
            self.bytes -= cost(&oldest.events);
        }
    }
}

fn len(batches: &VecDeque<Arc<Revised>>) -> i64 {
    i64::try_from(batches.len()).expect("the ring is bounded")
}

fn cost(events: &[FeedEvent]) -> usize {
    let one = |kv: &KeyValue| kv.key.len() + kv.value.len();
    let rows = events.iter().map(|event| one(&event.kv) + event.prev_kv.as_ref().map_or(0, one));
    rows.sum::<usize>() + size_of_val(events)
}

impl Feed {
    pub(crate) fn new(revision: i64, bytes_max: usize) -> Self {
        let ring = Ring {
            batches: VecDeque::new(),
            bytes: 0,
            bytes_max,
            last: revision,
            handed_over: revision,
            staged: Vec::new(),
        };
        Self {
            ring: RwLock::new(ring),
            revision: AtomicI64::new(revision),
            moved: watch::Sender::new(revision),
        }
    }

    /// The store revision, and a signal each time it moves.
    pub fn revision(&self) -> watch::Receiver<i64> {
        self.moved.subscribe()
    }

    /// Every revision after `after`, if the ring still remembers them all.
    pub fn recent(&self, after: i64) -> Recent {
        let ring = self.ring.read();
        let Ok(known) = usize::try_from(after.saturating_add(1).saturating_sub(ring.first()))
        else {
            return Recent::TooOld;
        };
        Recent::Batches(ring.batches.iter().skip(known).cloned().collect())
    }

    /// The newest revision that readers may see.
    pub(crate) fn current(&self) -> i64 {
        self.revision.load(Ordering::Acquire)
    }

    /// First revision that the ring remembers; all older ones are in the persister's hands.
    pub(crate) fn first(&self) -> i64 {
        self.ring.read().first()
    }

    /// Up to `max_revisions` revisions from `from` on, at least one if there is any, which must not be
    /// older than the ring.
    pub(crate) fn slice(
        &self,
        from: i64,
        max_revisions: usize,
        max_bytes: usize,
    ) -> Option<Vec<Arc<Revised>>> {
        let ring = self.ring.read();
        let skip = usize::try_from(from.saturating_sub(ring.first())).ok()?;
        let mut bytes = 0;
        let mut taken = Vec::new();
        for revised in ring.batches.iter().skip(skip).take(max_revisions.max(1)) {
            taken.push(revised.clone());
            bytes += cost(&revised.events);
            if bytes >= max_bytes {
                break;
            }
        }
        Some(taken)
    }

    /// Adds a change to the revision in the making. `overwrites_own` tells that this revision already
    /// changed the key, so that the state before it comes from that earlier change. A creation has
    /// no state before it, even if the same revision deleted the key first: etcd has it so.
    pub(crate) fn stage(&self, mut event: FeedEvent, overwrites_own: bool) {
        let mut ring = self.ring.write();
        let is_creation = event.kind == EventType::Put && event.kv.version == 1;
        if overwrites_own && !is_creation {
            let own = ring.staged.iter().find(|earlier| earlier.kv.key == event.kv.key);
            event.prev_kv = own.and_then(|earlier| earlier.prev_kv.clone());
        }
        ring.staged.push(event);
    }

    /// Makes the staged changes visible as the next revision. The ring holds them before anyone can
    /// learn the number.
    pub(crate) fn publish(&self) -> i64 {
        let mut ring = self.ring.write();
        let revision = ring.last + 1;
        // A list of exactly its size, since the ring holds thousands.
        let events: Vec<_> = ring.staged.drain(..).collect();
        ring.staged.shrink_to(STAGED_KEPT);
        ring.bytes += cost(&events);
        ring.batches.push_back(Arc::new(Revised { revision, events }));
        ring.last = revision;
        ring.shrink();
        self.revision.store(revision, Ordering::Release);
        drop(ring);
        self.moved.send_replace(revision);
        revision
    }

    /// Lets the ring forget revisions again that the persister has taken over.
    pub(crate) fn hand_over(&self, revision: i64) {
        self.ring.write().handed_over = revision;
    }

    /// Starts anew after the whole state was replaced.
    pub(crate) fn restart(&self, revision: i64) {
        let mut ring = self.ring.write();
        ring.batches.clear();
        ring.staged.clear();
        ring.bytes = 0;
        (ring.last, ring.handed_over) = (revision, revision);
        self.revision.store(revision, Ordering::Release);
        drop(ring);
        self.moved.send_replace(revision);
    }

    /// The row that the change at `successor` replaced, if the ring remembers that change.
    pub(crate) fn replaced_by(&self, successor: RevisionKey) -> Option<KeyValue> {
        let ring = self.ring.read();
        let place = usize::try_from(successor.sub).ok()?;
        ring.events(successor.main)?.get(place)?.prev_kv.clone()
    }

    /// How many keys of the span came to be (less those that went) after `revision`, in the revision
    /// in the making too unless that is the one asked for. `None` if the ring does not go back so far.
    pub(crate) fn born_after(&self, revision: i64, span: &Span) -> Option<i64> {
        let ring = self.ring.read();
        let skip = usize::try_from(revision.saturating_add(1).saturating_sub(ring.first())).ok()?;
        let later = ring.batches.iter().skip(skip).flat_map(|revised| &revised.events);
        let staged = if revision > ring.last { &[][..] } else { &ring.staged };
        let mut born = 0;
        for event in later.chain(staged).filter(|event| span.contains(&event.kv.key)) {
            born += match event.kind {
                EventType::Put if event.kv.version == 1 => 1,
                EventType::Put => 0,
                EventType::Delete => -1,
            };
        }
        Some(born)
    }
}

/// What a watcher sees of a deletion.
pub(crate) fn deletion(key: Bytes, revision: i64) -> KeyValue {
    KeyValue { key, mod_revision: revision, ..KeyValue::default() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn change(feed: &Feed, key: &'static [u8], size: usize) -> i64 {
        let kv = KeyValue {
            key: Bytes::from_static(key),
            version: 1,
            value: vec![0; size].into(),
            ..KeyValue::default()
        };
        feed.stage(FeedEvent { kind: EventType::Put, kv, prev_kv: None }, false);
        feed.publish()
    }

    #[test]
    fn the_ring_forgets_only_what_the_persister_has() {
        let feed = Feed::new(1, 1 << 24);
        for _ in 0..REVISIONS_MAX + 5 {
            change(&feed, b"a", 1);
        }
        assert_eq!(feed.first(), 2, "nothing is handed over yet");
        feed.hand_over(feed.current());
        change(&feed, b"a", 1);
        assert_eq!(feed.first(), 8);
        assert!(matches!(feed.recent(6), Recent::TooOld));
        let Recent::Batches(batches) = feed.recent(7) else { panic!("8 is still there") };
        assert_eq!((batches[0].revision, batches.len()), (8, REVISIONS_MAX));
        feed.hand_over(feed.current());
        change(&feed, b"a", 1 << 24);
        assert!(matches!(feed.recent(feed.current() - 1), Recent::Batches(b) if b.len() == 1));
    }

    #[test]
    fn nothing_new_is_not_too_old() {
        let feed = Feed::new(9, 1 << 24);
        assert!(matches!(feed.recent(9), Recent::Batches(batches) if batches.is_empty()));
        assert!(matches!(feed.recent(50), Recent::Batches(batches) if batches.is_empty()));
        assert!(matches!(feed.recent(8), Recent::TooOld));
        assert!(matches!(feed.recent(i64::MIN), Recent::TooOld));
        assert!(feed.slice(8, 10, 10).is_none());
    }

    #[test]
    fn births_after_a_revision() {
        let feed = Feed::new(1, 1 << 24);
        let span = Span::new(&Bytes::from_static(b"a"), &Bytes::from_static(b"b"));
        change(&feed, b"a", 1);
        change(&feed, b"x", 1);
        assert_eq!(feed.born_after(1, &span), Some(1));
        assert_eq!(feed.born_after(2, &span), Some(0));
        assert_eq!(feed.born_after(0, &span), None);
    }
}
