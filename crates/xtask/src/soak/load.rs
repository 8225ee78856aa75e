//! The load of a soak: writers with keys of their own, leased events, compactions, old reads, lists,
//! watchers, snapshot streams and hashes. Each task waits for one answer before it asks again, so what
//! is in flight is bounded by the number of tasks. The first wrong or missing answer ends the soak.
//! Over 600 lines, because every kind of load shares one set of bounds and counts.

use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use kelson_api::etcdserverpb as pb;
use pb::kv_client::KvClient;
use pb::lease_client::LeaseClient;
use pb::maintenance_client::MaintenanceClient;
use pb::watch_client::WatchClient;
use pb::watch_request::RequestUnion;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Interval, MissedTickBehavior, interval, interval_at, sleep, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;

use super::plot::Mark;
use super::sample::{Sample, Sampler};
use super::values::{self, Rng};

/// Writers; each has one request in flight.
pub(crate) const WRITERS: usize = 48;
/// Connections that the tasks share.
const CHANNELS: usize = 4;
/// Longest wait for any answer.
const PATIENCE: Duration = Duration::from_secs(30);
/// Longest wait for an answer that takes work in proportion to the store.
const LONG_PATIENCE: Duration = Duration::from_secs(120);
/// Time between two compactions, and how much history each leaves.
const COMPACT_EVERY: Duration = Duration::from_secs(20);
const HISTORY: Duration = Duration::from_secs(10);
/// Every so many compactions one waits until the rows are gone.
const PHYSICAL_EVERY: usize = 3;
const SNAPSHOT_EVERY: Duration = Duration::from_secs(60);
const HASH_EVERY: Duration = Duration::from_secs(45);
const OLD_READ_EVERY: Duration = Duration::from_millis(50);
const LIST_EVERY: Duration = Duration::from_secs(1);
/// Events written a second, all under one lease, and how long they live. Unit: seconds.
const EVENTS: u32 = 20;
const EVENT_TTL: i64 = 30;
const WATCHERS: usize = 4;

/// What happens beside the writers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Kind {
    Events,
    Compactions,
    OldReads,
    Lists,
    Snapshots,
    Hashes,
    /// One of the watchers.
    Watch(usize),
}

/// All that can happen beside the writers, by name. The watchers share one.
pub(crate) const KINDS: [(&str, Kind); 10] = [
    ("events", Kind::Events),
    ("compactions", Kind::Compactions),
    ("old-reads", Kind::OldReads),
    ("lists", Kind::Lists),
    ("snapshots", Kind::Snapshots),
    ("hashes", Kind::Hashes),
    ("watch-restless", Kind::Watch(0)),
    ("watches", Kind::Watch(1)),
    ("watches", Kind::Watch(2)),
    ("watch-slow", Kind::Watch(WATCHERS - 1)),
];

/// What a writer knows of one of its keys.
#[derive(Clone, Copy)]
pub(crate) struct Known {
    pub(crate) number: u32,
    /// Counts its writes.
    pub(crate) version: u32,
    /// Revision of the last put; 0 if it does not exist.
    pub(crate) mod_revision: i64,
}

/// What all tasks share.
pub(crate) struct Load {
    channels: Vec<Channel>,
    /// Of writes since the last sample. Unit: microseconds.
    latencies: Mutex<Vec<u32>>,
    /// Newest revision that any answer named, and the newest compaction.
    revision: AtomicI64,
    compacted: AtomicI64,
    begun: Mutex<Instant>,
    marks: Mutex<Vec<Mark>>,
    done: Done,
    /// How long the physical compactions took. Unit: seconds.
    physical: Mutex<Vec<f64>>,
}

/// Answers by kind.
#[derive(Default)]
struct Done {
    writes: AtomicU64,
    old_reads: AtomicU64,
    lists: AtomicU64,
    events: AtomicU64,
    snapshots: AtomicU64,
    snapshot_bytes: AtomicU64,
    hashes: AtomicU64,
    compactions: AtomicU64,
    resumed: AtomicU64,
}

