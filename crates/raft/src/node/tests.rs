//! Tests of the member as a whole that need its inside: short logs, ends that are forced.

use kelson_api::etcdserverpb::{PutRequest, RangeRequest};
use kelson_api::peer::peer_client::PeerClient;
use kelson_api::peer::{SnapshotPart, snapshot_part};
use tonic::service::Interceptor as _;

use super::*;
use crate::peers::Credentials;
use crate::snapshot;

/// A member that does not know who votes asks consensus for it, and then for its barriers; here it
/// finds that it is a quorum by itself.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn barriers_by_rounds() {
    let dir = tempfile::tempdir().expect("make a directory");
    let config = NodeConfig::with_defaults(dir.path().join("data"));
    let (node, reader) = Node::start(config).await.expect("first start");
    let progress = &node.inner.progress;
    assert!(progress.reads_are_local());
    progress.forget_membership(0);
    assert!(!progress.reads_are_local());
    let put = PutRequest { key: "key".into(), ..PutRequest::default() };
    node.propose(Op::Put(put)).await.expect("proposed").result.expect("a put");
    let waiting: Vec<_> = (0..100)
        .map(|_| {
            let node = node.clone();
            tokio::spawn(async move { node.read_barrier().await })
        })
        .collect();
    for barrier in waiting {
        let index = barrier.await.expect("no reader panics").expect("confirmed");
        assert!(index <= reader.applied().index && index >= 3, "{index}");
    }
    assert!(progress.reads_are_local());
    let other = node.clone();
    progress.forget_membership(0);
    node.shutdown().await;
    assert_eq!(other.read_barrier().await, Err(Error::Stopped));
}

/// Tells the child process of the test below where to run.
const ABORTING: &str = "KELSON_TEST_ABORTING";

/// Consensus that ends by itself takes the process with it: seen from outside, in a child.
#[test]
fn the_process_ends_with_consensus() {
    use std::os::unix::process::ExitStatusExt;
    if let Ok(dir) = std::env::var(ABORTING) {
        return end_consensus(dir.as_ref());
    }
    let dir = tempfile::tempdir().expect("make a directory");
    let program = std::env::current_exe().expect("a test knows its program");
    let child = std::process::Command::new(program)
        .args(["--exact", "node::tests::the_process_ends_with_consensus"])
        .env(ABORTING, dir.path())
        .output()
        .expect("run the child");
    assert_eq!(child.status.signal(), Some(6), "not aborted: {child:?}");
    // What was acknowledged before is there.
    let runtime = tokio::runtime::Runtime::new().expect("make a runtime");
    runtime.block_on(async {
        let config = NodeConfig::with_defaults(dir.path());
        let (node, reader) = Node::start(config).await.expect("restart");
        assert_eq!(reader.revision(), 2);
        node.shutdown().await;
    });
}

fn end_consensus(dir: &std::path::Path) {
    let runtime = tokio::runtime::Runtime::new().expect("make a runtime");
    runtime.block_on(async {
        let (node, _) = Node::start(NodeConfig::with_defaults(dir)).await.expect("start");
        let put = PutRequest { key: "key".into(), ..PutRequest::default() };
        node.propose(Op::Put(put)).await.expect("proposed").result.expect("a put");
        node.inner.raft.shutdown().await.expect("consensus ends");
        tokio::time::sleep(Duration::from_secs(60)).await;
    });
}

/// Serves a member to its peers until the test ends.
fn serve(node: &Node, listener: tokio::net::TcpListener) {
    let server = tonic::transport::Server::builder().add_routes(node.peer_routes());
    let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener);
    tokio::spawn(server.serve_with_incoming(incoming));
}

async fn bind() -> (tokio::net::TcpListener, String) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("bind");
    let url = format!("http://{}", listener.local_addr().expect("bound"));
    (listener, url)
}

