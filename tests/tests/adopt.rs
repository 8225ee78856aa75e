//! The first start on the data directory of a real etcd: everything that etcd acknowledged is
//! there, also what its database had not yet taken from its log; ids stay; etcd's files stay as
//! they were; and what cannot be taken over is refused with nothing changed. `KELSON_BIN` names
//! another binary.

use std::path::Path;
use std::time::Instant;

use kelson_api::etcdserverpb as pb;
use kelson_tests::cluster::{Cluster, PATIENCE};
use kelson_tests::server::{etcd_binary, kelson_binary};
use kelson_tests::tools::{copy_dir, etcdctl, files, hash_kv, hash_kv_for, peer, run};
use kelson_tests::users::{self, ROOT};
use pb::auth_client::AuthClient;
use pb::kv_client::KvClient;
use tonic::{Request, Status};

/// Something of everything, with the newest changes right at the end.
fn fill(endpoint: &str) {
    let ctl = |words: &[&str]| etcdctl(endpoint, words);
    let granted = ctl(&["lease", "grant", "5000"]);
    let lease = granted.split_whitespace().nth(1).expect("an id").to_owned();
    for key in 0..60 {
        ctl(&["put", &format!("key/{:02}", key % 25), &"v".repeat(1 + key * 40)]);
    }
    ctl(&["compact", "20"]);
    ctl(&["put", "leased", "x", &format!("--lease={lease}")]);
    ctl(&["del", "key/1", "key/2"]);
    ctl(&["put", "last", "acknowledged"]);
}

fn revision(endpoint: &str) -> i64 {
    let fields = etcdctl(endpoint, &["get", "last", "-w", "fields"]);
    let line = fields.lines().find_map(|line| line.strip_prefix("\"Revision\" : "));
    line.expect("a revision").parse().expect("a number")
}

fn member_ids(endpoint: &str) -> Vec<String> {
    let list = etcdctl(endpoint, &["member", "list", "-w", "simple"]);
    let mut lines: Vec<String> = list.lines().map(str::to_owned).collect();
    lines.sort();
    lines
}

/// A real etcd on the same files.
fn etcds_own(etcd: &Path, data_dir: &Path) -> Cluster {
    let mut etcd = Cluster::reserved(etcd, 1);
    copy_dir(data_dir, &etcd.data_dir(0));
    // Not with --force-new-cluster, which drops what etcd's log does not yet call committed.
    etcd.spawn_finding(0, &[format!("--initial-cluster={}", etcd.initial_cluster())]);
    etcd.wait_ready(0);
    etcd
}

#[test]
fn a_member_that_was_killed_goes_on_as_ours() {
    goes_on_as_ours(&etcd_binary(), "3.7");
}

#[test]
fn a_member_of_etcd_3_6_goes_on_as_ours() {
    goes_on_as_ours(&peer("etcd-3.6"), "3.6");
}

#[test]
fn a_member_of_etcd_3_5_goes_on_as_ours() {
    goes_on_as_ours(&peer("etcd-3.5"), "3.5");
}

#[test]
fn a_member_of_etcd_3_4_goes_on_as_ours() {
    goes_on_as_ours(&peer("etcd-3.4"), "3.4");
}

