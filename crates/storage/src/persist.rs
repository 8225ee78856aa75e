//! The persister: the one thread that writes the state to disk, behind the log and behind the answers
//! to clients. It drains a queue of deltas, never goes past what the log has on disk, and closes what
//! it wrote with a checkpoint: rows, tables and applied position become durable in one flush. A second
//! thread answers reads of old rows from a handle of its own; what is queued is readable meanwhile.
//!
//! The first error or panic of the database ends the process. It never retries: after a failed flush
//! the database may claim success for data that it lost.

pub(crate) mod copy;
mod reads;
mod writer;

use std::collections::{BTreeMap, VecDeque};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::Duration;

use bytes::Bytes;
use parking_lot::{Condvar, Mutex, RwLock};
use tokio::sync::watch;

use crate::chain::Chain;
use crate::engine::Backend;
use crate::engine::watchdog::{CALL_MAX, Watchdog};
use crate::keys::{Tables, Tally};
use crate::types::{Delta, Fatal, LogId, RevisionKey, Row};
use reads::Reads;

/// Deltas waiting to be written. At the bound `push` blocks, which slows the apply loop down. Unit:
/// bytes.
const QUEUE_BYTES: usize = 256 << 20;
/// Compaction slices waiting to be removed. At the bound `remove_rows` blocks, which slows the
/// compaction thread down.
const QUEUE_SLICES: usize = 4;
/// The same while a snapshot or a hash holds the rows: so many that the compaction thread is not held
/// up with them, which would also hold up a shutdown. About 30 MiB of row names.
const QUEUE_SLICES_HELD: usize = 1000;

/// How the persister works.
#[derive(Clone)]
pub(crate) struct PersistConfig {
    /// Written bytes that force a checkpoint; they live in memory until then.
    pub(crate) checkpoint_bytes: u64,
    /// Longest time between a write and the checkpoint that closes it.
    pub(crate) checkpoint_interval: Duration,
    /// A push returns when the writer has nothing to do.
    pub(crate) in_step: bool,
    /// Where the database lies, to measure it and to rewrite it.
    pub(crate) place: Option<Place>,
}

/// The directory of a database on disk.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    /// Holds one directory per generation of the database and the file that names the current one.
    pub(crate) state_dir: PathBuf,
    pub(crate) cache_bytes: u64,
    /// Whether somebody is making another generation; clones share it.
    pub(crate) claimed: Arc<AtomicBool>,
}

impl Place {
    /// Takes the right to make a generation; `None` if somebody else has it.
    pub(crate) fn claim(&self) -> Option<Claim> {
        let was_claimed = self.claimed.swap(true, Ordering::AcqRel);
        (!was_claimed).then(|| Claim(self.claimed.clone()))
    }
}

/// The right to make a generation, until dropped: a rewrite and a transfer use the same names.
#[derive(Debug)]
pub(crate) struct Claim(Arc<AtomicBool>);

impl Drop for Claim {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}

/// How far the log is on disk. Source: `log::Durable`; tests bring their own.
pub(crate) trait DurableLog: Send + 'static {
    /// Blocks until the entry is on disk; false if the log was closed before.
    fn wait_for(&self, index: u64) -> bool;
}

impl DurableLog for crate::log::Durable {
    fn wait_for(&self, index: u64) -> bool {
        crate::log::Durable::wait_for(self, index)
    }
}

