//! The three things that no safe wrapper offers: leaving a namespace, the `ifreq` calls that give a
//! TUN device its address, and code between fork and exec. It keeps no state and decides
//! nothing; it stands under the fabric and the process control.
#![allow(unsafe_code, reason = "unshare, ioctl and pre_exec have no safe form")]

use std::fs::File;
use std::io;
use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::Arc;

use rustix::ioctl::{Opcode, Updater, ioctl};
use rustix::process::{Signal, set_parent_process_death_signal};
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space, unshare_unsafe};

const TUNSETIFF: Opcode = 0x4004_54ca;
const SIOCSIFFLAGS: Opcode = 0x8914;
const SIOCSIFADDR: Opcode = 0x8916;
const SIOCSIFNETMASK: Opcode = 0x891c;
const SIOCSIFMTU: Opcode = 0x8922;
const SIOCSIFTXQLEN: Opcode = 0x8943;

const IFF_TUN_NO_PI: u16 = 0x1001;
const IFF_UP_RUNNING: u16 = 0x41;
const AF_INET: u16 = 2;

/// Large enough that bulk transfers are not bound by one system call per packet.
const MTU: i32 = 60_000;
/// Packets that the kernel keeps for a fabric that is busy elsewhere.
const QUEUE: i32 = 4_000;

/// The kernel's `struct ifreq`: a name and 24 bytes whose meaning depends on the call.
#[repr(C)]
struct IfReq {
    name: [u8; 16],
    data: [u8; 24],
}

impl IfReq {
    fn new(name: &str, data: &[u8]) -> Self {
        let mut request = Self { name: [0; 16], data: [0; 24] };
        request.name[..name.len()].copy_from_slice(name.as_bytes());
        request.data[..data.len()].copy_from_slice(data);
        request
    }

    fn address(name: &str, address: Ipv4Addr) -> Self {
        let mut data = [0; 8];
        data[..2].copy_from_slice(&AF_INET.to_ne_bytes());
        data[4..].copy_from_slice(&address.octets());
        Self::new(name, &data)
    }
}

fn call<const CODE: Opcode>(fd: impl AsFd, mut request: IfReq) -> io::Result<()> {
    // SAFETY: each code used in this file takes a pointer to a `struct ifreq`, whose size and layout
    // `IfReq` has; the kernel writes at most that much back.
    unsafe { ioctl(fd, Updater::<CODE, IfReq>::new(&mut request)) }.map_err(io::Error::from)
}

/// A network namespace without a name and the TUN device that is its only way out.
pub(crate) struct Island {
    /// Keeps the namespace alive and is the ticket for entering it.
    pub(crate) namespace: OwnedFd,
    /// One read or write is one IP packet.
    pub(crate) tun: File,
}

/// Makes a namespace with the given address in a /24 on its TUN device. Needs CAP_SYS_ADMIN and
/// CAP_NET_ADMIN; everything goes away with the last file descriptor.
pub(crate) fn island(address: Ipv4Addr) -> io::Result<Island> {
    // A thread of its own, since the thread that unshares cannot come back without a ticket.
    let maker = std::thread::Builder::new().name("island".into()).spawn(move || {
        // SAFETY: only the network namespace of this thread changes; file tables stay shared.
        unsafe { unshare_unsafe(UnshareFlags::NEWNET) }?;
        let namespace = OwnedFd::from(File::open("/proc/thread-self/ns/net")?);
        let tun = File::options().read(true).write(true).open("/dev/net/tun")?;
        call::<TUNSETIFF>(&tun, IfReq::new("wire", &IFF_TUN_NO_PI.to_ne_bytes()))?;
        // Any IPv4 socket of this namespace carries the interface calls.
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
        call::<SIOCSIFFLAGS>(&socket, IfReq::new("lo", &IFF_UP_RUNNING.to_ne_bytes()))?;
        call::<SIOCSIFADDR>(&socket, IfReq::address("wire", address))?;
        call::<SIOCSIFNETMASK>(&socket, IfReq::address("wire", Ipv4Addr::new(255, 255, 255, 0)))?;
        call::<SIOCSIFMTU>(&socket, IfReq::new("wire", &MTU.to_ne_bytes()))?;
        call::<SIOCSIFTXQLEN>(&socket, IfReq::new("wire", &QUEUE.to_ne_bytes()))?;
        call::<SIOCSIFFLAGS>(&socket, IfReq::new("wire", &IFF_UP_RUNNING.to_ne_bytes()))?;
        Ok(Island { namespace, tun })
    })?;
    maker.join().map_err(|_| io::Error::other("the thread that makes a namespace panicked"))?
}

/// Moves the calling thread into a namespace; threads that it starts later are born there, and
/// sockets stay in the namespace in which they were made.
pub(crate) fn enter(namespace: &OwnedFd) -> io::Result<()> {
    move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))
        .map_err(io::Error::from)
}

/// Gives this thread, and all threads and processes that it starts later, mounts of their own: what
/// is mounted there goes away with the last of them, a SIGKILL included. Needs CAP_SYS_ADMIN.
pub(crate) fn own_mounts() -> io::Result<()> {
    // SAFETY: only the mounts and the working directory of this thread change; file tables stay
    // shared.
    unsafe { unshare_unsafe(UnshareFlags::NEWNS) }?;
    // Else what is mounted here would show outside as well.
    let status = Command::new("mount").args(["--make-rprivate", "/"]).status()?;
    if !status.success() {
        return Err(io::Error::other(format!("mount: {status}")));
    }
    // Others cut and mount theirs meanwhile.
    kelson_image::release_copies()
}

/// Makes a command run in a namespace and die together with the thread that spawns it, so that a
/// harness killed by SIGKILL leaves no member behind.
pub(crate) fn confine(command: &mut Command, namespace: Arc<OwnedFd>) {
    // SAFETY: between fork and exec only two system calls are made, nothing is allocated or locked.
    unsafe {
        command.pre_exec(move || {
            set_parent_process_death_signal(Some(Signal::KILL)).map_err(io::Error::from)?;
            enter(&namespace)
        });
    }
}

/// Makes a command die together with the thread that spawns it.
pub(crate) fn tie(command: &mut Command) {
    // SAFETY: one system call between fork and exec, nothing is allocated or locked.
    unsafe {
        command.pre_exec(|| {
            set_parent_process_death_signal(Some(Signal::KILL)).map_err(io::Error::from)
        });
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use kelson_image::{Image, Kind};

    use super::*;

    /// Else a test of power loss beside a run of this harness finds its file system dead for good.
    #[test]
    fn mounts_of_ones_own_hold_no_image_of_others() {
        if !rustix::process::geteuid().is_root() {
            assert!(std::env::var_os("CI").is_none(), "mounting needs root in CI");
            return;
        }
        let dir = tempfile::tempdir().expect("a directory");
        let mut image = Image::create(dir.path(), Kind::Ext4, 16).expect("an image");
        let ((tell, told), (end, ended)) = (channel(), channel::<()>());
        let other = std::thread::spawn(move || {
            own_mounts().expect("mounts of its own");
            tell.send(()).expect("somebody waits");
            ended.recv().ok();
        });
        told.recv().expect("it has them");
        image.cut_power().expect("a cut");
        image.unmount().expect("unmounts");
        image.mount().expect("mounts again");
        std::fs::write(image.mount_point().join("file"), "alive").expect("takes a file");
        drop(end);
        other.join().expect("ends");
    }
}