fn goes_on_as_ours(etcd: &Path, version: &str) {
    let mut cluster = Cluster::start(etcd, 1, "http", &[]);
    // The database follows the log in steps of 100 ms: some of this is only in the log.
    fill(&cluster.endpoint(0));
    let members = member_ids(&cluster.endpoint(0));
    let acknowledged = revision(&cluster.endpoint(0));
    cluster.kill(0);
    let temp = tempfile::tempdir().expect("temporary directory");
    let before = temp.path().join("before");
    copy_dir(&cluster.data_dir(0), &before);

    cluster.become_of(&kelson_binary());
    cluster.spawn(0);
    cluster.wait_ready(0);
    let endpoint = cluster.endpoint(0);
    assert_eq!(etcdctl(&endpoint, &["get", "last"]), "last\nacknowledged\n");
    assert_eq!(member_ids(&endpoint), members);
    let at = revision(&endpoint);
    assert_eq!(at, acknowledged);
    assert_eq!(hash_kv(&endpoint, at), hash_kv(&etcds_own(etcd, &before).endpoint(0), at));
    let leases = etcdctl(&endpoint, &["lease", "list"]);
    let lease = leases.lines().nth(1).expect("a lease").to_owned();
    let keys = etcdctl(&endpoint, &["lease", "timetolive", &lease, "--keys", "-w", "fields"]);
    assert!(keys.contains("\"Key\" : \"leased\""), "{keys}");
    etcdctl(&endpoint, &["put", "new", "ours"]);

    // The files of etcd are the same byte for byte, elsewhere.
    let kept = files(&cluster.data_dir(0).join("member.etcd"));
    let original = files(&before.join("member"));
    let bytes = |files: &[(std::path::PathBuf, Vec<u8>)]| {
        files.iter().map(|(_, bytes)| bytes.clone()).collect::<Vec<_>>()
    };
    assert!(!kept.is_empty() && bytes(&kept) == bytes(&original), "etcd's files have changed");

    // An etcd that is started there by mistake refuses and does no harm.
    cluster.stop(0);
    cluster.become_of(etcd);
    cluster.spawn(0);
    assert!(!cluster.wait_end(0).success(), "etcd must not run on our directory");
    cluster.become_of(&kelson_binary());
    cluster.spawn(0);
    cluster.wait_ready(0);
    assert_eq!(etcdctl(&endpoint, &["get", "new"]), "new\nours\n");

    // And the way back to the release that it came from.
    let hash = hash_kv(&endpoint, 0);
    cluster.stop(0);
    let mut back = Cluster::reserved(etcd, 1);
    export(&cluster.data_dir(0), &back, 0, &["--etcd-version", version]);
    back.spawn_finding(0, &[format!("--initial-cluster={}", back.initial_cluster())]);
    back.wait_ready(0);
    assert_eq!(hash_kv(&back.endpoint(0), 0), hash);
    etcdctl(&back.endpoint(0), &["put", "new", "etcds"]);
}

/// An etcd whose database takes only what it must: all else is in its log alone.
fn late(etcd: &Path, flags: &[String]) -> Cluster {
    let late = ["--backend-batch-interval=1h", "--backend-batch-limit=1000000", users::CHEAP];
    let mut cluster = Cluster::reserved(etcd, 1);
    let list = format!("--initial-cluster={}", cluster.initial_cluster());
    let all = late.map(str::to_owned).into_iter().chain([list]).chain(flags.iter().cloned());
    cluster.spawn_finding(0, &all.collect::<Vec<_>>());
    cluster.wait_ready(0);
    cluster
}

/// A call over gRPC, for what etcdctl cannot say.
fn call<T>(asked: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.expect("a runtime can be built").block_on(asked)
}

fn with<T>(token: &str, message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("token", token.parse().expect("ASCII"));
    request
}

fn log_in(cluster: &Cluster, name: &str, password: &str) -> String {
    let request = pb::AuthenticateRequest { name: name.into(), password: password.into() };
    call(async {
        let answer = AuthClient::new(cluster.channel(0)).authenticate(request).await;
        answer.expect("the password is right").into_inner().token
    })
}

fn put(cluster: &Cluster, token: &str, key: &str) -> Result<(), Status> {
    let request = pb::PutRequest { key: key.to_owned().into(), ..Default::default() };
    call(async { KvClient::new(cluster.channel(0)).put(with(token, request)).await.map(drop) })
}

#[test]
fn users_of_etcd_3_7_come_over() {
    users_come_over(&etcd_binary(), "3.7");
}

#[test]
fn users_of_etcd_3_6_come_over() {
    users_come_over(&peer("etcd-3.6"), "3.6");
}

