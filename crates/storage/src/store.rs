//! The one writer. It turns log entries into state and hands each entry's changes to the persister as
//! one delta; it never waits for the disk, except when the persister's queue is over its bound. Also
//! here: how the state is put together from what the disk remembers.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Instant;

use bytes::Bytes;
use kelson_api::command::{Command, MembersChange};
use parking_lot::RwLock;
use tokio::sync::watch;

use crate::auth::Auth;
use crate::auth::tokens::Tokens;
use crate::chain::{Chain, Chains};
use crate::failpoint;
use crate::feed::Feed;
use crate::lease::Leases;
use crate::mvcc::apply::{apply, change_members};
use crate::mvcc::compact::{self, Compaction, Pace};
use crate::mvcc::index::{Entry, Index};
use crate::mvcc::row::{self, Held};
use crate::mvcc::state::{Cluster, Counters, Home, State};
use crate::options::Options;
use crate::persist::Persister;
use crate::reader::Reader;
use crate::recover::Recovered;
use crate::sabotage::{self, Variant};
use crate::times::StateTimes;
use crate::types::{Delta, Fatal, LogId, MetaChange, Outcome, Row};

/// Memory of a delta beside its rows.
const DELTA_COST: usize = 128;
/// A larger buffer for marshalling rows is given back after the entry. Unit: bytes.
const SCRATCH_MAX: usize = 1 << 20;

/// Applies the log. There is one per member, owned by raft's state machine.
pub struct Store {
    state: Arc<State>,
    scratch: Vec<u8>,
    compactor: Option<JoinHandle<()>>,
    /// Lets go of a state that was replaced.
    retiring: Option<JoinHandle<()>>,
}

impl Store {
    /// The last entry applied.
    pub fn applied(&self) -> LogId {
        *self.state.applied.read()
    }

    /// The position at which the state last came from another member; (0, 0) if it never did. It is
    /// recorded in the same step as the state: a state ahead of the log that stands exactly here was
    /// installed before a crash, and the log is to be emptied up to here.
    pub fn installed(&self) -> LogId {
        *self.state.installed.read()
    }

    /// The raft membership last applied and where it was agreed; the bytes are the raft crate's own.
    pub fn membership(&self) -> Option<(LogId, Bytes)> {
        self.state.cluster.read().membership.clone()
    }

    /// Applies one entry; an empty one only moves the applied position. Each command is atomic and
    /// visible to readers when this returns; the whole entry becomes durable together, later. Blocks
    /// while the persister's queue is over its bound.
    ///
    /// # Errors
    /// This member cannot go on; the caller ends the process.
    pub fn apply(&mut self, id: LogId, commands: &[Command]) -> Result<Vec<Outcome>, Fatal> {
        let mut delta = self.begin(id)?;
        let mut outcomes = Vec::with_capacity(commands.len());
        for command in commands {
            // The clock is for the metrics page alone: no answer and no row depends on it.
            let start = Instant::now();
            let outcome = apply(&self.state, command, &mut delta, &mut self.scratch)?;
            self.state.times.apply.add(command, outcome.result.is_ok(), start);
            outcomes.push(outcome);
        }
        self.finish(delta)?;
        Ok(outcomes)
    }

    /// Applies a membership entry: raft's own bytes, and the change of the members table with it.
    ///
    /// # Errors
    /// As `apply`.
    pub fn apply_membership(
        &mut self,
        id: LogId,
        membership: Bytes,
        change: Option<&MembersChange>,
    ) -> Result<(), Fatal> {
        let mut delta = self.begin(id)?;
        // Copied: the bytes may be a slice of a whole log batch.
        let membership = Bytes::copy_from_slice(&membership);
        self.state.cluster.write().membership = Some((id, membership.clone()));
        delta.bytes += membership.len();
        delta.meta.push(MetaChange::Membership(id, membership));
        if let Some(change) = change {
            change_members(&self.state, &mut delta, change);
        }
        self.finish(delta)
    }

    fn begin(&self, id: LogId) -> Result<Delta, Fatal> {
        let applied = self.applied();
        if id.index <= applied.index {
            let text = format!("entry {} comes after entry {}", id.index, applied.index);
            return Err(Fatal(text));
        }
        Ok(Delta {
            id,
            rows: Vec::new(),
            meta: Vec::new(),
            chain: Chain::default(),
            bytes: DELTA_COST,
        })
    }

    fn finish(&mut self, mut delta: Delta) -> Result<(), Fatal> {
        let id = delta.id;
        let chain = self.state.chains.read().newest().after(&delta);
        delta.chain = chain;
        failpoint::hit("beforeWritebackBuf");
        self.state.persister().push(delta)?;
        self.state.feed.hand_over(self.state.current());
        failpoint::hit("afterWritebackBuf");
        *self.state.applied.write() = id;
        self.state.chains.write().push(id.index, chain);
        if self.scratch.capacity() > SCRATCH_MAX {
            self.scratch = Vec::new();
        }
        self.state.settle();
        Ok(())
    }

