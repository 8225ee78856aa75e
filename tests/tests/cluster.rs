//! Three members that agree: every member serves what any of them was told, the death of the leader
//! loses nothing, members come and go, leases live through any member, and a rolling restart is not
//! seen by clients that do what etcd's own does. `KELSON_BIN` names another binary.
//! Over 600 lines: every test is one life of the same three members.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use kelson_api::etcdserverpb as pb;
use kelson_tests::cluster::{Cluster, PATIENCE};
use kelson_tests::forge::forge;
use kelson_tests::run;
use kelson_tests::server::{Server, http_get, kelson_binary};
use pb::cluster_client::ClusterClient;
use pb::kv_client::KvClient;
use pb::lease_client::LeaseClient;
use pb::maintenance_client::MaintenanceClient;
use tonic::transport::Channel;
use tonic::{Code, Status};

fn three() -> Cluster {
    Cluster::start(&kelson_binary(), 3, "http", &[])
}

fn put_of(key: &str, value: &str, lease: i64) -> pb::PutRequest {
    let (key, value) = (key.to_owned().into(), value.to_owned().into());
    pb::PutRequest { key, value, lease, ..Default::default() }
}

async fn put(cluster: &Cluster, member: usize, key: &str, value: &str) {
    let mut kv = KvClient::new(cluster.channel(member));
    kv.put(put_of(key, value, 0)).await.expect("a put");
}

async fn get(cluster: &Cluster, member: usize, key: &str) -> Option<String> {
    let mut kv = KvClient::new(cluster.channel(member));
    let request = pb::RangeRequest { key: key.to_owned().into(), ..Default::default() };
    let found = kv.range(request).await.expect("a range").into_inner().kvs;
    found.first().map(|kv| String::from_utf8_lossy(&kv.value).into_owned())
}

/// Puts through each member are seen through all, at once.
async fn all_see_all(cluster: &Cluster, members: &[usize], round: &str) {
    for writer in members {
        let key = format!("{round}/{writer}");
        put(cluster, *writer, &key, round).await;
        for reader in members {
            let found = get(cluster, *reader, &key).await;
            assert_eq!(found.as_deref(), Some(round), "{key} on {reader}");
        }
    }
}

/// Waits until all these members have the same hash at the same revision.
async fn all_equal(cluster: &Cluster, members: &[usize]) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let mut hashes = Vec::new();
        for member in members {
            let mut client = MaintenanceClient::new(cluster.channel(*member));
            let hash = client.hash_kv(pb::HashKvRequest { revision: 0 }).await;
            let hash = hash.expect("a hash").into_inner();
            hashes.push((hash.hash_revision, hash.compact_revision, hash.hash));
        }
        if hashes.windows(2).all(|pair| pair[0] == pair[1]) {
            return;
        }
        assert!(Instant::now() < deadline, "the members differ: {hashes:?}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

#[test]
fn every_member_serves_what_any_was_told() {
    run(async {
        let cluster = three();
        all_see_all(&cluster, &[0, 1, 2], "a").await;
        all_equal(&cluster, &[0, 1, 2]).await;
        let mut client = ClusterClient::new(cluster.channel(1));
        let list = client.member_list(pb::MemberListRequest { linearizable: true }).await;
        let members = list.expect("a list").into_inner().members;
        assert_eq!(members.len(), 3);
        assert!(members.windows(2).all(|pair| pair[0].id < pair[1].id));
    });
}

/// Certificates of one authority for 127.0.0.1.
fn peer_certificates(dir: &std::path::Path, common_name: &str) -> Vec<String> {
    use rcgen::{
        BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
        KeyPair, KeyUsagePurpose,
    };
    let ca_key = KeyPair::generate().expect("a key");
    let mut ca = CertificateParams::new(Vec::new()).expect("parameters");
    ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    ca.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    ca.distinguished_name.push(DnType::CommonName, "test authority");
    let ca_pem = ca.self_signed(&ca_key).expect("a certificate").pem();
    let issuer = Issuer::new(ca, ca_key);
    let key = KeyPair::generate().expect("a key");
    let mut params = CertificateParams::new(vec!["127.0.0.1".to_owned()]).expect("parameters");
    params.distinguished_name.push(DnType::CommonName, common_name);
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    let cert = params.signed_by(&key, &issuer).expect("a certificate").pem();
    let write = |name: &str, text: &str| {
        let path = dir.join(name);
        std::fs::write(&path, text).expect("written");
        path.display().to_string()
    };
    vec![
        format!("--peer-trusted-ca-file={}", write("ca.crt", &ca_pem)),
        format!("--peer-cert-file={}", write("peer.crt", &cert)),
        format!("--peer-key-file={}", write("peer.key", &key.serialize_pem())),
        "--peer-client-cert-auth".to_owned(),
    ]
}

#[test]
fn members_speak_tls_with_certificates_of_both_sides() {
    run(async {
        let dir = tempfile::tempdir().expect("a directory");
        let mut flags = peer_certificates(dir.path(), "member");
        flags.push("--peer-cert-allowed-cn=member".to_owned());
        let mut cluster = Cluster::start(&kelson_binary(), 3, "https", &flags);
        all_see_all(&cluster, &[0, 1, 2], "tls").await;
        cluster.stop(2);
        cluster.spawn(2);
        cluster.wait_ready(2);
        all_see_all(&cluster, &[0, 1, 2], "again").await;

        // A certificate of another authority gets nobody in.
        let foreign = tempfile::tempdir().expect("a directory");
        peer_certificates(foreign.path(), "member");
        cluster.stop(1);
        for name in ["peer.crt", "peer.key"] {
            std::fs::copy(foreign.path().join(name), dir.path().join(name)).expect("copied");
        }
        cluster.spawn(1);
        tokio::time::sleep(Duration::from_secs(3)).await;
        let is_ready = kelson_tests::server::http_ok(cluster.client_port(1), "/readyz");
        assert!(!is_ready, "a stranger takes part");
    });
}

#[test]
fn members_speak_tls_with_certificates_of_their_own_making() {
    run(async {
        let flags = ["--peer-auto-tls".to_owned()];
        let cluster = Cluster::start(&kelson_binary(), 3, "https", &flags);
        all_see_all(&cluster, &[0, 1, 2], "auto").await;
    });
}

/// What became of one write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Acknowledged,
    /// The client was told that it failed, or that nobody knows.
    Failed,
}