#[test]
fn users_of_etcd_3_5_come_over() {
    users_come_over(&peer("etcd-3.5"), "3.5");
}

#[test]
fn users_of_etcd_3_4_come_over() {
    users_come_over(&peer("etcd-3.4"), "3.4");
}

fn users_come_over(etcd: &Path, version: &str) {
    let describe = if version == "3.4" { users::rights } else { users::describe };

    let mut cluster = late(etcd, &[]);
    let endpoint = cluster.endpoint(0);
    users::make(&endpoint);
    users::enable(&endpoint);
    change_users(&cluster);
    let (token, last) = only_in_log(&cluster, |last| write_keys(&cluster, last));
    let acknowledged = revision_for(&endpoint);
    cluster.kill(0);
    let temp = tempfile::tempdir().expect("temporary directory");
    let before = temp.path().join("before");
    copy_dir(&cluster.data_dir(0), &before);
    assert!(!is_in_database(&cluster, &last), "it must be in the log alone");
    let has_late_users = ["3.4", "3.5"].contains(&version);
    assert!(!has_late_users || !is_in_database(&cluster, "fay"), "they must be in the log alone");
    let theirs = etcds_own(etcd, &before);

    cluster.become_of(&kelson_binary());
    cluster.spawn(0);
    cluster.wait_ready(0);
    // A start forgets tokens, as etcd's does: clients log in again by themselves.
    let refused = put(&cluster, &token, "ann/by-token").expect_err("a token from before");
    assert_eq!(refused.message(), "etcdserver: invalid auth token");
    let hash = |endpoint: &str| hash_kv_for(endpoint, acknowledged, &[ROOT]);
    assert_eq!(hash(&endpoint), hash(&theirs.endpoint(0)), "what etcd refused must be refused");
    let told = describe(&endpoint);
    assert_eq!(told, describe(&theirs.endpoint(0)));
    assert!(told.contains("user fay"), "{told}");
    users::check(&endpoint);
    users::log_in(&endpoint, "fay", "new");
    let missing = ["--endpoints", &endpoint, "--user=fay:old", "get", "ann/x"];
    run(&peer("etcdctl"), missing).failure(2);

    // They are kept, changed, and go back.
    etcdctl(&endpoint, &[ROOT, "user", "add", "gus:gus's"]);
    etcdctl(&endpoint, &[ROOT, "user", "grant-role", "gus", "reader"]);
    let told = describe(&endpoint);
    cluster.kill(0);
    cluster.spawn(0);
    cluster.wait_ready(0);
    assert_eq!(describe(&endpoint), told);
    let hash = hash_kv_for(&endpoint, 0, &[ROOT]);
    cluster.stop(0);
    let mut back = Cluster::reserved(etcd, 1);
    export(&cluster.data_dir(0), &back, 0, &["--etcd-version", version]);
    back.spawn_finding(0, &[format!("--initial-cluster={}", back.initial_cluster())]);
    back.wait_ready(0);
    let endpoint = back.endpoint(0);
    assert_eq!(describe(&endpoint), told);
    assert_eq!(hash_kv_for(&endpoint, 0, &[ROOT]), hash);
    users::check(&endpoint);
    users::log_in(&endpoint, "gus", "gus's");
    etcdctl(&endpoint, &[ROOT, "user", "delete", "gus"]);
}

fn is_in_database(cluster: &Cluster, text: &str) -> bool {
    let path = cluster.data_dir(0).join("member/snap/db");
    let bytes = std::fs::read(path).expect("read the database");
    bytes.windows(text.len()).any(|window| window == text.as_bytes())
}

/// Writes until etcd's database lacks the end of it, which is the text that is given. Since 3.6 it takes
/// what is before it with every change of users, and every four seconds until it knows its own version.
fn only_in_log<T>(cluster: &Cluster, mut write: impl FnMut(&str) -> T) -> (T, String) {
    let mut rounds = (0..20).map(|round| {
        let last = format!("acknowledged {round}");
        (write(&last), last)
    });
    let round = rounds.find(|(_, last)| !is_in_database(cluster, last));
    round.expect("a round whose end is in the log alone")
}

