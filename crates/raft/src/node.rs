//! A running member: opens log and state, starts consensus and its few tasks, and is what the
//! server talks to. It contains no policy of its own; each part is in the module of its name.
//! Over 600 lines, because it is one door: most of them document what a caller may rely on.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use kelson_api::Error;
use kelson_api::command::Asker;
use kelson_api::command::command::Op;
use kelson_storage::log::{Log, LogOptions};
use kelson_storage::{DataDir, Identity, Outcome, Reader, Store};
use openraft::ServerState;
use openraft::async_runtime::watch::WatchReceiver;
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tonic::metadata::MetadataMap;
use tonic::service::Routes;

use crate::background::blocking;
use crate::config::NodeConfig;
use crate::confirm::Confirm;
use crate::error::{StartError, abort};
use crate::forward::Forwarder;
use crate::join::{self, Arrival};
use crate::log_store::LogStore;
use crate::membership::{MemberChange, Members};
use crate::network::Network;
use crate::peer_service::PeerService;
use crate::peers::{PeerChannel, PeerCounters, Peers};
use crate::progress::Progress;
use crate::proposer::{Limits, Proposer, Urgency};
use crate::purge::Retention;
use crate::reads::Reads;
use crate::snapshot::Transfers;
use crate::state_machine::{SharedStore, StateMachine};
use crate::status::{Counters, Pace, Status};
use crate::types::{Peer, Raft, Vote};
use crate::waiters::Waiters;
use crate::{adopt, codec, confirm, force, purge, stall, status};

/// Pause between two attempts of a starting member to find a leader.
const READY_RETRY: Duration = Duration::from_millis(50);
/// Pause between two requests to a member to take over leadership.
const TRANSFER_RETRY: Duration = Duration::from_millis(30);

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
    confirm: Arc<Confirm>,
    progress: Arc<Progress>,
    peers: Peers,
    forwarder: Forwarder,
    members: Arc<Members>,
    transfers: Transfers,
    status: watch::Receiver<Status>,
    stopping: Arc<AtomicBool>,
    guard: Mutex<Option<JoinHandle<()>>>,
    election: Duration,
    timeout: Duration,
    identity: Identity,
    member_id: u64,
    storage_uuid: [u8; 16],
    /// Holds the lock of the directory, together with the guard.
    data_dir: Mutex<Option<Arc<DataDir>>>,
}

/// What is on disk, opened.
struct Opened {
    data_dir: DataDir,
    log: Log,
    vote: Vote,
    store: Store,
    reader: Reader,
    identity: Identity,
}

impl Node {
    /// Opens the data directory, or prepares a new one, and runs the member. The only voter of a
    /// cluster leads and has applied its log when this returns. With company it returns at once, so
    /// that the others can be answered ([`Node::peer_routes`]); see [`Node::ready`].
    ///
    /// The member runs until [`Node::shutdown`]: dropping every handle does not stop it.
    pub async fn start(config: NodeConfig) -> Result<(Node, Reader), StartError> {
        let retention = Retention::keeping(config.snapshot_catchup_entries);
        Self::start_with(config, retention).await
    }

    async fn start_with(
        config: NodeConfig,
        retention: Retention,
    ) -> Result<(Node, Reader), StartError> {
        let settings = config.consensus()?;
        let opening = config.clone();
        let is_simulated = config.simulated.is_some();
        let data_dir = opened(is_simulated, move || {
            adopt::adopt(&opening.data_dir, opening.etcd_wal_dir.as_deref())?;
            Ok(DataDir::open(&opening.data_dir)?)
        });
        let data_dir = data_dir.await?;
        let arrival = match data_dir.identity() {
            Some(_) => None,
            None => Some(join::arrive(&config).await?),
        };
        let opening = config.clone();
        let first = arrival.as_ref().map(|arrival| arrival.identity);
        let stored = data_dir.identity().map(|identity| identity.member_id);
        let ready = opened(is_simulated, move || open(&opening, data_dir, first)).await;
        let opened = ready.map_err(|error| error.of(stored))?;
        let reader = opened.reader.clone();
        let inner = Inner::run(opened, &config, settings, retention, arrival).await?;
        let node = Node { inner: Arc::new(inner) };
        if let Err(error) = node.inner.begin(&config).await {
            node.shutdown().await;
            return Err(error);
        }
        Ok((node, reader))
    }

