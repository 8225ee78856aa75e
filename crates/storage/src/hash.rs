//! Hashes by which members, and tools, compare stores. They are CRC-32C over the bytes that a
//! snapshot file of etcd would hold, so they equal etcd's for the same history. Every method blocks
//! and reads all of the history; writes go on meanwhile.

use std::sync::Arc;
use std::time::{Duration, Instant};

use kelson_api::Error;

use crate::keys::revision_bytes;
use crate::mvcc::index::{Index, Visible};
use crate::mvcc::row;
use crate::persist::Persister;
use crate::reader::Reader;
use crate::snapshot::{Buckets, Cut, CutRows, KEY_BUCKET, is_left_out_of_hash};
use crate::types::{Fatal, Row};

/// Longest wait for an entry whose revision is visible to be handed to the persister.
const HAND_OVER_MAX: Duration = Duration::from_secs(5);
/// How often to look.
const LOOK_AGAIN: Duration = Duration::from_millis(1);

/// The hash of the key space at a revision.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct HashKv {
    /// CRC-32C of the rows that are retained at the revision.
    pub hash: u32,
    /// The revision hashed.
    pub hash_revision: i64,
    /// The compaction revision then; -1 = never compacted. Hashes are comparable only if it is equal.
    pub compact_revision: i64,
}

impl Reader {
    /// Hashes the key space as of `revision`; 0 = the newest. Blocking.
    ///
    /// # Errors
    /// `Compacted` below the compaction revision, `FutureRevision` above the newest; `Stopped` if
    /// this member is failing.
    pub fn hash_kv(&self, revision: i64) -> Result<HashKv, Error> {
        loop {
            let persister = self.state.persister();
            let hashed = self.hash_rows(persister.clone(), revision);
            // Under this lock rows and index belong to one state. If another one came into force on
            // the way, what was hashed was part of each.
            let _index = self.state.index.read();
            if Arc::ptr_eq(&persister, &self.state.persister()) {
                return hashed;
            }
        }
    }

    fn hash_rows(&self, persister: Arc<Persister>, revision: i64) -> Result<HashKv, Error> {
        let newest = self.revision();
        let revision = if revision == 0 { newest } else { revision };
        if revision > newest {
            return Err(Error::FutureRevision);
        }
        // The pin keeps the index from forgetting what is visible at the revision; the rows' own hold
        // keeps even older rows on disk.
        let _pin = self.pin(revision)?;
        let until = Instant::now() + HAND_OVER_MAX;
        while persister.newest_revision() < revision {
            if Instant::now() > until {
                return Err(Error::Stopped);
            }
            std::thread::sleep(LOOK_AGAIN);
        }
        let rows = CutRows::new(persister, revision);
        let compacted = self.compacted();
        if revision < compacted {
            return Err(Error::Compacted);
        }
        let has_keys = {
            let index = self.state.index.read();
            index.iter().any(|entry| index.visible(entry, revision) != Visible::Absent)
        };
        let mut hash = crc32c::crc32c(KEY_BUCKET.as_bytes());
        let hashed = rows.for_each(|rows| {
            let index = self.state.index.read();
            for row in rows {
                let is_compacted = row.key.main <= compacted;
                let is_superseded = is_compacted && has_keys && !is_kept(&index, row, revision);
                let is_compacted_deletion = row.tombstone && row.key.main == compacted;
                if !is_superseded && !is_compacted_deletion {
                    hash = append_row(hash, row);
                }
            }
        });
        hashed.map_err(|fatal| {
            tracing::error!(%fatal, "hashing the key space failed");
            Error::Stopped
        })?;
        Ok(HashKv { hash, hash_revision: revision, compact_revision: compacted })
    }

    /// Hashes everything that a snapshot file would hold, but for what differs between members.
    /// Blocking.
    ///
    /// # Errors
    /// The store was shut down.
    pub fn hash(&self) -> Result<u32, Fatal> {
        let cut = Cut::of(&self.state)?;
        let mut hash = 0;
        for (name, pairs) in &Buckets::new(&cut.tables).0 {
            hash = crc32c::crc32c_append(hash, name.as_bytes());
            if *name == KEY_BUCKET {
                cut.rows.for_each(|rows| hash = rows.iter().fold(hash, append_row))?;
            }
            for (key, value) in pairs.iter().filter(|(key, _)| !is_left_out_of_hash(name, key)) {
                hash = crc32c::crc32c_append(crc32c::crc32c_append(hash, key), value);
            }
        }
        Ok(hash)
    }
}

/// Whether a row is what a reader at the revision finds for its key.
fn is_kept(index: &Index, row: &Row, revision: i64) -> bool {
    let Some(parsed) = row::parse(&row.kv) else { return false };
    let Some(entry) = index.get(&row.kv[parsed.key]) else { return false };
    match index.visible(entry, revision) {
        Visible::Absent => false,
        Visible::Newest => entry.at() == row.key,
        Visible::Older { at, .. } => at == row.key,
    }
}

fn append_row(hash: u32, row: &Row) -> u32 {
    let key = revision_bytes(row.key, row.tombstone);
    crc32c::crc32c_append(crc32c::crc32c_append(hash, &key), &row.kv)
}
