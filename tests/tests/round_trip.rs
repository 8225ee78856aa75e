//! From etcd to Kelson and back: a store with a long history, leases, users and a compaction in its
//! midst moves by its data directory and by a snapshot, and nothing that a client could see changes
//! on the way. At every stop the whole picture is taken anew: hashes, users, leases with their
//! keys, the point of compaction, and every event that a watcher who comes back there is told.
//! `KELSON_BIN` names another binary.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hasher};
use std::path::Path;
use std::time::{Duration, Instant};

use futures::{StreamExt, TryStreamExt};
use kelson_api::Message;
use kelson_api::etcdserverpb as pb;
use kelson_api::mvccpb::Event;
use kelson_tests::cluster::Cluster;
use kelson_tests::server::{etcd_binary, kelson_binary};
use kelson_tests::tools::{etcdctl, hash_kv_for, peer, run};
use kelson_tests::users::{self, ROOT};
use kelson_tests::watch::all_from;
use pb::auth_client::AuthClient;
use pb::kv_client::KvClient;
use pb::lease_client::LeaseClient;
use pb::request_op::Request as Op;
use pb::watch_client::WatchClient;
use tonic::Request;
use tonic::transport::Channel;

/// Changes of one transaction, and transactions under way.
const TXN_OPS: u64 = 100;
const IN_FLIGHT: usize = 32;
/// How long all events of a watcher may take.
const WATCH_TIME: Duration = Duration::from_secs(120);

#[test]
fn two_hundred_thousand_keys_go_to_kelson_and_back() {
    there_and_back(&etcd_binary(), "3.7", 200_000, true);
}

#[test]
fn etcd_3_6_goes_to_kelson_and_back() {
    there_and_back(&peer("etcd-3.6"), "3.6", 5_000, false);
}

#[test]
fn etcd_3_5_goes_to_kelson_and_back() {
    there_and_back(&peer("etcd-3.5"), "3.5", 5_000, false);
}

#[test]
fn etcd_3_4_goes_to_kelson_and_back() {
    there_and_back(&peer("etcd-3.4"), "3.4", 5_000, false);
}

/// Whatever clients can see of a store that should not change on the way.
#[derive(Clone, PartialEq, Debug)]
struct Picture {
    revision: i64,
    compacted: i64,
    keys: i64,
    /// HashKV at the newest revision and at one in the past.
    hashes: [(u64, i64); 2],
    users: String,
    /// Time granted and keys, by id.
    leases: BTreeMap<i64, (i64, Vec<String>)>,
    /// A digest of all events of each revision behind the compaction.
    events: BTreeMap<i64, u64>,
}

impl Picture {
    /// Everything is the same as here; where not, the message is short enough to be read.
    fn assert_same(&self, other: &Self, stop: &str) {
        let differs =
            |(revision, digest): &(&i64, &u64)| other.events.get(revision) != Some(digest);
        let first = self.events.iter().find(differs).map(|(revision, _)| revision);
        assert_eq!(first, None, "{stop}: the events of this revision differ, or are missing");
        assert_eq!(self.events.len(), other.events.len(), "{stop}: revisions of events");
        let rest = |picture: &Self| Self { events: BTreeMap::new(), ..picture.clone() };
        assert_eq!(rest(self), rest(other), "{stop}");
    }
}

/// A way to a member, as root where users are on.
struct Door {
    endpoint: String,
    channel: Channel,
    token: Option<String>,
}

impl Door {
    /// `users`: they are on.
    async fn open(cluster: &Cluster, users: bool) -> Door {
        let channel = cluster.channel(0);
        let (name, password) = ("root".to_owned(), "r00t".to_owned());
        let request = pb::AuthenticateRequest { name, password };
        let mut token = None;
        if users {
            let answer = AuthClient::new(channel.clone()).authenticate(request).await;
            token = Some(answer.expect("root's password").into_inner().token);
        }
        Door { endpoint: cluster.endpoint(0), channel, token }
    }

