//! Caches made of a list and a watch: at each revision that the watch called complete they hold what
//! the log says, and every event they were sent was of use. A previous value may be missing where the
//! target is etcd and a compaction that was asked for before includes the event.

use super::log::show;
use super::{Findings, Log, Rule};
use crate::call::end_of;
use crate::history::{Call, Note, Op, Outcome, Row};
use crate::workload::REGISTRY;

pub(super) fn check(notes: &[Note], ops: &[Op], log: &Log, findings: &mut Findings) {
    let end = end_of(REGISTRY);
    for note in notes {
        match note {
            Note::Cache { member, at, revision, rows } => {
                let expected = log.range_at(REGISTRY, &end, *revision);
                if let Some(wrong) = difference(rows, &expected) {
                    let at = *at as f64 / 1e9;
                    let proof = format!("[{at:.4} member {member} revision {revision}] {wrong}");
                    findings.add(Rule::WrongCache, proof);
                }
            }
            Note::CacheBroken { member, at, text } => {
                let at = *at as f64 / 1e9;
                findings.add(Rule::WrongCache, format!("[{at:.4} member {member}] {text}"));
            }
            Note::PreviousGone { member, at, revision, key } => {
                if compacted(ops, *at) < *revision {
                    let at = *at as f64 / 1e9;
                    let text = format!("no previous value of {key} at {revision}, not compacted");
                    findings.add(Rule::WrongCache, format!("[{at:.4} member {member}] {text}"));
                }
            }
            Note::Lists(_) => {}
        }
    }
}

/// The newest revision that may have been compacted before a moment; 0 for none.
fn compacted(ops: &[Op], before: u64) -> i64 {
    let asked = ops.iter().filter(|op| op.start < before && op.outcome != Outcome::Fail);
    let revisions = asked.filter_map(|op| match op.call {
        Call::Compact { revision } => Some(revision),
        _ => None,
    });
    revisions.max().unwrap_or(0)
}

fn difference(rows: &[Row], expected: &[&Row]) -> Option<String> {
    (0..rows.len().max(expected.len())).find_map(|index| {
        let (got, want) = (rows.get(index), expected.get(index).copied());
        (got != want).then(|| format!("holds {}, the log has {}", show(got), show(want)))
    })
}
