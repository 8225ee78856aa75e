//! Reads etcd's write-ahead log: files of framed records with a running checksum, as 3.4 to 3.7 write
//! them. It gives the hard state and all entries behind a position, each as the command that it is
//! here (`requests`). It changes nothing and decides nothing about what is committed: that is for
//! consensus. Stands beside `database`; the raft crate makes log entries of what it finds.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};

use kelson_api::Message;

use super::EtcdFileError;
use super::database::COUNT_MAX;
use super::requests::{Payload, Requests, entries_of};
use crate::types::LogId;

/// Length of a record's length.
const FRAME: u64 = 8;
/// Writes reach the disk in pieces of this size; one that is all zero was never written.
const SECTOR: u64 = 512;
/// Entries behind the position that may be held. etcd's database follows its log within a second, so
/// there are few. Unit: bytes.
const HELD_BYTES_MAX: usize = 1 << 30;
/// etcd begins a new file behind this many bytes; no request comes near. Unit: bytes.
const RECORD_BYTES_MAX: u64 = 64 << 20;

pub(super) const METADATA: i64 = 1;
pub(super) const ENTRY: i64 = 2;
pub(super) const STATE: i64 = 3;
pub(super) const CRC: i64 = 4;
pub(super) const SNAPSHOT: i64 = 5;

pub(super) const CONF_CHANGE: i32 = 1;

impl Record {
    /// Appends the record as it stands in a file.
    pub(super) fn frame_into(&self, file: &mut Vec<u8>) {
        let bytes = self.encode_to_vec();
        let padding = (8 - bytes.len() % 8) % 8;
        let mut frame = bytes.len() as u64;
        if padding != 0 {
            frame |= (0x80 | padding as u64) << 56;
        }
        file.extend_from_slice(&frame.to_le_bytes());
        file.extend_from_slice(&bytes);
        file.resize(file.len() + padding, 0);
    }
}

/// What the log says.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct EtcdLog {
    /// Whose log it is.
    pub member_id: u64,
    /// Of which cluster.
    pub cluster_id: u64,
    /// Raft term.
    pub term: u64,
    /// For whom the member voted in it; 0 = nobody.
    pub vote: u64,
    /// Everything up to here is committed; there may be more.
    pub commit: u64,
    /// The entry at the position asked for, if the log still knows it.
    pub at_position: Option<LogId>,
    /// The last entry.
    pub last: LogId,
    /// All entries behind the position.
    pub entries: Vec<EtcdEntry>,
}

/// One entry.
#[derive(Clone, PartialEq, Debug)]
pub struct EtcdEntry {
    /// Term and index.
    pub id: LogId,
    /// What it does.
    pub payload: Payload,
}

#[derive(Clone, PartialEq, kelson_api::Message)]
pub(super) struct Record {
    #[prost(int64, tag = "1")]
    pub(super) kind: i64,
    #[prost(uint32, tag = "2")]
    pub(super) crc: u32,
    #[prost(bytes = "vec", tag = "3")]
    pub(super) data: Vec<u8>,
}

#[derive(Clone, PartialEq, kelson_api::Message)]
pub(super) struct RaftEntry {
    #[prost(int32, tag = "1")]
    pub(super) kind: i32,
    #[prost(uint64, tag = "2")]
    pub(super) term: u64,
    #[prost(uint64, tag = "3")]
    pub(super) index: u64,
    #[prost(bytes = "vec", tag = "4")]
    pub(super) data: Vec<u8>,
}

#[derive(Clone, PartialEq, kelson_api::Message)]
pub(super) struct HardState {
    #[prost(uint64, tag = "1")]
    pub(super) term: u64,
    #[prost(uint64, tag = "2")]
    pub(super) vote: u64,
    #[prost(uint64, tag = "3")]
    pub(super) commit: u64,
}

#[derive(Clone, PartialEq, kelson_api::Message)]
pub(super) struct Metadata {
    #[prost(uint64, tag = "1")]
    pub(super) member_id: u64,
    #[prost(uint64, tag = "2")]
    pub(super) cluster_id: u64,
}

