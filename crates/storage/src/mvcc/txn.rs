//! Transactions: which branch holds, whether it may run, and its execution. All compares, those of
//! nested transactions too, look at the state before the transaction; a check that fails refuses all
//! of it, so that execution cannot stop half way.

use kelson_api::Error;
use kelson_api::etcdserverpb::compare::{CompareResult, CompareTarget, TargetUnion};
use kelson_api::etcdserverpb::request_op::Request;
use kelson_api::etcdserverpb::response_op::Response;
use kelson_api::etcdserverpb::{
    Compare, DeleteRangeRequest, DeleteRangeResponse, PutRequest, PutResponse, RangeRequest,
    RequestOp, ResponseHeader, ResponseOp, TxnRequest, TxnResponse,
};
use kelson_api::mvccpb::KeyValue;

use super::range::range;
use super::span::Span;
use super::state::{Failure, State, count};
use super::walk::{Walk, find};
use super::write::{Put, Writer};
use crate::sabotage::{self, Variant};

/// Keys that a compare over a range takes from the index at a time.
const STEP: usize = 256;

/// The branch that was chosen, and the choices of the transactions nested in it, in order.
pub(crate) struct Choice {
    succeeded: bool,
    nested: Vec<Choice>,
}

impl Choice {
    fn operations<'a>(&self, txn: &'a TxnRequest) -> &'a [RequestOp] {
        if self.succeeded { &txn.success } else { &txn.failure }
    }
}

/// Evaluates all compares of the path that will run, on the state at `revision`.
pub(crate) fn choose(state: &State, txn: &TxnRequest, revision: i64) -> Result<Choice, Failure> {
    let mut succeeded = true;
    for compare in &txn.compare {
        if !holds(state, compare, revision)? {
            succeeded = false;
            break;
        }
    }
    let mut choice = Choice { succeeded, nested: Vec::new() };
    for operation in choice.operations(txn) {
        if let Some(Request::RequestTxn(inner)) = &operation.request {
            choice.nested.push(choose(state, inner, revision)?);
        }
    }
    Ok(choice)
}

fn holds(state: &State, compare: &Compare, revision: i64) -> Result<bool, Failure> {
    let span = Span::new(&compare.key, &compare.range_end);
    let is_value = compare.target == CompareTarget::Value as i32;
    let zero = || !is_value && matches(compare, &KeyValue::default());
    if let Some(key) = span.single() {
        let kv = find(state, key, revision)?;
        return Ok(kv.map_or_else(zero, |kv| matches(compare, &kv)));
    }
    let mut walk = Walk::new(span, revision);
    let mut found = Vec::new();
    let mut is_empty = true;
    while !walk.is_done() {
        walk.step(state, STEP, &mut found)?;
        for found in found.drain(..) {
            is_empty = false;
            if !matches(compare, &found.resolve(state, revision)?) {
                return Ok(false);
            }
        }
    }
    Ok(!is_empty || zero())
}

/// One key against one compare. An operand of another kind than the target counts as 0 or empty, an
/// unknown target as equal, an unknown result as true: so etcd evaluates them.
fn matches(compare: &Compare, kv: &KeyValue) -> bool {
    let operand = compare.target_union.as_ref();
    let ordering = match CompareTarget::try_from(compare.target) {
        Ok(CompareTarget::Value) => {
            let value = match operand {
                Some(TargetUnion::Value(value)) => value.as_ref(),
                _ => &[],
            };
            kv.value.as_ref().cmp(value)
        }
        Ok(CompareTarget::Version) => kv.version.cmp(&match operand {
            Some(TargetUnion::Version(version)) => *version,
            _ => 0,
        }),
        Ok(CompareTarget::Create) if sabotage::is(Variant::FenceIgnored) => return true,
        Ok(CompareTarget::Create) => kv.create_revision.cmp(&match operand {
            Some(TargetUnion::CreateRevision(revision)) => *revision,
            _ => 0,
        }),
        Ok(CompareTarget::Mod) => kv.mod_revision.cmp(&match operand {
            Some(TargetUnion::ModRevision(revision)) => *revision,
            _ => 0,
        }),
        Ok(CompareTarget::Lease) => kv.lease.cmp(&match operand {
            Some(TargetUnion::Lease(lease)) => *lease,
            _ => 0,
        }),
        Err(_) => std::cmp::Ordering::Equal,
    };
    match CompareResult::try_from(compare.result) {
        Ok(CompareResult::Equal) => ordering.is_eq(),
        Ok(CompareResult::Greater) => ordering.is_gt(),
        Ok(CompareResult::Less) => ordering.is_lt(),
        Ok(CompareResult::NotEqual) => ordering.is_ne(),
        Err(_) => true,
    }
}

/// Refuses a chosen path that could not run to its end.
pub(crate) fn check(
    state: &State,
    txn: &TxnRequest,
    choice: &Choice,
    revision: i64,
) -> Result<(), Failure> {
    let mut nested = choice.nested.iter();
    for operation in choice.operations(txn) {
        match &operation.request {
            Some(Request::RequestRange(request)) => check_range(state, request, revision)?,
            Some(Request::RequestPut(request)) => {
                check_kept(state, request, revision)?;
                check_lease(state, request)?;
            }
            Some(Request::RequestTxn(inner)) => {
                let choice = nested.next().expect("one choice for each nested transaction");
                check(state, inner, choice, revision)?;
            }
            Some(Request::RequestDeleteRange(_)) | None => {}
        }
    }
    Ok(())
}

