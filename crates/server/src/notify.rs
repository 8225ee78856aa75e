//! Tells systemd that the member serves (`Type=notify` units): one datagram to the socket named
//! by `NOTIFY_SOCKET`. Without that variable it does nothing.

use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

/// Sends `state`, e.g. `READY=1`, to the service manager if there is one. Returns whether there
/// was.
///
/// # Errors
/// The socket that the variable names cannot be reached.
pub fn notify(state: &str) -> io::Result<bool> {
    let Some(name) = std::env::var_os("NOTIFY_SOCKET") else { return Ok(false) };
    send(&name.to_string_lossy(), state).map(|()| true)
}

fn send(name: &str, state: &str) -> io::Result<()> {
    let address = match name.strip_prefix('@') {
        Some(hidden) => SocketAddr::from_abstract_name(hidden)?,
        None => SocketAddr::from_pathname(name)?,
    };
    UnixDatagram::unbound()?.send_to_addr(state.as_bytes(), &address).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_state_arrives_at_the_socket() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("notify");
        let manager = UnixDatagram::bind(&path).expect("a socket");
        send(path.to_str().expect("a text path"), "READY=1").expect("sent");
        let mut buffer = [0; 64];
        let len = manager.recv(&mut buffer).expect("received");
        assert_eq!(&buffer[..len], b"READY=1");
    }
}
