//! The Raft log of a data directory as a tool shows it: what each entry carries. It opens nothing,
//! takes no lock and changes no byte; a running member's log may be read, too.

use std::path::Path;

use kelson_api::Message;
use kelson_api::command::{Batch, Command};
use kelson_storage::LogId;
use kelson_storage::log::{Dumped, LogError, dump};

use crate::codec::{DecodeError, decode_entry, decode_vote};
use crate::types::{Payload, position};

/// One record of a Raft log, in the order in which they were written.
#[derive(Debug)]
pub enum Shown {
    /// Commands, all of which were applied or none.
    Commands(LogId, Vec<Command>),
    /// An entry without a command: a leader began its term.
    Blank(LogId),
    /// The members from here on, and what changes in their table.
    Membership(LogId, Vec<Command>),
    /// A vote: term, for whom, and whether a quorum granted it.
    Vote {
        /// Raft term.
        term: u64,
        /// Member id.
        voted_for: u64,
        /// That member leads the term.
        granted: bool,
    },
    /// All entries behind this index are void.
    TruncatedAfter(u64),
    /// Entries up to here are no longer needed.
    Purged(LogId),
    /// Entries up to here were known to be committed.
    Committed(LogId),
}

/// Why a log cannot be shown.
#[derive(Debug, thiserror::Error)]
pub enum DumpError {
    /// The files.
    #[error(transparent)]
    Log(#[from] LogError),
    /// What an entry holds.
    #[error("entry {index}: {source}")]
    Entry {
        /// Index of the entry; 0 for a vote.
        index: u64,
        /// What is wrong with it.
        source: DecodeError,
    },
}

/// Shows the log in `<data_dir>/member/wal`, in memory one segment at a time.
///
/// # Errors
/// The log cannot be read or is damaged; what was shown until then is right.
pub fn show_log(data_dir: &Path, each: &mut dyn FnMut(Shown)) -> Result<(), DumpError> {
    let mut bad = None;
    dump(&data_dir.join("member").join("wal"), &mut |dumped| {
        if bad.is_none() {
            match shown(dumped) {
                Ok(record) => each(record),
                Err(error) => bad = Some(error),
            }
        }
    })?;
    bad.map_or(Ok(()), Err)
}

fn shown(dumped: Dumped) -> Result<Shown, DumpError> {
    Ok(match dumped {
        Dumped::Entry(entry) => {
            let index = entry.id.index;
            let failed = |source| DumpError::Entry { index, source };
            let entry = decode_entry(entry).map_err(failed)?;
            let id = position(&entry.log_id);
            let commands = |bytes: bytes::Bytes| {
                let malformed = |source| DecodeError::Malformed { what: "commands", source };
                let batch = Batch::decode(bytes).map_err(malformed).map_err(failed);
                batch.map(|batch| batch.commands)
            };
            match entry.payload {
                Payload::Blank => Shown::Blank(id),
                Payload::Commands(bytes) => Shown::Commands(id, commands(bytes.0)?),
                Payload::Membership(_, change) => Shown::Membership(id, commands(change.0)?),
            }
        }
        Dumped::Vote(bytes) => {
            let vote =
                decode_vote(bytes).map_err(|source| DumpError::Entry { index: 0, source })?;
            let (term, voted_for) = (vote.leader_id.term, vote.leader_id.voted_for);
            Shown::Vote { term, voted_for, granted: vote.committed }
        }
        Dumped::TruncatedAfter(index) => Shown::TruncatedAfter(index),
        Dumped::Purged(id) => Shown::Purged(id),
        Dumped::Committed(id) => Shown::Committed(id),
    })
}
