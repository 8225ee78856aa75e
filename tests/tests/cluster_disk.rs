//! Disks of a cluster that lose power or hang, under load. Power cut on one member, a majority and all
//! of them, on real ext4 and xfs: every acknowledged write is on every member afterwards. Syncs that
//! hang on a majority: nothing is acknowledged meanwhile. With `--unsafe-no-fsync` both must find
//! something, which proves that they can. `KELSON_POWER_ROUNDS` changes the number of cuts.

use std::path::{Path, PathBuf};
use std::time::Duration;

use kelson_api::etcdserverpb as pb;
use kelson_tests::cluster::{Cluster, PATIENCE, Place};
use kelson_tests::image::{self, Image, Kind};
use kelson_tests::ledger::{Ledger, Load};
use kelson_tests::run;
use kelson_tests::server::{kelson_binary, root};
use pb::kv_client::KvClient;

const MEMBERS: usize = 3;
const NO_FSYNC: &str = "--unsafe-no-fsync";

/// Who loses power in a round: a follower, the leader, the leader and a follower, both followers, all.
fn victims(round: u64, leader: usize) -> Vec<usize> {
    let (second, third) = ((leader + 1) % MEMBERS, (leader + 2) % MEMBERS);
    match round % 5 {
        0 => vec![second],
        1 => vec![leader],
        2 => vec![leader, second],
        3 => vec![second, third],
        _ => vec![leader, second, third],
    }
}

async fn cut_and_judge(kind: Kind, rounds: u64, flags: &[String]) -> Result<usize, String> {
    let mut images: Vec<Image> = (0..MEMBERS).map(|_| Image::new(kind, 512)).collect();
    let places = images.iter().map(|image| {
        let data_dir = Some(image.mount_point().join("data"));
        Place { data_dir, ..Place::default() }
    });
    let mut cluster = Cluster::start_at(&kelson_binary(), places.collect(), flags);
    let mut ledger = Ledger::default();
    for round in 0..rounds {
        let leader = cluster.leader().await;
        let victims = victims(round, leader);
        let endpoints = (0..MEMBERS).map(|member| cluster.endpoint(member));
        let loads: Vec<Load> = endpoints.map(|endpoint| ledger.start(&endpoint, 3)).collect();
        let millis = 100 + (round.wrapping_mul(2_654_435_761) >> 7) % 1500;
        tokio::time::sleep(Duration::from_millis(millis)).await;
        victims.iter().for_each(|victim| images[*victim].cut_power());
        // Whatever is acknowledged after the cut would be a lie as well: let them try.
        tokio::time::sleep(Duration::from_millis(50)).await;
        victims.iter().for_each(|victim| cluster.kill(*victim));
        for load in loads {
            ledger.finish(load).await;
        }
        for victim in &victims {
            images[*victim].unmount();
            images[*victim].mount();
            cluster.spawn(*victim);
        }
        for member in 0..MEMBERS {
            let ready = cluster.try_ready(member);
            ready.map_err(|log| format!("round {round}: member {member} is not back: {log}"))?;
        }
        for member in 0..MEMBERS {
            let verdict = ledger.judge(&cluster.endpoint(member)).await;
            verdict.map_err(|violation| {
                format!("round {round}, power lost by {victims:?}, member {member}: {violation}")
            })?;
        }
    }
    // Its processes hold the file systems.
    drop(cluster);
    images.iter_mut().for_each(Image::unmount);
    Ok(ledger.acknowledged())
}

#[test]
fn nothing_acknowledged_is_lost_on_ext4() {
    let kind = Kind::Ext4;
    image::nothing_is_lost(kind, |flags| run(cut_and_judge(kind, image::rounds(10), flags)));
}

#[test]
fn nothing_acknowledged_is_lost_on_xfs() {
    let kind = Kind::Xfs;
    image::nothing_is_lost(kind, |flags| run(cut_and_judge(kind, image::rounds(10), flags)));
}

#[test]
fn without_fsync_a_cut_finds_losses() {
    image::losses_are_found(|flags| run(cut_and_judge(Kind::Ext4, 10, flags)));
}

/// A cluster whose members' syncs can be held, each by a file of its own.
struct Held {
    cluster: Cluster,
    dir: tempfile::TempDir,
}

impl Held {
    fn start(flags: &[String]) -> Held {
        let shim = root().join("target/release/libkelson_shim.so");
        let hint = "build it with `cargo build --release -p kelson-shim`";
        assert!(shim.exists(), "{} is missing; {hint}", shim.display());
        let dir = tempfile::tempdir().expect("a directory");
        let places = (0..MEMBERS).map(|member| {
            let file = file(dir.path(), member);
            Place {
                env: vec![("LD_PRELOAD", shim.clone()), ("KELSON_HOLD_FSYNC", file)],
                ..Place::default()
            }
        });
        let cluster = Cluster::start_at(&kelson_binary(), places.collect(), flags);
        Held { cluster, dir }
    }

