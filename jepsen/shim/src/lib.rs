//! A library that is preloaded into a member (`LD_PRELOAD`) and hurts its calls into the C library:
//! syncs that hang, are slow or fail, writes that fail, and a wall clock that is off. It does what a
//! shared page of memory says (`KELSON_FAULT_PAGE`, the file of that page), so that everything can be
//! switched while the member runs, and counts there what it did, so that a fault which reached nothing
//! is no test. `KELSON_HOLD_FSYNC` names a file that holds the syncs while it exists.
//!
//! It never changes data, and does nothing in a process without these variables. It cannot reach
//! programs that are linked statically, as Go's are, or that make system calls by themselves.

use std::ffi::{CStr, c_char};
use std::sync::atomic::{AtomicI64, AtomicPtr, AtomicU64, Ordering};

/// How often a held call looks whether it may go on. Unit: microseconds.
const LOOK_EVERY: libc::useconds_t = 2_000;

/// Says that this library has mapped the page; another layout needs another number.
const LAYOUT: u64 = 0x4b45_4c53_4f4e_0001;

/// The shared page, word by word. The harness writes the first part (`jepsen/src/page.rs` has the same
/// numbers), this library the second.
#[repr(C)]
struct Page {
    /// Not zero: syncs do not return.
    hold: AtomicU64,
    /// Syncs take this much longer. Unit: microseconds.
    delay_us: AtomicU64,
    /// Not zero: syncs fail with this number.
    sync_errno: AtomicU64,
    /// Not zero: writes to files fail with this number.
    write_errno: AtomicU64,
    /// The wall clock is off by this. Unit: nanoseconds.
    clock_offset_ns: AtomicI64,
    unused: [u64; 3],
    layout: AtomicU64,
    /// Syncs asked for; syncs held, delayed or failed; writes failed; readings of a clock that was off.
    syncs: AtomicU64,
    syncs_hurt: AtomicU64,
    writes_failed: AtomicU64,
    clock_reads: AtomicU64,
}

static PAGE: AtomicPtr<Page> = AtomicPtr::new(std::ptr::null_mut());
/// Stands for "there is none" once that is known.
static NO_PAGE: Page = Page {
    hold: AtomicU64::new(0),
    delay_us: AtomicU64::new(0),
    sync_errno: AtomicU64::new(0),
    write_errno: AtomicU64::new(0),
    clock_offset_ns: AtomicI64::new(0),
    unused: [0; 3],
    layout: AtomicU64::new(0),
    syncs: AtomicU64::new(0),
    syncs_hurt: AtomicU64::new(0),
    writes_failed: AtomicU64::new(0),
    clock_reads: AtomicU64::new(0),
};

/// The C library's own clock, found once.
static REAL_CLOCK: AtomicPtr<libc::c_void> = AtomicPtr::new(std::ptr::null_mut());

type ClockGettime = extern "C" fn(libc::clockid_t, *mut libc::timespec) -> libc::c_int;

/// A variable of the environment, read without locks or memory of our own: this runs inside calls
/// that a member makes from anywhere.
fn variable(name: &CStr) -> *const c_char {
    // SAFETY: the name is a C string; members do not change their environment after their start.
    unsafe { libc::getenv(name.as_ptr()) }
}

fn page() -> &'static Page {
    let known = PAGE.load(Ordering::Acquire);
    let page = if known.is_null() { map() } else { known };
    // SAFETY: it is `NO_PAGE` or a mapping of that size that is never taken back; all that changes in
    // it is atomic.
    unsafe { &*page }
}

/// Maps the page. Two threads at once map it twice, which does no harm.
fn map() -> *mut Page {
    let none = (&raw const NO_PAGE).cast_mut();
    let path = variable(c"KELSON_FAULT_PAGE");
    let mut found = none;
    if !path.is_null() {
        // SAFETY: the path is a C string; the mapping is checked before it is used, and shared pages
        // of a file stay valid after the file is closed. The harness made it 4096 bytes long.
        unsafe {
            let fd = libc::open(path, libc::O_RDWR | libc::O_CLOEXEC);
            if fd >= 0 {
                let prot = libc::PROT_READ | libc::PROT_WRITE;
                let memory = libc::mmap(std::ptr::null_mut(), 4096, prot, libc::MAP_SHARED, fd, 0);
                libc::close(fd);
                if memory != libc::MAP_FAILED {
                    found = memory.cast();
                    (*found).layout.store(LAYOUT, Ordering::Relaxed);
                }
            }
        }
    }
    PAGE.store(found, Ordering::Release);
    found
}

fn fail(number: u64) -> libc::c_int {
    // SAFETY: the C library gives each thread a place for the number of its last error.
    unsafe { *libc::__errno_location() = number as libc::c_int };
    -1
}

fn rest(microseconds: libc::useconds_t) {
    // SAFETY: it only sleeps.
    unsafe { libc::usleep(microseconds) };
}

/// What a sync has to go through first; true if it may be made.
fn sync_passes() -> bool {
    let path = variable(c"KELSON_HOLD_FSYNC");
    // SAFETY: the path is a C string that lives as long as the process; the call does not keep it.
    while !path.is_null() && unsafe { libc::access(path, libc::F_OK) } == 0 {
        rest(LOOK_EVERY);
    }
    let page = page();
    page.syncs.fetch_add(1, Ordering::Relaxed);
    let delay = page.delay_us.load(Ordering::Relaxed);
    let hurt = |page: &Page| page.hold.load(Ordering::Relaxed) != 0;
    if hurt(page) || delay != 0 || page.sync_errno.load(Ordering::Relaxed) != 0 {
        page.syncs_hurt.fetch_add(1, Ordering::Relaxed);
    }
    while hurt(page) {
        rest(LOOK_EVERY);
    }
    if delay != 0 {
        rest(delay.min(1_000_000) as libc::useconds_t);
    }
    page.sync_errno.load(Ordering::Relaxed) == 0
}

