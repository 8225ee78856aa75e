//! The simulated world: members that run as hosts of turmoil, the network between them, and the driver
//! that lets time pass, carries out the schedule, and looks at everybody every few milliseconds. What is
//! right is the matter of `history`.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use kelson_api::command::{MemberPublish, command::Op};
use kelson_api::etcdserverpb::PutRequest;
use kelson_raft::{MemberChange, Node, NodeConfig, StartError};
use kelson_storage::log::SimDisk;
use kelson_storage::{Options, Reader};
use parking_lot::Mutex;
use tokio::sync::mpsc;

use super::clients::Client;
use super::disk::{Lies, LogDisk};
use super::history::{History, Shown};
use super::machine;
use super::net;
use super::schedule::{Fault, Step};
use super::{Flaw, Report, Run};
use crate::rng::Rng;

/// How often everybody is looked at. Unit: milliseconds.
const LOOK_EVERY: u64 = 10;
/// Clients of each member.
const CLIENTS: u64 = 2;
/// Simulated time in which a healed cluster must be whole. Unit: milliseconds.
const HEAL_TIME: u64 = 10_000;
/// How long a fault waits for its occasion. Unit: milliseconds.
const OCCASION: u64 = 6_000;

/// Name and peer URLs of each member.
type Cluster = Vec<(String, Vec<String>)>;

/// What the driver asks of a running member.
enum Task {
    Add(String),
    Change(MemberChange),
    Write,
}

/// One member.
struct Slot {
    dir: PathBuf,
    disk: LogDisk,
    life: u64,
    /// The founders, or the members that a joining one is told.
    cluster: Cluster,
    is_joining: bool,
    /// It is to run, as far as faults let it.
    is_wanted: bool,
    is_up: bool,
    running: Option<Running>,
    has_written: bool,
}

struct Running {
    node: Node,
    reader: Reader,
    shown: Shown,
    tasks: mpsc::UnboundedSender<Task>,
}

/// What hosts and driver share.
struct World {
    run: Run,
    slots: Vec<Mutex<Slot>>,
    history: Arc<Mutex<History>>,
    /// Members that the spare one must be told when it joins.
    joined: Mutex<Option<Cluster>>,
}

fn name(member: usize) -> String {
    format!("m{member}")
}

fn url(member: usize) -> String {
    format!("http://{}:2380", name(member))
}

/// Runs one seed to its end, on the calling thread, in a process that does nothing else.
pub(super) fn simulate(run: Run, steps: &[Step], home: &Path) -> Report {
    machine::begin(run.seed);
    let mut driver = Driver::new(run, home);
    driver.play(steps);
    driver.report()
}

struct Driver {
    world: Arc<World>,
    sim: turmoil::Sim<'static>,
    rng: Rng,
    now: u64,
    /// Faults under way, by their end.
    active: Vec<(u64, Fault)>,
    /// Directions that are cut, and how often.
    cut: BTreeMap<(usize, usize), usize>,
    held: BTreeSet<(usize, usize)>,
    /// When members that are down start again.
    restarts: Vec<(u64, usize)>,
    counts: BTreeMap<&'static str, u64>,
}

