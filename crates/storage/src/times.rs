//! Durations counted for the metrics page: they are written beside the work and never influence it.

use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use kelson_api::command::Command;
use kelson_api::command::command::Op;

/// Counts of durations by size; the bounds of the `N` buckets double.
pub(crate) struct Times<const N: usize> {
    first: Duration,
    nanos: AtomicU64,
    /// Not cumulative. What is longer than the last bound is only in `total`.
    buckets: [AtomicU64; N],
    total: AtomicU64,
}

/// What [`Times`] held when it was read.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TimesRead {
    /// Upper bound in seconds, and durations up to it that no smaller bound holds.
    pub buckets: Vec<(f64, u64)>,
    /// All durations, those above the last bound included.
    pub count: u64,
    /// Their sum. Unit: seconds.
    pub seconds: f64,
}

impl<const N: usize> Times<N> {
    /// Nothing counted; `first` is the bound of the smallest bucket.
    pub(crate) fn new(first: Duration) -> Self {
        let buckets = std::array::from_fn(|_| AtomicU64::new(0));
        Self { first, nanos: AtomicU64::new(0), buckets, total: AtomicU64::new(0) }
    }

    pub(crate) fn add(&self, took: Duration) {
        let nanos = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        self.nanos.fetch_add(nanos, Ordering::Relaxed);
        self.total.fetch_add(1, Ordering::Relaxed);
        let mut bound = self.first;
        for bucket in &self.buckets {
            if took <= bound {
                bucket.fetch_add(1, Ordering::Relaxed);
                return;
            }
            bound *= 2;
        }
    }

    pub(crate) fn read(&self) -> TimesRead {
        let mut bound = self.first.as_secs_f64();
        let buckets = self.buckets.iter().map(|bucket| {
            let row = (bound, bucket.load(Ordering::Relaxed));
            bound *= 2.0;
            row
        });
        TimesRead {
            buckets: buckets.collect(),
            count: self.total.load(Ordering::Relaxed),
            seconds: self.nanos.load(Ordering::Relaxed) as f64 / 1e9,
        }
    }
}

/// Kinds of commands, by etcd's names for them.
const KINDS: [&str; 24] = [
    "Put",
    "DeleteRange",
    "Txn",
    "Compaction",
    "LeaseGrant",
    "LeaseRevoke",
    "LeaseCheckpoint",
    "Alarm",
    "ClusterMemberChange",
    "ClusterMemberAttrSet",
    "ClusterVersionSet",
    "AuthEnable",
    "AuthDisable",
    "Authenticate",
    "AuthUserAdd",
    "AuthUserDelete",
    "AuthUserChangePassword",
    "AuthUserGrantRole",
    "AuthUserRevokeRole",
    "AuthRoleAdd",
    "AuthRoleDelete",
    "AuthRoleGrantPermission",
    "AuthRoleRevokePermission",
    "Unknown",
];

fn kind(command: &Command) -> usize {
    match command.op {
        Some(Op::Put(_)) => 0,
        Some(Op::DeleteRange(_)) => 1,
        Some(Op::Txn(_)) => 2,
        Some(Op::Compaction(_)) => 3,
        Some(Op::LeaseGrant(_)) => 4,
        Some(Op::LeaseRevoke(_)) => 5,
        Some(Op::LeaseCheckpoint(_)) => 6,
        Some(Op::Alarm(_)) => 7,
        Some(Op::MembersChange(_)) => 8,
        Some(Op::MemberPublish(_)) => 9,
        Some(Op::ClusterVersionSet(_)) => 10,
        Some(Op::AuthEnable(_)) => 11,
        Some(Op::AuthDisable(_)) => 12,
        Some(Op::Login(_)) => 13,
        Some(Op::UserAdd(_)) => 14,
        Some(Op::UserDelete(_)) => 15,
        Some(Op::UserChangePassword(_)) => 16,
        Some(Op::UserGrantRole(_)) => 17,
        Some(Op::UserRevokeRole(_)) => 18,
        Some(Op::RoleAdd(_)) => 19,
        Some(Op::RoleDelete(_)) => 20,
        Some(Op::RoleGrantPermission(_)) => 21,
        Some(Op::RoleRevokePermission(_)) => 22,
        None => 23,
    }
}

/// How long commands took to apply, by kind and result.
pub(crate) struct ApplyTimes {
    by_kind: Vec<[Times<20>; 2]>,
    /// What takes longer is counted and logged; zero is never.
    slow: Duration,
    slow_count: AtomicU64,
}

impl ApplyTimes {
    pub(crate) fn new(slow: Duration) -> Self {
        let times = || Times::new(Duration::from_micros(100));
        let by_kind = KINDS.iter().map(|_| [times(), times()]).collect();
        Self { by_kind, slow, slow_count: AtomicU64::new(0) }
    }

