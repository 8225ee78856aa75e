//! `kelson snapshot`, `check`, `hashkv` and `defrag`: snapshots of a real etcd and of Kelson become
//! clusters again, with all that was in them; damage is refused with its place; and what is printed is
//! what etcd's own tools print. `KELSON_BIN` names another binary.

use std::path::{Path, PathBuf};

use kelson_api::etcdserverpb as pb;
use kelson_tests::cluster::Cluster;
use kelson_tests::server::{etcd_binary, kelson_binary};
use kelson_tests::tools::{Said, copy_dir, etcdctl, files, hash_kv, hash_kv_for, peer, run};
use kelson_tests::users::{self, ROOT};
use pb::kv_client::KvClient;
use pb::watch_client::WatchClient;

/// A store of a real etcd with something of everything, and its snapshot.
struct Source {
    snapshot: PathBuf,
    /// Its hash and compaction.
    hash: (u64, i64),
    revision: i64,
    lease: String,
    /// Every key at an old revision, as etcdctl prints it.
    past: String,
    _dir: tempfile::TempDir,
}

const PAST: &str = "--rev=200";

fn source() -> Source {
    let etcd = Cluster::start(&etcd_binary(), 1, "http", &[]);
    let endpoint = etcd.endpoint(0);
    let ctl = |words: &[&str]| etcdctl(&endpoint, words);
    let granted = ctl(&["lease", "grant", "5000"]);
    let lease = granted.split_whitespace().nth(1).expect("an id").to_owned();
    // One call per thousand: a transaction of etcdctl takes its lines from standard input.
    for round in 0..3 {
        for key in 0..100 {
            let value = "v".repeat(1 + (round * 100 + key) * 7 % 900);
            ctl(&["put", &format!("key/{key:03}"), &value]);
        }
    }
    ctl(&["put", "leased", "x", &format!("--lease={lease}")]);
    ctl(&["put", "large", &"L".repeat(100_000)]);
    ctl(&["del", "key/01", "key/02"]);
    ctl(&["del", "key/050"]);
    ctl(&["put", "key/050", "again"]);
    ctl(&["compact", "150", "--physical"]);
    let past = ctl(&["get", "", "--from-key", PAST, "-w", "fields"]);
    let past = keys_only(&past);
    let dir = tempfile::tempdir().expect("temporary directory");
    let snapshot = dir.path().join("snapshot.db");
    ctl(&["snapshot", "save", &snapshot.display().to_string()]);
    let revision = revision_of(&ctl(&["get", "large", "-w", "fields"]));
    let hash = hash_kv(&endpoint, revision);
    Source { snapshot, hash, revision, lease, past, _dir: dir }
}

fn revision_of(fields: &str) -> i64 {
    let line = fields.lines().find_map(|line| line.strip_prefix("\"Revision\" : "));
    line.expect("a revision").parse().expect("a number")
}

/// What is about keys in etcdctl's fields, without ids and terms of the cluster.
fn keys_only(fields: &str) -> String {
    let is_header = |line: &&str| {
        ["\"ClusterID\"", "\"MemberID\"", "\"Revision\"", "\"RaftTerm\""]
            .iter()
            .any(|name| line.starts_with(name))
    };
    fields.lines().filter(|line| !is_header(line)).collect::<Vec<_>>().join("\n")
}

fn kelson(arguments: &[&str]) -> Said {
    run(&kelson_binary(), arguments)
}

fn text(path: &Path) -> String {
    path.display().to_string()
}

/// Restores a member of one and starts it.
fn restored(snapshot: &Path, flags: &[&str]) -> Cluster {
    let mut cluster = Cluster::reserved(&kelson_binary(), 1);
    restore(&cluster, snapshot, flags);
    cluster.spawn_finding(0, &[format!("--initial-cluster={}", cluster.initial_cluster())]);
    cluster.wait_ready(0);
    cluster
}

fn restore(cluster: &Cluster, snapshot: &Path, flags: &[&str]) {
    let (file, dir) = (text(snapshot), text(&cluster.data_dir(0)));
    let (list, url) = (cluster.initial_cluster(), cluster.peer_url(0));
    let mut words = vec!["snapshot", "restore", &file, "--name=m0", "--data-dir", &dir];
    words.extend(["--initial-cluster", &list, "--initial-advertise-peer-urls", &url]);
    words.extend(flags);
    kelson(&words).ok();
}

