//! A running member: opens log and state, starts consensus and its few tasks, and is what the
//! server talks to. It contains no policy of its own; each part is in the module of its name.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use kelson_api::Error;
use kelson_api::command::command::Op;
use kelson_storage::log::{Log, LogOptions};
use kelson_storage::{DataDir, Identity, Outcome, Reader, Store};
use openraft::ServerState;
use openraft::async_runtime::watch::WatchReceiver;
use parking_lot::Mutex;
use tokio::sync::watch;

use crate::config::NodeConfig;
use crate::error::{StartError, abort};
use crate::log_store::LogStore;
use crate::network::Network;
use crate::progress::Progress;
use crate::proposer::{Limits, Proposer, Urgency};
use crate::reads::Reads;
use crate::state_machine::{SharedStore, StateMachine};
use crate::status::Status;
use crate::types::{Peer, Raft, Vote};
use crate::waiters::Waiters;
use crate::{codec, purge, status};

/// A member of a cluster. Clones are handles to the same member.
#[derive(Clone)]
pub struct Node {
    inner: Arc<Inner>,
}

struct Inner {
    raft: Raft,
    store: SharedStore,
    log: Log,
    reader: Reader,
    proposer: Arc<Proposer>,
    reads: Arc<Reads>,
    progress: Arc<Progress>,
    status: watch::Receiver<Status>,
    stopping: Arc<AtomicBool>,
    election: std::time::Duration,
    member_id: u64,
    /// Holds the lock of the directory until the last handle is gone.
    _data_dir: DataDir,
}

/// What is on disk, opened.
struct Opened {
    data_dir: DataDir,
    log: Log,
    vote: Option<Vote>,
    store: Store,
    reader: Reader,
    identity: Identity,
}

impl Node {
    /// Opens the data directory, or prepares a new one, and runs the member. Returns once the member
    /// has caught up with its own log and leads, so that no read sees an older state than before
    /// the restart.
    pub async fn start(config: NodeConfig) -> Result<(Node, Reader), StartError> {
        let settings = Arc::new(config.consensus()?);
        let opening = config.clone();
        let opened = tokio::task::spawn_blocking(move || open(&opening))
            .await
            .map_err(|e| StartError::System(format!("open the data directory: {e}")))??;
        let Opened { data_dir, log, vote, store, reader, identity } = opened;
        let member_id = identity.member_id;
        let progress = Arc::new(Progress::new(member_id, store.applied(), log.last_id()));
        let waiters = Arc::new(Waiters::default());
        let store: SharedStore = Arc::new(Mutex::new(Some(store)));
        let log_store = LogStore::new(log.clone(), vote, progress.clone());
        let state_machine = StateMachine::new(
            store.clone(),
            reader.clone(),
            waiters.clone(),
            progress.clone(),
            member_id,
        );
        let raft = Raft::new(member_id, settings, Network, log_store.clone(), state_machine)
            .await
            .map_err(|e| StartError::Consensus(e.to_string()))?;

        let term = vote.map_or(0, |vote| vote.leader_id.term);
        let initial = Status::initial(identity.cluster_id, member_id, term).at(&progress);
        let (status_sender, status) = watch::channel(initial);
        let timeout = config.request_timeout();
        let limits = Limits { max_request_bytes: config.max_request_bytes, timeout };
        let proposer = Proposer::new(
            member_id,
            limits,
            waiters,
            progress.clone(),
            log.clone(),
            status.clone(),
        );
        let reads = Reads::new(progress.clone(), status.clone(), timeout);
        let stopping = Arc::new(AtomicBool::new(false));

        tokio::spawn(guard(raft.clone(), stopping.clone()));
        tokio::spawn(status::follow(raft.clone(), progress.clone(), status_sender));
        tokio::spawn(proposer.clone().run(raft.clone()));
        tokio::spawn(proposer.clone().expire());
        tokio::spawn(reads.clone().run(raft.clone()));
        let catch_up = config.snapshot_catchup_entries;
        tokio::spawn(purge::run(raft.clone(), log_store, reader.clone(), catch_up));

        let election = config.election;
        let inner = Inner {
            raft,
            store,
            log,
            reader: reader.clone(),
            proposer,
            reads,
            progress,
            status,
            stopping,
            election,
            member_id,
            _data_dir: data_dir,
        };
        let node = Node { inner: Arc::new(inner) };
        if let Err(error) = node.inner.lead(&config).await {
            node.shutdown().await;
            return Err(error);
        }
        Ok((node, reader))
    }

