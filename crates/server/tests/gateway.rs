//! The JSON gateway of a running member beyond what golden scripts can say: bodies that come piece by
//! piece, WebSocket, clients that leave, limits, and what the metrics count.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;

use futures::{SinkExt, StreamExt};
use serde_json::{Value, json};
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::{Error, Message};

mod process;

use process::{PATIENCE, Server, get};

/// One request with a body; status and body of the answer.
fn post(port: u16, path: &str, headers: &str, body: &str) -> (u16, String) {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).expect("connected");
    stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    let len = body.len();
    let head = format!(
        "POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{headers}Content-Length: {len}\r\n\r\n"
    );
    stream.write_all(head.as_bytes()).expect("sent");
    // A body that is too large need not be taken.
    let _refused = stream.write_all(body.as_bytes());
    let mut text = String::new();
    stream.read_to_string(&mut text).expect("an answer");
    let (head, body) = text.split_once("\r\n\r\n").expect("an answer");
    let status = head.split(' ').nth(1).and_then(|code| code.parse().ok()).expect("a status");
    (status, body.to_owned())
}

fn put(port: u16, key: &str, value: &str) {
    let body = json!({ "key": key, "value": value }).to_string();
    let (status, answer) = post(port, "/v3/kv/put", "", &body);
    assert_eq!(status, 200, "{answer}");
}

/// A request whose body is sent in chunks while its answer is read.
struct Open {
    sender: TcpStream,
    reader: BufReader<TcpStream>,
}

impl Open {
    fn new(port: u16, path: &str) -> Self {
        let mut sender = TcpStream::connect(("127.0.0.1", port)).expect("connected");
        sender.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        let head = format!("POST {path} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n");
        sender.write_all(head.as_bytes()).expect("sent");
        let reader = BufReader::new(sender.try_clone().expect("a second handle"));
        Self { sender, reader }
    }

    fn send(&mut self, text: &str) {
        let chunk = format!("{:x}\r\n{text}\r\n", text.len());
        self.sender.write_all(chunk.as_bytes()).expect("sent");
    }

    /// The next line of JSON; head and chunk sizes are passed over.
    fn line(&mut self) -> Value {
        loop {
            let mut line = String::new();
            let len = self.reader.read_line(&mut line).expect("a line");
            assert!(len > 0, "the answer ended");
            if line.starts_with('{') {
                return serde_json::from_str(&line).expect("JSON");
            }
        }
    }
}

#[test]
fn requests_of_a_stream_may_come_one_by_one() {
    let server = Server::start(&[]);
    let mut watch = Open::new(server.client, "/v3/watch");
    watch.send("{\"create_request\":");
    watch.send("{\"key\":\"YQ==\"}}");
    assert_eq!(watch.line()["result"]["created"], true);
    put(server.client, "YQ==", "MQ==");
    let event = watch.line();
    assert_eq!(event["result"]["events"][0]["kv"]["value"], "MQ==");
    watch.send("{\"cancel_request\":{\"watch_id\":\"0\"}} {\"create_request\":{\"key\":\"Yg==\"}}");
    assert_eq!(watch.line()["result"]["canceled"], true);
    let created = watch.line();
    assert_eq!(created["result"]["watch_id"], "1", "{created}");
}

/// Once, such a request was agreed on and could not be read back: it ended every member for ever.
#[test]
fn transactions_within_one_another_end_nobody() {
    let server = Server::start(&[]);
    let nested = |levels: usize| {
        let level = "{\"success\":[{\"request_txn\":".repeat(levels - 1);
        let put = "{\"success\":[{\"request_put\":{\"key\":\"YQ==\"}}]}";
        format!("{level}{put}{}", "}]}".repeat(levels - 1))
    };
    for levels in [33, 48, 49, 50, 51, 63] {
        let (status, answer) = post(server.client, "/v3/kv/txn", "", &nested(levels));
        assert_eq!(status, 400, "{levels}: {answer}");
    }
    let (status, answer) = post(server.client, "/v3/kv/txn", "", &nested(32));
    assert_eq!(status, 200, "{answer}");
    put(server.client, "Yg==", "MQ==");
}

