//! The HTTP surface of a running member: paths, bodies, codes and listeners as etcd has them, and
//! the counters that gRPC calls leave in `/metrics`.

use kelson_api::etcdserverpb::kv_client::KvClient;
use kelson_api::etcdserverpb::watch_client::WatchClient;
use kelson_api::etcdserverpb::{
    PutRequest, RangeRequest, WatchCreateRequest, WatchRequest, watch_request::RequestUnion,
};

mod process;

use process::{Server, ask, get};

#[test]
fn probes_and_versions_answer_as_etcd_does() {
    let server = Server::start(&[]);
    for port in [server.client, server.metrics] {
        for path in ["/health", "/health?serializable=true", "/health?exclude=NOSPACE"] {
            let answer = get(port, path).expect("an answer");
            assert_eq!((answer.status, answer.body.as_str()), (200, HEALTHY), "{path}");
            assert!(answer.headers.contains("content-type: text/plain; charset=utf-8"));
        }
        for path in ["/livez", "/readyz", "/livez/serializable_read", "/readyz/non_learner"] {
            let answer = get(port, path).expect("an answer");
            assert_eq!((answer.status, answer.body.as_str()), (200, "ok\n"), "{path}");
        }
        let answer = get(port, "/livez?verbose").expect("an answer");
        assert_eq!(answer.body, "[+]serializable_read ok\nok\n");
        let answer = get(port, "/readyz?verbose&exclude=non_learner&exclude=nothing");
        let body = answer.expect("an answer").body;
        assert_eq!(body.lines().count(), 4, "{body}");
        assert!(!body.contains("non_learner"), "{body}");
        for path in ["/", "/livez/non_learner", "/readyz/nothing", "/v2/keys", "/debug/pprof/"] {
            let answer = get(port, path).expect("an answer");
            assert_eq!((answer.status, answer.body.as_str()), (404, NOT_FOUND), "{path}");
        }
        let answer = ask(port, "POST", "/health", "").expect("an answer");
        assert_eq!(answer.status, 405);
        assert!(answer.headers.contains("allow: get"), "{}", answer.headers);
        assert_eq!(get(port, "/metrics").expect("an answer").status, 200);
    }
}

const HEALTHY: &str = "{\"health\":\"true\",\"reason\":\"\"}";
const NOT_FOUND: &str = "404 page not found\n";

#[test]
fn each_listener_has_its_own_paths() {
    let server = Server::start(&[]);
    assert_eq!(get(server.metrics, "/v3/kv/range").expect("an answer").status, 404);
    assert_eq!(get(server.peer, "/v3/kv/range").expect("an answer").status, 404);
    assert_eq!(get(server.client, "/v3/kv/range").expect("an answer").status, 501);
    let version = "{\"etcdserver\":\"3.7.3\",\"etcdcluster\":\"3.7.0\",\"storage\":\"3.7.0\"}";
    eventually(|| get(server.client, "/version").expect("an answer").body == version);
    assert_eq!(get(server.peer, "/version").expect("an answer").body, version);
    assert_eq!(get(server.metrics, "/version").expect("an answer").status, 404);
    assert_eq!(get(server.metrics, "/members").expect("an answer").status, 404);
    assert_eq!(get(server.peer, "/health").expect("an answer").status, 404);

    let members = get(server.peer, "/members").expect("an answer");
    assert!(members.headers.contains("x-etcd-cluster-id: "), "{}", members.headers);
    let rows: serde_json::Value = serde_json::from_str(&members.body).expect("JSON");
    assert_eq!(rows[0]["name"], "default");
    assert_eq!(rows[0]["peerURLs"][0], format!("http://127.0.0.1:{}", server.peer));
    assert_eq!(rows[0]["clientURLs"][0], format!("http://127.0.0.1:{}", server.client));
    assert!(rows[0]["id"].is_u64());
    assert!(rows[0].get("isLearner").is_none());

    let variables = get(server.client, "/debug/vars").expect("an answer");
    let variables: serde_json::Value = serde_json::from_str(&variables.body).expect("JSON");
    assert!(variables["file_descriptor_limit"].as_u64() > Some(0));
}

#[test]
fn browsers_and_host_names_are_let_in_by_the_flags() {
    let server = Server::start(&["--cors=http://good.example", "--host-whitelist=good.example"]);
    let good = "Host: good.example:2379\r\nOrigin: http://good.example\r\n";
    let answer = ask(server.client, "OPTIONS", "/health", good).expect("an answer");
    assert_eq!(answer.status, 200);
    assert!(answer.headers.contains("access-control-allow-origin: http://good.example"));
    // The headers are there in any case if everybody may call; scripts gateway/browsers and
    // gateway/origins have the rest.
    let foreign = "Host: good.example\r\nOrigin: http://evil.example\r\n";
    let answer = ask(server.client, "GET", "/health", foreign).expect("an answer");
    assert_eq!(answer.status, 200);
    assert!(!answer.headers.contains("access-control"), "{}", answer.headers);
    assert_eq!(get(server.client, "/health").expect("an answer").status, 421);
    assert_eq!(get(server.metrics, "/health").expect("an answer").status, 200);
}

