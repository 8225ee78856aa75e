//! The key index: every key that still has a retained revision, its newest row in memory, and where
//! its older retained revisions are. It knows nothing of the disk; superseded values leave memory as
//! soon as their successor enters, apart from what the feed holds.
//!
//! One entry is 40 bytes beside its row, and the row holds the key, so a key is stored once. Live keys
//! are counted by blocks of a few hundred neighbors, so the size of any range is known without a walk.

use std::borrow::Borrow;
use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;
use std::sync::Arc;

use super::row;
use super::span::Span;
use crate::types::RevisionKey;

/// A block of more live keys than this is cut in two.
const BLOCK_MAX: u32 = 512;
/// Places of an entry without history.
const NO_HISTORY: u32 = 0;
/// Highest size a `Past` can hold; larger rows count as this.
const SIZE_MAX: u32 = u32::MAX >> 1;

/// The newest revision of one key. Ordered by key.
#[derive(Clone, Debug)]
pub(crate) struct Entry {
    row: Arc<[u8]>,
    main: i64,
    sub: u32,
    key_len: u32,
    history: u32,
    tombstone: bool,
}

impl Entry {
    /// An entry from a canonical row. `key_len` is the length of the key within it.
    pub(crate) fn new(row: Arc<[u8]>, key_len: usize, at: RevisionKey, tombstone: bool) -> Self {
        let sub = u32::try_from(at.sub).expect("a revision has fewer than 2^32 changes");
        let key_len = u32::try_from(key_len).expect("a key is shorter than 4 GiB");
        Self { row, main: at.main, sub, key_len, history: NO_HISTORY, tombstone }
    }

    pub(crate) fn key(&self) -> &[u8] {
        let len = self.key_len as usize;
        let start = row::key_start(len);
        &self.row[start..start + len]
    }

    pub(crate) fn row(&self) -> &Arc<[u8]> {
        &self.row
    }

    pub(crate) fn main(&self) -> i64 {
        self.main
    }

    pub(crate) fn at(&self) -> RevisionKey {
        RevisionKey { main: self.main, sub: i64::from(self.sub) }
    }

    pub(crate) fn is_live(&self) -> bool {
        !self.tombstone
    }
}

impl Borrow<[u8]> for Entry {
    fn borrow(&self) -> &[u8] {
        self.key()
    }
}

impl PartialEq for Entry {
    fn eq(&self, other: &Self) -> bool {
        self.key() == other.key()
    }
}

impl Eq for Entry {}

impl PartialOrd for Entry {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Entry {
    fn cmp(&self, other: &Self) -> Ordering {
        self.key().cmp(other.key())
    }
}

/// A superseded revision that is not compacted yet. 16 bytes: busy keys have thousands.
#[derive(Clone, Copy, Debug)]
struct Past {
    main: i64,
    sub: u32,
    size_and_tombstone: u32,
}

impl Past {
    fn of(entry: &Entry) -> Self {
        let size = size(&entry.row) << 1 | u32::from(entry.tombstone);
        Self { main: entry.main, sub: entry.sub, size_and_tombstone: size }
    }

    fn at(self) -> RevisionKey {
        RevisionKey { main: self.main, sub: i64::from(self.sub) }
    }

    fn is_tombstone(self) -> bool {
        self.size_and_tombstone & 1 == 1
    }

    fn size(self) -> u32 {
        self.size_and_tombstone >> 1
    }
}

fn size(row: &[u8]) -> u32 {
    u32::try_from(row.len()).unwrap_or(SIZE_MAX).min(SIZE_MAX)
}

/// What a retained revision costs beside its row: the revision key and the checksum.
const ROW_OVERHEAD: i64 = 21;

fn cost(size: u32) -> i64 {
    i64::from(size) + ROW_OVERHEAD
}

/// What a reader at some revision finds for a key.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Visible {
    /// The key does not exist at that revision.
    Absent,
    /// The newest row.
    Newest,
    /// An older row: its place, and that of the change that replaced it.
    Older { at: RevisionKey, successor: RevisionKey },
}

/// Rows that a compaction takes away.
pub(crate) type Doomed = Vec<(RevisionKey, bool)>;

/// All keys with a retained revision.
#[derive(Default)]
pub(crate) struct Index {
    entries: BTreeSet<Entry>,
    /// Superseded revisions by `Entry::history`, oldest first; slot 0 stays empty.
    histories: Vec<Vec<Past>>,
    free: Vec<u32>,
    blocks: Blocks,
    live: u64,
    in_use: i64,
}

