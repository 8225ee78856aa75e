//! Snapshots as openraft sees them: a position that durable state has reached. State on disk is its
//! own snapshot, so building one copies nothing; it waits until a checkpoint has passed. Content is
//! not carried yet: installing one is refused until clusters of several members exist.

use std::io;

use kelson_storage::{LogId as Position, Reader};
use openraft::RaftSnapshotBuilder;

use crate::types::{Snapshot, SnapshotMeta, StoredMembership, TypeConfig, raft_log_id};

/// Stands for the state as of a position.
#[derive(Debug, Clone)]
pub(crate) struct SnapshotHandle {
    /// The last entry that the state contains.
    pub(crate) applied: Position,
}

pub(crate) fn at(applied: Position, membership: StoredMembership) -> Snapshot {
    Snapshot {
        meta: SnapshotMeta { last_log_id: raft_log_id(applied), last_membership: membership },
        snapshot: SnapshotHandle { applied },
    }
}

/// Waits until the state as of the builder's making is durable, then names it.
pub(crate) struct SnapshotBuilder {
    pub(crate) applied: Position,
    pub(crate) membership: StoredMembership,
    pub(crate) reader: Reader,
}

impl RaftSnapshotBuilder<TypeConfig> for SnapshotBuilder {
    type SnapshotData = SnapshotHandle;

    async fn build_snapshot(&mut self) -> io::Result<Snapshot> {
        let mut durable = self.reader.durable_applied();
        durable.wait_for(|durable| *durable >= self.applied).await.map_err(io::Error::other)?;
        Ok(at(self.applied, self.membership.clone()))
    }
}
