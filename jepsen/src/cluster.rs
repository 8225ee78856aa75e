//! Members as processes: start, kill, pause, restart, logs, and the disks they write to. It never looks
//! into a member's files and never speaks to a member; commands and faults call it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc;

use kelson_image::{Image, Kind};
use rustix::process::{Pid, Signal, kill_process};

use crate::fabric::{self, Fabric};
use crate::page::Page;
use crate::sys;

/// Size of a member's own file system. Unit: MiB. Members want 256 MiB free and keep up to four log
/// segments of 64 MiB; the file is sparse, so room that is not used costs nothing.
const DISK_MIB: u64 = 1024;

/// The line that the harness writes into a member's log at each start.
const STARTED: &str = "--- started by the harness";

/// What is tested.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Target {
    Kelson,
    Etcd,
}

impl Target {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Kelson => "kelson",
            Self::Etcd => "etcd",
        }
    }

    /// The program as this repository builds or fetches it.
    pub(crate) fn default_bin(self) -> PathBuf {
        let target = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target");
        match self {
            Self::Etcd => target.join("peers/bin/etcd"),
            Self::Kelson => {
                let release = target.join("release/kelson");
                if release.exists() { release } else { target.join("debug/kelson") }
            }
        }
    }
}

/// How to start members.
#[derive(Clone, Debug)]
pub(crate) struct Setup {
    pub(crate) target: Target,
    pub(crate) bin: PathBuf,
    /// Flags beside those that name the member and its cluster.
    pub(crate) extra: Vec<String>,
    /// The run directory; each member has a folder in it.
    pub(crate) dir: PathBuf,
    /// Each member's data lie on a file system of its own, so that its power can be cut.
    pub(crate) disk: Option<Kind>,
    /// The library that hurts system calls, preloaded into each member.
    pub(crate) shim: Option<PathBuf>,
}

/// The processes of one cluster.
pub(crate) struct Cluster {
    setup: Setup,
    fabric: Fabric,
    members: BTreeMap<usize, Member>,
    launcher: Launcher,
}

struct Member {
    flags: Vec<String>,
    image: Option<Image>,
    page: Option<Page>,
    child: Option<Child>,
    paused: bool,
    /// Ended by the harness, or by its own removal: its death is no finding.
    excused: bool,
    /// Starts so far, and those after which it was free to end by itself, with loud words.
    starts: usize,
    forgiven: BTreeSet<usize>,
    /// How it ended before the harness came to end it.
    fallen: Vec<ExitStatus>,
}

/// Starts processes from one thread that lives as long as the harness: a member dies with the thread
/// that started it.
#[derive(Clone)]
struct Launcher {
    requests: mpsc::Sender<(Command, mpsc::Sender<io::Result<Child>>)>,
}

impl Launcher {
    fn new() -> io::Result<Self> {
        // Unbounded in type only: the callers wait for each answer.
        let (requests, inbox) = mpsc::channel::<(Command, mpsc::Sender<io::Result<Child>>)>();
        std::thread::Builder::new().name("launcher".into()).spawn(move || {
            for (mut command, reply) in inbox {
                reply.send(command.spawn()).ok();
            }
        })?;
        Ok(Self { requests })
    }

    fn spawn(&self, command: Command) -> io::Result<Child> {
        let (reply, answer) = mpsc::channel();
        let gone = |_| io::Error::other("the launcher thread is gone");
        self.requests.send((command, reply)).map_err(|_| gone(()))?;
        answer.recv().map_err(|_| gone(()))?
    }
}

/// The URL on which a member listens for its peers.
pub(crate) fn peer_url(member: usize) -> String {
    format!("http://{}:2380", fabric::address(member))
}

/// Members as `--initial-cluster` names them.
fn initial(peers: &[usize]) -> String {
    let each = peers.iter().map(|peer| format!("{}={}", name(*peer), peer_url(*peer)));
    each.collect::<Vec<_>>().join(",")
}

fn name(member: usize) -> String {
    format!("m{member}")
}

impl Cluster {
    pub(crate) fn new(setup: Setup, fabric: Fabric) -> io::Result<Self> {
        if !setup.bin.exists() {
            return Err(io::Error::other(format!("no program at {}", setup.bin.display())));
        }
        Ok(Self { setup, fabric, members: BTreeMap::new(), launcher: Launcher::new()? })
    }