impl Index {
    pub(crate) fn get(&self, key: &[u8]) -> Option<&Entry> {
        self.entries.get(key)
    }

    /// Number of keys that exist at the newest revision.
    pub(crate) fn live(&self) -> u64 {
        self.live
    }

    /// Bytes of all retained revisions.
    pub(crate) fn in_use(&self) -> i64 {
        self.in_use
    }

    /// Records the newest revision of a key; the one before becomes history.
    pub(crate) fn record(&mut self, key: &[u8], entry: Entry) {
        let is_live = entry.is_live();
        match (self.supersede(entry), is_live) {
            (false, true) => self.born(key),
            (true, false) => self.died(key),
            _ => {}
        }
    }

    /// As `record`, for a bulk load that ends with `count_blocks`.
    pub(crate) fn load(&mut self, entry: Entry) {
        let is_live = entry.is_live();
        let was_live = self.supersede(entry);
        self.live = self.live + u64::from(is_live) - u64::from(was_live);
    }

    /// Counts live keys into blocks after a bulk load.
    pub(crate) fn count_blocks(&mut self) {
        self.blocks = Blocks::default();
        let (mut start, mut count): (Box<[u8]>, u32) = (Box::default(), 0);
        for entry in self.entries.iter().filter(|entry| entry.is_live()) {
            if count == BLOCK_MAX / 2 {
                self.blocks.starts.insert(std::mem::replace(&mut start, entry.key().into()), count);
                count = 0;
            }
            count += 1;
        }
        self.blocks.starts.insert(start, count);
    }

    /// Returns whether the key was live before.
    fn supersede(&mut self, mut entry: Entry) -> bool {
        self.in_use += cost(size(&entry.row));
        let Some(old) = self.entries.get(entry.key()) else {
            self.entries.insert(entry);
            return false;
        };
        let (past, was_live) = (Past::of(old), old.is_live());
        entry.history = old.history;
        if entry.history == NO_HISTORY {
            entry.history = self.new_history();
        }
        self.histories[entry.history as usize].push(past);
        self.entries.replace(entry);
        was_live
    }

    fn new_history(&mut self) -> u32 {
        if let Some(slot) = self.free.pop() {
            return slot;
        }
        if self.histories.is_empty() {
            self.histories.push(Vec::new());
        }
        self.histories.push(Vec::new());
        u32::try_from(self.histories.len() - 1).expect("fewer than 2^32 keys")
    }

    fn born(&mut self, key: &[u8]) {
        self.live += 1;
        let (start, count) = self.blocks.of_mut(key);
        *count += 1;
        if *count <= BLOCK_MAX {
            return;
        }
        let (start, half) = (start.clone(), *count / 2);
        let from = (Bound::Included(start.as_ref()), Bound::Unbounded);
        let mut block = self.entries.range::<[u8], _>(from).filter(|entry| entry.is_live());
        let middle = block.nth(half as usize).expect("the block has more than half its keys");
        *self.blocks.of_mut(middle.key()).1 = half;
        self.blocks.starts.insert(middle.key().into(), BLOCK_MAX + 1 - half);
    }

    fn died(&mut self, key: &[u8]) {
        self.live -= 1;
        let (start, count) = self.blocks.of_mut(key);
        *count -= 1;
        if *count == 0 && !start.is_empty() {
            let start = start.clone();
            self.blocks.starts.remove(&start);
        }
    }

    /// Number of live keys in a span at the newest recorded revision, without a walk over all of it.
    pub(crate) fn count(&self, span: &Span) -> u64 {
        let Some((start, end)) = span.bounds(None) else { return 0 };
        if let Some(key) = span.single() {
            return u64::from(self.get(key).is_some_and(Entry::is_live));
        }
        let Bound::Included(first) = start else { return 0 };
        let mut blocks = self.blocks.from(first);
        let Some((mut block, mut count)) = blocks.next() else { return 0 };
        // The walked part of the first block ends where the second block or the span ends.
        let mut total = 0;
        for (next, next_count) in blocks {
            let within = match end {
                Bound::Excluded(end) => next < end,
                _ => true,
            };
            if !within {
                break;
            }
            total += if block >= first {
                u64::from(count)
            } else {
                self.walk_live((start, Bound::Excluded(next)))
            };
            (block, count) = (next, next_count);
        }
        let last_start = if block >= first { Bound::Included(block) } else { start };
        total + self.walk_live((last_start, end))
    }

