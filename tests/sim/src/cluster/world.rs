//! The members of a simulated cluster, as hosts of turmoil: what each of them runs from its start to its
//! end, and what hosts and driver know of each other. It lets no time pass and hurts nobody: that is the
//! driver's.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use kelson_api::command::{MemberPublish, command::Op};
use kelson_raft::{MemberChange, Node, NodeConfig, StartError};
use kelson_storage::{Options, Reader};
use parking_lot::Mutex;
use tokio::sync::mpsc;

use super::clients::Client;
use super::disk::LogDisk;
use super::history::{History, Shown};
use super::net;
use super::{Flaw, Run};
use crate::rng::Rng;

/// Clients of each member.
const CLIENTS: u64 = 2;

/// Name and peer URLs of each member.
pub(super) type Cluster = Vec<(String, Vec<String>)>;

/// What the driver asks of a running member.
pub(super) enum Task {
    Add(String),
    /// With the fault that counts if it is done.
    Change(MemberChange, &'static str),
    /// The last one: a write and a linearizable read.
    Finish,
}

/// One member.
pub(super) struct Slot {
    pub(super) dir: PathBuf,
    pub(super) disk: LogDisk,
    pub(super) life: u64,
    /// The founders, or the members that a joining one is told.
    pub(super) cluster: Cluster,
    pub(super) is_joining: bool,
    /// It is to run, as far as faults let it.
    pub(super) is_wanted: bool,
    pub(super) is_up: bool,
    pub(super) running: Option<Running>,
    pub(super) has_finished: bool,
}

pub(super) struct Running {
    pub(super) node: Node,
    pub(super) reader: Reader,
    pub(super) shown: Shown,
    pub(super) tasks: mpsc::UnboundedSender<Task>,
}

/// What hosts and driver share.
pub(super) struct World {
    pub(super) run: Run,
    pub(super) slots: Vec<Mutex<Slot>>,
    pub(super) history: Arc<Mutex<History>>,
    /// Members that the spare one must be told when it joins.
    pub(super) joined: Mutex<Option<Cluster>>,
    /// Faults that happened, by kind.
    pub(super) counts: Mutex<BTreeMap<&'static str, u64>>,
}

impl World {
    pub(super) fn count(&self, kind: &'static str) {
        *self.counts.lock().entry(kind).or_default() += 1;
    }
}

pub(super) fn name(member: usize) -> String {
    format!("m{member}")
}

pub(super) fn url(member: usize) -> String {
    format!("http://{}:2380", name(member))
}

/// A life of a member.
pub(super) async fn live(world: Arc<World>, member: usize) -> turmoil::Result {
    let Some((node, reader)) = start(&world, member).await else {
        return std::future::pending().await;
    };
    let (tasks, waiting) = mpsc::unbounded_channel();
    world.history.lock().born(member, &node.status());
    let life = {
        let mut slot = world.slots[member].lock();
        let shown = Shown::default();
        let (node, reader) = (node.clone(), reader.clone());
        slot.running = Some(Running { node, reader, shown, tasks });
        slot.life
    };
    let client = |number: u64| Client {
        name: format!("m{member}.{life}.{number}"),
        rng: Rng::fork(world.run.seed, 300 + (member as u64 * 1_000 + life) * 10 + number),
        node: node.clone(),
        reader: reader.clone(),
        history: world.history.clone(),
        reads_locally: world.run.flaw == Some(Flaw::LocalReads),
        lease: None,
    };
    tokio::spawn(publish(node.clone(), member));
    if world.run.flaw == Some(Flaw::Panic) {
        tokio::spawn(end_badly());
    }
    tokio::spawn(work(world.clone(), member, client(CLIENTS), waiting));
    for number in 0..CLIENTS {
        tokio::spawn(client(number).run(world.run.seconds * 1_000));
    }
    net::serve(node.peer_routes()).await?;
    std::future::pending().await
}

async fn start(world: &Arc<World>, member: usize) -> Option<(Node, Reader)> {
    let config = {
        let slot = world.slots[member].lock();
        if !slot.is_wanted {
            return None;
        }
        config(world, member, &slot)
    };
    loop {
        match Node::start(config.clone()).await {
            Ok(started) => return Some(started),
            // Nobody can be asked yet, or who was asked does not know of the addition.
            Err(StartError::NoClusterInfo(_) | StartError::OtherCluster(_))
                if config.initial_state_existing =>
            {
                tokio::time::sleep(Duration::from_millis(300)).await;
            }
            Err(error) => {
                let text = format!("member {member} does not start: {error}");
                world.history.lock().violate(text);
                return None;
            }
        }
    }
}

fn config(world: &World, member: usize, slot: &Slot) -> NodeConfig {
    let storage = Options {
        checkpoint_bytes: 12 << 10,
        // Never by time.
        checkpoint_interval: Duration::from_secs(1_000_000),
        compaction_sleep: Duration::ZERO,
        sled_cache_bytes: 1 << 20,
        in_step: true,
        ..Options::new(&slot.dir)
    };
    let stream = 200_000 + member as u64 * 1_000 + slot.life;
    NodeConfig {
        name: name(member),
        initial_cluster: slot.cluster.clone(),
        advertise_peer_urls: vec![url(member)],
        initial_state_existing: slot.is_joining,
        heartbeat: Duration::from_millis(50),
        election: Duration::from_millis(500),
        max_request_bytes: 16 << 10,
        snapshot_catchup_entries: 40,
        log_segment_bytes: 64 << 10,
        connect: net::connector(),
        simulated: Some(slot.disk.for_a_life(Rng::fork(world.run.seed, stream))),
        storage,
        ..NodeConfig::with_defaults(&slot.dir)
    }
}

async fn publish(node: Node, member: usize) {
    let publish = MemberPublish {
        id: node.status().member_id,
        name: name(member),
        storage_uuid: bytes::Bytes::copy_from_slice(&node.storage_uuid()),
        ..MemberPublish::default()
    };
    while node.propose(Op::MemberPublish(publish.clone())).await.is_err() {
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
}

/// Planted: what becomes of a background task is nobody's business.
async fn end_badly() {
    tokio::time::sleep(Duration::from_secs(1)).await;
    panic!("planted");
}

/// Does what the driver asks; the last of it by a client of its own.
async fn work(
    world: Arc<World>,
    member: usize,
    client: Client,
    mut waiting: mpsc::UnboundedReceiver<Task>,
) {
    let node = client.node.clone();
    while let Some(task) = waiting.recv().await {
        match task {
            Task::Add(url) => {
                let peer_urls = vec![url];
                let add = MemberChange::Add { peer_urls: peer_urls.clone(), is_learner: true };
                let result = node.change_members(add).await;
                if result.is_ok() {
                    world.count("add");
                }
                world.history.lock().say(&format!("m{member} add: {result:?}"));
                let rows = node.reader().members();
                if rows.iter().any(|row| row.peer_ur_ls == peer_urls) {
                    let spare = (name(world.run.members), peer_urls.clone());
                    let others = rows.into_iter().filter(|row| row.peer_ur_ls != peer_urls);
                    let mut cluster: Vec<_> =
                        others.map(|row| (row.name, row.peer_ur_ls)).collect();
                    cluster.push(spare);
                    *world.joined.lock() = Some(cluster);
                }
            }
            Task::Change(change, kind) => {
                let result = node.change_members(change).await;
                if result.is_ok() {
                    world.count(kind);
                }
                world.history.lock().say(&format!("m{member} change: {result:?}"));
            }
            Task::Finish => {
                client.finish().await;
                world.slots[member].lock().has_finished = true;
                return;
            }
        }
    }
}
