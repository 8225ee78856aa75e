//! The key index: every key that still has a retained revision, its newest row in memory, and where
//! its older retained revisions are. It knows nothing of the disk; superseded values leave memory as
//! soon as their successor enters, apart from what the feed holds.
//!
//! The row holds the key, so a key is stored once. How entries lie in memory is the business of
//! blocks.rs.

use std::ops::Bound;

use super::blocks::Blocks;
pub(crate) use super::entry::Entry;
use super::entry::NO_HISTORY;
use super::span::Span;
use crate::types::RevisionKey;

/// Highest size a `Past` can hold; larger rows count as this.
const SIZE_MAX: u32 = u32::MAX >> 1;

/// A superseded revision that is not compacted yet. 16 bytes: busy keys have thousands.
#[derive(Clone, Copy, Debug)]
struct Past {
    main: i64,
    sub: u32,
    size_and_tombstone: u32,
}

impl Past {
    fn of(entry: &Entry) -> Self {
        let size = size(entry.row()) << 1 | u32::from(!entry.is_live());
        Self { main: entry.main(), sub: entry.sub(), size_and_tombstone: size }
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
    entries: Blocks,
    /// Superseded revisions by `Entry::history`, oldest first; slot 0 stays empty.
    histories: Vec<Vec<Past>>,
    free: Vec<u32>,
    in_use: i64,
}

impl Index {
    pub(crate) fn get(&self, key: &[u8]) -> Option<&Entry> {
        self.entries.get(key)
    }

    /// Number of keys that exist at the newest revision.
    pub(crate) fn live(&self) -> u64 {
        self.entries.live()
    }

    /// Bytes of all retained revisions.
    pub(crate) fn in_use(&self) -> i64 {
        self.in_use
    }

    /// Records the newest revision of a key; the one before becomes history.
    pub(crate) fn record(&mut self, mut entry: Entry) {
        self.in_use += cost(size(entry.row()));
        let place = match self.entries.find(entry.key()) {
            Ok(place) => place,
            Err(place) => return self.entries.insert(place, entry),
        };
        let old = self.entries.at(place);
        let past = Past::of(old);
        entry.history = old.history;
        if entry.history == NO_HISTORY {
            entry.history = self.new_history();
        }
        self.histories[entry.history as usize].push(past);
        self.entries.replace(place, entry);
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

    /// Number of live keys in a span at the newest recorded revision, without a walk over all of it.
    pub(crate) fn count(&self, span: &Span) -> u64 {
        span.bounds(None).map_or(0, |bounds| self.entries.count(bounds))
    }

    /// Whether the count is at most `most`; the cost is bounded by that.
    pub(crate) fn is_at_most(&self, span: &Span, most: u64) -> bool {
        span.bounds(None).is_none_or(|bounds| self.entries.is_at_most(bounds, most))
    }

    /// Entries in key order within bounds made by `Span::bounds`.
    pub(crate) fn range(
        &self,
        bounds: (Bound<&[u8]>, Bound<&[u8]>),
    ) -> impl Iterator<Item = &Entry> {
        self.entries.range(bounds)
    }

    /// Every entry in key order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Entry> {
        self.entries.iter()
    }

    /// What a reader at `revision` finds for the key of `entry`.
    pub(crate) fn visible(&self, entry: &Entry, revision: i64) -> Visible {
        if entry.main() <= revision {
            return if entry.is_live() { Visible::Newest } else { Visible::Absent };
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
        for entry in self.entries.range((start, Bound::Unbounded)).take(keys) {
            seen += 1;
            last = Some(entry);
            let history = entry.history as usize;
            if !entry.is_live() && entry.main() < compacted {
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
        let entry = self.entries.remove(key).expect("found in this walk, under the same lock");
        self.in_use -= cost(size(entry.row()));
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
    let newest_is_past = entry.main() > compacted;
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

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use bytes::Bytes;

    use super::super::row;
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
            row::encode_tombstone(&mut Vec::new(), key, main)
        };
        index.record(Entry::new(row, 0, !live));
    }

    #[test]
    fn an_entry_costs_sixteen_bytes() {
        assert_eq!(size_of::<Entry>(), 16);
        assert_eq!(size_of::<Past>(), 16);
    }

    /// Random writes, reads at every revision and compactions beside a plain map of all history.
    #[test]
    fn it_tells_what_a_plain_map_of_history_tells() {
        let mut index = Index::default();
        let mut model: BTreeMap<Vec<u8>, Vec<(i64, bool)>> = BTreeMap::new();
        let mut state = 12345_u32;
        let mut random = |below: u32| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) % below
        };
        let mut compacted = 0;
        for main in 2..20_000_i64 {
            let key = key(random(2500));
            let history = model.entry(key.clone()).or_default();
            let was_live = history.last().is_some_and(|(_, live)| *live);
            let live = !was_live || random(3) > 0;
            history.push((main, live));
            put(&mut index, &key, main, live);
            if main % 2_000 == 0 {
                compacted = main - i64::from(random(1500));
                let (mut doomed, mut after) = (Doomed::new(), None);
                loop {
                    after = index.compact(compacted, after.as_deref(), 100, &mut doomed);
                    if after.is_none() {
                        break;
                    }
                }
                assert!(!doomed.is_empty(), "each round has something to compact");
            }
            if main % 500 == 0 {
                let revision = compacted
                    + i64::from(random(u32::try_from(main - compacted + 1).expect("small")));
                compare(&index, &model, revision, (random(2600), random(2600)));
            }
        }
        assert!(index.in_use() > 0);
    }

    fn compare(
        index: &Index,
        model: &BTreeMap<Vec<u8>, Vec<(i64, bool)>>,
        revision: i64,
        (from, to): (u32, u32),
    ) {
        let live_at = |history: &[(i64, bool)], revision: i64| {
            let last = history.iter().rev().find(|(main, _)| *main <= revision);
            last.filter(|(_, live)| *live).map(|(main, _)| *main)
        };
        let newest = i64::MAX;
        let live = model.values().filter(|history| live_at(history, newest).is_some()).count();
        assert_eq!(index.live(), live as u64);
        let (start, end) = (Bytes::from(key(from)), Bytes::from(key(to)));
        for end in [end, Bytes::from_static(b"\0"), Bytes::new()] {
            let span = Span::new(&start, &end);
            let within = || model.iter().filter(|(key, _)| span.contains(key));
            let count = within().filter(|(_, h)| live_at(h, newest).is_some()).count() as u64;
            assert_eq!(index.count(&span), count);
            assert!(index.is_at_most(&span, count));
            assert!(count == 0 || !index.is_at_most(&span, count - 1));
            let expected: Vec<_> = within()
                .filter_map(|(key, history)| Some((key.clone(), live_at(history, revision)?)))
                .collect();
            let Some(bounds) = span.bounds(None) else {
                assert!(expected.is_empty());
                continue;
            };
            let found: Vec<_> = index
                .range(bounds)
                .filter_map(|entry| match index.visible(entry, revision) {
                    Visible::Absent => None,
                    Visible::Newest => Some((entry.key().to_vec(), entry.main())),
                    Visible::Older { at, .. } => Some((entry.key().to_vec(), at.main)),
                })
                .collect();
            assert_eq!(found, expected);
        }
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
