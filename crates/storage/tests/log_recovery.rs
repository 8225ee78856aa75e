//! Opening a log that is torn, damaged, incomplete or not ours: what is cut and what is refused.

mod log_support;

use std::collections::BTreeSet;

use bytes::Bytes;
use kelson_storage::LogId;
use kelson_storage::log::{Log, SimDisk};
use log_support::*;

/// A log that was left without a clean shutdown: its files before and after the last append.
struct Torn {
    before: SimDisk,
    after: SimDisk,
    /// Bytes of the last append in the first segment.
    range: std::ops::Range<usize>,
}

const DURABLE: u64 = 12;

fn torn(last: std::ops::RangeInclusive<u64>, bytes: usize) -> Torn {
    let disk = SimDisk::new();
    let log = new_log(&disk);
    for index in 1..=DURABLE {
        append(&log, vec![entry(1, index, 40)]);
    }
    let before = copy(&disk);
    append(&log, entries(1, last, bytes));
    let after = copy(&disk);
    let (old, new) = (first_bytes(&before), first_bytes(&after));
    let differs = |at: &usize| old[*at] != new[*at];
    let start = (0..old.len()).find(differs).expect("the append changed something");
    let end = (0..old.len()).rfind(differs).expect("the append changed something");
    // A record starts at a multiple of 8 and its first byte may be zero.
    Torn { before, after, range: start / 8 * 8..(end + 1).next_multiple_of(8) }
}

fn first_bytes(disk: &SimDisk) -> Vec<u8> {
    disk.bytes(&segment(1)).expect("the first segment exists")
}

/// It opens with all durable entries and a prefix of the others, takes new ones, and these stay.
fn recovers(disk: &SimDisk, case: &str) -> u64 {
    let opened = open(disk).unwrap_or_else(|error| panic!("{case}: {error}"));
    let last = opened.last.index;
    assert!(last >= DURABLE, "{case}: only {last} entries are left");
    let bytes = |index| if index <= DURABLE { 40 } else { 300 };
    let mut expected: Vec<_> = (1..=last).map(|index| entry(1, index, bytes(index))).collect();
    assert_eq!(all(&opened.log), expected, "{case}");
    // A short one: what follows it in the file must not come to life.
    expected.push(entry(2, last + 1, 3));
    append(&opened.log, vec![entry(2, last + 1, 3)]);
    // Without and with the closing record of a clean shutdown.
    let crashed = copy(disk);
    drop(opened);
    for disk in [&crashed, disk] {
        let opened = open(disk).unwrap_or_else(|error| panic!("{case}, again: {error}"));
        assert_eq!(all(&opened.log), expected, "{case}, again");
    }
    last
}

#[test]
fn a_tail_torn_at_any_byte_is_cut_behind_the_durable_entries() {
    let torn = torn(13..=15, 300);
    let (old, new) = (first_bytes(&torn.before), first_bytes(&torn.after));
    let mut lasts = BTreeSet::new();
    for cut in torn.range.clone() {
        let mut bytes = old.clone();
        bytes[..cut].copy_from_slice(&new[..cut]);
        let disk = with(&torn.before, &segment(1), bytes);
        let last = recovers(&disk, &format!("cut at {cut}"));
        // The very last bytes are padding: without them the record is still whole.
        assert!(last < 15 || cut + 8 > torn.range.end, "cut at {cut}");
        lasts.insert(last);
    }
    assert!(lasts.is_superset(&BTreeSet::from([12, 13, 14])), "each record is cut somewhere");
    assert_eq!(recovers(&copy(&torn.after), "not cut"), 15);
}

#[test]
fn a_tail_of_which_only_later_bytes_arrived_is_cut_too() {
    let torn = torn(13..=15, 300);
    let (old, new) = (first_bytes(&torn.before), first_bytes(&torn.after));
    for cut in torn.range.clone().skip(1).step_by(5) {
        let mut bytes = old.clone();
        bytes[cut..].copy_from_slice(&new[cut..]);
        let disk = with(&torn.before, &segment(1), bytes);
        assert_eq!(recovers(&disk, &format!("arrived from {cut}")), DURABLE);
    }
}

