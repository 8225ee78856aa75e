//! How far this member is: the numbers that every request looks at, kept where reading them costs
//! next to nothing. Written by the log store, the state machine and what is sent to other members; it
//! decides nothing but whether a read may be answered from local state, and whose word a leader needs
//! to know that it leads.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use kelson_storage::LogId as Position;
use parking_lot::Mutex;

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
    /// The newest term in which this member has voted or followed.
    voted_term: AtomicU64,
    /// The newest membership in the log has this member as its only voter.
    sole_voter: AtomicBool,
    /// The voters of the newest membership in the log; `None` = to be asked of consensus.
    voters: Mutex<Option<(u64, Voters)>>,
    started: Instant,
    /// When a leader was last heard, in milliseconds since `started`, plus one; 0 = never.
    heard: AtomicU64,
}

/// Who votes: in a change of the membership by two sets, each of which must agree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Voters(Arc<[BTreeSet<u64>]>);

impl Voters {
    #[cfg(test)]
    pub(crate) fn of<const N: usize>(sets: [&[u64]; N]) -> Self {
        Self(sets.map(|set| set.iter().copied().collect()).into())
    }

    /// Whether those for whom `agrees` is true are a majority of each set.
    pub(crate) fn agree(&self, agrees: impl Fn(u64) -> bool) -> bool {
        let majority =
            |set: &BTreeSet<u64>| 2 * set.iter().filter(|id| agrees(**id)).count() > set.len();
        self.0.iter().all(majority)
    }

    /// All of them, each once.
    pub(crate) fn ids(&self) -> BTreeSet<u64> {
        self.0.iter().flatten().copied().collect()
    }
}

/// What a leader knows before it asks whether it still leads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Leading {
    /// It has committed an entry in this term.
    pub(crate) term: u64,
    /// Index up to which entries may have been acknowledged, if it leads.
    pub(crate) committed: u64,
    pub(crate) voters: Voters,
}

