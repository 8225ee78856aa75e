//! The way of a command into the log: admission, two bounded queues, and one task that packs what
//! has arrived into entries, for the own log if this member leads and for the leader's otherwise. It has no timers on the way of a command; a batch is what came while
//! earlier entries were under way. Results do not come back here: the local apply finds the caller
//! by request id in `waiters`.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use kelson_api::command::{Asker, Batch, Command, command::Op};
use kelson_api::{Error, Message};
use kelson_storage::log::Log;
use kelson_storage::{Outcome, failpoint};
use openraft::errors::ClientWriteError;
use openraft::raft::ClientWriteResult;
use parking_lot::Mutex;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, watch};

use crate::forward::{Forwarded, Forwarder};
use crate::progress::Progress;
use crate::reads::Reads;
use crate::status::Status;
use crate::types::{Answer, Commands, CommittedLeaderId, Raft, TypeConfig};
use crate::waiters::Waiters;

/// One entry carries at most this many commands ...
const BATCH_COMMANDS: usize = 256;
/// ... and is closed when it has this many bytes of commands.
const BATCH_BYTES: usize = 256 * 1024;
/// Entries under way at a time. More would make smaller batches and no more throughput.
const ENTRIES_IN_FLIGHT: usize = 4;
/// Waiting commands of clients; about four seconds of work at full speed.
const NORMAL_QUEUE: usize = 65_536;
/// Waiting urgent commands (lease revocations, compactions).
const URGENT_QUEUE: usize = 16_384;
/// Bytes of commands admitted and not yet committed.
const BYTES_IN_FLIGHT: usize = 256 * 1024 * 1024;
/// Entries committed and not applied beyond which clients are turned away. Source: etcd.
const APPLY_GAP: u64 = 5_000;
/// How often expired callers are looked for.
const EXPIRE_EVERY: Duration = Duration::from_millis(100);
/// Pause after consensus refused an entry though this member believes to lead.
const REFUSED_PAUSE: Duration = Duration::from_millis(10);

/// Which queue a command takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Urgency {
    Normal,
    /// Goes first, and is admitted when clients are already turned away: it frees resources.
    Urgent,
}

/// Bounds that come from the configuration.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Largest encoded command in bytes.
    pub(crate) max_request_bytes: usize,
    /// How long a caller waits for its result.
    pub(crate) timeout: Duration,
}

struct Queued {
    command: Command,
    bytes: usize,
}

#[derive(Default)]
struct Queues {
    urgent: VecDeque<Queued>,
    normal: VecDeque<Queued>,
    closed: bool,
}

/// Everything the callers and the packing task share.
pub(crate) struct Proposer {
    member_id: u64,
    limits: Limits,
    queues: Mutex<Queues>,
    arrived: Notify,
    bytes_in_flight: AtomicUsize,
    /// Consensus refused an entry since the last batch was made.
    refused: AtomicBool,
    failed: AtomicU64,
    next_request: AtomicU64,
    waiters: Arc<Waiters>,
    progress: Arc<Progress>,
    log: Log,
    status: watch::Receiver<Status>,
}

/// Bytes of a follower's batch that are under way here.
pub(crate) struct ForwardedRoom {
    proposer: Arc<Proposer>,
    bytes: usize,
}

impl Drop for ForwardedRoom {
    fn drop(&mut self) {
        self.proposer.bytes_in_flight.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// Takes the caller out of the waiting room when its future is dropped.
struct Leaving<'a> {
    waiters: &'a Waiters,
    request_id: u64,
}

impl Drop for Leaving<'_> {
    fn drop(&mut self) {
        self.waiters.remove(self.request_id);
    }
}

/// Ids of a run begin at its start in nanoseconds and count up: slower than the clock does, so they
/// stay apart from those in entries of earlier runs, which may be applied again while new callers
/// wait. A process that is restarted at once may start twice in one second, never in one millisecond.
fn first_request_id(since_epoch: Duration) -> u64 {
    // Enough for more than five hundred years.
    (since_epoch.as_nanos() as u64).max(1)
}

impl Proposer {
    pub(crate) fn new(
        member_id: u64,
        limits: Limits,
        waiters: Arc<Waiters>,
        progress: Arc<Progress>,
        log: Log,
        status: watch::Receiver<Status>,
    ) -> Arc<Proposer> {
        let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Arc::new(Proposer {
            member_id,
            limits,
            queues: Mutex::default(),
            arrived: Notify::new(),
            bytes_in_flight: AtomicUsize::new(0),
            refused: AtomicBool::new(false),
            failed: AtomicU64::new(0),
            next_request: AtomicU64::new(first_request_id(since_epoch)),
            waiters,
            progress,
            log,
            status,
        })
    }