    /// The last entry whose changes are on disk, and a signal each time it moves: the log may be
    /// purged up to there.
    pub fn durable_applied(&self) -> watch::Receiver<LogId> {
        self.state.persister().durable_watch()
    }

    /// Replaces the whole state by a later one. Readers, the feed and all signals stay valid; a reader
    /// in the middle of a walk goes on in the new state, which holds the same history, or learns that
    /// its revision is compacted. The old one is let go on a thread of its own.
    ///
    /// # Errors
    /// The thread cannot be started; the new state is in force.
    pub(crate) fn replace(
        &mut self,
        mut loaded: Loaded,
        persister: Persister,
    ) -> Result<(), Fatal> {
        let state = &self.state;
        let (mut leases, mut cluster) = (loaded.leases, loaded.cluster);
        let mut auth = loaded.auth;
        let old = {
            // Whoever looks at the index sees one state with all that belongs to it.
            let mut index = state.index.write();
            std::mem::swap(&mut *index, &mut loaded.index);
            std::mem::swap(&mut *state.leases.write(), &mut leases);
            std::mem::swap(&mut *state.cluster.write(), &mut cluster);
            std::mem::swap(&mut *state.auth.write(), &mut auth);
            // Which of their owners are still there is not known here.
            state.tokens.clear();
            // Before the persister: who misses a row in the new one must learn that it is compacted.
            state.compaction.restart(loaded.scheduled, loaded.finished);
            let old = std::mem::replace(&mut *state.persister.write(), Arc::new(persister));
            old.retire(loaded.applied, loaded.finished);
            *state.applied.write() = loaded.applied;
            *state.chains.write() = Chains::new(loaded.chain, loaded.applied.index);
            *state.installed.write() = loaded.installed;
            // Last: it tells watchers, who then read history.
            state.feed.restart(loaded.revision);
            old
        };
        state.announce_lease_change();
        self.let_go(move || drop((old, loaded.index, leases, cluster, auth)))?;
        if self.state.home.persist.in_step {
            // Files of the old state must not stay longer in one run than in another.
            self.join_retiring();
        }
        self.state.settle();
        Ok(())
    }

    /// Frees what may take long on a thread of its own; only one does so at a time.
    fn let_go(&mut self, free: impl FnOnce() + Send + 'static) -> Result<(), Fatal> {
        let earlier = self.retiring.take();
        let thread = std::thread::Builder::new().name("state-retire".into()).spawn(move || {
            free();
            // A panic there was reported by the panic hook.
            let _ = earlier.map(JoinHandle::join);
        });
        let thread = thread.map_err(|error| Fatal(format!("cannot start a thread: {error}")))?;
        self.retiring = Some(thread);
        Ok(())
    }

    /// Everything that readers see.
    pub(crate) fn state(&self) -> &Arc<State> {
        &self.state
    }

    /// A reader of this store.
    pub fn reader(&self) -> Reader {
        Reader::new(self.state.clone())
    }

    /// Ends the background work after a final checkpoint. Readers stay usable for what is in memory.
    pub fn shutdown(mut self) {
        self.close();
    }

    fn join_retiring(&mut self) {
        if let Some(retiring) = self.retiring.take()
            && retiring.join().is_err()
        {
            tracing::error!("letting go of a replaced state panicked");
        }
    }

    fn close(&mut self) {
        self.state.compaction.stop();
        self.join_retiring();
        if let Some(compactor) = self.compactor.take() {
            if compactor.join().is_err() {
                tracing::error!("the compaction thread panicked");
            }
            self.state.persister().shutdown();
        }
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        self.close();
    }
}

/// Builds the state from the rows on disk.
#[derive(Default)]
pub(crate) struct Loader {
    index: Index,
    newest: i64,
}

/// A state that nobody sees yet.
pub(crate) struct Loaded {
    index: Index,
    leases: Leases,
    cluster: Cluster,
    auth: Auth,
    applied: LogId,
    chain: Chain,
    installed: LogId,
    revision: i64,
    /// Compactions in force and carried out; -1 = never.
    scheduled: i64,
    finished: i64,
}

impl Loaded {
    pub(crate) fn applied(&self) -> LogId {
        self.applied
    }

    pub(crate) fn membership(&self) -> Option<(LogId, Bytes)> {
        self.cluster.membership.clone()
    }

    /// The store revision.
    pub(crate) fn revision(&self) -> i64 {
        self.revision
    }

    pub(crate) fn chain(&self) -> Chain {
        self.chain
    }
}

impl Loader {
    /// An empty state.
    pub(crate) fn new() -> Self {
        Self::default()
    }

