//! The Lock service: a mutex whose holder is the oldest of the keys under a name. It keeps no lock
//! itself; `contest` has the rules.

use bytes::Bytes;
use kelson_api::v3lockpb::lock_server::Lock;
use kelson_api::v3lockpb::{LockRequest, LockResponse, UnlockRequest, UnlockResponse};
use tonic::{Request, Response, Status};

use super::contest::{Contender, Contests, Lost};
use super::gate::Gate;
use crate::app::App;

/// Serves locks.
pub(super) struct LockService {
    gate: Gate,
    contests: Contests,
}

impl LockService {
    pub(super) fn new(app: &App, contests: Contests) -> Self {
        Self { gate: Gate::new(app), contests }
    }
}

#[tonic::async_trait]
impl Lock for LockService {
    async fn lock(&self, request: Request<LockRequest>) -> Result<Response<LockResponse>, Status> {
        // The services that are asked below ask who calls.
        let _anybody = self.gate.unary(request.metadata(), request.extensions(), false)?;
        let asker = self.contests.asker(&request);
        let LockRequest { name, lease } = request.into_inner();
        let lease = asker.lease(lease).await?;
        let mut contender = Contender::enter(asker, &name, lease, Bytes::new()).await?;
        if !contender.is_first() {
            contender.header = contender.turn().await.map_err(|lost| match lost {
                Lost::Expired => Status::unknown("mutex: session is expired"),
                Lost::Failed(status) => status,
            })?;
        }
        contender.won();
        let (header, key) = (contender.header, contender.key.clone());
        Ok(Response::new(LockResponse { header, key }))
    }

    async fn unlock(
        &self,
        request: Request<UnlockRequest>,
    ) -> Result<Response<UnlockResponse>, Status> {
        // The services that are asked below ask who calls.
        let _anybody = self.gate.unary(request.metadata(), request.extensions(), false)?;
        let asker = self.contests.asker(&request);
        let header = asker.delete(request.into_inner().key).await?;
        Ok(Response::new(UnlockResponse { header }))
    }
}