/// Stands in for the C library's `fsync`.
// SAFETY: the name is meant to be found before the C library's; the types are the same.
#[unsafe(no_mangle)]
pub extern "C" fn fsync(fd: libc::c_int) -> libc::c_int {
    if !sync_passes() {
        return fail(page().sync_errno.load(Ordering::Relaxed));
    }
    // SAFETY: the system call takes any number and answers an error for a wrong one.
    unsafe { libc::syscall(libc::SYS_fsync, fd) as libc::c_int }
}

/// Stands in for the C library's `fdatasync`.
// SAFETY: as above.
#[unsafe(no_mangle)]
pub extern "C" fn fdatasync(fd: libc::c_int) -> libc::c_int {
    if !sync_passes() {
        return fail(page().sync_errno.load(Ordering::Relaxed));
    }
    // SAFETY: as above.
    unsafe { libc::syscall(libc::SYS_fdatasync, fd) as libc::c_int }
}

/// The number with which a write to this descriptor has to fail now; zero if it passes. Sockets and
/// the member's own log (its standard output and error) are never hurt.
fn write_error(fd: libc::c_int) -> u64 {
    let page = page();
    let number = page.write_errno.load(Ordering::Relaxed);
    if number == 0 || fd <= 2 {
        return 0;
    }
    // SAFETY: all zeros are a valid `stat`, which the call fills in.
    let mut stat: libc::stat = unsafe { std::mem::zeroed() };
    // SAFETY: as above; a wrong descriptor gives an error.
    let known = unsafe { libc::fstat(fd, &raw mut stat) } == 0;
    if !known || stat.st_mode & libc::S_IFMT != libc::S_IFREG {
        return 0;
    }
    page.writes_failed.fetch_add(1, Ordering::Relaxed);
    number
}

/// Stands in for the C library's `write`.
///
/// # Safety
/// As the C library's: `bytes` has `count` bytes.
// SAFETY: as above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn write(
    fd: libc::c_int,
    bytes: *const libc::c_void,
    count: libc::size_t,
) -> libc::ssize_t {
    match write_error(fd) {
        // SAFETY: the arguments are the caller's own.
        0 => unsafe { libc::syscall(libc::SYS_write, fd, bytes, count) as libc::ssize_t },
        number => fail(number) as libc::ssize_t,
    }
}

/// Stands in for the C library's `pwrite64`.
///
/// # Safety
/// As [`write`].
// SAFETY: as above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pwrite64(
    fd: libc::c_int,
    bytes: *const libc::c_void,
    count: libc::size_t,
    offset: libc::off64_t,
) -> libc::ssize_t {
    match write_error(fd) {
        // SAFETY: the arguments are the caller's own.
        0 => unsafe {
            libc::syscall(libc::SYS_pwrite64, fd, bytes, count, offset) as libc::ssize_t
        },
        number => fail(number) as libc::ssize_t,
    }
}

/// Stands in for the C library's `writev`.
///
/// # Safety
/// As the C library's: `parts` has `count` parts.
// SAFETY: as above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn writev(
    fd: libc::c_int,
    parts: *const libc::iovec,
    count: libc::c_int,
) -> libc::ssize_t {
    match write_error(fd) {
        // SAFETY: the arguments are the caller's own.
        0 => unsafe { libc::syscall(libc::SYS_writev, fd, parts, count) as libc::ssize_t },
        number => fail(number) as libc::ssize_t,
    }
}

fn real_clock() -> Option<ClockGettime> {
    let mut found = REAL_CLOCK.load(Ordering::Relaxed);
    if found.is_null() {
        // SAFETY: the name is a C string; the next library behind this one is the C library, whose
        // clock needs no system call.
        found = unsafe { libc::dlsym(libc::RTLD_NEXT, c"clock_gettime".as_ptr()) };
        REAL_CLOCK.store(found, Ordering::Relaxed);
    }
    // SAFETY: the C library's function of that name has this type; none stays none.
    unsafe { std::mem::transmute::<*mut libc::c_void, Option<ClockGettime>>(found) }
}

/// Stands in for the C library's `clock_gettime`; only the wall clock is ever off.
///
/// # Safety
/// As the C library's: `time` may be written to.
// SAFETY: as above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn clock_gettime(
    clock: libc::clockid_t,
    time: *mut libc::timespec,
) -> libc::c_int {
    let Some(real) = real_clock() else { return fail(libc::ENOSYS as u64) };
    let result = real(clock, time);
    let wall = matches!(clock, libc::CLOCK_REALTIME | libc::CLOCK_REALTIME_COARSE);
    if !wall || result != 0 {
        return result;
    }
    let offset = page().clock_offset_ns.load(Ordering::Relaxed);
    if offset != 0 {
        page().clock_reads.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the call above filled it in.
        let time = unsafe { &mut *time };
        let nanos = time.tv_nsec + offset % 1_000_000_000;
        time.tv_sec += offset / 1_000_000_000 + nanos.div_euclid(1_000_000_000);
        time.tv_nsec = nanos.rem_euclid(1_000_000_000);
    }
    result
}
