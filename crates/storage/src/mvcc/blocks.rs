//! The entries of the index in key order: a list of blocks, each a dense list of up to a few hundred
//! neighbors with a count of those that are live. So a key costs its entry and hardly more, however
//! the keys arrived, and the size of any range is known without a walk. It knows nothing of
//! revisions or history.

use std::cmp::Ordering;
use std::ops::Bound;

use super::entry::Entry;

/// Entries of a block. A larger one would make an insertion move more, a smaller one a count add up
/// more.
const BLOCK_MAX: usize = 256;
/// Entries by which a block grows, so that at most these are allocated in vain.
const GROWTH: usize = 32;
/// A block that shrinks to this is joined with a neighbor, if both together leave room to grow.
const BLOCK_LOW: usize = BLOCK_MAX / 4;
/// Entries of two joined blocks.
const JOINED_MAX: usize = BLOCK_MAX / 4 * 3;

/// All entries. No block is empty.
#[derive(Default)]
pub(super) struct Blocks {
    blocks: Vec<Block>,
    live: u64,
}

#[derive(Default)]
struct Block {
    entries: Vec<Entry>,
    live: u32,
}

/// Where an entry is, or where it belongs. Valid until the next insertion or removal.
#[derive(Clone, Copy)]
pub(super) struct Place {
    block: usize,
    at: usize,
}

impl Blocks {
    /// Number of live entries.
    pub(super) fn live(&self) -> u64 {
        self.live
    }

    pub(super) fn get(&self, key: &[u8]) -> Option<&Entry> {
        self.find(key).ok().map(|place| self.at(place))
    }

    /// Where a key is, or as an error where it belongs.
    pub(super) fn find(&self, key: &[u8]) -> Result<Place, Place> {
        let Some(last) = self.blocks.last() else { return Err(Place { block: 0, at: 0 }) };
        // Keys often arrive in order, in a load and when everything is read back.
        let is_in_last = last.first() <= Some(key);
        if is_in_last && last.entries.last().is_some_and(|entry| entry.key() < key) {
            return Err(Place { block: self.blocks.len() - 1, at: last.entries.len() });
        }
        let begun = if is_in_last {
            self.blocks.len()
        } else {
            let found = search(&self.blocks, |block| block.first().cmp(&Some(key)));
            found.map_or_else(|behind| behind, |block| block + 1)
        };
        let Some(block) = begun.checked_sub(1) else { return Err(Place { block: 0, at: 0 }) };
        let found = search(&self.blocks[block].entries, |entry| entry.key().cmp(key));
        found.map(|at| Place { block, at }).map_err(|at| Place { block, at })
    }

    /// The entry at a place where there is one.
    pub(super) fn at(&self, place: Place) -> &Entry {
        &self.blocks[place.block].entries[place.at]
    }

    /// Puts an entry in the place of one with the same key.
    pub(super) fn replace(&mut self, place: Place, entry: Entry) {
        let block = &mut self.blocks[place.block];
        let old = &mut block.entries[place.at];
        let (is_live, was_live) = (entry.is_live(), old.is_live());
        *old = entry;
        block.live = block.live + u32::from(is_live) - u32::from(was_live);
        self.live = self.live + u64::from(is_live) - u64::from(was_live);
    }

    /// Inserts an entry where it belongs.
    pub(super) fn insert(&mut self, place: Place, entry: Entry) {
        if self.blocks.is_empty() {
            self.blocks.push(Block::default());
        }
        self.live += u64::from(entry.is_live());
        let Place { block, at } = self.make_room(place);
        self.blocks[block].insert(at, entry);
    }

    /// Sees to it that the block of a place can take one more. A full block is cut in halves, but
    /// left as it is if keys arrive in order at either end of it: they start a block of their own.
    fn make_room(&mut self, Place { block, at }: Place) -> Place {
        let len = self.blocks[block].entries.len();
        if len < BLOCK_MAX {
            return Place { block, at };
        }
        if at == 0 {
            self.blocks.insert(block, Block::default());
            return Place { block, at: 0 };
        }
        let next = block + 1;
        if at == len {
            if self.blocks.get(next).is_none_or(|block| block.entries.len() == BLOCK_MAX) {
                self.blocks.insert(next, Block::default());
            }
            return Place { block: next, at: 0 };
        }
        let upper = self.blocks[block].cut(len / 2);
        self.blocks.insert(next, upper);
        if at <= len / 2 { Place { block, at } } else { Place { block: next, at: at - len / 2 } }
    }

    /// Takes an entry out.
    pub(super) fn remove(&mut self, key: &[u8]) -> Option<Entry> {
        let place = self.find(key).ok()?;
        let block = &mut self.blocks[place.block];
        let entry = block.entries.remove(place.at);
        block.live -= u32::from(entry.is_live());
        self.live -= u64::from(entry.is_live());
        match block.entries.len() {
            0 => drop(self.blocks.remove(place.block)),
            1..=BLOCK_LOW => self.join(place.block),
            _ => block.give_back(),
        }
        Some(entry)
    }