    /// Waits until this member knows a leader and has applied everything that was committed when it
    /// asked: no read sees an older state than before a restart. Waits as long as there is no quorum.
    ///
    /// # Errors
    /// `Stopped`.
    pub async fn ready(&self) -> Result<(), Error> {
        loop {
            match self.read_barrier().await {
                Ok(_) => return Ok(()),
                Err(Error::Stopped) => return Err(Error::Stopped),
                Err(_) => tokio::time::sleep(READY_RETRY).await,
            }
        }
    }

    /// What other members ask this one: to be served on the peer listeners, and nowhere else.
    pub fn peer_routes(&self) -> Routes {
        let inner = &self.inner;
        let service = PeerService {
            raft: inner.raft.clone(),
            peers: inner.peers.clone(),
            identity: inner.identity,
            reader: inner.reader.clone(),
            progress: inner.progress.clone(),
            proposer: inner.proposer.clone(),
            confirm: inner.confirm.clone(),
            members: inner.members.clone(),
            transfers: inner.transfers.clone(),
        };
        Routes::new(service.server())
    }

    /// A channel to another member for services of its own; opened by the first call.
    pub fn peer_channel(&self, member: u64) -> PeerChannel {
        self.inner.peers.channel(member)
    }

    /// Learns from a call over [`Node::peer_channel`] that was refused whether this member was removed:
    /// a learner never asks for votes, so once no leader calls it, nothing else would tell it.
    pub fn check_refusal(&self, status: &tonic::Status) {
        self.inner.peers.check_refusal(status);
    }

    /// A call over [`Node::peer_channel`] that tells its receiver that the cluster has removed it:
    /// it ends then. Whoever does not hear it learns the same when it asks.
    pub fn farewell<T>(message: T) -> tonic::Request<T> {
        Peers::farewell(message)
    }

    /// Who sent a call on a peer listener. A call may also tell this member that it was removed.
    ///
    /// # Errors
    /// `FailedPrecondition` or `InvalidArgument`: it is not a member that may speak to this one.
    pub fn check_peer(&self, metadata: &MetadataMap) -> Result<u64, tonic::Status> {
        self.inner.peers.check_sender(metadata)
    }

    /// Since when another member has answered every call; `None` if it did not answer the last one, or
    /// was never asked.
    pub fn active_since(&self, member: u64) -> Option<std::time::Instant> {
        self.inner.peers.active_since(member)
    }

    /// What was counted about other members, by member. Samples are those since the last call of this
    /// function, at most 4096 of a kind.
    pub fn take_peer_counters(&self) -> Vec<(u64, PeerCounters)> {
        self.inner.peers.take_counters()
    }

    /// True once this member knows that the cluster has removed it for ever: it should end.
    pub fn removed(&self) -> watch::Receiver<bool> {
        self.inner.peers.removed().subscribe()
    }

    /// Voters that consensus counts, as this member knows; one that was added may not be among them
    /// before it has caught up.
    pub fn voters(&self) -> Vec<u64> {
        self.inner.raft.voter_ids().collect()
    }

    /// How far the logs of other members match, if this member leads: by member, indexes from 1.
    pub fn matched(&self) -> BTreeMap<u64, u64> {
        let metrics = self.inner.raft.data_metrics();
        let metrics = metrics.borrow_watched();
        let matched = metrics.replication.iter().flatten();
        matched.map(|(id, matched)| (*id, matched.map_or(0, |id| id.index + 1))).collect()
    }

