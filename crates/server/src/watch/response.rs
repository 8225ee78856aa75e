//! Responses of a watch stream and how they reach the wire: everything but the events is encoded
//! per watcher, the events are appended as ready bytes. Field 11 has the highest number in
//! `WatchResponse`, so the result is the same, byte for byte, as encoding the whole message.

use bytes::{BufMut, Bytes};
use kelson_api::Message;
use kelson_api::etcdserverpb::{ResponseHeader, WatchRequest, WatchResponse};
use tonic::Status;
use tonic::codec::{BufferSettings, Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};

/// Buffer that tonic allocates per stream and direction. Watch streams are many and mostly silent,
/// so it is small; it grows with the traffic. Unit: bytes.
const BUFFER_BYTES: usize = 1024;

/// Responses that are ready together are sent as one piece up to this size. Unit: bytes.
const BATCH_BYTES: usize = 32 * 1024;

/// One response to one watcher, or to the whole stream.
#[derive(Clone, Debug, PartialEq)]
pub struct Response {
    /// All fields but the events.
    pub head: WatchResponse,
    /// The events, each as encoded field 11.
    pub events: Vec<Bytes>,
}

impl Response {
    /// A response without events.
    pub fn bare(head: WatchResponse) -> Self {
        Response { head, events: Vec::new() }
    }

    /// Events for one watcher.
    pub fn events(header: ResponseHeader, watch_id: i64, events: Vec<Bytes>) -> Self {
        let head = WatchResponse { header: Some(header), watch_id, ..Default::default() };
        Response { head, events }
    }

    /// Size on the wire, without the frame around the message. Unit: bytes.
    pub fn encoded_len(&self) -> usize {
        self.head.encoded_len() + self.events.iter().map(Bytes::len).sum::<usize>()
    }

    /// Appends the message to `buffer`.
    pub fn encode(&self, buffer: &mut impl BufMut) {
        self.head.encode(buffer).expect("the buffer grows as needed");
        for event in &self.events {
            buffer.put_slice(event);
        }
    }

    /// Cuts a response of `max_bytes` or more into pieces below it, each with at least one event;
    /// all pieces but the last say that more follows. Smaller ones and single events stay whole.
    pub fn into_fragments(self, max_bytes: usize) -> Vec<Response> {
        if self.events.len() < 2 || self.encoded_len() < max_bytes {
            return vec![self];
        }
        let head = WatchResponse { fragment: true, ..self.head };
        let empty_len = head.encoded_len();
        let mut pieces = Vec::new();
        let mut piece = Vec::new();
        let mut piece_len = empty_len;
        for event in self.events {
            if !piece.is_empty() && piece_len + event.len() >= max_bytes {
                let events = std::mem::take(&mut piece);
                pieces.push(Response { head: head.clone(), events });
                piece_len = empty_len;
            }
            piece_len += event.len();
            piece.push(event);
        }
        let head = WatchResponse { fragment: false, ..head };
        pieces.push(Response { head, events: piece });
        pieces
    }
}

/// Reads `WatchRequest` and writes [`Response`].
#[derive(Clone, Copy, Debug, Default)]
pub struct WatchCodec;

impl Codec for WatchCodec {
    type Encode = Response;
    type Decode = WatchRequest;
    type Encoder = WatchCodec;
    type Decoder = WatchCodec;

    fn encoder(&mut self) -> WatchCodec {
        WatchCodec
    }

    fn decoder(&mut self) -> WatchCodec {
        WatchCodec
    }
}

impl Encoder for WatchCodec {
    type Item = Response;
    type Error = Status;

    fn encode(&mut self, item: Response, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        buffer.reserve(item.encoded_len());
        item.encode(buffer);
        Ok(())
    }

    fn buffer_settings(&self) -> BufferSettings {
        BufferSettings::new(BUFFER_BYTES, BATCH_BYTES)
    }
}

impl Decoder for WatchCodec {
    type Item = WatchRequest;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<WatchRequest>, Status> {
        WatchRequest::decode(buffer).map(Some).map_err(|error| Status::internal(error.to_string()))
    }

