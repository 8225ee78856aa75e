//! One watch stream of one client: reads its requests, takes what the hub delivers, reads history
//! for watchers that are behind, and hands out responses one by one. A single owner does all this in
//! turn, so the order of responses is the order in which things were handled. It is polled only when
//! the client takes more, hence a slow client stops nothing but its own stream. It never routes
//! events to others and never writes. It stands between `hub` and `services::watch`.
//! Over 600 lines, because every step works on the one state of the stream.

mod progress;

use std::collections::{BTreeMap, VecDeque};
use std::ops::Bound;
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::{Stream, StreamExt};
use kelson_api::Error;
use kelson_api::etcdserverpb::watch_request::RequestUnion;
use kelson_api::etcdserverpb::{ResponseHeader, WatchCreateRequest, WatchRequest, WatchResponse};
use kelson_storage::sabotage::{self, Variant};
use kelson_storage::{Recent, failpoint};
use tokio::task::JoinHandle;
use tokio::time::Interval;
use tonic::Status;

use self::progress::{progress_timer, ticked};
use super::catch_up::{Found, Picker, Slice, read_slice};
use super::hub::{Asker, Delivery, Hit, HubGone, HubHandle, Joined, Stay};
use super::watchers::{Interest, Place, Watchers};
use super::{Response, SharedRevision, Slot, Source};

/// The id in responses that concern the whole stream or a watcher that never came to be.
const NO_WATCH_ID: i64 = -1;

/// Deliveries taken from the queue in one go, so that the client's next request is looked at too.
const DELIVERIES_PER_TURN: usize = 64;

/// Bytes of events taken from the queue in one go; what is taken no longer counts as queued.
const BYTES_PER_TURN: usize = 256 * 1024;

/// What the flags say about streams.
#[derive(Clone, Copy, Debug)]
pub struct StreamOptions {
    /// Responses of this size or more are cut for watchers that allow it. Unit: bytes.
    pub fragment_bytes: usize,
    /// Time between two progress ticks; each stream adds up to a tenth, so that they spread out.
    pub progress_interval: Duration,
}

/// Resolves with the status that ends the stream from our side: no leader, or the server stops.
pub type Ends = BoxFuture<'static, Status>;

/// Tells whether the client may read a key or a range of keys, as it stands in its request.
pub type Permit = Box<dyn Fn(Bytes, Bytes) -> BoxFuture<'static, Result<(), Error>> + Send + Sync>;

/// The state of one stream. `R` is the client's requests.
pub struct WatchStream<S: Source, R> {
    source: S,
    hub: HubHandle,
    options: StreamOptions,
    /// `None` once the client has closed its side; its watchers then go on without it.
    requests: Option<R>,
    ends: Ends,
    /// `None` = everything is allowed.
    permit: Option<Permit>,
    watchers: Watchers,
    /// Our stay in the hub, from the first join until the hub closes our queue.
    stay: Option<Stay>,
    /// Watchers that will ask the hub to join, before anything else happens.
    joining: Vec<Interest>,
    /// Watchers that are behind, by the first revision they miss. May name watchers that are gone.
    lagging: BTreeMap<i64, Vec<Slot>>,
    /// The group that was read last; the next one above it is the next to be read.
    served_group: i64,
    slice: Option<RunningSlice>,
    /// Responses in order. Bounded by what one step may add: one turn of deliveries or one slice.
    ready: VecDeque<Response>,
    progress_timer: Interval,
    state: State,
    /// What the gauge of slow watchers holds on our behalf.
    reported_slow: usize,
}

/// Whether the stream goes on.
enum State {
    Running,
    /// It ends after the responses that are ready.
    Ending(Result<(), Status>),
    Ended,
}

/// A read of history under way. It is a task of its own: a stream whose client takes nothing is not
/// polled, and must not keep its place among the reads from others.
struct RunningSlice {
    members: Vec<Slot>,
    read: JoinHandle<Slice>,
}

impl Drop for RunningSlice {
    /// A read that still waits for its turn is not needed any more.
    fn drop(&mut self) {
        self.read.abort();
    }
}

