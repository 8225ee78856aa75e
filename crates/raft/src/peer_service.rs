//! What this member does for others: takes entries, votes, commands and reads of followers, changes of
//! the membership, snapshots. Every call is checked for who sends it first (`peers`); the work is
//! openraft's or the module's of that name. It speaks to no client.

use std::pin::Pin;
use std::sync::Arc;

use futures::{Stream, StreamExt};
use kelson_api::Message;
use kelson_api::command::Batch;
use kelson_api::peer::forward_reply::Outcome;
use kelson_api::peer::peer_server::{Peer, PeerServer};
use kelson_api::peer::{
    AppendReply, AppendRequest, ChangeMembersReply, ChangeMembersRequest, ConfirmReply,
    ConfirmRequest, DescribeReply, DescribeRequest, ForwardReply, ForwardRequest, KnownIdentity,
    ReadIndexReply, ReadIndexRequest, SnapshotPart, SnapshotReply, TransferReply, TransferRequest,
    VoteReply, VoteRequest,
};
use kelson_storage::sabotage::{self, Variant};
use kelson_storage::{Identity, Reader, failpoint};
use openraft::errors::ClientWriteError;
use openraft::raft::{AppendEntriesResponse, ClientWriteResult};
use tonic::{Request, Response, Status, Streaming};

use crate::confirm::Confirm;
use crate::error::abort;
use crate::membership::Members;
use crate::peers::{MESSAGE_MAX, Peers, lost_text};
use crate::progress::Progress;
use crate::proposer::Proposer;
use crate::snapshot::{self, Transfers};
use crate::types::{Answer, Commands, Raft, TypeConfig};
use crate::wire;

/// The service of `kelson.peer.Peer`. Clones share the member.
#[derive(Clone)]
pub(crate) struct PeerService {
    pub(crate) raft: Raft,
    pub(crate) peers: Peers,
    pub(crate) identity: Identity,
    pub(crate) reader: Reader,
    pub(crate) progress: Arc<Progress>,
    pub(crate) proposer: Arc<Proposer>,
    pub(crate) confirm: Arc<Confirm>,
    pub(crate) members: Arc<Members>,
    pub(crate) transfers: Transfers,
}

impl PeerService {
    pub(crate) fn server(self) -> PeerServer<PeerService> {
        PeerServer::new(self)
            .max_decoding_message_size(MESSAGE_MAX)
            .max_encoding_message_size(MESSAGE_MAX)
    }
}

type Replies<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

fn stopped(error: impl std::fmt::Display) -> Status {
    Status::unavailable(format!("consensus has stopped: {error}"))
}

#[tonic::async_trait]
impl Peer for PeerService {
    type AppendStream = Replies<AppendReply>;
    type ReadIndexStream = Replies<ReadIndexReply>;
    type ConfirmStream = Replies<ConfirmReply>;

    async fn append(
        &self,
        request: Request<Streaming<AppendRequest>>,
    ) -> Result<Response<Self::AppendStream>, Status> {
        let from = self.peers.check_sender(request.metadata())?;
        let requests =
            futures::stream::unfold(request.into_inner(), move |mut requests| async move {
                let request = requests.message().await;
                let request = request.and_then(|request| request.map(wire::appended).transpose());
                match request {
                    Ok(Some(request)) => Some((request, requests)),
                    Ok(None) => None,
                    Err(status) => {
                        tracing::debug!(
                            "remote-peer-id" = format!("{from:x}"),
                            error = status.message(),
                            "a stream of entries ended"
                        );
                        None
                    }
                }
            });
        let progress = self.progress.clone();
        let replies = self.raft.stream_append(requests).map(move |result| {
            let result = result.map_err(stopped)?;
            if !matches!(&result, Err(openraft::raft::StreamAppendError::HigherVote(_))) {
                progress.note_heard();
            }
            failpoint::hit("raftBeforeFollowerSend");
            Ok(wire::append_reply(&result))
        });
        Ok(self.peers.answer_stream(Box::pin(replies), self.progress.last()))
    }

    async fn heartbeat(
        &self,
        request: Request<AppendRequest>,
    ) -> Result<Response<AppendReply>, Status> {
        self.peers.check_sender(request.metadata())?;
        let request = wire::appended(request.into_inner())?;
        let previous = request.prev_log_id;
        let last = request.entries.last().map(|entry| entry.log_id).or(previous);
        let response = self.raft.append_entries(request).await.map_err(stopped)?;
        if let (AppendEntriesResponse::Conflict, Some(previous)) = (&response, previous)
            && !sabotage::is(Variant::OlderCopyAccepted)
        {
            // A heartbeat follows what this member acknowledged to that very leader. With less it
            // cannot be trusted to vote. etcd ends a member, too, that is told to have more.
            abort("follow the leader", &lost_text("this member", previous.index + 1));
        }
        let reply = wire::lone_reply(response, previous, last);
        if !matches!(reply.outcome, Some(kelson_api::peer::append_reply::Outcome::Higher(_))) {
            self.progress.note_heard();
        }
        Ok(self.peers.answer(reply))
    }

    async fn vote(&self, request: Request<VoteRequest>) -> Result<Response<VoteReply>, Status> {
        self.peers.check_sender(request.metadata())?;
        let request = request.into_inner();
        let asked = wire::asked_vote(&request)?;
        let response = if request.is_pre_vote {
            self.raft.pre_vote(asked).await
        } else {
            self.raft.vote(asked).await
        };
        Ok(self.peers.answer(wire::vote_reply(&response.map_err(stopped)?)))
    }

