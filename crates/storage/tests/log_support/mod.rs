//! What the tests of the log share: a small log on a disk in memory, and waiting for callbacks.

#![allow(dead_code, reason = "each test binary uses its own part of it")]

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::channel;

use bytes::Bytes;
use kelson_storage::LogId;
use kelson_storage::log::{Done, Entry, Log, LogError, LogOptions, Opened, SimDisk};

/// Small segments, so that a test crosses many; a small tail, so that reads go to the files.
pub(crate) const SEGMENT_BYTES: u64 = 16 << 10;

pub(crate) fn options() -> LogOptions {
    LogOptions {
        segment_bytes: SEGMENT_BYTES,
        tail_bytes: 4 << 10,
        ..LogOptions::new("/log", [7; 16])
    }
}

pub(crate) fn open(disk: &SimDisk) -> Result<Opened, LogError> {
    Log::open_on(options(), Arc::new(disk.clone()))
}

/// Opens a new log and saves a first vote.
pub(crate) fn new_log(disk: &SimDisk) -> Log {
    let opened = open(disk).expect("an empty disk opens");
    assert_eq!(opened.vote, None);
    wait(|done| opened.log.save_vote(Bytes::from_static(b"first"), done)).expect("the vote");
    opened.log
}

pub(crate) fn id(term: u64, index: u64) -> LogId {
    LogId { term, index }
}

/// An entry whose bytes depend on its position, so that a wrong one is noticed.
pub(crate) fn entry(term: u64, index: u64, bytes: usize) -> Entry {
    let seed = (term * 31 + index * 7) as u8;
    let payload: Vec<u8> = (0..bytes).map(|at| seed.wrapping_add(at as u8)).collect();
    Entry { id: id(term, index), kind: (index % 5) as u8, payload: Bytes::from(payload) }
}

pub(crate) fn entries(
    term: u64,
    indexes: std::ops::RangeInclusive<u64>,
    bytes: usize,
) -> Vec<Entry> {
    indexes.map(|index| entry(term, index, bytes)).collect()
}

/// Runs one operation and waits for its callback.
pub(crate) fn wait(operation: impl FnOnce(Done)) -> Result<(), LogError> {
    let (sender, receiver) = channel();
    operation(Box::new(move |result| sender.send(result).expect("the test is waiting")));
    receiver.recv().expect("every callback comes")
}

pub(crate) fn append(log: &Log, entries: Vec<Entry>) {
    wait(|done| log.append(entries, done)).expect("the append");
}

pub(crate) fn all(log: &Log) -> Vec<Entry> {
    log.read(log.first_index(), u64::MAX, usize::MAX).expect("the log reads")
}

pub(crate) fn segment(sequence: u64) -> PathBuf {
    Path::new("/log").join(format!("{sequence:016x}.wal"))
}

/// The segments on the disk, oldest first.
pub(crate) fn segments(disk: &SimDisk) -> Vec<PathBuf> {
    let paths = disk.paths().into_iter();
    paths.filter(|path| path.extension().is_some_and(|it| it == "wal")).collect()
}

/// A copy of the files without their history, all of one moment: the log renames files meanwhile.
pub(crate) fn copy(disk: &SimDisk) -> SimDisk {
    disk.copy()
}

/// The same files with one of them replaced.
pub(crate) fn with(disk: &SimDisk, path: &Path, bytes: Vec<u8>) -> SimDisk {
    let copy = copy(disk);
    copy.put(path, bytes);
    copy
}

/// Waits until a condition holds; only "eventually", never a measurement.
pub(crate) fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(30);
    while !holds() {
        assert!(std::time::Instant::now() < deadline, "not in time: {what}");
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
}

/// Message of a refusal; the log must not open.
pub(crate) fn refusal(disk: &SimDisk) -> String {
    match open(disk) {
        Ok(opened) => panic!("opened up to {:?} instead of refusing", opened.last),
        Err(error) => error.to_string(),
    }
}
