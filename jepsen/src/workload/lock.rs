//! A lock made of a lease and a key. Effects that compare the lock's create revision (a fence) must
//! exclude each other for ever; effects that only trust the holder's belief are known to overlap when
//! a holder sleeps, and are counted, not judged.

use super::{Board, Script, Turn};
use crate::call::{Compare, Is, Operand, Txn, TxnOp};
use crate::history::{Call, Op, Outcome};

pub(crate) const LOCK: &str = "k/lock";
/// Values are the fence, a blank and a unique rest.
pub(crate) const FENCED: &str = "k/fenced";
pub(crate) const PLAIN: &str = "k/plain";
/// Seconds; short, so that sleeping holders lose it within a run.
const TTL: i64 = 2;

#[derive(Default)]
pub(super) struct Lock {
    lease: Option<i64>,
    /// Create revision of the lock when this client got it.
    fence: Option<i64>,
    /// Turns left in which a holder does nothing, not even for its lease.
    asleep: u64,
    woke: bool,
}

/// The fence in the value of an effect.
pub(crate) fn fence(value: &str) -> Option<i64> {
    value.split(' ').next()?.parse().ok()
}

impl Script for Lock {
    fn draw(&mut self, turn: &mut Turn<'_>) -> Call {
        if self.asleep > 0 {
            self.asleep -= 1;
            self.woke = self.asleep == 0;
            return Call::Get { key: FENCED.into(), serializable: false };
        }
        let Some(lease) = self.lease else { return Call::Grant { ttl: TTL } };
        let Some(fence) = self.fence else { return self.acquire(turn, lease) };
        if std::mem::take(&mut self.woke) {
            // What it was about to do when it fell asleep.
            return Call::Put { key: PLAIN.into(), value: format!("{fence} {}", turn.value) };
        }
        let mine = Compare::one(LOCK, Is::Equal, Operand::Create(fence));
        match turn.rng.below(100) {
            0..45 => Call::Txn(Txn {
                compare: vec![mine],
                success: vec![TxnOp::put(FENCED, &format!("{fence} {}", turn.value))],
                failure: vec![TxnOp::get(LOCK)],
            }),
            45..65 => Call::Put { key: PLAIN.into(), value: format!("{fence} {}", turn.value) },
            65..90 => Call::KeepAlive { lease },
            90..95 => Call::Txn(Txn {
                compare: vec![mine],
                success: vec![TxnOp::delete(LOCK)],
                failure: vec![TxnOp::get(LOCK)],
            }),
            95..98 => Call::Revoke { lease },
            _ => {
                // Long enough to lose the lock at the usual rate of 30 turns a second.
                self.asleep = 90;
                Call::Get { key: LOCK.into(), serializable: false }
            }
        }
    }

    fn learn(&mut self, op: &Op, _: &mut Board) {
        match &op.call {
            Call::Grant { .. } if op.outcome == Outcome::Ok => self.lease = Some(op.detail.lease),
            Call::Revoke { .. } => *self = Self::default(),
            Call::KeepAlive { .. } if op.outcome == Outcome::Ok && !op.succeeded => {
                // The lease is gone; the holder's next effect will tell it about the lock.
                self.lease = None;
            }
            Call::Txn(txn) if txn.puts().iter().any(|(key, ..)| *key == LOCK) => {
                self.fence = Some(op.revision).filter(|_| op.wrote());
                if op.outcome != Outcome::Ok {
                    self.lease = None;
                }
            }
            Call::Txn(txn) => {
                let released = op.succeeded && !txn.deletes().is_empty();
                if released || op.outcome != Outcome::Ok || !op.succeeded {
                    self.fence = None;
                }
            }
            _ => {}
        }
    }
}

impl Lock {
    fn acquire(&self, turn: &mut Turn<'_>, lease: i64) -> Call {
        if turn.rng.chance(0.3) {
            return Call::KeepAlive { lease };
        }
        let put = TxnOp::Put { key: LOCK.into(), value: turn.value.clone(), lease };
        Call::Txn(Txn {
            compare: vec![Compare::one(LOCK, Is::Equal, Operand::Create(0))],
            success: vec![put],
            failure: vec![TxnOp::get(LOCK)],
        })
    }
}