/// Handle to the threads. Dropping it is the same as `shutdown`.
pub(crate) struct Persister {
    shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

/// What the handle and the threads have in common.
struct Shared {
    queue: Mutex<Queue>,
    /// Something for the writer to do.
    work: Condvar,
    /// Room in the queue, or a removal has ended.
    room: Condvar,
    /// Rows that were pushed and are not in the database yet.
    tail: RwLock<BTreeMap<RevisionKey, Row>>,
    reads: Reads,
    /// Newest revision that was pushed.
    newest_revision: AtomicI64,
    signals: Arc<Signals>,
    checkpoints: Mutex<CheckpointStats>,
    /// Directory of the current generation; moves when the database is rewritten.
    generation_dir: Mutex<Option<PathBuf>>,
    in_step: bool,
}

/// What others wait for. It outlives a persister that is replaced.
pub(crate) struct Signals {
    durable_applied: watch::Sender<LogId>,
    finished_compaction: watch::Sender<i64>,
}

impl Signals {
    pub(crate) fn new(applied: LogId, finished: i64) -> Arc<Self> {
        Arc::new(Self {
            durable_applied: watch::Sender::new(applied),
            finished_compaction: watch::Sender::new(finished),
        })
    }
}

#[derive(Default)]
struct Queue {
    deltas: VecDeque<Delta>,
    bytes: usize,
    slices: VecDeque<Slice>,
    /// Deltas pushed and deltas written since the start: a slice waits for those before it.
    pushed: u64,
    written: u64,
    /// Scans that need rows to stay.
    holds: usize,
    is_removing: bool,
    rewrites: Vec<SyncSender<Result<bool, Fatal>>>,
    cuts: VecDeque<CutRequest>,
    is_stopping: bool,
    /// The writer waits for something to do.
    is_idle: bool,
    /// Another persister has taken over: nothing is written any more, reads go on.
    is_retired: bool,
}

/// Somebody wants the tables as of everything pushed so far.
struct CutRequest {
    /// It is answered once this many deltas were written.
    after: u64,
    answer: SyncSender<(Tables, i64)>,
}

/// Rows that a compaction removes in one go.
struct Slice {
    rows: Vec<(RevisionKey, bool)>,
    revision: i64,
    last: bool,
    /// It may run once this many deltas were written.
    after: u64,
}

/// Durations of checkpoints since the last call of `take_checkpoints`, for a histogram. Bounded; the
/// oldest are dropped.
#[derive(Default, Debug)]
struct CheckpointStats {
    samples: VecDeque<Duration>,
}

/// Samples kept between two collections of metrics: enough for an hour of checkpoints.
const CHECKPOINT_SAMPLES: usize = 4096;

impl Persister {
    /// Starts the threads on an opened database.
    ///
    /// `at` is what the database says of itself.
    pub(crate) fn start(
        backend: Box<dyn Backend>,
        config: PersistConfig,
        durable: impl DurableLog,
        at: Start,
    ) -> Result<Self, std::io::Error> {
        let (reads, jobs) = Reads::new();
        let shared = Arc::new(Shared {
            queue: Mutex::default(),
            work: Condvar::new(),
            room: Condvar::new(),
            tail: RwLock::default(),
            reads,
            newest_revision: AtomicI64::new(at.revision),
            signals: at.signals.clone(),
            checkpoints: Mutex::default(),
            generation_dir: Mutex::new(at.generation_dir.clone()),
            in_step: config.in_step,
        });
        let watchdog = Watchdog::start(CALL_MAX, |doing| {
            let text = format!("the state database does not come back from a {doing}");
            die(&Fatal(text));
        })?;
        let backend = watchdog.wrap(backend);
        let read_handle = backend.reader();
        let reader = std::thread::Builder::new().name("state-reader".into());
        let reader = reader.spawn(move || reads::serve(read_handle, &jobs))?;
        let writer_shared = shared.clone();
        let writer = std::thread::Builder::new().name("state-writer".into());
        let writer = writer.spawn(move || {
            writer::Writer::new(writer_shared, (backend, watchdog), config, durable, &at).run();
        })?;
        Ok(Self { shared, threads: Mutex::new(vec![writer, reader]) })
    }

    /// Queues what one entry changed. Its rows are readable when this returns. Blocks while the
    /// queue is over its bound.
    ///
    /// # Errors
    /// The persister was shut down.
    pub(crate) fn push(&self, delta: Delta) -> Result<(), Fatal> {
        let mut queue = self.shared.queue.lock();
        while queue.bytes > QUEUE_BYTES && !queue.is_closed() {
            self.shared.room.wait(&mut queue);
        }
        if queue.is_closed() {
            return Err(stopped());
        }
        if !delta.rows.is_empty() {
            let rows = delta.rows.iter().map(|row| (row.key, row.clone()));
            self.shared.tail.write().extend(rows);
        }
        if let Some(row) = delta.rows.last() {
            self.shared.newest_revision.store(row.key.main, Ordering::Release);
        }
        queue.bytes += cost(&delta);
        queue.pushed += 1;
        queue.deltas.push_back(delta);
        queue.is_idle = false;
        self.shared.work.notify_one();
        drop(queue);
        if self.shared.in_step {
            self.settle();
        }
        Ok(())
    }

    /// Waits until the writer has nothing to do.
    pub(crate) fn settle(&self) {
        let mut queue = self.shared.queue.lock();
        while !queue.is_idle && !queue.is_closed() {
            self.shared.room.wait(&mut queue);
        }
    }

