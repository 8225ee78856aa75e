//! The KV service: Range, Put, DeleteRange, Txn, Compact; RangeStream has a file of its own. Checks
//! come in etcd's order, because a request with several faults must get etcd's error.

use std::sync::Arc;
use std::time::Instant;

use kelson_api::Error;
use kelson_api::command::command::Op;
use kelson_api::etcdserverpb::kv_server::Kv;
use kelson_api::etcdserverpb::request_op::Request as Operation;
use kelson_api::etcdserverpb::{
    CompactionRequest, CompactionResponse, DeleteRangeRequest, DeleteRangeResponse, PutRequest,
    PutResponse, RangeRequest, RangeResponse, TxnRequest, TxnResponse,
};
use kelson_raft::Node;
use kelson_storage::sabotage::{self, Variant};
use kelson_storage::{Reader, Reply};
use tonic::{Request, Response, Status};

use super::blocking::Blocking;
use super::gate::Gate;
use super::{mismatched, range_stream};
use crate::app::App;
use crate::header::header;
use crate::housekeeping::quota::{self, Quota};
use crate::limits::Limits;
use crate::metrics::Metrics;
use crate::validate;

/// Serves keys and values.
pub(super) struct KvService {
    node: Node,
    reader: Reader,
    limits: Arc<Limits>,
    gate: Gate,
    metrics: Arc<Metrics>,
    quota: Quota,
    blocking: Blocking,
}

impl KvService {
    pub(super) fn new(app: &App) -> Self {
        let quota = app.limits.quota_backend_bytes;
        Self {
            node: app.node.clone(),
            reader: app.reader.clone(),
            limits: Arc::clone(&app.limits),
            gate: Gate::new(app),
            metrics: Arc::clone(&app.metrics),
            quota: Quota::new(app.node.clone(), app.reader.clone(), quota),
            blocking: Blocking::new(),
        }
    }

    /// Waits until this member has all that was acknowledged before, unless the caller is content
    /// with less.
    async fn catch_up(&self, serializable: bool) -> Result<(), Error> {
        if !serializable {
            self.node.read_barrier().await?;
        }
        Ok(())
    }

    /// Sabotage: the answer that a put will have if all goes well.
    fn answer_unagreed(&self, request: PutRequest) -> Response<PutResponse> {
        let (node, revision) = (self.node.clone(), self.reader.revision() + 1);
        let header = Some(header(&self.node, revision));
        tokio::spawn(async move { node.propose(Op::Put(request)).await.ok() });
        Response::new(PutResponse { header, prev_kv: None })
    }

    async fn read(&self, request: RangeRequest) -> Result<(RangeResponse, i64), Status> {
        let start = Instant::now();
        let answer = if self.reader.is_quick(&request) {
            self.reader.range(&request)
        } else {
            let reader = self.reader.clone();
            self.blocking.run(move || reader.range(&request)).await?
        };
        self.metrics.server_range_duration.observe(answer.is_ok(), start);
        let (took, expected) = (start.elapsed(), self.limits.warning_apply_duration);
        if took > expected && !expected.is_zero() {
            tracing::warn!(op = "Range", ?took, ?expected, "apply request took too long");
        }
        Ok(answer?)
    }

    async fn read_txn(&self, request: TxnRequest) -> Result<(TxnResponse, i64), Status> {
        let quick = validate::branches(&request).all(|op| match &op.request {
            Some(Operation::RequestRange(range)) => self.reader.is_quick(range),
            _ => false,
        });
        if quick {
            return Ok(self.reader.txn_read_only(&request)?);
        }
        let reader = self.reader.clone();
        Ok(self.blocking.run(move || reader.txn_read_only(&request)).await??)
    }
}

#[tonic::async_trait]
impl Kv for KvService {
    type RangeStreamStream = range_stream::Chunks;

    async fn range(
        &self,
        request: Request<RangeRequest>,
    ) -> Result<Response<RangeResponse>, Status> {
        let (metadata, extensions, request) = request.into_parts();
        let caller = self.gate.unary(&metadata, &extensions, request.serializable)?;
        validate::range(&request)?;
        self.catch_up(request.serializable).await?;
        let seen = caller.reads(&request.key, &request.range_end).await?;
        let ahead = i64::from(request.serializable && sabotage::is(Variant::HeaderAhead));
        let (mut response, revision) = self.read(request).await?;
        seen.still_holds()?;
        response.header = Some(header(&self.node, revision + ahead));
        Ok(Response::new(response))
    }

