//! Carries the traffic between members, so that it can be cut without privileges. The peer URL that
//! a member advertises is a port of the lab, which passes bytes on to the port where the member
//! listens. Who connects is read from the kernel's tables (`sockets`), so both directions of an
//! isolated member are cut: what it is sent and what it sends.
//!
//! A cut behaves as a network that loses every packet: connections stay open and nothing passes.
//! What was under way goes on after healing, unless the cut lasts longer than [`FROZEN_MAX`]; then
//! the connections are closed, as a system's own retransmission limit would do.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinHandle;

/// Longest time that a cut connection is kept.
const FROZEN_MAX: Duration = Duration::from_secs(30);
/// Connections to one member at a time; further ones wait in the kernel's queue.
const CONNECTIONS_MAX: usize = 256;
/// Bytes on their way in one direction of one connection.
const BUFFER_BYTES: usize = 64 << 10;
/// Pause after a refused accept, which means that file descriptors have run out.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Everything that links share: who is cut off, and which process is which member.
#[derive(Clone, Default)]
pub(crate) struct Links {
    isolated: watch::Sender<BTreeSet<u16>>,
    pids: Arc<Mutex<BTreeMap<u16, u32>>>,
}

/// The port of one member; it closes, with all connections through it, when this is dropped.
pub(crate) struct Link(JoinHandle<()>);

impl Drop for Link {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Links {
    /// Opens the advertised port of a member. Needs a runtime.
    ///
    /// # Errors
    /// A text for the user: the port cannot be had.
    pub(crate) async fn open(
        &self,
        number: u16,
        advertised: SocketAddr,
        target: SocketAddr,
    ) -> Result<Link, String> {
        let listener = TcpListener::bind(advertised)
            .await
            .map_err(|error| format!("cannot listen on {advertised}: {error}"))?;
        let links = self.clone();
        Ok(Link(tokio::spawn(async move { links.accept(listener, number, target).await })))
    }

    /// Notes which process is the member now, or that there is none.
    pub(crate) fn set_pid(&self, number: u16, pid: Option<u32>) {
        let mut pids = self.pids.lock();
        match pid {
            Some(pid) => pids.insert(number, pid),
            None => pids.remove(&number),
        };
    }

    /// Cuts a member off.
    pub(crate) fn isolate(&self, number: u16) {
        self.isolated.send_modify(|isolated| {
            isolated.insert(number);
        });
    }

    /// Ends one isolation; false when there was none.
    pub(crate) fn heal(&self, number: u16) -> bool {
        self.isolated.send_if_modified(|isolated| isolated.remove(&number))
    }

    /// Whether a member is cut off.
    pub(crate) fn is_isolated(&self, number: u16) -> bool {
        self.isolated.borrow().contains(&number)
    }

    async fn accept(&self, listener: TcpListener, number: u16, target: SocketAddr) {
        let permits = Arc::new(Semaphore::new(CONNECTIONS_MAX));
        // Dropped with this task, which ends all connections of the port.
        let mut connections = tokio::task::JoinSet::new();
        loop {
            let Ok(permit) = Arc::clone(&permits).acquire_owned().await else { return };
            while connections.try_join_next().is_some() {}
            let Ok((stream, client)) = listener.accept().await else {
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            };
            let links = self.clone();
            connections.spawn(async move {
                links.carry(stream, client, number, target).await;
                drop(permit);
            });
        }
    }

