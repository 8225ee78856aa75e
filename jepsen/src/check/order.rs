//! The revision-order check: every operation has one place in the log, its answer is what the log
//! says there, and places never contradict real time. It proves strict serializability of the whole
//! store in O(n log n); its counterexamples are one or two operations long.

use std::collections::HashMap;

use super::log::{brief, show};
use super::{Findings, Log, Rule};
use crate::history::{Call, Op, Outcome, Row, WatchRecord, WatchWhat};

pub(super) fn check(ops: &[Op], watches: &[WatchRecord], log: &Log, findings: &mut Findings) {
    let placed = explain(ops, log, findings);
    for op in ops.iter().filter(|op| op.outcome == Outcome::Ok) {
        if op.revision > log.last() {
            let proof = format!("{} answers a revision beyond the last, {}", name(op), log.last());
            findings.add(Rule::LostWrite, proof);
            continue;
        }
        if op.wrote() {
            check_write(op, log, findings);
        }
        check_answer(op, log, findings);
    }
    real_time(ops, &placed, watches, findings);
}

/// An operation in one line.
fn name(op: &Op) -> String {
    let Op { process, member, start, end, revision, .. } = op;
    let what = match &op.call {
        Call::Put { key, value } => format!("put {key}={value}"),
        Call::PutTwo { first, second } => {
            format!("put {}={} and {}={}", first.0, first.1, second.0, second.1)
        }
        Call::Cas { key, expect, value } => format!("cas {key}={value} if mod is {expect}"),
        Call::Delete { key } => format!("delete {key}"),
        Call::Get { key, .. } => format!("{} {key}", op.call.kind()),
        Call::List { .. } => op.call.kind().to_owned(),
    };
    let (start, end) = (*start as f64 / 1e9, *end as f64 / 1e9);
    format!("[{start:.4}-{end:.4} process {process} member {member} revision {revision}] {what}")
}

/// Finds for every event the operation that made it. Gives the revisions of writes by their index in
/// `ops`, including writes whose answer was lost.
fn explain(ops: &[Op], log: &Log, findings: &mut Findings) -> HashMap<usize, i64> {
    let mut writers: HashMap<&str, usize> = HashMap::new();
    // Deletes carry no value, so those without an answer are counted per key.
    let mut deletes: HashMap<(&str, i64), usize> = HashMap::new();
    let mut spare: HashMap<&str, usize> = HashMap::new();
    for (index, op) in ops.iter().enumerate() {
        for (_, value) in op.call.puts() {
            writers.insert(value, index);
        }
        if let Call::Delete { key } = &op.call {
            match op.outcome {
                Outcome::Ok if op.succeeded => {
                    deletes.insert((key, op.revision), index);
                }
                Outcome::Unknown => *spare.entry(key).or_default() += 1,
                Outcome::Ok | Outcome::Fail => {}
            }
        }
    }
    let mut placed: HashMap<usize, i64> = HashMap::new();
    for (revision, events) in log.revisions() {
        for event in events {
            let Some(put) = &event.put else {
                let known = deletes.contains_key(&(event.key.as_str(), revision));
                let left = spare.entry(&event.key).or_default();
                if !known && *left == 0 {
                    let proof = format!("revision {revision} deletes {}: nobody did", event.key);
                    findings.add(Rule::Unexplained, proof);
                }
                *left -= usize::from(!known && *left > 0);
                continue;
            };
            match writers.get(put.value.as_str()) {
                Some(index) => place(*index, &ops[*index], put, &mut placed, findings),
                None => {
                    let proof = format!("nobody wrote {} of revision {revision}", show(Some(put)));
                    findings.add(Rule::Unexplained, proof);
                }
            }
        }
    }
    placed
}

/// Ties an event to the operation that wrote its value.
fn place(
    index: usize,
    op: &Op,
    put: &Row,
    placed: &mut HashMap<usize, i64>,
    findings: &mut Findings,
) {
    let revision = put.modified;
    if op.outcome == Outcome::Fail || (op.outcome == Outcome::Ok && !op.succeeded) {
        let error = op.error.as_deref().unwrap_or("compare did not hold");
        let proof = format!("{} failed ({error}) but is in the log at {revision}", name(op));
        findings.add(Rule::FailedWrite, proof);
    }
    if !op.call.puts().iter().any(|(key, _)| *key == put.key) {
        findings.add(Rule::Unexplained, format!("{} took effect as {}", name(op), show(Some(put))));
    }
    if let Some(other) = placed.insert(index, revision).filter(|other| *other != revision) {
        let proof = format!("{} took effect at {other} and at {revision}", name(op));
        findings.add(Rule::Unexplained, proof);
    }
}

