//! What locks and elections share: contenders are keys under one prefix, each bound to a lease, and
//! the key that was created first has won. This room asks the other services for everything it does,
//! in the process but with the metadata of the client, so that they check and limit it as if the
//! client had asked them; it keeps no state between calls and touches no store of its own.

use bytes::Bytes;
use kelson_api::Error;
use kelson_api::etcdserverpb::compare::{CompareResult, CompareTarget, TargetUnion};
use kelson_api::etcdserverpb::kv_client::KvClient;
use kelson_api::etcdserverpb::lease_client::LeaseClient;
use kelson_api::etcdserverpb::range_request::{SortOrder, SortTarget};
use kelson_api::etcdserverpb::request_op::Request as Operation;
use kelson_api::etcdserverpb::response_op::Response as Outcome;
use kelson_api::etcdserverpb::watch_client::WatchClient;
use kelson_api::etcdserverpb::watch_create_request::FilterType;
use kelson_api::etcdserverpb::watch_request::RequestUnion;
use kelson_api::etcdserverpb::{
    Compare, DeleteRangeRequest, LeaseGrantRequest, LeaseRevokeRequest, PutRequest, RangeRequest,
    RangeResponse, RequestOp, ResponseHeader, TxnRequest, TxnResponse, WatchCreateRequest,
    WatchRequest, WatchResponse,
};
use kelson_api::mvccpb::{KeyValue, event::EventType};
use tonic::metadata::{KeyRef, MetadataMap};
use tonic::service::Routes;
use tonic::{Extensions, Request, Status, Streaming};

/// Lease that a contender is given who brings none. Unit: seconds. Source: etcd.
const SESSION_TTL: i64 = 60;

/// Longest time for taking a contender out whose client is gone; its lease does it later otherwise.
const WITHDRAWAL_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(7);

/// The other services, to be asked in the process.
#[derive(Clone)]
pub(super) struct Contests {
    kv: KvClient<Routes>,
    lease: LeaseClient<Routes>,
    watch: WatchClient<Routes>,
}

impl Contests {
    /// Asks the services in `routes`.
    pub(super) fn new(routes: &Routes) -> Self {
        // Nothing that came from a service of ours can be too large for us.
        Self {
            kv: KvClient::new(routes.clone()).max_decoding_message_size(usize::MAX),
            lease: LeaseClient::new(routes.clone()).max_decoding_message_size(usize::MAX),
            watch: WatchClient::new(routes.clone()).max_decoding_message_size(usize::MAX),
        }
    }

    /// Asks on behalf of the client that sent this request.
    pub(super) fn asker<T>(&self, request: &Request<T>) -> Asker {
        Asker {
            contests: self.clone(),
            metadata: passed_on(request.metadata()),
            extensions: request.extensions().clone(),
        }
    }
}

/// What the other services are told of the client: all but what belongs to the call itself. Whether
/// there is a leader was asked at the door; a contender that waits goes on without one.
fn passed_on(metadata: &MetadataMap) -> MetadataMap {
    let mut kept = metadata.clone();
    for key in metadata.keys() {
        let name = match key {
            KeyRef::Ascii(key) => key.as_str(),
            KeyRef::Binary(key) => key.as_str(),
        };
        if name.starts_with("grpc-") || name == "hasleader" || name == "content-type" {
            kept.remove(name);
        }
    }
    kept
}

/// A status as etcd's recipes hand it on: they know errors of the server by their text only, and
/// the code is lost. That the server stops must stay a reason to ask another member.
fn without_code(status: Status) -> Status {
    let text = status.message();
    if text.starts_with("etcdserver: ") && text != Error::Stopped.text() {
        return Status::unknown(text);
    }
    status
}

/// One client's way to the other services.
#[derive(Clone)]
pub(super) struct Asker {
    contests: Contests,
    metadata: MetadataMap,
    /// What the connection tells of the client.
    extensions: Extensions,
}

impl Asker {
    fn request<T>(&self, message: T) -> Request<T> {
        Request::from_parts(self.metadata.clone(), self.extensions.clone(), message)
    }

    pub(super) async fn txn(&self, request: TxnRequest) -> Result<TxnResponse, Status> {
        let mut kv = self.contests.kv.clone();
        let answer = kv.txn(self.request(request)).await.map_err(without_code)?;
        Ok(answer.into_inner())
    }

