//! The process around one member: flags, TLS, listeners, etcd's v3 services, watch fan-out,
//! housekeeping, metrics. It never touches bytes on disk and never decides what an agreed entry
//! means; it stands leftmost: server -> raft -> storage -> api.

pub mod config;
pub mod limits;
pub mod metrics;
pub mod tls;
pub mod version;
