//! A state sent from one store to another: it arrives whole and exactly as of one entry whatever
//! happens meanwhile, and what is not exactly that is refused and leaves no trace.

mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use kelson_api::authpb::Permission;
use kelson_api::command::command::Op;
use kelson_api::command::{ClusterVersionSet, MemberPublish, MembersChange};
use kelson_api::etcdserverpb::alarm_request::AlarmAction;
use kelson_api::etcdserverpb::{AlarmRequest, LeaseCheckpointRequest, Member, RangeRequest};
use kelson_api::{Error, etcdserverpb};
use kelson_storage::{HashKv, LogId, Reader, Received, TransferError};
use support::{Fixture, compact_op, delete_op, get, grant_op, put, put_op, revoke_op};

/// What entry `index` of every log here does.
fn entry(index: u64) -> Vec<Op> {
    let key = format!("key{:03}", index.wrapping_mul(7919) % 300);
    match index {
        1 => return vec![members(&[1, 2, 3], &[])],
        2 => return vec![Op::ClusterVersionSet(ClusterVersionSet { version: "3.7.0".into() })],
        5 => return vec![members(&[], &[3])],
        6 => return vec![publish(2)],
        7 => return vec![alarm(AlarmAction::Activate, 1), alarm(AlarmAction::Activate, 2)],
        8 => return vec![alarm(AlarmAction::Deactivate, 1)],
        11 => return users(),
        _ => {}
    }
    match index % 20 {
        3 => vec![grant_op(index.cast_signed())],
        4 => {
            let lease = (index - 1).cast_signed();
            vec![Op::Put(etcdserverpb::PutRequest { lease, ..put(&key, "leased") })]
        }
        9 => vec![delete_op(&key, "")],
        13 if index > 100 => vec![revoke_op(index.cast_signed() - 50)],
        14 => vec![delete_op("key2", "key23")],
        17 => vec![remaining(index.cast_signed() - 14)],
        18 => Vec::new(),
        19 => (0..5).map(|at| put_op(&format!("{key}-{at}"), "many at once")).collect(),
        _ => vec![put_op(&key, &format!("{index} {}", "x".repeat((index % 400) as usize * 10)))],
    }
}

fn members(put: &[u64], remove: &[u64]) -> Op {
    let member = |id: &u64| Member { id: *id, name: format!("m{id}"), ..Member::default() };
    let put = put.iter().map(member).collect();
    Op::MembersChange(MembersChange { put, remove: remove.to_vec() })
}

/// A user who holds a role that allows something; auth is on.
fn users() -> Vec<Op> {
    let user = |name: &str| {
        Op::UserAdd(etcdserverpb::AuthUserAddRequest {
            name: name.to_owned(),
            hashed_password: "aGFzaA==".to_owned(),
            ..Default::default()
        })
    };
    let grant = |user: &str, role: &str| {
        let (user, role) = (user.to_owned(), role.to_owned());
        Op::UserGrantRole(etcdserverpb::AuthUserGrantRoleRequest { user, role })
    };
    let perm = Some(Permission { perm_type: 2, key: "a".into(), range_end: "b".into() });
    let allow = etcdserverpb::AuthRoleGrantPermissionRequest { name: "plain".to_owned(), perm };
    vec![
        user("root"),
        grant("root", "root"),
        Op::RoleAdd(etcdserverpb::AuthRoleAddRequest { name: "plain".to_owned() }),
        Op::RoleGrantPermission(allow),
        user("ann"),
        grant("ann", "plain"),
        Op::AuthEnable(etcdserverpb::AuthEnableRequest {}),
    ]
}

fn publish(id: u64) -> Op {
    let storage_uuid = Bytes::from_static(b"0123456789abcdef");
    Op::MemberPublish(MemberPublish { id, storage_uuid, ..MemberPublish::default() })
}

fn alarm(action: AlarmAction, member_id: u64) -> Op {
    // Of a kind that forbids nothing: the puts that follow must succeed.
    Op::Alarm(AlarmRequest { action: action.into(), member_id, alarm: 7 })
}

fn remaining(id: i64) -> Op {
    let point = etcdserverpb::LeaseCheckpoint { id, remaining_ttl: 11 };
    Op::LeaseCheckpoint(LeaseCheckpointRequest { checkpoints: vec![point] })
}

