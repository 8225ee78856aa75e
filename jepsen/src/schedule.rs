//! What will be done to a cluster, drawn from the seed and written down before any of it is done. It
//! knows the faults by name and cost, not what they do; `attack.rs` carries it out.

use std::io;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::nemesis::{Class, Fault};
use crate::rng::Rng;
use crate::run::Plan;

/// The faults of `run --smoke`: short ones of six classes.
pub(crate) const SMOKE: [Fault; 10] = [
    Fault::IsolateLeader,
    Fault::LeaderInMinority,
    Fault::KillLeader,
    Fault::PauseLeader,
    Fault::PowerMajority,
    Fault::HeldSyncs,
    Fault::FlipLog,
    Fault::ClockForward,
    Fault::Compact,
    Fault::Defrag,
];

/// One attack: calm, then one fault or two, held for a while.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Entry {
    /// Time after the cluster got over the attack before. Unit: milliseconds.
    pub(crate) calm_ms: u64,
    pub(crate) faults: Vec<String>,
    pub(crate) hold_ms: u64,
    /// Decides who is hurt, and where.
    pub(crate) draw: u64,
}

/// A fault that could not be planned, and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LeftOut {
    pub(crate) fault: String,
    pub(crate) reason: String,
}

/// All attacks of a run, in order.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Schedule {
    pub(crate) entries: Vec<Entry>,
    #[serde(default)]
    pub(crate) left_out: Vec<LeftOut>,
}

/// Time that a fault takes beyond its calm and hold, roughly. Unit: milliseconds.
fn cost(fault: Fault) -> u64 {
    match (fault, fault.class()) {
        (Fault::WipedMember | Fault::StaleCopy, _) | (_, Class::Corruption) => 5_000,
        (_, Class::Member) => 5_000,
        (_, Class::Disk) => 1_500,
        (_, Class::Network | Class::Process) => 700,
        (_, Class::Clock | Class::Admin | Class::Scenario) => 200,
    }
}

/// How long a fault is in force. Unit: milliseconds.
fn hold(fault: Fault, rng: &mut Rng) -> u64 {
    match fault.class() {
        // Their work is done when they are installed, or when they are undone.
        Class::Corruption | Class::Member | Class::Admin => 300 + rng.below(700),
        Class::Disk if fault == Fault::FailedSync => 500,
        _ => 1_000 + rng.below(3_000),
    }
}

/// True if a fault of the network may be in force at the same time.
fn overlaps(fault: Fault) -> bool {
    matches!(fault.class(), Class::Process | Class::Clock)
        || matches!(fault, Fault::PowerOne | Fault::SlowSyncs | Fault::HeldSyncs)
}

impl Schedule {
    /// Draws attacks with `faults` until `seconds` are full. Every fault comes once before any comes
    /// a second time.
    pub(crate) fn draw(plan: &Plan, faults: &[Fault], seconds: u64) -> Self {
        let (possible, left_out) = sift(plan, faults);
        let mut rng = Rng::fork(plan.seed, 77);
        let mut entries = Vec::new();
        let mut left = seconds * 1000;
        let mut bag: Vec<Fault> = Vec::new();
        while !possible.is_empty() {
            if bag.is_empty() {
                bag = shuffled(&possible, &mut rng);
            }
            let fault = bag.pop().expect("just filled");
            let entry = entry(fault, &possible, &mut rng);
            let takes = entry.calm_ms + entry.hold_ms + cost(fault);
            // One attack at least, else the run would prove nothing.
            if takes > left && !entries.is_empty() {
                break;
            }
            left = left.saturating_sub(takes);
            entries.push(entry);
        }
        Self { entries, left_out }
    }

    /// Each of the faults once, in an order that is drawn.
    pub(crate) fn once(plan: &Plan, faults: &[Fault]) -> Self {
        let (possible, left_out) = sift(plan, faults);
        let mut rng = Rng::fork(plan.seed, 78);
        let order = shuffled(&possible, &mut rng);
        let alone = |fault| Entry { calm_ms: 700, ..entry(fault, &[], &mut rng) };
        Self { entries: order.into_iter().map(alone).collect(), left_out }
    }

    pub(crate) fn faults(&self) -> Result<Vec<Fault>, String> {
        let names = self.entries.iter().flat_map(|entry| entry.faults.iter());
        names.map(|name| fault(name)).collect()
    }

    pub(crate) fn load(path: &Path) -> Result<Self, String> {
        let text = std::fs::read(path).map_err(|error| format!("{}: {error}", path.display()))?;
        let schedule: Self = serde_json::from_slice(&text)
            .map_err(|error| format!("{}: {error}", path.display()))?;
        schedule.faults()?;
        Ok(schedule)
    }

    pub(crate) fn save(&self, path: &Path) -> io::Result<()> {
        std::fs::write(path, serde_json::to_vec_pretty(self).expect("a schedule is plain data"))
    }
}

/// The fault of that name.
pub(crate) fn fault(name: &str) -> Result<Fault, String> {
    let all: Vec<Fault> = Fault::all().collect();
    let found = Fault::named(&[name.to_owned()], &all)?;
    found.first().copied().ok_or_else(|| format!("no fault {name}"))
}

fn sift(plan: &Plan, faults: &[Fault]) -> (Vec<Fault>, Vec<LeftOut>) {
    let (mut possible, mut left_out) = (Vec::new(), Vec::new());
    for fault in faults {
        match fault.impossible(plan) {
            None => possible.push(*fault),
            Some(reason) => left_out.push(LeftOut { fault: fault.name().into(), reason }),
        }
    }
    (possible, left_out)
}

fn shuffled(faults: &[Fault], rng: &mut Rng) -> Vec<Fault> {
    let mut order = faults.to_vec();
    for last in (1..order.len()).rev() {
        order.swap(last, rng.below(last as u64 + 1) as usize);
    }
    order
}

fn entry(fault: Fault, others: &[Fault], rng: &mut Rng) -> Entry {
    let mut faults = vec![fault.name().to_owned()];
    let second: Vec<&Fault> =
        others.iter().filter(|other| other.class() == Class::Network).collect();
    if overlaps(fault) && !second.is_empty() && rng.chance(0.25) {
        faults.push(rng.pick(&second).name().to_owned());
    }
    let (calm_ms, hold_ms) = (500 + rng.below(1_500), hold(fault, rng));
    Entry { calm_ms, faults, hold_ms, draw: rng.next() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::Args;

    fn plan(words: &[&str]) -> Plan {
        let mut args = Args::new(words.iter().map(|word| (*word).to_owned()));
        Plan::from_args("test", &mut args).expect("a plan")
    }

    #[test]
    fn a_seed_draws_the_same_schedule_again() {
        let faults = Fault::of(Class::Network);
        let one = Schedule::draw(&plan(&["--seed", "7"]), &faults, 300);
        assert_eq!(one, Schedule::draw(&plan(&["--seed", "7"]), &faults, 300));
        assert_ne!(one, Schedule::draw(&plan(&["--seed", "8"]), &faults, 300));
        let kinds: std::collections::BTreeSet<Fault> =
            one.faults().expect("names of faults").into_iter().collect();
        assert_eq!(kinds.len(), faults.len(), "every fault comes before any comes again");
    }

    #[test]
    fn what_cannot_be_done_is_left_out_with_a_reason() {
        let schedule = Schedule::once(&plan(&["--target", "etcd"]), &Fault::of(Class::Clock));
        assert!(schedule.entries.is_empty());
        assert!(schedule.left_out.iter().all(|left| left.reason.contains("statically")));
        assert_eq!(schedule.left_out.len(), 3);
    }
}
