//! The chunks of a transfer as bytes. Each stands for itself: a header with its kind and its place in
//! one transfer, and a checksum over all of it. It does no I/O and never panics on foreign bytes.
//! docs/STORAGE_FORMAT.md promises the layout.

use bytes::{Buf, Bytes};

use crate::chain::{Chain, Digest};
use crate::keys::{Pair, decode_chain, decode_log_id, encode_chain, encode_log_id};
use crate::types::LogId;

/// First bytes of each chunk.
const MAGIC: &[u8] = b"KLST";
/// Layout of chunks that this file describes.
const VERSION: u8 = 1;
/// Magic, version, kind, two zeros, transfer, number.
const HEADER_LEN: usize = 24;
/// The checksum at the end.
const CRC_LEN: usize = 4;
/// Lengths of key and value in front of each pair.
const PAIR_HEADER_LEN: usize = 8;
/// Largest chunk, unless a single pair is larger. Unit: bytes.
const CHUNK_MAX: usize = 1 << 20;

const HEAD: u8 = 1;
const PAIRS: u8 = 2;
const TRAILER: u8 = 3;

/// A chunk taken apart.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Chunk {
    /// Random name of the transfer.
    pub(super) transfer: u64,
    /// Place in the transfer, from 0.
    pub(super) number: u64,
    pub(super) content: Content,
}

/// What a chunk holds.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Content {
    /// The first chunk.
    Head(Head),
    /// Pairs of the database, to be read with `next_pair`: first all tables, then all rows, each in
    /// key order.
    Pairs(Bytes),
    /// The last chunk.
    Trailer(Trailer),
}

/// What state is described.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Head {
    /// Layout of keys and values.
    pub(super) schema: u32,
    pub(super) applied: LogId,
    /// The hash chain at `applied`.
    pub(super) chain: Chain,
    /// Store revision.
    pub(super) revision: i64,
}

/// What all pairs together amount to.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Trailer {
    /// Pairs of tables.
    pub(super) tables: u64,
    /// Rows.
    pub(super) rows: u64,
    /// Digest of the bodies of all chunks before.
    pub(super) digest: u64,
}

/// Counts what goes by.
#[derive(Clone, Debug)]
pub(super) struct Totals {
    pub(super) tables: u64,
    pub(super) rows: u64,
    digest: Digest,
}

impl Totals {
    pub(super) fn new(head: &Head) -> Self {
        let mut digest = Digest::new(0);
        digest.bytes(&encode_head(head));
        Self { tables: 0, rows: 0, digest }
    }

    /// Takes in the body of a chunk of pairs.
    pub(super) fn add(&mut self, pairs: &[u8]) {
        self.digest.bytes(pairs);
    }

    pub(super) fn trailer(&self) -> Trailer {
        Trailer { tables: self.tables, rows: self.rows, digest: self.digest.finish() }
    }
}

/// A chunk of pairs in the making.
pub(super) struct Packer(Vec<u8>);

impl Packer {
    pub(super) fn new() -> Self {
        Self(Vec::with_capacity(CHUNK_MAX))
    }

    /// Adds a pair, unless the chunk has some already and would become too large.
    pub(super) fn add(&mut self, (key, value): &Pair) -> bool {
        let len = PAIR_HEADER_LEN + key.len() + value.len();
        if !self.0.is_empty() && HEADER_LEN + self.0.len() + len + CRC_LEN > CHUNK_MAX {
            return false;
        }
        for part in [key, value] {
            let len = u32::try_from(part.len()).expect("keys and values are shorter than 4 GiB");
            self.0.extend_from_slice(&len.to_be_bytes());
        }
        self.0.extend_from_slice(key);
        self.0.extend_from_slice(value);
        true
    }

    /// The pairs so far; `None` if there are none.
    pub(super) fn take(&mut self) -> Option<Bytes> {
        let full = std::mem::take(&mut self.0);
        (!full.is_empty()).then(|| Bytes::from(full))
    }
}

