//! The writer thread: the only place that writes and syncs the log while it is open.
//!
//! It drains what has arrived, encodes it into one buffer, writes once, syncs once, publishes the
//! durable index and calls back in order. A failed write or sync ends the process: after a failed
//! fdatasync nobody knows what is on the disk, and asking again may well answer Ok. It never reads.

use std::collections::VecDeque;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use bytes::Bytes;

use crate::failpoint;
use crate::sabotage::{self, Variant};
use crate::types::LogId;

use super::disk::{LogFile, write_all};
use super::memory::Place;
use super::record::{RECORD_HEADER, RecordType, encode, record_bytes};
use super::segment::{Header, SEGMENT_HEADER, Segment, Slot, UNFINISHED_NAME, segment_path};
use super::spare::{Spare, fill};
use super::{Done, Entry, LogError, LogOptions, Shared};

/// One write takes no more than this, plus one record. Larger batches gain nothing, and a torn one
/// loses more.
const BATCH_BYTES_MAX: usize = 4 << 20;

/// The first write to a segment is padded to a whole block.
pub(super) const HEAD_BYTES: usize = 4096;

/// Largest vote; header, vote and purge mark must fit into the first block of a segment.
pub(super) const VOTE_BYTES_MAX: usize = 1024;
const _: () = assert!(SEGMENT_HEADER + 3 * RECORD_HEADER + VOTE_BYTES_MAX <= HEAD_BYTES);

/// What callers ask of the writer. Bounded by the callers, who wait for their answers.
pub(super) enum Operation {
    Append { entries: Vec<Entry>, operation: u64, done: Done },
    Vote { vote: Bytes, done: Done },
    TruncateAfter { index: u64, last: LogId, operation: u64, done: Done },
    Purge { upto: LogId, done: Done },
    Shutdown,
}

/// The segment that is being written.
pub(super) struct Active {
    pub(super) file: Arc<dyn LogFile>,
    pub(super) header: Header,
    /// Where the next write goes.
    pub(super) position: u64,
    /// The newest record says that the segment was left in good order.
    pub(super) ends_with_close: bool,
}

pub(super) struct Writer {
    shared: Arc<Shared>,
    receiver: Receiver<Operation>,
    /// Operations that votes have overtaken while the disk was full.
    deferred: VecDeque<Operation>,
    active: Active,
    vote: Option<Bytes>,
    purged: LogId,
    last: LogId,
    committed: LogId,
    /// Number of the newest append or truncation that was encoded completely.
    operation: u64,
    buffer: Vec<u8>,
    records: u64,
    places: Vec<Place>,
    done: Vec<Done>,
    purge_pending: bool,
    closing: bool,
}

impl Writer {
    pub(super) fn new(
        shared: Arc<Shared>,
        receiver: Receiver<Operation>,
        active: Active,
        vote: Option<Bytes>,
        (purged, last): (LogId, LogId),
    ) -> Writer {
        Writer {
            shared,
            receiver,
            deferred: VecDeque::new(),
            active,
            vote,
            purged,
            last,
            committed: LogId::default(),
            operation: 0,
            buffer: Vec::new(),
            records: 0,
            places: Vec::new(),
            done: Vec::new(),
            purge_pending: false,
            closing: false,
        }
    }

    /// Body of the writer thread.
    pub(super) fn run(mut self) {
        // A panic here (or in a callback) would leave a log that accepts and never answers.
        let _guard = AbortOnPanic;
        while !self.closing {
            let next = self.deferred.pop_front().or_else(|| self.receiver.recv().ok());
            let Some(next) = next else { break };
            self.take(next);
            while !self.closing && self.buffer.len() < BATCH_BYTES_MAX {
                let next = self.deferred.pop_front().or_else(|| self.receiver.try_recv().ok());
                let Some(next) = next else { break };
                self.take(next);
            }
            self.commit();
        }
        self.finish();
    }

    fn take(&mut self, operation: Operation) {
        match operation {
            Operation::Append { entries, operation, done } => {
                match self.take_entries(&entries) {
                    Ok(()) => self.done.push(done),
                    Err(error) => return done(Err(error)),
                }
                self.operation = operation;
            }
            Operation::TruncateAfter { index, last, operation, done } => {
                let id = LogId { term: 0, index };
                if let Err(error) = self.take_small(RecordType::TruncateAfter, id, &[]) {
                    return done(Err(error));
                }
                self.places.push(Place::TruncateAfter(index));
                self.last = last;
                self.operation = operation;
                self.done.push(done);
            }
            Operation::Vote { vote, done } => {
                match self.take_small(RecordType::Vote, LogId::default(), &vote) {
                    Ok(()) => self.note_vote(vote, done),
                    Err(error) => done(Err(error)),
                }
            }
            Operation::Purge { upto, done } => {
                match self.take_small(RecordType::Purge, upto, &[]) {
                    Ok(()) => self.note_purge(upto, done),
                    Err(error) => done(Err(error)),
                }
            }
            Operation::Shutdown => self.closing = true,
        }
    }