    /// The key under the prefix that was created first, if there is any, at a revision or, with 0, at
    /// the newest; and the header.
    pub(super) async fn oldest(
        &self,
        prefix: &Bytes,
        revision: i64,
    ) -> Result<(Option<ResponseHeader>, Option<KeyValue>), Status> {
        let mut kv = self.contests.kv.clone();
        let request = RangeRequest { revision, ..oldest(prefix) };
        let answer = kv.range(self.request(request)).await.map_err(without_code)?;
        let RangeResponse { header, kvs, .. } = answer.into_inner();
        Ok((header, kvs.into_iter().next()))
    }

    pub(super) async fn delete(&self, key: Bytes) -> Result<Option<ResponseHeader>, Status> {
        let mut kv = self.contests.kv.clone();
        let request = DeleteRangeRequest { key, ..Default::default() };
        let answer = kv.delete_range(self.request(request)).await.map_err(without_code)?;
        Ok(answer.into_inner().header)
    }

    /// The lease to contend with: the client's own, or a new one if that is 0.
    pub(super) async fn lease(&self, own: i64) -> Result<Lease, Status> {
        if own != 0 {
            return Ok(Lease { id: own, is_granted: false });
        }
        let mut lease = self.contests.lease.clone();
        let request = LeaseGrantRequest { ttl: SESSION_TTL, id: 0 };
        let answer = lease.lease_grant(self.request(request)).await.map_err(without_code)?;
        Ok(Lease { id: answer.into_inner().id, is_granted: true })
    }

    /// Opens a stream that watches these ranges of keys.
    pub(super) async fn watch(
        &self,
        creates: Vec<WatchCreateRequest>,
    ) -> Result<Streaming<WatchResponse>, Status> {
        let mut watch = self.contests.watch.clone();
        let requests = creates.into_iter().map(|create| WatchRequest {
            request_union: Some(RequestUnion::CreateRequest(create)),
        });
        // A stream whose requests end would end as a whole.
        let requests = futures::StreamExt::chain(
            futures::stream::iter(requests.collect::<Vec<_>>()),
            futures::stream::pending(),
        );
        let answer = watch.watch(self.request(requests)).await.map_err(without_code)?;
        Ok(answer.into_inner())
    }
}

/// The next response of a watch; `None` if it was overtaken by a compaction and must begin anew.
///
/// # Errors
/// Unknown if the watch was refused; what ended the stream otherwise.
pub(super) async fn next(
    responses: &mut Streaming<WatchResponse>,
) -> Result<Option<WatchResponse>, Status> {
    let response = responses.message().await.map_err(without_code)?;
    let Some(response) = response else {
        return Err(Status::unknown("the watch of the contenders ended"));
    };
    if !response.canceled {
        return Ok(Some(response));
    }
    if response.compact_revision > 0 {
        Ok(None)
    } else {
        Err(Status::unknown(response.cancel_reason))
    }
}

/// The lease of a contender.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Lease {
    pub(super) id: i64,
    /// Made for this call; nobody else knows it.
    is_granted: bool,
}

/// The prefix under which contenders of this name are.
pub(super) fn prefix(name: &[u8]) -> Bytes {
    [name, b"/"].concat().into()
}

/// End of the range of all keys under a prefix that ends with a slash.
pub(super) fn prefix_end(prefix: &Bytes) -> Bytes {
    let mut end = prefix.to_vec();
    if let Some(last) = end.last_mut() {
        // A slash, so it cannot overflow.
        *last += 1;
    }
    end.into()
}

/// The key of a contender: the lease as Go prints it in hexadecimal digits.
fn key(prefix: &Bytes, lease: i64) -> Bytes {
    let sign = if lease < 0 { "-" } else { "" };
    [prefix.as_ref(), format!("{sign}{:x}", lease.unsigned_abs()).as_bytes()].concat().into()
}

fn oldest(prefix: &Bytes) -> RangeRequest {
    RangeRequest {
        key: prefix.clone(),
        range_end: prefix_end(prefix),
        limit: 1,
        sort_order: SortOrder::Ascend as i32,
        sort_target: SortTarget::Create as i32,
        ..Default::default()
    }
}

