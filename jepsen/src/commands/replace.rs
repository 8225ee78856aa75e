//! `jepsen replace`: membership changes under write load, each old member replaced by a fresh one
//! (learner, then voter, then the old one goes; the leader is among them). Then a large database: a
//! fresh member catches up while the put latency and the memory of both sides are watched.

use std::io;
use std::time::Duration;

use crate::args::Args;
use crate::bulk;
use crate::nemesis::member::{join, leave};
use crate::report::Extra;
use crate::run::{Plan, Run, Step, Verdict, inside};
use crate::workload::Shape;

pub(crate) fn run(mut args: Args) -> Result<bool, String> {
    let mut plan = Plan::from_args("replace", &mut args)?;
    let rounds = args.number("rounds", 3)? as usize;
    let mib = args.number("mib", 2048)?;
    let rate = args.number("rate", 200)?;
    args.done()?;
    if plan.members + rounds > 60 {
        return Err("--rounds: the network has 60 places".into());
    }
    // The fresh members of all rounds, and the one that catches up at the end.
    plan.spare = rounds + 1;
    plan.extra.push(format!("--quota-backend-bytes={}", 8u64 << 30));
    let verdict = inside(&plan.clone(), async |fabric| {
        let run = Run::start(plan, fabric).await?;
        run.begin(Shape { rate, ..Shape::default() });
        tokio::time::sleep(Duration::from_secs(3)).await;
        exchange(&run, rounds).await?;
        let mut measured: Extra = Vec::new();
        if mib > 0 && run.findings.lock().is_empty() {
            measured = bulk::catch_up(&run, mib).await?;
        }
        finish(&run, measured).await
    });
    verdict.map(|verdict| verdict.valid()).map_err(|error| error.to_string())
}

async fn finish(run: &Run, measured: Extra) -> io::Result<Verdict> {
    run.finish(measured).await
}

/// Replaces one member per round; the leader in every second one and in the last.
async fn exchange(run: &Run, rounds: usize) -> io::Result<()> {
    for round in 1..=rounds {
        let Some(leader) = run.monitor.settled(Duration::from_secs(30)).await else {
            run.finding(format!("replacement {round}: no leader for 30 s"));
            return Ok(());
        };
        let members = run.load.members.read().clone();
        let lead = round % 2 == 0 || round == rounds;
        let follower = members.iter().copied().find(|member| *member != leader);
        let old = if lead { leader } else { follower.unwrap_or(leader) };
        let (from, start) = (run.clock.seconds(), run.clock.now());
        let new = run.plan.members + round;
        let joined = join(run, new).await?;
        let done = match joined {
            Ok(()) => leave(run, old).await,
            Err(error) => Err(error),
        };
        if let Err(error) = done {
            run.finding(format!("replacing member {old} by {new}: {error}"));
            return Ok(());
        }
        let recovery = run.converge(Duration::from_secs(60)).await;
        let writes = run.writes(start, run.clock.now());
        let role = if lead { "leader" } else { "follower" };
        run.say(&format!("replaced {role} {old} by {new}, {writes} writes meanwhile"));
        run.steps.add(Step {
            name: format!("replace {role} {old} by {new}"),
            from,
            to: run.clock.seconds(),
            writes,
            recovery,
            ..Default::default()
        });
        if recovery.is_none() || writes == 0 {
            run.finding(format!("after replacing {old} by {new}: not all serve, or no writes"));
        }
        // The load goes on against the new membership for a while.
        tokio::time::sleep(Duration::from_secs(3)).await;
    }
    Ok(())
}
