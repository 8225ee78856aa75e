//! The watchers of one stream: their ids, what they want, and how far each has come. Plain data
//! without queues or time; the stream task is its only user.

use std::collections::HashMap;

use kelson_api::Error;
use kelson_api::etcdserverpb::WatchCreateRequest;
use kelson_api::etcdserverpb::watch_create_request::FilterType;
use kelson_api::mvccpb::event::EventType;

use super::{IdMap, KeyRange, Slot};

/// Watchers one stream may have; one more is created and canceled with a reason. It bounds what a
/// single client can make the member remember, far above what any known client does.
pub(super) const WATCHERS_MAX: usize = 100_000;

/// Kinds of events that a watcher does not want.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Filter {
    no_put: bool,
    no_delete: bool,
}

impl Filter {
    /// Reads the filters of a request; unknown values are ignored.
    fn parse(filters: &[i32]) -> Filter {
        let has = |filter: FilterType| filters.contains(&(filter as i32));
        Filter { no_put: has(FilterType::Noput), no_delete: has(FilterType::Nodelete) }
    }

    /// Whether events of this kind are wanted.
    pub(super) fn passes(self, kind: EventType) -> bool {
        match kind {
            EventType::Put => !self.no_put,
            EventType::Delete => !self.no_delete,
        }
    }
}

/// What hub and history reader need to know of a watcher.
#[derive(Clone, Debug)]
pub(super) struct Interest {
    pub(super) slot: Slot,
    pub(super) range: KeyRange,
    pub(super) filter: Filter,
    pub(super) prev_kv: bool,
    /// First revision that was not sent.
    pub(super) next: i64,
}

/// How a watcher gets its events at the moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// From the hub.
    Live,
    /// It asked the hub to join and waits for the answer.
    Joining,
    /// From history.
    Lagging,
}

/// One watcher of a stream.
#[derive(Debug)]
pub(super) struct Watcher {
    pub(super) watch_id: i64,
    pub(super) interest: Interest,
    /// The start revision that the client gave, 0 = from creation on.
    pub(super) start_revision: i64,
    pub(super) place: Place,
    /// Store revision when it last asked to join: up to there it gets history, which may be
    /// bundled; later events are live ones, one response per revision.
    pub(super) asked_at: i64,
    pub(super) fragment: bool,
    pub(super) progress_notify: bool,
    /// Something was sent since the last tick of the progress timer.
    pub(super) is_active: bool,
    /// The last tick found it idle: the answer to that tick may tell it the revision.
    pub(super) is_due: bool,
}

impl Watcher {
    /// Whether every event up to `revision` has been sent, so that a progress response may say so.
    /// A watcher that starts in the future does not count, as its client has not seen `revision`.
    pub(super) fn is_synced(&self, revision: i64) -> bool {
        let is_sent = match self.place {
            Place::Live => true,
            Place::Joining => self.interest.next > revision,
            Place::Lagging => false,
        };
        is_sent && self.start_revision <= revision
    }
}

/// Why a watcher could not be created.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum CreateError {
    #[error("{}", Error::Compacted.text())]
    NegativeStart,
    #[error("mvcc: watcher range is empty")]
    EmptyRange,
    #[error("mvcc: duplicate watch ID provided on the WatchStream")]
    DuplicateId,
    #[error("{}", Error::TooManyRequests.text())]
    TooMany,
}

/// The watchers of one stream by slot and by the id that the client knows.
#[derive(Debug, Default)]
pub(super) struct Watchers {
    by_slot: IdMap<Watcher>,
    slots: HashMap<i64, Slot>,
    next_slot: Slot,
    next_id: i64,
    lagging: usize,
    notified: usize,
}

impl Watchers {
    /// Adds the watcher of a create request, in place `Joining`, and returns its slot.
    /// `revision` is the store revision that the created response will name.
    pub(super) fn create(
        &mut self,
        request: &WatchCreateRequest,
        revision: i64,
    ) -> Result<Slot, CreateError> {
        if request.start_revision < 0 {
            return Err(CreateError::NegativeStart);
        }
        let range = KeyRange::parse(&request.key, &request.range_end);
        let range = range.ok_or(CreateError::EmptyRange)?;
        if self.slots.contains_key(&request.watch_id) && request.watch_id != 0 {
            return Err(CreateError::DuplicateId);
        }
        if self.slots.len() >= WATCHERS_MAX {
            return Err(CreateError::TooMany);
        }
        let watch_id = if request.watch_id == 0 { self.pick_id() } else { request.watch_id };
        let slot = self.next_slot;
        self.next_slot += 1;
        let next = if request.start_revision == 0 { revision + 1 } else { request.start_revision };
        let filter = Filter::parse(&request.filters);
        let watcher = Watcher {
            watch_id,
            interest: Interest { slot, range, filter, prev_kv: request.prev_kv, next },
            start_revision: request.start_revision,
            place: Place::Joining,
            asked_at: revision,
            fragment: request.fragment,
            progress_notify: request.progress_notify,
            is_active: false,
            is_due: false,
        };
        self.notified += usize::from(request.progress_notify);
        self.slots.insert(watch_id, slot);
        self.by_slot.insert(slot, watcher);
        Ok(slot)
    }

    /// The next id that no watcher has, counting up from 0 over the life of the stream.
    fn pick_id(&mut self) -> i64 {
        while self.slots.contains_key(&self.next_id) {
            self.next_id += 1;
        }
        self.next_id += 1;
        self.next_id - 1
    }

