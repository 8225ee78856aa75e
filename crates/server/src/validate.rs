//! Checks a key-value request before anything is proposed or read, in etcd's order, so that a
//! request with several faults gets the same error as from etcd. It never looks at the store:
//! what depends on the state is decided when the entry is applied.

use std::collections::{BTreeMap, HashSet};
use std::ops::Bound;

use kelson_api::Error;
use kelson_api::etcdserverpb::range_request::{SortOrder, SortTarget};
use kelson_api::etcdserverpb::request_op::Request;
use kelson_api::etcdserverpb::{
    DeleteRangeRequest, PutRequest, RangeRequest, RequestOp, TxnRequest,
};

/// Checks a range: a key and known sort options.
///
/// # Errors
/// `EmptyKey`, `InvalidSortOption`.
pub fn range(request: &RangeRequest) -> Result<(), Error> {
    if request.key.is_empty() {
        return Err(Error::EmptyKey);
    }
    let known = SortOrder::try_from(request.sort_order).is_ok()
        && SortTarget::try_from(request.sort_target).is_ok();
    if known { Ok(()) } else { Err(Error::InvalidSortOption) }
}

/// Checks a range that is to be streamed: its keys come in key order and unfiltered.
///
/// # Errors
/// As [`range`], then `StreamSort`, then `StreamFilter`.
pub fn range_stream(request: &RangeRequest) -> Result<(), Error> {
    range(request)?;
    // Without an order the keys come as they are stored, whatever target is named.
    let by_key = request.sort_target == SortTarget::Key as i32;
    let in_key_order = request.sort_order == SortOrder::None as i32
        || (by_key && request.sort_order == SortOrder::Ascend as i32);
    if !in_key_order {
        return Err(Error::StreamSort);
    }
    let filtered = [
        request.min_mod_revision,
        request.max_mod_revision,
        request.min_create_revision,
        request.max_create_revision,
    ];
    if filtered.iter().any(|bound| *bound != 0) { Err(Error::StreamFilter) } else { Ok(()) }
}

/// Checks a put: a key, and nothing given that it asks to be ignored.
///
/// # Errors
/// `EmptyKey`, `ValueProvided`, `LeaseProvided`.
pub fn put(request: &PutRequest) -> Result<(), Error> {
    if request.key.is_empty() {
        return Err(Error::EmptyKey);
    }
    if request.ignore_value && !request.value.is_empty() {
        return Err(Error::ValueProvided);
    }
    if request.ignore_lease && request.lease != 0 {
        return Err(Error::LeaseProvided);
    }
    Ok(())
}

/// Checks a delete: a key.
///
/// # Errors
/// `EmptyKey`.
pub fn delete_range(request: &DeleteRangeRequest) -> Result<(), Error> {
    if request.key.is_empty() { Err(Error::EmptyKey) } else { Ok(()) }
}

/// Transactions within one another, the outermost included. Each is two messages deep, and whoever
/// reads a message refuses the hundred and first within one another: a command that cannot be read
/// back from the log would end every member.
const LEVELS_MAX: usize = 32;

/// Checks a transaction: number of nesting levels, size of each, its operations in the order given,
/// then keys that it would change twice.
///
/// # Errors
/// `TooManyOps`, the errors of the single operations, `KeyNotFound` for an empty operation,
/// `DuplicateKey`.
pub fn txn(request: &TxnRequest, max_ops: usize) -> Result<(), Error> {
    level(request, max_ops, LEVELS_MAX)?;
    changes(&request.success)?;
    changes(&request.failure)?;
    Ok(())
}

/// Whether the transaction can be answered without agreement: it holds nothing but ranges. A
/// nested transaction counts as a write even if it only reads.
#[must_use]
pub fn is_read_only(request: &TxnRequest) -> bool {
    branches(request).all(|op| matches!(op.request, Some(Request::RequestRange(_))))
}

/// Whether a read-only transaction may be answered from local state: each of its ranges says so.
#[must_use]
pub fn is_serializable(request: &TxnRequest) -> bool {
    branches(request)
        .all(|op| matches!(&op.request, Some(Request::RequestRange(range)) if range.serializable))
}

/// The operations of both branches of this level.
pub fn branches(request: &TxnRequest) -> impl Iterator<Item = &RequestOp> {
    request.success.iter().chain(&request.failure)
}

