//! The revision-order check: every operation has one place in the log, its answer is what the log
//! says there, and places never contradict real time. It proves strict serializability of the whole
//! store in O(n log n); its counterexamples are one or two operations long.

use std::collections::HashMap;

use super::eval::{Answered, Eval, wrong_parts, wrong_range};
use super::log::{brief, show};
use super::{Findings, Log, Rule};
use crate::call::{Txn, covers};
use crate::history::{Call, Event, Op, Outcome, Row, WatchRecord, WatchWhat};

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
    for (index, revision) in &placed {
        if let (Outcome::Unknown, Call::Txn(txn)) = (ops[*index].outcome, &ops[*index].call) {
            whole(&ops[*index], txn, *revision, log, findings);
        }
    }
    real_time(ops, &placed, watches, findings);
}

/// A transaction whose answer was lost took effect as a whole, if at all.
fn whole(op: &Op, txn: &Txn, revision: i64, log: &Log, findings: &mut Findings) {
    let mut eval = Eval::on(log, revision - 1);
    eval.run(txn);
    if eval.events != log.events(revision) {
        let (got, want) = (brief(log.events(revision)), brief(&eval.events));
        let proof = format!("{} made {got} at {revision}, should be {want}", name(op));
        findings.add(Rule::LostWrite, proof);
    }
}

/// An operation in one line.
pub(super) fn name(op: &Op) -> String {
    let Op { process, member, start, end, revision, .. } = op;
    let what = match &op.call {
        Call::Put { key, value } => format!("put {key}={value}"),
        Call::PutTwo { first, second } => {
            format!("put {}={} and {}={}", first.0, first.1, second.0, second.1)
        }
        Call::Cas { key, expect, value } => format!("cas {key}={value} if mod is {expect}"),
        Call::Delete { key } => format!("delete {key}"),
        Call::Get { key, .. } => format!("{} {key}", op.call.kind()),
        Call::List { .. } | Call::Members => op.call.kind().to_owned(),
        call => format!("{call:?}"),
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
        match op.outcome {
            Outcome::Ok => {
                for key in deleted(op) {
                    deletes.insert((key, op.revision), index);
                }
            }
            Outcome::Unknown => {
                for (key, _) in op.call.deletes() {
                    *spare.entry(key).or_default() += 1;
                }
            }
            Outcome::Fail => {}
        }
    }
    let mut placed: HashMap<usize, i64> = HashMap::new();
    for (revision, events) in log.revisions() {
        let mut by: Option<&Op> = None;
        for put in events.iter().filter_map(|event| event.put.as_ref()) {
            match writers.get(put.value.as_str()) {
                Some(index) => {
                    by = Some(&ops[*index]);
                    place(*index, &ops[*index], put, &mut placed, findings);
                }
                None => {
                    let proof = format!("nobody wrote {} of revision {revision}", show(Some(put)));
                    findings.add(Rule::Unexplained, proof);
                }
            }
        }
        // A lease that ends takes its keys and nothing else; whether it might is another judge's.
        if ended_lease(events).is_some() {
            continue;
        }
        for event in events.iter().filter(|event| event.put.is_none()) {
            let key = event.key.as_str();
            let asked = by.is_some_and(|op| {
                op.call.deletes().iter().any(|(from, end)| covers(from, end, key))
            });
            if asked || deletes.contains_key(&(key, revision)) {
                continue;
            }
            let left = spare.entry(key).or_default();
            if *left == 0 {
                let proof = format!("revision {revision} deletes {key}: nobody did");
                findings.add(Rule::Unexplained, proof);
            }
            *left = left.saturating_sub(1);
        }
    }
    placed
}

/// Keys that an answer says were deleted.
fn deleted(op: &Op) -> Vec<&str> {
    match &op.call {
        Call::Delete { key } if op.succeeded => vec![key],
        Call::Txn(txn) if op.wrote() => {
            let covered =
                |key: &str| txn.deletes().iter().any(|(from, end)| covers(from, end, key));
            op.shown().into_iter().map(|row| row.key.as_str()).filter(|key| covered(key)).collect()
        }
        _ => Vec::new(),
    }
}

/// The lease whose end would explain the events of a revision: nothing but deletes, all of its keys.
pub(super) fn ended_lease(events: &[Event]) -> Option<i64> {
    let lease = |event: &Event| match (&event.put, &event.before) {
        (None, Some(before)) => Some(before.lease).filter(|lease| *lease != 0),
        _ => None,
    };
    let first = lease(events.first()?)?;
    events.iter().all(|event| lease(event) == Some(first)).then_some(first)
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
    if op.outcome == Outcome::Fail || (op.outcome == Outcome::Ok && !op.wrote()) {
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
        Call::Txn(txn) => {
            let mut eval = Eval::on(log, op.revision - 1);
            eval.run(txn);
            eval.events == events
        }
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
    let wrong = match &op.call {
        Call::Txn(txn) => return check_txn(op, txn, log, findings),
        Call::Cas { key, expect, .. } => {
            // The compare saw what was there before the write it allowed.
            let judged = if op.succeeded { op.revision - 1 } else { op.revision };
            let modified = log.at(key, judged).map_or(0, |row| row.modified);
            if (modified == *expect) != op.succeeded {
                let held = if op.succeeded { "held" } else { "did not hold" };
                let proof = format!("{}: compare {held}, mod was {modified}", name(op));
                findings.add(Rule::WrongCompare, proof);
            }
            let found = log.at(key, op.revision).filter(|_| !op.succeeded);
            let got = op.rows.first();
            (got != found).then(|| format!("answered {}, the log has {}", show(got), show(found)))
        }
        Call::Delete { key } if !op.succeeded => {
            let row = log.at(key, op.revision);
            row.map(|row| format!("found nothing; there was {}", show(Some(row))))
        }
        call => call.range().and_then(|asked| {
            let at = if asked.revision > 0 { asked.revision } else { op.revision };
            if at > op.revision {
                return Some(format!("answered revision {at}, beyond that of its header"));
            }
            let Op { rows, detail, .. } = op;
            let answer = Answered { rows, count: detail.count, more: detail.more };
            wrong_range(&asked, &answer, &log.range_at(&asked.key, &asked.end, at))
        }),
    };
    if let Some(wrong) = wrong {
        findings.add(Rule::WrongRead, format!("{}: {wrong}", name(op)));
    }
}

/// A transaction took the branch that the state before it demands, and each step answered right.
fn check_txn(op: &Op, txn: &Txn, log: &Log, findings: &mut Findings) {
    let before = if op.wrote() { op.revision - 1 } else { op.revision };
    let (held, parts) = Eval::on(log, before).run(txn);
    if held != op.succeeded {
        let proof = format!("{}: compares held: {}, should be {held}", name(op), op.succeeded);
        findings.add(Rule::WrongCompare, proof);
        return;
    }
    if let Some(wrong) = wrong_parts(txn, held, &op.detail.parts, &parts) {
        findings.add(Rule::WrongRead, format!("{}: {wrong}", name(op)));
    }
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
            // Answers about members carry no revision.
            Outcome::Ok if !op.call.is_serializable() && !op.call.is_about_members() => {
                Some(op.revision)
            }
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
