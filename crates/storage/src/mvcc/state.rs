//! Everything the applied log amounts to, shared by the one writer and all readers. Each part has its
//! own lock, held for microseconds; taken together they are taken in the order of the fields.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use kelson_api::Error;
use kelson_api::etcdserverpb::{AlarmMember, AlarmType, Member};
use parking_lot::RwLock;
use tokio::sync::watch;

use super::compact::Compaction;
use super::index::Index;
use crate::auth::Auth;
use crate::auth::tokens::Tokens;
use crate::chain::Chains;
use crate::feed::Feed;
use crate::lease::Leases;
use crate::log::Durable;
use crate::persist::{PersistConfig, Persister, Place};
use crate::times::StateTimes;
use crate::types::{Fatal, LogId};

/// Why a read or a command stopped.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The client did something that the state does not allow.
    Refused(Error),
    /// This member cannot go on.
    Storage(Fatal),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Refused(error)
    }
}

impl From<Fatal> for Failure {
    fn from(fatal: Fatal) -> Self {
        Self::Storage(fatal)
    }
}

/// The shared state.
pub(crate) struct State {
    pub(crate) index: RwLock<Index>,
    pub(crate) leases: RwLock<Leases>,
    pub(crate) cluster: RwLock<Cluster>,
    pub(crate) auth: RwLock<Auth>,
    pub(crate) tokens: Tokens,
    pub(crate) feed: Feed,
    pub(crate) compaction: Compaction,
    pub(crate) persister: RwLock<Arc<Persister>>,
    pub(crate) applied: RwLock<LogId>,
    pub(crate) chains: RwLock<Chains>,
    /// Where the state came from another member; (0, 0) = it never did.
    pub(crate) installed: RwLock<LogId>,
    /// Moves when a lease is granted or revoked.
    pub(crate) lease_moves: watch::Sender<u64>,
    pub(crate) counters: Counters,
    pub(crate) times: StateTimes,
    pub(crate) home: Home,
}

/// Where and how the state is kept: what it takes to put another one into its place.
pub(crate) struct Home {
    pub(crate) place: Place,
    pub(crate) persist: PersistConfig,
    pub(crate) durable: Durable,
}

impl State {
    /// The newest revision that readers may see.
    pub(crate) fn current(&self) -> i64 {
        self.feed.current()
    }

    pub(crate) fn persister(&self) -> Arc<Persister> {
        self.persister.read().clone()
    }

    pub(crate) fn announce_lease_change(&self) {
        self.lease_moves.send_modify(|moves| *moves += 1);
    }
}

/// What the log says of the cluster besides keys and leases.
#[derive(Default)]
pub(crate) struct Cluster {
    /// (alarm type, member), the order in which they are listed.
    pub(crate) alarms: BTreeSet<(i32, u64)>,
    pub(crate) members: BTreeMap<u64, Member>,
    pub(crate) removed: BTreeSet<u64>,
    /// Identity of each member's data directory.
    pub(crate) uuids: BTreeMap<u64, Bytes>,
    pub(crate) version: Option<String>,
    pub(crate) membership: Option<(LogId, Bytes)>,
}

impl Cluster {
    /// Alarms of one type; type NONE lists all.
    pub(crate) fn alarms(&self, kind: i32) -> Vec<AlarmMember> {
        let all = self.alarms.iter();
        let wanted = all.filter(|(alarm, _)| kind == AlarmType::None as i32 || *alarm == kind);
        wanted.map(|&(alarm, member_id)| AlarmMember { member_id, alarm }).collect()
    }

    pub(crate) fn has_alarm(&self, kind: AlarmType) -> bool {
        self.alarms.range((kind as i32, 0)..=(kind as i32, u64::MAX)).next().is_some()
    }

    /// All members by ascending id.
    pub(crate) fn members(&self) -> Vec<Member> {
        self.members.values().cloned().collect()
    }
}

/// How often things happened since the start; for metrics only.
#[derive(Default)]
pub(crate) struct Counters {
    pub(crate) puts: AtomicU64,
    pub(crate) put_bytes: AtomicU64,
    pub(crate) deletes: AtomicU64,
    pub(crate) ranges: AtomicU64,
    pub(crate) txns: AtomicU64,
    pub(crate) events: AtomicU64,
    pub(crate) compactions: AtomicU64,
    pub(crate) compacted_rows: AtomicU64,
    pub(crate) disk_reads: AtomicU64,
}

/// Adds to a counter that orders nothing.
pub(crate) fn count(counter: &AtomicU64, more: u64) {
    counter.fetch_add(more, Ordering::Relaxed);
}