/// Every kind of change to users.
fn change_users(cluster: &Cluster) {
    let endpoint = cluster.endpoint(0);
    let root = |words: &[&str]| etcdctl(&endpoint, &[&[ROOT], words].concat());
    let ann = "--user=ann:ann's";
    // Since 3.5 etcd's database takes what is before it with each removal, so these come first.
    root(&["user", "add", "gone:gone"]);
    root(&["user", "delete", "gone"]);
    root(&["role", "delete", "empty"]);
    // A lease without keys belongs to everybody.
    let granted = root(&["lease", "grant", "5000"]);
    let lease = granted.split_whitespace().nth(1).expect("an id");
    etcdctl(&endpoint, &[ann, "lease", "revoke", lease]);
    for words in [
        &["user", "add", "fay:old"][..],
        &["user", "grant-role", "fay", "plain"],
        &["user", "revoke-role", "eve", "plain"],
        &["role", "add", "late"],
        &["role", "grant-permission", "late", "read", "secret", "secrets"],
        &["role", "grant-permission", "plain", "read", "shared"],
        &["role", "revoke-permission", "reader", "shared"],
    ] {
        root(words);
    }
    let token = log_in(cluster, "root", "r00t");
    let (name, password) = ("fay".to_owned(), "new".to_owned());
    let change = pb::AuthUserChangePasswordRequest { name, password, ..Default::default() };
    call(async {
        let mut auth = AuthClient::new(cluster.channel(0));
        auth.user_change_password(with(&token, change)).await.expect("a new password");
    });
}

/// Requests that etcd judges when it applies them: it refuses some. Returns a token of ann's.
fn write_keys(cluster: &Cluster, last: &str) -> String {
    let endpoint = cluster.endpoint(0);
    let root = |words: &[&str]| etcdctl(&endpoint, &[&[ROOT], words].concat());
    let ann = "--user=ann:ann's";
    let refused = |words: &[&str]| {
        let at = format!("--endpoints={endpoint}");
        let said = run(&peer("etcdctl"), [&[at.as_str(), ann], words].concat());
        let error = said.failure(1);
        assert!(error.contains("permission denied"), "{words:?}: {error}");
    };
    let granted = root(&["lease", "grant", "5000"]);
    let lease = granted.split_whitespace().nth(1).expect("an id").to_owned();
    root(&["put", "root/x", "1"]);
    root(&["put", "root/leased", "x", &format!("--lease={lease}")]);
    etcdctl(&endpoint, &[ann, "put", "ann/x", "hers"]);
    etcdctl(&endpoint, &[ann, "put", "ann/gone", "hers"]);
    etcdctl(&endpoint, &[ann, "del", "ann/gone"]);
    refused(&["put", "root/x", "hers"]);
    refused(&["put", "shared", "she may only read it"]);
    refused(&["del", "", "--from-key"]);
    refused(&["lease", "revoke", &lease]);
    refused(&["put", "ann/leased", "x", &format!("--lease={lease}")]);
    refused(&["user", "add", "hal:hal's"]);
    root(&["put", "last", last]);
    log_in(cluster, "ann", "ann's")
}

/// The store revision, with users on.
fn revision_for(endpoint: &str) -> i64 {
    let fields = etcdctl(endpoint, &[ROOT, "get", "last", "-w", "fields"]);
    let line = fields.lines().find_map(|line| line.strip_prefix("\"Revision\" : "));
    line.expect("a revision").parse().expect("a number")
}

