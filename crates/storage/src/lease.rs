//! Leases as the log knows them: id, TTL, checkpointed rest, and the keys attached. Time never passes
//! here; who counts it down is the leader's housekeeping, and ends a lease through the log.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;

use bytes::Bytes;

use crate::types::LeaseRow;

/// All leases of the store.
#[derive(Default)]
pub(crate) struct Leases {
    by_id: BTreeMap<i64, Lease>,
}

struct Lease {
    row: LeaseRow,
    /// Attached keys in key order: the order in which a revocation deletes them.
    keys: BTreeSet<Box<[u8]>>,
}

impl Leases {
    pub(crate) fn contains(&self, id: i64) -> bool {
        self.by_id.contains_key(&id)
    }

    pub(crate) fn get(&self, id: i64) -> Option<LeaseRow> {
        self.by_id.get(&id).map(|lease| lease.row)
    }

    /// All leases by ascending id.
    pub(crate) fn rows(&self) -> Vec<LeaseRow> {
        self.by_id.values().map(|lease| lease.row).collect()
    }

    /// Attached keys in key order; none for an unknown lease.
    pub(crate) fn keys(&self, id: i64) -> Vec<Bytes> {
        let keys = self.by_id.get(&id).map(|lease| &lease.keys);
        keys.into_iter().flatten().map(|key| Bytes::copy_from_slice(key)).collect()
    }

    /// The first attached key after `after`.
    pub(crate) fn next_key(&self, id: i64, after: Option<&[u8]>) -> Option<Bytes> {
        let keys = &self.by_id.get(&id)?.keys;
        let start = after.map_or(Bound::Unbounded, Bound::Excluded);
        let next = keys.range::<[u8], _>((start, Bound::Unbounded)).next()?;
        Some(Bytes::copy_from_slice(next))
    }

    /// Adds a lease, or replaces its times.
    pub(crate) fn put(&mut self, row: LeaseRow) {
        let fresh = || Lease { row, keys: BTreeSet::new() };
        self.by_id.entry(row.id).or_insert_with(fresh).row = row;
    }

    pub(crate) fn remove(&mut self, id: i64) {
        self.by_id.remove(&id);
    }

    /// Moves a key from one lease to another; 0 is no lease, and unknown ones are passed over.
    pub(crate) fn reattach(&mut self, key: &[u8], from: i64, to: i64) {
        if let Some(lease) = self.by_id.get_mut(&from) {
            lease.keys.remove(key);
        }
        if let Some(lease) = self.by_id.get_mut(&to) {
            lease.keys.insert(key.into());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_follow_their_lease() {
        let mut leases = Leases::default();
        for id in [7, -3] {
            leases.put(LeaseRow { id, ttl: 5, remaining_ttl: 0 });
        }
        leases.reattach(b"b", 0, 7);
        leases.reattach(b"a", 99, 7);
        assert_eq!(leases.keys(7), [&b"a"[..], b"b"]);
        assert_eq!(leases.next_key(7, Some(b"a")).as_deref(), Some(&b"b"[..]));
        leases.reattach(b"a", 7, -3);
        leases.put(LeaseRow { id: -3, ttl: 5, remaining_ttl: 2 });
        assert_eq!(leases.keys(-3), [&b"a"[..]], "new times keep the keys");
        leases.remove(7);
        assert!(leases.keys(7).is_empty() && leases.next_key(7, None).is_none());
        assert_eq!(leases.rows().len(), 1);
    }
}