#[test]
fn what_stood_behind_a_torn_record_never_comes_back() {
    let torn = torn(13..=15, 300);
    let mut bytes = first_bytes(&torn.after);
    // The first record of the write is lost, the two behind it are whole.
    bytes[torn.range.start..torn.range.start + 32].fill(0);
    let disk = with(&torn.after, &segment(1), bytes);
    let opened = open(&disk).expect("the tail is cut");
    assert_eq!(opened.last, id(1, DURABLE));
    // As long as the lost one: the old record 14 would follow it without a gap.
    append(&opened.log, vec![entry(1, 13, 300)]);
    let opened = open(&copy(&disk)).expect("it reopens");
    assert_eq!(opened.last, id(1, 13));
}

#[test]
fn a_tail_with_a_hole_or_garbage_is_cut() {
    let torn = torn(13..=15, 300);
    let new = first_bytes(&torn.after);
    for at in torn.range.clone().step_by(3) {
        let mut bytes = new.clone();
        let end = (at + 100).min(torn.range.end);
        bytes[at..end].fill(0);
        recovers(&with(&torn.after, &segment(1), bytes.clone()), &format!("hole at {at}"));
        bytes[at..end].fill(0xA5);
        recovers(&with(&torn.after, &segment(1), bytes), &format!("garbage at {at}"));
    }
}

/// A log over several segments, shut down cleanly, with all kinds of records.
fn long_log() -> (SimDisk, LogId) {
    let disk = SimDisk::new();
    let log = new_log(&disk);
    for index in 1..=90 {
        append(&log, vec![entry(1, index, 300)]);
    }
    wait(|done| log.truncate_after(85, done)).expect("the truncation");
    wait(|done| log.save_vote(Bytes::from_static(b"second"), done)).expect("the vote");
    wait(|done| log.purge(id(1, 5), done)).expect("the purge");
    append(&log, entries(2, 86..=100, 300));
    log.hint_committed(id(2, 95));
    append(&log, entries(2, 101..=101, 300));
    let last = log.last_id();
    log.shutdown();
    assert!(segments(&disk).len() >= 3);
    (disk, last)
}

/// End of the last record that is not the closing one.
fn end_of_records(bytes: &[u8]) -> usize {
    let used = bytes.iter().rposition(|&byte| byte != 0).expect("there are records") + 1;
    // The closing record has a zero term and index, so its last byte that counts is in the batch
    // field at 12..16 of its 32.
    (used - 12) / 8 * 8
}

#[test]
fn a_flipped_bit_in_any_record_but_the_last_is_refused() {
    let (disk, last) = long_log();
    let paths = segments(&disk);
    for (number, path) in paths.iter().enumerate() {
        let bytes = disk.bytes(path).expect("it exists");
        let active = number + 1 == paths.len();
        let end = if active { end_of_records(&bytes) } else { used(&bytes) };
        // Each byte of the first records, then one in 23: all fields of records are hit.
        let flips = (0..400).chain((400..end).step_by(23)).chain(end - 40..end);
        for at in flips.filter(|&at| at < end) {
            let mut bad = bytes.clone();
            bad[at] ^= 1 << (at % 8);
            let message = refusal(&with(&disk, path, bad));
            let name = path.file_name().expect("it has a name").to_string_lossy();
            assert!(message.contains(&*name), "{message}");
        }
    }
    assert_eq!(open(&disk).expect("unharmed").last, last);
}

/// End of all bytes of the records in a segment of a log that was never recycled.
fn used(bytes: &[u8]) -> usize {
    bytes.iter().rposition(|&byte| byte != 0).expect("there are records") + 1
}

#[test]
fn a_flipped_bit_behind_the_records_or_in_the_last_one_loses_nothing_durable() {
    let (disk, last) = long_log();
    let path = segments(&disk).pop().expect("there are segments");
    let bytes = disk.bytes(&path).expect("it exists");
    let end = end_of_records(&bytes);
    for at in (end..end + 64).chain((end + 64..bytes.len()).step_by(501)) {
        let mut flipped = bytes.clone();
        flipped[at] ^= 0x10;
        let opened = open(&with(&disk, &path, flipped)).expect("nothing durable is touched");
        assert_eq!(opened.last, last);
    }
}

#[test]
fn a_file_that_was_cut_is_refused() {
    let (disk, _) = long_log();
    for path in segments(&disk) {
        let bytes = disk.bytes(&path).expect("it exists");
        for length in [0, 1, 63, 64, 65, 4095, 4096, 8000, bytes.len() - 4096, bytes.len() - 1] {
            let message = refusal(&with(&disk, &path, bytes[..length].to_vec()));
            let name = path.file_name().expect("it has a name").to_string_lossy();
            assert!(message.contains(&*name), "{message}");
        }
        let zeroed = [&bytes[..bytes.len() / 3], &vec![0; bytes.len() - bytes.len() / 3]].concat();
        if Some(&path) != segments(&disk).last() {
            assert!(refusal(&with(&disk, &path, zeroed)).contains("damaged"));
        }
    }
}

