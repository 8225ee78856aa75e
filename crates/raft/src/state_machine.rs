//! openraft's state machine on top of `kelson_storage::Store`: decodes the commands of an entry
//! once, applies them, and hands each result to the caller that waits for it. It never waits for
//! the disk by itself and knows no clock. A failed write of state ends the process.

use std::io;
use std::sync::Arc;

use futures::{Stream, StreamExt};
use kelson_api::Message;
use kelson_api::command::{Batch, MembersChange, command::Op};
use kelson_api::etcdserverpb::Member;
use kelson_storage::{LogId as Position, Reader, Store, failpoint};
use openraft::storage::{EntryResponder, RaftStateMachine};
use parking_lot::Mutex;
use tokio::sync::watch;

use crate::background::blocking;
use crate::codec;
use crate::error::abort;
use crate::progress::Progress;
use crate::snapshot::{self, SnapshotBuilder, SnapshotHandle};
use crate::types::{
    Commands, Entry, Membership, Payload, RaftLogId, Snapshot, SnapshotMeta, StoredMembership,
    TypeConfig, position, raft_log_id,
};
use crate::waiters::Waiters;

/// The store, until shutdown takes it away for the final checkpoint.
pub(crate) type SharedStore = Arc<Mutex<Option<Store>>>;

/// Applies entries to the store.
pub(crate) struct StateMachine {
    store: SharedStore,
    reader: Reader,
    waiters: Arc<Waiters>,
    progress: Arc<Progress>,
    removed: watch::Sender<bool>,
    member_id: u64,
    is_simulated: bool,
}

impl StateMachine {
    pub(crate) fn new(
        store: SharedStore,
        reader: Reader,
        waiters: Arc<Waiters>,
        progress: Arc<Progress>,
        removed: watch::Sender<bool>,
        member_id: u64,
        is_simulated: bool,
    ) -> StateMachine {
        StateMachine { store, reader, waiters, progress, removed, member_id, is_simulated }
    }

    fn state(&self) -> io::Result<(Position, StoredMembership)> {
        let store = self.store.lock();
        let store = store.as_ref().ok_or_else(stopped)?;
        let membership = match store.membership() {
            None => StoredMembership::default(),
            Some((id, bytes)) => {
                let membership = codec::decode_membership(bytes).map_err(io::Error::other)?;
                StoredMembership::new(raft_log_id(id), membership)
            }
        };
        Ok((store.applied(), membership))
    }

    fn apply_entry(&mut self, entry: Entry) -> io::Result<()> {
        let id = position(&entry.log_id);
        let mut store = self.store.lock();
        let store = store.as_mut().ok_or_else(stopped)?;
        match entry.payload {
            Payload::Blank => {
                store.apply(id, &[]).unwrap_or_else(|e| abort("apply a blank entry", &e));
            }
            Payload::Commands(commands) => {
                let batch = Batch::decode(commands.0).map_err(io::Error::other)?;
                let outcomes = store
                    .apply(id, &batch.commands)
                    .unwrap_or_else(|e| abort("apply a log entry", &e));
                // The position moves before the callers are told, so that whoever has an answer
                // sees an applied index that covers it.
                self.progress.set_applied(id);
                let results = batch.commands.iter().zip(outcomes);
                let ours = results.filter(|(command, _)| command.origin == self.member_id);
                self.waiters.complete(ours.map(|(command, outcome)| (command.request_id, outcome)));
                return Ok(());
            }
            Payload::Membership(membership, change) => {
                failpoint::hit("beforeApplyOneConfChange");
                let change = members_change(&membership, change, store.membership().is_none())?;
                store
                    .apply_membership(id, codec::encode_membership(&membership), change.as_ref())
                    .unwrap_or_else(|e| abort("apply a membership", &e));
                if change.is_some_and(|change| change.remove.contains(&self.member_id)) {
                    self.removed.send_replace(true);
                }
            }
        }
        self.progress.set_applied(id);
        Ok(())
    }
}

/// The change of the members table that goes with a membership entry. The bootstrap entry is made
/// by openraft and carries none: its nodes say who the first members are.
fn members_change(
    membership: &Membership,
    change: Commands,
    first: bool,
) -> io::Result<Option<MembersChange>> {
    if !change.0.is_empty() {
        let batch = Batch::decode(change.0).map_err(io::Error::other)?;
        return match batch.commands.into_iter().next().and_then(|command| command.op) {
            Some(Op::MembersChange(change)) => Ok(Some(change)),
            _ => Err(io::Error::other("a membership entry carries something else than members")),
        };
    }
    if !first {
        return Ok(None);
    }
    let voters: Vec<u64> = membership.voter_ids().collect();
    let put = membership.nodes().map(|(id, peer)| Member {
        id: *id,
        name: peer.name.clone(),
        peer_ur_ls: peer.peer_urls.clone(),
        client_ur_ls: Vec::new(),
        is_learner: !voters.contains(id),
    });
    Ok(Some(MembersChange { put: put.collect(), remove: Vec::new() }))
}

