//! The bank: money is neither made nor lost. Every answer that shows accounts shows all of them, with
//! the sum that they began with. It asks neither the log nor revisions.

use super::order::name;
use super::{Findings, Rule};
use crate::history::{Call, Op, Outcome, Part, Row};
use crate::workload::{ACCOUNTS, BANK, START, balance};

pub(super) fn check(ops: &[Op], findings: &mut Findings) {
    for op in ops.iter().filter(|op| op.outcome == Outcome::Ok) {
        let rows = match &op.call {
            Call::Range(range) if range.key == BANK && range.is_whole() => &op.rows,
            Call::Txn(_) => match op.detail.parts.first() {
                Some(Part::Range { rows, .. }) if of_bank(rows) => rows,
                _ => continue,
            },
            _ => continue,
        };
        // Nobody has opened the accounts yet.
        if rows.is_empty() {
            continue;
        }
        let sum: i64 = rows.iter().filter_map(|row| balance(&row.value)).sum();
        let (count, expected) = (rows.len() as u64, START * ACCOUNTS as i64);
        if count != ACCOUNTS || sum != expected {
            let proof = format!(
                "{}: {count} accounts with {sum} in all, should be {ACCOUNTS} with {expected}",
                name(op)
            );
            findings.add(Rule::Unbalanced, proof);
        }
    }
}

fn of_bank(rows: &[Row]) -> bool {
    rows.first().is_some_and(|row| row.key.starts_with(BANK))
}
