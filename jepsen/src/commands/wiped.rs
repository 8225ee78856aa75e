//! `jepsen wiped`: a follower loses its disk and comes back under its old name. It has forgotten its
//! votes and acknowledgments, so it must be refused; the cluster goes on without it, and the way back
//! is to replace it, which this command does at the end.

use std::io;
use std::time::Duration;

use crate::args::Args;
use crate::nemesis::member::{join, leave};
use crate::run::{Plan, Run, Step, Verdict, inside};
use crate::workload::Shape;

/// A member that is refused ends by itself within this.
const REFUSED: Duration = Duration::from_secs(20);

pub(crate) fn run(mut args: Args) -> Result<bool, String> {
    let mut plan = Plan::from_args("wiped", &mut args)?;
    let existing = args.switch("existing");
    args.done()?;
    if plan.members < 3 {
        return Err("a cluster of fewer than 3 members does not survive this".into());
    }
    plan.spare = 1;
    let verdict = inside(&plan.clone(), async |fabric| {
        let run = Run::start(plan, fabric).await?;
        run.begin(Shape::default());
        tokio::time::sleep(Duration::from_secs(6)).await;
        forget(&run, existing).await
    });
    verdict.map(|verdict| verdict.valid()).map_err(|error| error.to_string())
}

async fn forget(run: &Run, existing: bool) -> io::Result<Verdict> {
    let leader = run.monitor.settled(Duration::from_secs(30)).await;
    let members = run.load.members.read().clone();
    let victim = members.iter().copied().find(|member| Some(*member) != leader);
    let (Some(_), Some(victim)) = (leader, victim) else {
        run.finding("no leader for 30 s".into());
        return run.finish(Vec::new()).await;
    };
    let (from, start) = (run.clock.seconds(), run.clock.now());
    {
        let mut cluster = run.cluster.lock();
        cluster.kill(victim)?;
        cluster.wipe(victim)?;
        // What an operator in a hurry may write into the flags must not help either.
        cluster.start(victim, &members, existing)?;
        cluster.excuse(victim);
    }
    let refused = run.ended(victim, REFUSED).await;
    let note = match &refused {
        Some(status) => format!("the member ended: {status}"),
        None => "the member ran on".into(),
    };
    run.say(&format!("member {victim} came back with an empty disk: {note}"));
    if refused.is_none() {
        run.finding(format!("member {victim} came back with an empty disk and was not refused"));
    }
    let writes = run.writes(start, run.clock.now());
    let to = run.clock.seconds();
    run.steps.add(Step { name: "wiped".into(), from, to, writes, note, ..Default::default() });
    let new = run.plan.members + 1;
    // The refused one goes first: adding beside a dead member would make a quorum harder to reach.
    let replaced = match leave(run, victim).await {
        Ok(()) => join(run, new).await?,
        Err(error) => Err(error),
    };
    if let Err(error) = replaced {
        run.finding(format!("replacing member {victim} by {new}: {error}"));
    }
    tokio::time::sleep(Duration::from_secs(3)).await;
    run.finish(Vec::new()).await
}
