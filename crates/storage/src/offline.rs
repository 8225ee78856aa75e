//! A member's directory while no member runs: opened for tools, or looked at file by file. Everything
//! here takes the directory's lock first. `examine` changes nothing but what the engine itself writes
//! when it opens its files; `open_stopped` opens the state as a start does, without the log.

use std::path::{Path, PathBuf};

use bytes::Bytes;

use crate::log::{Durable, DurablePublisher};
use crate::open::{OpenError, open};
use crate::options::Options;
use crate::persist::Place;
use crate::recover;
use crate::store::Loader;
use crate::types::{Fatal, LogId};
use crate::{DataDir, Reader, Store};

/// The state of a stopped member. Dropping it closes the files.
pub struct Stopped {
    /// Answers all questions.
    pub reader: Reader,
    /// Closed before the lock is given back.
    store: Option<Store>,
    /// Whose directory it is.
    pub data_dir: DataDir,
    /// The log as far as this state is concerned: all of it is on disk.
    _log: DurablePublisher,
}

impl Drop for Stopped {
    fn drop(&mut self) {
        if let Some(store) = self.store.take() {
            store.shutdown();
        }
    }
}

/// Opens the state of a stopped member as its last checkpoint left it. A compaction that was under way
/// goes on. Blocking.
///
/// # Errors
/// The directory is in use, holds no member, or its state is damaged: then it is left as it is.
pub fn open_stopped(data_dir: &Path) -> Result<Stopped, OpenError> {
    let dir = DataDir::open_existing(data_dir)?;
    // A log that seems to begin later keeps a damaged state from being set aside and made anew.
    let log_purged = LogId { term: 1, index: 1 };
    let options = Options { log_purged, ..Options::new(data_dir) };
    let (durable, publisher) = Durable::manual(u64::MAX);
    let (store, reader) = open(&options, durable)?;
    Ok(Stopped { reader, store: Some(store), data_dir: dir, _log: publisher })
}

/// What a sound state says of itself.
#[derive(Clone, PartialEq, Debug)]
pub struct StateFacts {
    /// The generation that is in force.
    pub path: PathBuf,
    /// The last entry that it contains.
    pub applied: LogId,
    /// Store revision.
    pub revision: i64,
    /// Compactions in force; -1 = never.
    pub compacted: i64,
    /// Rows of history.
    pub rows: u64,
    /// Leases.
    pub leases: usize,
    /// Members.
    pub members: usize,
    /// The raft membership and where it was agreed.
    pub membership: Option<(LogId, Bytes)>,
}

/// Reads every pair of the state and checks it; `None` if there is no state. The caller holds the lock
/// of the directory. Blocking.
///
/// # Errors
/// `Damaged` with what is wrong where.
pub fn examine(data_dir: &Path) -> Result<Option<StateFacts>, OpenError> {
    let place = Place {
        state_dir: data_dir.join("member").join("state"),
        cache_bytes: Options::new(data_dir).sled_cache_bytes,
        claimed: Default::default(),
    };
    let mut loader = Loader::new();
    let mut rows = 0;
    let taken = |row: &crate::types::Row| -> Result<(), Fatal> {
        rows += 1;
        loader.row(row)
    };
    let Some((path, tables)) = recover::examine(&place, taken)? else { return Ok(None) };
    let (leases, members) = (tables.leases.len(), tables.members.len());
    let compacted = tables.scheduled_compaction.max(tables.finished_compaction).unwrap_or(-1);
    let loaded = loader.finish(tables.into());
    Ok(Some(StateFacts {
        path,
        applied: loaded.applied(),
        revision: loaded.revision(),
        compacted,
        rows,
        leases,
        members,
        membership: loaded.membership(),
    }))
}
