//! One connection to one member, one attempt per call. It never repeats anything and never asks
//! another member, so that the recorded outcome is what the member did; workloads, probes and the
//! monitor call through it.

use std::time::Duration;

use futures::StreamExt;
use kelson_api::etcdserverpb as pb;
use pb::cluster_client::ClusterClient;
use pb::kv_client::KvClient;
use pb::lease_client::LeaseClient;
use pb::maintenance_client::MaintenanceClient;
use pb::request_op;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};

use crate::call::{Compare, Is, Operand, Part, Txn, TxnOp};
use crate::fabric;
use crate::history::{Call, Detail, Outcome, Row};
use crate::wire;

/// All keys of the workload begin with this.
pub(crate) const PREFIX: &str = "k/";

/// Answers of bulk reads may be larger than the default of 4 MiB.
const MAX_MESSAGE: usize = 64 << 20;

/// A connection that is dialed when first used. Cloning shares the connection.
#[derive(Clone)]
pub(crate) struct Client {
    channel: Channel,
    timeout: Duration,
}

/// What a member answered.
#[derive(Clone, Debug, Default)]
pub(crate) struct Answer {
    pub(crate) revision: i64,
    pub(crate) succeeded: bool,
    pub(crate) rows: Vec<Row>,
    pub(crate) detail: Detail,
}

/// Why there is no answer.
#[derive(Clone, Debug)]
pub(crate) struct Refusal {
    pub(crate) outcome: Outcome,
    pub(crate) text: String,
}

/// An answer that says no more than that it was done.
fn done() -> Answer {
    Answer { succeeded: true, ..Default::default() }
}

impl Client {
    /// A connection to a member; calls end after `timeout`.
    pub(crate) fn new(member: usize, timeout: Duration) -> Self {
        let endpoint = Endpoint::from_shared(format!("http://{}:2379", fabric::address(member)))
            .expect("an address is a valid URI")
            .connect_timeout(timeout.min(Duration::from_secs(1)))
            .tcp_nodelay(true);
        Self { channel: endpoint.connect_lazy(), timeout }
    }

    async fn bounded<T>(
        &self,
        call: impl Future<Output = Result<tonic::Response<T>, Status>>,
    ) -> Result<T, Status> {
        match tokio::time::timeout(self.timeout, call).await {
            Ok(answer) => answer.map(tonic::Response::into_inner),
            Err(_) => Err(Status::deadline_exceeded("no answer in time")),
        }
    }

    /// Makes one call of the workload.
    pub(crate) async fn call(&self, call: &Call) -> Result<Answer, Refusal> {
        let done = match call {
            Call::Put { key, value } => self.put(key, &wire::bytes_of(value)).await,
            Call::PutTwo { first, second } => {
                let puts = [first, second].map(|(key, value)| TxnOp::put(key, value));
                let txn = Txn { success: puts.to_vec(), ..Default::default() };
                self.txn(wire::txn(&txn)).await
            }
            Call::Cas { key, expect, value } => self.cas(key, *expect, value).await,
            Call::Delete { key } => self.delete(key).await,
            Call::Get { key, serializable } => self.range(get(key, *serializable)).await,
            Call::List { serializable } => self.range(list(PREFIX, *serializable)).await,
            Call::Range(range) => self.range(wire::range(range)).await,
            Call::Txn(txn) => self.txn(wire::txn(txn)).await,
            Call::Grant { ttl } => self.grant(*ttl).await,
            Call::KeepAlive { lease } => self.keep_alive(*lease).await,
            Call::Revoke { lease } => self.revoke(*lease).await,
            Call::TimeToLive { lease } => self.time_to_live(*lease).await,
            Call::Compact { revision } => self.compact(*revision).await,
            Call::Members => self.members().await,
            Call::MemberAdd { url } => self.add(url).await,
            Call::MemberPromote { id } => self.member_promote(*id).await.map(|()| done()),
            Call::MemberRemove { id } => self.member_remove(*id).await.map(|()| done()),
        };
        done.map_err(|status| refusal(&status, call.has_effect()))
    }

    pub(crate) async fn put(&self, key: &str, value: &[u8]) -> Result<Answer, Status> {
        let request = pb::PutRequest {
            key: key.to_owned().into(),
            value: value.to_vec().into(),
            ..Default::default()
        };
        let mut kv = KvClient::new(self.channel.clone());
        let answer = self.bounded(kv.put(request)).await?;
        Ok(Answer { revision: revision(answer.header), ..done() })
    }

    async fn cas(&self, key: &str, expect: i64, value: &str) -> Result<Answer, Status> {
        let txn = Txn {
            compare: vec![Compare::one(key, Is::Equal, Operand::Mod(expect))],
            success: vec![TxnOp::put(key, value)],
            failure: vec![TxnOp::get(key)],
        };
        let mut answer = self.txn(wire::txn(&txn)).await?;
        for part in std::mem::take(&mut answer.detail.parts) {
            if let Part::Range { rows, .. } = part {
                answer.rows = rows;
            }
        }
        Ok(answer)
    }

