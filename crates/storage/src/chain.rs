//! The hash chain: one number per applied entry that depends on all entries before it and on every
//! change they made. Members that stand at the same entry and differ in it have different states. The
//! number says that something went wrong, never what; it is no defense against somebody who wants two
//! states to look alike. This file does no I/O.

use std::collections::VecDeque;

use crate::keys;
use crate::types::{Delta, MetaChange};

/// Positions whose hash is remembered. 64 KiB.
const REMEMBERED: usize = 4096;
/// Odd, so that multiplying by it loses nothing: two inputs that differ in one word only never have
/// the same digest.
const FACTOR: u64 = 0x9e37_79b9_7f4a_7c15;
/// Added after each word, so that zeros count too.
const STEP: u64 = 0xd1b5_4a32_d192_ed03;
/// Says that a pair was put.
const PUT: u64 = 1;
/// Says that a key was removed.
const REMOVE: u64 = 2;

/// A 64-bit digest of words and byte strings, made for speed: about a nanosecond per 8 bytes. Its
/// values are compared between members and kept on disk: docs/STORAGE_FORMAT.md promises them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Digest(u64);

impl Digest {
    /// A digest that goes on from an earlier number.
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// Takes in one word.
    pub(crate) fn word(&mut self, word: u64) {
        self.0 = (self.0 ^ word).wrapping_mul(FACTOR).rotate_left(29).wrapping_add(STEP);
    }

    /// Takes in a length and that many bytes, in little-endian words; zeros fill up the last one.
    pub(crate) fn bytes(&mut self, bytes: &[u8]) {
        self.word(bytes.len() as u64);
        let (words, rest) = bytes.as_chunks::<8>();
        for word in words {
            self.word(u64::from_le_bytes(*word));
        }
        if !rest.is_empty() {
            let mut last = [0; 8];
            last[..rest.len()].copy_from_slice(rest);
            self.word(u64::from_le_bytes(last));
        }
    }

    /// The number: each bit of it depends on each bit taken in.
    pub(crate) fn finish(self) -> u64 {
        let mut mixed = self.0;
        for shift in [32, 29, 31] {
            mixed = (mixed ^ (mixed >> shift)).wrapping_mul(FACTOR);
        }
        mixed ^ (mixed >> 32)
    }
}

/// The chain at one entry.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Chain {
    /// Depends on all entries after `since`.
    pub(crate) hash: u64,
    /// Index of the entry behind which the chain began: 0, unless the state was written by a version
    /// that knew no chain. Only chains with the same beginning can be compared.
    pub(crate) since: u64,
}

impl Chain {
    /// A chain that begins behind an entry.
    pub(crate) fn beginning(since: u64) -> Self {
        Self { hash: 0, since }
    }

    /// The chain after one more entry.
    pub(crate) fn after(self, delta: &Delta) -> Self {
        let mut digest = Digest::new(self.hash);
        digest.word(delta.id.index);
        digest.word(delta.id.term);
        digest.word(delta.rows.len() as u64);
        for row in &delta.rows {
            digest.word(row.key.main.cast_unsigned());
            digest.word(row.key.sub.cast_unsigned() << 1 | u64::from(row.tombstone));
            digest.bytes(&row.kv);
        }
        delta.meta.iter().for_each(|change| add_meta(&mut digest, change));
        Self { hash: digest.finish(), since: self.since }
    }
}

fn add_meta(digest: &mut Digest, change: &MetaChange) {
    let writes = keys::encode_meta(change);
    for (key, value) in &writes.puts {
        digest.word(PUT);
        digest.bytes(key);
        digest.bytes(value);
    }
    for key in &writes.removes {
        digest.word(REMOVE);
        digest.bytes(key);
    }
}

/// The chain and its recent past.
#[derive(Debug)]
pub(crate) struct Chains {
    newest: Chain,
    /// (index, hash) by ascending index. Bound: `REMEMBERED`.
    recent: VecDeque<(u64, u64)>,
}

impl Chains {
    /// The chain of a state at rest.
    pub(crate) fn new(chain: Chain, applied: u64) -> Self {
        Self { newest: chain, recent: VecDeque::from([(applied, chain.hash)]) }
    }

    pub(crate) fn newest(&self) -> Chain {
        self.newest
    }

    /// Records the chain after the entry at `index`, which is higher than all before it.
    pub(crate) fn push(&mut self, index: u64, chain: Chain) {
        if self.recent.len() == REMEMBERED {
            self.recent.pop_front();
        }
        self.recent.push_back((index, chain.hash));
        self.newest = chain;
    }

