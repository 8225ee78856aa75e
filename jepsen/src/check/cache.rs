//! Caches made of a list and a watch: at each revision that the watch called complete they hold what
//! the log says, and every event they were sent was of use.

use super::log::show;
use super::{Findings, Log, Rule};
use crate::call::end_of;
use crate::history::{Note, Row};
use crate::workload::REGISTRY;

pub(super) fn check(notes: &[Note], log: &Log, findings: &mut Findings) {
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
            Note::Lists(_) => {}
        }
    }
}

fn difference(rows: &[Row], expected: &[&Row]) -> Option<String> {
    (0..rows.len().max(expected.len())).find_map(|index| {
        let (got, want) = (rows.get(index), expected.get(index).copied());
        (got != want).then(|| format!("holds {}, the log has {}", show(got), show(want)))
    })
}
