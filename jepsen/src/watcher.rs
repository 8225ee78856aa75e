//! Watchers: one per member, on all keys of the workload, from revision 1, going on after every
//! break where they stopped. They record what they are sent as it comes and judge nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use futures::StreamExt;
use kelson_api::etcdserverpb as pb;
use kelson_api::mvccpb;
use parking_lot::Mutex;
use pb::watch_client::WatchClient;
use pb::watch_request::RequestUnion;
use tonic::transport::Endpoint;

use crate::client::{PREFIX, revision, row};
use crate::fabric;
use crate::history::{Clock, Event, Recorder, WatchRecord, WatchWhat};

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

    fn over(&self, member: usize) -> bool {
        self.stop.load(Ordering::Relaxed) || self.left.lock().contains(&member)
    }

    /// Watches one member until `stop`.
    pub(crate) fn watch(self: &Arc<Self>, member: usize) -> tokio::task::JoinHandle<()> {
        let this = self.clone();
        tokio::spawn(async move {
            while !this.over(member) {
                let stream = this.streams.fetch_add(1, Ordering::Relaxed);
                if let Err(error) = this.follow(member, stream).await {
                    this.record(stream, member, WatchWhat::Ended { error });
                }
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
        })
    }

    fn record(&self, stream: u64, member: usize, what: WatchWhat) {
        self.records.add(WatchRecord { stream, member, at: self.clock.now(), what });
    }

    /// One stream, from the revision after the last one seen to its end.
    async fn follow(&self, member: usize, stream: u64) -> Result<(), String> {
        let from = self.reached(member) + 1;
        // Slower than the pings that etcd's servers punish; without them a stream through a network
        // that swallows packets would look alive for ever.
        let endpoint = Endpoint::from_shared(format!("http://{}:2379", fabric::address(member)))
            .expect("an address is a valid URI")
            .connect_timeout(Duration::from_secs(1))
            .http2_keep_alive_interval(Duration::from_secs(6))
            .keep_alive_timeout(Duration::from_secs(3));
        let channel = endpoint.connect().await.map_err(|error| format!("{error:?}"))?;
        let mut client = WatchClient::new(channel).max_decoding_message_size(64 << 20);
        let asked = futures::stream::iter([request(from)]).chain(futures::stream::pending());
        let opening = tokio::time::timeout(Duration::from_secs(5), client.watch(asked));
        let mut answers = match opening.await {
            Ok(opened) => opened.map_err(|status| format!("{status:?}"))?.into_inner(),
            Err(_) => return Err("no answer to the watch request in time".into()),
        };
        self.record(stream, member, WatchWhat::Started { from });
        while !self.over(member) {
            let next = tokio::time::timeout(Duration::from_millis(500), answers.message());
            let response = match next.await {
                Err(_) => continue,
                Ok(message) => message.map_err(|status| format!("{status:?}"))?,
            };
            let Some(response) = response else { return Err("closed by the member".into()) };
            if response.canceled {
                let compacted = response.compact_revision;
                return Err(format!(
                    "canceled: {} (compacted {compacted})",
                    response.cancel_reason
                ));
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
            let mut reached = self.reached.lock();
            let at = reached.entry(member).or_default();
            *at = last.revision.max(*at);
        }
        self.record(stream, member, WatchWhat::Events { revision: header, events });
    }
}

fn request(from: i64) -> pb::WatchRequest {
    let mut end = PREFIX.as_bytes().to_vec();
    if let Some(last) = end.last_mut() {
        *last += 1;
    }
    let create = pb::WatchCreateRequest {
        key: PREFIX.into(),
        range_end: end.into(),
        start_revision: from,
        progress_notify: true,
        prev_kv: true,
        ..Default::default()
    };
    pb::WatchRequest { request_union: Some(RequestUnion::CreateRequest(create)) }
}

fn event(event: &mvccpb::Event) -> Event {
    let kv = event.kv.clone().unwrap_or_default();
    let deleted = event.r#type == mvccpb::event::EventType::Delete as i32;
    Event {
        revision: kv.mod_revision,
        key: String::from_utf8_lossy(&kv.key).into_owned(),
        put: (!deleted).then(|| row(&kv)),
        before: event.prev_kv.as_ref().map(row),
    }
}
