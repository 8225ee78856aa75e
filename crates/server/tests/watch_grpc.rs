//! Watches of one real member over gRPC: the codec, metadata, the end of streams, and that events
//! of acknowledged writes arrive with the revision that the writer was told.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use kelson_api::command::command::Op;
use kelson_api::etcdserverpb::watch_client::WatchClient;
use kelson_api::etcdserverpb::watch_request::RequestUnion;
use kelson_api::etcdserverpb::{
    PutRequest, WatchCancelRequest, WatchCreateRequest, WatchProgressRequest, WatchRequest,
    WatchResponse,
};
use kelson_raft::{Node, NodeConfig};
use kelson_server::app::App;
use kelson_server::callers::Callers;
use kelson_server::limits::Limits;
use kelson_server::metrics::Metrics;
use kelson_server::metrics::peers::TrafficByUrl;
use kelson_server::services::watch::{WatchServer, server};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::transport::Channel;
use tonic::{Code, Request, Status, Streaming};

const DEADLINE: Duration = Duration::from_secs(20);

/// A member on a port of its own that ends with this value.
struct Member {
    node: Node,
    stop: watch::Sender<bool>,
    channel: Channel,
    server: WatchServer,
    _dir: tempfile::TempDir,
}

impl Member {
    async fn start(limits: Limits) -> Member {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let config = NodeConfig::with_defaults(dir.path());
        let (node, reader) = Node::start(config).await.expect("a new member");
        let (stop, stopping) = watch::channel(false);
        let metrics = Arc::new(Metrics::new(false));
        let app = App {
            node: node.clone(),
            callers: Arc::new(Callers::new(node.clone(), reader.clone())),
            reader,
            limits: Arc::new(limits),
            metrics,
            stopping,
            probes: Arc::default(),
            traffic: TrafficByUrl::default(),
        };
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("it is bound");
        let server = server(&app);
        let routes = tonic::transport::Server::builder().add_service(server.clone());
        tokio::spawn(routes.serve_with_incoming(TcpListenerStream::new(listener)));
        let endpoint = Channel::from_shared(format!("http://{address}")).expect("an address");
        let channel = endpoint.connect().await.expect("the server listens");
        Member { node, stop, channel, server, _dir: dir }
    }

    async fn put(&self, key: &str, value: &str) -> i64 {
        let (key, value) = (key.to_owned().into(), value.to_owned().into());
        let put = Op::Put(PutRequest { key, value, ..Default::default() });
        let outcome = tokio::time::timeout(DEADLINE, self.node.propose(put)).await;
        let outcome = outcome.expect("in time").expect("a member alone agrees with itself");
        outcome.result.expect("a good put");
        outcome.revision
    }

    async fn open(&self) -> Stream {
        let (requests, receiver) = mpsc::channel(1000);
        let mut request = Request::new(ReceiverStream::new(receiver));
        request.metadata_mut().insert("hasleader", "true".parse().expect("ASCII"));
        let responses = WatchClient::new(self.channel.clone()).watch(request).await;
        Stream { requests, responses: responses.expect("a stream").into_inner() }
    }
}

struct Stream {
    requests: mpsc::Sender<WatchRequest>,
    responses: Streaming<WatchResponse>,
}

impl Stream {
    async fn send(&self, union: RequestUnion) {
        let request = WatchRequest { request_union: Some(union) };
        self.requests.send(request).await.expect("the stream is open");
    }

    async fn create(&mut self, request: WatchCreateRequest) -> WatchResponse {
        self.send(RequestUnion::CreateRequest(request)).await;
        let response = self.next().await;
        assert!(response.created, "{response:?}");
        response
    }

    async fn message(&mut self) -> Result<Option<WatchResponse>, Status> {
        let message = tokio::time::timeout(DEADLINE, self.responses.message()).await;
        message.expect("something within the deadline")
    }

    async fn next(&mut self) -> WatchResponse {
        self.message().await.expect("no error").expect("an open stream")
    }
}

fn create(key: &'static str, range_end: &'static str) -> WatchCreateRequest {
    WatchCreateRequest { key: key.into(), range_end: range_end.into(), ..Default::default() }
}

