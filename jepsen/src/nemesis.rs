//! What can be done to a cluster, and how each thing is undone. Faults know nothing of time or
//! judgment: the commands say when, the report says what came of it.

use std::io;
use std::time::Duration;

use crate::fabric::{CONTROLLER, Rule};
use crate::rng::Rng;
use crate::run::Run;

/// What is done to the cluster; the leader is the one at the time of the fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
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
    /// The leader does not run, for as long as the fault is held.
    PauseLeader,
    /// Clients do not reach the leader; members do.
    LeaderWithoutClients,
    /// One follower hears and reaches nobody.
    IsolateFollower,
    /// Up to 200 ms of delay drawn per packet, so packets overtake each other, and 5 % come twice.
    Disorder,
    /// 20 kB/s on every link of one follower.
    ThinFollower,
    /// SIGKILL and a restart when the fault ends.
    KillLeader,
    KillFollower,
    KillAll,
    PauseFollower,
    PauseAll,
}

impl Fault {
    /// The faults of `jepsen smoke`, in its order.
    pub(crate) const SMOKE: [Self; 10] = [
        Self::IsolateLeader,
        Self::DeafLeader,
        Self::MuteLeader,
        Self::Ring,
        Self::LeaderInMinority,
        Self::FollowersInMinority,
        Self::AllApart,
        Self::Loss,
        Self::Delay,
        Self::PauseLeader,
    ];

    /// Everything there is.
    pub(crate) const ALL: [Self; 19] = [
        Self::IsolateLeader,
        Self::DeafLeader,
        Self::MuteLeader,
        Self::Ring,
        Self::LeaderInMinority,
        Self::FollowersInMinority,
        Self::AllApart,
        Self::Loss,
        Self::Delay,
        Self::PauseLeader,
        Self::LeaderWithoutClients,
        Self::IsolateFollower,
        Self::Disorder,
        Self::ThinFollower,
        Self::KillLeader,
        Self::KillFollower,
        Self::KillAll,
        Self::PauseFollower,
        Self::PauseAll,
    ];