#[test]
fn three_members_come_back_from_a_snapshot_of_etcd() {
    let source = source();
    let mut cluster = Cluster::reserved(&kelson_binary(), 3);
    let (file, list) = (text(&source.snapshot), cluster.initial_cluster());
    // Called by its own name, by etcdutl's, and by that of an old etcdctl; flags on both sides.
    let links = tempfile::tempdir().expect("temporary directory");
    for name in ["etcdutl", "etcdctl"] {
        std::os::unix::fs::symlink(kelson_binary(), links.path().join(name)).expect("a link");
    }
    for index in 0..3 {
        let (dir, url) = (text(&cluster.data_dir(index)), cluster.peer_url(index));
        let dir = format!("--data-dir={dir}");
        let common =
            ["--initial-cluster", &list, "--initial-advertise-peer-urls", &url, dir.as_str()];
        let (program, before, after): (_, Vec<&str>, Vec<&str>) = match index {
            0 => (kelson_binary(), vec!["-w", "json", "snapshot", "restore"], vec!["--name", "m0"]),
            1 => {
                let before = vec!["--write-out=table", "snapshot", "--timeout", "3s", "restore"];
                (links.path().join("etcdutl"), before, vec!["--skip-hash-check=false"])
            }
            _ => {
                let before = vec!["--endpoints=http://127.0.0.1:1", "snapshot", "restore"];
                (links.path().join("etcdctl"), before, vec!["--name=m2"])
            }
        };
        let words = before.into_iter().chain(common).chain([file.as_str()]).chain(after);
        let said = run(&program, words);
        assert_eq!(said.code, Some(0), "{said:?}");
        let is_inferred = said.err.contains("--name is not given: taking \"m1\"");
        assert_eq!(is_inferred, index == 1, "{said:?}");
    }
    for index in 0..3 {
        cluster.spawn_finding(index, &[format!("--initial-cluster={list}")]);
    }
    (0..3).for_each(|index| cluster.wait_ready(index));
    for index in 0..3 {
        let endpoint = cluster.endpoint(index);
        assert_eq!(hash_kv(&endpoint, source.revision), source.hash, "member {index}");
        let past = etcdctl(&endpoint, &["get", "", "--from-key", PAST, "-w", "fields"]);
        assert_eq!(keys_only(&past), source.past, "member {index}");
        let lease =
            etcdctl(&endpoint, &["lease", "timetolive", &source.lease, "--keys", "-w", "fields"]);
        assert!(lease.contains("\"GrantedTTL\" : 5000"), "{lease}");
        assert!(lease.contains("\"Key\" : \"leased\""), "{lease}");
        etcdctl(&endpoint, &["put", &format!("new/{index}"), "x"]);
    }
    let members = etcdctl(&cluster.endpoint(0), &["member", "list", "-w", "simple"]);
    assert_eq!(members.lines().filter(|line| line.contains("started")).count(), 3, "{members}");
    let hashes: Vec<_> =
        (0..3).map(|index| hash_kv(&cluster.endpoint(index), source.revision + 3)).collect();
    assert!(hashes.iter().all(|hash| hash == &hashes[0]), "{hashes:?}");

    // And from a snapshot of ours, with a leader that dies first.
    etcdctl(&cluster.endpoint(1), &["lease", "revoke", &source.lease]);
    let ours = links.path().join("ours.db");
    etcdctl(&cluster.endpoint(2), &["snapshot", "save", &text(&ours)]);
    let hash = hash_kv(&cluster.endpoint(2), 0);
    drop(cluster);
    let again = restored(&ours, &[]);
    assert_eq!(hash_kv(&again.endpoint(0), 0), hash);
    assert_eq!(etcdctl(&again.endpoint(0), &["get", "leased"]), "");
}

#[test]
fn users_come_back_from_snapshots() {
    users_come_back(&etcd_binary(), users::describe);
}

#[test]
fn users_come_back_from_snapshots_of_etcd_3_4() {
    users_come_back(&peer("etcd-3.4"), users::rights);
}

