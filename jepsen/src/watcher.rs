//! Watchers: one per member, on all keys of the workload, from revision 1, going on after every
//! break where they stopped. They record what they are sent as it comes and judge nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use futures::channel::mpsc;
use kelson_api::etcdserverpb as pb;
use parking_lot::Mutex;
use pb::watch_client::WatchClient;
use pb::watch_create_request::FilterType;
use pb::watch_request::RequestUnion;
use tonic::Streaming;
use tonic::transport::Endpoint;

use crate::client::revision;
use crate::fabric;
use crate::history::{Clock, Event, Recorder, Spec, WatchRecord, WatchWhat};
use crate::wire::event;

/// All watchers of a run.
pub(crate) struct Watchers {
    clock: Clock,
    records: Recorder<WatchRecord>,
    streams: AtomicU64,
    /// Newest revision that each member's watcher was sent.
    reached: Mutex<BTreeMap<usize, i64>>,
    /// Members whose watchers end early.
    left: Mutex<BTreeSet<usize>>,
    stop: AtomicBool,
}

impl Watchers {
    pub(crate) fn new(clock: Clock, records: Recorder<WatchRecord>) -> Arc<Self> {
        Arc::new(Self {
            clock,
            records,
            streams: AtomicU64::new(1),
            reached: Mutex::default(),
            left: Mutex::default(),
            stop: AtomicBool::new(false),
        })
    }

    pub(crate) fn records(&self) -> &Recorder<WatchRecord> {
        &self.records
    }

    /// The newest revision that this member's watcher was sent.
    pub(crate) fn reached(&self, member: usize) -> i64 {
        self.reached.lock().get(&member).copied().unwrap_or(0)
    }

    /// What lies before this was compacted: a new watcher of the member begins behind it.
    pub(crate) fn skip(&self, member: usize, compacted: i64) {
        let mut reached = self.reached.lock();
        let at = reached.entry(member).or_default();
        *at = compacted.max(*at);
    }

    pub(crate) fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    /// Ends the watcher of a member that leaves the cluster.
    pub(crate) fn leave(&self, member: usize) {
        self.left.lock().insert(member);
    }

    /// True when the run has no more use for watchers.
    pub(crate) fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    fn over(&self, member: usize) -> bool {
        self.stopped() || self.left.lock().contains(&member)
    }

    /// Watches one member until `stop`.
    pub(crate) fn watch(self: &Arc<Self>, member: usize) -> tokio::task::JoinHandle<()> {
        let this = self.clone();
        tokio::spawn(async move {
            while !this.over(member) {
                let stream = this.stream();
                if let Err(error) = this.follow(member, stream).await {
                    this.record(stream, member, WatchWhat::Ended { error });
                }
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
        })
    }

    pub(crate) fn record(&self, stream: u64, member: usize, what: WatchWhat) {
        self.records.add(WatchRecord { stream, member, at: self.clock.now(), what });
    }

    /// One stream, from the revision after the last one seen to its end.
    async fn follow(&self, member: usize, stream: u64) -> Result<(), String> {
        let from = self.reached(member) + 1;
        let (_asks, mut answers) = open(member, request(from)).await?;
        self.record(stream, member, WatchWhat::Started { from, spec: Spec::default() });
        while !self.over(member) {
            let next = tokio::time::timeout(Duration::from_millis(500), answers.message());
            let response = match next.await {
                Err(_) => continue,
                Ok(message) => message.map_err(|status| format!("{status:?}"))?,
            };
            let Some(response) = response else { return Err("closed by the member".into()) };
            if response.canceled && response.compact_revision > 0 {
                // What is lost to this watcher others have seen: nothing newer is ever compacted.
                let revision = response.compact_revision;
                self.record(stream, member, WatchWhat::Compacted { revision });
                self.reach(member, revision - 1);
                return Ok(());
            }
            if response.canceled {
                return Err(format!("canceled: {}", response.cancel_reason));
            }
            self.take(stream, member, response);
        }
        Ok(())
    }

    fn take(&self, stream: u64, member: usize, response: pb::WatchResponse) {
        let header = revision(response.header);
        if response.events.is_empty() {
            if !response.created {
                self.record(stream, member, WatchWhat::Progress { revision: header });
            }
            return;
        }
        let events: Vec<Event> = response.events.iter().map(event).collect();
        if let Some(last) = events.last() {
            self.reach(member, last.revision);
        }
        let more = response.fragment;
        self.record(stream, member, WatchWhat::Events { revision: header, events, more });
    }

    fn reach(&self, member: usize, revision: i64) {
        let mut reached = self.reached.lock();
        let at = reached.entry(member).or_default();
        *at = revision.max(*at);
    }

    /// The newest revision that any of them was sent.
    pub(crate) fn newest(&self) -> i64 {
        self.reached.lock().values().copied().max().unwrap_or(0)
    }

    /// A stream number that no stream had before.
    pub(crate) fn stream(&self) -> u64 {
        self.streams.fetch_add(1, Ordering::Relaxed)
    }
}

/// Requests to an open stream go in here.
pub(crate) type Asks = mpsc::Sender<pb::WatchRequest>;

/// Opens a watch stream to a member with its first request.
pub(crate) async fn open(
    member: usize,
    first: pb::WatchRequest,
) -> Result<(Asks, Streaming<pb::WatchResponse>), String> {
    // Slower than the pings that etcd's servers punish; without them a stream through a network
    // that swallows packets would look alive for ever.
    let endpoint = Endpoint::from_shared(format!("http://{}:2379", fabric::address(member)))
        .expect("an address is a valid URI")
        .connect_timeout(Duration::from_secs(1))
        .http2_keep_alive_interval(Duration::from_secs(6))
        .keep_alive_timeout(Duration::from_secs(3));
    let channel = endpoint.connect().await.map_err(|error| format!("{error:?}"))?;
    let mut client = WatchClient::new(channel).max_decoding_message_size(64 << 20);
    // What a full queue refuses is not asked: the requests that come later may be left out.
    let (mut asks, asked) = mpsc::channel(16);
    asks.try_send(first).map_err(|error| error.to_string())?;
    let opening = tokio::time::timeout(Duration::from_secs(5), client.watch(asked));
    match opening.await {
        Ok(opened) => Ok((asks, opened.map_err(|status| format!("{status:?}"))?.into_inner())),
        Err(_) => Err("no answer to the watch request in time".into()),
    }
}

fn request(from: i64) -> pb::WatchRequest {
    create(&Spec::default(), from, 0)
}

/// Asks for a watch; with `id` 0 the member names it.
pub(crate) fn create(spec: &Spec, from: i64, id: i64) -> pb::WatchRequest {
    let filters = [(spec.no_put, FilterType::Noput), (spec.no_delete, FilterType::Nodelete)];
    let filters = filters.into_iter().filter(|(on, _)| *on).map(|(_, kind)| kind as i32);
    let create = pb::WatchCreateRequest {
        key: spec.key.clone().into(),
        range_end: spec.end.clone().into(),
        start_revision: from,
        progress_notify: spec.progress,
        filters: filters.collect(),
        prev_kv: spec.prev_kv,
        watch_id: id,
        fragment: spec.fragment,
    };
    pb::WatchRequest { request_union: Some(RequestUnion::CreateRequest(create)) }
}
