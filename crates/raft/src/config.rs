//! What a member must be told before it starts, and the checks that need no disk. The flags that
//! describe a first start are ignored once the data directory holds a member, as in etcd.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use kelson_storage::Identity;
use kelson_storage::log::{Disk, Done, Log};
use kelson_storage::sabotage::{self, Variant};
use openraft::{Config, SnapshotPolicy};

use crate::error::StartError;
use crate::identity::{bootstrap_member_id, cluster_id};
use crate::peers::{PeerConnector, plain_connector};
use crate::types::Peer;

/// Wraps what is called when an operation of the log is on disk; it is asked when the operation is, in
/// the same order. A simulation lets it come at a moment that it chose.
pub type Landing = Arc<dyn Fn(&Log, Done) -> Done + Send + Sync>;

/// A machine for a member whose time is simulated.
#[derive(Clone)]
pub struct Simulated {
    /// Where the log lies.
    pub disk: Arc<dyn Disk>,
    /// When its disk answers.
    pub landing: Landing,
}

/// Settings of a member. Names follow etcd's flags.
#[derive(Clone)]
pub struct NodeConfig {
    /// `--name`.
    pub name: String,
    /// `--data-dir`; everything is kept below its `member` folder.
    pub data_dir: PathBuf,
    /// `--initial-cluster`: name and peer URLs of each first member.
    pub initial_cluster: Vec<(String, Vec<String>)>,
    /// `--initial-cluster-token`.
    pub initial_cluster_token: String,
    /// `--initial-advertise-peer-urls`.
    pub advertise_peer_urls: Vec<String>,
    /// `--initial-cluster-state=existing`.
    pub initial_state_existing: bool,
    /// `--heartbeat-interval`.
    pub heartbeat: Duration,
    /// `--election-timeout`.
    pub election: Duration,
    /// `--unsafe-no-fsync`: the log is written but not synced.
    pub unsafe_no_fsync: bool,
    /// `--max-request-bytes`: largest encoded command.
    pub max_request_bytes: usize,
    /// `--experimental-snapshot-catchup-entries`: log entries kept for members that were away.
    pub snapshot_catchup_entries: u64,
    /// `--force-new-cluster`: the data directory becomes a cluster of this member alone.
    pub force_new_cluster: bool,
    /// `--max-learners`: learners that a cluster may have at once, as this member counts when it leads.
    pub learners_max: usize,
    /// Length of a segment of the log. Unit: bytes; a multiple of 4096 from 16 KiB to 1 GiB.
    pub log_segment_bytes: u64,
    /// `--wal-dir`: where an etcd that ran on this data directory kept its log, if elsewhere.
    pub etcd_wal_dir: Option<PathBuf>,
    /// How connections to other members are made.
    pub connect: PeerConnector,
    /// What a simulation puts in the place of the machine; nothing else sets it.
    pub simulated: Option<Simulated>,
    /// Settings of the store: checkpoints, compaction, memory. Its `data_dir` is replaced by the
    /// one above.
    pub storage: kelson_storage::Options,
}

impl NodeConfig {
    /// The settings of an etcd without flags, for the given directory.
    pub fn with_defaults(data_dir: impl Into<PathBuf>) -> NodeConfig {
        let data_dir = data_dir.into();
        let urls = vec!["http://localhost:2380".to_owned()];
        NodeConfig {
            name: "default".to_owned(),
            storage: kelson_storage::Options::new(data_dir.clone()),
            data_dir,
            initial_cluster: vec![("default".to_owned(), urls.clone())],
            initial_cluster_token: "etcd-cluster".to_owned(),
            advertise_peer_urls: urls,
            initial_state_existing: false,
            heartbeat: Duration::from_millis(100),
            election: Duration::from_secs(1),
            unsafe_no_fsync: false,
            max_request_bytes: 1_572_864,
            snapshot_catchup_entries: 5_000,
            force_new_cluster: false,
            learners_max: 1,
            log_segment_bytes: 64 << 20,
            simulated: None,
            etcd_wal_dir: None,
            connect: plain_connector(),
        }
    }

    /// How long a request waits for consensus. Source: etcd's request timeout.
    pub fn request_timeout(&self) -> Duration {
        Duration::from_secs(5) + 2 * self.election
    }