/// What can happen to a stream.
enum Step {
    SliceRead(Slice),
    Over(Status),
    Asked(Option<Result<WatchRequest, Status>>),
    Ticked,
    Delivered(Option<Delivery>),
}

impl<S, R> WatchStream<S, R>
where
    S: Source,
    R: Stream<Item = Result<WatchRequest, Status>> + Send + Unpin + 'static,
{
    /// A stream without watchers. Needs a tokio runtime with time.
    pub fn new(source: S, hub: HubHandle, options: StreamOptions, requests: R, ends: Ends) -> Self {
        hub.stats.move_streams(1);
        WatchStream {
            source,
            hub,
            options,
            requests: Some(requests),
            ends,
            permit: None,
            watchers: Watchers::default(),
            stay: None,
            joining: Vec::new(),
            lagging: BTreeMap::new(),
            served_group: 0,
            slice: None,
            ready: VecDeque::new(),
            progress_timer: progress_timer(options.progress_interval),
            state: State::Running,
            reported_slow: 0,
        }
    }

    /// Lets each create request pass only if the client may read what it watches.
    #[must_use]
    pub fn checked_by(mut self, permit: Permit) -> Self {
        self.permit = Some(permit);
        self
    }

    /// The responses as a stream that ends with the status of the call.
    pub fn responses(self) -> impl Stream<Item = Result<Response, Status>> + Send + 'static {
        futures::stream::unfold(Box::new(self), |mut stream| async move {
            let item = stream.next().await?;
            Some((item, stream))
        })
    }

    /// The next response; `None` once the stream has ended well or after its error.
    pub async fn next(&mut self) -> Option<Result<Response, Status>> {
        loop {
            if self.ask_to_join().await.is_err() {
                self.end(Err(Error::Stopped.into()));
            }
            if let Some(response) = self.ready.pop_front() {
                if let Some(time) = failpoint::delay("beforeSendWatchResponse") {
                    tokio::time::sleep(time).await;
                }
                return Some(Ok(response));
            }
            match std::mem::replace(&mut self.state, State::Ended) {
                State::Running => self.state = State::Running,
                State::Ending(Err(status)) => return Some(Err(status)),
                State::Ending(Ok(())) | State::Ended => return None,
            }
            if self.requests.is_none() && self.watchers.len() == 0 {
                // Nothing can come any more. With watchers it can: etcd's gateway and one-shot
                // clients close their side right after the create request and go on listening.
                return None;
            }
            self.start_slice();
            let step = self.wait().await;
            if self.take(step).await.is_err() {
                self.end(Err(Error::Stopped.into()));
            }
            self.report_slow();
        }
    }

    /// Waits for the next thing to happen. The order makes sure that a flood of one kind does not
    /// hold up the kinds that are rare: events are many, so they come last.
    async fn wait(&mut self) -> Step {
        tokio::select! {
            biased;
            slice = slice_read(&mut self.slice) => Step::SliceRead(slice),
            status = &mut self.ends => Step::Over(status),
            request = asked(&mut self.requests) => Step::Asked(request),
            () = ticked(&mut self.progress_timer, self.watchers.notified() > 0) => Step::Ticked,
            delivery = delivered(&mut self.stay) => Step::Delivered(delivery),
        }
    }

    async fn take(&mut self, step: Step) -> Result<(), HubGone> {
        match step {
            Step::SliceRead(slice) => self.take_slice(slice),
            Step::Over(status) => self.end(Err(status)),
            Step::Asked(Some(Ok(request))) => self.answer(request).await?,
            Step::Asked(Some(Err(status))) => self.end(Err(status)),
            Step::Asked(None) => self.requests = None,
            Step::Ticked => self.tick().await?,
            Step::Delivered(Some(delivery)) => {
                let mut bytes = self.take_delivery(delivery).await?;
                for _ in 1..DELIVERIES_PER_TURN {
                    let next = self.stay.as_mut().and_then(|stay| stay.queue.try_recv().ok());
                    let Some(delivery) = next else { break };
                    bytes += self.take_delivery(delivery).await?;
                    if bytes > BYTES_PER_TURN {
                        break;
                    }
                }
            }
            Step::Delivered(None) => self.left_behind(),
        }
        Ok(())
    }

    /// Stops everything but handing out what is ready.
    fn end(&mut self, result: Result<(), Status>) {
        if matches!(self.state, State::Running) {
            self.state = State::Ending(result);
            self.stay = None;
            self.joining.clear();
        }
    }

    // Requests of the client.

    async fn answer(&mut self, request: WatchRequest) -> Result<(), HubGone> {
        match request.request_union {
            Some(RequestUnion::CreateRequest(request)) => self.create(&request).await,
            Some(RequestUnion::CancelRequest(request)) => self.cancel(request.watch_id).await?,
            Some(RequestUnion::ProgressRequest(_)) => {
                if sabotage::is(Variant::ProgressEarly) {
                    self.tell_client(self.source.revision());
                    return Ok(());
                }
                // A watcher that lags means no answer, ever: the client asks again.
                if let Some(stay) = &self.stay
                    && self.watchers.lagging() == 0
                {
                    stay.progress(Asker::Client).await?;
                }
            }
            None => {}
        }
        Ok(())
    }

    async fn create(&mut self, request: &WatchCreateRequest) {
        // Only a request that could be served at all is worth the question.
        let forbidden = match &self.permit {
            Some(permit) if request.start_revision >= 0 => {
                let key = match request.key.is_empty() {
                    true => Bytes::from_static(b"\0"),
                    false => request.key.clone(),
                };
                permit(key, request.range_end.clone()).await.err()
            }
            _ => None,
        };
        let revision = self.source.revision();
        let header = Some(self.source.header(revision));
        let created = WatchResponse { header, created: true, ..Default::default() };
        let slot = match forbidden {
            Some(error) => Err(denial(error)),
            None => self.watchers.create(request, revision).map_err(|error| error.to_string()),
        };
        let slot = match slot {
            Ok(slot) => slot,
            Err(cancel_reason) => {
                return self.ready.push_back(Response::bare(WatchResponse {
                    watch_id: NO_WATCH_ID,
                    canceled: true,
                    cancel_reason,
                    ..created
                }));
            }
        };
        self.hub.stats.move_watchers(1);
        if request.progress_notify && self.watchers.notified() == 1 {
            self.progress_timer.reset();
        }
        let watch_id = self.watchers.get(slot).map_or(NO_WATCH_ID, |watcher| watcher.watch_id);
        self.ready.push_back(Response::bare(WatchResponse { watch_id, ..created }));
        let compacted = self.source.compacted();
        let is_gone = request.start_revision != 0 && request.start_revision < compacted;
        if is_gone && !sabotage::is(Variant::CompactedSilently) {
            self.cancel_compacted(slot, compacted);
        } else {
            self.settle(slot, revision);
        }
    }

    async fn cancel(&mut self, watch_id: i64) -> Result<(), HubGone> {
        let Some(slot) = self.watchers.slot(watch_id) else { return Ok(()) };
        self.forget(slot);
        let header = Some(self.source.header(self.source.revision()));
        let canceled = WatchResponse { header, watch_id, canceled: true, ..Default::default() };
        self.ready.push_back(Response::bare(canceled));
        match &self.stay {
            Some(stay) => stay.leave(slot).await,
            None => Ok(()),
        }
    }

    /// Tells the client that history it needs is gone. The watcher is not in the hub.
    fn cancel_compacted(&mut self, slot: Slot, compact_revision: i64) {
        let Some(watch_id) = self.forget(slot) else { return };
        self.ready.push_back(Response::bare(WatchResponse {
            header: Some(self.source.header(0)),
            watch_id,
            canceled: true,
            compact_revision,
            ..Default::default()
        }));
    }

    fn forget(&mut self, slot: Slot) -> Option<i64> {
        let watcher = self.watchers.remove(slot)?;
        self.joining.retain(|interest| interest.slot != slot);
        self.hub.stats.move_watchers(-1);
        Some(watcher.watch_id)
    }

    // Places of watchers.

    /// Decides how a watcher that is not in the hub goes on: near the newest revision it joins the
    /// hub, otherwise it reads history.
    fn settle(&mut self, slot: Slot, revision: i64) {
        let Some(watcher) = self.watchers.get(slot) else { return };
        let next = watcher.interest.next;
        if revision - next >= self.hub.tuning.join_gap {
            self.read_history(slot);
        } else {
            self.joining.push(watcher.interest.clone());
            self.watchers.set_joining(slot, revision);
        }
    }

    /// Puts a watcher that is not in the hub among those that read history.
    fn read_history(&mut self, slot: Slot) {
        let Some(watcher) = self.watchers.get(slot) else { return };
        self.lagging.entry(watcher.interest.next).or_default().push(slot);
        self.watchers.set_place(slot, Place::Lagging);
    }

    async fn ask_to_join(&mut self) -> Result<(), HubGone> {
        if self.joining.is_empty() {
            return Ok(());
        }
        if self.stay.is_none() {
            self.stay = Some(self.hub.open().await?);
        }
        let stay = self.stay.as_ref().expect("it was opened just now");
        stay.join(std::mem::take(&mut self.joining)).await
    }

    /// The hub has closed our queue and we have emptied it: every live watcher has got all events
    /// below the revision that the hub left for us, and none from there on.
    fn left_behind(&mut self) {
        let Some(stay) = self.stay.take() else { return };
        let lost_from = stay.lane.lost_from();
        if lost_from == 0 {
            // The hub did not even say good-bye: it is gone, and nobody knows where we stand.
            return self.end(Err(Error::Stopped.into()));
        }
        self.joining.clear();
        let revision = self.source.revision();
        let mut slots = Vec::new();
        for watcher in self.watchers.iter_mut() {
            if watcher.place == Place::Live {
                watcher.interest.next = watcher.interest.next.max(lost_from);
            }
            if watcher.place != Place::Lagging {
                slots.push(watcher.interest.slot);
            }
        }
        slots.sort_unstable();
        for slot in slots {
            self.settle(slot, revision);
        }
    }

    /// Takes watchers out of the hub that it has just let in, to go on from history.
    async fn go_back(&mut self, slots: &[Slot]) -> Result<(), HubGone> {
        for slot in slots {
            self.read_history(*slot);
            if let Some(stay) = &self.stay {
                stay.leave(*slot).await?;
            }
        }
        Ok(())
    }

    // What the hub delivers.

    /// Returns the bytes of events that were taken.
    async fn take_delivery(&mut self, delivery: Delivery) -> Result<usize, HubGone> {
        match delivery {
            Delivery::Events(revision, hits) => {
                let hits = hits.as_slice();
                self.hub.stats.move_pending_events(-(hits.len() as i64));
                if let Some(stay) = &self.stay {
                    stay.lane.release(revision.bytes());
                }
                self.take_events(&revision, hits);
                return Ok(revision.bytes());
            }
            Delivery::Joined(joined) => self.take_joined(joined).await?,
            Delivery::Progress(position, Asker::Client) => self.tell_client(position),
            Delivery::Progress(position, Asker::Timer) => self.tell_idle(position),
        }
        Ok(0)
    }

    fn take_events(&mut self, revision: &SharedRevision, hits: &[Hit]) {
        let header = self.source.header(revision.revision());
        for group in hits.chunk_by(|left, right| left.slot == right.slot) {
            // Whoever is not live left the hub after these events were queued, and gets them from
            // history if at all.
            let watcher = self.watchers.get(group[0].slot);
            let Some(watcher) = watcher.filter(|watcher| watcher.place == Place::Live) else {
                continue;
            };
            let prev_kv = watcher.interest.prev_kv;
            let group_max = if sabotage::is(Variant::RevisionSplit) { 1 } else { group.len() };
            for group in group.chunks(group_max) {
                let frames = group.iter().map(|hit| revision.frame(hit.event, prev_kv)).collect();
                self.send_events(group[0].slot, header, frames);
            }
        }
    }

    /// Watchers are in the hub now: from its position on they are live; up to there they get the
    /// events from the feed, before anything that the hub delivers later.
    async fn take_joined(&mut self, answer: Joined) -> Result<(), HubGone> {
        let Joined { position, joined, behind } = answer;
        for slot in behind {
            // The hub is ahead of what `settle` saw; it does not matter if it is near again.
            if self.watchers.is_joining(slot) {
                self.read_history(slot);
            }
        }
        let mut gap = Vec::new();
        for slot in joined {
            if !self.watchers.is_joining(slot) {
                continue;
            }
            self.watchers.set_place(slot, Place::Live);
            let watcher = self.watchers.get(slot);
            if watcher.is_some_and(|watcher| watcher.interest.next <= position) {
                gap.push(slot);
            }
        }
        if gap.is_empty() {
            return Ok(());
        }
        if self.fill_gap(&gap, position) { Ok(()) } else { self.go_back(&gap).await }
    }

    /// Sends what the feed has up to `position` to watchers that have just joined there. Returns
    /// false if the feed does not reach back far enough, or holds too much for one go; then the
    /// watchers are as far as their `next` says.
    fn fill_gap(&mut self, slots: &[Slot], position: i64) -> bool {
        let interests =
            || slots.iter().filter_map(|slot| Some(&self.watchers.get(*slot)?.interest));
        let first = interests().map(|interest| interest.next).min().unwrap_or(position + 1);
        let Recent::Batches(batches) = self.source.recent(first - 1) else { return false };
        let mut picker = Picker::new(interests(), self.source.compacted());
        let mut next = first;
        for revised in batches.iter().take_while(|revised| revised.revision <= position) {
            if revised.revision != next || picker.is_full(&self.hub.tuning) {
                break;
            }
            // The feed gives the state before each event by itself.
            let _complete = picker.pick(revised, |revised, _| Some(revised.clone()));
            next += 1;
        }
        self.send_found(picker.finish(), slots, next);
        next > position
    }

    // History.

    /// Starts to read the next piece of history, if any watcher needs it and no read is running.
    fn start_slice(&mut self) {
        while self.slice.is_none() && !self.lagging.is_empty() {
            let above = (Bound::Excluded(self.served_group), Bound::Unbounded);
            let first = self.lagging.range(above).next().or(self.lagging.first_key_value());
            let Some(from) = first.map(|(from, _)| *from) else { return };
            self.served_group = from;
            let mut members = self.lagging.remove(&from).unwrap_or_default();
            members.retain(|slot| self.watchers.get(*slot).is_some());
            if members.is_empty() {
                continue;
            }
            // Stopping where the next group stands makes them one group from then on.
            let next_group = self.lagging.range(from..).next();
            let before = next_group.map_or(i64::MAX, |(from, _)| *from);
            let watchers = members.iter().filter_map(|slot| self.watchers.get(*slot));
            let interests = watchers.map(|watcher| watcher.interest.clone()).collect();
            let read = run_slice(self.source.clone(), &self.hub, interests, from, before);
            self.slice = Some(RunningSlice { members, read });
        }
    }

    fn take_slice(&mut self, slice: Slice) {
        let Some(mut running) = self.slice.take() else { return };
        let members = std::mem::take(&mut running.members);
        match slice {
            Slice::Read { found, next } => {
                self.send_found(found, &members, next);
                let revision = self.source.revision();
                for slot in members {
                    self.settle(slot, revision);
                }
            }
            Slice::Compacted(revision) if sabotage::is(Variant::CompactedSilently) => {
                self.send_found(BTreeMap::new(), &members, revision);
                members.into_iter().for_each(|slot| self.settle(slot, revision));
            }
            Slice::Compacted(revision) => {
                for slot in members {
                    self.cancel_compacted(slot, revision);
                }
            }
            Slice::Failed(error) => self.end(Err(error.into())),
        }
    }

    /// Sends events from history or feed, and notes that these watchers now stand at `next`.
    fn send_found(&mut self, found: BTreeMap<Slot, Vec<Found>>, slots: &[Slot], next: i64) {
        let header = self.source.header(self.source.revision());
        for (slot, events) in found {
            let Some(watcher) = self.watchers.get(slot) else { continue };
            let prev_kv = watcher.interest.prev_kv;
            let history_end =
                if watcher.place == Place::Lagging { i64::MAX } else { watcher.asked_at };
            let live = events.partition_point(|found| found.revision.revision() <= history_end);
            let (history, live) = events.split_at(live);
            let frames = |events: &[Found]| -> Vec<Bytes> {
                events.iter().map(|found| found.revision.frame(found.event, prev_kv)).collect()
            };
            if !history.is_empty() {
                self.send_events(slot, header, frames(history));
            }
            for events in live.chunk_by(|a, b| a.revision.revision() == b.revision.revision()) {
                let header = ResponseHeader { revision: events[0].revision.revision(), ..header };
                self.send_events(slot, header, frames(events));
            }
        }
        for slot in slots {
            if let Some(watcher) = self.watchers.get_mut(*slot) {
                let back = i64::from(next > 2 && sabotage::is(Variant::EventRepeated));
                watcher.interest.next = watcher.interest.next.max(next - back);
            }
        }
    }

    fn send_events(&mut self, slot: Slot, header: ResponseHeader, frames: Vec<Bytes>) {
        let Some(watcher) = self.watchers.get_mut(slot) else { return };
        watcher.is_active = true;
        self.hub.stats.count_events_sent(frames.len() as u64);
        let response = Response::events(header, watcher.watch_id, frames);
        if watcher.fragment {
            self.ready.extend(response.into_fragments(self.options.fragment_bytes));
        } else {
            self.ready.push_back(response);
        }
    }
}

