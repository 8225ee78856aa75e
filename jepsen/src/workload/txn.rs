//! Transactions: money moves between accounts whose sum must never change, and transactions of many
//! steps, with deletes of ranges and transactions inside, do whatever the protocol allows.

use super::{Board, Script, Turn};
use crate::call::{Compare, Is, Operand, Range, Txn, TxnOp};
use crate::history::{Call, Op, Outcome, Row};

/// Keys of accounts begin with this. Their values are the balance, a blank and a unique rest.
pub(crate) const BANK: &str = "k/bank/";
pub(crate) const ACCOUNTS: u64 = 6;
/// Balance of each account at the start.
pub(crate) const START: i64 = 100;

const PREFIX: &str = "k/txn/";
const KEYS: u64 = 8;

#[derive(Default)]
pub(super) struct Txns {
    /// The accounts as last seen.
    accounts: Vec<Row>,
}

/// The balance that an account's value tells.
pub(crate) fn balance(value: &str) -> Option<i64> {
    value.split(' ').next()?.parse().ok()
}

fn account(number: u64) -> String {
    format!("{BANK}{number}")
}

fn key(number: u64) -> String {
    format!("{PREFIX}{number}")
}

impl Script for Txns {
    fn draw(&mut self, turn: &mut Turn<'_>) -> Call {
        match turn.rng.below(100) {
            0..35 if self.accounts.len() as u64 == ACCOUNTS => self.transfer(turn),
            0..35 => found(turn),
            35..55 => {
                let serializable = turn.rng.chance(0.3);
                Call::Range(Range { serializable, ..Range::prefix(BANK) })
            }
            _ => Call::Txn(draw(turn)),
        }
    }

    fn learn(&mut self, op: &Op, board: &mut Board) {
        board.note(op);
        if op.outcome != Outcome::Ok || op.wrote() {
            return;
        }
        let accounts = |row: &&Row| row.key.starts_with(BANK);
        let seen: Vec<Row> = op.shown().into_iter().filter(accounts).cloned().collect();
        if !seen.is_empty() {
            self.accounts = seen;
        }
    }
}

/// Opens all accounts, if nobody has.
fn found(turn: &Turn<'_>) -> Call {
    let open = |number| TxnOp::put(&account(number), &format!("{START} {}.{number}", turn.value));
    Call::Txn(Txn {
        compare: vec![Compare::one(&account(0), Is::Equal, Operand::Create(0))],
        success: (0..ACCOUNTS).map(open).collect(),
        failure: vec![TxnOp::Range(Range::prefix(BANK))],
    })
}

impl Txns {
    fn transfer(&self, turn: &mut Turn<'_>) -> Call {
        let from = turn.rng.below(ACCOUNTS) as usize;
        let to = (from + 1 + turn.rng.below(ACCOUNTS - 1) as usize) % ACCOUNTS as usize;
        let (from, to) = (&self.accounts[from], &self.accounts[to]);
        let held = balance(&from.value).unwrap_or(0);
        let amount = turn.rng.below(1 + held.clamp(0, 20) as u64) as i64;
        let same = |row: &Row| Compare::one(&row.key, Is::Equal, Operand::Mod(row.modified));
        let now = |row: &Row, change: i64, mark: &str| {
            let balance = balance(&row.value).unwrap_or(0) + change;
            TxnOp::put(&row.key, &format!("{balance} {}.{mark}", turn.value))
        };
        Call::Txn(Txn {
            compare: vec![same(from), same(to)],
            success: vec![now(from, -amount, "a"), now(to, amount, "b")],
            failure: vec![TxnOp::Range(Range::prefix(BANK))],
        })
    }
}

/// A transaction of anything that fits together.
fn draw(turn: &mut Turn<'_>) -> Txn {
    let compare = (0..turn.rng.below(3)).map(|_| draw_compare(turn)).collect();
    let success = branch(turn, "s");
    let failure = branch(turn, "f");
    Txn { compare, success, failure }
}

fn draw_compare(turn: &mut Turn<'_>) -> Compare {
    let key = key(turn.rng.below(KEYS));
    let modified = turn.board.modified(&key);
    let to = match turn.rng.below(5) {
        0 => Operand::Version(turn.rng.below(3) as i64),
        1 => Operand::Create(modified),
        2 => Operand::Lease(0),
        3 => Operand::Value(turn.value.clone()),
        _ => Operand::Mod(modified),
    };
    let is = *turn.rng.pick(&[Is::Equal, Is::Equal, Is::Unequal, Is::Greater, Is::Less]);
    let end = if turn.rng.chance(0.15) { crate::call::end_of(PREFIX) } else { String::new() };
    Compare { key, end, is, to }
}

/// Steps of which no two put one key, and none puts what another deletes: that is refused.
fn branch(turn: &mut Turn<'_>, mark: &str) -> Vec<TxnOp> {
    let mut steps = Vec::new();
    let mut free: Vec<u64> = (0..KEYS).collect();
    let deletes = turn.rng.chance(0.35);
    if deletes {
        let from = turn.rng.below(KEYS - 1);
        let to = from + 1 + turn.rng.below(3.min(KEYS - 1 - from));
        free.retain(|number| !(from..to).contains(number));
        steps.push(TxnOp::Delete { key: key(from), end: key(to) });
    }
    for number in 0..1 + turn.rng.below(3) {
        let value = format!("{}.{mark}{number}", turn.value);
        match turn.rng.below(10) {
            0..5 => steps.push(TxnOp::put(&key(take(turn, &mut free)), &value)),
            5..8 => steps.push(TxnOp::Range(Range::prefix(PREFIX))),
            _ => {
                let outer = draw_compare(turn);
                steps.push(TxnOp::Txn(Txn {
                    compare: vec![outer],
                    success: vec![
                        TxnOp::put(&key(take(turn, &mut free)), &format!("{value}.t")),
                        TxnOp::Range(Range { limit: 3, ..Range::prefix(PREFIX) }),
                    ],
                    failure: vec![TxnOp::get(&key(turn.rng.below(KEYS)))],
                }));
            }
        }
    }
    if deletes {
        // Deletes leave no value, so a put tells whose they were.
        steps.push(TxnOp::put(&key(take(turn, &mut free)), &format!("{}.{mark}", turn.value)));
    }
    steps
}

/// Takes one of the keys that the branch has not touched.
fn take(turn: &mut Turn<'_>, free: &mut Vec<u64>) -> u64 {
    free.swap_remove(turn.rng.below(free.len() as u64) as usize)
}
