//! Which watchers want this key: exact keys in a hash map, ranges in a balanced interval tree.
//! It never looks at events or streams; the hub and the catch-up reader put small copyable entries
//! in and ask with one key. On the path of a watch event it stands between feed and queues.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};

use bytes::Bytes;

/// The keys that a watcher asks for, as a range that cannot be empty.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KeyRange {
    start: Bytes,
    end: End,
}

/// Where a range stops.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum End {
    /// Only the start key itself.
    Point,
    /// This key is the first one outside.
    Before(Bytes),
    /// No upper end.
    Open,
}

impl End {
    /// Whether `key`, known to be at or above the start, lies inside.
    fn is_above(&self, key: &[u8]) -> bool {
        match self {
            End::Point => false,
            End::Before(end) => end.as_ref() > key,
            End::Open => true,
        }
    }
}

impl KeyRange {
    /// Reads key and range_end of a watch request. An empty key stands for the smallest key, and
    /// range_end `\0` for no upper end. `None`: the range holds no key.
    pub fn parse(key: &Bytes, range_end: &Bytes) -> Option<KeyRange> {
        let start = if key.is_empty() { Bytes::from_static(&[0]) } else { key.clone() };
        let end = match range_end.as_ref() {
            [] => End::Point,
            [0] => End::Open,
            end if start.as_ref() >= end => return None,
            _ => End::Before(range_end.clone()),
        };
        Some(KeyRange { start, end })
    }

    /// Whether `key` lies in the range.
    pub fn contains(&self, key: &[u8]) -> bool {
        match &self.end {
            End::Point => self.start.as_ref() == key,
            end => self.start.as_ref() <= key && end.is_above(key),
        }
    }
}

/// Entries by the range of keys they are interested in.
///
/// Watchers of one range share one node, so a thousand watchers of one prefix cost one comparison.
/// Asking costs O(log ranges + hits); changes cost O(log ranges + watchers of that range).
pub struct IntervalIndex<T> {
    points: HashMap<Bytes, Vec<T>>,
    tree: Tree<T>,
    len: usize,
}

impl<T: Copy + Ord> IntervalIndex<T> {
    /// An index without entries.
    pub fn new() -> Self {
        IntervalIndex { points: HashMap::new(), tree: Tree::new(), len: 0 }
    }

    /// How many entries there are.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is no entry.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Adds `entry` for `range`; an equal entry of the same range is replaced.
    pub fn insert(&mut self, range: &KeyRange, entry: T) {
        let entries = match range.end {
            End::Point => self.points.entry(range.start.clone()).or_default(),
            _ => self.tree.entries_mut(range),
        };
        match entries.binary_search(&entry) {
            Ok(place) => entries[place] = entry,
            Err(place) => {
                entries.insert(place, entry);
                self.len += 1;
            }
        }
    }

    /// Takes `entry` of `range` out; `false` if it is not there.
    pub fn remove(&mut self, range: &KeyRange, entry: &T) -> bool {
        let is_point = range.end == End::Point;
        let entries = if is_point {
            self.points.get_mut(&range.start)
        } else {
            self.tree.find(range).map(|at| &mut self.tree.nodes[at].entries)
        };
        let Some(entries) = entries else { return false };
        let Ok(place) = entries.binary_search(entry) else { return false };
        entries.remove(place);
        self.len -= 1;
        if entries.is_empty() {
            if is_point {
                self.points.remove(&range.start);
            } else {
                self.tree.remove(range);
            }
        }
        true
    }

    /// Calls `visit` for every entry whose range contains `key`. Within one range the entries come
    /// in their own order.
    pub fn visit(&self, key: &[u8], mut visit: impl FnMut(&T)) {
        if let Some(entries) = self.points.get(key) {
            entries.iter().for_each(&mut visit);
        }
        self.tree.visit(self.tree.root, key, &mut visit);
    }
}

impl<T: Copy + Ord> Default for IntervalIndex<T> {
    fn default() -> Self {
        Self::new()
    }
}

/// A treap over ranges ordered by (start, end), each node knowing the highest end below it. Nodes
/// live in one vector and name each other by index, freed places are used again.
struct Tree<T> {
    nodes: Vec<Node<T>>,
    free: Vec<usize>,
    root: Option<usize>,
    /// Keyed per process, so that no client can choose ranges that make the tree a list.
    random: RandomState,
    drawn: u64,
}

struct Node<T> {
    range: KeyRange,
    highest_end: End,
    /// A parent's priority is at least that of its children; random, hence balanced.
    priority: u64,
    left: Option<usize>,
    right: Option<usize>,
    entries: Vec<T>,
}

