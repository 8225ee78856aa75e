//! A library that is preloaded into a member (`LD_PRELOAD`) and holds its syncs: while the file named
//! by `KELSON_HOLD_FSYNC` exists, `fsync` and `fdatasync` do not return, as with a disk that hangs.
//! Writes pass. So whoever acknowledges what was written and not synced is found without a power cut.
//!
//! It never changes data or results, and does nothing in a process without that variable. It cannot
//! reach programs that are linked statically, as Go's are.

use std::ffi::CString;
use std::os::unix::ffi::OsStrExt;
use std::sync::OnceLock;

/// How often a held call looks whether it may go on. Unit: microseconds.
const LOOK_EVERY: libc::useconds_t = 2_000;

static HELD_WHILE: OnceLock<Option<CString>> = OnceLock::new();

fn wait() {
    let path = HELD_WHILE.get_or_init(|| {
        std::env::var_os("KELSON_HOLD_FSYNC").and_then(|path| CString::new(path.as_bytes()).ok())
    });
    let Some(path) = path else { return };
    // SAFETY: the path is a C string that lives as long as the process; neither call keeps it.
    while unsafe { libc::access(path.as_ptr(), libc::F_OK) } == 0 {
        // SAFETY: it only sleeps.
        unsafe { libc::usleep(LOOK_EVERY) };
    }
}

/// Stands in for the C library's `fsync`.
// SAFETY: the name is meant to be found before the C library's; the types are the same.
#[unsafe(no_mangle)]
pub extern "C" fn fsync(fd: libc::c_int) -> libc::c_int {
    wait();
    // SAFETY: the system call takes any number and answers an error for a wrong one.
    unsafe { libc::syscall(libc::SYS_fsync, fd) as libc::c_int }
}

/// Stands in for the C library's `fdatasync`.
// SAFETY: as above.
#[unsafe(no_mangle)]
pub extern "C" fn fdatasync(fd: libc::c_int) -> libc::c_int {
    wait();
    // SAFETY: as above.
    unsafe { libc::syscall(libc::SYS_fdatasync, fd) as libc::c_int }
}