impl Load {
    /// Connections to the server at a port; made when they are first used. Needs a runtime.
    pub(crate) fn new(port: u16) -> Result<Self, String> {
        let url = format!("http://127.0.0.1:{port}");
        let endpoint = Channel::from_shared(url.clone()).map_err(|e| format!("{url}: {e}"))?;
        let endpoint = endpoint.tcp_nodelay(true);
        Ok(Self {
            channels: (0..CHANNELS).map(|_| endpoint.connect_lazy()).collect(),
            latencies: Mutex::default(),
            revision: AtomicI64::new(1),
            compacted: AtomicI64::new(0),
            begun: Mutex::new(Instant::now()),
            marks: Mutex::default(),
            done: Done::default(),
            physical: Mutex::default(),
        })
    }

    fn channel(&self, task: usize) -> Channel {
        self.channels[task % CHANNELS].clone()
    }

    pub(crate) fn kv(&self, task: usize) -> KvClient<Channel> {
        KvClient::new(self.channel(task)).max_decoding_message_size(usize::MAX)
    }

    pub(crate) fn maintenance(&self) -> MaintenanceClient<Channel> {
        MaintenanceClient::new(self.channel(0)).max_decoding_message_size(usize::MAX)
    }

    pub(crate) fn take_latencies(&self) -> Vec<u32> {
        std::mem::take(&mut *held(&self.latencies))
    }

    /// What happened when.
    pub(crate) fn marks(&self) -> Vec<Mark> {
        held(&self.marks).clone()
    }

    /// What was done, in words.
    pub(crate) fn summary(&self) -> Vec<String> {
        let Done { writes, old_reads, lists, events, .. } = &self.done;
        let Done { snapshots, snapshot_bytes, hashes, compactions, resumed, .. } = &self.done;
        let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let physical = held(&self.physical);
        let longest = physical.iter().copied().fold(0.0, f64::max);
        vec![
            format!("{} writes, {} old reads, {} lists", of(writes), of(old_reads), of(lists)),
            format!("{} watch events, {} watches begun anew", of(events), of(resumed)),
            format!(
                "{} snapshots of {} MiB altogether, {} hashes",
                of(snapshots),
                of(snapshot_bytes) >> 20,
                of(hashes)
            ),
            format!(
                "{} compactions, {} of them waited for, the longest {longest:.1} s",
                of(compactions),
                physical.len()
            ),
        ]
    }

    fn mark(&self, kind: &'static str) {
        let second = held(&self.begun).elapsed().as_secs_f64();
        held(&self.marks).push((second, kind));
    }

    fn note_revision(&self, header: Option<&pb::ResponseHeader>) -> i64 {
        let revision = header.map_or(0, |header| header.revision);
        self.revision.fetch_max(revision, Ordering::Relaxed);
        revision
    }

    fn now(&self) -> i64 {
        self.revision.load(Ordering::Relaxed)
    }
}

/// Locks; a panic of another task ends the soak anyway.
fn held<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

fn count(counter: &AtomicU64, by: usize) {
    counter.fetch_add(by as u64, Ordering::Relaxed);
}

/// One answer, in time.
async fn answer<T>(
    what: &str,
    patience: Duration,
    call: impl Future<Output = Result<tonic::Response<T>, tonic::Status>>,
) -> Result<T, String> {
    match timeout(patience, call).await {
        Ok(Ok(response)) => Ok(response.into_inner()),
        Ok(Err(status)) => Err(format!("{what}: {status}")),
        Err(_) => Err(format!("{what}: no answer within {} s", patience.as_secs())),
    }
}

/// The work of one writer.
struct Writer {
    load: Arc<Load>,
    kv: KvClient<Channel>,
    rng: Rng,
    keys: Vec<Known>,
}

impl Writer {
    fn new(load: &Arc<Load>, number: usize, keys: Vec<Known>) -> Self {
        let kv = load.kv(number);
        Self { load: load.clone(), kv, rng: Rng::new(number as u64 + 1), keys }
    }

    /// Writes each key once.
    async fn fill(mut self) -> Result<Vec<Known>, String> {
        for at in 0..self.keys.len() {
            self.put(at).await?;
        }
        Ok(self.keys)
    }

