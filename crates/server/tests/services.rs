//! The services over a real connection and a real member of one: every verb once, the errors that
//! need the whole path, and the answers' headers. Rules of single checks are tested beside them.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use kelson_api::Error;
use kelson_api::etcdserverpb::cluster_client::ClusterClient;
use kelson_api::etcdserverpb::compare::{CompareTarget, TargetUnion};
use kelson_api::etcdserverpb::kv_client::KvClient;
use kelson_api::etcdserverpb::lease_client::LeaseClient;
use kelson_api::etcdserverpb::maintenance_client::MaintenanceClient;
use kelson_api::etcdserverpb::request_op::Request as Operation;
use kelson_api::etcdserverpb::response_op::Response as Answer;
use kelson_api::etcdserverpb::*;
use kelson_api::health::HealthCheckRequest;
use kelson_api::health::health_client::HealthClient;
use kelson_raft::{Node, NodeConfig};
use kelson_server::app::App;
use kelson_server::callers::Callers;
use kelson_server::housekeeping::Checks;
use kelson_server::limits::Limits;
use kelson_server::metrics::Metrics;
use kelson_server::metrics::peers::TrafficByUrl;
use kelson_server::{housekeeping, services};
use sha2::{Digest, Sha256};
use tokio::sync::{oneshot, watch};
use tonic::transport::{Channel, Endpoint, Server};
use tonic::{Code, Request, Status};

/// How long a test waits for something that must come.
const DEADLINE: Duration = Duration::from_secs(30);

/// A member that serves, and what must live as long as it does.
struct Member {
    channel: Channel,
    node: Node,
    stop: watch::Sender<bool>,
    end: Option<oneshot::Sender<()>>,
    server: tokio::task::JoinHandle<()>,
    housekeeping: housekeeping::Housekeeping,
    data: tempfile::TempDir,
}

impl Member {
    async fn start(limits: Limits) -> Member {
        Self::start_in(tempfile::tempdir().expect("temporary directory"), limits).await
    }

    async fn start_in(data: tempfile::TempDir, limits: Limits) -> Member {
        let config = NodeConfig::with_defaults(data.path());
        let (node, reader) = Node::start(config).await.expect("the member starts");
        let (stop, stopping) = watch::channel(false);
        let app = App {
            node: node.clone(),
            callers: Arc::new(Callers::new(node.clone(), reader.clone())),
            reader,
            limits: Arc::new(limits),
            metrics: Arc::new(Metrics::new(false)),
            stopping,
            probes: Arc::default(),
            traffic: TrafficByUrl::default(),
        };
        let housekeeping = housekeeping::start(&app, &Checks::default());
        let routes = services::routes(&app, housekeeping.lessor());
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("bound");
        let (end, ended) = oneshot::channel::<()>();
        let server = tokio::spawn(async move {
            let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener);
            let server = Server::builder().add_routes(routes);
            let shutdown = async { drop(ended.await) };
            server.serve_with_incoming_shutdown(incoming, shutdown).await.expect("serves");
        });
        let endpoint = Endpoint::from_shared(format!("http://{address}")).expect("valid");
        let channel = endpoint.connect().await.expect("connects");
        Member { channel, node, stop, end: Some(end), server, housekeeping, data }
    }

    /// Ends everything and returns the data directory.
    async fn stop(mut self) -> tempfile::TempDir {
        self.stop.send_replace(true);
        drop(self.end.take());
        drop(self.channel);
        self.server.await.expect("no panic");
        self.housekeeping.stop().await;
        self.node.shutdown().await;
        self.data
    }

    fn kv(&self) -> KvClient<Channel> {
        KvClient::new(self.channel.clone())
    }

    fn lease(&self) -> LeaseClient<Channel> {
        LeaseClient::new(self.channel.clone())
    }

    fn maintenance(&self) -> MaintenanceClient<Channel> {
        MaintenanceClient::new(self.channel.clone())
    }
}

fn bytes(text: &str) -> Bytes {
    Bytes::copy_from_slice(text.as_bytes())
}