#[test]
fn a_stream_says_why_it_ends() {
    let mut server = Server::start(&[]);
    let mut watch = Open::new(server.client, "/v3/watch");
    watch.send("{\"create_request\":{\"key\":\"YQ==\"}}");
    assert_eq!(watch.line()["result"]["created"], true);
    let id = server.child.id().to_string();
    assert!(std::process::Command::new("kill").arg(&id).status().expect("kill runs").success());
    let error = json!({ "error": { "code": 14, "message": "etcdserver: server stopped" } });
    assert_eq!(watch.line(), error);
    server.child.wait().expect("the process ends");
}

#[test]
fn a_snapshot_comes_as_lines() {
    use base64::Engine;
    use base64::engine::general_purpose::STANDARD;
    let server = Server::start(&[]);
    put(server.client, "YQ==", "MQ==");
    let mut stream = Open::new(server.client, "/v3/maintenance/snapshot");
    stream.send("{}");
    stream.sender.write_all(b"0\r\n\r\n").expect("sent");
    let (mut bytes, mut left) = (Vec::new(), None);
    loop {
        let line = stream.line();
        let part = &line["result"];
        assert_eq!(part["version"], "3.7.0", "{part}");
        let blob = STANDARD.decode(part["blob"].as_str().expect("a blob")).expect("base64");
        let remaining: u64 =
            part["remaining_bytes"].as_str().unwrap_or("0").parse().expect("a number");
        if left == Some(0) {
            // Behind the last piece comes a digest of all.
            assert_eq!(blob.len(), 32);
            bytes.extend(blob);
            break;
        }
        if let Some(left) = left {
            assert_eq!(remaining + blob.len() as u64, left);
        }
        left = Some(remaining);
        bytes.extend(blob);
    }
    assert_eq!(bytes.len() % 512, 32);
}

fn handled(page: &str, service: &str, method: &str, code: &str) -> Option<f64> {
    let line = page.lines().find(|line| {
        line.starts_with("grpc_server_handled_total{")
            && [service, method, code].iter().all(|part| line.contains(&format!("\"{part}\"")))
    })?;
    line.rsplit(' ').next()?.parse().ok()
}

