//! A member whose data are damaged or gone says which commands replace it. They are run here as they
//! were printed, in a shell, with the etcdctl that `cargo xtask peers` built; then the member comes back
//! and has everything. `KELSON_BIN` names another binary.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use kelson_api::etcdserverpb as pb;
use kelson_tests::cluster::{Cluster, PATIENCE};
use kelson_tests::run;
use kelson_tests::server::{kelson_binary, root};
use pb::kv_client::KvClient;

/// Hurts the data of a member that is stopped.
type Damage = fn(&Path);

/// A byte in the head of the first log segment.
fn flip(member_dir: &Path) {
    let segment = member_dir.join("wal/0000000000000001.wal");
    let mut bytes = std::fs::read(&segment).expect("read the segment");
    bytes[4] ^= 0x10;
    std::fs::write(&segment, bytes).expect("write the segment");
}

/// The file that says whose directory it is.
fn garble_identity(member_dir: &Path) {
    std::fs::write(member_dir.join("identity"), "kelson?\n").expect("write the identity");
}

fn wipe(member_dir: &Path) {
    std::fs::remove_dir_all(member_dir).expect("remove the directory");
}

/// The commands in the last line of a log that has some.
fn commands(log: &str) -> Option<String> {
    log.lines().rev().find_map(|line| {
        let line: serde_json::Value = serde_json::from_str(line).ok()?;
        line.get("run")?.as_str().map(str::to_owned)
    })
}

async fn put(cluster: &Cluster, member: usize, value: &str) -> i64 {
    let put =
        pb::PutRequest { key: "a".into(), value: value.to_owned().into(), ..Default::default() };
    let done = KvClient::new(cluster.channel(member)).put(put).await.expect("a put");
    done.into_inner().header.expect("a header").revision
}

async fn value(cluster: &Cluster, member: usize) -> String {
    let get = pb::RangeRequest { key: "a".into(), ..Default::default() };
    let found = KvClient::new(cluster.channel(member)).range(get).await.expect("a range");
    String::from_utf8_lossy(&found.into_inner().kvs[0].value).into_owned()
}

/// Runs what the log says, one command after the other, and one again while the cluster has no leader or
/// does not call itself healthy: it wants its members connected for five seconds.
fn obey(cluster: &Cluster, victim: usize, others: &[usize]) {
    let endpoints: Vec<String> = others.iter().map(|other| cluster.endpoint(*other)).collect();
    let tools = root().join("target/peers/bin");
    assert!(tools.join("etcdctl").exists(), "etcdctl is missing: run `cargo xtask peers`");
    let path = format!("{}:{}", tools.display(), std::env::var("PATH").unwrap_or_default());
    let log = cluster.log_tail(victim);
    let commands = commands(&log).unwrap_or_else(|| panic!("no commands in\n{log}"));
    let deadline = Instant::now() + PATIENCE;
    for command in commands.split(" && ") {
        loop {
            let mut shell = Command::new("sh");
            shell.args(["-c", command]).env("PATH", &path).env("ENDPOINTS", endpoints.join(","));
            let done = shell.output().expect("a shell");
            if done.status.success() {
                break;
            }
            let error = String::from_utf8_lossy(&done.stderr);
            let early = ["unhealthy cluster", "DeadlineExceeded", "no leader"];
            let is_early = early.iter().any(|reason| error.contains(reason));
            assert!(is_early && Instant::now() < deadline, "{command}\n{error}");
            std::thread::sleep(Duration::from_millis(500));
        }
    }
}

#[test]
fn a_refusal_names_the_commands_that_replace_the_member() {
    run(async {
        let mut cluster = Cluster::start(&kelson_binary(), 3, "http", &[]);
        let damages: [(&str, Damage); 3] =
            [("flipped", flip), ("nameless", garble_identity), ("wiped", wipe)];
        for (victim, (name, damage)) in damages.into_iter().enumerate() {
            let others: Vec<usize> = (0..3).filter(|other| *other != victim).collect();
            put(&cluster, victim, name).await;
            cluster.stop(victim);
            damage(&cluster.data_dir(victim).join("member"));
            cluster.spawn(victim);
            let status = cluster.wait_end(victim);
            assert_eq!(status.code(), Some(1), "{name}: {}", cluster.log_tail(victim));
            obey(&cluster, victim, &others);
            cluster.join(victim, &others);
            cluster.wait_ready(victim);
            assert_eq!(value(&cluster, victim).await, name, "after the damage {name}");
        }
    });
}

#[test]
fn a_lone_member_is_not_told_to_leave() {
    run(async {
        let mut cluster = Cluster::start(&kelson_binary(), 1, "http", &[]);
        put(&cluster, 0, "1").await;
        cluster.stop(0);
        flip(&cluster.data_dir(0).join("member"));
        cluster.spawn(0);
        assert_eq!(cluster.wait_end(0).code(), Some(1));
        let log = cluster.log_tail(0);
        assert!(log.contains("0000000000000001.wal") && commands(&log).is_none(), "{log}");
    });
}
