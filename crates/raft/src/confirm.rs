//! How a leader proves that it still leads, for reads: a quorum says to have voted in no later term
//! since the read began, so nobody else can have been elected, and nothing acknowledged, before it
//! (Raft dissertation, section 6.4). One question at a time is under way to each member, on a stream
//! that stays open; an answer serves everybody who waited when it was asked. It reads no data, writes
//! nothing, and does not prolong any lease.
//!
//! openraft's own proof sends each member a heartbeat as a call of its own and passes its core twice;
//! it stands in while a new leader has nothing of its own term applied.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures::SinkExt;
use futures::channel::mpsc;
use kelson_api::peer::ConfirmRequest;
use kelson_storage::failpoint;
use kelson_storage::sabotage::{self, Variant};
use openraft::errors::RaftError;
use openraft::{RaftState, ReadPolicy};
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::task::AbortHandle;
use tonic::Status;

use crate::peers::{Link, Peers};
use crate::progress::{Leading, Progress, Voters};
use crate::types::{Raft, TypeConfig, position};

/// Consensus has stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stopped;

/// The rounds of this member, as leader.
pub(crate) struct Confirm {
    member_id: u64,
    progress: Arc<Progress>,
    peers: Peers,
    /// Longest time of a round.
    election: Duration,
    /// Number of the newest round.
    wanted: watch::Sender<u64>,
    answers: Mutex<Answers>,
    answered: watch::Sender<()>,
    asking: Mutex<Asking>,
}

/// By member: the newest round that it answered, and the term that it confirmed then.
#[derive(Debug, Default)]
struct Answers(BTreeMap<u64, Answer>);

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Answer {
    term: u64,
    round: u64,
}

impl Answers {
    /// A member that was asked in `term`, for `round`, says to have voted last in `voted`. In a later
    /// term it may have elected somebody else, so that is no proof. Returns whether it is one.
    fn take(&mut self, id: u64, voted: u64, term: u64, round: u64) -> bool {
        let proves = voted <= term;
        if proves {
            self.0.insert(id, Answer { term, round });
        }
        proves
    }

    /// Whether a quorum confirmed this leader's term in `round` or later. `present` are voters of
    /// which it is known without an answer.
    fn agree(&self, leading: &Leading, round: u64, present: impl Fn(u64) -> bool) -> bool {
        let answered = |id| {
            let answer = self.0.get(&id).copied().unwrap_or_default();
            answer.term == leading.term && answer.round >= round
        };
        leading.voters.agree(|id| present(id) || answered(id))
    }
}

/// One task for each other voter.
#[derive(Default)]
struct Asking {
    closed: bool,
    voters: Option<Voters>,
    tasks: BTreeMap<u64, AbortHandle>,
}

/// Tells `progress` the membership that consensus goes by. To be run by consensus, so that it cannot
/// cross a change of it.
pub(crate) fn learn_voters(progress: &Progress, state: &RaftState<TypeConfig>) {
    let membership = state.membership_state.effective();
    let index = membership.log_id().as_ref().map_or(0, |id| position(id).index);
    progress.set_membership(index, membership.membership());
}

