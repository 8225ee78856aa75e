//! The durable index: up to where the log survives a power cut.
//!
//! It is the gate in front of every checkpoint of the state: state must never be durable past the
//! log. Only the log (or a test through [`Durable::manual`]) moves it; it never does I/O.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::{Condvar, Mutex};

#[derive(Default)]
struct State {
    index: AtomicU64,
    closed: AtomicBool,
    /// Held while `index` or `closed` changes, so that no waiter misses a change.
    lock: Mutex<()>,
    changed: Condvar,
}

/// A handle that watches the highest index whose entry is durable on this member.
#[derive(Clone)]
pub struct Durable(Arc<State>);

impl Durable {
    /// A durable index that somebody else than a log moves: for tests and tools without a log.
    pub fn manual(index: u64) -> (Durable, DurablePublisher) {
        let state = Arc::new(State { index: AtomicU64::new(index), ..State::default() });
        (Durable(Arc::clone(&state)), DurablePublisher(state))
    }

    /// The durable index now. It goes back only when the log is truncated.
    pub fn index(&self) -> u64 {
        self.0.index.load(Ordering::Acquire)
    }

    /// Waits until the entry at `index` is durable; false means the log was closed before.
    ///
    /// Blocks the thread without a time limit: never call it on an async worker.
    pub fn wait_for(&self, index: u64) -> bool {
        if self.index() >= index {
            return true;
        }
        let mut guard = self.0.lock.lock();
        loop {
            if self.index() >= index {
                return true;
            }
            if self.0.closed.load(Ordering::Acquire) {
                return false;
            }
            self.0.changed.wait(&mut guard);
        }
    }
}

/// The end that moves a [`Durable`]. Dropping it closes the durable index.
pub struct DurablePublisher(Arc<State>);

impl DurablePublisher {
    /// Sets the durable index and wakes all waiters.
    pub fn publish(&self, index: u64) {
        if self.0.index.load(Ordering::Acquire) == index {
            return;
        }
        let _guard = self.0.lock.lock();
        self.0.index.store(index, Ordering::Release);
        self.0.changed.notify_all();
    }

    /// Ends all waits, now and later, that have not been reached yet.
    pub fn close(&self) {
        let _guard = self.0.lock.lock();
        self.0.closed.store(true, Ordering::Release);
        self.0.changed.notify_all();
    }
}

impl Drop for DurablePublisher {
    fn drop(&mut self) {
        self.close();
    }
}
