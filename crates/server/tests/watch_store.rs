//! Watches on the real store: history comes from memory and from disk, compactions really remove
//! rows, and every event must equal what a plain list says.

mod watch_support;

use bytes::Bytes;
use futures::{FutureExt, StreamExt};
use kelson_api::command::Command;
use kelson_api::command::command::Op;
use kelson_api::etcdserverpb::request_op::Request;
use kelson_api::etcdserverpb::watch_request::RequestUnion;
use kelson_api::etcdserverpb::{
    CompactionRequest, DeleteRangeRequest, PutRequest, RequestOp, ResponseHeader, TxnRequest,
    WatchCreateRequest, WatchRequest, WatchResponse,
};
use kelson_api::mvccpb::{Event, KeyValue};
use kelson_api::{Error, Message};
use kelson_server::watch::{Hub, HubHandle, Source, StreamOptions, Tuning, WatchStream};
use kelson_storage::log::Durable;
use kelson_storage::{Changes, DataDir, LogId, Options, Reader, Recent, Store};
use tokio::sync::watch;

use watch_support::{Change, DEADLINE, Draw, Model, create};

/// More revisions than the feed remembers, so that the first ones come from disk.
const REVISIONS: i64 = 12_000;

/// The store as a source of watches, without a member around it.
#[derive(Clone)]
struct Plain(Reader);

impl Source for Plain {
    fn revision(&self) -> i64 {
        self.0.revision()
    }

    fn compacted(&self) -> i64 {
        self.0.compacted()
    }

    fn feed(&self) -> watch::Receiver<i64> {
        self.0.feed().revision()
    }

    fn recent(&self, after: i64) -> Recent {
        self.0.feed().recent(after)
    }

    fn changes(&self, from: i64, max_revisions: usize, max_bytes: usize) -> Result<Changes, Error> {
        self.0.changes(from, max_revisions, max_bytes)
    }

    fn kv_before(&self, key: &[u8], revision: i64) -> Option<KeyValue> {
        self.0.kv_before(key, revision)
    }

    fn header(&self, revision: i64) -> ResponseHeader {
        ResponseHeader { cluster_id: 1, member_id: 2, revision, raft_term: 3 }
    }
}

/// A store with the list of what was done to it.
struct Pair {
    store: Store,
    model: Model,
    index: u64,
    draw: Draw,
}

impl Pair {
    fn apply(&mut self, ops: Vec<Op>) {
        let command = |op| Command { op: Some(op), ..Command::default() };
        let commands: Vec<Command> = ops.into_iter().map(command).collect();
        self.index += 1;
        let id = LogId { term: 1, index: self.index };
        for outcome in self.store.apply(id, &commands).expect("the store works") {
            outcome.result.expect("a good command");
        }
    }

    /// Some random revisions in one log entry.
    fn write(&mut self, count: usize) {
        let mut ops = Vec::new();
        for _ in 0..count {
            let mut changes: Vec<(String, Option<String>)> = Vec::new();
            for _ in 0..1 + self.draw.below(3) {
                let key = format!("/k{}/{}", self.draw.below(3), self.draw.below(40));
                let value = format!("value {}", self.draw.below(1000));
                if changes.iter().all(|(taken, _)| *taken != key) {
                    changes.push((key, (!self.draw.one_in(5)).then_some(value)));
                }
            }
            let changes: Vec<Change<'_>> =
                changes.iter().map(|(key, value)| (key.as_str(), value.as_deref())).collect();
            self.model.apply(&changes);
            ops.push(txn(&changes));
        }
        self.apply(ops);
    }

