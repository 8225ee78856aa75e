//! The second judge: linearizability of each key by itself, from values and times alone. It ignores
//! every revision and every watch event, so it does not believe what the first judge believes; it
//! sees less (nothing across keys), and says so when a search grows too large.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use super::{Findings, Rule};
use crate::call::{Part, Txn, TxnOp, covers};
use crate::history::{Call, Op, Outcome};
use crate::rng::Rng;

/// States kept per key before the search is given up as undecided: about 200 MB.
const STATES: usize = 3_000_000;
/// Moves of the search per key before it is given up: some seconds.
const MOVES: usize = 30_000_000;
/// Operations at a time on one key beyond which acknowledged writes that nobody saw are left out too.
/// That keeps every contradiction that remains true, and loses some.
const CROWD: usize = 12;

/// A value of one key by number; 0 is absence.
type Value = u32;

/// What one operation means for one key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Act {
    Read(Value),
    /// A delete too: that it found something could be the doing of a write left out.
    Write(Value),
}

/// An operation on one key.
#[derive(Clone, Copy, Debug)]
struct Step {
    start: u64,
    end: u64,
    act: Act,
    /// Place in the history, for the proof.
    op: usize,
}

enum Verdict {
    Linearizable,
    /// No order exists; the operation at which the longest attempt stuck.
    Stuck(usize),
    Undecided,
}

pub(super) fn check(ops: &[Op], findings: &mut Findings) -> usize {
    let mut undecided = 0;
    for (key, mut steps) in by_key(ops) {
        thin(&mut steps);
        match search(&steps) {
            Verdict::Linearizable => {}
            Verdict::Undecided => undecided += 1,
            Verdict::Stuck(op) => {
                let op = &ops[op];
                let (start, end) = (op.start as f64 / 1e9, op.end as f64 / 1e9);
                let (process, member) = (op.process, op.member);
                let saw = op.rows.iter().find(|row| row.key == key).map(|row| &row.value);
                let proof = format!(
                    "{key}: no order of its operations fits \
                     [{start:.4}-{end:.4} process {process} member {member}] {} ({saw:?})",
                    op.call.kind()
                );
                findings.add(Rule::NotLinearizable, proof);
            }
        }
    }
    undecided
}

/// Numbers the values of one history.
#[derive(Default)]
struct Values(HashMap<String, Value>);

impl Values {
    fn number(&mut self, value: &str) -> Value {
        let next = self.0.len() as Value + 1;
        *self.0.entry(value.to_owned()).or_insert(next)
    }
}

/// Splits a history by key. Writes that nobody is known to have seen and whose outcome is unknown are
/// left out: values are unique, so they can have no part in any contradiction.
fn by_key(ops: &[Op]) -> BTreeMap<String, Vec<Step>> {
    let mut values = Values::default();
    let keys = keys(ops);
    let sightings = sightings(ops);
    let mut split: BTreeMap<String, Vec<Step>> = BTreeMap::new();
    for (index, op) in ops.iter().enumerate() {
        let mut add = |key: &str, end: u64, act: Act| {
            let step = Step { start: op.start, end, act, op: index };
            split.entry(key.to_owned()).or_default().push(step);
        };
        match op.outcome {
            Outcome::Fail => {}
            Outcome::Unknown => {
                for (key, value) in op.call.puts() {
                    if let Some(seen) = sightings.get(value) {
                        // It happened before the first sighting was over.
                        add(key, (*seen).max(op.start + 1), Act::Write(values.number(value)));
                    }
                }
                for (from, end) in op.call.deletes() {
                    let all = keys.iter().filter(|key| covers(from, end, key));
                    all.for_each(|key| add(key, u64::MAX, Act::Write(0)));
                }
            }
            Outcome::Ok if op.call.is_serializable() => {}
            Outcome::Ok => {
                for (key, value, wrote) in touched(op, &keys) {
                    let value = value.map_or(0, |value| values.number(value));
                    add(key, op.end, if wrote { Act::Write(value) } else { Act::Read(value) });
                }
            }
        }
    }
    // Keys on leases vanish without an operation.
    for key in ops.iter().flat_map(leased) {
        split.remove(key);
    }
    split
}

/// Keys that may have been put on a lease.
fn leased(op: &Op) -> Vec<&str> {
    match &op.call {
        Call::Txn(txn) => {
            txn.puts().into_iter().filter(|(_, _, lease)| *lease != 0).map(|put| put.0).collect()
        }
        _ => Vec::new(),
    }
}

type Touch<'a> = (&'a str, Option<&'a str>, bool);

