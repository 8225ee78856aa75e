//! The disk of one simulated member. Its log lies on a disk in memory that knows what is synced; the
//! threads of the log work at once, but each answer lands at a simulated time drawn from the seed, and
//! until then a cut may take back what it stands for. Its state lies in files, of which a cut leaves a
//! copy as of the last finished checkpoint.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use kelson_raft::{Landing, Simulated};
use kelson_storage::log::{Call, Crash, Disk, Done, Log, LogError, LogFile, SimDisk};
use parking_lot::{Condvar, Mutex};
use tokio::sync::mpsc;
use tokio::time::Instant;

use crate::rng::Rng;

/// What is planted in the disk, to see that it is found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Lies {
    /// Syncs do nothing and say that all is well.
    pub(super) no_sync: bool,
    /// An operation is answered before it is on the disk.
    pub(super) early: bool,
}

/// The log's part of it. Clones are the same disk.
#[derive(Clone)]
pub(super) struct LogDisk {
    inner: Arc<Inner>,
}

struct Inner {
    disk: SimDisk,
    lies: Lies,
    operations: Mutex<Operations>,
    /// An operation is on the disk.
    finished: Condvar,
}

#[derive(Default)]
struct Operations {
    asked: u64,
    /// The newest whose answer has landed.
    landed: u64,
    /// Results that wait to land.
    results: BTreeMap<u64, Result<(), LogError>>,
    on_disk: u64,
    /// After an operation was on the disk: its number, and the log's durable index.
    durable: Vec<(u64, u64)>,
    /// Longest time of an operation. Unit: milliseconds.
    slowness: u64,
}

struct Flight {
    number: u64,
    lands: Instant,
    done: Done,
}

impl LogDisk {
    pub(super) fn new(disk: SimDisk, lies: Lies) -> Self {
        let operations = Mutex::new(Operations { slowness: NORMAL, ..Operations::default() });
        let inner = Inner { disk, lies, operations, finished: Condvar::new() };
        Self { inner: Arc::new(inner) }
    }

    /// How long an operation may take from now on. Unit: milliseconds.
    pub(super) fn set_slowness(&self, slowness: Option<u64>) {
        self.inner.operations.lock().slowness = slowness.unwrap_or(NORMAL);
    }

    /// What a member is given for one life. Must be called on its runtime.
    pub(super) fn for_a_life(&self, mut rng: Rng) -> Simulated {
        let (flights, landing_flights) = mpsc::unbounded_channel();
        tokio::spawn(land(self.clone(), landing_flights));
        let (this, groups) = (self.clone(), Mutex::new(Groups::new()));
        let rng = Mutex::new(move |bound: u64| rng.below(bound));
        let landing: Landing = Arc::new(move |log: &Log, done: Done| {
            let (number, slowness) = this.ask(log);
            let takes = (rng.lock())(slowness * 1_000 + 1);
            let lands = groups.lock().lands(Instant::now(), Duration::from_micros(takes));
            // Without a receiver the member is gone, and nobody waits.
            let _ = flights.send(Flight { number, lands, done });
            let this = this.clone();
            Box::new(move |result| this.reach(number, result))
        });
        Simulated { disk: Arc::new(self.clone()), landing }
    }

    /// A new operation is asked for. The one before is on the disk when this returns: so each of them is
    /// written by itself, in whatever moment the threads work.
    fn ask(&self, log: &Log) -> (u64, u64) {
        let mut operations = self.inner.operations.lock();
        while operations.on_disk < operations.asked {
            self.inner.finished.wait(&mut operations);
        }
        let known = (operations.on_disk, log.durable().index());
        operations.durable.push(known);
        operations.asked += 1;
        let asked = (operations.asked, operations.slowness);
        drop(operations);
        log.settle();
        asked
    }

    /// An operation is on the disk.
    fn reach(&self, number: u64, result: Result<(), LogError>) {
        self.inner.disk.note(number);
        let mut operations = self.inner.operations.lock();
        operations.results.insert(number, result);
        operations.on_disk = number;
        self.inner.finished.notify_all();
    }

    fn result(&self, number: u64) -> Result<(), LogError> {
        let mut operations = self.inner.operations.lock();
        loop {
            if let Some(result) = operations.results.remove(&number) {
                operations.landed = number;
                return result;
            }
            self.inner.finished.wait(&mut operations);
        }
    }