/// Only revision 0 is free here: etcd compares a negative one with the compaction revision.
fn check_range(state: &State, request: &RangeRequest, revision: i64) -> Result<(), Error> {
    match request.revision {
        0 => Ok(()),
        asked if asked > revision => Err(Error::FutureRevision),
        asked if asked < state.compaction.compacted() => Err(Error::Compacted),
        _ => Ok(()),
    }
}

/// A put that keeps the value or the lease needs a key to keep it from.
pub(crate) fn check_kept(
    state: &State,
    request: &PutRequest,
    revision: i64,
) -> Result<(), Failure> {
    let keeps = request.ignore_value || request.ignore_lease;
    if keeps && find(state, &request.key, revision)?.is_none() {
        return Err(Error::KeyNotFound.into());
    }
    Ok(())
}

/// A put with a lease needs the lease.
pub(crate) fn check_lease(state: &State, request: &PutRequest) -> Result<(), Error> {
    if request.lease != 0 && !state.leases.read().contains(request.lease) {
        return Err(Error::LeaseNotFound);
    }
    Ok(())
}

/// Runs a checked path.
pub(crate) fn run(
    writer: &mut Writer<'_>,
    txn: &TxnRequest,
    choice: &Choice,
) -> Result<TxnResponse, Failure> {
    let mut nested = choice.nested.iter();
    let mut responses = Vec::new();
    for operation in choice.operations(txn) {
        let response = match &operation.request {
            Some(Request::RequestRange(request)) => {
                count(&writer.state.counters.ranges, 1);
                let mut response = range(writer.state, request, writer.revision())?;
                response.header = header(writer.revision());
                Some(Response::ResponseRange(response))
            }
            Some(Request::RequestPut(request)) => {
                let mut response = put(writer, request);
                response.header = header(writer.revision());
                Some(Response::ResponsePut(response))
            }
            Some(Request::RequestDeleteRange(request)) => {
                let mut response = delete_range(writer, request)?;
                response.header = header(writer.revision());
                Some(Response::ResponseDeleteRange(response))
            }
            Some(Request::RequestTxn(inner)) => {
                let choice = nested.next().expect("one choice for each nested transaction");
                let mut response = run(writer, inner, choice)?;
                response.header = Some(ResponseHeader::default());
                Some(Response::ResponseTxn(response))
            }
            None => None,
        };
        responses.push(ResponseOp { response });
    }
    Ok(TxnResponse { header: None, succeeded: choice.succeeded, responses })
}

/// Runs the chosen path of a transaction that only reads, at one revision.
pub(crate) fn run_read_only(
    state: &State,
    txn: &TxnRequest,
    choice: &Choice,
    revision: i64,
) -> Result<TxnResponse, Failure> {
    let mut nested = choice.nested.iter();
    let mut responses = Vec::new();
    for operation in choice.operations(txn) {
        let response = match &operation.request {
            Some(Request::RequestRange(request)) => {
                count(&state.counters.ranges, 1);
                let mut response = range(state, request, revision)?;
                response.header = header(revision);
                Some(Response::ResponseRange(response))
            }
            Some(Request::RequestTxn(inner)) => {
                let choice = nested.next().expect("one choice for each nested transaction");
                let mut response = run_read_only(state, inner, choice, revision)?;
                response.header = Some(ResponseHeader::default());
                Some(Response::ResponseTxn(response))
            }
            // A transaction that writes goes through the log; here its writes have no answer.
            Some(Request::RequestPut(_) | Request::RequestDeleteRange(_)) | None => None,
        };
        responses.push(ResponseOp { response });
    }
    Ok(TxnResponse { header: None, succeeded: choice.succeeded, responses })
}

#[expect(clippy::unnecessary_wraps, reason = "the field it fills is an Option")]
fn header(revision: i64) -> Option<ResponseHeader> {
    Some(ResponseHeader { revision, ..ResponseHeader::default() })
}

/// Carries out a checked put.
pub(crate) fn put(writer: &mut Writer<'_>, request: &PutRequest) -> PutResponse {
    let change = Put {
        value: (!request.ignore_value).then_some(request.value.as_ref()),
        lease: (!request.ignore_lease).then_some(request.lease),
    };
    let prev_kv = writer.put(&request.key, &change);
    PutResponse { header: None, prev_kv: prev_kv.filter(|_| request.prev_kv) }
}

/// Carries out a deletion.
pub(crate) fn delete_range(
    writer: &mut Writer<'_>,
    request: &DeleteRangeRequest,
) -> Result<DeleteRangeResponse, Failure> {
    let span = Span::new(&request.key, &request.range_end);
    let (deleted, prev_kvs) = writer.delete_range(span, request.prev_kv)?;
    Ok(DeleteRangeResponse { header: None, deleted, prev_kvs })
}

/// Whether a transaction has a put in either branch, at any depth: only those count against quota.
pub(crate) fn has_put(txn: &TxnRequest) -> bool {
    txn.success.iter().chain(&txn.failure).any(|operation| match &operation.request {
        Some(Request::RequestPut(_)) => true,
        Some(Request::RequestTxn(inner)) => has_put(inner),
        _ => false,
    })
}
