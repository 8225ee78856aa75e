//! The folder of a lab: what it remembers, the lock that keeps a second lab out, and `--reset`. It
//! deletes only names that a lab gives, and only in a folder that holds a lab's record.
//!
//! ```text
//! lab.json      the record: settings and members          m1/      data directory of member 1
//! lock          held while the lab runs                   m1.log   what member 1 logs
//! control.sock  commands from other shells                tls/     CA, certificates and keys
//! ```

use std::fs::{self, DirBuilder, File};
use std::io::{ErrorKind, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

use super::args::{BASE_PORT, MEMBERS, Start};

const RECORD: &str = "lab.json";
const LOCK: &str = "lock";
/// First value of every record; another one is another program's file or a later format.
const FORMAT: &str = "kelson-lab 1";
/// Ports from one member's first to the next member's first.
const PORT_STEP: u16 = 10;
/// Numbers are not reused, so a lab of many additions ends here.
const NUMBER_MAX: u16 = 99;

/// Longest wait for the members of a lab that was killed; the kernel ends them with it.
const LEFTOVER_WAIT: Duration = Duration::from_secs(5);
const LEFTOVER_PAUSE: Duration = Duration::from_millis(50);

/// What a lab remembers.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Record {
    format: String,
    /// Cluster token, different for each new lab, so that two labs never become one cluster.
    pub(crate) token: String,
    /// Certificates everywhere.
    pub(crate) tls: bool,
    base_port: u16,
    /// The server's program when it is not this one.
    server_bin: Option<PathBuf>,
    /// Flags for every member.
    pub(crate) server_flags: Vec<String>,
    /// Number of the next new member.
    next: u16,
    /// The members, by number.
    pub(crate) members: Vec<Entry>,
}

/// What is remembered of one member.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Entry {
    /// Its number: name and ports follow from it.
    pub(crate) number: u16,
    /// Its `--initial-cluster`.
    pub(crate) initial_cluster: String,
    /// It joined a cluster that was there.
    pub(crate) joined: bool,
}

/// An open folder; the lock is held until it is dropped.
pub(crate) struct Folder {
    /// The folder, from the root.
    pub(crate) path: PathBuf,
    /// What it remembers.
    pub(crate) record: Record,
    /// This program, as it was found when the lab began: a new build may take its place meanwhile.
    pub(crate) program: PathBuf,
    /// The server's program.
    pub(crate) server: PathBuf,
    _lock: File,
}

/// The four addresses of one member, all on 127.0.0.1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ports {
    /// `--listen-client-urls`.
    pub(crate) client: SocketAddr,
    /// `--initial-advertise-peer-urls`: the lab listens here.
    pub(crate) advertised: SocketAddr,
    /// `--listen-peer-urls`: the member listens here.
    pub(crate) peer: SocketAddr,
    /// `--listen-metrics-urls`, always without TLS.
    pub(crate) metrics: SocketAddr,
}

/// Name of the member with this number.
pub(crate) fn name(number: u16) -> String {
    format!("m{number}")
}

impl Folder {
    /// Opens the folder, making it when it is not there, and locks it.
    ///
    /// # Errors
    /// A text for the user. A folder that is not a lab's is left as it is.
    pub(crate) fn open(start: &Start) -> Result<Self, String> {
        let path = make(&start.dir)?;
        let before = read_record(&path)?;
        if before.is_none() {
            refuse_foreign(&path)?;
        }
        let lock = lock(&path)?;
        let had_members = before.is_some();
        let before = match before {
            Some(record) if start.reset => {
                reset(&path, &record).map_err(|e| format!("cannot reset {}: {e}", show(&path)))?;
                None
            }
            other => other,
        };
        let mut record = match before {
            Some(record) => accept(record, start)?,
            None => Record::new(start)?,
        };
        if let Some(program) = &start.server_bin {
            record.server_bin = Some(
                fs::canonicalize(program)
                    .map_err(|error| format!("--server-bin {program}: {error}"))?,
            );
        }
        if let Some(flags) = &start.server_flags {
            record.server_flags.clone_from(flags);
        }
        wait_free(&record, if had_members { LEFTOVER_WAIT } else { Duration::ZERO })?;
        let program = std::env::current_exe()
            .map_err(|error| format!("cannot tell this program's path: {error}"))?;
        let server = record.server_bin.clone().unwrap_or_else(|| program.clone());
        let folder = Self { path, record, program, server, _lock: lock };
        folder.save()?;
        Ok(folder)
    }

    /// Writes the record; it is on disk when this returns.
    ///
    /// # Errors
    /// A text for the user.
    pub(crate) fn save(&self) -> Result<(), String> {
        let write = || {
            let text = serde_json::to_string_pretty(&self.record)?;
            let draft = self.path.join("lab.json.new");
            let mut file = File::create(&draft)?;
            file.write_all(text.as_bytes())?;
            file.sync_all()?;
            fs::rename(&draft, self.path.join(RECORD))?;
            File::open(&self.path)?.sync_all()
        };
        write().map_err(|error| format!("cannot write {}: {error}", show(&self.path.join(RECORD))))
    }

