//! `jepsen smoke`: each kind of network fault and a long pause of the leader, one after the other
//! under load, with healing in between. It looks for stale answers and lost writes in the history,
//! and for leaders that change again and again after the network is whole.

use std::io;
use std::time::Duration;

use crate::args::Args;
use crate::nemesis::Fault;
use crate::report::Extra;
use crate::rng::Rng;
use crate::run::{Plan, Run, Spread, Step, Verdict, inside};
use crate::workload::Shape;

/// How long the leadership is observed after each fault.
const CALM: Duration = Duration::from_secs(10);
/// Leaders that may come in that time: healing itself may cost one election, not two.
const CHANGES: usize = 1;
/// A pause far beyond every timer of a member.
const PAUSE: Duration = Duration::from_secs(30);

pub(crate) fn run(mut args: Args) -> Result<bool, String> {
    let plan = Plan::from_args("smoke", &mut args)?;
    let seconds = args.number("seconds", 10)?;
    let rate = args.number("rate", 300)?;
    let only = args.many("only");
    args.done()?;
    if plan.members < 3 {
        return Err("partitions need 3 members".into());
    }
    let chosen = Fault::named(&only, &Fault::SMOKE)?;
    let verdict = inside(&plan.clone(), async |fabric| {
        let run = Run::start(plan, fabric).await?;
        run.begin(Shape { rate, ..Shape::default() });
        tokio::time::sleep(Duration::from_secs(3)).await;
        attack(&run, &chosen, Duration::from_secs(seconds)).await
    });
    verdict.map(|verdict| verdict.valid()).map_err(|error| error.to_string())
}

async fn attack(run: &Run, faults: &[Fault], hold: Duration) -> io::Result<Verdict> {
    let mut recoveries = Vec::new();
    let mut flaps = 0;
    for fault in faults {
        let Some(step) = one(run, *fault, hold).await? else { break };
        recoveries.extend(step.recovery);
        flaps += step.changes.unwrap_or(0);
        run.steps.add(step);
    }
    let spread = Spread::of(recoveries);
    let measured: Extra = vec![
        ("faults".into(), spread.count as f64, String::new()),
        ("heal to all members serving, median".into(), spread.median, "s".into()),
        ("heal to all members serving, max".into(), spread.max, "s".into()),
        (
            "leader changes in the 10 s after a fault, all faults".into(),
            flaps as f64,
            String::new(),
        ),
    ];
    run.finish(measured).await
}

/// One fault and its healing; none if the cluster is beyond going on.
async fn one(run: &Run, fault: Fault, hold: Duration) -> io::Result<Option<Step>> {
    let name = fault.name();
    let Some(leader) = run.monitor.settled(Duration::from_secs(30)).await else {
        run.finding(format!("before {name}: no leader for 30 s"));
        return Ok(None);
    };
    let (from, start, dropped) = (run.clock.seconds(), run.clock.now(), run.fabric.counts().1);
    run.say(&format!("{name}: leader is {leader}"));
    let mut rng = Rng::fork(run.plan.seed, start);
    let mut hurt = fault.install(run, leader, &mut rng).await?;
    tokio::time::sleep(if fault == Fault::PauseLeader { PAUSE } else { hold }).await;
    let dropped = run.fabric.counts().1 - dropped;
    fault.undo(run, &mut hurt).await?;
    run.fabric.heal();
    let (to, healed) = (run.clock.seconds(), run.clock.now());
    let recovery = run.converge(Duration::from_secs(60)).await;
    let rest = (healed + CALM.as_nanos() as u64).saturating_sub(run.clock.now());
    tokio::time::sleep(Duration::from_nanos(rest)).await;
    let changes = run.monitor.changes(healed, healed + CALM.as_nanos() as u64);
    let step = Step {
        name: name.into(),
        from,
        to,
        dropped,
        writes: run.writes(start, healed),
        recovery,
        changes: Some(changes),
        note: format!(
            "leader was {leader}, terms meanwhile {}",
            run.monitor.changes(start, healed)
        ),
    };
    if recovery.is_none() {
        run.finding(format!("{name}: not all members serve a minute after healing"));
        return Ok(None);
    }
    judge(run, fault, &step);
    Ok(Some(step))
}

/// What must be true of a step whatever the history says.
fn judge(run: &Run, fault: Fault, step: &Step) {
    let Step { name, writes, dropped, changes, recovery, .. } = step;
    let (recovery, changes) = (recovery.unwrap_or(0.0), changes.unwrap_or(0));
    run.say(&format!(
        "{name}: {writes} writes during, all serve {recovery:.2} s after, {changes} leader changes"
    ));
    if changes > CHANGES {
        run.finding(format!("{name}: {changes} leaders in 10 s after healing"));
    }
    if fault.cuts() && *dropped == 0 {
        run.finding(format!("{name}: the network dropped nothing, so nothing was tested"));
    }
    if *writes == 0 && fault.leaves_majority() {
        run.finding(format!("{name}: not one write was acknowledged while a majority was whole"));
    }
}
