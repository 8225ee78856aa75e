//! When each lease ends, as the leader's monotonic clock sees it. A plain table without a clock of
//! its own and without knowledge of members; the lessor asks it and proposes what it says.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::time::Duration;

use kelson_api::etcdserverpb::LeaseCheckpoint;
use kelson_storage::LeaseRow;
use kelson_storage::sabotage::{self, Variant};
use tokio::time::Instant;

/// Deadlines of all leases while this member leads; nothing otherwise. It knows no clock: each
/// call says what time it is.
#[derive(Default)]
pub(super) struct Deadlines {
    /// The term in which this member leads.
    pub(super) term: Option<u64>,
    leases: HashMap<i64, Deadline>,
    /// When to look at which lease. Exactly one entry per lease: (`Deadline::look`, id).
    order: BTreeSet<(Instant, i64)>,
}

#[derive(Clone, Copy)]
struct Deadline {
    ends: Instant,
    /// `ends`, or later once its end has been proposed and may have to be proposed again.
    look: Instant,
}

impl Deadlines {
    /// Starts every lease afresh: nothing ends before the clients could reach the new leader.
    pub(super) fn promote(&mut self, term: u64, rows: &[LeaseRow], now: Instant, grace: Duration) {
        self.demote();
        self.term = Some(term);
        for row in rows {
            let left = if row.remaining_ttl > 0 { row.remaining_ttl } else { row.ttl };
            let left = if sabotage::is(Variant::LeaseForever) { i64::MAX } else { left };
            self.set(row.id, later(now + grace, left));
        }
    }

    pub(super) fn demote(&mut self) {
        *self = Self::default();
    }

    /// Takes over what the store says: new leases start now, gone ones are forgotten.
    pub(super) fn reconcile(&mut self, rows: &[LeaseRow], now: Instant) {
        for row in rows {
            self.reconcile_one(*row, now);
        }
        if self.leases.len() > rows.len() {
            let alive: HashSet<i64> = rows.iter().map(|row| row.id).collect();
            let gone = self.leases.keys().filter(|id| !alive.contains(id)).copied();
            for id in gone.collect::<Vec<_>>() {
                self.remove(id);
            }
        }
    }

    /// Takes over one lease that the store has, unless it is known.
    pub(super) fn reconcile_one(&mut self, row: LeaseRow, now: Instant) {
        if !self.leases.contains_key(&row.id) {
            self.set(row.id, later(now, row.ttl));
        }
    }

    /// Gives a lease its full time from now on; false if its time is up already.
    pub(super) fn renew(&mut self, row: LeaseRow, now: Instant) -> bool {
        if self.leases.get(&row.id).is_some_and(|deadline| deadline.ends <= now) {
            return false;
        }
        if !sabotage::is(Variant::KeepAliveForgotten) {
            self.set(row.id, later(now, row.ttl));
        }
        true
    }

    /// Time left of a lease; none if its time is up or it is unknown here.
    pub(super) fn left(&self, id: i64, now: Instant) -> Option<Duration> {
        self.leases.get(&id).map(|deadline| deadline.ends.saturating_duration_since(now))
    }

    /// Up to `most` leases whose time is up, the longest overdue first. The same lease is given
    /// out again only after `retry`.
    pub(super) fn due(&mut self, now: Instant, most: usize, retry: Duration) -> Vec<i64> {
        let due = self.order.range(..=(now, i64::MAX)).take(most);
        let due: Vec<i64> = due.map(|(_, id)| *id).collect();
        for id in &due {
            let deadline = self.leases.get_mut(id).expect("every entry of the order has a lease");
            self.order.remove(&(deadline.look, *id));
            deadline.look = now + retry;
            self.order.insert((deadline.look, *id));
        }
        due
    }

    /// Leases with more than `at_least` left, with the seconds they have.
    pub(super) fn long(&self, now: Instant, at_least: Duration) -> Vec<LeaseCheckpoint> {
        let checkpoints = self.leases.iter().filter_map(|(id, deadline)| {
            let left = deadline.ends.saturating_duration_since(now);
            (left > at_least)
                .then(|| LeaseCheckpoint { id: *id, remaining_ttl: whole_seconds(left) })
        });
        checkpoints.collect()
    }

    pub(super) fn set(&mut self, id: i64, ends: Instant) {
        let deadline = Deadline { ends, look: ends };
        if let Some(old) = self.leases.insert(id, deadline) {
            self.order.remove(&(old.look, id));
        }
        self.order.insert((ends, id));
    }

    pub(super) fn remove(&mut self, id: i64) {
        if let Some(old) = self.leases.remove(&id) {
            self.order.remove(&(old.look, id));
        }
    }
}

/// `from` and so many seconds more; times beyond the clock's range stay at a far end of it.
pub(super) fn later(from: Instant, seconds: i64) -> Instant {
    const FAR: Duration = Duration::from_secs(100 * 365 * 24 * 3600);
    let time = Duration::from_secs(u64::try_from(seconds).unwrap_or(0));
    from.checked_add(time).unwrap_or(from + FAR)
}

