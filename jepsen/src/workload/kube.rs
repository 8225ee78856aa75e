//! What kube-apiserver does: objects created, updated and deleted under a guard of their mod revision,
//! lists in pages at the revision of the first, and compaction agreed on through a key. The caches
//! that watch beside it are in `cache.rs`.

use super::{Board, Script, Turn};
use crate::call::{Compare, Is, Operand, Range, Txn, TxnOp};
use crate::history::{Call, Op, Outcome, Row};

/// Keys of objects begin with this.
pub(crate) const REGISTRY: &str = "k/registry/pods/";
const NAMESPACES: u64 = 3;
const NAMES: u64 = 8;
const COMPACT: &str = "k/compact_rev_key";
/// Objects per page.
pub(crate) const PAGE: i64 = 5;

#[derive(Default)]
pub(super) struct Kube {
    /// The object in hand, as last seen.
    object: Option<Row>,
    page: Option<Range>,
    rounds: Rounds,
}

/// What a compactor remembers between its rounds.
#[derive(Default)]
struct Rounds {
    /// Version of the key that the next round expects.
    version: i64,
    /// Revision of the last round, which the next one compacts to.
    revision: i64,
    /// This round was won: compact to here.
    due: Option<i64>,
}

impl Script for Kube {
    fn draw(&mut self, turn: &mut Turn<'_>) -> Call {
        if let Some(revision) = self.rounds.due.take().filter(|revision| *revision > 0) {
            // Nothing that no watcher has shown yet may go.
            return Call::Compact { revision: revision.min(turn.board.watched.max(1)) };
        }
        if let Some(page) = self.page.take() {
            return Call::Range(page);
        }
        if let Some(row) = self.object.take() {
            return if turn.rng.chance(0.75) {
                guarded(&row.key, row.modified, TxnOp::put(&row.key, &turn.value))
            } else {
                guarded(&row.key, row.modified, TxnOp::delete(&row.key))
            };
        }
        let (space, name) = (turn.rng.below(NAMESPACES), turn.rng.below(NAMES));
        let key = format!("{REGISTRY}{space}/{name}");
        match turn.rng.below(100) {
            0..30 => Call::Txn(Txn {
                compare: vec![Compare::one(&key, Is::Equal, Operand::Mod(0))],
                success: vec![TxnOp::put(&key, &turn.value)],
                failure: Vec::new(),
            }),
            30..80 => Call::Range(Range { limit: 1, ..Range::one(&key) }),
            80..92 => Call::Range(Range { limit: PAGE, ..Range::prefix(REGISTRY) }),
            92..97 => Call::Range(Range { count_only: true, ..Range::prefix(REGISTRY) }),
            97 => self.rounds.next(turn),
            _ => {
                let space = format!("{REGISTRY}{space}/");
                Call::Range(Range { limit: PAGE, ..Range::prefix(&space) })
            }
        }
    }

    fn learn(&mut self, op: &Op, board: &mut Board) {
        board.note(op);
        if op.outcome != Outcome::Ok {
            return;
        }
        match &op.call {
            Call::Compact { revision } => board.compacted = board.compacted.max(*revision),
            Call::Txn(txn) if txn.compare.iter().any(|compare| compare.key == COMPACT) => {
                self.rounds.learn(op);
            }
            // A lost race: again with what the answer shows, which is a new operation.
            Call::Txn(_) if !op.succeeded => self.object = op.shown().first().copied().cloned(),
            Call::Range(asked) if asked.end.is_empty() => self.object = op.rows.first().cloned(),
            Call::Range(asked) => self.page = next_page(asked, op),
            _ => {}
        }
    }
}

/// One step under a guard; without it, the object as it is.
fn guarded(key: &str, modified: i64, step: TxnOp) -> Call {
    Call::Txn(Txn {
        compare: vec![Compare::one(key, Is::Equal, Operand::Mod(modified))],
        success: vec![step],
        failure: vec![TxnOp::get(key)],
    })
}

/// The page behind this one, if its count says that there is more.
pub(crate) fn next_page(asked: &Range, op: &Op) -> Option<Range> {
    let last = op.rows.last().filter(|_| op.detail.count > op.rows.len() as i64)?;
    let revision = if asked.revision > 0 { asked.revision } else { op.revision };
    Some(Range { key: format!("{}\0", last.key), revision, ..asked.clone() })
}

impl Rounds {
    fn next(&self, turn: &Turn<'_>) -> Call {
        let value = format!("{} {}", self.revision, turn.value);
        Call::Txn(Txn {
            compare: vec![Compare::one(COMPACT, Is::Equal, Operand::Version(self.version))],
            success: vec![TxnOp::put(COMPACT, &value)],
            failure: vec![TxnOp::get(COMPACT)],
        })
    }

    fn learn(&mut self, op: &Op) {
        if op.succeeded {
            self.due = Some(self.revision);
            self.version += 1;
        } else if let Some(row) = op.shown().first() {
            self.version = row.version;
        }
        self.revision = op.revision;
    }
}
