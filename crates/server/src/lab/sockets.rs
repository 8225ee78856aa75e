//! Tells which member is behind a connection on loopback. All members share one address, so the
//! kernel's own tables are asked: the client's port leads to its socket's inode, and the inode to
//! the process that holds it. This needs no privilege for processes of the same user.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};

/// The number of the member whose process holds the socket `client` that is connected to `server`;
/// `None` when it is none of `pids` (pairs of number and process id) or has closed it already.
///
/// Blocking: reads a few files of `/proc`.
pub(crate) fn holder(client: SocketAddr, server: SocketAddr, pids: &[(u16, u32)]) -> Option<u16> {
    let (SocketAddr::V4(client), SocketAddr::V4(server)) = (client, server) else {
        return None;
    };
    let inode = inode_of(&fs::read_to_string("/proc/net/tcp").ok()?, client, server)?;
    let link = format!("socket:[{inode}]");
    let holds = |pid: u32| {
        let files = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
        files
            .map(|file| fs::read_link(file.path()))
            .any(|target| target.is_ok_and(|target| target.as_os_str() == link.as_str()))
    };
    pids.iter().find(|(_, pid)| holds(*pid)).map(|(number, _)| *number)
}

/// Finds the inode of the socket from `local` to `remote` in the text of `/proc/net/tcp`.
fn inode_of(table: &str, local: SocketAddrV4, remote: SocketAddrV4) -> Option<u64> {
    let (local, remote) = (hex(local), hex(remote));
    table.lines().skip(1).find_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let is_it = *fields.get(1)? == local && *fields.get(2)? == remote;
        // A closed socket lingers with inode 0.
        is_it.then(|| fields.get(9)?.parse().ok().filter(|inode| *inode != 0)).flatten()
    })
}

/// An address as the table shows it: the bytes of the address as one number of this machine's
/// byte order, then the port.
fn hex(address: SocketAddrV4) -> String {
    let ip: &Ipv4Addr = address.ip();
    format!("{:08X}:{:04X}", u32::from_ne_bytes(ip.octets()), address.port())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream};

    #[test]
    fn the_holder_of_a_connection_is_found() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
        let server = listener.local_addr().expect("address");
        let stream = TcpStream::connect(server).expect("connect");
        let client = stream.local_addr().expect("address");
        let me = std::process::id();
        assert_eq!(holder(client, server, &[(4, 1), (7, me)]), Some(7));
        assert_eq!(holder(client, server, &[]), None);
        let stranger = SocketAddr::from(([127, 0, 0, 1], 1));
        assert_eq!(holder(stranger, server, &[(7, me)]), None);
    }

    #[test]
    fn table_lines_are_matched_whole() {
        let table = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   \
                     uid  timeout inode\n   0: 0100007F:5CEF 0100007F:0050 01 00000000:00000000 \
                     00:00000000 00000000  0 0 0 1\n   1: 0100007F:5CEE 0100007F:0050 01 \
                     00000000:00000000 00:00000000 00000000  0 0 4711 1\n   cut";
        let at = |port| SocketAddrV4::new(Ipv4Addr::LOCALHOST, port);
        if cfg!(target_endian = "little") {
            assert_eq!(inode_of(table, at(0x5CEE), at(80)), Some(4711));
            assert_eq!(inode_of(table, at(0x5CEF), at(80)), None);
            assert_eq!(inode_of(table, at(80), at(0x5CEE)), None);
        }
    }
}
