//! Changes of who belongs to the cluster. The leader makes them, one at a time, each as a log entry
//! that carries openraft's membership and the new row of the members table together; other members
//! ask it to. A new voter enters as a learner of consensus and gets its vote when it has caught up,
//! without anybody asking: a blank voter would stall every commit. The members table tells clients
//! what was asked for. No rule of etcd's API about when a change is wise is here: that is the server's.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use kelson_api::command::{Batch, Command, MembersChange, command::Op};
use kelson_api::etcdserverpb::Member;
use kelson_api::peer::change_members_request::Change;
use kelson_api::peer::{AddMember, ChangeMembersRequest, UpdateMember};
use kelson_api::{Error, Message};
use kelson_storage::Reader;
use kelson_storage::sabotage::{self, Variant};
use openraft::async_runtime::watch::WatchReceiver;
use openraft::errors::{ChangeMembershipError, ClientWriteError, RaftError};
use openraft::raft::ChangeMembershipRequest;
use openraft::{ChangeMembers, ServerState};
use tokio::sync::watch;

use crate::config::NodeConfig;
use crate::identity::added_member_id;
use crate::peers::Peers;
use crate::status::Status;
use crate::types::{Commands, Payload, Peer, Raft};

/// A change of the cluster's members.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MemberChange {
    /// A new member, as etcd's MemberAdd.
    Add {
        /// Where it will listen.
        peer_urls: Vec<String>,
        /// Without a vote until it is promoted.
        is_learner: bool,
    },
    /// Gives a learner its vote.
    Promote(u64),
    /// Moves a member's peer URLs.
    Update {
        /// The member.
        id: u64,
        /// Its new URLs.
        peer_urls: Vec<String>,
    },
    /// Takes a member out for ever.
    Remove(u64),
}

impl MemberChange {
    /// The message to the leader, and the id of the member concerned. A new id is made here, from the
    /// clock of the asking member, as etcd does.
    pub(crate) fn request(self) -> (u64, ChangeMembersRequest) {
        let (id, change) = match self {
            MemberChange::Add { peer_urls, is_learner } => {
                let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
                let id = added_member_id(&peer_urls, now);
                (id, Change::Add(AddMember { id, peer_urls, is_learner }))
            }
            MemberChange::Promote(id) => (id, Change::Promote(id)),
            MemberChange::Update { id, peer_urls } => {
                (id, Change::Update(UpdateMember { id, peer_urls }))
            }
            MemberChange::Remove(id) => (id, Change::Remove(id)),
        };
        (id, ChangeMembersRequest { change: Some(change) })
    }
}

/// Pause before a change is tried again that met another one under way.
const BUSY_PAUSE: Duration = Duration::from_millis(20);
/// How often the leader looks for learners that have caught up.
const LOOK_EVERY: Duration = Duration::from_millis(250);
/// Log entries that a new voter may lack when it gets its vote.
const CAUGHT_UP: u64 = 1_000;

/// The leader's side.
pub(crate) struct Members {
    raft: Raft,
    reader: Reader,
    peers: Peers,
    timeout: Duration,
    learners_max: usize,
    /// One change at a time.
    turn: tokio::sync::Mutex<()>,
}

impl Members {
    pub(crate) fn new(
        raft: Raft,
        reader: Reader,
        peers: Peers,
        config: &NodeConfig,
    ) -> Arc<Members> {
        let (timeout, learners_max) = (config.request_timeout(), config.learners_max);
        let turn = tokio::sync::Mutex::default();
        Arc::new(Members { raft, reader, peers, timeout, learners_max, turn })
    }

    /// Makes a change and returns the index of its entry, which is applied here.
    ///
    /// # Errors
    /// `NotLeader`; `MemberNotFound`, `MemberExists`, `PeerUrlExists`, `MemberNotLearner`,
    /// `LearnerNotReady`, `TooManyLearners`; `Timeout`, then the outcome is unknown.
    pub(crate) async fn change(&self, request: ChangeMembersRequest) -> Result<u64, Error> {
        let change = request.change.ok_or(Error::MemberNotFound)?;
        let changing = async {
            let _turn = self.turn.lock().await;
            // The table must be as new as the change: everything committed before is applied first.
            let barrier = self.raft.ensure_linearizable(openraft::ReadPolicy::ReadIndex).await;
            barrier.map_err(|error| match error {
                RaftError::Fatal(_) => Error::Stopped,
                RaftError::APIError(_) => Error::NotLeader,
            })?;
            self.finish().await?;
            let (members, steps) = self.plan(change)?;
            let mut index = 0;
            for step in steps {
                index = self.write(step, &members).await?;
            }
            Ok(index)
        };
        tokio::time::timeout(self.timeout, changing).await.unwrap_or(Err(Error::Timeout))
    }