    /// Writes random keys of its own at a steady pace: puts, updates that compare the revision like
    /// those of kube-apiserver, and a few deletions.
    async fn run(mut self, every: Duration, end: Instant) -> Result<Vec<Known>, String> {
        let mut pace = interval(every);
        pace.set_missed_tick_behavior(MissedTickBehavior::Delay);
        while Instant::now() < end {
            pace.tick().await;
            let at = self.rng.below(self.keys.len());
            let exists = self.keys[at].mod_revision > 0;
            let begun = Instant::now();
            match self.rng.below(100) {
                0..3 if exists => self.delete(at).await?,
                3..40 if exists => self.update(at).await?,
                _ => self.put(at).await?,
            }
            let micros = u32::try_from(begun.elapsed().as_micros()).unwrap_or(u32::MAX);
            held(&self.load.latencies).push(micros);
            count(&self.load.done.writes, 1);
        }
        Ok(self.keys)
    }

    /// A put of the next version of a key.
    fn next_put(&self, at: usize) -> pb::PutRequest {
        let Known { number, version, .. } = self.keys[at];
        let value = values::value(number, version + 1).into();
        pb::PutRequest { key: values::key(number).into(), value, ..Default::default() }
    }

    fn noted(&mut self, at: usize, revision: i64) {
        self.keys[at].version += 1;
        self.keys[at].mod_revision = revision;
    }

    async fn put(&mut self, at: usize) -> Result<(), String> {
        let request = self.next_put(at);
        let done = answer("put", PATIENCE, self.kv.put(request)).await?;
        let revision = self.load.note_revision(done.header.as_ref());
        self.noted(at, revision);
        Ok(())
    }

    async fn update(&mut self, at: usize) -> Result<(), String> {
        let put = self.next_put(at);
        let is_same = pb::Compare {
            result: pb::compare::CompareResult::Equal as i32,
            target: pb::compare::CompareTarget::Mod as i32,
            key: put.key.clone(),
            target_union: Some(pb::compare::TargetUnion::ModRevision(self.keys[at].mod_revision)),
            ..Default::default()
        };
        let put = pb::RequestOp { request: Some(pb::request_op::Request::RequestPut(put)) };
        let txn =
            pb::TxnRequest { compare: vec![is_same], success: vec![put], ..Default::default() };
        let done = answer("update", PATIENCE, self.kv.txn(txn)).await?;
        if !done.succeeded {
            return Err(format!("{} has another revision", values::key(self.keys[at].number)));
        }
        let revision = self.load.note_revision(done.header.as_ref());
        self.noted(at, revision);
        Ok(())
    }

    async fn delete(&mut self, at: usize) -> Result<(), String> {
        let key = values::key(self.keys[at].number).into();
        let request = pb::DeleteRangeRequest { key, ..Default::default() };
        let done = answer("delete", PATIENCE, self.kv.delete_range(request)).await?;
        if done.deleted != 1 {
            return Err(format!("{} was not there", values::key(self.keys[at].number)));
        }
        self.load.note_revision(done.header.as_ref());
        self.keys[at].mod_revision = 0;
        Ok(())
    }
}

/// Writes all keys once, and says what each writer knows.
pub(crate) async fn fill(load: &Arc<Load>, keys: usize) -> Result<Vec<Known>, String> {
    let count = u32::try_from(keys).map_err(|_| "too many keys".to_owned())?;
    let fresh = (0..count).map(|number| Known { number, version: 0, mod_revision: 0 });
    let mut tasks = JoinSet::new();
    for (number, keys) in deal(fresh.collect()).into_iter().enumerate() {
        tasks.spawn(Writer::new(load, number, keys).fill());
    }
    gather(tasks).await
}

/// The keys of each writer.
fn deal(keys: Vec<Known>) -> Vec<Vec<Known>> {
    let mut hands = vec![Vec::new(); WRITERS];
    for (at, known) in keys.into_iter().enumerate() {
        hands[at % WRITERS].push(known);
    }
    hands
}

