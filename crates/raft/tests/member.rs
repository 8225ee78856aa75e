//! One member through its public door: first start, proposals, reads, restarts, refusals. Real
//! files, real consensus, no network. Nothing here depends on how fast the machine is.

use std::collections::HashSet;
use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use kelson_api::Error;
use kelson_api::command::{MemberPublish, command::Op};
use kelson_api::etcdserverpb::{PutRequest, RangeRequest};
use kelson_raft::{Node, NodeConfig, StartError};
use kelson_storage::{Outcome, Reader, Reply};

fn config(dir: &Path) -> NodeConfig {
    NodeConfig::with_defaults(dir.join("data"))
}

fn put(key: &str, value: impl Into<Bytes>) -> Op {
    let key = Bytes::copy_from_slice(key.as_bytes());
    Op::Put(PutRequest { key, value: value.into(), ..PutRequest::default() })
}

fn get(reader: &Reader, key: &str) -> Option<Bytes> {
    let request =
        RangeRequest { key: Bytes::copy_from_slice(key.as_bytes()), ..RangeRequest::default() };
    let (response, _) = reader.range(&request).expect("reads the newest revision");
    response.kvs.into_iter().next().map(|kv| kv.value)
}

fn revision_of(outcome: Result<Outcome, Error>) -> i64 {
    let outcome = outcome.expect("proposed");
    assert!(matches!(outcome.result, Ok(Reply::Put(_))), "{outcome:?}");
    outcome.revision
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bootstrap_propose_read_restart() {
    let dir = tempfile::tempdir().expect("make a directory");
    let (node, reader) = Node::start(config(dir.path())).await.expect("first start");
    let first = node.status();
    assert!(first.is_leader && !first.is_learner);
    assert_eq!(first.leader, Some(first.member_id));
    assert_eq!(format!("{:x}", first.member_id), "8e9e05c52164694d");
    assert_eq!(format!("{:x}", first.cluster_id), "cdf818194e3a8c32");
    let members = reader.members();
    assert_eq!(members.len(), 1);
    assert_eq!((members[0].id, &members[0].name[..]), (first.member_id, "default"));
    assert_eq!(members[0].peer_ur_ls, ["http://localhost:2380"]);

    assert_eq!(revision_of(node.propose(put("a", "1")).await), 2);
    assert_eq!(revision_of(node.propose_urgent(put("b", "2")).await), 3);
    let barrier = node.read_barrier().await.expect("the only voter is a quorum");
    assert!(barrier >= node.status().committed_index);
    assert_eq!(get(&reader, "a").as_deref(), Some(&b"1"[..]));
    let before = node.status();
    assert_eq!(before.applied_index, before.last_index);
    drop(reader);
    node.shutdown().await;

    // Flags of the first start do not count any more.
    let later = NodeConfig {
        name: "other".into(),
        initial_cluster: vec![("other".into(), vec!["http://other:1".into()])],
        initial_cluster_token: "other".into(),
        initial_state_existing: true,
        ..config(dir.path())
    };
    let (node, reader) = Node::start(later).await.expect("restart");
    let after = node.status();
    assert_eq!((after.cluster_id, after.member_id), (before.cluster_id, before.member_id));
    assert!(after.is_leader && after.term > before.term);
    assert!(after.applied_index > before.applied_index, "a leader begins with an entry");
    assert_eq!(get(&reader, "a").as_deref(), Some(&b"1"[..]));
    assert_eq!(get(&reader, "b").as_deref(), Some(&b"2"[..]));
    assert_eq!(reader.members().len(), 1);
    assert_eq!(revision_of(node.propose(put("c", "3")).await), 4);
    node.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_thousand_callers_get_their_own_results() {
    let dir = tempfile::tempdir().expect("make a directory");
    let (node, reader) = Node::start(config(dir.path())).await.expect("first start");
    let before = node.status().last_index;
    let callers = 10_000;
    let mut tasks = Vec::new();
    for i in 0..callers {
        let node = node.clone();
        tasks.push(tokio::spawn(async move {
            let revision = revision_of(node.propose(put(&format!("key{i}"), i.to_string())).await);
            (i, revision)
        }));
    }
    let mut revisions = HashSet::new();
    for task in tasks {
        let (i, revision) = task.await.expect("no caller panics");
        assert!(revisions.insert(revision), "two callers were told revision {revision}");
        let key = Bytes::from(format!("key{i}"));
        let request = RangeRequest { key, ..RangeRequest::default() };
        let (response, _) = reader.range(&request).expect("reads the newest revision");
        assert_eq!(response.kvs[0].mod_revision, revision, "key{i} got somebody else's result");
        assert_eq!(response.kvs[0].value, i.to_string());
    }
    assert_eq!(reader.revision(), 1 + callers);
    let entries = node.status().last_index - before;
    assert!(entries < callers as u64, "{entries} entries: nothing was put together");
    node.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_caller_keeps_its_order() {
    let dir = tempfile::tempdir().expect("make a directory");
    let (node, reader) = Node::start(config(dir.path())).await.expect("first start");
    for i in 0..200 {
        assert_eq!(revision_of(node.propose(put("key", i.to_string())).await), i + 2);
        assert_eq!(get(&reader, "key"), Some(i.to_string().into()), "applied before answered");
    }
    node.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dropped_callers_disturb_nobody() {
    let dir = tempfile::tempdir().expect("make a directory");
    let (node, reader) = Node::start(config(dir.path())).await.expect("first start");
    let mut tasks = Vec::new();
    for i in 0..2_000 {
        let node = node.clone();
        tasks.push(tokio::spawn(async move {
            node.propose(put(&format!("key{i}"), "v")).await.expect("proposed")
        }));
    }
    let (left, stayed): (Vec<_>, Vec<_>) =
        tasks.into_iter().enumerate().partition(|(i, _)| i % 2 == 0);
    for (_, task) in &left {
        task.abort();
    }
    for (i, task) in stayed {
        task.await.expect("its neighbors left, not it");
        assert!(get(&reader, &format!("key{i}")).is_some());
    }
    // Everything handed out is accounted for: the member goes on as before.
    let revision = revision_of(node.propose(put("last", "v")).await);
    assert_eq!(revision, reader.revision());
    node.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn too_large_is_refused_and_not_proposed() {
    let dir = tempfile::tempdir().expect("make a directory");
    let small = NodeConfig { max_request_bytes: 1000, ..config(dir.path()) };
    let (node, reader) = Node::start(small).await.expect("first start");
    let before = node.status().last_index;
    let error = node.propose(put("k", vec![0; 1000])).await.expect_err("too large with its key");
    assert_eq!(error, Error::RequestTooLarge);
    assert_eq!(node.status().last_index, before);
    assert_eq!(get(&reader, "k"), None);
    let counters = node.counters();
    assert_eq!((counters.proposals_failed, counters.proposals_pending), (1, 0));
    revision_of(node.propose(put("k", vec![0; 900])).await);
    node.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stopped_member_says_so() {
    let dir = tempfile::tempdir().expect("make a directory");
    let (node, _reader) = Node::start(config(dir.path())).await.expect("first start");
    let other = node.clone();
    let mut status = node.watch_status();
    node.shutdown().await;
    let error = other.propose(put("k", "v")).await.expect_err("stopped");
    assert_eq!(error, Error::Stopped);
    let gone = status.wait_for(|status| status.leader.is_none());
    tokio::time::timeout(Duration::from_secs(30), gone)
        .await
        .expect("the status follows")
        .expect("the last status stays readable");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn leadership_moves_only_to_voters() {
    let dir = tempfile::tempdir().expect("make a directory");
    let (node, _reader) = Node::start(config(dir.path())).await.expect("first start");
    let own = node.status().member_id;
    assert_eq!(node.move_leader(own).await, Ok(()));
    assert_eq!(node.move_leader(own ^ 1).await, Err(Error::BadLeaderTransferee));
    node.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn publish_is_kept() {
    let dir = tempfile::tempdir().expect("make a directory");
    let (node, reader) = Node::start(config(dir.path())).await.expect("first start");
    let publish = MemberPublish {
        id: node.status().member_id,
        name: "renamed".into(),
        client_urls: vec!["http://localhost:2379".into()],
        storage_uuid: Bytes::new(),
    };
    let outcome = node.propose(Op::MemberPublish(publish)).await.expect("proposed");
    assert!(matches!(outcome.result, Ok(Reply::Published)), "{outcome:?}");
    assert_eq!(reader.members()[0].name, "renamed");
    node.shutdown().await;
}

/// A process that is killed: its runtime and all its tasks vanish, nothing is shut down.
fn run_and_kill(dir: &Path, from: u64, to: u64) {
    let runtime = tokio::runtime::Runtime::new().expect("make a runtime");
    runtime.block_on(async {
        let (node, reader) = Node::start(config(dir)).await.expect("start");
        for i in 0..from {
            assert!(get(&reader, &format!("key{i}")).is_some(), "key{i} was acknowledged");
        }
        assert_eq!(reader.revision(), 1 + from as i64, "each command is applied once");
        for i in from..to {
            revision_of(node.propose(put(&format!("key{i}"), "v")).await);
        }
    });
    runtime.shutdown_timeout(Duration::from_secs(30));
}

#[test]
fn acknowledged_writes_survive_kills() {
    let dir = tempfile::tempdir().expect("make a directory");
    for round in 0..4 {
        run_and_kill(dir.path(), round * 100, (round + 1) * 100);
    }
}

#[tokio::test]
async fn a_wrong_first_start_writes_nothing() {
    let dir = tempfile::tempdir().expect("make a directory");
    let mut twice = config(dir.path());
    let urls = twice.advertise_peer_urls.clone();
    twice.initial_cluster.push(("second".into(), urls));
    let error = Node::start(twice).await.err().expect("the same URLs twice");
    assert!(matches!(error, StartError::SameUrls(_)), "{error}");
    // The directory is as good as new.
    let (node, _reader) = Node::start(config(dir.path())).await.expect("first start");
    node.shutdown().await;
}
