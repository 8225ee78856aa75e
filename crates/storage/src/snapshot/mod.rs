//! Snapshots: the whole state at one revision as a database file of etcd, and hashes over the same
//! content. A cut is taken behind everything applied so far; rows stay on disk while it is read, and
//! writes go on meanwhile. Nothing is copied to a file or held in memory on the way: the file is
//! planned in one pass over the rows and sent in a second. Every method here blocks.

mod bbolt;
mod content;

use std::io;
use std::sync::Arc;

use bytes::Bytes;

use crate::etcd::Founding;
use crate::keys::Tables;
use crate::mvcc::state::State;
use crate::persist::{Hold, Persister};
use crate::reader::Reader;
use crate::types::{Fatal, RevisionKey, Row};

pub(crate) use bbolt::file_of;
pub(crate) use content::{Buckets, KEY_BUCKET, is_left_out_of_hash, member_json};

/// Rows read at a time.
const SCAN_ROWS: usize = 1000;
/// Bytes read at a time.
const SCAN_BYTES: usize = 4 << 20;

/// The bytes of a snapshot file, without the digest that tools expect behind them.
pub struct SnapshotFile {
    /// Exact sum of all chunks. Unit: bytes.
    pub total_bytes: u64,
    /// The revision that the file holds.
    pub revision: i64,
    /// The bytes, in order. Blocking. An error ends the file.
    pub chunks: Box<dyn Iterator<Item = io::Result<Bytes>> + Send>,
}

/// The state behind one log entry, frozen.
pub(crate) struct Cut {
    pub(crate) tables: Tables,
    /// Newest revision that belongs to it.
    pub(crate) revision: i64,
    pub(crate) rows: CutRows,
}

/// Reads the rows of a cut, again and again the same.
#[derive(Clone)]
pub(crate) struct CutRows {
    persister: Arc<Persister>,
    revision: i64,
    _hold: Arc<Hold>,
}

impl Cut {
    /// The state as of everything applied so far.
    pub(crate) fn of(state: &State) -> Result<Self, Fatal> {
        loop {
            let persister = state.persister();
            let cut = Self::take(persister.clone());
            // Another state may have come into force in between; then that is what is wanted.
            if cut.is_ok() || Arc::ptr_eq(&persister, &state.persister()) {
                return cut;
            }
        }
    }

    fn take(persister: Arc<Persister>) -> Result<Self, Fatal> {
        let hold = Arc::new(persister.hold_removals());
        let (tables, revision) = persister.cut()?;
        Ok(Self { tables, revision, rows: CutRows { persister, revision, _hold: hold } })
    }
}

impl CutRows {
    /// Rows of the given persister up to a revision; the caller knows that all of them are there.
    pub(crate) fn new(persister: Arc<Persister>, revision: i64) -> Self {
        let hold = Arc::new(persister.hold_removals());
        Self { persister, revision, _hold: hold }
    }

    /// The next rows from a place on; empty = no more.
    pub(crate) fn next(&self, from: RevisionKey) -> Result<Vec<Row>, Fatal> {
        let mut rows = self.persister.scan(from, SCAN_ROWS, SCAN_BYTES)?;
        let within = rows.partition_point(|row| row.key.main <= self.revision);
        rows.truncate(within);
        Ok(rows)
    }

    /// Calls `each` on all rows in order.
    pub(crate) fn for_each(&self, mut each: impl FnMut(&[Row])) -> Result<(), Fatal> {
        let mut from = RevisionKey::default();
        loop {
            let rows = self.next(from)?;
            let Some(last) = rows.last() else { return Ok(()) };
            from = behind(last.key);
            each(&rows);
        }
    }
}

/// The first place after a row.
pub(crate) fn behind(key: RevisionKey) -> RevisionKey {
    RevisionKey { main: key.main, sub: key.sub + 1 }
}

impl Reader {
    /// A snapshot file of everything applied so far. Blocking.
    ///
    /// # Errors
    /// The store was shut down.
    pub fn snapshot(&self) -> Result<SnapshotFile, Fatal> {
        let cut = Cut::of(&self.state)?;
        let buckets = Buckets::new(&cut.tables);
        Self::file(cut, &buckets)
    }

    /// The database of a member of a new cluster of etcd, with everything applied so far. Blocking.
    ///
    /// # Errors
    /// The store was shut down.
    pub(crate) fn exported(&self, founding: &Founding) -> Result<SnapshotFile, Fatal> {
        let mut cut = Cut::of(&self.state)?;
        let (cluster, storage) = founding.version.texts();
        cut.tables.applied = founding.applied();
        cut.tables.members = founding.members.clone();
        cut.tables.removed.clear();
        cut.tables.cluster_version = Some(cluster.to_owned());
        let mut buckets = Buckets::new(&cut.tables);
        if let (None, Some(meta)) = (storage, buckets.0.get_mut("meta")) {
            meta.remove(b"storageVersion".as_slice());
        }
        Self::file(cut, &buckets)
    }

    fn file(cut: Cut, buckets: &Buckets) -> Result<SnapshotFile, Fatal> {
        let revision = cut.revision;
        let plan = bbolt::Plan::new(&cut.rows, buckets)?;
        let (total_bytes, chunks) = (plan.total_bytes(), Box::new(plan.emit(cut.rows)));
        Ok(SnapshotFile { total_bytes, revision, chunks })
    }

    /// Rewrites the files of the state if that frees a good part of them. Blocking; reads of old
    /// revisions wait meanwhile.
    ///
    /// # Errors
    /// The store was shut down.
    pub fn defragment(&self) -> Result<(), Fatal> {
        self.state.persister().defragment().map(drop)
    }

    /// Whether the disk is so full that writes should be refused before it is too late: less than
    /// 256 MiB is free, or less than 2 % and 1 GiB.
    pub fn disk_low(&self) -> bool {
        self.state.persister().disk_low()
    }

    /// Durations of the checkpoints since the last call.
    pub fn take_checkpoints(&self) -> Vec<std::time::Duration> {
        self.state.persister().take_checkpoints()
    }
}
