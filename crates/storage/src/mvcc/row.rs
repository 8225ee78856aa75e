//! The bytes of one revision of one key: a marshalled `KeyValue`, byte for byte what etcd stores. The
//! index, the persister's queue and the feed share one such allocation; key and value of an answer are
//! slices of it. This file never panics on bytes that came from a file.

use std::ops::{Deref, Range};

use bytes::Bytes;
use kelson_api::mvccpb::KeyValue;
use prost::encoding::{decode_varint, encode_varint};
use triomphe::ThinArc;

/// A row in memory with the revision that wrote it, in one allocation of 24 bytes more than the row.
/// A clone shares it; the handle itself takes 8 bytes.
#[derive(Clone, Debug)]
pub(crate) struct Held(ThinArc<i64, u8>);

impl Held {
    /// Copies a row.
    pub(crate) fn new(revision: i64, row: &[u8]) -> Self {
        Self(ThinArc::from_header_and_slice(revision, row))
    }

    /// The store revision that wrote the row.
    pub(crate) fn revision(&self) -> i64 {
        self.0.header.header
    }
}

impl Deref for Held {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0.slice
    }
}

impl AsRef<[u8]> for Held {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

/// The fields of a row, with key and value as places within it.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(crate) struct Parsed {
    pub(crate) key: Range<usize>,
    pub(crate) value: Range<usize>,
    pub(crate) create_revision: i64,
    pub(crate) mod_revision: i64,
    pub(crate) version: i64,
    pub(crate) lease: i64,
}

const KEY: u8 = 0x0a;
const CREATE: u8 = 0x10;
const MOD: u8 = 0x18;
const VERSION: u8 = 0x20;
const VALUE: u8 = 0x2a;
const LEASE: u8 = 0x30;

/// What a put records, before it becomes a row.
pub(crate) struct Fields<'a> {
    pub(crate) key: &'a [u8],
    pub(crate) value: &'a [u8],
    pub(crate) create_revision: i64,
    pub(crate) mod_revision: i64,
    pub(crate) version: i64,
    pub(crate) lease: i64,
}

/// Marshals a row into an allocation of exactly its size. `scratch` saves a growing buffer per call.
/// The copy is wanted: key and value of a command are slices of a whole log batch, which a row that
/// lives for years must not keep in memory.
pub(crate) fn encode(scratch: &mut Vec<u8>, fields: &Fields<'_>) -> Held {
    scratch.clear();
    put_bytes(scratch, KEY, fields.key);
    put_number(scratch, CREATE, fields.create_revision);
    put_number(scratch, MOD, fields.mod_revision);
    put_number(scratch, VERSION, fields.version);
    put_bytes(scratch, VALUE, fields.value);
    put_number(scratch, LEASE, fields.lease);
    Held::new(fields.mod_revision, scratch)
}

/// Marshals the row of a deletion, which holds the key alone.
pub(crate) fn encode_tombstone(scratch: &mut Vec<u8>, key: &[u8], revision: i64) -> Held {
    scratch.clear();
    put_bytes(scratch, KEY, key);
    Held::new(revision, scratch)
}

fn put_bytes(out: &mut Vec<u8>, tag: u8, bytes: &[u8]) {
    if !bytes.is_empty() {
        out.push(tag);
        encode_varint(bytes.len() as u64, out);
        out.extend_from_slice(bytes);
    }
}

fn put_number(out: &mut Vec<u8>, tag: u8, number: i64) {
    if number != 0 {
        out.push(tag);
        encode_varint(number.cast_unsigned(), out);
    }
}

/// The key of a canonical row, which stands first in it.
pub(crate) fn leading_key(row: &[u8]) -> &[u8] {
    let Some((&KEY, mut rest)) = row.split_first() else { return &[] };
    let len = match rest.split_first() {
        Some((&byte, after)) if byte < 0x80 => {
            rest = after;
            usize::from(byte)
        }
        _ => {
            let len =
                decode_varint(&mut rest).expect("a row is checked before it enters the index");
            usize::try_from(len).expect("checked, too")
        }
    };
    &rest[..len]
}

/// Finds the fields of a row. `None` if the bytes are no `KeyValue`.
pub(crate) fn parse(row: &[u8]) -> Option<Parsed> {
    let mut parsed = Parsed::default();
    let mut rest = row;
    while let Some((&tag, after)) = rest.split_first() {
        rest = after;
        let number = match rest.first() {
            Some(&byte) if byte < 0x80 => {
                rest = &rest[1..];
                u64::from(byte)
            }
            _ => decode_varint(&mut rest).ok()?,
        };
        match tag {
            CREATE => parsed.create_revision = number.cast_signed(),
            MOD => parsed.mod_revision = number.cast_signed(),
            VERSION => parsed.version = number.cast_signed(),
            LEASE => parsed.lease = number.cast_signed(),
            KEY | VALUE => {
                let len = usize::try_from(number).ok().filter(|len| *len <= rest.len())?;
                let start = row.len() - rest.len();
                rest = &rest[len..];
                let place = start..start + len;
                if tag == KEY { parsed.key = place } else { parsed.value = place }
            }
            _ => return None,
        }
    }
    Some(parsed)
}

/// The `KeyValue` of a row from the index, whose bytes were checked when it entered.
pub(crate) fn key_value(row: &Held) -> KeyValue {
    let parsed = parse(row).expect("a row is checked before it enters the index");
    slices(&share(row), parsed)
}

/// The `KeyValue` of a row read back from disk. `None` if the bytes are no `KeyValue`.
pub(crate) fn key_value_of(row: &Bytes) -> Option<KeyValue> {
    Some(slices(row, parse(row)?))
}

fn slices(row: &Bytes, parsed: Parsed) -> KeyValue {
    KeyValue {
        key: row.slice(parsed.key),
        create_revision: parsed.create_revision,
        mod_revision: parsed.mod_revision,
        version: parsed.version,
        value: row.slice(parsed.value),
        lease: parsed.lease,
    }
}

/// A handle that others can hold and cut, without a copy of the row.
pub(crate) fn share(row: &Held) -> Bytes {
    Bytes::from_owner(row.clone())
}

#[cfg(test)]
mod tests {
    use prost::Message;

    use super::*;

    fn sample(key: &[u8], value: &[u8], lease: i64) -> KeyValue {
        KeyValue {
            key: Bytes::copy_from_slice(key),
            create_revision: 2,
            mod_revision: 300,
            version: 7,
            value: Bytes::copy_from_slice(value),
            lease,
        }
    }

    #[test]
    fn rows_are_what_prost_writes_and_reads() {
        let long = vec![b'k'; 300];
        for (key, value, lease) in
            [(&b"a"[..], &b""[..], 0), (b"", b"v", -5), (&long, &long, i64::MAX)]
        {
            let kv = sample(key, value, lease);
            let fields =
                Fields { key, value, create_revision: 2, mod_revision: 300, version: 7, lease };
            let row = encode(&mut Vec::new(), &fields);
            assert_eq!(row.as_ref(), kv.encode_to_vec().as_slice());
            assert_eq!((row.revision(), leading_key(&row)), (300, key));
            assert_eq!(key_value(&row), kv);
        }
    }

    #[test]
    fn a_damaged_row_is_refused() {
        let row = sample(b"key", b"value", 1).encode_to_vec();
        assert!(parse(&row[..row.len() - 5]).is_none(), "cut inside the value");
        assert!(parse(&[0xff; 12]).is_none(), "no such field");
        assert!(parse(&[KEY]).is_none(), "no length");
    }
}