    /// As `count`, but gives up beyond `most`, so that the cost is bounded by it.
    pub(crate) fn is_at_most(&self, span: &Span, most: u64) -> bool {
        let Some((Bound::Included(first), end)) = span.bounds(None) else { return true };
        let mut total = 0;
        for (block, count) in self.blocks.from(first) {
            if matches!(end, Bound::Excluded(end) if block >= end) {
                break;
            }
            total += u64::from(count);
            if total > most {
                return false;
            }
        }
        true
    }

    fn walk_live(&self, bounds: (Bound<&[u8]>, Bound<&[u8]>)) -> u64 {
        self.entries.range::<[u8], _>(bounds).filter(|entry| entry.is_live()).count() as u64
    }

    /// Entries in key order within bounds made by `Span::bounds`.
    pub(crate) fn range(
        &self,
        bounds: (Bound<&[u8]>, Bound<&[u8]>),
    ) -> impl Iterator<Item = &Entry> {
        self.entries.range::<[u8], _>(bounds)
    }

    /// Every entry in key order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Entry> {
        self.entries.iter()
    }

    /// What a reader at `revision` finds for the key of `entry`.
    pub(crate) fn visible(&self, entry: &Entry, revision: i64) -> Visible {
        if entry.main <= revision {
            return if entry.tombstone { Visible::Absent } else { Visible::Newest };
        }
        let history = self.history(entry);
        let newer = history.partition_point(|past| past.main <= revision);
        let Some(past) = newer.checked_sub(1).map(|place| history[place]) else {
            return Visible::Absent;
        };
        if past.is_tombstone() {
            return Visible::Absent;
        }
        let successor = history.get(newer).map_or(entry.at(), |next| next.at());
        Visible::Older { at: past.at(), successor }
    }

    fn history(&self, entry: &Entry) -> &[Past] {
        self.histories.get(entry.history as usize).map_or(&[], Vec::as_slice)
    }

    /// Takes away what a compaction at `compacted` no longer retains, for up to `keys` keys behind
    /// `after`. Returns the key to go on behind, or `None` at the end.
    pub(crate) fn compact(
        &mut self,
        compacted: i64,
        after: Option<&[u8]>,
        keys: usize,
        doomed: &mut Doomed,
    ) -> Option<Box<[u8]>> {
        let start = after.map_or(Bound::Unbounded, Bound::Excluded);
        let mut dead: Vec<Box<[u8]>> = Vec::new();
        let mut seen = 0;
        let mut last = None;
        for entry in self.entries.range::<[u8], _>((start, Bound::Unbounded)).take(keys) {
            seen += 1;
            last = Some(entry);
            let history = entry.history as usize;
            if entry.tombstone && entry.main < compacted {
                dead.push(entry.key().into());
            }
            if let Some(pasts) = self.histories.get_mut(history).filter(|pasts| !pasts.is_empty()) {
                self.in_use -= drop_pasts(pasts, entry, compacted, doomed);
            }
        }
        let next = last.filter(|_| seen == keys).map(|entry| entry.key().into());
        for key in dead {
            self.bury(&key, doomed);
        }
        next
    }

    /// Forgets a key whose deletion is compacted.
    fn bury(&mut self, key: &[u8], doomed: &mut Doomed) {
        let entry = self.entries.take(key).expect("found in this walk, under the same lock");
        self.in_use -= cost(size(&entry.row));
        doomed.push((entry.at(), true));
        if entry.history != NO_HISTORY {
            self.histories[entry.history as usize] = Vec::new();
            self.free.push(entry.history);
        }
    }
}

/// Drops the superseded revisions of one key that a compaction does not retain: all at or below it,
/// but for the newest of them if that is a put, or a deletion exactly there. Returns the bytes freed.
fn drop_pasts(pasts: &mut Vec<Past>, entry: &Entry, compacted: i64, doomed: &mut Doomed) -> i64 {
    let below = pasts.partition_point(|past| past.main <= compacted);
    let newest_is_past = entry.main > compacted;
    let keep_last = newest_is_past
        && below > 0
        && (!pasts[below - 1].is_tombstone() || pasts[below - 1].main == compacted);
    let gone = below - usize::from(keep_last);
    let freed = pasts[..gone].iter().map(|past| cost(past.size())).sum();
    doomed.extend(pasts.drain(..gone).map(|past| (past.at(), past.is_tombstone())));
    if pasts.is_empty() {
        *pasts = Vec::new();
    } else if pasts.capacity() > 4 * pasts.len() {
        pasts.shrink_to_fit();
    }
    freed
}

/// Live keys per block of neighbors, by the first key that belongs to the block. The first block
/// starts at the empty key and always exists.
struct Blocks {
    starts: BTreeMap<Box<[u8]>, u32>,
}

