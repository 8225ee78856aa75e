//! Writers that remember what was acknowledged, and the judge that compares it with what a server
//! holds after a crash: every acknowledged write is there, nothing else is, revisions never go back,
//! and HashKV equals the hash of the history as a watcher sees it.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use kelson_api::Message;
use kelson_api::etcdserverpb as pb;
use kelson_api::mvccpb::{Event, KeyValue, event::EventType};
use pb::kv_client::KvClient;
use pb::maintenance_client::MaintenanceClient;
use pb::watch_client::WatchClient;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;

/// What became of one attempted write.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Fate {
    /// Acknowledged at this revision.
    Acked(i64),
    /// No answer came: it may or may not have happened.
    Unknown,
}

/// All attempts so far, by value (every value is written once).
#[derive(Default)]
pub struct Ledger {
    attempts: HashMap<String, (String, Fate)>,
    /// Highest acknowledged revision.
    highest: i64,
    counter: Arc<AtomicU64>,
}

/// One writer's result.
type Attempt = (String, String, Fate);

impl Ledger {
    /// Number of acknowledged writes.
    pub fn acknowledged(&self) -> usize {
        self.attempts.values().filter(|(_, fate)| matches!(fate, Fate::Acked(_))).count()
    }

    /// Starts `writers` tasks that write until the endpoint dies or `stop` is set.
    pub fn start(&self, endpoint: &str, writers: usize) -> Load {
        let stop = Arc::new(AtomicBool::new(false));
        let tasks = (0..writers)
            .map(|writer| {
                let counter = self.counter.clone();
                tokio::spawn(write(endpoint.to_string(), writer, counter, stop.clone()))
            })
            .collect();
        Load { stop, tasks }
    }

    /// Ends the load and takes its attempts into the ledger.
    pub async fn finish(&mut self, load: Load) {
        load.stop.store(true, Ordering::Relaxed);
        for task in load.tasks {
            for (key, value, fate) in task.await.expect("a writer does not panic") {
                if let Fate::Acked(revision) = fate {
                    self.highest = self.highest.max(revision);
                }
                self.attempts.insert(value, (key, fate));
            }
        }
    }

    /// Compares a running server with the ledger. `Err` names the first violation.
    pub async fn judge(&mut self, endpoint: &str) -> Result<(), String> {
        let channel = connect(endpoint).await?;
        let (revision, events) = history(&channel).await?;
        if revision < self.highest {
            return Err(format!("revision went back: {revision} < {}", self.highest));
        }
        let mut seen: HashMap<&str, i64> = HashMap::new();
        let mut last = 1;
        for event in &events {
            let kv = event.kv.as_ref().ok_or("an event without kv")?;
            if kv.mod_revision < last || kv.mod_revision > last + 1 {
                return Err(format!("history jumps from {last} to {}", kv.mod_revision));
            }
            last = kv.mod_revision;
            let value = std::str::from_utf8(&kv.value).map_err(|_| "a foreign value")?;
            let Some((key, _)) = self.attempts.get(value) else {
                return Err(format!("phantom value {value:?} at {last}"));
            };
            if key.as_bytes() != kv.key || seen.insert(value, last).is_some() {
                return Err(format!("value {value:?} under a wrong key or twice"));
            }
        }
        // More may have come meanwhile: a write without an answer takes effect when a majority is back.
        if last < revision {
            return Err(format!("revision {revision} but history ends at {last}"));
        }
        for (value, (key, fate)) in &self.attempts {
            if let Fate::Acked(acked) = fate
                && seen.get(value.as_str()) != Some(acked)
            {
                let found = seen.get(value.as_str());
                return Err(format!("lost: {key}={value} acked at {acked}, found {found:?}"));
            }
        }
        self.highest = last.max(revision);
        judge_hash(&channel, &events).await
    }
}

/// Running writers.
pub struct Load {
    stop: Arc<AtomicBool>,
    tasks: Vec<tokio::task::JoinHandle<Vec<Attempt>>>,
}

