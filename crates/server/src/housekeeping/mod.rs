//! What the member does without being asked: ends leases whose time is up, compacts history by
//! the configured rule, decides the cluster version, raises the alarm when space runs out, and looks
//! after the other members: whether they answer, whether they reach this one, and whether their data
//! are the same. Each task is an ordinary client of the raft door; none of them changes the store by
//! itself.

pub mod compact;
pub mod corruption;
pub mod leadership;
pub mod lease;
pub mod probe;
pub mod quota;
pub mod version;

use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinSet;

use crate::app::App;
use crate::config::Config;
use lease::Lessor;

/// The running tasks. Dropping it stops them.
pub struct Housekeeping {
    lessor: Arc<Lessor>,
    tasks: JoinSet<()>,
}

/// Which comparisons of the members' data run, and how often.
#[derive(Clone, Copy, Debug, Default)]
pub struct Checks {
    /// `--corrupt-check-time`.
    pub whole: Option<Duration>,
    /// `--compact-hash-check-time`, with the feature gate CompactHashCheck.
    pub compactions: Option<Duration>,
}

impl Checks {
    /// As the flags say.
    #[must_use]
    pub fn new(config: &Config) -> Self {
        let whole = config.corrupt_check_time;
        let compactions = config.feature_gates.enabled("CompactHashCheck");
        Self {
            whole: (!whole.is_zero()).then_some(whole),
            compactions: compactions.then_some(config.compact_hash_check_time),
        }
    }
}

/// Starts all tasks. They run on every member and act only where this member leads, except for
/// the watch over its own disk.
#[must_use]
pub fn start(app: &App, checks: &Checks) -> Housekeeping {
    let lessor = Arc::new(Lessor::new(app));
    let mut tasks = JoinSet::new();
    tasks.spawn(Arc::clone(&lessor).run());
    tasks.spawn(Arc::clone(&lessor).watch_pulse());
    tasks.spawn(probe::run(app.clone()));
    tasks.spawn(leadership::run(app.clone()));
    tasks.spawn(corruption::compare_chains(app.clone()));
    if let Some(every) = checks.whole {
        tasks.spawn(corruption::compare_hashes(app.clone(), every));
    }
    if let Some(every) = checks.compactions {
        tasks.spawn(corruption::compare_after_compactions(app.clone(), every));
    }
    tasks.spawn(compact::run(app.node.clone(), app.reader.clone(), app.limits.auto_compaction));
    tasks.spawn(version::run(app.clone()));
    tasks.spawn(Arc::clone(&app.callers).run());
    tasks.spawn(quota::guard(app.node.clone(), app.reader.clone()));
    Housekeeping { lessor, tasks }
}

impl Housekeeping {
    /// The deadlines of leases, for the lease service.
    #[must_use]
    pub fn lessor(&self) -> Arc<Lessor> {
        Arc::clone(&self.lessor)
    }

    /// Ends all tasks and waits until they are gone.
    pub async fn stop(mut self) {
        self.tasks.shutdown().await;
    }
}