/// What an answered operation says about keys: the value, and whether it wrote or read it.
fn touched<'a>(op: &'a Op, all: &'a BTreeSet<String>) -> Vec<Touch<'a>> {
    let shown = |key: &str| op.rows.iter().find(|row| row.key == key).map(|row| &row.value[..]);
    match &op.call {
        Call::Delete { key } => vec![(key, None, op.succeeded)],
        Call::Cas { key, .. } if !op.succeeded => vec![(key, shown(key), false)],
        Call::Txn(txn) => last_touches(txn, op.succeeded, &op.detail.parts),
        call => match call.range() {
            Some(range) if range.is_whole() => {
                let keys = all.iter().filter(|key| range.covers(key));
                keys.map(|key| (key.as_str(), shown(key), false)).collect()
            }
            // A part of a range says nothing of what it leaves out.
            Some(range) if range.revision == 0 && !range.keys_only => {
                op.rows.iter().map(|row| (row.key.as_str(), Some(&row.value[..]), false)).collect()
            }
            Some(_) => Vec::new(),
            None => call.puts().into_iter().map(|(key, v)| (key, Some(v), true)).collect(),
        },
    }
}

/// The same for the branch that a transaction took: the last write of each key, or what was read of a
/// key that it did not write.
fn last_touches<'a>(txn: &'a Txn, succeeded: bool, parts: &'a [Part]) -> Vec<Touch<'a>> {
    let mut touches: BTreeMap<&str, (Option<&str>, bool)> = BTreeMap::new();
    for (key, value, wrote) in all_touches(txn, succeeded, parts) {
        let known = touches.entry(key).or_insert((value, wrote));
        if wrote || !known.1 {
            *known = (value, wrote);
        }
    }
    touches.into_iter().map(|(key, (value, wrote))| (key, value, wrote)).collect()
}

fn all_touches<'a>(txn: &'a Txn, succeeded: bool, parts: &'a [Part]) -> Vec<Touch<'a>> {
    let mut touches: Vec<Touch<'_>> = Vec::new();
    let steps = if succeeded { &txn.success } else { &txn.failure };
    for (step, part) in steps.iter().zip(parts) {
        match (step, part) {
            (TxnOp::Put { key, value, .. }, _) => touches.push((key, Some(value), true)),
            (TxnOp::Delete { .. }, Part::Delete { rows }) => {
                touches.extend(rows.iter().map(|row| (row.key.as_str(), None, true)));
            }
            (TxnOp::Range(range), Part::Range { rows, .. }) if range.end.is_empty() => {
                let value = rows.first().map(|row| &row.value[..]);
                touches.push((&range.key, value, false));
            }
            (TxnOp::Txn(inner), Part::Txn { succeeded, parts }) => {
                touches.extend(all_touches(inner, *succeeded, parts));
            }
            _ => {}
        }
    }
    touches
}

/// Leaves out writes that no step read, where too many steps overlap. The order of what is left can
/// only be easier to find, so nothing right becomes wrong.
fn thin(steps: &mut Vec<Step>) {
    let mut moments: Vec<(u64, i64)> = Vec::new();
    for step in steps.iter() {
        moments.extend([(step.start, 1), (step.end, -1)]);
    }
    moments.sort_unstable();
    let (mut now, mut most) = (0, 0);
    for (_, change) in moments {
        now += change;
        most = now.max(most);
    }
    if most as usize <= CROWD {
        return;
    }
    let mut read = HashSet::new();
    read.extend(steps.iter().filter_map(|step| match step.act {
        Act::Read(value) => Some(value),
        Act::Write(_) => None,
    }));
    steps.retain(|step| !matches!(step.act, Act::Write(value) if !read.contains(&value)));
}

fn keys(ops: &[Op]) -> BTreeSet<String> {
    let mut keys = BTreeSet::new();
    for op in ops {
        keys.extend(op.call.puts().iter().map(|(key, _)| (*key).to_owned()));
        keys.extend(op.shown().into_iter().map(|row| row.key.clone()));
    }
    keys
}

/// When each value was first seen by a linearizable answer.
fn sightings(ops: &[Op]) -> HashMap<&str, u64> {
    let mut seen: HashMap<&str, u64> = HashMap::new();
    let answers = ops.iter().filter(|op| op.outcome == Outcome::Ok && !op.call.is_serializable());
    for op in answers {
        for row in op.shown() {
            let first = seen.entry(&row.value).or_insert(op.end);
            *first = op.end.min(*first);
        }
    }
    seen
}

/// What a step makes of a value, or none if it cannot happen there.
fn apply(state: Value, act: Act) -> Option<Value> {
    match act {
        Act::Read(value) => (state == value).then_some(state),
        Act::Write(value) => Some(value),
    }
}

/// Calls and returns of all steps in the order of time, as a list from which pairs are taken out and
/// put back in reverse order.
struct Timeline {
    next: Vec<usize>,
    before: Vec<usize>,
    /// Place of the call and of the return of each step.
    places: Vec<(usize, usize)>,
    /// Step and kind of each place; place 0 is the head.
    entries: Vec<(usize, bool)>,
}

