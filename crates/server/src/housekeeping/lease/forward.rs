//! Questions about the time of leases, put to the leader by another member. An answer that says the
//! leader has moved, or none at all, is `None`: the caller looks again who leads.

use kelson_api::Error;
use kelson_api::etcdserverpb::{LeaseTimeToLiveRequest, LeaseTimeToLiveResponse};
use kelson_api::peer::LeaseRenewRequest;
use kelson_api::peer::side_client::SideClient;
use kelson_raft::Node;
use tokio::time::Instant;
use tonic::Status;

use crate::services::side::error_of;

/// Leaves an answer as it is, unless it only says that another member leads.
pub(super) fn unless_moved<T>(answer: Result<T, Error>) -> Option<Result<T, Error>> {
    match answer {
        Err(Error::NotPrimaryLessor | Error::LeaderChanged | Error::NotLeader) => None,
        answer => Some(answer),
    }
}

/// Asks the leader to renew a lease.
pub(super) async fn renew(
    node: &Node,
    leader: u64,
    id: i64,
    deadline: Instant,
) -> Option<Result<i64, Error>> {
    let mut side = SideClient::new(node.peer_channel(leader));
    let asked = side.lease_renew(LeaseRenewRequest { id });
    let answer = in_time(deadline, asked).await?;
    match answer {
        Ok(reply) if reply.error.is_empty() => Some(Ok(reply.ttl)),
        Ok(reply) => of_leader(&reply.error),
        Err(status) => of_leader(status.message()),
    }
}

/// Asks the leader for the time left of a lease.
pub(super) async fn time_to_live(
    node: &Node,
    leader: u64,
    id: i64,
    keys: bool,
    deadline: Instant,
) -> Option<Result<LeaseTimeToLiveResponse, Error>> {
    let mut side = SideClient::new(node.peer_channel(leader));
    let asked = side.lease_time_to_live(LeaseTimeToLiveRequest { id, keys });
    match in_time(deadline, asked).await? {
        Ok(response) => Some(Ok(response)),
        Err(status) => of_leader(status.message()),
    }
}

async fn in_time<T>(
    deadline: Instant,
    asked: impl Future<Output = Result<tonic::Response<T>, Status>>,
) -> Option<Result<T, Status>> {
    let answer = tokio::time::timeout_at(deadline, asked).await.ok()?;
    Some(answer.map(tonic::Response::into_inner))
}

/// An error in the words of the table comes from the leader; one that stops is followed by another.
fn of_leader<T>(text: &str) -> Option<Result<T, Error>> {
    match error_of(text)? {
        Error::Stopped => None,
        error => unless_moved(Err(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_answers_of_a_leader_are_final() {
        assert_eq!(unless_moved(Ok(5)), Some(Ok(5)));
        assert_eq!(unless_moved::<i64>(Err(Error::NotPrimaryLessor)), None);
        assert_eq!(of_leader::<i64>(Error::Timeout.text()), Some(Err(Error::Timeout)));
        assert_eq!(of_leader::<i64>(Error::Stopped.text()), None);
        assert_eq!(of_leader::<i64>("connection refused"), None);
    }
}
