//! Scenarios of links and pauses.

use std::io;
use std::time::Duration;

use super::{cast, note, recovered, recovered_within, wait};
use crate::client::{Client, PREFIX};
use crate::cluster::Target;
use crate::fabric::{CONTROLLER, Rule};
use crate::history::{Call, Outcome};
use crate::nemesis::member::{join, remove};
use crate::run::Run;
use crate::wire::long_value;

/// The log that a member lacks is thrown away after this, with little log kept; a busy machine takes
/// longer. Unit: seconds.
const FORGETS: [f64; 3] = [15.0, 30.0, 60.0];

/// Large values, and their length in bytes: more than the 10 MB or so that buffers hold.
const FILL: usize = 120;
const FILL_BYTES: usize = 200_000;

/// A member that was removed hears of it within this once it is reached again.
const LEARNS: Duration = Duration::from_secs(20);

/// TCP asks again only after as long as it has already been silent, two minutes at most. etcd's streams
/// between members wait for that: it was seen to need ninety seconds after a cut of a minute. Only etcd is
/// given that time.
const AFTER_SILENCE: Duration = Duration::from_secs(150);

fn cut_off(run: &Run, member: usize, others: &[usize]) {
    others
        .iter()
        .filter(|other| **other != member)
        .for_each(|other| run.fabric.cut(member, *other));
}

/// Writes so much, through one member, that the buffers on the way to a member that is cut off cannot
/// hold it: else the network would bring it up from them.
async fn fill(run: &Run, through: usize) -> io::Result<()> {
    let client = Client::new(through, Duration::from_secs(5));
    let process = run.load.process();
    for number in 0..FILL {
        let value = long_value(&format!("{process}.{number}"), FILL_BYTES);
        let call = Call::Put { key: format!("{PREFIX}fill/{}", number % 10), value };
        let op = run.load.perform(&client, process, through, call).await;
        if op.outcome != Outcome::Ok {
            return Err(io::Error::other(format!("the others do not write: {:?}", op.error)));
        }
    }
    Ok(())
}

/// A follower is cut off until the others have thrown away what it lacks, so it must be sent the whole
/// state, while its watchers stay connected. Once, or again at once.
pub(super) async fn blackhole(run: &Run, times: usize) -> io::Result<()> {
    let (_, others) = cast(run).await?;
    let (follower, before) = (others[0], run.cluster.lock().transfers());
    for _ in 0..times {
        for forgets in FORGETS {
            if until_sent(run, follower, forgets).await? {
                break;
            }
        }
    }
    match run.plan.target {
        Target::Kelson => recovered(run, "after the transfers").await?,
        Target::Etcd => recovered_within(run, "after the transfers", AFTER_SILENCE).await?,
    }
    let sent = run.cluster.lock().transfers() - before;
    run.say(&format!("{sent} states were sent whole"));
    if sent < times {
        run.gap(format!("{sent} states were sent whole, not {times}"));
    }
    wait(3.0).await;
    Ok(())
}

/// Cuts a follower off for so many seconds; whether it was sent the whole state then.
async fn until_sent(run: &Run, follower: usize, forgets: f64) -> io::Result<bool> {
    let members = run.load.members.read().clone();
    let from = run.clock.seconds();
    let sent = run.cluster.lock().transfers();
    cut_off(run, follower, &members);
    let (leader, _) = cast(run).await?;
    fill(run, leader).await?;
    wait(forgets).await;
    run.fabric.heal();
    note(run, "a follower is cut off from the members", from, &[follower]);
    // On a busy machine a state of some megabytes takes most of a minute; another cut would end it.
    for _ in 0..600 {
        if run.cluster.lock().transfers() > sent {
            return Ok(true);
        }
        wait(0.1).await;
    }
    Ok(false)
}

