//! Decides the cluster version: the smallest minor version among the members, published by the
//! leader through the log. It only ever goes up, and no API of this program depends on it; tools
//! and other members read it.

use std::time::Duration;

use kelson_api::command::ClusterVersionSet;
use kelson_api::command::command::Op;
use kelson_raft::Node;
use kelson_storage::Reader;

use crate::version::ETCD_CLUSTER_VERSION;

/// How often the leader looks again.
const INTERVAL: Duration = Duration::from_secs(4);

/// A version `major.minor.patch`, ordered as numbers.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Version {
    /// Major number.
    pub major: u64,
    /// Minor number.
    pub minor: u64,
}

impl Version {
    /// Reads `3.7`, `3.7.1` or `3.7.1-rc.0`; the patch number is checked and dropped.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let release = text.split(['-', '+']).next()?;
        let mut numbers = release.split('.').map(|part| part.parse::<u64>().ok());
        let version = Self { major: numbers.next()??, minor: numbers.next()?? };
        match (numbers.next(), numbers.next()) {
            (None | Some(Some(_)), None) => Some(version),
            _ => None,
        }
    }
}

/// Publishes the cluster version whenever this member leads and the stored one is missing or older.
pub(super) async fn run(node: Node, reader: Reader) {
    let mut roles = node.watch_status();
    loop {
        if roles.borrow_and_update().is_leader && needs_update(reader.cluster_version().as_deref())
        {
            let version = ETCD_CLUSTER_VERSION.to_owned();
            match node.propose(Op::ClusterVersionSet(ClusterVersionSet { version })).await {
                Ok(_) => tracing::info!(version = ETCD_CLUSTER_VERSION, "set cluster version"),
                Err(error) => tracing::debug!(%error, "the cluster version is not set yet"),
            }
        }
        tokio::select! {
            () = tokio::time::sleep(INTERVAL) => {}
            changed = roles.changed() => if changed.is_err() { return },
        }
    }
}

fn needs_update(stored: Option<&str>) -> bool {
    let ours = Version::parse(ETCD_CLUSTER_VERSION);
    stored.and_then(Version::parse) < ours
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_as_numbers() {
        let version = |major, minor| Some(Version { major, minor });
        for (text, expected) in [
            ("3.6", version(3, 6)),
            ("3.10.2", version(3, 10)),
            ("3.7.0-rc.1", version(3, 7)),
            ("3", None),
            ("3.x", None),
            ("3.6.1.2", None),
            ("v3.6", None),
            ("", None),
        ] {
            assert_eq!(Version::parse(text), expected, "{text}");
        }
        assert!(Version::parse("3.10") > Version::parse("3.9"));
    }

    #[test]
    fn a_stored_version_is_only_raised() {
        assert!(needs_update(None));
        assert!(needs_update(Some("3.5.0")));
        assert!(!needs_update(Some(ETCD_CLUSTER_VERSION)));
        assert!(!needs_update(Some("9.0.0")));
    }
}