async fn gather(mut tasks: JoinSet<Result<Vec<Known>, String>>) -> Result<Vec<Known>, String> {
    let mut all = Vec::new();
    while let Some(ended) = tasks.join_next().await {
        all.extend(ended.map_err(|error| format!("a task: {error}"))??);
    }
    Ok(all)
}

/// Runs everything for a time. Returns what the writers know, and a sample of each second.
pub(crate) async fn drive(
    load: &Arc<Load>,
    ledger: Vec<Known>,
    kinds: &[Kind],
    (rate, length): (usize, Duration),
    sampler: Sampler,
) -> Result<(Vec<Known>, Vec<Sample>), String> {
    let keys = ledger.len();
    *held(&load.begun) = Instant::now();
    let end = Instant::now() + length;
    let every = Duration::from_secs_f64(WRITERS as f64 / rate as f64);
    let mut writers = JoinSet::new();
    for (number, keys) in deal(ledger).into_iter().enumerate() {
        writers.spawn(Writer::new(load, number, keys).run(every, end));
    }
    let mut others = JoinSet::new();
    for kind in kinds {
        let load = load.clone();
        match *kind {
            Kind::Events => others.spawn(write_events(load, end)),
            Kind::Compactions => others.spawn(compact(load, end)),
            Kind::OldReads => others.spawn(read_old(load, keys, end)),
            Kind::Lists => others.spawn(list(load, keys, end)),
            Kind::Snapshots => others.spawn(stream_snapshots(load, end)),
            Kind::Hashes => others.spawn(hash(load, end)),
            Kind::Watch(number) => others.spawn(watch(load, number, keys, end)),
        };
    }
    let samples = tokio::spawn(sample(sampler, end));
    let others = async {
        while let Some(ended) = others.join_next().await {
            ended.map_err(|error| format!("a task: {error}"))??;
        }
        Ok(())
    };
    let (ledger, ()) = tokio::try_join!(gather(writers), others)?;
    let samples = samples.await.map_err(|error| format!("the sampler: {error}"))??;
    Ok((ledger, samples))
}

async fn sample(mut sampler: Sampler, end: Instant) -> Result<Vec<Sample>, String> {
    let begun = Instant::now();
    let mut samples = Vec::new();
    let mut pace = every(Duration::from_secs(1));
    // The first tick is now: it only sets the marks that the next one counts from.
    pace.tick().await;
    sampler.take(0.0).await?;
    while Instant::now() < end {
        pace.tick().await;
        let sample = sampler.take(begun.elapsed().as_secs_f64()).await?;
        if samples.len() % 30 == 29 {
            println!(
                "{:4.0} s: RSS {:.0} MiB, state {:.0} MiB, log {:.0} MiB, {:.0} writes/s, p99 {:.1} ms",
                sample.seconds,
                sample.rss_mib,
                sample.state_mib,
                sample.wal_mib,
                sample.puts,
                sample.p99_ms
            );
        }
        samples.push(sample);
    }
    Ok(samples)
}

fn every(period: Duration) -> Interval {
    let mut pace = interval(period);
    pace.set_missed_tick_behavior(MissedTickBehavior::Delay);
    pace
}

/// The same, beginning a third of a period from now, so that short soaks do it too.
fn later(period: Duration) -> Interval {
    let mut pace = interval_at(tokio::time::Instant::now() + period / 3, period);
    pace.set_missed_tick_behavior(MissedTickBehavior::Delay);
    pace
}

/// Events of kube's kind: a few a second, all of a second under one lease, which ends them.
async fn write_events(load: Arc<Load>, end: Instant) -> Result<(), String> {
    let (mut kv, mut leases) = (load.kv(1), LeaseClient::new(load.channel(1)));
    let mut pace = every(Duration::from_secs(1));
    for second in 0.. {
        pace.tick().await;
        if Instant::now() >= end {
            break;
        }
        let request = pb::LeaseGrantRequest { ttl: EVENT_TTL, id: 0 };
        let lease = answer("grant", PATIENCE, leases.lease_grant(request)).await?.id;
        for number in 0..EVENTS {
            let key = format!("{}default/{second:06}.{number:02}", values::EVENTS).into();
            let value = values::value(number, second).into();
            let request = pb::PutRequest { key, value, lease, ..Default::default() };
            let done = answer("put of an event", PATIENCE, kv.put(request)).await?;
            load.note_revision(done.header.as_ref());
        }
    }
    Ok(())
}

