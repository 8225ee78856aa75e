//! The store of made-up histories: takes calls one by one and answers as a member must. The checks
//! share no code with it, so that one mistake does not excuse the other.

use std::collections::BTreeMap;

use crate::call::{Compare, Field, Is, MemberRow, Operand, Part, Range, Txn, TxnOp};
use crate::history::{Call, Event, Op, Outcome, Row};

type Contents = BTreeMap<String, Row>;

struct Lease {
    ttl: i64,
    /// Virtual nanoseconds; it ends at some moment after.
    deadline: u64,
}

pub(super) struct Store {
    pub(super) revision: i64,
    pub(super) rows: Contents,
    /// The contents at each revision, from 1.
    pub(super) past: Vec<Contents>,
    /// Events and time of each revision, from 2.
    pub(super) made: Vec<(u64, Vec<Event>)>,
    pub(super) compacted: i64,
    leases: BTreeMap<i64, Lease>,
    members: Vec<MemberRow>,
    /// Numbers for leases and members.
    numbers: u64,
    now: u64,
}

impl Store {
    pub(super) fn new() -> Self {
        let member = |id: u64| MemberRow { id, url: format!("http://m{id}"), learner: false };
        Self {
            revision: 1,
            rows: Contents::new(),
            past: vec![Contents::new()],
            made: Vec::new(),
            compacted: 0,
            leases: BTreeMap::new(),
            members: (1..=3).map(member).collect(),
            numbers: 100,
            now: 0,
        }
    }

    /// Lets time pass; leases whose time is over by `lag` end.
    pub(super) fn pass(&mut self, now: u64, lag: u64) {
        self.now = now;
        let over = |lease: &Lease| lease.deadline + lag < now;
        let ended: Vec<i64> =
            self.leases.iter().filter(|(_, lease)| over(lease)).map(|(id, _)| *id).collect();
        ended.into_iter().for_each(|lease| self.end(lease));
    }

    fn end(&mut self, lease: i64) {
        self.leases.remove(&lease);
        let on = |row: &&Row| row.lease == lease;
        let keys: Vec<String> = self.rows.values().filter(on).map(|row| row.key.clone()).collect();
        let mut events = Vec::new();
        keys.iter().for_each(|key| self.remove(key, &mut events));
        self.commit(events);
    }

    /// Carries out an operation and fills in its answer.
    pub(super) fn apply(&mut self, op: &mut Op, lag: i64) {
        op.succeeded = true;
        match op.call.clone() {
            Call::Put { key, value } => self.puts(&[(key, value)]),
            Call::PutTwo { first, second } => self.puts(&[first, second]),
            Call::Cas { key, expect, value } => {
                let row = self.rows.get(&key).cloned();
                op.succeeded = row.as_ref().map_or(0, |row| row.modified) == expect;
                if op.succeeded {
                    self.puts(&[(key, value)]);
                } else {
                    op.rows = row.into_iter().collect();
                }
            }
            Call::Delete { key } => {
                op.succeeded = self.rows.contains_key(&key);
                let mut events = Vec::new();
                self.remove(&key, &mut events);
                self.commit(events);
            }
            Call::Txn(txn) => self.txn(op, &txn),
            Call::Get { .. } | Call::List { .. } | Call::Range(_) => return self.read(op, lag),
            Call::Compact { revision } => self.compact(op, revision),
            Call::Grant { .. }
            | Call::KeepAlive { .. }
            | Call::Revoke { .. }
            | Call::TimeToLive { .. } => self.lease(op),
            Call::Members
            | Call::MemberAdd { .. }
            | Call::MemberPromote { .. }
            | Call::MemberRemove { .. } => return self.member(op),
        }
        if op.outcome == Outcome::Ok {
            op.revision = self.revision;
        }
    }

    fn puts(&mut self, puts: &[(String, String)]) {
        let mut events = Vec::new();
        for (key, value) in puts {
            self.insert(key, value, 0, &mut events);
        }
        self.commit(events);
    }