    /// What consensus has to do, and the row that goes with it.
    fn plan(
        &self,
        change: Change,
    ) -> Result<(MembersChange, Vec<ChangeMembers<u64, Peer>>), Error> {
        let members = self.reader.members();
        let find = |id| members.iter().find(|member| member.id == id).cloned();
        let taken = |urls: &[String], except: u64| {
            let mut others = members.iter().filter(|member| member.id != except);
            others.any(|member| member.peer_ur_ls.iter().any(|url| urls.contains(url)))
        };
        let put = |member| MembersChange { put: vec![member], remove: Vec::new() };
        let node = |id, urls: &[String]| {
            BTreeMap::from([(id, Peer { name: String::new(), peer_urls: urls.to_vec() })])
        };
        match change {
            Change::Add(AddMember { id, peer_urls, is_learner }) => {
                // Two requests of one second have one id: the URLs say more.
                if taken(&peer_urls, 0) {
                    return Err(Error::PeerUrlExists);
                }
                // An id that was used up is unknown, as for every other change of it.
                if self.reader.removed_members().contains(&id) {
                    return Err(Error::MemberNotFound);
                }
                if find(id).is_some() {
                    return Err(Error::MemberExists);
                }
                // The server has asked that too, of a table without what is under way.
                let learners = members.iter().filter(|member| member.is_learner).count();
                if is_learner && learners >= self.learners_max {
                    return Err(Error::TooManyLearners);
                }
                let step = ChangeMembers::AddNodes(node(id, &peer_urls));
                let member = Member { id, peer_ur_ls: peer_urls, is_learner, ..Member::default() };
                Ok((put(member), vec![step]))
            }
            Change::Promote(id) => {
                let mut member = find(id).ok_or(Error::MemberNotFound)?;
                if !member.is_learner {
                    return Err(Error::MemberNotLearner);
                }
                if !self.is_in_sync(id) {
                    return Err(Error::LearnerNotReady);
                }
                member.is_learner = false;
                Ok((put(member), vec![ChangeMembers::AddVoterIds(BTreeSet::from([id]))]))
            }
            Change::Update(UpdateMember { id, peer_urls }) => {
                let mut member = find(id).ok_or(Error::MemberNotFound)?;
                if taken(&peer_urls, id) {
                    return Err(Error::PeerUrlExists);
                }
                let step = ChangeMembers::SetNodes(node(id, &peer_urls));
                self.peers.tell(id, &peer_urls);
                member.peer_ur_ls = peer_urls;
                Ok((put(member), vec![step]))
            }
            Change::Remove(id) => {
                find(id).ok_or(Error::MemberNotFound)?;
                let is_voter = self.raft.voter_ids().any(|voter| voter == id);
                let ids = BTreeSet::from([id]);
                let step = if is_voter {
                    ChangeMembers::RemoveVoters(ids)
                } else {
                    ChangeMembers::RemoveNodes(ids)
                };
                Ok((MembersChange { put: Vec::new(), remove: vec![id] }, vec![step]))
            }
        }
    }

    /// Whether a learner has nine tenths of what the leader has. Source: etcd.
    fn is_in_sync(&self, id: u64) -> bool {
        sabotage::is(Variant::BlankVoter)
            || self.matched(id).is_some_and(|(matched, last)| matched * 10 >= last * 9)
    }

    /// How far a member's log matches, and how far this one's reaches.
    fn matched(&self, id: u64) -> Option<(u64, u64)> {
        let metrics = self.raft.data_metrics();
        let metrics = metrics.borrow_watched();
        let last = metrics.last_log.map_or(0, |id| id.index + 1);
        let matched = metrics.replication.as_ref()?.get(&id)?.map_or(0, |id| id.index + 1);
        Some((matched, last))
    }

