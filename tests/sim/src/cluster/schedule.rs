//! What happens to a cluster and when: drawn from the seed before the run, so that single faults can be
//! left out of it. It touches nothing.

use std::fmt;

use crate::rng::Rng;

/// One thing that goes wrong. Members are numbered from 0; the last one is the spare.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// No message between these members and the others.
    Split(Vec<usize>),
    /// No message from one to another; the other way is open.
    OneWay(usize, usize),
    /// No message between two; both reach the others.
    Link(usize, usize),
    /// Messages between two wait, and all come when it is over.
    Hold(usize, usize),
    /// Every message takes so many milliseconds.
    Latency(u64),
    /// Links break at random, each message with a chance of one in so many.
    Loss(u64),
    /// The process ends; what it had written is there.
    Kill(usize),
    /// The power fails; what was not synced is lost, or torn.
    Power(Vec<usize>),
    /// A member is away until it needs the whole state.
    Away(usize),
    /// Each sync takes up to so many milliseconds.
    SlowDisk(usize, u64),
    /// Each sees only its two neighbours in this order.
    Ring(Vec<usize>),
    /// The next state transfer is broken off in its middle.
    BreakTransfer(Break),
    /// The spare member is added as a learner.
    Add,
    /// It gets its vote.
    Promote,
    /// It is removed.
    Remove,
}

/// How a state transfer is broken off. In all cases the other side hears nothing of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Break {
    /// Its sender, a leader, loses its power.
    Sender,
    /// Its receiver loses its power.
    Receiver,
    /// No message passes between the two for a while.
    Link,
}

impl Fault {
    /// One word for counting.
    pub fn kind(&self) -> &'static str {
        match self {
            Fault::Split(_) => "split",
            Fault::OneWay(..) => "one-way",
            Fault::Link(..) => "link",
            Fault::Hold(..) => "hold",
            Fault::Latency(_) => "latency",
            Fault::Loss(_) => "loss",
            Fault::Kill(_) => "kill",
            Fault::Power(members) if members.len() > 1 => "power-many",
            Fault::Power(_) => "power-one",
            Fault::Away(_) => "away",
            Fault::SlowDisk(..) => "slow-disk",
            Fault::Ring(_) => "ring",
            Fault::BreakTransfer(_) => "break-transfer",
            Fault::Add => "add",
            Fault::Promote => "promote",
            Fault::Remove => "remove",
        }
    }
}

/// A fault and its time. Unit: milliseconds of simulated time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// When it begins.
    pub at: u64,
    /// How long it lasts.
    pub lasts: u64,
    /// What it is.
    pub fault: Fault,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ms for {} ms: {:?}", self.at, self.lasts, self.fault)
    }
}

/// The time before the first fault: a cluster is founded.
const QUIET: u64 = 2_000;

/// The faults of a seed, by their beginning.
pub fn draw(seed: u64, members: usize, seconds: u64) -> Vec<Step> {
    let mut rng = Rng::fork(seed, 201);
    let end = (seconds * 1_000).saturating_sub(500).max(QUIET + 500);
    let mut steps = Vec::new();
    let mut at = QUIET + rng.below(1_000);
    while at < end {
        let fault = draw_one(&mut rng, members);
        let lasts = match fault {
            Fault::Away(_) => 4_000 + rng.below(4_000),
            Fault::Kill(_) | Fault::Power(_) => 100 + rng.below(2_500),
            _ => 300 + rng.below(3_000),
        };
        steps.push(Step { at, lasts, fault });
        // Some overlap, some leave a pause.
        at += 200 + rng.below(2_500);
    }
    if rng.below(3) == 0 {
        membership(&mut rng, end, &mut steps);
    }
    for _ in 0..1 + rng.below(2) {
        transfer(&mut rng, members, end, &mut steps);
    }
    steps.sort_by_key(|step| step.at);
    steps
}

fn draw_one(rng: &mut Rng, members: usize) -> Fault {
    let any = |rng: &mut Rng| rng.below(members as u64) as usize;
    let two = |rng: &mut Rng| {
        let first = any(rng);
        (first, (first + 1 + rng.below(members as u64 - 1) as usize) % members)
    };
    match rng.below(16) {
        0 | 1 => Fault::Split(vec![any(rng)]),
        2 => {
            let some = some(rng, members, members / 2);
            Fault::Split(some)
        }
        3 => {
            let (from, to) = two(rng);
            Fault::OneWay(from, to)
        }
        4 => {
            let (a, b) = two(rng);
            Fault::Link(a, b)
        }
        5 => {
            let (a, b) = two(rng);
            Fault::Hold(a, b)
        }
        6 => Fault::Latency(10 + rng.below(80)),
        7 => Fault::Loss(50 + rng.below(400)),
        8 => Fault::Kill(any(rng)),
        9 => Fault::Power(vec![any(rng)]),
        10 => {
            let count = members / 2 + 1 + rng.below(members as u64 / 2 + 1) as usize;
            Fault::Power(some(rng, members, count))
        }
        11 => Fault::Away(any(rng)),
        12 => Fault::SlowDisk(any(rng), 50 + rng.below(400)),
        13 => Fault::BreakTransfer(a_break(rng)),
        // Three are all neighbours.
        14 if members > 3 => Fault::Ring(shuffled(rng, members + 1)),
        _ => Fault::Kill(any(rng)),
    }
}

fn a_break(rng: &mut Rng) -> Break {
    match rng.below(4) {
        0 | 1 => Break::Sender,
        2 => Break::Receiver,
        _ => Break::Link,
    }
}

/// Members from 0 on below `count`, in any order.
fn shuffled(rng: &mut Rng, count: usize) -> Vec<usize> {
    let mut left: Vec<usize> = (0..count).collect();
    let mut order = Vec::new();
    while !left.is_empty() {
        order.push(left.remove(rng.below(left.len() as u64) as usize));
    }
    order
}

/// A member is away for so long that it needs the state, and what it is then sent is broken off. By
/// chance alone both rarely meet.
fn transfer(rng: &mut Rng, members: usize, end: u64, steps: &mut Vec<Step>) {
    let lasts = 2_000 + rng.below(2_500);
    let Some(room) = end.checked_sub(QUIET + lasts + 500) else { return };
    let at = QUIET + rng.below(room + 1);
    let fault = Fault::Away(rng.below(members as u64) as usize);
    steps.push(Step { at, lasts, fault });
    let fault = Fault::BreakTransfer(a_break(rng));
    steps.push(Step { at: at + lasts, lasts: 0, fault });
}

/// So many different members.
fn some(rng: &mut Rng, members: usize, count: usize) -> Vec<usize> {
    let mut all: Vec<usize> = (0..members).collect();
    while all.len() > count.max(1) {
        all.remove(rng.below(all.len() as u64) as usize);
    }
    all
}

fn membership(rng: &mut Rng, end: u64, steps: &mut Vec<Step>) {
    let mut at = QUIET + rng.below(end / 2);
    for fault in [Fault::Add, Fault::Promote, Fault::Remove] {
        steps.push(Step { at, lasts: 0, fault });
        at += 1_500 + rng.below(4_000);
        if at >= end || rng.below(4) == 0 {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_gives_one_schedule_and_many_give_all_kinds() {
        assert_eq!(draw(7, 3, 20), draw(7, 3, 20));
        let steps = (0..200).flat_map(|seed| draw(seed, 5, 20));
        let kinds: std::collections::BTreeSet<_> = steps.map(|step| step.fault.kind()).collect();
        assert_eq!(kinds.len(), 16, "{kinds:?}");
    }
}
