//! Damage to the files of the state: every kind, in every file, leads to the right answers or to a
//! clear refusal, never to wrong answers or a hang. With a log that still has everything the state is
//! set aside and rebuilt; otherwise the member refuses to start and says why.

#![allow(clippy::unwrap_used, reason = "a test may fail loudly")]

mod support;

use std::fs;
use std::path::{Path, PathBuf};

use kelson_api::command::Command;
use kelson_api::command::command::Op;
use kelson_api::etcdserverpb::{CompactionRequest, LeaseGrantRequest};
use kelson_storage::log::Durable;
use kelson_storage::{DataDir, HashKv, LogId, OpenError, Options, Reader, Store};
use support::{delete_op, put_op};

/// The log of these tests.
fn entry(index: u64) -> Op {
    match index % 10 {
        3 => delete_op(&format!("key{}", index % 7), ""),
        5 => Op::LeaseGrant(LeaseGrantRequest { ttl: 60, id: index.cast_signed() }),
        _ => put_op(&format!("key{}", index % 50), &"value ".repeat((index % 40) as usize)),
    }
}

fn replay(store: &mut Store, last: u64) {
    for index in store.applied().index + 1..=last {
        let command = Command { op: Some(entry(index)), ..Command::default() };
        store.apply(LogId { term: 1, index }, &[command]).unwrap();
    }
}

/// Everything that can be asked, in short.
fn answers(reader: &Reader) -> (HashKv, i64, usize, u64) {
    (reader.hash_kv(0).unwrap(), reader.revision(), reader.leases().len(), reader.key_count())
}

const ENTRIES: u64 = 600;

fn options(dir: &Path) -> Options {
    Options { checkpoint_bytes: 16 << 10, ..Options::new(dir) }
}

fn open(options: &Options) -> Result<(Store, Reader), OpenError> {
    let (durable, publisher) = Durable::manual(u64::MAX);
    // Dropping it would close the log before the last checkpoint.
    std::mem::forget(publisher);
    kelson_storage::open(options, durable)
}

/// A closed state with several flushes behind it, and its answers.
fn make(dir: &Path) -> (HashKv, i64, usize, u64) {
    drop(DataDir::open(dir).unwrap());
    let (mut store, reader) = open(&options(dir)).unwrap();
    replay(&mut store, ENTRIES);
    let right = answers(&reader);
    store.shutdown();
    right
}

fn files(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() { found.extend(files(&path)) } else { found.push(path) }
    }
    found.sort();
    found
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        let target = to.join(path.file_name().unwrap());
        if path.is_dir() {
            copy(&path, &target);
        } else {
            fs::copy(&path, &target).unwrap();
        }
    }
}

/// What a damage is called, and how it is done to a file.
type Damage = (String, Box<dyn Fn(&Path)>);

/// Kinds of damage to a file of some length.
fn damages(length: usize) -> Vec<Damage> {
    let mut kinds: Vec<Damage> = Vec::new();
    kinds.push(("missing".into(), Box::new(|path| fs::remove_file(path).unwrap())));
    if length == 0 {
        return kinds;
    }
    for at in [0, length / 3, length / 2, length - 1] {
        let flip = move |path: &Path| {
            let mut bytes = fs::read(path).unwrap();
            bytes[at] ^= 0x10;
            fs::write(path, bytes).unwrap();
        };
        kinds.push((format!("byte {at} flipped"), Box::new(flip)));
    }
    for left in [0, length / 2, length - 1] {
        let cut = move |path: &Path| {
            fs::File::options().write(true).open(path).unwrap().set_len(left as u64).unwrap();
        };
        kinds.push((format!("cut to {left}"), Box::new(cut)));
    }
    for at in [0, length / 2 / 4096 * 4096] {
        let zero = move |path: &Path| {
            let mut bytes = fs::read(path).unwrap();
            let end = bytes.len().min(at + 4096);
            bytes[at..end].fill(0);
            fs::write(path, bytes).unwrap();
        };
        kinds.push((format!("page at {at} zeroed"), Box::new(zero)));
    }
    kinds
}

#[test]
fn every_damage_to_every_file_is_survived_or_refused() {
    let temp = tempfile::tempdir().unwrap();
    let whole = temp.path().join("whole");
    let right = make(&whole);
    let state = whole.join("member/state");
    let (mut intact, mut rebuilt, mut refused) = (0, 0, 0);
    for file in files(&state) {
        let length = usize::try_from(fs::metadata(&file).unwrap().len()).unwrap();
        let name = file.strip_prefix(&whole).unwrap().to_owned();
        // Dozens of slab files are empty; what holds for one holds for all.
        let is_slab = name.components().any(|part| part.as_os_str() == "slabs");
        if length == 0 && is_slab && !name.to_string_lossy().ends_with('0') {
            continue;
        }
        for (kind, damage) in damages(length) {
            for log_purged in [LogId::default(), LogId { term: 1, index: ENTRIES }] {
                let dir = temp.path().join("damaged");
                copy(&whole, &dir);
                damage(&dir.join(&name));
                let what =
                    format!("{}: {kind}, log gone up to {}", name.display(), log_purged.index);
                match open(&Options { log_purged, ..options(&dir) }) {
                    Ok((mut store, reader)) => {
                        let is_set_aside = dir.join("member/state.bad-1").exists();
                        assert!(log_purged.index == 0 || !is_set_aside, "{what}");
                        *(if is_set_aside { &mut rebuilt } else { &mut intact }) += 1;
                        replay(&mut store, ENTRIES);
                        assert_eq!(answers(&reader), right, "{what}");
                        store.shutdown();
                    }
                    Err(error) => {
                        let text = error.to_string();
                        assert!(log_purged.index > 0, "{what}: {text}");
                        assert!(text.contains("state"), "names the place: {text}");
                        assert!(
                            text.contains("delete its data directory"),
                            "says what to do: {text}"
                        );
                        assert!(!dir.join("member/state.bad-1").exists(), "left alone");
                        refused += 1;
                    }
                }
                fs::remove_dir_all(&dir).unwrap();
            }
        }
    }
    assert!(rebuilt > 5 && refused > 5, "{intact} intact, {rebuilt} rebuilt, {refused} refused");
}

