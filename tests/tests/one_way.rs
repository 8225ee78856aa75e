//! Connections that can be made in one direction only, as when a firewall closes a leader's peer port
//! and lets its own calls out. `KELSON_BIN` names another binary.

use std::time::{Duration, Instant};

use kelson_api::etcdserverpb as pb;
use kelson_tests::cluster::{Cluster, PATIENCE};
use kelson_tests::run;
use kelson_tests::server::{free_port, kelson_binary};
use pb::kv_client::KvClient;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tonic::{Request, Status};

/// A way to one port. While it is shut, connections stand and nothing passes, either way.
struct Door(watch::Sender<bool>);

impl Door {
    async fn before(port: u16, from: u16) -> Door {
        let listener = TcpListener::bind(("127.0.0.1", from)).await.expect("a port");
        let is_shut = watch::Sender::new(false);
        let seen = is_shut.subscribe();
        tokio::spawn(async move {
            while let Ok((outside, _)) = listener.accept().await {
                let seen = seen.clone();
                tokio::spawn(async move {
                    let Ok(inside) = TcpStream::connect(("127.0.0.1", port)).await else { return };
                    let (from_outside, to_outside) = outside.into_split();
                    let (from_inside, to_inside) = inside.into_split();
                    tokio::select! {
                        () = pass(from_outside, to_inside, seen.clone()) => {}
                        () = pass(from_inside, to_outside, seen) => {}
                    }
                });
            }
        });
        Door(is_shut)
    }

    fn shut(&self, is_shut: bool) {
        self.0.send_replace(is_shut);
    }
}

/// Passes bytes on until either end is gone.
async fn pass(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    mut seen: watch::Receiver<bool>,
) {
    let mut buffer = vec![0; 64 << 10];
    while let Ok(read @ 1..) = from.read(&mut buffer).await {
        if seen.wait_for(|is_shut| !is_shut).await.is_err() {
            return;
        }
        if to.write_all(&buffer[..read]).await.is_err() {
            return;
        }
    }
}

/// Puts with two seconds to do it.
async fn put(cluster: &Cluster, member: usize, key: &str) -> Result<(), Status> {
    let key = key.to_owned().into();
    let mut request = Request::new(pb::PutRequest { key, ..Default::default() });
    request.set_timeout(Duration::from_secs(2));
    KvClient::new(cluster.channel(member)).put(request).await.map(drop)
}

async fn put_in_the_end(cluster: &Cluster, member: usize, key: &str) {
    let deadline = Instant::now() + PATIENCE;
    while let Err(status) = put(cluster, member, key).await {
        assert!(Instant::now() < deadline, "{key}: {status}\n{}", cluster.log_tail(member));
    }
}

#[test]
fn a_leader_that_nobody_can_call_hands_leadership_on() {
    run(async {
        let mut cluster = Cluster::reserved(&kelson_binary(), 3);
        let initial = cluster.initial_cluster();
        let mut doors = Vec::new();
        for member in 0..3 {
            let url = cluster.peer_url(member);
            let (_, shown) = url.rsplit_once(':').expect("a URL with a port");
            let hidden = free_port();
            doors.push(Door::before(hidden, shown.parse().expect("a port")).await);
            let listens = format!("--listen-peer-urls=http://127.0.0.1:{hidden}");
            cluster.spawn_finding(member, &[format!("--initial-cluster={initial}"), listens]);
        }
        (0..3).for_each(|member| cluster.wait_ready(member));
        let leader = cluster.leader().await;
        let other = (leader + 1) % 3;
        put(&cluster, other, "before").await.expect("all doors are open");

        doors[leader].shut(true);
        put_in_the_end(&cluster, other, "shut").await;
        let deadline = Instant::now() + PATIENCE;
        // The former one hears of it with the answer to its next heartbeat.
        while cluster.leader().await == leader {
            assert!(Instant::now() < deadline, "it cannot be called, and leads");
        }
        doors[leader].shut(false);
        // It follows again.
        put_in_the_end(&cluster, leader, "open").await;

        // A follower that cannot be called is no reason.
        let leader = cluster.leader().await;
        doors[(leader + 1) % 3].shut(true);
        put_in_the_end(&cluster, (leader + 2) % 3, "follower").await;
        tokio::time::sleep(Duration::from_secs(6)).await;
        assert_eq!(cluster.leader().await, leader, "the others call it");
    });
}