impl<S: Source, R> WatchStream<S, R> {
    /// Brings the gauge of slow watchers up to date.
    fn report_slow(&mut self) {
        let slow = self.watchers.lagging();
        if slow != self.reported_slow {
            self.hub.stats.move_slow_watchers(slow as i64 - self.reported_slow as i64);
            self.reported_slow = slow;
        }
    }
}

impl<S: Source, R> Drop for WatchStream<S, R> {
    fn drop(&mut self) {
        self.hub.stats.move_streams(-1);
        self.hub.stats.move_watchers(-(self.watchers.len() as i64));
        self.hub.stats.move_slow_watchers(-(self.reported_slow as i64));
    }
}

/// Reads a slice on a blocking thread, when it is our turn.
fn run_slice<S: Source>(
    source: S,
    hub: &HubHandle,
    interests: Vec<Interest>,
    from: i64,
    before: i64,
) -> JoinHandle<Slice> {
    let (permits, tuning) = (hub.slices.clone(), hub.tuning);
    tokio::spawn(async move {
        let permit = permits.acquire_owned().await;
        let read = tokio::task::spawn_blocking(move || {
            let _permit = permit;
            read_slice(&source, &interests, from, before, &tuning)
        });
        read.await.unwrap_or(Slice::Failed(Error::Stopped))
    })
}

