//! The failpoints of a build that has them, through gofail's HTTP protocol: listed, armed, counted,
//! disarmed, refused; and the process that ends at one.
#![cfg(feature = "failpoints")]

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use kelson_api::etcdserverpb::kv_client::KvClient;
use kelson_api::etcdserverpb::{PutRequest, RangeRequest};
use tonic::Code;

mod process;

use process::{PATIENCE, Server};

fn ask(port: u16, method: &str, path: &str, body: &str) -> (u16, String) {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).expect("it listens");
    stream.set_read_timeout(Some(PATIENCE)).expect("a socket takes a timeout");
    let length = body.len();
    write!(stream, "{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n{body}")
        .expect("it takes the request");
    let mut text = String::new();
    stream.read_to_string(&mut text).expect("it answers");
    let (head, body) = text.split_once("\r\n\r\n").expect("a head");
    let status = head.split(' ').nth(1).and_then(|code| code.parse().ok());
    (status.expect("a status"), body.to_owned())
}

fn put(server: &Server) -> Result<(), tonic::Status> {
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    runtime.block_on(async {
        let mut kv = KvClient::connect(format!("http://127.0.0.1:{}", server.client))
            .await
            .map_err(|error| tonic::Status::unavailable(error.to_string()))?;
        let request = PutRequest { key: "a".into(), ..Default::default() };
        kv.put(request).await.map(drop)
    })
}

/// Reads with half a second to do it.
fn get(server: &Server, serializable: bool) -> Result<(), tonic::Status> {
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    runtime.block_on(async {
        let mut kv = KvClient::connect(format!("http://127.0.0.1:{}", server.client))
            .await
            .map_err(|error| tonic::Status::unavailable(error.to_string()))?;
        let message = RangeRequest { key: "a".into(), serializable, ..Default::default() };
        let mut request = tonic::Request::new(message);
        request.set_timeout(Duration::from_millis(500));
        kv.range(request).await.map(drop)
    })
}

#[test]
fn places_are_listed_armed_counted_and_passed() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = listener.local_addr().expect("an address").port();
    drop(listener);
    let address = format!("127.0.0.1:{port}");
    let environment =
        [("GOFAIL_HTTP", address.as_str()), ("GOFAIL_FAILPOINTS", "beforeCommit=sleep(1)")];
    let mut server = Server::start_with(&[], &environment);
    let (status, list) = ask(port, "GET", "/", "");
    assert_eq!((status, list.lines().count()), (200, 22), "{list}");
    assert!(list.contains("\nbeforeCommit=sleep(1)\n"), "{list}");

    assert_eq!(ask(port, "PUT", "/raftAfterSave", "sleep(\"5ms\")").0, 204);
    put(&server).expect("a put that takes longer");
    let (status, count) = ask(port, "GET", "/raftAfterSave/count", "");
    assert!(status == 200 && count.parse::<u64>().is_ok_and(|count| count > 0), "{count}");
    assert_eq!(ask(port, "DELETE", "/raftAfterSave", "").0, 204);
    assert_eq!(ask(port, "DELETE", "/raftAfterSave", "").0, 400);
    for (path, term, status) in [
        ("/nowhere", "panic", 400),
        ("/raftAfterSave", "explode", 400),
        ("/a", &"x".repeat(5000), 400),
    ] {
        assert_eq!(ask(port, "PUT", path, term).0, status, "{path}");
    }
    assert_eq!(ask(port, "GET", "/nowhere", "").0, 404);
    put(&server).expect("nothing is armed");

    assert_eq!(ask(port, "PUT", "/raftBeforeSave", "panic").0, 204);
    put(&server).expect_err("nobody can have acknowledged it");
    let deadline = Instant::now() + PATIENCE;
    while server.child.try_wait().expect("a child").is_none() {
        assert!(Instant::now() < deadline, "it still runs");
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(server.log().contains("failpoint raftBeforeSave: panic"), "{}", server.log());
}

/// etcd's suite relies on it, see `kelson_storage::failpoint::save_sleeps`.
#[test]
fn linearizable_reads_wait_while_a_save_sleeps() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = listener.local_addr().expect("an address").port();
    drop(listener);
    let address = format!("127.0.0.1:{port}");
    let server = Server::start_with(&[], &[("GOFAIL_HTTP", address.as_str())]);
    put(&server).expect("nothing is armed");
    for place in ["raftBeforeSave", "raftAfterSave"] {
        get(&server, false).expect("no save sleeps");
        // Long enough to outlast both reads on any machine, short enough for the put's own timeout.
        assert_eq!(ask(port, "PUT", &format!("/{place}"), "1*sleep(\"4s\")").0, 204);
        std::thread::scope(|scope| {
            let sleeping = scope.spawn(|| put(&server));
            let deadline = Instant::now() + PATIENCE;
            while ask(port, "GET", &format!("/{place}/count"), "").1 != "1" {
                assert!(Instant::now() < deadline, "no save came to {place}");
                std::thread::sleep(Duration::from_millis(5));
            }
            let late = get(&server, false).expect_err("a linearizable read waits");
            // Whoever looks at the clock first: the server, or this client.
            let waited = matches!(late.code(), Code::DeadlineExceeded | Code::Cancelled);
            assert!(waited, "{place}: {late}");
            get(&server, true).expect("a serializable read asks nobody");
            sleeping.join().expect("it does not panic").expect("a put that takes longer");
        });
    }
}