/// A follower is replaced while nobody reaches it; when the network is whole again it must stay out.
pub(super) async fn replaced_when_cut(run: &Run) -> io::Result<()> {
    let (_, others) = cast(run).await?;
    let (old, members) = (others[0], run.load.members.read().clone());
    let from = run.clock.seconds();
    cut_off(run, old, &members);
    wait(2.0).await;
    if let Err(error) = remove(run, old).await {
        run.finding(format!("member {old} cannot be removed while it is cut off: {error}"));
    }
    let new = run.fresh().ok_or_else(|| io::Error::other("no place for another member"))?;
    if let Err(error) = join(run, new).await? {
        run.finding(format!("member {new} cannot join: {error}"));
    }
    note(run, "a follower is replaced while it is cut off", from, &[old, new]);
    let from = run.clock.seconds();
    run.fabric.heal();
    match run.ended(old, LEARNS).await {
        Some(status) => run.say(&format!("member {old} ended: {status}")),
        None => {
            run.finding(format!("member {old} runs on {LEARNS:?} after it could learn the news"))
        }
    }
    note(run, "the one that was replaced is back", from, &[old]);
    run.cluster.lock().kill(old)?;
    recovered(run, "after the replacement").await?;
    Ok(())
}

/// The leader is cut off from the members and keeps its clients, while a follower is paused: nobody
/// has a majority. Then the follower goes on, and there are two who think that they lead.
pub(super) async fn old_leader(run: &Run) -> io::Result<()> {
    for _ in 0..3 {
        let (leader, others) = cast(run).await?;
        let from = run.clock.seconds();
        cut_off(run, leader, &others);
        run.cluster.lock().pause(others[0])?;
        wait(2.0).await;
        run.cluster.lock().resume(others[0])?;
        wait(3.0).await;
        run.fabric.heal();
        note(
            run,
            "the leader keeps only its clients, a follower sleeps",
            from,
            &[leader, others[0]],
        );
        recovered(run, "after the old leader").await?;
        wait(1.0).await;
    }
    Ok(())
}

/// Leaders are stopped for longer than an election takes, with reads under way, again and again.
pub(super) async fn paused_reads(run: &Run) -> io::Result<()> {
    for round in 0..6 {
        let (leader, _) = cast(run).await?;
        let from = run.clock.seconds();
        run.cluster.lock().pause(leader)?;
        wait(2.2 + 0.15 * f64::from(round)).await;
        run.cluster.lock().resume(leader)?;
        note(run, "the leader sleeps through an election", from, &[leader]);
        recovered(run, "after the pause").await?;
        wait(0.7).await;
    }
    Ok(())
}

/// One member's watcher and clients hang on a thin line; it must get all events once the line is well.
pub(super) async fn slow_watcher(run: &Run) -> io::Result<()> {
    let (leader, others) = cast(run).await?;
    for member in [others[0], leader] {
        let from = run.clock.seconds();
        let thin = Rule { rate: Some(3_000), ..Rule::default() };
        run.fabric.set(member, CONTROLLER, thin);
        wait(8.0).await;
        run.fabric.heal();
        note(run, "3 kB/s from a member to its clients", from, &[member]);
        recovered(run, "after the thin line").await?;
        wait(2.0).await;
    }
    Ok(())
}

/// Each follower in turn hears of everything late, so that watches for what the others have already
/// told lie in its future.
pub(super) async fn future_watch(run: &Run) -> io::Result<()> {
    let (_, followers) = cast(run).await?;
    for follower in followers {
        let (leader, others) = cast(run).await?;
        let from = run.clock.seconds();
        let late = Rule { delay: Duration::from_millis(400), ..Rule::default() };
        for other in others.iter().copied().chain([leader]).filter(|other| *other != follower) {
            run.fabric.set(other, follower, late);
        }
        wait(6.0).await;
        run.fabric.heal();
        note(run, "a member hears everything 400 ms late", from, &[follower]);
        recovered(run, "after the delay").await?;
        wait(1.0).await;
    }
    Ok(())
}

/// Progress is asked for and told by time while events pile up behind a thin line, and while members
/// stand still and then tell all that they missed.
pub(super) async fn progress_race(run: &Run) -> io::Result<()> {
    for _ in 0..3 {
        let (leader, others) = cast(run).await?;
        let from = run.clock.seconds();
        let thin = Rule { rate: Some(60_000), ..Rule::default() };
        run.fabric.set(others[0], CONTROLLER, thin);
        wait(3.0).await;
        run.fabric.heal();
        note(run, "60 kB/s from a follower to its clients", from, &[others[0]]);
        let from = run.clock.seconds();
        run.cluster.lock().pause(leader)?;
        wait(2.0).await;
        run.cluster.lock().resume(leader)?;
        note(run, "the leader stands still", from, &[leader]);
        recovered(run, "after the pause").await?;
        wait(0.7).await;
    }
    Ok(())
}
