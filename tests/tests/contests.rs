//! Locks and elections in a cluster: contenders at several members wait in the order in which they
//! came, give up, lose their lease, or lose their member, and there is never more than one winner.
//! What one member answers to which call is recorded in tests/scripts/contest.

use std::time::Duration;

use election::election_client::ElectionClient;
use kelson_api::etcdserverpb as pb;
use kelson_api::v3electionpb as election;
use kelson_api::v3lockpb as lock;
use kelson_tests::cluster::{Cluster, PATIENCE};
use kelson_tests::run;
use kelson_tests::server::kelson_binary;
use lock::lock_client::LockClient;
use pb::kv_client::KvClient;
use pb::lease_client::LeaseClient;
use tokio::task::JoinHandle;
use tonic::{Code, Status};

/// How long a call that must wait is seen to wait.
const WAITS: Duration = Duration::from_millis(500);

fn three() -> Cluster {
    Cluster::start(&kelson_binary(), 3, "http", &[])
}

async fn grant(cluster: &Cluster, ttl: i64) -> i64 {
    let mut client = LeaseClient::new(cluster.channel(0));
    let request = pb::LeaseGrantRequest { ttl, id: 0 };
    client.lease_grant(request).await.expect("a lease").into_inner().id
}

type Held = Result<String, Status>;

/// Asks for the lock `n` at a member, beside the test.
fn lock(cluster: &Cluster, member: usize, lease: i64) -> JoinHandle<Held> {
    let mut client = LockClient::new(cluster.channel(member));
    let request = lock::LockRequest { name: "n".into(), lease };
    tokio::spawn(async move {
        let answer = client.lock(request).await?.into_inner();
        Ok(String::from_utf8_lossy(&answer.key).into_owned())
    })
}

async fn waits<T: std::fmt::Debug>(call: &mut JoinHandle<T>) {
    let ended = tokio::time::timeout(WAITS, call).await;
    assert!(ended.is_err(), "it does not wait: {ended:?}");
}

async fn ended<T>(call: JoinHandle<T>) -> T {
    tokio::time::timeout(PATIENCE, call).await.expect("in time").expect("no panic")
}

async fn unlock(cluster: &Cluster, member: usize, key: &str) {
    let mut client = LockClient::new(cluster.channel(member));
    let request = lock::UnlockRequest { key: key.to_owned().into() };
    client.unlock(request).await.expect("unlocked");
}

/// The keys of all contenders for `n`, oldest first.
async fn contenders(cluster: &Cluster, member: usize) -> Vec<String> {
    let mut kv = KvClient::new(cluster.channel(member));
    let request = pb::RangeRequest {
        key: "n/".into(),
        range_end: "n0".into(),
        sort_target: pb::range_request::SortTarget::Create as i32,
        sort_order: pb::range_request::SortOrder::Ascend as i32,
        ..Default::default()
    };
    let kvs = kv.range(request).await.expect("a range").into_inner().kvs;
    kvs.iter().map(|kv| String::from_utf8_lossy(&kv.key).into_owned()).collect()
}