#[derive(Clone, PartialEq, kelson_api::Message)]
pub(super) struct SnapshotMark {
    #[prost(uint64, tag = "1")]
    pub(super) index: u64,
    #[prost(uint64, tag = "2")]
    pub(super) term: u64,
}

#[derive(Clone, PartialEq, kelson_api::Message)]
pub(super) struct ConfChangeRecord {
    #[prost(int32, tag = "2")]
    pub(super) kind: i32,
    #[prost(uint64, tag = "3")]
    pub(super) member_id: u64,
    #[prost(bytes = "vec", tag = "4")]
    pub(super) context: Vec<u8>,
}

/// Reads the log in a directory: everything that stands behind `position`.
///
/// # Errors
/// A file is missing or damaged, or an entry is none that we can carry out. An unfinished write at the
/// end of the last file is no damage.
pub fn read_wal(dir: &Path, position: u64) -> Result<EtcdLog, EtcdFileError> {
    read(dir, position, Requests::default())
}

/// As [`read_wal`].
pub(super) fn read(
    dir: &Path,
    position: u64,
    requests: Requests,
) -> Result<EtcdLog, EtcdFileError> {
    let files = files(dir)?;
    let mut reading = Reading { position, requests, ..Reading::default() };
    let last = files.len() - 1;
    for (place, (_, path)) in files.into_iter().enumerate() {
        reading.file(&path, place == last)?;
    }
    reading.finish(dir)
}

/// Files in order of their numbers, which have no gap.
fn files(dir: &Path) -> Result<BTreeMap<u64, PathBuf>, EtcdFileError> {
    let entries = fs::read_dir(dir).map_err(|error| EtcdFileError::io("read", dir, error))?;
    let mut files = BTreeMap::new();
    for entry in entries {
        let entry = entry.map_err(|error| EtcdFileError::io("read", dir, error))?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let stem = name.strip_suffix(".wal").and_then(|stem| stem.split_once('-'));
        let number = stem.and_then(|(number, index)| {
            u64::from_str_radix(index, 16).ok()?;
            u64::from_str_radix(number, 16).ok()
        });
        if let Some(number) = number {
            files.insert(number, entry.path());
        }
    }
    let foreign = |reason: String| EtcdFileError::Foreign {
        path: dir.to_owned(),
        expected: "a whole log of etcd",
        reason,
    };
    let Some(first) = files.keys().next().copied() else {
        return Err(foreign("it holds no log file".to_owned()));
    };
    let mut last = first;
    for number in files.keys().skip(1) {
        // There is a greater one, so this one can be counted on.
        last += 1;
        if *number != last {
            return Err(foreign(format!("the file with number {last:016x} is missing")));
        }
    }
    Ok(files)
}

#[derive(Default)]
struct Reading {
    position: u64,
    log: EtcdLog,
    has_metadata: bool,
    crc: u32,
    held: usize,
    requests: Requests,
}

/// One record and where it stands.
struct Framed {
    record: Record,
    offset: u64,
}

impl Reading {
    fn file(&mut self, path: &Path, is_last: bool) -> Result<(), EtcdFileError> {
        let file = File::open(path).map_err(|error| EtcdFileError::io("open", path, error))?;
        let about = file.metadata().map_err(|error| EtcdFileError::io("read", path, error))?;
        let mut input = BufReader::with_capacity(1 << 18, file);
        let (mut offset, end) = (0, about.len());
        while let Some(framed) = self.record(path, &mut input, &mut offset, end, is_last)? {
            self.take(path, framed)?;
        }
        Ok(())
    }

