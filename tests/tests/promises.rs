//! One promise of a cluster each, put to the test by one short and certain scenario instead of chance:
//! a lone member, a forgotten vote, a leader that stands still, a state sent from member to member.
//! `KELSON_BIN` names another binary.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use kelson_api::etcdserverpb as pb;
use kelson_tests::cluster::{Cluster, PATIENCE};
use kelson_tests::run;
use kelson_tests::server::{Server, http_get, kelson_binary};
use kelson_tests::watch::{Watcher, Written, judge};
use pb::cluster_client::ClusterClient;
use pb::kv_client::KvClient;
use pb::lease_client::LeaseClient;
use pb::maintenance_client::MaintenanceClient;
use pb::watch_client::WatchClient;
use tonic::transport::Channel;
use tonic::{Request, Status};

/// Little log: a member that was away for some seconds needs the state itself.
const LITTLE_LOG: [&str; 2] = ["--snapshot-count=100", "--snapshot-catchup-entries=50"];

fn three(flags: &[&str]) -> Cluster {
    let flags: Vec<String> = flags.iter().map(|flag| (*flag).to_owned()).collect();
    Cluster::start(&kelson_binary(), 3, "http", &flags)
}

fn put_of(key: &str, value: &str, lease: i64) -> pb::PutRequest {
    let (key, value) = (key.to_owned().into(), value.to_owned().into());
    pb::PutRequest { key, value, lease, ..Default::default() }
}

fn range_of(key: &str) -> pb::RangeRequest {
    pb::RangeRequest { key: key.to_owned().into(), ..Default::default() }
}

async fn put(cluster: &Cluster, member: usize, key: &str, value: &str) -> i64 {
    let mut kv = KvClient::new(cluster.channel(member));
    let answer = kv.put(put_of(key, value, 0)).await.expect("a put").into_inner();
    answer.header.expect("a header").revision
}

async fn get(cluster: &Cluster, member: usize, key: &str) -> Option<kelson_api::mvccpb::KeyValue> {
    let mut kv = KvClient::new(cluster.channel(member));
    kv.range(range_of(key)).await.expect("a range").into_inner().kvs.pop()
}

