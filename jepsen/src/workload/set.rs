//! Sets: unique elements are added to one value by compare and put, and read back. Nothing that was
//! acknowledged may ever be missing. A full set is left for a fresh one, so that values stay short.

use super::{Board, Script, Turn};
use crate::history::{Call, Op, Outcome, Row};

/// Keys of sets begin with this.
pub(crate) const SETS: &str = "k/set/";
/// Elements of a set before a new one is begun.
const FULL: usize = 100;

#[derive(Default)]
pub(super) struct Set {
    /// The set as last seen, with its key.
    seen: Option<(String, Option<Row>)>,
}

impl Script for Set {
    fn draw(&mut self, turn: &mut Turn<'_>) -> Call {
        let key = format!("{SETS}{}", turn.board.set);
        let known = self.seen.take().filter(|(seen, _)| *seen == key);
        match known {
            Some((key, row)) if turn.rng.chance(0.8) => {
                let expect = row.as_ref().map_or(0, |row| row.modified);
                let value = match row {
                    Some(row) => format!("{} {}", row.value, turn.value),
                    None => turn.value.clone(),
                };
                Call::Cas { key, expect, value }
            }
            _ => Call::Get { key, serializable: false },
        }
    }

    fn learn(&mut self, op: &Op, board: &mut Board) {
        if op.outcome != Outcome::Ok || op.wrote() {
            return;
        }
        let (Call::Get { key, .. } | Call::Cas { key, .. }) = &op.call else { return };
        let row = op.rows.first().cloned();
        let full = row.as_ref().is_some_and(|row| row.value.split(' ').count() >= FULL);
        if full && *key == format!("{SETS}{}", board.set) {
            board.set += 1;
        }
        self.seen = Some((key.clone(), row));
    }
}
