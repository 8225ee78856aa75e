//! openraft's log storage on top of `kelson_storage::log`: translates positions and payloads and
//! passes callbacks on. It never waits for the disk in `append` (that runs on the consensus task)
//! and keeps nothing but the vote. On the write path between consensus and the log's writer thread.

use std::collections::VecDeque;
use std::fmt::Debug;
use std::io;
use std::ops::{Bound, RangeBounds};
use std::sync::Arc;

use futures::Stream;
use kelson_storage::failpoint;
use kelson_storage::log::{self, Done, Log, LogError};
use kelson_storage::sabotage::{self, Variant};
use openraft::storage::{IOFlushed, LogState, RaftLogStorage};
use openraft::{OptionalSend, RaftLogReader};
use parking_lot::Mutex;
use tokio::sync::oneshot;

use crate::codec;
use crate::config::Landing;
use crate::progress::Progress;
use crate::types::{Entry, Payload, RaftLogId, TypeConfig, Vote, position, raft_log_id};

/// Bytes of entries read for one message to a peer or one step of applying.
const READ_BYTES: usize = 1024 * 1024;

/// Log and vote of this member. Clones share them.
#[derive(Clone)]
pub(crate) struct LogStore {
    log: Log,
    vote: Arc<Mutex<Option<Vote>>>,
    progress: Arc<Progress>,
    sizes: Arc<Mutex<LogSizes>>,
    /// In a simulation, when the disk answers.
    landing: Option<Landing>,
}

impl LogStore {
    pub(crate) fn new(
        log: Log,
        vote: Option<Vote>,
        progress: Arc<Progress>,
        landing: Option<Landing>,
    ) -> LogStore {
        let sizes = Arc::new(Mutex::new(LogSizes::default()));
        LogStore { log, vote: Arc::new(Mutex::new(vote)), progress, sizes, landing }
    }

    fn landed(&self, done: Done) -> Done {
        match &self.landing {
            Some(landing) => landing(&self.log, done),
            None => done,
        }
    }

    /// A step of the log that is answered once it is on disk.
    async fn settled(&self, start: impl FnOnce(Done)) -> io::Result<()> {
        let (sender, receiver) = oneshot::channel();
        // The receiver is gone only if consensus is; then nobody is left to tell.
        start(self.landed(Box::new(move |result| drop(sender.send(result)))));
        match receiver.await {
            Ok(result) => result.map_err(io::Error::other),
            Err(_) => Err(io::Error::other("the log was shut down before the write was done")),
        }
    }

    /// Where the log could be cut so that `bytes` of payload written by this process stay.
    pub(crate) fn index_keeping(&self, bytes: u64) -> u64 {
        self.sizes.lock().index_keeping(bytes)
    }

    fn read(&self, from: u64, to: u64, max_bytes: usize) -> io::Result<Vec<Entry>> {
        let entries = self.log.read(from, to, max_bytes).map_err(io::Error::other)?;
        entries.into_iter().map(|e| codec::decode_entry(e).map_err(io::Error::other)).collect()
    }

    /// The storage indexes of an openraft range, cut to what the log holds: `[from, to)`.
    fn held<R: RangeBounds<u64>>(&self, range: &R) -> (u64, u64) {
        let from = match range.start_bound() {
            Bound::Included(index) => index.saturating_add(1),
            Bound::Excluded(index) => index.saturating_add(2),
            Bound::Unbounded => 0,
        };
        let to = match range.end_bound() {
            Bound::Included(index) => index.saturating_add(2),
            Bound::Excluded(index) => index.saturating_add(1),
            Bound::Unbounded => u64::MAX,
        };
        let first = self.log.first_index();
        let end = self.log.last_id().index.saturating_add(1).max(first);
        (from.clamp(first, end), to.clamp(first, end))
    }
}

impl RaftLogReader<TypeConfig> for LogStore {
    async fn try_get_log_entries<R: RangeBounds<u64> + Clone + Debug + OptionalSend>(
        &mut self,
        range: R,
    ) -> io::Result<Vec<Entry>> {
        let (mut from, to) = self.held(&range);
        let mut entries = Vec::new();
        while from < to {
            let chunk = self.read(from, to, READ_BYTES)?;
            if chunk.is_empty() {
                return Err(io::Error::other(format!("log entry {from} is missing")));
            }
            from += chunk.len() as u64;
            entries.extend(chunk);
        }
        Ok(entries)
    }

    async fn read_vote(&mut self) -> io::Result<Option<Vote>> {
        Ok(*self.vote.lock())
    }

    async fn limited_get_log_entries(&mut self, start: u64, end: u64) -> io::Result<Vec<Entry>> {
        let (from, to) = self.held(&(start..end));
        if from < to { self.read(from, to, READ_BYTES) } else { Ok(Vec::new()) }
    }

    // Read as it is consumed: after a restart the range may be the whole log.
    async fn entries_stream<R>(&mut self, range: R) -> impl Stream<Item = io::Result<Entry>> + Send
    where
        R: RangeBounds<u64> + Clone + Debug + OptionalSend,
    {
        let (from, to) = self.held(&range);
        let store = self.clone();
        let first = (VecDeque::new(), from);
        futures::stream::try_unfold(first, move |(mut ready, mut next)| {
            let result = (|| {
                if ready.is_empty() && next < to {
                    ready = VecDeque::from(store.read(next, to, READ_BYTES)?);
                    if ready.is_empty() {
                        return Err(io::Error::other(format!("log entry {next} is missing")));
                    }
                    next += ready.len() as u64;
                }
                Ok(ready.pop_front().map(|entry| (entry, (ready, next))))
            })();
            std::future::ready(result)
        })
    }
}

