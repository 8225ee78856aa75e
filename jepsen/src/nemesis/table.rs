//! The faults by name: what there is, in which class, and what it needs. What they do is in the files
//! of their classes.

use super::Class;

/// What is done to the cluster; the leader is the one at the time of the fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
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
    /// Two halves that only one follower reaches both of.
    Bridge,
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
    /// Clients do not reach the leader; members do.
    LeaderWithoutClients,
    /// Clients reach only the leader; members reach each other.
    ClientsOnlyLeader,
    /// Clients hear no answers from anybody; their requests arrive.
    AnswersLost,
    /// One follower hears and reaches nobody.
    IsolateFollower,
    /// Up to 200 ms of delay drawn per packet, so packets overtake each other, and 5 % come twice.
    Disorder,
    /// 20 kB/s on every link of one follower.
    ThinFollower,
    /// The leader is cut off and back every 700 ms.
    Flap,
    /// SIGKILL and a restart when the fault ends.
    KillLeader,
    KillFollower,
    KillAll,
    /// The leader does not run, for as long as the fault is held.
    PauseLeader,
    PauseFollower,
    PauseAll,
    /// The leader is stopped and goes on every 150 ms.
    StrobeLeader,
    /// The leader gets a twentieth of a processor.
    StarveLeader,
    /// A disk loses power, and the process with it: what was not synced is gone.
    PowerOne,
    /// The leader and so many others that they are a majority.
    PowerMajority,
    PowerAll,
    /// Syncs of the leader take 100 ms longer.
    SlowSyncs,
    /// Syncs of the leader do not return.
    HeldSyncs,
    /// A sync of the leader fails: it must end itself.
    FailedSync,
    /// The leader's file system is full to the last block.
    FullDisk,
    /// Writes of a follower say that there is no space.
    NoSpace,
    /// A follower's directory is emptied: it must be refused, and is then replaced.
    WipedMember,
    /// A follower comes back with an older copy of its directory: that must be noticed, and it is
    /// replaced.
    StaleCopy,
    /// A stopped follower's files are damaged: one bit in the log.
    FlipLog,
    /// One bit in each of many pages of the state.
    FlipState,
    /// The end of the newest log file is missing.
    TruncatedTail,
    /// A page of zeros in the middle of the log.
    ZeroedPage,
    /// A log file is missing.
    MissingFile,
    /// The leader's wall clock is an hour behind.
    ClockBack,
    /// The leader's wall clock is an hour ahead.
    ClockForward,
    /// The wall clocks of all members go an hour back and forth every 200 ms.
    ClockStrobe,
    /// A member more, for as long as the fault is held.
    Grow,
    /// A member less; another one takes its place.
    Shrink,
    /// The leader is replaced by a fresh member.
    Replace,
    /// Older revisions are dropped, as far as all watchers have read.
    Compact,
    /// Every member rewrites its database, one after the other.
    Defrag,
    /// A snapshot of the leader's database is taken whole and its digest compared.
    SnapshotSave,
}

use Class::{Admin, Clock, Corruption, Disk, Member, Network, Process};
use Fault as F;

