//! Leases: none ends before its time, none lives on much longer, and an end takes all of its keys at
//! once. Ends are read off the log (a revision that deletes all keys of one lease and that no
//! operation explains), times from grants, renewals and the first sight of each end.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use super::order::{ended_lease, name};
use super::{Findings, Log, Rule};
use crate::call::covers;
use crate::history::{Call, History, Op, Outcome, WatchWhat};

const SECOND: u64 = 1_000_000_000;
/// A lease may live this much longer than it should. Servers look for ended leases twice a second, and
/// one that loses its leader starts all leases anew; the rest is for machines that are slow.
const BOUND: u64 = 15 * SECOND;
/// A deposed leader may not know for this long that it leads no more.
const DEPOSED: u64 = 5 * SECOND;

/// What the operations tell of one lease.
struct Lease<'a> {
    /// Seconds as granted.
    ttl: u64,
    /// Renewals that were answered, the grant first.
    renewals: Vec<&'a Op>,
    /// The last moment at which it may have been renewed.
    latest: u64,
    /// When its end was asked for first.
    revoked: Option<u64>,
}

/// An end as the log shows it.
#[derive(Clone, Copy)]
struct End {
    revision: i64,
    /// When anybody saw it first.
    seen: u64,
}

pub(super) fn check(history: &History, log: &Log, findings: &mut Findings) {
    let leases = leases(&history.ops);
    if leases.is_empty() {
        return;
    }
    let ends = ends(history, log, findings);
    for (lease, end) in &ends {
        // Nothing is known of the time of a lease whose grant had no answer.
        if let Some(known) = leases.get(lease) {
            early(*lease, known, *end, findings);
        }
    }
    for op in history.ops.iter().filter(|op| op.outcome == Outcome::Ok) {
        after_the_end(op, &ends, log, findings);
    }
    overdue(history, &leases, &ends, log, findings);
}

fn leases(ops: &[Op]) -> HashMap<i64, Lease<'_>> {
    let mut leases = HashMap::new();
    for op in ops.iter().filter(|op| op.outcome == Outcome::Ok) {
        if let Call::Grant { .. } = op.call {
            let ttl = op.detail.ttl.max(0) as u64;
            let lease = Lease { ttl, renewals: vec![op], latest: op.end, revoked: None };
            leases.insert(op.detail.lease, lease);
        }
    }
    for op in ops {
        match op.call {
            Call::KeepAlive { lease } => {
                let Some(known) = leases.get_mut(&lease) else { continue };
                if op.outcome == Outcome::Ok && op.succeeded {
                    known.renewals.push(op);
                }
                if op.succeeded || op.outcome == Outcome::Unknown {
                    known.latest = known.latest.max(op.end);
                }
            }
            Call::Revoke { lease } if op.outcome != Outcome::Fail => {
                let Some(known) = leases.get_mut(&lease) else { continue };
                known.revoked = Some(known.revoked.map_or(op.start, |at| at.min(op.start)));
            }
            _ => {}
        }
    }
    leases
}

/// When each revision was seen first by a watcher or in an answer.
fn sights(history: &History, wanted: &HashSet<i64>) -> HashMap<i64, u64> {
    let mut sights: HashMap<i64, u64> = HashMap::new();
    let mut see = |revision: i64, at: u64| {
        if wanted.contains(&revision) {
            let first = sights.entry(revision).or_insert(at);
            *first = at.min(*first);
        }
    };
    for record in &history.watches {
        let WatchWhat::Events { events, .. } = &record.what else { continue };
        events.iter().for_each(|event| see(event.revision, record.at));
    }
    history.ops.iter().for_each(|op| see(op.revision, op.end));
    sights
}

/// Ends by lease. Each takes all keys that were on the lease, and no lease ends twice.
fn ends(history: &History, log: &Log, findings: &mut Findings) -> HashMap<i64, End> {
    let asked = asked(&history.ops);
    let mut keys: HashMap<i64, BTreeSet<&str>> = HashMap::new();
    let mut found: BTreeMap<i64, i64> = BTreeMap::new();
    for (revision, events) in log.revisions() {
        let ended = ended_lease(events);
        let ended = ended.filter(|_| !events.iter().all(|event| asked.has(&event.key, revision)));
        for event in events {
            if let Some(before) = event.before.as_ref().filter(|row| row.lease != 0) {
                keys.entry(before.lease).or_default().remove(event.key.as_str());
            }
            if let Some(row) = event.put.as_ref().filter(|row| row.lease != 0) {
                keys.entry(row.lease).or_default().insert(&event.key);
            }
        }
        let Some(lease) = ended else { continue };
        if let Some(left) = keys.get(&lease).and_then(BTreeSet::first) {
            // A delete without an answer looks like an end, but takes no more than one key.
            if !asked.maybe.contains(events[0].key.as_str()) || events.len() > 1 {
                let proof =
                    format!("revision {revision} ends lease {lease:x}, but {left} stays on it");
                findings.add(Rule::LeaseEnd, proof);
            }
        } else {
            found.insert(revision, lease);
        }
    }
    let sights = sights(history, &found.keys().copied().collect());
    let mut ends: HashMap<i64, End> = HashMap::new();
    for (revision, lease) in found {
        let seen = sights.get(&revision).copied().unwrap_or(u64::MAX);
        let first = log.events(revision)[0].key.as_str();
        // The last key of a lease, taken by a delete that nobody answered, may be no end at all.
        if asked.maybe.contains(first) && log.events(revision).len() == 1 {
            continue;
        }
        ends.insert(lease, End { revision, seen });
    }
    ends
}