/// An acknowledged write is in the log at its revision, whole and alone.
fn check_write(op: &Op, log: &Log, findings: &mut Findings) {
    let events = log.events(op.revision);
    let whole = match &op.call {
        Call::Delete { key } => {
            events.len() == 1 && events[0].key == *key && events[0].put.is_none()
        }
        call => {
            let puts = call.puts();
            events.len() == puts.len()
                && puts.iter().all(|(key, value)| {
                    let is = |row: &Row| row.key == *key && row.value == *value;
                    events.iter().any(|event| event.put.as_ref().is_some_and(is))
                })
        }
    };
    if !whole {
        let proof = format!("{} was acknowledged; the log has {}", name(op), brief(events));
        findings.add(Rule::LostWrite, proof);
    }
}

/// What an answer shows is the state at its revision.
fn check_answer(op: &Op, log: &Log, findings: &mut Findings) {
    let one = |key: &str, revision| log.at(key, revision).into_iter().collect::<Vec<_>>();
    let expected: Vec<&Row> = match &op.call {
        Call::Get { key, .. } => one(key, op.revision),
        Call::List { .. } => log.all_at(op.revision),
        Call::Cas { key, expect, .. } => {
            // The compare saw what was there before the write it allowed.
            let judged = if op.succeeded { op.revision - 1 } else { op.revision };
            let modified = log.at(key, judged).map_or(0, |row| row.modified);
            if (modified == *expect) != op.succeeded {
                let held = if op.succeeded { "held" } else { "did not hold" };
                let proof = format!("{}: compare {held}, mod was {modified}", name(op));
                findings.add(Rule::WrongCompare, proof);
            }
            if op.succeeded { Vec::new() } else { one(key, op.revision) }
        }
        Call::Delete { key } if !op.succeeded => {
            if let Some(row) = log.at(key, op.revision) {
                let proof = format!("{} found nothing; there was {}", name(op), show(Some(row)));
                findings.add(Rule::WrongRead, proof);
            }
            Vec::new()
        }
        Call::Delete { .. } | Call::Put { .. } | Call::PutTwo { .. } => Vec::new(),
    };
    if let Some(difference) = difference(&op.rows, &expected) {
        findings.add(Rule::WrongRead, format!("{}: {difference}", name(op)));
    }
}

/// The first place where an answer and the log differ.
fn difference(answer: &[Row], expected: &[&Row]) -> Option<String> {
    for index in 0..answer.len().max(expected.len()) {
        let (got, want) = (answer.get(index), expected.get(index).copied());
        if got != want {
            return Some(format!("answered {}, the log has {}", show(got), show(want)));
        }
    }
    None
}

/// Something known to have been visible at a time.
struct Seen {
    at: u64,
    revision: i64,
    proof: Proof,
}

#[derive(Clone, Copy)]
enum Proof {
    Op(usize),
    Stream(u64),
}

/// Whatever starts after a revision was seen may not be older; a write must be newer.
fn real_time(
    ops: &[Op],
    placed: &HashMap<usize, i64>,
    watches: &[WatchRecord],
    findings: &mut Findings,
) {
    let mut seen = Vec::new();
    let mut later = Vec::new();
    for (index, op) in ops.iter().enumerate() {
        if op.outcome == Outcome::Ok {
            seen.push(Seen { at: op.end, revision: op.revision, proof: Proof::Op(index) });
        }
        let revision = match op.outcome {
            Outcome::Ok if !op.call.is_serializable() => Some(op.revision),
            // Its answer was lost, but it cannot have happened before it was sent.
            Outcome::Unknown => placed.get(&index).copied(),
            Outcome::Ok | Outcome::Fail => None,
        };
        if let Some(revision) = revision {
            later.push((op.start, revision, index));
        }
    }
    for record in watches {
        let WatchWhat::Events { events, .. } = &record.what else { continue };
        if let Some(newest) = events.iter().map(|event| event.revision).max() {
            let proof = Proof::Stream(record.stream);
            seen.push(Seen { at: record.at, revision: newest, proof });
        }
    }
    seen.sort_by_key(|seen| seen.at);
    later.sort_unstable();
    let mut known = seen.iter().peekable();
    let mut newest: Option<&Seen> = None;
    for (start, revision, index) in later {
        while let Some(next) = known.next_if(|seen| seen.at < start) {
            if newest.is_none_or(|old| next.revision > old.revision) {
                newest = Some(next);
            }
        }
        let Some(before) = newest else { continue };
        let op = &ops[index];
        let writes = op.wrote() || op.outcome == Outcome::Unknown;
        if revision < before.revision || (writes && revision == before.revision) {
            let first = match before.proof {
                Proof::Op(index) => name(&ops[index]),
                Proof::Stream(stream) => {
                    let at = before.at as f64 / 1e9;
                    format!("[{at:.4} stream {stream} revision {}]", before.revision)
                }
            };
            findings.add(Rule::Stale, format!("{} at {revision}, after {first}", name(op)));
        }
    }
}