/// Seconds as etcd shows them: cut, not rounded.
pub(super) fn whole_seconds(time: Duration) -> i64 {
    i64::try_from(time.as_secs()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As in the lessor.
    const SCAN_MAX: usize = 500;
    const CHECKPOINT_INTERVAL: Duration = Duration::from_secs(300);

    const SECOND: Duration = Duration::from_secs(1);
    const RETRY: Duration = Duration::from_secs(7);
    const NONE: [i64; 0] = [];

    fn row(id: i64, ttl: i64) -> LeaseRow {
        LeaseRow { id, ttl, remaining_ttl: 0 }
    }

    #[test]
    fn a_lease_ends_at_its_deadline_and_not_before() {
        let start = Instant::now();
        let mut deadlines = Deadlines::default();
        deadlines.reconcile(&[row(1, 2), row(-7, 3)], start);
        assert_eq!(deadlines.due(start + 2 * SECOND - Duration::from_nanos(1), 10, RETRY), NONE);
        assert_eq!(deadlines.due(start + 2 * SECOND, 10, RETRY), [1]);
        assert_eq!(deadlines.due(start + 3 * SECOND, 10, RETRY), [-7]);
    }

    #[test]
    fn an_ending_lease_is_proposed_again_only_later_and_cannot_be_renewed() {
        let start = Instant::now();
        let mut deadlines = Deadlines::default();
        deadlines.reconcile(&[row(1, 2)], start);
        let up = start + 2 * SECOND;
        assert_eq!(deadlines.due(up, 10, RETRY), [1]);
        assert!(!deadlines.renew(row(1, 2), up));
        assert_eq!(deadlines.due(up + 6 * SECOND, 10, RETRY), NONE);
        assert_eq!(deadlines.due(up + RETRY, 10, RETRY), [1]);
        deadlines.reconcile(&[], up + RETRY);
        assert_eq!(deadlines.due(up + 100 * SECOND, 10, RETRY), NONE);
        assert!(deadlines.order.is_empty() && deadlines.leases.is_empty());
    }

    #[test]
    fn renewing_gives_the_full_time() {
        let start = Instant::now();
        let mut deadlines = Deadlines::default();
        deadlines.reconcile(&[row(1, 5)], start);
        assert_eq!(deadlines.left(1, start + 4 * SECOND), Some(SECOND));
        assert!(deadlines.renew(row(1, 5), start + 4 * SECOND));
        assert_eq!(deadlines.due(start + 8 * SECOND, 10, RETRY), NONE);
        assert_eq!(deadlines.due(start + 9 * SECOND, 10, RETRY), [1]);
        assert_eq!(deadlines.left(1, start + 99 * SECOND), Some(Duration::ZERO));
        assert_eq!(deadlines.left(2, start), None);
    }

    #[test]
    fn a_new_leader_starts_all_leases_afresh() {
        let start = Instant::now();
        let mut deadlines = Deadlines::default();
        let rows = [row(1, 10), LeaseRow { id: 2, ttl: 1000, remaining_ttl: 3 }];
        deadlines.reconcile(&rows, start);
        let later = start + 9 * SECOND;
        deadlines.promote(4, &rows, later, SECOND);
        assert_eq!(deadlines.term, Some(4));
        assert_eq!(deadlines.due(later + 4 * SECOND, 10, RETRY), [2]);
        assert_eq!(deadlines.due(later + 10 * SECOND, 10, RETRY), NONE);
        assert_eq!(deadlines.due(later + 11 * SECOND, 10, RETRY), [1, 2]);
    }

    #[test]
    fn one_scan_ends_a_bounded_number() {
        let start = Instant::now();
        let rows: Vec<LeaseRow> = (1..=1200).map(|id| row(id, 1)).collect();
        let mut deadlines = Deadlines::default();
        deadlines.reconcile(&rows, start);
        let up = start + SECOND;
        let sizes: Vec<usize> = (0..4).map(|_| deadlines.due(up, SCAN_MAX, RETRY).len()).collect();
        assert_eq!(sizes, [500, 500, 200, 0]);
    }

    #[test]
    fn only_long_leases_are_recorded() {
        let start = Instant::now();
        let mut deadlines = Deadlines::default();
        deadlines.reconcile(&[row(1, 300), row(2, 4000)], start);
        let found = deadlines.long(start + SECOND, CHECKPOINT_INTERVAL);
        assert_eq!(found, [LeaseCheckpoint { id: 2, remaining_ttl: 3999 }]);
    }

    #[test]
    fn the_longest_ttl_does_not_overflow() {
        let start = Instant::now();
        let mut deadlines = Deadlines::default();
        deadlines.reconcile(&[row(1, 9_000_000_000), row(2, i64::MAX)], start);
        assert_eq!(deadlines.left(1, start).map(whole_seconds), Some(9_000_000_000));
        assert!(deadlines.left(2, start) > Some(365 * 24 * 3600 * SECOND));
    }
}