    fn hold(&self, members: &[usize]) {
        for member in members {
            std::fs::write(file(self.dir.path(), *member), "").expect("make a file");
        }
    }

    fn release(&self, members: &[usize]) {
        for member in members {
            std::fs::remove_file(file(self.dir.path(), *member)).expect("remove a file");
        }
    }

    /// Puts through each member at once; returns how many are acknowledged within the time.
    async fn acknowledged(&self, round: u64, within: Duration) -> usize {
        let puts = (0..4 * MEMBERS).map(|number| {
            let mut kv = KvClient::new(self.cluster.channel(number % MEMBERS));
            let key = format!("{round}/{number}").into();
            async move {
                let put = kv.put(pb::PutRequest { key, value: "v".into(), ..Default::default() });
                matches!(tokio::time::timeout(within, put).await, Ok(Ok(_)))
            }
        });
        futures::future::join_all(puts).await.into_iter().filter(|acked| *acked).count()
    }

    /// Waits until puts through all members are acknowledged.
    async fn recover(&self) {
        let deadline = std::time::Instant::now() + PATIENCE;
        while self.acknowledged(u64::MAX, Duration::from_secs(5)).await < 4 * MEMBERS {
            assert!(std::time::Instant::now() < deadline, "no writes after the syncs went on");
        }
    }
}

fn file(dir: &Path, member: usize) -> PathBuf {
    dir.join(format!("hold{member}"))
}

/// Most writes that were acknowledged while a majority could not sync.
async fn acknowledged_without_a_majority(flags: &[String]) -> usize {
    let held = Held::start(flags);
    let mut most = 0;
    for round in 2..5 {
        let leader = held.cluster.leader().await;
        held.recover().await;
        let victims = victims(round, leader);
        held.hold(&victims);
        // A sync that had begun may end.
        tokio::time::sleep(Duration::from_millis(100)).await;
        most = most.max(held.acknowledged(round, Duration::from_secs(3)).await);
        held.release(&victims);
        held.recover().await;
    }
    most
}

#[test]
fn nothing_is_acknowledged_while_a_majority_cannot_sync() {
    let acknowledged = run(acknowledged_without_a_majority(&[]));
    assert_eq!(acknowledged, 0, "acknowledged without a majority's disk");
}

#[test]
fn without_fsync_holding_it_finds_acknowledgments() {
    let acknowledged = run(acknowledged_without_a_majority(&[NO_FSYNC.to_owned()]));
    assert!(acknowledged > 0, "writes that nobody waited for went unnoticed");
}

#[test]
fn one_disk_that_hangs_stops_no_write_for_long() {
    run(async {
        let held = Held::start(&[]);
        for round in 0..2 {
            let leader = held.cluster.leader().await;
            held.recover().await;
            let victims = victims(round, leader);
            held.hold(&victims);
            let survivor = (0..MEMBERS).find(|member| !victims.contains(member)).expect("one");
            let mut kv = KvClient::new(held.cluster.channel(survivor));
            let begun = std::time::Instant::now();
            let put =
                || pb::PutRequest { key: "k".into(), value: "v".into(), ..Default::default() };
            while kv.put(put()).await.is_err() {
                assert!(begun.elapsed() < PATIENCE, "no write while {victims:?} hang");
            }
            held.release(&victims);
            held.recover().await;
        }
    });
}

#[test]
fn nobody_is_elected_by_votes_that_are_not_on_disk() {
    run(async {
        let mut held = Held::start(&[]);
        let leader = held.cluster.leader().await;
        held.recover().await;
        let followers = victims(3, leader);
        held.hold(&followers);
        held.cluster.kill(leader);
        // Several elections long: neither can save its own vote, so neither may lead.
        let until = std::time::Instant::now() + Duration::from_secs(6);
        while std::time::Instant::now() < until {
            for follower in &followers {
                let status = status(&held.cluster, *follower).await;
                let leads = status.is_some_and(|(own, leader)| own == leader);
                assert!(!leads, "{follower} leads by votes that nobody has on disk");
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        held.release(&followers);
        held.cluster.leader().await;
        held.cluster.spawn(leader);
        held.recover().await;
    });
}

/// Who a member is and whom it takes for the leader, by its own word.
async fn status(cluster: &Cluster, member: usize) -> Option<(u64, u64)> {
    let mut client = pb::maintenance_client::MaintenanceClient::new(cluster.channel(member));
    let asked = client.status(pb::StatusRequest {});
    let answer = tokio::time::timeout(Duration::from_secs(1), asked).await.ok()?.ok()?;
    let status = answer.into_inner();
    Some((status.header.as_ref()?.member_id, status.leader))
}
