//! The persister on the database that loses power: after any call, what survives is the state of a
//! prefix of the log, whole entries only, and never beyond what the log has on disk.

use std::time::Instant;

use kelson_api::etcdserverpb::AlarmMember;

use super::*;
use crate::engine::faulty::{Call, FaultyBackend, Image};
use crate::keys;
use crate::log::{Durable, DurablePublisher};
use crate::types::{LeaseRow, MetaChange};

const PATIENCE: Duration = Duration::from_secs(30);

fn config(checkpoint_bytes: u64) -> PersistConfig {
    let checkpoint_interval = Duration::from_secs(3600);
    PersistConfig { checkpoint_bytes, checkpoint_interval, in_step: false, place: None }
}

fn start(backend: &FaultyBackend, config: PersistConfig, durable: Durable) -> Persister {
    let at = Start {
        applied: LogId::default(),
        revision: 1,
        tally: Tally::default(),
        chain: Chain::default(),
        scheduled: -1,
        signals: Signals::new(LogId::default(), -1),
        generation_dir: None,
    };
    Persister::start(Box::new(backend.clone()), config, durable, at).expect("threads start")
}

fn durable(index: u64) -> (Durable, DurablePublisher) {
    Durable::manual(index)
}

fn row(main: i64, sub: i64, tombstone: bool) -> Row {
    let kv = Bytes::from(format!("row {main}.{sub} {}", "x".repeat((main % 50) as usize)));
    Row { key: RevisionKey { main, sub }, tombstone, kv }
}

/// Some chain after entry `index`.
fn chain(index: u64) -> Chain {
    Chain { hash: index * 31, since: 0 }
}

/// What entry `index` changes: rows of one revision, and now and then tables.
fn delta(index: u64) -> Delta {
    let main = index.cast_signed() + 1;
    let rows = (0..=main % 3).map(|sub| row(main, sub, (main + sub) % 5 == 0)).collect();
    let mut meta = Vec::new();
    match index % 4 {
        0 => meta.push(MetaChange::LeasePut(LeaseRow { id: main, ttl: main, remaining_ttl: 0 })),
        1 if index > 4 => meta.push(MetaChange::LeaseRemove(main - 1)),
        2 => meta.push(MetaChange::AlarmPut(AlarmMember { member_id: 1, alarm: 1 })),
        3 => meta.push(MetaChange::AlarmRemove(AlarmMember { member_id: 1, alarm: 1 })),
        _ => {}
    }
    Delta { id: LogId { term: 1, index }, rows, meta, chain: chain(index), bytes: 100 }
}

type Content = BTreeMap<Vec<u8>, Bytes>;

/// All pairs but those that close a checkpoint, after the first `entries` entries.
fn replay(entries: u64) -> Content {
    let mut content = Content::new();
    for delta in (1..=entries).map(delta) {
        for row in &delta.rows {
            let (key, value) = keys::encode_row(row);
            content.insert(key, Bytes::from(value));
        }
        for change in &delta.meta {
            let writes = keys::encode_meta(change);
            content.extend(writes.puts.into_iter().map(|(key, value)| (key, Bytes::from(value))));
            writes.removes.iter().for_each(|key| drop(content.remove(key)));
        }
    }
    content
}

/// The applied index of an image and the rest of it; checks the tally on the way.
fn open_image(image: &Image) -> (u64, Content) {
    let (mut content, mut tables, mut tally) =
        (image.as_ref().clone(), Tables::default(), Tally::default());
    for (key, value) in image.iter() {
        if keys::is_row(key) {
            keys::decode_row(key, value.clone()).expect("a whole row");
            tally.add(key, value);
        } else {
            tables.take(key, value).expect("a whole table row");
        }
    }
    assert_eq!(tally, tables.tally, "rows and tally move together");
    let index = tables.applied.index;
    assert_eq!(tables.chain.unwrap_or_default(), chain(index), "chain and position too");
    for (key, _) in keys::encode_checkpoint(LogId::default(), Chain::default(), Tally::default()) {
        content.remove(&key);
    }
    (tables.applied.index, content)
}

