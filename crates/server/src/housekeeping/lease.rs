//! The lessor: which lease ends when. The leader's monotonic clock decides when to propose the end
//! of a lease; the end itself is an agreed entry, and a lease exists as long as the store says
//! so. Deadlines are never stored: a new leader starts all of them afresh.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use kelson_api::Error;
use kelson_api::command::command::Op;
use kelson_api::etcdserverpb::{LeaseCheckpoint, LeaseCheckpointRequest, LeaseRevokeRequest};
use kelson_raft::Node;
use kelson_storage::{LeaseRow, Reader};
use parking_lot::Mutex;
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::app::App;
use crate::limits::Limits;
use crate::metrics::Metrics;

/// Time between two looks for leases whose time is up.
const SCAN_INTERVAL: Duration = Duration::from_millis(500);

/// Leases ended by one scan at most; the rest waits for the next one.
const SCAN_MAX: usize = 500;

/// Revocations under way at once; further ones of the same scan wait for a place.
const REVOKES_MAX: usize = 16;

/// Leases with more time left than this have it recorded that often, if asked for.
const CHECKPOINT_INTERVAL: Duration = Duration::from_secs(300);

/// Leases in one checkpoint command.
const CHECKPOINT_BATCH: usize = 1000;

/// Deadlines of all leases while this member leads; nothing otherwise. It knows no clock: each
/// call says what time it is.
#[derive(Default)]
struct Deadlines {
    /// The term in which this member leads.
    term: Option<u64>,
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
    fn promote(&mut self, term: u64, rows: &[LeaseRow], now: Instant, grace: Duration) {
        self.demote();
        self.term = Some(term);
        for row in rows {
            let left = if row.remaining_ttl > 0 { row.remaining_ttl } else { row.ttl };
            self.set(row.id, later(now + grace, left));
        }
    }

    fn demote(&mut self) {
        *self = Self::default();
    }

