//! A store that cannot be wrong: it takes operations one by one in virtual time and tells what every
//! client and watcher would have recorded. The checks share no code with it.

use std::collections::BTreeMap;

use crate::client::PREFIX;
use crate::history::{Call, Event, Final, History, Op, Outcome, Row, WatchRecord, WatchWhat};
use crate::rng::Rng;

const KEYS: u64 = 8;
const MEMBERS: usize = 3;
/// Virtual nanoseconds between two moments at which something takes effect.
const STEP: u64 = 1_000;
/// How far calls reach to both sides of that moment at most.
const REACH: u64 = 6 * STEP;

type Contents = BTreeMap<String, Row>;

struct Model {
    rng: Rng,
    now: u64,
    revision: i64,
    store: Contents,
    /// The store at each revision, from 1.
    past: Vec<Contents>,
    /// Events and time of each revision, from 2.
    made: Vec<(u64, Vec<Event>)>,
}

/// A history that breaks no promise.
pub(super) fn history(seed: u64, ops: usize) -> History {
    let mut model = Model {
        rng: Rng::fork(seed, 3),
        now: REACH,
        revision: 1,
        store: Contents::new(),
        past: vec![Contents::new()],
        made: Vec::new(),
    };
    let ops = (0..ops as u64).map(|number| model.op(number)).collect();
    let watches = (1..=MEMBERS).flat_map(|member| model.watch(member)).collect();
    let finals = (1..=MEMBERS).map(|member| model.last(member)).collect();
    History { ops, watches, finals, sparse: false }
}

impl Model {
    fn op(&mut self, number: u64) -> Op {
        self.now += STEP;
        let call = self.draw(number);
        let mut op = Op {
            process: number,
            member: 1 + self.rng.below(MEMBERS as u64) as usize,
            call,
            start: self.now - self.rng.below(REACH),
            end: self.now + 1 + self.rng.below(REACH),
            outcome: Outcome::Ok,
            error: None,
            revision: 0,
            succeeded: false,
            rows: Vec::new(),
        };
        if op.call.is_write() {
            match self.rng.below(100) {
                0..4 => return refused(op, Outcome::Fail),
                4..8 => return refused(op, Outcome::Unknown),
                8..12 => {
                    // It took effect, but the answer was lost.
                    self.apply(&mut op);
                    return refused(op, Outcome::Unknown);
                }
                _ => {}
            }
        }
        self.apply(&mut op);
        op
    }

    fn draw(&mut self, number: u64) -> Call {
        let index = self.rng.below(KEYS);
        let key = format!("{PREFIX}{index}");
        let value = format!("v{number}");
        match self.rng.below(8) {
            0 | 1 => Call::Put { key, value },
            2 => {
                let other = format!("{PREFIX}{}", (index + 1) % KEYS);
                Call::PutTwo { first: (key, value.clone()), second: (other, value + "b") }
            }
            3 => {
                let now = self.store.get(&key).map_or(0, |row| row.modified);
                let expect = if self.rng.chance(0.6) { now } else { now + 1 };
                Call::Cas { key, expect, value }
            }
            4 => Call::Delete { key },
            5 | 6 => Call::Get { key, serializable: self.rng.chance(0.3) },
            _ => Call::List { serializable: self.rng.chance(0.3) },
        }
    }

    fn apply(&mut self, op: &mut Op) {
        op.succeeded = true;
        match op.call.clone() {
            Call::Put { key, value } => self.commit(&[(key, Some(value))]),
            Call::PutTwo { first, second } => {
                self.commit(&[(first.0, Some(first.1)), (second.0, Some(second.1))]);
            }
            Call::Cas { key, expect, value } => {
                let now = self.store.get(&key);
                op.succeeded = now.map_or(0, |row| row.modified) == expect;
                if op.succeeded {
                    self.commit(&[(key, Some(value))]);
                } else {
                    op.rows = now.into_iter().cloned().collect();
                }
            }
            Call::Delete { key } => {
                op.succeeded = self.store.contains_key(&key);
                if op.succeeded {
                    self.commit(&[(key, None)]);
                }
            }
            Call::Get { .. } | Call::List { .. } => return self.read(op),
        }
        op.revision = self.revision;
    }

    fn read(&mut self, op: &mut Op) {
        // A member that lags may answer a serializable read with an older state.
        let lag = if op.call.is_serializable() { self.rng.below(3) as i64 } else { 0 };
        op.revision = (self.revision - lag).max(1);
        let state = &self.past[op.revision as usize - 1];
        op.rows = match &op.call {
            Call::Get { key, .. } => state.get(key).into_iter().cloned().collect(),
            _ => state.values().cloned().collect(),
        };
    }

    fn commit(&mut self, changes: &[(String, Option<String>)]) {
        self.revision += 1;
        let mut events = Vec::new();
        for (key, value) in changes {
            let before = self.store.remove(key);
            let put = value.as_ref().map(|value| Row {
                key: key.clone(),
                value: value.clone(),
                create: before.as_ref().map_or(self.revision, |row| row.create),
                modified: self.revision,
                version: before.as_ref().map_or(0, |row| row.version) + 1,
            });
            if let Some(row) = &put {
                self.store.insert(key.clone(), row.clone());
            }
            events.push(Event { revision: self.revision, key: key.clone(), put, before });
        }
        self.past.push(self.store.clone());
        self.made.push((self.now, events));
    }

    /// Two streams of one member: the second begins where the first was broken.
    fn watch(&mut self, member: usize) -> Vec<WatchRecord> {
        let middle = self.made.len() / 2 + self.rng.below(20) as usize;
        let halves = [(0, middle), (middle, self.made.len())];
        let mut records = Vec::new();
        for (half, (from, to)) in halves.into_iter().enumerate() {
            let stream = (member * 2 + half) as u64;
            let mut add = |at, what| records.push(WatchRecord { stream, member, at, what });
            add(self.made[from].0, WatchWhat::Started { from: from as i64 + 2 });
            let mut next = from;
            while next < to {
                let until = (next + 1 + self.rng.below(4) as usize).min(to);
                let sent = &self.made[next..until];
                let at = sent[sent.len() - 1].0 + self.rng.below(10 * STEP);
                let events: Vec<Event> =
                    sent.iter().flat_map(|(_, events)| events.clone()).collect();
                let revision = until as i64 + 1;
                add(at, WatchWhat::Events { revision, events });
                if self.rng.chance(0.1) {
                    add(at, WatchWhat::Progress { revision });
                }
                next = until;
            }
            add(self.made[to - 1].0, WatchWhat::Ended { error: "broken".into() });
        }
        records
    }

    fn last(&self, member: usize) -> Final {
        Final {
            member,
            revision: self.revision,
            hash: 0x1234_5678,
            compacted: -1,
            rows: self.store.values().cloned().collect(),
            watched: self.revision,
        }
    }
}

fn refused(mut op: Op, outcome: Outcome) -> Op {
    op.outcome = outcome;
    op.error = Some("planned".into());
    op.revision = 0;
    op.succeeded = false;
    op.rows = Vec::new();
    op
}
