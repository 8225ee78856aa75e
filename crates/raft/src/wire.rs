//! Translates between what consensus says and the messages of the peer listeners. Positions on the
//! wire are the log's own (first index 1), so that a trace of the network reads like the log. It does
//! no I/O and trusts no bytes: what cannot be meant is refused with `InvalidArgument`.

use kelson_api::peer;
use kelson_storage::{LogId as Position, log};
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, StreamAppendError, StreamAppendResult,
    TransferLeaderRequest, VoteRequest, VoteResponse,
};
use tonic::Status;

use crate::codec;
use crate::types::{RaftLogId, TypeConfig, Vote, position, raft_log_id};

pub(crate) fn ballot(vote: &Vote) -> peer::Ballot {
    peer::Ballot {
        term: vote.leader_id.term,
        voted_for: vote.leader_id.voted_for,
        committed: vote.committed,
    }
}

pub(crate) fn vote(ballot: Option<&peer::Ballot>) -> Result<Vote, Status> {
    let ballot = ballot.ok_or_else(|| Status::invalid_argument("a ballot is missing"))?;
    Ok(if ballot.committed {
        Vote::new_committed(ballot.term, ballot.voted_for)
    } else {
        Vote::new(ballot.term, ballot.voted_for)
    })
}

/// A log position for the wire; nothing = before the first entry.
pub(crate) fn place(id: Option<&RaftLogId>) -> Option<peer::Position> {
    id.map(|id| placed(position(id)))
}

pub(crate) fn placed(at: Position) -> peer::Position {
    peer::Position { term: at.term, index: at.index }
}

pub(crate) fn storage_position(place: Option<&peer::Position>) -> Position {
    place.map_or(Position::default(), |at| Position { term: at.term, index: at.index })
}

pub(crate) fn log_id(place: Option<&peer::Position>) -> Option<RaftLogId> {
    raft_log_id(storage_position(place))
}

pub(crate) fn append_request(request: &AppendEntriesRequest<TypeConfig>) -> peer::AppendRequest {
    let record = |entry| {
        let log::Entry { id, kind, payload } = codec::encode_entry(entry);
        peer::EntryRecord { at: Some(placed(id)), kind: u32::from(kind), payload }
    };
    peer::AppendRequest {
        leader: Some(ballot(&request.vote)),
        previous: place(request.prev_log_id.as_ref()),
        entries: request.entries.iter().map(record).collect(),
        committed: place(request.leader_commit.as_ref()),
    }
}

/// The opposite of [`append_request`].
///
/// # Errors
/// `InvalidArgument` when an entry is malformed or does not follow the one before it: consensus
/// relies on that.
pub(crate) fn appended(
    request: peer::AppendRequest,
) -> Result<AppendEntriesRequest<TypeConfig>, Status> {
    let refuse = |what: String| Status::invalid_argument(what);
    let prev_log_id = log_id(request.previous.as_ref());
    let first = storage_position(request.previous.as_ref()).index + 1;
    let mut entries = Vec::with_capacity(request.entries.len());
    for (next, record) in (first..).zip(request.entries) {
        let id = storage_position(record.at.as_ref());
        if id.index != next {
            return Err(refuse(format!("entry {} stands in the place of {next}", id.index)));
        }
        let kind = u8::try_from(record.kind).map_err(|_| refuse("unknown kind of entry".into()))?;
        let entry = codec::decode_entry(log::Entry { id, kind, payload: record.payload });
        entries.push(entry.map_err(|error| refuse(error.to_string()))?);
    }
    Ok(AppendEntriesRequest {
        vote: vote(request.leader.as_ref())?,
        prev_log_id,
        entries,
        leader_commit: log_id(request.committed.as_ref()),
    })
}

fn reply(outcome: peer::append_reply::Outcome) -> peer::AppendReply {
    peer::AppendReply { outcome: Some(outcome) }
}

pub(crate) fn append_reply(result: &StreamAppendResult<TypeConfig>) -> peer::AppendReply {
    use peer::append_reply::Outcome;
    reply(match result {
        Ok(matched) => Outcome::Matched(place(matched.as_ref()).unwrap_or_default()),
        Err(StreamAppendError::Conflict(at)) => Outcome::Conflict(placed(position(at))),
        Err(StreamAppendError::HigherVote(vote)) => Outcome::Higher(ballot(vote)),
    })
}

/// The reply to a lone append whose entries end at `last`.
pub(crate) fn lone_reply(
    response: AppendEntriesResponse<TypeConfig>,
    previous: Option<RaftLogId>,
    last: Option<RaftLogId>,
) -> peer::AppendReply {
    match (response, previous) {
        // Nothing before the log can conflict; said so rather than trusted.
        (AppendEntriesResponse::Conflict, None) => append_reply(&Ok(None)),
        (response, previous) => append_reply(&response.into_stream_result(previous, last)),
    }
}

