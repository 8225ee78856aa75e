//! Simulated clusters: several whole members in one process, with a network, disks and a clock that
//! obey a seed. `schedule` draws what goes wrong, `driver` and `faults` let it happen to the
//! members of `world`, `clients` use the cluster, `history` judges; `disk`, `net` and `machine` are
//! what the members stand on; `panics` hears what would end in silence; `command` runs many seeds,
//! each in a process of its own. Nothing here knows how consensus works.

mod clients;
pub mod command;
mod disk;
mod driver;
mod faults;
mod history;
mod machine;
mod net;
mod panics;
pub mod schedule;
mod world;

use std::collections::BTreeMap;
use std::path::Path;

use self::schedule::Step;

/// A deliberate error, to see that it is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flaw {
    /// Syncs of the log do nothing.
    NoSync,
    /// The log answers before anything is on the disk.
    EarlyAck,
    /// Linearizable reads ask nobody.
    LocalReads,
    /// A background task of each member panics, for which nobody waits.
    Panic,
}

impl Flaw {
    /// All of them, by the names that the command line knows.
    pub const ALL: [(&'static str, Flaw); 4] = [
        ("no-sync", Flaw::NoSync),
        ("early-ack", Flaw::EarlyAck),
        ("local-reads", Flaw::LocalReads),
        ("panic", Flaw::Panic),
    ];

    /// The flaw of that name.
    pub fn from_name(name: &str) -> Option<Flaw> {
        Flaw::ALL.iter().find(|(known, _)| *known == name).map(|(_, flaw)| *flaw)
    }

    fn name(self) -> &'static str {
        Flaw::ALL.iter().find(|(_, flaw)| *flaw == self).map_or("-", |(name, _)| name)
    }
}

/// What makes a run.
#[derive(Clone, Debug)]
pub struct Run {
    /// All that happens follows from it.
    pub seed: u64,
    /// Founders; one more may be added.
    pub members: usize,
    /// Simulated time before everything heals.
    pub seconds: u64,
    /// Steps of the schedule that are left out.
    pub without: Vec<usize>,
    /// What is planted.
    pub flaw: Option<Flaw>,
}

impl Run {
    /// The faults that will happen.
    pub fn steps(&self) -> Vec<Step> {
        let all = schedule::draw(self.seed, self.members, self.seconds).into_iter().enumerate();
        all.filter(|(at, _)| !self.without.contains(at)).map(|(_, step)| step).collect()
    }
}

/// What a run showed.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// The first broken rule.
    pub violation: Option<String>,
    /// The end of the trace.
    pub lines: Vec<String>,
    /// Things that clients asked.
    pub operations: u64,
    /// Writes whose outcome nobody knows.
    pub unknown: u64,
    /// Linearizable reads that were answered.
    pub reads: u64,
    /// Faults that happened, by kind.
    pub counts: BTreeMap<String, u64>,
    /// Unit: milliseconds.
    pub simulated: u64,
    /// All that was seen, one line each.
    pub trace: String,
}

/// Runs one seed in this process, which must not do anything else before or after.
///
/// # Errors
/// The run panicked.
pub fn simulate(run: &Run, home: &Path) -> Result<Report, String> {
    // A thread that is new has drawn no random number yet.
    std::thread::scope(|scope| {
        let running = scope.spawn(|| driver::simulate(run.clone(), &run.steps(), home));
        running.join().map_err(|_| "the simulation panicked".to_owned())
    })
}
