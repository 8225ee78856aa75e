//! What can be done to a cluster, and how each thing is undone. Faults know nothing of time and judge
//! only what their own design promises (a wiped member is refused, damage is noticed); the commands
//! say when, the checks and the report say what came of it.

pub(crate) mod admin;
mod clock;
mod corrupt;
mod disk;
pub(crate) mod member;
mod network;
mod process;
mod table;

use std::collections::BTreeSet;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::task::JoinHandle;

use crate::cluster::Target;
use crate::page;
use crate::rng::Rng;
use crate::run::{Plan, Run};

pub(crate) use table::Fault;

/// What kind of harm a fault does. Up to two faults at a time, of different classes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Class {
    Network,
    Process,
    Disk,
    Corruption,
    Clock,
    Member,
    Admin,
    /// Steps of a directed scenario: no class that faults are drawn from.
    Scenario,
}

impl Class {
    pub(crate) const ALL: [Self; 7] = [
        Self::Network,
        Self::Process,
        Self::Disk,
        Self::Corruption,
        Self::Clock,
        Self::Member,
        Self::Admin,
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Network => "network",
            Self::Process => "process",
            Self::Disk => "disk",
            Self::Corruption => "corruption",
            Self::Clock => "clock",
            Self::Member => "member",
            Self::Admin => "admin",
            Self::Scenario => "scenario",
        }
    }

    pub(crate) fn named(name: &str) -> Result<Self, String> {
        let all: Vec<_> = Self::ALL.iter().map(|class| class.name()).collect();
        let found = Self::ALL.into_iter().find(|class| class.name() == name);
        found.ok_or_else(|| format!("--class {name}: there are {}", all.join(", ")))
    }
}

/// What became of a planned fault.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "outcome", rename_all = "lowercase")]
pub(crate) enum Outcome {
    Installed,
    /// It was not done, and why.
    Skipped {
        reason: String,
    },
    /// It may have been done, in part or wholly.
    Indeterminate {
        reason: String,
    },
}

/// A fault in force: what its undoing needs.
#[derive(Debug)]
pub(crate) struct Hurt {
    pub(crate) outcome: Outcome,
    /// Members that were touched.
    pub(crate) members: Vec<usize>,
    pub(crate) note: String,
    /// Goes on hurting until it is stopped.
    repeat: Option<Repeat>,
    /// Control groups to remove.
    groups: Vec<process::Group>,
    /// What the preloaded libraries had counted before, one number per member.
    before: Vec<u64>,
}

impl Hurt {
    fn new(members: &[usize]) -> Self {
        Self {
            outcome: Outcome::Installed,
            members: members.to_vec(),
            note: String::new(),
            repeat: None,
            groups: Vec::new(),
            before: Vec::new(),
        }
    }

    fn noted(members: &[usize], note: String) -> Self {
        Self { note, ..Self::new(members) }
    }

    fn skipped(reason: impl Into<String>) -> Self {
        Self { outcome: Outcome::Skipped { reason: reason.into() }, ..Self::new(&[]) }
    }

    fn doubt(&mut self, reason: impl Into<String>) {
        self.outcome = Outcome::Indeterminate { reason: reason.into() };
    }

    fn add(&mut self, note: &str) {
        if !self.note.is_empty() {
            self.note.push_str("; ");
        }
        self.note.push_str(note);
    }
}

/// A flag that a task looks at.
#[derive(Clone, Debug, Default)]
pub(crate) struct Done(Arc<AtomicBool>);