fn stopped() -> io::Error {
    io::Error::other("the store is shut down")
}

/// Ends the process when `apply` panics: a half-applied entry must not be built upon.
struct AbortOnPanic;

impl Drop for AbortOnPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            abort("apply log entries", &"the state machine panicked");
        }
    }
}

impl RaftStateMachine<TypeConfig> for StateMachine {
    type SnapshotData = SnapshotHandle;
    type SnapshotBuilder = SnapshotBuilder;

    async fn applied_state(&mut self) -> io::Result<(Option<RaftLogId>, StoredMembership)> {
        let (applied, membership) = self.state()?;
        Ok((raft_log_id(applied), membership))
    }

    async fn apply<S>(&mut self, mut entries: S) -> io::Result<()>
    where
        S: Stream<Item = io::Result<EntryResponder<TypeConfig>>> + Unpin + Send,
    {
        let _guard = AbortOnPanic;
        while let Some(next) = entries.next().await {
            let (entry, responder) = next?;
            self.apply_entry(entry)?;
            if let Some(responder) = responder {
                responder.send(());
            }
            // A long replay must not keep a runtime thread to itself.
            tokio::task::consume_budget().await;
        }
        Ok(())
    }

    async fn get_snapshot_builder(&mut self) -> SnapshotBuilder {
        let (applied, membership) = self.state().unwrap_or_default();
        SnapshotBuilder { applied, membership, reader: self.reader.clone() }
    }

    async fn install_snapshot(
        &mut self,
        _meta: &SnapshotMeta,
        snapshot: SnapshotHandle,
    ) -> io::Result<()> {
        let SnapshotHandle::Received(received) = snapshot else {
            return Err(io::Error::other("the own state cannot be installed"));
        };
        let applied = received.applied();
        let store = self.store.clone();
        let installing = blocking(self.is_simulated, move || {
            let mut store = store.lock();
            let store = store.as_mut().ok_or_else(stopped)?;
            store.install(*received).unwrap_or_else(|e| abort("install a snapshot", &e));
            Ok::<(), io::Error>(())
        });
        installing.await.unwrap_or_else(|e| abort("install a snapshot", &e))?;
        self.progress.forget_membership(0);
        self.progress.set_applied(applied);
        if self.reader.removed_members().contains(&self.member_id) {
            self.removed.send_replace(true);
        }
        Ok(())
    }

    async fn get_current_snapshot(&mut self) -> io::Result<Option<Snapshot>> {
        let (applied, membership) = self.state()?;
        Ok((applied.index > 0).then(|| snapshot::at(applied, membership)))
    }
}

/// Bytes of a batch, for tests of what consensus carries.
#[cfg(test)]
fn batch_bytes(commands: Vec<kelson_api::command::Command>) -> bytes::Bytes {
    Batch { commands }.encode_to_vec().into()
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use kelson_api::command::Command;

    use super::*;
    use crate::types::Peer;

    fn membership() -> Membership {
        let peer = |name: &str| Peer { name: name.into(), peer_urls: vec!["http://h:1".into()] };
        let nodes = BTreeMap::from([(1, peer("one")), (2, peer("two"))]);
        Membership::new(vec![BTreeSet::from([1])], nodes).expect("the voter has a node")
    }

    #[test]
    fn bootstrap_members_come_from_the_nodes() {
        let change = members_change(&membership(), Commands::default(), true)
            .expect("nothing to decode")
            .expect("the first membership has members");
        let rows: Vec<_> = change.put.iter().map(|m| (m.id, &m.name[..], m.is_learner)).collect();
        assert_eq!(rows, [(1, "one", false), (2, "two", true)]);
        let later = members_change(&membership(), Commands::default(), false);
        assert_eq!(later.expect("nothing to decode"), None);
    }

    #[test]
    fn own_change_wins_and_strangers_are_refused() {
        let change = MembersChange { put: Vec::new(), remove: vec![9] };
        let op = Some(Op::MembersChange(change.clone()));
        let bytes = batch_bytes(vec![Command { op, ..Command::default() }]);
        let decoded = members_change(&membership(), Commands(bytes), true);
        assert_eq!(decoded.expect("well formed"), Some(change));
        let bytes = batch_bytes(vec![Command::default()]);
        assert!(members_change(&membership(), Commands(bytes), true).is_err());
    }
}
