//! How openraft reaches other members: entries on one long-lived stream, heartbeats, votes and
//! hand-overs as calls on a connection of their own, snapshots on a third. Every wait here has an end:
//! openraft puts none on streams. It keeps no state but what is under way.

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use futures::{Stream, StreamExt};
use kelson_api::peer;
use kelson_storage::sabotage::{self, Variant};
use openraft::base::{BoxFuture, BoxStream};
use openraft::errors::{NetworkError, RPCError, ReplicationClosed, StreamingError, Unreachable};
use openraft::network::{Backoff, RPCOption, RaftNetworkFactory, RaftNetworkV2};
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, StreamAppendError,
    StreamAppendResult, TransferLeaderRequest, TransferLeaderResponse, VoteRequest, VoteResponse,
};
use tonic::Status;

use crate::peers::{Link, Peers};
use crate::progress::Progress;
use crate::snapshot::{self, SnapshotHandle, Transfers};
use crate::types::{Peer, Snapshot, TypeConfig, Vote};
use crate::wire;

/// A stream whose peer leaves a request unanswered for so many election timeouts is given up: its
/// disk may be slow, but then somebody else should be waited for.
const REPLY_ELECTIONS: u32 = 5;

/// What all connections of this member share.
#[derive(Clone)]
pub(crate) struct Network {
    pub(crate) peers: Peers,
    pub(crate) progress: Arc<Progress>,
    pub(crate) transfers: Transfers,
    pub(crate) election: Duration,
}

/// What a client is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Purpose {
    Entries,
    Heartbeats,
    Snapshots,
}

impl Network {
    fn client(&self, target: u64, node: &Peer, purpose: Purpose) -> PeerLink {
        self.peers.tell(target, &node.peer_urls);
        PeerLink { network: self.clone(), link: self.peers.link(target), target, purpose }
    }
}

impl RaftNetworkFactory<TypeConfig> for Network {
    type Network = PeerLink;

    async fn new_client(&mut self, target: u64, node: &Peer) -> PeerLink {
        self.client(target, node, Purpose::Entries)
    }

    async fn new_heartbeat_client(&mut self, target: u64, node: &Peer) -> PeerLink {
        self.client(target, node, Purpose::Heartbeats)
    }

    async fn new_snapshot_client(&mut self, target: u64, node: &Peer) -> PeerLink {
        self.client(target, node, Purpose::Snapshots)
    }
}

/// openraft's client of one member.
pub(crate) struct PeerLink {
    network: Network,
    link: Arc<Link>,
    target: u64,
    purpose: Purpose,
}

type AppendResult = Result<StreamAppendResult<TypeConfig>, RPCError<TypeConfig>>;

/// openraft waits before it tries again after `Unreachable`, and not after the other kinds.
fn failed(status: &Status) -> RPCError<TypeConfig> {
    RPCError::Unreachable(Unreachable::new(status))
}

impl PeerLink {
    /// A call that must be answered within `ttl`.
    async fn answered<T>(
        &self,
        ttl: Duration,
        call: impl Future<Output = Result<tonic::Response<T>, Status>>,
    ) -> Result<T, Status> {
        let late = || Err(Status::deadline_exceeded(format!("no answer within {ttl:?}")));
        let answer = tokio::time::timeout(ttl, call).await.unwrap_or_else(|_| late());
        self.network.peers.check_answer(&self.link, answer)
    }

    async fn heartbeat(
        &self,
        request: &AppendEntriesRequest<TypeConfig>,
        ttl: Duration,
    ) -> AppendResult {
        let begun = Instant::now();
        // openraft puts here what it knows the member to have.
        if let Some(previous) = &request.prev_log_id {
            self.link.note_matched(&request.vote, previous.index + 1);
        }
        note_committed(&self.network.progress, request);
        let mut client = self.link.control();
        let call = async {
            let reply = client.heartbeat(wire::append_request(request)).await?;
            let result = checked_result(&self.link, &request.vote, reply.get_ref())?;
            Ok(reply.map(|_| result))
        };
        let result = self.answered(ttl, call).await;
        self.link.note_heartbeat(result.is_ok().then(|| begun.elapsed()));
        result.map_err(|status| failed(&status))
    }