impl Driver {
    fn new(run: Run, home: &Path) -> Self {
        let founders: Vec<_> = (0..run.members).map(|m| (name(m), vec![url(m)])).collect();
        let lies = lies(run.flaw);
        let slot = |member: usize| {
            Mutex::new(Slot {
                dir: home.join(name(member)),
                disk: LogDisk::new(SimDisk::new(), lies),
                life: 0,
                cluster: founders.clone(),
                is_joining: member == run.members,
                is_wanted: member < run.members,
                is_up: member < run.members,
                running: None,
                has_written: false,
            })
        };
        let world = Arc::new(World {
            slots: (0..=run.members).map(slot).collect(),
            history: Arc::default(),
            joined: Mutex::default(),
            run,
        });
        let mut builder = turmoil::Builder::new();
        builder
            .tick_duration(Duration::from_millis(1))
            .simulation_duration(Duration::from_secs(100_000))
            .min_message_latency(Duration::from_millis(1))
            .max_message_latency(Duration::from_millis(4))
            .repair_rate(0.05)
            .tcp_capacity(4096)
            .rng_seed(Rng::fork(world.run.seed, 202).draw());
        let mut sim = builder.build();
        for member in 0..world.slots.len() {
            let world = world.clone();
            sim.host(name(member), move || live(world.clone(), member));
        }
        let rng = Rng::fork(world.run.seed, 203);
        Self {
            world,
            sim,
            rng,
            now: 0,
            active: Vec::new(),
            cut: BTreeMap::new(),
            held: BTreeSet::new(),
            restarts: Vec::new(),
            counts: BTreeMap::new(),
        }
    }

    fn say(&self, line: &str) {
        self.world.history.lock().say(line);
    }

    fn is_over(&self) -> bool {
        self.world.history.lock().violation().is_some()
    }

    fn play(&mut self, steps: &[Step]) {
        let end = self.world.run.seconds * 1_000;
        let mut steps = steps.iter().peekable();
        while self.now < end && !self.is_over() {
            while let Some(step) = steps.next_if(|step| step.at <= self.now) {
                self.begin(step);
            }
            self.tick();
        }
        if self.is_over() {
            return;
        }
        self.heal();
        let converged = self.until_whole() && self.write_everywhere() && self.until_whole();
        if self.is_over() {
            return;
        }
        if !converged {
            let text = self.positions();
            self.world.history.lock().violate(format!("not whole {HEAL_TIME} ms after: {text}"));
            return;
        }
        self.compare_hashes();
        self.world.history.lock().judge();
    }

    /// One millisecond.
    fn tick(&mut self) {
        self.now += 1;
        self.world.history.lock().now = self.now;
        machine::set_now(self.now);
        if let Err(error) = self.sim.step() {
            self.world.history.lock().violate(format!("a host failed: {error}"));
        }
        if self.now.is_multiple_of(LOOK_EVERY) {
            for member in 0..self.world.slots.len() {
                self.look(member);
            }
            self.admit_spare();
        }
        self.end_faults();
        self.take_occasions();
    }

    fn look(&self, member: usize) {
        let mut slot = self.world.slots[member].lock();
        let Some(running) = &mut slot.running else { return };
        let status = running.node.status();
        let Running { reader, shown, .. } = running;
        self.world.history.lock().observe(member, shown, &status, reader);
    }

    /// Starts the spare member when it has been added, and takes it away when it was removed.
    fn admit_spare(&mut self) {
        let spare = self.world.run.members;
        let joined = self.world.joined.lock().take();
        if let Some(cluster) = joined {
            let mut slot = self.world.slots[spare].lock();
            if !slot.is_wanted {
                (slot.cluster, slot.is_wanted) = (cluster, true);
                drop(slot);
                self.start(spare);
            }
        }
        let slot = self.world.slots[spare].lock();
        let is_removed = slot.running.as_ref().is_some_and(|it| *it.node.removed().borrow());
        drop(slot);
        if is_removed {
            self.say("m-spare was removed");
            self.world.slots[spare].lock().is_wanted = false;
            self.stop(spare, false);
        }
    }

    // Faults.

