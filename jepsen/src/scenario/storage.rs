//! Scenarios of disks, crashes and the database.

use std::io;
use std::time::Duration;

use super::{cast, note, recovered, wait};
use crate::client::{Client, PREFIX};
use crate::history::{Call, Outcome};
use crate::nemesis::{Fault, Outcome as Became};
use crate::page::Order;
use crate::rng::Rng;
use crate::run::Run;

/// As many followers are cut off as may be, so that the leader and the other followers are the majority
/// of all writes. Then those others lose power, the leader its life, and those who know nothing must
/// not make a majority with those who have forgotten.
pub(super) async fn forget(run: &Run) -> io::Result<()> {
    for _ in 0..3 {
        let (leader, others) = cast(run).await?;
        let (blind, witnesses) = others.split_at(others.len() / 2);
        // What is older than a few seconds survives a loss of power even without syncs; a store that
        // forgets that it is a member at all takes part in nothing, and shows nothing.
        for witness in witnesses {
            run.cluster.lock().write_back(*witness)?;
        }
        let from = run.clock.seconds();
        for member in blind {
            witnesses.iter().chain([&leader]).for_each(|other| run.fabric.cut(*member, *other));
        }
        wait(2.0).await;
        {
            let mut cluster = run.cluster.lock();
            for witness in witnesses {
                cluster.cut_power(*witness)?;
            }
            cluster.kill(leader)?;
            for witness in witnesses {
                cluster.repower(*witness)?;
            }
        }
        run.fabric.heal();
        // These may go on without the leader, but only with all that was acknowledged.
        wait(4.0).await;
        run.cluster.lock().restart(leader)?;
        let what = "some are blind, the others lose power, the leader dies";
        note(run, what, from, &run.load.members.read().clone());
        recovered(run, "after the loss of power").await?;
        wait(1.0).await;
    }
    Ok(())
}

/// Syncs hang on a majority: nothing that begins afterwards may be acknowledged.
pub(super) async fn hold_majority(run: &Run) -> io::Result<()> {
    for round in 0..3 {
        let (leader, others) = cast(run).await?;
        // With the leader among them, and without.
        let mut held = if round == 1 { Vec::new() } else { vec![leader] };
        let majority = others.len().div_ceil(2) + 1;
        held.extend(others.iter().take(majority - held.len()));
        let from = run.clock.seconds();
        order(run, &held, 1)?;
        // A sync that had begun may end.
        wait(0.2).await;
        let since = run.clock.now();
        wait(3.0).await;
        let until = run.clock.now();
        order(run, &held, 0)?;
        let acknowledged = run.load.ops.with(|ops| {
            let within = ops.iter().filter(|op| op.start >= since && op.end < until);
            within.filter(|op| op.wrote()).count()
        });
        note(run, "syncs of a majority hang", from, &held);
        if acknowledged > 0 {
            run.finding(format!(
                "{acknowledged} writes were acknowledged while {held:?} could not sync"
            ));
        }
        recovered(run, "after the syncs went on").await?;
        wait(1.0).await;
    }
    Ok(())
}

fn order(run: &Run, members: &[usize], value: i64) -> io::Result<()> {
    let cluster = run.cluster.lock();
    for member in members {
        let page = cluster.page(*member).ok_or_else(|| io::Error::other("no page"))?;
        if !page.alive()? {
            return Err(io::Error::other("a member runs without the preloaded library"));
        }
        page.set(Order::HoldSyncs, value)?;
    }
    Ok(())
}

/// The leader loses its disk and comes back under its name: it must be refused, and is replaced.
pub(super) async fn wiped_leader(run: &Run) -> io::Result<()> {
    let (leader, others) = cast(run).await?;
    // What is told to wipe a follower of somebody else wipes the leader.
    inject(run, Fault::WipedMember, others[0], Some(leader), 1.0).await?;
    recovered(run, "after the replacement").await?;
    Ok(())
}

/// The leader's disk is full, for longer than an election takes; then there is room again.
pub(super) async fn full_leader(run: &Run) -> io::Result<()> {
    let (leader, _) = cast(run).await?;
    inject(run, Fault::FullDisk, leader, None, 6.0).await?;
    recovered(run, "after room was made").await?;
    wait(2.0).await;
    Ok(())
}

/// One fault out of the table, held for some seconds. With a victim that is no draw is left open.
async fn inject(
    run: &Run,
    fault: Fault,
    leader: usize,
    victim: Option<usize>,
    seconds: f64,
) -> io::Result<()> {
    let from = run.clock.seconds();
    let members = run.load.members.read().clone();
    // Draws until the follower of the scene is the victim; among a few members that is soon.
    let draws = |draw: &u64| {
        let others: Vec<usize> = members.iter().copied().filter(|one| *one != leader).collect();
        let first = *Rng::fork(*draw, 0).pick(&others);
        victim.is_none_or(|victim| first == victim)
    };
    let draw = (0..1_000).find(draws).ok_or_else(|| io::Error::other("no draw for the victim"))?;
    let mut hurt = fault.install(run, leader, &mut Rng::fork(draw, 0)).await?;
    wait(seconds).await;
    fault.undo(run, &mut hurt).await?;
    note(run, &format!("{}: {}", fault.name(), hurt.note), from, &hurt.members);
    if hurt.outcome != Became::Installed {
        run.gap(format!("{}: {:?}", fault.name(), hurt.outcome));
    }
    Ok(())
}

