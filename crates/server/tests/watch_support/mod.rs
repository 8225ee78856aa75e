//! A model of the store and of one client, for tests of watches: history is a plain list, so what a
//! watcher should see can be computed without any of the code under test. It never sleeps.

#![allow(dead_code, reason = "each test binary uses another part of it")]

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::{FutureExt, Stream, StreamExt};
use kelson_api::etcdserverpb::watch_request::RequestUnion;
use kelson_api::etcdserverpb::{
    ResponseHeader, WatchCancelRequest, WatchCreateRequest, WatchProgressRequest, WatchRequest,
    WatchResponse,
};
use kelson_api::mvccpb::event::EventType;
use kelson_api::mvccpb::{Event, KeyValue};
use kelson_api::{Error, Message};
use kelson_server::watch::{
    Ends, Hub, HubHandle, Response, Source, StreamOptions, Tuning, WatchStream,
};
use kelson_storage::{Changes, FeedEvent, Recent, Revised};
use parking_lot::Mutex;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

/// How long a test waits for something that must come.
pub(crate) const DEADLINE: Duration = Duration::from_secs(20);

/// Small numbers that look random and are the same for the same seed.
pub(crate) struct Draw(u64);

impl Draw {
    pub(crate) fn new(seed: u64) -> Draw {
        Draw(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(crate) fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        ((self.0 >> 11) % bound as u64) as usize
    }

    pub(crate) fn one_in(&mut self, bound: usize) -> bool {
        self.below(bound) == 0
    }
}

/// One change of a revision: a put of a value, or a delete.
pub(crate) type Change<'a> = (&'a str, Option<&'a str>);

/// The model of the store. Its first revision with events is 2, as in an etcd that was just made.
#[derive(Clone)]
pub(crate) struct Model {
    inner: Arc<Mutex<Inner>>,
    moved: Arc<watch::Sender<i64>>,
    /// Revisions that the feed remembers.
    ring_len: usize,
}

struct Inner {
    history: Vec<Arc<Revised>>,
    live: BTreeMap<Bytes, KeyValue>,
    compacted: i64,
    /// The feed starts here even if it could remember more.
    ring_from: i64,
    /// The next look at the feed with something new in it misses the oldest part.
    has_hole: bool,
    /// The next read of history ends in a compaction at this revision.
    compact_after_read: Option<i64>,
}

impl Model {
    pub(crate) fn new(ring_len: usize) -> Model {
        let inner = Inner {
            history: Vec::new(),
            live: BTreeMap::new(),
            compacted: -1,
            ring_from: 2,
            has_hole: false,
            compact_after_read: None,
        };
        let moved = Arc::new(watch::Sender::new(1));
        Model { inner: Arc::new(Mutex::new(inner)), moved, ring_len }
    }

    /// Applies changes as one revision and returns its number. Deletes of absent keys are no
    /// events; without any event there is no revision.
    pub(crate) fn apply(&self, changes: &[Change<'_>]) -> i64 {
        let mut inner = self.inner.lock();
        let revision = inner.history.len() as i64 + 2;
        let mut events = Vec::new();
        for (key, value) in changes {
            let key = Bytes::copy_from_slice(key.as_bytes());
            let prev_kv = inner.live.get(&key).cloned();
            let event = match value {
                Some(value) => {
                    let kv = put(&key, value, revision, prev_kv.as_ref());
                    inner.live.insert(key, kv.clone());
                    FeedEvent { kind: EventType::Put, kv, prev_kv }
                }
                None if prev_kv.is_none() => continue,
                None => {
                    inner.live.remove(&key);
                    let kv = KeyValue { key, mod_revision: revision, ..Default::default() };
                    FeedEvent { kind: EventType::Delete, kv, prev_kv }
                }
            };
            events.push(event);
        }
        if events.is_empty() {
            return revision - 1;
        }
        inner.history.push(Arc::new(Revised { revision, events }));
        drop(inner);
        self.moved.send_replace(revision);
        revision
    }

    pub(crate) fn put(&self, key: &str, value: &str) -> i64 {
        self.apply(&[(key, Some(value))])
    }

    pub(crate) fn compact(&self, revision: i64) {
        let mut inner = self.inner.lock();
        inner.compacted = inner.compacted.max(revision);
    }

    /// Makes the feed forget all it has, as the install of a snapshot does.
    pub(crate) fn restart_feed(&self) {
        let mut inner = self.inner.lock();
        inner.ring_from = inner.history.len() as i64 + 2;
    }

    /// Makes the feed lose a revision, once.
    pub(crate) fn punch_hole(&self) {
        self.inner.lock().has_hole = true;
    }

    /// Lets a compaction happen just after the next read of history.
    pub(crate) fn compact_after_read(&self, revision: i64) {
        self.inner.lock().compact_after_read = Some(revision);
    }

    /// All events that a watcher should see from revision `from` on.
    pub(crate) fn expected(&self, request: &WatchCreateRequest, from: i64) -> Vec<Event> {
        let inner = self.inner.lock();
        let later = inner.history.iter().filter(|revised| revised.revision >= from);
        let events = later.flat_map(|revised| &revised.events);
        events.filter(|event| wants(request, event)).map(|e| as_event(request, e)).collect()
    }
}

fn put(key: &Bytes, value: &str, revision: i64, prev_kv: Option<&KeyValue>) -> KeyValue {
    KeyValue {
        key: key.clone(),
        value: Bytes::copy_from_slice(value.as_bytes()),
        create_revision: prev_kv.map_or(revision, |kv| kv.create_revision),
        mod_revision: revision,
        version: prev_kv.map_or(1, |kv| kv.version + 1),
        lease: 0,
    }
}

fn wants(request: &WatchCreateRequest, event: &FeedEvent) -> bool {
    let key = &event.kv.key;
    let is_inside = match request.range_end.as_ref() {
        [] => *key == request.key,
        [0] => *key >= request.key,
        end => *key >= request.key && key.as_ref() < end,
    };
    let filter = if event.kind == EventType::Put { 0 } else { 1 };
    is_inside && !request.filters.contains(&filter)
}

fn as_event(request: &WatchCreateRequest, event: &FeedEvent) -> Event {
    Event {
        r#type: event.kind as i32,
        kv: Some(event.kv.clone()),
        prev_kv: event.prev_kv.clone().filter(|_| request.prev_kv),
    }
}

impl Source for Model {
    fn revision(&self) -> i64 {
        self.inner.lock().history.len() as i64 + 1
    }

