//! Random watchers on random streams with tiny queues, under random writes, compactions, pauses and
//! restarts of the feed: each watcher sees exactly what a plain list says, in order, once. A failure
//! names the seed; `WATCH_SEED=<seed> cargo test -p kelson-server --test watch_random` repeats it.

mod watch_support;

use std::collections::HashMap;

use kelson_api::etcdserverpb::{WatchCreateRequest, WatchResponse};
use kelson_api::mvccpb::Event;
use kelson_server::watch::{Source, Tuning};
use tokio::task::yield_now;

use watch_support::{Change, Client, Draw, Model, World, create, header_revision, is_progress};

/// Runs by seed; each takes a few milliseconds.
const SEEDS: u64 = 250;

const KEYS: [&str; 6] = ["a", "a/1", "a/2", "b", "b/1", "c"];

#[test]
fn every_watcher_sees_what_a_list_says() {
    let seeds = match std::env::var("WATCH_SEED") {
        Ok(seed) => {
            let seed = seed.parse().expect("WATCH_SEED is a number");
            seed..seed + 1
        }
        Err(_) => 0..SEEDS,
    };
    let mut totals = Totals::default();
    for seed in seeds.clone() {
        let mut builder = tokio::runtime::Builder::new_current_thread();
        let runtime = builder.enable_all().build().expect("a runtime");
        let run = std::panic::AssertUnwindSafe(|| runtime.block_on(run(seed)));
        match std::panic::catch_unwind(run) {
            Ok(found) => totals.add(&found),
            Err(panic) => {
                eprintln!("failed with WATCH_SEED={seed}");
                std::panic::resume_unwind(panic);
            }
        }
    }
    if seeds.end - seeds.start > 1 {
        // The runs would prove nothing if these ways were never taken.
        assert!(totals.events > 10_000, "{totals:?}");
        assert!(totals.overflows > 100, "{totals:?}");
        assert!(totals.compacted > 10, "{totals:?}");
        assert!(totals.progress > 100, "{totals:?}");
        assert!(totals.fragments > 10, "{totals:?}");
    }
}

#[derive(Debug, Default)]
struct Totals {
    events: usize,
    overflows: u64,
    compacted: usize,
    progress: usize,
    fragments: usize,
}

impl Totals {
    fn add(&mut self, other: &Totals) {
        self.events += other.events;
        self.overflows += other.overflows;
        self.compacted += other.compacted;
        self.progress += other.progress;
        self.fragments += other.fragments;
    }
}

/// A watcher and what it has got so far.
struct Seen {
    request: WatchCreateRequest,
    /// First revision it should see; known once it is created.
    from: i64,
    events: Vec<Event>,
    /// It got a first piece of a response and waits for the rest of it.
    is_within_fragments: bool,
    /// It was canceled, by us or for compaction: what it has must be a beginning of the truth.
    has_ended: bool,
    cancel_asked: bool,
}

/// A stream and what should be on it.
struct Watching {
    client: Client,
    /// Create requests that are not answered.
    asked: Vec<WatchCreateRequest>,
    seen: HashMap<i64, Seen>,
    totals: Totals,
}

async fn run(seed: u64) -> Totals {
    let mut draw = Draw::new(seed + 1);
    let tuning = Tuning {
        queue_len: 1 + draw.below(5),
        queue_bytes: [10, 1000, 1 << 20][draw.below(3)],
        join_gap: [0, 1, 3, 20][draw.below(4)],
        slice_revisions: 1 + draw.below(8),
        slice_bytes: [1, 100, 1 << 20][draw.below(3)],
        slice_hits: [1, 10, 1000][draw.below(3)],
        slices_at_once: 1 + draw.below(2),
    };
    let ring_len = [1, 5, 50][draw.below(3)];
    let mut world = World::new(ring_len, tuning);
    world.options.fragment_bytes = 60 + draw.below(200);
    for _ in 0..draw.below(60) {
        write(&world.model, &mut draw);
    }
    let mut streams: Vec<Watching> = Vec::new();
    for _ in 0..1 + draw.below(5) {
        let totals = Totals::default();
        let client = world.client();
        streams.push(Watching { client, asked: Vec::new(), seen: HashMap::new(), totals });
    }
    for _ in 0..300 {
        act(&world.model, &mut streams, &mut draw).await;
    }
    let mut totals =
        Totals { overflows: world.hub.stats().streams_overflowed(), ..Totals::default() };
    for stream in &mut streams {
        finish(&world.model, stream).await;
        totals.add(&stream.totals);
    }
    assert_eq!(world.hub.stats().pending_events(), 0);
    totals
}