    /// Starts a member. `peers` are all members that it is told of, itself included; `existing` says
    /// that it joins them instead of founding a cluster.
    pub(crate) fn start(
        &mut self,
        member: usize,
        peers: &[usize],
        existing: bool,
    ) -> io::Result<()> {
        std::fs::create_dir_all(self.folder(member))?;
        let (image, page) = self.belongings(member)?;
        let client = format!("http://{}:2379", fabric::address(member));
        let mut flags = Vec::new();
        let mut flag = |key: &str, value: String| flags.push(format!("--{key}={value}"));
        flag("name", name(member));
        flag("data-dir", self.data(member).display().to_string());
        flag("listen-client-urls", client.clone());
        flag("advertise-client-urls", client);
        flag("listen-peer-urls", peer_url(member));
        flag("initial-advertise-peer-urls", peer_url(member));
        flag("initial-cluster", initial(peers));
        flag("initial-cluster-token", "jepsen".into());
        flag("initial-cluster-state", if existing { "existing" } else { "new" }.into());
        flags.extend(self.setup.extra.iter().cloned());
        let before = self.members.remove(&member);
        let (starts, forgiven, fallen) = before.map_or_else(Default::default, |before| {
            (before.starts, before.forgiven, before.fallen)
        });
        let (child, paused, excused) = (None, false, false);
        let state = Member { flags, image, page, child, paused, excused, starts, forgiven, fallen };
        self.members.insert(member, state);
        self.restart(member)
    }

    /// The disk and the page of a member: those it had, or new ones.
    fn belongings(&mut self, member: usize) -> io::Result<(Option<Image>, Option<Page>)> {
        if let Some(before) = self.members.get_mut(&member) {
            return Ok((before.image.take(), before.page.take()));
        }
        let folder = self.folder(member);
        let make = |kind| Image::create(&folder.join("disk"), kind, DISK_MIB);
        let image = self.setup.disk.map(make).transpose()?;
        let page = self.setup.shim.as_ref().map(|_| Page::create(&folder.join("page")));
        Ok((image, page.transpose()?))
    }

    /// The data directory of a member.
    pub(crate) fn data(&self, member: usize) -> PathBuf {
        let folder = self.folder(member);
        let root = if self.setup.disk.is_some() { folder.join("disk/mnt") } else { folder };
        root.join("data")
    }

    /// Starts the process of a member again, with the flags it had.
    pub(crate) fn restart(&mut self, member: usize) -> io::Result<()> {
        let mut log =
            File::options().create(true).append(true).open(self.folder(member).join("log"))?;
        writeln!(log, "{STARTED}")?;
        let state = self.members.get_mut(&member).ok_or_else(|| unknown(member))?;
        let mut command = Command::new(&self.setup.bin);
        command.args(&state.flags).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        if let (Some(shim), Some(page)) = (&self.setup.shim, &state.page) {
            command.env("LD_PRELOAD", shim).env("KELSON_FAULT_PAGE", page.path());
        }
        match self.fabric.namespace(member) {
            Some(namespace) => sys::confine(&mut command, namespace),
            None => sys::tie(&mut command),
        }
        state.child = Some(self.launcher.spawn(command)?);
        state.starts += 1;
        state.paused = false;
        state.excused = false;
        Ok(())
    }

    /// Sends SIGKILL and waits for the end.
    pub(crate) fn kill(&mut self, member: usize) -> io::Result<()> {
        let state = self.members.get_mut(&member).ok_or_else(|| unknown(member))?;
        let excused = std::mem::replace(&mut state.excused, true);
        if let Some(mut child) = state.child.take() {
            if let Some(status) = child.try_wait()?.filter(|_| !excused) {
                state.fallen.push(status);
            }
            child.kill()?;
            child.wait()?;
        }
        Ok(())
    }

    /// Asks a member to stop in order.
    pub(crate) fn terminate(&mut self, member: usize) -> io::Result<()> {
        self.excuse(member);
        let pid = self.pid(member).ok_or_else(|| unknown(member))?;
        kill_process(pid, Signal::TERM).map_err(io::Error::from)
    }

    /// Deletes the data of a member that does not run.
    pub(crate) fn wipe(&mut self, member: usize) -> io::Result<()> {
        std::fs::remove_dir_all(self.data(member))
    }