fn users_come_back(etcd: &Path, describe: fn(&str) -> String) {
    let etcd = Cluster::start(etcd, 1, "http", &[users::CHEAP.to_owned()]);
    let endpoint = etcd.endpoint(0);
    users::make(&endpoint);
    users::enable(&endpoint);
    etcdctl(&endpoint, &["--user=ann:ann's", "put", "ann/x", "hers"]);
    etcdctl(&endpoint, &[ROOT, "user", "add", "late:late's"]);
    etcdctl(&endpoint, &[ROOT, "user", "grant-role", "late", "plain"]);
    let dir = tempfile::tempdir().expect("temporary directory");
    let save = |endpoint: &str, name: &str| {
        let file = dir.path().join(name);
        etcdctl(endpoint, &[ROOT, "snapshot", "save", &text(&file)]);
        file
    };
    let theirs = save(&endpoint, "theirs.db");
    let picture = |endpoint: &str| (describe(endpoint), hash_kv_for(endpoint, 0, &[ROOT]));
    let before = picture(&endpoint);
    drop(etcd);

    let kelson = restored(&theirs, &[]);
    let endpoint = kelson.endpoint(0);
    assert_eq!(picture(&endpoint), before);
    users::check(&endpoint);
    users::log_in(&endpoint, "late", "late's");
    etcdctl(&endpoint, &[ROOT, "user", "delete", "late"]);
    etcdctl(&endpoint, &[ROOT, "role", "revoke-permission", "plain", "shared"]);
    etcdctl(&endpoint, &["--user=ann:ann's", "put", "ann/x", "ours"]);
    let before = picture(&endpoint);
    let ours = save(&endpoint, "ours.db");
    drop(kelson);

    let again = restored(&ours, &[]);
    assert_eq!(picture(&again.endpoint(0)), before);
    users::check(&again.endpoint(0));
    drop(again);
    // And with users switched off, who are there all the same.
    let off = restored(&ours, &["--bump-revision=100", "--mark-compacted"]);
    let endpoint = off.endpoint(0);
    etcdctl(&endpoint, &[ROOT, "auth", "disable"]);
    let status = etcdctl(&endpoint, &["auth", "status"]);
    let saved = dir.path().join("off.db");
    etcdctl(&endpoint, &["snapshot", "save", &text(&saved)]);
    drop(off);
    let off = restored(&saved, &[]);
    let endpoint = off.endpoint(0);
    assert_eq!(etcdctl(&endpoint, &["auth", "status"]), status);
    assert!(status.contains("Authentication Status: false"), "{status}");
    assert_eq!(etcdctl(&endpoint, &["user", "list"]), "ann\nbob\neve\nroot\n");
    users::enable(&endpoint);
    users::check(&endpoint);
}

#[test]
fn what_is_printed_is_what_etcdutl_prints() {
    let source = source();
    let dir = tempfile::tempdir().expect("temporary directory");
    // etcdutl changes a file that it hashes.
    let copy = dir.path().join("copy.db");
    std::fs::copy(&source.snapshot, &copy).expect("copy the snapshot");
    let (file, copy) = (text(&source.snapshot), text(&copy));
    let both = |words: &[&str]| {
        let (theirs, ours) = (run(&peer("etcdutl"), words), kelson(words));
        (theirs, ours)
    };
    for format in ["simple", "table", "json", "fields", "protobuf"] {
        let (theirs, ours) = both(&["snapshot", "status", &file, "-w", format]);
        assert_eq!(ours, theirs, "{format}");
        let (theirs, ours) = both(&["-w", format, "snapshot", "status", &file]);
        assert_eq!(ours, theirs, "{format}");
    }
    for format in ["simple", "table", "json", "fields"] {
        let ours = kelson(&["hashkv", &file, "-w", format]);
        assert_eq!(ours.out, run(&peer("etcdutl"), ["hashkv", &copy, "-w", format]).out);
    }
    for revision in [160, 250, source.revision] {
        let revision = format!("--rev={revision}");
        let theirs = run(&peer("etcdutl"), ["hashkv", &copy, &revision]);
        assert_eq!(kelson(&["hashkv", &file, &revision]).ok(), theirs.ok(), "{revision}");
    }
    for words in [
        &["snapshot", "status"][..],
        &["snapshot", "status", "/nowhere/file"],
        &["snapshot", "restore", &file, "--bump-revision=5"],
        &["snapshot", "restore", &file, "--mark-compacted"],
        &["hashkv", &copy, "--rev=100"],
        &["hashkv", &copy, "--rev=1000000"],
    ] {
        let (theirs, ours) = both(words);
        assert_eq!(ours, theirs, "{words:?}");
    }
    let (theirs, ours) = both(&["snapshot", "status", "--bad", &file]);
    assert_eq!(ours.code, theirs.code);
    assert!(ours.err.starts_with("Error: unknown flag: --bad"), "{ours:?}");
    let (theirs, ours) = both(&["snapshot", "status", &file, "-w", "xml"]);
    assert_eq!(ours.code, theirs.code);
}

