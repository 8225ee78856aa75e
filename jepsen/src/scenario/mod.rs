//! Directed scenarios: sequences of faults that are known to break stores, each with the claim that it
//! tests. Chance alone rarely meets them. What is special to a scenario is judged here, the history
//! by the checks as always.

mod lease;
mod network;
mod restore;
mod storage;

use std::io;
use std::time::Duration;

use crate::attack::FaultRecord;
use crate::cluster::Target;
use crate::nemesis::{Class, Outcome};
use crate::run::{Plan, Run};
use crate::workload::Workload;

/// A scenario by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scenario {
    Forget,
    HoldMajority,
    WipedLeader,
    Blackhole,
    TwoSnapshots,
    ReplacedWhenCut,
    LeaseLeaderChange,
    FullLeader,
    LeaseClock,
    OldLeader,
    RollingRestart,
    SnapshotDefrag,
    KillAfterAck,
    PausedReads,
    KillsBetweenSnapshots,
    CompactionRace,
    SlowWatcher,
    FutureWatch,
    ProgressRace,
    Restore,
}

use Scenario as S;

const TABLE: [(Scenario, &str, &str); 20] = [
    (S::Forget, "forget", "what a majority acknowledged outlives the power of one of them"),
    (S::HoldMajority, "hold-majority", "nothing is acknowledged while a majority cannot sync"),
    (S::WipedLeader, "wiped-leader", "a leader that comes back empty is refused"),
    (S::Blackhole, "blackhole", "a watch stays right over the transfer of a whole state"),
    (S::TwoSnapshots, "two-snapshots", "one transfer after the other does no harm"),
    (S::ReplacedWhenCut, "replaced-when-cut", "a member that was replaced while cut off stays out"),
    (S::LeaseLeaderChange, "lease-leader-change", "leases end neither early nor never"),
    (S::FullLeader, "full-leader", "a leader without room loses nothing and goes on with room"),
    (S::LeaseClock, "lease-clock", "leases do not follow the wall clock"),
    (S::OldLeader, "old-leader", "a leader that was deposed answers nothing old"),
    (S::RollingRestart, "rolling-restart", "members restart in turn and writes go on"),
    (S::SnapshotDefrag, "snapshot-defrag", "a snapshot is whole while members defragment"),
    (S::KillAfterAck, "kill-after-ack", "what was acknowledged a moment before all end is there"),
    (S::PausedReads, "paused-reads", "a leader that slept through an election reads nothing old"),
    (S::KillsBetweenSnapshots, "kills-between-snapshots", "crashes around snapshots lose nothing"),
    (S::CompactionRace, "compaction-race", "compaction under load drops nothing that is live"),
    (S::SlowWatcher, "slow-watcher", "a watcher on a thin line gets everything, in order"),
    (
        S::FutureWatch,
        "future-watch",
        "a watch ahead of a member that lags begins where it was asked",
    ),
    (S::ProgressRace, "progress-race", "progress is never told before the events that it covers"),
    (S::Restore, "restore", "watchers go on behind a restore, or are told that history is gone"),
];

impl Scenario {
    pub(crate) fn all() -> Vec<Self> {
        TABLE.iter().map(|(scenario, ..)| *scenario).collect()
    }