impl Default for Blocks {
    fn default() -> Self {
        Self { starts: BTreeMap::from([(Box::default(), 0)]) }
    }
}

impl Blocks {
    fn of_mut(&mut self, key: &[u8]) -> (&Box<[u8]>, &mut u32) {
        let upto = (Bound::Unbounded, Bound::Included(key));
        self.starts.range_mut::<[u8], _>(upto).next_back().expect("the first block starts at \"\"")
    }

    /// Blocks from the one that holds `key` on.
    fn from(&self, key: &[u8]) -> impl Iterator<Item = (&[u8], u32)> {
        let upto = (Bound::Unbounded, Bound::Included(key));
        let first = self.starts.range::<[u8], _>(upto).next_back();
        let rest = self.starts.range::<[u8], _>((Bound::Excluded(key), Bound::Unbounded));
        first.into_iter().chain(rest).map(|(start, count)| (start.as_ref(), *count))
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    fn key(number: u32) -> Vec<u8> {
        format!("/registry/pods/ns-{}/{number:06}", number % 7).into_bytes()
    }

    fn put(index: &mut Index, key: &[u8], main: i64, live: bool) {
        let row = if live {
            let fields = row::Fields {
                key,
                value: b"v",
                create_revision: main,
                mod_revision: main,
                version: 1,
                lease: 0,
            };
            row::encode(&mut Vec::new(), &fields)
        } else {
            row::encode_tombstone(&mut Vec::new(), key)
        };
        index.record(key, Entry::new(row, key.len(), RevisionKey { main, sub: 0 }, !live));
    }

    fn walked(index: &Index, span: &Span) -> u64 {
        span.bounds(None).map_or(0, |bounds| index.walk_live(bounds))
    }

    #[test]
    fn an_entry_costs_forty_bytes() {
        assert_eq!(size_of::<Entry>(), 40);
        assert_eq!(size_of::<Past>(), 16);
    }

    #[test]
    fn blocks_count_any_range() {
        let mut index = Index::default();
        let mut revision = 1;
        let mut state = 12345_u32;
        for _ in 0..20_000 {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            revision += 1;
            let key = key(state >> 8 & 0x1fff);
            let was_live = index.get(&key).is_some_and(Entry::is_live);
            put(&mut index, &key, revision, !was_live || state & 1 == 0);
        }
        assert!(index.blocks.starts.len() > 8, "the test splits blocks");
        for from in 0..40 {
            let start = Bytes::from(key(from * 200));
            for end in [Bytes::from(key(from * 300 + 17)), Bytes::from_static(b"\0")] {
                let span = Span::new(&start, &end);
                assert_eq!(index.count(&span), walked(&index, &span));
            }
        }
        let all = Span::new(&Bytes::from_static(b"\0"), &Bytes::from_static(b"\0"));
        assert_eq!(index.count(&all), index.live());
        let counted: Vec<_> = index.blocks.starts.values().copied().collect();
        index.count_blocks();
        let again: u32 = index.blocks.starts.values().sum();
        assert_eq!(again, counted.iter().sum::<u32>());
        assert_eq!(index.count(&all), index.live());
        assert!(index.is_at_most(&all, index.live()) && !index.is_at_most(&all, 10));
    }

    #[test]
    fn compaction_keeps_what_reads_need() {
        let mut index = Index::default();
        put(&mut index, b"a", 2, true);
        put(&mut index, b"a", 3, true);
        put(&mut index, b"a", 5, true);
        put(&mut index, b"b", 4, true);
        put(&mut index, b"b", 6, false);
        put(&mut index, b"b", 8, true);
        put(&mut index, b"c", 7, false);
        let mut doomed = Doomed::new();
        assert_eq!(index.compact(6, None, 10, &mut doomed), None);
        let mains: Vec<_> = doomed.iter().map(|(at, _)| at.main).collect();
        assert_eq!(mains, [2, 3, 4], "the newest put and the deletion exactly at 6 stay");
        let b = index.get(b"b").expect("b exists");
        assert_eq!(index.visible(b, 7), Visible::Absent);
        doomed.clear();
        assert!(index.compact(8, None, 1, &mut doomed).is_some());
        assert_eq!(index.compact(8, Some(b"a"), 10, &mut doomed), None);
        let mains: Vec<_> = doomed.iter().map(|(at, _)| at.main).collect();
        assert_eq!(mains, [6, 7], "deletions below 8 go");
        assert!(index.get(b"c").is_none());
        assert_eq!(index.live(), 2);
    }
}