/// Members are told to stop in order, one after the other, and start again.
pub(super) async fn rolling_restart(run: &Run) -> io::Result<()> {
    // Bound first: the loop's head would hold the lock of the list.
    let members = run.load.members.read().clone();
    for member in members {
        let (from, start) = (run.clock.seconds(), run.clock.now());
        run.cluster.lock().terminate(member)?;
        let ended = run.ended(member, Duration::from_secs(15)).await;
        if ended.is_none() {
            run.finding(format!("member {member} does not end 15 s after SIGTERM"));
        }
        run.cluster.lock().kill(member)?;
        run.cluster.lock().restart(member)?;
        note(run, "a member restarts in order", from, &[member]);
        recovered(run, "after a restart in order").await?;
        if run.writes(start, run.clock.now()) == 0 {
            run.finding(format!("no write was acknowledged while member {member} restarted"));
        }
        wait(1.0).await;
    }
    Ok(())
}

/// Snapshots are taken while all members rewrite their databases.
pub(super) async fn snapshot_defrag(run: &Run) -> io::Result<()> {
    for round in 0..4 {
        let (leader, _) = cast(run).await?;
        let from = run.clock.seconds();
        let (mut one, mut other) = (Rng::fork(round, 0), Rng::fork(round, 1));
        let (snapshot, defrag) = tokio::join!(
            Fault::SnapshotSave.install(run, leader, &mut one),
            Fault::Defrag.install(run, leader, &mut other)
        );
        for hurt in [snapshot?, defrag?] {
            run.say(&hurt.note);
            if hurt.outcome != Became::Installed {
                run.gap(format!("{:?}", hurt.outcome));
            }
        }
        note(run, "a snapshot beside a rewrite", from, &[leader]);
        wait(2.0).await;
    }
    Ok(())
}

/// A write is acknowledged, and at once every process ends or every disk loses power.
pub(super) async fn kill_after_ack(run: &Run) -> io::Result<()> {
    for round in 0..6 {
        let (leader, _) = cast(run).await?;
        let members = run.load.members.read().clone();
        let from = run.clock.seconds();
        let (client, process) = (Client::new(leader, Duration::from_secs(5)), run.load.process());
        let value = format!("{process}.1");
        let call = Call::Put { key: format!("{PREFIX}acknowledged-{round}"), value };
        let op = run.load.perform(&client, process, leader, call).await;
        {
            let mut cluster = run.cluster.lock();
            for member in &members {
                if round % 2 == 0 { cluster.cut_power(*member)? } else { cluster.kill(*member)? }
            }
            for member in &members {
                if round % 2 == 0 { cluster.repower(*member)? } else { cluster.restart(*member)? }
            }
        }
        note(run, "all end right after an answer", from, &members);
        if op.outcome != Outcome::Ok {
            run.gap(format!("the write before the end had no answer: {:?}", op.error));
        }
        recovered(run, "after the end of all").await?;
        wait(0.5).await;
    }
    Ok(())
}

/// Members that keep little log are killed in turn, under load.
pub(super) async fn kills(run: &Run) -> io::Result<()> {
    let mut rng = Rng::fork(run.plan.seed, 31);
    for _ in 0..8 {
        let members = run.load.members.read().clone();
        let (from, member) = (run.clock.seconds(), *rng.pick(&members));
        run.cluster.lock().kill(member)?;
        wait(0.1 + rng.below(2_000) as f64 / 1_000.0).await;
        run.cluster.lock().restart(member)?;
        note(run, "a member with little log is killed", from, &[member]);
        wait(0.5 + rng.below(1_000) as f64 / 1_000.0).await;
    }
    recovered(run, "after the kills").await?;
    Ok(())
}

/// Compactions several times a second, beside deletes.
pub(super) async fn compaction(run: &Run) -> io::Result<()> {
    let from = run.clock.seconds();
    let mut done = 0;
    for round in 0..40 {
        let (leader, _) = cast(run).await?;
        let hurt = Fault::Compact.install(run, leader, &mut Rng::fork(round, 0)).await?;
        done += u32::from(hurt.outcome == Became::Installed);
        wait(0.3).await;
    }
    note(run, &format!("{done} compactions"), from, &[]);
    if done < 20 {
        run.gap(format!("only {done} of 40 compactions were made"));
    }
    Ok(())
}