/// Cuts the next pair off the body of a chunk of pairs. `Err` if it is not whole.
pub(super) fn next_pair(rest: &mut Bytes) -> Result<Option<(Bytes, Bytes)>, &'static str> {
    if rest.is_empty() {
        return Ok(None);
    }
    if rest.len() < PAIR_HEADER_LEN {
        return Err("it ends within a pair");
    }
    let (key_len, value_len) = (rest.get_u32() as usize, rest.get_u32() as usize);
    if key_len.checked_add(value_len).is_none_or(|len| len > rest.len()) {
        return Err("it ends within a pair");
    }
    Ok(Some((rest.split_to(key_len), rest.split_to(value_len))))
}

impl Chunk {
    /// As bytes.
    pub(super) fn encode(&self) -> Bytes {
        let (kind, body) = match &self.content {
            Content::Head(head) => (HEAD, Bytes::from(encode_head(head))),
            Content::Pairs(pairs) => (PAIRS, pairs.clone()),
            Content::Trailer(trailer) => (TRAILER, Bytes::from(encode_trailer(trailer))),
        };
        let mut chunk = Vec::with_capacity(HEADER_LEN + body.len() + CRC_LEN);
        chunk.extend_from_slice(MAGIC);
        chunk.extend_from_slice(&[VERSION, kind, 0, 0]);
        chunk.extend_from_slice(&self.transfer.to_be_bytes());
        chunk.extend_from_slice(&self.number.to_be_bytes());
        chunk.extend_from_slice(&body);
        let crc = crc32c::crc32c(&chunk);
        chunk.extend_from_slice(&crc.to_be_bytes());
        Bytes::from(chunk)
    }

    /// Checks and reads a chunk. The pairs in it are not looked at.
    pub(super) fn decode(chunk: Bytes) -> Result<Self, &'static str> {
        if chunk.len() < HEADER_LEN + CRC_LEN {
            return Err("it is too short");
        }
        if &chunk[..4] != MAGIC {
            return Err("it is no chunk of a state");
        }
        if chunk[4] != VERSION {
            return Err("its version is not known");
        }
        let mut body = chunk.slice(..chunk.len() - CRC_LEN);
        let mut crc = chunk.slice(body.len()..);
        if crc.get_u32() != crc32c::crc32c(&body) {
            return Err("its checksum does not fit");
        }
        let (kind, zeros) = (chunk[5], [chunk[6], chunk[7]]);
        body.advance(8);
        let (transfer, number) = (body.get_u64(), body.get_u64());
        let content = match kind {
            HEAD => decode_head(body).map(Content::Head),
            PAIRS => Some(Content::Pairs(body)),
            TRAILER => decode_trailer(body).map(Content::Trailer),
            _ => None,
        };
        let content = content.filter(|_| zeros == [0, 0]).ok_or("it does not decode")?;
        Ok(Self { transfer, number, content })
    }
}

fn encode_head(head: &Head) -> Vec<u8> {
    let mut body = head.schema.to_be_bytes().to_vec();
    body.extend_from_slice(&encode_log_id(head.applied));
    body.extend_from_slice(&encode_chain(head.chain));
    body.extend_from_slice(&head.revision.to_be_bytes());
    body
}

fn decode_head(mut body: Bytes) -> Option<Head> {
    if body.len() != 4 + 16 + 16 + 8 {
        return None;
    }
    let schema = body.get_u32();
    let applied = decode_log_id(&body.split_to(16)).ok()?;
    let chain = decode_chain(&body.split_to(16)).ok()?;
    Some(Head { schema, applied, chain, revision: body.get_i64() })
}

fn encode_trailer(trailer: &Trailer) -> Vec<u8> {
    let words = [trailer.tables, trailer.rows, trailer.digest];
    words.iter().flat_map(|word| word.to_be_bytes()).collect()
}

fn decode_trailer(mut body: Bytes) -> Option<Trailer> {
    let is_whole = body.len() == 3 * 8;
    is_whole.then(|| Trailer {
        tables: body.get_u64(),
        rows: body.get_u64(),
        digest: body.get_u64(),
    })
}