    fn begin(&mut self, step: &Step) {
        self.say(&format!("fault {step}"));
        let ends = self.now + step.lasts;
        let mut happens = true;
        match &step.fault {
            Fault::Split(side) => self.cut_sides(side, true),
            Fault::OneWay(from, to) => self.cut_way(*from, *to, true),
            Fault::Link(a, b) => {
                self.cut_way(*a, *b, true);
                self.cut_way(*b, *a, true);
            }
            Fault::Hold(a, b) => {
                self.held.insert((*a, *b));
                self.refresh_links();
            }
            Fault::Latency(most) => {
                self.sim.set_max_message_latency(Duration::from_millis(*most));
            }
            Fault::Loss(one_in) => self.sim.set_fail_rate(1.0 / *one_in as f64),
            Fault::Kill(member) | Fault::Away(member) => {
                happens = self.take_down(*member, false, ends)
            }
            Fault::Power(members) => {
                let down = members.iter().filter(|it| self.take_down(**it, true, ends)).count();
                happens = down > 0;
            }
            Fault::SlowDisk(member, most) => {
                self.world.slots[*member].lock().disk.set_slowness(Some(*most));
            }
            Fault::BreakTransfer(_) => {
                self.active.push((self.now + OCCASION, step.fault.clone()));
                return;
            }
            Fault::Add => happens = self.ask(Task::Add(url(self.world.run.members))),
            Fault::Promote => happens = self.change_spare(MemberChange::Promote),
            Fault::Remove => happens = self.change_spare(MemberChange::Remove),
        }
        if happens {
            *self.counts.entry(step.fault.kind()).or_default() += 1;
            self.active.push((ends, step.fault.clone()));
        }
    }

    fn end_faults(&mut self) {
        let now = self.now;
        let (over, active): (Vec<_>, _) =
            std::mem::take(&mut self.active).into_iter().partition(|(ends, _)| *ends <= now);
        self.active = active;
        for (_, fault) in over {
            self.end(&fault);
        }
        let (due, later): (Vec<_>, _) =
            std::mem::take(&mut self.restarts).into_iter().partition(|(at, _)| *at <= now);
        self.restarts = later;
        for (_, member) in due {
            self.start(member);
        }
    }

    fn end(&mut self, fault: &Fault) {
        match fault {
            Fault::Split(side) => self.cut_sides(side, false),
            Fault::OneWay(from, to) => self.cut_way(*from, *to, false),
            Fault::Link(a, b) => {
                self.cut_way(*a, *b, false);
                self.cut_way(*b, *a, false);
            }
            Fault::Hold(a, b) => {
                self.held.remove(&(*a, *b));
                self.sim.release(name(*a), name(*b));
                self.refresh_links();
            }
            Fault::Latency(_) => self.sim.set_max_message_latency(Duration::from_millis(4)),
            Fault::Loss(_) => {
                self.sim.set_fail_rate(0.0);
                self.refresh_links();
            }
            Fault::SlowDisk(member, _) => {
                self.world.slots[*member].lock().disk.set_slowness(None);
            }
            // Restarts have their own list; the others have no end, or had no occasion.
            _ => return,
        }
        self.say(&format!("over {fault:?}"));
    }

    /// Faults that wait for something to happen.
    fn take_occasions(&mut self) {
        let waits = |fault: &Fault| matches!(fault, Fault::BreakTransfer(_));
        let Some(at) = self.active.iter().position(|(_, fault)| waits(fault)) else { return };
        let Some((sender, receiver)) = self.transfer() else { return };
        let (_, fault) = self.active.remove(at);
        let victim = if fault == Fault::BreakTransfer(true) { sender } else { receiver };
        self.say(&format!("a transfer from m{sender} to m{receiver} is under way"));
        let lasts = 500 + self.rng.below(1_500);
        if self.take_down(victim, true, self.now + lasts) {
            *self.counts.entry(fault.kind()).or_default() += 1;
        }
    }

    /// Sender and receiver of a state under way.
    fn transfer(&self) -> Option<(usize, usize)> {
        let id_of = |slot: &Slot| slot.running.as_ref().map(|it| it.node.status().member_id);
        let ids: Vec<_> = self.world.slots.iter().map(|slot| id_of(&slot.lock())).collect();
        for (sender, slot) in self.world.slots.iter().enumerate() {
            let slot = slot.lock();
            let Some(running) = &slot.running else { continue };
            for (id, counters) in running.node.take_peer_counters() {
                let receiver = ids.iter().position(|known| *known == Some(id));
                if let (true, Some(receiver)) = (counters.snapshots_sending > 0, receiver) {
                    return Some((sender, receiver));
                }
            }
        }
        None
    }