/// Whether etcd's own client would have sent a write again without telling its caller: the server
/// surely never processed it.
fn is_unprocessed(status: &Status) -> bool {
    let mut cause = std::error::Error::source(status);
    let mut texts = Vec::new();
    while let Some(error) = cause {
        texts.push(format!("{error:?}"));
        cause = error.source();
    }
    let text = texts.join("\n");
    // Refused connections, streams above the last one of a GOAWAY, and calls that never left.
    ["ConnectError", "ConnectionRefused", "GoAway", "REFUSED_STREAM", "Canceled", "ChannelClosed"]
        .iter()
        .any(|known| text.contains(known))
}

/// Writers over all members, each write once, with the balancing and the retries of etcd's client.
struct Load {
    stop: Arc<AtomicBool>,
    writers: Vec<tokio::task::JoinHandle<Vec<(String, Fate, String)>>>,
}

impl Load {
    fn start(cluster: &Cluster, writers: usize) -> Load {
        let stop = Arc::new(AtomicBool::new(false));
        let writers = (0..writers).map(|writer| {
            let channels: Vec<Channel> = (0..3).map(|member| cluster.channel(member)).collect();
            tokio::spawn(write(writer, channels, Arc::clone(&stop)))
        });
        Load { writers: writers.collect(), stop }
    }

    async fn finish(self) -> Vec<(String, Fate, String)> {
        self.stop.store(true, Ordering::Relaxed);
        let mut attempts = Vec::new();
        for writer in self.writers {
            attempts.extend(writer.await.expect("a writer does not panic"));
        }
        attempts
    }
}

