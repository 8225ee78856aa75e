//! Changes of membership through the cluster's own API, as any operator would make them: asked of
//! one running member, which passes them to the leader. Only refusals that pass by themselves are tried
//! again: a cluster too young for a change, and a learner that has not caught up.

use std::time::Duration;

use kelson_api::etcdserverpb as pb;
use pb::cluster_client::ClusterClient;
use tokio::time::timeout;
use tonic::transport::Channel;

/// Longest time for one call; the members' own limit is 7 s.
const CALL_TIMEOUT: Duration = Duration::from_secs(10);
/// Pause between two attempts.
const PAUSE: Duration = Duration::from_millis(500);
/// The answer to a change that comes too early after a start; nothing was changed then.
const UNHEALTHY: &str = "etcdserver: unhealthy cluster";
/// After so many attempts, ten seconds, that answer is the user's.
const EARLY_ATTEMPTS_MAX: u32 = 20;
/// After so many attempts, two minutes at least, promotion is left to the user.
const PROMOTE_ATTEMPTS_MAX: u32 = 240;

/// Adds a member and returns the `--initial-cluster` it must start with.
///
/// # Errors
/// What the cluster answers, or that it does not.
pub(crate) async fn add(
    channel: Channel,
    name: &str,
    peer_url: &str,
    is_learner: bool,
) -> Result<String, String> {
    let request = pb::MemberAddRequest { peer_ur_ls: vec![peer_url.to_owned()], is_learner };
    let mut client = ClusterClient::new(channel);
    let mut attempt = 1;
    let answer = loop {
        let answer = call(client.member_add(request.clone())).await;
        if !is_early(&answer, attempt) {
            break answer?;
        }
        attempt += 1;
        tokio::time::sleep(PAUSE).await;
    };
    let new = answer.member.unwrap_or_default().id;
    let entry = |member: &pb::Member| {
        // A member that has not started yet has no name in the list; any name will do there.
        let known = match member.name.as_str() {
            _ if member.id == new => name.to_owned(),
            "" => format!("unstarted-{:x}", member.id),
            known => known.to_owned(),
        };
        member.peer_ur_ls.iter().map(|url| format!("{known}={url}")).collect::<Vec<_>>()
    };
    Ok(answer.members.iter().flat_map(entry).collect::<Vec<_>>().join(","))
}

/// Promotes a learner, trying again while it has not caught up.
///
/// # Errors
/// What the cluster answers at last.
pub(crate) async fn promote(channel: Channel, peer_url: &str) -> Result<(), String> {
    let mut client = ClusterClient::new(channel);
    let mut last = String::new();
    for _ in 0..PROMOTE_ATTEMPTS_MAX {
        match find(&mut client, peer_url).await {
            Ok(member) if !member.is_learner => return Ok(()),
            Ok(member) => {
                let request = pb::MemberPromoteRequest { id: member.id };
                match call(client.member_promote(request)).await {
                    Ok(_) => return Ok(()),
                    Err(text) => last = text,
                }
            }
            Err(text) => last = text,
        }
        tokio::time::sleep(PAUSE).await;
    }
    Err(last)
}

/// Removes a member.
///
/// # Errors
/// What the cluster answers.
pub(crate) async fn remove(channel: Channel, peer_url: &str) -> Result<(), String> {
    let mut client = ClusterClient::new(channel);
    let id = find(&mut client, peer_url).await?.id;
    let mut attempt = 1;
    loop {
        let answer = call(client.member_remove(pb::MemberRemoveRequest { id })).await;
        if !is_early(&answer, attempt) {
            return answer.map(drop);
        }
        attempt += 1;
        tokio::time::sleep(PAUSE).await;
    }
}

/// Whether to try once more because the members have not known each other for long enough.
fn is_early<T>(answer: &Result<T, String>, attempt: u32) -> bool {
    answer.as_ref().is_err_and(|text| text == UNHEALTHY) && attempt < EARLY_ATTEMPTS_MAX
}

async fn find(client: &mut ClusterClient<Channel>, peer_url: &str) -> Result<pb::Member, String> {
    let list = call(client.member_list(pb::MemberListRequest { linearizable: true })).await?;
    let is_it = |member: &pb::Member| member.peer_ur_ls.iter().any(|url| url == peer_url);
    list.members.into_iter().find(is_it).ok_or_else(|| "it is not in the cluster".to_owned())
}

async fn call<T>(
    answer: impl Future<Output = Result<tonic::Response<T>, tonic::Status>>,
) -> Result<T, String> {
    match timeout(CALL_TIMEOUT, answer).await {
        Ok(Ok(response)) => Ok(response.into_inner()),
        Ok(Err(status)) => Err(status.message().to_owned()),
        Err(_) => Err("the cluster does not answer".to_owned()),
    }
}