/// Waits until all members have the same hash at the same revision.
async fn all_equal(cluster: &Cluster) {
    let deadline = Instant::now() + PATIENCE / 3;
    loop {
        let mut hashes = Vec::new();
        for member in 0..3 {
            let mut client = MaintenanceClient::new(cluster.channel(member));
            let hash = client.hash_kv(pb::HashKvRequest { revision: 0 }).await;
            let hash = hash.expect("a hash").into_inner();
            hashes.push((hash.hash_revision, hash.hash));
        }
        if hashes.windows(2).all(|pair| pair[0] == pair[1]) {
            return;
        }
        assert!(Instant::now() < deadline, "the members differ: {hashes:?}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

async fn term(cluster: &Cluster, member: usize) -> u64 {
    let mut client = MaintenanceClient::new(cluster.channel(member));
    client.status(pb::StatusRequest {}).await.expect("a status").into_inner().raft_term
}

/// The term of a member that has no leader, and serves no calls for that reason.
fn term_alone(cluster: &Cluster, member: usize) -> Option<u64> {
    let (_, text) = http_get(cluster.client_port(member), "/debug/vars")?;
    let (_, rest) = text.split_once("\"term\":")?;
    let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
    digits.parse().ok()
}

async fn move_leader(cluster: &Cluster, from: usize, to: usize) {
    let target_id = cluster.id(to).await;
    let mut client = MaintenanceClient::new(cluster.channel(from));
    client.move_leader(pb::MoveLeaderRequest { target_id }).await.expect("moved");
}

/// Opens a watch stream that requires a leader, as kube-apiserver does.
async fn open_watch(channel: &Channel) -> Result<(), Status> {
    let mut request = Request::new(tokio_stream::pending::<pb::WatchRequest>());
    request.metadata_mut().insert("hasleader", "true".parse().expect("ASCII"));
    WatchClient::new(channel.clone()).watch(request).await.map(drop)
}

/// What a member without company says must not count as agreed.
async fn nothing_is_agreed(cluster: &Cluster, member: usize) {
    let within = Duration::from_secs(3);
    let mut kv = KvClient::new(cluster.channel(member));
    let read = tokio::time::timeout(within, kv.range(range_of("a"))).await;
    assert!(!matches!(read, Ok(Ok(_))), "member {member} alone answered {read:?}");
    let write = tokio::time::timeout(within, kv.put(put_of("b", "2", 0))).await;
    assert!(!matches!(write, Ok(Ok(_))), "member {member} alone acknowledged {write:?}");
    let local = pb::RangeRequest { serializable: true, ..range_of("a") };
    let local = tokio::time::timeout(within, kv.range(local)).await.expect("an answer");
    assert_eq!(local.expect("a local read").into_inner().count, 1);
}

#[test]
fn a_lone_member_answers_no_read_and_acknowledges_no_write() {
    run(async {
        let mut cluster = three(&[]);
        let leader = cluster.leader().await;
        let (second, third) = ((leader + 1) % 3, (leader + 2) % 3);
        put(&cluster, second, "a", "1").await;
        assert!(get(&cluster, leader, "a").await.is_some());
        cluster.kill(second);
        cluster.kill(third);
        nothing_is_agreed(&cluster, leader).await;
        cluster.spawn(second);
        cluster.wait_ready(second);
        cluster.wait_ready(leader);
        // Calls are served a moment later than health is: the member first tells the others its name.
        assert!(get(&cluster, second, "a").await.is_some());
        let leader = cluster.leader().await;
        let follower = if leader == second { (second + 2) % 3 } else { second };
        cluster.kill(leader);
        nothing_is_agreed(&cluster, follower).await;
    });
}

#[test]
fn a_vote_survives_the_end_of_the_process() {
    run(async {
        let mut cluster = three(&[]);
        for _ in 0..3 {
            let leader = cluster.leader().await;
            move_leader(&cluster, leader, (leader + 1) % 3).await;
            assert_eq!(cluster.leader().await, (leader + 1) % 3);
        }
        put(&cluster, 0, "a", "1").await;
        let mut before = Vec::new();
        for member in 0..3 {
            before.push(term(&cluster, member).await);
        }
        (0..3).for_each(|member| cluster.kill(member));
        // Alone, so that nobody can tell it what it has forgotten.
        for (member, before) in before.into_iter().enumerate() {
            cluster.spawn(member);
            cluster.try_wait_for(member, "/version").unwrap_or_else(|log| panic!("{log}"));
            let deadline = Instant::now() + PATIENCE / 6;
            let after = loop {
                if let Some(term) = term_alone(&cluster, member) {
                    break term;
                }
                assert!(Instant::now() < deadline, "no term: {}", cluster.log_tail(member));
                tokio::time::sleep(Duration::from_millis(20)).await;
            };
            assert!(after >= before, "member {member} went back from term {before} to {after}");
            cluster.kill(member);
        }
    });
}

#[test]
fn a_leader_that_stands_still_gets_a_write_once() {
    run(async {
        let cluster = three(&[]);
        for round in 0..3 {
            let leader = cluster.leader().await;
            let key = format!("once/{round}");
            put(&cluster, (leader + 1) % 3, "warm", "1").await;
            // Shorter than an election takes, longer than any usual answer.
            cluster.pause(leader);
            let mut kv = KvClient::new(cluster.channel((leader + 1) % 3));
            let writing = tokio::spawn(async move { kv.put(put_of(&key, "1", 0)).await.is_ok() });
            tokio::time::sleep(Duration::from_millis(600)).await;
            cluster.resume(leader);
            let is_written = writing.await.expect("no panic");
            tokio::time::sleep(Duration::from_millis(300)).await;
            let found = get(&cluster, leader, &format!("once/{round}")).await;
            let version = found.map_or(0, |kv| kv.version);
            assert!(version <= 1, "one put made version {version}");
            assert!(version == 1 || !is_written, "an acknowledged put is missing");
        }
    });
}

#[test]
fn a_lease_ends_in_time_whoever_leads() {
    run(async {
        let mut cluster = three(&[]);
        let leader = cluster.leader().await;
        let other = (leader + 1) % 3;
        let mut leases = LeaseClient::new(cluster.channel(other));
        let ttl = 4;
        leases.lease_grant(pb::LeaseGrantRequest { id: 7, ttl }).await.expect("granted");
        let granted = Instant::now();
        let mut kv = KvClient::new(cluster.channel(other));
        kv.put(put_of("leased", "1", 7)).await.expect("a put");
        cluster.kill(leader);
        cluster.leader().await;
        // A new leader gives the whole time again; twice that and half a minute are enough
        // on any machine.
        let limit = Duration::from_secs(2 * ttl as u64 + 30);
        loop {
            // Before the question: what is gone at the answer may have gone after it.
            let age = granted.elapsed();
            let Ok(Ok(answer)) =
                tokio::time::timeout(Duration::from_secs(3), kv.range(range_of("leased"))).await
            else {
                continue;
            };
            if answer.into_inner().kvs.is_empty() {
                let age = granted.elapsed();
                assert!(age >= Duration::from_secs(ttl as u64), "it ended after {age:?}");
                break;
            }
            assert!(age < limit, "the lease still lives after {age:?}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    });
}

#[test]
fn a_learner_that_lacks_the_log_gets_no_vote() {
    run(async {
        let mut cluster = three(&[]);
        put(&cluster, 0, "a", "1").await;
        let newcomer = cluster.reserve();
        let peer_ur_ls = vec![cluster.peer_url(newcomer)];
        let mut client = ClusterClient::new(cluster.channel(0));
        let deadline = Instant::now() + PATIENCE;
        let id = loop {
            let add = pb::MemberAddRequest { peer_ur_ls: peer_ur_ls.clone(), is_learner: true };
            match client.member_add(add).await {
                Ok(added) => break added.into_inner().member.expect("the new member").id,
                Err(status) => assert!(Instant::now() < deadline, "{status}"),
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        };
        let promoted = client.member_promote(pb::MemberPromoteRequest { id }).await;
        let refusal = promoted.expect_err("it has not even been started");
        let text = "etcdserver: can only promote a learner member which is in sync with leader";
        assert_eq!(refusal.message(), text);
        put(&cluster, 1, "a", "2").await;
    });
}

#[test]
fn a_majority_goes_on_within_seconds_without_the_leader() {
    run(async {
        let mut cluster = three(&[]);
        let leader = cluster.leader().await;
        let survivor = (leader + 1) % 3;
        put(&cluster, survivor, "a", "1").await;
        cluster.kill(leader);
        let begun = Instant::now();
        let mut kv = KvClient::new(cluster.channel(survivor));
        // One to two election timeouts of a second; the rest is for busy machines.
        let limit = Duration::from_secs(11);
        loop {
            let write = kv.put(put_of("a", "2", 0));
            if matches!(tokio::time::timeout(Duration::from_secs(1), write).await, Ok(Ok(_))) {
                break;
            }
            assert!(begun.elapsed() < limit, "no write for {limit:?} after the leader died");
        }
        println!("writes again after {:?}", begun.elapsed());
    });
}

#[test]
fn a_member_that_was_away_serves_again_within_seconds() {
    run(async {
        let mut cluster = three(&[]);
        let leader = cluster.leader().await;
        let away = (leader + 1) % 3;
        put(&cluster, away, "a", "0").await;
        cluster.stop(away);
        // Long enough for the leader to have noticed.
        for number in 0..20 {
            put(&cluster, leader, "a", &number.to_string()).await;
            tokio::time::sleep(Duration::from_millis(150)).await;
        }
        cluster.spawn(away);
        let begun = Instant::now();
        let limit = Duration::from_secs(30);
        let mut kv = KvClient::new(cluster.channel(away));
        loop {
            let read = tokio::time::timeout(Duration::from_secs(1), kv.range(range_of("a"))).await;
            if let Ok(Ok(answer)) = read {
                assert_eq!(answer.into_inner().kvs[0].value.as_ref(), b"19");
                break;
            }
            assert!(begun.elapsed() < limit, "no read for {limit:?}: {}", cluster.log_tail(away));
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        println!("reads again after {:?}", begun.elapsed());
    });
}

/// Writes, not through `away`, until the log of the next entry that a paused member can still get is
/// gone everywhere else. What was sent to it waits in buffers, of the network and of the stream (some
/// 10 MB): it must lack more than those hold.
async fn outrun(cluster: &Cluster, away: usize, written: &mut Written) {
    let others: Vec<usize> = (0..3).filter(|other| *other != away).collect();
    let mut client = MaintenanceClient::new(cluster.channel(others[0]));
    let before = client.status(pb::StatusRequest {}).await.expect("a status").into_inner();
    let buffered = 80;
    let deadline = Instant::now() + PATIENCE;
    for number in 0.. {
        let value = format!("{number}.{}", "v".repeat(250_000));
        let key = format!("key/{}", number % 40);
        let revision = put(cluster, others[0], &key, &value).await;
        written.insert(revision, vec![(key, Some(value))]);
        let gone = |member| purged(cluster, member) > before.raft_applied_index + buffered;
        if number % 40 == 39 && others.iter().all(|other| gone(*other)) {
            return;
        }
        assert!(Instant::now() < deadline, "the log is never cut");
        if number > 160 {
            // All that is needed is there; checkpoints and cuts take their time.
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
}

/// The last entry that a member has thrown away.
fn purged(cluster: &Cluster, member: usize) -> u64 {
    let mut log = std::process::Command::new(kelson_binary());
    log.args(["log", "--json"]).arg(cluster.data_dir(member));
    let output = log.output().expect("kelson log").stdout;
    let output = String::from_utf8_lossy(&output);
    let purges = output.lines().filter(|line| line.contains("\"kind\":\"purged\""));
    let index =
        |line: &str| serde_json::from_str::<serde_json::Value>(line).ok()?["index"].as_u64();
    purges.filter_map(index).max().unwrap_or(0)
}

fn received(cluster: &Cluster, member: usize) -> usize {
    logged(cluster, member, "installed a received state")
}

#[test]
fn watches_and_leases_go_through_a_state_transfer() {
    run(async {
        let cluster = three(&LITTLE_LOG);
        let leader = cluster.leader().await;
        let away = (leader + 1) % 3;
        let mut written = Written::new();
        written.insert(
            put(&cluster, away, "key/0", "0").await,
            vec![("key/0".into(), Some("0".into()))],
        );
        let mut watcher = Watcher::open(&cluster.channel(away), 1).await;
        let first = watcher.until(2, PATIENCE).await.expect("the first event");
        cluster.pause(away);
        let mut leases = LeaseClient::new(cluster.channel(leader));
        leases.lease_grant(pb::LeaseGrantRequest { id: 7, ttl: 600 }).await.expect("granted");
        let mut kv = KvClient::new(cluster.channel(leader));
        let leased = kv.put(put_of("leased", "1", 7)).await.expect("a put").into_inner();
        outrun(&cluster, away, &mut written).await;
        cluster.resume(away);
        let deadline = Instant::now() + PATIENCE;
        while received(&cluster, away) == 0 {
            assert!(Instant::now() < deadline, "no state was sent: {}", cluster.log_tail(away));
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let leased = leased.header.expect("a header").revision;
        let revoked = leases.lease_revoke(pb::LeaseRevokeRequest { id: 7 }).await;
        let revoked = revoked.expect("revoked").into_inner().header.expect("a header").revision;
        all_equal(&cluster).await;
        let last = put(&cluster, away, "last", "1").await;
        let mut seen = watcher.until(last, PATIENCE / 3).await.expect("the watch goes on");
        seen.splice(0..0, first);
        // The judge knows of no leases.
        for kv in seen.iter_mut().flat_map(|it| &mut it.events).filter_map(|it| it.kv.as_mut()) {
            kv.lease = 0;
        }
        for kv in seen.iter_mut().flat_map(|it| &mut it.events).filter_map(|it| it.prev_kv.as_mut())
        {
            kv.lease = 0;
        }
        written.insert(leased, vec![("leased".into(), Some("1".into()))]);
        written.insert(revoked, vec![("leased".into(), None)]);
        written.insert(last, vec![("last".into(), Some("1".into()))]);
        judge(&seen, &written, 1).expect("the watch that went through the transfer");
    });
}

#[test]
fn a_member_killed_while_it_receives_a_state_comes_back() {
    run(async {
        let mut cluster = three(&LITTLE_LOG);
        let leader = cluster.leader().await;
        let away = (leader + 1) % 3;
        let value = "v".repeat(100_000);
        for number in 0..40 {
            put(&cluster, leader, &format!("large/{number}"), &value).await;
        }
        let mut written = Written::new();
        let mut kills = 0;
        for round in 0..3_u64 {
            cluster.pause(away);
            outrun(&cluster, away, &mut written).await;
            let (begun, before) =
                (logged(&cluster, away, "receiving database snapshot"), received(&cluster, away));
            cluster.resume(away);
            let deadline = Instant::now() + PATIENCE;
            while logged(&cluster, away, "receiving database snapshot") == begun {
                assert!(Instant::now() < deadline, "no state came: {}", cluster.log_tail(away));
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            tokio::time::sleep(Duration::from_millis(100 * round)).await;
            cluster.kill(away);
            kills += usize::from(received(&cluster, away) == before);
            cluster.spawn(away);
            cluster.try_ready(away).unwrap_or_else(|log| panic!("round {round}: {log}"));
            all_equal(&cluster).await;
            // What a round wrote needs not come along in the next: a busy machine takes long for it.
            let revision = put(&cluster, leader, "round", &round.to_string()).await;
            let request = pb::CompactionRequest { revision, physical: true };
            let mut kv = KvClient::new(cluster.channel(leader));
            kv.compact(request).await.expect("a compaction");
        }
        println!("{kills} kills before the state was in force");
        assert!(kills > 0, "the states were in force before the kills: nothing was tested");
    });
}

fn logged(cluster: &Cluster, member: usize, text: &str) -> usize {
    let log = std::fs::read_to_string(cluster.log_path(member)).expect("a log");
    log.lines().filter(|line| line.contains(text)).count()
}

#[test]
fn members_that_were_told_the_same_hold_the_same() {
    run(async {
        let cluster = three(&[]);
        for number in 0..30 {
            put(&cluster, number % 3, &format!("{}", number % 7), &number.to_string()).await;
        }
        all_equal(&cluster).await;
    });
}

/// Takes the lock if nobody has it; returns the create revision of its key.
async fn lock(kv: &mut KvClient<tonic::transport::Channel>, owner: &str, lease: i64) -> i64 {
    let put = pb::request_op::Request::RequestPut(put_of("lock", owner, lease));
    let txn = pb::TxnRequest {
        compare: vec![created_at("lock", 0)],
        success: vec![pb::RequestOp { request: Some(put) }],
        ..Default::default()
    };
    let answer = kv.txn(txn).await.expect("a txn").into_inner();
    assert!(answer.succeeded, "{owner} does not get a lock that nobody has");
    answer.header.expect("a header").revision
}

fn created_at(key: &str, revision: i64) -> pb::Compare {
    pb::Compare {
        key: key.to_owned().into(),
        target: pb::compare::CompareTarget::Create.into(),
        result: pb::compare::CompareResult::Equal.into(),
        target_union: Some(pb::compare::TargetUnion::CreateRevision(revision)),
        ..Default::default()
    }
}

/// Writes on behalf of whoever got the lock at this revision; returns whether it was let.
async fn fenced(kv: &mut KvClient<tonic::transport::Channel>, token: i64, value: &str) -> bool {
    let put = pb::request_op::Request::RequestPut(put_of("data", value, 0));
    let txn = pb::TxnRequest {
        compare: vec![created_at("lock", token)],
        success: vec![pb::RequestOp { request: Some(put) }],
        ..Default::default()
    };
    kv.txn(txn).await.expect("a txn").into_inner().succeeded
}

#[test]
fn a_former_holder_of_a_lock_is_fenced_off() {
    run(async {
        let server = Server::start(&kelson_binary(), &[]);
        let channel = tonic::transport::Channel::from_shared(server.endpoint()).expect("a URL");
        let channel = channel.connect_lazy();
        let (mut kv, mut leases) = (KvClient::new(channel.clone()), LeaseClient::new(channel));
        for id in [1, 2] {
            leases.lease_grant(pb::LeaseGrantRequest { id, ttl: 60 }).await.expect("granted");
        }
        let first = lock(&mut kv, "first", 1).await;
        assert!(fenced(&mut kv, first, "by the first").await);
        leases.lease_revoke(pb::LeaseRevokeRequest { id: 1 }).await.expect("revoked");
        assert!(!fenced(&mut kv, first, "by nobody").await, "written without a lock");
        let second = lock(&mut kv, "second", 2).await;
        assert!(!fenced(&mut kv, first, "by the former").await, "a former holder has written");
        assert!(fenced(&mut kv, second, "by the second").await);
    });
}

#[test]
fn no_watch_is_refused_while_leadership_moves() {
    run(async {
        let mut cluster = three(&[]);
        let mut leader = cluster.leader().await;
        let third = (leader + 2) % 3;
        let (opened, ended) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
        let mut openers = Vec::new();
        for _ in 0..8 {
            let channel = cluster.channel(third);
            let (opened, ended) = (Arc::clone(&opened), Arc::clone(&ended));
            openers.push(tokio::spawn(async move {
                while !ended.load(Ordering::Relaxed) {
                    open_watch(&channel).await?;
                    opened.fetch_add(1, Ordering::Relaxed);
                }
                Ok::<(), Status>(())
            }));
        }
        for _ in 0..20 {
            let next = 3 - third - leader;
            move_leader(&cluster, leader, next).await;
            leader = cluster.leader().await;
            assert_ne!(leader, third, "it was told to move elsewhere");
            // Watches are opened before the next move, too.
            let before = opened.load(Ordering::Relaxed);
            let deadline = Instant::now() + PATIENCE;
            while opened.load(Ordering::Relaxed) < before + 16 {
                let open = openers.iter().filter(|opener| !opener.is_finished()).count();
                assert!(open > 0 && Instant::now() < deadline, "watches are refused");
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        }
        ended.store(true, Ordering::Relaxed);
        for opener in openers {
            opener.await.expect("no panic").expect("no watch is refused");
        }
        // Without a leader for good, it is not kept waiting for ever.
        let channel = cluster.channel(third);
        for member in (0..3).filter(|member| *member != third) {
            cluster.kill(member);
        }
        let refused = async {
            loop {
                if let Err(status) = open_watch(&channel).await {
                    return status;
                }
            }
        };
        let refused = tokio::time::timeout(PATIENCE, refused).await.expect("an answer");
        assert_eq!(refused.message(), "etcdserver: no leader");
    });
}