    /// Counts a command that was begun at `start` and has just ended.
    pub(crate) fn add(&self, command: &Command, is_success: bool, start: Instant) {
        let took = start.elapsed();
        let kind = kind(command);
        self.by_kind[kind][usize::from(is_success)].add(took);
        if took > self.slow && !self.slow.is_zero() {
            self.slow_count.fetch_add(1, Ordering::Relaxed);
            let op = KINDS[kind];
            tracing::warn!(op, ?took, expected = ?self.slow, "apply request took too long");
        }
    }
}

/// Times of the state: how long commands and compactions took.
pub(crate) struct StateTimes {
    pub(crate) apply: ApplyTimes,
    /// Holds of the index lock by compactions.
    pub(crate) index_compaction: Times<14>,
    /// Whole compactions, until the last slice was handed over.
    pub(crate) compaction: Times<14>,
    /// When the last one ended. Unit: seconds since 1970; 0 = none since the start.
    last_compaction: AtomicI64,
}

/// Times of the state for the metrics page.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StoreTimes {
    /// Commands applied: etcd's name of the kind, whether it succeeded, how long it took. Kinds
    /// that never came are left out.
    pub apply: Vec<(&'static str, bool, TimesRead)>,
    /// Commands that took longer than [`crate::Options::slow_apply`].
    pub slow_applies: u64,
    /// Holds of the index lock by compactions.
    pub index_compaction: TimesRead,
    /// Whole compactions, until the last slice was handed over.
    pub compaction: TimesRead,
    /// When the last one ended. Unit: seconds since 1970; 0 = none since the start.
    pub last_compaction: i64,
}

impl StateTimes {
    pub(crate) fn new(slow_apply: Duration) -> Self {
        Self {
            apply: ApplyTimes::new(slow_apply),
            index_compaction: Times::new(Duration::from_micros(500)),
            compaction: Times::new(Duration::from_millis(100)),
            last_compaction: AtomicI64::new(0),
        }
    }

    /// Counts a compaction that was begun at `start` and has just ended.
    pub(crate) fn compacted(&self, start: Instant) {
        self.compaction.add(start.elapsed());
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let seconds = i64::try_from(now.as_secs()).unwrap_or(i64::MAX);
        self.last_compaction.store(seconds, Ordering::Relaxed);
    }

    pub(crate) fn read(&self) -> StoreTimes {
        let kinds = KINDS.iter().zip(&self.apply.by_kind);
        let rows = kinds.flat_map(|(&kind, [failed, succeeded])| {
            [(kind, false, failed.read()), (kind, true, succeeded.read())]
        });
        StoreTimes {
            apply: rows.filter(|(_, _, times)| times.count > 0).collect(),
            slow_applies: self.apply.slow_count.load(Ordering::Relaxed),
            index_compaction: self.index_compaction.read(),
            compaction: self.compaction.read(),
            last_compaction: self.last_compaction.load(Ordering::Relaxed),
        }
    }
}

#[cfg(test)]
mod tests {
    use kelson_api::etcdserverpb::PutRequest;

    use super::*;

    #[test]
    fn a_duration_counts_in_the_first_bucket_that_holds_it() {
        let times = Times::<3>::new(Duration::from_millis(1));
        for millis in [0, 1, 2, 3, 4, 5, 100] {
            times.add(Duration::from_millis(millis));
        }
        let read = times.read();
        assert_eq!(read.buckets, [(0.001, 2), (0.002, 1), (0.004, 2)]);
        assert_eq!(read.count, 7);
        assert!((read.seconds - 0.115).abs() < 1e-9);
    }

    #[test]
    fn commands_count_by_kind_and_result_and_slow_ones_twice() {
        let times = StateTimes::new(Duration::from_millis(5));
        let put = Command { op: Some(Op::Put(PutRequest::default())), ..Command::default() };
        times.apply.add(&put, true, Instant::now());
        let long_ago = Instant::now().checked_sub(Duration::from_millis(10)).expect("uptime");
        times.apply.add(&put, false, long_ago);
        let read = times.read();
        let rows: Vec<_> = read.apply.iter().map(|(op, ok, it)| (*op, *ok, it.count)).collect();
        assert_eq!(rows, [("Put", false, 1), ("Put", true, 1)]);
        assert_eq!(read.slow_applies, 1);
        let unlimited = ApplyTimes::new(Duration::ZERO);
        unlimited.add(&put, true, long_ago);
        assert_eq!(unlimited.slow_count.load(Ordering::Relaxed), 0);
    }
}
