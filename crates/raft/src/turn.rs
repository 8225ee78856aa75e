//! Whose turn it is to bring this member a state. There is room for one transfer, and the newest goes
//! before: a sender that lost its power or its network says no more, and its half transfer must not
//! keep out the next leader's. It never looks at what is transferred. On the receiving side of
//! `snapshot`.

use std::sync::Arc;

use kelson_storage::sabotage::{self, Variant};
use tokio::sync::{Mutex, OwnedMutexGuard, watch};
use tonic::Status;

use crate::types::Vote;

/// The transfers to this member. Clones share them.
#[derive(Clone)]
pub(crate) struct Turns {
    /// The leader that sends the newest, and how many there have been.
    newest: watch::Sender<(Option<Vote>, u64)>,
    room: Arc<Mutex<()>>,
}

/// Until it is dropped no other transfer begins.
pub(crate) struct Room {
    _held: OwnedMutexGuard<()>,
}

/// One transfer.
pub(crate) struct Turn {
    number: u64,
    newest: watch::Receiver<(Option<Vote>, u64)>,
}

impl Turns {
    pub(crate) fn new() -> Turns {
        Turns { newest: watch::Sender::new((None, 0)), room: Arc::default() }
    }

    /// Ends the transfer before, and waits until that has let go of its files.
    ///
    /// # Errors
    /// `Aborted`: a later leader has sent since, or a newer transfer has come while this one waited.
    ///
    /// # Cancel safety
    /// Safe; the transfer before ends all the same.
    pub(crate) async fn take(&self, leader: Vote) -> Result<(Turn, Room), Status> {
        let mut newest = self.newest.subscribe();
        if sabotage::is(Variant::FormerTransferStays) {
            let held = self.room.clone().try_lock_owned();
            let held = held.map_err(|_| Status::aborted("a transfer is under way"))?;
            return Ok((Turn { number: 0, newest }, Room { _held: held }));
        }
        let mut number = None;
        self.newest.send_if_modified(|(known, count)| {
            // A deposed leader must not end what its successor sends.
            if known.is_some_and(|known| leader < known) {
                return false;
            }
            (*known, *count) = (Some(leader), *count + 1);
            number = Some(*count);
            true
        });
        let number = number.ok_or_else(|| Status::aborted("a later leader has sent its state"))?;
        newest.mark_unchanged();
        let mut turn = Turn { number, newest };
        let held = tokio::select! {
            biased;
            ended = turn.ended() => return Err(ended),
            held = self.room.clone().lock_owned() => held,
        };
        Ok((turn, Room { _held: held }))
    }
}

impl Turn {
    /// Waits until a newer transfer has come, and says so.
    ///
    /// # Cancel safety
    /// Safe.
    pub(crate) async fn ended(&mut self) -> Status {
        let number = self.number;
        // The sending half lives as long as the member; without it there is nothing to go on for.
        drop(self.newest.wait_for(|(_, newest)| *newest != number).await);
        Status::aborted("a newer transfer of the state has begun")
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    fn vote(term: u64) -> Vote {
        Vote::new_committed(term, term)
    }

    #[tokio::test]
    async fn the_newest_goes_before_and_waits_for_the_room() {
        let turns = Turns::new();
        let (mut first, room) = turns.take(vote(2)).await.expect("nobody else is there");
        assert!(first.ended().now_or_never().is_none());

        let mut second = Box::pin(turns.take(vote(2)));
        assert!(second.as_mut().now_or_never().is_none(), "the first still has its files");
        assert!(first.ended().now_or_never().is_some(), "the first was not told");

        let mut third = Box::pin(turns.take(vote(3)));
        assert!(third.as_mut().now_or_never().is_none());
        assert!(second.await.is_err(), "it came before the third");
        drop(room);
        let (mut third, _room) = third.await.expect("its turn");
        assert!(third.ended().now_or_never().is_none());
    }

    #[tokio::test]
    async fn a_deposed_leader_ends_nothing() {
        let turns = Turns::new();
        let (mut turn, _room) = turns.take(vote(3)).await.expect("nobody else is there");
        assert!(turns.take(vote(2)).await.is_err());
        assert!(turn.ended().now_or_never().is_none());
    }
}