/// Checks one nesting level. A nested transaction may use what its parent's widest list leaves, and
/// one of the levels that are left.
fn level(request: &TxnRequest, max_ops: usize, levels: usize) -> Result<(), Error> {
    let levels = levels.checked_sub(1).ok_or(Error::TooManyOps)?;
    let widest = request.compare.len().max(request.success.len()).max(request.failure.len());
    let Some(left) = max_ops.checked_sub(widest) else {
        return Err(Error::TooManyOps);
    };
    if request.compare.iter().any(|compare| compare.key.is_empty()) {
        return Err(Error::EmptyKey);
    }
    for op in branches(request) {
        match &op.request {
            Some(Request::RequestRange(request)) => range(request)?,
            Some(Request::RequestPut(request)) => put(request)?,
            Some(Request::RequestDeleteRange(request)) => delete_range(request)?,
            Some(Request::RequestTxn(request)) => level(request, left, levels)?,
            None => return Err(Error::KeyNotFound),
        }
    }
    Ok(())
}

/// What one branch changes, with all transactions nested in it.
#[derive(Default)]
struct Changes<'a> {
    puts: HashSet<&'a [u8]>,
    deletes: Spans,
}

/// Collects what a branch changes and refuses a key that it changes twice.
///
/// The order of the steps decides which overlaps are seen, and it is etcd's: deletes of this level
/// first, then nested transactions one by one, each checked against the deletes known so far but
/// not against its own; then the puts of this level. So siblings [put k], [delete k] pass while
/// [delete k], [put k] do not.
fn changes(ops: &[RequestOp]) -> Result<Changes<'_>, Error> {
    let mut found = Changes::default();
    for op in ops {
        if let Some(Request::RequestDeleteRange(request)) = &op.request {
            found.deletes.insert(request);
        }
    }
    for op in ops {
        if let Some(Request::RequestTxn(nested)) = &op.request {
            let then = changes(&nested.success)?;
            let otherwise = changes(&nested.failure)?;
            adopt(&mut found, then, otherwise)?;
        }
    }
    for op in ops {
        if let Some(Request::RequestPut(request)) = &op.request {
            add_put(&mut found, &request.key)?;
        }
    }
    Ok(found)
}

/// Joins a nested transaction into its parent. Only one of its branches runs, so both may put the
/// same key.
fn adopt<'a>(
    found: &mut Changes<'a>,
    then: Changes<'a>,
    otherwise: Changes<'a>,
) -> Result<(), Error> {
    for key in &then.puts {
        add_put(found, key)?;
    }
    for key in otherwise.puts {
        // Present already because of the other branch: that one was checked a moment ago.
        if !then.puts.contains(key) {
            add_put(found, key)?;
        }
    }
    found.deletes.absorb(then.deletes);
    found.deletes.absorb(otherwise.deletes);
    Ok(())
}

fn add_put<'a>(found: &mut Changes<'a>, key: &'a [u8]) -> Result<(), Error> {
    if found.deletes.contains(key) || !found.puts.insert(key) {
        return Err(Error::DuplicateKey);
    }
    Ok(())
}

/// A union of half-open key intervals, kept disjoint so that a lookup looks at one of them.
#[derive(Default)]
struct Spans {
    /// Start to exclusive end.
    by_start: BTreeMap<Vec<u8>, Vec<u8>>,
}

impl Spans {
    /// Adds the keys of a delete. An open end (`\0`) is an ordinary, smallest end here, as in
    /// etcd's check: the span is empty, so such a delete never conflicts with a put.
    fn insert(&mut self, request: &DeleteRangeRequest) {
        let start = request.key.to_vec();
        let end = if request.range_end.is_empty() {
            let mut end = start.clone();
            end.push(0);
            end
        } else {
            request.range_end.to_vec()
        };
        self.insert_span(start, end);
    }

    fn insert_span(&mut self, mut start: Vec<u8>, mut end: Vec<u8>) {
        if end <= start {
            return;
        }
        // Each round takes in one span that touches the new one; what is left is disjoint.
        while let Some((key, value)) = self.by_start.range(..=end.clone()).next_back() {
            if *value < start {
                break;
            }
            let key = key.clone();
            let value = self.by_start.remove(&key).expect("the key was just read from the map");
            start = start.min(key);
            end = end.max(value);
        }
        self.by_start.insert(start, end);
    }

    fn absorb(&mut self, other: Spans) {
        for (start, end) in other.by_start {
            self.insert_span(start, end);
        }
    }

    fn contains(&self, key: &[u8]) -> bool {
        let mut up_to = self.by_start.range::<[u8], _>((Bound::Unbounded, Bound::Included(key)));
        up_to.next_back().is_some_and(|(_, end)| end.as_slice() > key)
    }
}

#[cfg(test)]
mod tests;
