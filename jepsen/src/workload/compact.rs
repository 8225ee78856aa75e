//! Compaction: the store is compacted to revisions drawn around the newest one while clients read at,
//! below and above them. Refusals are as telling as answers here.

use super::{Board, Script, Turn};
use crate::call::Range;
use crate::history::{Call, Op, Outcome};

pub(crate) const PREFIX: &str = "k/compact/";
const KEYS: u64 = 10;

pub(super) struct Compact;

impl Script for Compact {
    fn draw(&mut self, turn: &mut Turn<'_>) -> Call {
        let Turn { rng, board, value } = turn;
        let key = format!("{PREFIX}{}", rng.below(KEYS));
        match rng.below(100) {
            0..30 => Call::Put { key, value: value.clone() },
            30..38 => Call::Delete { key },
            38..43 => Call::Compact { revision: board.old_revision(rng) },
            // Too old for sure once one was done, and too new for sure.
            43 => Call::Compact { revision: board.compacted.max(1) },
            44 => Call::Compact { revision: board.revision + 10_000 },
            45..60 => Call::Range(Range::prefix(PREFIX)),
            _ => {
                let revision = match rng.below(4) {
                    0 => board.revision + 3 - rng.below(6) as i64,
                    1 => board.revision - rng.below(100) as i64,
                    _ => board.compacted + 2 - rng.below(5) as i64,
                };
                let range = if rng.chance(0.5) { Range::one(&key) } else { Range::prefix(PREFIX) };
                let serializable = rng.chance(0.2);
                Call::Range(Range { revision: revision.max(1), serializable, ..range })
            }
        }
    }

    fn learn(&mut self, op: &Op, board: &mut Board) {
        board.note(op);
        if let (Outcome::Ok, Call::Compact { revision }) = (op.outcome, &op.call) {
            board.compacted = board.compacted.max(*revision);
        }
    }
}