#[tokio::test]
async fn a_raised_revision_compacts_all_before_it() {
    let source = source();
    let flags = ["--bump-revision=1000", "--mark-compacted"];
    let cluster = restored(&source.snapshot, &flags);
    let raised = source.revision + 1000;
    // The real thing, restored by the real tool.
    let mut etcd = Cluster::reserved(&etcd_binary(), 1);
    let (file, dir) = (text(&source.snapshot), text(&etcd.data_dir(0)));
    let (list, url) = (etcd.initial_cluster(), etcd.peer_url(0));
    let words = ["snapshot", "restore", &file, "--name=m0", "--data-dir", &dir];
    let words = words.into_iter().chain(["--initial-cluster", &list]);
    let words = words.chain(["--initial-advertise-peer-urls", &url]).chain(flags);
    run(&peer("etcdutl"), words).ok();
    etcd.spawn_finding(0, &[format!("--initial-cluster={list}")]);
    etcd.wait_ready(0);
    for member in [&cluster, &etcd] {
        let mut watch = WatchClient::new(member.channel(0));
        let create = pb::WatchCreateRequest {
            key: "key/000".into(),
            start_revision: source.revision,
            ..Default::default()
        };
        let union = pb::watch_request::RequestUnion::CreateRequest(create);
        let asked = tokio_stream::iter([pb::WatchRequest { request_union: Some(union) }]);
        let asked = tokio_stream::StreamExt::chain(asked, tokio_stream::pending());
        let mut answers = watch.watch(asked).await.expect("a stream").into_inner();
        let compacted = loop {
            let answer = answers.message().await.expect("an answer").expect("no end");
            if answer.canceled {
                break answer.compact_revision;
            }
            assert!(answer.created && answer.events.is_empty(), "{answer:?}");
        };
        assert_eq!(compacted, raised);
        let put = pb::PutRequest { key: "new".into(), value: "x".into(), ..Default::default() };
        let done = KvClient::new(member.channel(0)).put(put).await.expect("a put").into_inner();
        assert_eq!(done.header.expect("a header").revision, raised + 1);
    }
    // etcd also keeps an empty key at the raised revision, which its HashKV covers and ours does not.
    for words in [&["get", "key", "--prefix"][..], &["get", "l", "--prefix"], &["lease", "list"]] {
        let (ours, theirs) =
            (etcdctl(&cluster.endpoint(0), words), etcdctl(&etcd.endpoint(0), words));
        assert_eq!(ours, theirs, "{words:?}");
        assert!(ours.lines().count() > 1, "{words:?}");
    }
    let raised_by_etcd = etcd.data_dir(0).join("member/snap/db");
    etcd.stop(0);
    let copy = raised_by_etcd.with_extension("copy");
    std::fs::copy(&raised_by_etcd, &copy).expect("copy the database");
    let theirs = run(&peer("etcdutl"), ["hashkv", &text(&copy)]).ok();
    assert_eq!(kelson(&["hashkv", &text(&raised_by_etcd)]).ok(), theirs);
    // What etcd raised comes over raised.
    let again = restored(&raised_by_etcd, &["--skip-hash-check"]);
    let put = pb::PutRequest { key: "new".into(), value: "x".into(), ..Default::default() };
    let done = KvClient::new(again.channel(0)).put(put).await.expect("a put").into_inner();
    assert_eq!(done.header.expect("a header").revision, raised + 2);
}

