//! The log through its public face: append, read, vote, truncate, purge, durable index, limits.

mod log_support;

use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;
use std::sync::mpsc::channel;

use bytes::Bytes;
use kelson_storage::LogId;
use kelson_storage::log::{Call, Durable, Faults, Log, LogError, LogOptions, SimDisk};
use log_support::*;

#[test]
fn entries_come_back_across_segments_and_restarts() {
    let disk = SimDisk::new();
    let log = new_log(&disk);
    let mut expected = Vec::new();
    for first in (1..=300).step_by(3) {
        let batch = entries(1 + first / 100, first..=first + 2, 300);
        expected.extend(batch.clone());
        append(&log, batch);
    }
    assert!(segments(&disk).len() > 4, "the test crosses segments");
    assert_eq!(all(&log), expected);
    assert_eq!(log.last_id(), id(3, 300));
    assert_eq!(log.id_at(150), Some(id(2, 150)));
    drop(log);
    let opened = open(&disk).expect("it reopens");
    assert_eq!(opened.last, id(3, 300));
    assert_eq!(opened.purged, LogId::default());
    assert_eq!(opened.vote.as_deref(), Some(&b"first"[..]));
    assert_eq!(all(&opened.log), expected);
    assert_eq!(opened.log.durable().index(), 300);
}

#[test]
fn entries_are_readable_when_append_returns() {
    let log = new_log(&SimDisk::new());
    for index in 1..=200 {
        log.append(vec![entry(1, index, 100)], Box::new(|_| {}));
        let read = log.read(index, index + 1, usize::MAX).expect("it reads");
        assert_eq!(read, vec![entry(1, index, 100)]);
    }
}

#[test]
fn a_read_is_cut_by_bytes_but_never_empty() {
    let log = new_log(&SimDisk::new());
    append(&log, entries(1, 1..=60, 200));
    for from in [1, 30, 58] {
        assert_eq!(log.read(from, 61, 0).expect("it reads").len(), 1);
        assert_eq!(log.read(from, 61, 400).expect("it reads").len(), 2);
        assert_eq!(log.read(from, from + 1, 4000).expect("it reads").len(), 1);
    }
    // The tail holds the last 20 entries: this read takes from a file and from the tail.
    assert_eq!(log.read(35, 61, 5200).expect("it reads"), entries(1, 35..=60, 200));
    assert_eq!(log.read(35, 61, 5199).expect("it reads"), entries(1, 35..=59, 200));
    assert_eq!(log.read(61, 70, 1000).expect("it reads"), vec![]);
}

#[test]
fn callbacks_come_in_order_and_after_the_sync() {
    let disk = SimDisk::new();
    let log = new_log(&disk);
    for index in 1..=500u64 {
        let noted = disk.clone();
        let done = move |result: Result<(), LogError>| {
            result.expect("the append");
            noted.note(index);
        };
        log.append(vec![entry(1, index, 50)], Box::new(done));
    }
    assert!(log.durable().wait_for(500));
    log.shutdown();
    let (mut notes, mut unsynced, mut syncs) = (Vec::new(), 0, 0);
    let calls = disk.calls();
    // File 0 is the first segment; what happens to spares is of no interest here.
    for call in &calls {
        match call {
            Call::Note(index) => {
                assert_eq!(unsynced, 0, "entry {index} was acknowledged before its sync");
                notes.push(*index);
            }
            Call::Write(_, _, bytes) if bytes.iter().any(|&byte| byte != 0) => unsynced += 1,
            Call::SyncData(_) if unsynced > 0 => (unsynced, syncs) = (0, syncs + 1),
            _ => {}
        }
    }
    assert_eq!(notes, (1..=500).collect::<Vec<u64>>());
    assert!(syncs > 0);
}

#[test]
fn the_last_vote_survives_every_roll() {
    let disk = SimDisk::new();
    let log = new_log(&disk);
    for round in 0..40u64 {
        let vote = Bytes::from(format!("vote {round}"));
        wait(|done| log.save_vote(vote.clone(), done)).expect("the vote");
        append(&log, entries(1, round * 5 + 1..=round * 5 + 5, 400));
        wait(|done| log.purge(id(1, round * 5 + 3), done)).expect("the purge");
        let opened = open(&copy(&disk)).expect("it reopens");
        assert_eq!(opened.vote, Some(vote));
        assert_eq!(opened.purged, id(1, round * 5 + 3));
    }
}

