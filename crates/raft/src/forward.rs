//! What a follower asks of its leader: to take commands into the log, to confirm that it leads, to
//! change the membership. Each call has an end in time. It knows whether a call that failed may have
//! had an effect; what follows from that is for the caller to decide.

use std::time::Duration;

use bytes::Bytes;
use futures::SinkExt;
use futures::channel::mpsc;
use kelson_api::Error;
use kelson_api::peer::forward_reply::Outcome;
use kelson_api::peer::peer_client::PeerClient;
use kelson_api::peer::{ChangeMembersRequest, ForwardRequest, ReadIndexReply, ReadIndexRequest};
use kelson_storage::sabotage::{self, Variant};
use tonic::{Response, Status, Streaming};

use crate::peers::{Link, PeerChannel, Peers, never_sent};

/// Questions to a leader for the index that a reader must have applied, one at a time.
pub(crate) struct Indexes {
    pub(crate) leader: u64,
    requests: mpsc::Sender<ReadIndexRequest>,
    replies: Streaming<ReadIndexReply>,
    timeout: Duration,
}

impl Indexes {
    /// The index that covers everything acknowledged before the call; `Some(None)` = the leader could
    /// not tell, `None` = the stream has failed. A stream whose question was dropped must be dropped,
    /// too.
    pub(crate) async fn ask(&mut self, voted_term: u64) -> Option<Option<u64>> {
        self.requests.send(ReadIndexRequest { voted_term }).await.ok()?;
        let reply = tokio::time::timeout(self.timeout, self.replies.message()).await;
        let reply = reply.ok()?.ok()??;
        Some((reply.index > 0).then_some(reply.index))
    }
}

/// How the leader disposed of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Forwarded {
    /// The leader has applied it; it will be applied here too.
    Applied,
    /// Surely not in any log.
    Refused,
    /// Surely not in any log, and the leader has no room.
    Busy,
    /// It may be applied later, or never.
    Unknown,
}

/// Calls to the leader. Clones share the connections.
#[derive(Clone)]
pub(crate) struct Forwarder {
    peers: Peers,
    /// Longest time for an answer.
    timeout: Duration,
}

impl Forwarder {
    pub(crate) fn new(peers: Peers, timeout: Duration) -> Forwarder {
        Forwarder { peers, timeout }
    }

    /// Asks the leader to take an encoded batch.
    pub(crate) async fn batch(&self, leader: u64, batch: Bytes) -> Forwarded {
        let link = self.peers.link(leader);
        let mut client = link.bulk();
        let again = sabotage::is(Variant::ForwardedTwice)
            .then(|| tokio::spawn(send_again(link.bulk(), batch.clone())));
        let call = client.forward(ForwardRequest { batch });
        let answer = self.answered(&link, call).await;
        if let Some(again) = again {
            again.abort();
        }
        match answer {
            Ok(reply) => match reply.outcome() {
                Outcome::Applied => Forwarded::Applied,
                Outcome::NotLeader => Forwarded::Refused,
                Outcome::Busy => Forwarded::Busy,
                Outcome::Unknown => Forwarded::Unknown,
            },
            Err(Failure::NotDone) => Forwarded::Refused,
            Err(Failure::Unknown) => Forwarded::Unknown,
        }
    }

    /// Opens a stream of questions to the leader; `None` = it does not listen.
    pub(crate) async fn ask_indexes(&self, leader: u64) -> Option<Indexes> {
        let link = self.peers.link(leader);
        let mut client = link.control();
        let (requests, receiver) = mpsc::channel(1);
        let call = client.read_index(receiver);
        let replies = self.answered(&link, call).await.ok()?;
        Some(Indexes { leader, requests, replies, timeout: self.timeout })
    }

    /// Asks the leader for a change of the members; returns the index of its entry.
    ///
    /// # Errors
    /// As the leader says, `NotLeader` if it was surely not asked, `Timeout` if the outcome is unknown.
    pub(crate) async fn change(
        &self,
        leader: u64,
        request: ChangeMembersRequest,
    ) -> Result<u64, Error> {
        let link = self.peers.link(leader);
        let mut client = link.control();
        let call = client.change_members(request);
        match self.answered(&link, call).await {
            Ok(reply) if reply.error.is_empty() => Ok(reply.index),
            Ok(reply) => {
                let known = Error::ALL.iter().find(|error| error.text() == reply.error);
                Err(known.copied().unwrap_or(Error::Timeout))
            }
            Err(Failure::NotDone) => Err(Error::NotLeader),
            Err(Failure::Unknown) => Err(Error::Timeout),
        }
    }

    async fn answered<T>(
        &self,
        link: &Link,
        call: impl Future<Output = Result<Response<T>, Status>>,
    ) -> Result<T, Failure> {
        let late = || Err(Status::deadline_exceeded("the leader did not answer in time"));
        let answer = tokio::time::timeout(self.timeout, call).await.unwrap_or_else(|_| late());
        // Judged by what the other side said, before this side judges the other: an answer that is
        // not believed does not mean that nothing was done.
        let failure = match &answer {
            Err(status) if never_sent(status) || is_refusal(status) => Failure::NotDone,
            _ => Failure::Unknown,
        };
        self.peers.check_answer(link, answer).map_err(|_| failure)
    }
}

/// Sabotage: takes a leader that is slow for one that has not heard.
async fn send_again(mut client: PeerClient<PeerChannel>, batch: Bytes) {
    tokio::time::sleep(Duration::from_millis(200)).await;
    client.forward(ForwardRequest { batch }).await.ok();
}

/// What a call without an answer amounts to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Failure {
    /// Refused at the door, or never at it.
    NotDone,
    /// It may have been done, or may be done yet.
    Unknown,
}

/// The receiver refused to listen, so it did nothing.
fn is_refusal(status: &Status) -> bool {
    matches!(status.code(), tonic::Code::FailedPrecondition | tonic::Code::InvalidArgument)
}
