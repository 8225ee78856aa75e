//! How fast a snapshot is sent: as fast as the sender's own log does not feel it, and the sender's
//! processors have time; and how fast it is read back where it is received. Only arithmetic on what
//! the log counts and how late the sending thread wakes up; it reads no clock and sleeps nowhere.

use std::time::{Duration, Instant};

use kelson_storage::log::LogStats;

/// Speed at first, and bounds. Unit: bytes per second.
const FIRST: u64 = 4 << 20;
const SLOWEST: u64 = 2 << 20;
const FASTEST: u64 = 64 << 20;
/// How often it looks at the log.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// What every such time without trouble adds, as long as trouble is far ...
const STEP: u64 = 128 << 10;
/// ... and near the speed at which it last came: it must be rare, for it is what clients feel.
const SMALL_STEP: u64 = 8 << 10;
/// What is read back at once, and how fast. Reading without a pause takes all processors of a small
/// machine. Unit: bytes, bytes per second.
const BACK_STEP: u64 = 256 << 10;
const BACK_RATE: u64 = 64 << 20;
/// The log feels it if its syncs take so many times as long as usual ...
const SLOW_FACTOR: f64 = 1.5;
/// ... and at least this much longer: less is noise. Unit: seconds.
const SLOW_LEAST: f64 = 0.001;
/// The processors are too busy if a thread that slept wakes up so much too late.
const LATE: Duration = Duration::from_millis(8);

/// Syncs of the log so far.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Fsyncs {
    pub(crate) count: u64,
    pub(crate) seconds: f64,
}

impl Fsyncs {
    pub(crate) fn of(stats: &LogStats) -> Self {
        Self { count: stats.fsyncs, seconds: stats.fsync_seconds }
    }

    /// Mean time of a sync since an earlier look; `None` if there was none.
    fn mean_since(self, earlier: Self) -> Option<f64> {
        let count = self.count.checked_sub(earlier.count).filter(|count| *count > 0)?;
        Some((self.seconds - earlier.seconds) / count as f64)
    }
}

/// The pace of one snapshot.
#[derive(Debug)]
pub(crate) struct Throttle {
    /// Bytes per second.
    rate: u64,
    /// The rate when trouble came last.
    too_fast: u64,
    /// When the next bytes may go.
    due: Instant,
    looked: Instant,
    seen: Fsyncs,
    /// By how much the sender woke up too late since the last look, at most.
    late: Duration,
    /// Mean time of a sync before the snapshot. Unit: seconds.
    usual: f64,
}

impl Throttle {
    pub(crate) fn begin(seen: Fsyncs, now: Instant) -> Self {
        let usual = seen.mean_since(Fsyncs::default()).unwrap_or(0.0);
        Self {
            rate: FIRST,
            too_fast: u64::MAX,
            due: now,
            looked: now,
            seen,
            late: Duration::ZERO,
            usual,
        }
    }

    /// The sender slept, and for so much longer than it was told.
    pub(crate) fn overslept(&mut self, late: Duration) {
        self.late = self.late.max(late);
    }

    /// So many bytes were sent; returns how long to wait before the next.
    pub(crate) fn sent(
        &mut self,
        bytes: u64,
        fsyncs: impl FnOnce() -> Fsyncs,
        now: Instant,
    ) -> Duration {
        let unseen = now.duration_since(self.looked);
        if unseen >= LOOK_EVERY {
            let seen = fsyncs();
            // Nothing synced: nobody writes, or a sync takes long and shows in one of the next looks.
            let mean = seen.mean_since(self.seen).unwrap_or(0.0);
            let is_slow =
                mean > (self.usual * SLOW_FACTOR).max(self.usual + SLOW_LEAST) || self.late > LATE;
            if is_slow {
                self.too_fast = self.rate;
                self.rate /= 2;
            } else {
                let is_far = self.rate < self.too_fast / 4 * 3;
                let step = if is_far { STEP } else { SMALL_STEP };
                self.rate += step * (unseen.as_millis() / LOOK_EVERY.as_millis()) as u64;
            }
            self.rate = self.rate.clamp(SLOWEST, FASTEST);
            (self.looked, self.seen, self.late) = (now, seen, Duration::ZERO);
        }
        // Time that was not used is not made up for: a burst is what clients feel.
        let took = Duration::from_micros(bytes.saturating_mul(1_000_000) / self.rate);
        self.due = self.due.max(now) + took;
        self.due.duration_since(now)
    }
}