    fn buffer_settings(&self) -> BufferSettings {
        BufferSettings::new(BUFFER_BYTES, BATCH_BYTES)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use kelson_api::mvccpb::{Event, KeyValue, event::EventType};
    use kelson_storage::{FeedEvent, Revised};

    use super::*;
    use crate::watch::SharedRevision;

    fn kv(key: &str, value_len: usize, revision: i64) -> KeyValue {
        KeyValue {
            key: Bytes::copy_from_slice(key.as_bytes()),
            value: Bytes::from(vec![b'v'; value_len]),
            create_revision: 3,
            mod_revision: revision,
            version: 2,
            lease: -1,
        }
    }

    fn header() -> ResponseHeader {
        ResponseHeader { cluster_id: u64::MAX, member_id: 7, revision: 300, raft_term: 2 }
    }

    fn revision(value_len: usize, count: usize) -> SharedRevision {
        let put = |number: usize| FeedEvent {
            kind: EventType::Put,
            kv: kv(&format!("key{number}"), value_len, 300),
            prev_kv: number.is_multiple_of(2).then(|| kv("old", 10, 200)),
        };
        let gone = KeyValue { key: Bytes::from("d"), mod_revision: 300, ..Default::default() };
        let delete =
            FeedEvent { kind: EventType::Delete, kv: gone, prev_kv: Some(kv("d", 5, 100)) };
        let events = (0..count).map(put).chain([delete]).collect();
        SharedRevision::new(Arc::new(Revised { revision: 300, events }))
    }

    #[test]
    fn shared_bytes_equal_the_plain_encoding() {
        for prev_kv in [false, true] {
            for value_len in [0, 1, 200, 70_000] {
                let shared = revision(value_len, 3);
                let events = (0..4).map(|event| shared.frame(event, prev_kv)).collect();
                let ours = Response::events(header(), 5, events);
                let mut bytes = Vec::new();
                ours.encode(&mut bytes);
                assert_eq!(bytes.len(), ours.encoded_len());
                let read = WatchResponse::decode(&bytes[..]).expect("our own bytes");
                assert_eq!(read.encode_to_vec(), bytes);
                assert_eq!(read.events.len(), 4);
                let expected = Event {
                    r#type: EventType::Put as i32,
                    kv: Some(kv("key2", value_len, 300)),
                    prev_kv: prev_kv.then(|| kv("old", 10, 200)),
                };
                assert_eq!(read.events[2], expected);
                assert_eq!(read.events[3].prev_kv.is_some(), prev_kv);
            }
        }
    }

    #[test]
    fn an_event_is_encoded_once() {
        let shared = revision(100, 1);
        assert_eq!(shared.frame(0, false).as_ptr(), shared.frame(0, false).as_ptr());
        assert_eq!(shared.frame(0, true).as_ptr(), shared.frame(0, true).as_ptr());
        assert_ne!(shared.frame(0, true), shared.frame(0, false));
    }

    #[test]
    fn fragments_are_small_and_complete() {
        let shared = revision(1000, 50);
        let events: Vec<Bytes> = (0..51).map(|event| shared.frame(event, false)).collect();
        let whole = Response::events(header(), 1, events.clone());
        let len = whole.encoded_len();
        assert_eq!(whole.clone().into_fragments(len + 1), vec![whole.clone()]);
        for max_bytes in [1, 1500, 5000, len] {
            let pieces = whole.clone().into_fragments(max_bytes);
            assert!(pieces.len() > 1);
            let (last, others) = pieces.split_last().expect("there are pieces");
            assert!(!last.head.fragment && others.iter().all(|piece| piece.head.fragment));
            for piece in &pieces {
                assert!(piece.events.len() == 1 || piece.encoded_len() < max_bytes);
                assert_eq!(piece.head.header, whole.head.header);
                assert_eq!(piece.head.watch_id, 1);
            }
            let joined: Vec<Bytes> = pieces.into_iter().flat_map(|piece| piece.events).collect();
            assert_eq!(joined, events);
        }
    }
}