    async fn open_stream<S>(&self, input: S) -> Result<AppendReplies, RPCError<TypeConfig>>
    where
        S: Stream<Item = AppendEntriesRequest<TypeConfig>> + Send + Unpin + 'static,
    {
        let (first, rest) = begun(input).await;
        let vote = first.as_ref().map(|request| request.vote);
        let under_way = Arc::new(AtomicU64::new(0));
        let (sent, progress) = (under_way.clone(), self.network.progress.clone());
        let requests = futures::stream::iter(first).chain(rest).map(move |request| {
            note_committed(&progress, &request);
            sent.fetch_add(1, Ordering::AcqRel);
            wire::append_request(&request)
        });
        let mut client = self.link.bulk();
        let replies = self.answered(self.network.election, client.append(requests)).await;
        let replies = replies.map_err(|status| failed(&status))?;
        Ok(AppendReplies {
            replies,
            under_way,
            progress: self.network.progress.clone(),
            link: self.link.clone(),
            vote,
            patience: self.network.election * REPLY_ELECTIONS,
        })
    }
}

/// Waits for the first request, and returns it and the others: openraft pauses after a failure only
/// where it is asked for a request, and a call to a member that is down fails before it asks.
async fn begun<S: Stream + Unpin>(input: S) -> (Option<S::Item>, impl Stream<Item = S::Item>) {
    // It may end before the first request, and must not be asked again then.
    let mut input = input.fuse();
    (input.next().await, input)
}

/// Whatever another member is told to apply is counted as committed here first: reads rely on it, see
/// `Progress::leading`.
fn note_committed(progress: &Progress, request: &AppendEntriesRequest<TypeConfig>) {
    if let Some(committed) = &request.leader_commit {
        progress.set_committed(committed.index + 1);
    }
}

/// What a member answered the leader by that vote, unless it takes back what it said before.
fn checked_result(
    link: &Link,
    vote: &Vote,
    reply: &peer::AppendReply,
) -> Result<StreamAppendResult<TypeConfig>, Status> {
    let result = wire::append_result(reply)?;
    if let Err(StreamAppendError::Conflict(at)) = &result {
        link.check_conflict(vote, at.index + 1)?;
    }
    Ok(result)
}

/// The answering half of a stream of entries.
struct AppendReplies {
    replies: tonic::Streaming<peer::AppendReply>,
    under_way: Arc<AtomicU64>,
    progress: Arc<Progress>,
    link: Arc<Link>,
    /// Of the leader that sends; `None` = there is no request.
    vote: Option<Vote>,
    patience: Duration,
}

impl AppendReplies {
    /// The next answer; `None` at the end of the stream.
    async fn next(&mut self) -> Option<AppendResult> {
        let result = self.reply().await?;
        Some(result.map_err(|status| {
            self.link.note_failure(&status);
            match status.code() {
                // It will not get better by itself.
                tonic::Code::FailedPrecondition => failed(&status),
                _ => RPCError::Network(NetworkError::new(&status)),
            }
        }))
    }

    async fn reply(&mut self) -> Option<Result<StreamAppendResult<TypeConfig>, Status>> {
        let mut message = pin!(self.replies.message());
        let reply = loop {
            match tokio::time::timeout(self.patience, &mut message).await {
                Ok(Ok(Some(reply))) => break reply,
                Ok(Ok(None)) => return None,
                Ok(Err(status)) => return Some(Err(status)),
                // Nothing to answer for: an idle stream may be silent for ever.
                Err(_) if self.under_way.load(Ordering::Acquire) == 0 => {}
                Err(_) => {
                    let text = format!("entries unanswered for {:?}", self.patience);
                    return Some(Err(Status::deadline_exceeded(text)));
                }
            }
        };
        self.under_way.fetch_sub(1, Ordering::AcqRel);
        let Some(vote) = &self.vote else {
            return Some(Err(Status::internal("an answer to no request")));
        };
        let result = checked_result(&self.link, vote, &reply);
        if let Ok(result) = &result {
            self.link.note_alive();
            if let Ok(Some(matched)) = result {
                self.link.note_matched(vote, matched.index + 1);
                self.link.note_kept((matched.index + 1).min(self.progress.committed()));
            }
        }
        Some(result)
    }
}

impl RaftNetworkV2<TypeConfig> for PeerLink {
    type SnapshotData = SnapshotHandle;

