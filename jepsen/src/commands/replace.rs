//! `jepsen replace`: membership changes under write load, each old member replaced by a fresh one
//! (learner, then voter, then the old one goes; the leader is among them). Then a large database: a
//! fresh member catches up while the put latency and the memory of both sides are watched.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use kelson_api::etcdserverpb::MemberAddResponse;

use crate::args::Args;
use crate::bulk;
use crate::client::Client;
use crate::cluster::peer_url;
use crate::report::Extra;
use crate::run::{Plan, Run, Step, Verdict, inside};
use crate::workload::Shape;

/// A learner of a small store is in step within seconds; of a large one within minutes.
const CATCH_UP: Duration = Duration::from_secs(600);

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

/// Adds a member as a learner, starts it and promotes it once it is in step.
pub(crate) async fn join(run: &Run, new: usize) -> io::Result<Result<(), String>> {
    let members = run.load.members.read().clone();
    let added = match add(&members, new).await {
        Ok(added) => added,
        Err(status) => return Ok(Err(format!("member add: {status}"))),
    };
    let Some(id) = added.member.map(|member| member.id) else {
        return Ok(Err("member add: the answer names no member".into()));
    };
    let mut peers = members.clone();
    peers.push(new);
    run.cluster.lock().start(new, &peers, true)?;
    run.monitor.watch(new);
    let promoted = promote(run, &members, id).await;
    if promoted.is_ok() {
        run.load.members.write().push(new);
        run.watchers.watch(new);
    }
    Ok(promoted)
}

/// Adds a learner. Members that were started lately are refused as unhealthy for some seconds.
async fn add(members: &[usize], new: usize) -> Result<MemberAddResponse, tonic::Status> {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(30);
    loop {
        let client = Client::new(members[0], Duration::from_secs(10));
        match client.member_add(peer_url(new), true).await {
            Err(status) if tokio::time::Instant::now() < deadline && unhealthy(&status) => {}
            answer => return answer,
        }
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
}

fn unhealthy(status: &tonic::Status) -> bool {
    status.message().contains("unhealthy cluster")
}

/// Asks for the promotion until the learner is ready, as an operator would.
async fn promote(run: &Run, members: &[usize], id: u64) -> Result<(), String> {
    let deadline = tokio::time::Instant::now() + CATCH_UP;
    let mut turn = 0;
    loop {
        let client = Client::new(members[turn % members.len()], Duration::from_secs(10));
        turn += 1;
        let refusal = match client.member_promote(id).await {
            Ok(()) => return Ok(()),
            Err(status) => status,
        };
        if tokio::time::Instant::now() > deadline {
            return Err(format!("promote: still {refusal} after {CATCH_UP:?}"));
        }
        if !refusal.message().contains("in sync") {
            run.say(&format!("promote: {refusal}"));
        }
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
}

/// Removes a member, through another one, and ends its process.
pub(crate) async fn leave(run: &Run, old: usize) -> Result<(), String> {
    let id = run.monitor.id(old).ok_or("its member id was never seen")?;
    let rest: Vec<usize> =
        run.load.members.read().iter().copied().filter(|member| *member != old).collect();
    let through = *rest.last().ok_or("it is the only member")?;
    run.load.members.write().retain(|member| *member != old);
    run.watchers.leave(old);
    run.cluster.lock().excuse(old);
    let mut answer = Err("never asked".to_owned());
    // A leader that is removed may take the answer with it: then a second request says not found.
    for _ in 0..20 {
        let client = Client::new(through, Duration::from_secs(10));
        match client.member_remove(id).await {
            Ok(()) => answer = Ok(()),
            Err(status) if status.code() == tonic::Code::NotFound => answer = Ok(()),
            Err(status) => answer = Err(format!("member remove: {status}")),
        }
        if answer.is_ok() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    answer?;
    // A removed member stops by itself; that is what an operator waits for.
    for _ in 0..100 {
        if run.cluster.lock().ended(old).is_some() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    if run.cluster.lock().ended(old).is_none() {
        run.finding(format!("member {old} still runs 10 s after its removal"));
    }
    run.cluster.lock().kill(old).map_err(|error| error.to_string())
}

/// A flag that a task looks at.
#[derive(Clone, Default)]
pub(crate) struct Done(Arc<AtomicBool>);

impl Done {
    pub(crate) fn set(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    pub(crate) fn get(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}
