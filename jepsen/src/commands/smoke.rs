//! `jepsen smoke`: each kind of network fault and a long pause of the leader, one after the other
//! under load, with healing in between. It looks for stale answers and lost writes in the history,
//! and for leaders that change again and again after the network is whole.

use std::io;
use std::time::Duration;

use crate::args::Args;
use crate::fabric::Rule;
use crate::report::Extra;
use crate::run::{Plan, Run, Spread, Step, Verdict, inside};
use crate::workload::Shape;

/// How long the leadership is observed after each fault.
const CALM: Duration = Duration::from_secs(10);
/// Leaders that may come in that time: healing itself may cost one election, not two.
const CHANGES: usize = 1;
/// A pause far beyond every timer of a member.
const PAUSE: Duration = Duration::from_secs(30);

/// What is done to the cluster; the leader is the one at the time of the fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    /// The leader hears and reaches no member; clients still reach it.
    IsolateLeader,
    /// The leader reaches the others but hears nothing.
    DeafLeader,
    /// The leader hears the others but reaches nobody.
    MuteLeader,
    /// Each member reaches only its two neighbors, so all have a majority, but different ones. Of
    /// three members one pair is cut, which leaves a chain with the leader at one end.
    Ring,
    /// The leader is in the minority (with one follower where there are five).
    LeaderInMinority,
    /// The leader keeps a majority; the others are cut off and come back.
    FollowersInMinority,
    /// Nobody reaches anybody.
    AllApart,
    /// One packet of ten is lost, on every link.
    Loss,
    /// Every packet takes 50 ms longer, up to 10 ms more.
    Delay,
    /// SIGSTOP for half a minute.
    PauseLeader,
}

const ALL: [Fault; 10] = [
    Fault::IsolateLeader,
    Fault::DeafLeader,
    Fault::MuteLeader,
    Fault::Ring,
    Fault::LeaderInMinority,
    Fault::FollowersInMinority,
    Fault::AllApart,
    Fault::Loss,
    Fault::Delay,
    Fault::PauseLeader,
];

impl Fault {
    fn name(self) -> &'static str {
        match self {
            Self::IsolateLeader => "isolate-leader",
            Self::DeafLeader => "deaf-leader",
            Self::MuteLeader => "mute-leader",
            Self::Ring => "ring",
            Self::LeaderInMinority => "leader-in-minority",
            Self::FollowersInMinority => "followers-in-minority",
            Self::AllApart => "all-apart",
            Self::Loss => "loss-10-percent",
            Self::Delay => "delay-50-ms",
            Self::PauseLeader => "pause-leader-30-s",
        }
    }

    /// True where the network itself must be seen dropping packets.
    fn cuts(self) -> bool {
        !matches!(self, Self::Delay | Self::PauseLeader)
    }
}

pub(crate) fn run(mut args: Args) -> Result<bool, String> {
    let plan = Plan::from_args("smoke", &mut args)?;
    let seconds = args.number("seconds", 10)?;
    let rate = args.number("rate", 300)?;
    let only = args.many("only");
    args.done()?;
    if plan.members < 3 {
        return Err("partitions need 3 members".into());
    }
    if let Some(stray) = only.iter().find(|name| ALL.iter().all(|fault| fault.name() != **name)) {
        let names = ALL.map(Fault::name).join(", ");
        return Err(format!("--only {stray}: there are {names}"));
    }
    let chosen: Vec<Fault> = ALL
        .into_iter()
        .filter(|fault| only.is_empty() || only.iter().any(|name| name == fault.name()))
        .collect();
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
    install(run, fault, leader)?;
    tokio::time::sleep(if fault == Fault::PauseLeader { PAUSE } else { hold }).await;
    let dropped = run.fabric.counts().1 - dropped;
    if fault == Fault::PauseLeader {
        run.cluster.lock().resume(leader)?;
    }
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
    // In all other faults some majority stays connected, so somebody must get writes through.
    if *writes == 0 && fault != Fault::AllApart {
        run.finding(format!("{name}: not one write was acknowledged while a majority was whole"));
    }
}

fn install(run: &Run, fault: Fault, leader: usize) -> io::Result<()> {
    let members = run.load.members.read().clone();
    let others: Vec<usize> = members.iter().copied().filter(|member| *member != leader).collect();
    let dead = Rule { cut: true, ..Rule::default() };
    let fabric = &run.fabric;
    match fault {
        Fault::IsolateLeader => others.iter().for_each(|other| fabric.cut(leader, *other)),
        Fault::DeafLeader => others.iter().for_each(|other| fabric.set(*other, leader, dead)),
        Fault::MuteLeader => others.iter().for_each(|other| fabric.set(leader, *other, dead)),
        Fault::Ring if members.len() == 3 => fabric.cut(leader, others[0]),
        Fault::Ring => {
            let count = members.len();
            pairs(count).filter(|(a, b)| b - a != 1 && b - a != count - 1).for_each(|(a, b)| {
                fabric.cut(members[a], members[b]);
            });
        }
        Fault::LeaderInMinority => {
            let with = (members.len() - 1) / 2 - 1;
            split(run, &others[with..], |member| {
                member == leader || others[..with].contains(&member)
            });
        }
        Fault::FollowersInMinority => {
            let minority = &others[..(members.len() - 1) / 2];
            split(run, minority, |member| !minority.contains(&member));
        }
        Fault::AllApart => {
            pairs(members.len()).for_each(|(a, b)| fabric.cut(members[a], members[b]));
        }
        Fault::Loss => everywhere(run, Rule { loss: 0.1, ..Rule::default() }),
        Fault::Delay => everywhere(
            run,
            Rule {
                delay: Duration::from_millis(50),
                jitter: Duration::from_millis(10),
                ..Rule::default()
            },
        ),
        Fault::PauseLeader => run.cluster.lock().pause(leader)?,
    }
    Ok(())
}

/// Cuts every link between one side and the members that `other` picks.
fn split(run: &Run, side: &[usize], other: impl Fn(usize) -> bool) {
    for member in run.load.members.read().iter().filter(|member| other(**member)) {
        side.iter().for_each(|away| run.fabric.cut(*member, *away));
    }
}

/// One rule on every link, those of the clients too.
fn everywhere(run: &Run, rule: Rule) {
    let mut places = vec![crate::fabric::CONTROLLER];
    places.extend(run.load.members.read().iter());
    for from in &places {
        places.iter().filter(|to| *to != from).for_each(|to| run.fabric.set(*from, *to, rule));
    }
}

fn pairs(count: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..count).flat_map(move |a| (a + 1..count).map(move |b| (a, b)))
}
