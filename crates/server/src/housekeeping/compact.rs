//! Compacts history by itself, on the leader only: either everything older than a period, or
//! everything but the newest revisions. It only proposes; a revision that someone else has
//! compacted already counts as done.

use std::collections::VecDeque;
use std::time::Duration;

use kelson_api::Error;
use kelson_api::command::command::Op;
use kelson_api::etcdserverpb::CompactionRequest;
use kelson_raft::Node;
use kelson_storage::Reader;
use tokio::time::Instant;

use crate::limits::AutoCompaction;

/// Longest time between two compactions of the periodic mode.
const PERIODIC_INTERVAL_MAX: Duration = Duration::from_secs(3600);

/// Samples of the revision per interval of the periodic mode.
const SAMPLES: u32 = 10;

/// Time between two looks of the revision mode.
const REVISION_INTERVAL: Duration = Duration::from_secs(300);

/// Runs the configured mode for ever.
pub(super) async fn run(node: Node, reader: Reader, mode: AutoCompaction) {
    match mode {
        AutoCompaction::Off => {}
        AutoCompaction::Periodic(period) => periodic(node, reader, period).await,
        AutoCompaction::Revision(keep) => by_revision(node, reader, keep).await,
    }
}

async fn periodic(node: Node, reader: Reader, period: Duration) {
    let mut history = Periodic::new(period, Instant::now());
    loop {
        history.sample(reader.revision());
        tokio::time::sleep(history.sampling()).await;
        if !node.status().is_leader {
            continue;
        }
        let Some(revision) = history.due(Instant::now()) else {
            continue;
        };
        if compact(&node, revision).await {
            history.done(revision, Instant::now());
        }
    }
}

async fn by_revision(node: Node, reader: Reader, keep: i64) {
    let mut last = 0;
    loop {
        tokio::time::sleep(REVISION_INTERVAL).await;
        let revision = reader.revision().saturating_sub(keep);
        let due = revision > 0 && revision != last && node.status().is_leader;
        if due && compact(&node, revision).await {
            last = revision;
        }
    }
}

/// Compacts; returns whether nothing older than `revision` is left to compact.
async fn compact(node: &Node, revision: i64) -> bool {
    let request = CompactionRequest { revision, physical: false };
    let result = node.propose_urgent(Op::Compaction(request)).await;
    match result.and_then(|outcome| outcome.result) {
        Ok(_) => {
            tracing::info!(revision, "compacted history automatically");
            true
        }
        Err(Error::Compacted) => true,
        Err(error) => {
            tracing::warn!(revision, %error, "automatic compaction failed and will be retried");
            false
        }
    }
}

/// What the periodic mode remembers: which revision was current how long ago.
struct Periodic {
    interval: Duration,
    /// The newest sample is last. Bounded by the samples of one period.
    samples: VecDeque<i64>,
    samples_max: usize,
    /// Before this time nothing is due: a whole period after the start, an interval later on.
    not_before: Instant,
    last: i64,
}

impl Periodic {
    fn new(period: Duration, now: Instant) -> Self {
        let interval = period.min(PERIODIC_INTERVAL_MAX);
        let sampling = (interval / SAMPLES).max(Duration::from_millis(1));
        let per_period = period.as_millis() / sampling.as_millis();
        let samples_max = usize::try_from(per_period).unwrap_or(usize::MAX).saturating_add(1);
        Self { interval, samples: VecDeque::new(), samples_max, not_before: now + period, last: 0 }
    }

    /// Time between two samples.
    fn sampling(&self) -> Duration {
        (self.interval / SAMPLES).max(Duration::from_millis(1))
    }

    fn sample(&mut self, revision: i64) {
        if self.samples.len() == self.samples_max {
            self.samples.pop_front();
        }
        self.samples.push_back(revision);
    }

    /// The revision of a period ago, if it is time to compact to it.
    fn due(&self, now: Instant) -> Option<i64> {
        let oldest = *self.samples.front()?;
        (now >= self.not_before && oldest != self.last).then_some(oldest)
    }

    fn done(&mut self, revision: i64, now: Instant) {
        self.last = revision;
        self.not_before = now + self.interval;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINUTE: Duration = Duration::from_secs(60);

    /// Drives the samples as the task does, one revision per step; returns (step, revision) of
    /// each compaction.
    fn drive(period: Duration, steps: i64) -> (Duration, Vec<(i64, i64)>) {
        let mut now = Instant::now();
        let mut history = Periodic::new(period, now);
        let mut compactions = Vec::new();
        for step in 0..steps {
            history.sample(step + 1);
            now += history.sampling();
            if let Some(revision) = history.due(now) {
                compactions.push((step, revision));
                history.done(revision, now);
            }
        }
        (history.sampling(), compactions)
    }

    #[test]
    fn an_hour_is_kept_and_compacted_hourly() {
        let (sampling, compactions) = drive(60 * MINUTE, 32);
        assert_eq!(sampling, 6 * MINUTE);
        assert_eq!(compactions, [(9, 1), (19, 10), (29, 20)]);
    }

    #[test]
    fn a_day_is_kept_and_compacted_hourly() {
        let (sampling, compactions) = drive(24 * 60 * MINUTE, 262);
        assert_eq!(sampling, 6 * MINUTE);
        assert_eq!(compactions, [(239, 1), (249, 10), (259, 20)]);
    }

    #[test]
    fn a_few_seconds_are_kept_and_compacted_as_often() {
        let (sampling, compactions) = drive(Duration::from_secs(5), 22);
        assert_eq!(sampling, Duration::from_millis(500));
        assert_eq!(compactions, [(9, 1), (19, 10)]);
    }

    #[test]
    fn an_unchanged_revision_is_not_compacted_twice() {
        let mut now = Instant::now();
        let mut history = Periodic::new(Duration::from_secs(10), now);
        for _ in 0..40 {
            history.sample(7);
            now += history.sampling();
            if let Some(revision) = history.due(now) {
                assert_eq!((history.last, revision), (0, 7));
                history.done(revision, now);
            }
        }
        assert_eq!(history.last, 7);
    }

    #[test]
    fn a_failed_compaction_is_due_again_with_the_next_sample() {
        let mut now = Instant::now();
        let mut history = Periodic::new(Duration::from_secs(10), now);
        for step in 0..10 {
            history.sample(step + 1);
            now += history.sampling();
        }
        assert_eq!(history.due(now), Some(1));
        history.sample(11);
        now += history.sampling();
        assert_eq!(history.due(now), Some(1));
        history.sample(12);
        now += history.sampling();
        assert_eq!(history.due(now), Some(2));
    }
}
