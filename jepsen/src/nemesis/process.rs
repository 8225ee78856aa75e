//! Faults of processes: ended, stopped, or short of processor time. Killed members start again when
//! the fault ends.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::process::{Signal, kill_process};

use super::{Fault, Hurt, Repeat, Scene};
use crate::run::Run;

/// How long a strobed process runs and stands still.
const STROBE: Duration = Duration::from_millis(150);

/// Where control groups for processors are, in the first version of that interface.
const GROUPS: &str = "/sys/fs/cgroup/cpu";
/// A twentieth of one processor. Unit: microseconds of each period of 100 ms.
const QUOTA_US: &str = "5000";

pub(super) fn install(fault: Fault, run: &Run, scene: &Scene) -> io::Result<Hurt> {
    let Scene { leader, members, follower, .. } = scene;
    match fault {
        Fault::PauseLeader => pause(run, &[*leader]),
        Fault::PauseFollower => pause(run, &[*follower]),
        Fault::PauseAll => pause(run, members),
        Fault::KillLeader => kill(run, &[*leader]),
        Fault::KillFollower => kill(run, &[*follower]),
        Fault::KillAll => kill(run, members),
        Fault::StrobeLeader => strobe(run, *leader),
        Fault::StarveLeader => starve(run, *leader),
        other => unreachable!("{} is no fault of processes", other.name()),
    }
}

pub(super) fn undo(fault: Fault, run: &Run, hurt: &mut Hurt) -> io::Result<()> {
    // Removed once dropped.
    hurt.groups.clear();
    let mut cluster = run.cluster.lock();
    for victim in &hurt.members {
        match fault {
            Fault::KillLeader | Fault::KillFollower | Fault::KillAll => cluster.restart(*victim)?,
            Fault::StarveLeader => {}
            _ => cluster.resume(*victim)?,
        }
    }
    Ok(())
}

fn pause(run: &Run, members: &[usize]) -> io::Result<Hurt> {
    let mut cluster = run.cluster.lock();
    members.iter().try_for_each(|member| cluster.pause(*member))?;
    Ok(Hurt::new(members))
}

fn kill(run: &Run, members: &[usize]) -> io::Result<Hurt> {
    let mut cluster = run.cluster.lock();
    members.iter().try_for_each(|member| cluster.kill(*member))?;
    Ok(Hurt::new(members))
}

fn strobe(run: &Run, member: usize) -> io::Result<Hurt> {
    let Some(pid) = run.cluster.lock().pid(member) else {
        return Ok(Hurt::skipped(format!("member {member} does not run")));
    };
    let turn = move |on: bool| {
        // A process that is gone shows as a death in the verdict.
        kill_process(pid, if on { Signal::STOP } else { Signal::CONT }).ok();
    };
    Ok(Hurt { repeat: Some(Repeat::start(STROBE, turn)), ..Hurt::new(&[member]) })
}

/// A control group that holds one process; removed when dropped.
#[derive(Debug)]
pub(super) struct Group(PathBuf);

impl Drop for Group {
    fn drop(&mut self) {
        // A group can be removed once it is empty: its processes go back to the root.
        let members = std::fs::read_to_string(self.0.join("cgroup.procs")).unwrap_or_default();
        for pid in members.lines() {
            std::fs::write(Path::new(GROUPS).join("cgroup.procs"), pid).ok();
        }
        std::fs::remove_dir(&self.0).ok();
    }
}

fn starve(run: &Run, member: usize) -> io::Result<Hurt> {
    let Some(pid) = run.cluster.lock().pid(member) else {
        return Ok(Hurt::skipped(format!("member {member} does not run")));
    };
    if !Path::new(GROUPS).join("cgroup.procs").exists() {
        return Ok(Hurt::skipped(format!("no control groups at {GROUPS}")));
    }
    let path = Path::new(GROUPS).join(format!("jepsen-{}-m{member}", std::process::id()));
    std::fs::create_dir_all(&path)?;
    let group = Group(path);
    std::fs::write(group.0.join("cpu.cfs_quota_us"), QUOTA_US)?;
    std::fs::write(group.0.join("cgroup.procs"), pid.as_raw_nonzero().to_string())?;
    let note = format!("{QUOTA_US} of 100000 microseconds by a control group");
    Ok(Hurt { groups: vec![group], ..Hurt::noted(&[member], note) })
}