    /// Puts a command into the log and returns its result once a quorum has it on disk and it is
    /// applied here.
    ///
    /// # Errors
    /// `RequestTooLarge`, `TooManyRequests`, `NoSpace`, `ProposalNotAccepted`: surely not proposed.
    /// `Timeout`, `TimeoutLeaderFailure`, `Stopped`: the outcome is unknown.
    ///
    /// # Cancel safety
    /// Dropping the future leaves the outcome unknown, unless the command was still queued: then it
    /// is not proposed.
    pub async fn propose(&self, op: Op) -> Result<Outcome, Error> {
        self.inner.proposer.propose(op, Urgency::Normal).await
    }

    /// As [`Node::propose`], ahead of waiting clients and with twice their room: for what frees
    /// resources, as lease revocations and compactions do.
    pub async fn propose_urgent(&self, op: Op) -> Result<Outcome, Error> {
        self.inner.proposer.propose(op, Urgency::Urgent).await
    }

    /// Returns an applied index that covers everything acknowledged, on any member, before the call:
    /// a read of local state after it is linearizable.
    ///
    /// # Errors
    /// `Timeout` when no quorum confirmed in time, `LeaderChanged`, `TooManyRequests`, `Stopped`.
    ///
    /// # Cancel safety
    /// Safe.
    pub async fn read_barrier(&self) -> Result<u64, Error> {
        self.inner.reads.barrier().await
    }

    /// The member's view of its cluster at this moment.
    pub fn status(&self) -> Status {
        let status = self.inner.status.borrow().clone();
        status.at(&self.inner.progress)
    }

    /// Moves when leader, term or role change. Positions in it are those of that change: ask
    /// [`Node::status`] for fresh ones.
    pub fn watch_status(&self) -> watch::Receiver<Status> {
        self.inner.status.clone()
    }

    /// The state of this member.
    pub fn reader(&self) -> &Reader {
        &self.inner.reader
    }

    /// The log of this member, for its statistics.
    pub fn log(&self) -> &Log {
        &self.inner.log
    }

    /// Hands leadership to another voter and waits until it leads.
    ///
    /// # Errors
    /// `NotLeader`, `BadLeaderTransferee` (not a voter), `TimeoutLeaderTransfer`.
    pub async fn move_leader(&self, target: u64) -> Result<(), Error> {
        let inner = &self.inner;
        if !self.status().is_leader {
            return Err(Error::NotLeader);
        }
        let is_voter = {
            let metrics = inner.raft.server_metrics();
            let metrics = metrics.borrow_watched();
            metrics.membership_config.voter_ids().any(|id| id == target)
        };
        if !is_voter {
            return Err(Error::BadLeaderTransferee);
        }
        if target == inner.member_id {
            return Ok(());
        }
        inner.raft.trigger().transfer_leader(target).await.map_err(|_| Error::Stopped)?;
        let mut status = inner.status.clone();
        let led = status.wait_for(|status| status.leader == Some(target));
        match tokio::time::timeout(inner.election, led).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(_)) => Err(Error::Stopped),
            Err(_) => Err(Error::TimeoutLeaderTransfer),
        }
    }

    /// Stops the member: waiting callers get `Stopped`, consensus ends, state gets its last
    /// checkpoint, the log is closed. Other handles stay valid for reads.
    pub async fn shutdown(self) {
        let inner = self.inner;
        inner.stopping.store(true, Ordering::SeqCst);
        inner.proposer.close();
        inner.reads.close();
        if let Err(error) = inner.raft.shutdown().await {
            tracing::warn!(%error, "consensus did not stop cleanly");
        }
        let store = inner.store.lock().take();
        let log = inner.log.clone();
        let closing = tokio::task::spawn_blocking(move || {
            // The last checkpoint may have to wait for the log, so the log goes last.
            if let Some(store) = store {
                store.shutdown();
            }
            log.shutdown();
        });
        if let Err(error) = closing.await {
            tracing::error!(%error, "the last checkpoint failed");
        }
    }
}