fn eventually(what: &str, mut is_true: impl FnMut() -> bool) {
    let until = Instant::now() + PATIENCE;
    while !is_true() {
        assert!(Instant::now() < until, "{what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_power_cut_after_any_call_leaves_a_prefix_of_the_log() {
    let backend = FaultyBackend::default();
    let (log, _publisher) = durable(u64::MAX);
    let persister = start(&backend, config(400), log);
    const ENTRIES: u64 = 60;
    for index in 1..=ENTRIES {
        persister.push(delta(index)).expect("open");
        // Not all at once, so that batches of many sizes come about.
        if index % 7 == 0 {
            eventually("the queue drains", || persister.shared.queue.lock().deltas.is_empty());
        }
    }
    persister.shutdown();
    let calls = backend.calls();
    assert!(calls.iter().filter(|(call, _)| *call == Call::Flush).count() > 5);
    let mut last = 0;
    for (number, (call, image)) in calls.iter().enumerate() {
        let (applied, content) = open_image(image);
        assert_eq!(content, replay(applied), "after call {number}, {call:?}");
        assert!(applied >= last, "durable state goes back at call {number}");
        last = applied;
    }
    assert_eq!(last, ENTRIES, "shutdown makes everything durable");
    // A machine that comes back from any of these disks reads exactly that prefix.
    let (_, image) = &calls[calls.len() / 2];
    let revived = FaultyBackend::after_power_cut(image);
    assert_eq!(revived.live(), image.as_ref().clone());
}

#[test]
fn state_is_never_durable_beyond_the_log() {
    let backend = FaultyBackend::default();
    let (log, publisher) = durable(0);
    let persister = start(&backend, config(1), log);
    for index in 1..=10 {
        persister.push(delta(index)).expect("open");
    }
    for reached in [3, 4, 9] {
        publisher.publish(reached);
        std::thread::sleep(Duration::from_millis(20));
        for (call, image) in backend.calls() {
            assert!(open_image(&image).0 <= reached, "{call:?}");
        }
    }
    publisher.publish(10);
    eventually("all is durable", || persister.durable_applied().index == 10);
    assert_eq!(*persister.durable_watch().borrow(), LogId { term: 1, index: 10 });
}

#[test]
fn a_closed_log_ends_the_writing_where_it_ended() {
    let backend = FaultyBackend::default();
    let (log, publisher) = durable(2);
    let persister = start(&backend, config(1), log);
    persister.push(delta(1)).expect("open");
    eventually("the first is durable", || persister.durable_applied().index == 1);
    persister.push(delta(2)).expect("open");
    eventually("the second is durable", || persister.durable_applied().index == 2);
    persister.push(delta(3)).expect("open");
    publisher.close();
    persister.shutdown();
    let (_, image) = backend.calls().pop().expect("there were calls");
    assert_eq!(open_image(&image), (2, replay(2)));
}

#[test]
fn what_is_queued_can_be_read_in_order() {
    let backend = FaultyBackend::default();
    let (log, publisher) = durable(20);
    let persister = start(&backend, config(1), log);
    let all: Vec<Row> = (1..=40).flat_map(|index| delta(index).rows).collect();
    for index in 1..=40 {
        persister.push(delta(index)).expect("open");
    }
    let read = |limit_rows: usize, limit_bytes: usize| {
        let (mut found, mut from) = (Vec::new(), RevisionKey::default());
        loop {
            let rows = persister.scan(from, limit_rows, limit_bytes).expect("open");
            let Some(last) = rows.last() else { return found };
            from = RevisionKey { main: last.key.main, sub: last.key.sub + 1 };
            assert!(rows.len() <= limit_rows);
            found.extend(rows);
        }
    };
    for (rows, bytes) in [(1, 1), (7, 1 << 20), (1000, 200), (1000, 1 << 20)] {
        assert_eq!(read(rows, bytes), all, "{rows} rows, {bytes} bytes at a time");
    }
    publisher.publish(40);
    eventually("all is durable", || persister.durable_applied().index == 40);
    assert_eq!(read(9, 1 << 20), all);
    assert!(persister.shared.tail.read().is_empty(), "nothing is held twice");
    for row in &all {
        assert_eq!(persister.get(row.key).expect("open"), Some(row.kv.clone()));
    }
    assert_eq!(persister.get(RevisionKey { main: 99, sub: 0 }).expect("open"), None);
}

/// The entry that puts a compaction in force.
fn compaction(index: u64, revision: i64) -> Delta {
    let meta = vec![MetaChange::ScheduledCompaction(revision)];
    Delta { rows: Vec::new(), meta, ..delta(index) }
}

/// Names of the rows of the first entries.
fn rows_of(entries: u64) -> Vec<(RevisionKey, bool)> {
    let rows = (1..=entries).flat_map(|index| delta(index).rows);
    rows.map(|row| (row.key, row.tombstone)).collect()
}

fn left(doomed: &[(RevisionKey, bool)], content: &Content) -> usize {
    let is_there = |&&(key, dead): &&_| content.contains_key(&keys::row_key(key, dead));
    doomed.iter().filter(is_there).count()
}

fn is_finished(content: &Content) -> bool {
    content.keys().any(|key| key.starts_with(b"mcompact_finished"))
}

#[test]
fn compaction_slices_take_exactly_their_rows() {
    let backend = FaultyBackend::default();
    let (log, _publisher) = durable(u64::MAX);
    let persister = start(&backend, config(1 << 20), log);
    for index in 1..=30 {
        persister.push(delta(index)).expect("open");
    }
    let doomed = rows_of(20);
    let finished = persister.finished_compaction();
    assert_eq!(*finished.borrow(), -1);
    let hold = persister.hold_removals();
    let (first, second) = doomed.split_at(doomed.len() / 2);
    persister.remove_rows(first.to_vec(), 21, false);
    persister.remove_rows(second.to_vec(), 21, true);
    persister.push(compaction(31, 21)).expect("open");
    persister.push(delta(32)).expect("open");
    let (_, revision) = persister.cut().expect("open");
    assert_eq!(revision, 33, "a cut sees what was pushed, though nothing is removed yet");
    let held = persister.scan(RevisionKey::default(), 1, 1).expect("open");
    assert_eq!(held[0].key.main, 2, "held rows stay");
    drop(hold);
    eventually("the compaction ends", || *finished.borrow() == 21);
    persister.shutdown();
    for (call, image) in backend.calls() {
        // The tally check within proves that rows and tally are of one moment.
        let (_, content) = open_image(&image);
        assert!(!is_finished(&content) || left(&doomed, &content) == 0, "{call:?}");
    }
    let rows = backend.live().keys().filter(|key| keys::is_row(key)).count();
    let kept = rows_of(30).len() - doomed.len() + delta(32).rows.len();
    assert_eq!(rows, kept, "no row is leaked, none is lost");
}

#[test]
fn no_row_goes_before_the_compaction_is_written() {
    let backend = FaultyBackend::default();
    let (log, publisher) = durable(10);
    let persister = start(&backend, config(1), log);
    for index in 1..=10 {
        persister.push(delta(index)).expect("open");
    }
    // The compaction thread is quicker than the thread that applies the entry.
    persister.remove_rows(rows_of(5), 6, true);
    eventually("the rows are durable", || persister.durable_applied().index == 10);
    persister.push(compaction(11, 6)).expect("open");
    std::thread::sleep(Duration::from_millis(20));
    let all = rows_of(10);
    assert_eq!(left(&all, &backend.live()), all.len(), "its entry is not in the log yet");
    publisher.publish(11);
    let finished = persister.finished_compaction();
    eventually("the compaction ends", || *finished.borrow() == 6);
    for (call, image) in backend.calls() {
        let (applied, content) = open_image(&image);
        let is_whole = left(&rows_of(applied.min(10)), &content) == rows_of(applied.min(10)).len();
        assert!(is_whole || applied == 11, "{call:?}");
    }
}

#[test]
fn a_compaction_that_loses_power_anywhere_is_carried_out_again() {
    const ENTRIES: u64 = 40;
    let doomed = rows_of(30);
    let compact = |persister: &Persister| {
        let slices = doomed.chunks(5).count();
        for (number, slice) in doomed.chunks(5).enumerate() {
            persister.remove_rows(slice.to_vec(), 31, number + 1 == slices);
        }
        let finished = persister.finished_compaction();
        eventually("the compaction ends", || *finished.borrow() == 31);
        persister.shutdown();
    };
    let backend = FaultyBackend::default();
    let (log, _publisher) = durable(u64::MAX);
    // Checkpoints in the middle of the compaction, but not after each slice.
    let persister = start(&backend, config(3000), log.clone());
    (1..=ENTRIES).for_each(|index| persister.push(delta(index)).expect("open"));
    persister.push(compaction(ENTRIES + 1, 31)).expect("open");
    persister.cut().expect("open");
    let before = backend.calls().len();
    compact(&persister);
    let calls = backend.calls();
    let flushes = calls[before..].iter().filter(|(call, _)| *call == Call::Flush).count();
    assert!((2..doomed.chunks(5).count()).contains(&flushes), "{flushes} checkpoints");
    let (_, end) = calls.last().expect("there were calls");
    let end = open_image(end);
    assert_eq!((left(&doomed, &end.1), is_finished(&end.1)), (0, true));
    for (call, image) in &calls[before..] {
        let (applied, content) = open_image(image);
        assert!(!is_finished(&content) || left(&doomed, &content) == 0, "{call:?}");
        if applied <= ENTRIES {
            assert_eq!(left(&doomed, &content), doomed.len(), "{call:?}");
            continue;
        }
        let revived = FaultyBackend::after_power_cut(image);
        let mut tables = Tables::default();
        for (key, value) in image.iter().filter(|(key, _)| !keys::is_row(key)) {
            tables.take(key, value).expect("a whole table row");
        }
        let at = Start {
            applied: tables.applied,
            revision: 41,
            tally: tables.tally,
            chain: tables.chain.unwrap_or_default(),
            scheduled: tables.scheduled_compaction.unwrap_or(-1),
            signals: Signals::new(tables.applied, tables.finished_compaction.unwrap_or(-1)),
            generation_dir: None,
        };
        let persister = Persister::start(Box::new(revived.clone()), config(3000), log.clone(), at);
        compact(&persister.expect("threads start"));
        let (_, again) = revived.calls().pop().expect("there were calls");
        assert_eq!(open_image(&again), end, "after {call:?}");
    }
}

#[test]
fn a_full_queue_blocks_until_there_is_room() {
    let backend = FaultyBackend::default();
    let (log, publisher) = durable(0);
    let persister = Arc::new(start(&backend, config(1 << 20), log));
    let huge = |index| Delta { bytes: QUEUE_BYTES / 2, ..delta(index) };
    (1..=2).for_each(|index| persister.push(huge(index)).expect("open"));
    let other = persister.clone();
    let pushing = std::thread::spawn(move || other.push(huge(3)));
    std::thread::sleep(Duration::from_millis(50));
    assert!(!pushing.is_finished(), "over the bound");
    publisher.publish(10);
    pushing.join().expect("no panic").expect("open");
    persister.shutdown();
    assert!(persister.push(delta(4)).is_err(), "nothing enters after shutdown");
}

#[test]
fn readers_and_askers_are_let_go_at_shutdown() {
    let backend = FaultyBackend::default();
    let (log, _publisher) = durable(u64::MAX);
    let persister = start(&backend, config(1), log);
    persister.push(delta(1)).expect("open");
    persister.shutdown();
    persister.shutdown();
    assert!(persister.cut().is_err());
    assert!(persister.defragment().is_err());
    assert!(persister.scan(RevisionKey::default(), 1, 1).is_err());
    persister.remove_rows(Vec::new(), 1, true);
    drop(persister.hold_removals());
}

#[test]
fn a_retired_persister_writes_nothing_and_still_answers() {
    let backend = FaultyBackend::default();
    let (log, publisher) = durable(0);
    let persister = start(&backend, config(1), log);
    let (applied, finished) = (persister.durable_watch(), persister.finished_compaction());
    // These remove nothing themselves: a writer that starts late takes them all before it is retired.
    (1..=2).for_each(|index| persister.push(delta(index)).expect("open"));
    let successor = LogId { term: 2, index: 50 };
    persister.retire(successor, 9);
    assert_eq!((*applied.borrow(), *finished.borrow()), (successor, 9));
    assert!(persister.push(delta(3)).is_err() && persister.cut().is_err());
    assert!(persister.defragment().is_err());
    persister.remove_rows(vec![(RevisionKey { main: 2, sub: 0 }, false)], 2, true);
    // What the writer has taken waits for the log, the rest is given up.
    publisher.publish(10);
    std::thread::sleep(Duration::from_millis(20));
    let rows: Vec<Row> = (1..=2).flat_map(|index| delta(index).rows).collect();
    let found = persister.scan(RevisionKey::default(), 1000, 1 << 20).expect("open");
    assert_eq!(found, rows, "what was pushed can be read");
    persister.shutdown();
    assert!(backend.calls().iter().all(|(call, _)| *call != Call::Remove));
    assert_eq!((*applied.borrow(), *finished.borrow()), (successor, 9), "it has no say");
}

/// Runs the test of the same name in a process of its own, in which `body` must end it by abort.
fn dies(name: &str, body: impl FnOnce()) {
    const MARK: &str = "KELSON_TEST_DIES";
    if std::env::var(MARK).is_ok_and(|wanted| wanted == name) {
        body();
        return;
    }
    let path = format!("persist::tests::{name}");
    let output = std::process::Command::new(std::env::current_exe().expect("knows itself"))
        .args(["--exact", &path, "--nocapture"])
        .env(MARK, name)
        .output()
        .expect("starts");
    use std::os::unix::process::ExitStatusExt;
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.signal(), Some(6), "ended by SIGABRT: {:?} {text}", output.status);
}

/// Lets the call with this number fail and waits for the end.
fn fail_at(call: usize) {
    let backend = FaultyBackend::default();
    backend.fail_at(call);
    let (log, _publisher) = durable(u64::MAX);
    let persister = start(&backend, config(1), log);
    for index in 1.. {
        persister.push(delta(index)).expect("open");
        std::thread::sleep(Duration::from_millis(5));
        assert!(index < 1000, "it must have ended by now");
    }
}

#[test]
fn a_failed_write_ends_the_process() {
    dies("a_failed_write_ends_the_process", || fail_at(0));
}

#[test]
fn a_failed_flush_ends_the_process() {
    // Per entry: its rows, the closing rows, the flush.
    dies("a_failed_flush_ends_the_process", || fail_at(5));
}

#[test]
fn a_damaged_row_ends_the_process_when_it_is_read() {
    dies("a_damaged_row_ends_the_process_when_it_is_read", || {
        let mut backend = FaultyBackend::default();
        let key = keys::row_key(RevisionKey { main: 2, sub: 0 }, false);
        backend.write(vec![(key, b"not sealed".to_vec())]).expect("writes");
        let (log, _publisher) = durable(u64::MAX);
        let persister = start(&backend, config(1), log);
        let found = persister.get(RevisionKey { main: 2, sub: 0 });
        panic!("it must not answer: {found:?}");
    });
}
