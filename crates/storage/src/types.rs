//! The words this crate shares with its callers and between its rooms: positions, outcomes, rows and
//! deltas. It holds data only; it never decides anything and does no I/O.

use std::sync::Arc;

use bytes::Bytes;
use kelson_api::Error;
use kelson_api::authpb::{Role, User};
use kelson_api::etcdserverpb::{
    AlarmMember, AlarmResponse, DeleteRangeResponse, LeaseGrantResponse, Member, PutResponse,
    TxnResponse,
};
use kelson_api::mvccpb::KeyValue;
use kelson_api::mvccpb::event::EventType;
use tokio::sync::watch;

use crate::chain::Chain;

/// Position in the raft log, ordered by term, then index. `(0, 0)` is before the first entry.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default, Hash)]
pub struct LogId {
    /// Term of the leader that made the entry.
    pub term: u64,
    /// Place in the log, from 1.
    pub index: u64,
}

/// Position of one change: the store revision and the place within it, from 0.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default, Hash)]
pub struct RevisionKey {
    /// Store revision of the change.
    pub main: i64,
    /// Order of execution within the revision.
    pub sub: i64,
}

/// What one command did.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Store revision after the command.
    pub revision: i64,
    /// The answer, or the error that a client sees; an error means that nothing changed.
    pub result: Result<Reply, Error>,
}

/// The answer to one command. Response messages carry no header of their own, except that operations
/// inside a `TxnResponse` carry one with only `revision`, and nested ones an empty one.
#[derive(Clone, Debug)]
pub enum Reply {
    /// Answer to a put.
    Put(PutResponse),
    /// Answer to a delete.
    DeleteRange(DeleteRangeResponse),
    /// Answer to a transaction.
    Txn(TxnResponse),
    /// The compaction is in force for readers; the ticket is there if `physical` was asked for.
    Compact(Option<CompactionTicket>),
    /// Answer to a grant: id and TTL.
    LeaseGrant(LeaseGrantResponse),
    /// The lease and its keys are gone.
    LeaseRevoke,
    /// Remaining times are recorded.
    LeaseCheckpoint,
    /// The alarms that the request listed, raised or cleared.
    Alarm(AlarmResponse),
    /// All members after the change, by ascending id.
    Members(Vec<Member>),
    /// The member's name and URLs are recorded.
    Published,
    /// The cluster version is recorded.
    ClusterVersion,
    /// The change of users, of roles, or of whether they count is made.
    Auth,
    /// The token of a user, known to every member that has applied the command.
    Login(String),
}

/// Waits until a compaction has removed its rows and the removal is on disk.
#[derive(Clone, Debug)]
pub struct CompactionTicket {
    pub(crate) revision: i64,
    pub(crate) finished: watch::Receiver<i64>,
}

impl CompactionTicket {
    /// Returns true once the rows are gone, false if the store was shut down before.
    ///
    /// # Cancel safety
    /// Dropping the future only stops the wait.
    pub async fn wait(mut self) -> bool {
        let revision = self.revision;
        self.finished.wait_for(|finished| *finished >= revision).await.is_ok()
    }

    /// Whether the rows are gone already.
    pub fn is_finished(&self) -> bool {
        *self.finished.borrow() >= self.revision
    }
}

/// The state could not be written or read. The caller logs it and ends the process: going on would
/// acknowledge changes that may be lost.
#[derive(Clone, Debug, thiserror::Error)]
#[error("state storage failed: {0}")]
pub struct Fatal(pub String);

/// The persistent part of a lease.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LeaseRow {
    /// Lease id, any number but 0.
    pub id: i64,
    /// Granted time to live. Unit: seconds.
    pub ttl: i64,
    /// Time left at the last checkpoint; 0 = never checkpointed. Unit: seconds.
    pub remaining_ttl: i64,
}

/// Sizes that quota and status speak of. Unit: bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Sizes {
    /// Files of the state on disk.
    pub total: i64,
    /// Retained revisions: what would be left if all freed space were returned.
    pub in_use: i64,
}