#[test]
fn a_request_whose_token_was_too_old_is_refused_here_too() {
    let temp = tempfile::tempdir().expect("temporary directory");
    let secret = temp.path().join("secret");
    std::fs::write(&secret, "a secret of some length, for a test").expect("write the secret");
    let jwt = format!("--auth-token=jwt,sign-method=HS256,ttl=1h,priv-key={}", secret.display());
    let mut cluster = late(&etcd_binary(), std::slice::from_ref(&jwt));
    let endpoint = cluster.endpoint(0);
    users::make(&endpoint);
    users::enable(&endpoint);
    // A signed token says at which revision of the users it was made.
    let token = log_in(&cluster, "ann", "ann's");
    put(&cluster, &token, "ann/x").expect("ann may do that");
    etcdctl(&endpoint, &[ROOT, "role", "add", "late"]);
    let (_, last) = only_in_log(&cluster, |last| {
        let refused = put(&cluster, &token, "ann/x").expect_err("the token is too old");
        assert_eq!(refused.message(), "etcdserver: revision of auth store is old");
        etcdctl(&endpoint, &[ROOT, "put", "last", last]);
    });
    cluster.kill(0);
    assert!(!is_in_database(&cluster, &last), "it must be in the log alone");
    let before = temp.path().join("before");
    copy_dir(&cluster.data_dir(0), &before);
    let etcd = etcds_own(&etcd_binary(), &before);
    let theirs = etcd.endpoint(0);
    let (hash, told) = (hash_kv_for(&theirs, 0, &[ROOT]), users::describe(&theirs));
    let acknowledged = revision_for(&theirs);
    cluster.become_of(&kelson_binary());
    cluster.spawn(0);
    cluster.wait_ready(0);
    assert_eq!(revision_for(&endpoint), acknowledged);
    assert_eq!(hash_kv_for(&endpoint, 0, &[ROOT]), hash);
    assert_eq!(users::describe(&endpoint), told);
    let refused = put(&cluster, &token, "ann/x").expect_err("the token is too old");
    assert_eq!(refused.message(), "etcdserver: revision of auth store is old");
    users::check(&endpoint);
}

#[test]
fn three_members_are_taken_over_at_different_places() {
    let mut cluster = Cluster::start(&etcd_binary(), 3, "http", &[]);
    etcdctl(&cluster.endpoint(0), &["put", "first", "x"]);
    // One stays behind. It may have been the leader.
    cluster.kill(2);
    let endpoint = format!("--endpoints={}", cluster.endpoint(0));
    let deadline = Instant::now() + PATIENCE;
    while run(&peer("etcdctl"), [&endpoint, "put", "again", "x"]).code != Some(0) {
        assert!(Instant::now() < deadline, "no leader");
    }
    fill(&cluster.endpoint(0));
    let at = revision(&cluster.endpoint(0));
    let hash = hash_kv(&cluster.endpoint(0), at);
    let members = member_ids(&cluster.endpoint(0));
    cluster.kill(1);
    cluster.kill(0);
    cluster.become_of(&kelson_binary());
    (0..3).for_each(|index| cluster.spawn(index));
    (0..3).for_each(|index| cluster.wait_ready(index));
    for index in 0..3 {
        let endpoint = cluster.endpoint(index);
        assert_eq!(etcdctl(&endpoint, &["get", "last"]), "last\nacknowledged\n");
        assert_eq!(member_ids(&endpoint), members);
        assert_eq!(hash_kv(&endpoint, at), hash, "member {index}");
        etcdctl(&endpoint, &["put", &format!("new{index}"), "x"]);
    }
    let hashes: Vec<_> = (0..3).map(|index| hash_kv(&cluster.endpoint(index), at + 3)).collect();
    assert!(hashes.iter().all(|hash| *hash == hashes[0]), "{hashes:?}");
}