    /// Changes who belongs to the cluster, through the leader, and returns the id of the member
    /// concerned once the change is applied here.
    ///
    /// # Errors
    /// `MemberNotFound`, `MemberExists`, `PeerUrlExists`, `MemberNotLearner`, `LearnerNotReady`;
    /// `Timeout`, `TimeoutLeaderFailure`, `Stopped`: the outcome is unknown.
    ///
    /// # Cancel safety
    /// Dropping the future leaves the outcome unknown.
    pub async fn change_members(&self, change: MemberChange) -> Result<u64, Error> {
        let inner = &self.inner;
        let (id, request) = change.request();
        let deadline = tokio::time::Instant::now() + inner.timeout;
        let mut status = inner.status.clone();
        let index = loop {
            let (leader, is_leader) = {
                let status = status.borrow_and_update();
                (status.leader, status.is_leader)
            };
            let result = match leader {
                Some(leader) if !is_leader => inner.forwarder.change(leader, request.clone()).await,
                _ => inner.members.change(request.clone()).await,
            };
            match result {
                // Surely not made: the leader has moved, or there is none.
                Err(Error::NotLeader) => {
                    let moved = tokio::time::timeout(Duration::from_millis(500), status.changed());
                    if tokio::time::Instant::now() >= deadline {
                        return Err(Error::Timeout);
                    }
                    drop(moved.await);
                }
                result => break result?,
            }
        };
        self.applied_at_least(index).await?;
        Ok(id)
    }

    /// Waits until this member has applied the log up to an index, for as long as a request may take.
    ///
    /// # Errors
    /// `Timeout`.
    ///
    /// # Cancel safety
    /// Safe.
    pub async fn applied_at_least(&self, index: u64) -> Result<(), Error> {
        let inner = &self.inner;
        if inner.progress.applied() < index {
            let applied = inner.raft.wait(Some(inner.timeout));
            let applied = applied.applied_index_at_least(Some(index - 1), "an index asked for");
            applied.await.map_err(|_| Error::Timeout)?;
        }
        Ok(())
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
        self.inner.proposer.propose(None, op, Urgency::Normal).await
    }

    /// As [`Node::propose`], on behalf of a client: whether it may do this is decided where the
    /// command is applied.
    ///
    /// # Errors
    /// As [`Node::propose`]. What the rights forbid is an error in the outcome.
    ///
    /// # Cancel safety
    /// As [`Node::propose`].
    pub async fn propose_for(&self, asker: Asker, op: Op) -> Result<Outcome, Error> {
        self.inner.proposer.propose(Some(asker), op, Urgency::Normal).await
    }

    /// As [`Node::propose_for`] and [`Node::propose_urgent`] in one.
    pub async fn propose_urgent_for(&self, asker: Asker, op: Op) -> Result<Outcome, Error> {
        self.inner.proposer.propose(Some(asker), op, Urgency::Urgent).await
    }

    /// As [`Node::propose`], ahead of waiting clients and with twice their room: for what frees
    /// resources, as lease revocations and compactions do.
    pub async fn propose_urgent(&self, op: Op) -> Result<Outcome, Error> {
        self.inner.proposer.propose(None, op, Urgency::Urgent).await
    }

    /// As [`Node::propose_urgent`], but only while this member leads `term`, and never through another
    /// leader: for what a leader decides by its own clock, as the end of a lease. A leader that was
    /// deposed without noticing must not have its late decisions carried out.
    ///
    /// # Errors
    /// `NotLeader`: surely not proposed. Others as [`Node::propose`].
    ///
    /// # Cancel safety
    /// Dropping the future leaves the outcome unknown.
    pub async fn propose_leading(&self, op: Op, term: u64) -> Result<Outcome, Error> {
        self.inner.proposer.propose_leading(&self.inner.raft, op, term).await
    }

