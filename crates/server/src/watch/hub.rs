//! The hub: one task that follows the feed and routes each revision to the streams that want it.
//! It owns the index of live watchers and the position up to which all of them were served. It
//! never waits for a stream and never reads history; what does not fit into a stream's queue makes
//! the stream leave. It stands between `storage::Feed` and `stream`.
//!
//! Order is the point of this file. All that a stream learns from the hub comes through one queue,
//! in the order in which the hub did it: events of revision 7, then "you have joined at 7", then
//! "everything up to 7 was before this". A progress answer can therefore not overtake an event.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, AtomicUsize, Ordering};

use kelson_storage::sabotage::{self, Variant};
use kelson_storage::{Recent, Revised};
use tokio::sync::{Semaphore, mpsc};

use super::watchers::{Filter, Interest};
use super::{
    IdMap, IntervalIndex, KeyRange, SharedRevision, Slot, Source, StreamId, Tuning, WatchStats,
};

/// Requests of streams that may wait for the hub; a stream that finds it full waits.
const INBOX_LEN: usize = 1024;

/// Requests that the hub takes before it looks at the feed again.
const REQUESTS_PER_TURN: usize = 256;

/// Deliveries after which the hub lets other tasks run.
const DELIVERIES_PER_TURN: usize = 2048;

/// What the hub puts into the queue of a stream.
pub(super) enum Delivery {
    /// Events of one revision.
    Events(Arc<SharedRevision>, Hits),
    /// Answer to a join.
    Joined(Joined),
    /// Everything up to this revision is before this in the queue.
    Progress(i64, Asker),
}

/// Which events of a revision go to which watchers, ordered by watcher, then by event.
pub(super) enum Hits {
    /// The usual case, kept without another allocation.
    One(Hit),
    /// At least two.
    Many(Box<[Hit]>),
}

impl Hits {
    pub(super) fn as_slice(&self) -> &[Hit] {
        match self {
            Hits::One(hit) => std::slice::from_ref(hit),
            Hits::Many(hits) => hits,
        }
    }
}

/// One event for one watcher.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Hit {
    pub(super) slot: Slot,
    pub(super) event: u32,
}

/// Answer to a join: who is in, and who has to read more history first.
pub(super) struct Joined {
    /// Events up to this revision will not come from the hub any more, all later ones will.
    pub(super) position: i64,
    pub(super) joined: Vec<Slot>,
    pub(super) behind: Vec<Slot>,
}

/// Who wants to know of progress.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Asker {
    /// The client, by a progress request.
    Client,
    /// The timer of the stream.
    Timer,
}

/// What streams ask of the hub. Requests about a stay that has ended are ignored.
pub(super) enum Request {
    /// A new stay begins.
    Open { stream: StreamId, queue: mpsc::Sender<Delivery>, lane: Arc<Lane> },
    /// These watchers want events from their `next` on.
    Join { stream: StreamId, interests: Vec<Interest> },
    /// This watcher is gone.
    Leave { stream: StreamId, slot: Slot },
    /// Say how far you are, in order.
    Progress { stream: StreamId, asker: Asker },
    /// The stay ends.
    Close { stream: StreamId },
}

/// What hub and stream both see of one stay.
#[derive(Default)]
pub(super) struct Lane {
    /// Bytes of events in the queue.
    queued_bytes: AtomicUsize,
    /// When the hub has closed the queue: the first revision that it did not deliver.
    lost_from: AtomicI64,
}

impl Lane {
    /// Takes the events of one delivery off the account; called when they have left the queue.
    pub(super) fn release(&self, bytes: usize) {
        self.queued_bytes.fetch_sub(bytes, Ordering::Relaxed);
    }

    /// First revision that was not delivered. Meaningful once the queue is closed and empty.
    pub(super) fn lost_from(&self) -> i64 {
        self.lost_from.load(Ordering::Acquire)
    }
}

