//! Fills the state of a new data directory from a database of etcd: every row byte for byte,
//! leases, alarms, users and roles, compactions. Who the members are and where the log begins is
//! said by the caller, who knows consensus. The directory counts for nothing until its owner gives
//! it its final name. Called by the raft crate; stands on `database` and the engine.

use std::path::{Path, PathBuf};

use bytes::Bytes;
use kelson_api::etcdserverpb::Member;

use super::EtcdFileError;
use super::database::{Database, FileRow, Imprint};
use crate::chain::Chain;
use crate::dir::{DataDir, make_dir};
use crate::disk;
use crate::engine::{Backend, EngineError};
use crate::keys::{self, Pair, Tables, Tally};
use crate::mvcc::index::Entry;
use crate::mvcc::row;
use crate::open::OpenError;
use crate::options::Options;
use crate::persist::Place;
use crate::persist::copy::Copy;
use crate::recover::{self, open_patiently};
use crate::types::{LogId, Row};

/// Pairs that are written and flushed together, and bytes of them.
const STEP_PAIRS: usize = 4096;
const STEP_BYTES: usize = 4 << 20;

/// No store reaches it, and it leaves room to count on.
const REVISION_MAX: i64 = i64::MAX / 4;

/// Why a state could not be filled. The source is untouched.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    /// The source.
    #[error(transparent)]
    File(#[from] EtcdFileError),
    /// The target.
    #[error(transparent)]
    Dir(#[from] OpenError),
    /// The files of the target cannot be written.
    #[error("cannot write the state in {}: {reason}", path.display())]
    Write {
        /// The directory.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// The disk of the target is so full that the state may not fit.
    #[error("the disk that holds {} is too full", path.display())]
    NoSpace {
        /// The directory.
        path: PathBuf,
    },
    /// The revision cannot be raised so far.
    #[error(
        "the revision {revision} cannot be raised by {by}: no room would be left to count on; \
         choose a smaller --bump-revision"
    )]
    Raise {
        /// The newest revision of the source.
        revision: i64,
        /// What was asked.
        by: u64,
    },
    /// The source has a revision that nobody can have counted to.
    #[error("{}: the revision {revision} is none that a store can reach", path.display())]
    Revision {
        /// The source.
        path: PathBuf,
        /// Its revision.
        revision: i64,
    },
}

/// What the new state says of members and log.
#[derive(Clone, Debug, Default)]
pub struct Plan {
    /// The last entry that the state contains: the log begins behind it.
    pub applied: LogId,
    /// The raft membership there, bytes of the raft crate.
    pub membership: Bytes,
    /// Rows of the members table.
    pub members: Vec<Member>,
    /// Ids of former members.
    pub removed: Vec<u64>,
    /// The cluster version to start from; `None` = to be agreed anew.
    pub cluster_version: Option<String>,
    /// By how much the revision goes up beyond the newest one of the source, which is then compacted.
    pub raise: Option<u64>,
}

/// What was filled in.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Imported {
    /// Rows of history.
    pub rows: u64,
    /// Their bytes.
    pub bytes: u64,
    /// The store revision.
    pub revision: i64,
    /// Everything below is compacted; -1 = nothing.
    pub compacted: i64,
    /// Leases.
    pub leases: usize,
    /// Users.
    pub users: usize,
}

/// Fills the state. `progress` is told rows and bytes now and then. Blocks; on disk when it returns.
///
/// # Errors
/// See [`ImportError`]. What was written until then is of no use.
pub fn import(
    database: &Database,
    data_dir: &DataDir,
    plan: Plan,
    progress: &mut dyn FnMut(Imported),
) -> Result<Imported, ImportError> {
    let imprint = database.imprint()?;
    let state_dir = data_dir.state_dir();
    make_dir(&state_dir)?;
    let cache_bytes = Options::new("").sled_cache_bytes;
    let place = Place { state_dir, cache_bytes, claimed: Default::default() };
    let dir = recover::first_generation(&place);
    let open = || open_patiently(&dir, cache_bytes).map(|open| Box::new(open) as Box<dyn Backend>);
    let copy = Copy::begin(open, cache_bytes).map_err(|error| failed(&dir, &error))?;
    let mut filling = Filling {
        dir: &dir,
        copy,
        waiting: Vec::new(),
        waiting_bytes: 0,
        tally: Tally::default(),
        done: Imported::default(),
        marked: 0,
    };
    let mut bad = None;
    let read = database.rows(|row| {
        filling.take(database, row, progress).map_err(|error| match error {
            ImportError::File(error) => error,
            error => {
                bad = Some(error);
                EtcdFileError::Asked("the target cannot be written")
            }
        })
    });
    if let Some(error) = bad {
        return Err(error);
    }
    read?;
    let (tally, mut done) = (filling.tally, filling.done);
    let tables = tables(database.path(), imprint, &plan, filling.marked, &mut done)?;
    for pair in keys::encode_tables(&tables) {
        filling.put(pair)?;
    }
    let chain = Chain::beginning(plan.applied.index);
    for pair in keys::encode_checkpoint(plan.applied, chain, tally) {
        filling.put(pair)?;
    }
    filling.flush()?;
    filling.copy.close();
    recover::sync_tree(&dir).map_err(|error| failed(&dir, &error))?;
    recover::name_current(&place, &dir)?;
    progress(done);
    Ok(done)
}