async fn act(model: &Model, streams: &mut [Watching], draw: &mut Draw) {
    let index = draw.below(streams.len());
    let stream = &mut streams[index];
    match draw.below(20) {
        0..=6 => write(model, draw),
        7 => stream.create(model, draw),
        8 if draw.one_in(3) => stream.cancel(draw),
        9 | 17 => stream.client.ask_progress(),
        10 if draw.one_in(12) => {
            let back = draw.below(20) as i64;
            model.compact((model.revision() - back).max(1));
        }
        11 if draw.one_in(6) => model.restart_feed(),
        12..=16 => {
            for _ in 0..draw.below(6) {
                if let Some(response) = stream.client.poll() {
                    stream.take(model, response);
                }
            }
        }
        _ => yield_now().await,
    }
}

fn write(model: &Model, draw: &mut Draw) {
    let mut changes: Vec<Change<'_>> = Vec::new();
    for _ in 0..1 + draw.below(3) {
        let key = KEYS[draw.below(KEYS.len())];
        if changes.iter().all(|(taken, _)| *taken != key) {
            let value = ["", "short", "a value that is a little longer"][draw.below(3)];
            changes.push((key, (!draw.one_in(4)).then_some(value)));
        }
    }
    model.apply(&changes);
}

impl Watching {
    fn create(&mut self, model: &Model, draw: &mut Draw) {
        let (key, end) = [
            ("a", ""),
            ("a", "b"),
            ("a/", "a0"),
            ("a", "\0"),
            ("b", "c"),
            ("b", "\0"),
            ("c", ""),
            ("a/1", "b/1"),
        ][draw.below(8)];
        let start_revision = match draw.below(8) {
            0..4 => 0,
            4..7 => (model.revision() + 1 - draw.below(25) as i64).max(0),
            _ => 1 + draw.below(model.revision() as usize + 5) as i64,
        };
        let request = WatchCreateRequest {
            start_revision,
            prev_kv: draw.one_in(2),
            fragment: draw.one_in(2),
            filters: if draw.one_in(4) { vec![draw.below(2) as i32] } else { Vec::new() },
            ..create(key, end)
        };
        self.client.create(request.clone());
        self.asked.push(request);
    }

    fn cancel(&mut self, draw: &mut Draw) {
        let live = self.seen.iter().filter(|(_, seen)| !seen.has_ended && !seen.cancel_asked);
        let mut ids: Vec<i64> = live.map(|(id, _)| *id).collect();
        ids.sort_unstable();
        if ids.is_empty() {
            return;
        }
        let id = ids[draw.below(ids.len())];
        self.client.cancel(id);
        self.seen.get_mut(&id).expect("it was picked from there").cancel_asked = true;
    }

    /// Checks one response against all rules and takes its events.
    fn take(&mut self, model: &Model, response: WatchResponse) {
        let revision = header_revision(&response);
        assert!(revision <= model.revision());
        if response.created {
            let request = self.asked.remove(0);
            let start = request.start_revision;
            let from = if start == 0 { revision + 1 } else { start };
            let seen = Seen {
                request,
                from,
                events: Vec::new(),
                is_within_fragments: false,
                has_ended: false,
                cancel_asked: false,
            };
            assert!(self.seen.insert(response.watch_id, seen).is_none(), "an id given twice");
        } else if is_progress(&response) {
            self.totals.progress += 1;
            assert_eq!(response.watch_id, -1);
            for seen in self.seen.values().filter(|seen| !seen.has_ended) {
                let expected = model.expected(&seen.request, seen.from);
                let due = expected.iter().filter(|event| mod_revision(event) <= revision).count();
                assert!(seen.events.len() >= due, "progress {revision} came before an event");
            }
        } else {
            let seen = self.seen.get_mut(&response.watch_id).expect("events of a known watcher");
            assert!(!seen.has_ended, "something came after the end");
            if response.canceled {
                seen.has_ended = true;
                self.totals.compacted += usize::from(response.compact_revision > 0);
                seen.check_cancel(model, &response);
            } else {
                self.totals.events += response.events.len();
                self.totals.fragments += usize::from(response.fragment);
                seen.take_events(model, response);
            }
        }
    }
}