/// The value of one sample.
fn sample(page: &str, name: &str) -> Option<f64> {
    let line = page.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '))?;
    line.parse().ok()
}

fn eventually(mut holds: impl FnMut() -> bool) {
    let deadline = std::time::Instant::now() + process::PATIENCE;
    while !holds() {
        assert!(std::time::Instant::now() < deadline, "it never came true");
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
}

#[test]
fn the_metrics_that_alerts_use_exist_from_the_start() {
    let server = Server::start(&["--quota-backend-bytes=1000000000", "--metrics=extensive"]);
    let page = get(server.metrics, "/metrics").expect("an answer").body;
    for (name, value) in [
        ("etcd_server_has_leader", 1.0),
        ("etcd_server_is_leader", 1.0),
        ("etcd_server_quota_backend_bytes", 1e9),
        ("etcd_server_proposals_failed_total", 0.0),
        ("etcd_server_proposals_pending", 0.0),
        ("etcd_server_version{server_version=\"3.7.3\"}", 1.0),
        ("etcd_network_client_grpc_sent_bytes_total", 0.0),
    ] {
        assert_eq!(sample(&page, name), Some(value), "{name}");
    }
    for name in [
        "etcd_server_leader_changes_seen_total",
        "etcd_server_proposals_committed_total",
        "etcd_server_proposals_applied_total",
        "etcd_mvcc_db_total_size_in_bytes",
        "etcd_mvcc_db_total_size_in_use_in_bytes",
        "etcd_disk_wal_fsync_duration_seconds_count",
        "etcd_disk_wal_fsync_duration_seconds_bucket{le=\"8.192\"}",
        "etcd_disk_backend_commit_duration_seconds_bucket{le=\"0.001\"}",
        "process_resident_memory_bytes",
        "process_open_fds",
        "process_max_fds",
    ] {
        assert!(sample(&page, name).is_some(), "{name}");
    }
    let zero = "grpc_server_handled_total{grpc_code=\"Unavailable\",grpc_method=\"LeaseKeepAlive\",\
                grpc_service=\"etcdserverpb.Lease\",grpc_type=\"bidi_stream\"}";
    assert_eq!(sample(&page, zero), Some(0.0));
    assert!(page.contains("grpc_server_handling_seconds_bucket"));
}

fn handled(page: &str, kind: &str, service: &str, method: &str, code: &str) -> Option<f64> {
    let labels = format!(
        "{{grpc_code=\"{code}\",grpc_method=\"{method}\",grpc_service=\"{service}\",\
         grpc_type=\"{kind}\"}}"
    );
    sample(page, &format!("grpc_server_handled_total{labels}"))
}

/// One put, one bad range and one watch, then the connection breaks off.
fn call_and_leave(port: u16) {
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let channel = tonic::transport::Endpoint::from_shared(format!("http://127.0.0.1:{port}"));
    let channel = channel.expect("an endpoint");
    runtime.block_on(async {
        let channel = channel.connect().await.expect("connected");
        let mut kv = KvClient::new(channel.clone());
        let put = PutRequest { key: "k".into(), value: "v".into(), ..Default::default() };
        let mut request = tonic::Request::new(put);
        request.metadata_mut().insert("client-api-version", "3.6".parse().expect("a value"));
        kv.put(request).await.expect("stored");
        kv.range(RangeRequest::default()).await.expect_err("no key was given");

        let create = WatchCreateRequest { key: "k".into(), ..Default::default() };
        let create = WatchRequest { request_union: Some(RequestUnion::CreateRequest(create)) };
        let requests = futures::StreamExt::chain(
            futures::stream::iter([create]),
            futures::stream::pending::<WatchRequest>(),
        );
        let events = WatchClient::new(channel).watch(requests).await.expect("a stream");
        let created = events.into_inner().message().await.expect("an answer");
        assert!(created.expect("a message").created);
    });
}

#[test]
fn calls_are_counted_by_method_and_code() {
    let server = Server::start(&[]);
    call_and_leave(server.client);
    let page = || get(server.metrics, "/metrics").expect("an answer").body;
    let kv = "etcdserverpb.KV";
    // The client's going away reaches the server a moment later.
    eventually(|| {
        handled(&page(), "bidi_stream", "etcdserverpb.Watch", "Watch", "Canceled") == Some(1.0)
    });
    let page = page();
    assert_eq!(handled(&page, "unary", kv, "Put", "OK"), Some(1.0));
    assert_eq!(handled(&page, "unary", kv, "Range", "InvalidArgument"), Some(1.0));
    assert_eq!(handled(&page, "unary", kv, "Range", "OK"), Some(0.0));
    let requests = "etcd_server_client_requests_total";
    let known = format!("{requests}{{client_api_version=\"3.6\",type=\"unary\"}}");
    let unknown = format!("{requests}{{client_api_version=\"unknown\",type=\"unary\"}}");
    assert_eq!(sample(&page, &known), Some(1.0));
    assert_eq!(sample(&page, &unknown), Some(1.0));
    for direction in ["sent", "received"] {
        let name = format!("etcd_network_client_grpc_{direction}_bytes_total");
        assert!(sample(&page, &name) > Some(0.0), "{name}");
    }
    let labels = "{grpc_method=\"Watch\",grpc_service=\"etcdserverpb.Watch\",\
                  grpc_type=\"bidi_stream\"}";
    for direction in ["sent", "received"] {
        let name = format!("grpc_server_msg_{direction}_total{labels}");
        assert_eq!(sample(&page, &name), Some(1.0), "{name}");
    }
}

#[test]
fn an_open_watch_does_not_hold_up_the_end() {
    use std::os::unix::process::ExitStatusExt;
    let mut server = Server::start(&[]);
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let endpoint = format!("http://127.0.0.1:{}", server.client);
    let mut events = runtime.block_on(async {
        let endpoint = tonic::transport::Endpoint::from_shared(endpoint).expect("an endpoint");
        let mut watch = WatchClient::new(endpoint.connect().await.expect("connected"));
        let create = WatchCreateRequest { key: "k".into(), ..Default::default() };
        let create = WatchRequest { request_union: Some(RequestUnion::CreateRequest(create)) };
        let requests = futures::StreamExt::chain(
            futures::stream::iter([create]),
            futures::stream::pending::<WatchRequest>(),
        );
        let mut events = watch.watch(requests).await.expect("a stream").into_inner();
        assert!(events.message().await.expect("an answer").expect("a message").created);
        events
    });
    let id = server.child.id().to_string();
    let sent = std::process::Command::new("kill").arg(&id).status().expect("kill runs");
    assert!(sent.success());
    let status = runtime.block_on(events.message()).expect_err("the stream ends");
    assert_eq!(status.code(), tonic::Code::Unavailable);
    assert_eq!(status.message(), "etcdserver: server stopped");
    assert_eq!(server.child.wait().expect("the process ends").signal(), Some(15));
    assert!(!server.log().contains("although requests are in flight"), "{}", server.log());
}

#[test]
fn local_sockets_are_served_and_removed() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("etcd.sock");
    // Left by a process that was killed.
    drop(std::os::unix::net::UnixListener::bind(&path).expect("a socket"));
    let flag = format!("--listen-client-http-urls=unix://{}", path.display());
    let mut server = Server::start(&[&flag]);
    let mut stream = std::os::unix::net::UnixStream::connect(&path).expect("connected");
    let request = "GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
    std::io::Write::write_all(&mut stream, request.as_bytes()).expect("sent");
    let answer = std::io::read_to_string(stream).expect("an answer");
    assert!(answer.ends_with(HEALTHY), "{answer}");
    let id = server.child.id().to_string();
    assert!(std::process::Command::new("kill").arg(&id).status().expect("kill runs").success());
    server.child.wait().expect("the process ends");
    assert!(!path.exists());
}

