//! The services of etcd's v3 API, one file each. A service checks a request, asks for agreement or
//! reads the store, and writes the header of the answer; it holds no state of its own and knows
//! neither connections nor metrics of calls.

pub mod gate;
mod hashing;
pub mod watch;
pub mod wire;

mod auth;
mod blocking;
mod cluster;
mod contest;
mod downgrade;
mod election;
mod health;
mod kv;
mod lease;
mod lock;
mod maintenance;
mod range_stream;
pub(crate) mod side;
mod snapshot;

use std::sync::Arc;

use kelson_api::etcdserverpb::auth_server::AuthServer;
use kelson_api::etcdserverpb::cluster_server::ClusterServer;
use kelson_api::etcdserverpb::kv_server::KvServer;
use kelson_api::etcdserverpb::lease_server::LeaseServer;
use kelson_api::etcdserverpb::maintenance_server::MaintenanceServer;
use kelson_api::health::health_server::HealthServer;
use kelson_api::v3electionpb::election_server::ElectionServer;
use kelson_api::v3lockpb::lock_server::LockServer;
use kelson_storage::Reply;
use tonic::Status;
use tonic::service::Routes;

use crate::app::App;
use crate::housekeeping::lease::Lessor;

/// All services behind one router that speaks grpc-go's texts. Call it once per process, inside
/// the runtime: the watch service starts its hub.
#[must_use]
pub fn routes(app: &App, lessor: Arc<Lessor>) -> Routes {
    let bytes_max = app.limits.max_decoding_bytes();
    let routes = Routes::default()
        .add_service(KvServer::new(kv::KvService::new(app)).max_decoding_message_size(bytes_max))
        .add_service(watch::server(app))
        .add_service(
            LeaseServer::new(lease::LeaseService::new(app, lessor))
                .max_decoding_message_size(bytes_max),
        )
        .add_service(
            ClusterServer::new(cluster::ClusterService::new(app))
                .max_decoding_message_size(bytes_max),
        )
        .add_service(
            MaintenanceServer::new(maintenance::MaintenanceService::new(app))
                .max_decoding_message_size(bytes_max),
        )
        .add_service(
            AuthServer::new(auth::AuthService::new(app)).max_decoding_message_size(bytes_max),
        )
        .add_service(
            HealthServer::new(health::HealthService::new(app)).max_decoding_message_size(bytes_max),
        );
    // They ask the services above, as clients do.
    let contests = contest::Contests::new(&routes.clone().prepare());
    let lock = lock::LockService::new(app, contests.clone());
    let election = election::ElectionService::new(app, contests);
    let routes = routes
        .add_service(LockServer::new(lock).max_decoding_message_size(bytes_max))
        .add_service(ElectionServer::new(election).max_decoding_message_size(bytes_max));
    Routes::from(routes.into_axum_router().layer(wire::GrpcTextsLayer))
}

/// What a caller hears if the store answered with another kind of reply than was asked for. It
/// cannot happen unless apply has a defect, and then it must not be taken for success.
fn mismatched(asked: &str, reply: &Reply) -> Status {
    // By its kind alone: a reply may hold values of clients, or a token.
    let kind = std::mem::discriminant(reply);
    tracing::error!(asked, ?kind, "the store gave the wrong kind of reply");
    Status::internal("wrong kind of reply")
}