    /// Returns an applied index that covers everything acknowledged, on any member, before the
    /// call: a read of local state after it is linearizable.
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
        let mut status = status.at(&self.inner.progress);
        // A new voter has no vote before it has caught up, and is no learner all the same: clients go
        // by what was asked for.
        let id = self.inner.member_id;
        if status.is_learner || status.awaits_vote {
            let members = self.inner.reader.members();
            let is_to_learn = members.iter().any(|row| row.id == id && row.is_learner);
            status.is_learner &= is_to_learn;
            status.awaits_vote &= !is_to_learn;
        }
        status
    }

    /// What this member has counted since it started.
    pub fn counters(&self) -> Counters {
        let (proposals_pending, proposals_failed) = self.inner.proposer.pending_and_failed();
        let (reads_failed, reads_slow) = self.inner.reads.failed_and_slow();
        Counters { proposals_pending, proposals_failed, reads_failed, reads_slow }
    }

    /// Moves when leader, term or role change. Positions in it are those of that change: ask
    /// [`Node::status`] for fresh ones.
    pub fn watch_status(&self) -> watch::Receiver<Status> {
        self.inner.status.clone()
    }

    /// Random name of the data directory, made with it. Published with the member's name, it lets
    /// others notice a member that comes back with an emptied directory.
    pub fn storage_uuid(&self) -> [u8; 16] {
        self.inner.storage_uuid
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
        let deadline = tokio::time::Instant::now() + inner.election;
        let mut status = inner.status.clone();
        loop {
            // The first call stops new entries; the target ignores every call until it has all that
            // were there before.
            inner.raft.trigger().transfer_leader(target).await.map_err(|_| Error::Stopped)?;
            let led = status.wait_for(|status| status.leader == Some(target));
            match tokio::time::timeout(TRANSFER_RETRY, led).await {
                Ok(Ok(_)) => return Ok(()),
                Ok(Err(_)) => return Err(Error::Stopped),
                Err(_) if tokio::time::Instant::now() >= deadline => {
                    return Err(Error::TimeoutLeaderTransfer);
                }
                Err(_) => {}
            }
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
        close(&inner.store, &inner.log).await;
        let guard = inner.guard.lock().take();
        if let Some(Err(error)) = futures::future::OptionFuture::from(guard).await {
            tracing::warn!(%error, "the task that watches consensus failed");
        }
        // Whoever starts a member in this directory next finds it free, even if handles remain.
        drop(inner.data_dir.lock().take());
    }
}

/// Writes the last checkpoint, which may have to wait for the log, and then closes the log.
async fn close(store: &SharedStore, log: &Log) {
    let store = store.lock().take();
    let log = log.clone();
    let closing = tokio::task::spawn_blocking(move || {
        if let Some(store) = store {
            store.shutdown();
        }
        log.shutdown();
    });
    if let Err(error) = closing.await {
        tracing::error!(%error, "the last checkpoint failed");
    }
}