    /// Hands a task to some member that runs.
    fn ask(&mut self, task: Task) -> bool {
        let first = self.rng.below(self.world.run.members as u64) as usize;
        let order = (0..self.world.run.members).map(|at| (first + at) % self.world.run.members);
        for member in order {
            if let Some(running) = &self.world.slots[member].lock().running {
                return running.tasks.send(task).is_ok();
            }
        }
        false
    }

    fn change_spare(&mut self, change: fn(u64) -> MemberChange) -> bool {
        let slot = self.world.slots[self.world.run.members].lock();
        let id = slot.running.as_ref().map(|it| it.node.status().member_id);
        drop(slot);
        id.is_some_and(|id| self.ask(Task::Change(change(id))))
    }

    // The network.

    fn cut_sides(&mut self, side: &[usize], is_cut: bool) {
        for member in side {
            for other in (0..self.world.slots.len()).filter(|other| !side.contains(other)) {
                self.cut_way(*member, other, is_cut);
                self.cut_way(other, *member, is_cut);
            }
        }
    }

    fn cut_way(&mut self, from: usize, to: usize, is_cut: bool) {
        let count = self.cut.entry((from, to)).or_default();
        *count = if is_cut { *count + 1 } else { count.saturating_sub(1) };
        let count = *count;
        if is_cut && count == 1 {
            self.sim.partition_oneway(name(from), name(to));
        } else if count == 0 {
            self.refresh_links();
        }
    }

    /// Opens what nothing keeps shut.
    fn refresh_links(&self) {
        let members = self.world.slots.len();
        let is_cut = |way: (usize, usize)| self.cut.get(&way).is_some_and(|count| *count > 0);
        for a in 0..members {
            for b in a + 1..members {
                let is_held = self.held.contains(&(a, b)) || self.held.contains(&(b, a));
                if is_held {
                    self.sim.hold(name(a), name(b));
                } else {
                    self.sim.repair(name(a), name(b));
                }
                for (from, to) in [(a, b), (b, a)] {
                    if is_cut((from, to)) {
                        self.sim.partition_oneway(name(from), name(to));
                    }
                }
            }
        }
    }

    // Members.

    fn take_down(&mut self, member: usize, is_power: bool, until: u64) -> bool {
        if !self.world.slots[member].lock().is_up {
            return false;
        }
        self.stop(member, is_power);
        self.restarts.push((until, member));
        true
    }

    /// Ends a member's process as a kill does, or cuts its power.
    fn stop(&mut self, member: usize, is_power: bool) {
        self.look(member);
        if is_power {
            // No word leaves a machine without power.
            self.cut_sides(&[member], true);
        }
        let (dir, disk, copy) = {
            let mut slot = self.world.slots[member].lock();
            let durable =
                slot.running.as_ref().map_or(0, |it| it.reader.durable_applied().borrow().index);
            let copy = slot.dir.with_extension("copy");
            copy_at_rest(&slot.dir, &copy);
            let disk = slot.disk.cut(durable, is_power, &mut self.rng);
            (slot.running, slot.is_up) = (None, false);
            (slot.dir.clone(), disk, copy)
        };
        self.say(&format!("m{member} is down"));
        self.sim.crash(name(member));
        let replaced = fs::remove_dir_all(&dir).and_then(|()| fs::rename(&copy, &dir));
        replaced.unwrap_or_else(|error| panic!("replace {}: {error}", dir.display()));
        self.world.slots[member].lock().disk = LogDisk::new(disk, lies(self.world.run.flaw));
        if is_power {
            self.cut_sides(&[member], false);
        }
    }

    fn start(&mut self, member: usize) {
        let mut slot = self.world.slots[member].lock();
        if slot.is_up || !slot.is_wanted {
            return;
        }
        (slot.is_up, slot.life) = (true, slot.life + 1);
        drop(slot);
        self.say(&format!("m{member} starts"));
        self.sim.bounce(name(member));
    }