    /// Joins a block with a neighbor that is small enough.
    fn join(&mut self, block: usize) {
        let len = |block: usize| self.blocks.get(block).map_or(BLOCK_MAX, |b| b.entries.len());
        let fits = |&left: &usize| len(left) + len(left + 1) <= JOINED_MAX;
        let Some(left) = block.checked_sub(1).filter(fits).or(Some(block).filter(fits)) else {
            return self.blocks[block].give_back();
        };
        let right = self.blocks.remove(left + 1);
        let left = &mut self.blocks[left];
        left.entries.reserve_exact(right.entries.len());
        left.entries.extend(right.entries);
        left.live += right.live;
        left.give_back();
    }

    /// Entries in key order within bounds, of which the first must not be behind the second.
    pub(super) fn range(
        &self,
        bounds: (Bound<&[u8]>, Bound<&[u8]>),
    ) -> impl Iterator<Item = &Entry> {
        self.runs(bounds).flat_map(|(_, run)| run)
    }

    /// Every entry in key order.
    pub(super) fn iter(&self) -> impl Iterator<Item = &Entry> {
        self.blocks.iter().flat_map(|block| &block.entries)
    }

    /// Number of live entries within bounds.
    pub(super) fn count(&self, bounds: (Bound<&[u8]>, Bound<&[u8]>)) -> u64 {
        self.runs(bounds).map(|(block, run)| u64::from(block.live_in(run))).sum()
    }

    /// Whether at most so many live entries are within bounds; gives up when it knows better, so
    /// that the cost is bounded by the number.
    pub(super) fn is_at_most(&self, bounds: (Bound<&[u8]>, Bound<&[u8]>), most: u64) -> bool {
        let mut left = most;
        self.runs(bounds).all(|(block, run)| {
            let rest = left.checked_sub(u64::from(block.live_in(run)));
            left = rest.unwrap_or(0);
            rest.is_some()
        })
    }

    /// The parts of blocks within bounds.
    fn runs(
        &self,
        (start, end): (Bound<&[u8]>, Bound<&[u8]>),
    ) -> impl Iterator<Item = (&Block, &[Entry])> {
        let before = |key: &[u8]| self.find(key).unwrap_or_else(|place| place);
        let behind = |key: &[u8]| match self.find(key) {
            Ok(Place { block, at }) => Place { block, at: at + 1 },
            Err(place) => place,
        };
        let first = match start {
            Bound::Included(key) => before(key),
            Bound::Excluded(key) => behind(key),
            Bound::Unbounded => Place { block: 0, at: 0 },
        };
        let last = match end {
            Bound::Included(key) => behind(key),
            Bound::Excluded(key) => before(key),
            Bound::Unbounded => Place { block: self.blocks.len(), at: 0 },
        };
        let touched = self.blocks.iter().enumerate().take(last.block + 1).skip(first.block);
        touched.map(move |(number, block)| {
            let from = if number == first.block { first.at } else { 0 };
            let to = if number == last.block { last.at } else { block.entries.len() };
            (block, block.entries.get(from..to).unwrap_or_default())
        })
    }
}

impl Block {
    fn first(&self) -> Option<&[u8]> {
        self.entries.first().map(Entry::key)
    }

    fn insert(&mut self, at: usize, entry: Entry) {
        if self.entries.len() == self.entries.capacity() {
            self.entries.reserve_exact(GROWTH);
        }
        self.live += u32::from(entry.is_live());
        self.entries.insert(at, entry);
    }

    /// Keeps the first entries and returns the others.
    fn cut(&mut self, at: usize) -> Self {
        let mut upper = Self::default();
        upper.entries.reserve_exact(self.entries.len() - at + GROWTH);
        upper.entries.extend(self.entries.drain(at..));
        upper.live = live(&upper.entries);
        self.live -= upper.live;
        self.give_back();
        upper
    }

    /// Gives memory back that a few insertions will not need.
    fn give_back(&mut self) {
        if self.entries.capacity() > self.entries.len() + 2 * GROWTH {
            self.entries.shrink_to(self.entries.len() + GROWTH);
        }
    }

    /// Live entries of a part of this block, counted only if it is not all of it.
    fn live_in(&self, run: &[Entry]) -> u32 {
        if run.len() == self.entries.len() { self.live } else { live(run) }
    }
}

/// Binary search that branches: each step needs memory that is seldom in the cache, and the processor
/// fetches ahead along the branch it guesses, which it cannot do through the library's search.
fn search<T>(list: &[T], compare: impl Fn(&T) -> Ordering) -> Result<usize, usize> {
    let (mut low, mut high) = (0, list.len());
    while low < high {
        let middle = low.midpoint(high);
        match compare(&list[middle]) {
            Ordering::Less => low = middle + 1,
            Ordering::Equal => return Ok(middle),
            Ordering::Greater => high = middle,
        }
    }
    Err(low)
}

