//! The storage of one member, driven through its public doors: directory, log, state. It opens them in
//! the order in which a member starts and refuses what a member refuses; it has no consensus, so
//! whatever the log holds is taken as agreed.

use std::path::{Path, PathBuf};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use bytes::Bytes;
use kelson_api::Message;
use kelson_api::command::Batch;
use kelson_storage::log::{Done, Durable, Entry, Log, LogError, LogOptions};
use kelson_storage::{DataDir, Identity, LogId, Options, Reader, Store};

/// Length of a segment: short, so that a run has many.
const SEGMENT_BYTES: u64 = 64 << 10;
/// Payload that the log holds in memory: little, so that older entries are read from files.
const TAIL_BYTES: usize = 32 << 10;
/// Written bytes that make a checkpoint: few, so that a run has many.
const CHECKPOINT_BYTES: u64 = 24 << 10;
/// Longest time between a change and its checkpoint.
const CHECKPOINT_INTERVAL: Duration = Duration::from_millis(200);
/// Longest wait for anything that must come.
const PATIENCE: Duration = Duration::from_secs(60);

/// Whose directory it is.
const IDENTITY: Identity = Identity { cluster_id: 0x51, member_id: 0x52 };

/// Kind of entries that carry an operation.
pub const OPERATION: u8 = 1;
/// Kind of entries that another leader cut off again.
pub const STRANGER: u8 = 2;

/// A running member.
pub struct Member {
    /// Holds the lock of the directory.
    _dir: DataDir,
    /// Its log.
    pub log: Log,
    /// Its state.
    pub store: Store,
    /// The door to read the state.
    pub reader: Reader,
    /// The newest vote, which is a term here.
    pub vote: u64,
}

/// Settings of the state in a directory.
pub fn options(dir: &Path, log_purged: LogId) -> Options {
    Options {
        checkpoint_bytes: CHECKPOINT_BYTES,
        checkpoint_interval: CHECKPOINT_INTERVAL,
        compaction_sleep: Duration::ZERO,
        sled_cache_bytes: 1 << 20,
        log_purged,
        ..Options::new(dir)
    }
}

impl Member {
    /// Opens or prepares everything, as the start of a member does.
    pub fn open(dir: &Path) -> Result<Self, String> {
        let data_dir = DataDir::open(dir).map_err(|error| error.to_string())?;
        if data_dir.identity().is_none() {
            data_dir.set_identity(IDENTITY).map_err(|error| error.to_string())?;
        }
        let log_options = LogOptions {
            segment_bytes: SEGMENT_BYTES,
            tail_bytes: TAIL_BYTES,
            ..LogOptions::new(data_dir.wal_dir(), data_dir.storage_uuid())
        };
        let opened = Log::open(log_options).map_err(|error| error.to_string())?;
        let vote = match opened.vote {
            Some(bytes) => term_of(&bytes)?,
            None => {
                save_vote(&opened.log, 0)?;
                0
            }
        };
        let options = options(dir, opened.purged);
        let (store, reader) = kelson_storage::open(&options, opened.log.durable())
            .map_err(|error| error.to_string())?;
        let (state, purged) = (store.applied(), opened.purged.index);
        let last = opened.last.index.max(purged);
        if state.index > last {
            if reader.installed() != state {
                return Err(format!("the log ends at {last}, the state at {}", state.index));
            }
            settled(|done| opened.log.purge(state, done))?;
        }
        if state.index < purged {
            return Err(format!(
                "the log begins after {purged}, the state ends at {}",
                state.index
            ));
        }
        Ok(Self { _dir: data_dir, log: opened.log, store, reader, vote })
    }

    /// Applies what the log has beyond the state, up to an entry.
    pub fn replay(&mut self, upto: u64) -> Result<(), String> {
        while self.store.applied().index < upto {
            let next = self.store.applied().index + 1;
            let entries = self.log.read(next, upto + 1, 1 << 20).map_err(|e| e.to_string())?;
            if entries.is_empty() {
                return Err(format!("entry {next} of the log is missing"));
            }
            entries.iter().try_for_each(|entry| self.apply(entry))?;
        }
        Ok(())
    }