impl Progress {
    /// `voted_term` is that of the vote on disk.
    pub(crate) fn new(
        member_id: u64,
        voted_term: u64,
        applied: Position,
        last: Position,
    ) -> Progress {
        Progress {
            member_id,
            last: AtomicU64::new(last.index.max(applied.index)),
            committed: AtomicU64::new(applied.index),
            applied: AtomicU64::new(applied.index),
            applied_term: AtomicU64::new(applied.term),
            leading_term: AtomicU64::new(0),
            voted_term: AtomicU64::new(voted_term),
            sole_voter: AtomicBool::new(false),
            voters: Mutex::new(None),
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
        // No candidate may hear of this vote before those who ask here for the newest one.
        self.voted_term.fetch_max(vote.leader_id.term, Ordering::SeqCst);
        self.leading_term.store(term, Ordering::SeqCst);
    }

    /// The newest term in which this member has voted or followed: it will not help to elect a leader
    /// of an earlier one.
    pub(crate) fn voted_term(&self) -> u64 {
        self.voted_term.load(Ordering::SeqCst)
    }

    /// The term that this member leads, as far as it knows; 0 = none.
    pub(crate) fn leading_term(&self) -> u64 {
        self.leading_term.load(Ordering::SeqCst)
    }

    /// Called with each membership and the index of its entry (0 = none) before any other member can
    /// see it. An earlier one than is known is ignored.
    pub(crate) fn set_membership(&self, index: u64, membership: &Membership) {
        let mut voters = self.voters.lock();
        if voters.as_ref().is_some_and(|(known, _)| *known > index) {
            return;
        }
        let sets = membership.get_joint_config();
        *voters = (!sets.is_empty()).then(|| (index, Voters(sets.as_slice().into())));
        let sole = membership.voter_ids().eq([self.member_id]);
        self.sole_voter.store(sole, Ordering::Release);
    }

    /// Entries behind `index` were taken out of the log, or it was replaced (0).
    pub(crate) fn forget_membership(&self, index: u64) {
        let mut voters = self.voters.lock();
        if index == 0 || voters.as_ref().is_some_and(|(known, _)| *known > index) {
            *voters = None;
            self.sole_voter.store(false, Ordering::Release);
        }
    }

    pub(crate) fn knows_voters(&self) -> bool {
        self.voters.lock().is_some()
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

    /// What must be confirmed by a quorum before a read; `None` = this member does not lead, or has not
    /// yet applied an entry of its own term: what was acknowledged before may lie behind what it knows
    /// to be committed.
    ///
    /// Once confirmed, `committed` covers every acknowledged write: this member applies nothing, and
    /// tells no other member to, that it has not counted as committed here first.
    pub(crate) fn leading(&self) -> Option<Leading> {
        let term = self.leading_term();
        if term == 0 || self.applied_term.load(Ordering::Acquire) != term {
            return None;
        }
        let (_, voters) = self.voters.lock().clone()?;
        Some(Leading { term, committed: self.committed(), voters })
    }

    /// Whether local state is linearizable as it stands: this member is the only voter, leads, and
    /// has applied an entry of its own term, hence everything acknowledged before. No other member
    /// can then have acknowledged a write, and our own are acknowledged after they are applied.
    pub(crate) fn reads_are_local(&self) -> bool {
        let leading = self.leading_term();
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
        let progress = Progress::new(7, 1, Position { term: 1, index: 5 }, Position::default());
        assert!(!progress.reads_are_local());
        progress.set_membership(6, &membership(&[7]));
        progress.set_vote(&Vote::new(2, 7));
        assert!(!progress.reads_are_local(), "a candidate does not lead");
        progress.set_vote(&Vote::new_committed(2, 7));
        assert!(!progress.reads_are_local(), "nothing of term 2 is applied");
        progress.set_applied(Position { term: 2, index: 6 });
        assert!(progress.reads_are_local());
        progress.set_membership(6, &membership(&[7, 8]));
        assert!(!progress.reads_are_local(), "another voter may lead");
        progress.set_membership(6, &membership(&[7]));
        assert!(progress.reads_are_local());
        progress.set_vote(&Vote::new_committed(3, 8));
        assert!(!progress.reads_are_local(), "deposed");
    }

    #[test]
    fn each_set_of_voters_must_agree() {
        let sets = [BTreeSet::from([1, 2, 3]), BTreeSet::from([3, 4])];
        let voters = Voters(sets.as_slice().into());
        assert_eq!(voters.ids(), BTreeSet::from([1, 2, 3, 4]));
        for (who, agreed) in
            [(&[1_u64, 2][..], false), (&[3, 4], false), (&[1, 3, 4], true), (&[1, 2, 3], false)]
        {
            assert_eq!(voters.agree(|id| who.contains(&id)), agreed, "{who:?}");
        }
    }

    #[test]
    fn a_leader_asks_the_voters_of_the_newest_membership() {
        let progress = Progress::new(7, 1, Position { term: 1, index: 5 }, Position::default());
        progress.set_vote(&Vote::new_committed(2, 7));
        progress.set_membership(6, &membership(&[7, 8, 9]));
        assert_eq!(progress.leading(), None, "nothing of term 2 is applied");
        progress.set_applied(Position { term: 2, index: 6 });
        progress.set_committed(9);
        let leading = progress.leading().expect("it leads");
        assert_eq!((leading.term, leading.committed), (2, 9));
        assert_eq!(leading.voters.ids(), BTreeSet::from([7, 8, 9]));

        progress.set_membership(5, &membership(&[7]));
        let leading = progress.leading().expect("it leads");
        assert_eq!(
            leading.voters.ids(),
            BTreeSet::from([7, 8, 9]),
            "an older one was learned late"
        );
        progress.set_membership(8, &membership(&[7]));
        progress.forget_membership(8);
        assert!(progress.knows_voters() && progress.is_sole_voter());
        progress.forget_membership(7);
        assert!(!progress.knows_voters() && !progress.is_sole_voter(), "its entry is gone");
        assert_eq!(progress.leading(), None);
        progress.set_membership(6, &membership(&[7, 8]));
        assert!(progress.leading().is_some());

        assert_eq!(progress.voted_term(), 2);
        progress.set_vote(&Vote::new(3, 8));
        assert_eq!((progress.voted_term(), progress.leading_term()), (3, 0));
        assert_eq!(progress.leading(), None, "deposed");
    }
}