/// The way to the hub, and what all streams share. Cloning shares it.
#[derive(Clone)]
pub struct HubHandle {
    inbox: mpsc::Sender<Request>,
    next_stream: Arc<AtomicU64>,
    pub(super) stats: Arc<WatchStats>,
    pub(super) tuning: Tuning,
    /// Permits for reads of history.
    pub(super) slices: Arc<Semaphore>,
}

impl HubHandle {
    /// Counters of all streams.
    pub fn stats(&self) -> &Arc<WatchStats> {
        &self.stats
    }

    /// Begins a stay: the hub learns of it before anything sent later.
    pub(super) async fn open(&self) -> Result<Stay, HubGone> {
        let stream = self.next_stream.fetch_add(1, Ordering::Relaxed);
        let (sender, queue) = mpsc::channel(self.tuning.queue_len);
        let lane = Arc::new(Lane::default());
        self.send(Request::Open { stream, queue: sender, lane: lane.clone() }).await?;
        Ok(Stay { stream, queue, lane, hub: self.clone() })
    }

    async fn send(&self, request: Request) -> Result<(), HubGone> {
        self.inbox.send(request).await.map_err(|_| HubGone)
    }
}

/// The hub has ended, so the member is stopping.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the watch hub has stopped")]
pub(super) struct HubGone;

/// A stream's stay in the hub; dropping it ends the stay.
pub(super) struct Stay {
    stream: StreamId,
    pub(super) queue: mpsc::Receiver<Delivery>,
    pub(super) lane: Arc<Lane>,
    hub: HubHandle,
}

impl Stay {
    pub(super) async fn join(&self, interests: Vec<Interest>) -> Result<(), HubGone> {
        self.hub.send(Request::Join { stream: self.stream, interests }).await
    }

    pub(super) async fn leave(&self, slot: Slot) -> Result<(), HubGone> {
        self.hub.send(Request::Leave { stream: self.stream, slot }).await
    }

    pub(super) async fn progress(&self, asker: Asker) -> Result<(), HubGone> {
        self.hub.send(Request::Progress { stream: self.stream, asker }).await
    }
}

impl Drop for Stay {
    fn drop(&mut self) {
        let close = Request::Close { stream: self.stream };
        if let Err(mpsc::error::TrySendError::Full(close)) = self.hub.inbox.try_send(close) {
            // One small task per stream that ends while the hub is busy: no more than streams.
            if let Ok(runtime) = tokio::runtime::Handle::try_current() {
                let inbox = self.hub.inbox.clone();
                runtime.spawn(async move { inbox.send(close).await });
            }
        }
        self.queue.close();
        while let Ok(delivery) = self.queue.try_recv() {
            if let Delivery::Events(_, hits) = delivery {
                self.hub.stats.move_pending_events(-(hits.as_slice().len() as i64));
            }
        }
    }
}

/// The task's own state.
pub struct Hub<S> {
    source: S,
    inbox: mpsc::Receiver<Request>,
    /// Every revision up to this one was routed.
    position: i64,
    index: IntervalIndex<Entry>,
    streams: IdMap<Guest>,
    tuning: Tuning,
    stats: Arc<WatchStats>,
    /// Hits of the revision at hand, kept to reuse the memory.
    hits: Vec<(StreamId, Hit)>,
}

/// A stream that stays in the hub.
struct Guest {
    queue: mpsc::Sender<Delivery>,
    lane: Arc<Lane>,
    ranges: IdMap<KeyRange>,
}

/// A live watcher in the index.
#[derive(Clone, Copy)]
struct Entry {
    stream: StreamId,
    slot: Slot,
    filter: Filter,
    /// Earlier events are not wanted: the start lies ahead, or they were read from history.
    next: i64,
}

impl Entry {
    fn key(&self) -> (StreamId, Slot) {
        (self.stream, self.slot)
    }
}

impl PartialEq for Entry {
    fn eq(&self, other: &Self) -> bool {
        self.key() == other.key()
    }
}

impl Eq for Entry {}

