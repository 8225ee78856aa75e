//! The read barrier: proves that local state contains every write acknowledged before a read began.
//! One task takes all waiting readers, makes one round for them and wakes them together: the leader asks
//! a quorum (`confirm`), a follower asks the leader. It never reads data. The only voter of a cluster
//! needs no round: see `Progress::reads_are_local`.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use kelson_api::Error;
use kelson_storage::sabotage::{self, Variant};
use parking_lot::Mutex;
use tokio::sync::{Notify, oneshot, watch};

use crate::confirm::{Confirm, Stopped, wait_for_sleeping_save};
use crate::forward::{Forwarder, Indexes};
use crate::progress::Progress;
use crate::status::Status;
use crate::types::Raft;

/// A round without an answer is repeated after this long. Source: etcd.
const RETRY: Duration = Duration::from_millis(500);
/// Readers that wait for one round.
const WAITING: usize = 65_536;

type Barrier = Result<u64, Error>;

#[derive(Default)]
struct Room {
    waiting: Vec<oneshot::Sender<Barrier>>,
    closed: bool,
}

/// Readers that wait for a barrier, and what is needed to give them one.
pub(crate) struct Reads {
    room: Mutex<Room>,
    arrived: Notify,
    progress: Arc<Progress>,
    confirm: Arc<Confirm>,
    status: watch::Receiver<Status>,
    timeout: Duration,
    failed: AtomicU64,
    slow: AtomicU64,
}

impl Reads {
    pub(crate) fn new(
        progress: Arc<Progress>,
        confirm: Arc<Confirm>,
        status: watch::Receiver<Status>,
        timeout: Duration,
    ) -> Arc<Reads> {
        Arc::new(Reads {
            room: Mutex::default(),
            arrived: Notify::new(),
            progress,
            confirm,
            status,
            timeout,
            failed: AtomicU64::new(0),
            slow: AtomicU64::new(0),
        })
    }

    /// Returns an applied index that covers everything acknowledged before the call. Cancel safe.
    pub(crate) async fn barrier(&self) -> Barrier {
        if self.progress.reads_are_local() {
            wait_for_sleeping_save().await;
            return Ok(self.progress.applied());
        }
        if sabotage::is(Variant::LocalReads) && !self.status.borrow().is_leader {
            return Ok(self.progress.applied());
        }
        let start = Instant::now();
        let barrier = self.wait_for_round().await;
        if barrier.is_err() {
            self.failed.fetch_add(1, Ordering::Relaxed);
        } else if start.elapsed() > self.timeout / 2 {
            self.slow.fetch_add(1, Ordering::Relaxed);
        }
        barrier
    }

    /// Barriers that failed since start, and those that took more than half the timeout.
    pub(crate) fn failed_and_slow(&self) -> (u64, u64) {
        (self.failed.load(Ordering::Relaxed), self.slow.load(Ordering::Relaxed))
    }

    async fn wait_for_round(&self) -> Barrier {
        let (sender, receiver) = oneshot::channel();
        {
            let mut room = self.room.lock();
            if room.closed {
                return Err(Error::Stopped);
            }
            if room.waiting.len() >= WAITING {
                return Err(Error::TooManyRequests);
            }
            room.waiting.push(sender);
        }
        self.arrived.notify_one();
        match tokio::time::timeout(self.timeout, receiver).await {
            Ok(Ok(barrier)) => barrier,
            Ok(Err(_)) => Err(Error::Stopped),
            Err(_) => Err(Error::Timeout),
        }
    }

    pub(crate) fn close(&self) {
        let mut room = self.room.lock();
        room.closed = true;
        for reader in room.waiting.drain(..) {
            reader.send(Err(Error::Stopped)).ok();
        }
        drop(room);
        self.arrived.notify_one();
        self.confirm.close();
    }

    /// Makes rounds until [`Reads::close`].
    pub(crate) async fn run(self: Arc<Self>, raft: Raft, forwarder: Forwarder) {
        let mut way = Way { raft, forwarder, indexes: None };
        loop {
            self.arrived.notified().await;
            let readers = {
                let mut room = self.room.lock();
                if room.closed {
                    return;
                }
                std::mem::take(&mut room.waiting)
            };
            if readers.is_empty() {
                continue;
            }
            let barrier = self.round(&mut way, &readers).await;
            let late = if sabotage::is(Variant::LateReaders) {
                std::mem::take(&mut self.room.lock().waiting)
            } else {
                Vec::new()
            };
            for reader in readers.into_iter().chain(late) {
                // A reader that left does not want to know.
                reader.send(barrier).ok();
            }
        }
    }

    async fn round(&self, way: &mut Way, readers: &[oneshot::Sender<Barrier>]) -> Barrier {
        let leader_changes = self.status.borrow().leader_changes;
        let mut status = self.status.clone();
        while readers.iter().any(|reader| !reader.is_closed()) {
            let asked = {
                let status = status.borrow_and_update();
                status.leader.filter(|_| !status.is_leader)
            };
            let proof = async {
                let barrier = self.proof(way, asked).await;
                if barrier.is_none() {
                    tokio::time::sleep(RETRY).await;
                }
                barrier
            };
            tokio::select! {
                biased;
                barrier = proof => {
                    if let Some(barrier) = barrier {
                        return barrier;
                    }
                }
                // An old leader may be waited for in vain.
                changed = status.changed() => {
                    if changed.is_err() {
                        return Err(Error::Stopped);
                    }
                }
            }
            let now = status.borrow().leader_changes;
            // The first leader of this process is no change: readers waited for it.
            if now != leader_changes && leader_changes != 0 {
                return Err(Error::LeaderChanged);
            }
        }
        Err(Error::Timeout)
    }

    /// Asks this leader, or a quorum if this member leads; `None` = nobody could confirm.
    async fn proof(&self, way: &mut Way, leader: Option<u64>) -> Option<Barrier> {
        let index = match leader {
            Some(leader) => self.asked_leader(way, leader).await?,
            None => match self.confirm.index(&way.raft, None).await {
                Ok(index) => index?,
                Err(Stopped) => return Some(Err(Error::Stopped)),
            },
        };
        Some(self.applied(&way.raft, index).await)
    }

    /// What the leader says; `None` = it could not tell.
    async fn asked_leader(&self, way: &mut Way, leader: u64) -> Option<u64> {
        let open = way.indexes.take().filter(|indexes| indexes.leader == leader);
        // The stream is put back only with no question under way.
        if let Some(mut indexes) = open
            && let Some(index) = indexes.ask(self.progress.voted_term()).await
        {
            way.indexes = Some(indexes);
            return index;
        }
        let mut indexes = way.forwarder.ask_indexes(leader).await?;
        let index = indexes.ask(self.progress.voted_term()).await?;
        way.indexes = Some(indexes);
        index
    }

    /// Waits until this index is applied here, and returns it.
    async fn applied(&self, raft: &Raft, index: u64) -> Barrier {
        if self.progress.applied() >= index {
            return Ok(index);
        }
        // openraft counts from 0.
        let waiting = raft.wait(Some(self.timeout));
        match waiting.applied_index_at_least(Some(index - 1), "a read").await {
            Ok(_) => Ok(index),
            Err(openraft::metrics::WaitError::Timeout(..)) => Err(Error::Timeout),
            Err(openraft::metrics::WaitError::ShuttingDown) => Err(Error::Stopped),
        }
    }
}

/// Whom a round may ask.
struct Way {
    raft: Raft,
    forwarder: Forwarder,
    /// The stream to the leader that was asked last.
    indexes: Option<Indexes>,
}
