//! How the process ends: which signals ask for it, how listeners hear of it, and dying of the
//! signal that asked, so that a shell or a supervisor sees the cause.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{Notify, watch};

/// Longest wait for requests in flight once the end was asked for. The longest that a request may
/// take, so what still runs after it is stuck or a stream.
pub const DRAIN_TIMEOUT: Duration = Duration::from_secs(7);

/// Longest wait for clients to close connections on which nothing is in flight any more.
const FAREWELL_TIMEOUT: Duration = Duration::from_secs(1);

/// Listens for SIGTERM and SIGINT.
pub struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

/// The signal that asked for the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asked {
    /// SIGTERM.
    Terminate,
    /// SIGINT.
    Interrupt,
}

impl Signals {
    /// Takes over both signals; from here on they no longer kill the process.
    ///
    /// # Errors
    /// The system refuses a handler.
    pub fn new() -> std::io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
        })
    }

    /// Waits for either signal.
    ///
    /// # Cancel safety
    /// Cancel safe: a signal that came meanwhile is answered by the next call.
    pub async fn asked(&mut self) -> Asked {
        tokio::select! {
            _ = self.terminate.recv() => Asked::Terminate,
            _ = self.interrupt.recv() => Asked::Interrupt,
        }
    }
}

impl Asked {
    /// Name as Go prints it, for the log.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Terminate => "terminated",
            Self::Interrupt => "interrupt",
        }
    }

    /// Ends the process by this signal's default action. As process 1 the default action does
    /// not exist and the process exits with 0.
    pub fn die(self) -> ! {
        if std::process::id() != 1 {
            let number = match self {
                Self::Terminate => signal_hook::consts::SIGTERM,
                Self::Interrupt => signal_hook::consts::SIGINT,
            };
            if let Err(error) = signal_hook::low_level::emulate_default_handler(number) {
                tracing::warn!(%error, "cannot re-raise the signal");
            }
        }
        std::process::exit(0)
    }
}

/// The state of a running server's end, shared by listeners and requests.
#[derive(Clone)]
pub struct Shutdown {
    stage: watch::Sender<Stage>,
    stopping: watch::Sender<bool>,
    in_flight: Arc<InFlight>,
    connections: Arc<InFlight>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Stage {
    Serving,
    /// No new connections and requests; those in flight go on.
    Draining,
    /// Connections are dropped.
    Closing,
}

#[derive(Default)]
struct InFlight {
    count: AtomicUsize,
    idle: Notify,
}

/// One request or connection that the end waits for; dropping it lets go.
pub struct RequestGuard {
    in_flight: Arc<InFlight>,
}

impl Default for Shutdown {
    fn default() -> Self {
        Self {
            stage: watch::Sender::new(Stage::Serving),
            stopping: watch::Sender::new(false),
            in_flight: Arc::default(),
            connections: Arc::default(),
        }
    }
}

impl Shutdown {
    /// Tells all listeners and connections to take nothing new, and long streams to end.
    pub fn ask(&self) {
        self.stopping.send_replace(true);
        self.stage.send_replace(Stage::Draining);
    }

    /// Becomes true with [`Shutdown::ask`]; for services whose streams would never end.
    #[must_use]
    pub fn stopping(&self) -> watch::Receiver<bool> {
        self.stopping.subscribe()
    }

    /// Tells all connections to end at once.
    pub fn close(&self) {
        self.stage.send_replace(Stage::Closing);
    }

    /// Returns once [`Shutdown::ask`] was called.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub async fn asked(&self) {
        self.reached(Stage::Draining).await;
    }

    /// Returns once [`Shutdown::close`] was called.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub async fn closed(&self) {
        self.reached(Stage::Closing).await;
    }

    async fn reached(&self, stage: Stage) {
        let mut current = self.stage.subscribe();
        // An error means the sender is gone, which `self` prevents.
        let _never = current.wait_for(|current| *current >= stage).await;
    }

    /// Counts a unary request until the guard is dropped.
    #[must_use]
    pub fn request(&self) -> RequestGuard {
        RequestGuard::new(&self.in_flight)
    }

    /// Counts a connection until the guard is dropped.
    #[must_use]
    pub fn connection(&self) -> RequestGuard {
        RequestGuard::new(&self.connections)
    }

    /// Waits until no unary request is in flight, [`DRAIN_TIMEOUT`] at most, and then for clients to
    /// close the connections that were told to end: one that was cut could have had a request on
    /// its way that its client must not repeat.
    pub async fn drained(&self) {
        if tokio::time::timeout(DRAIN_TIMEOUT, self.in_flight.idle()).await.is_err() {
            tracing::warn!("closing connections although requests are in flight");
        }
        // Those that do not listen any more are not waited for.
        let _silent = tokio::time::timeout(FAREWELL_TIMEOUT, self.connections.idle()).await;
    }
}

impl InFlight {
    async fn idle(&self) {
        loop {
            let notified = self.idle.notified();
            if self.count.load(Ordering::SeqCst) == 0 {
                return;
            }
            notified.await;
        }
    }
}

impl RequestGuard {
    fn new(in_flight: &Arc<InFlight>) -> Self {
        in_flight.count.fetch_add(1, Ordering::SeqCst);
        Self { in_flight: Arc::clone(in_flight) }
    }
}

impl Drop for RequestGuard {
    fn drop(&mut self) {
        if self.in_flight.count.fetch_sub(1, Ordering::SeqCst) == 1 {
            self.in_flight.idle.notify_waiters();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn draining_waits_for_the_last_request() {
        let shutdown = Shutdown::default();
        let guard = shutdown.request();
        let waiting = tokio::spawn({
            let shutdown = shutdown.clone();
            async move { shutdown.drained().await }
        });
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        drop(guard);
        waiting.await.expect("no panic");
    }

    #[tokio::test]
    async fn asking_reaches_those_who_come_late() {
        let shutdown = Shutdown::default();
        shutdown.ask();
        shutdown.asked().await;
    }
}