#[test]
fn truncated_entries_give_way_to_others() {
    let disk = SimDisk::new();
    let log = new_log(&disk);
    append(&log, entries(1, 1..=100, 300));
    wait(|done| log.truncate_after(20, done)).expect("the truncation");
    assert_eq!(log.last_id(), id(1, 20));
    assert_eq!(log.read(21, 30, 1000).expect("it reads"), vec![]);
    append(&log, entries(4, 21..=70, 300));
    let mut expected = entries(1, 1..=20, 300);
    expected.extend(entries(4, 21..=70, 300));
    assert_eq!(all(&log), expected);
    drop(log);
    let opened = open(&disk).expect("it reopens");
    assert_eq!(all(&opened.log), expected);
    wait(|done| opened.log.truncate_after(0, done)).expect("the truncation");
    append(&opened.log, entries(5, 1..=3, 10));
    drop(opened);
    assert_eq!(all(&open(&disk).expect("it reopens").log), entries(5, 1..=3, 10));
}

#[test]
fn truncations_and_appends_need_no_waiting() {
    let disk = SimDisk::new();
    let log = new_log(&disk);
    let mut expected = Vec::new();
    for term in 1..=60u64 {
        let keep = expected.len() as u64 / 2;
        log.truncate_after(keep, Box::new(|result| result.expect("the truncation")));
        expected.truncate(keep as usize);
        let more = entries(term, keep + 1..=keep + 20, 100);
        log.append(more.clone(), Box::new(|result| result.expect("the append")));
        expected.extend(more);
        assert_eq!(all(&log), expected);
    }
    log.shutdown();
    assert_eq!(all(&log), expected);
    assert_eq!(all(&open(&disk).expect("it reopens").log), expected);
}

#[test]
fn a_truncation_takes_the_durable_index_back_at_once() {
    let log = new_log(&SimDisk::new());
    append(&log, entries(1, 1..=10, 10));
    assert_eq!(log.durable().index(), 10);
    for _ in 0..200 {
        log.append(entries(1, 11..=12, 10), Box::new(|_| {}));
        log.truncate_after(4, Box::new(|_| {}));
        assert!(log.durable().index() <= 4, "dropped entries are not durable");
        append(&log, entries(1, 5..=10, 10));
        assert_eq!(log.durable().index(), 10);
    }
}

/// A log with long segments, ten large entries, and its writer held up in a callback until the
/// returned end is dropped: what is asked meanwhile queues up.
fn held_log() -> (Log, std::sync::mpsc::Sender<()>) {
    let options = LogOptions { segment_bytes: 32 << 20, ..options() };
    let log = Log::open_on(options, Arc::new(SimDisk::new())).expect("a new log").log;
    wait(|done| log.save_vote(Bytes::from_static(b"v"), done)).expect("the vote");
    append(&log, entries(1, 1..=10, LARGE));
    let (release, held) = channel::<()>();
    let (arrived, arrival) = channel();
    let hold = move |_| {
        arrived.send(()).expect("the test is waiting");
        held.recv().expect_err("the test drops its end");
    };
    log.save_vote(Bytes::from_static(b"w"), Box::new(hold));
    arrival.recv().expect("the writer has arrived");
    (log, release)
}

/// Five entries of this size fill one write of the writer.
const LARGE: usize = 900 << 10;

#[test]
fn an_append_that_was_truncated_before_its_sync_is_not_published() {
    let (log, release) = held_log();
    let (sender, receiver) = channel();
    let durable = log.durable();
    let done = move |_| sender.send(durable.index()).expect("the test is waiting");
    log.append(entries(1, 11..=15, LARGE), Box::new(done));
    log.truncate_after(4, Box::new(|_| {}));
    drop(release);
    assert_eq!(receiver.recv(), Ok(4), "entries 5 to 15 are no longer in the log");
}