/// Applies entries up to `last`; every 400th compacts if wanted.
fn advance(fixture: &mut Fixture, last: u64, compacts: bool) {
    while fixture.index < last {
        let index = fixture.index + 1;
        if index == 10 {
            fixture.index = index;
            let id = LogId { term: 1, index };
            let store = fixture.store.as_mut().expect("open");
            let membership = Bytes::from_static(b"who votes");
            store.apply_membership(id, membership, None).expect("the disk works");
        } else if index.is_multiple_of(400) {
            let op = compact_op(fixture.reader.revision() - 800);
            fixture.entry(if compacts && index > 800 { vec![op] } else { Vec::new() });
        } else {
            fixture.entry(entry(index));
        }
    }
}

fn busy() -> Fixture {
    Fixture::with(|options| {
        options.checkpoint_bytes = 16 << 10;
        options.checkpoint_interval = Duration::from_millis(5);
        options.compaction_batch_limit = 20;
        options.compaction_sleep = Duration::from_millis(1);
        options.sled_cache_bytes = 256 << 10;
    })
}

/// A store that has applied entries up to `last`.
fn at(last: u64, compacts: bool) -> Fixture {
    let mut fixture = busy();
    advance(&mut fixture, last, compacts);
    fixture
}

fn chunks(reader: &Reader) -> Vec<Bytes> {
    let mut transfer = reader.transfer().expect("open");
    std::iter::from_fn(|| transfer.next_chunk().expect("open")).collect()
}

fn receive(reader: &Reader, chunks: &[Bytes]) -> Result<Received, TransferError> {
    let mut receiver = reader.receive()?;
    for chunk in chunks {
        receiver.take(chunk.clone())?;
    }
    receiver.finish()
}

fn install(fixture: &mut Fixture, received: Received) {
    fixture.index = received.applied().index;
    fixture.store.as_mut().expect("open").install(received).expect("the disk works");
    assert_eq!(fixture.reader.applied().index, fixture.index);
    assert_eq!(fixture.reader.installed(), fixture.reader.applied());
}

/// Everything that can be asked, of the newest revision and of history.
fn answers(fixture: &Fixture) -> Vec<String> {
    let reader = &fixture.reader;
    let (newest, compacted) = (reader.revision(), reader.compacted());
    let oldest = compacted.max(1);
    let hashes: Vec<HashKv> = [oldest, (oldest + newest) / 2, newest]
        .map(|revision| reader.hash_kv(revision).expect("not compacted"))
        .to_vec();
    let leases = reader.leases();
    let keys: Vec<_> = leases.iter().map(|lease| reader.lease_keys(lease.id)).collect();
    let changes = reader.changes(oldest + 1, usize::MAX, usize::MAX).expect("not compacted");
    let applied = reader.applied();
    vec![
        format!("{applied:?} {newest} {compacted} {}", reader.key_count()),
        format!("{hashes:?}"),
        format!("{leases:?} {keys:?}"),
        format!("{:?} {:?}", reader.members(), reader.removed_members()),
        format!("{:?} {:?}", reader.alarms(), reader.storage_uuid(2)),
        format!("{} {}", reader.is_auth_enabled(), reader.auth_revision()),
        format!("{:?} {:?}", reader.user("ann"), reader.role("plain")),
        format!("{:?} {:?}", reader.membership(), reader.cluster_version()),
        format!("{:?} {:?}", reader.chain_at(applied.index), reader.chain_since()),
        format!("{:?}", changes.batches),
        format!("{:?}", fixture.range(get("\0", "\0"))),
    ]
}

fn assert_same(found: &Fixture, right: &Fixture) {
    for (found, right) in answers(found).iter().zip(&answers(right)) {
        assert!(found == right, "found {found:.2000}\nright {right:.2000}");
    }
}

