//! Agreement: one order of commands for all members of a cluster. [`Node`] is the only door: it
//! opens log and state, runs consensus (openraft) and gives callers the results of the local apply.
//!
//! A write goes `proposer` (admission, batching) -> openraft -> `log_store` (fsync in the log's own
//! thread) -> openraft (commit) -> `state_machine` (apply) -> the caller, found in `waiters`. A
//! linearizable read passes `reads`, where the leader has a quorum `confirm` that it leads, and then
//! reads the store by itself.
//!
//! Only this crate names openraft, and only `codec` says what consensus looks like on disk. It
//! never speaks to clients and never decides what a command does. Other members are reached through
//! `network` (what openraft sends), `forward` (what followers ask their leader) and answered by
//! `peer_service`; `peers` says who they are. `dump` shows a log to people and tools, `check` looks at
//! all files of a stopped member; `restore` and `adopt` make members from snapshots and from the data
//! of an etcd; `export` makes a directory for an etcd.

mod adopt;
mod background;
mod check;
mod codec;
mod config;
mod confirm;
mod dump;
mod error;
mod export;
mod force;
mod forward;
mod identity;
mod join;
mod log_store;
mod membership;
mod network;
mod node;
mod peer_service;
mod peers;
mod progress;
mod proposer;
mod purge;
mod reads;
mod restore;
mod seed;
mod snapshot;
mod stall;
mod state_machine;
mod status;
mod throttle;
mod turn;
mod types;
mod waiters;
mod wire;

pub use adopt::AdoptError;
pub use check::{Checked, check};
pub use codec::DecodeError;
pub use config::{Landing, NodeConfig, Simulated};
pub use dump::{DumpError, Shown, show_log};
pub use error::StartError;
pub use export::{Export, ExportError, export};
pub use identity::{bootstrap_member_id, cluster_id};
pub use membership::MemberChange;
pub use node::Node;
pub use peers::{Credentials, PeerChannel, PeerConnector, PeerCounters, PeerIo, plain_connector};
pub use restore::{Restore, RestoreError, restore};
pub use seed::SeedError;
pub use status::{Counters, Status};

#[cfg(test)]
mod log_suite;
