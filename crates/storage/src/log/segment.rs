//! Segment files: names, header, and what each segment holds in memory about its entries.
//!
//! It never interprets records; recovery and the writer do. A segment's length is fixed at birth
//! and written in its header, so a file that was cut is noticed.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::LogError;
use super::disk::LogFile;
use super::record::{Seed, u32_at, u64_at};

/// First bytes of every segment.
pub(super) const MAGIC: [u8; 8] = *b"KELSNLOG";
/// The only format version so far.
pub(super) const VERSION: u32 = 1;
/// Bytes of the segment header; the first record follows.
pub(super) const SEGMENT_HEADER: usize = 64;
/// Most segments that wait for their turn; further purged ones are removed.
pub(super) const SPARES_MAX: usize = 3;
/// A file that is still being filled; worthless after a crash.
pub(super) const UNFINISHED_NAME: &str = "unfinished.tmp";

/// The 64 bytes at the start of a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    /// Number of the segment, without gaps; also its file name.
    pub(super) sequence: u64,
    /// Index that the next entry had to have when the segment was begun.
    pub(super) first_index: u64,
    /// Whose log it is.
    pub(super) identity: [u8; 16],
    /// Length of the whole file.
    pub(super) bytes: u64,
}

impl Header {
    pub(super) fn encode(&self) -> [u8; SEGMENT_HEADER] {
        let mut out = [0; SEGMENT_HEADER];
        out[0..8].copy_from_slice(&MAGIC);
        out[8..12].copy_from_slice(&VERSION.to_le_bytes());
        out[12..16].copy_from_slice(&(SEGMENT_HEADER as u32).to_le_bytes());
        out[16..24].copy_from_slice(&self.sequence.to_le_bytes());
        out[24..32].copy_from_slice(&self.first_index.to_le_bytes());
        out[32..48].copy_from_slice(&self.identity);
        out[48..56].copy_from_slice(&self.bytes.to_le_bytes());
        let crc = crc32c::crc32c(&out[0..60]);
        out[60..64].copy_from_slice(&crc.to_le_bytes());
        out
    }

    /// Reads a header; the path is only for the message of a refusal.
    pub(super) fn decode(bytes: &[u8], path: &Path) -> Result<Header, LogError> {
        if bytes.get(..8) != Some(&MAGIC) {
            return Err(LogError::Foreign { file: path.to_owned() });
        }
        let Some(bytes) = bytes.get(..SEGMENT_HEADER) else {
            return Err(LogError::corrupt(path, bytes.len(), "the segment header is cut off"));
        };
        let version = u32_at(bytes, 8);
        if version != VERSION {
            return Err(LogError::NewerVersion { file: path.to_owned(), version });
        }
        if u32_at(bytes, 60) != crc32c::crc32c(&bytes[0..60]) {
            return Err(LogError::corrupt(path, 0, "the segment header fails its checksum"));
        }
        Ok(Header {
            sequence: u64_at(bytes, 16),
            first_index: u64_at(bytes, 24),
            identity: bytes[32..48].try_into().expect("a slice of sixteen bytes"),
            bytes: u64_at(bytes, 48),
        })
    }

    pub(super) fn seed(&self) -> Seed {
        Seed::new(self.sequence, &self.identity)
    }
}

/// Path of a segment: its number as 16 hexadecimal digits, so that names sort by number.
pub(super) fn segment_path(dir: &Path, sequence: u64) -> PathBuf {
    dir.join(format!("{sequence:016x}.wal"))
}

/// Name of a segment that is full of zeros, or of a purged segment's stale bytes, and waits for its
/// turn.
pub(super) fn spare_name(slot: usize) -> String {
    format!("spare-{slot}.next")
}

/// The number in a segment's file name; `None` for any other name.
pub(super) fn parse_segment_name(name: &str) -> Option<u64> {
    let digits = name.strip_suffix(".wal")?;
    let lower_hex = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
    if digits.len() != 16 || !digits.bytes().all(lower_hex) {
        return None;
    }
    u64::from_str_radix(digits, 16).ok()
}

/// Where one entry lies in its segment: 16 bytes per entry of the log.
#[derive(Clone, Copy, Debug)]
pub(super) struct Slot {
    pub(super) position: u32,
    pub(super) payload_bytes: u32,
    pub(super) term: u64,
}

/// A segment and the places of its live entries.
pub(super) struct Segment {
    pub(super) path: PathBuf,
    pub(super) file: Arc<dyn LogFile>,
    pub(super) seed: Seed,
    pub(super) bytes: u64,
    /// Index of `slots[0]`; meaningless while there are none.
    first: u64,
    slots: Vec<Slot>,
}

impl Segment {
    pub(super) fn new(path: PathBuf, file: Arc<dyn LogFile>, header: &Header) -> Segment {
        let seed = header.seed();
        Segment { path, file, seed, bytes: header.bytes, first: 0, slots: Vec::new() }
    }

    /// Notes the next entry.
    pub(super) fn push(&mut self, index: u64, slot: Slot) {
        if self.slots.is_empty() {
            self.first = index;
        }
        assert_eq!(index, self.first + self.slots.len() as u64, "entries of a segment are dense");
        self.slots.push(slot);
    }

    /// Forgets all entries behind `index`.
    pub(super) fn truncate_after(&mut self, index: u64) {
        let keep = (index + 1).saturating_sub(self.first);
        self.slots.truncate(usize::try_from(keep).unwrap_or(usize::MAX));
    }

    pub(super) fn slot(&self, index: u64) -> Option<Slot> {
        let at = usize::try_from(index.checked_sub(self.first)?).ok()?;
        self.slots.get(at).copied()
    }

    /// Index of the newest live entry in this segment.
    pub(super) fn last_index(&self) -> Option<u64> {
        Some(self.first + (self.slots.len() as u64).checked_sub(1)?)
    }
}