/// Names in the directory of states.
fn generations(fixture: &Fixture) -> Vec<String> {
    let names = fs::read_dir(state_dir(fixture)).expect("it is there").flatten();
    let mut names: Vec<_> =
        names.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

fn state_dir(fixture: &Fixture) -> PathBuf {
    fixture.data_dir().join("member/state")
}

fn eventually(what: &str, mut is_true: impl FnMut() -> bool) {
    let until = Instant::now() + Duration::from_secs(60);
    while !is_true() {
        assert!(Instant::now() < until, "{what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn a_state_arrives_as_of_one_entry_while_its_sender_goes_on() {
    let mut sender = at(1900, true);
    let sent = AtomicBool::new(false);
    let (applied, membership, chunks) = std::thread::scope(|scope| {
        let reader = sender.reader.clone();
        let done = &sent;
        let sending = scope.spawn(move || {
            let mut transfer = reader.transfer().expect("open");
            let mut chunks = Vec::new();
            while let Some(chunk) = transfer.next_chunk().expect("open") {
                chunks.push(chunk);
                // Time for writes, compactions and checkpoints between any two chunks.
                std::thread::sleep(Duration::from_millis(50));
            }
            done.store(true, Ordering::Release);
            assert!(transfer.next_chunk().expect("open").is_none(), "the end stays the end");
            (transfer.applied(), transfer.membership(), chunks)
        });
        while !sent.load(Ordering::Acquire) {
            let next = sender.index + 1;
            advance(&mut sender, next, true);
        }
        sending.join().expect("no panic")
    });
    assert!(sender.index > applied.index, "writes went on");
    assert!(chunks.len() > 2 && chunks.iter().all(|chunk| chunk.len() <= 1 << 20));
    let right = at(applied.index, true);
    let mut target = busy();
    let received = receive(&target.reader, &chunks).expect("sound");
    assert_eq!((received.applied(), received.membership()), (applied, membership));
    assert_eq!(received.revision(), right.reader.revision());
    install(&mut target, received);
    assert_same(&target, &right);
    // The durable position of the new state is told to those who asked the old one.
    assert_eq!(target.reader.durable_applied().borrow().index, applied.index);
    // It goes on like the sender, on the same chain, also after a start.
    target.reopen();
    assert_same(&target, &right);
    advance(&mut target, sender.index, true);
    assert_same(&target, &sender);
    for fixture in [&sender, &target] {
        fixture.wait_for_compaction();
    }
    target.reopen();
    sender.reopen();
    assert_same(&target, &sender);
    assert_eq!(target.reader.sizes().in_use, sender.reader.sizes().in_use);
}

#[test]
fn an_empty_state_and_one_without_its_newest_row_arrive() {
    let mut sender = busy();
    let mut target = busy();
    let received = receive(&target.reader, &chunks(&sender.reader)).expect("sound");
    assert_eq!(received.applied(), LogId::default());
    install(&mut target, received);
    assert_same(&target, &sender);
    sender.ok(put_op("a", "1"));
    let newest = sender.ok(delete_op("a", ""));
    sender.ok(compact_op(newest));
    sender.wait_for_compaction();
    let received = receive(&target.reader, &chunks(&sender.reader)).expect("sound");
    assert_eq!(received.revision(), newest);
    install(&mut target, received);
    assert_eq!(target.reader.revision(), newest);
    assert_eq!(target.ok(put_op("b", "2")), newest + 1);
    target.reopen();
    assert_eq!(target.reader.revision(), newest + 1);
}

#[test]
fn a_huge_row_travels_alone() {
    let mut sender = busy();
    sender.ok(put_op("small", "1"));
    sender.ok(put_op("huge", &"x".repeat(3 << 20)));
    sender.ok(put_op("small", "2"));
    let chunks = chunks(&sender.reader);
    assert_eq!(chunks.iter().filter(|chunk| chunk.len() > 1 << 20).count(), 1);
    let mut target = busy();
    let received = receive(&target.reader, &chunks).expect("sound");
    install(&mut target, received);
    assert_same(&target, &sender);
}

/// All keys at a revision.
fn all_at(reader: &Reader, revision: i64) -> Result<Vec<(Bytes, Bytes, i64)>, Error> {
    let request = RangeRequest { revision, ..get("\0", "\0") };
    let kvs = reader.range(&request)?.0.kvs;
    Ok(kvs.into_iter().map(|kv| (kv.key, kv.value, kv.mod_revision)).collect())
}

#[test]
fn readers_of_a_store_see_one_state_or_the_other() {
    const OLD: u64 = 900;
    let truth = at(2500, false);
    for compacts in [false, true] {
        let sender = at(2500, compacts);
        let mut target = at(OLD, compacts);
        let old = target.reader.revision();
        let newest = sender.reader.revision();
        let received = receive(&target.reader, &chunks(&sender.reader)).expect("sound");
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let (stop, truth) = (&stop, &truth.reader);
            for step in [1, 7] {
                let reader = target.reader.clone();
                scope.spawn(move || {
                    let mut revision = old;
                    while !stop.load(Ordering::Acquire) {
                        revision = if revision > 100 { revision - step } else { old };
                        match all_at(&reader, revision) {
                            Ok(found) => assert!(found == all_at(truth, revision).expect("all")),
                            Err(error) => assert_eq!(error, Error::Compacted),
                        }
                        match reader.hash_kv(revision) {
                            Ok(hash) if hash.compact_revision < 1 => {
                                assert_eq!(hash, truth.hash_kv(revision).expect("all"));
                            }
                            Ok(_) => {}
                            Err(error) => assert_eq!(error, Error::Compacted),
                        }
                    }
                });
            }
            // A watcher: all changes in order, none twice, none missing.
            let reader = target.reader.clone();
            let watcher = scope.spawn(move || {
                let mut next = old - 5;
                while next <= newest {
                    let changes = match reader.changes(next, 50, 1 << 20) {
                        Ok(changes) => changes,
                        Err(error) => {
                            assert_eq!(error, Error::Compacted);
                            return None;
                        }
                    };
                    let last = usize::try_from(changes.next - next).expect("it goes forward");
                    let wanted = truth.changes(next, last, usize::MAX).expect("all");
                    let wanted = &wanted.batches[..last];
                    assert!(changes.batches == wanted, "changes from {next}");
                    next = changes.next;
                }
                Some(next)
            });
            std::thread::sleep(Duration::from_millis(50));
            let (moved, leases) = (target.reader.feed().revision(), target.reader.lease_changes());
            install(&mut target, received);
            assert!(moved.has_changed().expect("open") && leases.has_changed().expect("open"));
            assert_eq!(*moved.borrow(), newest);
            let seen = watcher.join().expect("no panic");
            assert_eq!(seen, (!compacts).then_some(newest + 1), "compacts: {compacts}");
            std::thread::sleep(Duration::from_millis(50));
            stop.store(true, Ordering::Release);
        });
        assert_same(&target, &sender);
        eventually("the old files go", || generations(&target).len() == 2);
    }
}

#[test]
fn a_state_that_is_older_is_not_installed() {
    let mut target = at(60, false);
    let sender = at(50, false);
    let received = receive(&target.reader, &chunks(&sender.reader)).expect("sound");
    let refusal = target.store.as_mut().expect("open").install(received);
    assert!(refusal.expect_err("older").to_string().contains("cannot replace"));
    assert_same(&target, &at(60, false));
    assert_eq!(generations(&target).len(), 2, "CURRENT and one generation");
}

#[test]
fn what_was_not_sent_like_this_is_refused() {
    let sender = at(1500, true);
    let good = chunks(&sender.reader);
    let other = chunks(&sender.reader);
    assert!(good.len() >= 4);
    let target = at(30, false);
    let refuse = |what: &str, bad: Vec<Bytes>| {
        let found = receive(&target.reader, &bad).err().unwrap_or_else(|| panic!("{what}: taken"));
        let is_right = matches!(found, TransferError::BadChunk { .. } | TransferError::Incomplete);
        assert!(is_right, "{what}: {found}");
        assert_eq!(generations(&target).len(), 2, "{what}: it leaves no files");
    };
    for at in 0..good.len() {
        let with = |chunk: Bytes| {
            let mut bad = good.clone();
            bad[at] = chunk;
            bad
        };
        let len = good[at].len();
        for cut in [0, len / 2, len - 1] {
            refuse("cut", with(good[at].slice(..cut)));
        }
        for place in [5, 20, len / 2, len - 1] {
            let mut bytes = good[at].to_vec();
            bytes[place] ^= 4;
            refuse("flipped", with(Bytes::from(bytes)));
        }
        refuse("of another transfer", with(other[at].clone()));
        let mut missing = good.clone();
        missing.remove(at);
        refuse("missing", missing);
        let mut twice = good.clone();
        twice.insert(at, good[at].clone());
        refuse("twice", twice);
        if at > 0 {
            let mut swapped = good.clone();
            swapped.swap(at - 1, at);
            refuse("swapped", swapped);
        }
        refuse("cut off", good[..at].to_vec());
    }
    let mut longer = good.clone();
    longer.push(good[good.len() - 1].clone());
    refuse("longer", longer);
    assert_same(&target, &at(30, false));
    receive(&target.reader, &good).expect("the good one is still taken");
}

#[test]
fn there_is_one_receiver_at_a_time() {
    let sender = at(900, false);
    let good = chunks(&sender.reader);
    let mut target = at(30, false);
    let mut receiver = target.reader.receive().expect("free");
    assert_eq!(target.reader.receive().err(), Some(TransferError::Busy));
    target.reader.defragment().expect("open");
    for chunk in &good {
        receiver.take(chunk.clone()).expect("sound");
    }
    target.reader.defragment().expect("open");
    let received = receiver.finish().expect("sound");
    assert_eq!(target.reader.receive().err(), Some(TransferError::Busy));
    install(&mut target, received);
    assert_same(&target, &sender);
    drop(target.reader.receive().expect("free again"));
}

#[test]
fn a_transfer_outlives_the_replacement_of_what_it_sends() {
    let mut middle = at(1200, false);
    let right = at(1200, false);
    let mut transfer = middle.reader.transfer().expect("open");
    let mut sent = vec![transfer.next_chunk().expect("open").expect("the head")];
    let received = receive(&middle.reader, &chunks(&at(1500, false).reader)).expect("sound");
    install(&mut middle, received);
    while let Some(chunk) = transfer.next_chunk().expect("open") {
        sent.push(chunk);
    }
    drop(transfer);
    let mut target = busy();
    let received = receive(&target.reader, &sent).expect("sound");
    install(&mut target, received);
    assert_same(&target, &right);
    assert_same(&middle, &at(1500, false));
    eventually("the old files go", || generations(&middle).len() == 2);
}

/// Copies what is there; files may vanish meanwhile.
fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).expect("creates");
    let Ok(entries) = fs::read_dir(from) else { return };
    for path in entries.flatten().map(|entry| entry.path()) {
        let target = to.join(path.file_name().expect("it has a name"));
        if path.is_dir() { copy(&path, &target) } else { drop(fs::copy(&path, &target)) }
    }
}

