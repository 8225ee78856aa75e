//! The store of one member: the raft log, and the state that applying the log builds. `Store` is the
//! only writer and is driven by raft; any number of `Reader`s answer reads, watches and housekeeping.
//! This crate never opens a socket, never reads a clock to decide anything and knows no consensus.

mod auth;
mod chain;
mod dir;
mod disk;
mod engine;
pub mod etcd;
pub mod failpoint;
mod feed;
mod hash;
mod keys;
mod lease;
pub mod log;
mod mvcc;
pub mod offline;
mod open;
mod options;
mod persist;
mod reader;
mod recover;
pub mod sabotage;
mod snapshot;
mod store;
mod times;
mod transfer;
mod types;

pub use dir::{DataDir, Identity};
pub use feed::Feed;
pub use hash::HashKv;
pub use mvcc::compact::Pin;
pub use open::{OpenError, open};
pub use options::Options;
pub use reader::{Reader, StreamChunk, StreamedRange};
pub use snapshot::SnapshotFile;
pub use store::Store;
pub use times::{StoreTimes, TimesRead};
pub use transfer::{Received, Receiver, Transfer, TransferError};
pub use types::{
    Changes, CompactionTicket, Fatal, FeedEvent, LeaseRow, LogId, Outcome, Recent, Reply, Revised,
    RevisionKey, Sizes, Stats,
};

/// Body of a fuzz target: the decoders of the state's rows and tables on any bytes. The first byte is
/// the length of the key.
#[doc(hidden)]
pub fn fuzz_row(data: &[u8]) {
    keys::fuzz(data);
}

/// Body of a fuzz target: the decoder of transferred chunks on any bytes.
#[doc(hidden)]
pub fn fuzz_chunk(data: &[u8]) {
    transfer::fuzz(data);
}

/// Body of a fuzz target: any bytes as a database file of etcd, written to `file` first.
#[doc(hidden)]
pub fn fuzz_bolt(data: &[u8], file: &std::path::Path) {
    etcd::fuzz_bolt(data, file);
}

/// Body of a fuzz target: any bytes as a log file of etcd, written to a file in `dir` first.
#[doc(hidden)]
pub fn fuzz_wal(data: &[u8], dir: &std::path::Path) {
    etcd::fuzz_wal(data, dir);
}

/// Body of a fuzz target: any bytes as a snapshot that is restored, in the empty directory `dir`.
#[doc(hidden)]
pub fn fuzz_restore(data: &[u8], dir: &std::path::Path) {
    etcd::fuzz_restore(data, dir);
}
