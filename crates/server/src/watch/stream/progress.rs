//! What a stream tells of revisions that brought no events: answers to the client's progress
//! requests, and notices to idle watchers. It decides only whether to speak; that everything up to
//! the revision was sent before follows from where the hub put its word into the queue.

use std::hash::{BuildHasher, RandomState};
use std::time::Duration;

use futures::Stream;
use kelson_api::etcdserverpb::{WatchRequest, WatchResponse};
use tokio::time::{Interval, MissedTickBehavior};
use tonic::Status;

use super::{NO_WATCH_ID, WatchStream};
use crate::watch::hub::{Asker, HubGone};
use crate::watch::{Response, Source};

/// Shortest time between two progress ticks, whatever the flag says.
const PROGRESS_INTERVAL_MIN: Duration = Duration::from_millis(100);

impl<S, R> WatchStream<S, R>
where
    S: Source,
    R: Stream<Item = Result<WatchRequest, Status>> + Send + Unpin + 'static,
{
    /// The hub has told us that all up to `position` came before this point of its queue. If every
    /// watcher is served up to there, the client may know.
    pub(super) fn tell_client(&mut self, position: i64) {
        let all_synced = self.watchers.iter().all(|watcher| watcher.is_synced(position));
        if all_synced && self.watchers.len() > 0 {
            self.tell(NO_WATCH_ID, position);
        }
    }

    /// The same for watchers that were idle at the last tick, each for itself.
    pub(super) fn tell_idle(&mut self, position: i64) {
        let mut idle = Vec::new();
        for watcher in self.watchers.iter_mut().filter(|watcher| watcher.is_due) {
            watcher.is_due = false;
            if !watcher.is_active && watcher.is_synced(position) {
                idle.push(watcher.watch_id);
            }
        }
        idle.sort_unstable();
        for watch_id in idle {
            self.tell(watch_id, position);
        }
    }

    fn tell(&mut self, watch_id: i64, position: i64) {
        let header = Some(self.source.header(position));
        let progress = WatchResponse { header, watch_id, ..Default::default() };
        self.ready.push_back(Response::bare(progress));
    }

    pub(super) async fn tick(&mut self) -> Result<(), HubGone> {
        let mut is_any_due = false;
        for watcher in self.watchers.iter_mut().filter(|watcher| watcher.progress_notify) {
            watcher.is_due = !watcher.is_active;
            watcher.is_active = false;
            is_any_due |= watcher.is_due;
        }
        match &self.stay {
            Some(stay) if is_any_due => stay.progress(Asker::Timer).await,
            _ => Ok(()),
        }
    }
}

/// The timer of one stream: the interval of the flag and up to a tenth more.
pub(super) fn progress_timer(interval: Duration) -> Interval {
    let jitter = (RandomState::new().hash_one(0_u8) % 1000) as u32;
    let period = interval.max(PROGRESS_INTERVAL_MIN);
    let period = period + period / 10_000 * jitter;
    let mut timer = tokio::time::interval_at(tokio::time::Instant::now() + period, period);
    timer.set_missed_tick_behavior(MissedTickBehavior::Delay);
    timer
}

/// Waits for the next tick, if ticks are wanted. Cancel safe.
pub(super) async fn ticked(timer: &mut Interval, is_wanted: bool) {
    if is_wanted {
        timer.tick().await;
    } else {
        std::future::pending().await
    }
}
