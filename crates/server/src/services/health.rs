//! The standard health service of gRPC: the server as a whole, named by the empty string, serves
//! as long as it answers. Whether the member has a leader or space is for HTTP /health to say.

use std::pin::Pin;

use futures::{Stream, StreamExt};
use kelson_api::Error;
use kelson_api::health::health_check_response::ServingStatus;
use kelson_api::health::health_server::Health;
use kelson_api::health::{HealthCheckRequest, HealthCheckResponse};
use tonic::{Request, Response, Status};

use super::gate::Gate;
use crate::app::App;

/// Serves health checks.
pub(super) struct HealthService {
    gate: Gate,
}

impl HealthService {
    pub(super) fn new(app: &App) -> Self {
        Self { gate: Gate::new(app) }
    }
}

fn response(status: ServingStatus) -> HealthCheckResponse {
    HealthCheckResponse { status: status as i32 }
}

#[tonic::async_trait]
impl Health for HealthService {
    type WatchStream = Pin<Box<dyn Stream<Item = Result<HealthCheckResponse, Status>> + Send>>;

    async fn check(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<HealthCheckResponse>, Status> {
        let (_anybody, request) = self.gate.take(request)?;
        if !request.service.is_empty() {
            return Err(Error::UnknownHealthService.into());
        }
        Ok(Response::new(response(ServingStatus::Serving)))
    }

    async fn watch(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let (metadata, extensions, request) = request.into_parts();
        let (_anybody, mut leader) = self.gate.stream(&metadata, &extensions, false).await?;
        let status = if request.service.is_empty() {
            ServingStatus::Serving
        } else {
            ServingStatus::ServiceUnknown
        };
        // The status never changes while the connection lives, so the stream says it once and then
        // waits for the client to leave.
        let first = futures::stream::iter([Ok(response(status))]);
        let end = futures::stream::once(async move { Err(leader.ended().await.into()) });
        Ok(Response::new(Box::pin(first.chain(end))))
    }
}
