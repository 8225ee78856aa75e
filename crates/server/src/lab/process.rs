//! One member's process: started with etcd's flags, signalled by its pid while it is not yet reaped,
//! and tied to the lab's life. It never looks a process up by name.
//!
//! A member must not outlive a lab that is killed. The kernel's death signal does that, and a process
//! must ask for it itself; so the lab starts its own program under a hidden word, which asks, makes
//! sure that the lab is still there, and becomes the server. The signal is SIGKILL: a paused member
//! would never act on SIGTERM, and the data is as safe as after any other kill -9.

use std::fs::{self, File};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, ExitCode, ExitStatus, Stdio};

use rustix::process::{Pid, Signal, getppid, kill_process, set_parent_process_death_signal};

use super::certs::Certs;
use super::folder::{Entry, Folder, name};

/// The hidden first word: `kelson lab run-member LAB_PID PROGRAM FLAGS...`.
pub(crate) const MEMBER_WORD: &str = "run-member";

/// A log that is longer than this at a start is put aside, and the one put aside before it goes.
const LOG_BYTES_MAX: u64 = 16 << 20;

/// A running member.
#[derive(Debug)]
pub(crate) struct Process {
    child: Child,
}

/// What the kernel tells of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Seen {
    /// It stands still after SIGSTOP.
    pub(crate) stopped: bool,
    /// Memory in use. Unit: bytes.
    pub(crate) resident_bytes: u64,
}

impl Process {
    /// Starts a member. Must be called by a thread that lives as long as the lab.
    ///
    /// # Errors
    /// A text for the user.
    pub(crate) fn start(
        folder: &Folder,
        entry: &Entry,
        certs: Option<&Certs>,
    ) -> Result<Self, String> {
        let path = folder.log(entry.number);
        let log = open_log(&path)
            .map_err(|error| format!("cannot open the log {}: {error}", path.display()))?;
        let mut command = Command::new(&folder.program);
        command
            .arg("lab")
            .arg(MEMBER_WORD)
            .arg(std::process::id().to_string())
            .arg(&folder.server)
            .args(flags(folder, entry, certs))
            .stdin(Stdio::null())
            .stdout(log.try_clone().map_err(|error| error.to_string())?)
            .stderr(log)
            // Ctrl-C in the lab's terminal is for the lab, which then stops members in order.
            .process_group(0);
        // Settings of the user's shell are for the user's own etcd.
        for (variable, _) in std::env::vars_os() {
            if variable.to_string_lossy().starts_with("ETCD_") {
                command.env_remove(variable);
            }
        }
        let child = command
            .spawn()
            .map_err(|error| format!("cannot start {}: {error}", name(entry.number)))?;
        Ok(Self { child })
    }

    /// Its process id.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal. The pid cannot belong to another process: this one is reaped only by
    /// [`Process::ended`].
    pub(crate) fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw);
        // The only failure is a process that has just ended, which the next look will tell.
        let _ended = pid.map(|pid| kill_process(pid, signal));
    }

    /// Asks whether it has ended, and if so how.
    pub(crate) fn ended(&mut self) -> Option<String> {
        match self.child.try_wait() {
            Ok(status) => status.map(describe),
            Err(error) => Some(format!("lost: {error}")),
        }
    }

    /// Ends it at once and waits for that.
    pub(crate) fn kill(&mut self) {
        // Both fail only for a process that has ended.
        let _ended = self.child.kill();
        let _reaped = self.child.wait();
    }

    /// Looks at the process; `None` when it is gone.
    pub(crate) fn look(&self) -> Option<Seen> {
        parse_stat(&fs::read_to_string(format!("/proc/{}/stat", self.child.id())).ok()?)
    }
}

