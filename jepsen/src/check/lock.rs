//! The fenced lock: an effect belongs to who holds the lock at that moment, and once a later holder
//! has acted, an earlier one never acts again. Read off the log alone. Effects without a fence are
//! expected to overlap and are only counted.

use super::{Findings, Log, Rule};
use crate::workload::{FENCED, LOCK, PLAIN, fence};

/// Judges the fenced effects; gives the number of plain ones that came too late.
pub(super) fn check(log: &Log, findings: &mut Findings) -> usize {
    // Create revision of the lock, 0 when it is free.
    let mut holder = 0;
    let (mut newest, mut newest_plain, mut late) = (0, 0, 0);
    for (revision, events) in log.revisions() {
        for event in events {
            let effect = event.put.as_ref().and_then(|row| fence(&row.value));
            match (event.key.as_str(), effect) {
                (FENCED, Some(fence)) => {
                    if fence != holder {
                        let proof = format!(
                            "revision {revision}: effect of holder {fence}; \
                             the lock was created at {holder} (0: free)"
                        );
                        findings.add(Rule::LockBroken, proof);
                    }
                    if fence < newest {
                        let proof =
                            format!("revision {revision}: effect of {fence} after one of {newest}");
                        findings.add(Rule::LockBroken, proof);
                    }
                    newest = fence.max(newest);
                }
                (PLAIN, Some(fence)) => {
                    late += usize::from(fence < newest_plain);
                    newest_plain = fence.max(newest_plain);
                }
                _ => {}
            }
            if event.key == LOCK {
                holder = event.put.as_ref().map_or(0, |row| row.create);
            }
        }
    }
    late
}
