//! Reads the segments back when a log is opened, and decides: go on, cut a torn tail, or refuse.
//!
//! The rule: what can have been lost without a broken promise is cut, everything else is refused.
//! A bad record is a torn tail only in the last segment, and only if every valid record behind it
//! belongs to the same unfinished write. It never drops an entry that may have been acknowledged,
//! and changes no byte before all segments have been accepted.

use std::collections::{BTreeSet, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;

use crate::types::LogId;

use super::disk::{Disk, LogFile, read_all, write_all};
use super::memory::truncate_segments;
use super::record::{ALIGN, Record, RecordType, Seed, decode, record_bytes};
use super::segment::{
    Header, SEGMENT_HEADER, SPARES_MAX, Segment, Slot, UNFINISHED_NAME, parse_segment_name,
    segment_path, spare_name,
};
use super::writer::{Active, create_first};
use super::{LogError, LogOptions, SEGMENT_BYTES_MAX};

/// Zeros are written in pieces of this size, and only over pieces that are not zero already.
const WIPE_STEP_BYTES: usize = 64 << 10;

/// Everything that the files say.
pub(super) struct Recovered {
    pub(super) segments: VecDeque<Segment>,
    pub(super) active: Active,
    pub(super) vote: Option<Bytes>,
    pub(super) purged: LogId,
    pub(super) last: LogId,
    pub(super) committed: Option<LogId>,
    pub(super) spares: Vec<PathBuf>,
}

/// Opens the log's directory, making it and the first segment if there is nothing.
pub(super) fn recover(disk: &dyn Disk, options: &LogOptions) -> Result<Recovered, LogError> {
    let dir = options.dir.as_path();
    disk.create_dir(dir).map_err(|error| LogError::io("create", dir, error))?;
    let names = disk.list(dir).map_err(|error| LogError::io("list", dir, error))?;
    let sequences = segment_numbers(dir, &names)?;
    let spares = (0..=SPARES_MAX).map(spare_name).filter(|name| names.contains(name));
    let spares: Vec<PathBuf> = spares.map(|name| dir.join(name)).collect();
    let mut replay = Replay::default();
    let Some(&newest) = sequences.last() else {
        if !spares.is_empty() {
            return Err(LogError::Missing { file: segment_path(dir, 1) });
        }
        let active = create_first(options, disk)
            .map_err(|error| LogError::io("create a segment in", dir, error))?;
        let path = segment_path(dir, active.header.sequence);
        let segment = Segment::new(path, Arc::clone(&active.file), &active.header);
        replay.segments.push_back(segment);
        return Ok(replay.into_recovered(active, spares));
    };
    let mut tail = None;
    for &sequence in &sequences {
        let loaded = load(disk, options, sequence)?;
        replay.begin(&loaded, sequence == sequences[0])?;
        let end = scan(&loaded, sequence == newest, &mut replay)?;
        tail = Some((loaded, end));
    }
    replay.check(dir, sequences[0])?;
    let (loaded, end) = tail.expect("there is at least one segment");
    if end.torn {
        wipe(&loaded, end.position)?;
    }
    if names.iter().any(|name| name == UNFINISHED_NAME) {
        let path = dir.join(UNFINISHED_NAME);
        disk.remove(&path).map_err(|error| LogError::io("remove", &path, error))?;
    }
    let active = Active {
        file: loaded.file,
        header: loaded.header,
        position: end.position as u64,
        ends_with_close: end.closed,
    };
    Ok(replay.into_recovered(active, spares))
}

/// Numbers of all segments in order; a gap or a file that is not ours is refused.
pub(super) fn segment_numbers(dir: &Path, names: &[String]) -> Result<Vec<u64>, LogError> {
    let mut numbers = BTreeSet::new();
    for name in names.iter().filter(|name| name.ends_with(".wal")) {
        let foreign = || LogError::Foreign { file: dir.join(name) };
        numbers.insert(parse_segment_name(name).ok_or_else(foreign)?);
    }
    let numbers: Vec<u64> = numbers.into_iter().collect();
    match numbers.windows(2).find(|pair| pair[1] != pair[0] + 1) {
        Some(pair) => Err(LogError::Missing { file: segment_path(dir, pair[0] + 1) }),
        None => Ok(numbers),
    }
}

/// A whole segment in memory, with a header that was checked against name, owner and length.
pub(super) struct Loaded {
    pub(super) path: PathBuf,
    file: Arc<dyn LogFile>,
    pub(super) header: Header,
    pub(super) bytes: Vec<u8>,
}

fn load(disk: &dyn Disk, options: &LogOptions, sequence: u64) -> Result<Loaded, LogError> {
    let loaded = load_any(disk, &options.dir, sequence)?;
    if loaded.header.identity != options.identity {
        return Err(LogError::OtherMember { file: loaded.path });
    }
    Ok(loaded)
}

/// As above, whoever the segment belongs to.
pub(super) fn load_any(disk: &dyn Disk, dir: &Path, sequence: u64) -> Result<Loaded, LogError> {
    let path = segment_path(dir, sequence);
    let failed = |error| LogError::io("read", &path, error);
    let file = disk.open(&path).map_err(failed)?;
    let size = file.size().map_err(failed)?;
    let mut head = vec![0; SEGMENT_HEADER.min(usize::try_from(size).unwrap_or(usize::MAX))];
    read_all(file.as_ref(), &mut head, 0).map_err(failed)?;
    let header = Header::decode(&head, &path)?;
    if header.sequence != sequence {
        return Err(LogError::corrupt(&path, 0, "the header has the number of another segment"));
    }
    if size != header.bytes || size > SEGMENT_BYTES_MAX {
        let reason = "the file does not have the length that its header tells";
        return Err(LogError::corrupt(&path, size as usize, reason));
    }
    let mut bytes = vec![0; size as usize];
    read_all(file.as_ref(), &mut bytes, 0).map_err(failed)?;
    Ok(Loaded { path, file, header, bytes })
}

/// Where the valid records of a segment end.
struct End {
    position: usize,
    /// The last record is a closing one.
    closed: bool,
    /// Bytes of an unfinished write may lie behind.
    torn: bool,
}

/// Reads all records of one segment in order.
fn scan(loaded: &Loaded, is_last: bool, replay: &mut Replay) -> Result<End, LogError> {
    let (bytes, seed) = (loaded.bytes.as_slice(), loaded.header.seed());
    let mut position = SEGMENT_HEADER;
    let mut closed = false;
    while let Some(record) = bytes.get(position..).and_then(|rest| decode(rest, position, seed)) {
        closed = record.type_byte == RecordType::Close as u8;
        replay.apply(&loaded.path, position, &record)?;
        position += record_bytes(record.payload.len());
    }
    if !is_last && !closed {
        let reason = "a record is bad, and later segments follow";
        return Err(LogError::corrupt(&loaded.path, position, reason));
    }
    let followed = find_record(bytes, position, seed);
    if let Some((at, batch)) = followed
        && (batch as usize > position || !is_last)
    {
        tracing::error!(bad = position, valid = at, "a bad log record is followed by a valid one");
        let reason = "a record is bad, but records behind it are valid and were written later";
        return Err(LogError::corrupt(&loaded.path, position, reason));
    }
    let torn = is_last && (!closed || followed.is_some());
    Ok(End { position, closed, torn })
}

/// Looks behind `position` for the valid record of the latest write; also returns where that began.
fn find_record(bytes: &[u8], position: usize, seed: Seed) -> Option<(usize, u32)> {
    let mut at = position + ALIGN;
    let mut latest: Option<(usize, u32)> = None;
    while at < bytes.len() {
        match decode(&bytes[at..], at, seed) {
            Some(record) => {
                if latest.is_none_or(|(_, batch)| record.batch > batch) {
                    latest = Some((at, record.batch));
                }
                at += record_bytes(record.payload.len());
            }
            None => at += ALIGN,
        }
    }
    latest
}

/// Zeroes everything from `position` to the end of the segment and makes that durable.
///
/// Otherwise whole records of the torn write could stand behind new, shorter ones, and the next
/// recovery would take them for valid.
fn wipe(loaded: &Loaded, position: usize) -> Result<(), LogError> {
    let zeros = vec![0; WIPE_STEP_BYTES];
    let failed = |error| LogError::io("cut the torn tail of", &loaded.path, error);
    let mut wiped = false;
    for (step, piece) in loaded.bytes[position..].chunks(WIPE_STEP_BYTES).enumerate() {
        if piece.iter().any(|&byte| byte != 0) {
            let offset = (position + step * WIPE_STEP_BYTES) as u64;
            write_all(loaded.file.as_ref(), &zeros[..piece.len()], offset).map_err(failed)?;
            wiped = true;
        }
    }
    if wiped {
        tracing::info!(file = %loaded.path.display(), position, "zeroed behind the last log record");
        loaded.file.sync_data().map_err(failed)?;
    }
    Ok(())
}

/// The log as far as it has been read.
#[derive(Default)]
struct Replay {
    segments: VecDeque<Segment>,
    /// Entries up to here are not in the files. The purge mark must cover it in the end.
    floor: u64,
    /// Its term is 0 while it is not known: at the floor, before a purge mark has named it.
    last: LogId,
    purged: LogId,
    vote: Option<Bytes>,
    committed: Option<LogId>,
}

impl Replay {
    fn begin(&mut self, loaded: &Loaded, oldest: bool) -> Result<(), LogError> {
        let Some(before) = loaded.header.first_index.checked_sub(1) else {
            return Err(LogError::corrupt(&loaded.path, 24, "the first index is 0"));
        };
        if oldest {
            self.floor = before;
            self.last = LogId { term: 0, index: before };
        } else if before != self.last.index {
            let reason = "the segment does not continue the one before it";
            return Err(LogError::corrupt(&loaded.path, 24, reason));
        }
        let file = Arc::clone(&loaded.file);
        self.segments.push_back(Segment::new(loaded.path.clone(), file, &loaded.header));
        Ok(())
    }

    fn apply(&mut self, path: &Path, at: usize, record: &Record<'_>) -> Result<(), LogError> {
        let Some(record_type) = RecordType::from_byte(record.type_byte) else {
            return Err(LogError::corrupt(path, at, "a record has a type that is not known"));
        };
        match record_type {
            RecordType::Entry => self.entry(at, record),
            RecordType::Vote => {
                self.vote = Some(Bytes::copy_from_slice(record.payload));
                Ok(())
            }
            RecordType::TruncateAfter => self.truncate_after(record.id.index),
            RecordType::Purge => {
                self.purge(record.id);
                Ok(())
            }
            RecordType::Committed => {
                self.committed = self.committed.max(Some(record.id));
                Ok(())
            }
            RecordType::Close => Ok(()),
        }
        .map_err(|reason| LogError::corrupt(path, at, reason))
    }

    fn entry(&mut self, at: usize, record: &Record<'_>) -> Result<(), &'static str> {
        if self.last.index.checked_add(1) != Some(record.id.index) {
            return Err("an entry does not continue the log");
        }
        if record.id.term < self.last.term {
            return Err("an entry has a lower term than the one before it");
        }
        let slot = Slot {
            position: u32::try_from(at).map_err(|_| "the segment is too long")?,
            payload_bytes: record.payload.len() as u32,
            term: record.id.term,
        };
        let segment = self.segments.back_mut().expect("begin has pushed this segment");
        segment.push(record.id.index, slot);
        self.last = record.id;
        Ok(())
    }

    fn truncate_after(&mut self, index: u64) -> Result<(), &'static str> {
        if index < self.purged.index {
            return Err("a truncation goes below the purge mark");
        }
        if index >= self.last.index {
            return Ok(());
        }
        self.floor = self.floor.min(index);
        self.last = match self.segments.iter().rev().find_map(|segment| segment.slot(index)) {
            _ if index == self.purged.index => self.purged,
            Some(slot) => LogId { term: slot.term, index },
            None => LogId { term: 0, index },
        };
        truncate_segments(&mut self.segments, index);
        Ok(())
    }

    fn purge(&mut self, upto: LogId) {
        if upto.index <= self.purged.index {
            return;
        }
        self.purged = upto;
        self.floor = self.floor.max(upto.index);
        if upto.index > self.last.index {
            truncate_segments(&mut self.segments, 0);
        }
        if upto.index >= self.last.index {
            self.last = upto;
        }
    }

    /// What only the end of the log can show.
    fn check(&self, dir: &Path, oldest: u64) -> Result<(), LogError> {
        if self.purged.index < self.floor {
            let file = segment_path(dir, oldest.saturating_sub(1));
            return Err(LogError::Missing { file });
        }
        if self.vote.is_none() && self.last.index > 0 {
            return Err(LogError::NoVote { dir: dir.to_owned() });
        }
        Ok(())
    }

    fn into_recovered(self, active: Active, spares: Vec<PathBuf>) -> Recovered {
        let last = self.last;
        Recovered {
            segments: self.segments,
            active,
            vote: self.vote,
            purged: self.purged,
            last,
            committed: self.committed.filter(|id| id.index <= last.index),
            spares,
        }
    }
}
