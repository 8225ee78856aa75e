//! Our bytes for what consensus persists: vote, membership, entry payload. openraft's own encoding
//! is never used, so a new version of the library cannot change the files. Field numbers and kinds
//! are never reused. Bytes from the log are refused, never trusted.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use kelson_api::Message;
use kelson_storage::log;

use crate::types::{Commands, Entry, Membership, Payload, Peer, Vote, position, raft_log_id};

/// Entry kinds on disk.
const BLANK: u8 = 0;
const COMMANDS: u8 = 1;
const MEMBERSHIP: u8 = 2;

/// Bytes that do not say what they should.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    /// Not a protobuf message of the expected shape.
    #[error("malformed {what}: {source}")]
    Malformed {
        /// What the bytes should have been.
        what: &'static str,
        /// The decoder's complaint.
        source: prost::DecodeError,
    },
    /// A kind of entry that this version does not know.
    #[error("unknown kind of log entry: {0}")]
    UnknownKind(u8),
    /// A membership that openraft refuses.
    #[error("impossible membership: {0}")]
    Membership(String),
    /// Index 0 belongs to no entry.
    #[error("log entry without an index")]
    NoIndex,
}

#[derive(Clone, PartialEq, prost::Message)]
struct VoteRecord {
    #[prost(uint64, tag = "1")]
    term: u64,
    #[prost(uint64, tag = "2")]
    voted_for: u64,
    /// Granted by a quorum: `voted_for` leads the term.
    #[prost(bool, tag = "3")]
    committed: bool,
}

