//! Faults of disks: power that is cut, syncs that are slow, hang or fail, no room, and directories that
//! are lost or old. Power and room need a file system of the member's own, syncs the preloaded library.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use rustix::fs::{FallocateFlags, fallocate, statvfs};
use rustix::io::Errno;

use super::member::exchange;
use super::{Fault, Hurt, Scene, admin, dismiss, order};
use crate::cluster::Target;
use crate::page::{Count, Order};
use crate::run::Run;

/// What a slow sync takes longer. Unit: microseconds.
const SLOW_US: i64 = 100_000;
/// The file that takes all room.
const FILLER: &str = "filler";
/// A member that must end by itself does so within this.
const ENDS: Duration = Duration::from_secs(20);
/// What a member may acknowledge after the cut would be a lie; it gets the time to tell it.
const LIE: Duration = Duration::from_millis(50);

pub(super) async fn install(fault: Fault, run: &Run, scene: &Scene) -> io::Result<Hurt> {
    let Scene { leader, members, follower, .. } = scene;
    let sync = |what, value| order(run, &[*leader], what, value, Count::SyncsHurt);
    match fault {
        Fault::PowerOne => {
            cut(run, &[if scene.draw.is_multiple_of(2) { *leader } else { *follower }]).await
        }
        Fault::PowerMajority => cut(run, &scene.majority()).await,
        Fault::PowerAll => cut(run, members).await,
        Fault::SlowSyncs => sync(Order::DelaySyncs, SLOW_US),
        Fault::HeldSyncs => sync(Order::HoldSyncs, 1),
        Fault::FailedSync => {
            run.cluster.lock().excuse(*leader);
            sync(Order::FailSyncs, i64::from(Errno::IO.raw_os_error()))
        }
        Fault::FullDisk => fill(run, *leader),
        Fault::NoSpace => {
            run.cluster.lock().excuse(*follower);
            let number = i64::from(Errno::NOSPC.raw_os_error());
            order(run, &[*follower], Order::FailWrites, number, Count::WritesFailed)
        }
        Fault::WipedMember => wipe(run, *follower),
        Fault::StaleCopy => copy(run, *follower),
        other => unreachable!("{} is no fault of disks", other.name()),
    }
}

pub(super) async fn undo(fault: Fault, run: &Run, hurt: &mut Hurt) -> io::Result<()> {
    match fault {
        Fault::PowerOne | Fault::PowerMajority | Fault::PowerAll => {
            let mut cluster = run.cluster.lock();
            hurt.members.iter().try_for_each(|member| cluster.repower(*member))
        }
        Fault::SlowSyncs | Fault::HeldSyncs => dismiss(run, hurt, Count::SyncsHurt),
        Fault::FailedSync => failed(run, hurt, Count::SyncsHurt, true).await,
        Fault::NoSpace => failed(run, hurt, Count::WritesFailed, false).await,
        Fault::FullDisk => free(run, hurt).await,
        Fault::WipedMember => refused(run, hurt).await,
        Fault::StaleCopy => stale(run, hurt).await,
        other => unreachable!("{} is no fault of disks", other.name()),
    }
}

async fn cut(run: &Run, members: &[usize]) -> io::Result<Hurt> {
    {
        let mut cluster = run.cluster.lock();
        members.iter().try_for_each(|member| cluster.cut_power(*member))?;
    }
    tokio::time::sleep(LIE).await;
    let mut cluster = run.cluster.lock();
    members.iter().try_for_each(|member| cluster.kill(*member))?;
    Ok(Hurt::noted(members, format!("members {members:?}")))
}

/// After calls that failed: who must have ended did so, who may have is started again.
async fn failed(run: &Run, hurt: &mut Hurt, count: Count, must_end: bool) -> io::Result<()> {
    let member = hurt.members[0];
    let ended =
        if must_end { run.ended(member, ENDS).await } else { run.cluster.lock().ended(member) };
    dismiss(run, hurt, count)?;
    match ended {
        Some(status) => {
            hurt.add(&format!("member {member} ended itself: {status}"));
            let mut cluster = run.cluster.lock();
            cluster.kill(member)?;
            cluster.restart(member)?;
        }
        None if must_end => run.finding(format!("a sync of member {member} failed and it ran on")),
        None => hurt.add(&format!("member {member} ran on")),
    }
    Ok(())
}

