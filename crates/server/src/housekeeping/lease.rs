//! The lessor: which lease ends when. The leader's monotonic clock decides when to propose the end
//! of a lease; the end itself is an agreed entry, and a lease exists as long as the store says
//! so. Deadlines are never stored: a new leader starts all of them afresh. On other members every
//! question about time is passed on to the leader (`forward`).

mod deadlines;
mod forward;

use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime};

use kelson_api::Error;
use kelson_api::command::command::Op;
use kelson_api::etcdserverpb::{
    LeaseCheckpoint, LeaseCheckpointRequest, LeaseRevokeRequest, LeaseTimeToLiveResponse,
};
use kelson_raft::Node;
use kelson_storage::sabotage::{self, Variant};
use kelson_storage::{LeaseRow, Reader};
use parking_lot::Mutex;
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::app::App;
use crate::limits::Limits;
use crate::metrics::Metrics;
use deadlines::{Deadlines, later, whole_seconds};

/// Time between two looks for leases whose time is up.
const SCAN_INTERVAL: Duration = Duration::from_millis(100);

/// Leases ended by one scan at most; the rest waits for the next one. Source: etcd ends a thousand a
/// second at most.
const SCAN_MAX: usize = 100;

/// A scan compares all leases with the deadlines only if that took less than this part of the time
/// since it was last done.
const RECONCILE_PART: u32 = 20;

/// Leases granted through other members get their deadline after this time at the latest.
const RECONCILE_PAUSE_MAX: Duration = Duration::from_millis(500);

/// Revocations under way at once; further ones of the same scan wait for a place.
const REVOKES_MAX: usize = 16;

/// Leases with more time left than this have it recorded that often, if asked for.
const CHECKPOINT_INTERVAL: Duration = Duration::from_secs(300);

/// Leases in one checkpoint command.
const CHECKPOINT_BATCH: usize = 1000;

/// Pause before a question is put to the leader again after it went wrong. Source: etcd.
const FORWARD_PAUSE: Duration = Duration::from_millis(50);

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
    pulse: Pulse,
}

/// Notices that the process stood still (a stopped process, a frozen machine): while it did, another
/// member may have become the leader, which this one does not know yet.
struct Pulse {
    /// When the process was last seen to run.
    last: Mutex<Instant>,
    every: Duration,
}

impl Pulse {
    fn new(every: Duration) -> Self {
        Self { last: Mutex::new(Instant::now()), every }
    }

    /// Whether the process has been running all the time until now.
    fn is_steady(&self, now: Instant) -> bool {
        now.saturating_duration_since(*self.last.lock()) <= 3 * self.every
    }

    async fn beat(&self) {
        let mut tick = tokio::time::interval(self.every);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tick.tick().await;
            *self.last.lock() = Instant::now();
        }
    }
}

/// The time by which leases end, which no jump of the wall clock moves.
fn now() -> Instant {
    if !sabotage::is(Variant::WallClock) {
        return Instant::now();
    }
    static START: OnceLock<(Instant, SystemTime)> = OnceLock::new();
    let (start, wall) = *START.get_or_init(|| (Instant::now(), SystemTime::now()));
    start + wall.elapsed().unwrap_or_default()
}

/// Where the leader is.
enum Leader {
    Here,
    At(u64),
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
            pulse: Pulse::new(app.limits.heartbeat),
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

    /// Gives a lease its full time again, wherever the leader is. Returns its TTL in seconds, or 0 if
    /// there is no such lease; one whose time is up is waited for until it is gone.
    ///
    /// # Errors
    /// `NoLeader` or `Timeout` after the request timeout, and the errors of a read barrier.
    ///
    /// # Cancel safety
    /// Dropping the future leaves open whether the lease was renewed.
    pub(crate) async fn renew(&self, id: i64) -> Result<i64, Error> {
        let deadline = Instant::now() + self.limits.request_timeout;
        loop {
            let answer = match self.leader(deadline).await? {
                Leader::Here => forward::unless_moved(self.renew_leading(id).await),
                Leader::At(member) => forward::renew(&self.node, member, id, deadline).await,
            };
            match answer {
                Some(answer) => return answer,
                None => pause(deadline).await?,
            }
        }
    }

