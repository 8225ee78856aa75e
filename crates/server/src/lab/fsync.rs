//! Reads the time of a member's log syncs out of its metrics: the mean of the last second and the
//! 99th percentile of the last half minute. Counters only; nothing is measured here.

use std::collections::VecDeque;

const NAME: &str = "etcd_disk_wal_fsync_duration_seconds";
/// Readings that the percentile looks back over, one a second.
const READINGS_MAX: usize = 30;

/// One reading of the histogram.
#[derive(Clone, Debug, Default, PartialEq)]
struct Reading {
    /// Upper bound in seconds and cumulative count, in ascending order; the last bound is infinite.
    buckets: Vec<(f64, u64)>,
    sum_seconds: f64,
    count: u64,
}

/// What is shown.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct FsyncTimes {
    /// Mean of the latest second with any sync. Unit: seconds.
    pub(crate) last_seconds: Option<f64>,
    /// Upper bound of the histogram's bucket that holds the 99th percentile. Unit: seconds.
    pub(crate) p99_seconds: Option<f64>,
}

/// The latest readings of one member.
#[derive(Debug, Default)]
pub(crate) struct Fsync {
    readings: VecDeque<Reading>,
    times: FsyncTimes,
}

impl Fsync {
    /// Takes the text of `/metrics` and returns the times as they are now.
    pub(crate) fn take(&mut self, metrics: &str) -> FsyncTimes {
        let now = Reading::parse(metrics);
        // A restarted member counts from zero again.
        if self.readings.back().is_some_and(|before| before.count > now.count) {
            self.readings.clear();
        }
        let zero = Reading::default();
        let before = self.readings.back().unwrap_or(&zero);
        if now.count > before.count {
            let seconds = now.sum_seconds - before.sum_seconds;
            self.times.last_seconds = Some(seconds / (now.count - before.count) as f64);
        }
        if self.readings.len() == READINGS_MAX {
            self.readings.pop_front();
        }
        self.times.p99_seconds =
            now.p99_since(self.readings.front().unwrap_or(&zero)).or(self.times.p99_seconds);
        self.readings.push_back(now);
        self.times
    }
}

impl Reading {
    fn parse(metrics: &str) -> Self {
        let mut reading = Self::default();
        for line in metrics.lines() {
            let Some(rest) = line.strip_prefix(NAME) else { continue };
            let Some((what, value)) = rest.rsplit_once(' ') else { continue };
            let value: f64 = value.parse().unwrap_or_default();
            // Counts stay far below 2^53.
            let count = value as u64;
            if let Some(bound) = what.strip_prefix("_bucket{le=\"") {
                let bound = bound.trim_end_matches("\"}").parse().unwrap_or(f64::INFINITY);
                reading.buckets.push((bound, count));
            } else if what == "_sum" {
                reading.sum_seconds = value;
            } else if what == "_count" {
                reading.count = count;
            }
        }
        reading
    }

    /// The bound below which 99 of 100 syncs since `before` stayed; `None` without any sync.
    fn p99_since(&self, before: &Self) -> Option<f64> {
        let total = self.count.checked_sub(before.count).filter(|total| *total > 0)?;
        let wanted = total - total / 100;
        let earlier = |index: usize| before.buckets.get(index).map_or(0, |(_, count)| *count);
        let found = self
            .buckets
            .iter()
            .enumerate()
            .find(|(index, (_, count))| count.saturating_sub(earlier(*index)) >= wanted);
        found.map(|(_, (bound, _))| *bound)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn metrics(fast: u64, slow: u64, sum: f64) -> String {
        let count = fast + slow;
        format!(
            "# TYPE {NAME} histogram\n{NAME}_bucket{{le=\"0.001\"}} {fast}\n\
             {NAME}_bucket{{le=\"0.016\"}} {count}\n{NAME}_bucket{{le=\"+Inf\"}} {count}\n\
             {NAME}_sum {sum}\n{NAME}_count {count}\nother 7\n"
        )
    }

    #[test]
    fn times_follow_the_counters() {
        let mut fsync = Fsync::default();
        assert_eq!(fsync.take("nothing"), FsyncTimes::default());
        let times = fsync.take(&metrics(99, 1, 0.1));
        assert_eq!(times.p99_seconds, Some(0.001));
        assert!((times.last_seconds.expect("some") - 0.001).abs() < 1e-9);
        let times = fsync.take(&metrics(99, 11, 0.2));
        assert_eq!(times.p99_seconds, Some(0.016));
        assert!((times.last_seconds.expect("some") - 0.01).abs() < 1e-9);
        // Nothing new: the last values stay. A restart: counting begins again.
        assert_eq!(fsync.take(&metrics(99, 11, 0.2)), times);
        assert_eq!(fsync.take(&metrics(1, 0, 0.001)).p99_seconds, Some(0.001));
    }
}
