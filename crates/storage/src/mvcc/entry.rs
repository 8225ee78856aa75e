//! What the index holds in memory of one key: the newest row and how it was written. It changes
//! nothing and decides nothing.

use super::row::{self, Held};
use crate::types::RevisionKey;

/// Place of the history of an entry without history.
pub(super) const NO_HISTORY: u32 = 0;

/// The newest revision of one key. 16 bytes beside the row, which holds the key and the revision.
#[derive(Clone, Debug)]
pub(crate) struct Entry {
    row: Held,
    /// Number of the history slot in the index.
    pub(super) history: u32,
    sub_and_tombstone: u32,
}

impl Entry {
    /// Highest `sub` that an entry can hold.
    pub(crate) const SUB_MAX: i64 = (u32::MAX >> 1) as i64;

    /// An entry from a row whose key stands first. `sub` is the place within the row's revision.
    pub(crate) fn new(row: Held, sub: i64, tombstone: bool) -> Self {
        let sub = u32::try_from(sub).expect("a revision has fewer than 2^31 changes");
        Self { row, history: NO_HISTORY, sub_and_tombstone: sub << 1 | u32::from(tombstone) }
    }

    pub(crate) fn key(&self) -> &[u8] {
        row::leading_key(&self.row)
    }

    pub(crate) fn row(&self) -> &Held {
        &self.row
    }

    pub(crate) fn main(&self) -> i64 {
        self.row.revision()
    }

    pub(super) fn sub(&self) -> u32 {
        self.sub_and_tombstone >> 1
    }

    pub(crate) fn at(&self) -> RevisionKey {
        RevisionKey { main: self.main(), sub: i64::from(self.sub()) }
    }

    pub(crate) fn is_live(&self) -> bool {
        self.sub_and_tombstone & 1 == 0
    }
}
