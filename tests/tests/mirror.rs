//! `kelson mirror` from outside: a cluster that follows another has the same revisions, versions,
//! leases and hash, whoever of the two is etcd; what cannot be followed is refused with the reason.

#![allow(clippy::unwrap_used, reason = "a test may fail loudly")]

use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use kelson_api::etcdserverpb as pb;
use kelson_tests::server::{Server, etcd_binary, kelson_binary};
use pb::kv_client::KvClient;
use pb::lease_client::LeaseClient;
use pb::maintenance_client::MaintenanceClient;
use pb::request_op::Request as Op;
use tonic::transport::Channel;

/// A lease of the source, by its id.
const LEASE: i64 = 77;
/// Another, which is revoked.
const REVOKED: i64 = 78;
/// One that ends within seconds unless somebody renews it.
const SHORT: i64 = 79;

fn channel(server: &Server) -> Channel {
    Channel::from_shared(server.endpoint()).unwrap().connect_lazy()
}

fn kv(server: &Server) -> KvClient<Channel> {
    KvClient::new(channel(server))
}

async fn put(server: &Server, key: String, lease: i64) {
    let value = format!("value of {key}").into();
    let request = pb::PutRequest { key: key.into(), value, lease, ..Default::default() };
    kv(server).put(request).await.unwrap();
}

async fn delete(server: &Server, key: &str, range_end: &str) {
    let (key, range_end) = (key.to_owned().into(), range_end.to_owned().into());
    let request = pb::DeleteRangeRequest { key, range_end, ..Default::default() };
    kv(server).delete_range(request).await.unwrap();
}

async fn grant(server: &Server, id: i64, ttl: i64) {
    let request = pb::LeaseGrantRequest { id, ttl };
    LeaseClient::new(channel(server)).lease_grant(request).await.unwrap();
}

/// Renews the short lease of the source for as long as the handle lives.
fn renew(server: &Server) -> tokio::task::JoinHandle<()> {
    let mut client = LeaseClient::new(channel(server));
    tokio::spawn(async move {
        loop {
            let request = pb::LeaseKeepAliveRequest { id: SHORT };
            let replies = client.lease_keep_alive(tokio_stream::once(request)).await.unwrap();
            let reply = replies.into_inner().message().await.unwrap().unwrap();
            assert!(reply.ttl > 0, "the source has lost the lease");
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
    })
}

async fn compact(server: &Server, revision: i64) {
    let request = pb::CompactionRequest { revision, physical: true };
    kv(server).compact(request).await.unwrap();
}

/// Hash, compaction and revision of everything.
async fn hash(server: &Server) -> (u32, i64, i64) {
    let mut client = MaintenanceClient::new(channel(server));
    let reply = client.hash_kv(pb::HashKvRequest { revision: 0 }).await.unwrap().into_inner();
    (reply.hash, reply.compact_revision, reply.header.unwrap().revision)
}

/// All kinds of changes, some of which one call of etcd makes and no single one repeats.
async fn live(server: &Server, round: usize) {
    for i in 0..200 {
        put(server, format!("{round}/{i:03}"), 0).await;
    }
    let put_op = |key: &str| pb::RequestOp {
        request: Some(Op::RequestPut(pb::PutRequest {
            key: format!("{round}/{key}").into(),
            ..Default::default()
        })),
    };
    let delete_op = |key: &str| pb::RequestOp {
        request: Some(Op::RequestDeleteRange(pb::DeleteRangeRequest {
            key: format!("{round}/{key}").into(),
            ..Default::default()
        })),
    };
    // Not in the order of keys.
    let success = vec![put_op("z"), delete_op("005"), put_op("a"), delete_op("003")];
    kv(server).txn(pb::TxnRequest { success, ..Default::default() }).await.unwrap();
    // More deletions in one revision than a transaction may have operations, with a gap and without.
    delete(server, &format!("{round}/000"), &format!("{round}/190")).await;
    grant(server, REVOKED, 500).await;
    for i in 0..150 {
        let lease = if i % 50 == 7 { 0 } else { REVOKED };
        put(server, format!("{round}/leased{i:03}"), lease).await;
    }
    let request = pb::LeaseRevokeRequest { id: REVOKED };
    LeaseClient::new(channel(server)).lease_revoke(request).await.unwrap();
}

fn mirror(source: &Server, target: &Server, more: &[&str]) -> Child {
    let mut command = Command::new(kelson_binary());
    command.args(["mirror", "--source", &source.endpoint(), "--target", &target.endpoint()]);
    command.args(more).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.spawn().unwrap()
}

/// Waits for the end, a minute at most.
fn ended(mut child: Child) -> Output {
    let until = Instant::now() + Duration::from_secs(60);
    while child.try_wait().unwrap().is_none() && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(20));
    }
    // Harmless if it has ended.
    let _ = child.kill();
    child.wait_with_output().unwrap()
}

