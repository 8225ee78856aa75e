//! Histories that cannot be wrong: clients of a workload take turns on one store in virtual time, and
//! the model tells what every client and watcher would have recorded. The checks share no code with
//! it.

use std::collections::BTreeMap;

use super::store::Store;
use crate::call::Range;
use crate::history::{
    Detail, Event, Final, History, Note, Op, Outcome, Row, Spec, WatchRecord, WatchWhat,
};
use crate::rng::Rng;
use crate::workload::{Board, COMPACTED, REGISTRY, Script, Turn, WATCHED, Workload};

const KEYS: u64 = 8;
const CLIENTS: usize = 10;
const MEMBERS: usize = 3;
/// Streams beside those that make the log.
const SIDE: usize = 12;

/// Virtual nanoseconds between two moments at which something takes effect.
fn step(workload: Workload) -> u64 {
    match workload {
        // Long enough that leases end.
        Workload::Lease | Workload::Lock => 40_000_000,
        _ => 1_000,
    }
}

struct Client {
    script: Box<dyn Script>,
    process: u64,
    /// End of its last operation.
    free: u64,
}

struct Model {
    rng: Rng,
    step: u64,
    now: u64,
    store: Store,
    board: Board,
    clients: Vec<Client>,
    processes: u64,
    streams: u64,
    watches: Vec<WatchRecord>,
    notes: Vec<Note>,
}

/// A history that breaks no promise.
pub(super) fn history(workload: Workload, seed: u64, ops: usize) -> History {
    let client =
        |index| Client { script: workload.script(KEYS, index), process: index as u64 + 1, free: 0 };
    let step = step(workload);
    let mut model = Model {
        rng: Rng::fork(seed, 3),
        step,
        // Late enough that a whole lease fits before.
        now: 100_000_000_000,
        store: Store::new(),
        board: Board::default(),
        clients: (0..CLIENTS).map(client).collect(),
        processes: CLIENTS as u64,
        streams: 0,
        watches: Vec::new(),
        notes: Vec::new(),
    };
    let ops = (0..ops as u64).map(|number| model.op(number)).collect();
    for member in 1..=MEMBERS {
        model.base(member);
    }
    match workload {
        Workload::Watch => (0..SIDE).for_each(|_| model.side()),
        Workload::Compact => (1..=MEMBERS).for_each(|member| model.too_late(member)),
        Workload::Kube => (1..=MEMBERS).for_each(|member| model.cache(member)),
        _ => {}
    }
    let finals = (1..=MEMBERS).map(|member| model.last(member)).collect();
    let Model { watches, notes, .. } = model;
    History { ops, watches, finals, notes, ..History::default() }
}

impl Model {
    fn op(&mut self, number: u64) -> Op {
        self.now += self.step;
        let lag = self.rng.below(8 * self.step);
        self.store.pass(self.now, lag);
        // Operations reach six steps to both sides at most, so some client is always free.
        let free: Vec<usize> =
            (0..CLIENTS).filter(|index| self.clients[*index].free + 1 < self.now).collect();
        let index = *self.rng.pick(&free);
        self.board.watched = self.store.revision;
        let client = &mut self.clients[index];
        let value = format!("{}.{number}", client.process);
        let (rng, board) = (&mut self.rng, &mut self.board);
        let call = client.script.draw(&mut Turn { rng, board, value });
        let reach = 6 * self.step;
        let mut op = Op {
            process: client.process,
            member: 1 + index % MEMBERS,
            call,
            start: (self.now - self.rng.below(reach)).max(client.free + 1),
            end: self.now + 1 + self.rng.below(reach),
            outcome: Outcome::Ok,
            error: None,
            revision: 0,
            succeeded: false,
            rows: Vec::new(),
            detail: Detail::default(),
        };
        self.outcome(&mut op);
        let client = &mut self.clients[index];
        client.free = op.end;
        if op.outcome == Outcome::Unknown {
            self.processes += 1;
            client.process = self.processes;
        }
        client.script.learn(&op, &mut self.board);
        self.notes.append(&mut self.board.notes);
        op
    }

    fn outcome(&mut self, op: &mut Op) {
        let lag = self.rng.below(3) as i64;
        match self.rng.below(100) {
            0..4 => refused(op, Outcome::Fail),
            4..8 if op.call.has_effect() => refused(op, Outcome::Unknown),
            8..12 if op.call.has_effect() => {
                // It took effect, but the answer was lost.
                self.store.apply(op, lag);
                refused(op, Outcome::Unknown);
            }
            _ => self.store.apply(op, lag),
        }
    }

    /// Two streams of one member: the second begins where the first was broken.
    fn base(&mut self, member: usize) {
        let made = self.store.made.len();
        let middle = made / 2 + self.rng.below(20.min(made as u64 / 2).max(1)) as usize;
        for (from, to) in [(0, middle), (middle, made)] {
            self.stream(member, Spec::default(), from as i64 + 2, to as i64 + 1);
        }
    }