    fn insert(&mut self, key: &str, value: &str, lease: i64, events: &mut Vec<Event>) {
        let revision = self.revision + 1;
        let old = self.rows.get(key);
        let row = Row {
            key: key.to_owned(),
            value: value.to_owned(),
            create: old.map_or(revision, |old| old.create),
            modified: revision,
            version: 1 + old.map_or(0, |old| old.version),
            lease,
        };
        let before = self.rows.insert(key.to_owned(), row.clone());
        events.push(Event { revision, key: key.to_owned(), put: Some(row), before });
    }

    fn remove(&mut self, key: &str, events: &mut Vec<Event>) {
        if let Some(before) = self.rows.remove(key) {
            let (revision, key) = (self.revision + 1, key.to_owned());
            events.push(Event { revision, key, put: None, before: Some(before) });
        }
    }

    fn commit(&mut self, events: Vec<Event>) {
        if !events.is_empty() {
            self.revision += 1;
            self.past.push(self.rows.clone());
            self.made.push((self.now, events));
        }
    }

    fn read(&mut self, op: &mut Op, lag: i64) {
        let Some(asked) = op.call.range() else { return };
        // A member that lags may answer a serializable read with an older state.
        let lag = if asked.serializable { lag } else { 0 };
        op.revision = (self.revision - lag).max(1);
        let at = if asked.revision > 0 { asked.revision } else { op.revision };
        if at < self.compacted {
            return refuse(op, "OutOfRange: required revision has been compacted");
        }
        if at > op.revision {
            return refuse(op, "OutOfRange: required revision is a future revision");
        }
        (op.rows, op.detail.count, op.detail.more) = range(&self.past[at as usize - 1], &asked);
    }

    fn txn(&mut self, op: &mut Op, txn: &Txn) {
        if txn.puts().iter().any(|(_, _, lease)| *lease != 0 && !self.leases.contains_key(lease)) {
            return refuse(op, "NotFound: requested lease not found");
        }
        let before = self.rows.clone();
        let mut events = Vec::new();
        (op.succeeded, op.detail.parts) = self.branch(&before, txn, &mut events);
        self.commit(events);
    }

    fn branch(
        &mut self,
        before: &Contents,
        txn: &Txn,
        events: &mut Vec<Event>,
    ) -> (bool, Vec<Part>) {
        let held = txn.compare.iter().all(|compare| holds(before, compare));
        let steps = if held { &txn.success } else { &txn.failure };
        let mut parts = Vec::new();
        for step in steps {
            parts.push(match step {
                TxnOp::Put { key, value, lease } => {
                    self.insert(key, value, *lease, events);
                    Part::Put
                }
                TxnOp::Delete { key, end } => {
                    let all = Range { key: key.clone(), end: end.clone(), ..Range::default() };
                    let (rows, ..) = range(&self.rows, &all);
                    rows.iter().for_each(|row| self.remove(&row.key, events));
                    Part::Delete { rows }
                }
                TxnOp::Range(asked) => {
                    let (rows, count, more) = range(&self.rows, asked);
                    Part::Range { rows, count, more }
                }
                TxnOp::Txn(inner) => {
                    let (succeeded, parts) = self.branch(before, inner, events);
                    Part::Txn { succeeded, parts }
                }
            });
        }
        (held, parts)
    }

    fn compact(&mut self, op: &mut Op, revision: i64) {
        if revision <= self.compacted {
            refuse(op, "OutOfRange: required revision has been compacted");
        } else if revision > self.revision {
            refuse(op, "OutOfRange: required revision is a future revision");
        } else {
            self.compacted = revision;
        }
    }

    fn lease(&mut self, op: &mut Op) {
        let second = 1_000_000_000;
        match op.call {
            Call::Grant { ttl } => {
                self.numbers += 1;
                let deadline = self.now + ttl as u64 * second;
                op.detail.lease = self.numbers as i64;
                op.detail.ttl = ttl;
                self.leases.insert(op.detail.lease, Lease { ttl, deadline });
            }
            Call::KeepAlive { lease } => match self.leases.get_mut(&lease) {
                Some(known) if known.deadline > self.now => {
                    known.deadline = self.now + known.ttl as u64 * second;
                    op.detail.ttl = known.ttl;
                }
                _ => op.succeeded = false,
            },
            Call::Revoke { lease } if self.leases.contains_key(&lease) => self.end(lease),
            Call::Revoke { .. } => refuse(op, "NotFound: requested lease not found"),
            Call::TimeToLive { lease } => {
                let left = |lease: &Lease| (lease.deadline.saturating_sub(self.now)) / second;
                op.detail.ttl = self.leases.get(&lease).map_or(-1, |lease| left(lease) as i64);
                op.succeeded = op.detail.ttl >= 0;
            }
            _ => {}
        }
    }

