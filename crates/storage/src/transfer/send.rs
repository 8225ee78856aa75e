//! The sending side: a frozen cut of the state, read out chunk by chunk. It changes nothing; rows stay
//! on disk until it is dropped.

use std::collections::VecDeque;

use bytes::Bytes;

use super::wire::{Chunk, Content, Head, Packer, Totals};
use crate::keys::{self, Pair, SCHEMA_VERSION};
use crate::reader::Reader;
use crate::sabotage::{self, Variant};
use crate::snapshot::{Cut, CutRows, behind};
use crate::types::{Fatal, LogId, RevisionKey};

/// A consistent copy of the whole state for another member. Dropping it lets compactions remove rows
/// again.
pub struct Transfer {
    head: Head,
    membership: Option<(LogId, Bytes)>,
    rows: CutRows,
    /// Pairs that go into the next chunks: the tables, then at most one batch of rows.
    waiting: VecDeque<Pair>,
    /// Where to read on; `None` = all rows were read.
    from: Option<RevisionKey>,
    is_in_tables: bool,
    totals: Totals,
    /// Random name, so that chunks of two transfers are never mixed.
    transfer: u64,
    number: u64,
    is_closed: bool,
}

impl Reader {
    /// A copy of everything applied so far for another member. Blocking: it waits until all of that
    /// is written, but not for a checkpoint.
    ///
    /// # Errors
    /// The store was shut down.
    pub fn transfer(&self) -> Result<Transfer, Fatal> {
        let mut name = [0; 8];
        getrandom::fill(&mut name).map_err(|error| Fatal(format!("no random name: {error}")))?;
        let mut cut = Cut::of(&self.state)?;
        if sabotage::is(Variant::SnapshotWithoutLeases) {
            cut.tables.leases.clear();
        }
        let head = Head {
            schema: SCHEMA_VERSION,
            applied: cut.tables.applied,
            chain: cut.tables.chain.unwrap_or_default(),
            revision: cut.revision,
        };
        Ok(Transfer {
            head,
            waiting: keys::encode_tables(&cut.tables).into(),
            membership: cut.tables.membership,
            rows: cut.rows,
            from: Some(RevisionKey::default()),
            is_in_tables: true,
            totals: Totals::new(&head),
            transfer: u64::from_be_bytes(name),
            number: 0,
            is_closed: false,
        })
    }
}

impl Transfer {
    /// The last entry that the copy contains.
    pub fn applied(&self) -> LogId {
        self.head.applied
    }

    /// The store revision of the copy.
    pub fn revision(&self) -> i64 {
        self.head.revision
    }

    /// The raft membership that the copy contains, and where it was agreed.
    pub fn membership(&self) -> Option<(LogId, Bytes)> {
        self.membership.clone()
    }

    /// The next chunk: at most 1 MiB, unless a single row is larger. `None` = there are no more.
    /// Blocking.
    ///
    /// # Errors
    /// The store was shut down; only this transfer fails. A disk that fails ends the process where
    /// it is read.
    pub fn next_chunk(&mut self) -> Result<Option<Bytes>, Fatal> {
        if self.is_closed {
            return Ok(None);
        }
        let content = if self.number == 0 {
            Content::Head(self.head)
        } else if let Some(pairs) = self.pack()? {
            self.totals.add(&pairs);
            Content::Pairs(pairs)
        } else {
            self.is_closed = true;
            Content::Trailer(self.totals.trailer())
        };
        let chunk = Chunk { transfer: self.transfer, number: self.number, content };
        self.number += 1;
        Ok(Some(chunk.encode()))
    }

    /// As many pairs as fit into one chunk. Tables and rows never share one.
    fn pack(&mut self) -> Result<Option<Bytes>, Fatal> {
        let mut packer = Packer::new();
        loop {
            while let Some(pair) = self.waiting.front() {
                if !packer.add(pair) {
                    return Ok(packer.take());
                }
                let is_table = self.is_in_tables;
                *if is_table { &mut self.totals.tables } else { &mut self.totals.rows } += 1;
                self.waiting.pop_front();
            }
            if std::mem::take(&mut self.is_in_tables)
                && let Some(tables) = packer.take()
            {
                return Ok(Some(tables));
            }
            let Some(from) = self.from else { return Ok(packer.take()) };
            let rows = self.rows.next(from)?;
            self.from = rows.last().map(|last| behind(last.key));
            self.waiting.extend(rows.iter().map(keys::encode_row));
        }
    }
}