    /// Ids and first members of a cluster that starts with these flags. Every first member computes
    /// the same.
    pub(crate) fn bootstrap(&self) -> Result<(Identity, BTreeMap<u64, Peer>), StartError> {
        let own = self.own_urls()?;
        let mut members = BTreeMap::new();
        for (name, urls) in &self.initial_cluster {
            let id = bootstrap_member_id(urls, &self.initial_cluster_token);
            let peer = Peer { name: name.clone(), peer_urls: urls.clone() };
            if members.insert(id, peer).is_some() {
                return Err(StartError::SameUrls(name.clone()));
            }
        }
        let ids: Vec<u64> = members.keys().copied().collect();
        let member_id = bootstrap_member_id(own, &self.initial_cluster_token);
        Ok((Identity { cluster_id: cluster_id(&ids), member_id }, members))
    }

    /// The URLs that `--initial-cluster` has for this member; they must be the advertised ones.
    pub(crate) fn own_urls(&self) -> Result<&[String], StartError> {
        let own = self.initial_cluster.iter().find(|(name, _)| *name == self.name);
        let Some((name, urls)) = own else {
            return Err(StartError::NotInInitialCluster(self.name.clone()));
        };
        let (listed, advertised) = (sorted(urls), sorted(&self.advertise_peer_urls));
        if listed != advertised {
            return Err(StartError::PeerUrlsDiffer { name: name.clone(), listed, advertised });
        }
        Ok(urls)
    }

    /// openraft's settings; what differs from its defaults, and why.
    pub(crate) fn consensus(&self) -> Result<Config, StartError> {
        let slowness = if sabotage::is(Variant::SlowElection) { 12 } else { 1 };
        let election = self.election.as_millis() as u64 * slowness;
        let config = Config {
            cluster_name: self.initial_cluster_token.clone(),
            heartbeat_interval: self.heartbeat.as_millis() as u64,
            // A follower waits for the upper bound, which is the leader's lease, and then for a time
            // between the two: together 1 to 1.5 times the flag, where etcd waits 1 to 2 times.
            election_timeout_min: election / 4,
            election_timeout_max: election * 3 / 4,
            enable_pre_vote: Some(true),
            // A restarted leader asks again: its state may be behind what it had committed.
            enable_leader_restore: Some(false),
            allow_log_reversion: Some(false),
            snapshot_policy: SnapshotPolicy::Never,
            // Only `purge` cuts the log.
            max_in_snapshot_log_to_keep: u64::MAX,
            max_payload_entries: 4096,
            ..Config::default()
        };
        config.validate().map_err(|e| StartError::Settings(e.to_string()))
    }
}

pub(crate) fn sorted(urls: &[String]) -> Vec<String> {
    let mut urls = urls.to_vec();
    urls.sort_unstable();
    urls
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_of_a_first_start_are_checked() {
        let good = NodeConfig::with_defaults("unused");
        let (identity, members) = good.bootstrap().expect("the defaults fit");
        assert_eq!(identity.member_id, 0x8e9e_05c5_2164_694d);
        assert_eq!(members.keys().copied().collect::<Vec<_>>(), [identity.member_id]);

        let mut several = good.clone();
        several.initial_cluster.push(("other".into(), vec!["http://other:2380".into()]));
        let (identity, members) = several.bootstrap().expect("two members");
        assert_eq!(members.len(), 2);
        assert_eq!(members[&identity.member_id].name, "default");
        several.initial_cluster.push(("third".into(), vec!["http://other:2380".into()]));
        assert!(matches!(several.bootstrap(), Err(StartError::SameUrls(_))));

        let stranger = NodeConfig { name: "stranger".into(), ..good.clone() };
        assert!(matches!(stranger.bootstrap(), Err(StartError::NotInInitialCluster(_))));
        let elsewhere =
            NodeConfig { advertise_peer_urls: vec!["http://elsewhere:1".into()], ..good };
        assert!(matches!(elsewhere.bootstrap(), Err(StartError::PeerUrlsDiffer { .. })));
    }

    #[test]
    fn consensus_settings_are_valid_for_etcds_range() {
        for (heartbeat, election) in [(100, 1000), (10, 50), (500, 5000)] {
            let config = NodeConfig {
                heartbeat: Duration::from_millis(heartbeat),
                election: Duration::from_millis(election),
                ..NodeConfig::with_defaults("unused")
            };
            config.consensus().expect("etcd takes these");
        }
    }
}
