//! Counters of the watch machinery, kept with plain atomics so that the hot path pays little. They
//! never decide anything; the metrics page reads them.

use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};

/// What the metrics page shows about watches. Gauges are signed, for they are moved by differences
/// from several tasks and may be read between two halves of a move.
#[derive(Debug, Default)]
pub struct WatchStats {
    streams: AtomicI64,
    watchers: AtomicI64,
    slow_watchers: AtomicI64,
    pending_events: AtomicI64,
    events_sent: AtomicU64,
    streams_overflowed: AtomicU64,
}

impl WatchStats {
    /// Open watch streams (`etcd_debugging_mvcc_watch_stream_total`).
    pub fn streams(&self) -> i64 {
        self.streams.load(Ordering::Relaxed)
    }

    /// Watchers of all streams (`etcd_debugging_mvcc_watcher_total`).
    pub fn watchers(&self) -> i64 {
        self.watchers.load(Ordering::Relaxed)
    }

    /// Watchers that read history because they are behind (`etcd_debugging_mvcc_slow_watcher_total`).
    pub fn slow_watchers(&self) -> i64 {
        self.slow_watchers.load(Ordering::Relaxed)
    }

    /// Events in the queues of streams (`etcd_debugging_mvcc_pending_events_total`).
    pub fn pending_events(&self) -> i64 {
        self.pending_events.load(Ordering::Relaxed)
    }

    /// Events handed to clients, once per watcher (`etcd_debugging_mvcc_events_total`).
    pub fn events_sent(&self) -> u64 {
        self.events_sent.load(Ordering::Relaxed)
    }

    /// How often a stream left the hub because its queue was full.
    pub fn streams_overflowed(&self) -> u64 {
        self.streams_overflowed.load(Ordering::Relaxed)
    }

    pub(super) fn move_streams(&self, by: i64) {
        self.streams.fetch_add(by, Ordering::Relaxed);
    }

    pub(super) fn move_watchers(&self, by: i64) {
        self.watchers.fetch_add(by, Ordering::Relaxed);
    }

    pub(super) fn move_slow_watchers(&self, by: i64) {
        self.slow_watchers.fetch_add(by, Ordering::Relaxed);
    }

    pub(super) fn move_pending_events(&self, by: i64) {
        self.pending_events.fetch_add(by, Ordering::Relaxed);
    }

    pub(super) fn count_events_sent(&self, count: u64) {
        self.events_sent.fetch_add(count, Ordering::Relaxed);
    }

    pub(super) fn count_overflow(&self) {
        self.streams_overflowed.fetch_add(1, Ordering::Relaxed);
    }
}
