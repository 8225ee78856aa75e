//! Events of one revision as all listeners share them: each is turned into wire bytes once, by the
//! first stream that needs it. It never copies keys or values before that and knows no watcher.

use std::sync::{Arc, OnceLock};

use bytes::{BufMut, Bytes, BytesMut};
use kelson_api::Message;
use kelson_api::mvccpb::{Event, KeyValue, event::EventType};
use kelson_storage::sabotage::{self, Variant};
use kelson_storage::{FeedEvent, Revised};

/// First byte of an event inside a `WatchResponse`: field 11, length-delimited.
const EVENT_TAG: u8 = 11 << 3 | 2;

/// The events of one revision with their wire bytes. Cheap to share, never changed.
pub struct SharedRevision {
    revised: Arc<Revised>,
    frames: Box<[Frames]>,
    bytes: usize,
}

/// The wire bytes of one event, made when first asked for.
#[derive(Default)]
struct Frames {
    plain: OnceLock<Bytes>,
    with_prev_kv: OnceLock<Bytes>,
}

impl SharedRevision {
    /// Shares a revision of the feed or of history.
    pub fn new(revised: Arc<Revised>) -> Self {
        let frames = revised.events.iter().map(|_| Frames::default()).collect();
        let bytes = revised.events.iter().map(event_bytes).sum();
        SharedRevision { revised, frames, bytes }
    }

    /// The revision of all these events.
    pub fn revision(&self) -> i64 {
        self.revised.revision
    }

    /// Rough size of the events. Unit: bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Field 11 of a `WatchResponse` holding event number `event` of the revision, with the state
    /// before it if `prev_kv` is wanted and known.
    pub fn frame(&self, event: u32, prev_kv: bool) -> Bytes {
        let event = event as usize;
        let source = &self.revised.events[event];
        let frames = &self.frames[event];
        match &source.prev_kv {
            Some(before) if prev_kv => {
                let before = if sabotage::is(Variant::PrevKvNow) { &source.kv } else { before };
                frames.with_prev_kv.get_or_init(|| encode(source, Some(before))).clone()
            }
            _ => frames.plain.get_or_init(|| encode(source, None)).clone(),
        }
    }
}

/// Keys and values of an event, as a measure of what it holds in memory.
pub(super) fn event_bytes(event: &FeedEvent) -> usize {
    let size = |kv: &KeyValue| kv.key.len() + kv.value.len();
    size(&event.kv) + event.prev_kv.as_ref().map_or(0, size)
}

/// Whether the event made its key exist, so that there was no state before it.
pub(super) fn is_creation(event: &FeedEvent) -> bool {
    event.kind == EventType::Put && event.kv.create_revision == event.kv.mod_revision
}

fn encode(event: &FeedEvent, prev_kv: Option<&KeyValue>) -> Bytes {
    let mut kv = event.kv.clone();
    if sabotage::is(Variant::CreatedAgain) {
        kv.create_revision = kv.mod_revision;
    }
    let message = Event { r#type: event.kind as i32, kv: Some(kv), prev_kv: prev_kv.cloned() };
    let len = message.encoded_len();
    let mut buffer = BytesMut::with_capacity(1 + 10 + len);
    buffer.put_u8(EVENT_TAG);
    message.encode_length_delimited(&mut buffer).expect("the buffer grows as needed");
    buffer.freeze()
}
