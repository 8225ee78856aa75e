//! Refusals: "compacted" only for what somebody had asked to compact, "future" only for what nobody
//! could have seen, and no answers about what was compacted before the question. From calls, answers
//! and times; it does not look at contents.

use super::order::name;
use super::{Findings, Rule};
use crate::history::{Call, Op, Outcome, WatchRecord, WatchWhat};

/// A revision that is known from a moment on, with the operation that tells.
type Known<'a> = (u64, i64, &'a Op);

/// The largest revision known before each moment.
struct Growth<'a>(Vec<Known<'a>>);

impl<'a> Growth<'a> {
    fn new(mut all: Vec<Known<'a>>) -> Self {
        all.sort_by_key(|(at, revision, _)| (*at, *revision));
        let mut grown: Vec<Known<'a>> = Vec::new();
        for known in all {
            if grown.last().is_none_or(|(_, revision, _)| known.1 > *revision) {
                grown.push(known);
            }
        }
        Self(grown)
    }

    fn before(&self, moment: u64) -> Option<&Known<'a>> {
        let count = self.0.partition_point(|(at, ..)| *at < moment);
        self.0[..count].last()
    }

    fn revision(&self, moment: u64) -> i64 {
        self.before(moment).map_or(0, |(_, revision, _)| *revision)
    }
}

pub(super) fn check(ops: &[Op], watches: &[WatchRecord], findings: &mut Findings) {
    let compactions = || {
        ops.iter().filter_map(|op| match op.call {
            Call::Compact { revision } => Some((op, revision)),
            _ => None,
        })
    };
    let asked = compactions().filter(|(op, _)| op.outcome != Outcome::Fail);
    let asked = Growth::new(asked.map(|(op, revision)| (op.start, revision, op)).collect());
    let done = compactions().filter(|(op, _)| op.outcome == Outcome::Ok);
    let done = Growth::new(done.map(|(op, revision)| (op.end, revision, op)).collect());
    let seen = ops.iter().filter(|op| op.outcome == Outcome::Ok);
    let seen = Growth::new(seen.map(|op| (op.end, op.revision, op)).collect());
    for op in ops {
        let (at, least) = match &op.call {
            // Reads may be as old as the compacted revision itself, compactions must be newer.
            Call::Range(range) if range.revision > 0 => (range.revision, range.revision + 1),
            Call::Compact { revision } => (*revision, *revision),
            _ => continue,
        };
        let error = op.error.as_deref().unwrap_or_default();
        if op.outcome == Outcome::Ok && !op.call.is_serializable() {
            if let Some((_, to, by)) = done.before(op.start).filter(|(_, to, _)| *to >= least) {
                let proof = format!("{} after {} to {to}", name(op), name(by));
                findings.add(Rule::NotCompacted, proof);
            }
        } else if error.contains("has been compacted") && asked.revision(op.end) < least {
            let proof = format!("{}: refused as compacted; nobody had asked that", name(op));
            findings.add(Rule::WrongRefusal, proof);
        } else if error.contains("future revision")
            && !op.call.is_serializable()
            && let Some((_, _, by)) = seen.before(op.start).filter(|(_, seen, _)| *seen >= at)
        {
            let proof = format!("{}: refused as future, after {}", name(op), name(by));
            findings.add(Rule::WrongRefusal, proof);
        }
        if op.outcome == Outcome::Ok && matches!(op.call, Call::Compact { .. }) && at > op.revision
        {
            let proof = format!("{}: compacted beyond the newest revision", name(op));
            findings.add(Rule::WrongRefusal, proof);
        }
    }
    watched(watches, &asked, findings);
}

/// A stream is told "compacted" only where somebody asked for such a compaction, and only when it
/// lacks something that is gone.
fn watched(watches: &[WatchRecord], asked: &Growth<'_>, findings: &mut Findings) {
    let mut next: std::collections::HashMap<u64, i64> = Default::default();
    for record in watches {
        let at = next.entry(record.stream).or_insert(1);
        match &record.what {
            WatchWhat::Started { from, .. } => *at = *from,
            WatchWhat::Events { events, .. } => {
                let last = events.iter().map(|event| event.revision + 1).max();
                *at = last.unwrap_or(0).max(*at);
            }
            WatchWhat::Compacted { revision } => {
                if asked.revision(record.at) < *revision || *at >= *revision {
                    let proof = format!(
                        "stream {} (member {}) stood before {at} and was told that {revision} was \
                         compacted; asked for was {}",
                        record.stream,
                        record.member,
                        asked.revision(record.at)
                    );
                    findings.add(Rule::WrongRefusal, proof);
                }
            }
            WatchWhat::Progress { .. } | WatchWhat::Ended { .. } => {}
        }
    }
}