const TABLE: [(Fault, &str, Class); 49] = [
    (F::IsolateLeader, "isolate-leader", Network),
    (F::DeafLeader, "deaf-leader", Network),
    (F::MuteLeader, "mute-leader", Network),
    (F::Ring, "ring", Network),
    (F::Bridge, "bridge", Network),
    (F::LeaderInMinority, "leader-in-minority", Network),
    (F::FollowersInMinority, "followers-in-minority", Network),
    (F::AllApart, "all-apart", Network),
    (F::Loss, "loss-10-percent", Network),
    (F::Delay, "delay-50-ms", Network),
    (F::LeaderWithoutClients, "leader-without-clients", Network),
    (F::ClientsOnlyLeader, "clients-only-leader", Network),
    (F::AnswersLost, "answers-lost", Network),
    (F::IsolateFollower, "isolate-follower", Network),
    (F::Disorder, "disorder", Network),
    (F::ThinFollower, "thin-follower", Network),
    (F::Flap, "flap", Network),
    (F::KillLeader, "kill-leader", Process),
    (F::KillFollower, "kill-follower", Process),
    (F::KillAll, "kill-all", Process),
    (F::PauseLeader, "pause-leader", Process),
    (F::PauseFollower, "pause-follower", Process),
    (F::PauseAll, "pause-all", Process),
    (F::StrobeLeader, "strobe-leader", Process),
    (F::StarveLeader, "starve-leader", Process),
    (F::PowerOne, "power-one", Disk),
    (F::PowerMajority, "power-majority", Disk),
    (F::PowerAll, "power-all", Disk),
    (F::SlowSyncs, "fsync-slow", Disk),
    (F::HeldSyncs, "fsync-hold", Disk),
    (F::FailedSync, "fsync-eio", Disk),
    (F::FullDisk, "disk-full", Disk),
    (F::NoSpace, "write-enospc", Disk),
    (F::WipedMember, "wiped-member", Disk),
    (F::StaleCopy, "stale-copy", Disk),
    (F::FlipLog, "flip-log", Corruption),
    (F::FlipState, "flip-state", Corruption),
    (F::TruncatedTail, "truncated-tail", Corruption),
    (F::ZeroedPage, "zeroed-page", Corruption),
    (F::MissingFile, "missing-file", Corruption),
    (F::ClockBack, "clock-back", Clock),
    (F::ClockForward, "clock-forward", Clock),
    (F::ClockStrobe, "clock-strobe", Clock),
    (F::Grow, "grow", Member),
    (F::Shrink, "shrink", Member),
    (F::Replace, "replace", Member),
    (F::Compact, "compact", Admin),
    (F::Defrag, "defrag", Admin),
    (F::SnapshotSave, "snapshot-save", Admin),
];

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

    /// The faults of `jepsen storm`: those that are done and undone within moments.
    pub(crate) const STORM: [Self; 19] = [
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

    /// Everything there is.
    pub(crate) fn all() -> impl Iterator<Item = Self> {
        TABLE.iter().map(|(fault, ..)| *fault)
    }

    pub(crate) fn of(class: Class) -> Vec<Self> {
        Self::all().filter(|fault| fault.class() == class).collect()
    }

    fn row(self) -> &'static (Self, &'static str, Class) {
        TABLE.iter().find(|(fault, ..)| *fault == self).expect("every fault is in the table")
    }

    pub(crate) fn name(self) -> &'static str {
        self.row().1
    }

    pub(crate) fn class(self) -> Class {
        self.row().2
    }

    /// Picks faults by name; all of `from` if no name is given.
    pub(crate) fn named(names: &[String], from: &[Self]) -> Result<Vec<Self>, String> {
        let known = |name: &String| from.iter().any(|fault| fault.name() == name);
        if let Some(stray) = names.iter().find(|name| !known(name)) {
            let all: Vec<_> = from.iter().map(|fault| fault.name()).collect();
            return Err(format!("no fault {stray}: there are {}", all.join(", ")));
        }
        let chosen = |fault: &Self| names.is_empty() || names.iter().any(|n| n == fault.name());
        Ok(from.iter().copied().filter(chosen).collect())
    }

    /// True where the network itself must be seen dropping packets.
    pub(crate) fn cuts(self) -> bool {
        self.class() == Network && !matches!(self, F::Delay | F::Disorder | F::ThinFollower)
    }

    /// True if some majority stays connected and runs, and clients reach it.
    pub(crate) fn leaves_majority(self) -> bool {
        !matches!(
            self,
            F::AllApart
                | F::KillAll
                | F::PauseAll
                | F::PowerAll
                | F::PowerMajority
                | F::AnswersLost
                | F::FullDisk
        )
    }

    /// Done through the preloaded library.
    pub(crate) fn needs_page(self) -> bool {
        self.class() == Clock
            || matches!(self, F::SlowSyncs | F::HeldSyncs | F::FailedSync | F::NoSpace)
    }

    /// Done to a file system that only one member uses.
    pub(crate) fn needs_image(self) -> bool {
        matches!(self, F::PowerOne | F::PowerMajority | F::PowerAll | F::FullDisk)
    }
}