    /// The command with which an operator makes a member's data anew out of a snapshot. What it had is
    /// deleted; it must not run. `bump` moves the revisions on and compacts all before, 0 does not.
    pub(crate) fn restore(
        &mut self,
        member: usize,
        peers: &[usize],
        snapshot: &Path,
        bump: i64,
    ) -> io::Result<Command> {
        self.wipe(member)?;
        // Kelson is its own tool; etcd's lies beside it.
        let etcdutl = self.setup.bin.with_file_name("etcdutl");
        let is_etcd = self.setup.target == Target::Etcd;
        let mut command = Command::new(if is_etcd { &etcdutl } else { &self.setup.bin });
        command.args(["snapshot", "restore"]).arg(snapshot);
        command.arg("--data-dir").arg(self.data(member));
        command.args(["--name", &name(member), "--initial-cluster", &initial(peers)]);
        command.args(["--initial-advertise-peer-urls", &peer_url(member)]);
        command.args(["--initial-cluster-token", "restored"]).stdin(Stdio::null());
        if bump > 0 {
            command.args(["--mark-compacted", "--bump-revision", &bump.to_string()]);
        }
        Ok(command)
    }

    /// Cuts the power of a member's disk. Its process feels that as failing writes and may end.
    pub(crate) fn cut_power(&mut self, member: usize) -> io::Result<()> {
        self.excuse(member);
        let image = self.members.get(&member).and_then(|state| state.image.as_ref());
        image.ok_or_else(|| no_image(member))?.cut_power()
    }

    /// Writes what the kernel still holds of a member's disk, as it does by itself within half a minute.
    pub(crate) fn write_back(&self, member: usize) -> io::Result<()> {
        let image = self.members.get(&member).and_then(|state| state.image.as_ref());
        let mount = image.ok_or_else(|| no_image(member))?.mount_point();
        Ok(rustix::fs::syncfs(File::open(mount)?)?)
    }

    /// Power is back: the process is gone, the file system replays its journal, the member starts.
    pub(crate) fn repower(&mut self, member: usize) -> io::Result<()> {
        self.kill(member)?;
        let image = self.members.get_mut(&member).and_then(|state| state.image.as_mut());
        let image = image.ok_or_else(|| no_image(member))?;
        image.unmount()?;
        image.mount()?;
        self.restart(member)
    }

    /// The page through which a member's system calls are hurt.
    pub(crate) fn page(&self, member: usize) -> Option<&Page> {
        self.members.get(&member)?.page.as_ref()
    }

    /// What a member wrote to its log since its last start.
    pub(crate) fn last_log(&self, member: usize) -> String {
        let bytes = std::fs::read(self.folder(member).join("log")).unwrap_or_default();
        let text = String::from_utf8_lossy(&bytes);
        text.rsplit(STARTED).next().unwrap_or_default().to_owned()
    }

    /// Until its next start this member may end by itself: it was removed from the cluster, or was
    /// hurt in a way that it must not survive.
    pub(crate) fn excuse(&mut self, member: usize) {
        if let Some(state) = self.members.get_mut(&member) {
            state.excused = true;
            state.forgiven.insert(state.starts);
        }
    }

    pub(crate) fn pause(&mut self, member: usize) -> io::Result<()> {
        self.signal(member, Signal::STOP)
    }

    pub(crate) fn resume(&mut self, member: usize) -> io::Result<()> {
        self.signal(member, Signal::CONT)
    }

    fn signal(&mut self, member: usize, signal: Signal) -> io::Result<()> {
        let pid = self.pid(member).ok_or_else(|| unknown(member))?;
        kill_process(pid, signal)?;
        if let Some(state) = self.members.get_mut(&member) {
            state.paused = signal == Signal::STOP;
        }
        Ok(())
    }

    /// The process id of a running member.
    pub(crate) fn pid(&self, member: usize) -> Option<Pid> {
        self.members.get(&member)?.child.as_ref().map(Pid::from_child)
    }

    /// Members that were started and not killed.
    pub(crate) fn running(&self) -> Vec<usize> {
        let runs = |state: &Member| state.child.is_some() && !state.paused;
        self.members.iter().filter(|(_, state)| runs(state)).map(|(member, _)| *member).collect()
    }

    /// How a member ended, if it ended by itself.
    pub(crate) fn ended(&mut self, member: usize) -> Option<ExitStatus> {
        self.members.get_mut(&member)?.child.as_mut()?.try_wait().ok()?
    }

