//! Changes of membership through the cluster's own API, as any operator would make them: asked of
//! one running member, which passes them to the leader. Only refusals that pass by themselves are tried
//! again: a cluster too young for an addition, and a learner that has not caught up.

use std::time::Duration;

use kelson_api::etcdserverpb as pb;
use pb::cluster_client::ClusterClient;
use tokio::time::timeout;
use tonic::transport::Channel;

/// Longest time for one call; the members' own limit is 7 s.
const CALL_TIMEOUT: Duration = Duration::from_secs(10);
/// Pause between two attempts.
const PAUSE: Duration = Duration::from_millis(500);
/// The answer to an addition that would come too early; nothing was changed then.
const UNHEALTHY: &str = "etcdserver: unhealthy cluster";
/// After so many attempts, ten seconds, the answer is the user's.
const ADD_ATTEMPTS_MAX: u32 = 20;
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
    let mut attempts = 1;
    let answer = loop {
        match call(client.member_add(request.clone())).await {
            // Members must have seen each other for some seconds; a new lab's have not.
            Err(text) if text == UNHEALTHY && attempts < ADD_ATTEMPTS_MAX => attempts += 1,
            other => break other?,
        }
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
    call(client.member_remove(pb::MemberRemoveRequest { id })).await.map(drop)
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
