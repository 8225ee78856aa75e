//! The first start of a member that has company: asks the other members what cluster there is, and
//! finds out whether this one founds it, joins it, or must not start at all. It changes nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use kelson_api::peer::peer_client::PeerClient;
use kelson_api::peer::{DescribeReply, DescribeRequest};
use kelson_storage::Identity;
use kelson_storage::sabotage::{self, Variant};
use tonic::transport::{Endpoint, Uri};

use crate::config::{NodeConfig, sorted};
use crate::error::StartError;
use crate::types::Peer;

/// Time for one member to say what it knows.
const ANSWER_TIME: Duration = Duration::from_secs(2);

/// What the first start found out.
pub(crate) struct Arrival {
    pub(crate) identity: Identity,
    /// The members of the cluster as far as known: the founders, or those that were asked.
    pub(crate) members: BTreeMap<u64, Peer>,
}

/// Decides how a member with an empty data directory starts.
///
/// # Errors
/// The flags contradict each other or the running cluster.
pub(crate) async fn arrive(config: &NodeConfig) -> Result<Arrival, StartError> {
    if config.initial_state_existing { join(config).await } else { found(config).await }
}

/// A founder must not be one that the cluster already knew: it would have forgotten its votes.
async fn found(config: &NodeConfig) -> Result<Arrival, StartError> {
    let (identity, members) = config.bootstrap()?;
    let others = others(config);
    let asked = others.iter().map(|url| describe(config, url));
    for answer in futures::future::join_all(asked).await.into_iter().flatten() {
        let known = is_known(&answer, identity.member_id);
        if answer.removed.contains(&identity.member_id) {
            return Err(StartError::Removed(identity.member_id));
        }
        if answer.cluster_id == identity.cluster_id && known {
            return Err(StartError::AlreadyBootstrapped(identity.member_id));
        }
    }
    Ok(Arrival { identity, members })
}

async fn join(config: &NodeConfig) -> Result<Arrival, StartError> {
    let own = sorted(config.own_urls()?);
    let mut reasons = Vec::new();
    for url in others(config) {
        match describe(config, &url).await {
            Ok(answer) if !answer.members.is_empty() => return matched(config, &own, &answer),
            Ok(_) => reasons.push(format!("{url}: it has no cluster yet")),
            Err(reason) => reasons.push(format!("{url}: {reason}")),
        }
    }
    if reasons.is_empty() {
        reasons.push("--initial-cluster names no other member".to_owned());
    }
    Err(StartError::NoClusterInfo(reasons.join("; ")))
}

/// `--initial-cluster` must describe the members that there are, by their peer URLs.
fn matched(
    config: &NodeConfig,
    own: &[String],
    answer: &DescribeReply,
) -> Result<Arrival, StartError> {
    let listed: BTreeSet<Vec<String>> =
        config.initial_cluster.iter().map(|(_, urls)| sorted(urls)).collect();
    if listed.len() != answer.members.len() {
        return Err(StartError::OtherCluster(format!(
            "member count is unequal: --initial-cluster names {}, the cluster has {}",
            listed.len(),
            answer.members.len()
        )));
    }
    let mut members = BTreeMap::new();
    let mut identity = None;
    for member in &answer.members {
        let urls = sorted(&member.peer_ur_ls);
        if !listed.contains(&urls) {
            return Err(StartError::OtherCluster(format!(
                "unmatched member while checking PeerURLs: the cluster has member {:x} at {urls:?}, \
                 --initial-cluster does not",
                member.id
            )));
        }
        if urls == own {
            identity = Some(Identity { cluster_id: answer.cluster_id, member_id: member.id });
        }
        let peer = Peer { name: member.name.clone(), peer_urls: member.peer_ur_ls.clone() };
        members.insert(member.id, peer);
    }
    let Some(identity) = identity else {
        let text = format!("the cluster has no member at {own:?}: add it first");
        return Err(StartError::OtherCluster(text));
    };
    // A member that has run before has promised things that an empty directory does not know.
    if is_known(answer, identity.member_id) {
        return Err(StartError::AlreadyBootstrapped(identity.member_id));
    }
    Ok(Arrival { identity, members })
}