    /// Members that ended although nobody told them to, with how they ended.
    pub(crate) fn deaths(&mut self) -> Vec<(usize, ExitStatus)> {
        let mut deaths = Vec::new();
        for (member, state) in &mut self.members {
            deaths.extend(state.fallen.iter().map(|status| (*member, *status)));
            if let Some(child) = state.child.as_mut().filter(|_| !state.excused)
                && let Ok(Some(status)) = child.try_wait()
            {
                deaths.push((*member, status));
            }
        }
        deaths
    }

    /// Kills all members; with `keep` false their data goes too, logs stay.
    pub(crate) fn stop(&mut self, keep: bool) -> io::Result<()> {
        let members: Vec<usize> = self.members.keys().copied().collect();
        for member in members {
            self.kill(member)?;
            let data = self.data(member);
            if !keep && data.exists() {
                std::fs::remove_dir_all(&data)?;
            }
            let folder = self.folder(member);
            if let Some(state) = self.members.get_mut(&member)
                && let Some(image) = state.image.take()
            {
                put_away(image, &folder, &data)?;
            }
            std::fs::remove_file(folder.join("page")).ok();
        }
        Ok(())
    }

    /// Bytes of memory of a running member: all of it, and the part that is no mapped file.
    pub(crate) fn memory(&self, member: usize) -> Option<Memory> {
        let pid = self.pid(member)?.as_raw_nonzero();
        let mut text = String::new();
        File::open(format!("/proc/{pid}/status")).ok()?.read_to_string(&mut text).ok()?;
        let field = |name: &str| -> Option<u64> {
            let line = text.lines().find(|line| line.starts_with(name))?;
            line.split_whitespace().nth(1)?.parse::<u64>().ok().map(|kib| kib << 10)
        };
        Some(Memory { resident: field("VmRSS:")?, anonymous: field("RssAnon:")? })
    }

    fn folder(&self, member: usize) -> PathBuf {
        self.setup.dir.join(name(member))
    }

    /// Lines that only a broken member writes, out of the logs of members that should be well.
    pub(crate) fn alarms(&self) -> Vec<String> {
        let loud = ["panicked at", "panic:", "\"level\":\"fatal\"", "\"level\":\"panic\""];
        self.lines(false, |line| loud.iter().any(|mark| line.contains(mark)))
    }

    /// How often a member was sent the whole state, as the logs of both targets tell.
    pub(crate) fn transfers(&self) -> usize {
        let received = |line: &str| {
            line.contains("received database snapshot")
                || line.contains("received and saved database snapshot")
        };
        self.lines(true, received).len()
    }

    /// Lines of logs that fit, cut to a readable length; from times in which a member was free to end
    /// only if asked to.
    fn lines(&self, forgiven: bool, fits: impl Fn(&str) -> bool) -> Vec<String> {
        let mut found = Vec::new();
        for (member, state) in &self.members {
            let Ok(log) = std::fs::read(self.folder(*member).join("log")) else { continue };
            let text = String::from_utf8_lossy(&log);
            // What comes before the first start is nothing.
            for (start, part) in text.split(STARTED).enumerate() {
                if state.forgiven.contains(&start) && !forgiven {
                    continue;
                }
                for line in part.lines().filter(|line| fits(line)) {
                    let short: String = line.chars().take(300).collect();
                    found.push(format!("{}: {short}", name(*member)));
                }
            }
        }
        found
    }
}

/// Memory of a process in bytes.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Memory {
    pub(crate) resident: u64,
    pub(crate) anonymous: u64,
}

/// Removes an image; data that are still on it move to where they would lie without one.
fn put_away(mut image: Image, folder: &Path, data: &Path) -> io::Result<()> {
    if data.exists() {
        let mut copy = Command::new("cp");
        let status = copy.args(["-a", "--sparse=always"]).arg(data).arg(folder).status()?;
        if !status.success() {
            return Err(io::Error::other(format!("copying {}: {status}", data.display())));
        }
    }
    image.unmount()?;
    std::fs::remove_dir_all(folder.join("disk"))
}

fn no_image(member: usize) -> io::Error {
    io::Error::other(format!("member {member} has no disk of its own"))
}

fn unknown(member: usize) -> io::Error {
    io::Error::other(format!("member {member} is not running"))
}