#[test]
fn a_missing_state_is_rebuilt_only_from_a_whole_log() {
    let temp = tempfile::tempdir().unwrap();
    let right = make(temp.path());
    fs::remove_dir_all(temp.path().join("member/state")).unwrap();
    let log_purged = LogId { term: 1, index: 1 };
    let refusal = open(&Options { log_purged, ..options(temp.path()) }).err().unwrap().to_string();
    assert!(refusal.contains("missing"), "{refusal}");
    let (mut store, reader) = open(&options(temp.path())).unwrap();
    replay(&mut store, ENTRIES);
    assert_eq!(answers(&reader), right);
    store.shutdown();
}

#[test]
fn a_state_that_ends_before_the_log_begins_is_refused() {
    let temp = tempfile::tempdir().unwrap();
    make(temp.path());
    let log_purged = LogId { term: 1, index: ENTRIES + 1 };
    let refusal = open(&Options { log_purged, ..options(temp.path()) }).err().unwrap().to_string();
    assert!(refusal.contains(&format!("ends at entry {ENTRIES}")), "{refusal}");
}

#[test]
fn an_unfinished_first_creation_is_made_anew() {
    let temp = tempfile::tempdir().unwrap();
    let right = make(temp.path());
    // Without the file that names it, a generation does not count.
    fs::remove_file(temp.path().join("member/state/CURRENT")).unwrap();
    let (mut store, reader) = open(&options(temp.path())).unwrap();
    assert_eq!(store.applied(), LogId::default());
    replay(&mut store, ENTRIES);
    assert_eq!(answers(&reader), right);
    store.shutdown();
}

#[test]
fn an_unfinished_rewrite_is_removed() {
    let temp = tempfile::tempdir().unwrap();
    let right = make(temp.path());
    let state = temp.path().join("member/state");
    // A rewrite that was cut off: a second generation, sound or not, that nothing names.
    copy(&state.join("0000000000000001"), &state.join("0000000000000002"));
    fs::create_dir(state.join("00000000000000ff")).unwrap();
    let (store, reader) = open(&options(temp.path())).unwrap();
    assert_eq!(answers(&reader), right);
    store.shutdown();
    let mut left: Vec<_> = fs::read_dir(&state).unwrap().map(|e| e.unwrap().file_name()).collect();
    left.sort();
    assert_eq!(left, ["0000000000000001", "CURRENT"]);
}

#[test]
fn a_newer_state_is_refused_and_left_alone() {
    let temp = tempfile::tempdir().unwrap();
    make(temp.path());
    let path = temp.path().join("member/state/CURRENT");
    let text = fs::read_to_string(&path).unwrap().replace("kelson state 1", "kelson state 2");
    let body = &text[..text.len() - 9];
    let text = format!("{body}{:08x}\n", crc32c::crc32c(body.as_bytes()));
    fs::write(&path, &text).unwrap();
    let refusal = open(&options(temp.path())).err().unwrap().to_string();
    assert!(refusal.contains("newer"), "{refusal}");
    assert_eq!(fs::read_to_string(&path).unwrap(), text);
}

#[test]
fn defragmentation_keeps_everything_and_gives_space_back() {
    let temp = tempfile::tempdir().unwrap();
    drop(DataDir::open(temp.path()).unwrap());
    let mut options = options(temp.path());
    // A reopening gives space back too, and would leave nothing to be rewritten.
    options.sled_cache_bytes = 1 << 30;
    let (mut store, reader) = open(&options).unwrap();
    let current = || fs::read_to_string(temp.path().join("member/state/CURRENT")).unwrap();
    let first = current();
    let mut index = 0;
    let mut apply = |store: &mut Store, op: Op| {
        index += 1;
        let command = Command { op: Some(op), ..Command::default() };
        store.apply(LogId { term: 1, index }, &[command]).unwrap();
    };
    // Values that zstd cannot shrink.
    let mut seed = 1_u64;
    let mut noise = || {
        let mut text = String::new();
        for _ in 0..8000 {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            text.push(char::from(33 + (seed >> 57) as u8 % 90));
        }
        text
    };
    // The engine gives space back by itself at the checkpoints that follow a compaction. On a slow
    // machine one of those may come in between and leave nothing to be rewritten; then once more.
    let mut rounds = 0;
    while current() == first {
        rounds += 1;
        assert!(rounds <= 20, "there was never a rewrite");
        for i in 0..3000 {
            apply(&mut store, put_op(&format!("key{}", i % 300), &noise()));
        }
        reader.defragment().unwrap();
        let full = reader.sizes().total;
        let revision = reader.revision();
        apply(&mut store, Op::Compaction(CompactionRequest { revision, physical: true }));
        let ticket = reader.compaction_ticket();
        while !ticket.is_finished() {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        let before = answers(&reader);
        reader.defragment().unwrap();
        let after = reader.sizes().total;
        assert!(after * 2 < full, "{full} bytes before, {after} after");
        assert_eq!(answers(&reader), before);
    }
    apply(&mut store, put_op("after", "it"));
    let last = answers(&reader);
    store.shutdown();
    let (store, reader) = open(&options).unwrap();
    assert_eq!(answers(&reader), last);
    store.shutdown();
}
