//! Snapshot files and hashes against etcd's own tools: `etcdutl` checks and restores what we write,
//! a real etcd serves it, and both compute the same HashKV for the same history. The tools come from
//! `cargo xtask peers`; without them the tests say so and pass, except in CI, where they fail.

#![allow(clippy::unwrap_used, reason = "a test may fail loudly")]

mod support;

use std::io::Write;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use kelson_api::authpb::Permission;
use kelson_api::command::command::Op;
use kelson_api::command::{ClusterVersionSet, MembersChange};
use kelson_api::etcdserverpb::{
    AlarmRequest, AuthEnableRequest, AuthRoleAddRequest, AuthRoleGrantPermissionRequest,
    AuthUserAddRequest, AuthUserGrantRoleRequest, CompactionRequest, LeaseGrantRequest, Member,
    PutRequest,
};
use kelson_storage::Reader;
use serde_json::Value;
use sha2::{Digest, Sha256};
use support::{Fixture, bytes, delete_op, put_op};

/// The folder of the real programs.
fn peers() -> Option<PathBuf> {
    let bin = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/peers/bin");
    let has_all = ["etcd", "etcdctl", "etcdutl"].iter().all(|name| bin.join(name).exists());
    assert!(has_all || std::env::var_os("CI").is_none(), "run `cargo xtask peers` first");
    if !has_all {
        eprintln!("skipped: run `cargo xtask peers` first");
    }
    has_all.then_some(bin)
}

/// Writes a whole snapshot file, digest included.
fn save(reader: &Reader, path: &Path) -> Vec<u8> {
    let file = reader.snapshot().unwrap();
    let mut out = Vec::new();
    for chunk in file.chunks {
        out.extend_from_slice(&chunk.unwrap());
    }
    assert_eq!(out.len() as u64, file.total_bytes, "announced and sent");
    let digest = Sha256::digest(&out);
    let mut disk = std::fs::File::create(path).unwrap();
    disk.write_all(&out).unwrap();
    disk.write_all(&digest).unwrap();
    out
}

fn json(command: &mut Command) -> Value {
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{command:?}: {text}{errors}");
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{command:?}: {error}: {text}"))
}

/// A running etcd that ends with the test.
struct Etcd {
    child: Child,
    client: String,
    bin: PathBuf,
}

