//! What does one event cost when many watch? Asked of the hub and the streams alone, without network
//! and disk: from the feed to encoded responses. The ceiling by thought: per watcher one queue entry
//! (50 ns), one wake-up (0.5 us, shared by a burst) and one copy of the event bytes.
//! Run: `cargo bench -p kelson-benches --bench watch_fanout`.

use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use futures::{FutureExt, StreamExt};
use kelson_api::etcdserverpb::watch_request::RequestUnion;
use kelson_api::etcdserverpb::{ResponseHeader, WatchCreateRequest, WatchRequest};
use kelson_api::mvccpb::{KeyValue, event::EventType};
use kelson_api::{Error, Message};
use kelson_server::watch::{
    Hub, HubHandle, IntervalIndex, KeyRange, Response, SharedRevision, Source, StreamOptions,
    Tuning, WatchStream,
};
use kelson_storage::{Changes, FeedEvent, Recent, Revised};
use tokio::sync::{mpsc, watch};

/// Events per measured burst: what a busy member applies within a few milliseconds.
const BURST: i64 = 100;

const VALUE_BYTES: usize = 256;

/// A feed that remembers one burst.
#[derive(Clone)]
struct Burst {
    moved: Arc<watch::Sender<i64>>,
    key: Bytes,
}

impl Burst {
    fn revised(&self, revision: i64) -> Arc<Revised> {
        let kv = KeyValue {
            key: self.key.clone(),
            value: Bytes::from_static(&[b'v'; VALUE_BYTES]),
            create_revision: 2,
            mod_revision: revision,
            version: revision - 1,
            lease: 0,
        };
        let events = vec![FeedEvent { kind: EventType::Put, kv, prev_kv: None }];
        Arc::new(Revised { revision, events })
    }
}

impl Source for Burst {
    fn revision(&self) -> i64 {
        *self.moved.borrow()
    }

    fn compacted(&self) -> i64 {
        -1
    }

    fn feed(&self) -> watch::Receiver<i64> {
        self.moved.subscribe()
    }

    fn recent(&self, after: i64) -> Recent {
        let newest = self.revision();
        Recent::Batches((after + 1..=newest).map(|revision| self.revised(revision)).collect())
    }

    fn changes(&self, from: i64, max_revisions: usize, _: usize) -> Result<Changes, Error> {
        let store_revision = self.revision();
        let next = (store_revision + 1).min(from + max_revisions as i64);
        let batches = (from..next).map(|revision| self.revised(revision)).collect();
        Ok(Changes { batches, next, store_revision })
    }

    fn kv_before(&self, _: &[u8], _: i64) -> Option<KeyValue> {
        None
    }

    fn header(&self, revision: i64) -> ResponseHeader {
        ResponseHeader { cluster_id: 1 << 60, member_id: 1 << 61, revision, raft_term: 2 }
    }
}

fn create(key: &str) -> WatchRequest {
    let request = WatchCreateRequest { key: key.to_owned().into(), ..Default::default() };
    WatchRequest { request_union: Some(RequestUnion::CreateRequest(request)) }
}

/// Starts a client that encodes what it gets and tells how many events came. It says 0 once all
/// its watchers are created.
fn start_client(source: &Burst, hub: &HubHandle, watchers: usize, told: mpsc::Sender<usize>) {
    let requests = futures::stream::iter(vec![Ok(create("key")); watchers]);
    let requests = requests.chain(futures::stream::pending());
    let options =
        StreamOptions { fragment_bytes: 2 << 20, progress_interval: Duration::from_secs(600) };
    let ends = futures::future::pending().boxed();
    let stream = WatchStream::new(source.clone(), hub.clone(), options, requests, ends);
    tokio::spawn(async move {
        let mut responses = Box::pin(stream.responses()).ready_chunks(128);
        let mut buffer = BytesMut::new();
        let mut created = 0;
        while let Some(chunk) = responses.next().await {
            buffer.clear();
            let mut events = 0;
            for response in chunk {
                // The streams end with the runtime, when the measurement is over.
                let Ok(response) = response else { return };
                created += usize::from(response.head.created);
                events += response.events.len();
                response.encode(&mut buffer);
            }
            black_box(&buffer);
            if (events > 0 || created == watchers) && told.send(events).await.is_err() {
                return;
            }
        }
    });
}

