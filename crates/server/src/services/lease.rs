//! The Lease service. Granting and revoking are agreed on; renewing and asking for the time left
//! go to the lessor, which keeps the deadlines of the leader.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use futures::Stream;
use kelson_api::command::command::Op;
use kelson_api::etcdserverpb::lease_server::Lease;
use kelson_api::etcdserverpb::{
    LeaseGrantRequest, LeaseGrantResponse, LeaseKeepAliveRequest, LeaseKeepAliveResponse,
    LeaseLeasesRequest, LeaseLeasesResponse, LeaseRevokeRequest, LeaseRevokeResponse, LeaseStatus,
    LeaseTimeToLiveRequest, LeaseTimeToLiveResponse,
};
use kelson_raft::Node;
use kelson_storage::{Reader, Reply};
use tonic::{Request, Response, Status, Streaming};

use super::gate::{Gate, LeaderWatch};
use super::{mismatched, wire};
use crate::app::App;
use crate::callers::Caller;
use crate::header::header;
use crate::housekeeping::lease::Lessor;
use crate::housekeeping::quota::{LEASE_COST, Quota};
use crate::limits::Limits;
use crate::metrics::Metrics;

/// Serves leases.
pub(super) struct LeaseService {
    node: Node,
    reader: Reader,
    limits: Arc<Limits>,
    metrics: Arc<Metrics>,
    gate: Gate,
    quota: Quota,
    lessor: Arc<Lessor>,
    ids: LeaseIds,
}

impl LeaseService {
    pub(super) fn new(app: &App, lessor: Arc<Lessor>) -> Self {
        let quota = app.limits.quota_backend_bytes;
        Self {
            node: app.node.clone(),
            reader: app.reader.clone(),
            limits: Arc::clone(&app.limits),
            metrics: Arc::clone(&app.metrics),
            gate: Gate::new(app),
            quota: Quota::new(app.node.clone(), app.reader.clone(), quota),
            lessor,
            ids: LeaseIds::new(app.node.status().member_id),
        }
    }
}

/// Makes lease ids that no other member makes: the member, then the time of the start, then a
/// counter that goes on from there.
struct LeaseIds {
    member: u64,
    next: AtomicU64,
}

impl LeaseIds {
    /// Low bits that count; 40 of them hold the milliseconds, 8 the ids of one millisecond.
    const COUNTER_BITS: u32 = 48;

    fn new(member_id: u64) -> Self {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let millis = u64::try_from(since.as_millis()).unwrap_or(u64::MAX);
        Self { member: member_id << Self::COUNTER_BITS, next: AtomicU64::new(millis << 8) }
    }

    /// An id that is positive and not 0.
    fn next(&self) -> i64 {
        loop {
            let counter = self.next.fetch_add(1, Ordering::Relaxed) + 1;
            let id = self.member | (counter & ((1 << Self::COUNTER_BITS) - 1));
            // The sign bit goes, so that the id prints as etcd's do.
            match i64::try_from(id & (u64::MAX >> 1)).unwrap_or(0) {
                0 => continue,
                id => return id,
            }
        }
    }
}

#[tonic::async_trait]
impl Lease for LeaseService {
    type LeaseKeepAliveStream =
        Pin<Box<dyn Stream<Item = Result<LeaseKeepAliveResponse, Status>> + Send>>;

    async fn lease_grant(
        &self,
        request: Request<LeaseGrantRequest>,
    ) -> Result<Response<LeaseGrantResponse>, Status> {
        let (caller, mut request) = self.gate.take(request)?;
        self.quota.admit(LEASE_COST).await?;
        if request.id == 0 {
            request.id = self.ids.next();
        }
        request.ttl = request.ttl.max(self.limits.min_lease_ttl);
        let outcome = caller.propose(Op::LeaseGrant(request)).await?;
        match outcome.result? {
            Reply::LeaseGrant(mut response) => {
                self.lessor.granted(response.id);
                self.quota.admit_applied(LEASE_COST).await?;
                self.metrics.lease_granted.inc();
                // Seconds fit a float exactly up to far beyond the longest lease.
                self.metrics.lease_ttl.observe(response.ttl as f64);
                response.header = Some(header(&self.node, outcome.revision));
                Ok(Response::new(response))
            }
            other => Err(mismatched("LeaseGrant", &other)),
        }
    }

