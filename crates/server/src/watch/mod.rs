//! Watches: from the feed of applied revisions to the streams of clients.
//!
//! One task, the [`hub`], follows the feed and puts the events of each revision into the bounded
//! queue of every stream that has a watcher for them. A stream whose queue is full leaves the hub;
//! it reads history on its own until it is near enough, then joins again. One number per watcher,
//! the first revision it has not sent, says all about its position, so nothing is lost or sent twice.
//!
//! This room never writes, never asks for agreement, and no client can slow down another: the hub
//! waits for nobody, and every stream waits only for its own client. It stands between
//! `storage::Feed` and `services::watch`.

mod catch_up;
mod event;
mod hub;
mod interval_index;
mod response;
mod source;
mod stats;
mod stream;
mod watchers;

pub use event::SharedRevision;
pub use hub::{Hub, HubHandle};
pub use interval_index::{IntervalIndex, KeyRange};
pub use response::{Response, WatchCodec};
pub use source::{Member, Source};
pub use stats::WatchStats;
pub use stream::{Ends, Permit, StreamOptions, WatchStream};

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

/// Bounds of queues and reads. The defaults serve; tests make them tiny.
#[derive(Clone, Copy, Debug)]
pub struct Tuning {
    /// Deliveries that may wait for one stream; at one more the stream leaves the hub.
    pub queue_len: usize,
    /// Bytes of events that may wait for one stream; beyond it the stream leaves the hub. The bytes
    /// are shared by all streams that wait for the same revision.
    pub queue_bytes: usize,
    /// How far behind the hub a watcher may be and still join; it reads the rest from the feed.
    /// Unit: revisions.
    pub join_gap: i64,
    /// Longest piece of history read at once. Unit: revisions.
    pub slice_revisions: usize,
    /// Biggest piece of history read at once. Unit: bytes.
    pub slice_bytes: usize,
    /// Most events that one read of history picks for all watchers together.
    pub slice_hits: usize,
    /// Reads of history at the same time, by all streams together; others wait their turn.
    pub slices_at_once: usize,
}

impl Default for Tuning {
    fn default() -> Self {
        Tuning {
            queue_len: 512,
            queue_bytes: 16 << 20,
            join_gap: 1000,
            slice_revisions: 1000,
            slice_bytes: 2 << 20,
            slice_hits: 16 * 1024,
            slices_at_once: 4,
        }
    }
}

/// Number of a stream's stay in the hub: new at each stay and never used again.
type StreamId = u64;

/// Number of a watcher within its stream: never used again, unlike the id that the client sees.
type Slot = u64;

/// A map keyed by numbers that we count up ourselves, so no client can make them collide.
type IdMap<V> = HashMap<u64, V, BuildHasherDefault<CountedIdHasher>>;

/// Spreads counted ids over a hash table by one multiplication.
#[derive(Default)]
struct CountedIdHasher(u64);

impl Hasher for CountedIdHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u64(u64::from(*byte));
        }
    }

    fn write_u64(&mut self, number: u64) {
        // The odd constant is 2^64 divided by the golden ratio: neighbors land far apart.
        self.0 = (self.0 ^ number).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
}
