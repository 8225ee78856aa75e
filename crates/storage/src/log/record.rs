//! Bytes of one log record: encoding, decoding, checksums.
//!
//! Pure functions over byte slices; this file never does I/O and never panics on what it reads.
//! The writer encodes through it, recovery and reads decode through it. The layout is promised in
//! docs/STORAGE_FORMAT.md and fixed by golden bytes in tests/log_format.rs.

use crate::sabotage::{self, Variant};
use crate::types::LogId;

/// Bytes of a record before its payload.
pub(super) const RECORD_HEADER: usize = 32;

/// Records start at multiples of this, so that recovery need not look at every byte for one.
pub(super) const ALIGN: usize = 8;

/// What a record says. The numbers are on disk: never change or reuse one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum RecordType {
    /// One raft entry.
    Entry = 1,
    /// The current vote, opaque bytes of the raft crate.
    Vote = 2,
    /// All entries behind `index` are void.
    TruncateAfter = 3,
    /// All entries up to (term, index) are no longer needed.
    Purge = 4,
    /// Entries up to (term, index) were known to be committed; never synced for its own sake.
    Committed = 5,
    /// The segment was left in good order: by a roll to the next one, or by a clean shutdown.
    Close = 6,
}

impl RecordType {
    pub(super) fn from_byte(byte: u8) -> Option<RecordType> {
        Some(match byte {
            1 => RecordType::Entry,
            2 => RecordType::Vote,
            3 => RecordType::TruncateAfter,
            4 => RecordType::Purge,
            5 => RecordType::Committed,
            6 => RecordType::Close,
            _ => return None,
        })
    }
}

/// The start value of all checksums of one segment.
///
/// It binds a record to its segment number and to the member, so that stale bytes of a recycled
/// file, or of another member's file, are never valid, and no client can forge a record in a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Seed(u32);

impl Seed {
    pub(super) fn new(sequence: u64, identity: &[u8; 16]) -> Seed {
        Seed(crc32c::crc32c_append(crc32c::crc32c(&sequence.to_le_bytes()), identity))
    }
}

/// One decoded record, borrowing its payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Record<'a> {
    /// The raw type byte: a newer version may have written one that we do not know.
    pub(super) type_byte: u8,
    /// The raft crate's payload kind; 0 in records that are not entries.
    pub(super) kind: u8,
    /// Offset in the segment of the first record of the same write.
    /// Everything before it was durable when this record was written.
    pub(super) batch: u32,
    pub(super) id: LogId,
    pub(super) payload: &'a [u8],
}

/// Bytes that a record with this payload takes in the file.
pub(super) fn record_bytes(payload: usize) -> usize {
    RECORD_HEADER + payload.next_multiple_of(ALIGN)
}

/// Appends one record to the buffer. The payload must be shorter than 4 GiB (segments are).
pub(super) fn encode(
    buffer: &mut Vec<u8>,
    seed: Seed,
    batch: u32,
    kind: (RecordType, u8),
    id: LogId,
    payload: &[u8],
) {
    let start = buffer.len();
    let length = u32::try_from(payload.len()).expect("append refuses payloads over a segment");
    buffer.extend_from_slice(&length.to_le_bytes());
    buffer.extend_from_slice(&[0; 4]);
    buffer.extend_from_slice(&[kind.0 as u8, kind.1, 0, 0]);
    buffer.extend_from_slice(&batch.to_le_bytes());
    buffer.extend_from_slice(&id.term.to_le_bytes());
    buffer.extend_from_slice(&id.index.to_le_bytes());
    buffer.extend_from_slice(payload);
    buffer.resize(start + record_bytes(payload.len()), 0);
    let check = header_check(seed, &buffer[start..start + RECORD_HEADER]);
    buffer[start + 10..start + 12].copy_from_slice(&check.to_le_bytes());
    let crc = record_crc(seed, &buffer[start..]);
    buffer[start + 4..start + 8].copy_from_slice(&crc.to_le_bytes());
}

/// Decodes the record at the start of `bytes`, which sits at `position` in its segment.
/// `None` = there is no valid record of this segment here.
pub(super) fn decode(bytes: &[u8], position: usize, seed: Seed) -> Option<Record<'_>> {
    let header = bytes.get(..RECORD_HEADER)?;
    let type_byte = header[8];
    let batch = u32_at(header, 12);
    if type_byte == 0 || batch as usize > position {
        return None;
    }
    // The short check comes first: without it, hostile bytes could claim a huge length at every
    // eighth byte and make the search behind a torn tail quadratic.
    if u16::from_le_bytes([header[10], header[11]]) != header_check(seed, header) {
        return None;
    }
    let length = u32_at(header, 0) as usize;
    let whole = bytes.get(..RECORD_HEADER.checked_add(length.checked_next_multiple_of(ALIGN)?)?)?;
    let fits = u32_at(header, 4) == record_crc(seed, whole);
    if !fits && !sabotage::is(Variant::LogChecksumIgnored) {
        return None;
    }
    Some(Record {
        type_byte,
        kind: header[9],
        batch,
        id: LogId { term: u64_at(header, 16), index: u64_at(header, 24) },
        payload: &whole[RECORD_HEADER..RECORD_HEADER + length],
    })
}

/// 16 bits over the header without its two checksums.
fn header_check(seed: Seed, header: &[u8]) -> u16 {
    let crc = crc32c::crc32c_append(seed.0, &header[0..4]);
    let crc = crc32c::crc32c_append(crc, &header[8..10]);
    let crc = crc32c::crc32c_append(crc, &header[12..RECORD_HEADER]);
    (crc >> 16) as u16 ^ crc as u16
}

/// crc32c over the length and all behind the checksum, padding included.
fn record_crc(seed: Seed, whole: &[u8]) -> u32 {
    let crc = crc32c::crc32c_append(seed.0, &whole[0..4]);
    crc32c::crc32c_append(crc, &whole[8..])
}

/// Little-endian u32 at `at`; the caller has checked the bounds.
pub(super) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("a slice of four bytes"))
}

/// Little-endian u64 at `at`; the caller has checked the bounds.
pub(super) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("a slice of eight bytes"))
}
