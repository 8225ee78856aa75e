//! A failed write or sync ends the process before anything is acknowledged.

mod log_support;

use std::os::unix::process::ExitStatusExt;
use std::process::Command;

use kelson_storage::log::{Faults, SimDisk};
use log_support::*;

const CHILD: &str = "KELSON_TEST_ABORT_CHILD";
const SIGABRT: i32 = 6;

/// The child's part: an append whose fdatasync fails. It reports every acknowledgement.
fn fail_a_sync() {
    let disk = SimDisk::new();
    let log = new_log(&disk);
    append(&log, entries(1, 1..=1, 10));
    println!("acknowledged before");
    disk.set_faults(Faults { sync_fails: true, ..Faults::default() });
    let result = wait(|done| log.append(entries(1, 2..=2, 10), done));
    println!("acknowledged after: {result:?}");
    std::process::exit(0);
}

#[test]
fn a_failed_fdatasync_ends_the_process() {
    if std::env::var_os(CHILD).is_some() {
        fail_a_sync();
    }
    let program = std::env::current_exe().expect("the test knows its own path");
    let output = Command::new(program)
        .args(["--exact", "a_failed_fdatasync_ends_the_process", "--nocapture"])
        .env(CHILD, "1")
        .output()
        .expect("the child runs");
    let (out, err) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert_eq!(output.status.signal(), Some(SIGABRT), "{out}{err}");
    assert!(out.contains("acknowledged before"), "{out}");
    assert!(!out.contains("acknowledged after"), "{out}");
    assert!(err.contains("cannot fdatasync log segment"), "{err}");
}
