//! Script commands of the Lock and Election services: `lock NAME LEASE`, `unlock KEY`, `campaign NAME
//! LEASE VALUE`, `proclaim NAME LEASE REV VALUE`, `resign NAME LEASE REV`, `leader NAME`. A key is the
//! name, a slash and the lease in hexadecimal digits, which the commands put together.

use bytes::Bytes;
use election::election_client::ElectionClient;
use kelson_api::v3electionpb as election;
use kelson_api::v3lockpb as lock;
use lock::lock_client::LockClient;
use tonic::transport::Channel;
use tonic::{Status, Streaming};

use crate::format;
use crate::parse::Words;

/// Names of the commands.
pub const COMMANDS: [&str; 6] = ["lock", "unlock", "campaign", "proclaim", "resign", "leader"];

/// A leader as the answer to a campaign names it; with `none` as name, nothing.
fn leader_key(words: &mut Words) -> Option<election::LeaderKey> {
    let name = words.bytes();
    if name == "none" {
        return None;
    }
    let (lease, rev) = (words.number(), words.number());
    let key = Bytes::from(format!("{}/{lease:x}", String::from_utf8_lossy(&name)));
    Some(election::LeaderKey { name, key, rev, lease })
}

/// Runs one command.
///
/// # Errors
/// The status of the call.
pub async fn run(channel: &Channel, name: &str, words: &mut Words) -> Result<Vec<String>, Status> {
    let mut locks = LockClient::new(channel.clone());
    let mut elections = ElectionClient::new(channel.clone());
    Ok(match name {
        "lock" => {
            let request = lock::LockRequest { name: words.bytes(), lease: words.number() };
            let given = request.lease != 0;
            let answer = locks.lock(request).await?.into_inner();
            let key = if given { format::text(&answer.key) } else { "of a new lease".into() };
            vec![format!("{} key={key}", format::header(answer.header.as_ref()))]
        }
        "unlock" => {
            let answer = locks.unlock(lock::UnlockRequest { key: words.bytes() }).await?;
            vec![format::header(answer.get_ref().header.as_ref())]
        }
        "campaign" => {
            let (name, lease) = (words.bytes(), words.number());
            let request = election::CampaignRequest { name, lease, value: words.bytes() };
            let answer = elections.campaign(request).await?.into_inner();
            let leader = answer.leader.unwrap_or_default();
            vec![format!(
                "{} name={} key={} create={} lease={}",
                format::header(answer.header.as_ref()),
                format::text(&leader.name),
                format::text(&leader.key),
                leader.rev,
                leader.lease
            )]
        }
        "proclaim" => {
            let leader = leader_key(words);
            let request = election::ProclaimRequest { leader, value: words.bytes() };
            let answer = elections.proclaim(request).await?;
            vec![format::header(answer.get_ref().header.as_ref())]
        }
        "resign" => {
            let request = election::ResignRequest { leader: leader_key(words) };
            let answer = elections.resign(request).await?;
            vec![format::header(answer.get_ref().header.as_ref())]
        }
        _ => {
            let request = election::LeaderRequest { name: words.bytes() };
            show(elections.leader(request).await?.get_ref())
        }
    })
}

fn show(leader: &election::LeaderResponse) -> Vec<String> {
    let kv = leader.kv.as_ref().map_or("no kv".into(), format::kv);
    vec![format!("{} {kv}", format::header(leader.header.as_ref()))]
}

/// Observes an election.
///
/// # Errors
/// The status of the call.
pub async fn observe(
    channel: &Channel,
    name: Bytes,
) -> Result<Streaming<election::LeaderResponse>, Status> {
    let request = election::LeaderRequest { name };
    Ok(ElectionClient::new(channel.clone()).observe(request).await?.into_inner())
}

/// The next leader that an observer sees.
pub async fn seen(stream: &mut Streaming<election::LeaderResponse>) -> Vec<String> {
    match stream.message().await {
        Ok(Some(leader)) => show(&leader),
        Ok(None) => vec!["end of stream".into()],
        Err(status) => format::status(&status),
    }
}
