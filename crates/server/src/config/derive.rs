//! Checked settings turned into what the rooms to the right and the other files of this crate
//! take: request limits, the member's own configuration. It decides nothing.

use std::time::Duration;

use super::{Config, check};
use crate::limits::{self, AutoCompaction, DEFAULT_QUOTA_BYTES, Limits};

impl Config {
    /// Time between heartbeats.
    #[must_use]
    pub fn heartbeat(&self) -> Duration {
        Duration::from_millis(self.heartbeat_interval_ms)
    }

    /// Time without a leader before an election.
    #[must_use]
    pub fn election(&self) -> Duration {
        Duration::from_millis(self.election_timeout_ms)
    }

    /// The members of a new cluster with their peer URLs, in the order they were given.
    ///
    /// # Errors
    /// As [`super::load`] has checked the text, none after it.
    pub fn cluster_members(&self) -> Result<Vec<(String, Vec<String>)>, String> {
        let members = check::parse_cluster(&self.initial_cluster)?;
        let texts = |urls: Vec<super::Url>| urls.iter().map(ToString::to_string).collect();
        Ok(members.into_iter().map(|(name, urls)| (name, texts(urls))).collect())
    }

    /// The limits of requests.
    #[must_use]
    pub fn limits(&self) -> Limits {
        let or = |value: Duration, default| if value.is_zero() { default } else { value };
        let (heartbeat, election) = (self.heartbeat(), self.election());
        Limits {
            max_request_bytes: self.max_request_bytes,
            max_txn_ops: self.max_txn_ops,
            quota_backend_bytes: match self.quota_backend_bytes {
                0 => DEFAULT_QUOTA_BYTES,
                bytes => bytes,
            },
            request_timeout: limits::request_timeout(election),
            election_timeout: election,
            min_lease_ttl: limits::min_lease_ttl(heartbeat, election),
            progress_notify_interval: or(
                self.watch_progress_notify_interval,
                Duration::from_secs(600),
            ),
            max_concurrent_streams: self.max_concurrent_streams,
            max_learners: self.max_learners,
            strict_reconfig_check: self.strict_reconfig_check,
            warning_apply_duration: self.warning_apply_duration,
            warning_unary_request_duration: self.warning_unary_request_duration,
            fast_lease_keep_alive: self.feature_gates.enabled("FastLeaseKeepAlive"),
            lease_checkpoint: self.feature_gates.enabled("LeaseCheckpoint"),
            auto_compaction: check::auto_compaction(self).unwrap_or(AutoCompaction::Off),
            compaction_batch_limit: match self.compaction_batch_limit {
                0 => 1000,
                limit => limit,
            },
            compaction_sleep_interval: or(
                self.compaction_sleep_interval,
                Duration::from_millis(10),
            ),
        }
    }
}