#[test]
fn damaged_snapshots_are_refused_and_leave_nothing() {
    let source = source();
    let dir = tempfile::tempdir().expect("temporary directory");
    let good = std::fs::read(&source.snapshot).expect("read the snapshot");
    let bad = dir.path().join("bad.db");
    let target = dir.path().join("target");
    let restore = |bytes: &[u8], flags: &[&str]| {
        std::fs::write(&bad, bytes).expect("write a snapshot");
        let (file, dir) = (text(&bad), text(&target));
        let words = ["snapshot", "restore", &file, "--data-dir", &dir];
        kelson(&words.into_iter().chain(flags.iter().copied()).collect::<Vec<_>>())
    };
    let is_left = || target.exists() && std::fs::read_dir(&target).expect("lists").count() > 0;
    for place in (0..good.len()).step_by(good.len() / 23) {
        let mut bytes = good.clone();
        bytes[place] ^= 4;
        let error = restore(&bytes, &[]).failure(1);
        assert!(error.contains("sha256"), "byte {place}: {error}");
        assert!(!is_left(), "byte {place}");
        let error = kelson(&["snapshot", "status", &text(&bad)]).failure(1);
        assert!(error.contains("bad.db"), "byte {place}: {error}");
    }
    let without = &good[..good.len() - 32];
    let error = restore(without, &[]).failure(1);
    assert_eq!(
        error.lines().last(),
        Some("Error: snapshot missing hash but --skip-hash-check=false")
    );
    // Heads of pages, where a flipped bit cannot pass for data.
    let (mut refused, mut flipped) = (0, 0);
    let pages = without.len() / 4096;
    for page in (0..pages).step_by((pages / 12).max(1)).map(|page| page * 4096) {
        for offset in [0, 8, 10, 17, 21, 25] {
            let mut bytes = without.to_vec();
            bytes[page + offset] ^= 0x15;
            let said = restore(&bytes, &["--skip-hash-check"]);
            flipped += 1;
            if said.code == Some(0) {
                // A page that is not in use, or the older meta.
                std::fs::remove_dir_all(&target).expect("remove the member");
                continue;
            }
            refused += 1;
            said.failure(1);
            assert!(!is_left(), "page {page}, byte {offset}");
        }
    }
    // How many pages are in use is up to etcd; some are.
    assert!(refused >= 6, "{refused} of {flipped} refused");
    for len in [0, 10, 4096, 9000, without.len() - 4096] {
        let error = restore(&without[..len], &["--skip-hash-check"]).failure(1);
        assert!(error.contains("bad.db"), "{len}: {error}");
        assert!(!is_left());
    }
}

#[test]
fn a_directory_that_holds_something_is_left_alone() {
    let source = source();
    let mut cluster = restored(&source.snapshot, &[]);
    let (file, dir) = (text(&source.snapshot), text(&cluster.data_dir(0)));
    let error = kelson(&["snapshot", "restore", &file, "--data-dir", &dir]).failure(1);
    assert!(error.contains("in use by another process"), "{error}");
    for tool in ["check", "hashkv", "defrag"] {
        let error = kelson(&[tool, "--data-dir", &dir]).failure(1);
        assert!(error.contains("in use by another process"), "{tool}: {error}");
    }
    cluster.stop(0);
    let before = files(&cluster.data_dir(0));
    let error = kelson(&["snapshot", "restore", &file, "--data-dir", &dir]).failure(1);
    let last = error.lines().last().expect("a line");
    assert_eq!(last, format!("Error: data-dir {dir:?} not empty or could not be read"));
    assert!(before == files(&cluster.data_dir(0)), "nothing was changed");
    cluster.spawn(0);
    cluster.wait_ready(0);
}

/// A stopped member with some history, and the hash that it had.
fn stopped_member() -> (Cluster, String) {
    let mut cluster = Cluster::start(&kelson_binary(), 1, "http", &[]);
    let endpoint = cluster.endpoint(0);
    for key in 0..40 {
        etcdctl(&endpoint, &["put", &format!("k{}", key % 7), &"v".repeat(key * 50)]);
    }
    etcdctl(&endpoint, &["del", "k3"]);
    etcdctl(&endpoint, &["compact", "20", "--physical"]);
    let (hash, compacted) = hash_kv(&endpoint, 0);
    cluster.stop(0);
    (cluster, format!("{hash}, 42, {compacted}\n"))
}

