//! Asks one member for its state, four times a second, and for its metrics once a second. It keeps
//! asking whatever comes back; what an answer means for the lab is decided by the host.

use std::sync::Arc;
use std::time::Duration;

use kelson_api::etcdserverpb::StatusRequest;
use kelson_api::etcdserverpb::maintenance_client::MaintenanceClient;
use rustls::ClientConfig;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{MissedTickBehavior, interval, timeout};

use super::dial;
use super::folder::Ports;
use super::fsync::{Fsync, FsyncTimes};

/// Pause between two questions, and between two drawings of the view.
pub(crate) const PERIOD: Duration = Duration::from_millis(250);
/// A member that takes longer does not answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(1);
/// Every so many questions the metrics are read too.
const METRICS_EVERY: u32 = 4;

/// What one member says of itself.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Answer {
    /// Its id.
    pub(crate) id: u64,
    /// The leader it knows, 0 for none.
    pub(crate) leader: u64,
    /// Its term.
    pub(crate) term: u64,
    /// Revision of its data.
    pub(crate) revision: i64,
    /// Last log entry it knows as agreed.
    pub(crate) raft_index: u64,
    /// Last log entry it has applied.
    pub(crate) applied_index: u64,
    /// Size of its database. Unit: bytes.
    pub(crate) db_bytes: i64,
    /// It has no vote.
    pub(crate) is_learner: bool,
}

/// One round of questions.
#[derive(Debug)]
pub(crate) struct Report {
    /// The member.
    pub(crate) number: u16,
    /// Its answer, if any.
    pub(crate) answer: Option<Answer>,
    /// The times of its log syncs, when they were read in this round.
    pub(crate) fsync: Option<FsyncTimes>,
}

/// A task that asks one member; it ends when this is dropped.
pub(crate) struct Probe(JoinHandle<()>);

impl Drop for Probe {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Probe {
    /// Starts asking. Needs a runtime.
    pub(crate) fn start(
        number: u16,
        ports: Ports,
        tls: Option<Arc<ClientConfig>>,
        reports: mpsc::Sender<Report>,
    ) -> Self {
        let client = MaintenanceClient::new(dial::channel(ports.client, tls));
        Self(tokio::spawn(ask(number, client, ports, reports)))
    }
}

async fn ask(
    number: u16,
    mut client: MaintenanceClient<tonic::transport::Channel>,
    ports: Ports,
    reports: mpsc::Sender<Report>,
) {
    let mut ticks = interval(PERIOD);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut fsync = Fsync::default();
    let mut round = 0_u32;
    loop {
        ticks.tick().await;
        let answer = timeout(ANSWER_TIMEOUT, status(&mut client)).await.ok().flatten();
        let mut times = None;
        if answer.is_some() && round.is_multiple_of(METRICS_EVERY) {
            let metrics = timeout(ANSWER_TIMEOUT, dial::get(ports.metrics, "/metrics")).await;
            times = metrics.ok().and_then(Result::ok).map(|text| fsync.take(&text));
        }
        round = round.wrapping_add(1);
        if reports.send(Report { number, answer, fsync: times }).await.is_err() {
            return;
        }
    }
}

async fn status(client: &mut MaintenanceClient<tonic::transport::Channel>) -> Option<Answer> {
    let status = client.status(StatusRequest::default()).await.ok()?.into_inner();
    let header = status.header.unwrap_or_default();
    Some(Answer {
        id: header.member_id,
        leader: status.leader,
        term: status.raft_term,
        revision: header.revision,
        raft_index: status.raft_index,
        applied_index: status.raft_applied_index,
        db_bytes: status.db_size,
        is_learner: status.is_learner,
    })
}