    async fn lease_revoke(
        &self,
        request: Request<LeaseRevokeRequest>,
    ) -> Result<Response<LeaseRevokeResponse>, Status> {
        let (caller, request) = self.gate.take(request)?;
        let outcome = caller.propose_urgent(Op::LeaseRevoke(request)).await?;
        match outcome.result? {
            Reply::LeaseRevoke => {
                self.lessor.revoked(request.id);
                self.metrics.lease_revoked.inc();
                let header = Some(header(&self.node, outcome.revision));
                Ok(Response::new(LeaseRevokeResponse { header }))
            }
            other => Err(mismatched("LeaseRevoke", &other)),
        }
    }

    async fn lease_keep_alive(
        &self,
        request: Request<Streaming<LeaseKeepAliveRequest>>,
    ) -> Result<Response<Self::LeaseKeepAliveStream>, Status> {
        let (metadata, extensions, requests) = request.into_parts();
        let (caller, leader) = self.gate.stream(&metadata, &extensions, false).await?;
        let stream = KeepAlive {
            node: self.node.clone(),
            reader: self.reader.clone(),
            lessor: Arc::clone(&self.lessor),
            caller,
            leader,
            requests,
        };
        let answers = futures::stream::try_unfold(stream, |mut stream| async move {
            Ok(stream.answer().await?.map(|answer| (answer, stream)))
        });
        Ok(Response::new(Box::pin(answers)))
    }

    async fn lease_time_to_live(
        &self,
        request: Request<LeaseTimeToLiveRequest>,
    ) -> Result<Response<LeaseTimeToLiveResponse>, Status> {
        let (caller, request) = self.gate.take(request)?;
        caller.anybody().await?;
        let mut response = self.lessor.time_to_live(request.id, request.keys).await?;
        // Of the keys in the answer, whatever this member knows of the lease.
        self.reader.check_keys(&caller.asker().await?, &response.keys)?;
        response.header = Some(header(&self.node, self.reader.revision()));
        Ok(Response::new(response))
    }

    async fn lease_leases(
        &self,
        request: Request<LeaseLeasesRequest>,
    ) -> Result<Response<LeaseLeasesResponse>, Status> {
        let (caller, _) = self.gate.take(request)?;
        caller.anybody().await?;
        let ids = self.lessor.by_time_left();
        self.reader.check_lease_keys(&caller.asker().await?, &ids)?;
        let leases = ids.into_iter().map(|id| LeaseStatus { id }).collect();
        let header = Some(header(&self.node, self.reader.revision()));
        Ok(Response::new(LeaseLeasesResponse { header, leases }))
    }
}

/// One stream of renewals: a request is read when the answer to the one before is on its way, so
/// a client that sends faster than it is served is slowed down by flow control.
struct KeepAlive {
    node: Node,
    reader: Reader,
    lessor: Arc<Lessor>,
    caller: Caller,
    leader: LeaderWatch,
    requests: Streaming<LeaseKeepAliveRequest>,
}

impl KeepAlive {
    /// The next answer; none once the client has closed its side.
    async fn answer(&mut self) -> Result<Option<LeaseKeepAliveResponse>, Status> {
        let request = tokio::select! {
            // A request that is there is served even if the leader is gone: it gets the error.
            biased;
            request = self.requests.message() => request.map_err(wire::translate)?,
            error = self.leader.ended() => return Err(error.into()),
        };
        let Some(LeaseKeepAliveRequest { id }) = request else {
            return Ok(None);
        };
        // Taken before renewing: a client must never see a success that is newer than a revoke.
        let revision = self.reader.revision();
        self.caller.anybody().await?;
        self.reader.check_renewal(&self.caller.asker().await?, id)?;
        let ttl = self.lessor.renew(id).await?;
        let header = Some(header(&self.node, revision));
        Ok(Some(LeaseKeepAliveResponse { header, id, ttl }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lease_ids_are_positive_and_differ_between_members() {
        for member in [0, 1, 0x8e9e_05c5_2164_694d, u64::MAX] {
            let ids = LeaseIds::new(member);
            let made: Vec<i64> = (0..1000).map(|_| ids.next()).collect();
            assert!(made.iter().all(|id| *id > 0));
            assert!(made.windows(2).all(|pair| pair[0] != pair[1]));
            let prefix = i64::try_from(member & 0x7fff).expect("15 bits");
            assert!(made.iter().all(|id| id >> LeaseIds::COUNTER_BITS == prefix));
        }
    }

    #[test]
    fn the_id_zero_is_skipped() {
        let ids = LeaseIds { member: 0, next: AtomicU64::new((1 << LeaseIds::COUNTER_BITS) - 1) };
        assert_eq!(ids.next(), 1);
    }
}