    fn member(&mut self, op: &mut Op) {
        match op.call.clone() {
            Call::MemberAdd { .. } if self.members.iter().any(|member| member.learner) => {
                return refuse(op, "FailedPrecondition: too many learner members in cluster");
            }
            Call::MemberAdd { url } => {
                self.numbers += 1;
                op.detail.id = self.numbers;
                self.members.push(MemberRow { id: self.numbers, url, learner: true });
            }
            Call::MemberPromote { .. } => {
                return refuse(op, "FailedPrecondition: learner is not in sync with leader");
            }
            Call::MemberRemove { id } => {
                if !self.members.iter().any(|member| member.id == id) {
                    return refuse(op, "NotFound: member not found");
                }
                self.members.retain(|member| member.id != id);
                return;
            }
            _ => {}
        }
        op.detail.members = self.members.clone();
    }
}

fn refuse(op: &mut Op, error: &str) {
    op.outcome = Outcome::Fail;
    op.error = Some(error.into());
    (op.revision, op.succeeded) = (0, false);
}

fn holds(rows: &Contents, compare: &Compare) -> bool {
    let all = Range { key: compare.key.clone(), end: compare.end.clone(), ..Range::default() };
    let (found, ..) = range(rows, &all);
    let number = |is: Is, left: i64, right: i64| match is {
        Is::Equal => left == right,
        Is::Unequal => left != right,
        Is::Greater => left > right,
        Is::Less => left < right,
    };
    let one = |row: &Row| match &compare.to {
        Operand::Version(right) => number(compare.is, row.version, *right),
        Operand::Create(right) => number(compare.is, row.create, *right),
        Operand::Mod(right) => number(compare.is, row.modified, *right),
        Operand::Lease(right) => number(compare.is, row.lease, *right),
        Operand::Value(_) if row.version == 0 => false,
        Operand::Value(right) => match compare.is {
            Is::Equal => row.value == *right,
            Is::Unequal => row.value != *right,
            Is::Greater => row.value > *right,
            Is::Less => row.value < *right,
        },
    };
    if found.is_empty() { one(&Row::default()) } else { found.iter().all(one) }
}

/// The rows, the count and whether the limit cut some off.
pub(super) fn range(rows: &Contents, asked: &Range) -> (Vec<Row>, i64, bool) {
    let single = asked.end.is_empty();
    let inside = |key: &str| {
        if single { *key == asked.key } else { key >= &asked.key[..] && key < &asked.end[..] }
    };
    let mut found: Vec<Row> = rows.values().filter(|row| inside(&row.key)).cloned().collect();
    let count = found.len() as i64;
    if asked.count_only {
        return (Vec::new(), count, false);
    }
    let under = |bound: i64, number: i64| bound == 0 || number <= bound;
    found.retain(|row| row.modified >= asked.modified.0 && under(asked.modified.1, row.modified));
    found.retain(|row| row.create >= asked.created.0 && under(asked.created.1, row.create));
    match asked.sort.map(|(field, _)| field) {
        None | Some(Field::Key) => {}
        Some(Field::Version) => found.sort_by_key(|row| row.version),
        Some(Field::Create) => found.sort_by_key(|row| row.create),
        Some(Field::Mod) => found.sort_by_key(|row| row.modified),
        Some(Field::Value) => found.sort_by(|a, b| a.value.cmp(&b.value)),
    }
    if asked.sort.is_some_and(|(_, down)| down) {
        found.reverse();
    }
    let more = asked.limit > 0 && found.len() as i64 > asked.limit;
    if more {
        found.truncate(asked.limit as usize);
    }
    if asked.keys_only {
        found.iter_mut().for_each(|row| row.value.clear());
    }
    (found, count, more)
}