    /// The slot behind a client's watch id.
    pub(super) fn slot(&self, watch_id: i64) -> Option<Slot> {
        self.slots.get(&watch_id).copied()
    }

    /// Takes a watcher out; its id becomes free.
    pub(super) fn remove(&mut self, slot: Slot) -> Option<Watcher> {
        let watcher = self.by_slot.remove(&slot)?;
        self.slots.remove(&watcher.watch_id);
        self.lagging -= usize::from(watcher.place == Place::Lagging);
        self.notified -= usize::from(watcher.progress_notify);
        Some(watcher)
    }

    pub(super) fn get(&self, slot: Slot) -> Option<&Watcher> {
        self.by_slot.get(&slot)
    }

    /// Whether the watcher is there and waits for the hub's answer.
    pub(super) fn is_joining(&self, slot: Slot) -> bool {
        self.get(slot).is_some_and(|watcher| watcher.place == Place::Joining)
    }

    /// The watcher for changes of its marks; its place is changed by [`Watchers::set_place`].
    pub(super) fn get_mut(&mut self, slot: Slot) -> Option<&mut Watcher> {
        self.by_slot.get_mut(&slot)
    }

    /// Moves a watcher to another place.
    pub(super) fn set_place(&mut self, slot: Slot, place: Place) {
        if let Some(watcher) = self.by_slot.get_mut(&slot) {
            self.lagging -= usize::from(watcher.place == Place::Lagging);
            self.lagging += usize::from(place == Place::Lagging);
            watcher.place = place;
        }
    }

    /// Moves a watcher among those that ask to join, at this store revision.
    pub(super) fn set_joining(&mut self, slot: Slot, revision: i64) {
        self.set_place(slot, Place::Joining);
        if let Some(watcher) = self.by_slot.get_mut(&slot) {
            watcher.asked_at = revision;
        }
    }

    /// All watchers, in no order that means anything.
    pub(super) fn iter(&self) -> impl Iterator<Item = &Watcher> {
        self.by_slot.values()
    }

    /// All watchers, for changes of their marks.
    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = &mut Watcher> {
        self.by_slot.values_mut()
    }

    pub(super) fn len(&self) -> usize {
        self.by_slot.len()
    }

    /// How many watchers read history.
    pub(super) fn lagging(&self) -> usize {
        self.lagging
    }

    /// How many watchers want to hear of progress now and then.
    pub(super) fn notified(&self) -> usize {
        self.notified
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    fn request(watch_id: i64) -> WatchCreateRequest {
        WatchCreateRequest { key: Bytes::from("a"), watch_id, ..Default::default() }
    }

    fn create(watchers: &mut Watchers, watch_id: i64) -> Result<i64, CreateError> {
        let slot = watchers.create(&request(watch_id), 10)?;
        Ok(watchers.get(slot).expect("it was just made").watch_id)
    }

    #[test]
    fn ids_are_picked_from_zero_upward() {
        let mut watchers = Watchers::default();
        assert_eq!(create(&mut watchers, 0), Ok(0));
        assert_eq!(create(&mut watchers, 2), Ok(2));
        assert_eq!(create(&mut watchers, -7), Ok(-7));
        assert_eq!(create(&mut watchers, 0), Ok(1));
        assert_eq!(create(&mut watchers, 0), Ok(3));
        assert_eq!(create(&mut watchers, 2), Err(CreateError::DuplicateId));
        let slot = watchers.slot(0).expect("id 0 is in use");
        assert!(watchers.remove(slot).is_some());
        assert_eq!(create(&mut watchers, 0), Ok(4));
        assert_eq!(watchers.len(), 5);
    }

    #[test]
    fn refusals_have_the_texts_that_clients_know() {
        let mut watchers = Watchers::default();
        let negative = WatchCreateRequest { start_revision: -1, ..request(0) };
        let error = watchers.create(&negative, 1).expect_err("negative start");
        assert_eq!(error.to_string(), "etcdserver: mvcc: required revision has been compacted");
        let empty = WatchCreateRequest { range_end: Bytes::from("a"), ..request(0) };
        let error = watchers.create(&empty, 1).expect_err("an empty range");
        assert_eq!(error.to_string(), "mvcc: watcher range is empty");
        assert_eq!(
            CreateError::DuplicateId.to_string(),
            "mvcc: duplicate watch ID provided on the WatchStream"
        );
    }

    #[test]
    fn filters_drop_their_kind_only() {
        let puts = Filter::parse(&[1, 99]);
        assert!(puts.passes(EventType::Put) && !puts.passes(EventType::Delete));
        let deletes = Filter::parse(&[0]);
        assert!(!deletes.passes(EventType::Put) && deletes.passes(EventType::Delete));
    }

    #[test]
    fn counts_follow_places() {
        let mut watchers = Watchers::default();
        let slot = watchers.create(&request(0), 10).expect("a good request");
        watchers.set_place(slot, Place::Lagging);
        watchers.set_place(slot, Place::Lagging);
        assert_eq!(watchers.lagging(), 1);
        watchers.set_place(slot, Place::Live);
        assert_eq!(watchers.lagging(), 0);
        watchers.set_place(slot, Place::Lagging);
        watchers.remove(slot);
        assert_eq!((watchers.lagging(), watchers.len()), (0, 0));
    }
}