impl<T> Tree<T> {
    fn new() -> Self {
        let random = RandomState::new();
        Tree { nodes: Vec::new(), free: Vec::new(), root: None, random, drawn: 0 }
    }

    fn find(&self, range: &KeyRange) -> Option<usize> {
        let mut at = self.root;
        while let Some(index) = at {
            let node = &self.nodes[index];
            at = match range.cmp(&node.range) {
                std::cmp::Ordering::Equal => return Some(index),
                std::cmp::Ordering::Less => node.left,
                std::cmp::Ordering::Greater => node.right,
            };
        }
        None
    }

    /// The entries of `range`, whose node is made if needed.
    fn entries_mut(&mut self, range: &KeyRange) -> &mut Vec<T> {
        let index = match self.find(range) {
            Some(index) => index,
            None => {
                let index = self.make_node(range);
                self.root = Some(self.insert(self.root, index));
                index
            }
        };
        &mut self.nodes[index].entries
    }

    fn make_node(&mut self, range: &KeyRange) -> usize {
        self.drawn += 1;
        let node = Node {
            range: range.clone(),
            highest_end: range.end.clone(),
            priority: self.random.hash_one(self.drawn),
            left: None,
            right: None,
            entries: Vec::new(),
        };
        if let Some(index) = self.free.pop() {
            self.nodes[index] = node;
            return index;
        }
        self.nodes.push(node);
        self.nodes.len() - 1
    }

    /// Puts `node` below `at` and returns the new top of that subtree.
    fn insert(&mut self, at: Option<usize>, node: usize) -> usize {
        let Some(top) = at else { return node };
        let is_left = self.nodes[node].range < self.nodes[top].range;
        if self.nodes[node].priority > self.nodes[top].priority {
            let range = self.nodes[node].range.clone();
            let (left, right) = self.split(Some(top), &range);
            self.nodes[node].left = left;
            self.nodes[node].right = right;
            self.refresh(node);
            return node;
        }
        if is_left {
            let left = self.insert(self.nodes[top].left, node);
            self.nodes[top].left = Some(left);
        } else {
            let right = self.insert(self.nodes[top].right, node);
            self.nodes[top].right = Some(right);
        }
        self.refresh(top);
        top
    }

    /// Cuts the subtree `at` into ranges below and ranges above `range`.
    fn split(&mut self, at: Option<usize>, range: &KeyRange) -> (Option<usize>, Option<usize>) {
        let Some(top) = at else { return (None, None) };
        if self.nodes[top].range < *range {
            let (low, high) = self.split(self.nodes[top].right, range);
            self.nodes[top].right = low;
            self.refresh(top);
            (Some(top), high)
        } else {
            let (low, high) = self.split(self.nodes[top].left, range);
            self.nodes[top].left = high;
            self.refresh(top);
            (low, Some(top))
        }
    }

    /// Joins two subtrees, every range of `low` being below every range of `high`.
    fn merge(&mut self, low: Option<usize>, high: Option<usize>) -> Option<usize> {
        let (Some(left), Some(right)) = (low, high) else { return low.or(high) };
        let top = if self.nodes[left].priority >= self.nodes[right].priority {
            self.nodes[left].right = self.merge(self.nodes[left].right, high);
            left
        } else {
            self.nodes[right].left = self.merge(low, self.nodes[right].left);
            right
        };
        self.refresh(top);
        Some(top)
    }

    fn remove(&mut self, range: &KeyRange) {
        self.root = self.remove_below(self.root, range);
    }

    fn remove_below(&mut self, at: Option<usize>, range: &KeyRange) -> Option<usize> {
        let top = at?;
        match range.cmp(&self.nodes[top].range) {
            std::cmp::Ordering::Less => {
                self.nodes[top].left = self.remove_below(self.nodes[top].left, range);
            }
            std::cmp::Ordering::Greater => {
                self.nodes[top].right = self.remove_below(self.nodes[top].right, range);
            }
            std::cmp::Ordering::Equal => {
                self.free.push(top);
                self.nodes[top].entries = Vec::new();
                return self.merge(self.nodes[top].left, self.nodes[top].right);
            }
        }
        self.refresh(top);
        Some(top)
    }

    /// Computes the highest end of `at` from its own range and its children.
    fn refresh(&mut self, at: usize) {
        let node = &self.nodes[at];
        let below = [node.left, node.right].into_iter().flatten();
        let ends = below.map(|child| &self.nodes[child].highest_end);
        let highest = ends.fold(&node.range.end, |highest, end| highest.max(end)).clone();
        self.nodes[at].highest_end = highest;
    }