    /// The disk that a cut leaves now. Of the operations that have not landed any number may be on it,
    /// but not fewer than the checkpoint of the state at `durable` waited for: state never passes the
    /// log on disk.
    pub(super) fn cut(&self, durable: u64, is_power: bool, rng: &mut Rng) -> SimDisk {
        let mut operations = self.inner.operations.lock();
        while operations.on_disk < operations.asked {
            self.inner.finished.wait(&mut operations);
        }
        let waited_for = operations.durable.iter().rev().find(|(_, index)| *index < durable);
        let waited_for = waited_for.map_or(0, |(number, _)| number + 1).min(operations.asked);
        let promised = if self.inner.lies.early { 0 } else { operations.landed };
        let least = promised.max(waited_for);
        let kept = least + rng.below(operations.asked - least + 1);
        let calls = self.inner.disk.calls();
        let place = |number: u64| {
            let note = calls.iter().position(|call| *call == Call::Note(number));
            note.map_or(0, |at| at + 1)
        };
        // Somewhere within the next one.
        let (from, to) = (place(kept), if kept < operations.asked { place(kept + 1) } else { 0 });
        let (from, to) =
            if kept == operations.asked { (calls.len(), calls.len()) } else { (from, to) };
        let at = from + rng.below((to.saturating_sub(from)) as u64 + 1) as usize;
        let crash = match (is_power, rng.below(2)) {
            (false, _) => Crash::Kept,
            (true, 0) => Crash::Lost,
            (true, _) => Crash::Torn(rng.draw()),
        };
        self.inner.disk.cut(at, crash)
    }
}

/// When operations land: all that come during one sync share the next one.
struct Groups {
    /// The end of the sync under way.
    busy_until: Instant,
    /// The end of the one behind it, if anybody waits for that.
    next: Option<Instant>,
}

impl Groups {
    fn new() -> Self {
        Self { busy_until: Instant::now(), next: None }
    }

    fn lands(&mut self, now: Instant, takes: Duration) -> Instant {
        if now >= self.busy_until {
            self.busy_until = self.next.take().unwrap_or(self.busy_until);
        }
        if now >= self.busy_until {
            self.busy_until = now + takes;
            return self.busy_until;
        }
        *self.next.get_or_insert(self.busy_until + takes)
    }
}

/// Longest time of an operation of a good disk. Unit: milliseconds.
const NORMAL: u64 = 3;

/// Lets answers land, in order.
async fn land(disk: LogDisk, mut flights: mpsc::UnboundedReceiver<Flight>) {
    while let Some(Flight { number, lands, done }) = flights.recv().await {
        if !disk.inner.lies.early {
            tokio::time::sleep_until(lands).await;
        }
        done(disk.result(number));
    }
}

impl Disk for LogDisk {
    fn create_dir(&self, dir: &std::path::Path) -> std::io::Result<()> {
        self.inner.disk.create_dir(dir)
    }
    fn list(&self, dir: &std::path::Path) -> std::io::Result<Vec<String>> {
        self.inner.disk.list(dir)
    }
    fn create(&self, path: &std::path::Path) -> std::io::Result<Arc<dyn LogFile>> {
        Ok(self.file(self.inner.disk.create(path)?))
    }
    fn open(&self, path: &std::path::Path) -> std::io::Result<Arc<dyn LogFile>> {
        Ok(self.file(self.inner.disk.open(path)?))
    }
    fn rename(&self, from: &std::path::Path, to: &std::path::Path) -> std::io::Result<()> {
        self.inner.disk.rename(from, to)
    }
    fn remove(&self, path: &std::path::Path) -> std::io::Result<()> {
        self.inner.disk.remove(path)
    }
    fn sync_dir(&self, dir: &std::path::Path) -> std::io::Result<()> {
        self.inner.disk.sync_dir(dir)
    }
}

impl LogDisk {
    fn file(&self, file: Arc<dyn LogFile>) -> Arc<dyn LogFile> {
        if self.inner.lies.no_sync { Arc::new(Unsynced(file)) } else { file }
    }
}

/// A file whose syncs do nothing.
struct Unsynced(Arc<dyn LogFile>);

impl LogFile for Unsynced {
    fn size(&self) -> std::io::Result<u64> {
        self.0.size()
    }
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> std::io::Result<usize> {
        self.0.read_at(buffer, offset)
    }
    fn write_at(&self, bytes: &[u8], offset: u64) -> std::io::Result<usize> {
        self.0.write_at(bytes, offset)
    }
    fn sync_data(&self) -> std::io::Result<()> {
        Ok(())
    }
}