    /// Puts many rows in one transaction.
    pub(crate) async fn put_all(&self, rows: Vec<(String, Vec<u8>)>) -> Result<Answer, Status> {
        let puts = rows
            .into_iter()
            .map(|(key, value)| pb::RequestOp {
                request: Some(request_op::Request::RequestPut(pb::PutRequest {
                    key: key.into(),
                    value: value.into(),
                    ..Default::default()
                })),
            })
            .collect();
        self.txn(pb::TxnRequest { success: puts, ..Default::default() }).await
    }

    async fn delete(&self, key: &str) -> Result<Answer, Status> {
        let request = pb::DeleteRangeRequest { key: key.to_owned().into(), ..Default::default() };
        let mut kv = KvClient::new(self.channel.clone());
        let answer = self.bounded(kv.delete_range(request)).await?;
        let succeeded = answer.deleted > 0;
        Ok(Answer { revision: revision(answer.header), succeeded, ..Default::default() })
    }

    pub(crate) async fn range(&self, request: pb::RangeRequest) -> Result<Answer, Status> {
        let mut kv = KvClient::new(self.channel.clone()).max_decoding_message_size(MAX_MESSAGE);
        let answer = self.bounded(kv.range(request)).await?;
        Ok(Answer {
            revision: revision(answer.header),
            rows: answer.kvs.iter().map(wire::row).collect(),
            detail: Detail { count: answer.count, more: answer.more, ..Default::default() },
            ..done()
        })
    }

    async fn txn(&self, request: pb::TxnRequest) -> Result<Answer, Status> {
        let mut kv = KvClient::new(self.channel.clone());
        let answer = self.bounded(kv.txn(request)).await?;
        let parts = answer.responses.iter().map(wire::part).collect();
        Ok(Answer {
            revision: revision(answer.header),
            succeeded: answer.succeeded,
            rows: Vec::new(),
            detail: Detail { parts, ..Default::default() },
        })
    }

    async fn grant(&self, ttl: i64) -> Result<Answer, Status> {
        let mut leases = LeaseClient::new(self.channel.clone());
        let request = pb::LeaseGrantRequest { ttl, id: 0 };
        let answer = self.bounded(leases.lease_grant(request)).await?;
        let detail = Detail { lease: answer.id, ttl: answer.ttl, ..Default::default() };
        Ok(Answer { revision: revision(answer.header), detail, ..done() })
    }

    /// One renewal on a stream of its own; a lease that is gone answers with no time left.
    async fn keep_alive(&self, lease: i64) -> Result<Answer, Status> {
        let mut leases = LeaseClient::new(self.channel.clone());
        let asked = futures::stream::iter([pb::LeaseKeepAliveRequest { id: lease }]);
        let asked = asked.chain(futures::stream::pending());
        let answer = self.bounded(async {
            let mut answers = leases.lease_keep_alive(asked).await?.into_inner();
            let first = answers.message().await?;
            first.map(tonic::Response::new).ok_or_else(|| Status::unknown("closed without answer"))
        });
        let answer = answer.await?;
        let detail = Detail { ttl: answer.ttl, ..Default::default() };
        let succeeded = answer.ttl > 0;
        Ok(Answer { revision: revision(answer.header), succeeded, rows: Vec::new(), detail })
    }

    async fn revoke(&self, lease: i64) -> Result<Answer, Status> {
        let mut leases = LeaseClient::new(self.channel.clone());
        let request = pb::LeaseRevokeRequest { id: lease };
        let answer = self.bounded(leases.lease_revoke(request)).await?;
        Ok(Answer { revision: revision(answer.header), ..done() })
    }

    async fn time_to_live(&self, lease: i64) -> Result<Answer, Status> {
        let mut leases = LeaseClient::new(self.channel.clone());
        let request = pb::LeaseTimeToLiveRequest { id: lease, keys: false };
        let answer = self.bounded(leases.lease_time_to_live(request)).await?;
        let detail = Detail { ttl: answer.ttl, ..Default::default() };
        let succeeded = answer.ttl >= 0;
        Ok(Answer { revision: revision(answer.header), succeeded, rows: Vec::new(), detail })
    }

    async fn compact(&self, to: i64) -> Result<Answer, Status> {
        let mut kv = KvClient::new(self.channel.clone());
        let request = pb::CompactionRequest { revision: to, physical: false };
        let answer = self.bounded(kv.compact(request)).await?;
        Ok(Answer { revision: revision(answer.header), ..done() })
    }

    async fn members(&self) -> Result<Answer, Status> {
        let mut cluster = ClusterClient::new(self.channel.clone());
        let request = pb::MemberListRequest { linearizable: true };
        let answer = self.bounded(cluster.member_list(request)).await?;
        let members = wire::members(&answer.members);
        Ok(Answer { detail: Detail { members, ..Default::default() }, ..done() })
    }