#[test]
fn a_crash_leaves_the_old_state_or_the_new_one() {
    let (old, new) = (at(800, true), at(1600, true));
    let chunks = chunks(&new.reader);
    let mut target = Fixture::new();
    advance(&mut target, 800, true);
    let images = tempfile::tempdir().expect("a temporary directory");
    let taken = std::cell::RefCell::new(Vec::new());
    let crash = |target: &Fixture, is_new: bool| {
        let reader = &target.reader;
        target.wait_for_compaction();
        let durable = reader.durable_applied();
        eventually("all is on disk", || *durable.borrow() == reader.applied());
        let image = images.path().join(taken.borrow().len().to_string());
        copy(target.data_dir(), &image);
        taken.borrow_mut().push((image, is_new));
    };
    let mut receiver = target.reader.receive().expect("free");
    crash(&target, false);
    for (number, chunk) in chunks.iter().enumerate() {
        receiver.take(chunk.clone()).expect("sound");
        if number % 2 == 1 {
            crash(&target, false);
        }
    }
    let received = receiver.finish().expect("sound");
    crash(&target, false);
    // The new name is written but not in force.
    crash(&target, false);
    let (draft, _) = taken.borrow().last().expect("there are some").clone();
    fs::write(draft.join("member/state/CURRENT.tmp"), b"kelson state 1\n00000").expect("writes");
    install(&mut target, received);
    crash(&target, true);
    eventually("the old files go", || generations(&target).len() == 2);
    crash(&target, true);
    for (image, is_new) in taken.into_inner() {
        let mut revived = Fixture::at(&image, if is_new { 1600 } else { 800 });
        assert_same(&revived, if is_new { &new } else { &old });
        let origin = if is_new { revived.reader.applied() } else { LogId::default() };
        assert_eq!(revived.store.as_ref().expect("open").installed(), origin);
        let left = generations(&revived);
        let is_tidy = left.iter().filter(|name| !name.starts_with("CURRENT")).count() == 1;
        assert!(is_tidy, "{left:?}");
        // The next one can be received.
        let received = receive(&revived.reader, &chunks).expect("sound");
        install(&mut revived, received);
        assert_same(&revived, &new);
    }
}