impl Etcd {
    fn start(bin: &Path, data_dir: &Path) -> Self {
        let port = || TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let (client, peer) = (port(), port());
        let client = format!("http://127.0.0.1:{client}");
        let peer = format!("http://127.0.0.1:{peer}");
        let child = Command::new(bin.join("etcd"))
            .args(["--name", "m1", "--data-dir"])
            .arg(data_dir)
            .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer])
            .args(["--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &format!("m1={peer}")])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let etcd = Self { child, client, bin: bin.to_owned() };
        let deadline = Instant::now() + Duration::from_secs(60);
        while !etcd.ctl(&["auth", "status"]).output().unwrap().status.success() {
            assert!(Instant::now() < deadline, "etcd does not answer");
            std::thread::sleep(Duration::from_millis(100));
        }
        etcd
    }

    fn ctl(&self, args: &[&str]) -> Command {
        let mut command = Command::new(self.bin.join("etcdctl"));
        command.args(["--endpoints", &self.client]).args(args);
        command
    }

    fn run(&self, args: &[&str]) {
        let output = self.ctl(args).output().unwrap();
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    }

    fn hash_kv(&self, revision: i64) -> Value {
        let revision = format!("--rev={revision}");
        json(&mut self.ctl(&["endpoint", "hashkv", "-w", "json", &revision]))[0]["HashKV"].clone()
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A state with something in every bucket that we write.
fn rich_state() -> Fixture {
    let mut state = Fixture::new();
    let member = Member {
        id: 0x8e9e_05c5_2164_694d,
        name: "m1".to_owned(),
        peer_ur_ls: vec!["http://127.0.0.1:2380".to_owned()],
        client_ur_ls: vec!["http://127.0.0.1:2379".to_owned()],
        is_learner: false,
    };
    let change = MembersChange { put: vec![member], remove: vec![99] };
    state.ok(Op::MembersChange(change));
    state.ok(Op::ClusterVersionSet(ClusterVersionSet { version: "3.6.0".to_owned() }));
    state.ok(Op::LeaseGrant(LeaseGrantRequest { ttl: 3600, id: 77 }));
    state.ok(Op::Alarm(AlarmRequest { action: 1, member_id: 7, alarm: 2 }));
    state.ok(Op::Alarm(AlarmRequest { action: 2, member_id: 7, alarm: 2 }));
    for i in 0..5000 {
        state.ok(put_op(&format!("/registry/pods/{:05}", i % 4000), &"x".repeat(i % 700)));
    }
    let big = PutRequest {
        key: bytes("/big"),
        value: bytes(vec![b'B'; 1_500_000]),
        lease: 77,
        ..PutRequest::default()
    };
    state.ok(Op::Put(big));
    state.ok(delete_op("/registry/pods/00001", ""));
    state.ok(delete_op("/registry/pods/01", "/registry/pods/02"));
    state
}

#[test]
fn etcdutl_accepts_and_restores_a_snapshot_and_etcd_serves_it() {
    let Some(bin) = peers() else { return };
    let state = rich_state();
    let temp = tempfile::tempdir().unwrap();
    let file = temp.path().join("snapshot.db");
    save(&state.reader, &file);
    let status = json(
        Command::new(bin.join("etcdutl")).args(["snapshot", "status", "-w", "json"]).arg(&file),
    );
    assert_eq!(status["revision"], state.reader.revision());
    assert_eq!(status["totalKey"].as_u64(), Some(state.reader.key_count()), "{status}");
    let data_dir = temp.path().join("restored");
    let restored = Command::new(bin.join("etcdutl"))
        .args(["snapshot", "restore", "--name", "m1"])
        .args(["--initial-cluster", "m1=http://127.0.0.1:2380"])
        .args(["--initial-advertise-peer-urls", "http://127.0.0.1:2380", "--data-dir"])
        .arg(&data_dir)
        .arg(&file)
        .output()
        .unwrap();
    assert!(restored.status.success(), "{}", String::from_utf8_lossy(&restored.stderr));
    let etcd = Etcd::start(&bin, &data_dir);
    let count = json(&mut etcd.ctl(&["get", "", "--from-key", "--limit=1", "-w", "json"]));
    assert_eq!(count["count"].as_u64(), Some(state.reader.key_count()), "{count}");
    let lease = json(&mut etcd.ctl(&["lease", "timetolive", "4d", "--keys", "-w", "json"]));
    assert_eq!(lease["granted-ttl"], 3600, "{lease}");
    assert_eq!(lease["keys"].as_array().map(Vec::len), Some(1), "{lease}");
    let ours = state.reader.hash_kv(0).unwrap();
    let theirs = etcd.hash_kv(ours.hash_revision);
    assert_eq!(theirs["hash"], ours.hash, "{theirs}");
}

/// bcrypt of `U*U`.
const HASH: &str =
    "JDJhJDA1JENDQ0NDQ0NDQ0NDQ0NDQ0NDQ0NDQy5FNVlQTzlrbXl1Ukd5aDBYb3VRWWI0WU1KS3Z5T2VX";

#[test]
fn etcd_knows_the_users_of_a_snapshot() {
    let Some(bin) = peers() else { return };
    let mut state = rich_state();
    for name in ["root", "ann"] {
        let (name, hashed_password) = (name.to_owned(), HASH.to_owned());
        state.ok(Op::UserAdd(AuthUserAddRequest { name, hashed_password, ..Default::default() }));
    }
    state.ok(Op::RoleAdd(AuthRoleAddRequest { name: "plain".to_owned() }));
    let perm = Some(Permission { perm_type: 0, key: bytes("/b"), range_end: bytes("/c") });
    let allow = AuthRoleGrantPermissionRequest { name: "plain".to_owned(), perm };
    state.ok(Op::RoleGrantPermission(allow));
    for (user, role) in [("root", "root"), ("ann", "plain")] {
        let (user, role) = (user.to_owned(), role.to_owned());
        state.ok(Op::UserGrantRole(AuthUserGrantRoleRequest { user, role }));
    }
    state.ok(Op::AuthEnable(AuthEnableRequest {}));
    let temp = tempfile::tempdir().unwrap();
    let file = temp.path().join("snapshot.db");
    save(&state.reader, &file);
    let data_dir = temp.path().join("restored");
    let restored = Command::new(bin.join("etcdutl"))
        .args(["snapshot", "restore", "--name", "m1"])
        .args(["--initial-cluster", "m1=http://127.0.0.1:2380"])
        .args(["--initial-advertise-peer-urls", "http://127.0.0.1:2380", "--data-dir"])
        .arg(&data_dir)
        .arg(&file)
        .output()
        .unwrap();
    assert!(restored.status.success(), "{}", String::from_utf8_lossy(&restored.stderr));
    let etcd = Etcd::start(&bin, &data_dir);
    let status = json(&mut etcd.ctl(&["auth", "status", "-w", "json"]));
    assert_eq!(status["enabled"], true, "{status}");
    assert_eq!(status["authRevision"].as_u64(), Some(state.reader.auth_revision()));
    let root = |args: &[&str]| json(etcd.ctl(&["--user", "root:U*U", "-w", "json"]).args(args));
    assert_eq!(root(&["user", "list"])["users"], serde_json::json!(["ann", "root"]));
    assert_eq!(root(&["user", "get", "ann"])["roles"], serde_json::json!(["plain"]));
    let role = root(&["role", "get", "plain"]);
    assert_eq!(role["perm"][0]["key"], "L2I=", "{role}");
    let ann = |args: &[&str]| {
        let output = etcd.ctl(&["--user", "ann:U*U"]).args(args).output().unwrap();
        output.status.success()
    };
    assert!(ann(&["get", "/big", "--keys-only"]) && !ann(&["get", "/registry"]));
    assert!(!ann(&["put", "/big", "1"]));
}

#[test]
fn hash_kv_equals_etcds_for_the_same_history() {
    let Some(bin) = peers() else { return };
    let temp = tempfile::tempdir().unwrap();
    let etcd = Etcd::start(&bin, &temp.path().join("etcd"));
    let mut state = Fixture::new();
    let check = |state: &Fixture, revisions: &[i64]| {
        for revision in revisions {
            let ours = state.reader.hash_kv(*revision).unwrap();
            let theirs = etcd.hash_kv(*revision);
            assert_eq!(theirs["hash"], ours.hash, "revision {revision}: {theirs} {ours:?}");
            assert_eq!(theirs["compact_revision"], ours.compact_revision, "{theirs}");
        }
    };
    let put = |state: &mut Fixture, key: &str, value: &str| {
        etcd.run(&["put", key, value]);
        state.ok(put_op(key, value));
    };
    let delete = |state: &mut Fixture, key: &str| {
        etcd.run(&["del", key]);
        state.ok(delete_op(key, ""));
    };
    for (key, value) in [("a", "1"), ("b", "2"), ("a", "3"), ("c", ""), ("a", "4")] {
        put(&mut state, key, value);
    }
    delete(&mut state, "b");
    put(&mut state, "b", "5");
    delete(&mut state, "c");
    check(&state, &[2, 4, 5, 7, 8, 9, 0]);
    // At a deletion that is history, then at one that is the newest change of its key. etcd answers
    // for the compaction revision itself from a cache that names the compaction before, so the
    // revisions behind it are compared.
    let compact = |state: &mut Fixture, revision: i64| {
        etcd.run(&["compact", &revision.to_string(), "--physical"]);
        state.ok(Op::Compaction(CompactionRequest { revision, physical: true }));
        state.wait_for_compaction();
    };
    compact(&mut state, 7);
    check(&state, &[8, 9, 0]);
    put(&mut state, "d", "6");
    compact(&mut state, 9);
    check(&state, &[10, 0]);
    // With nothing alive.
    delete(&mut state, "a");
    delete(&mut state, "b");
    delete(&mut state, "d");
    check(&state, &[10, 11, 12, 13, 0]);
    compact(&mut state, 12);
    check(&state, &[13, 0]);
}

#[test]
fn an_empty_state_makes_a_valid_snapshot() {
    let Some(bin) = peers() else { return };
    let state = Fixture::new();
    let temp = tempfile::tempdir().unwrap();
    let file = temp.path().join("snapshot.db");
    save(&state.reader, &file);
    let status = json(
        Command::new(bin.join("etcdutl")).args(["snapshot", "status", "-w", "json"]).arg(&file),
    );
    assert_eq!(status["totalKey"], 0, "{status}");
}

#[test]
fn a_snapshot_is_the_same_while_writes_and_compactions_go_on() {
    let mut state = rich_state();
    let temp = tempfile::tempdir().unwrap();
    let quiet = save(&state.reader, &temp.path().join("quiet.db"));
    let file = state.reader.snapshot().unwrap();
    let mut chunks = file.chunks;
    let mut busy = chunks.next().unwrap().unwrap().to_vec();
    let revision = state.reader.revision();
    for i in 0..2000 {
        state.ok(put_op(&format!("/registry/pods/{i:05}"), "later"));
    }
    state.ok(Op::Compaction(CompactionRequest { revision: revision + 1000, physical: false }));
    for chunk in chunks {
        busy.extend_from_slice(&chunk.unwrap());
    }
    assert!(quiet == busy, "the same bytes");
    state.wait_for_compaction();
}

#[test]
fn equal_states_have_equal_hashes_and_a_restart_keeps_them() {
    let (mut one, two) = (rich_state(), rich_state());
    let hashes = |state: &Fixture| (state.reader.hash_kv(0).unwrap(), state.reader.hash().unwrap());
    let before = hashes(&one);
    assert_eq!(before, hashes(&two));
    one.reopen();
    assert_eq!(before, hashes(&one));
    one.ok(put_op("another", "value"));
    let after = hashes(&one);
    assert!(before.0.hash != after.0.hash && before.1 != after.1);
    let old = one.reader.hash_kv(before.0.hash_revision).unwrap();
    assert_eq!(old, before.0, "an old revision keeps its hash");
}