#[test]
fn a_take_over_that_was_cut_off_is_finished_or_begun_anew() {
    let mut cluster = Cluster::start(&etcd_binary(), 1, "http", &[]);
    fill(&cluster.endpoint(0));
    cluster.stop(0);
    let dir = cluster.data_dir(0);
    // Before the directories were renamed: what is there counts for nothing.
    let part = dir.join("import.part/member");
    std::fs::create_dir_all(part.join("state")).expect("make a part");
    std::fs::write(part.join("state/CURRENT"), "half").expect("write");
    cluster.become_of(&kelson_binary());
    cluster.spawn(0);
    cluster.wait_ready(0);
    assert!(!dir.join("import.part").exists());
    etcdctl(&cluster.endpoint(0), &["put", "new", "x"]);
    cluster.stop(0);
    // Between the two renames.
    std::fs::create_dir(dir.join("import.part")).expect("make a part");
    std::fs::rename(dir.join("member"), &part).expect("rename");
    cluster.spawn(0);
    cluster.wait_ready(0);
    assert_eq!(etcdctl(&cluster.endpoint(0), &["get", "new"]), "new\nx\n");
    assert!(!dir.join("import.part").exists());
}

/// Starts a member and returns what it says when it refuses; nothing may have changed.
fn refusal(cluster: &mut Cluster) -> String {
    let dir = cluster.data_dir(0);
    let before = files(&dir);
    cluster.spawn(0);
    let status = cluster.wait_end(0);
    assert_eq!(status.code(), Some(1), "{}", cluster.log_tail(0));
    assert!(before == files(&dir), "files have changed");
    cluster.log_tail(0)
}

#[test]
fn what_cannot_be_taken_over_is_refused_and_left_as_it_is() {
    let mut cluster = Cluster::start(&etcd_binary(), 1, "http", &[]);
    fill(&cluster.endpoint(0));
    // While it runs.
    let dir = cluster.data_dir(0).display().to_string();
    let said = run(&kelson_binary(), ["--data-dir", dir.as_str(), "--log-format=json"]);
    assert!(said.failure(1).contains("in use by another process"));
    cluster.kill(0);
    cluster.become_of(&kelson_binary());
    let dir = cluster.data_dir(0);
    let wal = dir.join("member/wal/0000000000000000-0000000000000000.wal");
    let good = std::fs::read(&wal).expect("read the log");

    let end = good.iter().rposition(|byte| *byte != 0).expect("not empty");
    // Within values: padding between records is covered by no checksum.
    let is_value = |place: &usize| good[place - 8..place + 8].iter().all(|byte| *byte == b'v');
    let values: Vec<usize> = (8..end).filter(is_value).collect();
    for place in [values[0], values[values.len() / 3], values[values.len() - 1]] {
        let mut bad = good.clone();
        bad[place] ^= 1;
        std::fs::write(&wal, &bad).expect("write the log");
        let log = refusal(&mut cluster);
        assert!(log.contains("0000000000000000.wal is damaged at byte"), "byte {place}: {log}");
    }
    std::fs::rename(&wal, dir.join("away")).expect("rename");
    assert!(refusal(&mut cluster).contains("it holds no log file"));
    std::fs::remove_file(dir.join("away")).expect("remove");
    std::fs::write(&wal, &good).expect("write the log");

    let db = dir.join("member/snap/db");
    let database = std::fs::read(&db).expect("read the database");
    std::fs::write(&db, &database[..9000]).expect("write the database");
    assert!(refusal(&mut cluster).contains("is damaged at byte 9000"));
    std::fs::write(&db, b"no database").expect("write the database");
    assert!(refusal(&mut cluster).contains("is not a database of etcd"));
    std::fs::write(&db, &database).expect("write the database");

    // A write at the end that never reached the disk as a whole is no damage.
    let mut torn = good.clone();
    let behind = (end + 1).next_multiple_of(8);
    torn[behind + 8..behind + 40].fill(7);
    // 2 KiB, of which the first sector was written.
    torn[behind..behind + 8].copy_from_slice(b"\x00\x08\x00\x00\x00\x00\x00\x00");
    std::fs::write(&wal, &torn).expect("write the log");
    cluster.spawn(0);
    cluster.wait_ready(0);
    assert_eq!(etcdctl(&cluster.endpoint(0), &["get", "last"]), "last\nacknowledged\n");
}