/// Body of a fuzz target: any bytes are taken apart or refused, and what is accepted encodes to the
/// same bytes again.
pub(crate) fn fuzz(data: &[u8]) {
    // The second attempt has a fitting checksum, so that the decoders behind it are reached too.
    let crc = crc32c::crc32c(data).to_be_bytes();
    for chunk in [data.to_vec(), [data, &crc].concat()] {
        let chunk = Bytes::from(chunk);
        let Ok(decoded) = Chunk::decode(chunk.clone()) else { continue };
        assert_eq!(decoded.encode(), chunk);
        if let Content::Pairs(mut rest) = decoded.content {
            while let Ok(Some(_)) = next_pair(&mut rest) {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    #[test]
    fn chunks_have_these_bytes() {
        let chain = Chain { hash: 0x0102_0304_0506_0708, since: 1 };
        let applied = LogId { term: 2, index: 3 };
        let head = Head { schema: 2, applied, chain, revision: 4 };
        let mut packer = Packer::new();
        assert!(packer.add(&(b"key".to_vec(), b"value".to_vec())));
        let pairs = packer.take().expect("there is one");
        let trailer = Trailer { tables: 5, rows: 6, digest: 7 };
        let wanted = [
            "4b4c5354010100000000000000000009000000000000000000000002000000000000000200000000000000\
             030102030405060708000000000000000100000000000000044084898f",
            "4b4c5354010200000000000000000009000000000000000100000003000000056b657976616c7565",
            "4b4c5354010300000000000000000009000000000000000200000000000000050000000000000006000000\
             0000000007",
        ];
        let contents = [Content::Head(head), Content::Pairs(pairs), Content::Trailer(trailer)];
        for ((number, content), wanted) in (0..).zip(contents).zip(wanted) {
            let chunk = Chunk { transfer: 9, number, content };
            let bytes = chunk.encode();
            assert!(hex(&bytes).starts_with(wanted), "{}", hex(&bytes));
            assert_eq!(Chunk::decode(bytes), Ok(chunk));
        }
    }

    #[test]
    fn a_chunk_is_full_at_its_bound() {
        let mut packer = Packer::new();
        let pair = (vec![1; 100], vec![2; 60_000]);
        let mut count = 0;
        while packer.add(&pair) {
            count += 1;
        }
        assert_eq!(count, 17);
        let mut pairs = packer.take().expect("there are some");
        assert!(pairs.len() < CHUNK_MAX && packer.take().is_none());
        while let Some(found) = next_pair(&mut pairs).expect("whole") {
            assert_eq!((found.0.to_vec(), found.1.to_vec()), pair);
            count -= 1;
        }
        assert_eq!(count, 0);
        assert!(packer.add(&(vec![1], vec![0; 2 * CHUNK_MAX])), "one pair may be larger");
        assert!(!packer.add(&(vec![2], vec![])), "but stays alone");
    }

    #[test]
    fn every_flipped_bit_and_every_cut_is_refused() {
        let content = Content::Pairs(Bytes::from_static(b"\0\0\0\x01\0\0\0\x01kv"));
        let chunk = Chunk { transfer: 1, number: 2, content }.encode();
        for bit in 0..chunk.len() * 8 {
            let mut bad = chunk.to_vec();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(Chunk::decode(Bytes::from(bad)).is_err(), "bit {bit}");
        }
        for len in 0..chunk.len() {
            assert!(Chunk::decode(chunk.slice(..len)).is_err());
        }
        for len in 1..10 {
            assert!(next_pair(&mut chunk.slice(24..24 + len)).is_err());
        }
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_are_decoded_or_refused(mut data: Vec<u8>, kind in 0_u8..5) {
            fuzz(&data);
            data.splice(..0, [&b"KLST\x01"[..], &[kind, 0, 0]].concat());
            fuzz(&data);
        }
    }
}
