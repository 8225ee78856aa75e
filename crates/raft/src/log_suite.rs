//! openraft's own test suite for log stores, run on ours with real files. Its state machine is a
//! plain one in memory: the suite looks at how a member finds itself again from log and state, not
//! at what commands do.

use std::io;
use std::sync::Arc;

use futures::{Stream, StreamExt};
use kelson_storage::log::{Log, LogOptions};
use openraft::storage::{EntryResponder, RaftStateMachine};
use openraft::testing::log::{StoreBuilder, Suite};
use openraft::{RaftSnapshotBuilder, StorageError};
use tempfile::TempDir;

use crate::log_store::LogStore;
use crate::progress::Progress;
use crate::snapshot::{self, SnapshotHandle};
use crate::types::{
    RaftLogId, Snapshot, SnapshotMeta, StoredMembership, TypeConfig, position, raft_log_id,
};

#[derive(Clone, Default)]
struct MemoryState {
    applied: kelson_storage::LogId,
    membership: StoredMembership,
    snapshot: Option<Snapshot>,
}

impl MemoryState {
    fn take_snapshot(&mut self) -> Snapshot {
        let taken = snapshot::at(self.applied, self.membership.clone());
        self.snapshot = Some(taken.clone());
        taken
    }
}

struct Taken(Snapshot);

impl RaftSnapshotBuilder<TypeConfig> for Taken {
    type SnapshotData = SnapshotHandle;

    async fn build_snapshot(&mut self) -> io::Result<Snapshot> {
        Ok(self.0.clone())
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
        Taken(self.take_snapshot())
    }

    async fn install_snapshot(
        &mut self,
        meta: &SnapshotMeta,
        snapshot: SnapshotHandle,
    ) -> io::Result<()> {
        self.applied = meta.last_log_id.as_ref().map(position).unwrap_or_default();
        self.membership = meta.last_membership.clone();
        self.snapshot = Some(Snapshot { meta: meta.clone(), snapshot });
        Ok(())
    }

    async fn get_current_snapshot(&mut self) -> io::Result<Option<Snapshot>> {
        Ok(self.snapshot.clone())
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

impl StoreBuilder<TypeConfig, LogStore, MemoryState, Open> for Files {
    async fn build(&self) -> Result<(Open, LogStore, MemoryState), StorageError<TypeConfig>> {
        let dir = tempfile::tempdir().expect("make a directory");
        let options = LogOptions::new(dir.path().join("wal"), [7; 16]);
        let opened = Log::open(options).expect("open a new log");
        let progress = Arc::new(Progress::new(0, Default::default(), Default::default()));
        let store = LogStore::new(opened.log.clone(), None, progress);
        Ok((Open { log: opened.log, _dir: dir }, store, MemoryState::default()))
    }
}

#[tokio::test]
async fn log_store_passes_the_suite_of_openraft() {
    Suite::test_all(Files).await.expect("the suite passes");
}