/// Everything beside the rows. Adds revision and compaction to what was done.
fn tables(
    source: &Path,
    imprint: Imprint,
    plan: &Plan,
    marked: i64,
    done: &mut Imported,
) -> Result<Tables, ImportError> {
    let mut scheduled = imprint.compactions.scheduled;
    // A marker that a raised revision left is no row; etcd compacts at it in the same step.
    if marked > done.revision {
        scheduled = scheduled.max(Some(marked));
    }
    let mut revision = done.revision.max(scheduled.unwrap_or(1)).max(1);
    revision = revision.max(imprint.compactions.finished.unwrap_or(1));
    if revision > REVISION_MAX {
        return Err(ImportError::Revision { path: source.to_owned(), revision });
    }
    if let Some(by) = plan.raise {
        let raised = i64::try_from(by).ok().and_then(|by| revision.checked_add(by));
        let raised = raised.filter(|raised| *raised <= REVISION_MAX);
        revision = raised.ok_or(ImportError::Raise { revision, by })?;
        scheduled = Some(revision);
    }
    done.revision = revision;
    done.compacted = scheduled.max(imprint.compactions.finished).unwrap_or(-1);
    done.leases = imprint.leases.len();
    done.users = imprint.auth.users.len();
    Ok(Tables {
        leases: imprint.leases,
        alarms: imprint.alarms,
        auth: imprint.auth,
        members: plan.members.clone(),
        removed: plan.removed.clone(),
        membership: Some((plan.applied, plan.membership.clone())),
        cluster_version: plan.cluster_version.clone(),
        scheduled_compaction: scheduled,
        finished_compaction: imprint.compactions.finished,
        ..Tables::default()
    })
}

fn failed(path: &Path, cause: &dyn std::fmt::Display) -> ImportError {
    ImportError::Write { path: path.to_owned(), reason: cause.to_string() }
}

/// A state in the making.
struct Filling<'a, F> {
    dir: &'a Path,
    copy: Copy<F>,
    waiting: Vec<Pair>,
    waiting_bytes: usize,
    tally: Tally,
    /// Rows, bytes and the newest revision of a row.
    done: Imported,
    /// Revision of the newest marker that is no row.
    marked: i64,
}

impl<F: FnMut() -> Result<Box<dyn Backend>, EngineError>> Filling<'_, F> {
    fn take(
        &mut self,
        database: &Database,
        row: FileRow<'_>,
        progress: &mut dyn FnMut(Imported),
    ) -> Result<(), ImportError> {
        if row.kv.is_empty() && !row.tombstone {
            self.marked = row.key.main;
            return Ok(());
        }
        let parsed = row::parse(row.kv).filter(|parsed| {
            let is_whole = row.tombstone || parsed.mod_revision == row.key.main;
            // A key changes once in a revision at most.
            let known = 0..=row.key.main;
            let is_past =
                known.contains(&parsed.create_revision) && known.contains(&parsed.version);
            let has_place = (0..=Entry::SUB_MAX).contains(&row.key.sub);
            is_whole && is_past && has_place && !parsed.key.is_empty()
        });
        if parsed.is_none() {
            return Err(database.bad_row(row.key).into());
        }
        let kv = Bytes::copy_from_slice(row.kv);
        let (key, value) = keys::encode_row(&Row { key: row.key, tombstone: row.tombstone, kv });
        self.tally.add(&key, &value);
        self.done.rows += 1;
        self.done.bytes += row.kv.len() as u64;
        self.done.revision = row.key.main;
        if self.put((key, value))? {
            progress(self.done);
        }
        Ok(())
    }

    /// Says whether it was time to write.
    fn put(&mut self, pair: Pair) -> Result<bool, ImportError> {
        self.waiting_bytes += pair.0.len() + pair.1.len();
        self.waiting.push(pair);
        let is_full = self.waiting.len() >= STEP_PAIRS || self.waiting_bytes >= STEP_BYTES;
        if is_full {
            self.flush()?;
        }
        Ok(is_full)
    }

    fn flush(&mut self) -> Result<(), ImportError> {
        // The engine does not survive a full disk.
        if disk::is_low(self.dir) {
            return Err(ImportError::NoSpace { path: self.dir.to_owned() });
        }
        self.waiting_bytes = 0;
        let pairs = std::mem::take(&mut self.waiting);
        self.copy.put(pairs).map_err(|error| failed(self.dir, &error))
    }
}