    fn visit(&self, at: Option<usize>, key: &[u8], visit: &mut impl FnMut(&T)) {
        let Some(index) = at else { return };
        let node = &self.nodes[index];
        if !node.highest_end.is_above(key) {
            return;
        }
        self.visit(node.left, key, visit);
        if node.range.start.as_ref() <= key {
            if node.range.end.is_above(key) {
                node.entries.iter().for_each(&mut *visit);
            }
            self.visit(node.right, key, visit);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(key: &'static str, end: &'static str) -> KeyRange {
        KeyRange::parse(&Bytes::from(key), &Bytes::from(end)).expect("a test range holds keys")
    }

    fn hits(index: &IntervalIndex<u32>, key: &str) -> Vec<u32> {
        let mut found = Vec::new();
        index.visit(key.as_bytes(), |entry| found.push(*entry));
        found.sort_unstable();
        found
    }

    #[test]
    fn request_fields_become_ranges() {
        assert!(KeyRange::parse(&Bytes::from("b"), &Bytes::from("b")).is_none());
        assert!(KeyRange::parse(&Bytes::from("b"), &Bytes::from("a")).is_none());
        assert!(range("a", "").contains(b"a") && !range("a", "").contains(b"aa"));
        assert!(range("a", "\0").contains(b"zz") && !range("b", "\0").contains(b"a"));
        assert!(range("", "\0").contains(b"\0"));
        assert!(range("", "").contains(b"\0") && !range("", "").contains(b"a"));
        assert!(range("a", "c").contains(b"b") && !range("a", "c").contains(b"c"));
    }

    #[test]
    fn equal_entries_are_kept_once() {
        let mut index = IntervalIndex::new();
        index.insert(&range("a", "c"), 1);
        index.insert(&range("a", "c"), 1);
        assert_eq!(index.len(), 1);
        assert!(!index.remove(&range("a", "b"), &1));
        assert!(index.remove(&range("a", "c"), &1));
        assert!(!index.remove(&range("a", "c"), &1));
        assert!(index.is_empty());
    }

    /// The index answers as a plain list does, under random insertions, removals and questions.
    #[test]
    fn agrees_with_a_list() {
        let mut seed = 0x9e37_79b9_u64;
        let mut draw = |below: u64| {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            seed % below
        };
        let key = |draw: &mut dyn FnMut(u64) -> u64| {
            let len = 1 + draw(3) as usize;
            (0..len).map(|_| (b'a' + draw(4) as u8) as char).collect::<String>()
        };
        let mut index = IntervalIndex::new();
        let mut list: Vec<(KeyRange, u32)> = Vec::new();
        for step in 0..20_000_u32 {
            match draw(5) {
                0 | 1 => {
                    let end = match draw(4) {
                        0 => String::new(),
                        1 => "\0".to_owned(),
                        _ => key(&mut draw),
                    };
                    let start = Bytes::from(key(&mut draw));
                    if let Some(range) = KeyRange::parse(&start, &Bytes::from(end)) {
                        index.insert(&range, step);
                        list.push((range, step));
                    }
                }
                2 if !list.is_empty() && (list.len() > 300 || draw(3) == 0) => {
                    let (range, entry) = list.swap_remove(draw(list.len() as u64) as usize);
                    assert!(index.remove(&range, &entry));
                }
                _ => {
                    let key = key(&mut draw);
                    let inside = list.iter().filter(|(range, _)| range.contains(key.as_bytes()));
                    let mut expected: Vec<u32> = inside.map(|(_, entry)| *entry).collect();
                    expected.sort_unstable();
                    assert_eq!(hits(&index, &key), expected, "step {step}, key {key}");
                }
            }
            assert_eq!(index.len(), list.len());
        }
        for (range, entry) in list.drain(..) {
            assert!(index.remove(&range, &entry));
        }
        assert!(index.is_empty() && index.tree.root.is_none() && index.points.is_empty());
    }

    /// Ten thousand nested and side-by-side ranges stay shallow.
    #[test]
    fn the_tree_stays_balanced() {
        let mut index = IntervalIndex::new();
        for number in 0..10_000_u32 {
            let start = Bytes::from(format!("/registry/{number:05}/"));
            let end = Bytes::from(format!("/registry/{number:05}0"));
            let range = KeyRange::parse(&start, &end).expect("start is below end");
            index.insert(&range, number);
        }
        fn depth(tree: &Tree<u32>, at: Option<usize>) -> usize {
            at.map_or(0, |at| {
                let node = &tree.nodes[at];
                1 + depth(tree, node.left).max(depth(tree, node.right))
            })
        }
        assert!(depth(&index.tree, index.tree.root) < 80);
        assert_eq!(hits(&index, "/registry/04711/pod"), vec![4711]);
    }
}
