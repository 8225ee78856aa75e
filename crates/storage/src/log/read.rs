//! Reading entries back: the tail from memory, older ones from their segment.
//!
//! It checks every record that comes from a file and never returns an entry that fails. It takes
//! the log's mutex only to find the place, not while it reads.

use bytes::Bytes;

use super::disk::read_all;
use super::memory::{FileRun, Source};
use super::record::{RecordType, decode, record_bytes};
use super::{Entry, Log, LogError};
use crate::types::LogId;

impl Log {
    /// Reads the entries of `from..to_exclusive` in order: at least one if there is any, and as many
    /// as fit into `max_bytes` of payload. Stops at the end of the log.
    ///
    /// Blocks on the disk for entries that are no longer in the tail.
    ///
    /// # Errors
    /// `Purged` below [`Log::first_index`]; `Corrupt` or `Io` if a file no longer holds what was
    /// written: then the process should end.
    pub fn read(
        &self,
        from: u64,
        to_exclusive: u64,
        max_bytes: usize,
    ) -> Result<Vec<Entry>, LogError> {
        let mut entries: Vec<Entry> = Vec::new();
        let mut bytes = 0;
        loop {
            let next = from + entries.len() as u64;
            let left = max_bytes.saturating_sub(bytes);
            if !entries.is_empty() && left == 0 {
                return Ok(entries);
            }
            let more = match self.run(next, to_exclusive, left) {
                Ok(more) => more,
                // A purge came in between; what was read before it is still right.
                Err(LogError::Purged { .. }) if !entries.is_empty() => return Ok(entries),
                Err(error) => return Err(error),
            };
            let first_bytes = more.first().map_or(0, |entry| entry.payload.len());
            if more.is_empty() || (!entries.is_empty() && first_bytes > left) {
                return Ok(entries);
            }
            bytes += more.iter().map(|entry| entry.payload.len()).sum::<usize>();
            entries.extend(more);
        }
    }

    /// One run of consecutive entries from one place.
    fn run(&self, from: u64, to: u64, max_bytes: usize) -> Result<Vec<Entry>, LogError> {
        let memory = self.0.shared.memory.lock();
        let purged = memory.purged;
        if from <= purged.index {
            return Err(LogError::Purged { index: from, purged });
        }
        let to = to.min(memory.last.index + 1);
        if from >= to {
            return Ok(Vec::new());
        }
        let source = memory.locate(from, to, max_bytes).expect("a live entry has a place");
        drop(memory);
        match source {
            Source::Tail(entries) => Ok(entries),
            Source::File(run) => read_run(&run).map_err(|error| self.judge(from, error)),
        }
    }

    /// A purge may have recycled the file while it was read: then the bytes were rightly bad.
    fn judge(&self, index: u64, error: LogError) -> LogError {
        let purged = self.purged();
        if index <= purged.index { LogError::Purged { index, purged } } else { error }
    }
}

fn read_run(run: &FileRun) -> Result<Vec<Entry>, LogError> {
    let (Some(first), Some(last)) = (run.slots.first(), run.slots.last()) else {
        return Ok(Vec::new());
    };
    let start = first.position as usize;
    let end = last.position as usize + record_bytes(last.payload_bytes as usize);
    let mut buffer = vec![0; end - start];
    read_all(run.file.as_ref(), &mut buffer, start as u64)
        .map_err(|error| LogError::io("read", &run.path, error))?;
    let buffer = Bytes::from(buffer);
    let mut entries = Vec::with_capacity(run.slots.len());
    for (index, slot) in (run.from..).zip(&run.slots) {
        let position = slot.position as usize;
        let id = LogId { term: slot.term, index };
        let record = decode(&buffer[position - start..], position, run.seed)
            .filter(|record| record.type_byte == RecordType::Entry as u8 && record.id == id);
        let Some(record) = record else {
            let reason = "a record that was valid before is not so any more";
            return Err(LogError::corrupt(&run.path, position, reason));
        };
        entries.push(Entry { id, kind: record.kind, payload: buffer.slice_ref(record.payload) });
    }
    Ok(entries)
}
