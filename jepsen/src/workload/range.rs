//! Ranges: reads of parts of thirty keys with every option that the protocol has, now and at older
//! revisions, and lists read page by page at a fixed revision while the keys change.

use super::{Board, Script, Turn};
use crate::call::{Field, Range};
use crate::history::{Call, Op, Outcome};

const PREFIX: &str = "k/range/";
const KEYS: u64 = 30;

#[derive(Default)]
pub(super) struct Ranges {
    /// The next page of a list: the request and the key it begins at.
    page: Option<Range>,
}

fn key(number: u64) -> String {
    format!("{PREFIX}{number:02}")
}

impl Script for Ranges {
    fn draw(&mut self, turn: &mut Turn<'_>) -> Call {
        if let Some(page) = self.page.take() {
            return Call::Range(page);
        }
        let number = turn.rng.below(KEYS);
        let value = turn.value.clone();
        match turn.rng.below(100) {
            0..25 => Call::Put { key: key(number), value },
            25..33 => {
                let other = key((number + 1 + turn.rng.below(KEYS - 1)) % KEYS);
                let second = (other, format!("{value}.b"));
                Call::PutTwo { first: (key(number), value), second }
            }
            33..45 => Call::Delete { key: key(number) },
            45..55 => {
                let limit = 1 + turn.rng.below(6) as i64;
                Call::Range(Range { limit, ..Range::prefix(PREFIX) })
            }
            _ => Call::Range(draw(turn)),
        }
    }

    fn learn(&mut self, op: &Op, board: &mut Board) {
        board.note(op);
        let Call::Range(asked) = &op.call else { return };
        let paged = asked.limit > 0 && asked.sort.is_none() && asked.modified == (0, 0);
        if op.outcome != Outcome::Ok || !op.detail.more || !paged || asked.created != (0, 0) {
            return;
        }
        let Some(last) = op.rows.last() else { return };
        let revision = if asked.revision > 0 { asked.revision } else { op.revision };
        let key = format!("{}\0", last.key);
        self.page = Some(Range { key, revision, ..asked.clone() });
    }
}

/// A range with options, as they come.
fn draw(turn: &mut Turn<'_>) -> Range {
    let (rng, newest) = (&mut *turn.rng, turn.board.revision);
    let mut range = match rng.below(4) {
        0 => Range::one(&key(rng.below(KEYS))),
        1 => {
            let from = rng.below(KEYS);
            let to = from + 1 + rng.below(KEYS - from);
            Range { key: key(from), end: key(to), ..Range::default() }
        }
        _ => Range::prefix(PREFIX),
    };
    if rng.chance(0.4) {
        // Now and then a revision that nobody has made yet.
        range.revision = (newest - rng.below(100) as i64 + 3).max(1);
    }
    if rng.chance(0.4) {
        range.limit = 1 + rng.below(12) as i64;
    }
    if rng.chance(0.4) {
        let fields = [Field::Key, Field::Version, Field::Create, Field::Mod, Field::Value];
        range.sort = Some((*rng.pick(&fields), rng.chance(0.5)));
    }
    range.serializable = rng.chance(0.3);
    range.keys_only = rng.chance(0.2);
    range.count_only = rng.chance(0.1);
    let bounds = |rng: &mut crate::rng::Rng| {
        let from = (newest - rng.below(200) as i64).max(0);
        (from, if rng.chance(0.5) { from + rng.below(150) as i64 } else { 0 })
    };
    if rng.chance(0.2) {
        range.modified = bounds(rng);
    }
    if rng.chance(0.2) {
        range.created = bounds(rng);
    }
    range
}