#[test]
fn calls_through_the_gateway_are_counted_and_end_with_their_client() {
    let server = Server::start(&[]);
    let page = || get(server.metrics, "/metrics").expect("an answer").body;
    put(server.client, "YQ==", "MQ==");
    assert_eq!(handled(&page(), "etcdserverpb.KV", "Put", "OK"), Some(1.0));
    assert_eq!(handled(&page(), "v3lockpb.Lock", "Lock", "OK"), None, "not used yet");
    post(server.client, "/v3/lock/lock", "", "{\"name\":\"YQ==\"}");
    assert_eq!(handled(&page(), "v3lockpb.Lock", "Lock", "OK"), Some(1.0));
    let mut watch = Open::new(server.client, "/v3/watch");
    watch.send("{\"create_request\":{\"key\":\"YQ==\"}}");
    assert_eq!(watch.line()["result"]["created"], true);
    drop(watch);
    let deadline = std::time::Instant::now() + PATIENCE;
    while handled(&page(), "etcdserverpb.Watch", "Watch", "Canceled") != Some(1.0) {
        assert!(std::time::Instant::now() < deadline, "the watch goes on");
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
}

#[test]
fn sizes_and_times_are_limited() {
    let server = Server::start(&["--max-request-bytes=100000"]);
    let value = |len: usize| json!({ "key": "YQ==", "value": "QUFB".repeat(len / 4) }).to_string();
    // 90 000 bytes are 120 000 in base64.
    assert_eq!(post(server.client, "/v3/kv/put", "", &value(120_000)).0, 200);
    let (status, body) = post(server.client, "/v3/kv/put", "", &value(140_000));
    assert_eq!((status, body.contains("etcdserver: request is too large")), (400, true), "{body}");
    let (status, body) = post(server.client, "/v3/kv/put", "", &value(1_000_000));
    assert_eq!((status, body.contains("\"code\":8")), (429, true), "{body}");
    let (status, body) = post(server.client, "/v3/kv/put", "", &value(4_000_000));
    assert_eq!((status, body.contains("grpc: received message larger than max")), (429, true));
    let (status, body) =
        post(server.client, "/v3/lock/lock", "Grpc-Timeout: 1n\r\n", "{\"name\":\"YQ==\"}");
    let text = "{\"code\":4,\"message\":\"context deadline exceeded\"}";
    assert_eq!((status, body.as_str()), (504, text));
}

type Socket = tokio_tungstenite::WebSocketStream<tokio::net::TcpStream>;

async fn socket(port: u16, path: &str, protocol: Option<&str>) -> Result<Socket, Box<Error>> {
    let stream = tokio::net::TcpStream::connect(("127.0.0.1", port)).await.expect("connected");
    let mut request = format!("ws://127.0.0.1:{port}{path}").into_client_request()?;
    if let Some(protocol) = protocol {
        let protocol = protocol.parse().expect("a header");
        request.headers_mut().insert("sec-websocket-protocol", protocol);
    }
    let (socket, response) = tokio_tungstenite::client_async(request, stream).await?;
    let echoed = response.headers().get("sec-websocket-protocol");
    assert_eq!(echoed.map(|it| it.as_bytes()), protocol.map(|_| &b"Bearer"[..]));
    Ok(socket)
}

async fn receive(socket: &mut Socket) -> Option<Value> {
    let message = tokio::time::timeout(PATIENCE, socket.next()).await.expect("in time")?;
    match message.expect("a message") {
        Message::Text(text) => Some(serde_json::from_str(&text).expect("JSON")),
        _ => None,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_run_over_websocket() {
    let server = tokio::task::spawn_blocking(|| Server::start(&[])).await.expect("a server");
    let port = server.client;
    let mut watch = socket(port, "/v3/watch", None).await.expect("a connection");
    let create = "{\"create_request\":{\"key\":\"YQ==\"}}";
    watch.send(Message::text(create)).await.expect("sent");
    assert_eq!(receive(&mut watch).await.expect("a line")["result"]["created"], true);
    tokio::task::spawn_blocking(move || put(port, "YQ==", "MQ==")).await.expect("put");
    let event = receive(&mut watch).await.expect("a line");
    assert_eq!(event["result"]["events"][0]["kv"]["key"], "YQ==");
    // A value may be cut into messages, and come as bytes.
    watch.send(Message::binary(&b"{\"cancel_request\":"[..])).await.expect("sent");
    watch.send(Message::text("{}}")).await.expect("sent");
    assert_eq!(receive(&mut watch).await.expect("a line")["result"]["canceled"], true);
    watch.close(None).await.expect("closed");

    let mut lease =
        socket(port, "/v3/lease/keepalive", Some("Bearer, nobody")).await.expect("open");
    lease.send(Message::text("{\"ID\":7}{\"ID\":8}")).await.expect("sent");
    assert_eq!(receive(&mut lease).await.expect("a line")["result"]["ID"], "7");
    assert_eq!(receive(&mut lease).await.expect("a line")["result"]["ID"], "8");

    let mut range = socket(port, "/v3/kv/range", None).await.expect("a connection");
    range.send(Message::text("{\"key\":\"YQ==\"}")).await.expect("sent");
    assert_eq!(receive(&mut range).await.expect("a line")["count"], "1");
    assert!(receive(&mut range).await.is_none(), "there is one answer only");
    let mut range = socket(port, "/v3/kv/range", None).await.expect("a connection");
    range.send(Message::text("{}")).await.expect("sent");
    let error = json!({ "code": 3, "message": "etcdserver: key is not provided" });
    assert_eq!(receive(&mut range).await, Some(error));
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_handshakes_are_refused() {
    let server = tokio::task::spawn_blocking(|| Server::start(&[])).await.expect("a server");
    let port = server.client;
    let refused = |path: &'static str| async move {
        match *socket(port, path, None).await.expect_err("refused") {
            Error::Http(response) => response.status().as_u16(),
            other => panic!("{other}"),
        }
    };
    assert_eq!(refused("/v3/nothing").await, 404);
    assert_eq!(refused("/health").await, 200, "no WebSocket there");
    let headers = "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 12\r\n";
    let answer = tokio::task::spawn_blocking(move || {
        process::ask(port, "GET", "/v3/watch", headers).expect("an answer")
    });
    let answer = answer.await.expect("an answer");
    assert_eq!((answer.status, answer.body.as_str()), (400, "Bad Request\n"));
    assert!(answer.headers.contains("sec-websocket-version: 13"), "{}", answer.headers);
}