    fn with<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        if let Some(token) = &self.token {
            request.metadata_mut().insert("token", token.parse().expect("ASCII"));
        }
        request
    }

    /// Runs transactions, many at a time.
    async fn run(&self, transactions: impl Iterator<Item = Vec<Op>>) {
        let calls = transactions.map(|operations| async {
            let operation = |request| pb::RequestOp { request: Some(request) };
            let success = operations.into_iter().map(operation).collect();
            let request = pb::TxnRequest { success, ..Default::default() };
            KvClient::new(self.channel.clone()).txn(self.with(request)).await.map(drop)
        });
        let done = futures::stream::iter(calls).buffer_unordered(IN_FLIGHT);
        done.try_collect::<Vec<()>>().await.expect("all transactions");
    }

    /// The store revision, and how many keys there are.
    async fn extent(&self) -> (i64, i64) {
        let (key, range_end, count_only) = ("\0".into(), "\0".into(), true);
        let request = pb::RangeRequest { key, range_end, count_only, ..Default::default() };
        let answer = KvClient::new(self.channel.clone()).range(self.with(request)).await;
        let answer = answer.expect("a count").into_inner();
        (answer.header.expect("a header").revision, answer.count)
    }

    async fn compact(&self, revision: i64) {
        let request = pb::CompactionRequest { revision, ..Default::default() };
        let done = KvClient::new(self.channel.clone()).compact(self.with(request)).await;
        done.expect("a compaction");
    }

    /// Leases with three keys each, which `tag` tells from others.
    async fn lease(&self, tag: &str, leases: i64) {
        let mut client = LeaseClient::new(self.channel.clone());
        for number in 1..=leases {
            let request = pb::LeaseGrantRequest { ttl: 5000 + number, id: 0 };
            let lease = client.lease_grant(self.with(request)).await.expect("a lease");
            let id = lease.into_inner().id;
            let put = |place| put(format!("leased/{tag}/{number}/{place}"), "x".to_owned(), id);
            self.run(std::iter::once((0..3).map(put).collect())).await;
        }
    }

    async fn leases(&self) -> BTreeMap<i64, (i64, Vec<String>)> {
        let mut client = LeaseClient::new(self.channel.clone());
        let all = client.lease_leases(self.with(pb::LeaseLeasesRequest {})).await;
        let mut leases = BTreeMap::new();
        for lease in all.expect("a list").into_inner().leases {
            let request = pb::LeaseTimeToLiveRequest { id: lease.id, keys: true };
            let about = client.lease_time_to_live(self.with(request)).await.expect("a lease");
            let about = about.into_inner();
            let keys = about.keys.iter().map(|key| key.escape_ascii().to_string());
            let mut keys: Vec<String> = keys.collect();
            keys.sort();
            assert!(about.ttl > 0 && about.ttl <= about.granted_ttl, "{about:?}");
            leases.insert(lease.id, (about.granted_ttl, keys));
        }
        leases
    }

    /// Digests of all events from a revision to another, with the states before them.
    async fn events(&self, from: i64, to: i64) -> BTreeMap<i64, u64> {
        let asked = futures::stream::iter([all_from(from)]);
        let asked = self.with(asked.chain(futures::stream::pending()));
        let mut client = WatchClient::new(self.channel.clone());
        client = client.max_decoding_message_size(usize::MAX);
        let mut answers = client.watch(asked).await.expect("a stream").into_inner();
        let mut digests: BTreeMap<i64, DefaultHasher> = BTreeMap::new();
        let deadline = Instant::now() + WATCH_TIME;
        while digests.keys().next_back().is_none_or(|newest| *newest < to) {
            let left = deadline.saturating_duration_since(Instant::now());
            let answer = tokio::time::timeout(left, answers.message()).await;
            let answer = answer.expect("all events in time").expect("an answer");
            let answer = answer.expect("no end");
            assert!(!answer.canceled, "{answer:?}");
            for event in &answer.events {
                let digest = digests.entry(revision_of(event)).or_default();
                digest.write(&event.encode_to_vec());
            }
        }
        digests.into_iter().map(|(revision, digest)| (revision, digest.finish())).collect()
    }

    async fn picture(&self, users: fn(&str) -> String) -> Picture {
        let (revision, keys) = self.extent().await;
        let hash = |at| hash_kv_for(&self.endpoint, at, &[ROOT]);
        let newest = hash(revision);
        let compacted = newest.1;
        Picture {
            revision,
            compacted,
            keys,
            hashes: [newest, hash(compacted + (revision - compacted) / 2)],
            users: users(&self.endpoint),
            leases: self.leases().await,
            events: self.events(compacted + 1, revision).await,
        }
    }
}

