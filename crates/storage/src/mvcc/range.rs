//! Range: which keys, at which revision, filtered, sorted, cut and stripped as etcd does it. Never
//! changes anything; reads the disk only for revisions older than the feed.

use std::cmp::Ordering;

use kelson_api::Error;
use kelson_api::etcdserverpb::range_request::{SortOrder, SortTarget};
use kelson_api::etcdserverpb::{RangeRequest, RangeResponse};
use kelson_api::mvccpb::KeyValue;

use super::span::Span;
use super::state::{Failure, State};
use super::walk::{Found, Walk, count_keys, find};
use crate::sabotage::{self, Variant};

/// Keys taken from the index at a time while an answer is built.
const STEP: usize = 256;

/// Answers a request against the state at `current`, the newest revision the caller may see.
pub(crate) fn range(
    state: &State,
    request: &RangeRequest,
    current: i64,
) -> Result<RangeResponse, Failure> {
    let revision = at(state, request, current)?;
    let span = Span::new(&request.key, &request.range_end);
    if request.count_only {
        let count = count_keys(state, &span, revision)?;
        check(state, revision)?;
        return Ok(RangeResponse { count, ..RangeResponse::default() });
    }
    let limit = usize::try_from(request.limit).unwrap_or(0);
    let is_cut_before_sort = !has_filters(request) && order(request) == SortOrder::None as i32;
    let reads_all = limit == 0 || !(is_cut_before_sort || is_key_order(request));
    let wanted = if reads_all { usize::MAX } else { limit.saturating_add(1) };
    let (mut kvs, seen) = collect(state, request, span.clone(), revision, wanted)?;
    let count = match seen {
        Some(all) => all,
        None => count_keys(state, &span, revision)?,
    };
    sort(request, &mut kvs);
    let mut more = limit > 0 && kvs.len() > limit;
    if more {
        kvs.truncate(limit);
    }
    more &= request.revision <= 0 || !sabotage::is(Variant::MoreForgotten);
    kvs.iter_mut().for_each(|kv| shorten(request, kv));
    check(state, revision)?;
    Ok(RangeResponse { header: None, kvs, more, count })
}

/// The revision to read: the asked one if it lies between compaction and `current`.
pub(crate) fn at(state: &State, request: &RangeRequest, current: i64) -> Result<i64, Error> {
    let revision = if request.revision <= 0 { current } else { request.revision };
    if revision > current {
        return Err(Error::FutureRevision);
    }
    check(state, revision)?;
    Ok(revision)
}

fn check(state: &State, revision: i64) -> Result<(), Error> {
    if revision < state.compaction.compacted() { Err(Error::Compacted) } else { Ok(()) }
}

/// Reads up to `wanted` rows that pass the filters, and tells how many keys the span has if the walk
/// went over all of it.
fn collect(
    state: &State,
    request: &RangeRequest,
    span: Span,
    revision: i64,
    wanted: usize,
) -> Result<(Vec<KeyValue>, Option<i64>), Failure> {
    if let Some(key) = span.single() {
        let kv = find(state, key, revision)?;
        let seen = i64::from(kv.is_some());
        return Ok((kv.into_iter().filter(|kv| passes(request, kv)).collect(), Some(seen)));
    }
    let mut walk = Walk::new(span, revision);
    let mut kvs = Vec::new();
    let mut found: Vec<Found> = Vec::with_capacity(STEP.min(wanted));
    let mut seen = 0;
    while !walk.is_done() {
        if kvs.len() >= wanted {
            return Ok((kvs, None));
        }
        walk.step(state, STEP.min(wanted - kvs.len()), &mut found)?;
        seen += i64::try_from(found.len()).expect("one step");
        for found in found.drain(..) {
            let kv = found.resolve(state, revision)?;
            if passes(request, &kv) {
                kvs.push(kv);
            }
        }
    }
    Ok((kvs, Some(seen)))
}

/// Takes out what a request for keys only does not get. As with etcd 3.7 that includes the lease,
/// unless the values were looked at for sorting.
pub(crate) fn shorten(request: &RangeRequest, kv: &mut KeyValue) {
    if request.keys_only {
        kv.value.clear();
        if request.sort_target != SortTarget::Value as i32 {
            kv.lease = 0;
        }
    }
}

/// Whether any revision filter is on.
pub(crate) fn has_filters(request: &RangeRequest) -> bool {
    request.min_mod_revision != 0
        || request.max_mod_revision != 0
        || request.min_create_revision != 0
        || request.max_create_revision != 0
}

fn passes(request: &RangeRequest, kv: &KeyValue) -> bool {
    let within = |low: i64, high: i64, revision: i64| {
        (low == 0 || revision >= low) && (high == 0 || revision <= high)
    };
    within(request.min_mod_revision, request.max_mod_revision, kv.mod_revision)
        && within(request.min_create_revision, request.max_create_revision, kv.create_revision)
}

fn order(request: &RangeRequest) -> i32 {
    request.sort_order
}

/// Whether the walk's own order is the asked one, so that a cut needs no more than its keys.
fn is_key_order(request: &RangeRequest) -> bool {
    request.sort_target == SortTarget::Key as i32 && order(request) != SortOrder::Descend as i32
}

/// Sorts as asked. No order with another target than the key means ascending, after the cut. Ties
/// keep key order, which etcd leaves open. An unknown target counts as the key.
pub(crate) fn sort(request: &RangeRequest, kvs: &mut [KeyValue]) {
    if is_key_order(request) {
        return;
    }
    let compare: fn(&KeyValue, &KeyValue) -> Ordering =
        match SortTarget::try_from(request.sort_target).unwrap_or_default() {
            SortTarget::Key => |a, b| a.key.cmp(&b.key),
            SortTarget::Version => |a, b| a.version.cmp(&b.version),
            SortTarget::Create => |a, b| a.create_revision.cmp(&b.create_revision),
            SortTarget::Mod => |a, b| a.mod_revision.cmp(&b.mod_revision),
            SortTarget::Value => |a, b| a.value.cmp(&b.value),
        };
    if request.sort_order == SortOrder::Descend as i32 {
        kvs.sort_by(|a, b| compare(b, a));
    } else {
        kvs.sort_by(compare);
    }
}