    /// The next record of a file; `None` behind the last one.
    fn record(
        &mut self,
        path: &Path,
        input: &mut impl Read,
        offset: &mut u64,
        end: u64,
        is_last: bool,
    ) -> Result<Option<Framed>, EtcdFileError> {
        let failed = |error| EtcdFileError::io("read", path, error);
        let damaged = |reason: &str| EtcdFileError::damaged(path, *offset, reason);
        if end - *offset < FRAME {
            return Ok(None);
        }
        let mut frame = [0; FRAME as usize];
        input.read_exact(&mut frame).map_err(failed)?;
        let frame = u64::from_le_bytes(frame);
        if frame == 0 {
            return Ok(None);
        }
        let record_len = frame & 0x00ff_ffff_ffff_ffff;
        let padding = if frame >> 63 == 1 { frame >> 56 & 7 } else { 0 };
        let len = record_len + padding;
        if len > end - *offset - FRAME {
            // A length is written as a whole, so this one is wrong, or the file was cut.
            let reason = "a record reaches beyond the end of its file; if etcd can repair it, start \
                          etcd once and stop it in order";
            return Err(damaged(reason));
        }
        if len > RECORD_BYTES_MAX {
            return Err(damaged("a record is larger than 64 MiB: etcd writes none"));
        }
        let mut bytes = vec![0; len as usize];
        input.read_exact(&mut bytes).map_err(failed)?;
        let is_torn = || is_last && has_zero_sector(&bytes, *offset + FRAME);
        let Ok(record) = Record::decode(&bytes[..record_len as usize]) else {
            return if is_torn() { Ok(None) } else { Err(damaged("a record does not decode")) };
        };
        if record.kind != CRC {
            let crc = crc32c::crc32c_append(self.crc, &record.data);
            if crc != record.crc {
                return match is_torn() {
                    true => Ok(None),
                    false => Err(damaged("the checksum of a record does not fit")),
                };
            }
            self.crc = crc;
        }
        let framed = Framed { record, offset: *offset };
        *offset += FRAME + len;
        Ok(Some(framed))
    }

    fn take(&mut self, path: &Path, framed: Framed) -> Result<(), EtcdFileError> {
        let Framed { record, offset } = framed;
        let damaged = |reason: &str| EtcdFileError::damaged(path, offset, reason);
        match record.kind {
            CRC => {
                if self.crc != 0 && self.crc != record.crc {
                    return Err(damaged("the file does not continue the one before"));
                }
                self.crc = record.crc;
            }
            METADATA => {
                let metadata = Metadata::decode(record.data.as_slice());
                let metadata = metadata.map_err(|_| damaged("metadata do not decode"))?;
                let found = (metadata.member_id, metadata.cluster_id);
                if self.has_metadata && found != (self.log.member_id, self.log.cluster_id) {
                    return Err(damaged("the file belongs to another member"));
                }
                self.has_metadata = true;
                (self.log.member_id, self.log.cluster_id) = found;
            }
            STATE => {
                let state = HardState::decode(record.data.as_slice());
                let state = state.map_err(|_| damaged("a hard state does not decode"))?;
                if state.term.max(state.commit) > COUNT_MAX {
                    return Err(damaged("a hard state has an impossible term or index"));
                }
                self.log.term = state.term;
                self.log.vote = state.vote;
                self.log.commit = state.commit;
            }
            ENTRY => {
                let entry = RaftEntry::decode(record.data.as_slice());
                self.entry(path, offset, entry.map_err(|_| damaged("an entry does not decode"))?)?;
            }
            SNAPSHOT => {
                let mark = SnapshotMark::decode(record.data.as_slice());
                let mark = mark.map_err(|_| damaged("a snapshot mark does not decode"))?;
                if mark.term.max(mark.index) > COUNT_MAX {
                    return Err(damaged("a snapshot mark has an impossible term or index"));
                }
                self.snapshot(LogId { term: mark.term, index: mark.index });
            }
            _ => return Err(damaged("a record has a type that is not known")),
        }
        Ok(())
    }

    /// A snapshot that reaches beyond the entries replaces them.
    fn snapshot(&mut self, at: LogId) {
        if at.index == self.position && at.index > 0 {
            self.log.at_position = Some(at);
        }
        if at.index > self.log.last.index {
            self.log.last = at;
            self.forget(0);
        }
    }