fn revision_of(event: &Event) -> i64 {
    event.kv.as_ref().expect("every event has one").mod_revision
}

fn put(key: String, value: String, lease: i64) -> Op {
    let (key, value) = (key.into(), value.into());
    Op::RequestPut(pb::PutRequest { key, value, lease, ..Default::default() })
}

fn delete(key: String) -> Op {
    Op::RequestDeleteRange(pb::DeleteRangeRequest { key: key.into(), ..Default::default() })
}

fn key(number: u64) -> String {
    format!("key/{number:07}")
}

/// All keys once.
fn all(keys: u64) -> impl Iterator<Item = Vec<Op>> {
    let one = |number| put(key(number), format!("{number} {}", "first ".repeat(6)), 0);
    (0..keys / TXN_OPS).map(move |batch| {
        let numbers = batch * TXN_OPS..(batch + 1) * TXN_OPS;
        numbers.map(one).collect()
    })
}

/// New values for one key of five, and the end of one of twenty-five: of others each round, so that
/// what an earlier one deleted is created again.
fn changed(keys: u64, round: u64) -> impl Iterator<Item = Vec<Op>> {
    let one = move |place: u64| match place % 5 {
        ending if ending == round => delete(key(place * 5)),
        _ => put(key(place * 5), format!("{round} {place}"), 0),
    };
    (0..keys / 5 / TXN_OPS).map(move |batch| {
        let places = batch * TXN_OPS..(batch + 1) * TXN_OPS;
        places.map(one).collect()
    })
}

/// Fills a member that has just been started, with a compaction in the midst of it all.
async fn fill(cluster: &Cluster, keys: u64) {
    let door = Door::open(cluster, false).await;
    door.run(all(keys)).await;
    door.lease("first", 5).await;
    users::make(&door.endpoint);
    users::enable(&door.endpoint);
    let door = Door::open(cluster, true).await;
    let (from, _) = door.extent().await;
    door.run(changed(keys, 0)).await;
    let (to, _) = door.extent().await;
    door.lease("second", 5).await;
    // Half of what the round replaced and deleted goes, and half stays.
    door.compact(from + (to - from) / 2).await;
    door.run(changed(keys / 2, 1)).await;
    etcdctl(&door.endpoint, &[ROOT, "user", "add", "late:late's"]);
    etcdctl(&door.endpoint, &[ROOT, "user", "grant-role", "late", "plain"]);
    etcdctl(&door.endpoint, &["--user=late:late's", "put", "ann/late", "x"]);
}

/// A new member of one from a snapshot, by Kelson or by etcd's tool.
fn restored(server: &Path, tool: &Path, snapshot: &Path) -> Cluster {
    let mut cluster = Cluster::reserved(server, 1);
    let (file, dir) = (snapshot.display().to_string(), cluster.data_dir(0).display().to_string());
    let (list, url) = (cluster.initial_cluster(), cluster.peer_url(0));
    let words = ["snapshot", "restore", &file, "--name=m0", "--data-dir", &dir];
    let words = words.into_iter().chain(["--initial-cluster", &list]);
    run(tool, words.chain(["--initial-advertise-peer-urls", &url])).ok();
    start(&mut cluster);
    cluster
}

fn start(cluster: &mut Cluster) {
    let list = format!("--initial-cluster={}", cluster.initial_cluster());
    cluster.spawn_finding(0, &[list, users::CHEAP.to_owned()]);
    cluster.wait_ready(0);
}

fn save(endpoint: &str, file: &Path) {
    etcdctl(endpoint, &[ROOT, "snapshot", "save", &file.display().to_string()]);
}

