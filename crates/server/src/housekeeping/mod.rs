//! What the member does without being asked: ends leases whose time is up, compacts history by
//! the configured rule, decides the cluster version and raises the alarm when space runs out. Each
//! task is an ordinary client of the raft door; none of them changes the store by itself.

pub mod compact;
pub mod lease;
pub mod quota;
pub mod version;

use std::sync::Arc;

use tokio::task::JoinSet;

use crate::app::App;
use lease::Lessor;

/// The running tasks. Dropping it stops them.
pub struct Housekeeping {
    lessor: Arc<Lessor>,
    tasks: JoinSet<()>,
}

/// Starts all tasks. They run on every member and act only where this member leads, except for
/// the watch over its own disk.
#[must_use]
pub fn start(app: &App) -> Housekeeping {
    let lessor = Arc::new(Lessor::new(app));
    let mut tasks = JoinSet::new();
    tasks.spawn(Arc::clone(&lessor).run());
    tasks.spawn(compact::run(app.node.clone(), app.reader.clone(), app.limits.auto_compaction));
    tasks.spawn(version::run(app.node.clone(), app.reader.clone()));
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
