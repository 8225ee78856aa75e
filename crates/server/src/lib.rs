//! The process around one member: flags, TLS, listeners, etcd's v3 services, watch fan-out,
//! housekeeping, metrics. It never touches bytes on disk and never decides what an agreed entry
//! means; it stands leftmost: server -> raft -> storage -> api.

pub mod app;
pub mod callers;
pub mod config;
pub mod dial;
pub mod discovery;
#[cfg(feature = "failpoints")]
pub mod failpoints;
#[doc(hidden)]
pub mod fuzz;
pub mod grpc_layer;
pub mod header;
pub mod housekeeping;
pub mod http;
pub mod jwt;
pub mod limits;
pub mod listen;
pub mod logging;
pub mod metrics;
pub mod notify;
pub mod peer_layer;
pub mod peer_urls;
pub mod ping_guard;
mod replace;
pub mod serve;
pub mod services;
pub mod shutdown;
pub mod tls;
pub mod validate;
pub mod version;
pub mod watch;