    // The end.

    fn heal(&mut self) {
        self.say("heal");
        for (_, fault) in std::mem::take(&mut self.active) {
            self.end(&fault);
        }
        self.cut.clear();
        self.held.clear();
        self.refresh_links();
        self.restarts.clear();
        for member in 0..self.world.slots.len() {
            self.start(member);
        }
    }

    /// A spare member that is no member any more need not come back. It may not have heard of it: who
    /// has no vote asks nobody.
    fn dismiss_spare(&mut self) {
        let spare = self.world.run.members;
        if !self.world.slots[spare].lock().is_wanted {
            return;
        }
        let address = url(spare);
        let lists = |row: &kelson_api::etcdserverpb::Member| row.peer_ur_ls.contains(&address);
        let mut stands = BTreeSet::new();
        for slot in &self.world.slots[..spare] {
            let slot = slot.lock();
            let Some(running) = &slot.running else { return };
            if running.reader.members().iter().any(lists) {
                return;
            }
            stands.insert(running.reader.applied());
        }
        if stands.len() == 1 {
            self.say("the spare is no member");
            self.world.slots[spare].lock().is_wanted = false;
            self.stop(spare, false);
        }
    }

    /// Everybody stands where everybody else does.
    fn until_whole(&mut self) -> bool {
        let until = self.now + HEAL_TIME;
        while self.now < until && !self.is_over() {
            self.tick();
            if self.now.is_multiple_of(100) {
                self.dismiss_spare();
                if self.is_whole() {
                    return true;
                }
            }
        }
        false
    }

    fn is_whole(&self) -> bool {
        let mut stands = BTreeSet::new();
        let mut leaders = 0;
        for slot in &self.world.slots {
            let slot = slot.lock();
            if !slot.is_wanted {
                continue;
            }
            let Some(running) = &slot.running else { return false };
            let status = running.node.status();
            leaders += usize::from(status.is_leader);
            if status.last_index != status.applied_index {
                return false;
            }
            stands.insert((running.reader.applied().index, running.reader.revision()));
        }
        stands.len() == 1 && leaders == 1
    }

    fn write_everywhere(&mut self) -> bool {
        for slot in &self.world.slots {
            if let Some(running) = &slot.lock().running {
                // A member that ends meanwhile is seen below.
                let _ = running.tasks.send(Task::Write);
            }
        }
        let until = self.now + HEAL_TIME;
        let has_written = |slot: &Mutex<Slot>| {
            let slot = slot.lock();
            slot.has_written || !slot.is_wanted
        };
        while self.now < until && !self.is_over() {
            self.tick();
            if self.world.slots.iter().all(has_written) {
                return true;
            }
        }
        false
    }

    fn compare_hashes(&self) {
        let mut hashes = BTreeSet::new();
        let slots: Vec<_> = self.world.slots.iter().map(|slot| slot.lock()).collect();
        let running: Vec<_> = slots.iter().filter_map(|slot| slot.running.as_ref()).collect();
        for it in &running {
            match it.reader.hash_kv(0) {
                Ok(hash) => drop(hashes.insert((hash.hash, hash.hash_revision))),
                Err(error) => self.world.history.lock().violate(format!("no hash: {error}")),
            }
        }
        if hashes.len() > 1 {
            self.world.history.lock().violate(format!("members hold different keys: {hashes:?}"));
        }
    }

    fn positions(&self) -> String {
        let mut text = String::new();
        for (member, slot) in self.world.slots.iter().enumerate() {
            let slot = slot.lock();
            let shown = slot.running.as_ref().map(|it| it.node.status());
            text += &format!("m{member} wanted {} {shown:?}; ", slot.is_wanted);
        }
        text
    }

