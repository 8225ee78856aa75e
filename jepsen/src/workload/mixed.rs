//! The mixed load: every kind of call on a few keys, drawn without a plan.

use super::{Board, Script, Turn};
use crate::client::PREFIX;
use crate::history::{Call, Op};

pub(super) struct Mixed {
    pub(super) keys: u64,
}

impl Script for Mixed {
    fn draw(&mut self, turn: &mut Turn<'_>) -> Call {
        let Turn { rng, board, value } = turn;
        let number = rng.below(self.keys);
        let key = format!("{PREFIX}{number}");
        let value = value.clone();
        match rng.below(100) {
            0..25 => Call::Put { key, value },
            25..33 => {
                // A transaction may not put one key twice.
                let other = (number + 1 + rng.below(self.keys - 1)) % self.keys;
                let second = format!("{value}.b");
                Call::PutTwo { first: (key, value), second: (format!("{PREFIX}{other}"), second) }
            }
            33..55 => {
                let expect = board.modified(&key);
                Call::Cas { key, expect, value }
            }
            55..61 => Call::Delete { key },
            61..78 => Call::Get { key, serializable: false },
            78..86 => Call::Get { key, serializable: true },
            86..94 => Call::List { serializable: false },
            _ => Call::List { serializable: true },
        }
    }

    fn learn(&mut self, op: &Op, board: &mut Board) {
        board.note(op);
    }
}
