//! Counters of the log for the metrics page. They never influence what the log does.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::times::Times;

/// Number of finite buckets: 1 ms, 2 ms, ... 8.192 s, the bounds of etcd's
/// `etcd_disk_wal_fsync_duration_seconds`.
pub const FSYNC_BUCKETS: usize = 14;

/// Upper bound of a finite fsync bucket. Unit: seconds.
pub fn fsync_bucket_bound(bucket: usize) -> f64 {
    0.001 * f64::from(1u32 << bucket.min(FSYNC_BUCKETS - 1))
}

/// What the log has done since it was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LogStats {
    /// Finished fdatasync calls of the writer.
    pub fsyncs: u64,
    /// Time spent in them. Unit: seconds.
    pub fsync_seconds: f64,
    /// Calls per bucket (not cumulative); the last one is for all slower than 8.192 s.
    pub fsync_buckets: [u64; FSYNC_BUCKETS + 1],
    /// Bytes of records written, headers and padding included.
    pub bytes_written: u64,
    /// Records written.
    pub records: u64,
    /// Segments begun.
    pub segments: u64,
}

#[derive(Default)]
pub(super) struct Counters {
    fsync_nanos: AtomicU64,
    fsync_buckets: [AtomicU64; FSYNC_BUCKETS + 1],
    bytes_written: AtomicU64,
    records: AtomicU64,
    segments: AtomicU64,
    pub(super) writes: WriteTimes,
}

/// Time of the write calls, without the syncs.
pub(super) struct WriteTimes(pub(super) Times<FSYNC_BUCKETS>);

impl Default for WriteTimes {
    fn default() -> Self {
        Self(Times::new(Duration::from_millis(1)))
    }
}

impl Counters {
    pub(super) fn fsync(&self, took: Duration) {
        let nanos = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        self.fsync_nanos.fetch_add(nanos, Ordering::Relaxed);
        let seconds = took.as_secs_f64();
        let bucket = (0..FSYNC_BUCKETS).find(|&bucket| seconds <= fsync_bucket_bound(bucket));
        self.fsync_buckets[bucket.unwrap_or(FSYNC_BUCKETS)].fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn wrote(&self, records: u64, bytes: usize) {
        self.records.fetch_add(records, Ordering::Relaxed);
        self.bytes_written.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub(super) fn segment(&self) {
        self.segments.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn read(&self) -> LogStats {
        let mut fsync_buckets = [0; FSYNC_BUCKETS + 1];
        for (to, from) in fsync_buckets.iter_mut().zip(&self.fsync_buckets) {
            *to = from.load(Ordering::Relaxed);
        }
        LogStats {
            fsyncs: fsync_buckets.iter().sum(),
            fsync_seconds: self.fsync_nanos.load(Ordering::Relaxed) as f64 / 1e9,
            fsync_buckets,
            bytes_written: self.bytes_written.load(Ordering::Relaxed),
            records: self.records.load(Ordering::Relaxed),
            segments: self.segments.load(Ordering::Relaxed),
        }
    }
}