/// The words of a mirror that ended well.
fn right(output: &Output) -> String {
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {text}", output.status);
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// The words of one that did not.
fn refused(output: &Output) -> String {
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    String::from_utf8_lossy(&output.stderr).into_owned()
}

async fn level(source: &Server, target: &Server) {
    let until = Instant::now() + Duration::from_secs(60);
    while hash(target).await.2 < hash(source).await.2 {
        assert!(Instant::now() < until, "{:?} {:?}", hash(source).await, hash(target).await);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

fn terminate(child: &Child) {
    let pid = rustix::process::Pid::from_raw(child.id().cast_signed()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
}

async fn follow(source: &Server, target: &mut Server) {
    grant(source, LEASE, 600).await;
    put(source, "held".into(), LEASE).await;
    live(source, 1).await;
    let once = ended(mirror(source, target, &["--until-caught-up"]));
    assert!(right(&once).contains("clients can move"));
    assert_eq!(hash(source).await, hash(target).await);
    let request = pb::LeaseTimeToLiveRequest { id: LEASE, keys: true };
    let lease = LeaseClient::new(channel(target)).lease_time_to_live(request).await.unwrap();
    let lease = lease.into_inner();
    assert_eq!((lease.granted_ttl, lease.keys), (600, vec!["held".into()]));
    let request = pb::LeaseTimeToLiveRequest { id: REVOKED, keys: false };
    let gone = LeaseClient::new(channel(target)).lease_time_to_live(request).await.unwrap();
    assert_eq!(gone.into_inner().ttl, -1);

    // It goes on where it stood, while the source lives, compacts, and the target dies.
    grant(source, SHORT, 3).await;
    put(source, "short".into(), SHORT).await;
    let renewing = renew(source);
    let following = mirror(source, target, &[]);
    live(source, 2).await;
    target.kill();
    live(source, 3).await;
    target.spawn();
    level(source, target).await;
    compact(source, hash(source).await.2 - 100).await;
    live(source, 4).await;
    // Nobody but the mirror renews it in the target.
    tokio::time::sleep(Duration::from_secs(6)).await;
    level(source, target).await;
    terminate(&following);
    assert!(right(&ended(following)).contains("clients can move"));
    assert_eq!(hash(source).await, hash(target).await);
    let request = pb::RangeRequest { key: "short".into(), ..Default::default() };
    assert_eq!(kv(target).range(request).await.unwrap().into_inner().count, 1);
    renewing.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn kelson_follows_etcd() {
    let source = Server::start(&etcd_binary(), &[]);
    let mut target = Server::start(&kelson_binary(), &[]);
    follow(&source, &mut target).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn etcd_follows_kelson() {
    let source = Server::start(&kelson_binary(), &[]);
    let mut target = Server::start(&etcd_binary(), &[]);
    follow(&source, &mut target).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_followed_is_refused() {
    let source = Server::start(&kelson_binary(), &[]);
    for i in 0..20 {
        put(&source, format!("{i}"), 0).await;
    }
    let other = Server::start(&kelson_binary(), &[]);
    put(&other, "of somebody else".into(), 0).await;
    let text = refused(&ended(mirror(&source, &other, &[])));
    assert!(text.contains("differ at revision 2"), "{text}");

    // Somebody writes to the target meanwhile.
    let target = Server::start(&kelson_binary(), &[]);
    let following = mirror(&source, &target, &[]);
    level(&source, &target).await;
    put(&target, "of somebody else".into(), 0).await;
    put(&source, "one more".into(), 0).await;
    let text = refused(&ended(following));
    assert!(text.contains("somebody else writes to the target"), "{text}");

    let empty = Server::start(&kelson_binary(), &[]);
    compact(&source, 10).await;
    let text = refused(&ended(mirror(&source, &empty, &[])));
    assert!(text.contains("restore a newer snapshot"), "{text}");

    // The source goes on when the signal comes: nobody may move.
    let late = Server::start(&kelson_binary(), &["--max-txn-ops=1".to_owned()]);
    let fresh = Server::start(&kelson_binary(), &[]);
    put(&fresh, "a".into(), 0).await;
    put(&fresh, "b".into(), 0).await;
    let success = ["a", "b"].map(|key| pb::RequestOp {
        request: Some(Op::RequestPut(pb::PutRequest { key: key.into(), ..Default::default() })),
    });
    let txn = pb::TxnRequest { success: success.to_vec(), ..Default::default() };
    kv(&fresh).txn(txn).await.unwrap();
    let text = refused(&ended(mirror(&fresh, &late, &[])));
    assert!(text.contains("larger --max-txn-ops"), "{text}");
}