/// A burst of events to all watchers, until each has encoded all of them.
fn fan_out(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("fan_out");
    for (streams, watchers) in [(1000, 1), (100, 10), (1, 1000), (1, 1)] {
        let events = BURST as u64 * (streams * watchers) as u64;
        group.throughput(Throughput::Elements(events));
        let id = BenchmarkId::from_parameter(format!("{streams}x{watchers}"));
        group.bench_function(id, |bencher| {
            let runtime = tokio::runtime::Runtime::new().expect("a runtime with all cores");
            bencher.iter_custom(|rounds| runtime.block_on(bursts(streams, watchers, rounds)));
        });
    }
    group.finish();
}

async fn bursts(streams: usize, watchers: usize, rounds: u64) -> Duration {
    let key = Bytes::from_static(b"key");
    let source = Burst { moved: Arc::new(watch::Sender::new(1)), key };
    let (hub, handle) = Hub::new(source.clone(), Tuning::default());
    tokio::spawn(hub.run());
    let (told, mut counts) = mpsc::channel(1024);
    for _ in 0..streams {
        start_client(&source, &handle, watchers, told.clone());
    }
    for _ in 0..streams {
        assert_eq!(counts.recv().await, Some(0));
    }
    let started = Instant::now();
    for _ in 0..rounds {
        for _ in 0..BURST {
            source.moved.send_modify(|revision| *revision += 1);
        }
        let mut missing = BURST as usize * streams * watchers;
        while missing > 0 {
            missing -= counts.recv().await.expect("clients go on");
        }
    }
    started.elapsed()
}

/// Finding the watchers of one key among ten thousand.
fn index(criterion: &mut Criterion) {
    let mut index = IntervalIndex::new();
    for number in 0..10_000_u32 {
        let start = Bytes::from(format!("/registry/kind{number:05}/"));
        let end = Bytes::from(format!("/registry/kind{number:05}0"));
        index.insert(&KeyRange::parse(&start, &end).expect("start is below end"), number);
    }
    let all = KeyRange::parse(&Bytes::from("/"), &Bytes::from("0")).expect("start is below end");
    index.insert(&all, u32::MAX);
    criterion.bench_function("index/10k_prefixes", |bencher| {
        bencher.iter(|| {
            let mut hits = 0;
            index.visit(black_box(b"/registry/kind04711/namespace/name"), |_| hits += 1);
            assert_eq!(hits, 2);
        });
    });
}

/// One event for one watcher: shared bytes against encoding the whole message.
fn encode(criterion: &mut Criterion) {
    let source =
        Burst { moved: Arc::new(watch::Sender::new(1)), key: Bytes::from_static(b"/registry/a") };
    let shared = SharedRevision::new(source.revised(1000));
    let mut buffer = BytesMut::with_capacity(4096);
    criterion.bench_function("encode/shared", |bencher| {
        bencher.iter(|| {
            buffer.clear();
            let events = vec![shared.frame(0, true)];
            Response::events(source.header(1000), 7, events).encode(&mut buffer);
            black_box(&buffer);
        });
    });
    let response = Response::events(source.header(1000), 7, vec![shared.frame(0, true)]);
    let mut bytes = BytesMut::new();
    response.encode(&mut bytes);
    let message = kelson_api::etcdserverpb::WatchResponse::decode(bytes).expect("our own bytes");
    criterion.bench_function("encode/whole", |bencher| {
        bencher.iter(|| {
            buffer.clear();
            message.clone().encode(&mut buffer).expect("the buffer grows");
            black_box(&buffer);
        });
    });
}

criterion_group!(benches, fan_out, index, encode);
criterion_main!(benches);