fn live(entries: &[Entry]) -> u32 {
    entries.iter().map(|entry| u32::from(entry.is_live())).sum()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::super::row;
    use super::*;

    type Model = BTreeMap<Vec<u8>, (i64, bool)>;

    fn entry(key: &[u8], main: i64, live: bool) -> Entry {
        Entry::new(row::encode_tombstone(&mut Vec::new(), key, main), 0, !live)
    }

    fn put(blocks: &mut Blocks, entry: Entry) {
        match blocks.find(entry.key()) {
            Ok(place) => blocks.replace(place, entry),
            Err(place) => blocks.insert(place, entry),
        }
    }

    fn key(number: u32) -> Vec<u8> {
        format!("{number:08}").into_bytes()
    }

    fn check_shape(blocks: &Blocks) {
        let mut total = 0;
        let mut last: &[u8] = &[];
        for block in &blocks.blocks {
            assert!((1..=BLOCK_MAX).contains(&block.entries.len()));
            assert!(block.entries.capacity() <= block.entries.len() + 3 * GROWTH);
            assert_eq!(block.live, live(&block.entries));
            total += u64::from(block.live);
            for entry in &block.entries {
                assert!(entry.key() > last, "keys ascend");
                last = entry.key();
            }
        }
        assert_eq!(total, blocks.live());
    }

    fn compare(blocks: &Blocks, model: &Model, (low, high): (&[u8], &[u8])) {
        let starts = [Bound::Unbounded, Bound::Included(low), Bound::Excluded(low)];
        let ends = [Bound::Unbounded, Bound::Included(high), Bound::Excluded(high)];
        for bounds in starts.iter().flat_map(|start| ends.iter().map(move |end| (*start, *end))) {
            if low == high && matches!(bounds, (Bound::Excluded(_), Bound::Excluded(_))) {
                continue;
            }
            let expected: Vec<_> = model.range::<[u8], _>(bounds).collect();
            let found = blocks.range(bounds).map(|e| (e.key(), e.main(), e.is_live()));
            let wanted = expected.iter().map(|(key, (main, live))| (key.as_slice(), *main, *live));
            assert!(found.eq(wanted), "{bounds:?}");
            let count = expected.iter().filter(|(_, (_, live))| *live).count() as u64;
            assert_eq!(blocks.count(bounds), count);
            assert!(blocks.is_at_most(bounds, count));
            assert!(count == 0 || !blocks.is_at_most(bounds, count - 1));
        }
        assert!(blocks.iter().map(Entry::key).eq(model.keys().map(Vec::as_slice)));
    }

    #[test]
    fn random_changes_leave_what_a_plain_map_holds() {
        for (seed, keys) in [(1_u32, 50), (2, 3_000), (3, 12_000)] {
            let (mut blocks, mut model) = (Blocks::default(), Model::new());
            let mut state = seed;
            let mut random = |below: u32| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 8) % below
            };
            for step in 0..40_000_i64 {
                // Phases of growth and of decline, so that blocks are cut and joined.
                let grows = step / 8_000 % 2 == 0;
                let key = key(random(keys));
                if random(10) < if grows { 8 } else { 2 } {
                    let live = random(4) > 0;
                    put(&mut blocks, entry(&key, step, live));
                    model.insert(key, (step, live));
                } else {
                    let removed = blocks.remove(&key).map(|entry| (entry.main(), entry.is_live()));
                    assert_eq!(removed, model.remove(&key));
                }
                if step % 1_000 == 0 {
                    check_shape(&blocks);
                    let (a, b) = (random(keys + 9), random(keys + 9));
                    compare(&blocks, &model, (&self::key(a.min(b)), &self::key(a.max(b))));
                }
                let probe = self::key(random(keys));
                let found = blocks.get(&probe).map(|entry| (entry.main(), entry.is_live()));
                assert_eq!(found, model.get(&probe).copied());
            }
            for key in model.keys() {
                assert!(blocks.remove(key).is_some());
            }
            assert!(blocks.blocks.is_empty() && blocks.live() == 0);
        }
    }

    #[test]
    fn keys_that_arrive_in_order_fill_their_blocks() {
        let all: Vec<u32> = (0..10_000).collect();
        let runs = (0..10_000).map(|number| number % 10 * 1_000 + number / 10).collect();
        for (order, blocks_max) in [
            (all.clone(), 10_000 / BLOCK_MAX + 1),
            (all.iter().rev().copied().collect(), 10_000 / BLOCK_MAX + 1),
            (runs, 10_000 / BLOCK_MAX * 2),
        ] {
            let mut blocks = Blocks::default();
            for number in order {
                put(&mut blocks, entry(&key(number), 1, true));
            }
            check_shape(&blocks);
            assert_eq!(blocks.iter().count(), 10_000);
            assert!(blocks.blocks.len() <= blocks_max, "{} blocks", blocks.blocks.len());
        }
    }
}
