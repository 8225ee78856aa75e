//! The calls that no safe wrapper offers: a child that asks to be traced, and the few requests of
//! `ptrace` that stop it at its system calls. It keeps no state and decides nothing; the recorder
//! stands on it. Of a process that is stopped, memory and files are read through `/proc`.
#![allow(unsafe_code, reason = "ptrace, waitpid and pre_exec have no safe form")]

use std::io;
use std::mem::MaybeUninit;
use std::os::unix::process::CommandExt;
use std::process::Command;

/// Why a traced thread stands still.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stop {
    /// At a system call, before or after it.
    Call,
    /// A signal is about to be delivered.
    Signal(i32),
    /// Something that only needs to be passed: a new thread, a new program, a group stop.
    Other,
    /// The thread has ended, by itself with a code ...
    Exited(i32),
    /// ... or by a signal.
    Killed(i32),
}

/// A system call at which a thread stands.
#[derive(Clone, Copy, Debug)]
pub(crate) enum At {
    /// Before it: number and arguments.
    Entry(u64, [u64; 6]),
    /// Behind it: the result, negative for an error.
    Exit(i64),
    /// Neither.
    Elsewhere,
}

/// Makes a command ask the thread that spawns it to trace it.
pub(crate) fn trace_me(command: &mut Command) {
    let ask = || {
        // SAFETY: one system call between fork and exec; nothing is allocated or locked.
        check(unsafe { libc::ptrace(libc::PTRACE_TRACEME, 0, 0_usize, 0_usize) }).map(drop)
    };
    // SAFETY: the closure makes that one call only.
    unsafe { command.pre_exec(ask) };
}

/// Follows threads and children from now on, and ends all of them with the tracer. The process stands
/// at its first stop.
pub(crate) fn follow(pid: i32) -> io::Result<()> {
    let options = libc::PTRACE_O_TRACESYSGOOD
        | libc::PTRACE_O_TRACECLONE
        | libc::PTRACE_O_TRACEFORK
        | libc::PTRACE_O_TRACEVFORK
        | libc::PTRACE_O_TRACEEXEC
        | libc::PTRACE_O_EXITKILL;
    // SAFETY: the request takes a number; a thread that is not stopped answers an error.
    check(unsafe { libc::ptrace(libc::PTRACE_SETOPTIONS, pid, 0_usize, options as usize) })
        .map(drop)
}

/// Lets a thread run to its next system call or signal. One that was killed meanwhile is no error.
pub(crate) fn resume(pid: i32, signal: i32) -> io::Result<()> {
    // SAFETY: the request takes a number; a thread that is not stopped answers an error.
    let resumed = unsafe { libc::ptrace(libc::PTRACE_SYSCALL, pid, 0_usize, signal as usize) };
    match check(resumed) {
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(()),
        other => other.map(drop),
    }
}

/// Ends a traced thread and its process at once. One that has ended already is no error.
pub(crate) fn kill(pid: i32) {
    // SAFETY: the call takes any number, and this one is a thread that is traced by the caller.
    unsafe { libc::kill(pid, libc::SIGKILL) };
}

/// Waits for any traced thread of this thread.
pub(crate) fn wait() -> io::Result<(i32, Stop)> {
    let mut status = 0;
    let flags = libc::__WALL | libc::__WNOTHREAD;
    let pid = loop {
        // SAFETY: `status` is a valid place for the one number that is written.
        let pid = unsafe { libc::waitpid(-1, &raw mut status, flags) };
        match check(i64::from(pid)) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
            Ok(_) => break pid,
        }
    };
    Ok((pid, stop(status)))
}

fn stop(status: i32) -> Stop {
    if libc::WIFEXITED(status) {
        return Stop::Exited(libc::WEXITSTATUS(status));
    }
    if libc::WIFSIGNALED(status) {
        return Stop::Killed(libc::WTERMSIG(status));
    }
    let is_event = status >> 16 != 0;
    match libc::WSTOPSIG(status) {
        signal if signal == libc::SIGTRAP | 0x80 => Stop::Call,
        // A new thread begins with a stop that it must not see.
        libc::SIGSTOP | libc::SIGTRAP => Stop::Other,
        _ if is_event => Stop::Other,
        signal => Stop::Signal(signal),
    }
}

/// Where a thread stands that has stopped at a system call.
pub(crate) fn at(pid: i32) -> io::Result<At> {
    let mut info = MaybeUninit::<libc::ptrace_syscall_info>::zeroed();
    let size = size_of::<libc::ptrace_syscall_info>();
    // SAFETY: the kernel writes at most `size` bytes to a place of that size.
    let got = unsafe { libc::ptrace(libc::PTRACE_GET_SYSCALL_INFO, pid, size, info.as_mut_ptr()) };
    check(got)?;
    // SAFETY: all bytes were zeroed, and any bytes are valid in each of its fields.
    let info = unsafe { info.assume_init() };
    Ok(match info.op {
        // SAFETY: the kernel says by `op` which part of the union it has written.
        libc::PTRACE_SYSCALL_INFO_ENTRY => unsafe { At::Entry(info.u.entry.nr, info.u.entry.args) },
        // SAFETY: as above.
        libc::PTRACE_SYSCALL_INFO_EXIT => unsafe { At::Exit(info.u.exit.sval) },
        _ => At::Elsewhere,
    })
}

fn check(result: i64) -> io::Result<i64> {
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(result) }
}