impl Timeline {
    fn new(steps: &[Step]) -> Self {
        let mut times: Vec<(u64, bool, usize)> = Vec::new();
        for (number, step) in steps.iter().enumerate() {
            times.push((step.start, false, number));
            times.push((step.end, true, number));
        }
        // Calls before returns of the same moment: such steps count as concurrent.
        times.sort_unstable();
        let mut places = vec![(0, 0); steps.len()];
        let mut entries = vec![(usize::MAX, false)];
        for (_, is_return, step) in times {
            let place = entries.len();
            if is_return {
                places[step].1 = place
            } else {
                places[step].0 = place
            }
            entries.push((step, is_return));
        }
        let count = entries.len();
        let next = (1..=count).collect();
        let before = (0..count).map(|place| place.saturating_sub(1)).collect();
        Self { next, before, places, entries }
    }

    fn first(&self) -> usize {
        self.next[0]
    }

    fn at(&self, place: usize) -> Option<(usize, bool)> {
        self.entries.get(place).copied()
    }

    fn unlink(&mut self, place: usize) {
        let (before, next) = (self.before[place], self.next[place]);
        self.next[before] = next;
        if next < self.before.len() {
            self.before[next] = before;
        }
    }

    fn relink(&mut self, place: usize) {
        let (before, next) = (self.before[place], self.next[place]);
        self.next[before] = place;
        if next < self.before.len() {
            self.before[next] = place;
        }
    }

    fn take(&mut self, step: usize) {
        let (call, back) = self.places[step];
        self.unlink(call);
        self.unlink(back);
    }

    fn put_back(&mut self, step: usize) {
        let (call, back) = self.places[step];
        self.relink(back);
        self.relink(call);
    }
}

/// Looks for an order of the steps in which each is possible and none comes before one that had
/// ended when it began (Wing and Gong's search with Lowe's memory of states already seen).
fn search(steps: &[Step]) -> Verdict {
    let mut timeline = Timeline::new(steps);
    // One random number per step; the sum over a set names the set. Two sets with one name could
    // only hide an order, never invent one, and 128 bits make that a matter of 1 in 10^23.
    let mut rng = Rng::fork(0, steps.len() as u64);
    let names: Vec<u128> =
        steps.iter().map(|_| u128::from(rng.next()) << 64 | u128::from(rng.next())).collect();
    let mut seen: HashSet<(u128, Value)> = HashSet::new();
    let mut done: Vec<(usize, Value)> = Vec::new();
    let (mut state, mut name) = (0, 0_u128);
    let (mut deepest, mut stuck) = (0, 0);
    let mut place = timeline.first();
    let mut moves = 0;
    while let Some((step, is_return)) = timeline.at(place) {
        moves += 1;
        if seen.len() > STATES || moves > MOVES {
            return Verdict::Undecided;
        }
        if !is_return {
            let after = apply(state, steps[step].act);
            match after.filter(|after| seen.insert((name ^ names[step], *after))) {
                Some(after) => {
                    done.push((step, state));
                    (state, name) = (after, name ^ names[step]);
                    timeline.take(step);
                    place = timeline.first();
                }
                None => place = timeline.next[place],
            }
            continue;
        }
        if done.len() >= deepest {
            (deepest, stuck) = (done.len(), steps[step].op);
        }
        // This step should have happened by now, so an earlier choice was wrong.
        let Some((last, was)) = done.pop() else { return Verdict::Stuck(stuck) };
        (state, name) = (was, name ^ names[last]);
        timeline.put_back(last);
        place = timeline.next[timeline.places[last].0];
    }
    Verdict::Linearizable
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Tries every order.
    fn possible(steps: &[Step], state: Value) -> bool {
        if steps.is_empty() {
            return true;
        }
        (0..steps.len()).any(|first| {
            let rest: Vec<Step> = (0..steps.len())
                .filter(|other| *other != first)
                .map(|other| steps[other])
                .collect();
            let in_time = rest.iter().all(|other| other.end >= steps[first].start);
            let after = apply(state, steps[first].act);
            in_time && after.is_some_and(|after| possible(&rest, after))
        })
    }

    #[test]
    fn the_search_agrees_with_trying_every_order() {
        let mut rng = Rng::fork(5, 5);
        let (mut good, mut bad) = (0, 0);
        for _ in 0..3000 {
            let count = 2 + rng.below(5) as usize;
            let steps: Vec<Step> = (0..count)
                .map(|op| {
                    let start = rng.below(12);
                    let act = match rng.below(5) {
                        0 | 1 => Act::Write(1 + op as Value),
                        2 | 3 => Act::Read(rng.below(count as u64 + 1) as Value),
                        _ => Act::Write(0),
                    };
                    Step { start, end: start + 1 + rng.below(6), act, op }
                })
                .collect();
            let found = matches!(search(&steps), Verdict::Linearizable);
            assert_eq!(found, possible(&steps, 0), "{steps:?}");
            if found { good += 1 } else { bad += 1 }
        }
        assert!(good > 300 && bad > 300, "{good} good and {bad} bad ones prove little");
    }
}