#[test]
fn a_stopped_member_is_hashed_and_rewritten() {
    let (mut cluster, hash) = stopped_member();
    let dir = text(&cluster.data_dir(0));
    assert_eq!(kelson(&["hashkv", "--data-dir", &dir]).ok(), hash);
    kelson(&["defrag", "--data-dir", &dir]).ok();
    assert_eq!(kelson(&["hashkv", "--data-dir", &dir]).ok(), hash);
    let error = kelson(&["hashkv", "--data-dir", &dir, "--rev=3"]).failure(1);
    assert!(error.contains("required revision has been compacted"), "{error}");
    let error = kelson(&["hashkv", "--data-dir", "/nowhere"]).failure(1);
    assert_eq!(error, "Error: stat /nowhere: no such file or directory\n");
    cluster.spawn(0);
    cluster.wait_ready(0);
}

#[test]
fn check_names_the_damaged_file() {
    let (cluster, _) = stopped_member();
    let good = cluster.data_dir(0);
    let said = kelson(&["check", "--data-dir", &text(&good)]).ok();
    assert!(said.contains("revision 42, compacted 20"), "{said}");
    assert!(said.ends_with("all files are sound\n"), "{said}");
    let largest = |dir: &Path, name: &str| {
        let mut found = files(dir);
        found.retain(|(path, _)| path.to_string_lossy().contains(name));
        found.retain(|(path, _)| path.extension().is_none_or(|kind| kind != "next"));
        found.sort_by_key(|(_, bytes)| bytes.len());
        found.pop().expect("there is one").0
    };
    type Damage<'a> = Box<dyn Fn(&Path) -> PathBuf + 'a>;
    let flip = |path: PathBuf, places: &[usize]| {
        let mut bytes = std::fs::read(&path).expect("read");
        places.iter().for_each(|place| bytes[*place] ^= 0x20);
        std::fs::write(&path, bytes).expect("write");
        path
    };
    let damages: [(&str, Damage<'_>); 7] = [
        ("identity", Box::new(|dir| flip(dir.join("member/identity"), &[20]))),
        ("head of the log", Box::new(|dir| flip(largest(dir, "/wal/"), &[4]))),
        ("record of the log", Box::new(|dir| flip(largest(dir, "/wal/"), &[4096 + 700]))),
        (
            "no log",
            Box::new(|dir| {
                std::fs::remove_dir_all(dir.join("member/wal")).expect("remove the log");
                dir.join("member/state")
            }),
        ),
        ("name of the state", Box::new(|dir| flip(dir.join("member/state/CURRENT"), &[3]))),
        (
            "pairs of the state",
            Box::new(|dir| {
                // All of them: one may hold nothing but pages that were written anew elsewhere.
                let mut slabs = files(&dir.join("member/state"));
                slabs.retain(|(path, _)| path.to_string_lossy().contains("/slabs/"));
                for (path, bytes) in slabs {
                    std::fs::write(path, vec![0; bytes.len()]).expect("write");
                }
                dir.join("member/state")
            }),
        ),
        (
            "no identity",
            Box::new(|dir| {
                std::fs::remove_file(dir.join("member/identity")).expect("remove it");
                dir.join("member/identity")
            }),
        ),
    ];
    for (name, damage) in &damages {
        let temp = tempfile::tempdir().expect("temporary directory");
        let dir = temp.path().join("data");
        copy_dir(&good, &dir);
        let path = damage(&dir);
        let log =
            |dir: &Path| dir.join("member/wal").exists().then(|| files(&dir.join("member/wal")));
        let before = log(&dir);
        let error = kelson(&["check", "--data-dir", &text(&dir)]).failure(1);
        assert!(error.contains(&text(&path)), "{name}: {error}");
        let advises = ["replace", "restore", "remove this member", "start the newer"];
        assert!(advises.iter().any(|word| error.contains(word)), "{name}: {error}");
        assert!(before == log(&dir), "{name}: the log was changed");
    }
    let error = kelson(&["check", "--data-dir", "/nowhere"]).failure(1);
    assert_eq!(error, "Error: /nowhere holds no member of Kelson\n");
}
