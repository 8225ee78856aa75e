//! Checked settings turned into what the rooms to the right and the other files of this crate
//! take: request limits, the member's own configuration. It decides nothing.

use std::path::Path;
use std::time::Duration;

use super::url::same_endpoints;
use super::{Config, check};
use crate::limits::{self, AutoCompaction, DEFAULT_QUOTA_BYTES, Limits};

/// Reads `name=url,name=url`, keeping names in the order of their first use; a name may repeat.
///
/// # Errors
/// A part without a name, a URL that does not parse, or one URL of two names.
pub fn parse_members(text: &str) -> Result<Vec<(String, Vec<String>)>, String> {
    let texts = |urls: Vec<super::Url>| urls.iter().map(ToString::to_string).collect();
    let members = check::parse_cluster(text)?;
    Ok(members.into_iter().map(|(name, urls)| (name, texts(urls))).collect())
}

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
        parse_members(&self.initial_cluster)
    }

    /// Whether the data directory holds a member, whose cluster is then known.
    #[must_use]
    pub fn has_data(&self) -> bool {
        let member = Path::new(&self.data_dir).join("member");
        match std::fs::read_to_string(member.join("identity")) {
            // A first start that failed leaves a directory that belongs to no cluster yet.
            Ok(identity) => identity.lines().any(|line| line.starts_with("cluster ")),
            Err(_) => member.exists(),
        }
    }

    /// The peer URLs by which a list of members knows this one, if they are the advertised ones;
    /// host names are resolved when the texts differ.
    ///
    /// # Errors
    /// The text of etcd when they are not the same, or this member is not in the list.
    pub fn own_peer_urls(&self, members: &[(String, Vec<String>)]) -> Result<Vec<String>, String> {
        let name = &self.name;
        let own = members.iter().find(|(member, _)| member == name).map(|(_, urls)| urls);
        let own = own.ok_or_else(|| {
            format!("couldn't find local name \"{name}\" in the initial cluster configuration")
        })?;
        let parsed = own.iter().map(|url| super::Url::parse(url)).collect::<Result<Vec<_>, _>>()?;
        let advertised = &self.initial_advertise_peer_urls;
        if same_endpoints(&parsed, advertised) {
            return Ok(own.clone());
        }
        let show = |urls: &[super::Url]| {
            let texts: Vec<String> = urls.iter().map(|url| format!("{name}={url}")).collect();
            texts.join(",")
        };
        Err(format!(
            "--initial-cluster has {} but --initial-advertise-peer-urls has {}",
            show(&parsed),
            show(advertised),
        ))
    }

    /// The limits of requests.
    #[must_use]
    pub fn limits(&self) -> Limits {
        let or = |value: Duration, default| if value.is_zero() { default } else { value };
        let (heartbeat, election) = (self.heartbeat(), self.election());
        Limits {
            max_request_bytes: self.max_request_bytes,
            max_txn_ops: self.max_txn_ops,
            bcrypt_cost: self.bcrypt_cost,
            quota_backend_bytes: match self.quota_backend_bytes {
                0 => DEFAULT_QUOTA_BYTES,
                bytes => bytes,
            },
            request_timeout: limits::request_timeout(election),
            heartbeat,
            election_timeout: election,
            min_lease_ttl: limits::min_lease_ttl(heartbeat, election),
            progress_notify_interval: or(
                self.watch_progress_notify_interval,
                Duration::from_secs(600),
            )
            .max(limits::PROGRESS_NOTIFY_MIN),
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
