//! Watchers that come and go beside those that make the log: up to three watches on one stream, each
//! with options of its own, from some way back or ahead, on any member, asked for progress now and
//! then, left after some seconds and often resumed elsewhere. They record and judge nothing.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use kelson_api::etcdserverpb as pb;
use pb::watch_request::RequestUnion;
use tokio::time::{Instant, timeout_at};

use super::{Load, Workload, compact, watch};
use crate::call::Range;
use crate::client::revision;
use crate::history::{Event, Spec, WatchWhat};
use crate::rng::Rng;
use crate::watcher::{Asks, Watchers, create, open};
use crate::wire::event;

/// One watch: its number in the record, what it asked for, and what it has not seen yet.
struct Watch {
    stream: u64,
    spec: Spec,
    next: i64,
    created: bool,
    over: bool,
}

/// Opens one stream after the other until the load ends.
pub(super) async fn wander(
    load: Arc<Load>,
    watchers: Arc<Watchers>,
    workload: Workload,
    number: u64,
) {
    let mut rng = Rng::fork(load.seed, 1000 + number);
    let mut left: Vec<(Spec, i64)> = Vec::new();
    while !load.stopped() {
        let member = *rng.pick(&load.members.read());
        let (newest, compacted) = {
            let board = load.board.lock();
            (board.revision, board.compacted)
        };
        let asked = if left.is_empty() || rng.chance(0.5) {
            let count = 1 + rng.below(3);
            let one = |_| match workload {
                Workload::Compact => draw_near(&mut rng, compacted),
                _ => draw(&mut rng, newest),
            };
            (0..count).map(one).collect()
        } else {
            std::mem::take(&mut left)
        };
        let mut watches = BTreeMap::new();
        for (id, (spec, next)) in (1..).zip(asked) {
            let stream = watchers.stream();
            watches.insert(id, Watch { stream, spec, next, created: false, over: false });
        }
        let until = Instant::now() + Duration::from_millis(500 + rng.below(5500));
        let mut session = Session { watchers: &watchers, member, watches };
        if let Err(error) = session.run(&mut rng, until).await {
            session.end(&error);
        }
        left = session.rest();
        tokio::time::sleep(Duration::from_millis(rng.below(300))).await;
    }
}

/// All keys of the compaction load, from a revision around that of the last compaction.
fn draw_near(rng: &mut Rng, compacted: i64) -> (Spec, i64) {
    let all = Range::prefix(compact::PREFIX);
    let spec = Spec { key: all.key, end: all.end, prev_kv: rng.chance(0.6), ..Spec::default() };
    (spec, (compacted + 2 - rng.below(5) as i64).max(1))
}

/// What to watch, and from where on.
fn draw(rng: &mut Rng, newest: i64) -> (Spec, i64) {
    let range = if rng.chance(0.4) { Range::one(&watch::key(rng)) } else { watch::group(rng) };
    let filter = rng.below(6);
    let spec = Spec {
        key: range.key,
        end: range.end,
        no_put: filter == 0,
        no_delete: filter == 1,
        prev_kv: rng.chance(0.6),
        progress: rng.chance(0.5),
        fragment: rng.chance(0.5),
    };
    (spec, (newest + 100 - rng.below(201) as i64).max(1))
}

struct Session<'a> {
    watchers: &'a Watchers,
    member: usize,
    watches: BTreeMap<i64, Watch>,
}

impl Session<'_> {
    async fn run(&mut self, rng: &mut Rng, until: Instant) -> Result<(), String> {
        let mut requests = self.watches.iter().map(|(id, one)| create(&one.spec, one.next, *id));
        let first = requests.next().ok_or("no watch")?;
        let (mut asks, mut answers) = open(self.member, first).await?;
        for request in requests {
            asks.try_send(request).map_err(|error| error.to_string())?;
        }
        while Instant::now() < until && self.watches.values().any(|watch| !watch.over) {
            let tick = until.min(Instant::now() + Duration::from_millis(100));
            match timeout_at(tick, answers.message()).await {
                Err(_) => ask_progress(&mut asks, rng),
                Ok(Ok(Some(response))) => self.take(&response),
                Ok(Ok(None)) => return Err("closed by the member".into()),
                Ok(Err(status)) => return Err(format!("{status:?}")),
            }
            if rng.chance(0.02) {
                ask_progress(&mut asks, rng);
            }
        }
        Ok(())
    }

    fn take(&mut self, response: &pb::WatchResponse) {
        let (header, member) = (revision(response.header), self.member);
        let record = |stream, what| self.watchers.record(stream, member, what);
        if response.watch_id == -1 && !response.created {
            // Progress of all watches of the stream.
            for watch in self.watches.values_mut().filter(|watch| watch.created && !watch.over) {
                record(watch.stream, WatchWhat::Progress { revision: header });
            }
            return;
        }
        let Some(watch) = self.watches.get_mut(&response.watch_id) else { return };
        if response.created {
            watch.created = true;
            let started = WatchWhat::Started { from: watch.next, spec: watch.spec.clone() };
            record(watch.stream, started);
        }
        if response.canceled {
            watch.over = true;
            record(
                watch.stream,
                match response.compact_revision {
                    0 => WatchWhat::Ended { error: response.cancel_reason.clone() },
                    revision => WatchWhat::Compacted { revision },
                },
            );
        } else if !response.events.is_empty() {
            let events: Vec<Event> = response.events.iter().map(event).collect();
            // A revision cut into fragments is seen when its last one is.
            let last = events.last().map_or(0, |event| event.revision + 1);
            watch.next = watch.next.max(if response.fragment { last - 1 } else { last });
            let more = response.fragment;
            record(watch.stream, WatchWhat::Events { revision: header, events, more });
        } else if !response.created {
            record(watch.stream, WatchWhat::Progress { revision: header });
        }
    }

    fn end(&self, error: &str) {
        for watch in self.watches.values().filter(|watch| watch.created && !watch.over) {
            let what = WatchWhat::Ended { error: error.to_owned() };
            self.watchers.record(watch.stream, self.member, what);
        }
    }

    /// What another session can go on with.
    fn rest(self) -> Vec<(Spec, i64)> {
        let rest = self.watches.into_values().filter(|watch| !watch.over);
        rest.map(|watch| (watch.spec, watch.next)).collect()
    }
}

/// Asks for progress in one of three cases.
fn ask_progress(asks: &mut Asks, rng: &mut Rng) {
    if rng.chance(0.3) {
        let request = RequestUnion::ProgressRequest(pb::WatchProgressRequest {});
        // A full queue means that the member reads slowly; it is asked again later.
        asks.try_send(pb::WatchRequest { request_union: Some(request) }).ok();
    }
}
