//! What every service and housekeeping task is given: the member, its store for reading, the
//! limits and the metrics. Cloning shares them; nothing here can be changed after the start.

use std::sync::Arc;

use kelson_raft::Node;
use kelson_storage::Reader;
use tokio::sync::watch;

use crate::callers::Callers;
use crate::housekeeping::probe::Probes;
use crate::limits::Limits;
use crate::metrics::Metrics;
use crate::metrics::peers::TrafficByUrl;

/// The running member as seen by the services.
#[derive(Clone)]
pub struct App {
    /// The door to agreement: propose, read barrier, status.
    pub node: Node,
    /// The store of this member, for reading.
    pub reader: Reader,
    /// Tells who calls.
    pub callers: Arc<Callers>,
    /// Limits from the flags.
    pub limits: Arc<Limits>,
    /// The registry of metrics.
    pub metrics: Arc<Metrics>,
    /// Becomes true when the process begins to end: streams should end then.
    pub stopping: watch::Receiver<bool>,
    /// Who of the other members is connected.
    pub probes: Arc<Probes>,
    /// Bytes of the connections to other members.
    pub traffic: TrafficByUrl,
}
