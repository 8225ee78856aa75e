//! Readers beside the writer and the compaction: a read is of one revision, whole, or it says that the
//! revision is compacted. Also ranges of thousands of keys, which take many steps of the index.

mod support;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use kelson_api::Error;
use kelson_api::command::command::Op;
use kelson_api::etcdserverpb::request_op::Request;
use kelson_api::etcdserverpb::{RangeRequest, RequestOp, TxnRequest};
use kelson_api::mvccpb::KeyValue;
use kelson_storage::{Reader, Recent};
use support::{Fixture, bytes, compact_op, delete_op, get, put, put_op};

fn name(number: u32) -> String {
    format!("/registry/pods/{:02}/{number:05}", number % 17)
}

/// A repeatable source of numbers.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u32) -> u32 {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 33) % u64::from(sides)) as u32
    }
}

/// Random puts and deletes over thousands of keys; returns all keys as of some of the revisions.
fn fill(fixture: &mut Fixture) -> BTreeMap<i64, BTreeMap<String, i64>> {
    let mut dice = Dice(7);
    let mut keys: BTreeMap<String, i64> = BTreeMap::new();
    let mut states = BTreeMap::new();
    for round in 0..60 {
        let mut ops = Vec::new();
        for _ in 0..100 {
            let key = name(dice.roll(6000));
            ops.push(if dice.roll(4) == 0 { delete_op(&key, "") } else { put_op(&key, "v") });
        }
        if round % 20 == 19 {
            ops.push(delete_op("/registry/pods/03", "/registry/pods/06"));
        }
        for (outcome, op) in fixture.entry(ops.clone()).into_iter().zip(ops) {
            match op {
                Op::Put(put) => {
                    keys.insert(String::from_utf8_lossy(&put.key).into(), outcome.revision);
                }
                Op::DeleteRange(delete) if delete.range_end.is_empty() => {
                    keys.remove(String::from_utf8_lossy(&delete.key).as_ref());
                }
                _ => keys.retain(|key, _| {
                    !("/registry/pods/03".."/registry/pods/06").contains(&key.as_str())
                }),
            }
            if outcome.revision % 97 == 0 {
                states.insert(outcome.revision, keys.clone());
            }
        }
    }
    states.insert(fixture.reader.revision(), keys);
    states
}

fn check_states(fixture: &Fixture, states: &BTreeMap<i64, BTreeMap<String, i64>>) {
    for (&revision, keys) in states {
        for (start, end) in [
            ("/registry/pods/", "/registry/pods0"),
            ("/registry/pods/04/00100", "/registry/pods0"),
            ("/registry/pods/11", "/registry/pods/13/02000"),
            ("/registry/pods/05/03000", "/registry/pods/05/03100"),
        ] {
            let request = RangeRequest { revision, ..get(start, end) };
            let expected: Vec<(&str, i64)> = keys
                .range(start.to_owned()..end.to_owned())
                .map(|(key, &revision)| (key.as_str(), revision))
                .collect();
            let all = fixture.range(request.clone());
            assert_eq!(listed(&all.kvs), expected);
            assert_eq!(all.count, expected.len() as i64);
            let page = fixture.range(RangeRequest { limit: 300, ..request.clone() });
            assert_eq!(listed(&page.kvs), expected[..expected.len().min(300)]);
            assert_eq!((page.count, page.more), (all.count, expected.len() > 300));
            let counted = fixture.range(RangeRequest { count_only: true, ..request.clone() });
            assert_eq!(counted.count, all.count, "{start} at {revision}");
            let mut stream = fixture.reader.range_chunks(&request).expect("readable");
            let mut streamed = Vec::new();
            loop {
                let chunk = stream.next_chunk(270).expect("readable");
                streamed.extend(chunk.kvs);
                if chunk.is_last {
                    break;
                }
            }
            assert_eq!(streamed, all.kvs);
            assert_eq!(stream.count(), all.count);
        }
    }
}

fn listed(kvs: &[KeyValue]) -> Vec<(&str, i64)> {
    let key = |kv: &'_ KeyValue| std::str::from_utf8(kv.key.as_ref()).map(str::len).expect("ASCII");
    kvs.iter()
        .map(|kv| (std::str::from_utf8(&kv.key[..key(kv)]).expect("ASCII"), kv.mod_revision))
        .collect()
}

#[test]
fn ranges_of_many_steps_agree_with_a_map() {
    let mut fixture = Fixture::new();
    let states = fill(&mut fixture);
    check_states(&fixture, &states);
    fixture.reopen();
    check_states(&fixture, &states);
}

#[test]
fn ranges_of_many_steps_agree_with_a_map_without_a_ring() {
    let mut fixture = Fixture::with(|options| options.recent_bytes = 2000);
    let mut states = fill(&mut fixture);
    check_states(&fixture, &states);
    let middle = *states.keys().nth(states.len() / 2).expect("many");
    fixture.ok(compact_op(middle));
    fixture.wait_for_compaction();
    states.retain(|revision, _| *revision >= middle);
    check_states(&fixture, &states);
    fixture.reopen();
    check_states(&fixture, &states);
}

const GROUP: u32 = 10;
const GROUPS: u32 = 60;

/// Puts one value under all keys of a group, in one revision.
fn rewrite(group: u32, value: &str) -> Op {
    let keys = (0..GROUP).map(|place| format!("g/{group:03}/{place}"));
    let puts = keys.map(|key| RequestOp { request: Some(Request::RequestPut(put(&key, value))) });
    Op::Txn(TxnRequest { success: puts.collect(), ..TxnRequest::default() })
}