async fn write(
    writer: usize,
    channels: Vec<Channel>,
    stop: Arc<AtomicBool>,
) -> Vec<(String, Fate, String)> {
    let mut attempts = Vec::new();
    let mut at = writer;
    while !stop.load(Ordering::Relaxed) {
        let key = format!("load/{writer}/{}", attempts.len());
        let fate = loop {
            at += 1;
            let mut kv = KvClient::new(channels[at % channels.len()].clone());
            match kv.put(put_of(&key, &key, 0)).await {
                Ok(_) => break (key, Fate::Acknowledged, String::new()),
                Err(status) if is_unprocessed(&status) => {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
                // Surely not accepted, so that a client may try again.
                Err(status) if status.code() == Code::DeadlineExceeded => {}
                Err(status) => break (key, Fate::Failed, format!("{status:?}")),
            }
        };
        attempts.push(fate);
    }
    attempts
}

/// Every acknowledged write is there, and nothing that was not attempted.
async fn judge(cluster: &Cluster, member: usize, attempts: &[(String, Fate, String)]) {
    let mut kv = KvClient::new(cluster.channel(member)).max_decoding_message_size(usize::MAX);
    let request = pb::RangeRequest {
        key: "load/".into(),
        range_end: "load0".into(),
        keys_only: true,
        ..Default::default()
    };
    let found = kv.range(request).await.expect("a range").into_inner().kvs;
    let attempted: BTreeMap<&[u8], Fate> =
        attempts.iter().map(|(key, fate, _)| (key.as_bytes(), *fate)).collect();
    for kv in &found {
        assert_eq!(kv.version, 1, "{:?} was written twice", kv.key);
        assert!(attempted.contains_key(kv.key.as_ref()), "{:?} was never written", kv.key);
    }
    let found: std::collections::BTreeSet<&[u8]> = found.iter().map(|kv| kv.key.as_ref()).collect();
    for (key, fate) in attempted {
        let key_text = String::from_utf8_lossy(key);
        assert!(fate != Fate::Acknowledged || found.contains(key), "{key_text} is lost");
    }
}

#[test]
fn the_death_of_the_leader_loses_nothing() {
    run(async {
        let mut cluster = three();
        let load = Load::start(&cluster, 8);
        for round in 0..3 {
            tokio::time::sleep(Duration::from_millis(700)).await;
            let leader = cluster.leader().await;
            cluster.kill(leader);
            let others: Vec<usize> = (0..3).filter(|member| *member != leader).collect();
            let next = cluster.leader().await;
            assert_ne!(next, leader);
            all_see_all(&cluster, &others, &format!("without/{round}")).await;
            cluster.spawn(leader);
            cluster.wait_ready(leader);
        }
        let attempts = load.finish().await;
        let acknowledged = attempts.iter().filter(|(_, fate, _)| *fate == Fate::Acknowledged);
        println!("{} writes acknowledged of {}", acknowledged.count(), attempts.len());
        for member in 0..3 {
            judge(&cluster, member, &attempts).await;
        }
        all_equal(&cluster, &[0, 1, 2]).await;
    });
}

#[test]
fn a_rolling_restart_fails_no_write() {
    run(async {
        let mut cluster = three();
        let load = Load::start(&cluster, 8);
        tokio::time::sleep(Duration::from_millis(500)).await;
        for member in 0..3 {
            cluster.stop(member);
            cluster.spawn(member);
            cluster.wait_ready(member);
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
        let attempts = load.finish().await;
        let failed: Vec<_> = attempts.iter().filter(|(_, fate, _)| *fate == Fate::Failed).collect();
        println!("{} writes, {} failed", attempts.len(), failed.len());
        assert!(failed.is_empty(), "{failed:#?}");
        for member in 0..3 {
            judge(&cluster, member, &attempts).await;
        }
        all_equal(&cluster, &[0, 1, 2]).await;
    });
}

/// Asks until the answer is not that the cluster is unhealthy: members must have been connected for
/// five seconds before one is added or removed.
async fn once_healthy<T, F>(ask: impl Fn() -> F) -> Result<T, Status>
where
    F: Future<Output = Result<tonic::Response<T>, Status>>,
{
    let deadline = Instant::now() + PATIENCE;
    loop {
        match ask().await {
            Err(status)
                if Instant::now() < deadline
                    && (status.message().contains("unhealthy cluster")
                        || status.message().contains("in sync with leader")) =>
            {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            answer => return answer.map(tonic::Response::into_inner),
        }
    }
}

#[test]
fn members_come_and_go() {
    run(async {
        let mut cluster = three();
        put(&cluster, 0, "before", "1").await;
        let newcomer = cluster.reserve();
        let client = || ClusterClient::new(cluster.channel(1));
        let add = |is_learner| pb::MemberAddRequest {
            peer_ur_ls: vec![cluster.peer_url(newcomer)],
            is_learner,
        };
        let added = once_healthy(|| async { client().member_add(add(true)).await }).await;
        let added = added.expect("added");
        let member = added.member.expect("the new member");
        assert!(member.is_learner && member.name.is_empty());
        assert_eq!(added.members.len(), 4);
        let again = client().member_add(add(true)).await.expect_err("the URL is taken");
        assert_eq!(again.message(), "etcdserver: Peer URLs already exists");
        let other = pb::MemberAddRequest {
            peer_ur_ls: vec!["http://127.0.0.1:1".to_owned()],
            is_learner: true,
        };
        let other = client().member_add(other).await.expect_err("one learner at a time");
        assert_eq!(other.message(), "etcdserver: too many learner members in cluster");

        cluster.join(newcomer, &[0, 1, 2]);
        cluster.wait_ready(newcomer);
        let refused = KvClient::new(cluster.channel(newcomer)).put(put_of("x", "x", 0)).await;
        let refused = refused.expect_err("a learner takes no writes");
        assert_eq!(refused.message(), "etcdserver: rpc not supported for learner");
        let mut local = KvClient::new(cluster.channel(newcomer));
        let request =
            pb::RangeRequest { key: "before".into(), serializable: true, ..Default::default() };
        assert_eq!(local.range(request).await.expect("a local read").into_inner().count, 1);

        let id = member.id;
        let client = |member| ClusterClient::new(cluster.channel(member));
        let promote = || async { client(2).member_promote(pb::MemberPromoteRequest { id }).await };
        let promoted = once_healthy(promote).await.expect("promoted");
        assert!(promoted.members.iter().all(|member| !member.is_learner));
        cluster.wait_for(newcomer, "/readyz");
        all_see_all(&cluster, &[0, 1, 2, newcomer], "four").await;

        // The leader itself is removed; the others go on and it ends by itself.
        let leader = cluster.leader().await;
        let id = cluster.id(leader).await;
        let asked = if leader == 0 { 1 } else { 0 };
        let remove = || async {
            let mut client = ClusterClient::new(cluster.channel(asked));
            client.member_remove(pb::MemberRemoveRequest { id }).await
        };
        let removed = once_healthy(remove).await.expect("removed");
        assert_eq!(removed.members.len(), 3);
        let status = cluster.wait_end(leader);
        assert_eq!(status.code(), Some(0), "{}", cluster.log_tail(leader));
        let log = std::fs::read_to_string(cluster.log_path(leader)).expect("a log");
        assert!(log.contains("the member has been permanently removed from the cluster"), "{log}");
        let left: Vec<usize> = (0..4).filter(|member| *member != leader).collect();
        cluster.leader().await;
        all_see_all(&cluster, &left, "three").await;
        all_equal(&cluster, &left).await;

        // It cannot come back.
        cluster.spawn(leader);
        let status = cluster.wait_end(leader);
        assert_eq!(status.code(), Some(0), "{}", cluster.log_tail(leader));
    });
}

#[test]
fn a_learner_removed_while_it_hears_nobody_ends() {
    run(async {
        let mut cluster = Cluster::start(&kelson_binary(), 1, "http", &[]);
        let learner = cluster.reserve();
        let request =
            pb::MemberAddRequest { peer_ur_ls: vec![cluster.peer_url(learner)], is_learner: true };
        let mut client = ClusterClient::new(cluster.channel(0));
        let added = client.member_add(request).await.expect("added").into_inner();
        let id = added.member.expect("the new member").id;
        cluster.join(learner, &[0]);
        cluster.wait_ready(learner);
        // No leader calls it any more once it goes on, and it never asks for votes.
        cluster.pause(learner);
        client.member_remove(pb::MemberRemoveRequest { id }).await.expect("removed");
        cluster.stop(0);
        cluster.spawn(0);
        cluster.wait_ready(0);
        cluster.resume(learner);
        let status = cluster.wait_end(learner);
        assert_eq!(status.code(), Some(0), "{}", cluster.log_tail(learner));
    });
}

#[test]
fn a_new_voter_is_healthy_only_with_its_vote() {
    run(async {
        let mut cluster = Cluster::start(&kelson_binary(), 1, "http", &[]);
        put(&cluster, 0, "a", "1").await;
        let new = cluster.reserve();
        let add = || async {
            let peer_ur_ls = vec![cluster.peer_url(new)];
            let request = pb::MemberAddRequest { peer_ur_ls, is_learner: false };
            ClusterClient::new(cluster.channel(0)).member_add(request).await
        };
        once_healthy(add).await.expect("added");
        cluster.join(new, &[0]);
        cluster.wait_ready(new);
        // Two voters need each other: what one of them writes alone is not agreed.
        cluster.pause(new);
        let mut kv = KvClient::new(cluster.channel(0));
        let alone = tokio::time::timeout(Duration::from_secs(2), kv.put(put_of("a", "2", 0))).await;
        cluster.resume(new);
        assert!(!matches!(alone, Ok(Ok(_))), "it said to be healthy and had no vote");
    });
}

#[test]
fn a_member_that_lost_its_data_is_refused() {
    run(async {
        let mut cluster = three();
        put(&cluster, 0, "a", "1").await;
        let leader = cluster.leader().await;
        let victim = (leader + 1) % 3;
        cluster.stop(victim);
        std::fs::remove_dir_all(cluster.data_dir(victim)).expect("removed");
        cluster.spawn(victim);
        let status = cluster.wait_end(victim);
        assert_eq!(status.code(), Some(1), "{}", cluster.log_tail(victim));
        let log = cluster.log_tail(victim);
        assert!(log.contains("has already been bootstrapped"), "{log}");
    });
}

/// Copies a directory of files and directories.
fn copy_dir(from: &std::path::Path, to: &std::path::Path) {
    std::fs::create_dir(to).expect("make a directory");
    for entry in std::fs::read_dir(from).expect("list a directory") {
        let entry = entry.expect("an entry");
        let target = to.join(entry.file_name());
        if entry.file_type().expect("its type").is_dir() {
            copy_dir(&entry.path(), &target);
        } else {
            std::fs::copy(entry.path(), target).expect("copy a file");
        }
    }
}

#[test]
fn a_member_with_an_older_copy_of_its_data_ends_and_hurts_nobody() {
    run(async {
        let mut cluster = three();
        let leader = cluster.leader().await;
        let (victim, other) = ((leader + 1) % 3, (leader + 2) % 3);
        let id = cluster.id(victim).await;
        all_see_all(&cluster, &[0, 1, 2], "before").await;
        cluster.kill(victim);
        let copies = tempfile::tempdir().expect("a directory");
        let copy = copies.path().join("data");
        copy_dir(&cluster.data_dir(victim), &copy);
        cluster.spawn(victim);
        cluster.wait_ready(victim);
        // The victim acknowledges these to the leader.
        all_see_all(&cluster, &[0, 1, 2], "lost").await;
        cluster.kill(victim);
        std::fs::remove_dir_all(cluster.data_dir(victim)).expect("removed");
        copy_dir(&copy, &cluster.data_dir(victim));
        cluster.spawn(victim);
        let status = cluster.wait_end(victim);
        assert!(!status.success(), "{}", cluster.log_tail(victim));
        let log = cluster.log_tail(victim);
        assert!(log.contains(&format!("member {id:x} had its log up to")), "{log}");
        assert!(log.contains(&format!("etcdctl member remove {id:x}")), "{log}");
        all_see_all(&cluster, &[leader, other], "meanwhile").await;
        assert_eq!(cluster.leader().await, leader, "{}", cluster.log_tail(leader));

        // What it says brings it back.
        let channel = cluster.channel(leader);
        let client = || ClusterClient::new(channel.clone());
        let remove = || async { client().member_remove(pb::MemberRemoveRequest { id }).await };
        once_healthy(remove).await.expect("removed");
        std::fs::remove_dir_all(cluster.data_dir(victim)).expect("removed");
        let add = || async {
            let peer_ur_ls = vec![cluster.peer_url(victim)];
            client().member_add(pb::MemberAddRequest { peer_ur_ls, is_learner: false }).await
        };
        once_healthy(add).await.expect("added");
        cluster.join(victim, &[leader, other]);
        cluster.wait_for(victim, "/readyz");
        all_see_all(&cluster, &[0, 1, 2], "after").await;
        all_equal(&cluster, &[0, 1, 2]).await;
    });
}

#[test]
fn leases_live_through_any_member() {
    run(async {
        let cluster = three();
        let leader = cluster.leader().await;
        let follower = (leader + 1) % 3;
        let mut client = LeaseClient::new(cluster.channel(follower));
        let grant = pb::LeaseGrantRequest { id: 77, ttl: 3 };
        client.lease_grant(grant).await.expect("granted");
        let mut kv = KvClient::new(cluster.channel(follower));
        kv.put(put_of("leased", "1", 77)).await.expect("a put");

        // Twice its time, kept alive through a follower only.
        let (sender, receiver) = tokio::sync::mpsc::channel(1);
        let requests = tokio_stream::wrappers::ReceiverStream::new(receiver);
        let sending = tokio::spawn(async move {
            for _ in 0..12 {
                let request = pb::LeaseKeepAliveRequest { id: 77 };
                sender.send(request).await.expect("the stream is open");
                tokio::time::sleep(Duration::from_millis(500)).await;
            }
        });
        let mut answers = client.lease_keep_alive(requests).await.expect("a stream").into_inner();
        for _ in 0..12 {
            let answer = answers.message().await.expect("an answer").expect("not the end");
            assert_eq!((answer.id, answer.ttl), (77, 3));
        }
        sending.await.expect("all were sent");
        for member in 0..3 {
            let mut client = LeaseClient::new(cluster.channel(member));
            let request = pb::LeaseTimeToLiveRequest { id: 77, keys: true };
            let left = client.lease_time_to_live(request).await.expect("an answer").into_inner();
            assert_eq!((left.granted_ttl, left.keys.len()), (3, 1), "on {member}: {left:?}");
        }

        // Then it ends, everywhere.
        let deadline = Instant::now() + PATIENCE;
        for member in 0..3 {
            while get(&cluster, member, "leased").await.is_some() {
                assert!(Instant::now() < deadline, "the lease does not end");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
        let request = pb::LeaseTimeToLiveRequest { id: 77, keys: false };
        let gone = client.lease_time_to_live(request).await.expect("an answer").into_inner();
        assert_eq!((gone.ttl, gone.granted_ttl), (-1, 0));
    });
}

/// The leader must not find out late about leases that others were asked for, nor end them late: with
/// half a second for each, a lease of two seconds lasted three, and four in a row were as good as
/// never in time (a mean of four was: it missed scans of half a second). A busy machine is late now
/// and then, too, and gets more rounds.
#[test]
fn leases_end_in_time_whoever_granted_them() {
    run(async {
        let cluster = three();
        let leader = cluster.leader().await;
        // What a new leader finds when it first looks gets an election timeout more: let it look.
        let mut first = LeaseClient::new(cluster.channel(leader));
        let request = pb::LeaseTimeToLiveRequest { id: 1, keys: false };
        first.lease_time_to_live(request).await.expect("an answer");
        let (mut late, mut in_time) = (Vec::new(), 0);
        while in_time < 4 {
            assert!(late.len() < 20, "late by {late:?}");
            // At other times of the leader's clock.
            tokio::time::sleep(Duration::from_millis(130 * (late.len() as u64 % 4))).await;
            let mut leases = LeaseClient::new(cluster.channel((leader + 1) % 3));
            let grant = pb::LeaseGrantRequest { id: 0, ttl: 2 };
            let id = leases.lease_grant(grant).await.expect("granted").into_inner().id;
            let granted = Instant::now();
            while granted.elapsed() < PATIENCE {
                let request = pb::LeaseTimeToLiveRequest { id, keys: false };
                let left = leases.lease_time_to_live(request).await.expect("an answer");
                if left.into_inner().ttl == -1 {
                    break;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            let by = granted.elapsed().checked_sub(Duration::from_secs(2)).expect("not early");
            in_time = if by < Duration::from_millis(250) { in_time + 1 } else { 0 };
            late.push(by);
        }
    });
}

/// Member changes count the time that a member has been connected from here on.
#[test]
fn a_member_that_came_back_is_connected_at_once() {
    run(async {
        let mut cluster = three();
        for round in 0..4 {
            let (member, other) = (round % 3, (round + 1) % 3);
            cluster.stop(member);
            // The others notice that it is gone, and try again when it is not there yet.
            tokio::time::sleep(Duration::from_millis(1300)).await;
            cluster.spawn(member);
            cluster.wait_ready(member);
            let ready = Instant::now();
            let id = cluster.id(member).await;
            let line = format!("Remote=\"{id:x}\"}} 1");
            let is_connected = || {
                let metrics = http_get(cluster.client_port(other), "/metrics").expect("metrics").1;
                let mut lines = metrics.lines();
                lines.any(|l| l.starts_with("etcd_network_active_peers{") && l.ends_with(&line))
            };
            while !is_connected() {
                let waited = ready.elapsed();
                assert!(waited < Duration::from_millis(300), "round {round}: {waited:?}");
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
    });
}

#[test]
fn leadership_moves_where_it_is_told() {
    run(async {
        let cluster = three();
        for _ in 0..3 {
            let leader = cluster.leader().await;
            let target = (leader + 1) % 3;
            let target_id = cluster.id(target).await;
            let request = pb::MoveLeaderRequest { target_id };
            let mut follower = MaintenanceClient::new(cluster.channel(target));
            let refused = follower.move_leader(request).await.expect_err("it does not lead");
            assert_eq!(refused.message(), "etcdserver: not leader");
            let mut client = MaintenanceClient::new(cluster.channel(leader));
            let unknown = client.move_leader(pb::MoveLeaderRequest { target_id: 5 }).await;
            let unknown = unknown.expect_err("nobody has this id");
            assert_eq!(unknown.message(), "etcdserver: bad leader transferee");
            client.move_leader(request).await.expect("moved");
            assert_eq!(cluster.leader().await, target);
            all_see_all(&cluster, &[0, 1, 2], "moved").await;
        }
    });
}

#[test]
fn members_meet_at_a_discovery_service() {
    run(async {
        let service = Server::start(&kelson_binary(), &[]);
        let channel = Channel::from_shared(service.endpoint()).expect("a URL").connect_lazy();
        let size = put_of("/_etcd/registry/meeting/_config/size", "3", 0);
        KvClient::new(channel).put(size).await.expect("a put");
        let flags = [
            format!("--discovery-endpoints={}", service.endpoint()),
            "--discovery-token=meeting".to_owned(),
        ];
        let mut cluster = Cluster::start_finding(&kelson_binary(), 3, &flags);
        all_see_all(&cluster, &[0, 1, 2], "met").await;

        let late = cluster.reserve();
        cluster.spawn_finding(late, &flags);
        assert_eq!(cluster.wait_end(late).code(), Some(1), "{}", cluster.log_tail(late));
        assert!(cluster.log_tail(late).contains("cluster is full"), "{}", cluster.log_tail(late));
        // Who has data does not need the service again.
        drop(service);
        cluster.stop(0);
        cluster.spawn(0);
        cluster.wait_ready(0);
    });
}

#[test]
fn a_member_with_other_data_is_found_and_named() {
    run(async {
        let mut cluster = three();
        put(&cluster, 0, "forged", "right-value-0001").await;
        all_equal(&cluster, &[0, 1, 2]).await;
        let leader = cluster.leader().await;
        let victim = (leader + 1) % 3;
        let victim_id = cluster.id(victim).await;
        cluster.stop(victim);
        forge(&cluster.data_dir(victim), "right-value-0001", "wrong-value-0001");
        cluster.spawn(victim);
        cluster.wait_ready(victim);
        assert_eq!(get(&cluster, victim, "forged").await.as_deref(), Some("wrong-value-0001"));

        let deadline = Instant::now() + PATIENCE;
        loop {
            let mut client = MaintenanceClient::new(cluster.channel(leader));
            let alarms = client.alarm(pb::AlarmRequest::default()).await.expect("alarms");
            let alarms = alarms.into_inner().alarms;
            if let [alarm] = alarms.as_slice() {
                assert_eq!(alarm.member_id, victim_id);
                assert_eq!(alarm.alarm(), pb::AlarmType::Corrupt);
                break;
            }
            assert!(Instant::now() < deadline, "no alarm, or more than one: {alarms:?}");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        let refused = KvClient::new(cluster.channel(leader)).put(put_of("x", "x", 0)).await;
        assert_eq!(refused.expect_err("no writes").message(), "etcdserver: corrupt cluster");
        for member in 0..3 {
            let (status, text) = http_get(cluster.client_port(member), "/readyz").expect("answers");
            assert_eq!(status, 503);
            assert!(text.contains("[-]data_corruption failed: alarm activated: CORRUPT"), "{text}");
        }

        // With the check at the start it does not even come up.
        cluster.stop(victim);
        cluster.spawn_with(victim, &["--feature-gates=InitialCorruptCheck=true".to_owned()]);
        assert_eq!(cluster.wait_end(victim).code(), Some(1), "{}", cluster.log_tail(victim));
        let log = cluster.log_tail(victim);
        assert!(log.contains("found data inconsistency with peers"), "{log}");
    });
}