impl Inner {
    /// Starts consensus and the tasks around it.
    async fn run(
        opened: Opened,
        config: &NodeConfig,
        settings: openraft::Config,
        retention: Retention,
        arrival: Option<Arrival>,
    ) -> Result<Inner, StartError> {
        let Opened { data_dir, log, vote, store, reader, identity } = opened;
        let member_id = identity.member_id;
        let storage_uuid = data_dir.storage_uuid();
        let connect = config.connect.clone();
        let peers = Peers::new(identity, storage_uuid, reader.clone(), connect, config.election);
        for (id, peer) in arrival.iter().flat_map(|arrival| &arrival.members) {
            peers.tell(*id, &peer.peer_urls);
        }
        let is_simulated = config.simulated.is_some();
        let transfers = Transfers::new(reader.clone(), log.clone(), is_simulated);
        let voted_term = vote.leader_id.term;
        let progress =
            Arc::new(Progress::new(member_id, voted_term, store.applied(), log.last_id()));
        let waiters = Arc::new(Waiters::default());
        let store: SharedStore = Arc::new(Mutex::new(Some(store)));
        let landing = config.simulated.as_ref().map(|simulated| simulated.landing.clone());
        let entries = LogStore::new(log.clone(), Some(vote), progress.clone(), landing);
        let state_machine = StateMachine::new(
            store.clone(),
            reader.clone(),
            waiters.clone(),
            progress.clone(),
            peers.removed().clone(),
            member_id,
            is_simulated,
        );
        let settings = Arc::new(settings);
        let network = Network {
            peers: peers.clone(),
            progress: progress.clone(),
            transfers: transfers.clone(),
            election: config.election,
        };
        let raft =
            match Raft::new(member_id, settings, network, entries.clone(), state_machine).await {
                Ok(raft) => raft,
                Err(error) => {
                    close(&store, &log).await;
                    return Err(StartError::Consensus(error.to_string()));
                }
            };
        let stopping = Arc::new(AtomicBool::new(false));
        let data_dir = Arc::new(data_dir);
        let guard = tokio::spawn(guard(raft.clone(), stopping.clone(), data_dir.clone()));

        let initial =
            Status::initial(identity.cluster_id, member_id, vote.leader_id.term).at(&progress);
        let (sender, status) = watch::channel(initial);
        let pace = Pace { heartbeat: config.heartbeat, election: config.election };
        tokio::spawn(status::follow(raft.clone(), progress.clone(), sender, pace));

        let timeout = config.request_timeout();
        let limits = Limits { max_request_bytes: config.max_request_bytes, timeout };
        let (seen, room) = (status.clone(), waiters);
        let proposer = Proposer::new(member_id, limits, room, progress.clone(), log.clone(), seen);
        let forwarder = Forwarder::new(peers.clone(), timeout);
        let confirm = Confirm::new(member_id, progress.clone(), peers.clone(), config.election);
        let reads = Reads::new(progress.clone(), confirm.clone(), status.clone(), timeout);
        tokio::spawn(proposer.clone().run(raft.clone(), forwarder.clone(), reads.clone()));
        tokio::spawn(proposer.clone().expire());
        tokio::spawn(reads.clone().run(raft.clone(), forwarder.clone()));
        let members = Members::new(raft.clone(), reader.clone(), peers.clone(), config);
        tokio::spawn(members.clone().promote_new_voters(status.clone()));
        let (disk, seen) = (log.clone(), status.clone());
        tokio::spawn(stall::run(raft.clone(), disk, progress.clone(), seen, config.election));
        let sent = transfers.clone();
        tokio::spawn(purge::run(raft.clone(), entries, reader.clone(), sent, retention));
        Ok(Inner {
            raft,
            store,
            log,
            reader,
            proposer,
            reads,
            confirm,
            progress,
            peers,
            forwarder,
            members,
            transfers,
            status,
            stopping,
            guard: Mutex::new(Some(guard)),
            election: config.election,
            timeout,
            identity,
            member_id,
            storage_uuid,
            data_dir: Mutex::new(Some(data_dir)),
        })
    }