impl Done {
    pub(crate) fn set(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    pub(crate) fn get(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// A task that does the same thing again and again.
#[derive(Debug)]
struct Repeat {
    done: Done,
    task: JoinHandle<()>,
}

impl Repeat {
    /// Calls `turn` with true and false in turns, ends with false.
    fn start(every: Duration, mut turn: impl FnMut(bool) + Send + 'static) -> Self {
        let done = Done::default();
        let stop = done.clone();
        let task = tokio::spawn(async move {
            let mut on = false;
            while !stop.get() {
                on = !on;
                turn(on);
                tokio::time::sleep(every).await;
            }
            turn(false);
        });
        Self { done, task }
    }

    async fn stop(self) {
        self.done.set();
        self.task.await.ok();
    }
}

/// Who is hurt: the leader at the moment of the fault and the rest, in an order that was drawn.
pub(crate) struct Scene {
    pub(crate) leader: usize,
    pub(crate) members: Vec<usize>,
    /// All but the leader.
    pub(crate) others: Vec<usize>,
    pub(crate) follower: usize,
    /// A number for what a fault draws itself.
    draw: u64,
}

impl Scene {
    pub(crate) fn new(run: &Run, leader: usize, rng: &mut Rng) -> Self {
        let members = run.load.members.read().clone();
        let others: Vec<usize> =
            members.iter().copied().filter(|member| *member != leader).collect();
        let follower = if others.is_empty() { leader } else { *rng.pick(&others) };
        Self { leader, members, others, follower, draw: rng.next() }
    }

    /// The smallest majority, the leader in it.
    fn majority(&self) -> Vec<usize> {
        let mut chosen = vec![self.leader];
        chosen.extend(&self.others[..self.members.len() / 2]);
        chosen
    }
}

impl Fault {
    /// Why this fault cannot be had with such members; nothing if it can.
    pub(crate) fn impossible(self, plan: &Plan) -> Option<String> {
        if self.class() == Class::Network && plan.rootless {
            return Some("without root packets cannot be hurt".into());
        }
        if plan.rootless && !matches!(self.class(), Class::Process) {
            return Some("without root only processes are hurt".into());
        }
        if plan.rootless && self == Self::StarveLeader {
            return Some("control groups need root".into());
        }
        if self.needs_page() && plan.target == Target::Etcd {
            return Some("etcd is linked statically: no library can be preloaded".into());
        }
        if self.needs_page() && plan.shim.is_none() {
            return Some("members run without the preloaded library".into());
        }
        if self.needs_image() && plan.disk.is_none() {
            return Some("members have no disks of their own (--disk ext4 or xfs)".into());
        }
        if plan.members < 3 {
            return Some("it needs 3 members".into());
        }
        None
    }

    /// How many members that come later it may need.
    pub(crate) fn spares(self) -> usize {
        match self {
            Self::WipedMember | Self::StaleCopy | Self::Grow | Self::Shrink | Self::Replace => 1,
            _ if self.class() == Class::Corruption => 1,
            _ => 0,
        }
    }

    /// Does it. An error means that the harness itself failed.
    pub(crate) async fn install(self, run: &Run, leader: usize, rng: &mut Rng) -> io::Result<Hurt> {
        let scene = Scene::new(run, leader, rng);
        match self.class() {
            Class::Network => Ok(network::install(self, run, &scene)),
            Class::Process => process::install(self, run, &scene),
            Class::Disk => disk::install(self, run, &scene).await,
            Class::Corruption => corrupt::install(self, run, &scene).await,
            Class::Clock => clock::install(self, run, &scene),
            Class::Member => member::install(self, run, &scene).await,
            Class::Admin => Ok(admin::install(self, run).await),
            Class::Scenario => unreachable!("no fault is of this class"),
        }
    }

    /// Undoes it, all but the rules of the network, which go with `Fabric::heal`.
    pub(crate) async fn undo(self, run: &Run, hurt: &mut Hurt) -> io::Result<()> {
        if let Some(repeat) = hurt.repeat.take() {
            repeat.stop().await;
        }
        if hurt.outcome != Outcome::Installed {
            return Ok(());
        }
        match self.class() {
            Class::Network | Class::Admin | Class::Scenario => Ok(()),
            Class::Process => process::undo(self, run, hurt),
            Class::Disk => disk::undo(self, run, hurt).await,
            Class::Corruption => corrupt::undo(run, hurt).await,
            Class::Clock => clock::undo(run, hurt),
            Class::Member => member::undo(self, run, hurt).await,
        }
    }
}

/// Gives an order to the preloaded libraries of some members, and remembers a count to compare with.
fn order(
    run: &Run,
    members: &[usize],
    order: page::Order,
    value: i64,
    count: page::Count,
) -> io::Result<Hurt> {
    let mut hurt = Hurt::new(members);
    let cluster = run.cluster.lock();
    for member in members {
        let Some(page) = cluster.page(*member) else {
            return Ok(Hurt::skipped("a member has no page"));
        };
        if !page.alive()? {
            let reason = format!("member {member} runs without the preloaded library");
            return Ok(Hurt::skipped(reason));
        }
        hurt.before.push(page.count(count)?);
        page.set(order, value)?;
    }
    Ok(hurt)
}

/// Takes all orders back and sees that they reached the members' calls.
fn dismiss(run: &Run, hurt: &mut Hurt, count: page::Count) -> io::Result<()> {
    let cluster = run.cluster.lock();
    let mut missed = BTreeSet::new();
    for (member, before) in hurt.members.iter().zip(&hurt.before) {
        let Some(page) = cluster.page(*member) else { continue };
        page.clear()?;
        if page.count(count)? == *before {
            missed.insert(*member);
        }
    }
    if !missed.is_empty() {
        hurt.doubt(format!("no call of members {missed:?} was hurt"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_fault_has_a_name_of_its_own_and_every_class_has_faults() {
        let names: BTreeSet<_> = Fault::all().map(Fault::name).collect();
        assert_eq!(names.len(), Fault::all().count());
        for class in Class::ALL {
            assert!(Fault::of(class).len() >= 3, "{}", class.name());
        }
    }

    #[test]
    fn unknown_names_are_refused_with_the_names_there_are() {
        assert_eq!(Class::named("disk"), Ok(Class::Disk));
        assert!(Class::named("disc").is_err_and(|error| error.contains("corruption")));
        let wrong = Fault::named(&["power-none".into()], &Fault::SMOKE);
        assert!(wrong.is_err_and(|error| error.contains("isolate-leader")));
    }
}
