//! The driver of a simulated cluster: lets time pass, looks at everybody every few milliseconds, ends
//! and starts members, and heals the whole in the end. What goes wrong meanwhile is the matter of
//! `faults`, what is right that of `history`.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use kelson_api::Error;
use kelson_storage::Reader;
use kelson_storage::log::SimDisk;
use parking_lot::Mutex;

use super::disk::{Lies, LogDisk};
use super::faults::NORMAL;
use super::machine;
use super::panics;
use super::schedule::{Fault, Step};
use super::world::{self, Running, Slot, Task, World, name, url};
use super::{Flaw, Report, Run};
use crate::rng::Rng;

/// How often everybody is looked at. Unit: milliseconds.
const LOOK_EVERY: u64 = 10;
/// Simulated time in which a healed cluster must be whole. Unit: milliseconds.
const HEAL_TIME: u64 = 10_000;

/// Runs one seed to its end, on the calling thread, in a process that does nothing else.
pub(super) fn simulate(run: Run, steps: &[Step], home: &Path) -> Report {
    machine::begin(run.seed);
    let mut driver = Driver::new(run, home);
    driver.play(steps);
    driver.report()
}

pub(super) struct Driver {
    pub(super) world: Arc<World>,
    pub(super) sim: turmoil::Sim<'static>,
    pub(super) rng: Rng,
    pub(super) now: u64,
    /// Faults under way, by their end.
    pub(super) active: Vec<(u64, Fault)>,
    /// Directions that are cut, and how often.
    pub(super) cut: BTreeMap<(usize, usize), usize>,
    pub(super) held: BTreeSet<(usize, usize)>,
    /// When members that are down start again.
    pub(super) restarts: Vec<(u64, usize)>,
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
                has_finished: false,
            })
        };
        let world = Arc::new(World {
            slots: (0..=run.members).map(slot).collect(),
            history: Arc::default(),
            joined: Mutex::default(),
            counts: Mutex::default(),
            run,
        });
        let mut builder = turmoil::Builder::new();
        builder
            .tick_duration(Duration::from_millis(1))
            .simulation_duration(Duration::from_secs(100_000))
            .min_message_latency(Duration::from_millis(1))
            .max_message_latency(Duration::from_millis(NORMAL))
            .repair_rate(0.05)
            .tcp_capacity(4096)
            .rng_seed(Rng::fork(world.run.seed, 202).draw());
        let mut sim = builder.build();
        for member in 0..world.slots.len() {
            let world = world.clone();
            sim.host(name(member), move || world::live(world.clone(), member));
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
        }
    }

    pub(super) fn say(&self, line: &str) {
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
        let converged = self.until_whole() && self.finish_everywhere() && self.until_whole();
        if self.is_over() {
            return;
        }
        if !converged {
            let text = self.positions();
            self.world.history.lock().violate(format!("not whole {HEAL_TIME} ms after: {text}"));
            return;
        }
        for member in 0..self.world.slots.len() {
            self.look(member);
        }
        self.compare_states();
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
        if let Some(panic) = panics::first() {
            self.world.history.lock().violate(panic);
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

    // Members.

    pub(super) fn take_down(&mut self, member: usize, is_power: bool, until: u64) -> bool {
        if !self.world.slots[member].lock().is_up {
            return false;
        }
        self.stop(member, is_power);
        self.restarts.push((until, member));
        true
    }

    /// Ends a member's process as a kill does, or cuts its power.
    pub(super) fn stop(&mut self, member: usize, is_power: bool) {
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

    pub(super) fn start(&mut self, member: usize) {
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
            // One that was promoted has no vote before it has caught up.
            let rows = running.reader.members();
            let due = rows.iter().filter(|row| !row.is_learner).map(|row| row.id);
            let due: BTreeSet<u64> = due.collect();
            let voters: BTreeSet<u64> = running.node.voters().into_iter().collect();
            if voters != due {
                return false;
            }
            stands.insert((running.reader.applied().index, running.reader.revision()));
        }
        stands.len() == 1 && leaders == 1
    }

    fn finish_everywhere(&mut self) -> bool {
        for slot in &self.world.slots {
            if let Some(running) = &slot.lock().running {
                // A member that ends meanwhile is seen below.
                let _ = running.tasks.send(Task::Finish);
            }
        }
        let until = self.now + HEAL_TIME;
        let has_finished = |slot: &Mutex<Slot>| {
            let slot = slot.lock();
            slot.has_finished || !slot.is_wanted
        };
        while self.now < until && !self.is_over() {
            self.tick();
            if self.world.slots.iter().all(has_finished) {
                return true;
            }
        }
        false
    }

    /// All members hold the same, part by part.
    fn compare_states(&self) {
        let mut first: Option<(usize, Vec<Part>)> = None;
        for (member, slot) in self.world.slots.iter().enumerate() {
            let slot = slot.lock();
            let Some(running) = &slot.running else { continue };
            let parts = match parts(&running.reader) {
                Ok(parts) => parts,
                Err(error) => {
                    let text = format!("member {member} has no hash: {error}");
                    return self.world.history.lock().violate(text);
                }
            };
            let Some((other, known)) = &first else {
                first = Some((member, parts));
                continue;
            };
            let differ = known.iter().zip(&parts).find(|(known, part)| known != part);
            if let Some(((what, known), (_, found))) = differ {
                return self.world.history.lock().violate(format!(
                    "members hold different {what}: m{other} {known}, m{member} {found}"
                ));
            }
        }
    }

    fn positions(&self) -> String {
        let mut text = String::new();
        for (member, slot) in self.world.slots.iter().enumerate() {
            let slot = slot.lock();
            let shown = slot.running.as_ref().map(|it| (it.node.status(), it.node.voters()));
            text += &format!("m{member} wanted {} {shown:?}; ", slot.is_wanted);
        }
        text
    }

    fn report(self) -> Report {
        let history = self.world.history.lock();
        let counts = self.world.counts.lock();
        Report {
            violation: history.violation().map(ToOwned::to_owned),
            lines: history.last_lines().into_iter().map(ToOwned::to_owned).collect(),
            operations: history.operations,
            unknown: history.unknown,
            reads: history.reads.len() as u64,
            counts: counts.iter().map(|(kind, count)| ((*kind).to_owned(), *count)).collect(),
            simulated: self.now,
            trace: history.trace().to_owned(),
        }
    }
}

/// Name and content of a part of what a member holds.
type Part = (&'static str, String);

/// What must be the same at all members that have applied the same entries.
fn parts(reader: &Reader) -> Result<Vec<Part>, Error> {
    let hash = reader.hash_kv(0)?;
    let leases = reader.leases().into_iter().map(|lease| (lease, reader.lease_keys(lease.id)));
    Ok(vec![
        ("keys", format!("{:?}", (hash.hash, hash.hash_revision))),
        ("leases", format!("{:?}", leases.collect::<Vec<_>>())),
        ("members", format!("{:?}", reader.members())),
        ("removed members", format!("{:?}", reader.removed_members())),
        ("voters", format!("{:?}", reader.membership())),
    ])
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