    /// Puts a command into the log and returns its result after the local apply.
    ///
    /// `asker` is the client whose rights count; `None` = the member itself.
    ///
    /// Cancel safe: a command whose future is dropped while it is queued is not proposed; after
    /// that its outcome is unknown.
    pub(crate) async fn propose(
        &self,
        asker: Option<Asker>,
        op: Op,
        urgency: Urgency,
    ) -> Result<Outcome, Error> {
        let result = self.propose_uncounted(asker, op, urgency).await;
        if result.is_err() {
            self.failed.fetch_add(1, Ordering::Relaxed);
        }
        result
    }

    /// As `propose` with urgency, but only into this member's own log and only while it leads `term`:
    /// never forwarded, never kept for later. For decisions that a leader may take and a deposed one
    /// must not.
    pub(crate) async fn propose_leading(
        &self,
        raft: &Raft,
        op: Op,
        term: u64,
    ) -> Result<Outcome, Error> {
        let request_id = self.next_request.fetch_add(1, Ordering::Relaxed);
        let command = Command { request_id, origin: self.member_id, asker: None, op: Some(op) };
        self.admit(command.encoded_len(), Urgency::Urgent)?;
        let deadline = Instant::now() + self.limits.timeout;
        let leader_changes = self.status.borrow().leader_changes;
        let mut answer = self.waiters.add(request_id, deadline, leader_changes);
        let _leaving = Leaving { waiters: &self.waiters, request_id };
        self.waiters.retain_proposed(&mut vec![request_id], |id| *id);
        let entry = Commands(Batch { commands: vec![command] }.encode_to_vec().into());
        let (sender, disposed) = tokio::sync::oneshot::channel();
        // The receiver is gone if the caller is.
        let told = Answer::new(move |result: ClientWriteResult<TypeConfig>| {
            drop(sender.send(result.map(|_| ())));
        });
        let leader = CommittedLeaderId::new(term);
        let writing = raft.write(entry).with_leader(leader).responder(told);
        writing.await.map_err(|_| Error::Stopped)?;
        tokio::select! {
            biased;
            outcome = &mut answer => outcome.unwrap_or(Err(Error::Stopped)),
            disposed = disposed => match disposed {
                Ok(Err(ClientWriteError::ForwardToLeader(_))) => Err(Error::NotLeader),
                Ok(Err(_)) => Err(Error::TimeoutLeaderFailure),
                Ok(Ok(())) | Err(_) => answer.await.unwrap_or(Err(Error::Stopped)),
            },
        }
    }

    /// Proposals that wait for their result, and those that got none since start.
    pub(crate) fn pending_and_failed(&self) -> (u64, u64) {
        (self.waiters.len() as u64, self.failed.load(Ordering::Relaxed))
    }

    async fn propose_uncounted(
        &self,
        asker: Option<Asker>,
        op: Op,
        urgency: Urgency,
    ) -> Result<Outcome, Error> {
        let request_id = self.next_request.fetch_add(1, Ordering::Relaxed);
        let command = Command { request_id, origin: self.member_id, asker, op: Some(op) };
        let bytes = command.encoded_len();
        self.admit(bytes, urgency)?;
        let deadline = Instant::now() + self.limits.timeout;
        let leader_changes = self.status.borrow().leader_changes;
        let answer = self.waiters.add(request_id, deadline, leader_changes);
        let _leaving = Leaving { waiters: &self.waiters, request_id };
        self.enqueue(Queued { command, bytes }, urgency)?;
        // The sender is dropped without an answer only when the member goes down.
        answer.await.unwrap_or(Err(Error::Stopped))
    }

    fn admit(&self, bytes: usize, urgency: Urgency) -> Result<(), Error> {
        if bytes > self.limits.max_request_bytes {
            return Err(Error::RequestTooLarge);
        }
        if !self.log.can_grow() {
            return Err(Error::NoSpace);
        }
        // Urgent commands free resources, so they pass where others are stopped. Source: etcd.
        let room = if urgency == Urgency::Urgent { 2 } else { 1 };
        let gap = self.progress.committed().saturating_sub(self.progress.applied());
        let in_flight = self.bytes_in_flight.load(Ordering::Relaxed);
        if gap > room * APPLY_GAP || in_flight.saturating_add(bytes) > BYTES_IN_FLIGHT {
            return Err(Error::TooManyRequests);
        }
        Ok(())
    }