/// `create_revision(key) = revision`; with 0 it holds if there is no such key.
pub(super) fn created_at(key: &Bytes, revision: i64) -> Compare {
    Compare {
        result: CompareResult::Equal as i32,
        target: CompareTarget::Create as i32,
        key: key.clone(),
        range_end: Bytes::new(),
        target_union: Some(TargetUnion::CreateRevision(revision)),
    }
}

/// An operation of a transaction.
pub(super) fn op(operation: Operation) -> RequestOp {
    RequestOp { request: Some(operation) }
}

/// The first pair that an operation of a transaction has read.
fn first_of(answer: &TxnResponse, operation: usize) -> Option<&KeyValue> {
    match &answer.responses.get(operation)?.response {
        Some(Outcome::ResponseRange(range)) => range.kvs.first(),
        _ => None,
    }
}

/// Why a contender that waited will never win.
#[derive(Debug)]
pub(super) enum Lost {
    /// Its key is gone: the lease ended, or somebody took it away.
    Expired,
    /// The wait went wrong.
    Failed(Status),
}

impl From<Status> for Lost {
    fn from(status: Status) -> Self {
        Lost::Failed(status)
    }
}

/// A contender in a contest. Unless it has [won](Contender::won), dropping it takes its key away, so
/// that those behind it need not wait for its lease to end.
pub(super) struct Contender {
    asker: Asker,
    prefix: Bytes,
    lease: Lease,
    pub(super) key: Bytes,
    /// Create revision of the key.
    pub(super) revision: i64,
    /// Header of the answer that told of its place.
    pub(super) header: Option<ResponseHeader>,
    /// The value that the key had before, if it was in the contest already.
    pub(super) found_value: Option<Bytes>,
    is_first: bool,
    withdrawal: Withdrawal,
}

impl Contender {
    /// Enters with this value; a lease that is in already keeps its place and its value.
    pub(super) async fn enter(
        asker: Asker,
        name: &[u8],
        lease: Lease,
        value: Bytes,
    ) -> Result<Contender, Status> {
        let prefix = prefix(name);
        let key = key(&prefix, lease.id);
        let mut withdrawal = Withdrawal::new(&asker, lease);
        let put = PutRequest { key: key.clone(), value, lease: lease.id, ..Default::default() };
        let get = RangeRequest { key: key.clone(), ..Default::default() };
        let request = TxnRequest {
            compare: vec![created_at(&key, 0)],
            success: vec![
                op(Operation::RequestPut(put)),
                op(Operation::RequestRange(oldest(&prefix))),
            ],
            failure: vec![
                op(Operation::RequestRange(get)),
                op(Operation::RequestRange(oldest(&prefix))),
            ],
        };
        let answer = asker.txn(request).await?;
        let found = if answer.succeeded { None } else { first_of(&answer, 0) };
        let revision = match found {
            Some(kv) => kv.create_revision,
            None => answer.header.as_ref().map_or(0, |header| header.revision),
        };
        withdrawal.entered(&key, revision);
        Ok(Contender {
            found_value: found.map(|kv| kv.value.clone()),
            is_first: first_of(&answer, 1).is_none_or(|kv| kv.create_revision == revision),
            header: answer.header,
            asker,
            prefix,
            lease,
            key,
            revision,
            withdrawal,
        })
    }

    /// Id of its lease.
    pub(super) fn lease_id(&self) -> i64 {
        self.lease.id
    }

    /// Whether nobody was before it when it entered.
    pub(super) fn is_first(&self) -> bool {
        self.is_first
    }

    /// Waits until nobody is before it, and gives the header of the answer that said so.
    ///
    /// # Cancel safety
    /// Dropping the future leaves the contender in its place.
    pub(super) async fn turn(&self) -> Result<Option<ResponseHeader>, Lost> {
        loop {
            let answer = self.asker.txn(self.look()).await?;
            if first_of(&answer, 1).is_none_or(|kv| kv.create_revision != self.revision) {
                return Err(Lost::Expired);
            }
            let Some(ahead) = first_of(&answer, 0) else { return Ok(answer.header) };
            let revision = answer.header.as_ref().map_or(0, |header| header.revision);
            self.until_deleted(ahead.key.clone(), revision + 1).await?;
        }
    }