/// Whether the cluster has seen a data directory of this member.
fn is_known(answer: &DescribeReply, member: u64) -> bool {
    let mut known = answer.identities.iter();
    known.any(|known| known.id == member) && !sabotage::is(Variant::WipedAccepted)
}

fn others(config: &NodeConfig) -> Vec<String> {
    let others = config.initial_cluster.iter().filter(|(name, _)| *name != config.name);
    others.flat_map(|(_, urls)| urls.clone()).collect()
}

async fn describe(config: &NodeConfig, url: &str) -> Result<DescribeReply, String> {
    let (connect, target) = (config.connect.clone(), url.to_owned());
    let endpoint = Endpoint::from_static("http://member");
    let connector = tower::service_fn(move |_: Uri| {
        let connecting = connect(target.clone());
        async move { connecting.await.map(TokioIo::new) }
    });
    let asking = async {
        let channel =
            endpoint.connect_with_connector(connector).await.map_err(|error| deepest(&error))?;
        let answer = PeerClient::new(channel).describe(DescribeRequest {}).await;
        answer.map(tonic::Response::into_inner).map_err(|status| status.message().to_owned())
    };
    let late = || Err(format!("no answer within {ANSWER_TIME:?}"));
    tokio::time::timeout(ANSWER_TIME, asking).await.unwrap_or_else(|_| late())
}

/// The cause behind a transport error, which by itself says nothing.
fn deepest(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(next) = cause.source() {
        cause = next;
    }
    cause.to_string()
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use kelson_api::etcdserverpb::Member;
    use kelson_api::peer::KnownIdentity;

    use super::*;

    fn config() -> NodeConfig {
        let url = |port| vec![format!("http://127.0.0.1:{port}")];
        NodeConfig {
            name: "b".into(),
            initial_cluster: vec![("a".into(), url(1)), ("b".into(), url(2))],
            advertise_peer_urls: url(2),
            initial_state_existing: true,
            ..NodeConfig::with_defaults("unused")
        }
    }

    fn answer(ports: &[u16]) -> DescribeReply {
        let member = |port: &u16| Member {
            id: u64::from(*port),
            peer_ur_ls: vec![format!("http://127.0.0.1:{port}")],
            ..Member::default()
        };
        DescribeReply {
            cluster_id: 9,
            members: ports.iter().map(member).collect(),
            ..DescribeReply::default()
        }
    }

    fn result(answer: &DescribeReply) -> Result<Arrival, StartError> {
        let config = config();
        let own = sorted(&config.advertise_peer_urls);
        matched(&config, &own, answer)
    }

    #[test]
    fn a_joining_member_finds_its_id_by_its_urls() {
        let arrival = result(&answer(&[1, 2])).expect("it fits");
        assert_eq!(arrival.identity, Identity { cluster_id: 9, member_id: 2 });
        assert_eq!(arrival.members.len(), 2);
    }

    #[test]
    fn another_cluster_is_refused() {
        let text = |answer| result(&answer).map(|_| ()).expect_err("refused").to_string();
        assert!(text(answer(&[1])).contains("member count is unequal"));
        assert!(text(answer(&[1, 3])).contains("unmatched member"));
        let mut known = answer(&[1, 2]);
        known.identities.push(KnownIdentity { id: 2, storage_uuid: Bytes::from_static(b"x") });
        assert!(text(known).contains("has already been bootstrapped"));
    }

    #[tokio::test]
    async fn nobody_to_ask() {
        let config = NodeConfig { name: "b".into(), ..config() };
        let error = arrive(&config).await.map(|_| ()).expect_err("nobody listens there");
        assert!(matches!(error, StartError::NoClusterInfo(_)), "{error}");
    }
}