impl PartialOrd for Entry {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Entry {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.key().cmp(&other.key())
    }
}

impl<S: Source> Hub<S> {
    /// A hub at the newest revision, and the way to it. It works once [`Hub::run`] is polled.
    pub fn new(source: S, tuning: Tuning) -> (Hub<S>, HubHandle) {
        let (sender, inbox) = mpsc::channel(INBOX_LEN);
        let stats = Arc::new(WatchStats::default());
        let handle = HubHandle {
            inbox: sender,
            next_stream: Arc::new(AtomicU64::new(0)),
            stats: stats.clone(),
            tuning,
            slices: Arc::new(Semaphore::new(tuning.slices_at_once)),
        };
        let position = *source.feed().borrow();
        let hub = Hub {
            source,
            inbox,
            position,
            index: IntervalIndex::new(),
            streams: IdMap::default(),
            tuning,
            stats,
            hits: Vec::new(),
        };
        (hub, handle)
    }

    /// Works until the store is gone or nobody holds a handle any more. All streams still in the
    /// hub then find their queues closed.
    pub async fn run(mut self) {
        let mut feed = self.source.feed();
        loop {
            // Both arms are cheap and each turn does both kinds of work, so order does not matter.
            tokio::select! {
                changed = feed.changed() => if changed.is_err() { break },
                request = self.inbox.recv() => match request {
                    Some(request) => self.serve(request).await,
                    None => break,
                },
            }
            for _ in 0..REQUESTS_PER_TURN {
                let Ok(request) = self.inbox.try_recv() else { break };
                self.serve(request).await;
            }
            self.advance().await;
        }
        self.dismiss_all();
    }

    async fn serve(&mut self, request: Request) {
        match request {
            Request::Open { stream, queue, lane } => {
                self.streams.insert(stream, Guest { queue, lane, ranges: IdMap::default() });
            }
            Request::Join { stream, interests } => {
                // What was applied before the watcher was created comes to it as history.
                self.advance().await;
                self.join(stream, interests);
            }
            Request::Leave { stream, slot } => {
                let guest = self.streams.get_mut(&stream);
                if let Some(range) = guest.and_then(|guest| guest.ranges.remove(&slot)) {
                    self.index.remove(&range, &Entry::named(stream, slot));
                }
            }
            Request::Progress { stream, asker } => {
                // The asker may have seen revisions that the hub has not looked at yet.
                self.advance().await;
                self.deliver(stream, Delivery::Progress(self.position, asker), self.position + 1);
            }
            Request::Close { stream } => self.dismiss(stream, self.position + 1),
        }
    }

    /// Takes watchers in that are near enough; the rest of their way they read from the feed.
    fn join(&mut self, stream: StreamId, interests: Vec<Interest>) {
        let position = self.position;
        let Some(guest) = self.streams.get_mut(&stream) else { return };
        let mut answer = Joined { position, joined: Vec::new(), behind: Vec::new() };
        for interest in interests {
            let Interest { slot, range, filter, next, .. } = interest;
            if position - next >= self.tuning.join_gap {
                answer.behind.push(slot);
                continue;
            }
            answer.joined.push(slot);
            let next = next.max(position + 1);
            self.index.insert(&range, Entry { stream, slot, filter, next });
            guest.ranges.insert(slot, range);
        }
        self.deliver(stream, Delivery::Joined(answer), position + 1);
    }

    /// Routes what the feed has beyond our position.
    async fn advance(&mut self) {
        let batches = match self.source.recent(self.position) {
            Recent::Batches(batches) => batches,
            Recent::TooOld => return self.skip(),
        };
        let mut deliveries = 0;
        for revised in batches {
            if revised.revision != self.position + 1 {
                // A hole would be lost events; every stream finds out from history instead.
                return self.skip();
            }
            deliveries += 1 + self.route(&revised);
            self.position = revised.revision;
            if deliveries >= DELIVERIES_PER_TURN {
                deliveries = 0;
                tokio::task::yield_now().await;
            }
        }
    }