    /// Puts entries behind the last one and waits until they are on disk.
    pub fn append(&self, kind: u8, payloads: Vec<Bytes>) -> Result<Vec<Entry>, String> {
        let first = self.log.last_id().index + 1;
        let entry = |(at, payload)| {
            let id = LogId { term: self.vote, index: first + at as u64 };
            Entry { id, kind, payload }
        };
        let entries: Vec<Entry> = payloads.into_iter().enumerate().map(entry).collect();
        settled(|done| self.log.append(entries.clone(), done))?;
        Ok(entries)
    }

    /// Carries out an entry that carries an operation.
    pub fn apply(&mut self, entry: &Entry) -> Result<(), String> {
        let batch = Batch::decode(entry.payload.clone()).map_err(|error| error.to_string())?;
        let applied = self.store.apply(entry.id, &batch.commands);
        applied.map(drop).map_err(|error| error.to_string())
    }

    /// Votes in a later term, on disk when this returns.
    pub fn vote(&mut self, term: u64) -> Result<(), String> {
        save_vote(&self.log, term)?;
        self.vote = term;
        Ok(())
    }

    /// Waits until everything applied is on disk.
    pub fn settle(&self) -> Result<(), String> {
        let (applied, durable) = (self.store.applied(), self.store.durable_applied());
        let until = Instant::now() + PATIENCE;
        while durable.borrow().index < applied.index {
            if Instant::now() > until {
                return Err(format!("no checkpoint covers entry {}", applied.index));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// Stops in good order.
    pub fn close(self) {
        self.store.shutdown();
        self.log.shutdown();
    }
}

/// A state without a log, in a directory of its own: what a plan says is applied to it directly.
pub struct Scratch {
    /// The directory, which must outlive the state.
    pub home: tempfile::TempDir,
    /// Its state.
    pub store: Store,
    /// The door to read the state.
    pub reader: Reader,
}

impl Scratch {
    /// An empty one.
    pub fn new() -> Result<Self, String> {
        let home = tempfile::tempdir().map_err(|error| format!("make a directory: {error}"))?;
        std::fs::create_dir(home.path().join("member")).map_err(|error| error.to_string())?;
        // All that is applied counts as being in the log.
        let (durable, _log) = Durable::manual(u64::MAX);
        let options = options(home.path(), LogId::default());
        let (store, reader) =
            kelson_storage::open(&options, durable).map_err(|error| error.to_string())?;
        Ok(Self { home, store, reader })
    }
}

/// Where the state of a directory lies if it was found damaged and set aside.
pub fn set_aside(dir: &Path) -> Option<PathBuf> {
    let entries = std::fs::read_dir(dir.join("member")).ok()?;
    let mut paths = entries.flatten().map(|entry| entry.path());
    paths.find(|path| path.file_name().is_some_and(|it| it.to_string_lossy().contains(".bad-")))
}

fn save_vote(log: &Log, term: u64) -> Result<(), String> {
    let bytes = Bytes::copy_from_slice(&term.to_le_bytes());
    settled(|done| log.save_vote(bytes, done))
}

fn term_of(vote: &[u8]) -> Result<u64, String> {
    let bytes = vote.try_into().map_err(|_| format!("a vote of {} bytes", vote.len()))?;
    Ok(u64::from_le_bytes(bytes))
}

/// Waits until a step of the log is on disk.
pub fn settled(start: impl FnOnce(Done)) -> Result<(), String> {
    let (sender, receiver) = channel::<Result<(), LogError>>();
    start(Box::new(move |result| drop(sender.send(result))));
    match receiver.recv_timeout(PATIENCE) {
        Ok(result) => result.map_err(|error| error.to_string()),
        Err(_) => Err("the log does not answer".to_owned()),
    }
}