pub(crate) fn append_result(
    reply: &peer::AppendReply,
) -> Result<StreamAppendResult<TypeConfig>, Status> {
    use peer::append_reply::Outcome;
    match &reply.outcome {
        Some(Outcome::Matched(at)) => Ok(Ok(log_id(Some(at)))),
        Some(Outcome::Conflict(at)) => match log_id(Some(at)) {
            Some(id) => Ok(Err(StreamAppendError::Conflict(id))),
            None => Err(Status::internal("a conflict before the first entry")),
        },
        Some(Outcome::Higher(ballot)) => {
            Ok(Err(StreamAppendError::HigherVote(vote(Some(ballot))?)))
        }
        None => Err(Status::internal("an append reply without an outcome")),
    }
}

pub(crate) fn vote_request(
    request: &VoteRequest<TypeConfig>,
    is_pre_vote: bool,
) -> peer::VoteRequest {
    peer::VoteRequest {
        candidate: Some(ballot(&request.vote)),
        last: place(request.last_log_id.as_ref()),
        is_transfer: request.leadership_transfer,
        is_pre_vote,
    }
}

pub(crate) fn asked_vote(request: &peer::VoteRequest) -> Result<VoteRequest<TypeConfig>, Status> {
    let last = log_id(request.last.as_ref());
    let mut asked = VoteRequest::new(vote(request.candidate.as_ref())?, last);
    asked.leadership_transfer = request.is_transfer;
    Ok(asked)
}

pub(crate) fn vote_reply(response: &VoteResponse<TypeConfig>) -> peer::VoteReply {
    peer::VoteReply {
        ballot: Some(ballot(&response.vote)),
        is_granted: response.vote_granted,
        last: place(response.last_log_id.as_ref()),
    }
}

pub(crate) fn vote_response(reply: &peer::VoteReply) -> Result<VoteResponse<TypeConfig>, Status> {
    let last = log_id(reply.last.as_ref());
    Ok(VoteResponse::new(vote(reply.ballot.as_ref())?, last, reply.is_granted))
}

pub(crate) fn transfer_request(
    request: &TransferLeaderRequest<TypeConfig>,
) -> peer::TransferRequest {
    peer::TransferRequest {
        leader: Some(ballot(request.from_leader())),
        target: *request.to_node_id(),
        last: place(request.last_log_id()),
    }
}

pub(crate) fn asked_transfer(
    request: &peer::TransferRequest,
) -> Result<TransferLeaderRequest<TypeConfig>, Status> {
    let (leader, last) = (vote(request.leader.as_ref())?, log_id(request.last.as_ref()));
    Ok(TransferLeaderRequest::new(leader, request.target, last))
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::types::{Commands, Entry, Payload};

    fn request(first: u64, count: u64) -> AppendEntriesRequest<TypeConfig> {
        let entry = |index| Entry {
            log_id: RaftLogId::new_term_index(3, index),
            payload: Payload::Commands(Commands(Bytes::from_static(b"batch"))),
        };
        AppendEntriesRequest {
            vote: Vote::new_committed(3, 9),
            prev_log_id: first.checked_sub(1).map(|index| RaftLogId::new_term_index(2, index)),
            entries: (first..first + count).map(entry).collect(),
            leader_commit: first.checked_sub(1).map(|index| RaftLogId::new_term_index(2, index)),
        }
    }

    #[test]
    fn appends_survive() {
        for (first, count) in [(0, 0), (0, 2), (7, 3)] {
            let request = request(first, count);
            let back = appended(append_request(&request)).expect("just made");
            assert_eq!(format!("{back:?}"), format!("{request:?}"));
        }
    }

    #[test]
    fn gaps_and_strange_entries_are_refused() {
        let mut gap = append_request(&request(7, 3));
        gap.entries.remove(1);
        assert!(appended(gap).is_err());
        let mut strange = append_request(&request(7, 1));
        strange.entries[0].kind = 256;
        assert!(appended(strange).is_err());
        let mut nobody = append_request(&request(7, 1));
        nobody.leader = None;
        assert!(appended(nobody).is_err());
    }

    #[test]
    fn replies_survive() {
        let id = RaftLogId::new_term_index(3, 4);
        let results = [
            Ok(None),
            Ok(Some(id)),
            Err(StreamAppendError::Conflict(id)),
            Err(StreamAppendError::HigherVote(Vote::new(5, 6))),
        ];
        for result in results {
            let back = append_result(&append_reply(&result)).expect("just made");
            assert_eq!(format!("{back:?}"), format!("{result:?}"));
        }
        assert!(append_result(&peer::AppendReply::default()).is_err());
        let nowhere = peer::append_reply::Outcome::Conflict(peer::Position::default());
        assert!(append_result(&reply(nowhere)).is_err());
    }

    #[test]
    fn votes_and_transfers_survive() {
        let mut asked = VoteRequest::new(Vote::new(5, 6), Some(RaftLogId::new_term_index(4, 0)));
        asked.leadership_transfer = true;
        let wire = vote_request(&asked, true);
        assert!(wire.is_pre_vote);
        assert_eq!(asked_vote(&wire).expect("just made"), asked);
        let response = VoteResponse::new(Vote::new(5, 6), None, true);
        assert_eq!(vote_response(&vote_reply(&response)).expect("just made"), response);
        let transfer = TransferLeaderRequest::new(Vote::new_committed(5, 6), 7, None);
        assert_eq!(asked_transfer(&transfer_request(&transfer)).expect("just made"), transfer);
    }
}