    /// Carries one connection until either side ends it.
    async fn carry(&self, stream: TcpStream, client: SocketAddr, number: u16, target: SocketAddr) {
        let Ok(server) = stream.local_addr() else { return };
        let pids: Vec<(u16, u32)> =
            self.pids.lock().iter().map(|(number, pid)| (*number, *pid)).collect();
        if !pids.iter().any(|(known, _)| *known == number) {
            // Nobody listens: reset, as the kernel would. Others try again many times a second, so
            // this must cost nothing.
            let _gone = stream.set_zero_linger();
            return;
        }
        let look = move || super::sockets::holder(client, server, &pids);
        let source = tokio::task::spawn_blocking(look).await.unwrap_or(None);
        let gate = Gate { isolated: self.isolated.subscribe(), ends: [source, Some(number)] };
        if !gate.clone().passed().await {
            return;
        }
        let Ok(onward) = TcpStream::connect(target).await else { return };
        // Heartbeats are small; neither half may wait for more to send.
        if stream.set_nodelay(true).and(onward.set_nodelay(true)).is_err() {
            return;
        }
        let (from_client, to_client) = stream.into_split();
        let (from_member, to_member) = onward.into_split();
        // One direction may end before the other; an error or a long cut ends both.
        let forth = pass(from_client, to_member, gate.clone());
        let back = pass(from_member, to_client, gate);
        let _one_failed = tokio::try_join!(forth, back);
    }
}

/// Opens while neither end of a connection is isolated.
#[derive(Clone)]
struct Gate {
    isolated: watch::Receiver<BTreeSet<u16>>,
    ends: [Option<u16>; 2],
}

impl Gate {
    /// Waits until the gate is open; false after [`FROZEN_MAX`].
    async fn passed(&mut self) -> bool {
        let ends = self.ends;
        let open = |isolated: &BTreeSet<u16>| {
            !ends.iter().flatten().any(|number| isolated.contains(number))
        };
        tokio::time::timeout(FROZEN_MAX, self.isolated.wait_for(open)).await.is_ok()
    }
}

/// Passes bytes one way until their end.
async fn pass(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    mut gate: Gate,
) -> std::io::Result<()> {
    let mut buffer = vec![0; BUFFER_BYTES];
    loop {
        let read = from.read(&mut buffer).await?;
        if !gate.passed().await {
            return Err(std::io::ErrorKind::TimedOut.into());
        }
        if read == 0 {
            return to.shutdown().await;
        }
        to.write_all(&buffer[..read]).await?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A server that sends back what it gets, and a link in front of it.
    async fn echo() -> (Links, Link, SocketAddr) {
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        let server = TcpListener::bind(any).await.expect("bind");
        let target = server.local_addr().expect("address");
        tokio::spawn(async move {
            while let Ok((stream, _)) = server.accept().await {
                let (mut from, mut to) = stream.into_split();
                tokio::spawn(async move { tokio::io::copy(&mut from, &mut to).await });
            }
        });
        let free = TcpListener::bind(any).await.expect("bind").local_addr().expect("address");
        let links = Links::default();
        let link = links.open(1, free, target).await.expect("open");
        (links, link, free)
    }

    async fn answer(stream: &mut TcpStream, wait: Duration) -> Option<u8> {
        tokio::time::timeout(wait, stream.read_u8()).await.ok()?.ok()
    }

    #[tokio::test]
    async fn a_cut_holds_bytes_back_and_healing_lets_them_pass() {
        let (long, short) = (Duration::from_secs(20), Duration::from_millis(200));
        let (links, link, address) = echo().await;
        // This process plays member 2, the first process of the machine plays member 1.
        links.set_pid(1, Some(1));
        links.set_pid(2, Some(std::process::id()));
        let mut stream = TcpStream::connect(address).await.expect("connect");
        stream.write_u8(1).await.expect("write");
        assert_eq!(answer(&mut stream, long).await, Some(1));
        for number in [1, 2] {
            links.isolate(number);
            assert!(links.is_isolated(number));
            stream.write_u8(7).await.expect("write");
            assert_eq!(answer(&mut stream, short).await, None, "isolated: {number}");
            let mut second = TcpStream::connect(address).await.expect("connect");
            second.write_u8(8).await.expect("write");
            assert_eq!(answer(&mut second, short).await, None, "isolated: {number}");
            assert!(links.heal(number) && !links.heal(number));
            assert_eq!(answer(&mut stream, long).await, Some(7));
            assert_eq!(answer(&mut second, long).await, Some(8));
        }
        links.isolate(3);
        stream.write_u8(9).await.expect("write");
        assert_eq!(answer(&mut stream, long).await, Some(9), "another member's isolation");
        links.set_pid(1, None);
        let mut refused = TcpStream::connect(address).await.expect("connect");
        let ended = tokio::time::timeout(long, refused.read_u8()).await.expect("at once");
        assert!(ended.is_err(), "nobody listens");
        drop(link);
        assert_eq!(answer(&mut stream, long).await, None, "closed with the link");
    }
}