/// The first member of a cluster below a directory, served to the others.
async fn found(dir: &std::path::Path, retention: Retention) -> (Node, Reader, NodeConfig) {
    let (listener, url) = bind().await;
    let config = NodeConfig {
        initial_cluster: vec![("default".into(), vec![url.clone()])],
        advertise_peer_urls: vec![url],
        ..NodeConfig::with_defaults(dir.join("a"))
    };
    let started = Node::start_with(config.clone(), retention).await;
    let (node, reader) = started.expect("first start");
    serve(&node, listener);
    (node, reader, config)
}

/// A second one that was added and is to be started and served: its id, settings and listener.
async fn invite(
    node: &Node,
    first: &NodeConfig,
    dir: &std::path::Path,
) -> (u64, NodeConfig, tokio::net::TcpListener) {
    let (listener, url) = bind().await;
    let add = MemberChange::Add { peer_urls: vec![url.clone()], is_learner: false };
    let id = node.change_members(add).await.expect("added");
    let mut cluster = first.initial_cluster.clone();
    cluster.push(("b".into(), vec![url.clone()]));
    let config = NodeConfig {
        name: "b".into(),
        initial_cluster: cluster,
        advertise_peer_urls: vec![url],
        initial_state_existing: true,
        ..NodeConfig::with_defaults(dir.join("b"))
    };
    (id, config, listener)
}

/// Keeps hardly any log: who joins later needs the whole state.
const SHORT: Retention = Retention {
    look: Duration::from_millis(20),
    keep_bytes: 1,
    keep_bytes_max: u64::MAX,
    step_entries: 10,
    catch_up_entries: 20,
};

async fn put(node: &Node, key: impl Into<bytes::Bytes>) {
    let put = PutRequest {
        key: key.into(),
        // The log is measured in marks of a megabyte.
        value: vec![0; 20_000].into(),
        ..PutRequest::default()
    };
    node.propose(Op::Put(put)).await.expect("proposed").result.expect("a put");
}

/// Writes until the first entries are no longer in the log.
async fn outgrow_the_log(node: &Node) {
    for i in 0..300 {
        put(node, format!("key{i}")).await;
    }
    until(&|| node.log().first_index() >= 100).await.expect("the log is purged");
}

async fn until(is_so: &dyn Fn() -> bool) -> Result<(), tokio::time::error::Elapsed> {
    let waiting = async {
        while !is_so() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), waiting).await
}

fn count(reader: &Reader) -> i64 {
    let request = RangeRequest {
        key: "\0".into(),
        range_end: "\0".into(),
        count_only: true,
        ..RangeRequest::default()
    };
    reader.range(&request).expect("reads the newest revision").0.count
}

/// A new member gets what the log no longer has, restarts from it, and goes on with the log.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_snapshot_brings_a_new_member() {
    let dir = tempfile::tempdir().expect("make a directory");
    let (node, reader, first) = found(dir.path(), SHORT).await;
    outgrow_the_log(&node).await;
    let (id, second, listener) = invite(&node, &first, dir.path()).await;
    let (joined, copy) = Node::start(second.clone()).await.expect("join");
    serve(&joined, listener);
    let within = Duration::from_secs(60);
    tokio::time::timeout(within, joined.ready()).await.expect("in time").expect("ready");
    assert_eq!((count(&copy), copy.revision()), (300, 301));
    assert!(joined.log().first_index() > 100, "its log begins behind the snapshot");
    until(&|| node.voters().contains(&id)).await.expect("it gets its vote");
    put(&node, "both").await;
    let hash = |reader: &Reader| reader.hash_kv(0).expect("hashes").hash;
    tokio::time::timeout(within, joined.ready()).await.expect("in time").expect("ready");
    assert_eq!(hash(&reader), hash(&copy));
    assert_eq!(copy.chain_at(copy.applied().index), reader.chain_at(copy.applied().index));
    joined.shutdown().await;

    let (again, copy) = Node::start(second).await.expect("restart");
    assert_eq!(count(&copy), 301);
    again.shutdown().await;
    node.shutdown().await;
}