    fn take_entries(&mut self, entries: &[Entry]) -> Result<(), LogError> {
        for entry in entries {
            if self.buffer.len() >= BATCH_BYTES_MAX {
                self.commit();
            }
            if !self.fits(entry.payload.len(), true) {
                self.roll()?;
            }
            let position = self.active.position + self.buffer.len() as u64;
            self.encode((RecordType::Entry, entry.kind), entry.id, &entry.payload);
            let slot = Slot {
                position: u32::try_from(position).expect("segments are at most 1 GiB"),
                payload_bytes: u32::try_from(entry.payload.len()).expect("it fits in a segment"),
                term: entry.id.term,
            };
            self.places.push(Place::Entry(entry.id.index, slot));
            self.last = entry.id;
        }
        Ok(())
    }

    fn take_small(&mut self, kind: RecordType, id: LogId, body: &[u8]) -> Result<(), LogError> {
        if !self.fits(body.len(), false) {
            self.roll()?;
        }
        self.encode((kind, 0), id, body);
        Ok(())
    }

    fn note_vote(&mut self, vote: Bytes, done: Done) {
        self.vote = Some(vote);
        self.done.push(done);
    }

    fn note_purge(&mut self, upto: LogId, done: Done) {
        if upto.index > self.purged.index {
            self.purged = upto;
        }
        if upto.index > self.last.index {
            self.places.push(Place::Reset);
        }
        if upto.index >= self.last.index {
            self.last = upto;
        }
        self.purge_pending = true;
        self.done.push(done);
    }

    fn encode(&mut self, kind: (RecordType, u8), id: LogId, payload: &[u8]) {
        let batch = u32::try_from(self.active.position).expect("segments are at most 1 GiB");
        encode(&mut self.buffer, self.active.header.seed(), batch, kind, id, payload);
        self.records += 1;
    }

    /// Whether a record fits behind what is buffered. Entries leave a reserve, so that votes can
    /// still be written when the disk is full; everything leaves room for the closing record.
    fn fits(&self, payload: usize, entry: bool) -> bool {
        let kept = if entry {
            self.shared.options.reserve_bytes() + RECORD_HEADER as u64
        } else {
            RECORD_HEADER as u64
        };
        let end = self.active.position + (self.buffer.len() + record_bytes(payload)) as u64;
        end + kept <= self.active.header.bytes
    }

    /// Writes and syncs what is buffered, publishes it and calls back.
    fn commit(&mut self) {
        if !self.buffer.is_empty() {
            self.note_committed();
            self.write_buffer();
        }
        let mut memory = self.shared.memory.lock();
        memory.written(self.operation, &self.places);
        // Under the lock: a truncation that has come meanwhile must not be overtaken.
        self.shared.publisher.publish(memory.durable_index(self.last.index));
        let retired = if self.purge_pending { memory.retire() } else { Vec::new() };
        drop(memory);
        self.purge_pending = false;
        self.places.clear();
        self.shared.spares.retire(retired);
        for done in self.done.drain(..) {
            done(Ok(()));
        }
    }

    fn write_buffer(&mut self) {
        let file = self.active.file.as_ref();
        let path = segment_path(&self.shared.options.dir, self.active.header.sequence);
        failpoint::hit_in_save("raftBeforeSave");
        let begun = Instant::now();
        or_abort("write", &path, seen(write_all(file, &self.buffer, self.active.position)));
        self.shared.counters.writes.0.add(begun.elapsed());
        if self.shared.options.fsync && !sabotage::is(Variant::SkipFsync) {
            let begun = Instant::now();
            or_abort("fdatasync", &path, seen(file.sync_data()));
            self.shared.counters.fsync(begun.elapsed());
        }
        failpoint::hit_in_save("raftAfterSave");
        self.shared.counters.wrote(self.records, self.buffer.len());
        self.active.position += self.buffer.len() as u64;
        self.active.ends_with_close = false;
        self.records = 0;
        self.buffer.clear();
        // A rare huge entry must not keep its memory for ever.
        self.buffer.shrink_to(2 * BATCH_BYTES_MAX);
    }

    /// Adds the committed hint to a write that is due anyway.
    fn note_committed(&mut self) {
        let committed = self.shared.memory.lock().committed;
        if committed > self.committed && committed <= self.last && self.fits(0, true) {
            self.encode((RecordType::Committed, 0), committed, &[]);
            self.committed = committed;
        }
    }

    /// Leaves the segment in good order and begins the next one.
    fn roll(&mut self) -> Result<(), LogError> {
        let spare = match self.shared.spares.take(Duration::ZERO) {
            Some(spare) => spare,
            None => {
                self.commit();
                self.wait_for_spare()?
            }
        };
        self.close_segment();
        self.commit();
        let sequence = self.active.header.sequence + 1;
        let (dir, disk) = (&self.shared.options.dir, self.shared.disk.as_ref());
        let path = segment_path(dir, sequence);
        let header = Header {
            sequence,
            first_index: self.last.index + 1,
            identity: self.shared.options.identity,
            bytes: self.shared.options.segment_bytes,
        };
        let (head, position) = head(&header, self.vote.as_deref(), self.purged);
        or_abort("begin", &path, write_all(spare.file.as_ref(), &head, 0));
        // Durable before it gets its name: a segment with a bad header is always damage.
        or_abort("fdatasync", &path, spare.file.sync_data());
        or_abort("rename", &path, disk.rename(&spare.path, &path));
        or_abort("sync the directory of", &path, disk.sync_dir(dir));
        let segment = Segment::new(path, Arc::clone(&spare.file), &header);
        self.shared.memory.lock().segments.push_back(segment);
        self.shared.counters.segment();
        self.shared.spares.renamed();
        self.active = Active { file: spare.file, header, position, ends_with_close: false };
        Ok(())
    }