    /// Queues the removal of rows that a compaction to revision `done` made superfluous; `last` ends
    /// that compaction. Blocks while too many slices wait; does nothing after shutdown.
    pub(crate) fn remove_rows(&self, rows: Vec<(RevisionKey, bool)>, done: i64, last: bool) {
        let mut queue = self.shared.queue.lock();
        loop {
            let bound = if queue.holds > 0 { QUEUE_SLICES_HELD } else { QUEUE_SLICES };
            if queue.is_retired {
                return;
            }
            if queue.slices.len() < bound || queue.is_stopping {
                break;
            }
            self.shared.room.wait(&mut queue);
        }
        let after = queue.pushed;
        queue.slices.push_back(Slice { rows, revision: done, last, after });
        queue.is_idle = false;
        self.shared.work.notify_one();
    }

    /// One row, from the queue or from disk. Blocking.
    ///
    /// # Errors
    /// The persister was shut down.
    pub(crate) fn get(&self, key: RevisionKey) -> Result<Option<Bytes>, Fatal> {
        if let Some(row) = self.shared.tail.read().get(&key) {
            return Ok(Some(row.kv.clone()));
        }
        self.shared.reads.get(key)
    }

    /// Rows in revision order from `from` on, queued ones included; at least one if there is any,
    /// then until a limit is reached. An empty answer means the end. Blocking.
    ///
    /// # Errors
    /// The persister was shut down.
    pub(crate) fn scan(
        &self,
        from: RevisionKey,
        limit_rows: usize,
        limit_bytes: usize,
    ) -> Result<Vec<Row>, Fatal> {
        // The queue first: a row leaves it only after the database has it, so that none is missed.
        let mut queued = Vec::new();
        let mut bytes = 0;
        for row in self.shared.tail.read().range(from..).take(limit_rows.max(1)).map(|(_, row)| row)
        {
            bytes += row_cost(row);
            queued.push(row.clone());
            if bytes >= limit_bytes {
                break;
            }
        }
        let stored = self.shared.reads.scan(from, limit_rows, limit_bytes)?;
        Ok(merge(stored, queued, limit_rows.max(1), limit_bytes))
    }

    /// Newest revision whose rows can be read here.
    pub(crate) fn newest_revision(&self) -> i64 {
        self.shared.newest_revision.load(Ordering::Acquire)
    }

    /// The tables as of everything pushed so far, with the newest revision that belongs to it. Waits
    /// until that is written, but not for a checkpoint.
    ///
    /// # Errors
    /// The persister was shut down.
    pub(crate) fn cut(&self) -> Result<(Tables, i64), Fatal> {
        let (answer, wait) = sync_channel(1);
        let mut queue = self.shared.queue.lock();
        if queue.is_closed() {
            return Err(stopped());
        }
        let after = queue.pushed;
        queue.cuts.push_back(CutRequest { after, answer });
        self.shared.work.notify_one();
        drop(queue);
        wait.recv().map_err(|_| stopped())
    }

    /// Applied position of the last finished checkpoint.
    #[cfg(test)]
    pub(crate) fn durable_applied(&self) -> LogId {
        *self.shared.signals.durable_applied.borrow()
    }

    /// Applied position of the last finished checkpoint, and a signal each time it moves.
    pub(crate) fn durable_watch(&self) -> watch::Receiver<LogId> {
        self.shared.signals.durable_applied.subscribe()
    }

    /// Revision of the last compaction whose rows are gone from disk; -1 = none.
    pub(crate) fn finished_compaction(&self) -> watch::Receiver<i64> {
        self.shared.signals.finished_compaction.subscribe()
    }

    /// Keeps all rows on disk until the guard is dropped; waits for a removal that is under way.
    pub(crate) fn hold_removals(&self) -> Hold {
        let mut queue = self.shared.queue.lock();
        queue.holds += 1;
        while queue.is_removing {
            self.shared.room.wait(&mut queue);
        }
        drop(queue);
        Hold { shared: self.shared.clone() }
    }

    /// Bytes that the files of the database take on disk; 0 for one in memory.
    pub(crate) fn disk_bytes(&self) -> u64 {
        let dir = self.shared.generation_dir.lock().clone();
        dir.map_or(0, |dir| crate::disk::used_bytes(&dir))
    }

    /// Whether the file system is so full that clients should stop writing: less than 256 MiB is free,
    /// or less than 2 % and 1 GiB.
    pub(crate) fn disk_low(&self) -> bool {
        let dir = self.shared.generation_dir.lock().clone();
        dir.is_some_and(|dir| crate::disk::is_low(&dir))
    }

    /// Rewrites the database into new files if that frees a good part of it, and says whether it
    /// did. Blocking; reads and writes wait meanwhile.
    ///
    /// # Errors
    /// The persister was shut down.
    pub(crate) fn defragment(&self) -> Result<bool, Fatal> {
        let (answer, wait) = sync_channel(1);
        let mut queue = self.shared.queue.lock();
        if queue.is_closed() {
            return Err(stopped());
        }
        queue.rewrites.push(answer);
        self.shared.work.notify_one();
        drop(queue);
        wait.recv().unwrap_or_else(|_| Err(stopped()))
    }

