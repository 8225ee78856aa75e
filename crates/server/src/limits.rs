//! What a request may cost: the numbers that services check before they ask for agreement. Made
//! once from the flags and shared read-only; it never changes while the process runs and it
//! knows nothing of connections (see `listen`) or of queues inside raft.

use std::time::Duration;

/// Bytes a gRPC message may exceed [`Limits::max_request_bytes`] by, before the transport refuses
/// it: the envelope around a request. Source: etcd's `grpcOverheadBytes`.
pub const GRPC_OVERHEAD_BYTES: usize = 512 * 1024;

/// The quota in effect when `--quota-backend-bytes` is 0 or absent.
pub const DEFAULT_QUOTA_BYTES: i64 = 2 * 1024 * 1024 * 1024;

/// The shortest [`Limits::progress_notify_interval`]; a shorter setting is raised to it, as etcd does.
pub const PROGRESS_NOTIFY_MIN: Duration = Duration::from_millis(100);

/// Limits of requests, from the flags of the same names.
#[derive(Clone, Debug, PartialEq)]
pub struct Limits {
    /// Largest agreed command in bytes; one more answers `request is too large`.
    pub max_request_bytes: usize,
    /// Largest number of operations on either branch of a transaction (nested ones count too).
    pub max_txn_ops: usize,
    /// Physical size at which writes answer `database space exceeded`; 0 or less means no quota.
    /// Unit: bytes. Already resolved: the flag's 0 has become [`DEFAULT_QUOTA_BYTES`].
    pub quota_backend_bytes: i64,
    /// How long one proposal or linearizable read may take before `request timed out`.
    pub request_timeout: Duration,
    /// Time between two heartbeats of the leader.
    pub heartbeat: Duration,
    /// Time without a leader before an election; streams that require a leader end after three.
    pub election_timeout: Duration,
    /// Shortest lease that is granted; shorter ones are raised to it. Unit: seconds.
    pub min_lease_ttl: i64,
    /// How often an idle watcher with `progress_notify` hears the store revision.
    pub progress_notify_interval: Duration,
    /// HTTP/2 streams one connection may have open.
    pub max_concurrent_streams: u32,
    /// Learners a cluster may have at once; one more answers `too many learner members`.
    pub max_learners: usize,
    /// Refuse member changes that could lose the quorum of started members.
    pub strict_reconfig_check: bool,
    /// Requests slower than this are logged as `apply request took too long`.
    pub warning_apply_duration: Duration,
    /// Unary requests slower than this are logged as `request stats`.
    pub warning_unary_request_duration: Duration,
    /// Answer from a cached view that this member is leader when renewing leases (3.7 gate).
    pub fast_lease_keep_alive: bool,
    /// Drop long leases' remaining time into the log now and then (gate LeaseCheckpoint).
    pub lease_checkpoint: bool,
    /// What housekeeping should keep of history.
    pub auto_compaction: AutoCompaction,
    /// Logarithm of the rounds of a password's hash, 4 to 31.
    pub bcrypt_cost: u32,
    /// Keys one physical compaction step may remove.
    pub compaction_batch_limit: usize,
    /// Pause between two physical compaction steps.
    pub compaction_sleep_interval: Duration,
}

/// The rule of `--auto-compaction-mode` and `--auto-compaction-retention`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AutoCompaction {
    /// Retention 0: history stays until a client compacts.
    Off,
    /// Keep what is younger than this.
    Periodic(Duration),
    /// Keep this many revisions.
    Revision(i64),
}

impl Limits {
    /// Largest gRPC message that is decoded at all; one byte more is the transport's
    /// `ResourceExhausted`. Unit: bytes.
    #[must_use]
    pub fn max_decoding_bytes(&self) -> usize {
        self.max_request_bytes.saturating_add(GRPC_OVERHEAD_BYTES)
    }
}

impl Default for Limits {
    /// The values that a start without any flag gives.
    fn default() -> Self {
        Self {
            max_request_bytes: 1_572_864,
            max_txn_ops: 128,
            quota_backend_bytes: DEFAULT_QUOTA_BYTES,
            request_timeout: request_timeout(Duration::from_millis(1000)),
            heartbeat: Duration::from_millis(100),
            election_timeout: Duration::from_millis(1000),
            min_lease_ttl: min_lease_ttl(Duration::from_millis(100), Duration::from_millis(1000)),
            progress_notify_interval: Duration::from_secs(600),
            max_concurrent_streams: u32::MAX,
            max_learners: 1,
            strict_reconfig_check: true,
            warning_apply_duration: Duration::from_millis(100),
            warning_unary_request_duration: Duration::from_millis(300),
            fast_lease_keep_alive: true,
            lease_checkpoint: false,
            auto_compaction: AutoCompaction::Off,
            bcrypt_cost: 10,
            compaction_batch_limit: 1000,
            compaction_sleep_interval: Duration::from_millis(10),
        }
    }
}

/// Five seconds for queue, disk and apply, plus two election timeouts for a leader change.
#[must_use]
pub fn request_timeout(election: Duration) -> Duration {
    Duration::from_secs(5) + 2 * election
}

/// One and a half election timeouts (counted in whole heartbeats), in seconds, rounded up: a
/// shorter lease could end before a new leader was able to renew it.
#[must_use]
pub fn min_lease_ttl(heartbeat: Duration, election: Duration) -> i64 {
    let heartbeat_ms = heartbeat.as_millis().max(1);
    let ticks = election.as_millis() / heartbeat_ms;
    let ttl_ms = (3 * ticks / 2) * heartbeat_ms;
    i64::try_from(ttl_ms.div_ceil(1000)).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn derived_times_match_etcd_at_its_defaults() {
        let limits = Limits::default();
        assert_eq!(limits.request_timeout, Duration::from_secs(7));
        assert_eq!(limits.min_lease_ttl, 2);
        assert_eq!(limits.max_decoding_bytes(), 2_097_152);
    }

    #[test]
    fn slow_elections_raise_the_shortest_lease() {
        assert_eq!(min_lease_ttl(Duration::from_millis(500), Duration::from_millis(5000)), 8);
    }
}