/// Every group that is there is there as a whole, with one value and one revision.
fn assert_whole(kvs: &[KeyValue], count: i64) {
    assert_eq!(kvs.len() as i64, count);
    for group in kvs.chunks(GROUP as usize) {
        assert_eq!(group.len(), GROUP as usize);
        let first = &group[0];
        let same = |kv: &KeyValue| {
            kv.key[..5] == first.key[..5]
                && kv.value == first.value
                && kv.mod_revision == first.mod_revision
        };
        assert!(group.iter().all(same), "{group:?}");
    }
}

fn read_until(reader: &Reader, stop: &AtomicBool) -> u64 {
    let mut reads = 0;
    while !stop.load(Ordering::Relaxed) {
        let current = reader.revision();
        let request = RangeRequest { revision: current, ..get("g/", "g0") };
        let mut stream = match reader.range_chunks(&request) {
            Ok(stream) => stream,
            Err(error) => {
                assert_eq!(error, Error::Compacted);
                continue;
            }
        };
        let mut streamed = Vec::new();
        let ended = loop {
            match stream.next_chunk(37) {
                Ok(chunk) => {
                    streamed.extend(chunk.kvs);
                    if chunk.is_last {
                        break true;
                    }
                }
                Err(error) => {
                    assert_eq!(error, Error::Compacted);
                    break false;
                }
            }
        };
        if ended {
            assert_whole(&streamed, stream.count());
            reads += 1;
        }
        match reader.range(&request) {
            Ok((again, _)) => {
                assert!(again.kvs.iter().all(|kv| kv.mod_revision <= current));
                assert_whole(&again.kvs, again.count);
                assert!(!ended || again.kvs == streamed, "a revision never changes");
            }
            Err(error) => assert_eq!(error, Error::Compacted),
        }
        let (newest, _) = reader.range(&get("g/", "g0")).expect("the newest is never compacted");
        assert_whole(&newest.kvs, newest.count);
    }
    reads
}

/// Follows all revisions as a watcher does, and checks that none is missing, doubled or split.
fn follow(reader: &Reader, until: i64) {
    let mut position = 1;
    while position < until {
        let batches = match reader.feed().recent(position) {
            Recent::Batches(batches) => batches,
            Recent::TooOld => {
                let changes = reader.changes(position + 1, 7, 4000).expect("not compacted yet");
                assert!(changes.next > position + 1);
                changes.batches
            }
        };
        for revised in batches {
            assert_eq!(revised.revision, position + 1);
            assert_eq!(revised.events.len() % GROUP as usize, 0, "whole groups");
            for event in &revised.events {
                let before = event.prev_kv.as_ref();
                assert_eq!(event.kv.version == 1, before.is_none(), "{event:?}");
                assert!(before.is_none_or(|kv| kv.mod_revision < revised.revision));
            }
            position += 1;
        }
        thread::sleep(Duration::from_micros(300));
    }
}

#[test]
fn readers_see_whole_revisions_beside_writer_and_compaction() {
    let mut fixture = Fixture::with(|options| {
        options.recent_bytes = 200_000;
        options.compaction_batch_limit = 50;
        options.compaction_sleep = Duration::from_micros(100);
        options.checkpoint_interval = Duration::from_millis(20);
    });
    let rounds = 1500;
    let stop = AtomicBool::new(false);
    let reader = fixture.reader.clone();
    let reads = thread::scope(|scope| {
        let readers = [(); 2].map(|()| scope.spawn(|| read_until(&reader, &stop)));
        let mut dice = Dice(3);
        for round in 0..rounds {
            let group = dice.roll(GROUPS);
            let op = if dice.roll(9) == 0 {
                delete_op(&format!("g/{group:03}/"), &format!("g/{group:03}0"))
            } else {
                rewrite(group, &format!("{round:0300}"))
            };
            fixture.entry(vec![op]);
            let revision = fixture.reader.revision();
            if round % 50 == 49 && revision - 20 > fixture.reader.compacted() {
                fixture.ok(compact_op(revision - i64::from(dice.roll(20))));
            }
        }
        fixture.wait_for_compaction();
        stop.store(true, Ordering::Relaxed);
        readers.map(|reader| reader.join().expect("no reader panics")).iter().sum::<u64>()
    });
    assert!(reads > 0);
}

#[test]
fn a_slow_follower_misses_nothing() {
    let mut fixture = Fixture::with(|options| {
        options.recent_bytes = 100_000;
        options.checkpoint_interval = Duration::from_millis(20);
    });
    let reader = fixture.reader.clone();
    let revisions = 1200;
    thread::scope(|scope| {
        let follower = scope.spawn(|| follow(&reader, revisions));
        let mut dice = Dice(5);
        while fixture.reader.revision() < revisions {
            let ops = (0..5).map(|_| rewrite(dice.roll(GROUPS), &"x".repeat(200))).collect();
            fixture.entry(ops);
        }
        follower.join().expect("the follower does not panic");
    });
}

#[test]
fn a_pin_keeps_rows_and_lets_go_of_them() {
    let mut fixture = Fixture::new();
    for value in ["1", "2", "3"] {
        fixture.ok(put_op("a", value));
    }
    let pin = fixture.reader.pin(2).expect("not compacted");
    assert_eq!(pin.revision(), 2);
    let ticket = {
        fixture.ok(compact_op(4));
        fixture.reader.compaction_ticket()
    };
    let in_use = fixture.reader.sizes().in_use;
    thread::sleep(Duration::from_millis(50));
    assert!(!ticket.is_finished());
    assert_eq!(fixture.reader.sizes().in_use, in_use, "nothing is taken away yet");
    assert!(matches!(fixture.reader.pin(3), Err(Error::Compacted)), "too late for 3");
    drop(pin);
    fixture.wait_for_compaction();
    assert!(fixture.reader.sizes().in_use < in_use);
    assert_eq!(fixture.range(get("a", "")).kvs[0].value, bytes("3"));
}