    async fn add(&self, url: &str) -> Result<Answer, Status> {
        let answer = self.member_add(url.to_owned(), true).await?;
        let id = answer.member.map_or(0, |member| member.id);
        let members = wire::members(&answer.members);
        Ok(Answer { detail: Detail { members, id, ..Default::default() }, ..done() })
    }

    pub(crate) async fn status(&self) -> Result<pb::StatusResponse, Status> {
        self.bounded(MaintenanceClient::new(self.channel.clone()).status(pb::StatusRequest {}))
            .await
    }

    pub(crate) async fn hash_kv(&self, revision: i64) -> Result<pb::HashKvResponse, Status> {
        let mut maintenance = MaintenanceClient::new(self.channel.clone());
        self.bounded(maintenance.hash_kv(pb::HashKvRequest { revision })).await
    }

    pub(crate) async fn member_add(
        &self,
        peer_url: String,
        learner: bool,
    ) -> Result<pb::MemberAddResponse, Status> {
        let request = pb::MemberAddRequest { peer_ur_ls: vec![peer_url], is_learner: learner };
        self.bounded(ClusterClient::new(self.channel.clone()).member_add(request)).await
    }

    /// Id of the member with this peer URL.
    pub(crate) async fn member_at(&self, peer_url: &str) -> Result<Option<u64>, Status> {
        let mut cluster = ClusterClient::new(self.channel.clone());
        let request = pb::MemberListRequest { linearizable: true };
        let members = self.bounded(cluster.member_list(request)).await?.members;
        let has_url = |member: &&pb::Member| member.peer_ur_ls.iter().any(|url| url == peer_url);
        Ok(members.iter().find(has_url).map(|member| member.id))
    }

    pub(crate) async fn member_promote(&self, id: u64) -> Result<(), Status> {
        let mut cluster = ClusterClient::new(self.channel.clone());
        self.bounded(cluster.member_promote(pb::MemberPromoteRequest { id })).await.map(drop)
    }

    pub(crate) async fn member_remove(&self, id: u64) -> Result<(), Status> {
        let mut cluster = ClusterClient::new(self.channel.clone());
        self.bounded(cluster.member_remove(pb::MemberRemoveRequest { id })).await.map(drop)
    }
}

pub(crate) fn revision(header: Option<pb::ResponseHeader>) -> i64 {
    header.map_or(0, |header| header.revision)
}

/// A read of one key.
pub(crate) fn get(key: &str, serializable: bool) -> pb::RangeRequest {
    pb::RangeRequest { key: key.to_owned().into(), serializable, ..Default::default() }
}

/// A read of all keys with a prefix.
pub(crate) fn list(prefix: &str, serializable: bool) -> pb::RangeRequest {
    let mut end = prefix.as_bytes().to_vec();
    if let Some(last) = end.last_mut() {
        *last += 1;
    }
    pb::RangeRequest {
        key: prefix.to_owned().into(),
        range_end: end.into(),
        serializable,
        ..Default::default()
    }
}

/// Sorts errors into those that prove that nothing happened and those that prove nothing. A read has
/// no effect, so a read without an answer has certainly failed.
fn refusal(status: &Status, write: bool) -> Refusal {
    let text = format!("{:?}: {}", status.code(), describe(status));
    let certain = match status.code() {
        // Refused before anything was proposed.
        Code::InvalidArgument
        | Code::PermissionDenied
        | Code::Unauthenticated
        | Code::NotFound
        | Code::OutOfRange
        | Code::FailedPrecondition
        | Code::ResourceExhausted
        | Code::Unimplemented => true,
        // No connection was ever made, so no request was ever sent.
        // Nor was one proposed where the answer says why not.
        Code::Unavailable => {
            text.contains("tcp connect error")
                || text.ends_with("etcdserver: unhealthy cluster")
                || text.ends_with("etcdserver: too many requests")
        }
        _ => false,
    };
    let outcome = if certain || !write { Outcome::Fail } else { Outcome::Unknown };
    Refusal { outcome, text }
}

/// The message with all its causes: tonic keeps a refused connection deep inside.
fn describe(status: &Status) -> String {
    let mut text = status.message().to_owned();
    let mut cause = std::error::Error::source(status);
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_errors_that_prove_it_make_a_write_fail() {
        let outcome = |status: Status, write| refusal(&status, write).outcome;
        assert_eq!(outcome(Status::resource_exhausted("too many requests"), true), Outcome::Fail);
        assert_eq!(outcome(Status::unavailable("request timed out"), true), Outcome::Unknown);
        assert_eq!(outcome(Status::deadline_exceeded("late"), true), Outcome::Unknown);
        assert_eq!(outcome(Status::unknown("broken pipe"), true), Outcome::Unknown);
        assert_eq!(outcome(Status::unavailable("request timed out"), false), Outcome::Fail);
    }

    #[test]
    fn a_list_ends_behind_the_prefix() {
        let request = list("k/", true);
        assert_eq!((&request.key[..], &request.range_end[..]), (&b"k/"[..], &b"k0"[..]));
    }
}