    /// Durations of the checkpoints since the last call.
    pub(crate) fn take_checkpoints(&self) -> Vec<Duration> {
        self.shared.checkpoints.lock().samples.drain(..).collect()
    }

    /// Hands over to a persister that stands at `applied` and has carried out the compaction
    /// `finished`. Nothing is written or announced from here on; what was pushed stays readable until
    /// the last user lets go, and then the files are removed.
    pub(crate) fn retire(&self, applied: LogId, finished: i64) {
        let mut queue = self.shared.queue.lock();
        queue.is_retired = true;
        queue.deltas.clear();
        queue.slices.clear();
        queue.cuts.clear();
        queue.rewrites.clear();
        self.shared.signals.durable_applied.send_replace(applied);
        self.shared.signals.finished_compaction.send_replace(finished);
        self.shared.work.notify_all();
        self.shared.room.notify_all();
    }

    /// What this persister announces.
    pub(crate) fn signals(&self) -> Arc<Signals> {
        self.shared.signals.clone()
    }

    /// Writes what is queued and durable in the log, makes a last checkpoint and ends the threads.
    /// A second call does nothing.
    pub(crate) fn shutdown(&self) {
        let mut queue = self.shared.queue.lock();
        queue.is_stopping = true;
        self.shared.work.notify_all();
        self.shared.room.notify_all();
        drop(queue);
        for thread in self.threads.lock().drain(..) {
            // A panic of these threads has already ended the process.
            let _ = thread.join();
        }
    }
}

impl Drop for Persister {
    fn drop(&mut self) {
        self.shutdown();
        let dir = self.shared.generation_dir.lock().clone();
        if let (Some(dir), true) = (dir, self.shared.queue.lock().is_retired)
            && let Err(error) = std::fs::remove_dir_all(&dir)
        {
            // The next start tries again.
            tracing::warn!(path = %dir.display(), %error, "cannot remove the replaced state");
        }
    }
}

impl Queue {
    /// Nothing may enter any more.
    fn is_closed(&self) -> bool {
        self.is_stopping || self.is_retired
    }
}

/// Where a database stands when its persister starts.
pub(crate) struct Start {
    pub(crate) applied: LogId,
    /// The store revision.
    pub(crate) revision: i64,
    pub(crate) tally: Tally,
    pub(crate) chain: Chain,
    /// The compaction in force; -1 = never.
    pub(crate) scheduled: i64,
    pub(crate) signals: Arc<Signals>,
    pub(crate) generation_dir: Option<PathBuf>,
}

/// While it lives no row is removed from disk.
pub(crate) struct Hold {
    shared: Arc<Shared>,
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.shared.queue.lock().holds -= 1;
        self.shared.work.notify_one();
    }
}

/// Memory that a queued row stands for, its place in maps included.
fn row_cost(row: &Row) -> usize {
    row.kv.len() + 96
}

fn cost(delta: &Delta) -> usize {
    delta.bytes.max(delta.rows.iter().map(row_cost).sum()) + 64
}

fn stopped() -> Fatal {
    Fatal("the store was shut down".to_owned())
}

/// Two ordered lists as one, without repeats, cut at the limits.
fn merge(stored: Vec<Row>, queued: Vec<Row>, limit_rows: usize, limit_bytes: usize) -> Vec<Row> {
    if queued.is_empty() {
        return stored;
    }
    let mut merged = Vec::with_capacity(stored.len() + queued.len());
    let (mut stored, mut queued) = (stored.into_iter().peekable(), queued.into_iter().peekable());
    let mut bytes = 0;
    while merged.len() < limit_rows && (bytes < limit_bytes || merged.is_empty()) {
        let row = match (stored.peek(), queued.peek()) {
            (Some(left), Some(right)) if left.key == right.key => {
                queued.next();
                stored.next()
            }
            (Some(left), Some(right)) if left.key > right.key => queued.next(),
            (None, _) => queued.next(),
            (Some(_), _) => stored.next(),
        };
        let Some(row) = row else { break };
        bytes += row_cost(&row);
        merged.push(row);
    }
    merged
}

/// Ends the process: the state on disk can no longer be trusted to follow the log.
fn die(error: &dyn std::error::Error) -> ! {
    tracing::error!(%error, "the state storage failed; the process ends to protect the data");
    std::process::abort();
}

#[cfg(test)]
mod tests;