    /// One stream with everything that its options ask for, from one revision to another.
    fn stream(&mut self, member: usize, spec: Spec, from: i64, to: i64) {
        self.streams += 1;
        let stream = self.streams;
        let began = self.time(from);
        let mut records = vec![(began, WatchWhat::Started { from, spec: spec.clone() })];
        let (mut next, mut at) = (from, began);
        while next <= to {
            let until = (next + self.rng.below(4) as i64).min(to);
            at = self.time(until).max(at) + self.rng.below(10 * self.step);
            let sent = &self.store.made[next as usize - 2..until as usize - 1];
            let wanted = |event: &&Event| spec.wants(event);
            let mut events: Vec<Event> =
                sent.iter().flat_map(|(_, events)| events).filter(wanted).cloned().collect();
            if !spec.prev_kv {
                events.iter_mut().for_each(|event| event.before = None);
            }
            if !events.is_empty() {
                let cut = if spec.fragment { events.len() / 2 } else { 0 };
                let rest = events.split_off(cut);
                if cut > 0 {
                    records.push((at, WatchWhat::Events { revision: until, events, more: true }));
                }
                let last = WatchWhat::Events { revision: until, events: rest, more: false };
                records.push((at, last));
            }
            if self.rng.chance(0.1) {
                records.push((at, WatchWhat::Progress { revision: until }));
            }
            next = until + 1;
        }
        records.push((at, WatchWhat::Ended { error: "broken".into() }));
        let record = |(at, what)| WatchRecord { stream, member, at, what };
        self.watches.extend(records.into_iter().map(record));
    }

    fn time(&self, revision: i64) -> u64 {
        let made = self.store.made.get((revision - 2).max(0) as usize);
        made.map_or(self.now, |(at, _)| *at)
    }

    /// A stream of a watcher that came and went.
    fn side(&mut self) {
        let last = self.store.revision;
        let from = 2 + self.rng.below(last as u64 - 1) as i64;
        let to = from - 1 + self.rng.below((last - from) as u64 + 2) as i64;
        let (group, filter) = (self.rng.below(4), self.rng.below(5));
        let range = match group {
            0 => Range::one(&format!("{WATCHED}0/1")),
            1 => Range::prefix(&format!("{WATCHED}1/")),
            _ => Range::prefix(WATCHED),
        };
        let spec = Spec {
            key: range.key,
            end: range.end,
            no_put: filter == 0,
            no_delete: filter == 1,
            prev_kv: self.rng.chance(0.7),
            progress: true,
            fragment: self.rng.chance(0.5),
        };
        let member = 1 + self.rng.below(MEMBERS as u64) as usize;
        self.stream(member, spec, from, to);
    }

    /// A stream that asks for what was compacted away.
    fn too_late(&mut self, member: usize) {
        let revision = self.store.compacted;
        if revision < 2 {
            return;
        }
        self.streams += 1;
        let all = Range::prefix(COMPACTED);
        let spec = Spec { key: all.key, end: all.end, ..Spec::default() };
        let from = 1 + self.rng.below(revision as u64 - 1) as i64;
        // Long after every operation.
        let (stream, at) = (self.streams, self.now + 100 * self.step);
        for what in [WatchWhat::Started { from, spec }, WatchWhat::Compacted { revision }] {
            self.watches.push(WatchRecord { stream, member, at, what });
        }
    }

    /// A cache of a member, and the stream that keeps it.
    fn cache(&mut self, member: usize) {
        let all = Range::prefix(REGISTRY);
        let spec = Spec { key: all.key, end: all.end, ..Spec::default() };
        let from = 2 + self.rng.below(20) as i64;
        self.stream(member, spec, from, self.store.revision);
        let mut revision = from;
        while revision <= self.store.revision {
            let rows: BTreeMap<String, Row> = self.store.past[revision as usize - 1].clone();
            let rows = rows.into_values().filter(|row| row.key.starts_with(REGISTRY)).collect();
            let at = self.time(revision) + self.rng.below(10 * self.step);
            self.notes.push(Note::Cache { member, at, revision, rows });
            revision += 1 + self.rng.below(20) as i64;
        }
    }

    fn last(&self, member: usize) -> Final {
        Final {
            member,
            revision: self.store.revision,
            hash: 0x1234_5678,
            compacted: self.store.compacted,
            rows: self.store.rows.values().cloned().collect(),
            watched: self.store.revision,
        }
    }
}

fn refused(op: &mut Op, outcome: Outcome) {
    // What an unknown call did, it did; only the answer is gone.
    op.outcome = outcome;
    op.error = Some("planned".into());
    (op.revision, op.succeeded) = (0, false);
    op.rows.clear();
    op.detail = Detail::default();
}
