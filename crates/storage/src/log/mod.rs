//! The raft log: one file sequence, one writer thread, one fdatasync per group of appends.
//!
//! It stands between raft and the disk: raft hands entries and votes in and is called back when they
//! are durable; the state's checkpoints wait on [`Durable`]. It never interprets a payload, never
//! acknowledges before fdatasync (unless told so), and never repairs what may have been promised.
//!
//! Rooms: `memory` answers reads of the tail and knows the place of every older entry; `writer`
//! owns the active segment; `spare` keeps one segment ready; `recovery` reads everything back;
//! `record` and `segment` know the bytes (docs/STORAGE_FORMAT.md); `dump` shows them to people; `disk`
//! is the seam for tests, `sim` a disk in memory that can lose power.
//!
//! Invariants:
//! - Entries are readable when `append` returns, and callbacks come in the order of the calls.
//! - A callback with `Ok` follows the fdatasync of everything asked before it.
//! - Indexes begin at 1 and have no gap above the purge mark; terms never go down.
//! - A segment's name is durable only after its header, the vote and the purge mark are.

mod disk;
mod dump;
mod durable;
mod fuzz;
mod memory;
mod read;
mod record;
mod recovery;
mod segment;
mod sim;
mod spare;
mod stats;
mod verify;
mod writer;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;

use bytes::Bytes;
use parking_lot::Mutex;

pub use disk::{Disk, LogFile, RealDisk};
pub use dump::{Dumped, dump};
pub use durable::{Durable, DurablePublisher};
pub use fuzz::fuzz_segment;
pub use sim::{Call, Crash, Faults, SimDisk};
pub use stats::{FSYNC_BUCKETS, LogStats, fsync_bucket_bound};
pub use verify::{Verified, verify};

use crate::sabotage::{self, Variant};
use crate::times::TimesRead;
use crate::types::LogId;
use memory::Memory;
use record::{RECORD_HEADER, record_bytes};
use spare::Spares;
use stats::Counters;
use writer::{HEAD_BYTES, Operation, VOTE_BYTES_MAX, Writer};

/// Longest segment that may be configured or opened; positions are 32 bits on disk.
const SEGMENT_BYTES_MAX: u64 = 1 << 30;
/// Shortest segment: the first block, the reserve and a few records.
const SEGMENT_BYTES_MIN: u64 = 16 << 10;
/// The first segment is filled with zeros while the member waits for it, so it is short.
const FIRST_SEGMENT_BYTES: u64 = 4 << 20;
/// Room at the end of a segment that entries leave to votes.
const RESERVE_BYTES_MAX: u64 = 64 << 10;

/// How to open a log.
#[derive(Clone, Debug)]
pub struct LogOptions {
    /// Directory of the segments, `<data>/member/wal`; made if it is missing.
    pub dir: PathBuf,
    /// Length of a segment, a multiple of 4096 from 16 KiB to 1 GiB. Unit: bytes.
    pub segment_bytes: u64,
    /// Payload bytes of the newest entries that stay in memory. Unit: bytes.
    pub tail_bytes: usize,
    /// False never calls fdatasync: a power cut then loses acknowledged entries.
    pub fsync: bool,
    /// Whose log it is; a log of another identity is refused.
    pub identity: [u8; 16],
}

impl LogOptions {
    /// The settings of production: segments of 64 MiB, a tail of 8 MiB, with fdatasync.
    pub fn new(dir: impl Into<PathBuf>, identity: [u8; 16]) -> LogOptions {
        let (segment_bytes, tail_bytes) = (64 << 20, 8 << 20);
        LogOptions { dir: dir.into(), segment_bytes, tail_bytes, fsync: true, identity }
    }

    /// Largest payload of one entry. Unit: bytes.
    pub fn payload_bytes_max(&self) -> usize {
        let room = self.segment_bytes - self.reserve_bytes() - (HEAD_BYTES + RECORD_HEADER) as u64;
        room as usize - record_bytes(0)
    }

    fn reserve_bytes(&self) -> u64 {
        (self.segment_bytes / 8).min(RESERVE_BYTES_MAX)
    }

    fn first_segment_bytes(&self) -> u64 {
        self.segment_bytes.min(FIRST_SEGMENT_BYTES)
    }

    fn validate(&self) -> Result<(), LogError> {
        let range = SEGMENT_BYTES_MIN..=SEGMENT_BYTES_MAX;
        if !range.contains(&self.segment_bytes) || !self.segment_bytes.is_multiple_of(4096) {
            return Err(LogError::SegmentBytes { bytes: self.segment_bytes });
        }
        Ok(())
    }
}

