//! How openraft reaches other members. This version runs clusters of one member, which has no
//! peers, so every call is refused with an error that says so; no socket is opened here.

use std::future::Future;

use openraft::AnyError;
use openraft::errors::{RPCError, ReplicationClosed, StreamingError, Unreachable};
use openraft::network::{RPCOption, RaftNetworkFactory, RaftNetworkV2};
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, VoteRequest, VoteResponse,
};

use crate::snapshot::SnapshotHandle;
use crate::types::{Peer, Snapshot, TypeConfig, Vote};

/// Makes [`NoPeers`] for whoever openraft asks for.
pub(crate) struct Network;

impl RaftNetworkFactory<TypeConfig> for Network {
    type Network = NoPeers;

    async fn new_client(&mut self, target: u64, _node: &Peer) -> NoPeers {
        NoPeers { target }
    }
}

/// A peer that cannot be reached, ever.
pub(crate) struct NoPeers {
    target: u64,
}

impl NoPeers {
    fn refusal(&self) -> Unreachable<TypeConfig> {
        Unreachable::new(&AnyError::error(format!(
            "member {:x}: multi-member clusters are not supported by this version yet",
            self.target
        )))
    }
}

impl RaftNetworkV2<TypeConfig> for NoPeers {
    type SnapshotData = SnapshotHandle;

    async fn append_entries(
        &mut self,
        _rpc: AppendEntriesRequest<TypeConfig>,
        _option: RPCOption,
    ) -> Result<AppendEntriesResponse<TypeConfig>, RPCError<TypeConfig>> {
        Err(RPCError::Unreachable(self.refusal()))
    }

    async fn vote(
        &mut self,
        _rpc: VoteRequest<TypeConfig>,
        _option: RPCOption,
    ) -> Result<VoteResponse<TypeConfig>, RPCError<TypeConfig>> {
        Err(RPCError::Unreachable(self.refusal()))
    }

    // The default would grant every pre-vote and so undo it.
    async fn pre_vote(
        &mut self,
        _rpc: VoteRequest<TypeConfig>,
        _option: RPCOption,
    ) -> Result<VoteResponse<TypeConfig>, RPCError<TypeConfig>> {
        Err(RPCError::Unreachable(self.refusal()))
    }

    async fn full_snapshot(
        &mut self,
        _vote: Vote,
        _snapshot: Snapshot,
        _cancel: impl Future<Output = ReplicationClosed> + Send + 'static,
        _option: RPCOption,
    ) -> Result<SnapshotResponse<TypeConfig>, StreamingError<TypeConfig>> {
        Err(StreamingError::Unreachable(self.refusal()))
    }
}