    /// One entry, or two if voters change: the row goes with the last.
    async fn write(
        &self,
        step: ChangeMembers<u64, Peer>,
        members: &MembersChange,
    ) -> Result<u64, Error> {
        let change = Command { op: Some(Op::MembersChange(members.clone())), ..Command::default() };
        let bytes = Batch { commands: vec![change] }.encode_to_vec();
        let payload = || Payload::Commands(Commands(bytes.clone().into()));
        loop {
            let request = ChangeMembershipRequest::new(step.clone(), false)
                .with_payload(Payload::Blank, payload());
            match self.raft.change_membership_with_payload(request).await {
                Ok(outcome) => return Ok(outcome.uniform.log_id.index + 1),
                Err(RaftError::Fatal(_)) => return Err(Error::Stopped),
                Err(RaftError::APIError(ClientWriteError::ForwardToLeader(_))) => {
                    return Err(Error::NotLeader);
                }
                Err(RaftError::APIError(ClientWriteError::ChangeMembershipError(
                    ChangeMembershipError::InProgress(_),
                ))) => tokio::time::sleep(BUSY_PAUSE).await,
                Err(RaftError::APIError(error)) => {
                    tracing::warn!(%error, "cannot change the membership");
                    return Err(Error::Timeout);
                }
            }
        }
    }

    /// The voters before and after a change of which only the first of two entries was written: its
    /// leader died, or nobody waited any more.
    pub(crate) fn halfway(&self) -> Option<(BTreeSet<u64>, BTreeSet<u64>)> {
        let metrics = self.raft.server_metrics();
        let metrics = metrics.borrow_watched();
        let (new, old) = metrics.membership_config.membership().get_joint_config().split_last()?;
        (!old.is_empty()).then(|| (old.iter().flatten().copied().collect(), new.clone()))
    }

    /// Writes the second entry of such a change, with the rows that were to go with it: who loses the
    /// vote leaves the cluster, and who gets one is no learner any more. Without it the next change, of
    /// whatever kind, would finish this one in consensus and not in the table. The turn must be held:
    /// a change under way looks the same.
    async fn finish(&self) -> Result<(), Error> {
        let Some((old, new)) = self.halfway() else { return Ok(()) };
        let remove: Vec<u64> = old.difference(&new).copied().collect();
        let rows = self.reader.members().into_iter();
        let promoted = rows.filter(|row| new.contains(&row.id) && !old.contains(&row.id));
        let put = promoted.map(|row| Member { is_learner: false, ..row }).collect();
        tracing::info!(?old, ?new, "finishing a change of voters that was left half done");
        let step = ChangeMembers::AddVoterIds(BTreeSet::new());
        self.write(step, &MembersChange { put, remove }).await.map(drop)
    }

    /// Gives votes to members that are to have one and have caught up, while this member leads.
    pub(crate) async fn promote_new_voters(self: Arc<Self>, mut status: watch::Receiver<Status>) {
        loop {
            while !status.borrow_and_update().is_leader {
                if status.changed().await.is_err() {
                    return;
                }
            }
            if self.halfway().is_some() {
                let _turn = self.turn.lock().await;
                match tokio::time::timeout(self.timeout, self.finish()).await {
                    Ok(Ok(())) => {}
                    Ok(Err(error)) => {
                        tracing::warn!(%error, "cannot finish a change of voters yet")
                    }
                    Err(_) => tracing::warn!("cannot finish a change of voters yet: timed out"),
                }
            }
            if let Some(member) = self.waiting_voter() {
                let row = MembersChange { put: vec![member.clone()], remove: Vec::new() };
                let _turn = self.turn.lock().await;
                let step = ChangeMembers::AddVoterIds(BTreeSet::from([member.id]));
                let id = format!("{:x}", member.id);
                match tokio::time::timeout(self.timeout, self.write(step, &row)).await {
                    Ok(Ok(_)) => tracing::info!("member-id" = id, "the new member has its vote"),
                    Ok(Err(error)) => tracing::warn!("member-id" = id, %error, "no vote yet"),
                    Err(_) => tracing::warn!("member-id" = id, "no vote yet: timed out"),
                }
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    /// A member whose row says voter, that consensus has as a learner, and that has caught up.
    fn waiting_voter(&self) -> Option<Member> {
        let (is_leader, voters) = {
            let metrics = self.raft.server_metrics();
            let metrics = metrics.borrow_watched();
            let voters: BTreeSet<u64> = metrics.membership_config.voter_ids().collect();
            (metrics.state == ServerState::Leader, voters)
        };
        let mut members = self.reader.members().into_iter();
        members.find(|member| {
            is_leader
                && !member.is_learner
                && !voters.contains(&member.id)
                && self
                    .matched(member.id)
                    .is_some_and(|(matched, last)| matched > 0 && matched + CAUGHT_UP >= last)
        })
    }
}
