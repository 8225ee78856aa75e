//! What one member's services ask of another's, on the peer listeners: leases of the leader, hashes,
//! the version. Every call is checked to come from a member of this cluster. It is the receiving
//! end; who asks is in `housekeeping`.

use std::sync::Arc;
use std::time::Instant;

use kelson_api::Error;
use kelson_api::etcdserverpb::{
    HashKvRequest, HashKvResponse, LeaseTimeToLiveRequest, LeaseTimeToLiveResponse,
};
use kelson_api::peer::side_server::{Side, SideServer};
use kelson_api::peer::{
    ChainReply, ChainRequest, LeaseRenewReply, LeaseRenewRequest, VersionReply, VersionRequest,
};
use kelson_raft::Node;
use kelson_storage::Reader;
use tonic::{Request, Response, Status};

use super::blocking::Blocking;
use crate::app::App;
use crate::header::header;
use crate::housekeeping::lease::Lessor;
use crate::housekeeping::probe::Probes;
use crate::version::{ETCD_VERSION, KELSON_VERSION};

/// Serves other members.
pub(crate) struct SideService {
    node: Node,
    reader: Reader,
    lessor: Arc<Lessor>,
    probes: Arc<Probes>,
    blocking: Blocking,
}

/// The service for the peer listeners.
pub(crate) fn server(app: &App, lessor: Arc<Lessor>) -> SideServer<SideService> {
    SideServer::new(SideService {
        node: app.node.clone(),
        reader: app.reader.clone(),
        lessor,
        probes: Arc::clone(&app.probes),
        blocking: Blocking::new(),
    })
}

#[tonic::async_trait]
impl Side for SideService {
    async fn lease_renew(
        &self,
        request: Request<LeaseRenewRequest>,
    ) -> Result<Response<LeaseRenewReply>, Status> {
        self.node.check_peer(request.metadata())?;
        let reply = match self.lessor.renew_leading(request.get_ref().id).await {
            Ok(ttl) => LeaseRenewReply { error: String::new(), ttl },
            Err(error) => LeaseRenewReply { error: error.text().to_owned(), ttl: 0 },
        };
        Ok(Response::new(reply))
    }

    async fn lease_time_to_live(
        &self,
        request: Request<LeaseTimeToLiveRequest>,
    ) -> Result<Response<LeaseTimeToLiveResponse>, Status> {
        self.node.check_peer(request.metadata())?;
        let LeaseTimeToLiveRequest { id, keys } = *request.get_ref();
        Ok(Response::new(self.lessor.time_to_live_leading(id, keys).await?))
    }

    async fn hash_kv(
        &self,
        request: Request<HashKvRequest>,
    ) -> Result<Response<HashKvResponse>, Status> {
        self.node.check_peer(request.metadata())?;
        let (reader, revision) = (self.reader.clone(), request.get_ref().revision);
        let hashed = self.blocking.run(move || reader.hash_kv(revision)).await??;
        Ok(Response::new(HashKvResponse {
            header: Some(header(&self.node, self.reader.revision())),
            hash: hashed.hash,
            compact_revision: hashed.compact_revision,
            hash_revision: hashed.hash_revision,
        }))
    }

    async fn chain(&self, request: Request<ChainRequest>) -> Result<Response<ChainReply>, Status> {
        self.node.check_peer(request.metadata())?;
        let applied_index = self.reader.applied().index;
        let index = match request.get_ref().index {
            0 => applied_index,
            index => index,
        };
        let hash = self.reader.chain_at(index).unwrap_or(0);
        let since = self.reader.chain_since();
        Ok(Response::new(ChainReply { index, hash, applied_index, since }))
    }

    async fn version(
        &self,
        request: Request<VersionRequest>,
    ) -> Result<Response<VersionReply>, Status> {
        self.probes.heard(self.node.check_peer(request.metadata())?, Instant::now());
        Ok(Response::new(VersionReply {
            etcd_version: ETCD_VERSION.to_owned(),
            kelson_version: KELSON_VERSION.to_owned(),
        }))
    }
}

/// The row of the error table with this text, as another member sent it.
pub(crate) fn error_of(text: &str) -> Option<Error> {
    Error::ALL.iter().copied().find(|error| error.text() == text)
}