    /// Reads who is directly before it, and itself.
    fn look(&self) -> TxnRequest {
        let ahead = RangeRequest {
            sort_order: SortOrder::Descend as i32,
            max_create_revision: self.revision - 1,
            keys_only: true,
            ..oldest(&self.prefix)
        };
        let own = RangeRequest { key: self.key.clone(), keys_only: true, ..Default::default() };
        TxnRequest {
            success: vec![op(Operation::RequestRange(ahead)), op(Operation::RequestRange(own))],
            ..Default::default()
        }
    }

    /// Returns when that key or its own may have been deleted since the revision.
    async fn until_deleted(&self, ahead: Bytes, from: i64) -> Result<(), Status> {
        let create = |key: Bytes| WatchCreateRequest {
            key,
            start_revision: from,
            filters: vec![FilterType::Noput as i32],
            ..Default::default()
        };
        let creates = vec![create(ahead), create(self.key.clone())];
        let mut responses = self.asker.watch(creates).await?;
        while let Some(response) = next(&mut responses).await? {
            let mut events = response.events.iter();
            if events.any(|event| event.r#type == EventType::Delete as i32) {
                break;
            }
        }
        Ok(())
    }

    /// Lets its key stay.
    pub(super) fn won(&mut self) {
        self.withdrawal.is_over = true;
    }
}

/// Takes away what a contender has left behind, when dropped too early.
struct Withdrawal {
    asker: Asker,
    lease: Lease,
    entry: Option<(Bytes, i64)>,
    is_over: bool,
}

impl Withdrawal {
    fn new(asker: &Asker, lease: Lease) -> Self {
        Self { asker: asker.clone(), lease, entry: None, is_over: false }
    }

    fn entered(&mut self, key: &Bytes, revision: i64) {
        self.entry = Some((key.clone(), revision));
    }
}

impl Drop for Withdrawal {
    fn drop(&mut self) {
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        if self.is_over {
            return;
        }
        let (asker, lease, entry) = (self.asker.clone(), self.lease, self.entry.take());
        // One small task for each call that ends: no more than calls.
        runtime.spawn(async move {
            let withdrawn = tokio::time::timeout(WITHDRAWAL_TIMEOUT, withdraw(asker, lease, entry));
            match withdrawn.await {
                Ok(Ok(())) => {}
                Ok(Err(status)) => tracing::debug!(%status, "cannot take a contender out"),
                Err(_) => tracing::debug!("taking a contender out took too long"),
            }
        });
    }
}

async fn withdraw(asker: Asker, lease: Lease, entry: Option<(Bytes, i64)>) -> Result<(), Status> {
    if lease.is_granted {
        // The key goes with it.
        let mut leases = asker.contests.lease.clone();
        leases.lease_revoke(asker.request(LeaseRevokeRequest { id: lease.id })).await?;
        return Ok(());
    }
    // Without an answer it is unknown whether the key is new or holds the contest already.
    let Some((key, revision)) = entry else { return Ok(()) };
    let compare = vec![created_at(&key, revision)];
    let delete = DeleteRangeRequest { key, ..Default::default() };
    let success = vec![op(Operation::RequestDeleteRange(delete))];
    asker.txn(TxnRequest { compare, success, failure: Vec::new() }).await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_show_the_lease_as_go_prints_it() {
        let prefix = prefix(b"name");
        assert_eq!(key(&prefix, 255), "name/ff");
        assert_eq!(key(&prefix, -5), "name/-5");
        assert_eq!(key(&prefix, i64::MIN), "name/-8000000000000000");
        assert_eq!(prefix_end(&prefix), "name0");
    }

    #[test]
    fn what_belongs_to_the_call_is_not_passed_on() {
        let mut metadata = MetadataMap::new();
        for name in ["grpc-timeout", "hasleader", "content-type", "token", "grpcgateway-accept"] {
            metadata.insert(name, "x".parse().expect("a value"));
        }
        let kept = passed_on(&metadata).into_headers();
        let mut names: Vec<_> = kept.keys().map(|name| name.as_str()).collect();
        names.sort_unstable();
        assert_eq!(names, ["grpcgateway-accept", "token"]);
    }

    #[test]
    fn the_code_of_the_server_s_errors_is_lost() {
        let code = |error: Error| without_code(error.into()).code();
        assert_eq!(code(Error::LeaseNotFound), tonic::Code::Unknown);
        assert_eq!(code(Error::Stopped), tonic::Code::Unavailable);
        let own = without_code(Status::internal("something else"));
        assert_eq!(own.code(), tonic::Code::Internal);
    }
}