impl RaftLogStorage<TypeConfig> for LogStore {
    type LogReader = LogStore;

    async fn get_log_state(&mut self) -> io::Result<LogState<TypeConfig>> {
        let purged = self.log.purged();
        let last = self.log.last_id().max(purged);
        Ok(LogState { last_purged_log_id: raft_log_id(purged), last_log_id: raft_log_id(last) })
    }

    async fn get_log_reader(&mut self) -> LogStore {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote) -> io::Result<()> {
        let is_first = self.vote.lock().replace(*vote).is_none();
        // A vote for someone else ends local reads before it can be sent.
        self.progress.set_vote(vote);
        if sabotage::is(Variant::VoteForgotten) && !is_first {
            return Ok(());
        }
        let bytes = codec::encode_vote(vote);
        self.settled(|done| self.log.save_vote(bytes, done)).await
    }

    // Not persisted: a restarted member learns the committed index by its own election. Kept here
    // because this is where consensus first says it.
    async fn save_committed(&mut self, committed: Option<RaftLogId>) -> io::Result<()> {
        if let Some(id) = committed {
            self.progress.set_committed(position(&id).index);
        }
        Ok(())
    }

    async fn append<I>(&mut self, entries: I, callback: IOFlushed<TypeConfig>) -> io::Result<()>
    where
        I: IntoIterator<Item = Entry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let mut encoded = Vec::new();
        let mut last = None;
        let mut bytes = 0;
        for entry in entries {
            if let Payload::Membership(membership, _) = &entry.payload {
                self.progress.set_membership(position(&entry.log_id).index, membership);
            }
            let entry: log::Entry = codec::encode_entry(&entry);
            bytes += entry.payload.len() as u64;
            last = Some(entry.id.index);
            encoded.push(entry);
        }
        if let Some(index) = last {
            self.progress.set_last(index);
            self.sizes.lock().add(index, bytes);
        }
        let done = move |result: Result<(), LogError>| {
            callback.io_completed(result.map_err(io::Error::other));
        };
        self.log.append(encoded, self.landed(Box::new(done)));
        Ok(())
    }

    async fn truncate_after(&mut self, last_log_id: Option<RaftLogId>) -> io::Result<()> {
        let index = last_log_id.map_or(0, |id| position(&id).index);
        self.progress.forget_membership(index);
        self.settled(|done| self.log.truncate_after(index, done)).await?;
        self.progress.set_last(index);
        Ok(())
    }

    async fn purge(&mut self, log_id: RaftLogId) -> io::Result<()> {
        let upto = position(&log_id);
        let is_replaced = upto.index > self.progress.last();
        self.settled(|done| self.log.purge(upto, done)).await?;
        if is_replaced {
            failpoint::hit("raftAfterWALRelease");
        }
        // After a snapshot the log is empty and begins behind it.
        self.progress.set_last(self.progress.last().max(upto.index));
        self.sizes.lock().forget(upto.index);
        Ok(())
    }
}

/// How many bytes lie behind which index, in marks of a megabyte or more.
#[derive(Default)]
struct LogSizes {
    /// (last index, bytes up to and including it since start); bounded by the purge policy, which
    /// keeps a few hundred megabytes at most.
    marks: VecDeque<(u64, u64)>,
    total: u64,
}

impl LogSizes {
    const MARK_BYTES: u64 = 1024 * 1024;

    fn add(&mut self, index: u64, bytes: u64) {
        self.total += bytes;
        match self.marks.back() {
            Some((_, marked)) if self.total - marked < Self::MARK_BYTES => {}
            _ => self.marks.push_back((index, self.total)),
        }
    }

    fn index_keeping(&self, bytes: u64) -> u64 {
        let Some(limit) = self.total.checked_sub(bytes) else { return 0 };
        let behind = self.marks.partition_point(|(_, marked)| *marked <= limit);
        behind.checked_sub(1).map_or(0, |i| self.marks[i].0)
    }

    fn forget(&mut self, index: u64) {
        while self.marks.front().is_some_and(|(marked, _)| *marked <= index) {
            self.marks.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_tell_where_to_cut() {
        let mut sizes = LogSizes::default();
        assert_eq!(sizes.index_keeping(0), 0);
        for index in 1..=10 {
            sizes.add(index, LogSizes::MARK_BYTES);
        }
        assert_eq!(sizes.index_keeping(0), 10);
        assert_eq!(sizes.index_keeping(3 * LogSizes::MARK_BYTES), 7);
        assert_eq!(sizes.index_keeping(100 * LogSizes::MARK_BYTES), 0);
        sizes.forget(7);
        assert_eq!(sizes.index_keeping(3 * LogSizes::MARK_BYTES), 0);
        assert_eq!(sizes.index_keeping(2 * LogSizes::MARK_BYTES), 8);
    }
}