    fn forget(&mut self, keep: usize) {
        self.log.entries.truncate(keep);
    }

    fn entry(&mut self, path: &Path, offset: u64, entry: RaftEntry) -> Result<(), EtcdFileError> {
        let id = LogId { term: entry.term, index: entry.index };
        let damaged = |reason: &str| EtcdFileError::damaged(path, offset, reason);
        if id.term.max(id.index) > COUNT_MAX {
            return Err(damaged("an entry has an impossible term or index"));
        }
        let is_first = self.log.last.index == 0;
        if id.index == 0 || (!is_first && id.index > self.log.last.index + 1) {
            return Err(damaged("entries are missing before this one"));
        }
        // A later entry of the same index replaces the earlier one and all behind it.
        self.log.last = id;
        if id.index == self.position {
            self.log.at_position = Some(id);
        }
        let Some(place) = id.index.checked_sub(self.position + 1) else {
            self.forget(0);
            return Ok(());
        };
        let place = usize::try_from(place).unwrap_or(usize::MAX);
        if place > self.log.entries.len() {
            let reason = format!(
                "the log begins with entry {}, but the database ends with entry {}",
                id.index, self.position
            );
            return Err(damaged(&reason));
        }
        self.forget(place);
        self.held += entry.data.len();
        if self.held > HELD_BYTES_MAX {
            let reason = "more than 1 GiB of entries wait to be applied: start etcd, let it catch \
                          up, and stop it in order";
            return Err(damaged(reason));
        }
        let payload = self.requests.payload(self.log.cluster_id, entry);
        let payload = payload.map_err(|reason| {
            damaged(&format!("entry {} cannot be carried out: {reason}", id.index))
        })?;
        self.log.entries.push(EtcdEntry { id, payload });
        Ok(())
    }

    fn finish(self, dir: &Path) -> Result<EtcdLog, EtcdFileError> {
        let foreign = |reason: String| EtcdFileError::Foreign {
            path: dir.to_owned(),
            expected: "the log that belongs to the database",
            reason,
        };
        if !self.has_metadata {
            return Err(foreign("it does not say whose it is".to_owned()));
        }
        if self.log.last.index < self.position {
            return Err(foreign(format!(
                "it ends with entry {}, but the database has applied entry {}",
                self.log.last.index, self.position
            )));
        }
        let expected = self.log.last.index - self.position;
        if self.log.entries.len() as u64 != expected {
            return Err(foreign(format!(
                "a snapshot up to entry {} was being received; the database still ends with entry \
                 {}: start etcd once so that it finishes, and stop it in order",
                self.log.last.index, self.position
            )));
        }
        Ok(self.log)
    }
}

/// Whether a part of a write never reached the disk.
fn has_zero_sector(bytes: &[u8], start: u64) -> bool {
    let first = (SECTOR - start % SECTOR) as usize;
    let (first, rest) = bytes.split_at(first.min(bytes.len()));
    let is_zero = |sector: &[u8]| !sector.is_empty() && sector.iter().all(|byte| *byte == 0);
    is_zero(first) || rest.chunks(SECTOR as usize).any(is_zero)
}

/// For the fuzz target: records with fitting checksums out of any bytes. The first byte of each is its
/// type, the second its length.
pub(super) fn with_sound_checksums(mut data: &[u8]) -> Vec<u8> {
    let mut records = Vec::new();
    while let [kind, len, rest @ ..] = data {
        let (body, rest) = rest.split_at(rest.len().min(usize::from(*len)));
        data = rest;
        records.push((i64::from(kind % 7), body.to_vec()));
    }
    records.retain(|(kind, _)| *kind != CRC);
    file_of(records)
}