    /// Reserves the number of a new member, for ever.
    ///
    /// # Errors
    /// The numbers are used up, its ports are taken, or the record cannot be written.
    pub(crate) fn reserve(&mut self) -> Result<u16, String> {
        let number = self.record.next;
        if number > NUMBER_MAX {
            return Err(format!("this lab has numbered {NUMBER_MAX} members; --reset starts anew"));
        }
        check_free(&self.record.ports(number))?;
        self.record.next += 1;
        self.save()?;
        Ok(number)
    }

    /// Data directory of a member.
    pub(crate) fn data_dir(&self, number: u16) -> PathBuf {
        self.path.join(name(number))
    }

    /// Log of a member.
    pub(crate) fn log(&self, number: u16) -> PathBuf {
        self.path.join(format!("m{number}.log"))
    }

    /// Directory of the certificates.
    pub(crate) fn tls_dir(&self) -> PathBuf {
        self.path.join("tls")
    }

    /// Forgets a member and deletes its data.
    ///
    /// # Errors
    /// A text for the user.
    pub(crate) fn forget(&mut self, number: u16) -> Result<(), String> {
        self.record.members.retain(|entry| entry.number != number);
        self.save()?;
        delete_member(&self.path, number)
            .map_err(|error| format!("cannot delete the data of {}: {error}", name(number)))
    }
}

impl Record {
    fn new(start: &Start) -> Result<Self, String> {
        let members = start.members.unwrap_or(MEMBERS);
        let next = u16::try_from(members).expect("the command line bounds it") + 1;
        let mut random = [0; 4];
        File::open("/dev/urandom")
            .and_then(|mut source| std::io::Read::read_exact(&mut source, &mut random))
            .map_err(|error| format!("cannot read random bytes: {error}"))?;
        let mut record = Self {
            format: FORMAT.to_owned(),
            token: format!("kelson-lab-{:08x}", u32::from_le_bytes(random)),
            tls: start.tls,
            base_port: start.base_port.unwrap_or(BASE_PORT),
            server_bin: None,
            server_flags: Vec::new(),
            next,
            members: Vec::new(),
        };
        let initial: Vec<String> = (1..next).map(|number| record.peer_entry(number)).collect();
        let initial_cluster = initial.join(",");
        let entry =
            |number| Entry { number, initial_cluster: initial_cluster.clone(), joined: false };
        record.members = (1..next).map(entry).collect();
        Ok(record)
    }

    /// The addresses of a member.
    pub(crate) fn ports(&self, number: u16) -> Ports {
        let first = self.base_port + PORT_STEP * (number - 1);
        let at = |offset| SocketAddr::from((Ipv4Addr::LOCALHOST, first + offset));
        Ports { client: at(0), advertised: at(1), peer: at(2), metrics: at(3) }
    }

    /// `http` or `https` in front of an address.
    pub(crate) fn url(&self, address: SocketAddr) -> String {
        format!("{}://{address}", if self.tls { "https" } else { "http" })
    }

    /// One part of `--initial-cluster`.
    fn peer_entry(&self, number: u16) -> String {
        format!("{}={}", name(number), self.url(self.ports(number).advertised))
    }
}

/// Makes the folder and returns its path from the root.
fn make(dir: &str) -> Result<PathBuf, String> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .and_then(|()| fs::canonicalize(dir))
        .map_err(|error| format!("cannot use the folder {dir}: {error}"))
}

/// The record in `path`; `None` when there is none.
fn read_record(path: &Path) -> Result<Option<Record>, String> {
    let file = path.join(RECORD);
    let text = match fs::read_to_string(&file) {
        Ok(text) => text,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(format!("cannot read {}: {error}", show(&file))),
    };
    let unreadable = |why: &dyn std::fmt::Display| {
        format!("{} is no record of a lab ({why}); nothing was touched", show(&file))
    };
    let record: Record = serde_json::from_str(&text).map_err(|error| unreadable(&error))?;
    if record.format != FORMAT {
        return Err(unreadable(&format!("format '{}'", record.format)));
    }
    let numbers_fit = record.members.iter().all(|entry| (1..record.next).contains(&entry.number));
    let span = u32::from(record.base_port) + u32::from(PORT_STEP) * u32::from(record.next);
    if !numbers_fit || span > u32::from(u16::MAX) {
        return Err(unreadable(&"numbers out of range"));
    }
    Ok(Some(record))
}

/// A folder without a record must be empty, but for the lock of a lab that never got further.
fn refuse_foreign(path: &Path) -> Result<(), String> {
    let failed = |error| format!("cannot read the folder {}: {error}", show(path));
    for entry in fs::read_dir(path).map_err(failed)? {
        if entry.map_err(failed)?.file_name() != LOCK {
            return Err(format!(
                "{} is not empty and not a lab's folder; it stays as it is. Name another folder \
                 with --dir",
                show(path)
            ));
        }
    }
    Ok(())
}

