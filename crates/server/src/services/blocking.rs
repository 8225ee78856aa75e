//! Work that may wait for the disk or takes long on the processor, kept away from the workers that
//! answer small requests. It knows nothing of what the work is.

use std::sync::Arc;

use tokio::sync::Semaphore;
use tonic::Status;

/// How many long reads run at once. More would only compete for the processor and hold more
/// results in memory; a caller above the bound waits, and leaves the line when its client does.
const RUNNING_MAX: usize = 8;

/// Runs closures on threads of their own, a bounded number at a time.
#[derive(Clone)]
pub(crate) struct Blocking {
    running: Arc<Semaphore>,
}

impl Blocking {
    pub(crate) fn new() -> Self {
        Self::with(RUNNING_MAX)
    }

    /// With another bound than that for reads.
    pub(crate) fn with(running_max: usize) -> Self {
        Self { running: Arc::new(Semaphore::new(running_max)) }
    }

    /// Runs `work` and returns what it returns.
    ///
    /// # Errors
    /// `Internal` if the work panicked.
    ///
    /// # Cancel safety
    /// Dropping the future before the work has started drops the work; afterwards it runs to its
    /// end unheard and keeps its place until then.
    pub(crate) async fn run<T, F>(&self, work: F) -> Result<T, Status>
    where
        F: FnOnce() -> T + Send + 'static,
        T: Send + 'static,
    {
        let place = Arc::clone(&self.running).acquire_owned().await;
        let place = place.expect("the semaphore is never closed");
        let task = tokio::task::spawn_blocking(move || {
            let result = work();
            drop(place);
            result
        });
        task.await.map_err(|error| {
            tracing::error!(%error, "a blocking read ended unexpectedly");
            Status::internal("read ended unexpectedly")
        })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[tokio::test]
    async fn no_more_than_the_bound_run_at_once() {
        let blocking = Blocking::new();
        let running = Arc::new(AtomicUsize::new(0));
        let tasks = (0..4 * RUNNING_MAX).map(|_| {
            let (blocking, running) = (blocking.clone(), Arc::clone(&running));
            tokio::spawn(async move {
                blocking
                    .run(move || {
                        let seen = running.fetch_add(1, Ordering::SeqCst) + 1;
                        std::thread::sleep(std::time::Duration::from_millis(2));
                        running.fetch_sub(1, Ordering::SeqCst);
                        seen
                    })
                    .await
            })
        });
        for seen in futures::future::join_all(tasks).await {
            assert!(seen.expect("task").expect("work") <= RUNNING_MAX);
        }
    }

    #[tokio::test]
    async fn a_panic_is_an_answer() {
        let result: Result<(), Status> = Blocking::new().run(|| panic!("on purpose")).await;
        assert_eq!(result.expect_err("panicked").code(), tonic::Code::Internal);
    }
}
