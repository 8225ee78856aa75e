//! Membership as clients see it: one client adds learners that never start, tries to promote them,
//! which must be refused, and removes them, while the others write and list the members.

use super::{Board, Script, Turn};
use crate::client::PREFIX;
use crate::history::{Call, Op, Outcome};

/// A place in the network that no member ever has.
const NOBODY: usize = 99;

pub(super) struct Members {
    pub(super) keys: u64,
    /// Only one client changes the membership: a cluster takes few learners at a time.
    pub(super) admin: bool,
    /// The learner that was added.
    pub(super) learner: Option<u64>,
}

impl Script for Members {
    fn draw(&mut self, turn: &mut Turn<'_>) -> Call {
        let key = format!("{PREFIX}members/{}", turn.rng.below(self.keys));
        match turn.rng.below(100) {
            0..15 if self.admin => match self.learner {
                None => Call::MemberAdd { url: url(turn) },
                Some(id) if turn.rng.chance(0.3) => Call::MemberPromote { id },
                Some(id) => Call::MemberRemove { id },
            },
            0..40 => Call::Put { key, value: turn.value.clone() },
            40..60 => Call::Get { key, serializable: false },
            _ => Call::Members,
        }
    }

    fn learn(&mut self, op: &Op, board: &mut Board) {
        board.note(op);
        match (&op.call, op.outcome) {
            (Call::MemberAdd { .. }, Outcome::Ok) => self.learner = Some(op.detail.id),
            (Call::MemberRemove { .. }, Outcome::Ok | Outcome::Fail) => self.learner = None,
            // A learner whose addition or removal is in doubt shows in a list, if it is there. Those that
            // join as a fault are not this client's.
            (Call::Members, Outcome::Ok) if self.admin => {
                let own = format!("http://{}:", crate::fabric::address(NOBODY));
                let members = &mut op.detail.members.iter();
                let learner = members.find(|row| row.learner && row.url.starts_with(&own));
                self.learner = learner.map(|member| member.id);
            }
            _ => {}
        }
    }
}

/// A place where nobody listens, with a port of its own for each attempt.
fn url(turn: &mut Turn<'_>) -> String {
    turn.board.learners += 1;
    let number = turn.board.learners;
    format!("http://{}:{}", crate::fabric::address(NOBODY), 1024 + number % 60_000)
}