/// The pace at which a received snapshot is read back.
#[derive(Debug)]
pub(crate) struct Steady {
    due: Instant,
    bytes: u64,
}

impl Steady {
    pub(crate) fn begin(now: Instant) -> Self {
        Self { due: now, bytes: 0 }
    }

    /// So many bytes were read; returns how long to wait before the next.
    pub(crate) fn took(&mut self, bytes: u64, now: Instant) -> Duration {
        self.bytes += bytes;
        if self.bytes < BACK_STEP {
            return Duration::ZERO;
        }
        // Time that was not used is not made up for.
        self.due = self.due.max(now) + Duration::from_micros(self.bytes * 1_000_000 / BACK_RATE);
        self.bytes = 0;
        self.due.duration_since(now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHUNK: u64 = 1 << 20;

    /// Sends for some seconds while every sync takes `seconds`; returns bytes per second of the last.
    fn speed(throttle: &mut Throttle, now: &mut Instant, log: &mut Fsyncs, seconds: f64) -> u64 {
        let end = *now + Duration::from_secs(60);
        let mut last = 0;
        while *now < end {
            let wait = throttle.sent(CHUNK, || *log, *now);
            *now += wait;
            log.count += 10;
            log.seconds += 10.0 * seconds;
            last = (CHUNK as f64 / wait.as_secs_f64()) as u64;
        }
        last
    }

    #[test]
    fn it_gives_way_and_comes_back() {
        let mut now = Instant::now();
        let mut log = Fsyncs { count: 1000, seconds: 1.0 };
        let mut throttle = Throttle::begin(log, now);
        let quiet = speed(&mut throttle, &mut now, &mut log, 0.001);
        assert!(quiet > FASTEST * 9 / 10, "{quiet}");
        let disturbed = speed(&mut throttle, &mut now, &mut log, 0.010);
        assert!(disturbed < SLOWEST * 11 / 10, "{disturbed}");
        let careful = speed(&mut throttle, &mut now, &mut log, 0.001);
        assert!(careful > SLOWEST * 2 && careful < FASTEST / 4, "{careful}");
        for _ in 0..50 {
            throttle.overslept(LATE * 2);
            now += throttle.sent(CHUNK, || log, now);
        }
        assert!(throttle.rate < SLOWEST * 2, "{}", throttle.rate);
    }

    #[test]
    fn it_comes_back_soon_but_not_to_where_it_was_too_fast() {
        let mut now = Instant::now();
        let mut throttle = Throttle::begin(Fsyncs::default(), now);
        while throttle.rate < 16 << 20 {
            now += throttle.sent(CHUNK, Fsyncs::default, now);
        }
        throttle.overslept(LATE * 2);
        while throttle.rate >= 16 << 20 {
            now += throttle.sent(CHUNK, Fsyncs::default, now);
        }
        let begun = now;
        let mut near = None;
        while throttle.rate < 16 << 20 {
            now += throttle.sent(CHUNK, Fsyncs::default, now);
            if throttle.rate >= 12 << 20 {
                near.get_or_insert(now);
            }
        }
        let near = near.expect("it passed there").duration_since(begun);
        assert!(near < Duration::from_secs(5), "{near:?}");
        let back = now.duration_since(begun);
        assert!(back > Duration::from_secs(40), "{back:?}");
    }

    #[test]
    fn reading_back_keeps_its_pace() {
        let mut now = Instant::now();
        let begun = now;
        let mut steady = Steady::begin(now);
        for _ in 0..64 << 10 {
            // It takes some of the time itself.
            now += Duration::from_micros(2);
            now += steady.took(4 << 10, now);
        }
        let took = now.duration_since(begun).as_secs_f64();
        assert!((4.0..4.5).contains(&took), "{took}");
        now += Duration::from_secs(9);
        assert!(steady.took(BACK_STEP, now) > Duration::ZERO, "nothing is made up for");
    }

    #[test]
    fn a_log_without_syncs_stops_nothing() {
        let mut now = Instant::now();
        let mut throttle = Throttle::begin(Fsyncs::default(), now);
        for _ in 0..4000 {
            now += throttle.sent(CHUNK, Fsyncs::default, now);
        }
        assert_eq!(throttle.rate, FASTEST);
        // An overdue chunk goes at once, and no more than one.
        now += Duration::from_secs(9);
        assert!(throttle.sent(CHUNK, Fsyncs::default, now) > Duration::ZERO);
    }
}
