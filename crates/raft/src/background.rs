//! Work that waits for the disk, away from the runtime. What takes seconds or minutes, the sending and
//! the receiving of a state, gives way to the work for clients: it is done in steps, on one thread that
//! has less of a processor than others. It knows nothing of what the steps do.

use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::oneshot;
use tokio::task::JoinError;
use tonic::Status;

/// How much less of a processor than others the thread gets.
const NICENESS: i32 = 10;

/// Does work that may wait for the disk. In a simulation everything else waits for it: nothing may happen
/// at a time of its own.
///
/// # Errors
/// The work panicked.
///
/// # Cancel safety
/// Dropping the future leaves the work to be done.
pub(crate) async fn blocking<T: Send + 'static>(
    is_simulated: bool,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, JoinError> {
    if is_simulated { Ok(work()) } else { tokio::task::spawn_blocking(work).await }
}

type Step<T> = Box<dyn FnOnce(&mut T) + Send>;

/// Something that is worked on in steps. Dropping it ends the work after the step under way; what was
/// worked on is dropped then.
pub(crate) enum Background<T> {
    /// On a thread of its own.
    Thread(Sender<Step<T>>),
    /// In a simulation, where everything waits.
    Here(Arc<Mutex<T>>),
}

impl<T: Send + 'static> Background<T> {
    /// # Errors
    /// `ResourceExhausted`: there is no thread.
    pub(crate) fn start(mut subject: T, is_simulated: bool) -> Result<Self, Status> {
        if is_simulated {
            return Ok(Background::Here(Arc::new(Mutex::new(subject))));
        }
        let (steps, waiting) = channel::<Step<T>>();
        let thread = std::thread::Builder::new().name("snapshot".to_owned()).spawn(move || {
            // It works at the usual priority, too.
            let _ = rustix::process::nice(NICENESS);
            for step in waiting {
                step(&mut subject);
            }
        });
        thread.map_err(|error| Status::resource_exhausted(format!("no thread: {error}")))?;
        Ok(Background::Thread(steps))
    }

    /// Does the next step. One after the other: the caller waits.
    ///
    /// # Errors
    /// `Internal`: the work panicked.
    ///
    /// # Cancel safety
    /// Dropping the future leaves the step to be done, and its result to be dropped.
    pub(crate) async fn step<R: Send + 'static>(
        &self,
        work: impl FnOnce(&mut T) -> R + Send + 'static,
    ) -> Result<R, Status> {
        let is_gone = || Status::internal("the thread that handles the snapshot is gone");
        match self {
            Background::Thread(steps) => {
                let (sender, receiver) = oneshot::channel();
                let step = move |subject: &mut T| drop(sender.send(work(subject)));
                steps.send(Box::new(step)).map_err(|_| is_gone())?;
                receiver.await.map_err(|_| is_gone())
            }
            Background::Here(subject) => {
                let subject = subject.clone();
                let step = blocking(true, move || work(&mut subject.lock()));
                step.await.map_err(|_| is_gone())
            }
        }
    }
}

impl<T: Send + 'static> Background<T> {
    /// Waits on the thread that gives way: on a busy machine it wakes late, which whoever measures the
    /// wait wants to feel.
    ///
    /// # Errors
    /// As [`Background::step`].
    pub(crate) async fn rest(&self, wait: Duration) -> Result<(), Status> {
        match self {
            Background::Thread(_) => self.step(move |_| std::thread::sleep(wait)).await,
            Background::Here(_) => {
                tokio::time::sleep(wait).await;
                Ok(())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn steps_work_on_the_same_thing_and_drop_it_at_the_end() {
        for is_simulated in [false, true] {
            let (sender, dropped) = channel::<u64>();
            let work = Background::start((0, sender), is_simulated).expect("a thread");
            for expected in 1..4 {
                let step = |(count, _): &mut (u64, Sender<u64>)| {
                    *count += 1;
                    *count
                };
                assert_eq!(work.step(step).await.expect("it works"), expected);
            }
            drop(work);
            assert!(dropped.recv().is_err(), "the sender was dropped, and nothing was sent");
        }
    }
}