/// Turns this process into the member that the lab asks for; returns only when that fails.
pub(crate) fn become_member(words: &[String]) -> ExitCode {
    let [lab, program, flags @ ..] = words else {
        super::complain("this word is for the lab's own use");
        return ExitCode::from(super::USAGE);
    };
    if let Err(error) = set_parent_process_death_signal(Some(Signal::KILL)) {
        super::complain(&format!("cannot tie the member to its lab: {error}"));
        return ExitCode::FAILURE;
    }
    // The lab may have gone before the line above took effect.
    let parent = getppid().map(|pid| pid.as_raw_nonzero().to_string());
    if parent.as_deref() != Some(lab.as_str()) {
        super::complain("the lab has ended");
        return ExitCode::FAILURE;
    }
    let error = Command::new(program).args(flags).exec();
    super::complain(&format!("cannot run {program}: {error}"));
    ExitCode::FAILURE
}

/// The flags of a member: etcd's own.
fn flags(folder: &Folder, entry: &Entry, certs: Option<&Certs>) -> Vec<String> {
    let record = &folder.record;
    let ports = record.ports(entry.number);
    let client = record.url(ports.client);
    let mut flags = vec![
        format!("--name={}", name(entry.number)),
        format!("--data-dir={}", folder.data_dir(entry.number).display()),
        format!("--listen-client-urls={client}"),
        format!("--advertise-client-urls={client}"),
        format!("--listen-peer-urls={}", record.url(ports.peer)),
        format!("--initial-advertise-peer-urls={}", record.url(ports.advertised)),
        format!("--listen-metrics-urls=http://{}", ports.metrics),
        format!("--initial-cluster={}", entry.initial_cluster),
        format!("--initial-cluster-state={}", if entry.joined { "existing" } else { "new" }),
        format!("--initial-cluster-token={}", record.token),
    ];
    if let Some(certs) = certs {
        for (prefix, whose) in [("", "server"), ("peer-", "peer")] {
            flags.push(format!("--{prefix}cert-file={}", certs.cert(whose).display()));
            flags.push(format!("--{prefix}key-file={}", certs.key(whose).display()));
            flags.push(format!("--{prefix}trusted-ca-file={}", certs.ca().display()));
            flags.push(format!("--{prefix}client-cert-auth=true"));
        }
    }
    flags.extend(record.server_flags.iter().cloned());
    flags
}

fn open_log(path: &Path) -> std::io::Result<File> {
    if fs::metadata(path).is_ok_and(|found| found.len() > LOG_BYTES_MAX) {
        fs::rename(path, path.with_extension("log.old"))?;
    }
    File::options().create(true).append(true).open(path)
}

fn describe(status: ExitStatus) -> String {
    match (status.signal(), status.code()) {
        (Some(9), _) => "killed".to_owned(),
        (Some(2 | 15), _) | (_, Some(0)) => "stopped".to_owned(),
        (Some(signal), _) => format!("ended by signal {signal}"),
        (None, code) => format!("ended with code {}", code.unwrap_or(-1)),
    }
}

/// Reads the line of `/proc/PID/stat`; fields are counted behind the process name, which may hold
/// anything.
fn parse_stat(line: &str) -> Option<Seen> {
    let fields: Vec<&str> = line.rsplit_once(')')?.1.split_whitespace().collect();
    let pages: u64 = fields.get(21)?.parse().ok()?;
    let page = u64::try_from(rustix::param::page_size()).ok()?;
    Some(Seen { stopped: *fields.first()? == "T", resident_bytes: pages.checked_mul(page)? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stat_lines_are_read_behind_any_name() {
        let rest: Vec<String> = (4..=52).map(|n| n.to_string()).collect();
        let page = u64::try_from(rustix::param::page_size()).expect("small");
        let line = format!("7 (odd) T name)) T {}", rest.join(" "));
        assert_eq!(parse_stat(&line), Some(Seen { stopped: true, resident_bytes: 24 * page }));
        let line = format!("7 (x) S {}", rest.join(" "));
        assert!(!parse_stat(&line).expect("read").stopped);
        assert_eq!(parse_stat("7 (cut"), None);
    }
}