#[test]
fn entries_stay_in_memory_until_they_are_in_a_file() {
    let (log, release) = held_log();
    let (sender, receiver) = channel();
    let inner = log.clone();
    // Between the two writes the second append is in no file, and the tail is far over its limit.
    let done = move |_| sender.send(inner.read(16, 21, usize::MAX)).expect("the test is waiting");
    log.append(entries(1, 11..=15, LARGE), Box::new(done));
    log.append(entries(1, 16..=20, LARGE), Box::new(|_| {}));
    drop(release);
    let read = receiver.recv().expect("the callback comes").expect("it reads");
    assert_eq!(read, entries(1, 16..=20, LARGE));
}

#[test]
fn purged_segments_are_recycled_and_their_bytes_never_return() {
    let disk = SimDisk::new();
    let log = new_log(&disk);
    for round in 0..60u64 {
        let first = round * 10 + 1;
        append(&log, entries(1, first..=first + 9, 300));
        wait(|done| log.purge(id(1, first + 7), done)).expect("the purge");
        let opened = open(&copy(&disk)).expect("it reopens");
        assert_eq!(opened.purged, id(1, first + 7));
        assert_eq!(all(&opened.log), entries(1, first + 8..=first + 9, 300));
    }
    eventually("old segments go", || segments(&disk).len() <= 2);
    assert!(!disk.paths().contains(&segment(1)));
    let from_recycling = |call: &Call| match call {
        Call::Rename(from, to) => {
            from.extension().is_some_and(|it| it == "wal")
                && to.extension().is_some_and(|it| it == "next")
        }
        _ => false,
    };
    let recycled = disk.calls().iter().filter(|call| from_recycling(call)).count();
    assert!(recycled > 5, "only {recycled} segments were recycled");
    let refused = log.read(100, 110, 1000).expect_err("purged entries are gone");
    assert!(matches!(refused, LogError::Purged { index: 100, .. }));
}

#[test]
fn a_purge_beyond_the_end_empties_the_log() {
    let disk = SimDisk::new();
    let log = new_log(&disk);
    append(&log, entries(1, 1..=200, 200));
    log.append(entries(1, 201..=210, 200), Box::new(|_| {}));
    wait(|done| log.purge(id(3, 1000), done)).expect("the purge");
    assert_eq!((log.last_id(), log.first_index()), (id(3, 1000), 1001));
    assert_eq!(log.durable().index(), 1000);
    assert_eq!(log.id_at(1000), Some(id(3, 1000)));
    drop(log);
    let opened = open(&disk).expect("it reopens");
    assert_eq!((opened.purged, opened.last), (id(3, 1000), id(3, 1000)));
    append(&opened.log, entries(3, 1001..=1005, 200));
    drop(opened);
    let opened = open(&disk).expect("it reopens");
    assert_eq!(all(&opened.log), entries(3, 1001..=1005, 200));
}

#[test]
fn what_does_not_fit_is_refused_and_changes_nothing() {
    let disk = SimDisk::new();
    let opened = open(&disk).expect("a new log");
    let early = wait(|done| opened.log.append(entries(1, 1..=1, 1), done));
    assert!(matches!(early, Err(LogError::VoteFirst)));
    drop(opened);
    let log = new_log(&disk);
    append(&log, entries(2, 1..=5, 10));
    let refusals = [entries(2, 7..=7, 1), entries(2, 5..=5, 1), entries(1, 6..=6, 1)];
    for refused in refusals {
        let result = wait(|done| log.append(refused, done));
        assert!(matches!(result, Err(LogError::OutOfOrder { .. })));
    }
    let bytes_max = options().payload_bytes_max();
    let result = wait(|done| log.append(vec![entry(2, 6, bytes_max + 1)], done));
    assert!(matches!(result, Err(LogError::TooLarge { .. })));
    let result = wait(|done| log.save_vote(Bytes::from(vec![0; 1025]), done));
    assert!(matches!(result, Err(LogError::TooLarge { .. })));
    wait(|done| log.purge(id(2, 3), done)).expect("the purge");
    let result = wait(|done| log.truncate_after(2, done));
    assert!(matches!(result, Err(LogError::Purged { .. })));
    assert_eq!(all(&log), entries(2, 4..=5, 10));
    append(&log, vec![entry(2, 6, bytes_max)]);
    log.shutdown();
    let result = wait(|done| log.append(entries(2, 7..=7, 1), done));
    assert!(matches!(result, Err(LogError::Closed)));
    assert_eq!(log.read(6, 7, 0).expect("reads go on").len(), 1);
    assert!(!log.durable().wait_for(7), "a closed log ends the wait");
}