    fn enqueue(&self, queued: Queued, urgency: Urgency) -> Result<(), Error> {
        let bytes = queued.bytes;
        {
            let mut queues = self.queues.lock();
            if queues.closed {
                return Err(Error::Stopped);
            }
            let (queue, bound) = match urgency {
                Urgency::Normal => (&mut queues.normal, NORMAL_QUEUE),
                Urgency::Urgent => (&mut queues.urgent, URGENT_QUEUE),
            };
            if queue.len() >= bound {
                return Err(Error::TooManyRequests);
            }
            queue.push_back(queued);
            self.bytes_in_flight.fetch_add(bytes, Ordering::Relaxed);
        }
        self.arrived.notify_one();
        Ok(())
    }

    /// Refuses new commands and fails those that wait.
    pub(crate) fn close(&self) {
        self.queues.lock().closed = true;
        self.arrived.notify_one();
        self.waiters.fail_all(Error::Stopped);
    }

    /// Packs commands into entries until [`Proposer::close`].
    pub(crate) async fn run(self: Arc<Self>, raft: Raft, forwarder: Forwarder, reads: Arc<Reads>) {
        let window = Arc::new(Semaphore::new(ENTRIES_IN_FLIGHT));
        let mut status = self.status.clone();
        'packing: loop {
            let permit = window.clone().acquire_owned().await;
            let permit = permit.expect("the window is never closed");
            // Without a leader nothing is proposed: callers wait, and may be told so safely.
            while status.borrow_and_update().leader.is_none() {
                if self.closed() || status.changed().await.is_err() {
                    return;
                }
            }
            if self.refused.swap(false, Ordering::Relaxed) {
                tokio::time::sleep(REFUSED_PAUSE).await;
            }
            let batch = loop {
                if self.closed() {
                    return;
                }
                match self.next_batch() {
                    Some(batch) => break batch,
                    None => {
                        self.arrived.notified().await;
                        // What came back is not sent again at once: the leader is looked up anew.
                        if self.refused.load(Ordering::Relaxed) {
                            continue 'packing;
                        }
                    }
                }
            };
            // Waiting for work may have taken long: the leader may be another one now. Whoever is
            // asked wrongly refuses, and the batch comes back.
            let (leader, is_leader) = {
                let status = status.borrow();
                (status.leader, status.is_leader)
            };
            match leader {
                Some(leader) if !is_leader => {
                    self.forward(&forwarder, &reads, leader, batch, permit)
                }
                _ => self.send(&raft, batch, permit).await,
            }
        }
    }

    /// Asks the leader to take one entry; `permit` comes back with its answer.
    fn forward(
        self: &Arc<Self>,
        forwarder: &Forwarder,
        reads: &Arc<Reads>,
        leader: u64,
        batch: Vec<Queued>,
        permit: OwnedSemaphorePermit,
    ) {
        let bytes: usize = batch.iter().map(|queued| queued.bytes).sum();
        let batch = Batch { commands: batch.into_iter().map(|queued| queued.command).collect() };
        let encoded = batch.encode_to_vec().into();
        let (proposer, forwarder, reads) = (self.clone(), forwarder.clone(), reads.clone());
        tokio::spawn(async move {
            let outcome = forwarder.batch(leader, encoded).await;
            proposer.bytes_in_flight.fetch_sub(bytes, Ordering::Relaxed);
            let ids = batch.commands.iter().map(|command| command.request_id);
            match outcome {
                // The local apply answers the callers.
                Forwarded::Applied => {}
                Forwarded::Unknown => {
                    drop(permit);
                    let ids: Vec<u64> = ids.collect();
                    return proposer.give_up(&reads, &ids).await;
                }
                Forwarded::Busy => proposer.waiters.fail(ids, Error::TooManyRequests),
                Forwarded::Refused => proposer.take_back(batch),
            }
            drop(permit);
        });
    }

    /// The leader is gone and with it, perhaps, what it was given. Whatever it had made durable on a
    /// quorum is applied here after the next barrier; who still waits then is told that the outcome is
    /// unknown, rather than left to time out.
    async fn give_up(&self, reads: &Reads, ids: &[u64]) {
        if reads.barrier().await.is_ok() {
            self.waiters.fail(ids.iter().copied(), Error::TimeoutLeaderFailure);
        }
    }

    /// Room for a batch that a follower sends; `None` = it is to be turned away. Dropping it gives the
    /// room back.
    pub(crate) fn admit_forwarded(self: &Arc<Self>, bytes: usize) -> Option<ForwardedRoom> {
        let gap = self.progress.committed().saturating_sub(self.progress.applied());
        let in_flight = self.bytes_in_flight.load(Ordering::Relaxed);
        // Twice the room of local callers: the follower has admitted the commands already.
        let is_full = gap > 2 * APPLY_GAP || in_flight.saturating_add(bytes) > 2 * BYTES_IN_FLIGHT;
        if is_full || !self.log.can_grow() {
            return None;
        }
        self.bytes_in_flight.fetch_add(bytes, Ordering::Relaxed);
        Some(ForwardedRoom { proposer: self.clone(), bytes })
    }

    /// Fails callers whose time is up, until [`Proposer::close`].
    pub(crate) async fn expire(self: Arc<Self>) {
        let mut every = tokio::time::interval(EXPIRE_EVERY);
        while !self.closed() {
            every.tick().await;
            self.waiters.expire(Instant::now(), self.status.borrow().leader_changes);
        }
    }

    fn closed(&self) -> bool {
        self.queues.lock().closed
    }

    /// The next commands, urgent ones first, without those whose callers are gone.
    fn next_batch(&self) -> Option<Vec<Queued>> {
        loop {
            let mut batch = Vec::new();
            let mut bytes = 0;
            {
                let mut queues = self.queues.lock();
                let Queues { urgent, normal, .. } = &mut *queues;
                for queue in [urgent, normal] {
                    while let Some(next) = queue.front() {
                        let full = batch.len() >= BATCH_COMMANDS
                            || (!batch.is_empty() && bytes + next.bytes > BATCH_BYTES);
                        if full {
                            break;
                        }
                        bytes += next.bytes;
                        batch.extend(queue.pop_front());
                    }
                }
            }
            if batch.is_empty() {
                return None;
            }
            self.waiters.retain_proposed(&mut batch, |queued: &Queued| queued.command.request_id);
            let kept: usize = batch.iter().map(|queued| queued.bytes).sum();
            self.bytes_in_flight.fetch_sub(bytes - kept, Ordering::Relaxed);
            if !batch.is_empty() {
                return Some(batch);
            }
        }
    }

    /// Hands one entry to consensus; `permit` comes back when it is applied or refused.
    async fn send(self: &Arc<Self>, raft: &Raft, batch: Vec<Queued>, permit: OwnedSemaphorePermit) {
        let bytes: usize = batch.iter().map(|queued| queued.bytes).sum();
        let batch = Batch { commands: batch.into_iter().map(|queued| queued.command).collect() };
        let entry = Commands(batch.encode_to_vec().into());
        let proposer = self.clone();
        let answer = Answer::new(move |result: ClientWriteResult<TypeConfig>| {
            proposer.bytes_in_flight.fetch_sub(bytes, Ordering::Relaxed);
            if let Err(error) = result {
                proposer.refused(error, batch);
            }
            drop(permit);
        });
        failpoint::hit("raftBeforeLeaderSend");
        if raft.client_write_ff(entry, Some(answer)).await.is_err() {
            // Consensus is gone: the process is stopping or about to abort.
            self.close();
        }
    }

    fn refused(&self, error: ClientWriteError<TypeConfig>, batch: Batch) {
        let ids = batch.commands.iter().map(|command| command.request_id);
        match error {
            // Refused before it was appended.
            ClientWriteError::ForwardToLeader(_) => self.take_back(batch),
            // Another leader's log replaced it, or may still commit it: the outcome is unknown.
            ClientWriteError::LogEntryDiscarded(_) => {
                self.waiters.fail(ids, Error::TimeoutLeaderFailure);
            }
            ClientWriteError::ChangeMembershipError(_)
            | ClientWriteError::PreconditionFailed(_) => {
                self.waiters.fail(ids, Error::Timeout);
            }
        }
    }

    /// Queues commands again that surely are in no log: they go first as soon as there is a leader.
    fn take_back(&self, batch: Batch) {
        self.waiters.unpropose(batch.commands.iter().map(|command| command.request_id));
        let mut queues = self.queues.lock();
        for command in batch.commands.into_iter().rev() {
            let bytes = command.encoded_len();
            self.bytes_in_flight.fetch_add(bytes, Ordering::Relaxed);
            queues.normal.push_front(Queued { command, bytes });
        }
        drop(queues);
        self.refused.store(true, Ordering::Relaxed);
        // Nobody else may have anything to propose here.
        self.arrived.notify_one();
    }
}

#[cfg(test)]
mod tests;
