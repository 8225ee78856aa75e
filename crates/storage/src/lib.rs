//! The store of one member: the raft log, and the state that applying the log builds. `Store` is the
//! only writer and is driven by raft; any number of `Reader`s answer reads, watches and housekeeping.
//! This crate never opens a socket, never reads a clock to decide anything and knows no consensus.

mod dir;
mod disk;
mod engine;
mod feed;
mod keys;
mod lease;
pub mod log {
    //! The raft log.
    mod durable;
    pub use durable::{Durable, DurablePublisher};
}
mod mvcc;
mod options;
mod open;
mod persist;
mod reader;
mod recover;
mod store;
mod types;

pub use dir::{DataDir, Identity};
pub use feed::Feed;
pub use mvcc::compact::Pin;
pub use open::{OpenError, open};
pub use options::Options;
pub use reader::{Reader, StreamChunk, StreamedRange};
pub use store::Store;
pub use types::{
    Changes, CompactionTicket, Fatal, FeedEvent, LeaseRow, LogId, Outcome, Recent, Reply, Revised,
    RevisionKey, Sizes, Stats,
};
