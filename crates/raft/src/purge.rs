//! When the head of the log may go: never past what a checkpoint has made durable, and keeping
//! enough for a member that was away for a while. openraft purges only behind a snapshot, so each
//! round first names one. Wakes a few times a minute, never on the path of a request.

use std::time::Duration;

use kelson_storage::Reader;
use openraft::async_runtime::watch::WatchReceiver;

use crate::log_store::LogStore;
use crate::types::Raft;

/// How often the head of the log is looked at.
const LOOK: Duration = Duration::from_secs(5);
/// Log that always stays, in bytes.
const KEEP_BYTES: u64 = 16 * 1024 * 1024;
/// Log beyond which even entries within the catch-up distance go: large values must not fill the
/// disk with history.
const KEEP_BYTES_MAX: u64 = 256 * 1024 * 1024;
/// A purge of less is not worth its writes.
const STEP_ENTRIES: u64 = 1_000;

/// The index up to which the log may be cut.
fn cut(durable: u64, last: u64, catch_up: u64, log: &dyn Fn(u64) -> u64) -> u64 {
    let by_entries = last.saturating_sub(catch_up).min(log(KEEP_BYTES));
    by_entries.max(log(KEEP_BYTES_MAX)).min(durable)
}

/// Purges until openraft stops. `catch_up` is the number of entries kept for slow members.
pub(crate) async fn run(raft: Raft, log: LogStore, reader: Reader, catch_up: u64) {
    let mut done = 0;
    loop {
        tokio::time::sleep(LOOK).await;
        let (last, snapshot) = {
            let metrics = raft.data_metrics();
            let metrics = metrics.borrow_watched();
            let index = |id: &Option<crate::types::RaftLogId>| id.map_or(0, |id| id.index + 1);
            (index(&metrics.last_log), index(&metrics.snapshot))
        };
        let durable = reader.durable_applied().borrow().index;
        let upto = cut(durable, last, catch_up, &|bytes| log.index_keeping(bytes));
        if upto < done + STEP_ENTRIES {
            continue;
        }
        let result = if snapshot < upto {
            // The purge follows in the next round, when the snapshot is there.
            raft.trigger().snapshot().await
        } else {
            done = upto;
            raft.trigger().purge_log(upto - 1).await
        };
        if result.is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_logs_stay_whole() {
        assert_eq!(cut(9_000, 9_000, 5_000, &|_| 0), 0);
    }

    #[test]
    fn entries_bytes_and_durability_all_bound_the_cut() {
        let log = |bytes| if bytes == KEEP_BYTES { 8_000 } else { 100 };
        assert_eq!(cut(9_000, 9_000, 5_000, &log), 4_000);
        assert_eq!(cut(9_000, 9_000, 500, &log), 8_000);
        assert_eq!(cut(3_000, 9_000, 5_000, &log), 3_000);
        let large = |bytes| if bytes == KEEP_BYTES { 8_900 } else { 8_500 };
        assert_eq!(cut(9_000, 9_000, 5_000, &large), 8_500, "large values are not kept for long");
    }
}