/// Compacts everything but the last seconds, again and again.
async fn compact(load: Arc<Load>, end: Instant) -> Result<(), String> {
    let mut kv = load.kv(2);
    let mut round = 0;
    while Instant::now() < end {
        sleep(COMPACT_EVERY - HISTORY).await;
        let revision = load.now();
        sleep(HISTORY).await;
        if Instant::now() >= end {
            break;
        }
        round += 1;
        let physical = round % PHYSICAL_EVERY == 0;
        load.compacted.store(revision, Ordering::Relaxed);
        load.mark("compaction");
        let begun = Instant::now();
        let request = pb::CompactionRequest { revision, physical };
        answer("compaction", LONG_PATIENCE, kv.compact(request)).await?;
        count(&load.done.compactions, 1);
        if physical {
            held(&load.physical).push(begun.elapsed().as_secs_f64());
        }
    }
    Ok(())
}

/// Lists a few keys at old revisions; one that was compacted meanwhile may be refused.
async fn read_old(load: Arc<Load>, keys: usize, end: Instant) -> Result<(), String> {
    let (mut kv, mut rng) = (load.kv(3), Rng::new(77));
    let mut pace = every(OLD_READ_EVERY);
    while Instant::now() < end {
        pace.tick().await;
        let (oldest, newest) = (load.compacted.load(Ordering::Relaxed).max(1), load.now());
        let revision = oldest + rng.below((newest - oldest).max(1) as usize) as i64;
        let prefix = values::namespace(rng.below(values::namespaces(keys)) as u32);
        let range_end = values::end_of(&prefix).into();
        let key = prefix.into();
        let request =
            pb::RangeRequest { key, range_end, revision, limit: 50, ..Default::default() };
        match answer("old read", PATIENCE, kv.range(request)).await {
            Ok(found) if found.kvs.iter().any(|kv| kv.mod_revision > revision) => {
                return Err(format!("a read at {revision} shows something newer"));
            }
            Ok(_) => count(&load.done.old_reads, 1),
            Err(error) if error.contains("compacted") => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Lists a namespace every second, and every tenth time everything, page by page at one revision.
async fn list(load: Arc<Load>, keys: usize, end: Instant) -> Result<(), String> {
    let (mut kv, mut rng) = (load.kv(0), Rng::new(78));
    let mut pace = every(LIST_EVERY);
    let mut round = 0;
    while Instant::now() < end {
        pace.tick().await;
        round += 1;
        let prefix = match round % 10 {
            0 => values::PREFIX.to_owned(),
            _ => values::namespace(rng.below(values::namespaces(keys)) as u32),
        };
        let range_end = values::end_of(&prefix);
        let (mut from, mut revision) = (prefix.into_bytes(), 0);
        loop {
            let request = pb::RangeRequest {
                key: from.into(),
                range_end: range_end.clone().into(),
                limit: 500,
                revision,
                ..Default::default()
            };
            let page = match answer("list", PATIENCE, kv.range(request)).await {
                // A compaction overtook the pages, as it may.
                Err(error) if error.contains("compacted") => break,
                page => page?,
            };
            if revision == 0 {
                revision = load.note_revision(page.header.as_ref());
            }
            count(&load.done.lists, 1);
            match page.kvs.last() {
                Some(last) if page.more => from = [last.key.as_ref(), &[0]].concat(),
                _ => break,
            }
        }
    }
    Ok(())
}

async fn stream_snapshots(load: Arc<Load>, end: Instant) -> Result<(), String> {
    let mut pace = later(SNAPSHOT_EVERY);
    while Instant::now() < end {
        pace.tick().await;
        if Instant::now() >= end {
            break;
        }
        load.mark("snapshot");
        let mut client = load.maintenance();
        let call = client.snapshot(pb::SnapshotRequest {});
        let mut stream = answer("snapshot", LONG_PATIENCE, call).await?;
        let mut left = None;
        loop {
            let part = timeout(LONG_PATIENCE, stream.message()).await;
            let part = part.map_err(|_| "a snapshot stands still".to_owned())?;
            let Some(part) = part.map_err(|status| format!("snapshot: {status}"))? else { break };
            count(&load.done.snapshot_bytes, part.blob.len());
            left = Some(part.remaining_bytes);
        }
        if left != Some(0) {
            return Err(format!("a snapshot ended with {left:?} bytes to go"));
        }
        count(&load.done.snapshots, 1);
    }
    Ok(())
}

async fn hash(load: Arc<Load>, end: Instant) -> Result<(), String> {
    let mut pace = later(HASH_EVERY);
    while Instant::now() < end {
        pace.tick().await;
        let mut client = load.maintenance();
        let call = client.hash_kv(pb::HashKvRequest { revision: 0 });
        answer("hash", LONG_PATIENCE, call).await?;
        count(&load.done.hashes, 1);
    }
    Ok(())
}

/// Watches a quarter of the keys. The last watcher pauses again and again, so that it falls behind
/// and must catch up from the disk; the first begins anew from an old revision.
async fn watch(load: Arc<Load>, number: usize, keys: usize, end: Instant) -> Result<(), String> {
    let share = values::namespaces(keys) * number / WATCHERS;
    let upto = values::namespaces(keys) * (number + 1) / WATCHERS;
    let (key, range_end) = (values::namespace(share as u32), values::namespace(upto as u32));
    let (is_slow, is_restless) = (number == WATCHERS - 1, number == 0);
    let mut from = 0;
    while Instant::now() < end {
        let create = pb::WatchCreateRequest {
            key: key.clone().into(),
            range_end: range_end.clone().into(),
            start_revision: from,
            ..Default::default()
        };
        let leave = if is_restless { Instant::now() + Duration::from_secs(15) } else { end };
        let reached = follow(&load, number, create, is_slow, leave.min(end)).await?;
        count(&load.done.resumed, 1);
        // Ten seconds back at the pace of the soak, or where the compaction stands.
        from = if is_restless { reached.saturating_sub(30_000) } else { reached };
        from = from.max(load.compacted.load(Ordering::Relaxed) + 1);
    }
    Ok(())
}

/// Reads one watch to a moment or until the server cancels it. Returns the newest revision seen.
async fn follow(
    load: &Load,
    task: usize,
    create: pb::WatchCreateRequest,
    is_slow: bool,
    until: Instant,
) -> Result<i64, String> {
    let mut seen = create.start_revision;
    let request = pb::WatchRequest { request_union: Some(RequestUnion::CreateRequest(create)) };
    // The request side stays open as long as the watch is read, and no longer: a call whose requests
    // never end is not reset when its responses are dropped, and the server keeps it for a client
    // that is merely slow.
    let (asking, requests) = mpsc::channel(1);
    asking.try_send(request).expect("the channel has room for one");
    let requests = ReceiverStream::new(requests);
    let mut client = WatchClient::new(load.channel(task)).max_decoding_message_size(usize::MAX);
    let mut responses = answer("watch", PATIENCE, client.watch(requests)).await?;
    let mut paused = Instant::now();
    while Instant::now() < until {
        if is_slow && paused.elapsed() > Duration::from_secs(5) {
            sleep(Duration::from_secs(5)).await;
            paused = Instant::now();
        }
        let Ok(message) = timeout(Duration::from_secs(1), responses.message()).await else {
            continue;
        };
        let message = message.map_err(|status| format!("watch: {status}"))?;
        let message = message.ok_or("a watch stream ended")?;
        if message.canceled {
            // Only a watch that begins too far back may be refused.
            return match message.compact_revision {
                0 => Err(format!("a watch was canceled: {}", message.cancel_reason)),
                compacted => Ok(compacted),
            };
        }
        for event in &message.events {
            let revision = event.kv.as_ref().map_or(0, |kv| kv.mod_revision);
            if revision < seen {
                return Err(format!("an event of revision {revision} came after {seen}"));
            }
            seen = revision;
        }
        count(&load.done.events, message.events.len());
    }
    Ok(seen)
}
