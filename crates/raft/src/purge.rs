//! When the head of the log may go: never past what a checkpoint has made durable, and keeping
//! enough for a member that was away for a while. openraft purges only behind a snapshot, so each
//! round cuts behind the one that it finds and names one for the next. Wakes a few times a minute,
//! never on the path of a request.

use std::time::Duration;

use kelson_storage::Reader;
use openraft::async_runtime::watch::WatchReceiver;

use crate::log_store::LogStore;
use crate::snapshot::Transfers;
use crate::types::Raft;

/// Entries that etcd keeps for members that were away.
const CATCH_UP_ENTRIES: u64 = 5_000;

/// How much log stays.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Retention {
    /// How often the head of the log is looked at.
    pub(crate) look: Duration,
    /// Log that always stays, in bytes.
    pub(crate) keep_bytes: u64,
    /// Log beyond which even entries within the catch-up distance go: large values must not fill
    /// the disk with history.
    pub(crate) keep_bytes_max: u64,
    /// A purge of less is not worth its writes.
    pub(crate) step_entries: u64,
    /// Entries that stay for members that were away.
    pub(crate) catch_up_entries: u64,
}

impl Retention {
    /// `--snapshot-catchup-entries`. Who asks for less than etcd's default wants a short log: then
    /// neither bytes nor slow members keep more.
    pub(crate) fn keeping(catch_up_entries: u64) -> Retention {
        let usual = Retention {
            look: Duration::from_secs(5),
            keep_bytes: 16 * 1024 * 1024,
            keep_bytes_max: 256 * 1024 * 1024,
            step_entries: 1_000,
            catch_up_entries,
        };
        if catch_up_entries >= CATCH_UP_ENTRIES {
            return usual;
        }
        Retention {
            look: Duration::from_secs(1),
            keep_bytes: 0,
            keep_bytes_max: 0,
            step_entries: catch_up_entries.clamp(1, 1_000),
            ..usual
        }
    }

    /// The index up to which the log may be cut. `index_keeping` says where a cut would leave so
    /// many bytes.
    fn cut(&self, durable: u64, last: u64, index_keeping: &dyn Fn(u64) -> u64) -> u64 {
        let by_entries = last.saturating_sub(self.catch_up_entries);
        if self.keep_bytes == 0 {
            return by_entries.min(durable);
        }
        let wanted = by_entries.min(index_keeping(self.keep_bytes));
        wanted.max(index_keeping(self.keep_bytes_max)).min(durable)
    }
}

/// Purges until openraft stops.
pub(crate) async fn run(
    raft: Raft,
    log: LogStore,
    reader: Reader,
    transfers: Transfers,
    retention: Retention,
) {
    let mut done = 0;
    loop {
        tokio::time::sleep(retention.look).await;
        let (last, snapshot) = {
            let metrics = raft.data_metrics();
            let metrics = metrics.borrow_watched();
            let index = |id: &Option<crate::types::RaftLogId>| id.map_or(0, |id| id.index + 1);
            (index(&metrics.last_log), index(&metrics.snapshot))
        };
        let durable = reader.durable_applied().borrow().index;
        let upto = retention.cut(durable, last, &|bytes| log.index_keeping(bytes));
        let upto = upto.min(needed(&raft, &transfers, &retention, &log));
        // The snapshot falls behind again as soon as it is there: under load it is never as new as what
        // could go, so the log goes as far as it reaches, and the rest with the next one.
        let cut = upto.min(snapshot);
        if cut >= done + retention.step_entries {
            done = cut;
            if raft.trigger().purge_log(cut - 1).await.is_err() {
                return;
            }
        }
        let is_worth_it = upto >= done + retention.step_entries;
        if is_worth_it && snapshot < upto && raft.trigger().snapshot().await.is_err() {
            return;
        }
    }
}

/// What other members still need: the log behind a snapshot under way always stays, the log of a slow
/// member as long as it is not too large.
fn needed(raft: &Raft, transfers: &Transfers, retention: &Retention, log: &LogStore) -> u64 {
    let slowest = {
        let metrics = raft.data_metrics();
        let metrics = metrics.borrow_watched();
        let matched = metrics.replication.iter().flatten();
        matched.map(|(_, matched)| matched.map_or(0, |id| id.index + 1)).min()
    };
    let slowest = slowest
        .filter(|_| retention.keep_bytes_max > 0)
        .map_or(u64::MAX, |slowest| slowest.max(log.index_keeping(retention.keep_bytes_max)));
    slowest.min(transfers.needed_from().unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_logs_stay_whole() {
        assert_eq!(Retention::keeping(5_000).cut(9_000, 9_000, &|_| 0), 0);
    }

    #[test]
    fn entries_bytes_and_durability_all_bound_the_cut() {
        let retention = Retention::keeping(5_000);
        let log = |bytes| if bytes == retention.keep_bytes { 8_000 } else { 100 };
        assert_eq!(retention.cut(9_000, 9_000, &log), 4_000);
        assert_eq!(Retention::keeping(500).cut(9_000, 9_000, &log), 8_500, "asked to be short");
        assert_eq!(Retention::keeping(500).cut(8_100, 9_000, &log), 8_100);
        assert_eq!(retention.cut(3_000, 9_000, &log), 3_000);
        let large = |bytes| if bytes == retention.keep_bytes { 8_900 } else { 8_500 };
        assert_eq!(retention.cut(9_000, 9_000, &large), 8_500, "large values do not stay long");
    }
}
