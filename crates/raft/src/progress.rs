//! How far this member is, in atomics: the numbers that every request looks at, kept where reading
//! them costs nothing. Written by the log store and the state machine only; it decides nothing but
//! whether a read may be answered from local state.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use kelson_storage::LogId as Position;

use crate::types::{Membership, Vote};

/// Positions are storage indexes: the first entry has index 1.
#[derive(Debug)]
pub(crate) struct Progress {
    member_id: u64,
    last: AtomicU64,
    committed: AtomicU64,
    applied: AtomicU64,
    /// Term of the last applied entry.
    applied_term: AtomicU64,
    /// The term this member leads; 0 = none that it knows of.
    leading_term: AtomicU64,
    /// The newest membership in the log has this member as its only voter.
    sole_voter: AtomicBool,
    started: Instant,
    /// When a leader was last heard, in milliseconds since `started`, plus one; 0 = never.
    heard: AtomicU64,
}

impl Progress {
    pub(crate) fn new(member_id: u64, applied: Position, last: Position) -> Progress {
        Progress {
            member_id,
            last: AtomicU64::new(last.index.max(applied.index)),
            committed: AtomicU64::new(applied.index),
            applied: AtomicU64::new(applied.index),
            applied_term: AtomicU64::new(applied.term),
            leading_term: AtomicU64::new(0),
            sole_voter: AtomicBool::new(false),
            started: Instant::now(),
            heard: AtomicU64::new(0),
        }
    }

    pub(crate) fn last(&self) -> u64 {
        self.last.load(Ordering::Acquire)
    }

    pub(crate) fn committed(&self) -> u64 {
        self.committed.load(Ordering::Acquire)
    }

    pub(crate) fn applied(&self) -> u64 {
        self.applied.load(Ordering::Acquire)
    }

    pub(crate) fn set_last(&self, index: u64) {
        self.last.store(index, Ordering::Release);
    }

    pub(crate) fn set_committed(&self, index: u64) {
        self.committed.fetch_max(index, Ordering::AcqRel);
    }

    pub(crate) fn set_applied(&self, id: Position) {
        // An entry read back after a restart may be applied before its commit is announced.
        self.set_committed(id.index);
        self.applied.store(id.index, Ordering::Release);
        self.applied_term.store(id.term, Ordering::Release);
    }

    /// Called with each vote before consensus goes on with it.
    pub(crate) fn set_vote(&self, vote: &Vote) {
        let leads = vote.committed && vote.leader_id.voted_for == self.member_id;
        let term = if leads { vote.leader_id.term } else { 0 };
        self.leading_term.store(term, Ordering::Release);
    }

    /// Called with each membership before any other member can see its entry.
    pub(crate) fn set_membership(&self, membership: &Membership) {
        let sole = membership.voter_ids().eq([self.member_id]);
        self.sole_voter.store(sole, Ordering::Release);
    }

    /// A leader's entries or heartbeat were accepted.
    pub(crate) fn note_heard(&self) {
        let now = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX - 1);
        self.heard.fetch_max(now + 1, Ordering::AcqRel);
    }

    /// How long ago a leader was heard; `None` = never.
    pub(crate) fn since_heard(&self) -> Option<Duration> {
        let heard = self.heard.load(Ordering::Acquire).checked_sub(1)?;
        Some(self.started.elapsed().saturating_sub(Duration::from_millis(heard)))
    }

    pub(crate) fn is_sole_voter(&self) -> bool {
        self.sole_voter.load(Ordering::Acquire)
    }

    /// Whether local state is linearizable as it stands: this member is the only voter, leads, and
    /// has applied an entry of its own term, hence everything acknowledged before. No other member
    /// can then have acknowledged a write, and our own are acknowledged after they are applied.
    pub(crate) fn reads_are_local(&self) -> bool {
        let leading = self.leading_term.load(Ordering::Acquire);
        leading != 0
            && self.applied_term.load(Ordering::Acquire) == leading
            && self.sole_voter.load(Ordering::Acquire)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use super::*;
    use crate::types::Peer;

    fn membership(ids: &[u64]) -> Membership {
        let nodes: BTreeMap<u64, Peer> = ids.iter().map(|id| (*id, Peer::default())).collect();
        Membership::new(vec![ids.iter().copied().collect::<BTreeSet<u64>>()], nodes)
            .expect("every voter has a node")
    }

    #[test]
    fn local_reads_need_sole_vote_leadership_and_an_entry_of_the_term() {
        let progress = Progress::new(7, Position { term: 1, index: 5 }, Position::default());
        assert!(!progress.reads_are_local());
        progress.set_membership(&membership(&[7]));
        progress.set_vote(&Vote::new(2, 7));
        assert!(!progress.reads_are_local(), "a candidate does not lead");
        progress.set_vote(&Vote::new_committed(2, 7));
        assert!(!progress.reads_are_local(), "nothing of term 2 is applied");
        progress.set_applied(Position { term: 2, index: 6 });
        assert!(progress.reads_are_local());
        progress.set_membership(&membership(&[7, 8]));
        assert!(!progress.reads_are_local(), "another voter may lead");
        progress.set_membership(&membership(&[7]));
        assert!(progress.reads_are_local());
        progress.set_vote(&Vote::new_committed(3, 8));
        assert!(!progress.reads_are_local(), "deposed");
    }
}
