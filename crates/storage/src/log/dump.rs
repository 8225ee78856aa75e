//! Everything that a log's segments say, in the order in which it was written, for people and tools.
//! It takes no lock and changes nothing, so it may look at the log of a running member; then it sees
//! what had been written when it read. It never decides what is in force: purged and voided entries
//! are shown for as long as their segment is there.

use std::path::Path;

use bytes::Bytes;

use crate::types::LogId;

use super::disk::{Disk, RealDisk};
use super::record::{RecordType, decode, record_bytes};
use super::recovery::{Loaded, load_any, segment_numbers};
use super::segment::SEGMENT_HEADER;
use super::{Entry, LogError};

/// One record of a log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Dumped {
    /// An entry; void if a `TruncatedAfter` with a lower index follows.
    Entry(Entry),
    /// The vote from here on, opaque bytes of the raft crate.
    Vote(Bytes),
    /// All entries behind this index are void.
    TruncatedAfter(u64),
    /// All entries up to here are no longer needed.
    Purged(LogId),
    /// Entries up to here were known to be committed.
    Committed(LogId),
}

/// Shows every record of the segments in `dir` (`<data>/member/wal`) to `each`. Holds one segment in
/// memory at a time.
///
/// # Errors
/// The directory or a segment cannot be read, is none of ours, or is damaged before its end. What
/// follows the last whole record of the newest segment may be an unfinished write and is passed over.
pub fn dump(dir: &Path, each: &mut dyn FnMut(Dumped)) -> Result<(), LogError> {
    let disk = RealDisk;
    let names = disk.list(dir).map_err(|error| LogError::io("list", dir, error))?;
    let sequences = segment_numbers(dir, &names)?;
    for sequence in &sequences {
        let loaded = load_any(&disk, dir, *sequence)?;
        let end = show(&loaded, each)?;
        if !end.closed && Some(sequence) != sequences.last() {
            let reason = "a record is bad, and later segments follow";
            return Err(LogError::corrupt(&loaded.path, end.position, reason));
        }
    }
    Ok(())
}

struct End {
    position: usize,
    closed: bool,
}

fn show(loaded: &Loaded, each: &mut dyn FnMut(Dumped)) -> Result<End, LogError> {
    let seed = loaded.header.seed();
    let mut end = End { position: SEGMENT_HEADER, closed: false };
    let at = |position| loaded.bytes.get(position..);
    while let Some(record) = at(end.position).and_then(|rest| decode(rest, end.position, seed)) {
        let Some(record_type) = RecordType::from_byte(record.type_byte) else {
            let reason = "a record has a type that is not known";
            return Err(LogError::corrupt(&loaded.path, end.position, reason));
        };
        end.closed = record_type == RecordType::Close;
        let payload = || Bytes::copy_from_slice(record.payload);
        let shown = match record_type {
            RecordType::Entry => {
                Some(Dumped::Entry(Entry { id: record.id, kind: record.kind, payload: payload() }))
            }
            RecordType::Vote => Some(Dumped::Vote(payload())),
            RecordType::TruncateAfter => Some(Dumped::TruncatedAfter(record.id.index)),
            RecordType::Purge => Some(Dumped::Purged(record.id)),
            RecordType::Committed => Some(Dumped::Committed(record.id)),
            RecordType::Close => None,
        };
        if let Some(shown) = shown {
            each(shown);
        }
        end.position += record_bytes(record.payload.len());
    }
    Ok(end)
}
