//! The judges: pure functions from a recorded history to violations. They never talk to a member and
//! know nothing of faults, so that a history can be judged again from its files.

mod append;
mod bank;
mod cache;
mod compact;
mod cycle;
mod eval;
mod finals;
mod lease;
mod linear;
mod lock;
mod log;
mod members;
mod order;
mod set;
mod watch;

use std::fmt;

use crate::history::{Call, History, Outcome};

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
    /// Watch: an event outside of what was asked for.
    WatchFilter,
    /// Watch: an event that differs from the log.
    WatchContent,
    /// An element of a set is gone.
    SetLost,
    /// An element that nobody added, or added in vain, or that is there twice.
    SetPhantom,
    /// List: elements of a transaction that failed or never was (G1a).
    ListAborted,
    /// List: elements of a transaction that had not ended (G1b).
    ListIntermediate,
    /// List: a transaction that does not see its own doing.
    ListInternal,
    /// List: two reads that no order of appends explains.
    ListOrder,
    /// Transactions in a circle of overwriting.
    CycleG0,
    /// Transactions in a circle of overwriting and reading.
    CycleG1c,
    /// Transactions in a circle in which one did not see another.
    CycleGSingle,
    /// Transactions in a circle in which several did not see others.
    CycleG2,
    /// Transactions in a circle that time closes.
    CycleTime,
    /// Money made or lost.
    Unbalanced,
    /// A lease that ended before its time.
    LeaseEarly,
    /// A lease that outlived its time by far.
    LeaseLate,
    /// An ended lease that is used or renewed.
    LeaseRisen,
    /// The end of a lease that left keys on it.
    LeaseEnd,
    /// A fenced effect of one who did not hold the lock.
    LockBroken,
    /// A cache kept by list and watch that differs from the log.
    WrongCache,
    /// An answer about what was compacted before the question.
    NotCompacted,
    /// "Compacted" or "future" where it was neither.
    WrongRefusal,
    /// A member list that contradicts what was changed.
    WrongMembers,
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
    let compacted = history.ops.iter().filter_map(|op| match op.call {
        Call::Compact { revision } if op.outcome != Outcome::Fail => Some(revision),
        _ => None,
    });
    let compacted = compacted.max().unwrap_or(0);
    let log = Log::merge(&history.watches, compacted, &mut findings);
    log.check(history.sparse, &mut findings);
    watch::check(&history.watches, &log, compacted, &mut findings);
    order::check(&history.ops, &history.watches, &log, &mut findings);
    let undecided = linear::check(&history.ops, &mut findings);
    if undecided > 0 {
        println!("second judge: {undecided} keys undecided, too many operations at a time");
    }
    finals::check(&history.finals, &log, &mut findings);
    let late = special(history, &log, &mut findings);
    if late > 0 {
        println!("plain lock: {late} effects after those of a later holder, as is to be expected");
    }
    for (rule, count) in &findings.counts {
        if *count > MOST {
            let proof = format!("{count} times in all; the first {MOST} are shown");
            findings.all.push(Violation { rule: *rule, proof });
        }
    }
    findings.all.sort_by_key(|violation| violation.rule);
    findings.all
}

/// The judges of single workloads; each looks only at the calls and notes that are its own. Gives the
/// number of effects by which the plain lock failed, which is no violation.
fn special(history: &History, log: &Log, findings: &mut Findings) -> usize {
    set::check(&history.ops, findings);
    append::check(&history.notes, findings);
    bank::check(&history.ops, findings);
    lease::check(history, log, findings);
    compact::check(&history.ops, &history.watches, findings);
    cache::check(&history.notes, &history.ops, log, findings);
    members::check(&history.ops, findings);
    lock::check(log, findings)
}
