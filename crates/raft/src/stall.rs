//! A leader whose disk does not answer hands leadership on. Its cluster can commit without it, but its
//! own clients wait for its log, and it cannot vote. It looks a few times a second and touches no data.

use std::sync::Arc;
use std::time::{Duration, Instant};

use kelson_storage::log::Log;
use openraft::async_runtime::watch::WatchReceiver;
use tokio::sync::watch;

use crate::progress::Progress;
use crate::status::Status;
use crate::types::Raft;

/// Written entries may wait for the disk for so many election timeouts.
const PATIENCE_ELECTIONS: u32 = 2;

/// What has not reached the disk, and since when.
#[derive(Clone, Copy, Debug)]
struct Waiting {
    durable: u64,
    since: Instant,
}

/// How long the disk has not moved although something waits for it.
fn stalled(waiting: &mut Option<Waiting>, durable: u64, last: u64, now: Instant) -> Duration {
    if durable >= last {
        *waiting = None;
        return Duration::ZERO;
    }
    match waiting {
        Some(known) if known.durable == durable => now.saturating_duration_since(known.since),
        _ => {
            *waiting = Some(Waiting { durable, since: now });
            Duration::ZERO
        }
    }
}

/// Watches until consensus stops.
pub(crate) async fn run(
    raft: Raft,
    log: Log,
    progress: Arc<Progress>,
    status: watch::Receiver<Status>,
    election: Duration,
) {
    let durable = log.durable();
    let mut waiting = None;
    loop {
        tokio::time::sleep(election / 4).await;
        if status.has_changed().is_err() {
            return;
        }
        let stall = stalled(&mut waiting, durable.index(), progress.last(), Instant::now());
        if stall < election * PATIENCE_ELECTIONS || !status.borrow().is_leader {
            continue;
        }
        let Some(target) = most_up_to_date(&raft, status.borrow().member_id) else { continue };
        tracing::warn!(
            stalled = ?stall,
            target = format!("{target:x}"),
            "the disk does not answer: handing leadership on"
        );
        if raft.trigger().transfer_leader(target).await.is_err() {
            return;
        }
        // One try per stall of this length.
        waiting = None;
    }
}

/// The other voter whose log reaches farthest.
fn most_up_to_date(raft: &Raft, own: u64) -> Option<u64> {
    let metrics = raft.data_metrics();
    let metrics = metrics.borrow_watched();
    let matched = metrics.replication.as_ref()?;
    let voters = raft.voter_ids().filter(|id| *id != own);
    voters.max_by_key(|id| matched.get(id).copied().flatten().map(|at| at.index))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_unmoved_disk_stalls() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut waiting = None;
        assert_eq!(stalled(&mut waiting, 5, 9, at(0)), Duration::ZERO);
        assert_eq!(stalled(&mut waiting, 5, 20, at(3)), Duration::from_secs(3));
        assert_eq!(stalled(&mut waiting, 6, 20, at(4)), Duration::ZERO, "it moves");
        assert_eq!(stalled(&mut waiting, 6, 20, at(6)), Duration::from_secs(2));
        assert_eq!(stalled(&mut waiting, 20, 20, at(9)), Duration::ZERO, "nothing waits");
        assert_eq!(stalled(&mut waiting, 20, 21, at(30)), Duration::ZERO, "it began just now");
    }
}