#[derive(Clone, PartialEq, prost::Message)]
struct VotersRecord {
    #[prost(uint64, repeated, tag = "1")]
    ids: Vec<u64>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct NodeRecord {
    #[prost(uint64, tag = "1")]
    id: u64,
    #[prost(string, tag = "2")]
    name: String,
    #[prost(string, repeated, tag = "3")]
    peer_urls: Vec<String>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct MembershipRecord {
    /// One set of voters; two while a joint change is under way.
    #[prost(message, repeated, tag = "1")]
    voters: Vec<VotersRecord>,
    /// Every member; those in no set of voters are learners.
    #[prost(message, repeated, tag = "2")]
    nodes: Vec<NodeRecord>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct MembershipEntry {
    #[prost(message, optional, tag = "1")]
    membership: Option<MembershipRecord>,
    /// Encoded `kelson.command.Batch` with the change of the members table.
    #[prost(bytes = "bytes", tag = "2")]
    change: Bytes,
}

pub(crate) fn encode_vote(vote: &Vote) -> Bytes {
    let record = VoteRecord {
        term: vote.leader_id.term,
        voted_for: vote.leader_id.voted_for,
        committed: vote.committed,
    };
    record.encode_to_vec().into()
}

pub(crate) fn decode_vote(bytes: Bytes) -> Result<Vote, DecodeError> {
    let record = VoteRecord::decode(bytes)
        .map_err(|source| DecodeError::Malformed { what: "vote", source })?;
    Ok(if record.committed {
        Vote::new_committed(record.term, record.voted_for)
    } else {
        Vote::new(record.term, record.voted_for)
    })
}

fn membership_record(membership: &Membership) -> MembershipRecord {
    let voters = membership.get_joint_config().iter();
    let nodes = membership.nodes();
    MembershipRecord {
        voters: voters.map(|set| VotersRecord { ids: set.iter().copied().collect() }).collect(),
        nodes: nodes
            .map(|(id, peer)| NodeRecord {
                id: *id,
                name: peer.name.clone(),
                peer_urls: peer.peer_urls.clone(),
            })
            .collect(),
    }
}

fn membership_of(record: MembershipRecord) -> Result<Membership, DecodeError> {
    let voters: Vec<BTreeSet<u64>> =
        record.voters.into_iter().map(|set| set.ids.into_iter().collect()).collect();
    let nodes: BTreeMap<u64, Peer> = record
        .nodes
        .into_iter()
        .map(|node| (node.id, Peer { name: node.name, peer_urls: node.peer_urls }))
        .collect();
    Membership::new(voters, nodes).map_err(|e| DecodeError::Membership(e.to_string()))
}

pub(crate) fn encode_membership(membership: &Membership) -> Bytes {
    membership_record(membership).encode_to_vec().into()
}

pub(crate) fn decode_membership(bytes: Bytes) -> Result<Membership, DecodeError> {
    let record = MembershipRecord::decode(bytes)
        .map_err(|source| DecodeError::Malformed { what: "membership", source })?;
    membership_of(record)
}

/// The storage form of an entry. Commands are not copied.
pub(crate) fn encode_entry(entry: &Entry) -> log::Entry {
    let (kind, payload) = match &entry.payload {
        Payload::Blank => (BLANK, Bytes::new()),
        Payload::Commands(commands) => (COMMANDS, commands.0.clone()),
        Payload::Membership(membership, change) => {
            let record = MembershipEntry {
                membership: Some(membership_record(membership)),
                change: change.0.clone(),
            };
            (MEMBERSHIP, record.encode_to_vec().into())
        }
    };
    log::Entry { id: position(&entry.log_id), kind, payload }
}

/// The opposite of [`encode_entry`].
pub(crate) fn decode_entry(entry: log::Entry) -> Result<Entry, DecodeError> {
    let payload = match entry.kind {
        BLANK => Payload::Blank,
        COMMANDS => Payload::Commands(Commands(entry.payload)),
        MEMBERSHIP => {
            let record = MembershipEntry::decode(entry.payload)
                .map_err(|source| DecodeError::Malformed { what: "membership entry", source })?;
            let membership = membership_of(record.membership.unwrap_or_default())?;
            Payload::Membership(membership, Commands(record.change))
        }
        kind => return Err(DecodeError::UnknownKind(kind)),
    };
    let log_id = raft_log_id(entry.id).ok_or(DecodeError::NoIndex)?;
    Ok(Entry { log_id, payload })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::RaftLogId;

    fn sample_membership() -> Membership {
        let peer = |name: &str| Peer {
            name: name.into(),
            peer_urls: vec![format!("http://127.0.0.1/{name}")],
        };
        let nodes = BTreeMap::from([(1, peer("a")), (2, peer("b")), (3, peer("learner"))]);
        let voters = vec![BTreeSet::from([1]), BTreeSet::from([1, 2])];
        Membership::new(voters, nodes).expect("voters are among the nodes")
    }

    #[test]
    fn votes_survive() {
        for vote in [Vote::new(7, u64::MAX), Vote::new_committed(u64::MAX, 1)] {
            assert_eq!(decode_vote(encode_vote(&vote)).expect("just encoded"), vote);
        }
    }

    #[test]
    fn vote_bytes_are_fixed() {
        assert_eq!(&encode_vote(&Vote::new_committed(3, 5))[..], b"\x08\x03\x10\x05\x18\x01");
    }

    #[test]
    fn entries_survive() {
        let payloads = [
            Payload::Blank,
            Payload::Commands(Commands(Bytes::from_static(b"batch"))),
            Payload::Membership(sample_membership(), Commands(Bytes::from_static(b"change"))),
            Payload::Membership(Membership::default(), Commands::default()),
        ];
        for payload in payloads {
            let entry = Entry { log_id: RaftLogId::new_term_index(4, 9), payload };
            assert_eq!(decode_entry(encode_entry(&entry)).expect("just encoded"), entry);
        }
    }

    #[test]
    fn bad_bytes_are_refused() {
        let id = kelson_storage::LogId { term: 1, index: 1 };
        let unknown = log::Entry { id, kind: 9, payload: Bytes::new() };
        assert!(matches!(decode_entry(unknown), Err(DecodeError::UnknownKind(9))));
        let broken = log::Entry { id, kind: MEMBERSHIP, payload: Bytes::from_static(b"\xff") };
        assert!(matches!(decode_entry(broken), Err(DecodeError::Malformed { .. })));
        let nowhere = log::Entry { id: Default::default(), kind: BLANK, payload: Bytes::new() };
        assert!(matches!(decode_entry(nowhere), Err(DecodeError::NoIndex)));
        assert!(decode_vote(Bytes::from_static(b"\xff")).is_err());
        // A voter that no node describes cannot be reached.
        let ghost = MembershipRecord { voters: vec![VotersRecord { ids: vec![1] }], nodes: vec![] };
        assert!(matches!(membership_of(ghost), Err(DecodeError::Membership(_))));
    }
}