    fn compacted(&self) -> i64 {
        self.inner.lock().compacted
    }

    fn feed(&self) -> watch::Receiver<i64> {
        self.moved.subscribe()
    }

    fn recent(&self, after: i64) -> Recent {
        let mut inner = self.inner.lock();
        let newest = inner.history.len() as i64 + 1;
        let first = inner.ring_from.max(newest + 1 - self.ring_len as i64);
        if after + 1 < first {
            return Recent::TooOld;
        }
        let mut skip = (after + 1 - 2).max(0) as usize;
        if inner.has_hole && inner.history.len() > skip + 1 {
            inner.has_hole = false;
            skip += 1;
        }
        Recent::Batches(inner.history.iter().skip(skip).cloned().collect())
    }

    fn changes(&self, from: i64, max_revisions: usize, max_bytes: usize) -> Result<Changes, Error> {
        let mut inner = self.inner.lock();
        if from < inner.compacted {
            return Err(Error::Compacted);
        }
        let mut bytes = 0;
        let mut batches = Vec::new();
        for revised in inner.history.iter().skip((from - 2).max(0) as usize) {
            if batches.len() >= max_revisions || bytes >= max_bytes {
                break;
            }
            // History on disk does not hold the states before the events.
            let mut events = revised.events.clone();
            for event in &mut events {
                bytes += event.kv.key.len() + event.kv.value.len();
                event.prev_kv = None;
            }
            batches.push(Arc::new(Revised { revision: revised.revision, events }));
        }
        let next = batches.last().map_or(from, |revised| revised.revision + 1);
        let compacted = inner.compact_after_read.take();
        inner.compacted = compacted.map_or(inner.compacted, |at| at.max(inner.compacted));
        Ok(Changes { batches, next, store_revision: inner.history.len() as i64 + 1 })
    }

    fn kv_before(&self, key: &[u8], revision: i64) -> Option<KeyValue> {
        let inner = self.inner.lock();
        if revision <= inner.compacted {
            return None;
        }
        let earlier = inner.history.iter().rev().filter(|revised| revised.revision < revision);
        let mut events = earlier.flat_map(|revised| &revised.events);
        let last = events.find(|event| event.kv.key == key)?;
        (last.kind == EventType::Put).then(|| last.kv.clone())
    }

    fn header(&self, revision: i64) -> ResponseHeader {
        ResponseHeader { cluster_id: 11, member_id: 22, revision, raft_term: 3 }
    }
}

/// The hub under test with its model, and how streams are made.
pub(crate) struct World {
    pub(crate) model: Model,
    pub(crate) hub: HubHandle,
    pub(crate) options: StreamOptions,
    pub(crate) task: tokio::task::JoinHandle<()>,
}

impl World {
    pub(crate) fn new(ring_len: usize, tuning: Tuning) -> World {
        let model = Model::new(ring_len);
        let (hub, handle) = Hub::new(model.clone(), tuning);
        let options =
            StreamOptions { fragment_bytes: 2 << 20, progress_interval: Duration::from_secs(600) };
        World { model, hub: handle, options, task: tokio::spawn(hub.run()) }
    }

