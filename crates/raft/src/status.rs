//! What a member knows of its cluster, in our own words: leader, term, positions. One task follows
//! openraft's metrics and publishes changes of leadership; positions are read when asked for, so
//! that a write wakes nobody here. A leader counts only while a quorum has acknowledged it, or while it
//! was heard, within the election timeout: openraft's own leader keeps its role without a quorum.

use std::sync::Arc;
use std::time::Duration;

use openraft::async_runtime::watch::WatchReceiver;
use openraft::metrics::RaftServerMetrics;
use openraft::{Instant, ServerState};
use tokio::sync::watch;

use crate::progress::Progress;
use crate::types::{Raft, TypeConfig};

/// A member's view of its cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    /// Id of the cluster.
    pub cluster_id: u64,
    /// Id of this member.
    pub member_id: u64,
    /// The leader, if there is one that a quorum follows.
    pub leader: Option<u64>,
    /// This member is that leader.
    pub is_leader: bool,
    /// This member has no vote and is to have none until it is promoted.
    pub is_learner: bool,
    /// This member is to have a vote and has none yet: the others are a quorum without it, or are not.
    /// It lasts from its addition until it has caught up.
    pub awaits_vote: bool,
    /// The current term.
    pub term: u64,
    /// Index of the last entry in the log, from 1.
    pub last_index: u64,
    /// Index up to which entries are known to be committed.
    pub committed_index: u64,
    /// Index up to which entries are applied here.
    pub applied_index: u64,
    /// How often a new leader was seen since the start of this process.
    pub leader_changes: u64,
}

/// What a member has counted since it started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Proposals whose callers wait now.
    pub proposals_pending: u64,
    /// Proposals that got no outcome: refused, timed out, stopped.
    pub proposals_failed: u64,
    /// Read barriers that failed.
    pub reads_failed: u64,
    /// Read barriers that took more than half the request timeout.
    pub reads_slow: u64,
}

impl Status {
    pub(crate) fn initial(cluster_id: u64, member_id: u64, term: u64) -> Status {
        Status {
            cluster_id,
            member_id,
            leader: None,
            is_leader: false,
            is_learner: false,
            awaits_vote: false,
            term,
            last_index: 0,
            committed_index: 0,
            applied_index: 0,
            leader_changes: 0,
        }
    }

    /// With the positions of this moment.
    pub(crate) fn at(mut self, progress: &Progress) -> Status {
        self.applied_index = progress.applied();
        self.committed_index = progress.committed().max(self.applied_index);
        self.last_index = progress.last().max(self.committed_index);
        self
    }

    fn follow(
        &mut self,
        metrics: &RaftServerMetrics<TypeConfig>,
        view: View,
        last_leader: &mut Option<u64>,
    ) {
        let membership = metrics.membership_config.membership();
        let leader = match metrics.state {
            ServerState::Leader => view.has_quorum.then_some(self.member_id),
            ServerState::Learner | ServerState::Follower => {
                let other = metrics.current_leader.filter(|leader| *leader != self.member_id);
                other.filter(|_| view.has_heard)
            }
            ServerState::Candidate | ServerState::Shutdown => None,
        };
        if leader.is_some() && leader != *last_leader {
            self.leader_changes += 1;
            *last_leader = leader;
        }
        self.leader = leader;
        self.is_leader = leader == Some(self.member_id);
        self.is_learner = membership.get_node(&self.member_id).is_some()
            && !membership.voter_ids().any(|id| id == self.member_id);
        // While voters change, the old ones decide as well as the new ones. Who has just joined knows of
        // no voters at all.
        let configs = membership.get_joint_config();
        self.awaits_vote =
            configs.is_empty() || configs.iter().any(|voters| !voters.contains(&self.member_id));
        self.term = metrics.vote.leader_id.term;
    }
}

/// How fresh the signs of a leader are.
#[derive(Clone, Copy, Debug)]
struct View {
    /// A quorum has acknowledged this member as leader within the election timeout.
    has_quorum: bool,
    /// A leader was heard within the election timeout.
    has_heard: bool,
}

impl View {
    fn now(raft: &Raft, progress: &Progress, election: Duration) -> View {
        let acknowledged = {
            let metrics = raft.data_metrics();
            let acked = metrics.borrow_watched().last_quorum_acked;
            acked.map(|at| at.elapsed())
        };
        let is_fresh = |since: Duration| since < election;
        View {
            // The only voter is a quorum by itself.
            has_quorum: progress.is_sole_voter() || acknowledged.is_some_and(is_fresh),
            has_heard: progress.since_heard().is_some_and(|since| since < election),
        }
    }
}

/// How often the freshness of a leader is looked at.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pace {
    pub(crate) heartbeat: Duration,
    pub(crate) election: Duration,
}

/// Publishes changes of leadership, term and role until openraft stops.
pub(crate) async fn follow(
    raft: Raft,
    progress: Arc<Progress>,
    status: watch::Sender<Status>,
    pace: Pace,
) {
    let mut metrics = raft.server_metrics();
    let mut last_leader = None;
    loop {
        let seen = metrics.borrow_watched().clone();
        let view = View::now(&raft, &progress, pace.election);
        let mut has_leader = false;
        status.send_if_modified(|status| {
            let before = status.clone();
            status.follow(&seen, view, &mut last_leader);
            has_leader = status.leader.is_some();
            let changed = *status != before;
            *status = status.clone().at(&progress);
            changed
        });
        // Nobody tells when a quorum acknowledges a new leader for the first time, or when the old one
        // falls silent.
        let pause = if has_leader { pace.heartbeat } else { pace.heartbeat / 10 };
        match tokio::time::timeout(pause, metrics.changed()).await {
            Ok(Ok(())) | Err(_) => {}
            Ok(Err(_)) => break,
        }
    }
    status.send_modify(|status| {
        status.leader = None;
        status.is_leader = false;
    });
}