/// A sender that loses its power says no more: what it began must not keep out the next leader's state.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_newer_transfer_ends_the_one_before() {
    let dir = tempfile::tempdir().expect("make a directory");
    let (node, _, first) = found(dir.path(), SHORT).await;
    outgrow_the_log(&node).await;
    let (id, second, listener) = invite(&node, &first, dir.path()).await;
    let (joined, copy) = Node::start(second).await.expect("join");
    let (side, side_url) = bind().await;
    serve(&joined, side);

    // The first one, by another way than the members', stops for ever after its first chunk.
    let mut state = node.reader().transfer().expect("a state to send");
    let vote = Vote::new_committed(node.status().term, node.inner.member_id);
    let (mut parts, stream) = futures::channel::mpsc::channel(2);
    let chunk = state.next_chunk().expect("readable").expect("not empty");
    for part in [
        snapshot::header(&state, &vote).expect("a header"),
        SnapshotPart { part: Some(snapshot_part::Part::Chunk(chunk)) },
    ] {
        parts.try_send(part).expect("there is room");
    }
    let endpoint = tonic::transport::Endpoint::from_shared(side_url).expect("a URL");
    let credentials = Credentials::new(node.inner.identity, node.inner.storage_uuid, id);
    let mut client = PeerClient::with_interceptor(endpoint.connect_lazy(), credentials);
    let stalled = tokio::spawn(async move { client.snapshot(stream).await });
    let state_dir = dir.path().join("b/member/state");
    let generations = || {
        let names = std::fs::read_dir(&state_dir).expect("a state");
        names.filter(|name| name.as_ref().is_ok_and(|name| name.path().is_dir())).count()
    };
    until(&|| generations() == 2).await.expect("files of the first transfer");

    serve(&joined, listener);
    // Far less than a transfer may be silent.
    let within = Duration::from_secs(10);
    tokio::time::timeout(within, joined.ready()).await.expect("in time").expect("ready");
    assert_eq!(count(&copy), 300);
    let refusal = stalled.await.expect("no panic").expect_err("it has ended");
    assert_eq!(refusal.code(), tonic::Code::Aborted, "{refusal}");
    drop(parts);
    joined.shutdown().await;
    node.shutdown().await;
}

/// A removal takes two entries. Whoever asked for it goes away between them, as a leader that dies does.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_removal_that_was_left_half_done_is_finished() {
    let dir = tempfile::tempdir().expect("make a directory");
    let (node, reader, first) = found(dir.path(), Retention::keeping(5_000)).await;
    let (id, second, listener) = invite(&node, &first, dir.path()).await;
    let (joined, _) = Node::start(second).await.expect("join");
    serve(&joined, listener);
    until(&|| node.voters().contains(&id)).await.expect("it gets its vote");
    until(&|| node.inner.members.halfway().is_none()).await.expect("the vote is in force");

    let (_, request) = MemberChange::Remove(id).request();
    let mut changing = Box::pin(node.inner.members.change(request));
    while node.inner.members.halfway().is_none() {
        let step = tokio::time::timeout(Duration::ZERO, &mut changing).await;
        assert!(step.is_err(), "it was done before it could be left");
        tokio::task::yield_now().await;
    }
    drop(changing);

    until(&|| reader.members().iter().all(|row| row.id != id)).await.expect("its row goes");
    assert!(reader.removed_members().contains(&id));
    assert_eq!(node.voters(), [node.inner.member_id]);
    joined.shutdown().await;
    node.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_farewell_is_believed_of_members_only() {
    let dir = tempfile::tempdir().expect("make a directory");
    let (node, _, first) = found(dir.path(), Retention::keeping(5_000)).await;
    let (id, second, listener) = invite(&node, &first, dir.path()).await;
    let (joined, _) = Node::start(second).await.expect("join");
    serve(&joined, listener);

    let own = node.inner.identity;
    let farewell = |from: Identity| {
        let mut credentials = Credentials::new(from, node.inner.storage_uuid, id);
        let named = credentials.call(tonic::Request::new(())).expect("never refuses");
        let mut metadata = Node::farewell(()).metadata().clone().into_headers();
        metadata.extend(named.metadata().clone().into_headers());
        joined.check_peer(&MetadataMap::from_headers(metadata))
    };
    let elsewhere = Identity { cluster_id: own.cluster_id + 1, ..own };
    assert!(farewell(elsewhere).is_err(), "of another cluster");
    assert!(!*joined.removed().borrow(), "nobody who may say so has said it");
    assert_eq!(farewell(own).ok(), Some(own.member_id));
    assert!(*joined.removed().borrow());
    joined.shutdown().await;
    node.shutdown().await;
}

