//! The store of one member: the raft log, and the state that applying the log builds. `Store` is the
//! only writer and is driven by raft; any number of `Reader`s answer reads, watches and housekeeping.
//! This crate never opens a socket, never reads a clock to decide anything and knows no consensus.

mod feed;
mod lease;
mod mvcc;
mod options;
#[path = "mvcc/memory.rs"]
mod persist;
mod reader;
mod store;
mod types;

pub use feed::Feed;
pub use mvcc::compact::Pin;
pub use options::Options;
pub use reader::{Reader, StreamChunk, StreamedRange};
pub use store::Store;
pub use types::{
    Changes, CompactionTicket, Fatal, FeedEvent, LeaseRow, LogId, Outcome, Recent, Reply, Revised,
    RevisionKey, Sizes, Stats,
};
