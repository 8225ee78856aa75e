//! The fuzz bodies for a bounded time on fixed seeds: what CI can afford of fuzz/.
//!
//! `KELSON_FUZZ_SECONDS` sets the time of each body, `KELSON_FUZZ_SEED` repeats one seed.

mod log_support;
mod support;

use std::time::{Duration, Instant};

use bytes::Bytes;
use kelson_api::Message;
use kelson_api::authpb::{Permission, UserAddOptions};
use kelson_api::command::command::Op;
use kelson_api::etcdserverpb::{
    AuthEnableRequest, AuthRoleAddRequest, AuthRoleGrantPermissionRequest, AuthUserAddRequest,
    AuthUserChangePasswordRequest, AuthUserDeleteRequest, AuthUserGrantRoleRequest,
    LeaseRevokeRequest, PutRequest,
};
use kelson_storage::log::{SimDisk, fuzz_segment};
use log_support::*;

/// A small generator, so that a seed names an input for ever.
struct Random(u64);

impl Random {
    fn new(seed: u64) -> Random {
        Random(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as usize % bound
    }

    fn bytes(&mut self, count: usize) -> Vec<u8> {
        (0..count).map(|_| self.below(256) as u8).collect()
    }
}

/// Prints the seed if the body panics.
struct Seed(u64);

impl Drop for Seed {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("failed; repeat with KELSON_FUZZ_SEED={}", self.0);
        }
    }
}

fn run(mut body: impl FnMut(&mut Random)) {
    if let Ok(seed) = std::env::var("KELSON_FUZZ_SEED") {
        let seed = seed.parse().expect("KELSON_FUZZ_SEED is a number");
        return body(&mut Random::new(seed));
    }
    let seconds = std::env::var("KELSON_FUZZ_SECONDS").ok().and_then(|it| it.parse().ok());
    let deadline = Instant::now() + Duration::from_secs(seconds.unwrap_or(8));
    let mut seeds = 0;
    while seeds == 0 || Instant::now() < deadline {
        let seed = Seed(seeds);
        body(&mut Random::new(seed.0));
        seeds += 1;
    }
    println!("seeds 0 to {}", seeds - 1);
}

#[test]
fn arbitrary_bytes_never_make_the_log_panic() {
    run(|random| {
        let count = random.below(600);
        fuzz_segment(&random.bytes(count));
    });
}

#[test]
fn a_mutated_log_opens_with_a_prefix_or_is_refused() {
    let disk = SimDisk::new();
    let log = new_log(&disk);
    for first in (1..=120).step_by(4) {
        append(&log, entries(1, first..=first + 3, 150));
    }
    let good = entries(1, 1..=120, 150);
    // Not shut down: the harder case, for the end of the log is not marked.
    let disk = copy(&disk);
    let paths = segments(&disk);
    run(|random| {
        let path = &paths[random.below(paths.len())];
        let mut bytes = disk.bytes(path).expect("it exists");
        for _ in 0..=random.below(3) {
            mutate(&mut bytes, random);
        }
        let mutated = with(&disk, path, bytes);
        if let Ok(opened) = open(&mutated) {
            let found = all(&opened.log);
            assert_eq!(found, good[..found.len()], "what opens is a prefix");
            // Only the last write may be lost: four entries.
            assert!(found.len() >= 116 || path == paths.last().expect("there are segments"));
        }
    });
}

fn mutate(bytes: &mut Vec<u8>, random: &mut Random) {
    if bytes.is_empty() {
        return;
    }
    let at = random.below(bytes.len());
    let end = (at + 1 + random.below(600)).min(bytes.len());
    match random.below(7) {
        0 | 1 => bytes[at] ^= 1 << random.below(8),
        2 => bytes[at..end].fill(0),
        3 => {
            let noise = random.bytes(end - at);
            bytes[at..end].copy_from_slice(&noise);
        }
        4 => bytes.truncate(at),
        5 => {
            let to = random.below(bytes.len() - (end - at) + 1);
            bytes.copy_within(at..end, to);
        }
        _ => {
            let removed = end - at;
            bytes.drain(at..end);
            bytes.extend(vec![0; removed]);
        }
    }
}

#[test]
fn arbitrary_bytes_never_make_the_state_panic() {
    run(|random| {
        let count = random.below(200);
        let mut data = random.bytes(count);
        // Most keys get a table that exists, else the decoders would hardly be reached.
        if data.len() > 1 && random.below(8) > 0 {
            data[0] = (random.below(20) + 1) as u8;
            data[1] = b"klmprux"[random.below(7)];
        }
        kelson_storage::fuzz_row(&data);
    });
}

#[test]
fn arbitrary_chunks_never_make_the_receiver_panic() {
    run(|random| {
        let count = random.below(200);
        let mut data = random.bytes(count);
        // Most get a header that fits, else the decoders would hardly be reached.
        if data.len() > 8 && random.below(8) > 0 {
            data[..8].copy_from_slice(b"KLST\x01\0\0\0");
            data[5] = random.below(5) as u8;
        }
        kelson_storage::fuzz_chunk(&data);
    });
}