#[test]
fn the_committed_hint_rides_along() {
    let disk = SimDisk::new();
    let log = new_log(&disk);
    append(&log, entries(1, 1..=5, 10));
    let calls = disk.calls().len();
    log.hint_committed(id(1, 4));
    append(&log, entries(1, 6..=6, 10));
    let syncs = |call: &&Call| matches!(call, Call::SyncData(0));
    assert_eq!(disk.calls()[calls..].iter().filter(syncs).count(), 1, "no sync of its own");
    drop(log);
    assert_eq!(open(&disk).expect("it reopens").committed_hint, Some(id(1, 4)));
}

#[test]
fn a_full_disk_stops_entries_but_not_votes() {
    let disk = SimDisk::new();
    let log = new_log(&disk);
    eventually("the first spare", || disk.paths().iter().any(|it| it.ends_with("spare-0.next")));
    disk.set_faults(Faults { full: true, ..Faults::default() });
    assert!(log.can_grow(), "the spare is still there");
    // The rest of the first segment, then the spare.
    append(&log, entries(1, 1..=50, 300));
    eventually("the refusal", || !log.can_grow());
    let (sender, receiver) = channel();
    let done = move |result| sender.send(result).expect("the test is waiting");
    log.append(entries(1, 51..=90, 300), Box::new(done));
    for round in 0..20 {
        let vote = Bytes::from(format!("vote {round}"));
        wait(|done| log.save_vote(vote.clone(), done)).expect("a vote finds room");
        assert_eq!(open(&copy(&disk)).expect("it reopens").vote, Some(vote));
    }
    assert!(receiver.try_recv().is_err(), "the append is still waiting");
    wait(|done| log.purge(id(1, 45), done)).expect("a purge finds room");
    eventually("a purged segment becomes the spare", || receiver.try_recv().is_ok());
    assert_eq!(all(&log), entries(1, 46..=90, 300));
    disk.set_faults(Faults::default());
    eventually("growing again", || log.can_grow());
    drop(log);
    assert_eq!(all(&open(&disk).expect("it reopens").log), entries(1, 46..=90, 300));
}

#[test]
fn votes_keep_their_order_when_the_reserve_runs_out() {
    let disk = SimDisk::new();
    let log = new_log(&disk);
    append(&log, entries(1, 1..=40, 300));
    eventually("the first spare", || disk.paths().iter().any(|it| it.ends_with("spare-0.next")));
    disk.set_faults(Faults { full: true, ..Faults::default() });
    log.append(entries(1, 41..=120, 300), Box::new(|_| {}));
    eventually("the writer is stuck", || !log.can_grow() && log.durable().index() > 80);
    let mut done = Vec::new();
    for bytes in [1000, 1000, 1000, 1000, 10] {
        let (sender, receiver) = channel();
        let vote = Bytes::from(vec![b'v'; bytes]);
        let answer = move |result: Result<(), LogError>| sender.send(result.is_ok()).expect("wait");
        log.save_vote(vote, Box::new(answer));
        done.push(receiver);
    }
    disk.set_faults(Faults::default());
    for receiver in done {
        assert_eq!(receiver.recv(), Ok(true));
    }
    drop(log);
    let vote = open(&disk).expect("it reopens").vote.expect("a vote was saved");
    assert_eq!(vote.len(), 10, "the last vote is the one that counts");
}