/// A channel to a server that answers; `Err` = it does not.
async fn connect(endpoint: &str) -> Result<Channel, String> {
    let channel = Channel::from_shared(endpoint.to_string()).expect("a URL").connect_lazy();
    for _ in 0..200 {
        let mut kv = KvClient::new(channel.clone());
        let request = pb::RangeRequest { key: "ready".into(), ..Default::default() };
        if kv.range(request).await.is_ok() {
            return Ok(channel);
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    Err(format!("{endpoint} does not answer within 10 s"))
}

async fn write(
    endpoint: String,
    writer: usize,
    counter: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
) -> Vec<Attempt> {
    let channel = Channel::from_shared(endpoint).expect("a URL").connect_lazy();
    let mut kv = KvClient::new(channel);
    let mut attempts = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        let number = counter.fetch_add(1, Ordering::Relaxed);
        // Few keys, so that histories grow; odd sizes, so that records straddle pages.
        let key = format!("w{writer}/{}", number % 7);
        let value = format!("{number}:{}", "v".repeat((number % 900) as usize));
        let put = pb::PutRequest {
            key: key.clone().into(),
            value: value.clone().into(),
            ..Default::default()
        };
        let answer = tokio::time::timeout(Duration::from_secs(10), kv.put(put)).await;
        match answer {
            Ok(Ok(answer)) => {
                let revision = answer.into_inner().header.map_or(0, |header| header.revision);
                attempts.push((key, value, Fate::Acked(revision)));
            }
            _ => {
                attempts.push((key, value, Fate::Unknown));
                // The server is gone; further attempts would all be unknown.
                break;
            }
        }
    }
    attempts
}

/// Every event from revision 2 on, and the current revision.
async fn history(channel: &Channel) -> Result<(i64, Vec<Event>), String> {
    let mut kv = KvClient::new(channel.clone());
    let request = pb::RangeRequest { key: "ready".into(), ..Default::default() };
    let answer = kv.range(request).await.map_err(|e| format!("range: {e}"))?.into_inner();
    let revision = answer.header.map_or(0, |header| header.revision);
    let mut events = Vec::new();
    if revision < 2 {
        return Ok((revision, events));
    }
    let create = pb::WatchCreateRequest {
        key: "\0".into(),
        range_end: "\0".into(),
        start_revision: 2,
        ..Default::default()
    };
    let (requests, outgoing) = mpsc::channel(1);
    let request_union = Some(pb::watch_request::RequestUnion::CreateRequest(create));
    requests.send(pb::WatchRequest { request_union }).await.map_err(|e| e.to_string())?;
    let mut watch = WatchClient::new(channel.clone()).max_decoding_message_size(i32::MAX as usize);
    let mut stream = watch
        .watch(ReceiverStream::new(outgoing))
        .await
        .map_err(|e| format!("watch: {e}"))?
        .into_inner();
    let complete = |events: &Vec<Event>| {
        events
            .last()
            .and_then(|event| event.kv.as_ref())
            .is_some_and(|kv| kv.mod_revision >= revision)
    };
    while !complete(&events) {
        let message = tokio::time::timeout(Duration::from_secs(30), stream.message()).await;
        let response = message
            .map_err(|_| format!("the history stops after {} events", events.len()))?
            .map_err(|e| format!("watch: {e}"))?
            .ok_or("the watch ended")?;
        if response.canceled {
            return Err(format!("watch canceled: {response:?}"));
        }
        events.extend(response.events);
    }
    Ok((revision, events))
}

/// HashKV over the history that the watcher saw, as etcd computes it without compaction.
async fn judge_hash(channel: &Channel, events: &[Event]) -> Result<(), String> {
    let mut sub = 0;
    let mut last = 0;
    let mut hash = crc32c::crc32c(b"key");
    for event in events {
        let kv = event.kv.as_ref().ok_or("an event without kv")?;
        sub = if kv.mod_revision == last { sub + 1 } else { 0 };
        last = kv.mod_revision;
        let mut key = Vec::with_capacity(18);
        key.extend(kv.mod_revision.to_be_bytes());
        key.push(b'_');
        key.extend(i64::to_be_bytes(sub));
        let value = if event.r#type == EventType::Delete as i32 {
            key.push(b't');
            KeyValue { key: kv.key.clone(), ..Default::default() }.encode_to_vec()
        } else {
            kv.encode_to_vec()
        };
        hash = crc32c::crc32c_append(hash, &key);
        hash = crc32c::crc32c_append(hash, &value);
    }
    let mut maintenance = MaintenanceClient::new(channel.clone());
    let answer = maintenance
        .hash_kv(pb::HashKvRequest { revision: last })
        .await
        .map_err(|e| format!("hashkv: {e}"))?
        .into_inner();
    if last > 0 && answer.hash != hash {
        return Err(format!("HashKV is {} but the history hashes to {hash}", answer.hash));
    }
    Ok(())
}