/// What a watcher that may not be is told: the text of a status, as Go writes it.
fn denial(error: Error) -> String {
    let shown = match error {
        Error::InvalidAuthToken | Error::AuthOldRevision | Error::UserEmpty => error,
        _ => Error::PermissionDenied,
    };
    format!("rpc error: code = {:?} desc = {}", shown.code(), shown.text())
}

/// Waits for the running read. Cancel safe: the read stays in place.
async fn slice_read(slice: &mut Option<RunningSlice>) -> Slice {
    match slice {
        // A join error means that the read panicked or the runtime ends.
        Some(slice) => (&mut slice.read).await.unwrap_or(Slice::Failed(Error::Stopped)),
        None => std::future::pending().await,
    }
}

/// Waits for the client's next request; `None` = it has closed its side. Cancel safe.
async fn asked<R>(requests: &mut Option<R>) -> Option<Result<WatchRequest, Status>>
where
    R: Stream<Item = Result<WatchRequest, Status>> + Unpin,
{
    match requests {
        Some(requests) => requests.next().await,
        None => std::future::pending().await,
    }
}

/// Waits for the next delivery; `None` = the hub has closed the queue. Cancel safe.
async fn delivered(stay: &mut Option<Stay>) -> Option<Delivery> {
    match stay {
        Some(stay) => stay.queue.recv().await,
        None => std::future::pending().await,
    }
}