#[test]
fn a_log_that_waits_for_room_can_be_shut_down() {
    let disk = SimDisk::new();
    let log = new_log(&disk);
    disk.set_faults(Faults { full: true, ..Faults::default() });
    let (sender, receiver) = channel();
    let done = move |result: Result<(), LogError>| sender.send(result.is_ok()).expect("waiting");
    log.append(entries(1, 1..=200, 300), Box::new(done));
    log.shutdown();
    assert_eq!(receiver.recv(), Ok(false));
    disk.set_faults(Faults::default());
    let opened = open(&disk).expect("it reopens");
    let count = opened.last.index;
    assert!(count < 200, "what was not acknowledged may be there in part");
    assert_eq!(all(&opened.log), entries(1, 1..=count, 300));
}

#[test]
fn short_writes_are_completed() {
    let disk = SimDisk::new();
    disk.set_faults(Faults { write_bytes_max: Some(13), ..Faults::default() });
    let log = new_log(&disk);
    append(&log, entries(1, 1..=20, 100));
    drop(log);
    assert_eq!(all(&open(&disk).expect("it reopens").log), entries(1, 1..=20, 100));
}

#[test]
fn without_fsync_nothing_is_synced_but_all_is_there() {
    let disk = SimDisk::new();
    let options = LogOptions { fsync: false, ..options() };
    let opened = Log::open_on(options, Arc::new(disk.clone())).expect("a new log");
    let begun = disk.calls().len();
    wait(|done| opened.log.save_vote(Bytes::from_static(b"v"), done)).expect("the vote");
    append(&opened.log, entries(1, 1..=3, 10));
    let calls = disk.calls();
    assert!(!calls[begun..].iter().any(|call| matches!(call, Call::SyncData(0))));
    assert_eq!(opened.log.stats().fsyncs, 0);
    drop(opened);
    assert_eq!(all(&open(&disk).expect("it reopens").log), entries(1, 1..=3, 10));
}

#[test]
fn the_last_handle_may_go_inside_a_callback() {
    let disk = SimDisk::new();
    let log = new_log(&disk);
    let (sender, receiver) = channel();
    let inner = log.clone();
    let done = move |_| {
        drop(inner);
        sender.send(()).expect("the test is waiting");
    };
    log.append(entries(1, 1..=1, 10), Box::new(done));
    drop(log);
    receiver.recv().expect("the callback comes");
    eventually("the log closes", || open(&copy(&disk)).is_ok_and(|it| it.last == id(1, 1)));
}

#[test]
fn a_manual_durable_index_wakes_and_closes() {
    let (durable, publisher) = Durable::manual(3);
    assert!(durable.wait_for(3));
    let waiter = durable.clone();
    let thread = std::thread::spawn(move || (waiter.wait_for(5), waiter.wait_for(6)));
    publisher.publish(5);
    drop(publisher);
    assert_eq!(thread.join().expect("the waiter ends"), (true, false));
    assert!(durable.wait_for(4) && !durable.wait_for(6));
}

#[test]
fn the_real_disk_keeps_entries_and_its_files_are_private() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let wal = dir.path().join("member/wal");
    let options = LogOptions {
        segment_bytes: 64 << 10,
        tail_bytes: 1 << 10,
        ..LogOptions::new(&wal, [1; 16])
    };
    let opened = Log::open(options.clone()).expect("a new log");
    wait(|done| opened.log.save_vote(Bytes::from_static(b"v"), done)).expect("the vote");
    append(&opened.log, entries(1, 1..=500, 500));
    wait(|done| opened.log.purge(id(1, 400), done)).expect("the purge");
    append(&opened.log, entries(1, 501..=700, 500));
    let stats = opened.log.stats();
    assert!(stats.fsyncs >= 4 && stats.bytes_written > 700 * 500 && stats.records >= 702);
    assert_eq!(stats.fsync_buckets.iter().sum::<u64>(), stats.fsyncs);
    drop(opened);
    let mode = |path: &std::path::Path| {
        std::fs::metadata(path).expect("it exists").permissions().mode() & 0o777
    };
    assert_eq!(mode(&wal), 0o700);
    for file in std::fs::read_dir(&wal).expect("the directory lists") {
        assert_eq!(mode(&file.expect("an entry").path()), 0o600);
    }
    let opened = Log::open(options).expect("it reopens");
    assert_eq!(all(&opened.log), entries(1, 401..=700, 500));
}