    /// Takes over what the store says: new leases start now, gone ones are forgotten.
    fn reconcile(&mut self, rows: &[LeaseRow], now: Instant) {
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
    fn reconcile_one(&mut self, row: LeaseRow, now: Instant) {
        if !self.leases.contains_key(&row.id) {
            self.set(row.id, later(now, row.ttl));
        }
    }

    /// Gives a lease its full time from now on; false if its time is up already.
    fn renew(&mut self, row: LeaseRow, now: Instant) -> bool {
        if self.leases.get(&row.id).is_some_and(|deadline| deadline.ends <= now) {
            return false;
        }
        self.set(row.id, later(now, row.ttl));
        true
    }

    /// Time left of a lease; none if its time is up or it is unknown here.
    fn left(&self, id: i64, now: Instant) -> Option<Duration> {
        self.leases.get(&id).map(|deadline| deadline.ends.saturating_duration_since(now))
    }

    /// Up to `most` leases whose time is up, the longest overdue first. The same lease is given
    /// out again only after `retry`.
    fn due(&mut self, now: Instant, most: usize, retry: Duration) -> Vec<i64> {
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
    fn long(&self, now: Instant, at_least: Duration) -> Vec<LeaseCheckpoint> {
        let checkpoints = self.leases.iter().filter_map(|(id, deadline)| {
            let left = deadline.ends.saturating_duration_since(now);
            (left > at_least)
                .then(|| LeaseCheckpoint { id: *id, remaining_ttl: whole_seconds(left) })
        });
        checkpoints.collect()
    }

    fn set(&mut self, id: i64, ends: Instant) {
        let deadline = Deadline { ends, look: ends };
        if let Some(old) = self.leases.insert(id, deadline) {
            self.order.remove(&(old.look, id));
        }
        self.order.insert((ends, id));
    }

    fn remove(&mut self, id: i64) {
        if let Some(old) = self.leases.remove(&id) {
            self.order.remove(&(old.look, id));
        }
    }
}

/// `from` and so many seconds more; times beyond the clock's range stay at a far end of it.
fn later(from: Instant, seconds: i64) -> Instant {
    const FAR: Duration = Duration::from_secs(100 * 365 * 24 * 3600);
    let time = Duration::from_secs(u64::try_from(seconds).unwrap_or(0));
    from.checked_add(time).unwrap_or(from + FAR)
}

/// Seconds as etcd shows them: cut, not rounded.
fn whole_seconds(time: Duration) -> i64 {
    i64::try_from(time.as_secs()).unwrap_or(i64::MAX)
}

/// What became of an attempt to renew.
enum Renewal {
    Renewed(LeaseRow),
    Unknown,
    /// Its time is up, the agreed end is on its way.
    Ending,
    NotLeading,
}

/// Keeps the time of leases while this member leads.
pub struct Lessor {
    node: Node,
    reader: Reader,
    limits: Arc<Limits>,
    metrics: Arc<Metrics>,
    deadlines: Mutex<Deadlines>,
}

impl Lessor {
    /// A lessor for the member of `app`; [`super::start`] runs it.
    #[must_use]
    pub fn new(app: &App) -> Self {
        Self {
            node: app.node.clone(),
            reader: app.reader.clone(),
            limits: Arc::clone(&app.limits),
            metrics: Arc::clone(&app.metrics),
            deadlines: Mutex::default(),
        }
    }

    /// Starts the time of a lease that was just granted: at the next scan at the latest, but a
    /// lease that takes the id of one revoked before must not get its deadline.
    pub(crate) fn granted(&self, id: i64) {
        if let (Some(mut deadlines), Some(row)) = (self.leading(), self.reader.lease(id)) {
            deadlines.set(id, later(Instant::now(), row.ttl));
        }
    }

    /// Forgets a lease that was just revoked.
    pub(crate) fn revoked(&self, id: i64) {
        if let Some(mut deadlines) = self.leading() {
            deadlines.remove(id);
        }
    }

    /// Gives a lease its full time again. Returns its TTL in seconds, or 0 if there is no such
    /// lease; one whose time is up is waited for until it is gone.
    ///
    /// # Errors
    /// `NoLeader` or `Timeout` after the request timeout, and the errors of a read barrier.
    ///
    /// # Cancel safety
    /// Dropping the future leaves open whether the lease was renewed.
    pub(crate) async fn renew(&self, id: i64) -> Result<i64, Error> {
        self.wait_to_lead().await?;
        if self.limits.fast_lease_keep_alive {
            // The barrier is needed only if the answer would be that the lease is unknown: it may
            // have been granted through another member a moment ago.
            if let Renewal::Renewed(row) = self.try_renew(id) {
                return Ok(self.renewed(row));
            }
        }
        self.node.read_barrier().await?;
        let deadline = Instant::now() + self.limits.request_timeout;
        let mut changes = self.reader.lease_changes();
        loop {
            changes.borrow_and_update();
            match self.try_renew(id) {
                Renewal::Renewed(row) => return Ok(self.renewed(row)),
                Renewal::Unknown => return Ok(0),
                Renewal::Ending => {
                    let gone = tokio::time::timeout_at(deadline, changes.changed()).await;
                    gone.map_err(|_| Error::Timeout)?.map_err(|_| Error::Stopped)?;
                }
                Renewal::NotLeading => self.wait_to_lead().await?,
            }
        }
    }

    /// Time left of a lease in whole seconds; none if there is no such lease.
    ///
    /// # Errors
    /// `NoLeader` or `Timeout` after the request timeout, and the errors of a read barrier.
    ///
    /// # Cancel safety
    /// Safe.
    pub(crate) async fn time_to_live(&self, id: i64) -> Result<Option<(LeaseRow, i64)>, Error> {
        self.wait_to_lead().await?;
        self.node.read_barrier().await?;
        let Some(row) = self.reader.lease(id) else {
            return Ok(None);
        };
        let now = Instant::now();
        let Some(mut deadlines) = self.leading() else {
            return Err(Error::LeaderChanged);
        };
        deadlines.reconcile_one(row, now);
        Ok(Some((row, deadlines.left(id, now).map_or(0, whole_seconds))))
    }

    /// All leases, those that end soonest first. Only a leader knows the time left; elsewhere the
    /// granted time decides.
    pub(crate) fn by_time_left(&self) -> Vec<i64> {
        let now = Instant::now();
        let deadlines = self.leading();
        let rows = self.reader.leases();
        let mut leases: Vec<(Duration, i64)> = rows
            .iter()
            .map(|row| {
                let left = deadlines.as_ref().and_then(|deadlines| deadlines.left(row.id, now));
                (left.unwrap_or_else(|| later(now, row.ttl) - now), row.id)
            })
            .collect();
        drop(deadlines);
        leases.sort_unstable();
        leases.into_iter().map(|(_, id)| id).collect()
    }

    /// Ends leases whose time is up, for as long as this member leads, until it is dropped.
    pub(super) async fn run(self: Arc<Self>) {
        let mut tick = tokio::time::interval(SCAN_INTERVAL);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut changes = self.reader.lease_changes();
        let mut revokes = JoinSet::new();
        let mut next_checkpoint = Instant::now() + CHECKPOINT_INTERVAL;
        // The first scan must not rely on having seen a change.
        changes.mark_changed();
        loop {
            tick.tick().await;
            while revokes.try_join_next().is_some() {}
            for id in self.scan(&mut changes) {
                if revokes.len() >= REVOKES_MAX {
                    revokes.join_next().await;
                }
                revokes.spawn(Arc::clone(&self).end(id));
            }
            if self.limits.lease_checkpoint && Instant::now() >= next_checkpoint {
                self.checkpoint().await;
                next_checkpoint = Instant::now() + CHECKPOINT_INTERVAL;
            }
        }
    }

    /// Brings the deadlines up to date and returns the leases to end now.
    fn scan(&self, changes: &mut tokio::sync::watch::Receiver<u64>) -> Vec<i64> {
        let Some(mut deadlines) = self.leading() else {
            return Vec::new();
        };
        let now = Instant::now();
        if changes.has_changed().unwrap_or(false) {
            changes.borrow_and_update();
            deadlines.reconcile(&self.reader.leases(), now);
        }
        deadlines.due(now, SCAN_MAX, self.limits.request_timeout)
    }

    /// Proposes the end of one lease. A failure is left to a later scan.
    async fn end(self: Arc<Self>, id: i64) {
        let result = self.node.propose_urgent(Op::LeaseRevoke(LeaseRevokeRequest { id })).await;
        match result.and_then(|outcome| outcome.result) {
            Ok(_) => {
                self.metrics.server_lease_expired.inc();
                self.metrics.lease_revoked.inc();
            }
            Err(Error::LeaseNotFound) => {}
            Err(error) => tracing::debug!(lease = id, %error, "could not end a lease yet"),
        }
    }

    /// Records the time that long leases have left, for the next leader.
    async fn checkpoint(&self) {
        let long = match self.leading() {
            Some(deadlines) => deadlines.long(Instant::now(), CHECKPOINT_INTERVAL),
            None => return,
        };
        for batch in long.chunks(CHECKPOINT_BATCH) {
            let request = LeaseCheckpointRequest { checkpoints: batch.to_vec() };
            if let Err(error) = self.node.propose(Op::LeaseCheckpoint(request)).await {
                tracing::debug!(%error, "could not record the remaining time of leases");
                return;
            }
        }
    }

    fn try_renew(&self, id: i64) -> Renewal {
        let Some(mut deadlines) = self.leading() else {
            return Renewal::NotLeading;
        };
        let Some(row) = self.reader.lease(id) else {
            return Renewal::Unknown;
        };
        if deadlines.renew(row, Instant::now()) { Renewal::Renewed(row) } else { Renewal::Ending }
    }

    /// Counts a renewal. A checkpoint of the lease now says too little; it is taken back behind
    /// the caller's back, because only a leader change within the next minutes would use it.
    fn renewed(&self, row: LeaseRow) -> i64 {
        self.metrics.lease_renewed.inc();
        if row.remaining_ttl > 0 {
            let checkpoints = vec![LeaseCheckpoint { id: row.id, remaining_ttl: 0 }];
            let node = self.node.clone();
            tokio::spawn(async move {
                let request = LeaseCheckpointRequest { checkpoints };
                if let Err(error) = node.propose(Op::LeaseCheckpoint(request)).await {
                    tracing::debug!(%error, "could not clear the remaining time of a lease");
                }
            });
        }
        row.ttl
    }

    /// The deadlines if this member leads, made afresh when it leads a new term.
    fn leading(&self) -> Option<parking_lot::MutexGuard<'_, Deadlines>> {
        let status = self.node.status();
        let mut deadlines = self.deadlines.lock();
        if !status.is_leader {
            deadlines.demote();
            return None;
        }
        if deadlines.term != Some(status.term) {
            let rows = self.reader.leases();
            deadlines.promote(status.term, &rows, Instant::now(), self.limits.election_timeout);
        }
        Some(deadlines)
    }

    async fn wait_to_lead(&self) -> Result<(), Error> {
        let mut roles = self.node.watch_status();
        let leads = roles.wait_for(|status| status.is_leader);
        match tokio::time::timeout(self.limits.request_timeout, leads).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(_)) => Err(Error::Stopped),
            Err(_) if self.node.status().leader.is_none() => Err(Error::NoLeader),
            Err(_) => Err(Error::Timeout),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
