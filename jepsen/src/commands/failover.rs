//! `jepsen failover`: kills the leader under load, again and again, and measures how long writes
//! stay away. The time runs from the signal to the first answer to a write that was sent after it,
//! through any surviving member.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::args::Args;
use crate::client::{Client, PREFIX};
use crate::history::{Call, Outcome};
use crate::report::Extra;
use crate::rng::Rng;
use crate::run::{Plan, Run, Spread, Verdict, inside};
use crate::workload::{Load, Shape};

/// Time between two probes; also the resolution of the measurement.
const PROBE_EVERY: Duration = Duration::from_millis(10);
/// A probe that hangs may have been sent to the dead leader and is given up after this.
const PROBE_TIMEOUT: Duration = Duration::from_secs(2);
/// No write within this after a kill is a finding, and the round ends.
const GIVE_UP: Duration = Duration::from_secs(30);
/// Keys that only probes write.
const PROBE_KEYS: u64 = 8;

pub(crate) fn run(mut args: Args) -> Result<bool, String> {
    let plan = Plan::from_args("failover", &mut args)?;
    let rounds = args.number("rounds", 50)?;
    let rate = args.number("rate", 200)?;
    args.done()?;
    if plan.members < 3 {
        return Err("a leader can be replaced from 3 members on".into());
    }
    let shape = Shape { rate, ..Shape::default() };
    let verdict = inside(&plan.clone(), async |fabric| {
        let run = Run::start(plan, fabric).await?;
        run.begin(shape);
        measure(&run, rounds).await
    });
    verdict.map(|verdict| verdict.valid()).map_err(|error| error.to_string())
}

async fn measure(run: &Run, rounds: u64) -> io::Result<Verdict> {
    let mut rng = Rng::fork(run.plan.seed, 1);
    let mut times = Vec::new();
    for round in 1..=rounds {
        // Long enough for every kind of operation to happen, and not in step with any timer.
        tokio::time::sleep(Duration::from_millis(800 + rng.below(700))).await;
        let Some(leader) = run.monitor.settled(Duration::from_secs(30)).await else {
            run.finding(format!("round {round}: no leader for 30 s"));
            break;
        };
        let from = run.clock.seconds();
        let gone = kill_and_wait(run, leader).await?;
        match gone {
            Some(seconds) => times.push(seconds),
            None => run.finding(format!("round {round}: no write for {GIVE_UP:?} after a kill")),
        }
        run.cluster.lock().restart(leader)?;
        let recovery = run.converge(Duration::from_secs(60)).await;
        if recovery.is_none() {
            run.finding(format!("round {round}: member {leader} does not serve after a restart"));
            break;
        }
        let gone = gone.map_or("never".into(), |gone| format!("{:.0} ms", gone * 1e3));
        run.say(&format!("round {round}: killed leader {leader}, first write after {gone}"));
        run.steps.add(crate::run::Step {
            name: format!("kill leader {leader}"),
            from,
            to: run.clock.seconds(),
            recovery,
            note: format!("first write after {gone}"),
            ..Default::default()
        });
    }
    let spread = Spread::of(times);
    let row = |name: &str, value: f64| (name.to_owned(), value * 1e3, "ms".to_owned());
    let measured: Extra = vec![
        ("kills of the leader".into(), spread.count as f64, String::new()),
        row("kill to first accepted write, median", spread.median),
        row("kill to first accepted write, p99", spread.p99),
        row("kill to first accepted write, max", spread.max),
    ];
    run.finish(measured).await
}

/// Kills a member and probes the others until one accepts a write. Seconds from the signal on.
async fn kill_and_wait(run: &Run, leader: usize) -> io::Result<Option<f64>> {
    let members = run.load.members.read().clone();
    let others = members.iter().copied().filter(|member| *member != leader);
    // Dialed before the kill, so that no handshake is measured.
    let mut probes = Vec::new();
    for member in others {
        let client = Client::new(member, PROBE_TIMEOUT);
        client.status().await.ok();
        probes.push((member, client));
    }
    let killed = run.clock.now();
    run.cluster.lock().kill(leader)?;
    let accepted = Arc::new(AtomicBool::new(false));
    let mut tasks = Vec::new();
    let deadline = tokio::time::Instant::now() + GIVE_UP;
    let mut ticks = tokio::time::interval(PROBE_EVERY);
    // In flight at once: no more than fit into the timeout of a probe.
    for (member, client) in probes.iter().cycle() {
        ticks.tick().await;
        if accepted.load(Ordering::Relaxed) || tokio::time::Instant::now() > deadline {
            break;
        }
        let probe = probe(run.load.clone(), client.clone(), *member, accepted.clone());
        tasks.push(tokio::spawn(probe));
    }
    let ends = futures::future::join_all(tasks).await;
    let first = ends.into_iter().flatten().flatten().min();
    Ok(first.map(|end| (end - killed) as f64 / 1e9))
}

/// One write with its own process number; the time of its acknowledgment.
async fn probe(
    load: Arc<Load>,
    client: Client,
    member: usize,
    accepted: Arc<AtomicBool>,
) -> Option<u64> {
    let process = load.process();
    let key = format!("{PREFIX}probe-{}", process % PROBE_KEYS);
    let call = Call::Put { key, value: format!("{process}.0") };
    let op = load.perform(&client, process, member, call).await;
    (op.outcome == Outcome::Ok).then(|| {
        accepted.store(true, Ordering::Relaxed);
        op.end
    })
}
