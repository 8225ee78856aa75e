//! The machine as the simulated process sees it: a clock that stands still between two ticks, and random
//! numbers that come from the seed. Both replace calls of the C library for the whole process, since
//! libraries ask for time and randomness in places that no parameter reaches (the order of a hash map,
//! the choice of `select!`, the deadline of a request). A process simulates once, and nothing else.
//! It decides nothing: before [`begin`] both calls are the system's.
#![allow(unreachable_pub, reason = "the linker sees the two functions")]
#![allow(unsafe_code, reason = "functions of the C library are replaced, and called")]

use std::cell::Cell;
use std::ffi::{c_int, c_uint, c_void};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::rng::Rng;

/// When simulated time begins, for wall clocks. Unit: seconds since 1970.
const EPOCH: u64 = 1_790_000_000;

/// How far the simulated clock is ahead of the system's at the beginning. Unit: seconds.
const AHEAD: u64 = 100_000;

static IS_SIMULATED: AtomicBool = AtomicBool::new(false);
/// The monotonic clock at the beginning. Unit: nanoseconds.
static BASE: AtomicU64 = AtomicU64::new(0);
/// Simulated time since the beginning. Unit: nanoseconds.
static NOW: AtomicU64 = AtomicU64::new(0);
/// For threads other than the simulation's: which of them asks first is not certain, and must not
/// matter.
static OTHERS: AtomicU64 = AtomicU64::new(0);

thread_local! {
    /// The generator of the simulation's own thread.
    static RANDOM: Cell<Option<u64>> = const { Cell::new(None) };
}

/// Makes time stand still and this thread's random numbers those of a seed, for the rest of the process.
pub(super) fn begin(seed: u64) {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    system_clock(libc::CLOCK_MONOTONIC, &raw mut now);
    // Waits with a deadline go by the system's clock, and one that was behind it would end them at once.
    // A whole second, so that rounding is the same.
    BASE.store((now.tv_sec.unsigned_abs() + AHEAD) * 1_000_000_000, Ordering::SeqCst);
    OTHERS.store(Rng::fork(seed, 101).draw(), Ordering::SeqCst);
    RANDOM.set(Some(Rng::fork(seed, 102).draw()));
    IS_SIMULATED.store(true, Ordering::SeqCst);
}

/// Sets the time since the beginning. Unit: milliseconds.
pub(super) fn set_now(milliseconds: u64) {
    NOW.store(milliseconds * 1_000_000, Ordering::SeqCst);
}

fn system_clock(clock: libc::clockid_t, into: *mut libc::timespec) -> c_int {
    // SAFETY: the caller's place is passed on to the call that it was meant for.
    unsafe { libc::syscall(libc::SYS_clock_gettime, clock, into) as c_int }
}

/// The C library's clock.
///
/// # Safety
/// As in the C library: `into` is a place for a time.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn clock_gettime(clock: libc::clockid_t, into: *mut libc::timespec) -> c_int {
    let base = match clock {
        libc::CLOCK_REALTIME | libc::CLOCK_REALTIME_COARSE => EPOCH * 1_000_000_000,
        libc::CLOCK_MONOTONIC | libc::CLOCK_MONOTONIC_COARSE | libc::CLOCK_BOOTTIME => {
            BASE.load(Ordering::Relaxed)
        }
        _ => return system_clock(clock, into),
    };
    if !IS_SIMULATED.load(Ordering::Relaxed) || into.is_null() {
        return system_clock(clock, into);
    }
    let now = base + NOW.load(Ordering::Relaxed);
    let (tv_sec, tv_nsec) = ((now / 1_000_000_000) as i64, (now % 1_000_000_000) as i64);
    // SAFETY: the caller promises a place for a time, and it is not null.
    unsafe { into.write(libc::timespec { tv_sec, tv_nsec }) };
    0
}

/// The C library's source of random bytes.
///
/// # Safety
/// As in the C library: `into` is a place for `bytes` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn getrandom(into: *mut c_void, bytes: usize, flags: c_uint) -> isize {
    if !IS_SIMULATED.load(Ordering::Relaxed) {
        // SAFETY: the caller's place is passed on to the call that it was meant for.
        return unsafe { libc::syscall(libc::SYS_getrandom, into, bytes, flags) as isize };
    }
    for at in 0..bytes {
        let byte = (next() >> 24) as u8;
        // SAFETY: the caller promises a place for so many bytes.
        unsafe { into.cast::<u8>().add(at).write(byte) };
    }
    bytes as isize
}

fn next() -> u64 {
    // A thread that is ending has no generator any more.
    let own = RANDOM.try_with(|random| {
        let state = random.get()?.wrapping_add(1);
        random.set(Some(state));
        Some(state)
    });
    let state = own.ok().flatten().unwrap_or_else(|| OTHERS.fetch_add(1, Ordering::Relaxed));
    Rng::fork(state, 103).draw()
}