    /// As [`Lessor::renew`], if this member leads.
    ///
    /// # Errors
    /// `NotPrimaryLessor` if another member leads now.
    pub(crate) async fn renew_leading(&self, id: i64) -> Result<i64, Error> {
        if self.limits.fast_lease_keep_alive && self.pulse.is_steady(Instant::now()) {
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
                Renewal::NotLeading => return Err(Error::NotPrimaryLessor),
            }
        }
    }

    /// Time left of a lease in whole seconds, and its keys if asked for, wherever the leader is; -1 if
    /// there is no such lease. The header is left to the caller.
    ///
    /// # Errors
    /// As [`Lessor::renew`].
    ///
    /// # Cancel safety
    /// Safe.
    pub(crate) async fn time_to_live(
        &self,
        id: i64,
        keys: bool,
    ) -> Result<LeaseTimeToLiveResponse, Error> {
        let deadline = Instant::now() + self.limits.request_timeout;
        loop {
            let answer = match self.leader(deadline).await? {
                Leader::Here => forward::unless_moved(self.time_to_live_leading(id, keys).await),
                Leader::At(at) => forward::time_to_live(&self.node, at, id, keys, deadline).await,
            };
            match answer {
                Some(answer) => return answer,
                None => pause(deadline).await?,
            }
        }
    }

    /// As [`Lessor::time_to_live`], if this member leads.
    ///
    /// # Errors
    /// `NotPrimaryLessor` if another member leads now.
    pub(crate) async fn time_to_live_leading(
        &self,
        id: i64,
        keys: bool,
    ) -> Result<LeaseTimeToLiveResponse, Error> {
        self.node.read_barrier().await?;
        let mut response = LeaseTimeToLiveResponse { id, ttl: -1, ..Default::default() };
        let now = Instant::now();
        let Some(mut deadlines) = self.leading() else {
            return Err(Error::NotPrimaryLessor);
        };
        if let Some(row) = self.reader.lease(id) {
            deadlines.reconcile_one(row, now);
            response.ttl = deadlines.left(id, now).map_or(0, whole_seconds);
            response.granted_ttl = row.ttl;
            if keys {
                response.keys = self.reader.lease_keys(id);
            }
        }
        Ok(response)
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

    /// Watches whether the process stands still, until it is dropped.
    pub(super) async fn watch_pulse(self: Arc<Self>) {
        self.pulse.beat().await;
    }

    /// Ends leases whose time is up, for as long as this member leads, until it is dropped.
    pub(super) async fn run(self: Arc<Self>) {
        let mut tick = tokio::time::interval(SCAN_INTERVAL);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut changes = self.reader.lease_changes();
        let mut revokes = JoinSet::new();
        let mut next_checkpoint = Instant::now() + CHECKPOINT_INTERVAL;
        let mut next_reconcile = Instant::now();
        // The first scan must not rely on having seen a change.
        changes.mark_changed();
        loop {
            tick.tick().await;
            while revokes.try_join_next().is_some() {}
            let (term, mut due) = self.scan(&mut changes, &mut next_reconcile);
            if !due.is_empty() && !self.still_leads(term).await {
                due.clear();
            }
            for id in due {
                if revokes.len() >= REVOKES_MAX {
                    revokes.join_next().await;
                }
                revokes.spawn(Arc::clone(&self).end(id, term));
            }
            if self.limits.lease_checkpoint && Instant::now() >= next_checkpoint {
                self.checkpoint().await;
                next_checkpoint = Instant::now() + CHECKPOINT_INTERVAL;
            }
        }
    }

    /// Brings the deadlines up to date and returns the leases to end now, and the term that this
    /// member leads.
    fn scan(
        &self,
        changes: &mut tokio::sync::watch::Receiver<u64>,
        next_reconcile: &mut Instant,
    ) -> (u64, Vec<i64>) {
        let Some(mut deadlines) = self.leading() else {
            return (0, Vec::new());
        };
        let now = now();
        let started = Instant::now();
        if started >= *next_reconcile && changes.has_changed().unwrap_or(false) {
            changes.borrow_and_update();
            deadlines.reconcile(&self.reader.leases(), now);
            let pause = (RECONCILE_PART * started.elapsed()).min(RECONCILE_PAUSE_MAX);
            *next_reconcile = Instant::now() + pause;
        }
        let term = deadlines.term.unwrap_or_default();
        (term, deadlines.due(now, SCAN_MAX, self.limits.request_timeout))
    }

    /// Proposes the end of one lease, as the leader of this term only: at another leader it may have
    /// been renewed. A failure is left to a later scan.
    async fn end(self: Arc<Self>, id: i64, term: u64) {
        let revoke = Op::LeaseRevoke(LeaseRevokeRequest { id });
        let result = self.node.propose_leading(revoke, term).await;
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
        let (term, long) = match self.leading() {
            Some(deadlines) => {
                let long = deadlines.long(Instant::now(), CHECKPOINT_INTERVAL);
                (deadlines.term.unwrap_or_default(), long)
            }
            None => return,
        };
        for batch in long.chunks(CHECKPOINT_BATCH) {
            let request = LeaseCheckpointRequest { checkpoints: batch.to_vec() };
            let request = Op::LeaseCheckpoint(request);
            if let Err(error) = self.node.propose_leading(request, term).await {
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
            let (node, term) = (self.node.clone(), self.node.status().term);
            tokio::spawn(async move {
                let request = Op::LeaseCheckpoint(LeaseCheckpointRequest { checkpoints });
                if let Err(error) = node.propose_leading(request, term).await {
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

    /// Asks a quorum whether this member leads, before anything is ended: one that stood still would
    /// take leases for overdue that were renewed at its successor.
    async fn still_leads(&self, term: u64) -> bool {
        let confirmed = self.node.read_barrier().await.is_ok();
        let status = self.node.status();
        confirmed && status.is_leader && status.term == term
    }

    /// Waits until there is a leader.
    async fn leader(&self, deadline: Instant) -> Result<Leader, Error> {
        let mut roles = self.node.watch_status();
        let known = roles.wait_for(|status| status.leader.is_some());
        let status = match tokio::time::timeout_at(deadline, known).await {
            Ok(Ok(status)) => status,
            Ok(Err(_)) => return Err(Error::Stopped),
            Err(_) => return Err(Error::NoLeader),
        };
        match status.leader {
            Some(member) if !status.is_leader => Ok(Leader::At(member)),
            _ => Ok(Leader::Here),
        }
    }
}

/// Waits a moment before the leader is asked again.
async fn pause(deadline: Instant) -> Result<(), Error> {
    let until = Instant::now() + FORWARD_PAUSE;
    if until >= deadline {
        return Err(Error::Timeout);
    }
    tokio::time::sleep_until(until).await;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn standing_still_is_noticed() {
        let pulse = Pulse::new(Duration::from_millis(100));
        let last = *pulse.last.lock();
        assert!(pulse.is_steady(last + Duration::from_millis(300)));
        assert!(!pulse.is_steady(last + Duration::from_millis(301)));
    }
}