async fn until_contenders(cluster: &Cluster, member: usize, count: usize) {
    let deadline = tokio::time::Instant::now() + PATIENCE;
    while contenders(cluster, member).await.len() != count {
        let now = tokio::time::Instant::now();
        assert!(now < deadline, "{:?}", contenders(cluster, member).await);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[test]
fn a_lock_goes_from_member_to_member_in_order() {
    run(async {
        let cluster = three();
        let mut waiting = Vec::new();
        for number in 0..6 {
            let lease = grant(&cluster, 60).await;
            waiting.push((lease, lock(&cluster, number % 3, lease)));
            until_contenders(&cluster, (number + 1) % 3, number + 1).await;
        }
        for number in 0..6 {
            let (lease, call) = waiting.remove(0);
            let key = ended(call).await.expect("the lock");
            assert_eq!(key, format!("n/{lease:x}"));
            assert_eq!(contenders(&cluster, 0).await.len(), 6 - number);
            for (_, call) in &mut waiting {
                assert!(!call.is_finished(), "two hold the lock");
            }
            unlock(&cluster, (number + 2) % 3, &key).await;
        }
        assert!(contenders(&cluster, 1).await.is_empty());
    });
}

#[test]
fn who_gives_up_or_loses_its_lease_is_out() {
    run(async {
        let cluster = three();
        let first = grant(&cluster, 60).await;
        let held = ended(lock(&cluster, 0, first)).await.expect("the lock");
        // Gives up: its key goes, those behind it still wait for the holder.
        let mut gives_up = lock(&cluster, 1, grant(&cluster, 60).await);
        until_contenders(&cluster, 1, 2).await;
        let mut behind = lock(&cluster, 2, grant(&cluster, 60).await);
        until_contenders(&cluster, 1, 3).await;
        waits(&mut gives_up).await;
        gives_up.abort();
        until_contenders(&cluster, 0, 2).await;
        waits(&mut behind).await;
        // Its lease ends: it is told so while the lock is still held.
        let lease = grant(&cluster, 60).await;
        let loses = lock(&cluster, 1, lease);
        until_contenders(&cluster, 1, 3).await;
        let mut leases = LeaseClient::new(cluster.channel(2));
        leases.lease_revoke(pb::LeaseRevokeRequest { id: lease }).await.expect("revoked");
        let status = ended(loses).await.expect_err("no lock without a lease");
        assert_eq!((status.code(), status.message()), (Code::Unknown, "mutex: session is expired"));
        waits(&mut behind).await;
        // The holder's lease ends: the next one has it.
        leases.lease_revoke(pb::LeaseRevokeRequest { id: first }).await.expect("revoked");
        let next = ended(behind).await.expect("the lock");
        assert_ne!(next, held);
        assert_eq!(contenders(&cluster, 0).await, [next]);
    });
}

#[test]
fn a_lease_that_the_server_granted_goes_with_who_gave_up() {
    run(async {
        let cluster = three();
        let held = ended(lock(&cluster, 0, grant(&cluster, 60).await)).await.expect("the lock");
        let mut leases = LeaseClient::new(cluster.channel(0));
        let mut waiting = lock(&cluster, 1, 0);
        until_contenders(&cluster, 1, 2).await;
        waits(&mut waiting).await;
        let begun = std::time::Instant::now();
        waiting.abort();
        until_contenders(&cluster, 0, 1).await;
        // By itself that lease would end after a minute.
        assert!(begun.elapsed() < Duration::from_secs(30), "it took {:?}", begun.elapsed());
        let left = leases.lease_leases(pb::LeaseLeasesRequest {}).await.expect("leases");
        assert_eq!(left.into_inner().leases.len(), 1);
        unlock(&cluster, 0, &held).await;
    });
}

#[test]
fn who_waits_at_a_member_that_stops_may_ask_another() {
    run(async {
        let mut cluster = three();
        let leader = cluster.leader().await;
        let (stopped, other) = ((leader + 1) % 3, (leader + 2) % 3);
        let held = ended(lock(&cluster, leader, grant(&cluster, 60).await)).await.expect("held");
        let lease = grant(&cluster, 60).await;
        let waiting = lock(&cluster, stopped, lease);
        until_contenders(&cluster, leader, 2).await;
        let begun = std::time::Instant::now();
        cluster.stop(stopped);
        assert!(begun.elapsed() < Duration::from_secs(6), "a waiting call holds up the end");
        let status = ended(waiting).await.expect_err("the member is gone");
        assert_eq!(status.code(), Code::Unavailable, "{status}");
        let mut again = lock(&cluster, other, lease);
        waits(&mut again).await;
        unlock(&cluster, other, &held).await;
        assert_eq!(ended(again).await.expect("the lock"), format!("n/{lease:x}"));
    });
}

#[test]
fn a_killed_member_takes_no_lock_with_it() {
    run(async {
        let mut cluster = three();
        let leader = cluster.leader().await;
        let (killed, other) = ((leader + 1) % 3, (leader + 2) % 3);
        let held = ended(lock(&cluster, killed, grant(&cluster, 60).await)).await.expect("held");
        // A short lease that nobody renews: its place is free again when it ends.
        let lost = lock(&cluster, killed, grant(&cluster, 4).await);
        until_contenders(&cluster, leader, 2).await;
        let mut waiting = lock(&cluster, other, grant(&cluster, 60).await);
        until_contenders(&cluster, leader, 3).await;
        cluster.kill(killed);
        ended(lost).await.expect_err("the member is gone");
        waits(&mut waiting).await;
        until_contenders(&cluster, leader, 2).await;
        waits(&mut waiting).await;
        unlock(&cluster, leader, &held).await;
        ended(waiting).await.expect("the lock");
    });
}

fn campaign(
    cluster: &Cluster,
    member: usize,
    lease: i64,
    value: &str,
) -> JoinHandle<Result<election::LeaderKey, Status>> {
    let mut client = ElectionClient::new(cluster.channel(member));
    let value = value.to_owned().into();
    let request = election::CampaignRequest { name: "n".into(), lease, value };
    tokio::spawn(async move {
        Ok(client.campaign(request).await?.into_inner().leader.expect("a leader"))
    })
}

#[test]
fn leaders_follow_one_another_and_are_seen_at_every_member() {
    run(async {
        let cluster = three();
        let mut observers = Vec::new();
        for member in 0..3 {
            let mut client = ElectionClient::new(cluster.channel(member));
            let request = election::LeaderRequest { name: "n".into() };
            observers.push(tokio::spawn(async move {
                let mut seen = Vec::new();
                let mut leaders = client.observe(request).await.expect("a stream").into_inner();
                while seen.len() < 4 {
                    let leader = leaders.message().await.expect("a leader").expect("a leader");
                    let value = leader.kv.expect("a pair").value;
                    seen.push(String::from_utf8_lossy(&value).into_owned());
                }
                seen
            }));
        }
        tokio::time::sleep(WAITS).await;
        let lease = grant(&cluster, 60).await;
        let first = ended(campaign(&cluster, 0, lease, "one")).await.expect("leads");
        let second = campaign(&cluster, 1, grant(&cluster, 60).await, "three");
        until_contenders(&cluster, 2, 2).await;
        let mut client = ElectionClient::new(cluster.channel(2));
        let leader = Some(first.clone());
        let request = election::ProclaimRequest { leader, value: "two".into() };
        client.proclaim(request).await.expect("proclaimed");
        let request = election::ResignRequest { leader: Some(first.clone()) };
        client.resign(request).await.expect("resigned");
        let second = ended(second).await.expect("leads");
        let old = election::ProclaimRequest { leader: Some(first), value: "no".into() };
        let status = client.proclaim(old).await.expect_err("deposed");
        assert_eq!((status.code(), status.message()), (Code::Unknown, "election: not leader"));
        let leader = Some(second);
        let request = election::ProclaimRequest { leader, value: "four".into() };
        client.proclaim(request).await.expect("proclaimed");
        for observer in observers {
            assert_eq!(ended(observer).await, ["one", "two", "three", "four"]);
        }
    });
}

/// etcd tells such a candidate that it leads, although its key is gone.
#[test]
fn nobody_leads_without_a_lease() {
    run(async {
        let cluster = three();
        let first = ended(campaign(&cluster, 0, grant(&cluster, 60).await, "one")).await;
        let lease = grant(&cluster, 60).await;
        let second = campaign(&cluster, 1, lease, "two");
        until_contenders(&cluster, 2, 2).await;
        let mut leases = LeaseClient::new(cluster.channel(2));
        leases.lease_revoke(pb::LeaseRevokeRequest { id: lease }).await.expect("revoked");
        let status = ended(second).await.expect_err("out");
        assert_eq!((status.code(), status.message()), (Code::Unknown, "election: not leader"));
        let request = election::ResignRequest { leader: Some(first.expect("leads")) };
        ElectionClient::new(cluster.channel(0)).resign(request).await.expect("resigned");
    });
}
