//! Callers that wait for the result of their command, by request id. Filled by the proposer,
//! emptied by the local apply; whoever stops waiting takes itself out. Never blocks but for a short
//! lock, and never does I/O.

use std::collections::BTreeMap;
use std::time::Instant;

use kelson_api::Error;
use kelson_storage::Outcome;
use parking_lot::Mutex;
use tokio::sync::oneshot;

/// What a caller gets.
pub(crate) type Answered = Result<Outcome, Error>;

struct Waiter {
    answer: oneshot::Sender<Answered>,
    deadline: Instant,
    /// Handed to consensus: from here on the outcome is unknown until it is applied.
    proposed: bool,
    /// Leader changes seen when the caller came.
    leader_changes: u64,
}

/// Request ids grow with time, so the first waiter is also the first to expire. Bounded by the
/// admission of the proposer.
#[derive(Default)]
pub(crate) struct Waiters {
    by_request: Mutex<BTreeMap<u64, Waiter>>,
}

impl Waiters {
    pub(crate) fn add(
        &self,
        request_id: u64,
        deadline: Instant,
        leader_changes: u64,
    ) -> oneshot::Receiver<Answered> {
        let (answer, receiver) = oneshot::channel();
        let waiter = Waiter { answer, deadline, proposed: false, leader_changes };
        self.by_request.lock().insert(request_id, waiter);
        receiver
    }

    /// Callers that wait now.
    pub(crate) fn len(&self) -> usize {
        self.by_request.lock().len()
    }

    /// The caller went away.
    pub(crate) fn remove(&self, request_id: u64) {
        self.by_request.lock().remove(&request_id);
    }

    /// Keeps the items whose callers still wait, and marks those as proposed. An item that is
    /// dropped here is never proposed.
    pub(crate) fn retain_proposed<T>(&self, items: &mut Vec<T>, request_id: impl Fn(&T) -> u64) {
        let mut waiters = self.by_request.lock();
        items.retain(|item| match waiters.get_mut(&request_id(item)) {
            Some(waiter) => {
                waiter.proposed = true;
                true
            }
            None => false,
        });
    }

    /// Consensus surely did not take these.
    pub(crate) fn unpropose(&self, request_ids: impl Iterator<Item = u64>) {
        let mut waiters = self.by_request.lock();
        for id in request_ids {
            if let Some(waiter) = waiters.get_mut(&id) {
                waiter.proposed = false;
            }
        }
    }

    /// Results of one entry, in order. Callers that are gone are skipped.
    pub(crate) fn complete(&self, outcomes: impl Iterator<Item = (u64, Outcome)>) {
        let mut answers = Vec::new();
        {
            let mut waiters = self.by_request.lock();
            // After a restart entries are applied that nobody waits for.
            if waiters.is_empty() {
                return;
            }
            for (id, outcome) in outcomes {
                if let Some(waiter) = waiters.remove(&id) {
                    answers.push((waiter.answer, outcome));
                }
            }
        }
        for (answer, outcome) in answers {
            // A caller that left meanwhile does not want to know.
            drop(answer.send(Ok(outcome)));
        }
    }

    /// Fails these callers.
    pub(crate) fn fail(&self, request_ids: impl Iterator<Item = u64>, error: Error) {
        let mut waiters = self.by_request.lock();
        for id in request_ids {
            if let Some(waiter) = waiters.remove(&id) {
                drop(waiter.answer.send(Err(error)));
            }
        }
    }

    /// Fails everybody.
    pub(crate) fn fail_all(&self, error: Error) {
        for waiter in std::mem::take(&mut *self.by_request.lock()).into_values() {
            drop(waiter.answer.send(Err(error)));
        }
    }

    /// Fails those whose time is up. Only a command that was never handed to consensus gets the
    /// error that invites clients to try again.
    pub(crate) fn expire(&self, now: Instant, leader_changes: u64) {
        let mut waiters = self.by_request.lock();
        while let Some(first) = waiters.first_entry() {
            if first.get().deadline > now {
                return;
            }
            let waiter = first.remove();
            let error = match (waiter.proposed, waiter.leader_changes == leader_changes) {
                (false, _) => Error::ProposalNotAccepted,
                (true, true) => Error::Timeout,
                (true, false) => Error::TimeoutLeaderFailure,
            };
            drop(waiter.answer.send(Err(error)));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn failure(answer: &mut oneshot::Receiver<Answered>) -> Option<Error> {
        answer.try_recv().ok()?.err()
    }

    #[test]
    fn expiry_tells_proposed_from_waiting() {
        let waiters = Waiters::default();
        let now = Instant::now();
        let mut proposed = waiters.add(1, now, 5);
        let mut queued = waiters.add(2, now, 5);
        let mut later = waiters.add(3, now + Duration::from_secs(60), 5);
        let mut items = vec![1, 9];
        waiters.retain_proposed(&mut items, |id| *id);
        assert_eq!(items, [1], "nobody waits for 9");
        waiters.expire(now, 5);
        assert_eq!(failure(&mut proposed), Some(Error::Timeout));
        assert_eq!(failure(&mut queued), Some(Error::ProposalNotAccepted));
        assert!(later.try_recv().is_err(), "its time is not up");
        waiters.fail_all(Error::Stopped);
        assert_eq!(failure(&mut later), Some(Error::Stopped));
    }

    #[test]
    fn a_lost_leader_shows_in_the_error() {
        let waiters = Waiters::default();
        let now = Instant::now();
        let mut proposed = waiters.add(1, now, 5);
        let mut refused = waiters.add(2, now, 5);
        waiters.retain_proposed(&mut vec![1, 2], |id| *id);
        waiters.unpropose([2].into_iter());
        waiters.expire(now, 6);
        assert_eq!(failure(&mut proposed), Some(Error::TimeoutLeaderFailure));
        assert_eq!(failure(&mut refused), Some(Error::ProposalNotAccepted));
    }
}
