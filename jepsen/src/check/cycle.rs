//! Cycles among transactions: a graph of who must come before whom, its strongly connected parts, and
//! a short cycle in each with the name of the anomaly. It knows nothing of lists.

use std::collections::{BTreeMap, VecDeque};

use super::Rule;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kind {
    WriteWrite,
    WriteRead,
    ReadWrite,
    Time,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Edge {
    pub(super) from: usize,
    pub(super) to: usize,
    pub(super) kind: Kind,
}

/// A cycle and what it breaks.
pub(super) struct Cycle {
    pub(super) rule: Rule,
    pub(super) edges: Vec<Edge>,
}

/// Nodes up to `count` are transactions; those behind are moments, which keep the edges of time few.
pub(super) struct Graph {
    count: usize,
    edges: Vec<Vec<(usize, Kind)>>,
}

/// Edges without a read that missed something, from which one search may start.
const TRIES: usize = 1000;

impl Graph {
    pub(super) fn new(count: usize) -> Self {
        Self { count, edges: vec![Vec::new(); count] }
    }

    pub(super) fn add(&mut self, from: usize, to: usize, kind: Kind) {
        if from != to {
            self.edges[from].push((to, kind));
        }
    }

    /// Adds real time: what ended comes before what starts later. Takes start and, if known, end of
    /// each transaction.
    pub(super) fn add_time(&mut self, times: impl Iterator<Item = (u64, Option<u64>)>) {
        let mut moments: Vec<(u64, bool, usize)> = Vec::new();
        for (node, (start, end)) in times.enumerate() {
            // Starts before ends of the same moment: such transactions overlap.
            moments.push((start, false, node));
            moments.extend(end.map(|end| (end, true, node)));
        }
        moments.sort_unstable();
        let mut last = None;
        for (_, is_end, node) in moments {
            if is_end {
                let moment = self.edges.len();
                self.edges.push(Vec::new());
                self.add(node, moment, Kind::Time);
                if let Some(before) = last.replace(moment) {
                    self.add(before, moment, Kind::Time);
                }
            } else if let Some(before) = last {
                self.add(before, node, Kind::Time);
            }
        }
    }

    /// One cycle per tangle, the gravest kind that there is; none for a graph that can be ordered.
    pub(super) fn cycles(&self) -> Vec<Cycle> {
        use Kind::{ReadWrite, Time, WriteRead, WriteWrite};
        let layers: [(&[Kind], Rule); 4] = [
            (&[WriteWrite], Rule::CycleG0),
            (&[WriteWrite, WriteRead], Rule::CycleG1c),
            (&[WriteWrite, WriteRead, ReadWrite], Rule::CycleG2),
            (&[WriteWrite, WriteRead, ReadWrite, Time], Rule::CycleTime),
        ];
        for (kinds, rule) in layers {
            let tangles = self.tangles(kinds);
            if !tangles.is_empty() {
                return tangles.iter().map(|tangle| self.cycle(tangle, kinds, rule)).collect();
            }
        }
        Vec::new()
    }

    fn next(&self, node: usize, kinds: &[Kind]) -> impl Iterator<Item = (usize, Kind)> {
        self.edges[node].iter().copied().filter(move |(_, kind)| kinds.contains(kind))
    }

    /// Strongly connected parts of more than one node (Tarjan's algorithm with a stack of its own).
    fn tangles(&self, kinds: &[Kind]) -> Vec<Vec<usize>> {
        let size = self.edges.len();
        let (mut order, mut low) = (vec![usize::MAX; size], vec![0; size]);
        let mut on_stack = vec![false; size];
        let (mut stack, mut tangles, mut clock) = (Vec::new(), Vec::new(), 0);
        for root in 0..size {
            if order[root] != usize::MAX {
                continue;
            }
            let mut work: Vec<(usize, usize)> = vec![(root, 0)];
            while let Some((node, at)) = work.pop() {
                if at == 0 {
                    (order[node], low[node]) = (clock, clock);
                    clock += 1;
                    stack.push(node);
                    on_stack[node] = true;
                }
                let next = self.edges[node].iter().enumerate().skip(at);
                let mut next = next.filter(|(_, (_, kind))| kinds.contains(kind));
                let child = next.find(|(_, (to, _))| {
                    if on_stack[*to] {
                        low[node] = low[node].min(order[*to]);
                    }
                    order[*to] == usize::MAX
                });
                if let Some((at, (to, _))) = child {
                    work.extend([(node, at + 1), (*to, 0)]);
                    continue;
                }
                if low[node] == order[node] {
                    let from = stack.iter().rposition(|other| *other == node).unwrap_or(0);
                    let tangle = stack.split_off(from);
                    tangle.iter().for_each(|other| on_stack[*other] = false);
                    if tangle.len() > 1 {
                        tangles.push(tangle);
                    }
                }
                if let Some((parent, _)) = work.last() {
                    low[*parent] = low[*parent].min(low[node]);
                }
            }
        }
        tangles
    }

    /// A short cycle in a tangle. One with a single read that missed something has a name of its own.
    fn cycle(&self, tangle: &[usize], kinds: &[Kind], rule: Rule) -> Cycle {
        let inside: BTreeMap<usize, ()> = tangle.iter().map(|node| (*node, ())).collect();
        let within = |(from, to, kind): (usize, usize, Kind)| {
            inside.contains_key(&to).then_some(Edge { from, to, kind })
        };
        let all = |node: &usize| {
            let from = *node;
            self.next(from, kinds).filter_map(move |(to, kind)| within((from, to, kind)))
        };
        let missed = |edge: &Edge| edge.kind == Kind::ReadWrite;
        let single: Vec<Kind> = kinds.iter().copied().filter(|k| *k != Kind::ReadWrite).collect();
        for edge in tangle.iter().flat_map(all).filter(missed).take(TRIES) {
            if let Some(path) = self.path(edge.to, edge.from, &single, &inside) {
                let rule = if rule == Rule::CycleG2 { Rule::CycleGSingle } else { rule };
                return Cycle { rule, edges: [vec![edge], path].concat() };
            }
        }
        let first = tangle.iter().find(|node| **node < self.count).unwrap_or(&tangle[0]);
        let edges = all(first).find_map(|edge| {
            let path = self.path(edge.to, edge.from, kinds, &inside)?;
            Some([vec![edge], path].concat())
        });
        Cycle { rule, edges: edges.unwrap_or_default() }
    }

    fn path(
        &self,
        from: usize,
        to: usize,
        kinds: &[Kind],
        inside: &BTreeMap<usize, ()>,
    ) -> Option<Vec<Edge>> {
        let mut came: BTreeMap<usize, Edge> = BTreeMap::new();
        let mut queue = VecDeque::from([from]);
        while let Some(node) = queue.pop_front() {
            if node == to {
                let mut edges = Vec::new();
                let mut at = to;
                while at != from {
                    let edge = came.get(&at)?;
                    edges.push(*edge);
                    at = edge.from;
                }
                edges.reverse();
                return Some(edges);
            }
            for (next, kind) in self.next(node, kinds) {
                if inside.contains_key(&next) && next != from && !came.contains_key(&next) {
                    came.insert(next, Edge { from: node, to: next, kind });
                    queue.push_back(next);
                }
            }
        }
        None
    }
}