/// `by_snapshot`: also by etcd's tools, in both directions.
fn there_and_back(etcd: &Path, version: &str, keys: u64, by_snapshot: bool) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.expect("a runtime can be built");
    let temp = tempfile::tempdir().expect("temporary directory");
    let users = if version == "3.4" { users::rights } else { users::describe };
    let picture = |cluster: &Cluster| {
        runtime.block_on(async { Door::open(cluster, true).await.picture(users).await })
    };
    let mut begun = Instant::now();
    let mut told = |stop: &str| {
        println!("{stop}: {:.1} s", begun.elapsed().as_secs_f32());
        begun = Instant::now();
    };

    let mut cluster = Cluster::start(etcd, 1, "http", &[users::CHEAP.to_owned()]);
    runtime.block_on(fill(&cluster, keys));
    told("etcd is filled");
    let origin = picture(&cluster);
    assert!(origin.keys > keys as i64 * 9 / 10 && origin.compacted > 0, "{:?}", origin.hashes);
    assert!(origin.leases.len() == 10, "{:?}", origin.leases);
    assert!(origin.events.len() as u64 > keys / TXN_OPS / 10, "{}", origin.events.len());
    told("etcd");
    let snapshot = temp.path().join("etcd.db");
    if by_snapshot {
        save(&cluster.endpoint(0), &snapshot);
    }
    cluster.kill(0);

    if by_snapshot {
        let ours = restored(&kelson_binary(), &kelson_binary(), &snapshot);
        origin.assert_same(&picture(&ours), "Kelson, from a snapshot");
        users::check(&ours.endpoint(0));
        told("Kelson, from a snapshot");
    }

    cluster.become_of(&kelson_binary());
    cluster.spawn(0);
    cluster.wait_ready(0);
    told("Kelson takes the directory over");
    origin.assert_same(&picture(&cluster), "Kelson, from a directory");
    told("Kelson, from a directory");
    let endpoint = cluster.endpoint(0);
    runtime.block_on(async {
        let door = Door::open(&cluster, true).await;
        door.run(changed(keys / 4, 2)).await;
        door.lease("ours", 3).await;
    });
    etcdctl(&endpoint, &[ROOT, "user", "revoke-role", "late", "plain"]);
    etcdctl(&endpoint, &[ROOT, "user", "add", "ours:ours'"]);
    users::check(&endpoint);
    let written = picture(&cluster);
    assert!(written.revision > origin.revision && written.leases.len() == 13);
    told("Kelson writes");
    let snapshot = temp.path().join("kelson.db");
    if by_snapshot {
        save(&endpoint, &snapshot);
    }
    cluster.stop(0);

    let mut back = Cluster::reserved(etcd, 1);
    export(&cluster.data_dir(0), &back, version);
    start(&mut back);
    written.assert_same(&picture(&back), "etcd, from an exported directory");
    serves(&back);
    told("etcd, from an exported directory");
    if by_snapshot {
        let theirs = restored(etcd, &peer("etcdutl"), &snapshot);
        written.assert_same(&picture(&theirs), "etcd, from a snapshot of Kelson");
        serves(&theirs);
        told("etcd, from a snapshot of Kelson");
    }
}

fn export(from: &Path, to: &Cluster, version: &str) {
    let (from, target) = (from.display().to_string(), to.data_dir(0).display().to_string());
    let (list, url) = (to.initial_cluster(), to.peer_url(0));
    let words = ["export", "--data-dir", &from, "--to", &target, "--name=m0"];
    let words = words.into_iter().chain(["--etcd-version", version, "--initial-cluster", &list]);
    run(&kelson_binary(), words.chain(["--initial-advertise-peer-urls", &url])).ok();
}

/// It goes on from there.
fn serves(cluster: &Cluster) {
    let endpoint = cluster.endpoint(0);
    users::check(&endpoint);
    users::log_in(&endpoint, "root", "r00t");
    etcdctl(&endpoint, &["--user=ann:ann's", "put", "ann/back", "x"]);
    etcdctl(&endpoint, &[ROOT, "user", "delete", "ours"]);
    assert_eq!(etcdctl(&endpoint, &[ROOT, "get", "ann/back"]), "ann/back\nx\n");
}
