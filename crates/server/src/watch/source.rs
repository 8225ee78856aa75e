//! Where watches get their revisions and headers from: the running member, or a model in tests.
//! It never waits for agreement; all it does is reading what this member has applied.

use kelson_api::Error;
use kelson_api::etcdserverpb::ResponseHeader;
use kelson_api::mvccpb::KeyValue;
use kelson_raft::Node;
use kelson_storage::{Changes, Reader, Recent};
use tokio::sync::watch;

/// What hub and streams read.
pub trait Source: Clone + Send + Sync + 'static {
    /// Newest applied revision.
    fn revision(&self) -> i64;

    /// Revision of the last compaction, -1 = never.
    fn compacted(&self) -> i64;

    /// Moves when revisions were added to the feed; its value is the newest one. Closed when the
    /// store is gone.
    fn feed(&self) -> watch::Receiver<i64>;

    /// Everything in the feed after revision `after`. Quick.
    fn recent(&self, after: i64) -> Recent;

    /// History from revision `from` on, whole revisions up to about the given size. May block.
    ///
    /// # Errors
    /// `Compacted` if revisions from `from` on are gone; other errors mean the store cannot be read.
    fn changes(&self, from: i64, max_revisions: usize, max_bytes: usize) -> Result<Changes, Error>;

    /// State of `key` just before `revision`, if it existed and is not compacted. May block.
    fn kv_before(&self, key: &[u8], revision: i64) -> Option<KeyValue>;

    /// Response header with this revision in it.
    fn header(&self, revision: i64) -> ResponseHeader;
}

/// The running member.
#[derive(Clone)]
pub struct Member {
    /// Tells who we are, for headers.
    pub node: Node,
    /// The applied state.
    pub reader: Reader,
}

impl Source for Member {
    fn revision(&self) -> i64 {
        self.reader.revision()
    }

    fn compacted(&self) -> i64 {
        self.reader.compacted()
    }

    fn feed(&self) -> watch::Receiver<i64> {
        self.reader.feed().revision()
    }

    fn recent(&self, after: i64) -> Recent {
        self.reader.feed().recent(after)
    }

    fn changes(&self, from: i64, max_revisions: usize, max_bytes: usize) -> Result<Changes, Error> {
        self.reader.changes(from, max_revisions, max_bytes)
    }

    fn kv_before(&self, key: &[u8], revision: i64) -> Option<KeyValue> {
        self.reader.kv_before(key, revision)
    }

    fn header(&self, revision: i64) -> ResponseHeader {
        crate::header::header(&self.node, revision)
    }
}