    /// The hash right after an entry, if it is remembered.
    pub(crate) fn at(&self, index: u64) -> Option<u64> {
        let place = self.recent.binary_search_by_key(&index, |(index, _)| *index).ok()?;
        Some(self.recent[place].1)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use bytes::Bytes;

    use super::*;
    use crate::Options;
    use crate::engine::Backend;
    use crate::recover::open_patiently;
    use crate::types::{LeaseRow, LogId, RevisionKey, Row};

    fn delta(index: u64, value: &'static [u8]) -> Delta {
        let kv = Bytes::from_static(value);
        let row = Row { key: RevisionKey { main: 7, sub: 0 }, tombstone: false, kv };
        let lease = LeaseRow { id: 1, ttl: 2, remaining_ttl: 0 };
        Delta {
            id: LogId { term: 3, index },
            rows: vec![row],
            meta: vec![MetaChange::LeasePut(lease), MetaChange::LeaseRemove(9)],
            chain: Chain::default(),
            bytes: 0,
        }
    }

    #[test]
    fn the_numbers_are_promised() {
        let first = Chain::default().after(&delta(1, b"a value of more than one word"));
        assert_eq!(first, Chain { hash: FIRST, since: 0 });
        assert_eq!(first.after(&delta(2, b"")), Chain { hash: SECOND, since: 0 });
    }

    const FIRST: u64 = 0x5fc6_f72d_6403_3285;
    const SECOND: u64 = 0xf5c4_f694_0c77_de12;

    #[test]
    fn every_part_of_an_entry_counts() {
        let right = delta(1, b"value");
        let mut others = vec![delta(2, b"value"), delta(1, b"valuf"), delta(1, b"value\0")];
        let mut change = |alter: fn(&mut Delta)| {
            let mut other = right.clone();
            alter(&mut other);
            others.push(other);
        };
        change(|delta| delta.id.term = 4);
        change(|delta| delta.rows[0].tombstone = true);
        change(|delta| delta.rows[0].key.sub = 1);
        change(|delta| delta.rows[0].key.main = 8);
        change(|delta| drop(delta.rows.pop()));
        change(|delta| drop(delta.meta.pop()));
        change(|delta| delta.meta.swap(0, 1));
        change(|delta| delta.meta.clear());
        let hash = |delta: &Delta| Chain::default().after(delta).hash;
        for other in &others {
            assert_ne!(hash(&right), hash(other), "{other:?}");
        }
        let later = Chain { hash: 1, since: 0 };
        assert_ne!(later.after(&right).hash, hash(&right), "the past counts");
        assert_eq!(later.after(&right), later.after(&right.clone()));
    }

    #[test]
    fn a_digest_tells_apart_where_strings_end() {
        let digest = |parts: &[&[u8]]| {
            let mut digest = Digest::new(0);
            parts.iter().for_each(|part| digest.bytes(part));
            digest.finish()
        };
        assert_ne!(digest(&[b"ab", b"c"]), digest(&[b"a", b"bc"]));
        assert_ne!(digest(&[b"\0"]), digest(&[b"\0\0"]));
        assert_ne!(digest(&[b""]), digest(&[]));
    }

    #[test]
    fn the_past_is_remembered_up_to_its_bound() {
        let mut chains = Chains::new(Chain { hash: 5, since: 0 }, 10);
        assert_eq!((chains.at(10), chains.at(9)), (Some(5), None));
        for index in (12..).step_by(2).take(REMEMBERED) {
            chains.push(index, Chain { hash: index * 3, since: 0 });
        }
        assert_eq!((chains.at(10), chains.at(12), chains.at(13)), (None, Some(36), None));
        assert_eq!(chains.recent.len(), REMEMBERED);
        assert_eq!(chains.newest().hash, chains.at(10 + 2 * REMEMBERED as u64).unwrap_or(0));
    }

    /// Turns a closed state into one of layout 1, which knew no chain.
    fn forget_chain(data_dir: &Path) {
        let dir = data_dir.join("member/state/0000000000000001");
        let mut backend: Box<dyn Backend> = Box::new(open_patiently(&dir, 1 << 20).expect("opens"));
        backend.remove(b"mchain").expect("works").expect("it was there");
        let crc = crc32c::crc32c(b"mschema\0\0\0\x01").to_le_bytes();
        let schema = [&[0, 0, 0, 1], crc.as_slice()].concat();
        backend.write(vec![(b"mschema".to_vec(), schema)]).expect("works");
        backend.flush().expect("works");
        backend.close();
    }

    #[test]
    fn a_state_without_a_chain_begins_one_where_it_stands() {
        let temp = tempfile::tempdir().expect("a temporary directory");
        std::fs::create_dir(temp.path().join("member")).expect("creates");
        let (durable, _log) = crate::log::Durable::manual(u64::MAX);
        let open = || crate::open(&Options::new(temp.path()), durable.clone()).expect("opens");
        let apply = |store: &mut crate::Store, index| {
            store.apply(LogId { term: 1, index }, &[]).expect("the disk works");
        };
        let (mut store, reader) = open();
        assert_eq!((reader.chain_since(), reader.chain_at(0)), (0, Some(0)));
        (1..=5).for_each(|index| apply(&mut store, index));
        let whole = reader.chain_at(5);
        store.shutdown();
        let (store, reader) = open();
        assert_eq!((reader.chain_at(5), reader.chain_at(4)), (whole, None), "only the newest");
        store.shutdown();
        forget_chain(temp.path());
        let (mut store, reader) = open();
        assert_eq!((reader.chain_since(), reader.chain_at(5)), (5, Some(0)));
        apply(&mut store, 6);
        let next = reader.chain_at(6);
        assert!(next.is_some_and(|hash| hash != 0));
        store.shutdown();
        let (_store, reader) = open();
        assert_eq!((reader.chain_since(), reader.chain_at(6)), (5, next));
    }
}