/// A raw HTTP/2 call, since the gRPC client would watch the deadline itself.
#[tokio::test]
async fn a_passed_deadline_ends_the_call() {
    let server = tokio::task::spawn_blocking(|| Server::start(&[])).await.expect("a server");
    let stream = tokio::net::TcpStream::connect(("127.0.0.1", server.client)).await;
    let io = hyper_util::rt::TokioIo::new(stream.expect("connected"));
    let executor = hyper_util::rt::TokioExecutor::new();
    let (mut sender, connection) =
        hyper::client::conn::http2::handshake(executor, io).await.expect("a handshake");
    tokio::spawn(connection);
    // A range of the key "k", for which no time is left.
    let message = bytes::Bytes::from_static(b"\0\0\0\0\x03\x0a\x01k");
    let request = http::Request::post("http://localhost/etcdserverpb.KV/Range")
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .header("grpc-timeout", "0n")
        .body(http_body_util::Full::new(message))
        .expect("a request");
    let response = sender.send_request(request).await.expect("an answer");
    assert_eq!(response.headers()["grpc-status"], "4");
    assert_eq!(response.headers()["grpc-message"], "context%20deadline%20exceeded");
}

#[test]
fn http_listeners_of_their_own_leave_grpc_alone() {
    let port = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let free = port.local_addr().expect("an address").port();
    drop(port);
    let flag = format!("--listen-client-http-urls=http://127.0.0.1:{free}");
    let server = Server::start(&[&flag]);
    assert_eq!(get(free, "/health").expect("an answer").body, HEALTHY);
    assert_eq!(get(free, "/v3/kv/range").expect("an answer").status, 501);
    // What is no gRPC gets gRPC's refusal there.
    let answer = get(server.client, "/health").expect("an answer");
    assert!(!answer.body.contains("health"), "{}", answer.body);
}