/// Deletes that operations asked for.
struct Asked<'a> {
    /// Key and revision of those that were answered.
    sure: HashSet<(&'a str, i64)>,
    /// Keys of those that were not.
    maybe: HashSet<&'a str>,
}

impl Asked<'_> {
    fn has(&self, key: &str, revision: i64) -> bool {
        self.sure.contains(&(key, revision))
    }
}

fn asked(ops: &[Op]) -> Asked<'_> {
    let mut asked = Asked { sure: HashSet::new(), maybe: HashSet::new() };
    for op in ops {
        for (key, end) in op.call.deletes() {
            match op.outcome {
                Outcome::Ok if end.is_empty() => {
                    asked.sure.insert((key, op.revision));
                }
                Outcome::Ok => {
                    let rows = op.shown().into_iter().filter(|row| covers(key, end, &row.key));
                    asked.sure.extend(rows.map(|row| (row.key.as_str(), op.revision)));
                }
                Outcome::Unknown => {
                    asked.maybe.insert(key);
                }
                Outcome::Fail => {}
            }
        }
    }
    asked
}

/// Every renewal answered before the end was seen gave the lease its whole time again.
fn early(lease: i64, known: &Lease<'_>, end: End, findings: &mut Findings) {
    if known.revoked.is_some_and(|at| at < end.seen) {
        return;
    }
    let before = known.renewals.iter().filter(|op| op.end < end.seen);
    let Some(last) = before.max_by_key(|op| op.start) else { return };
    let until = last.start + known.ttl * SECOND;
    if end.seen < until {
        let proof = format!(
            "lease {lease:x} ended at revision {}, seen at {:.4}; {} gave it {} s, until {:.4}",
            end.revision,
            end.seen as f64 / 1e9,
            name(last),
            known.ttl,
            until as f64 / 1e9
        );
        findings.add(Rule::LeaseEarly, proof);
    }
}

/// An ended lease takes no keys and is not renewed.
fn after_the_end(op: &Op, ends: &HashMap<i64, End>, log: &Log, findings: &mut Findings) {
    match &op.call {
        Call::KeepAlive { lease } if op.succeeded => {
            let end = ends.get(lease);
            if let Some(end) = end.filter(|end| end.seen.saturating_add(DEPOSED) < op.start) {
                let proof = format!("{} after its end at {}", name(op), end.revision);
                findings.add(Rule::LeaseRisen, proof);
            }
        }
        Call::Txn(txn) if op.wrote() => {
            for (key, _, lease) in txn.puts() {
                let end = ends.get(&lease).filter(|end| end.revision < op.revision);
                let put = log.at(key, op.revision).is_some_and(|row| row.modified == op.revision);
                if let Some(end) = end.filter(|_| put) {
                    let proof = format!("{} uses a lease that ended at {}", name(op), end.revision);
                    findings.add(Rule::LeaseRisen, proof);
                }
            }
        }
        Call::Revoke { lease } => {
            let keys = log.range_at("\0", "\u{10ffff}", op.revision);
            if let Some(row) = keys.into_iter().find(|row| row.lease == *lease) {
                let proof = format!("{} leaves {} behind", name(op), row.key);
                findings.add(Rule::LeaseEnd, proof);
            }
        }
        _ => {}
    }
}

/// A lease that nobody renews is gone some time later. A change of the leader starts it anew.
fn overdue(
    history: &History,
    leases: &HashMap<i64, Lease<'_>>,
    ends: &HashMap<i64, End>,
    log: &Log,
    findings: &mut Findings,
) {
    let over = history.ops.iter().map(|op| op.end).max().unwrap_or(0);
    let kept: HashSet<i64> = log.all_at(log.last()).into_iter().map(|row| row.lease).collect();
    let mut late = Vec::new();
    for (lease, known) in leases {
        let from = known.latest.max(known.revoked.unwrap_or(0));
        let due = |from: u64| from + known.ttl * SECOND + BOUND;
        let seen = ends.get(lease).map_or(over, |end| end.seen);
        // Leases without keys end unseen, and so do those whose last key moved on.
        let counts = ends.contains_key(lease) || kept.contains(lease);
        let changes = history.leaders.partition_point(|sighting| sighting.at < seen);
        let led = history.leaders[..changes].last().map_or(0, |sighting| sighting.at);
        if counts && seen != u64::MAX && seen > due(from.max(led)) {
            late.push((*lease, seen, due(from.max(led))));
        }
    }
    late.sort_unstable();
    for (lease, seen, due) in late {
        let (seen, due) = (seen as f64 / 1e9, due as f64 / 1e9);
        let proof =
            format!("lease {lease:x} had keys until {seen:.4}, should have ended by {due:.4}");
        findings.add(Rule::LeaseLate, proof);
    }
}