/// For etcd's robustness suite, see [`failpoint::save_sleeps`]; returns at once without failpoints.
pub(crate) async fn wait_for_sleeping_save() {
    while failpoint::save_sleeps() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

impl Confirm {
    pub(crate) fn new(
        member_id: u64,
        progress: Arc<Progress>,
        peers: Peers,
        election: Duration,
    ) -> Arc<Confirm> {
        Arc::new(Confirm {
            member_id,
            progress,
            peers,
            election,
            wanted: watch::Sender::new(0),
            answers: Mutex::default(),
            answered: watch::Sender::new(()),
            asking: Mutex::default(),
        })
    }

    /// Returns the index that a reader must have applied to see everything acknowledged before the
    /// call; `None` = this member does not lead, or no quorum said so within the election timeout.
    /// `asker`: a member that has itself just said to have voted in no later term than this member
    /// leads. Cancel safe.
    pub(crate) async fn index(
        self: &Arc<Self>,
        raft: &Raft,
        asker: Option<u64>,
    ) -> Result<Option<u64>, Stopped> {
        wait_for_sleeping_save().await;
        if !self.progress.knows_voters() {
            let progress = self.progress.clone();
            let learned = raft.with_raft_state(move |state| learn_voters(&progress, state));
            learned.await.map_err(|_| Stopped)?;
        }
        if let Some(leading) = self.progress.leading() {
            return Ok(self.round(leading, asker).await);
        }
        match raft.get_read_log_id(ReadPolicy::ReadIndex).await {
            // openraft counts from 0.
            Ok((read, _)) => Ok(Some(read.index() + 1)),
            Err(RaftError::Fatal(_)) => Err(Stopped),
            Err(RaftError::APIError(_)) => Ok(None),
        }
    }

    async fn round(self: &Arc<Self>, leading: Leading, asker: Option<u64>) -> Option<u64> {
        let present = |id| id == self.member_id || asker == Some(id);
        if !leading.voters.agree(present) && !sabotage::is(Variant::UnprovenLeader) {
            let mut answered = self.answered.subscribe();
            let round = self.begin(&leading.voters)?;
            let quorum = async {
                while !self.answers.lock().agree(&leading, round, present) {
                    // The sender lives as long as `self`.
                    answered.changed().await.ok()?;
                }
                Some(())
            };
            tokio::time::timeout(self.election, quorum).await.ok()??;
        }
        // The vote of this member counts, too.
        (self.progress.leading_term() == leading.term).then_some(leading.committed)
    }

    /// Opens a round and returns its number; `None` = closed.
    fn begin(self: &Arc<Self>, voters: &Voters) -> Option<u64> {
        let mut asking = self.asking.lock();
        if asking.closed {
            return None;
        }
        if asking.voters.as_ref() != Some(voters) {
            let ids = voters.ids();
            asking.tasks.retain(|id, task| {
                let stays = ids.contains(id);
                if !stays {
                    task.abort();
                }
                stays
            });
            for id in ids.into_iter().filter(|id| *id != self.member_id) {
                let spawn = || tokio::spawn(self.clone().ask(id)).abort_handle();
                asking.tasks.entry(id).or_insert_with(spawn);
            }
            asking.voters = Some(voters.clone());
        }
        let mut round = 0;
        self.wanted.send_modify(|wanted| {
            *wanted += 1;
            round = *wanted;
        });
        Some(round)
    }

    /// Ends all rounds.
    pub(crate) fn close(&self) {
        let mut asking = self.asking.lock();
        asking.closed = true;
        for task in std::mem::take(&mut asking.tasks).into_values() {
            task.abort();
        }
    }

    /// Asks a member, once for all rounds that were opened before, until it is aborted.
    async fn ask(self: Arc<Self>, id: u64) {
        let link = self.peers.link(id);
        let mut wanted = self.wanted.subscribe();
        let mut done = 0;
        loop {
            let before = done;
            let ended = self.converse(&link, id, &mut wanted, &mut done).await;
            if let Err(status) = ended {
                let member = format!("{id:x}");
                tracing::debug!("remote-peer-id" = member, error = status.message(), "no proof");
            }
            // A stream that had worked may only be an old one.
            if done == before {
                tokio::time::sleep(self.election / 5).await;
            }
        }
    }

    /// Asks on one stream until it fails or ends.
    async fn converse(
        &self,
        link: &Link,
        id: u64,
        wanted: &mut watch::Receiver<u64>,
        done: &mut u64,
    ) -> Result<(), Status> {
        let late = || Status::deadline_exceeded(format!("no answer within {:?}", self.election));
        // Opened when it is needed: a member that does not lead asks nobody.
        let round = self.wanted_after(wanted, *done).await?;
        if self.progress.leading_term() == 0 {
            *done = round;
            return Ok(());
        }
        let (mut requests, receiver) = mpsc::channel(1);
        let mut client = link.control();
        let call = client.confirm(receiver);
        let answer =
            tokio::time::timeout(self.election, call).await.unwrap_or_else(|_| Err(late()));
        let mut replies = self.peers.check_answer(link, answer)?;
        loop {
            let round = self.wanted_after(wanted, *done).await?;
            // Read before the question is sent: the answer is about this term or a later one.
            let term = self.progress.leading_term();
            if term == 0 {
                *done = round;
                continue;
            }
            let closed = |_| Status::unavailable("the stream has ended");
            requests.send(ConfirmRequest {}).await.map_err(closed)?;
            let reply = tokio::time::timeout(self.election, replies.message()).await;
            let Some(reply) = reply.map_err(|_| late())?? else { return Ok(()) };
            if self.answers.lock().take(id, reply.voted_term, term, round) {
                self.answered.send_replace(());
            }
            *done = round;
        }
    }

    /// The newest round, once there is one after `done`.
    async fn wanted_after(
        &self,
        wanted: &mut watch::Receiver<u64>,
        done: u64,
    ) -> Result<u64, Status> {
        let round = wanted.wait_for(|round| *round > done).await;
        // The sender lives as long as `self`.
        round.map(|round| *round).map_err(|_| Status::aborted("closed"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leading(term: u64, voters: Voters) -> Leading {
        Leading { term, committed: 7, voters }
    }

    /// This member, the leader.
    fn itself(id: u64) -> bool {
        id == 1
    }

    #[test]
    fn a_voter_of_a_later_term_proves_nothing() {
        let leads = leading(4, Voters::of([&[1, 2, 3]]));
        let mut answers = Answers::default();
        assert!(!answers.take(2, 5, 4, 1));
        assert!(!answers.agree(&leads, 1, itself));
        assert!(answers.take(2, 4, 4, 1));
        assert!(answers.agree(&leads, 1, itself));
        // It missed the election of this leader, and has voted for nobody since.
        assert!(answers.take(3, 2, 4, 2));
        assert!(answers.agree(&leads, 2, itself));
    }

    #[test]
    fn an_answer_counts_for_its_term_and_its_round() {
        let voters = Voters::of([&[1, 2, 3]]);
        let mut answers = Answers::default();
        answers.take(2, 4, 4, 3);
        assert!(answers.agree(&leading(4, voters.clone()), 3, itself));
        assert!(!answers.agree(&leading(4, voters.clone()), 4, itself), "asked before the read");
        // The same member leads again, two terms later: somebody else may have led in between.
        assert!(!answers.agree(&leading(6, voters), 3, itself));
    }

    #[test]
    fn both_sets_of_a_change_must_agree() {
        let leads = leading(4, Voters::of([&[1, 2, 3], &[1, 4, 5]]));
        let mut answers = Answers::default();
        answers.take(2, 4, 4, 1);
        answers.take(3, 4, 4, 1);
        assert!(!answers.agree(&leads, 1, itself));
        answers.take(5, 4, 4, 1);
        assert!(answers.agree(&leads, 1, itself));
    }
}