    pub(crate) fn client(&self) -> Client {
        self.client_that_ends(futures::future::pending().boxed())
    }

    pub(crate) fn client_that_ends(&self, ends: Ends) -> Client {
        let (requests, receiver) = mpsc::channel(10_000);
        let stream = WatchStream::new(
            self.model.clone(),
            self.hub.clone(),
            self.options,
            ReceiverStream::new(receiver),
            ends,
        );
        Client { requests: Some(requests), responses: Box::pin(stream.responses()) }
    }
}

/// One stream, seen from the client.
pub(crate) struct Client {
    requests: Option<mpsc::Sender<Result<WatchRequest, Status>>>,
    responses: Pin<Box<dyn Stream<Item = Result<Response, Status>> + Send>>,
}

impl Client {
    fn send(&self, union: RequestUnion) {
        self.send_raw(Ok(WatchRequest { request_union: Some(union) }));
    }

    pub(crate) fn send_raw(&self, request: Result<WatchRequest, Status>) {
        let requests = self.requests.as_ref().expect("the client has not half-closed");
        requests.try_send(request).expect("tests send few requests");
    }

    pub(crate) fn create(&self, request: WatchCreateRequest) {
        self.send(RequestUnion::CreateRequest(request));
    }

    pub(crate) fn cancel(&self, watch_id: i64) {
        self.send(RequestUnion::CancelRequest(WatchCancelRequest { watch_id }));
    }

    pub(crate) fn ask_progress(&self) {
        self.send(RequestUnion::ProgressRequest(WatchProgressRequest {}));
    }

    /// Ends the client's side of the stream.
    pub(crate) fn half_close(&mut self) {
        self.requests = None;
    }

    /// The next response, decoded from its wire bytes.
    pub(crate) async fn next(&mut self) -> WatchResponse {
        let response = tokio::time::timeout(DEADLINE, self.responses.next()).await;
        let response = response.expect("a response within the deadline");
        decode(response.expect("an open stream").expect("no error"))
    }

    /// How the stream ends; responses before that are an error of the test.
    pub(crate) async fn ending(&mut self) -> Result<(), Status> {
        let response = tokio::time::timeout(DEADLINE, self.responses.next()).await;
        match response.expect("an end within the deadline") {
            None => Ok(()),
            Some(Err(status)) => {
                assert!(self.responses.next().await.is_none(), "nothing follows an error");
                Err(status)
            }
            Some(Ok(response)) => panic!("a response instead of the end: {response:?}"),
        }
    }

    /// A response if one is there right now.
    pub(crate) fn poll(&mut self) -> Option<WatchResponse> {
        let response = self.responses.next().now_or_never()?;
        Some(decode(response.expect("an open stream").expect("no error")))
    }

    /// Asks for progress until the answer is `revision`, and returns all that came before it.
    pub(crate) async fn until_progress(&mut self, revision: i64) -> Vec<WatchResponse> {
        let mut before = Vec::new();
        let started = tokio::time::Instant::now();
        loop {
            assert!(started.elapsed() < DEADLINE, "no progress up to {revision}");
            self.ask_progress();
            let pause = Duration::from_millis(20);
            while let Ok(response) = tokio::time::timeout(pause, self.responses.next()).await {
                let response = decode(response.expect("an open stream").expect("no error"));
                if is_progress(&response) && response.watch_id == -1 {
                    if header_revision(&response) >= revision {
                        return before;
                    }
                } else {
                    before.push(response);
                }
            }
        }
    }
}

fn decode(response: Response) -> WatchResponse {
    let mut bytes = Vec::new();
    response.encode(&mut bytes);
    WatchResponse::decode(&bytes[..]).expect("our own bytes")
}

/// What a client takes for a progress notice.
pub(crate) fn is_progress(response: &WatchResponse) -> bool {
    response.events.is_empty()
        && !response.created
        && !response.canceled
        && response.compact_revision == 0
        && header_revision(response) != 0
}

pub(crate) fn header_revision(response: &WatchResponse) -> i64 {
    response.header.as_ref().expect("a header").revision
}

/// A create request for a range.
pub(crate) fn create(key: &str, range_end: &str) -> WatchCreateRequest {
    WatchCreateRequest {
        key: Bytes::copy_from_slice(key.as_bytes()),
        range_end: Bytes::copy_from_slice(range_end.as_bytes()),
        ..Default::default()
    }
}

/// Keys and revisions of the events of a response.
pub(crate) fn brief(response: &WatchResponse) -> Vec<(String, i64)> {
    let kvs = response.events.iter().map(|event| event.kv.as_ref().expect("a key-value"));
    kvs.map(|kv| (String::from_utf8_lossy(&kv.key).into_owned(), kv.mod_revision)).collect()
}