    pub(crate) fn name(self) -> &'static str {
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
            Self::PauseLeader => "pause-leader",
            Self::LeaderWithoutClients => "leader-without-clients",
            Self::IsolateFollower => "isolate-follower",
            Self::Disorder => "disorder",
            Self::ThinFollower => "thin-follower",
            Self::KillLeader => "kill-leader",
            Self::KillFollower => "kill-follower",
            Self::KillAll => "kill-all",
            Self::PauseFollower => "pause-follower",
            Self::PauseAll => "pause-all",
        }
    }

    /// Picks faults by name; all of `from` if no name is given.
    pub(crate) fn named(names: &[String], from: &[Self]) -> Result<Vec<Self>, String> {
        let known = |name: &String| from.iter().any(|fault| fault.name() == name);
        if let Some(stray) = names.iter().find(|name| !known(name)) {
            let all: Vec<_> = from.iter().map(|fault| fault.name()).collect();
            return Err(format!("--only {stray}: there are {}", all.join(", ")));
        }
        let chosen = |fault: &Self| names.is_empty() || names.iter().any(|n| n == fault.name());
        Ok(from.iter().copied().filter(chosen).collect())
    }

    /// True where the network itself must be seen dropping packets.
    pub(crate) fn cuts(self) -> bool {
        self.hurts_network() && !matches!(self, Self::Delay | Self::Disorder | Self::ThinFollower)
    }

    pub(crate) fn hurts_network(self) -> bool {
        !matches!(
            self,
            Self::PauseLeader
                | Self::PauseFollower
                | Self::PauseAll
                | Self::KillLeader
                | Self::KillFollower
                | Self::KillAll
        )
    }

    /// True if some majority stays connected and runs.
    pub(crate) fn leaves_majority(self) -> bool {
        !matches!(self, Self::AllApart | Self::KillAll | Self::PauseAll)
    }

    /// Does it, and gives the members whose processes it touched.
    pub(crate) fn install(self, run: &Run, leader: usize, rng: &mut Rng) -> io::Result<Vec<usize>> {
        let members = run.load.members.read().clone();
        let others: Vec<usize> =
            members.iter().copied().filter(|member| *member != leader).collect();
        let follower = *rng.pick(&others);
        let dead = Rule { cut: true, ..Rule::default() };
        let fabric = &run.fabric;
        match self {
            Self::IsolateLeader => others.iter().for_each(|other| fabric.cut(leader, *other)),
            Self::DeafLeader => others.iter().for_each(|other| fabric.set(*other, leader, dead)),
            Self::MuteLeader => others.iter().for_each(|other| fabric.set(leader, *other, dead)),
            Self::Ring if members.len() == 3 => fabric.cut(leader, follower),
            Self::Ring => {
                let count = members.len();
                let apart = |(a, b): &(usize, usize)| b - a != 1 && b - a != count - 1;
                pairs(count).filter(apart).for_each(|(a, b)| fabric.cut(members[a], members[b]));
            }
            Self::LeaderInMinority => {
                let with = (members.len() - 1) / 2 - 1;
                let minority: Vec<usize> = [&[leader], &others[..with]].concat();
                split(run, &members, &minority);
            }
            Self::FollowersInMinority => {
                split(run, &members, &others[..(members.len() - 1) / 2]);
            }
            Self::AllApart => {
                pairs(members.len()).for_each(|(a, b)| fabric.cut(members[a], members[b]));
            }
            Self::Loss => everywhere(run, Rule { loss: 0.1, ..Rule::default() }),
            Self::Delay => everywhere(run, delayed(50, 10, 0.0)),
            Self::Disorder => everywhere(run, delayed(0, 200, 0.05)),
            Self::LeaderWithoutClients => fabric.cut(CONTROLLER, leader),
            Self::IsolateFollower => split(run, &members, &[follower]),
            Self::ThinFollower => {
                let thin = Rule { rate: Some(20_000), ..Rule::default() };
                for other in members.iter().filter(|member| **member != follower) {
                    fabric.set(*other, follower, thin);
                    fabric.set(follower, *other, thin);
                }
            }
            Self::PauseLeader => return pause(run, &[leader]),
            Self::PauseFollower => return pause(run, &[follower]),
            Self::PauseAll => return pause(run, &members),
            Self::KillLeader => return kill(run, &[leader]),
            Self::KillFollower => return kill(run, &[follower]),
            Self::KillAll => return kill(run, &members),
        }
        Ok(Vec::new())
    }

    /// Undoes it for the processes; rules of the network all go with `Fabric::heal`.
    pub(crate) fn undo(self, run: &Run, victims: &[usize]) -> io::Result<()> {
        let mut cluster = run.cluster.lock();
        for victim in victims {
            match self {
                Self::KillLeader | Self::KillFollower | Self::KillAll => {
                    cluster.restart(*victim)?
                }
                _ => cluster.resume(*victim)?,
            }
        }
        Ok(())
    }
}

fn delayed(delay: u64, jitter: u64, duplicate: f64) -> Rule {
    let (delay, jitter) = (Duration::from_millis(delay), Duration::from_millis(jitter));
    Rule { delay, jitter, duplicate, ..Rule::default() }
}

fn pause(run: &Run, members: &[usize]) -> io::Result<Vec<usize>> {
    let mut cluster = run.cluster.lock();
    members.iter().try_for_each(|member| cluster.pause(*member))?;
    Ok(members.to_vec())
}

fn kill(run: &Run, members: &[usize]) -> io::Result<Vec<usize>> {
    let mut cluster = run.cluster.lock();
    members.iter().try_for_each(|member| cluster.kill(*member))?;
    Ok(members.to_vec())
}

/// Cuts every link between some members and the rest.
fn split(run: &Run, members: &[usize], side: &[usize]) {
    for member in members.iter().filter(|member| !side.contains(member)) {
        side.iter().for_each(|away| run.fabric.cut(*member, *away));
    }
}

/// One rule on every link, those of the clients too.
fn everywhere(run: &Run, rule: Rule) {
    let mut places = vec![CONTROLLER];
    places.extend(run.load.members.read().iter());
    for from in &places {
        places.iter().filter(|to| *to != from).for_each(|to| run.fabric.set(*from, *to, rule));
    }
}

fn pairs(count: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..count).flat_map(move |a| (a + 1..count).map(move |b| (a, b)))
}