/// Takes all room of a member's file system.
fn fill(run: &Run, member: usize) -> io::Result<Hurt> {
    let mut cluster = run.cluster.lock();
    cluster.excuse(member);
    let root = root(&cluster.data(member));
    let file = File::create(root.join(FILLER))?;
    let mut length = 0;
    let stat = statvfs(&root)?;
    let mut step = stat.f_bavail * stat.f_frsize;
    // Ever smaller pieces, since the file system needs some of the room itself.
    while step >= stat.f_frsize {
        match fallocate(&file, FallocateFlags::empty(), length, step) {
            Ok(()) => length += step,
            Err(Errno::NOSPC) => step /= 2,
            Err(error) => return Err(error.into()),
        }
    }
    let left = statvfs(&root)?.f_bavail;
    let note = format!("member {member}, {} MiB taken, {left} blocks left", length >> 20);
    Ok(Hurt::noted(&[member], note))
}

fn root(data: &Path) -> PathBuf {
    data.parent().map_or_else(|| data.to_owned(), Path::to_owned)
}

/// Gives the room back and takes back what members declared because of it.
async fn free(run: &Run, hurt: &mut Hurt) -> io::Result<()> {
    let member = hurt.members[0];
    {
        let mut cluster = run.cluster.lock();
        std::fs::remove_file(root(&cluster.data(member)).join(FILLER))?;
        if let Some(status) = cluster.ended(member) {
            hurt.add(&format!("member {member} ended: {status}"));
            cluster.kill(member)?;
            cluster.restart(member)?;
        }
    }
    match admin::disarm(run).await {
        Ok(0) => hurt.add("no alarm"),
        Ok(count) => hurt.add(&format!("{count} alarms disarmed")),
        Err(status) => run.finding(format!("alarms cannot be disarmed: {status}")),
    }
    Ok(())
}

/// A follower comes back with an empty directory, under its name and with its flags.
fn wipe(run: &Run, member: usize) -> io::Result<Hurt> {
    let mut cluster = run.cluster.lock();
    cluster.kill(member)?;
    cluster.wipe(member)?;
    cluster.restart(member)?;
    cluster.excuse(member);
    Ok(Hurt::new(&[member]))
}

async fn refused(run: &Run, hurt: &mut Hurt) -> io::Result<()> {
    let member = hurt.members[0];
    match run.ended(member, ENDS).await {
        Some(status) => hurt.add(&format!("member {member} was refused: {status}")),
        None => {
            run.finding(format!("member {member} came back empty and was not refused"));
        }
    }
    exchange(run, hurt, member).await
}

/// Keeps a copy of a follower's directory, taken while it does not run.
fn copy(run: &Run, member: usize) -> io::Result<Hurt> {
    let mut cluster = run.cluster.lock();
    cluster.kill(member)?;
    let data = cluster.data(member);
    let mut copy = Command::new("cp");
    let status = copy.args(["-a", "--sparse=always"]).arg(&data).arg(old(&data)).status()?;
    if !status.success() {
        return Err(io::Error::other(format!("copying {}: {status}", data.display())));
    }
    cluster.restart(member)?;
    Ok(Hurt::new(&[member]))
}

fn old(data: &Path) -> PathBuf {
    data.with_file_name("older")
}

/// Puts the older copy in place of the directory, which must be noticed.
async fn stale(run: &Run, hurt: &mut Hurt) -> io::Result<()> {
    let member = hurt.members[0];
    // What it acknowledges after the copy is what it will have forgotten.
    if run.serves(member, Duration::from_secs(30)).await.is_none() {
        run.finding(format!("member {member} does not serve 30 s after a restart"));
    }
    tokio::time::sleep(Duration::from_secs(1)).await;
    let leader = run.monitor.settled(Duration::from_secs(30)).await;
    if leader == Some(member) {
        hurt.doubt(format!("member {member} leads by now: nobody can know what it acknowledged"));
    }
    {
        let mut cluster = run.cluster.lock();
        cluster.kill(member)?;
        let data = cluster.data(member);
        std::fs::remove_dir_all(&data)?;
        std::fs::rename(old(&data), &data)?;
        cluster.restart(member)?;
        cluster.excuse(member);
    }
    match run.ended(member, ENDS).await {
        Some(status) => hurt.add(&format!("member {member} ended with its older copy: {status}")),
        // The leader that knew what the member had acknowledged may be gone.
        None if run.monitor.leader() != leader => hurt.doubt("the leader changed meanwhile"),
        None if run.plan.target == Target::Etcd => {
            hurt.add("it runs on with the older copy, which etcd does not notice");
            return Ok(());
        }
        None => run.finding(format!("member {member} runs on with an older copy of its directory")),
    }
    exchange(run, hurt, member).await
}