    /// Sends one revision to all who want it and returns how many streams that were.
    fn route(&mut self, revised: &Arc<Revised>) -> usize {
        let mut hits = std::mem::take(&mut self.hits);
        for (place, event) in revised.events.iter().enumerate() {
            self.index.visit(&event.kv.key, |entry| {
                let is_lost = sabotage::is(Variant::EventDropped) && revised.revision % 16 == 0;
                if revised.revision >= entry.next && entry.filter.passes(event.kind) && !is_lost {
                    hits.push((entry.stream, Hit { slot: entry.slot, event: place as u32 }));
                }
            });
        }
        let mut streams = 0;
        if !hits.is_empty() {
            hits.sort_unstable_by_key(|(stream, hit)| (*stream, hit.slot, hit.event));
            let shared = Arc::new(SharedRevision::new(revised.clone()));
            for group in hits.chunk_by(|left, right| left.0 == right.0) {
                let hits = match group {
                    [(_, hit)] => Hits::One(*hit),
                    group => Hits::Many(group.iter().map(|(_, hit)| *hit).collect()),
                };
                let delivery = Delivery::Events(shared.clone(), hits);
                self.deliver(group[0].0, delivery, revised.revision);
                streams += 1;
            }
        }
        hits.clear();
        self.hits = hits;
        streams
    }

    /// Puts a delivery into a stream's queue. If it does not fit, the stream leaves the hub and
    /// will find that everything from revision `lost_from` on did not come.
    fn deliver(&mut self, stream: StreamId, delivery: Delivery, lost_from: i64) {
        let Some(guest) = self.streams.get(&stream) else { return };
        let (bytes, events) = match &delivery {
            Delivery::Events(revision, hits) => (revision.bytes(), hits.as_slice().len() as i64),
            Delivery::Joined(_) | Delivery::Progress(..) => (0, 0),
        };
        let is_full =
            || guest.lane.queued_bytes.load(Ordering::Relaxed) + bytes > self.tuning.queue_bytes;
        while sabotage::is(Variant::SlowWatcherBlocks) && is_full() {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        let queued = guest.lane.queued_bytes.fetch_add(bytes, Ordering::Relaxed);
        let fits = queued == 0 || queued + bytes <= self.tuning.queue_bytes;
        self.stats.move_pending_events(events);
        if fits && guest.queue.try_send(delivery).is_ok() {
            return;
        }
        self.stats.move_pending_events(-events);
        self.stats.count_overflow();
        self.dismiss(stream, lost_from);
    }

    /// Ends a stay: the stream reads what is in its queue, then finds it closed.
    fn dismiss(&mut self, stream: StreamId, lost_from: i64) {
        let Some(guest) = self.streams.remove(&stream) else { return };
        for (slot, range) in &guest.ranges {
            self.index.remove(range, &Entry::named(stream, *slot));
        }
        guest.lane.lost_from.store(lost_from, Ordering::Release);
    }

    /// The feed no longer has what comes next (a snapshot was installed, or the hub was held up for
    /// very long): all streams go on from history, the hub from the newest revision.
    fn skip(&mut self) {
        tracing::info!(position = self.position, "watch hub goes on from the newest revision");
        if sabotage::is(Variant::EventsLostAtInstall) {
            self.position = *self.source.feed().borrow();
        }
        self.dismiss_all();
        self.position = self.position.max(*self.source.feed().borrow());
    }

    fn dismiss_all(&mut self) {
        let lost_from = self.position + 1;
        for guest in self.streams.values() {
            guest.lane.lost_from.store(lost_from, Ordering::Release);
        }
        self.streams.clear();
        self.index = IntervalIndex::new();
    }
}

impl Entry {
    /// An entry that equals the one of this watcher, for removing it.
    fn named(stream: StreamId, slot: Slot) -> Entry {
        Entry { stream, slot, filter: Filter::default(), next: 0 }
    }
}