#[test]
fn no_bytes_make_the_reader_of_etcds_database_panic() {
    let mut state = support::Fixture::new();
    for number in 0..300 {
        state.ok(support::put_op(&format!("key{}", number % 40), &"v".repeat(number * 3)));
    }
    for number in 0..20 {
        let (name, role) = (format!("user{number}"), format!("role{number}"));
        let add = AuthUserAddRequest { name: name.clone(), ..Default::default() };
        state.ok(Op::UserAdd(add));
        state.ok(Op::RoleAdd(AuthRoleAddRequest { name: role.clone() }));
        let perm = Permission { key: role.clone().into(), ..Default::default() };
        let perm = Some(perm);
        let grant = AuthRoleGrantPermissionRequest { name: role.clone(), perm };
        state.ok(Op::RoleGrantPermission(grant));
        state.ok(Op::UserGrantRole(AuthUserGrantRoleRequest { user: name, role }));
    }
    let file = state.reader.snapshot().expect("a snapshot");
    let chunks: Vec<_> = file.chunks.map(|chunk| chunk.expect("a chunk")).collect();
    let good = chunks.concat();
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = dir.path().join("db");
    run(|random| {
        if random.below(3) == 0 {
            let count = random.below(6000);
            return kelson_storage::fuzz_bolt(&random.bytes(count), &path);
        }
        let mut bytes = good.clone();
        for _ in 0..1 + random.below(4) {
            mutate(&mut bytes, random);
        }
        kelson_storage::fuzz_bolt(&bytes, &path);
    });
}

#[test]
fn no_bytes_make_the_reader_of_etcds_log_panic() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    run(|random| {
        let count = random.below(400);
        let mut bytes = random.bytes(count);
        // Types that exist and short records, so that the decoders behind them are reached.
        for place in (0..bytes.len()).step_by(2 + random.below(9)) {
            bytes[place] = random.below(32) as u8;
        }
        kelson_storage::fuzz_wal(&bytes, dir.path());
    });
}

/// A field of etcd's union of requests.
fn request(tag: u32, message: &impl Message) -> Vec<u8> {
    let mut bytes = Vec::new();
    prost::encoding::bytes::encode(tag, &message.encode_to_vec(), &mut bytes);
    bytes
}

#[test]
fn no_request_makes_the_reader_of_etcds_log_panic() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let name = || "ann".to_owned();
    let options = Some(UserAddOptions { no_password: false });
    let perm = Some(Permission { perm_type: 2, key: "k".into(), range_end: "l".into() });
    let good = [
        request(4, &PutRequest { key: "k".into(), value: "v".into(), ..Default::default() }),
        request(9, &LeaseRevokeRequest { id: 7 }),
        request(100, &AuthUserGrantRoleRequest { user: String::new(), role: name() }),
        request(1000, &AuthEnableRequest {}),
        request(1012, &AuthUserAddRequest { name: name(), ..Default::default() }),
        request(1100, &AuthUserAddRequest { name: name(), options, ..Default::default() }),
        request(1101, &AuthUserDeleteRequest { name: name() }),
        request(1103, &AuthUserChangePasswordRequest { name: name(), ..Default::default() }),
        request(1104, &AuthUserGrantRoleRequest { user: name(), role: name() }),
        request(1200, &AuthRoleAddRequest { name: name() }),
        request(1203, &AuthRoleGrantPermissionRequest { name: name(), perm }),
        request(1300, &AuthRoleAddRequest { name: "3.7.0".to_owned() }),
        request(2, &AuthUserGrantRoleRequest { user: "?".to_owned(), role: "PUT".to_owned() }),
    ];
    run(|random| {
        let mut log = Vec::new();
        for _ in 0..random.below(12) {
            let mut entry = good[random.below(good.len())].clone();
            entry.extend_from_slice(&good[random.below(good.len())]);
            if random.below(3) > 0 {
                mutate(&mut entry, random);
            }
            log.push(entry.len() as u8);
            log.extend_from_slice(&entry);
        }
        kelson_storage::fuzz_wal(&log, dir.path());
    });
}

/// Gives a chunk the checksum that its bytes ask for.
fn reseal(chunk: &mut [u8]) {
    let Some(body) = chunk.len().checked_sub(4) else { return };
    let crc = crc32c::crc32c(&chunk[..body]);
    chunk[body..].copy_from_slice(&crc.to_be_bytes());
}

#[test]
fn a_mutated_transfer_is_refused_or_is_the_one_that_was_sent() {
    let mut sender = support::Fixture::new();
    for number in 0..60 {
        sender.ok(support::put_op(&format!("key{}", number % 20), &"value ".repeat(number)));
        sender.ok(support::grant_op(1000 + number as i64));
    }
    sender.ok(support::compact_op(30));
    let mut transfer = sender.reader.transfer().expect("open");
    let good: Vec<Bytes> = std::iter::from_fn(|| transfer.next_chunk().expect("open")).collect();
    let right = sender.reader.hash_kv(0).expect("readable");
    let mut target = support::Fixture::new();
    let (mut refused, mut taken) = (0, 0);
    run(|random| {
        let mut chunks: Vec<_> = good.iter().map(|chunk| chunk.to_vec()).collect();
        for _ in 0..=random.below(2) {
            let at = random.below(chunks.len());
            match random.below(8) {
                0 => drop(chunks.remove(at)),
                1 => chunks.insert(at, good[random.below(good.len())].to_vec()),
                _ => mutate(&mut chunks[at], random),
            }
            if chunks.is_empty() {
                break;
            }
            // Mostly with a fitting checksum: what lies behind it must hold as well.
            let at = random.below(chunks.len());
            if random.below(4) > 0 {
                chunks.iter_mut().for_each(|chunk| reseal(chunk));
            } else {
                reseal(&mut chunks[at]);
            }
        }
        let mut receiver = target.reader.receive().expect("free");
        let all = chunks.into_iter().try_for_each(|chunk| receiver.take(Bytes::from(chunk)));
        let Ok(received) = all.and_then(|()| receiver.finish()) else {
            refused += 1;
            return;
        };
        taken += 1;
        if received.applied().index >= target.index {
            target.index = received.applied().index;
            target.store.as_mut().expect("open").install(received).expect("the disk works");
            assert_eq!(target.reader.hash_kv(0).expect("readable"), right);
        }
    });
    println!("{refused} refused, {taken} taken");
    assert!(refused > 0);
}
