//! Decides the cluster version: the smallest minor version among the members, published by the
//! leader through the log. It only ever goes up, and no API of this program depends on it; tools
//! and other members read it.

use std::time::Duration;

use crate::app::App;
use crate::version::ETCD_CLUSTER_VERSION;
use kelson_api::command::ClusterVersionSet;
use kelson_api::command::command::Op;

/// How often the leader looks again.
const INTERVAL: Duration = Duration::from_secs(4);

/// How often it looks while there is no version yet.
const FIRST_INTERVAL: Duration = Duration::from_secs(1);

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
pub(super) async fn run(app: App) {
    let mut roles = app.node.watch_status();
    loop {
        // The guard on the status must not be held across the proposal.
        let is_leader = roles.borrow_and_update().is_leader;
        if is_leader {
            raise(&app).await;
        }
        let undecided = app.reader.cluster_version().is_none();
        let pause = if undecided { FIRST_INTERVAL } else { INTERVAL };
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            changed = roles.changed() => if changed.is_err() { return },
        }
    }
}

async fn raise(app: &App) {
    let own = app.node.status().member_id;
    let members = app.reader.members();
    let versions = members.iter().map(|member| match member.id {
        id if id == own => Version::parse(ETCD_CLUSTER_VERSION),
        id => app.probes.version(id).as_deref().and_then(Version::parse),
    });
    let stored = app.reader.cluster_version().as_deref().and_then(Version::parse);
    let Some(Version { major, minor }) = decide(stored, versions) else { return };
    let version = format!("{major}.{minor}.0");
    let set = ClusterVersionSet { version: version.clone() };
    match app.node.propose(Op::ClusterVersionSet(set)).await {
        Ok(_) => tracing::info!(version, "set cluster version"),
        Err(error) => tracing::debug!(%error, "the cluster version is not set yet"),
    }
}

/// The smallest version of the members, if it should replace the stored one. To raise it all members
/// must have said theirs; the first one is decided as soon as a quorum has.
fn decide(
    stored: Option<Version>,
    versions: impl Iterator<Item = Option<Version>>,
) -> Option<Version> {
    let versions: Vec<Option<Version>> = versions.collect();
    let known = versions.iter().flatten().count();
    let enough = match stored {
        Some(_) => versions.len(),
        None => versions.len() / 2 + 1,
    };
    let smallest = versions.into_iter().flatten().min()?;
    (known >= enough && stored < Some(smallest)).then_some(smallest)
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
    fn the_smallest_version_counts_and_is_only_raised() {
        let v = |minor| Some(Version { major: 3, minor });
        let decide = |stored, list: &[Option<Version>]| decide(stored, list.iter().copied());
        assert_eq!(decide(None, &[v(7)]), v(7));
        assert_eq!(decide(None, &[v(7), v(6), v(7)]), v(6));
        assert_eq!(decide(None, &[v(7), None, v(7)]), v(7), "a quorum decides first");
        assert_eq!(decide(None, &[v(7), None, None]), None);
        assert_eq!(decide(v(6), &[v(7), None, v(7)]), None, "all must be known to raise it");
        assert_eq!(decide(v(6), &[v(7), v(7)]), v(7));
        assert_eq!(decide(v(7), &[v(7), v(6)]), None, "never lowered");
        assert_eq!(decide(v(9), &[v(7)]), None);
    }
}