    async fn range_stream(
        &self,
        request: Request<RangeRequest>,
    ) -> Result<Response<Self::RangeStreamStream>, Status> {
        let (metadata, extensions, request) = request.into_parts();
        let (caller, leader) = self.gate.stream(&metadata, &extensions, false).await?;
        validate::range_stream(&request)?;
        self.catch_up(request.serializable).await?;
        let seen = caller.reads(&request.key, &request.range_end).await?;
        let chunk_bytes = self.limits.max_request_bytes / 2;
        let node = self.node.clone();
        let chunks = range_stream::start(
            node,
            self.reader.clone(),
            self.blocking.clone(),
            request,
            chunk_bytes,
            range_stream::Stays { leader, seen },
        );
        Ok(Response::new(chunks.await?))
    }

    async fn put(&self, request: Request<PutRequest>) -> Result<Response<PutResponse>, Status> {
        let (caller, request) = self.gate.take(request)?;
        let cost = quota::put_cost(&request);
        self.quota.admit(cost).await?;
        validate::put(&request)?;
        if sabotage::is(Variant::AckBeforeCommit) {
            return Ok(self.answer_unagreed(request));
        }
        let outcome = caller.propose(Op::Put(request)).await?;
        if sabotage::is(Variant::LateRefusal) && outcome.revision % 16 == 0 {
            return Err(Error::NoSpace.into());
        }
        match outcome.result? {
            Reply::Put(mut response) => {
                self.quota.admit_applied(cost).await?;
                response.header = Some(header(&self.node, outcome.revision));
                Ok(Response::new(response))
            }
            other => Err(mismatched("Put", &other)),
        }
    }

    async fn delete_range(
        &self,
        request: Request<DeleteRangeRequest>,
    ) -> Result<Response<DeleteRangeResponse>, Status> {
        let (caller, request) = self.gate.take(request)?;
        validate::delete_range(&request)?;
        let outcome = caller.propose(Op::DeleteRange(request)).await?;
        match outcome.result? {
            Reply::DeleteRange(mut response) => {
                response.header = Some(header(&self.node, outcome.revision));
                Ok(Response::new(response))
            }
            other => Err(mismatched("DeleteRange", &other)),
        }
    }

    async fn txn(&self, request: Request<TxnRequest>) -> Result<Response<TxnResponse>, Status> {
        let (caller, request) = self.gate.take(request)?;
        let cost = quota::txn_cost(&request);
        self.quota.admit(cost).await?;
        validate::txn(&request, self.limits.max_txn_ops)?;
        let (mut response, revision) = if validate::is_read_only(&request) {
            self.catch_up(validate::is_serializable(&request)).await?;
            let seen = caller.reads_txn(&request).await?;
            let answer = self.read_txn(request).await?;
            seen.still_holds()?;
            answer
        } else {
            let outcome = caller.propose(Op::Txn(request)).await?;
            match outcome.result? {
                Reply::Txn(response) => {
                    self.quota.admit_applied(cost).await?;
                    (response, outcome.revision)
                }
                other => return Err(mismatched("Txn", &other)),
            }
        };
        response.header = Some(header(&self.node, revision));
        Ok(Response::new(response))
    }

    async fn compact(
        &self,
        request: Request<CompactionRequest>,
    ) -> Result<Response<CompactionResponse>, Status> {
        let (caller, request) = self.gate.take(request)?;
        let physical = request.physical;
        let outcome = caller.propose_urgent(Op::Compaction(request)).await?;
        let (ticket, refused) = match outcome.result {
            Ok(Reply::Compact(ticket)) => (ticket, None),
            // Whoever asks for removal may go by the answer that the rows are gone, whoever
            // compacted them.
            Err(error @ Error::Compacted) if physical => {
                (Some(self.reader.compaction_ticket()), Some(error))
            }
            Err(error) => (None, Some(error)),
            Ok(other) => return Err(mismatched("Compact", &other)),
        };
        if let Some(ticket) = ticket
            && !ticket.wait().await
        {
            return Err(Error::Stopped.into());
        }
        if let Some(error) = refused {
            return Err(error.into());
        }
        let header = Some(header(&self.node, self.reader.revision()));
        Ok(Response::new(CompactionResponse { header }))
    }
}