#[test]
fn a_missing_segment_is_refused() {
    let (disk, _) = long_log();
    let paths = segments(&disk);
    for missing in &paths[..paths.len() - 1] {
        let rest = SimDisk::new();
        for path in disk.paths().iter().filter(|path| *path != missing) {
            rest.put(path, disk.bytes(path).expect("it exists"));
        }
        let message = refusal(&rest);
        assert!(message.contains("is missing") && message.contains("replace this member"));
        let name = missing.file_name().expect("it has a name").to_string_lossy();
        assert!(message.contains(&*name), "{message}");
    }
    let spares_only = SimDisk::new();
    spares_only.put("/log/spare-0.next", vec![0; SEGMENT_BYTES as usize]);
    assert!(refusal(&spares_only).contains("is missing"));
}

#[test]
fn damage_names_the_file_the_offset_and_the_remedy() {
    let (disk, _) = long_log();
    let mut bytes = first_bytes(&disk);
    bytes[5000] ^= 1;
    let message = refusal(&with(&disk, &segment(1), bytes));
    for part in ["0000000000000001.wal", "at byte 4", "replace this member", "backup"] {
        assert!(message.contains(part), "{part} is not in: {message}");
    }
}

#[test]
fn a_log_without_a_vote_is_refused() {
    let disk = SimDisk::new();
    let opened = open(&disk).expect("a new log");
    // `append` would refuse; a purge mark shows as well that this log has had entries.
    wait(|done| opened.log.purge(id(1, 10), done)).expect("the purge");
    drop(opened);
    let message = refusal(&disk);
    assert!(message.contains("log without a vote") && message.contains("replace this member"));
}

#[test]
fn foreign_and_newer_files_are_refused_untouched() {
    let (disk, _) = long_log();
    let path = segments(&disk).pop().expect("there are segments");
    let good = disk.bytes(&path).expect("it exists");
    let mut newer = good.clone();
    newer[8] = 2;
    let mut foreign = good.clone();
    foreign[..8].copy_from_slice(b"SOMETHIN");
    for (bytes, message) in [(newer, "newer"), (foreign, "not a log segment")] {
        // An earlier crash left something to clean up: even that stays as it is.
        let changed = with(&disk, &path, bytes.clone());
        changed.put("/log/unfinished.tmp", vec![1]);
        assert!(refusal(&changed).contains(message));
        assert_eq!(changed.calls(), vec![], "nothing was written");
    }
    let etcd = copy(&disk);
    etcd.put("/log/0000000000000000-0000000000000000.wal", vec![4; 100]);
    assert!(refusal(&etcd).contains("not a log segment"));
    assert_eq!(etcd.calls(), vec![]);
}

#[test]
fn the_log_of_another_member_is_refused() {
    let (disk, _) = long_log();
    let mut options = options();
    options.identity = [8; 16];
    let Err(error) = Log::open_on(options, std::sync::Arc::new(disk.clone())) else {
        panic!("it opened");
    };
    assert!(error.to_string().contains("belongs to another member"));
}

#[test]
fn leftovers_of_an_interrupted_start_are_harmless() {
    let (disk, last) = long_log();
    disk.put("/log/unfinished.tmp", vec![1; 100]);
    disk.put("/log/spare-1.next", vec![9; 100]);
    disk.put("/log/lost+found", vec![]);
    let opened = open(&disk).expect("it opens");
    assert_eq!(opened.last, last);
    append(&opened.log, entries(3, last.index + 1..=last.index + 90, 300));
    drop(opened);
    assert_eq!(open(&disk).expect("it reopens").last.index, last.index + 90);
}

#[test]
fn many_clean_restarts_leave_the_log_alone() {
    let (disk, last) = long_log();
    let before = segments(&disk).pop().and_then(|path| disk.bytes(&path));
    for _ in 0..200 {
        let opened = open(&disk).expect("it reopens");
        assert_eq!(opened.last, last);
        drop(opened);
    }
    assert_eq!(before, segments(&disk).pop().and_then(|path| disk.bytes(&path)));
}
