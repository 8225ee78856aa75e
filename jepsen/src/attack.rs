//! Carries out a schedule: faults are installed, held and undone, the cluster heals, and each fault
//! leaves a line that says what became of it. It also sees that the load moved before and after each,
//! for a fault that meets a standing cluster tests nothing.

use std::io;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::history::Outcome as Answer;
use crate::nemesis::{Class, Fault, Hurt, Outcome};
use crate::report::Extra;
use crate::rng::Rng;
use crate::run::{Run, Spread, Step};
use crate::schedule::{Entry, Schedule, fault};

/// A cluster has a leader again within this, and all members serve.
const HEAL: Duration = Duration::from_secs(60);
/// The load gets an answer within this where nothing is in its way.
const MOVES: Duration = Duration::from_secs(10);

/// A fault as it happened.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct FaultRecord {
    /// Place of its attack in the schedule.
    pub(crate) entry: usize,
    pub(crate) fault: String,
    pub(crate) class: Class,
    /// Seconds since the run began.
    pub(crate) from: f64,
    pub(crate) to: f64,
    pub(crate) leader: usize,
    pub(crate) members: Vec<usize>,
    #[serde(flatten)]
    pub(crate) outcome: Outcome,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub(crate) note: String,
}

/// Carries out all of a schedule, or as much as the cluster survives.
pub(crate) async fn carry_out(run: &Run, schedule: &Schedule) -> io::Result<Extra> {
    let mut recoveries = Vec::new();
    for (number, entry) in schedule.entries.iter().enumerate() {
        match attack(run, number, entry).await? {
            Some(seconds) => recoveries.push(seconds),
            None => {
                let missed = schedule.entries.len() - number - 1;
                run.gap(format!("{missed} attacks of the schedule were not made any more"));
                break;
            }
        }
    }
    let spread = Spread::of(recoveries);
    Ok(vec![
        ("heal to all members serving, median".into(), spread.median, "s".into()),
        ("heal to all members serving, max".into(), spread.max, "s".into()),
    ])
}

/// One attack. Gives the seconds that healing took; none if the cluster is beyond going on.
async fn attack(run: &Run, number: usize, entry: &Entry) -> io::Result<Option<f64>> {
    let name = entry.faults.join(" and ");
    if !moves(run).await {
        run.gap(format!("before {name}: no operation was answered for {MOVES:?}"));
    }
    tokio::time::sleep(Duration::from_millis(entry.calm_ms)).await;
    let Some(leader) = run.monitor.settled(Duration::from_secs(30)).await else {
        run.finding(format!("before {name}: no leader for 30 s"));
        return Ok(None);
    };
    run.say(&format!("{name}: leader is {leader}"));
    let (from, start, dropped) = (run.clock.seconds(), run.clock.now(), run.fabric.counts().1);
    let mut rng = Rng::fork(entry.draw, 0);
    let mut hurts = Vec::new();
    for name in &entry.faults {
        let fault = fault(name).map_err(io::Error::other)?;
        let hurt = fault.install(run, leader, &mut rng).await?;
        hurts.push((fault, run.clock.seconds(), hurt));
    }
    tokio::time::sleep(Duration::from_millis(entry.hold_ms)).await;
    let (writes, dropped) = (run.writes(start, run.clock.now()), run.fabric.counts().1 - dropped);
    undo(run, &mut hurts).await?;
    let to = run.clock.seconds();
    let recovery = run.converge(HEAL).await;
    let note = hurts.iter().map(|(_, _, hurt)| hurt.note.clone()).collect::<Vec<_>>().join("; ");
    run.say(&format!("{name}: {writes} writes during, all serve after {recovery:.2?} s; {note}"));
    for (fault, from, hurt) in hurts {
        let told = Told { number, leader, from, to, dropped };
        record(run, fault, hurt, told);
    }
    run.steps.add(Step {
        name: name.clone(),
        from,
        to,
        dropped,
        writes,
        recovery,
        note,
        ..Step::default()
    });
    if recovery.is_none() {
        run.finding(format!("{name}: not all members serve {HEAL:?} after healing"));
    } else if !moves(run).await {
        run.gap(format!("after {name}: no operation was answered for {MOVES:?}"));
    }
    Ok(recovery)
}

/// Undoes all faults of an attack. The network goes first: others need it to be whole for their end.
async fn undo(run: &Run, hurts: &mut [(Fault, f64, Hurt)]) -> io::Result<()> {
    hurts.sort_by_key(|(fault, ..)| fault.class() != Class::Network);
    for (fault, _, hurt) in hurts.iter_mut() {
        if fault.class() != Class::Network {
            run.fabric.heal();
        }
        fault.undo(run, hurt).await?;
    }
    run.fabric.heal();
    Ok(())
}

/// What is known of an attack beside the fault itself.
struct Told {
    number: usize,
    leader: usize,
    from: f64,
    to: f64,
    dropped: u64,
}

fn record(run: &Run, fault: Fault, mut hurt: Hurt, told: Told) {
    let Told { number, leader, from, to, dropped } = told;
    if fault.cuts() && dropped == 0 && hurt.outcome == Outcome::Installed {
        let reason = "the network dropped nothing".to_owned();
        hurt.outcome = Outcome::Indeterminate { reason };
    }
    let name = fault.name();
    match &hurt.outcome {
        Outcome::Installed => {}
        Outcome::Skipped { reason } => run.gap(format!("{name} was skipped: {reason}")),
        Outcome::Indeterminate { reason } => {
            run.gap(format!("{name} may not have been in force: {reason}"));
        }
    }
    let (class, fault) = (fault.class(), name.to_owned());
    let (members, outcome, note) = (hurt.members, hurt.outcome, hurt.note);
    run.faults.add(FaultRecord {
        entry: number,
        fault,
        class,
        from,
        to,
        leader,
        members,
        outcome,
        note,
    });
}

/// True once an operation that needs a quorum, begun from now on, was answered.
async fn moves(run: &Run) -> bool {
    let since = run.clock.now();
    let deadline = tokio::time::Instant::now() + MOVES;
    loop {
        let answered = run.load.ops.with(|ops| {
            let late = ops.iter().rev().take_while(|op| op.end >= since);
            late.filter(|op| op.start >= since && !op.call.is_serializable())
                .any(|op| op.outcome == Answer::Ok)
        });
        if answered || tokio::time::Instant::now() > deadline {
            return answered;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