    async fn append_entries(
        &mut self,
        request: AppendEntriesRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<AppendEntriesResponse<TypeConfig>, RPCError<TypeConfig>> {
        match self.heartbeat(&request, option.hard_ttl()).await? {
            Ok(_) => Ok(AppendEntriesResponse::Success),
            Err(StreamAppendError::Conflict(_)) => Ok(AppendEntriesResponse::Conflict),
            Err(StreamAppendError::HigherVote(vote)) => Ok(AppendEntriesResponse::HigherVote(vote)),
        }
    }

    fn stream_append<'s, S>(
        &'s mut self,
        mut input: S,
        option: RPCOption,
    ) -> BoxFuture<'s, Result<BoxStream<'s, AppendResult>, RPCError<TypeConfig>>>
    where
        S: Stream<Item = AppendEntriesRequest<TypeConfig>> + Send + Unpin + 'static,
    {
        Box::pin(async move {
            if self.purpose == Purpose::Heartbeats {
                let mut results = Vec::new();
                while let Some(request) = input.next().await {
                    results.push(Ok(self.heartbeat(&request, option.hard_ttl()).await?));
                }
                return Ok(Box::pin(futures::stream::iter(results)) as BoxStream<'s, AppendResult>);
            }
            let replies = self.open_stream(input).await?;
            let results = futures::stream::unfold(Some(replies), |replies| async {
                let mut replies = replies?;
                let result = replies.next().await?;
                // Nothing follows a refusal or a failure.
                let goes_on = matches!(result, Ok(Ok(_)));
                Some((result, goes_on.then_some(replies)))
            });
            Ok(Box::pin(results) as BoxStream<'s, AppendResult>)
        })
    }

    async fn vote(
        &mut self,
        request: VoteRequest<TypeConfig>,
        _option: RPCOption,
    ) -> Result<VoteResponse<TypeConfig>, RPCError<TypeConfig>> {
        self.ask_vote(&request, false).await
    }

    // The default would grant every pre-vote and so undo it.
    async fn pre_vote(
        &mut self,
        request: VoteRequest<TypeConfig>,
        _option: RPCOption,
    ) -> Result<VoteResponse<TypeConfig>, RPCError<TypeConfig>> {
        self.ask_vote(&request, true).await
    }

    async fn full_snapshot(
        &mut self,
        vote: Vote,
        snapshot: Snapshot,
        cancel: impl Future<Output = ReplicationClosed> + Send + 'static,
        _option: RPCOption,
    ) -> Result<SnapshotResponse<TypeConfig>, StreamingError<TypeConfig>> {
        let network = &self.network;
        let from = snapshot.meta.last_log_id.map_or(0, |last| last.index + 1);
        let sending = snapshot::send(&network.transfers, &network.peers, &self.link, &vote, from);
        let (sending, cancel) = (pin!(sending), pin!(cancel));
        match futures::future::select(sending, cancel).await {
            futures::future::Either::Left((Ok(answered), _)) => {
                if answered == vote && from > 0 {
                    self.link.note_matched(&vote, from);
                }
                Ok(SnapshotResponse::new(answered))
            }
            futures::future::Either::Left((Err(status), _)) => {
                tracing::warn!(
                    "remote-peer-id" = format!("{:x}", self.target),
                    error = status.message(),
                    "failed to send database snapshot"
                );
                Err(StreamingError::Unreachable(Unreachable::new(&status)))
            }
            futures::future::Either::Right((closed, _)) => Err(StreamingError::Closed(closed)),
        }
    }

    async fn transfer_leader(
        &mut self,
        request: TransferLeaderRequest<TypeConfig>,
        _option: RPCOption,
    ) -> Result<TransferLeaderResponse<TypeConfig>, RPCError<TypeConfig>> {
        let mut client = self.link.control();
        let call = client.transfer_leader(wire::transfer_request(&request));
        let reply = self.answered(self.network.election, call).await;
        let reply = reply.map_err(|status| failed(&status))?;
        if reply.refusal.is_empty() {
            return Ok(Ok(()));
        }
        // Only that it was refused matters here: openraft logs it and stays leader.
        let text = std::io::Error::other(reply.refusal);
        Err(RPCError::Unreachable(Unreachable::new(&text)))
    }

    fn backoff(&self) -> Option<Backoff> {
        // One heartbeat or so: a member that is back should not wait.
        let mut pause = self.network.election / 5;
        if sabotage::is(Variant::SlowReconnect) {
            pause = Duration::from_secs(60);
        }
        Some(Backoff::new(std::iter::repeat(pause)))
    }
}

impl PeerLink {
    async fn ask_vote(
        &self,
        request: &VoteRequest<TypeConfig>,
        is_pre_vote: bool,
    ) -> Result<VoteResponse<TypeConfig>, RPCError<TypeConfig>> {
        let mut client = self.link.control();
        let call = client.vote(wire::vote_request(request, is_pre_vote));
        let reply = self.answered(self.network.election, call).await;
        let reply = reply.map_err(|status| failed(&status))?;
        wire::vote_response(&reply).map_err(|status| failed(&status))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Such a stream panics when it is asked after its end, as openraft's does.
    #[test]
    fn requests_that_end_before_the_first_are_not_asked_again() {
        let ended = Box::pin(futures::stream::unfold((), |()| async { None::<(u8, ())> }));
        let (first, rest) = futures::executor::block_on(begun(ended));
        assert!(first.is_none());
        assert!(futures::executor::block_on(rest.collect::<Vec<_>>()).is_empty());
    }
}