impl Inner {
    /// Founds the cluster if there is none, takes the lead, and waits until the log is applied.
    async fn lead(&self, config: &NodeConfig) -> Result<(), StartError> {
        let consensus = |e: &dyn std::fmt::Display| StartError::Consensus(e.to_string());
        if self.raft.is_initialized().await.map_err(|e| consensus(&e))? {
            // The only voter needs nobody's consent, so it does not wait for the timeout.
            let (member, progress) = (self.member_id, self.progress.clone());
            let sole = self.raft.with_raft_state(move |state| {
                let membership = state.membership_state.effective().membership();
                progress.set_membership(membership);
                membership.voter_ids().eq([member])
            });
            if sole.await.map_err(|e| consensus(&e))? {
                self.raft.trigger().elect(false).await.map_err(|e| consensus(&e))?;
            }
        } else {
            let members = self.founders(config)?;
            self.raft.initialize(members).await.map_err(|e| consensus(&e))?;
        }
        self.raft
            .wait(None)
            .metrics(
                |m| {
                    m.state == ServerState::Leader
                        && m.last_applied.map(|id| id.index) >= m.last_log_index
                },
                "this member leads and has applied its log",
            )
            .await
            .map_err(|e| consensus(&e))?;
        Ok(())
    }

    fn founders(&self, config: &NodeConfig) -> Result<BTreeMap<u64, Peer>, StartError> {
        let (described, members) = config.bootstrap()?;
        if described.member_id != self.member_id {
            return Err(StartError::OtherMember {
                stored: self.member_id,
                described: described.member_id,
            });
        }
        Ok(members)
    }
}

/// Opens or prepares everything on disk. Blocks.
fn open(config: &NodeConfig) -> Result<Opened, StartError> {
    let data_dir = DataDir::open(&config.data_dir)?;
    let identity = match data_dir.identity() {
        Some(identity) => identity,
        None => {
            let (identity, _) = config.bootstrap()?;
            data_dir.set_identity(identity)?;
            identity
        }
    };
    let opened = Log::open(LogOptions {
        fsync: !config.unsafe_no_fsync,
        ..LogOptions::new(data_dir.wal_dir(), data_dir.storage_uuid())
    })?;
    let vote = opened.vote.map(codec::decode_vote).transpose()?;
    let options =
        kelson_storage::Options { data_dir: config.data_dir.clone(), ..config.storage.clone() };
    let (store, reader) = kelson_storage::open(&options, opened.log.durable())?;
    let (log_end, applied) = (opened.last.max(opened.purged), store.applied());
    if applied.index > log_end.index {
        return Err(StartError::LogLost { log: log_end.index, state: applied.index });
    }
    Ok(Opened { data_dir, log: opened.log, vote, store, reader, identity })
}

/// Ends the process when consensus ends without being asked to.
async fn guard(raft: Raft, stopping: Arc<AtomicBool>) {
    let mut metrics = raft.server_metrics();
    while metrics.changed().await.is_ok() {}
    // A runtime that is being dropped ends consensus too, and this task at its next step.
    tokio::time::sleep(std::time::Duration::from_millis(1)).await;
    if stopping.load(Ordering::SeqCst) {
        return;
    }
    let state = raft.metrics().borrow_watched().running_state.clone();
    match state {
        Err(fatal) => abort("run consensus", &fatal),
        Ok(()) => abort("run consensus", &"its task ended unexpectedly"),
    }
}