fn put(key: &str, value: &str) -> PutRequest {
    PutRequest { key: bytes(key), value: bytes(value), ..Default::default() }
}

fn get(key: &str) -> RangeRequest {
    RangeRequest { key: bytes(key), ..Default::default() }
}

fn prefix(key: &str, end: &str) -> RangeRequest {
    RangeRequest { key: bytes(key), range_end: bytes(end), ..Default::default() }
}

fn op(operation: Operation) -> RequestOp {
    RequestOp { request: Some(operation) }
}

/// Whether the status is exactly this row of the error table.
#[track_caller]
fn assert_error(status: Status, error: Error) {
    assert_eq!(status.message(), error.text());
    assert_eq!(status.code(), Code::from_i32(error.code() as i32), "{}", error.text());
}

async fn values(kv: &mut KvClient<Channel>, request: RangeRequest) -> Vec<String> {
    let kvs = kv.range(request).await.expect("range").into_inner().kvs;
    kvs.iter().map(|kv| String::from_utf8_lossy(&kv.value).into_owned()).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keys_and_transactions() {
    let member = Member::start(Limits::default()).await;
    let mut kv = member.kv();

    let empty = kv.range(get("a")).await.expect("range").into_inner();
    let header = empty.header.expect("a header");
    assert_eq!((header.revision, empty.count), (1, 0));
    let status = member.node.status();
    assert_eq!((header.cluster_id, header.member_id), (status.cluster_id, status.member_id));
    assert!(header.cluster_id != 0 && header.raft_term > 0);

    let first = kv.put(put("a", "1")).await.expect("put").into_inner();
    assert_eq!(first.header.expect("a header").revision, 2);
    let again = PutRequest { prev_kv: true, ..put("a", "2") };
    let again = kv.put(again).await.expect("put").into_inner();
    assert_eq!(again.prev_kv.expect("asked for").value, bytes("1"));
    let old = RangeRequest { revision: 2, ..get("a") };
    assert_eq!(values(&mut kv, old).await, ["1"]);

    let guarded = TxnRequest {
        compare: vec![Compare {
            key: bytes("a"),
            target: CompareTarget::Mod as i32,
            target_union: Some(TargetUnion::ModRevision(3)),
            ..Default::default()
        }],
        success: vec![op(Operation::RequestPut(put("a", "3")))],
        failure: vec![op(Operation::RequestRange(get("a")))],
    };
    let done = kv.txn(guarded.clone()).await.expect("txn").into_inner();
    assert!(done.succeeded);
    assert_eq!(done.header.expect("a header").revision, 4);
    let Some(Answer::ResponsePut(inner)) = &done.responses[0].response else {
        panic!("an answer to a put: {:?}", done.responses);
    };
    let expected = ResponseHeader { revision: 4, ..Default::default() };
    assert_eq!(inner.header, Some(expected));
    let refused = kv.txn(guarded).await.expect("txn").into_inner();
    assert!(!refused.succeeded);
    assert_eq!(refused.header.expect("a header").revision, 4);

    let reading =
        TxnRequest { success: vec![op(Operation::RequestRange(get("a")))], ..Default::default() };
    let read = kv.txn(reading).await.expect("txn").into_inner();
    assert!(read.succeeded && read.responses.len() == 1);

    let delete = DeleteRangeRequest { key: bytes("a"), range_end: bytes("b"), prev_kv: true };
    let deleted = kv.delete_range(delete).await.expect("delete").into_inner();
    assert_eq!((deleted.deleted, deleted.header.expect("a header").revision), (1, 5));
    assert_eq!(deleted.prev_kvs[0].value, bytes("3"));
    member.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn refusals_have_etcd_s_code_and_text() {
    let member = Member::start(Limits::default()).await;
    let mut kv = member.kv();
    assert_error(kv.range(get("")).await.expect_err("no key"), Error::EmptyKey);
    assert_error(kv.put(put("", "")).await.expect_err("no key"), Error::EmptyKey);
    let future = RangeRequest { revision: 99, ..get("a") };
    assert_error(kv.range(future).await.expect_err("future"), Error::FutureRevision);
    let leased = PutRequest { lease: 77, ..put("a", "") };
    assert_error(kv.put(leased).await.expect_err("no lease"), Error::LeaseNotFound);
    let keeping = PutRequest { ignore_value: true, ..put("a", "") };
    assert_error(kv.put(keeping).await.expect_err("no key"), Error::KeyNotFound);
    let twice = vec![op(Operation::RequestPut(put("a", ""))); 2];
    let twice = TxnRequest { success: twice, ..Default::default() };
    assert_error(kv.txn(twice).await.expect_err("twice"), Error::DuplicateKey);

    let value = "x".repeat(1_600_000);
    assert_error(kv.put(put("a", &value)).await.expect_err("large"), Error::RequestTooLarge);
    let value = "x".repeat(3 << 20);
    let larger = kv.put(put("a", &value)).await.expect_err("larger");
    assert_eq!(larger.code(), Code::ResourceExhausted);
    let text = "grpc: received message larger than max (3145736 vs. 2097152)";
    assert_eq!(larger.message(), text);

    let mut impatient = Request::new(get("a"));
    impatient.metadata_mut().insert("hasleader", "true".parse().expect("ascii"));
    kv.range(impatient).await.expect("the member leads");
    member.stop().await;
}

/// Calls a method with these bytes as its message.
async fn raw_call(channel: Channel, path: &'static str, message: Bytes) -> Status {
    use http_body_util::{BodyExt, Full};
    let mut frame = vec![0];
    frame.extend(u32::try_from(message.len()).expect("short").to_be_bytes());
    frame.extend_from_slice(&message);
    let body = tonic::body::Body::new(Full::new(Bytes::from(frame)));
    let request = http::Request::post(format!("http://localhost{path}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(body)
        .expect("a request");
    let mut channel = channel;
    let response = tower::ServiceExt::ready(&mut channel).await.expect("ready");
    let response = tower::Service::call(response, request).await.expect("an answer");
    let (parts, body) = response.into_parts();
    if let Some(status) = Status::from_header_map(&parts.headers) {
        return status;
    }
    let trailers = body.collect().await.expect("a body").trailers().cloned().unwrap_or_default();
    Status::from_header_map(&trailers).expect("a status")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_transport_speaks_like_grpc_go() {
    let member = Member::start(Limits::default()).await;
    let call = |path, message| raw_call(member.channel.clone(), path, message);
    let unknown = call("/etcdserverpb.KV/Frob", Bytes::new()).await;
    assert_eq!(unknown.code(), Code::Unimplemented);
    assert_eq!(unknown.message(), "unknown method Frob for service etcdserverpb.KV");
    let unknown = call("/etcdserverpb.Auth/AuthEnable", Bytes::new()).await;
    assert_eq!(unknown.code(), Code::Unimplemented);
    assert_eq!(unknown.message(), "unknown service etcdserverpb.Auth");
    let garbage = call("/etcdserverpb.KV/Range", Bytes::from_static(&[0x0a, 5, 1])).await;
    assert_eq!(garbage.code(), Code::Internal);
    let text = garbage.message();
    assert!(text.starts_with("grpc: error unmarshalling request: "), "{text}");
    let fine = call("/etcdserverpb.KV/Range", Bytes::from_static(&[0x0a, 1, b'k'])).await;
    assert_eq!(fine.code(), Code::Ok);
    member.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_streamed_range_is_the_range_in_pieces() {
    let member = Member::start(Limits::default()).await;
    let mut kv = member.kv();
    for n in 0..100 {
        kv.put(put(&format!("k{n:03}"), &"v".repeat(1000))).await.expect("put");
    }
    for request in [
        prefix("k", "l"),
        RangeRequest { limit: 37, ..prefix("k", "l") },
        RangeRequest { revision: 50, ..prefix("k", "l") },
        RangeRequest { keys_only: true, ..prefix("k", "l") },
        RangeRequest { count_only: true, ..prefix("k", "l") },
        prefix("x", "y"),
    ] {
        let whole = kv.range(request.clone()).await.expect("range").into_inner();
        let mut stream = kv.range_stream(request).await.expect("stream").into_inner();
        let mut merged = RangeResponse::default();
        let mut messages = 0;
        while let Some(message) = stream.message().await.expect("no error") {
            assert!(merged.header.is_none(), "the header comes last");
            let part = message.range_response.expect("every message has one");
            merged.kvs.extend(part.kvs);
            merged.header = part.header;
            (merged.more, merged.count) = (part.more, part.count);
            messages += 1;
        }
        assert!(messages >= 1 && merged.header.is_some());
        assert_eq!(merged, whole);
    }
    let sorted = RangeRequest { sort_order: 2, ..prefix("k", "l") };
    assert_error(kv.range_stream(sorted).await.expect_err("sorted"), Error::StreamSort);
    let future = RangeRequest { revision: 999, ..prefix("k", "l") };
    assert_error(kv.range_stream(future).await.expect_err("future"), Error::FutureRevision);
    member.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn compaction_hides_the_past() {
    let member = Member::start(Limits::default()).await;
    let mut kv = member.kv();
    for value in ["1", "2", "3"] {
        kv.put(put("a", value)).await.expect("put");
    }
    let compact = |revision, physical| CompactionRequest { revision, physical };
    let done = kv.compact(compact(3, true)).await.expect("compact").into_inner();
    assert_eq!(done.header.expect("a header").revision, 4);
    let old = |revision| RangeRequest { revision, ..get("a") };
    assert_error(kv.range(old(2)).await.expect_err("gone"), Error::Compacted);
    assert_eq!(values(&mut kv, old(3)).await, ["2"]);
    for physical in [false, true] {
        let again = kv.compact(compact(3, physical)).await;
        assert_error(again.expect_err("done before"), Error::Compacted);
    }
    assert_error(kv.compact(compact(9, false)).await.expect_err("future"), Error::FutureRevision);
    member.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn leases_live_and_end() {
    let member = Member::start(Limits::default()).await;
    let (mut kv, mut lease) = (member.kv(), member.lease());
    let grant = |id, ttl| LeaseGrantRequest { id, ttl };
    let short = lease.lease_grant(grant(0, 1)).await.expect("grant").into_inner();
    assert_eq!(short.ttl, 2, "raised to the shortest lease");
    assert!(short.id > 0);
    let long = lease.lease_grant(grant(-5, 100)).await.expect("grant").into_inner();
    assert_eq!((long.id, long.ttl), (-5, 100));
    assert_error(lease.lease_grant(grant(-5, 9)).await.expect_err("taken"), Error::LeaseExists);
    let endless = lease.lease_grant(grant(0, 9_000_000_001)).await.expect_err("too long");
    assert_error(endless, Error::LeaseTtlTooLarge);
    for (key, id) in [("s", short.id), ("l", long.id)] {
        kv.put(PutRequest { lease: id, ..put(key, "v") }).await.expect("put");
    }

    let asked = LeaseTimeToLiveRequest { id: long.id, keys: true };
    let left = lease.lease_time_to_live(asked).await.expect("time to live").into_inner();
    assert_eq!((left.id, left.granted_ttl, left.keys), (-5, 100, vec![bytes("l")]));
    assert!((90..=100).contains(&left.ttl));
    let asked = LeaseTimeToLiveRequest { id: 4711, keys: true };
    let unknown = lease.lease_time_to_live(asked).await.expect("time to live").into_inner();
    assert_eq!((unknown.ttl, unknown.granted_ttl), (-1, 0));
    let listed = lease.lease_leases(LeaseLeasesRequest {}).await.expect("leases").into_inner();
    assert_eq!(listed.leases, [LeaseStatus { id: short.id }, LeaseStatus { id: long.id }]);

    let renewals = [long.id, 4711, 0].map(|id| LeaseKeepAliveRequest { id });
    let answers = lease.lease_keep_alive(tokio_stream::iter(renewals)).await.expect("renewals");
    let mut answers = answers.into_inner();
    for expected in [(long.id, 100), (4711, 0), (0, 0)] {
        let answer = answers.message().await.expect("no error").expect("an answer");
        assert_eq!((answer.id, answer.ttl), expected);
        assert!(answer.header.is_some());
    }
    assert!(answers.message().await.expect("no error").is_none());

    let gone = async {
        while !values(&mut kv, get("s")).await.is_empty() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(DEADLINE, gone).await.expect("the short lease ends");
    let revoke = LeaseRevokeRequest { id: long.id };
    let revoked = lease.lease_revoke(revoke).await.expect("revoke").into_inner();
    assert_eq!(revoked.header.expect("a header").revision, 5);
    assert!(values(&mut kv, get("l")).await.is_empty());
    assert_error(lease.lease_revoke(revoke).await.expect_err("gone"), Error::LeaseNotFound);
    member.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_quota_stops_what_adds() {
    let limits = Limits { quota_backend_bytes: 200, ..Limits::default() };
    let member = Member::start(limits).await;
    let (mut kv, mut maintenance) = (member.kv(), member.maintenance());
    assert_error(kv.put(put("", "")).await.expect_err("over quota"), Error::NoSpace);
    let member_id = member.node.status().member_id;
    let status = maintenance.status(StatusRequest {}).await.expect("status").into_inner();
    assert_eq!(status.errors, [format!("memberID:{member_id} alarm:NOSPACE ")]);
    assert_eq!(status.db_size_quota, 200);
    let delete = DeleteRangeRequest { key: bytes("a"), ..Default::default() };
    kv.delete_range(delete).await.expect("deletes pass");
    let reading =
        TxnRequest { success: vec![op(Operation::RequestRange(get("a")))], ..Default::default() };
    kv.txn(reading).await.expect("reads pass");

    let alarm = |action, alarm| AlarmRequest { action, member_id, alarm };
    let listed = maintenance.alarm(alarm(0, 0)).await.expect("alarms").into_inner();
    assert_eq!(listed.alarms, [AlarmMember { member_id, alarm: 1 }]);
    let cleared = maintenance.alarm(alarm(2, 1)).await.expect("clear").into_inner();
    assert_eq!(cleared.alarms.len(), 1);
    let again = maintenance.alarm(alarm(2, 1)).await.expect("clear").into_inner();
    assert!(again.alarms.is_empty());
    member.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn maintenance_speaks_of_this_member() {
    let member = Member::start(Limits::default()).await;
    let (mut kv, mut maintenance) = (member.kv(), member.maintenance());
    for n in 0..500 {
        kv.put(put(&format!("k{n}"), &"v".repeat(500))).await.expect("put");
    }
    let status = maintenance.status(StatusRequest {}).await.expect("status").into_inner();
    let raft = member.node.status();
    assert_eq!(status.leader, raft.member_id);
    assert_eq!(status.raft_term, raft.term);
    assert!(status.raft_applied_index > 0 && status.raft_index >= status.raft_applied_index);
    assert!(status.errors.is_empty() && !status.is_learner && status.db_size > 0);
    assert_eq!(status.version, kelson_server::version::ETCD_VERSION);
    assert_eq!(status.downgrade_info, Some(DowngradeInfo::default()));
    assert_eq!(status.header.expect("a header").revision, 501);

    let hash = |revision| HashKvRequest { revision };
    let now = maintenance.hash_kv(hash(0)).await.expect("hash").into_inner();
    assert_eq!((now.hash_revision, now.compact_revision), (501, -1));
    let same = maintenance.hash_kv(hash(501)).await.expect("hash").into_inner();
    assert_eq!(same.hash, now.hash);
    let early = maintenance.hash_kv(hash(100)).await.expect("hash").into_inner();
    assert!(early.hash != now.hash && early.hash_revision == 100);
    let future = maintenance.hash_kv(hash(999)).await.expect_err("future");
    assert_error(future, Error::FutureRevision);
    maintenance.hash(HashRequest {}).await.expect("hash");

    let mut pieces = maintenance.snapshot(SnapshotRequest {}).await.expect("starts").into_inner();
    let (mut file, mut last) = (Vec::new(), SnapshotResponse::default());
    while let Some(piece) = pieces.message().await.expect("no error") {
        assert!(piece.header.is_none());
        file.extend_from_slice(&last.blob);
        assert!(last.blob.is_empty() || piece.remaining_bytes <= last.remaining_bytes);
        last = piece;
    }
    assert_eq!(last.blob[..], Sha256::digest(&file)[..]);
    assert!(!file.is_empty() && file.len() % 512 == 0);

    let done = maintenance.defragment(DefragmentRequest {}).await.expect("defragment");
    assert_eq!(done.into_inner().header, None);
    let to_itself = MoveLeaderRequest { target_id: raft.member_id };
    maintenance.move_leader(to_itself).await.expect("it leads already");
    let refused = maintenance.move_leader(MoveLeaderRequest { target_id: 9 }).await;
    assert_error(refused.expect_err("unknown member"), Error::BadLeaderTransferee);
    member.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn members_and_health() {
    let member = Member::start(Limits::default()).await;
    let mut cluster = ClusterClient::new(member.channel.clone());
    let id = member.node.status().member_id;
    for linearizable in [false, true] {
        let request = MemberListRequest { linearizable };
        let listed = cluster.member_list(request).await.expect("list").into_inner();
        assert_eq!(listed.header.expect("a header").revision, 0);
        assert_eq!(listed.members.iter().map(|m| m.id).collect::<Vec<_>>(), [id]);
    }
    let peer_ur_ls = vec!["http://127.0.0.1:9".to_owned()];
    let update = MemberUpdateRequest { id, peer_ur_ls: peer_ur_ls.clone() };
    let updated = cluster.member_update(update).await.expect("update").into_inner();
    assert_eq!(updated.members[0].peer_ur_ls, peer_ur_ls);
    let taken = MemberAddRequest { peer_ur_ls, is_learner: false };
    assert_error(cluster.member_add(taken).await.expect_err("taken"), Error::PeerUrlExists);
    let unknown = cluster.member_remove(MemberRemoveRequest { id: 9 }).await;
    assert_error(unknown.expect_err("unknown"), Error::MemberNotFound);
    let voter = cluster.member_promote(MemberPromoteRequest { id }).await;
    assert_error(voter.expect_err("a voter"), Error::MemberNotLearner);

    let mut health = HealthClient::new(member.channel.clone());
    let check = |service: &str| HealthCheckRequest { service: service.to_owned() };
    let serving = health.check(check("")).await.expect("check").into_inner();
    assert_eq!(serving.status, 1);
    let unknown = health.check(check("etcd")).await.expect_err("unknown");
    assert_error(unknown, Error::UnknownHealthService);
    let mut changes = health.watch(check("")).await.expect("watch").into_inner();
    assert_eq!(changes.message().await.expect("no error").expect("a status").status, 1);
    member.stop.send_replace(true);
    assert_error(changes.message().await.expect_err("the server stops"), Error::Stopped);
    member.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everything_is_there_after_a_restart() {
    let member = Member::start(Limits::default()).await;
    member.kv().put(put("a", "1")).await.expect("put");
    let grant = LeaseGrantRequest { id: 7, ttl: 100 };
    member.lease().lease_grant(grant).await.expect("grant");
    member.kv().put(PutRequest { lease: 7, ..put("b", "2") }).await.expect("put");
    let data = member.stop().await;

    let member = Member::start_in(data, Limits::default()).await;
    let mut kv = member.kv();
    let all = kv.range(prefix("a", "z")).await.expect("range").into_inner();
    assert_eq!(all.header.expect("a header").revision, 3);
    assert_eq!(all.kvs.iter().map(|kv| kv.lease).collect::<Vec<_>>(), [0, 7]);
    let asked = LeaseTimeToLiveRequest { id: 7, keys: true };
    let left = member.lease().lease_time_to_live(asked).await.expect("time").into_inner();
    assert_eq!(left.keys, [bytes("b")]);
    assert!((90..=101).contains(&left.ttl), "{}", left.ttl);
    member.stop().await;
}