/// Each checkpoint covers more than the snapshot that waited for it: what may go must not be waited for
/// until writes pause.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_log_is_purged_while_writes_go_on() {
    let dir = tempfile::tempdir().expect("make a directory");
    let (node, _, _) = found(dir.path(), SHORT).await;
    let writing = async {
        loop {
            put(&node, "key").await;
        }
    };
    let is_purged = || node.log().first_index() >= 1_000;
    tokio::select! {
        purged = until(&is_purged) => purged.expect("writes never pause"),
        () = writing => {}
    }
    node.shutdown().await;
}

/// The log behind a transfer stays from the time at which it is asked for, not from its begin: else each
/// transfer would be followed by another one for as long as writes go on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transfer_that_waited_is_followed_by_the_log() {
    let dir = tempfile::tempdir().expect("make a directory");
    // Slow members keep nothing.
    let retention = Retention { look: SHORT.look, ..Retention::keeping(20) };
    let (node, _, first) = found(dir.path(), retention).await;
    outgrow_the_log(&node).await;
    let (id, second, listener) = invite(&node, &first, dir.path()).await;
    let transfers = &node.inner.transfers;
    let room = transfers.fill_the_room().await;
    let (joined, copy) = Node::start(second).await.expect("join");
    serve(&joined, listener);
    until(&|| transfers.needed_from().is_some()).await.expect("it is to get the state");
    let asked = transfers.needed_from().expect("it waits");
    for _ in 0..200 {
        put(&node, "key").await;
    }
    let is_durable = || node.reader().durable_applied().borrow().index >= asked + 200;
    until(&is_durable).await.expect("all that could go is in a checkpoint");
    // Time for many looks at the log.
    tokio::time::sleep(Duration::from_secs(1)).await;
    drop(room);

    until(&|| node.voters().contains(&id)).await.expect("it gets its vote");
    put(&node, "both").await;
    let is_level = || copy.applied() == node.reader().applied();
    until(&is_level).await.expect("it has all the log");
    let counters = node.inner.peers.take_counters();
    let sent: u64 = counters.iter().map(|(_, counters)| counters.snapshots_sent).sum();
    assert_eq!(sent, 1, "the log was there for the rest");
    joined.shutdown().await;
    node.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_purged_log_restarts() {
    let dir = tempfile::tempdir().expect("make a directory");
    let config = NodeConfig::with_defaults(dir.path().join("data"));
    let (node, _) = Node::start_with(config.clone(), SHORT).await.expect("first start");
    outgrow_the_log(&node).await;
    let kept = node.log().last_id().index - node.log().first_index();
    assert!(kept >= 20, "{kept} entries are kept for slow members");
    node.shutdown().await;

    let (node, reader) = Node::start(config).await.expect("restart");
    assert!(node.inner.progress.reads_are_local());
    for i in 0..300 {
        let key = format!("key{i}").into();
        let request = RangeRequest { key, count_only: true, ..RangeRequest::default() };
        let (response, _) = reader.range(&request).expect("reads the newest revision");
        assert_eq!(response.count, 1, "key{i}");
    }
    node.shutdown().await;
}