fn revision(response: &WatchResponse) -> i64 {
    response.header.as_ref().expect("a header").revision
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_member_serves_watches() {
    let member = Member::start(Limits::default()).await;
    let first = member.put("a", "before").await;
    let mut stream = member.open().await;
    let history = WatchCreateRequest { start_revision: first, ..create("a", "b") };
    let created = stream.create(history).await;
    let header = created.header.expect("a header");
    assert_eq!(header.member_id, member.node.status().member_id);
    assert_eq!(header.cluster_id, member.node.status().cluster_id);
    assert_eq!((created.watch_id, header.revision), (0, first));
    let response = stream.next().await;
    assert_eq!(response.events[0].kv.as_ref().expect("a key-value").value, "before");

    let with_prev_kv = WatchCreateRequest { prev_kv: true, ..create("a", "") };
    assert_eq!(stream.create(with_prev_kv).await.watch_id, 1);
    let second = member.put("a", "after").await;
    for watch_id in [0, 1] {
        let response = stream.next().await;
        assert_eq!((response.watch_id, revision(&response)), (watch_id, second));
        let prev_kv = response.events[0].prev_kv.as_ref().map(|kv| kv.value.clone());
        assert_eq!(prev_kv, (watch_id == 1).then(|| Bytes::from_static(b"before")));
    }
    let third = member.put("elsewhere", "x").await;
    stream.send(RequestUnion::ProgressRequest(WatchProgressRequest {})).await;
    let progress = stream.next().await;
    assert_eq!((progress.watch_id, revision(&progress)), (-1, third));
    stream.send(RequestUnion::CancelRequest(WatchCancelRequest { watch_id: 1 })).await;
    let canceled = stream.next().await;
    assert!(canceled.canceled && canceled.watch_id == 1);
    stream.send(RequestUnion::CancelRequest(WatchCancelRequest { watch_id: 0 })).await;
    assert!(stream.next().await.canceled);
    drop(stream.requests);
    let end = tokio::time::timeout(DEADLINE, stream.responses.message()).await;
    assert_eq!(end.expect("in time").expect("a good end"), None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_end_when_the_server_stops() {
    let member = Member::start(Limits::default()).await;
    let mut stream = member.open().await;
    stream.create(create("a", "")).await;
    member.stop.send_replace(true);
    let status = stream.message().await.expect_err("the server stops");
    assert_eq!(
        (status.code(), status.message()),
        (Code::Unavailable, "etcdserver: server stopped")
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_goes_away_leaves_no_watcher() {
    let member = Member::start(Limits::default()).await;
    let mut stream = member.open().await;
    stream.create(create("a", "")).await;
    let stats = member.server.stats();
    assert_eq!((stats.streams(), stats.watchers()), (1, 1));
    drop(stream);
    let gone = async {
        while stats.streams() > 0 || stats.watchers() > 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(DEADLINE, gone).await.expect("the stream is forgotten");
}

/// A client that does not read holds up neither writers nor other watchers, and gets everything
/// when it reads again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_does_not_read_disturbs_nobody() {
    let member = Member::start(Limits::default()).await;
    let mut slow = member.open().await;
    let mut quick = member.open().await;
    slow.create(create("a", "")).await;
    quick.create(create("a", "")).await;
    let value = "v".repeat(20_000);
    let mut last = 0;
    // More than the windows of HTTP/2 and the queue of the hub hold together.
    while member.server.stats().streams_overflowed() == 0 {
        last = member.put("a", &value).await;
        assert_eq!(revision(&quick.next().await), last);
    }
    let mut expected = 2;
    while expected <= last {
        for event in slow.next().await.events {
            assert_eq!(event.kv.expect("a key-value").mod_revision, expected);
            expected += 1;
        }
    }
    let live = member.put("a", "live").await;
    assert_eq!(revision(&slow.next().await), live);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn big_revisions_are_cut_at_the_request_limit() {
    let limits = Limits { max_request_bytes: 10_000, ..Limits::default() };
    let member = Member::start(limits).await;
    let mut stream = member.open().await;
    for number in 0..60 {
        member.put(&format!("a{number:02}"), &"v".repeat(20_000)).await;
    }
    let request = WatchCreateRequest { fragment: true, start_revision: 2, ..create("a", "b") };
    stream.create(request).await;
    let mut events = 0;
    let mut pieces = 0;
    while events < 60 {
        let response = stream.next().await;
        let bytes = kelson_api::Message::encoded_len(&response);
        assert!(bytes < 10_000 + 512 * 1024);
        assert_eq!(response.fragment, events + response.events.len() < 60);
        events += response.events.len();
        pieces += 1;
    }
    assert_eq!(pieces, 3);
}
