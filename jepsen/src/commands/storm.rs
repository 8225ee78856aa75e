//! `jepsen storm`: faults drawn at random, up to two at a time, often before the cluster has got
//! over the last one, on members that keep little log, so that they send each other their whole state
//! again and again. Every few faults the cluster gets the chance to heal and must take it.

use std::collections::BTreeMap;
use std::io;
use std::time::Duration;

use crate::args::Args;
use crate::nemesis::Fault;
use crate::report::Extra;
use crate::rng::Rng;
use crate::run::{Plan, Run, Spread, Step, Verdict, inside};
use crate::workload::Shape;

/// Attacks between two moments of peace.
const ATTACKS: u64 = 5;
/// Peace must bring all members back within this.
const HEAL: Duration = Duration::from_secs(60);

pub(crate) fn run(mut args: Args) -> Result<bool, String> {
    let mut plan = Plan::from_args("storm", &mut args)?;
    let seconds = args.number("seconds", 120)?;
    let rate = args.number("rate", 300)?;
    let faults = Fault::named(&args.many("only"), &Fault::STORM)?;
    args.done()?;
    if plan.members < 3 {
        return Err("partitions need 3 members".into());
    }
    // Little log: a member that was away for a second or two needs the state itself.
    for flag in ["--snapshot-count=100", "--snapshot-catchup-entries=50"] {
        plan.extra.push(flag.into());
    }
    let verdict = inside(&plan.clone(), async |fabric| {
        let run = Run::start(plan, fabric).await?;
        run.begin(Shape { rate, ..Shape::default() });
        rage(&run, &faults, Duration::from_secs(seconds)).await
    });
    verdict.map(|verdict| verdict.valid()).map_err(|error| error.to_string())
}

async fn rage(run: &Run, faults: &[Fault], time: Duration) -> io::Result<Verdict> {
    let mut rng = Rng::fork(run.plan.seed, 2);
    let mut counts: BTreeMap<&'static str, usize> = BTreeMap::new();
    let mut recoveries = Vec::new();
    while run.clock.seconds() < time.as_secs_f64() {
        for _ in 0..ATTACKS {
            let mut chosen = vec![*rng.pick(faults)];
            let second = *rng.pick(faults);
            // Two at a time only of different kinds, since one undoes what the other did.
            if rng.chance(0.3) && second.class() != chosen[0].class() {
                chosen.push(second);
            }
            for fault in &chosen {
                *counts.entry(fault.name()).or_default() += 1;
            }
            attack(run, &chosen, &mut rng).await?;
            tokio::time::sleep(Duration::from_millis(rng.below(3000))).await;
        }
        match run.converge(HEAL).await {
            Some(seconds) => recoveries.push(seconds),
            None => {
                run.finding(format!("not all members serve {HEAL:?} after the last fault"));
                break;
            }
        }
    }
    let transfers = run.cluster.lock().transfers();
    let spread = Spread::of(recoveries);
    let mut measured: Extra = vec![
        ("peace to all members serving, median".into(), spread.median, "s".into()),
        ("peace to all members serving, max".into(), spread.max, "s".into()),
        ("states sent whole from member to member".into(), transfers as f64, String::new()),
    ];
    for (name, count) in counts {
        measured.push((format!("fault {name}"), count as f64, "times".into()));
    }
    run.finish(measured).await
}

/// One or two faults, held for a moment and undone.
async fn attack(run: &Run, faults: &[Fault], rng: &mut Rng) -> io::Result<()> {
    let members = run.load.members.read().clone();
    // Without a leader anybody may be the victim.
    let leader = run.monitor.leader().unwrap_or_else(|| *rng.pick(&members));
    let names: Vec<_> = faults.iter().map(|fault| fault.name()).collect();
    let name = names.join(" and ");
    let (from, start, dropped) = (run.clock.seconds(), run.clock.now(), run.fabric.counts().1);
    let mut hurts = Vec::new();
    for fault in faults {
        hurts.push(fault.install(run, leader, rng).await?);
    }
    let hold = Duration::from_millis(300 + rng.below(6000));
    run.say(&format!("{name}: leader {leader}, for {:.1} s", hold.as_secs_f64()));
    tokio::time::sleep(hold).await;
    for (fault, hurt) in faults.iter().zip(&mut hurts) {
        fault.undo(run, hurt).await?;
    }
    run.fabric.heal();
    run.steps.add(Step {
        name,
        from,
        to: run.clock.seconds(),
        dropped: run.fabric.counts().1 - dropped,
        writes: run.writes(start, run.clock.now()),
        note: format!("leader {leader}"),
        ..Default::default()
    });
    Ok(())
}
