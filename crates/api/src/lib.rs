//! The words on the wire: generated messages of etcd's API and of our log, and the table of etcd
//! errors. It never does I/O and knows nothing of sled, openraft or tokio; every other crate may
//! name it. Service stubs exist only with feature `rpc`, so storage builds without tonic.

mod error;

pub use error::{Code, Error};

#[allow(missing_docs, unreachable_pub, unused_qualifications, clippy::all, reason = "generated code")]
#[rustfmt::skip]
mod generated {
    pub mod mvccpb { include!("generated/mvccpb.rs"); }
    pub mod authpb { include!("generated/authpb.rs"); }
    pub mod etcdserverpb { include!("generated/etcdserverpb.rs"); }
    pub mod v3lockpb { include!("generated/v3lockpb.rs"); }
    pub mod v3electionpb { include!("generated/v3electionpb.rs"); }
    pub mod health { include!("generated/grpc.health.v1.rs"); }
    pub mod command { include!("generated/kelson.command.rs"); }
    pub mod peer { include!("generated/kelson.peer.rs"); }
}

pub use generated::{authpb, command, etcdserverpb, health, mvccpb, peer, v3electionpb, v3lockpb};

/// Descriptors of all packages of etcd, as an encoded `FileDescriptorSet`, for whoever has to go by
/// the names of messages and fields. Source: proto/etcd.
pub const ETCD_DESCRIPTORS: &[u8] = include_bytes!("generated/etcd_descriptors.bin");

pub use prost::Message;