/// For the fuzz target: a log whose entries are any bytes. The first byte of each is its length.
pub(super) fn with_sound_entries(data: &[u8]) -> Vec<u8> {
    let metadata = Metadata { member_id: 1, cluster_id: 2 }.encode_to_vec();
    let entries = entries_of(data).into_iter().map(|entry| (ENTRY, entry.encode_to_vec()));
    file_of(std::iter::once((METADATA, metadata)).chain(entries))
}

/// Records with their running checksum.
pub(super) fn file_of(records: impl IntoIterator<Item = (i64, Vec<u8>)>) -> Vec<u8> {
    let (mut file, mut crc) = (Vec::new(), 0);
    for (kind, data) in records {
        crc = crc32c::crc32c_append(crc, &data);
        Record { kind, crc, data }.frame_into(&mut file);
    }
    file
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(term: u64, index: u64) -> (i64, Vec<u8>) {
        (ENTRY, RaftEntry { kind: 0, term, index, data: Vec::new() }.encode_to_vec())
    }

    fn metadata() -> (i64, Vec<u8>) {
        (METADATA, Metadata { member_id: 1, cluster_id: 2 }.encode_to_vec())
    }

    /// What is said of a log with these files.
    fn read_files(files: &[(&str, Vec<u8>)]) -> Result<EtcdLog, String> {
        let dir = tempfile::tempdir().expect("a temporary directory");
        for (name, bytes) in files {
            fs::write(dir.path().join(name), bytes).expect("write a file");
        }
        read_wal(dir.path(), 0).map_err(|error| {
            let text = error.to_string();
            assert!(text.contains(&dir.path().display().to_string()), "no file: {text}");
            text
        })
    }

    fn read_records(records: impl IntoIterator<Item = (i64, Vec<u8>)>) -> Result<EtcdLog, String> {
        let records = std::iter::once(metadata()).chain(records);
        read_files(&[("0000000000000000-0000000000000000.wal", file_of(records))])
    }

    #[test]
    fn numbers_that_cannot_be_counted_on_are_refused() {
        let found = read_records([entry(1, 1), entry(1, 2)]).expect("it is sound");
        assert_eq!((found.entries.len(), found.last.index), (2, 2));
        let state = |term, commit| (STATE, HardState { term, vote: 0, commit }.encode_to_vec());
        let mark = |index, term| (SNAPSHOT, SnapshotMark { index, term }.encode_to_vec());
        for (record, what) in [
            (entry(1, u64::MAX), "an entry"),
            (entry(u64::MAX, 1), "an entry"),
            (state(u64::MAX, 0), "a hard state"),
            (state(1, u64::MAX), "a hard state"),
            (mark(u64::MAX, 1), "a snapshot mark"),
            (mark(1, u64::MAX), "a snapshot mark"),
        ] {
            let error = read_records([record, entry(1, 2)]).expect_err("it must be refused");
            assert!(error.contains(&format!("{what} has an impossible term or index")), "{error}");
        }
    }

    #[test]
    fn files_follow_each_other_without_a_gap() {
        let name = |number: u64| format!("{number:016x}-0000000000000000.wal");
        let empty = || file_of([metadata()]);
        let last = name(u64::MAX);
        read_files(&[(&last, empty())]).expect("a number like any other");
        let error = read_files(&[(&name(3), empty()), (&last, empty())]).expect_err("a gap");
        assert!(error.contains("the file with number 0000000000000004 is missing"), "{error}");
    }

    #[test]
    fn a_record_that_etcd_cannot_have_written_takes_no_memory() {
        let mut file = file_of([metadata()]);
        let len = RECORD_BYTES_MAX + 8;
        file.extend_from_slice(&len.to_le_bytes());
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join("0000000000000000-0000000000000000.wal");
        fs::write(&path, &file).expect("write a file");
        // It is there, but as a hole that takes no room on the disk.
        let holed = File::options().write(true).open(&path).expect("open the file");
        holed.set_len(file.len() as u64 + len).expect("make it longer");
        let error = read_wal(dir.path(), 0).expect_err("it must be refused").to_string();
        assert!(error.contains("a record is larger than 64 MiB"), "{error}");
    }
}
