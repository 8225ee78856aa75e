//! The one place that binds openraft to our types: the type configuration, what a log entry
//! carries, and the mapping between openraft's log positions and the storage crate's. It does no
//! I/O. Nothing here is serialized by itself; bytes are made in `codec`.

use std::fmt;

use bytes::Bytes;
use kelson_storage::LogId as Position;
use openraft::entry::RaftPayload;
use openraft::impls::leader_id_std;
use openraft::raft::responder::Responder;
use openraft::{RaftTypeConfig, TokioRuntime};

/// openraft's type parameters for this project.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct TypeConfig;

impl RaftTypeConfig for TypeConfig {
    type D = Commands;
    type R = ();
    type NodeId = u64;
    type Node = Peer;
    type Term = u64;
    // One leader per term, so a log position is (term, index) as in etcd.
    type LeaderId = leader_id_std::LeaderId<u64, u64>;
    type Vote = Vote;
    type Payload = Payload;
    type Entry = Entry;
    type AsyncRuntime = TokioRuntime;
    type Responder<T>
        = Answer<T>
    where
        T: Send + 'static;
    type Batch<T>
        = openraft::impls::InlineBatch<T>
    where
        T: Send + 'static;
    type ErrorSource = openraft::AnyError;
}

/// Who leads, or asks to lead, a term.
pub(crate) type LeaderId = leader_id_std::LeaderId<u64, u64>;
/// A vote as openraft keeps it.
pub(crate) type Vote = openraft::Vote<LeaderId>;
/// The part of a leader's identity that a log position keeps: its term.
pub(crate) type CommittedLeaderId = <LeaderId as openraft::vote::RaftLeaderId>::Committed;
/// A log entry in openraft's hands.
pub(crate) type Entry = openraft::Entry<CommittedLeaderId, Payload>;
/// openraft's log position; its first index is 0.
pub(crate) type RaftLogId = openraft::LogId<CommittedLeaderId>;
/// Voters and learners.
pub(crate) type Membership = openraft::Membership<u64, Peer>;
/// A membership with the position of its entry.
pub(crate) type StoredMembership = openraft::StoredMembership<CommittedLeaderId, u64, Peer>;
/// What a snapshot covers.
pub(crate) type SnapshotMeta = openraft::SnapshotMeta<CommittedLeaderId, u64, Peer>;
/// A snapshot in openraft's hands.
pub(crate) type Snapshot =
    openraft::Snapshot<CommittedLeaderId, u64, Peer, crate::snapshot::SnapshotHandle>;
/// The consensus library with our state machine.
pub(crate) type Raft = openraft::Raft<TypeConfig, crate::state_machine::StateMachine>;

/// What openraft keeps of a member: enough to reach it, and its name for the bootstrap entry.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Peer {
    /// Name from `--initial-cluster`; empty for members that were added later.
    pub(crate) name: String,
    /// Where other members reach it.
    pub(crate) peer_urls: Vec<String>,
}

/// An encoded `kelson.command.Batch`: the same bytes in memory, in the log and between members.
#[derive(Clone, Default, PartialEq, Eq)]
pub(crate) struct Commands(pub(crate) Bytes);

/// Without content: the consensus library shows entries in its log lines, and a command may hold the
/// hash of a password or a token.
impl fmt::Debug for Commands {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for Commands {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes of commands", self.0.len())
    }
}

/// What one log entry carries.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Payload {
    /// Nothing: the first entry of a leader.
    Blank,
    /// Commands of clients.
    Commands(Commands),
    /// A new membership, with the change of the members table that belongs to it (encoded `Batch`,
    /// empty if there is none).
    Membership(Membership, Commands),
}

impl fmt::Display for Payload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Payload::Blank => write!(f, "blank"),
            Payload::Commands(commands) => write!(f, "{commands}"),
            Payload::Membership(membership, change) => {
                write!(f, "membership {membership} with {change}")
            }
        }
    }
}

impl RaftPayload for Payload {
    type D = Commands;
    type NodeId = u64;
    type Node = Peer;

    fn blank() -> Self {
        Payload::Blank
    }

    fn with_normal(self, data: Commands) -> Self {
        match self {
            Payload::Blank | Payload::Commands(_) => Payload::Commands(data),
            Payload::Membership(membership, _) => Payload::Membership(membership, data),
        }
    }

    fn with_membership(self, membership: Membership) -> Self {
        let change = match self {
            Payload::Blank => Commands::default(),
            Payload::Commands(change) | Payload::Membership(_, change) => change,
        };
        Payload::Membership(membership, change)
    }

    fn get_membership(&self) -> Option<Membership> {
        match self {
            Payload::Blank | Payload::Commands(_) => None,
            Payload::Membership(membership, _) => Some(membership.clone()),
        }
    }
}

/// Tells the proposer how openraft disposed of an entry: a closure that runs once.
pub(crate) struct Answer<T>(Box<dyn FnOnce(T) + Send>);

impl<T> Answer<T> {
    /// Wraps what is to be done with the answer. It runs on openraft's tasks: it must not block.
    pub(crate) fn new(then: impl FnOnce(T) + Send + 'static) -> Self {
        Answer(Box::new(then))
    }
}

impl<T: Send + 'static> Responder<TypeConfig, T> for Answer<T> {
    fn on_complete(self, result: T) {
        (self.0)(result)
    }
}

/// Storage position of an openraft log position. openraft counts from 0 and says "nothing" with
/// `None`; storage counts from 1, as etcd does, and says "nothing" with index 0.
pub(crate) fn position(id: &RaftLogId) -> Position {
    Position { term: id.leader_id.term, index: id.index + 1 }
}

/// The opposite of [`position`].
pub(crate) fn raft_log_id(position: Position) -> Option<RaftLogId> {
    let index = position.index.checked_sub(1)?;
    Some(RaftLogId::new_term_index(position.term, index))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_map_both_ways() {
        assert_eq!(raft_log_id(Position::default()), None);
        let first = RaftLogId::new_term_index(0, 0);
        assert_eq!(position(&first), Position { term: 0, index: 1 });
        assert_eq!(raft_log_id(position(&first)), Some(first));
    }

    #[test]
    fn membership_keeps_the_change_it_was_made_with() {
        let change = Commands(Bytes::from_static(b"change"));
        let payload = Payload::normal(change.clone()).with_membership(Membership::default());
        assert_eq!(payload, Payload::Membership(Membership::default(), change));
        let payload = Payload::membership(Membership::default());
        assert_eq!(payload, Payload::Membership(Membership::default(), Commands::default()));
    }
}