/// One raft entry as the log sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its position; indexes begin at 1.
    pub id: LogId,
    /// Payload kind of the raft crate, opaque here.
    pub kind: u8,
    /// Opaque bytes, at most [`LogOptions::payload_bytes_max`].
    pub payload: Bytes,
}

/// What opening a log gives.
pub struct Opened {
    /// The handle.
    pub log: Log,
    /// The last vote that was saved; `None` only for a new log.
    pub vote: Option<Bytes>,
    /// Everything up to here was purged; index 0 = nothing.
    pub purged: LogId,
    /// Position of the last entry, or of the purge mark if there is none behind it.
    pub last: LogId,
    /// A position that was known to be committed; may be far behind the truth.
    pub committed_hint: Option<LogId>,
}

/// Why the log refused.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The file system said no.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which file or directory.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// Bytes that were durable have changed.
    #[error(
        "log segment {} is damaged at byte {offset}: {reason}; acknowledged entries may be lost, \
         so this member must not go on: {REPLACE}", file.display()
    )]
    Corrupt {
        /// The damaged file.
        file: PathBuf,
        /// Where it is damaged. Unit: bytes from the start of the file.
        offset: u64,
        /// What does not hold.
        reason: &'static str,
    },
    /// A segment is not there, but entries in it are needed.
    #[error(
        "log segment {} is missing (damage at its byte 0); acknowledged entries may be lost, so \
         this member must not go on: {REPLACE}", file.display()
    )]
    Missing {
        /// The file that should exist.
        file: PathBuf,
    },
    /// Entries without a vote: the member could vote twice in one term.
    #[error(
        "log without a vote in {} (no vote record from byte 0 of its segments): this member could \
         vote twice in one term, so it must not go on: {REPLACE}", dir.display()
    )]
    NoVote {
        /// The log's directory.
        dir: PathBuf,
    },
    /// Not a file of this format.
    #[error("{} is not a log segment of this program; it was left untouched", file.display())]
    Foreign {
        /// The file.
        file: PathBuf,
    },
    /// A format of the future.
    #[error(
        "log segment {} has format version {version}, newer than this program knows; it was left \
         untouched: start the newer program", file.display()
    )]
    NewerVersion {
        /// The file.
        file: PathBuf,
        /// Its version.
        version: u32,
    },
    /// The log of somebody else.
    #[error("log segment {} belongs to another member; it was left untouched", file.display())]
    OtherMember {
        /// The file.
        file: PathBuf,
    },
    /// A setting that cannot work.
    #[error("a log segment of {bytes} bytes is not possible: 16 KiB to 1 GiB, multiple of 4096")]
    SegmentBytes {
        /// The value.
        bytes: u64,
    },
    /// The entries are gone, or a truncation asks for what was purged.
    #[error("log index {index} lies below the purge mark {}", purged.index)]
    Purged {
        /// What was asked.
        index: u64,
        /// The purge mark.
        purged: LogId,
    },
    /// An entry that does not continue the log.
    #[error("log entry {entry:?} does not continue the log, which ends with {last:?}")]
    OutOfOrder {
        /// The end of the log before it.
        last: LogId,
        /// The first entry that does not fit.
        entry: LogId,
    },
    /// A payload or vote that no segment can hold.
    #[error("a log record of {bytes} bytes is over the limit of {bytes_max}")]
    TooLarge {
        /// Its length.
        bytes: usize,
        /// The limit.
        bytes_max: usize,
    },
    /// An append before any vote was saved.
    #[error("no vote was saved before the first entry of the log")]
    VoteFirst,
    /// The log was shut down.
    #[error("the log is closed")]
    Closed,
}

/// What an operator can do about a damaged log.
const REPLACE: &str = "replace this member (remove the member from the cluster, delete its data \
     directory, add it again as a new member), or restore the cluster from a backup";

impl LogError {
    fn io(action: &'static str, path: &Path, source: io::Error) -> LogError {
        LogError::Io { action, path: path.to_owned(), source }
    }

    fn corrupt(file: &Path, offset: usize, reason: &'static str) -> LogError {
        LogError::Corrupt { file: file.to_owned(), offset: offset as u64, reason }
    }
}

/// Called once by the writer thread (or at once by the caller's, when the operation is refused).
/// It must be quick and must not panic: the next group waits for it.
pub type Done = Box<dyn FnOnce(Result<(), LogError>) + Send>;