    /// Founds the cluster if there is none. The only voter takes the lead and applies its log.
    async fn begin(&self, config: &NodeConfig) -> Result<(), StartError> {
        let consensus = |e: &dyn std::fmt::Display| StartError::Consensus(e.to_string());
        let is_initialized = self.raft.is_initialized().await.map_err(|e| consensus(&e))?;
        if !is_initialized {
            if config.initial_state_existing {
                // The leader sends everything.
                return Ok(());
            }
            let members = self.founders(config)?;
            self.raft.initialize(members).await.map_err(|e| consensus(&e))?;
        }
        let (member, progress, peers) = (self.member_id, self.progress.clone(), self.peers.clone());
        let is_sole = self.raft.with_raft_state(move |state| {
            confirm::learn_voters(&progress, state);
            let membership = state.membership_state.effective().membership();
            for (id, peer) in membership.nodes() {
                peers.tell(*id, &peer.peer_urls);
            }
            membership.voter_ids().eq([member])
        });
        if !is_sole.await.map_err(|e| consensus(&e))? {
            return Ok(());
        }
        if is_initialized {
            // The only voter needs nobody's consent, so it does not wait for the timeout.
            self.raft.trigger().elect(false).await.map_err(|e| consensus(&e))?;
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

/// Runs a step of the opening, which may wait for the disk.
async fn opened<T: Send + 'static>(
    is_simulated: bool,
    step: impl FnOnce() -> Result<T, StartError> + Send + 'static,
) -> Result<T, StartError> {
    let result = blocking(is_simulated, step).await;
    result.map_err(|e| StartError::System(format!("open the data directory: {e}")))?
}

/// Opens or prepares everything on disk. Blocks. `first` is the identity of a first start.
fn open(
    config: &NodeConfig,
    data_dir: DataDir,
    first: Option<Identity>,
) -> Result<Opened, StartError> {
    let identity = match (data_dir.identity(), first) {
        (Some(identity), _) => identity,
        (None, Some(identity)) => {
            data_dir.set_identity(identity)?;
            identity
        }
        (None, None) => {
            return Err(StartError::System("the data directory has no identity".into()));
        }
    };
    let log_options = LogOptions {
        fsync: !config.unsafe_no_fsync,
        segment_bytes: config.log_segment_bytes,
        ..LogOptions::new(data_dir.wal_dir(), data_dir.storage_uuid())
    };
    let (asked, most) = (config.max_request_bytes, log_options.payload_bytes_max() / 2);
    if asked > most {
        let text = format!("--max-request-bytes is {asked}, the log takes at most {most}");
        return Err(StartError::Settings(text));
    }
    let opened = match &config.simulated {
        Some(simulated) => Log::open_on(log_options, simulated.disk.clone())?,
        None => Log::open(log_options)?,
    };
    let vote = match opened.vote {
        Some(bytes) => codec::decode_vote(bytes)?,
        None => first_vote(&opened.log, identity.member_id)?,
    };
    let options = kelson_storage::Options {
        data_dir: config.data_dir.clone(),
        log_purged: opened.purged,
        ..config.storage.clone()
    };
    let (store, reader) = kelson_storage::open(&options, opened.log.durable())?;
    let state = store.applied().index;
    let (purged, last) = (opened.purged.index, opened.last.index.max(opened.purged.index));
    if state > last {
        // Legal only if the process ended between the installation of a snapshot and the emptying of
        // the log, which is caught up with here.
        if reader.installed() != store.applied() {
            return Err(StartError::LogLost { log: last, state });
        }
        empty(&opened.log, store.applied())?;
    }
    if state < purged {
        return Err(StartError::StateLost { log: purged, state });
    }
    if config.force_new_cluster {
        let peer =
            Peer { name: config.name.clone(), peer_urls: config.advertise_peer_urls.clone() };
        force::alone(&opened.log, &reader, identity, peer)?;
    }
    Ok(Opened { data_dir, log: opened.log, vote, store, reader, identity })
}

/// Takes everything up to a position out of the log, which then begins behind it.
fn empty(log: &Log, upto: kelson_storage::LogId) -> Result<(), StartError> {
    let (sender, receiver) = std::sync::mpsc::channel();
    // The receiver waits below.
    log.purge(upto, Box::new(move |result| drop(sender.send(result))));
    Ok(receiver.recv().unwrap_or(Err(kelson_storage::log::LogError::Closed))?)
}

/// A log begins with a vote, so that one that has lost its votes is never taken for a new one.
fn first_vote(log: &Log, member_id: u64) -> Result<Vote, StartError> {
    let vote = Vote::new(0, member_id);
    let (sender, receiver) = std::sync::mpsc::channel();
    // The receiver waits below.
    log.save_vote(codec::encode_vote(&vote), Box::new(move |result| drop(sender.send(result))));
    receiver.recv().unwrap_or(Err(kelson_storage::log::LogError::Closed))?;
    Ok(vote)
}

/// Ends the process when consensus ends without being asked to.
async fn guard(raft: Raft, stopping: Arc<AtomicBool>, _data_dir: Arc<DataDir>) {
    let mut metrics = raft.server_metrics();
    while metrics.changed().await.is_ok() {}
    if !stopping.load(Ordering::SeqCst) {
        // A runtime that is being dropped ends consensus too, and this task at its next step.
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    if stopping.load(Ordering::SeqCst) {
        return;
    }
    let state = raft.metrics().borrow_watched().running_state.clone();
    match state {
        Err(fatal) => abort("run consensus", &fatal),
        Ok(()) => abort("run consensus", &"its task ended unexpectedly"),
    }
}

#[cfg(test)]
mod tests;