fn lock(path: &Path) -> Result<File, String> {
    let file = path.join(LOCK);
    let lock = File::options().create(true).truncate(false).write(true).open(&file);
    let lock = lock.map_err(|error| format!("cannot open {}: {error}", show(&file)))?;
    flock(&lock, FlockOperation::NonBlockingLockExclusive).map_err(|error| match error {
        rustix::io::Errno::WOULDBLOCK => format!(
            "a lab runs in {} already; 'kelson lab --dir {} status' shows it",
            show(path),
            show(path)
        ),
        other => format!("cannot lock {}: {other}", show(&file)),
    })?;
    Ok(lock)
}

/// Compares what is asked for with what is remembered; what cannot change is refused.
fn accept(record: Record, start: &Start) -> Result<Record, String> {
    let dir = &start.dir;
    let has = record.members.len();
    if start.members.is_some_and(|members| members != has) {
        return Err(format!(
            "the lab in {dir} has {has} members; use the commands add and remove while it runs, \
             or --reset"
        ));
    }
    if start.base_port.is_some_and(|port| port != record.base_port) {
        let port = record.base_port;
        return Err(format!("the lab in {dir} has --base-port {port}; --reset starts anew"));
    }
    if start.tls && !record.tls {
        return Err(format!("the lab in {dir} was made without --tls; --reset starts anew"));
    }
    Ok(record)
}

/// Deletes what a lab leaves; the record goes last, so that an interrupted reset can be repeated.
fn reset(path: &Path, record: &Record) -> std::io::Result<()> {
    for number in 1..record.next {
        delete_member(path, number)?;
    }
    delete(fs::remove_dir_all(path.join("tls")))?;
    delete(fs::remove_file(path.join(super::control::SOCKET)))?;
    delete(fs::remove_file(path.join(RECORD)))
}

fn delete_member(path: &Path, number: u16) -> std::io::Result<()> {
    delete(fs::remove_dir_all(path.join(name(number))))?;
    delete(fs::remove_file(path.join(format!("m{number}.log"))))?;
    delete(fs::remove_file(path.join(format!("m{number}.log.old"))))
}

/// What is not there is deleted already.
fn delete(result: std::io::Result<()>) -> std::io::Result<()> {
    match result {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Checks the ports of all members. Members of a lab that was killed a moment ago may still hold
/// theirs, so a folder that had members waits for `patience`.
fn wait_free(record: &Record, patience: Duration) -> Result<(), String> {
    let deadline = Instant::now() + patience;
    loop {
        let mut members = record.members.iter();
        match members.try_for_each(|entry| check_free(&record.ports(entry.number))) {
            Err(_) if Instant::now() < deadline => std::thread::sleep(LEFTOVER_PAUSE),
            other => return other,
        }
    }
}

fn check_free(ports: &Ports) -> Result<(), String> {
    for address in [ports.client, ports.advertised, ports.peer, ports.metrics] {
        TcpListener::bind(address).map_err(|error| {
            format!("cannot listen on {address}: {error}; --base-port chooses other ports")
        })?;
    }
    Ok(())
}

fn show(path: &Path) -> String {
    path.display().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn start(dir: &Path) -> Start {
        // Ports that nothing listens on by habit; the tests only bind them for a moment.
        Start { dir: show(dir), base_port: Some(29_790), ..Start::default() }
    }

    #[test]
    fn a_folder_remembers_and_resets() {
        let temp = tempfile::tempdir().expect("temp dir");
        let dir = temp.path().join("lab");
        let mut folder = Folder::open(&start(&dir)).expect("new");
        let token = folder.record.token.clone();
        let number = folder.reserve().expect("free ports");
        assert_eq!((number, folder.record.members.len()), (4, 3));
        fs::create_dir(dir.join("m1")).expect("data");
        fs::write(dir.join("mine.txt"), "kept").expect("a stranger");
        let second = Folder::open(&start(&dir)).err().expect("locked");
        assert!(second.contains("runs in"), "{second}");
        drop(folder);

        let again = Folder::open(&start(&dir)).expect("again");
        assert_eq!((&again.record.token, again.record.next), (&token, 5));
        drop(again);
        let other = Folder::open(&Start { members: Some(5), ..start(&dir) }).err().expect("other");
        assert!(other.contains("has 3 members"), "{other}");

        let fresh = Folder::open(&Start { reset: true, members: Some(1), ..start(&dir) });
        let fresh = fresh.expect("reset");
        assert_ne!(fresh.record.token, token);
        assert_eq!(fresh.record.members.len(), 1);
        assert!(!dir.join("m1").exists() && dir.join("mine.txt").exists());
    }

    #[test]
    fn strangers_folders_are_left_alone() {
        let temp = tempfile::tempdir().expect("temp dir");
        fs::write(temp.path().join("thesis.txt"), "years of work").expect("write");
        let reset = Start { reset: true, ..start(temp.path()) };
        let error = Folder::open(&reset).err().expect("refused");
        assert!(error.contains("not a lab's folder"), "{error}");
        fs::write(temp.path().join(RECORD), "{\"format\":\"other\"}").expect("write");
        let error = Folder::open(&reset).err().expect("refused");
        assert!(error.contains("nothing was touched"), "{error}");
        let names = fs::read_dir(temp.path()).expect("list").count();
        assert_eq!(names, 2);
    }
}
