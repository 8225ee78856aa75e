//! openraft's own test suite for log stores, run on ours with real files. Its state machine is a
//! plain one in memory: the suite looks at how a member finds itself again from log and state, not
//! at what commands do.

use std::io;
use std::sync::Arc;

use futures::{Stream, StreamExt};
use kelson_storage::log::{Log, LogOptions};
use openraft::storage::{EntryResponder, IOFlushed, LogState, RaftLogStorage, RaftStateMachine};
use openraft::testing::log::{StoreBuilder, Suite};
use openraft::{RaftSnapshotBuilder, StorageError};
use tempfile::TempDir;

use crate::codec;
use crate::log_store::LogStore;
use crate::progress::Progress;
use crate::snapshot::{self, SnapshotHandle};
use crate::types::{
    Entry, Payload, RaftLogId, Snapshot, SnapshotMeta, StoredMembership, TypeConfig, Vote,
    position, raft_log_id,
};

#[derive(Clone, Default)]
struct MemoryState {
    applied: kelson_storage::LogId,
    membership: StoredMembership,
    snapshot: Option<SnapshotMeta>,
}

impl MemoryState {
    fn take_snapshot(&mut self) -> Snapshot {
        let taken = snapshot::at(self.applied, self.membership.clone());
        self.snapshot = Some(taken.meta.clone());
        taken
    }
}

struct Taken(SnapshotMeta);

fn with_content(meta: &SnapshotMeta) -> Snapshot {
    Snapshot { meta: meta.clone(), snapshot: SnapshotHandle::Own }
}

impl RaftSnapshotBuilder<TypeConfig> for Taken {
    type SnapshotData = SnapshotHandle;

    async fn build_snapshot(&mut self) -> io::Result<Snapshot> {
        Ok(with_content(&self.0))
    }
}

impl RaftStateMachine<TypeConfig> for MemoryState {
    type SnapshotData = SnapshotHandle;
    type SnapshotBuilder = Taken;

    async fn applied_state(&mut self) -> io::Result<(Option<RaftLogId>, StoredMembership)> {
        Ok((raft_log_id(self.applied), self.membership.clone()))
    }

    async fn apply<S>(&mut self, mut entries: S) -> io::Result<()>
    where
        S: Stream<Item = io::Result<EntryResponder<TypeConfig>>> + Unpin + Send,
    {
        while let Some(next) = entries.next().await {
            let (entry, _) = next?;
            self.applied = position(&entry.log_id);
            if let Some(membership) = openraft::entry::RaftEntry::get_membership(&entry) {
                self.membership = StoredMembership::new(Some(entry.log_id), membership);
            }
        }
        Ok(())
    }

    async fn get_snapshot_builder(&mut self) -> Taken {
        Taken(self.take_snapshot().meta)
    }

    async fn install_snapshot(
        &mut self,
        meta: &SnapshotMeta,
        _snapshot: SnapshotHandle,
    ) -> io::Result<()> {
        self.applied = meta.last_log_id.as_ref().map(position).unwrap_or_default();
        self.membership = meta.last_membership.clone();
        self.snapshot = Some(meta.clone());
        Ok(())
    }

    async fn get_current_snapshot(&mut self) -> io::Result<Option<Snapshot>> {
        Ok(self.snapshot.as_ref().map(with_content))
    }
}

/// The suite begins some logs in the middle and leaves holes, which our log refuses, as it should:
/// holes are filled with blank entries.
struct Filled(LogStore);

impl RaftLogStorage<TypeConfig> for Filled {
    type LogReader = LogStore;

    async fn get_log_state(&mut self) -> io::Result<LogState<TypeConfig>> {
        self.0.get_log_state().await
    }

    async fn get_log_reader(&mut self) -> LogStore {
        self.0.get_log_reader().await
    }

    async fn save_vote(&mut self, vote: &Vote) -> io::Result<()> {
        self.0.save_vote(vote).await
    }

    async fn append<I>(&mut self, entries: I, callback: IOFlushed<TypeConfig>) -> io::Result<()>
    where
        I: IntoIterator<Item = Entry> + Send,
        I::IntoIter: Send,
    {
        let last = self.0.get_log_state().await?.last_log_id;
        let mut next = last.map_or(0, |id| id.index + 1);
        let mut term = last.map_or(0, |id| id.leader_id.term);
        let mut filled = Vec::new();
        for entry in entries {
            for index in next..entry.log_id.index {
                let log_id = RaftLogId::new_term_index(term, index);
                filled.push(Entry { log_id, payload: Payload::Blank });
            }
            (next, term) = (entry.log_id.index + 1, entry.log_id.leader_id.term);
            filled.push(entry);
        }
        self.0.append(filled, callback).await
    }

    async fn truncate_after(&mut self, last_log_id: Option<RaftLogId>) -> io::Result<()> {
        self.0.truncate_after(last_log_id).await
    }

    async fn purge(&mut self, log_id: RaftLogId) -> io::Result<()> {
        self.0.purge(log_id).await
    }
}

struct Files;

/// Closes the log before its directory goes.
struct Open {
    log: Log,
    _dir: TempDir,
}

impl Drop for Open {
    fn drop(&mut self) {
        self.log.shutdown();
    }
}

impl StoreBuilder<TypeConfig, Filled, MemoryState, Open> for Files {
    async fn build(&self) -> Result<(Open, Filled, MemoryState), StorageError<TypeConfig>> {
        let dir = tempfile::tempdir().expect("make a directory");
        let options = LogOptions::new(dir.path().join("wal"), [7; 16]);
        let opened = Log::open(options).expect("open a new log");
        // As at the first start of a member; the suite is not told.
        let vote = codec::encode_vote(&Vote::new(0, 0));
        opened.log.save_vote(vote, Box::new(|saved| saved.expect("the first vote is saved")));
        let progress = Arc::new(Progress::new(0, 0, Default::default(), Default::default()));
        let store = LogStore::new(opened.log.clone(), None, progress, None);
        Ok((Open { log: opened.log, _dir: dir }, Filled(store), MemoryState::default()))
    }
}

#[tokio::test]
async fn log_store_passes_the_suite_of_openraft() {
    Suite::test_all(Files).await.expect("the suite passes");
}