/// One change as watchers see it. A delete's `kv` has only `key` and `mod_revision`.
#[derive(Clone, PartialEq, Debug)]
pub struct FeedEvent {
    /// Put or delete.
    pub kind: EventType,
    /// The state after the change.
    pub kv: KeyValue,
    /// The state one revision earlier; `None` if the key was absent or that state is compacted.
    pub prev_kv: Option<KeyValue>,
}

/// All changes of one revision, in order of execution.
#[derive(Clone, PartialEq, Debug)]
pub struct Revised {
    /// The revision.
    pub revision: i64,
    /// Its changes; never empty.
    pub events: Vec<FeedEvent>,
}

/// What the feed still remembers.
#[derive(Clone, Debug)]
pub enum Recent {
    /// Every revision after the asked one, ascending, without a gap; empty = nothing new.
    Batches(Vec<Arc<Revised>>),
    /// The ring has forgotten some of them: read them with `Reader::changes`.
    TooOld,
}

/// A stretch of history.
#[derive(Clone, Debug)]
pub struct Changes {
    /// Revisions in ascending order; those of one revision are never split.
    pub batches: Vec<Arc<Revised>>,
    /// First revision not covered: where the next call goes on.
    pub next: i64,
    /// Store revision when the history was read.
    pub store_revision: i64,
}

/// One row of history, as the state on disk and the snapshot file hold it.
#[derive(Clone, PartialEq, Debug)]
pub(crate) struct Row {
    pub(crate) key: RevisionKey,
    /// The row records a deletion; etcd's revision key then ends in `t`.
    pub(crate) tombstone: bool,
    /// Marshalled `KeyValue`, byte for byte what etcd stores.
    pub(crate) kv: Bytes,
}

/// A change outside the key space.
#[derive(Clone, PartialEq, Debug)]
pub(crate) enum MetaChange {
    /// Adds or replaces a lease.
    LeasePut(LeaseRow),
    /// Removes a lease.
    LeaseRemove(i64),
    /// Raises an alarm.
    AlarmPut(AlarmMember),
    /// Clears an alarm.
    AlarmRemove(AlarmMember),
    /// Adds or replaces a member.
    MemberPut(Member),
    /// Removes a member and remembers its id as used.
    MemberRemove(u64),
    /// Records the identity of a member's data directory.
    MemberUuid(u64, Bytes),
    /// Records the raft membership and where it was agreed.
    Membership(LogId, Bytes),
    /// Records the cluster version.
    ClusterVersion(String),
    /// Records whether users count.
    AuthEnabled(bool),
    /// Records the auth revision.
    AuthRevision(u64),
    /// Adds or replaces a user.
    UserPut(User),
    /// Removes a user.
    UserRemove(String),
    /// Adds or replaces a role.
    RolePut(Role),
    /// Removes a role.
    RoleRemove(String),
    /// A compaction is in force for readers.
    ScheduledCompaction(i64),
    /// A compaction has removed its rows. Written by the persister itself.
    FinishedCompaction(i64),
}

/// All that one log entry changes; becomes durable as a whole or not at all.
#[derive(Clone, PartialEq, Debug)]
pub(crate) struct Delta {
    pub(crate) id: LogId,
    pub(crate) rows: Vec<Row>,
    pub(crate) meta: Vec<MetaChange>,
    /// The hash chain after the entry.
    pub(crate) chain: Chain,
    /// Rough memory use, for the bound of the persister's queue.
    pub(crate) bytes: usize,
}

/// Counts of what happened since the start, for metrics.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Stats {
    /// Keys put.
    pub puts: u64,
    /// Bytes of their keys and values.
    pub put_bytes: u64,
    /// Keys deleted.
    pub deletes: u64,
    /// Range requests, those in transactions included.
    pub ranges: u64,
    /// Transactions.
    pub txns: u64,
    /// Events made for watchers.
    pub events: u64,
    /// Compactions carried out.
    pub compactions: u64,
    /// Revisions that compactions removed.
    pub compacted_rows: u64,
    /// Reads of old revisions that went to the disk.
    pub disk_reads: u64,
}