    fn row(self) -> &'static (Self, &'static str, &'static str) {
        TABLE.iter().find(|(one, ..)| *one == self).expect("every scenario is in the table")
    }

    pub(crate) fn name(self) -> &'static str {
        self.row().1
    }

    pub(crate) fn claim(self) -> &'static str {
        self.row().2
    }

    pub(crate) fn named(name: &str) -> Result<Self, String> {
        let all: Vec<_> = TABLE.iter().map(|(_, name, _)| *name).collect();
        let found = TABLE.iter().find(|(_, known, _)| *known == name);
        found
            .map(|(scenario, ..)| *scenario)
            .ok_or_else(|| format!("no scenario {name}: there are {}", all.join(", ")))
    }

    /// Members' data must lie on file systems of their own.
    pub(crate) fn needs_image(self) -> bool {
        matches!(self, S::Forget | S::FullLeader | S::KillAfterAck)
    }

    /// The library must be preloaded into members.
    pub(crate) fn needs_page(self) -> bool {
        matches!(self, S::HoldMajority | S::LeaseClock)
    }

    /// Why it cannot be had against such a target.
    pub(crate) fn impossible(self, plan: &Plan) -> Option<String> {
        if self.needs_page() && plan.target == Target::Etcd {
            return Some("etcd is linked statically: no library can be preloaded".into());
        }
        (plan.members < 3).then(|| "it needs 3 members".into())
    }

    /// Flags for the members: little log where states are to be sent whole.
    pub(crate) fn flags(self) -> &'static [&'static str] {
        match self {
            S::Blackhole | S::TwoSnapshots | S::KillsBetweenSnapshots => {
                &["--snapshot-count=100", "--snapshot-catchup-entries=50"]
            }
            _ => &[],
        }
    }

    /// What clients do meanwhile.
    pub(crate) fn workload(self) -> Workload {
        match self {
            S::FutureWatch | S::ProgressRace | S::Restore => Workload::Watch,
            _ => Workload::Mixed,
        }
    }

    /// It writes keys that no watcher covers, or leaves revisions out.
    pub(crate) fn sparse(self) -> bool {
        matches!(self, S::LeaseLeaderChange | S::LeaseClock | S::Restore)
    }

    pub(crate) async fn play(self, run: &Run) -> io::Result<()> {
        match self {
            S::Forget => storage::forget(run).await,
            S::HoldMajority => storage::hold_majority(run).await,
            S::WipedLeader => storage::wiped_leader(run).await,
            S::Blackhole => network::blackhole(run, 1).await,
            S::TwoSnapshots => network::blackhole(run, 2).await,
            S::ReplacedWhenCut => network::replaced_when_cut(run).await,
            S::LeaseLeaderChange => lease::leader_change(run).await,
            S::FullLeader => storage::full_leader(run).await,
            S::LeaseClock => lease::clock(run).await,
            S::OldLeader => network::old_leader(run).await,
            S::RollingRestart => storage::rolling_restart(run).await,
            S::SnapshotDefrag => storage::snapshot_defrag(run).await,
            S::KillAfterAck => storage::kill_after_ack(run).await,
            S::PausedReads => network::paused_reads(run).await,
            S::KillsBetweenSnapshots => storage::kills(run).await,
            S::CompactionRace => storage::compaction(run).await,
            S::SlowWatcher => network::slow_watcher(run).await,
            S::FutureWatch => network::future_watch(run).await,
            S::ProgressRace => network::progress_race(run).await,
            S::Restore => restore::restore(run).await,
        }
    }
}

/// The leader and the others; an error ends the scenario as one that tested nothing.
async fn cast(run: &Run) -> io::Result<(usize, Vec<usize>)> {
    let leader = run.monitor.settled(Duration::from_secs(30)).await;
    let leader = leader.ok_or_else(|| io::Error::other("no leader for 30 s"))?;
    let members = run.load.members.read().clone();
    let others = members.into_iter().filter(|member| *member != leader).collect();
    Ok((leader, others))
}

async fn wait(seconds: f64) {
    tokio::time::sleep(Duration::from_secs_f64(seconds)).await;
}

/// Notes one step of a scenario that began at `from` and ends now.
fn note(run: &Run, what: &str, from: f64, members: &[usize]) {
    let leader = run.monitor.leader().unwrap_or(0);
    let to = run.clock.seconds();
    run.say(what);
    run.faults.add(FaultRecord {
        entry: 0,
        fault: what.to_owned(),
        class: Class::Scenario,
        from,
        to,
        leader,
        members: members.to_vec(),
        outcome: Outcome::Installed,
        note: String::new(),
    });
}

/// All members must serve again. An error says that the cluster is beyond going on.
async fn recovered(run: &Run, what: &str) -> io::Result<()> {
    recovered_within(run, what, Duration::from_secs(60)).await
}

async fn recovered_within(run: &Run, what: &str, within: Duration) -> io::Result<()> {
    if run.converge(within).await.is_some() {
        return Ok(());
    }
    let text = format!("{what}: not all members serve {within:?} later");
    run.finding(text.clone());
    Err(io::Error::other(text))
}