    async fn transfer_leader(
        &self,
        request: Request<TransferRequest>,
    ) -> Result<Response<TransferReply>, Status> {
        self.peers.check_sender(request.metadata())?;
        let asked = wire::asked_transfer(request.get_ref())?;
        let result = self.raft.handle_transfer_leader(asked).await.map_err(stopped)?;
        let refusal = result.err().map(|refusal| refusal.to_string()).unwrap_or_default();
        Ok(self.peers.answer(TransferReply { refusal }))
    }

    async fn forward(
        &self,
        request: Request<ForwardRequest>,
    ) -> Result<Response<ForwardReply>, Status> {
        self.peers.check_sender(request.metadata())?;
        let batch = request.into_inner().batch;
        // What goes into the log must be readable by every member for ever.
        if let Err(error) = Batch::decode(batch.clone()) {
            return Err(Status::invalid_argument(format!("a malformed batch: {error}")));
        }
        let Some(room) = self.proposer.admit_forwarded(batch.len()) else {
            return Ok(self.peers.answer(ForwardReply { outcome: Outcome::Busy.into() }));
        };
        let (sender, receiver) = tokio::sync::oneshot::channel();
        let answer = Answer::new(move |result: ClientWriteResult<TypeConfig>| {
            drop(room);
            // The asking member is gone if it was canceled.
            drop(sender.send(result));
        });
        let outcome = match self.raft.client_write_ff(Commands(batch), Some(answer)).await {
            // Consensus has ended and took nothing.
            Err(_) => Outcome::NotLeader,
            Ok(()) => match receiver.await {
                Ok(Ok(_)) => Outcome::Applied,
                Ok(Err(ClientWriteError::ForwardToLeader(_))) => Outcome::NotLeader,
                Ok(Err(_)) | Err(_) => Outcome::Unknown,
            },
        };
        Ok(self.peers.answer(ForwardReply { outcome: outcome.into() }))
    }

    async fn read_index(
        &self,
        request: Request<Streaming<ReadIndexRequest>>,
    ) -> Result<Response<Self::ReadIndexStream>, Status> {
        let from = self.peers.check_sender(request.metadata())?;
        let (raft, confirm, progress) =
            (self.raft.clone(), self.confirm.clone(), self.progress.clone());
        let replies = request.into_inner().then(move |request| {
            let (raft, confirm, progress) = (raft.clone(), confirm.clone(), progress.clone());
            async move {
                // Whoever asks in a later term would only be told what a deposed leader believes.
                let index = if request?.voted_term > progress.leading_term() {
                    None
                } else {
                    let index = confirm.index(&raft, Some(from)).await;
                    index.map_err(|_| stopped("no reads any more"))?
                };
                Ok(ReadIndexReply { index: index.unwrap_or(0) })
            }
        });
        Ok(self.peers.answer(Box::pin(replies)))
    }

    async fn confirm(
        &self,
        request: Request<Streaming<ConfirmRequest>>,
    ) -> Result<Response<Self::ConfirmStream>, Status> {
        self.peers.check_sender(request.metadata())?;
        let progress = self.progress.clone();
        let replies = request.into_inner().map(move |request| {
            request.map(|_| ConfirmReply { voted_term: progress.voted_term() })
        });
        Ok(self.peers.answer(Box::pin(replies)))
    }

    async fn change_members(
        &self,
        request: Request<ChangeMembersRequest>,
    ) -> Result<Response<ChangeMembersReply>, Status> {
        self.peers.check_sender(request.metadata())?;
        let reply = match self.members.change(request.into_inner()).await {
            Ok(index) => ChangeMembersReply { index, error: String::new() },
            Err(error) => ChangeMembersReply { index: 0, error: error.text().to_owned() },
        };
        Ok(self.peers.answer(reply))
    }

    async fn snapshot(
        &self,
        request: Request<Streaming<SnapshotPart>>,
    ) -> Result<Response<SnapshotReply>, Status> {
        let from = self.peers.check_sender(request.metadata())?;
        let (link, parts) = (self.peers.link(from), request.into_inner());
        let reply = snapshot::receive(&self.raft, &self.transfers, &link, parts).await;
        if let Err(status) = &reply {
            tracing::warn!(
                "remote-peer-id" = format!("{from:x}"),
                error = status.message(),
                "failed to receive database snapshot"
            );
        }
        Ok(self.peers.answer(reply?))
    }

    /// Anybody who may connect may ask this: a process that is about to join has no identity yet.
    async fn describe(
        &self,
        _request: Request<DescribeRequest>,
    ) -> Result<Response<DescribeReply>, Status> {
        let members = self.reader.members();
        let known = members.iter().filter_map(|member| {
            let storage_uuid = self.reader.storage_uuid(member.id)?;
            Some(KnownIdentity { id: member.id, storage_uuid })
        });
        Ok(Response::new(DescribeReply {
            cluster_id: self.identity.cluster_id,
            member_id: self.identity.member_id,
            identities: known.collect(),
            removed: self.reader.removed_members(),
            cluster_version: self.reader.cluster_version().unwrap_or_default(),
            members,
        }))
    }
}
