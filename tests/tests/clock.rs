//! Wall clocks that jump by an hour, there and back, on one member and on all, under leases and
//! writes: nothing ends early and nothing stays. The clock is that of a preloaded library, which counts
//! how often it was read. `KELSON_BIN` names another binary.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use kelson_api::etcdserverpb as pb;
use kelson_tests::cluster::{Cluster, PATIENCE, Place};
use kelson_tests::run;
use kelson_tests::server::{kelson_binary, root};
use pb::kv_client::KvClient;
use pb::lease_client::LeaseClient;

const MEMBERS: usize = 3;
const HOUR: i64 = 3_600_000_000_000;

/// Words of the page that the library shares (`jepsen/shim`): the offset, and how often a clock that
/// was off has been read.
const OFFSET: u64 = 4;
const READS: u64 = 12;

fn word(page: &Path, number: u64) -> u64 {
    let mut bytes = [0; 8];
    let file = std::fs::File::open(page).expect("open the page");
    file.read_exact_at(&mut bytes, number * 8).expect("read the page");
    u64::from_ne_bytes(bytes)
}

fn shift(page: &Path, nanoseconds: i64) {
    let file = OpenOptions::new().write(true).open(page).expect("open the page");
    file.write_all_at(&nanoseconds.to_ne_bytes(), OFFSET * 8).expect("write the page");
}

fn put_of(key: &str, value: &str, lease: i64) -> pb::PutRequest {
    let (key, value) = (key.to_owned().into(), value.to_owned().into());
    pb::PutRequest { key, value, lease, ..Default::default() }
}

async fn is_there(cluster: &Cluster, member: usize, key: &str) -> bool {
    let get = pb::RangeRequest { key: key.to_owned().into(), ..Default::default() };
    let found = KvClient::new(cluster.channel(member)).range(get).await.expect("a range");
    !found.into_inner().kvs.is_empty()
}

async fn lease(cluster: &Cluster, id: i64, ttl: i64) {
    let mut leases = LeaseClient::new(cluster.channel(0));
    leases.lease_grant(pb::LeaseGrantRequest { id, ttl }).await.expect("granted");
    let put = put_of(&format!("lease/{id}"), "1", id);
    KvClient::new(cluster.channel(0)).put(put).await.expect("a put");
}

#[test]
fn jumps_of_the_wall_clock_change_nothing() {
    run(async {
        let library = root().join("target/release/libkelson_shim.so");
        let hint = "build it with `cargo build --release -p kelson-shim`";
        assert!(library.exists(), "{} is missing; {hint}", library.display());
        let dir = tempfile::tempdir().expect("a directory");
        let pages: Vec<PathBuf> =
            (0..MEMBERS).map(|member| dir.path().join(format!("page{member}"))).collect();
        let places = pages.iter().map(|page| {
            std::fs::write(page, [0; 4096]).expect("make the page");
            let env = vec![("LD_PRELOAD", library.clone()), ("KELSON_FAULT_PAGE", page.clone())];
            Place { env, ..Place::default() }
        });
        // Lines of the log have the time of the wall clock; so each request reads it.
        let flags = ["--warning-unary-request-duration=1us".to_owned()];
        let cluster = Cluster::start_at(&kelson_binary(), places.collect(), &flags);
        let leader = cluster.leader().await;
        let long = 600;
        lease(&cluster, long, long).await;

        // The leader alone, all, and back; the middle of them with the others an hour behind.
        let jumps: [(&[usize], i64); 4] =
            [(&[leader], HOUR), (&[0, 1, 2], -HOUR), (&[leader], HOUR), (&[0, 1, 2], 0)];
        for (round, (members, offset)) in jumps.into_iter().enumerate() {
            let short = 2;
            let id = 7 + round as i64;
            lease(&cluster, id, short).await;
            members.iter().for_each(|member| shift(&pages[*member], offset));
            let jumped = Instant::now();
            for member in 0..MEMBERS {
                let put = put_of(&format!("{round}/{member}"), "1", 0);
                KvClient::new(cluster.channel(member)).put(put).await.expect("a put");
                assert!(is_there(&cluster, member, &format!("{round}/{member}")).await);
            }
            // What ends in time ends, and what does not stays, also for some scans after the jump.
            while is_there(&cluster, 1, &format!("lease/{id}")).await
                || jumped.elapsed() < Duration::from_millis(1_500)
            {
                assert!(jumped.elapsed() < PATIENCE, "round {round}: lease {id} never ends");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            let is_left = is_there(&cluster, 2, &format!("lease/{long}")).await;
            assert!(is_left, "round {round}: a lease of {long} s has ended");
        }
        for (member, page) in pages.iter().enumerate() {
            assert!(word(page, READS) > 0, "member {member} never read a clock that was off");
        }
    });
}
