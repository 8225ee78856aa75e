//! Lists: transactions of one to four steps, each a read of a list or an append to one. All lists of a
//! transaction are read first, in one transaction of the store; then all appends are written if
//! nothing that was read has changed. Lists are left when they are long.

use std::collections::BTreeMap;

use super::{Board, Script, Turn};
use crate::call::{Compare, Is, Operand, Txn, TxnOp};
use crate::history::{Call, ListTxn, Mop, Note, Op, Outcome};

/// Keys of lists begin with this.
const LISTS: &str = "k/list/";
/// Lists in use at a time.
const LIVE: u64 = 3;
/// Elements of a list before another takes its place.
const LONG: usize = 32;

/// A transaction under way.
#[derive(Default)]
pub(super) struct Append {
    mops: Vec<Mop>,
    start: u64,
    /// Lists as the read phase saw them, with their mod revisions.
    seen: Option<BTreeMap<String, (i64, Vec<String>)>>,
}

impl Script for Append {
    fn draw(&mut self, turn: &mut Turn<'_>) -> Call {
        if let Some(seen) = &self.seen {
            return write(seen, &self.mops);
        }
        while (turn.board.lists.len() as u64) < LIVE {
            turn.board.lists_made += 1;
            let key = format!("{LISTS}{}", turn.board.lists_made);
            turn.board.lists.push(key);
        }
        let mop = |number: u64, turn: &mut Turn<'_>| Mop {
            key: turn.rng.pick(&turn.board.lists).clone(),
            append: turn.rng.chance(0.5).then(|| format!("{}.{number}", turn.value)),
            read: None,
        };
        self.mops = (0..1 + turn.rng.below(4)).map(|number| mop(number, turn)).collect();
        let keys: BTreeMap<&str, ()> = self.mops.iter().map(|mop| (mop.key.as_str(), ())).collect();
        let success = keys.into_keys().map(TxnOp::get).collect();
        Call::Txn(Txn { success, ..Default::default() })
    }

    fn learn(&mut self, op: &Op, board: &mut Board) {
        if self.seen.take().is_some() {
            return self.end(op, board);
        }
        if op.outcome != Outcome::Ok {
            return;
        }
        let mut lists: BTreeMap<String, (i64, Vec<String>)> =
            self.mops.iter().map(|mop| (mop.key.clone(), (0, Vec::new()))).collect();
        for row in op.shown() {
            let elements = row.value.split(' ').map(str::to_owned).collect();
            lists.insert(row.key.clone(), (row.modified, elements));
        }
        board.lists.retain(|key| lists.get(key).is_none_or(|(_, list)| list.len() < LONG));
        self.start = op.start;
        let mut now = lists.clone();
        for mop in &mut self.mops {
            let Some((_, list)) = now.get_mut(&mop.key) else { continue };
            match &mop.append {
                Some(element) => list.push(element.clone()),
                None => mop.read = Some(list.clone()),
            }
        }
        if self.mops.iter().all(|mop| mop.append.is_none()) {
            return self.end(op, board);
        }
        self.seen = Some(lists);
    }
}

impl Append {
    /// The transaction is over; `op` was its last part.
    fn end(&mut self, op: &Op, board: &mut Board) {
        let writes = self.mops.iter().any(|mop| mop.append.is_some());
        let outcome = match op.outcome {
            // What was read has changed meanwhile.
            Outcome::Ok if writes && !op.succeeded => Outcome::Fail,
            outcome => outcome,
        };
        let mops = std::mem::take(&mut self.mops);
        let Op { process, end, .. } = *op;
        let start = self.start;
        board.notes.push(Note::Lists(ListTxn { process, start, end, outcome, mops }));
    }
}

fn write(seen: &BTreeMap<String, (i64, Vec<String>)>, mops: &[Mop]) -> Call {
    let unchanged = |(key, (modified, _)): (&String, &(i64, Vec<String>))| {
        Compare::one(key, Is::Equal, Operand::Mod(*modified))
    };
    let mut lists: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for mop in mops {
        let Some(element) = &mop.append else { continue };
        let old = seen.get(&mop.key).map_or(&[][..], |(_, list)| list);
        let list = lists.entry(&mop.key).or_insert_with(|| old.iter().map(|e| &e[..]).collect());
        list.push(element);
    }
    Call::Txn(Txn {
        compare: seen.iter().map(unchanged).collect(),
        success: lists.into_iter().map(|(key, list)| TxnOp::put(key, &list.join(" "))).collect(),
        failure: Vec::new(),
    })
}
