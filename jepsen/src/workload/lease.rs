//! Leases: granted, used for keys, kept alive for a while, then revoked or left to end by themselves.
//! Keys move from one lease to another, and leases that ended are used again, which must be refused.

use super::{Board, Script, Turn};
use crate::call::{Range, Txn, TxnOp};
use crate::history::{Call, Op, Outcome};

/// Keys on leases begin with this.
const LEASED: &str = "k/lease/";
const KEYS: u64 = 24;

#[derive(Default)]
pub(super) struct Leases {
    /// The lease in use, and one that was left.
    lease: Option<i64>,
    left: Option<i64>,
}

impl Script for Leases {
    fn draw(&mut self, turn: &mut Turn<'_>) -> Call {
        let key = format!("{LEASED}{:02}", turn.rng.below(KEYS));
        if turn.rng.chance(0.3) {
            return match turn.rng.below(3) {
                0 => Call::Get { key, serializable: false },
                1 => Call::Range(Range::prefix(LEASED)),
                _ => Call::Delete { key },
            };
        }
        let Some(lease) = self.lease else {
            return Call::Grant { ttl: 2 + turn.rng.below(3) as i64 };
        };
        match turn.rng.below(100) {
            0..45 => self.attach(turn, &key, lease),
            45..85 => Call::KeepAlive { lease },
            85..92 => Call::TimeToLive { lease },
            92..95 => Call::Revoke { lease },
            _ => {
                // Left alone, it must end by itself.
                self.left = self.lease.take();
                Call::Grant { ttl: 2 + turn.rng.below(3) as i64 }
            }
        }
    }

    fn learn(&mut self, op: &Op, _: &mut Board) {
        match (&op.call, op.outcome) {
            (Call::Grant { .. }, Outcome::Ok) => self.lease = Some(op.detail.lease),
            // Nobody can tell which lease an answer that was lost was about.
            (Call::Grant { .. } | Call::Revoke { .. }, _) => self.lease = None,
            (Call::KeepAlive { lease }, Outcome::Ok) if !op.succeeded => self.forget(*lease),
            (Call::Txn(txn), Outcome::Fail) => {
                txn.puts().into_iter().for_each(|(_, _, lease)| self.forget(lease));
            }
            _ => {}
        }
    }
}

impl Leases {
    /// One or two keys on the lease; sometimes on one that may have ended long ago.
    fn attach(&self, turn: &mut Turn<'_>, key: &str, lease: i64) -> Call {
        let lease = self.left.filter(|_| turn.rng.chance(0.1)).unwrap_or(lease);
        let put = |key: &str, value: String| TxnOp::Put { key: key.to_owned(), value, lease };
        let mut success = vec![put(key, turn.value.clone())];
        let other = format!("{LEASED}{:02}", turn.rng.below(KEYS));
        if other != key && turn.rng.chance(0.5) {
            success.push(put(&other, format!("{}.b", turn.value)));
        }
        Call::Txn(Txn { success, ..Default::default() })
    }

    fn forget(&mut self, lease: i64) {
        self.lease = self.lease.filter(|own| *own != lease);
        self.left = self.left.filter(|own| *own != lease);
    }
}