/// What the threads and all handles share.
struct Shared {
    options: LogOptions,
    disk: Arc<dyn Disk>,
    memory: Mutex<Memory>,
    durable: Durable,
    publisher: DurablePublisher,
    spares: Spares,
    counters: Counters,
}

/// Handle of an open log; clones share it. Dropping the last one shuts the log down.
#[derive(Clone)]
pub struct Log(Arc<Handle>);

struct Handle {
    shared: Arc<Shared>,
    /// Unbounded: raft waits for the answers, and its proposer bounds the bytes in flight.
    sender: Sender<Operation>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl Log {
    /// Opens the log on this machine's file system, or makes a new one.
    ///
    /// The caller holds the lock of the data directory. Blocks: all segments are read.
    ///
    /// # Errors
    /// Refuses damage, gaps, files of others and a log without a vote; a torn tail is cut.
    pub fn open(options: LogOptions) -> Result<Opened, LogError> {
        Log::open_on(options, Arc::new(RealDisk))
    }

    /// Like [`Log::open`], on another disk: for fault injection and simulation.
    pub fn open_on(options: LogOptions, disk: Arc<dyn Disk>) -> Result<Opened, LogError> {
        options.validate()?;
        let recovered = recovery::recover(disk.as_ref(), &options)?;
        let spares = Spares::new(Arc::clone(&disk), options.dir.clone(), options.segment_bytes);
        for path in recovered.spares {
            let adopted = spares.adopt(path);
            adopted.map_err(|error| LogError::io("adopt a spare in", &options.dir, error))?;
        }
        let (purged, last) = (recovered.purged, recovered.last);
        let has_vote = recovered.vote.is_some();
        let mut memory =
            Memory::new(recovered.segments, (purged, last), has_vote, options.tail_bytes);
        // A crash may have come between a purge and the removal of its segments.
        spares.retire(memory.retire());
        let (durable, publisher) = Durable::manual(last.index);
        let shared = Arc::new(Shared {
            options,
            disk,
            memory: Mutex::new(memory),
            durable,
            publisher,
            spares,
            counters: Counters::default(),
        });
        let (sender, receiver) = channel();
        let vote = recovered.vote.clone();
        let writer =
            Writer::new(Arc::clone(&shared), receiver, recovered.active, vote, (purged, last));
        let helper = Arc::clone(&shared);
        let threads = vec![
            spawn("log-writer", &shared, move || writer.run())?,
            spawn("log-spare", &shared, move || helper.spares.run())?,
        ];
        let log = Log(Arc::new(Handle { shared, sender, threads: Mutex::new(threads) }));
        let (vote, committed_hint) = (recovered.vote, recovered.committed);
        Ok(Opened { log, vote, purged, last, committed_hint })
    }

    /// Adds entries at the end. They are readable when this returns; `done` follows their fdatasync.
    ///
    /// # Errors
    /// `done` gets, at once and with nothing changed: `OutOfOrder`, `TooLarge`, `VoteFirst` (no
    /// vote was ever saved), `Closed`.
    pub fn append(&self, entries: Vec<Entry>, done: Done) {
        let bytes_max = self.0.shared.options.payload_bytes_max();
        let mut memory = self.0.shared.memory.lock();
        let large = entries.iter().map(|entry| entry.payload.len()).find(|&it| it > bytes_max);
        let result = match large {
            _ if memory.closed => Err(LogError::Closed),
            _ if !memory.has_vote => Err(LogError::VoteFirst),
            Some(bytes) => Err(LogError::TooLarge { bytes, bytes_max }),
            None => memory.append(&entries),
        };
        match result {
            // Sent under the lock, so that the files follow in the order of the memory.
            Ok(operation) => self.send(Operation::Append { entries, operation, done }),
            Err(error) => {
                drop(memory);
                done(Err(error));
            }
        }
    }

    /// Saves the vote, opaque bytes of at most 1 KiB. The new one replaces the old one.
    pub fn save_vote(&self, vote: Bytes, done: Done) {
        let mut memory = self.0.shared.memory.lock();
        let (bytes, bytes_max) = (vote.len(), VOTE_BYTES_MAX);
        let refused = if memory.closed {
            Some(LogError::Closed)
        } else if bytes > bytes_max {
            Some(LogError::TooLarge { bytes, bytes_max })
        } else {
            None
        };
        if let Some(error) = refused {
            drop(memory);
            return done(Err(error));
        }
        memory.has_vote = true;
        if sabotage::is(Variant::VoteNotSynced) {
            self.send(Operation::Vote { vote, done: Box::new(drop) });
            return done(Ok(()));
        }
        self.send(Operation::Vote { vote, done });
    }

    /// Drops all entries behind `index`; 0 drops all. Reads follow at once, the files later.
    ///
    /// The durable index goes back at once too: an entry that replaces a dropped one is not durable
    /// because the dropped one was.
    ///
    /// # Errors
    /// `done` gets `Purged` if `index` lies below the purge mark, `Closed`.
    pub fn truncate_after(&self, index: u64, done: Done) {
        let mut memory = self.0.shared.memory.lock();
        let result =
            if memory.closed { Err(LogError::Closed) } else { memory.truncate_after(index) };
        match result {
            Ok((operation, last)) => {
                let durable = self.0.shared.durable.index();
                self.0.shared.publisher.publish(durable.min(index));
                self.send(Operation::TruncateAfter { index, last, operation, done });
            }
            Err(error) => {
                drop(memory);
                done(Err(error));
            }
        }
    }

    /// Drops all entries up to `upto`. Beyond the end it empties the log, which then continues
    /// behind `upto` (a snapshot was installed). Below the purge mark it changes nothing.
    pub fn purge(&self, upto: LogId, done: Done) {
        let mut memory = self.0.shared.memory.lock();
        if memory.closed {
            drop(memory);
            return done(Err(LogError::Closed));
        }
        memory.purge(upto);
        self.send(Operation::Purge { upto, done });
    }

    /// Tells a position that is known to be committed. It costs no write of its own: it goes out
    /// with a later append, and comes back as [`Opened::committed_hint`].
    pub fn hint_committed(&self, id: LogId) {
        let mut memory = self.0.shared.memory.lock();
        memory.committed = memory.committed.max(id);
    }

    /// Index of the first entry that can be read (one behind the end if there is none).
    pub fn first_index(&self) -> u64 {
        self.purged().index + 1
    }

    /// Position of the last entry, durable or not, or of the purge mark.
    pub fn last_id(&self) -> LogId {
        self.0.shared.memory.lock().last
    }

    /// The purge mark; index 0 = nothing was ever purged.
    pub fn purged(&self) -> LogId {
        self.0.shared.memory.lock().purged
    }

    /// Position of the entry (or purge mark) at this index, without reading its payload.
    pub fn id_at(&self, index: u64) -> Option<LogId> {
        self.0.shared.memory.lock().id_at(index)
    }

    /// The durable index of this log.
    pub fn durable(&self) -> Durable {
        self.0.shared.durable.clone()
    }

    /// False when no further segment could be prepared: client writes must be refused (NOSPACE),
    /// while votes and what raft itself needs still find room for a while.
    pub fn can_grow(&self) -> bool {
        self.0.shared.spares.can_grow()
    }

    /// Counters since the log was opened.
    pub fn stats(&self) -> LogStats {
        self.0.shared.counters.read()
    }

    /// How long the write calls took, without the syncs, since the log was opened.
    pub fn write_times(&self) -> TimesRead {
        self.0.shared.counters.writes.0.read()
    }

    /// Waits until the helper thread has nothing to do: in a simulation nothing may happen at a time of
    /// its own. Blocks.
    pub fn settle(&self) {
        self.0.shared.spares.settle();
    }

    /// Finishes what was asked before, closes the log and waits for its threads. Later calls are
    /// refused with `Closed`; reads go on working. Must not be called from a `done` callback.
    pub fn shutdown(&self) {
        self.0.close();
    }

    fn send(&self, operation: Operation) {
        // The writer ends only after it has set `closed` under the lock that the caller holds.
        let sent = self.0.sender.send(operation);
        assert!(sent.is_ok(), "the writer of an open log is running");
    }
}

impl Handle {
    fn close(&self) {
        let threads = std::mem::take(&mut *self.threads.lock());
        if threads.is_empty() {
            return;
        }
        // An error means that the writer has ended already.
        let _ = self.sender.send(Operation::Shutdown);
        for thread in threads {
            // The helper goes last: the writer may be waiting for a spare segment.
            if thread.thread().name() == Some("log-spare") {
                self.shared.spares.stop();
            }
            // The last handle may be dropped inside a callback, on the writer thread itself.
            if thread.thread().id() != std::thread::current().id() {
                let _ = thread.join();
            }
        }
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.close();
    }
}

fn spawn(
    name: &'static str,
    shared: &Shared,
    body: impl FnOnce() + Send + 'static,
) -> Result<JoinHandle<()>, LogError> {
    std::thread::Builder::new()
        .name(name.to_owned())
        .spawn(body)
        .map_err(|error| LogError::io("start a thread for", &shared.options.dir, error))
}
