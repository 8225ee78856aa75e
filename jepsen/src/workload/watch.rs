//! Load for watchers: keys in three groups are put, deleted and created again, some revisions carry
//! many events, and a few are so large that an answer with them must be cut where that was asked
//! for. What is watched is drawn in `sidewatch.rs`.

use super::{Board, Script, Turn};
use crate::call::{Range, Txn, TxnOp};
use crate::history::{Call, Op};
use crate::rng::Rng;
use crate::wire::long_value;

pub(crate) const PREFIX: &str = "k/watch/";
const GROUPS: u64 = 3;
const KEYS: u64 = 4;
/// With their previous values these make 1.6 MB in one revision, more than what a member sends at once
/// where its requests are limited as `Workload::flags` says.
const LARGE: u64 = 20;
const LARGE_VALUE: usize = 40_000;

pub(super) struct Watch;

pub(crate) fn key(rng: &mut Rng) -> String {
    format!("{PREFIX}{}/{}", rng.below(GROUPS), rng.below(KEYS))
}

/// All keys, one group of them, or the large ones.
pub(crate) fn group(rng: &mut Rng) -> Range {
    match rng.below(5) {
        0 | 1 => Range::prefix(PREFIX),
        2 => Range::prefix(&format!("{PREFIX}large/")),
        _ => Range::prefix(&format!("{PREFIX}{}/", rng.below(GROUPS))),
    }
}

impl Script for Watch {
    fn draw(&mut self, turn: &mut Turn<'_>) -> Call {
        let (key, other) = (key(turn.rng), key(turn.rng));
        let value = turn.value.clone();
        match turn.rng.below(1000) {
            0..350 => Call::Put { key, value },
            350..450 if key != other => {
                let second = format!("{value}.b");
                Call::PutTwo { first: (key, value), second: (other, second) }
            }
            450..650 => Call::Delete { key },
            650..652 => large(&value),
            652..700 => clear(turn, &value),
            _ => Call::Get { key, serializable: turn.rng.chance(0.3) },
        }
    }

    fn learn(&mut self, op: &Op, board: &mut Board) {
        board.note(op);
    }
}

fn large(value: &str) -> Call {
    let put = |number| {
        let value = long_value(&format!("{value}.{number}"), LARGE_VALUE);
        TxnOp::put(&format!("{PREFIX}large/{number:02}"), &value)
    };
    Call::Txn(Txn { success: (0..LARGE).map(put).collect(), ..Default::default() })
}

/// Deletes a whole group in one revision, with a put that tells whose deletes they are.
fn clear(turn: &mut Turn<'_>, value: &str) -> Call {
    let group = Range::prefix(&format!("{PREFIX}{}/", turn.rng.below(GROUPS)));
    let success = vec![
        TxnOp::Delete { key: group.key, end: group.end },
        TxnOp::put(&format!("{PREFIX}cleared"), value),
    ];
    Call::Txn(Txn { success, ..Default::default() })
}