impl Seen {
    fn check_cancel(&self, model: &Model, response: &WatchResponse) {
        let expected = model.expected(&self.request, self.from);
        if response.compact_revision > 0 {
            assert_eq!(header_revision(response), 0);
            assert!(response.compact_revision <= model.compacted());
            // Compaction ends a watcher only if there may be events that it can not get any more.
            let last = self.events.last().map_or(self.from - 1, mod_revision);
            assert!(last + 1 < response.compact_revision);
        } else {
            assert!(self.cancel_asked);
        }
        assert!(self.events.len() <= expected.len());
    }

    fn take_events(&mut self, model: &Model, response: WatchResponse) {
        assert!(!response.events.is_empty());
        let first = mod_revision(&response.events[0]);
        if let Some(last) = self.events.last()
            && !self.is_within_fragments
        {
            assert!(first > mod_revision(last), "a revision is split or repeated");
        }
        self.is_within_fragments = response.fragment;
        assert!(!response.fragment || self.request.fragment);
        let expected = model.expected(&self.request, self.from);
        for event in response.events {
            assert!(mod_revision(&event) <= response.header.as_ref().expect("a header").revision);
            let truth = expected.get(self.events.len()).expect("no more events than happened");
            let mut told = event.clone();
            if told.prev_kv.is_none() && truth.prev_kv.is_some() {
                // Only compaction may take the state before an event away.
                assert!(mod_revision(truth) <= model.compacted());
                told.prev_kv = truth.prev_kv.clone();
            }
            assert_eq!(told, *truth);
            self.events.push(event);
        }
    }
}

fn mod_revision(event: &Event) -> i64 {
    event.kv.as_ref().expect("an event has a key-value").mod_revision
}

/// Reads on until everything must be there, and compares it with the whole truth.
async fn finish(model: &Model, stream: &mut Watching) {
    // Watchers that start in the future never count as synced.
    let started = tokio::time::Instant::now();
    let mut idle = 0;
    while idle < 3 || !stream.asked.is_empty() || !stream.is_complete(model) {
        assert!(
            started.elapsed() < watch_support::DEADLINE,
            "something never came: {}",
            stream.missing(model)
        );
        idle += 1;
        while let Some(response) = stream.client.poll() {
            idle = 0;
            stream.take(model, response);
        }
        yield_now().await;
    }
    for (id, seen) in &stream.seen {
        let expected = model.expected(&seen.request, seen.from);
        assert!(!seen.is_within_fragments || seen.has_ended);
        if !seen.has_ended {
            assert_eq!(seen.events.len(), expected.len(), "watcher {id}");
        }
    }
}

impl Watching {
    /// What the stream still lacks, for the message of a failure.
    fn missing(&self, model: &Model) -> String {
        let lacks = self.seen.iter().filter(|(_, seen)| !seen.has_ended).map(|(id, seen)| {
            let expected = model.expected(&seen.request, seen.from);
            let (has, all, asked) = (seen.events.len(), expected.len(), seen.cancel_asked);
            format!("watcher {id} from {} has {has} of {all}, cancel asked: {asked}", seen.from)
        });
        let lacks: Vec<String> = lacks.collect();
        format!("{} creates, {}", self.asked.len(), lacks.join("; "))
    }

    fn is_complete(&self, model: &Model) -> bool {
        self.seen.values().all(|seen| {
            seen.has_ended
                || !seen.cancel_asked
                    && seen.events.len() >= model.expected(&seen.request, seen.from).len()
        })
    }
}
