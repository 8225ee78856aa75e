//! The end of a run: all members hold the same, it is what the log says, and every watcher got there.

use super::log::show;
use super::{Findings, Log, Rule};
use crate::history::Final;

pub(super) fn check(finals: &[Final], log: &Log, findings: &mut Findings) {
    for pair in finals.windows(2) {
        let [one, other] = pair else { continue };
        let fingerprint = |last: &Final| (last.hash, last.compacted, last.revision);
        if fingerprint(one) != fingerprint(other) {
            let proof = format!(
                "hash at revision {}: member {} has {:08x} (compacted {}), member {} {:08x} ({})",
                one.revision,
                one.member,
                one.hash,
                one.compacted,
                other.member,
                other.hash,
                other.compacted
            );
            findings.add(Rule::FinalState, proof);
        }
    }
    for last in finals {
        contents(last, log, findings);
        if last.watched < last.revision {
            let proof = format!(
                "member {}: the watcher came to {} of {}",
                last.member, last.watched, last.revision
            );
            findings.add(Rule::WatchBehind, proof);
        }
    }
}

fn contents(last: &Final, log: &Log, findings: &mut Findings) {
    let expected = log.all_at(last.revision);
    for index in 0..last.rows.len().max(expected.len()) {
        let (got, want) = (last.rows.get(index), expected.get(index).copied());
        if got != want {
            let proof = format!(
                "member {} at revision {}: holds {}, the log has {}",
                last.member,
                last.revision,
                show(got),
                show(want)
            );
            findings.add(Rule::FinalState, proof);
            return;
        }
    }
}