    /// Adds the next row, in revision order.
    ///
    /// # Errors
    /// The row is not what a store writes.
    pub(crate) fn row(&mut self, found: &Row) -> Result<(), Fatal> {
        let damaged = |what| Fatal(format!("row {}.{}: {what}", found.key.main, found.key.sub));
        let parsed = row::parse(&found.kv).ok_or_else(|| damaged("not a key-value record"))?;
        if found.key.main < self.newest {
            return Err(damaged("out of order"));
        }
        if !(0..=Entry::SUB_MAX).contains(&found.key.sub) {
            return Err(damaged("too many changes in one revision"));
        }
        self.newest = found.key.main;
        let key = &found.kv[parsed.key.clone()];
        // The key must stand where the index looks for it; etcd and this store write it so, but the
        // format leaves it open. The copy frees the row from the buffer it was read in.
        let canonical = if row::leading_key(&found.kv) == key {
            Held::new(found.key.main, &found.kv)
        } else {
            let fields = row::Fields {
                key,
                value: &found.kv[parsed.value],
                create_revision: parsed.create_revision,
                mod_revision: found.key.main,
                version: parsed.version,
                lease: parsed.lease,
            };
            row::encode(&mut Vec::new(), &fields)
        };
        self.index.record(Entry::new(canonical, found.key.sub, found.tombstone));
        Ok(())
    }

    /// Adds what is not in rows. The revision never goes back behind a compaction.
    pub(crate) fn finish(self, recovered: Recovered) -> Loaded {
        let scheduled = recovered.scheduled_compaction.max(recovered.finished_compaction);
        let floor = scheduled.unwrap_or(-1).max(recovered.current_revision_floor);
        let forgotten = i64::from(sabotage::is(Variant::RevisionForgotten));
        let mut leases = Leases::default();
        for mut lease in recovered.leases {
            if sabotage::is(Variant::LeaseTtlForgotten) {
                lease.ttl = 1;
            }
            leases.put(lease);
        }
        for entry in self.index.iter().filter(|entry| entry.is_live()) {
            let parsed = row::parse(entry.row()).expect("checked when the row was added");
            if parsed.lease != 0 && !sabotage::is(Variant::LeaseKeysForgotten) {
                leases.reattach(entry.key(), 0, parsed.lease);
            }
        }
        let cluster = Cluster {
            alarms: recovered.alarms.iter().map(|alarm| (alarm.alarm, alarm.member_id)).collect(),
            members: recovered.members.into_iter().map(|member| (member.id, member)).collect(),
            removed: recovered.removed.into_iter().collect(),
            uuids: recovered.uuids.into_iter().collect(),
            version: recovered.cluster_version,
            membership: recovered.membership,
        };
        Loaded {
            index: self.index,
            leases,
            cluster,
            auth: Auth::new(recovered.auth),
            applied: recovered.applied,
            chain: recovered.chain,
            installed: recovered.installed,
            // An empty store is at revision 1.
            revision: (self.newest - forgotten).max(floor).max(1),
            scheduled: scheduled.unwrap_or(-1),
            finished: recovered.finished_compaction.unwrap_or(-1),
        }
    }
}

/// Puts a loaded state into service; an unfinished compaction resumes.
///
/// # Errors
/// The compaction thread cannot be started.
pub(crate) fn assemble(
    loaded: Loaded,
    persister: Arc<Persister>,
    home: Home,
    options: &Options,
) -> Result<(Store, Reader), Fatal> {
    let state = Arc::new(State {
        index: RwLock::new(loaded.index),
        leases: RwLock::new(loaded.leases),
        cluster: RwLock::new(loaded.cluster),
        auth: RwLock::new(loaded.auth),
        tokens: Tokens::default(),
        feed: Feed::new(loaded.revision, options.recent_bytes),
        compaction: Compaction::new(loaded.scheduled, loaded.finished),
        persister: RwLock::new(persister),
        applied: RwLock::new(loaded.applied),
        chains: RwLock::new(Chains::new(loaded.chain, loaded.applied.index)),
        installed: RwLock::new(loaded.installed),
        lease_moves: watch::Sender::new(0),
        counters: Counters::default(),
        times: StateTimes::new(options.slow_apply),
        home,
    });
    let pace =
        Pace { batch_limit: options.compaction_batch_limit, sleep: options.compaction_sleep };
    let shared = state.clone();
    let compactor = std::thread::Builder::new()
        .name("compactor".into())
        .spawn(move || compact::run(&shared, pace))
        .map_err(|error| Fatal(format!("cannot start the compaction thread: {error}")))?;
    let reader = Reader::new(state.clone());
    state.settle();
    Ok((Store { state, scratch: Vec::new(), compactor: Some(compactor), retiring: None }, reader))
}