    fn report(self) -> Report {
        let history = self.world.history.lock();
        Report {
            violation: history.violation().map(ToOwned::to_owned),
            lines: history.last_lines().into_iter().map(ToOwned::to_owned).collect(),
            operations: history.operations,
            unknown: history.unknown,
            reads: history.reads.len() as u64,
            counts: self.counts.iter().map(|(kind, count)| ((*kind).to_owned(), *count)).collect(),
            simulated: self.now,
            trace: history.trace().to_owned(),
        }
    }
}

fn lies(flaw: Option<Flaw>) -> Lies {
    Lies { no_sync: flaw == Some(Flaw::NoSync), early: flaw == Some(Flaw::EarlyAck) }
}

/// Copies files that nobody changes meanwhile: what a member's threads still do comes before it or after
/// it, as with a kill.
fn copy_at_rest(from: &Path, to: &Path) {
    loop {
        drop(fs::remove_dir_all(to));
        let before = stamps(from);
        let copied = copy_tree(from, to);
        if copied.is_ok() && stamps(from) == before {
            return;
        }
        std::thread::yield_now();
    }
}

type Stamps = BTreeMap<PathBuf, (u64, Option<std::time::SystemTime>)>;

fn stamps(dir: &Path) -> Stamps {
    let mut all = Stamps::new();
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            all.extend(stamps(&path));
        }
        if let Ok(meta) = entry.metadata() {
            all.insert(path, (meta.len(), meta.modified().ok()));
        }
    }
    all
}

fn copy_tree(from: &Path, to: &Path) -> std::io::Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from).into_iter().flatten() {
        let entry = entry?;
        let (path, target) = (entry.path(), to.join(entry.file_name()));
        if path.is_dir() {
            copy_tree(&path, &target)?;
        } else {
            fs::copy(&path, &target)?;
        }
    }
    Ok(())
}

/// A life of a member.
async fn live(world: Arc<World>, member: usize) -> turmoil::Result {
    let Some((node, reader)) = start(&world, member).await else {
        return std::future::pending().await;
    };
    let (tasks, waiting) = mpsc::unbounded_channel();
    world.history.lock().born(member, &node.status());
    let (life, published) = {
        let mut slot = world.slots[member].lock();
        let shown = Shown::default();
        let (node, reader) = (node.clone(), reader.clone());
        slot.running = Some(Running { node, reader, shown, tasks });
        (slot.life, slot.dir.clone())
    };
    drop(published);
    tokio::spawn(publish(node.clone(), member));
    tokio::spawn(work(world.clone(), member, node.clone(), waiting));
    for number in 0..CLIENTS {
        let stream = 300 + (member as u64 * 1_000 + life) * 10 + number;
        let client = Client {
            name: format!("m{member}.{life}.{number}"),
            rng: Rng::fork(world.run.seed, stream),
            node: node.clone(),
            reader: reader.clone(),
            history: world.history.clone(),
            reads_locally: world.run.flaw == Some(Flaw::LocalReads),
            lease: None,
        };
        tokio::spawn(client.run(world.run.seconds * 1_000));
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

/// Does what the driver asks.
async fn work(
    world: Arc<World>,
    member: usize,
    node: Node,
    mut waiting: mpsc::UnboundedReceiver<Task>,
) {
    while let Some(task) = waiting.recv().await {
        match task {
            Task::Add(url) => {
                let peer_urls = vec![url];
                let add = MemberChange::Add { peer_urls: peer_urls.clone(), is_learner: true };
                let result = node.change_members(add).await;
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
            Task::Change(change) => {
                let result = node.change_members(change).await;
                world.history.lock().say(&format!("m{member} change: {result:?}"));
            }
            Task::Write => {
                loop {
                    let put = PutRequest {
                        key: "end".into(),
                        value: format!("m{member} {}", world.history.lock().now).into(),
                        ..PutRequest::default()
                    };
                    if node.propose(Op::Put(put)).await.is_ok_and(|put| put.result.is_ok()) {
                        break;
                    }
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
                world.slots[member].lock().has_written = true;
            }
        }
    }
}
