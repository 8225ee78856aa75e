//! A watcher of the whole key space that keeps all it was told, and the judge that compares that with
//! what was written: each event once, in order, whole revisions, the right state before and after, and
//! no progress told ahead of events.

use std::collections::BTreeMap;
use std::time::Duration;

use kelson_api::etcdserverpb as pb;
use kelson_api::mvccpb::{Event, KeyValue, event::EventType};
use pb::watch_client::WatchClient;
use pb::watch_request::RequestUnion;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;
use tonic::transport::Channel;

/// What each revision changed, in the order of its operations: key and new value, `None` = deleted.
pub type Written = BTreeMap<i64, Vec<(String, Option<String>)>>;

/// An open stream with one watcher.
pub struct Watcher {
    requests: mpsc::Sender<pb::WatchRequest>,
    responses: Streaming<pb::WatchResponse>,
}

fn request(union: RequestUnion) -> pb::WatchRequest {
    pb::WatchRequest { request_union: Some(union) }
}

/// Asks for everything from this revision on, with the states before.
pub fn all_from(revision: i64) -> pb::WatchRequest {
    request(RequestUnion::CreateRequest(pb::WatchCreateRequest {
        key: "\0".into(),
        range_end: "\0".into(),
        start_revision: revision,
        prev_kv: true,
        ..Default::default()
    }))
}

impl Watcher {
    /// Watches everything from this revision on, with the states before.
    pub async fn open(channel: &Channel, from: i64) -> Watcher {
        let (requests, outgoing) = mpsc::channel(16);
        requests.send(all_from(from)).await.expect("it is open");
        let mut client = WatchClient::new(channel.clone()).max_decoding_message_size(usize::MAX);
        let responses = client.watch(ReceiverStream::new(outgoing)).await.expect("a stream");
        Watcher { requests, responses: responses.into_inner() }
    }

    /// Where to ask for progress; each message is a question.
    pub fn questions(&self) -> mpsc::Sender<pb::WatchRequest> {
        self.requests.clone()
    }

    /// All responses up to the events of a revision. `Err`: they did not come within the time, or the
    /// stream ended.
    pub async fn until(
        &mut self,
        revision: i64,
        within: Duration,
    ) -> Result<Vec<pb::WatchResponse>, String> {
        let mut seen = Vec::new();
        let deadline = tokio::time::Instant::now() + within;
        loop {
            let message = tokio::time::timeout_at(deadline, self.responses.message()).await;
            let late = |_| format!("revision {revision} did not come within {within:?}");
            let message = message.map_err(late)?.map_err(|status| format!("watch: {status}"))?;
            let response = message.ok_or("the stream ended")?;
            if response.canceled {
                return Err(format!("canceled: {response:?}"));
            }
            let last = response.events.last().map_or(0, revision_of);
            seen.push(response);
            if last >= revision {
                return Ok(seen);
            }
        }
    }
}

/// The question for progress.
pub fn progress() -> pb::WatchRequest {
    request(RequestUnion::ProgressRequest(pb::WatchProgressRequest {}))
}

fn revision_of(event: &Event) -> i64 {
    event.kv.as_ref().map_or(0, |kv| kv.mod_revision)
}

/// Compares what a watcher from `from` on was told with what was written. `Err` names the first
/// difference.
pub fn judge(responses: &[pb::WatchResponse], written: &Written, from: i64) -> Result<(), String> {
    let mut told = 0;
    let mut last = 0;
    let mut events = Vec::new();
    for response in responses {
        let header = response.header.as_ref().map_or(0, |header| header.revision);
        let (Some(first), Some(end)) = (response.events.first(), response.events.last()) else {
            if !response.created {
                told = header;
            }
            continue;
        };
        let first = revision_of(first);
        if first <= told {
            return Err(format!("events of {first} after progress was told at {told}"));
        }
        if first <= last {
            return Err(format!("a response begins with {first} after one that ended with {last}"));
        }
        if revision_of(end) > header {
            return Err(format!("events of {} under header {header}", revision_of(end)));
        }
        last = revision_of(end);
        events.extend(response.events.iter().cloned());
    }
    let expected = expected(written, from);
    for (event, expected) in events.iter().zip(&expected) {
        if event != expected {
            return Err(format!("expected {expected:?}\n but came {event:?}"));
        }
    }
    if events.len() != expected.len() {
        return Err(format!("{} events instead of {}", events.len(), expected.len()));
    }
    Ok(())
}

/// The events of a history that begins with an empty store.
fn expected(written: &Written, from: i64) -> Vec<Event> {
    let mut state: BTreeMap<&str, KeyValue> = BTreeMap::new();
    let mut events = Vec::new();
    for (&revision, changes) in written {
        for (key, value) in changes {
            let before = state.remove(key.as_str());
            let mut kv =
                KeyValue { key: key.clone().into(), mod_revision: revision, ..KeyValue::default() };
            let mut kind = EventType::Delete;
            if let Some(value) = value {
                kind = EventType::Put;
                kv.value = value.clone().into();
                kv.create_revision = before.as_ref().map_or(revision, |kv| kv.create_revision);
                kv.version = before.as_ref().map_or(0, |kv| kv.version) + 1;
                state.insert(key, kv.clone());
            }
            if revision >= from {
                events.push(Event { r#type: kind as i32, kv: Some(kv), prev_kv: before });
            }
        }
    }
    events
}
