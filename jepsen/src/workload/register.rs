//! Registers: puts, reads and compares of single keys. It adds nothing that spans keys, and few
//! clients meet at one key, so that the second judge decides every key.

use super::{Board, Script, Turn};
use crate::client::PREFIX;
use crate::history::{Call, Op};

pub(super) struct Register {
    pub(super) keys: u64,
}

impl Script for Register {
    fn draw(&mut self, turn: &mut Turn<'_>) -> Call {
        let Turn { rng, board, value } = turn;
        let key = format!("{PREFIX}register/{}", rng.below(self.keys));
        let value = value.clone();
        match rng.below(100) {
            0..25 => Call::Put { key, value },
            25..55 => {
                let expect = board.modified(&key);
                Call::Cas { key, expect, value }
            }
            _ => Call::Get { key, serializable: false },
        }
    }

    fn learn(&mut self, op: &Op, board: &mut Board) {
        board.note(op);
    }
}