    /// Buffers the closing record unless it stands there already.
    fn close_segment(&mut self) {
        if !self.buffer.is_empty() || !self.active.ends_with_close {
            self.encode((RecordType::Close, 0), LogId::default(), &[]);
        }
    }

    /// Waits until the disk has room again. Votes go on being written meanwhile, into the reserve:
    /// a member with a full disk must not stop an election. Purges too, for they make room.
    fn wait_for_spare(&mut self) -> Result<Spare, LogError> {
        loop {
            if let Some(spare) = self.shared.spares.take(Duration::from_millis(50)) {
                return Ok(spare);
            }
            while let Ok(operation) = self.receiver.try_recv() {
                self.take_urgent(operation);
            }
            self.commit();
            if self.closing {
                return Err(LogError::Closed);
            }
        }
    }

    fn take_urgent(&mut self, operation: Operation) {
        let vote_waits = self.deferred.iter().any(|it| matches!(it, Operation::Vote { .. }));
        match operation {
            Operation::Vote { vote, done } if !vote_waits && self.fits(vote.len(), false) => {
                self.encode((RecordType::Vote, 0), LogId::default(), &vote);
                self.note_vote(vote, done);
            }
            Operation::Purge { upto, done }
                if upto.index <= self.last.index && self.fits(0, false) =>
            {
                self.encode((RecordType::Purge, 0), upto, &[]);
                self.note_purge(upto, done);
            }
            Operation::Shutdown => self.closing = true,
            other => self.deferred.push_back(other),
        }
    }

    /// Ends the log: a closing record, then refusals for whatever is still queued.
    fn finish(mut self) {
        self.shared.memory.lock().closed = true;
        self.close_segment();
        if !self.buffer.is_empty() {
            self.write_buffer();
        }
        self.shared.publisher.close();
        let left = self.deferred.drain(..).chain(self.receiver.try_iter());
        for operation in left {
            match operation {
                Operation::Append { done, .. }
                | Operation::Vote { done, .. }
                | Operation::TruncateAfter { done, .. }
                | Operation::Purge { done, .. } => done(Err(LogError::Closed)),
                Operation::Shutdown => {}
            }
        }
    }
}

/// The first block of a segment, and where the first further record goes.
fn head(header: &Header, vote: Option<&[u8]>, purged: LogId) -> (Vec<u8>, u64) {
    let mut head = Vec::with_capacity(HEAD_BYTES);
    head.extend_from_slice(&header.encode());
    let batch = SEGMENT_HEADER as u32;
    if let Some(vote) = vote {
        let kind = (RecordType::Vote, 0);
        encode(&mut head, header.seed(), batch, kind, LogId::default(), vote);
    }
    if purged.index > 0 {
        encode(&mut head, header.seed(), batch, (RecordType::Purge, 0), purged, &[]);
    }
    let position = head.len() as u64;
    // The padding wipes what an interrupted begin of the same segment may have left here.
    head.resize(HEAD_BYTES, 0);
    (head, position)
}

/// Makes the very first segment of a log; smaller than the others, so that a start is quick.
pub(super) fn create_first(shared: &LogOptions, disk: &dyn super::Disk) -> io::Result<Active> {
    let header = Header {
        sequence: 1,
        first_index: 1,
        identity: shared.identity,
        bytes: shared.first_segment_bytes(),
    };
    let unfinished = shared.dir.join(UNFINISHED_NAME);
    let file = fill(disk, &unfinished, header.bytes)?;
    let (head, position) = head(&header, None, LogId::default());
    write_all(file.as_ref(), &head, 0)?;
    file.sync_data()?;
    disk.rename(&unfinished, &segment_path(&shared.dir, header.sequence))?;
    disk.sync_dir(&shared.dir)?;
    Ok(Active { file, header, position, ends_with_close: false })
}

/// Ends the process if the log cannot be written: nothing may be acknowledged after that.
fn or_abort<T>(action: &str, path: &Path, result: io::Result<T>) -> T {
    match result {
        Ok(value) => value,
        Err(error) => {
            tracing::error!(%error, file = %path.display(), "{action} a log segment");
            eprintln!("kelson: cannot {action} log segment {}: {error}", path.display());
            std::process::abort();
        }
    }
}

/// The result as it is, unless sabotage overlooks failures.
fn seen(result: io::Result<()>) -> io::Result<()> {
    if sabotage::is(Variant::WriteErrorSwallowed) { Ok(()) } else { result }
}

struct AbortOnPanic;

impl Drop for AbortOnPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("kelson: the log writer panicked");
            std::process::abort();
        }
    }
}