/// Exports a stopped member; `to` becomes the data directory of a member of another cluster.
fn export(from: &Path, to: &Cluster, index: usize, flags: &[&str]) {
    let (from, to_dir) = (from.display().to_string(), to.data_dir(index).display().to_string());
    let (name, list, url) = (format!("m{index}"), to.initial_cluster(), to.peer_url(index));
    let words = ["export", "--data-dir", &from, "--to", &to_dir, "--name", &name];
    let words = words.into_iter().chain(["--initial-cluster", &list]);
    let words = words.chain(["--initial-advertise-peer-urls", &url]);
    run(&kelson_binary(), words.chain(flags.iter().copied())).ok();
}

#[test]
fn there_and_back_again() {
    let mut cluster = Cluster::start(&etcd_binary(), 1, "http", &[]);
    fill(&cluster.endpoint(0));
    let at = revision(&cluster.endpoint(0));
    let hash = hash_kv(&cluster.endpoint(0), at);
    let past = etcdctl(&cluster.endpoint(0), &["get", "key", "--prefix", "--rev=40"]);
    cluster.stop(0);
    cluster.become_of(&kelson_binary());
    cluster.spawn(0);
    cluster.wait_ready(0);
    etcdctl(&cluster.endpoint(0), &["put", "new", "ours"]);
    cluster.stop(0);
    let dir = cluster.data_dir(0);
    let mut etcd = Cluster::reserved(&etcd_binary(), 3);
    for index in 0..3 {
        export(&dir, &etcd, index, &[]);
    }
    let to = etcd.data_dir(0).display().to_string();
    let words = ["export", "--data-dir", &dir.display().to_string(), "--to", &to];
    assert!(run(&kelson_binary(), words).failure(1).contains("not empty"));
    let list = format!("--initial-cluster={}", etcd.initial_cluster());
    (0..3).for_each(|index| etcd.spawn_finding(index, std::slice::from_ref(&list)));
    (0..3).for_each(|index| etcd.wait_ready(index));
    for index in 0..3 {
        let endpoint = etcd.endpoint(index);
        assert_eq!(hash_kv(&endpoint, at), hash, "member {index}");
        assert_eq!(etcdctl(&endpoint, &["get", "key", "--prefix", "--rev=40"]), past);
        assert_eq!(etcdctl(&endpoint, &["get", "new"]), "new\nours\n");
        assert!(etcdctl(&endpoint, &["lease", "list"]).starts_with("found 1 leases"));
        etcdctl(&endpoint, &["put", &format!("etcds{index}"), "x"]);
    }
    // It restarts, and its own tools find nothing wrong.
    (0..3).for_each(|index| etcd.stop(index));
    (0..3).for_each(|index| etcd.spawn(index));
    (0..3).for_each(|index| etcd.wait_ready(index));
    assert_eq!(etcdctl(&etcd.endpoint(2), &["get", "etcds0"]), "etcds0\nx\n");
}

#[test]
fn a_member_alone_is_exported_as_it_is() {
    let mut cluster = Cluster::start(&kelson_binary(), 1, "http", &[]);
    fill(&cluster.endpoint(0));
    let at = revision(&cluster.endpoint(0));
    let hash = hash_kv(&cluster.endpoint(0), at);
    cluster.stop(0);
    let dir = cluster.data_dir(0);
    let out = dir.with_extension("etcd");
    let (from, to) = (dir.display().to_string(), out.display().to_string());
    run(&kelson_binary(), ["export", "--data-dir", &from, "--to", &to]).ok();
    std::fs::rename(dir.join("member"), dir.join("member.kelson")).expect("rename");
    std::fs::rename(out.join("member"), dir.join("member")).expect("rename");
    cluster.become_of(&etcd_binary());
    cluster.spawn(0);
    cluster.wait_ready(0);
    assert_eq!(hash_kv(&cluster.endpoint(0), at), hash);
    etcdctl(&cluster.endpoint(0), &["put", "new", "etcds"]);
}