    fn write_one(&mut self, changes: &[Change<'_>]) {
        self.model.apply(changes);
        self.apply(vec![txn(changes)]);
    }

    fn compact(&mut self, revision: i64) {
        self.apply(vec![Op::Compaction(CompactionRequest { revision, physical: false })]);
        self.model.compact(revision);
    }
}

fn txn(changes: &[Change<'_>]) -> Op {
    let success = changes.iter().map(|(key, value)| {
        let key = Bytes::copy_from_slice(key.as_bytes());
        let request = match value {
            Some(value) => {
                let value = Bytes::copy_from_slice(value.as_bytes());
                Request::RequestPut(PutRequest { key, value, ..Default::default() })
            }
            None => Request::RequestDeleteRange(DeleteRangeRequest { key, ..Default::default() }),
        };
        RequestOp { request: Some(request) }
    });
    Op::Txn(TxnRequest { success: success.collect(), ..Default::default() })
}

/// All events of one watcher up to the revision that `last` will name, or its compaction revision.
async fn collect(
    source: Plain,
    hub: HubHandle,
    request: WatchCreateRequest,
    last: watch::Receiver<i64>,
) -> Result<Vec<Event>, i64> {
    let union = Some(RequestUnion::CreateRequest(request));
    let requests = futures::stream::iter([Ok(WatchRequest { request_union: union })]);
    let requests = requests.chain(futures::stream::pending());
    let options = StreamOptions { fragment_bytes: 2 << 20, progress_interval: DEADLINE };
    let ends = futures::future::pending().boxed();
    let stream = WatchStream::new(source, hub, options, requests, ends);
    let mut responses = Box::pin(stream.responses());
    let mut events: Vec<Event> = Vec::new();
    while events.last().is_none_or(|event| mod_revision(event) != *last.borrow()) {
        let next = tokio::time::timeout(DEADLINE, responses.next()).await;
        let response = next.expect("in time").expect("an open stream").expect("no error");
        if response.head.canceled {
            return Err(response.head.compact_revision);
        }
        let mut bytes = Vec::new();
        response.encode(&mut bytes);
        events.extend(WatchResponse::decode(&bytes[..]).expect("our own bytes").events);
    }
    Ok(events)
}

fn mod_revision(event: &Event) -> i64 {
    event.kv.as_ref().expect("an event has a key-value").mod_revision
}

const RANGES: [(&str, &str); 4] = [("/k0/", "/k00"), ("/k1/7", ""), ("", "\0"), ("/k2/", "\0")];

/// A change to every range.
const LAST: [Change<'static>; 3] =
    [("/k0/last", Some("x")), ("/k1/7", Some("x")), ("/k2/last", Some("x"))];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn history_and_live_events_equal_the_list() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let _data_dir = DataDir::open(dir.path()).expect("a new data directory");
    let durable = Durable::manual(u64::MAX).0;
    let (store, reader) = kelson_storage::open(&Options::new(dir.path()), durable).expect("open");
    let mut pair = Pair { store, model: Model::new(1), index: 0, draw: Draw::new(5) };
    while pair.model.revision() < REVISIONS {
        tokio::task::block_in_place(|| pair.write(100));
    }
    assert_eq!(pair.model.revision(), reader.revision());
    let compacted = 500;
    tokio::task::block_in_place(|| pair.compact(compacted));

    let source = Plain(reader);
    let (hub, handle) = Hub::new(source.clone(), Tuning::default());
    tokio::spawn(hub.run());
    let (last, told) = watch::channel(0);
    let mut tasks = Vec::new();
    let newest = source.revision();
    for start_revision in [2, 499, 501, 1000, 3000, newest - 10, newest + 1, newest + 50] {
        for (key, end) in RANGES {
            let request = WatchCreateRequest { start_revision, prev_kv: true, ..create(key, end) };
            let collected = collect(source.clone(), handle.clone(), request.clone(), told.clone());
            tasks.push((request, tokio::spawn(collected)));
        }
    }
    // Watchers come through history while writes go on.
    for _ in 0..50 {
        tokio::task::block_in_place(|| pair.write(20));
        tokio::task::yield_now().await;
    }
    last.send_replace(pair.model.revision() + 1);
    pair.write_one(&LAST);
    for (request, task) in tasks {
        let events = task.await.expect("no panic");
        if request.start_revision < compacted {
            assert_eq!(events, Err(compacted), "{request:?}");
        } else {
            let expected = pair.model.expected(&request, request.start_revision);
            assert!(events == Ok(expected), "{request:?}");
        }
    }
    assert_eq!(handle.stats().slow_watchers(), 0);
    tokio::task::block_in_place(|| pair.store.shutdown());
}
