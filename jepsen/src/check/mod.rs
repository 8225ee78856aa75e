//! The judges: pure functions from a recorded history to violations. They never talk to a member and
//! know nothing of faults, so that a history can be judged again from its files.

mod finals;
mod linear;
mod log;
mod order;
mod watch;

use std::fmt;

use crate::history::History;

pub(crate) use log::Log;

/// A broken promise, with the proof in one line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Violation {
    pub(crate) rule: Rule,
    pub(crate) proof: String,
}

/// What a violation breaks. The names are those of the report.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Rule {
    /// Two members showed different events for one revision.
    Divergence,
    /// A revision that nobody showed although later ones were shown.
    Hole,
    /// An acknowledged write that is not where its answer said.
    LostWrite,
    /// A write that certainly failed took effect.
    FailedWrite,
    /// A value took effect twice, or nobody wrote it, or a delete nobody asked for.
    Unexplained,
    /// An answer that differs from the store at the revision of its header.
    WrongRead,
    /// A compare that was judged against the state of the store.
    WrongCompare,
    /// An older state after a newer one was seen.
    Stale,
    /// One key's values fit no order of its operations, revisions aside.
    NotLinearizable,
    /// Create revision, version or previous value of an event contradict the events before.
    WrongEvent,
    /// Watch: a revision after a later one.
    WatchOrder,
    /// Watch: the same event twice.
    WatchTwice,
    /// Watch: an event missing.
    WatchGap,
    /// Watch: one revision in two responses.
    WatchSplit,
    /// Watch: progress promised for events that came later.
    WatchProgress,
    /// A watcher that never reached the end.
    WatchBehind,
    /// Members end with different hashes or contents.
    FinalState,
}

impl fmt::Display for Violation {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{:?}: {}", self.rule, self.proof)
    }
}

/// Collects violations; at most `MOST` of a rule are kept, since one cause breaks thousands of reads.
#[derive(Default)]
pub(crate) struct Findings {
    all: Vec<Violation>,
    counts: std::collections::BTreeMap<Rule, usize>,
}

/// Proofs kept per rule.
const MOST: usize = 20;

impl Findings {
    pub(crate) fn add(&mut self, rule: Rule, proof: String) {
        let count = self.counts.entry(rule).or_default();
        *count += 1;
        if *count <= MOST {
            self.all.push(Violation { rule, proof });
        }
    }
}

/// All checks over one history. An empty result means that no promise was seen broken.
pub(crate) fn judge(history: &History) -> Vec<Violation> {
    let mut findings = Findings::default();
    let log = Log::merge(&history.watches, &mut findings);
    log.check(history.sparse, &mut findings);
    watch::check(&history.watches, &log, &mut findings);
    order::check(&history.ops, &history.watches, &log, &mut findings);
    let undecided = linear::check(&history.ops, &mut findings);
    if undecided > 0 {
        println!("second judge: {undecided} keys undecided, too many operations at a time");
    }
    finals::check(&history.finals, &log, &mut findings);
    for (rule, count) in &findings.counts {
        if *count > MOST {
            let proof = format!("{count} times in all; the first {MOST} are shown");
            findings.all.push(Violation { rule: *rule, proof });
        }
    }
    findings.all.sort_by_key(|violation| violation.rule);
    findings.all
}
