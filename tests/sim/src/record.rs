//! Runs a program under `ptrace` and writes down every storage call that it, its threads and its
//! children make below one directory, in the order in which the kernel carried them out: while one is
//! under way, no other may begin. Calls that could change files in a way that is not understood here
//! are refused, so that a recording is complete or fails.
//!
//! It never changes a call or a result. What a write to the file of marks says is recorded as a mark,
//! in the same order.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Component, Path, PathBuf};
use std::process::Command;

use crate::sys::{self, At, Stop};
use crate::trace::Call;

/// Longest path, and what is read of one at a time. Unit: bytes.
const PATH_BYTES_MAX: usize = 4096;
const PATH_STEP: u64 = 256;
/// Largest single write that is taken. Unit: bytes.
const WRITE_BYTES_MAX: u64 = 1 << 30;

/// What is written down, over one program or several, one after the other.
pub struct Recorder {
    /// The directory whose calls are recorded, and the file whose writes are marks.
    root: PathBuf,
    marks: PathBuf,
    /// Files by device and inode.
    files: HashMap<(u64, u64), u32>,
    made: u32,
    calls: Vec<Call>,
    /// The thread whose call is under way, and what it will have done.
    busy: Option<(i32, Pending)>,
    /// Threads and processes that were seen and have not ended.
    followed: BTreeSet<i32>,
    /// Threads that stand before a call until that one is over.
    waiting: VecDeque<(i32, u64, [u64; 6])>,
}

/// A call that has begun.
enum Pending {
    Open {
        path: PathBuf,
        existed: Option<u64>,
        truncates: bool,
    },
    Write {
        to: Target,
        offset: u64,
        bytes: Vec<u8>,
    },
    /// It is recorded as it is if it succeeds.
    Plain(Call),
    /// It is recorded if it succeeds and the file is shorter than this.
    Grow(u32, u64, PathBuf),
}

enum Target {
    File(u32),
    Marks,
}

type Prepared = Result<Option<Pending>, String>;

impl Recorder {
    /// Records what happens below `root`, which exists and is empty.
    pub fn new(root: &Path, marks: &Path) -> io::Result<Self> {
        let home = marks.parent().unwrap_or(Path::new("."));
        let marks = fs::canonicalize(home)?.join(marks.file_name().unwrap_or_default());
        Ok(Self {
            root: fs::canonicalize(root)?,
            marks,
            files: HashMap::new(),
            made: 0,
            calls: Vec::new(),
            busy: None,
            followed: BTreeSet::new(),
            waiting: VecDeque::new(),
        })
    }

    /// All calls so far.
    pub fn into_calls(self) -> Vec<Call> {
        self.calls
    }

    /// Runs a program to its end and returns its exit code.
    ///
    /// # Errors
    /// It cannot be started or traced, it was ended by a signal, or it made a call that is not
    /// understood; then it was ended.
    pub fn run(&mut self, command: &mut Command) -> Result<i32, String> {
        sys::trace_me(command);
        let child = command.spawn().map_err(|error| format!("run {command:?}: {error}"))?;
        let main = child.id() as i32;
        self.followed = BTreeSet::from([main]);
        let ended = self.attend(main);
        if ended.is_err() {
            self.end();
        }
        (self.busy, self.waiting) = (None, VecDeque::new());
        ended
    }

    fn attend(&mut self, main: i32) -> Result<i32, String> {
        let failed = |error: io::Error| format!("trace the member: {error}");
        let (mut code, mut is_followed) = (None, false);
        loop {
            let (pid, stop) = match sys::wait() {
                Err(error) if error.raw_os_error() == Some(libc::ECHILD) => break,
                other => other.map_err(failed)?,
            };
            self.followed.insert(pid);
            if !is_followed {
                sys::follow(main).map_err(failed)?;
                is_followed = true;
            }
            match stop {
                Stop::Call => self.step(pid)?,
                Stop::Signal(signal) => sys::resume(pid, signal).map_err(failed)?,
                Stop::Other => sys::resume(pid, 0).map_err(failed)?,
                Stop::Exited(_) | Stop::Killed(_) => {
                    self.followed.remove(&pid);
                    if self.busy.as_ref().is_some_and(|(thread, _)| *thread == pid) {
                        self.busy = None;
                        self.begin_next()?;
                    }
                    if pid == main {
                        code = Some(stop);
                    }
                }
            }
        }
        match code {
            Some(Stop::Exited(code)) => Ok(code),
            Some(Stop::Killed(signal)) => Err(format!("the member was ended by signal {signal}")),
            _ => Err("the member was lost".to_owned()),
        }
    }

    /// Ends a program that cannot be followed any more, and all that it has started.
    fn end(&mut self) {
        self.followed.iter().for_each(|pid| sys::kill(*pid));
        while let Ok((pid, stop)) = sys::wait() {
            if !matches!(stop, Stop::Exited(_) | Stop::Killed(_)) {
                sys::kill(pid);
            }
        }
    }

    fn step(&mut self, pid: i32) -> Result<(), String> {
        match sys::at(pid) {
            Ok(At::Entry(number, args)) if concerns_files(number) => {
                if self.busy.is_some() {
                    self.waiting.push_back((pid, number, args));
                    return Ok(());
                }
                self.begin(pid, number, args)?;
            }
            Ok(At::Exit(result)) if self.busy.as_ref().is_some_and(|busy| busy.0 == pid) => {
                let (_, pending) = self.busy.take().expect("it was just looked at");
                self.finish(pid, pending, result)?;
                self.begin_next()?;
            }
            Ok(_) => {}
            // It was killed meanwhile; its end is told next.
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => return Ok(()),
            Err(error) => return Err(format!("look at a call of the member: {error}")),
        }
        sys::resume(pid, 0).map_err(|error| format!("let the member go on: {error}"))
    }

    fn begin(&mut self, pid: i32, number: u64, args: [u64; 6]) -> Result<(), String> {
        let seen = Seen { pid, root: &self.root, marks: &self.marks, files: &self.files };
        let prepared = seen.prepare(number, args);
        self.busy = prepared?.map(|pending| (pid, pending));
        Ok(())
    }

    /// Lets those who waited begin, until one of them is busy with a call that counts.
    fn begin_next(&mut self) -> Result<(), String> {
        while self.busy.is_none() {
            let Some((pid, number, args)) = self.waiting.pop_front() else { return Ok(()) };
            self.begin(pid, number, args)?;
            sys::resume(pid, 0).map_err(|error| format!("let the member go on: {error}"))?;
        }
        Ok(())
    }

    fn finish(&mut self, pid: i32, pending: Pending, result: i64) -> Result<(), String> {
        if result < 0 {
            return Ok(());
        }
        match pending {
            Pending::Open { path, existed, truncates } => {
                self.opened(pid, &path, existed, truncates, result)?;
            }
            Pending::Write { to, offset, mut bytes } => {
                bytes.truncate(result as usize);
                match to {
                    Target::File(_) if bytes.is_empty() => {}
                    Target::File(file) => self.calls.push(Call::Write(file, offset, bytes)),
                    Target::Marks => {
                        let text = String::from_utf8_lossy(&bytes);
                        self.calls.extend(text.lines().map(|line| Call::Mark(line.to_owned())));
                    }
                }
            }
            Pending::Plain(call) => self.calls.push(call),
            Pending::Grow(file, before, path) => {
                let len =
                    fs::metadata(&path).map_err(|e| format!("{}: {e}", path.display()))?.len();
                if len != before {
                    self.calls.push(Call::SetLen(file, len));
                }
            }
        }
        Ok(())
    }

    fn opened(
        &mut self,
        pid: i32,
        path: &Path,
        existed: Option<u64>,
        truncates: bool,
        fd: i64,
    ) -> Result<(), String> {
        let found = fs::metadata(format!("/proc/{pid}/fd/{fd}"))
            .map_err(|error| format!("look at what was opened, {}: {error}", path.display()))?;
        let name = (found.dev(), found.ino());
        if existed.is_none() {
            let file = self.made;
            self.made += 1;
            self.files.insert(name, file);
            self.calls.push(Call::Create(relative(&self.root, path), file));
        } else if truncates && existed != Some(0) {
            let file = self.files.get(&name).copied();
            let file = file.ok_or_else(|| format!("{} is older than the run", path.display()))?;
            self.calls.push(Call::SetLen(file, 0));
        }
        Ok(())
    }
}

fn relative(root: &Path, path: &Path) -> String {
    path.strip_prefix(root).unwrap_or(path).to_string_lossy().into_owned()
}

/// A stopped thread and what is known of files.
struct Seen<'a> {
    pid: i32,
    root: &'a Path,
    marks: &'a Path,
    files: &'a HashMap<(u64, u64), u32>,
}

impl Seen<'_> {
    fn prepare(&self, number: u64, args: [u64; 6]) -> Prepared {
        let [a, b, c, d, ..] = args;
        match number as i64 {
            libc::SYS_openat => self.open(self.path_at(a, b)?, c),
            libc::SYS_write => self.write(a, None, || self.memory(b, c)),
            libc::SYS_pwrite64 => self.write(a, Some(d), || self.memory(b, c)),
            libc::SYS_writev => self.write(a, None, || self.vector(b, c)),
            libc::SYS_pwritev => self.write(a, Some(d), || self.vector(b, c)),
            libc::SYS_ftruncate => self.plain_file(a, |file| Call::SetLen(file, b)),
            libc::SYS_fallocate => self.allocate(a, b, c, d),
            libc::SYS_fsync | libc::SYS_fdatasync => self.sync(a),
            libc::SYS_sync_file_range => self.plain_file(a, Call::SyncRange),
            libc::SYS_sync | libc::SYS_syncfs => Ok(Some(Pending::Plain(Call::SyncAll))),
            libc::SYS_renameat => self.rename(self.path_at(a, b)?, self.path_at(c, d)?),
            libc::SYS_renameat2 if args[4] & !u64::from(libc::RENAME_NOREPLACE) == 0 => {
                self.rename(self.path_at(a, b)?, self.path_at(c, d)?)
            }
            libc::SYS_unlinkat => self.unlink(self.path_at(a, b)?, c),
            libc::SYS_mkdirat => Ok(self.under(self.path_at(a, b)?, Call::MakeDir)),
            _ => self.prepare_other(number, args),
        }
    }

    /// Old names of the same calls, and what is refused.
    fn prepare_other(&self, number: u64, args: [u64; 6]) -> Prepared {
        let [a, b, c, ..] = args;
        #[cfg(target_arch = "x86_64")]
        {
            let here = libc::AT_FDCWD as u64;
            match number as i64 {
                libc::SYS_open => return self.open(self.path_at(here, a)?, b),
                libc::SYS_creat => {
                    let flags = libc::O_CREAT | libc::O_TRUNC | libc::O_WRONLY;
                    return self.open(self.path_at(here, a)?, flags as u64);
                }
                libc::SYS_rename => {
                    return self.rename(self.path_at(here, a)?, self.path_at(here, b)?);
                }
                libc::SYS_unlink => return self.unlink(self.path_at(here, a)?, 0),
                libc::SYS_rmdir => {
                    return self.unlink(self.path_at(here, a)?, libc::AT_REMOVEDIR as u64);
                }
                libc::SYS_mkdir => return Ok(self.under(self.path_at(here, a)?, Call::MakeDir)),
                libc::SYS_link | libc::SYS_symlink => return self.refuse(number, b, here),
                _ => {}
            }
        }
        match number as i64 {
            libc::SYS_mmap => {
                let writes = args[2] as i32 & libc::PROT_WRITE != 0;
                let is_shared = args[3] as i32 & libc::MAP_TYPE != libc::MAP_PRIVATE;
                let is_ours = writes && is_shared && self.fd_path(args[4]).is_some();
                if is_ours { Err(unknown("a shared writable mapping")) } else { Ok(None) }
            }
            libc::SYS_io_uring_setup => Err(unknown("io_uring_setup")),
            libc::SYS_sendfile if self.fd_path(a).is_none() => Ok(None),
            libc::SYS_copy_file_range | libc::SYS_splice if self.fd_path(c).is_none() => Ok(None),
            libc::SYS_pwritev2 if self.fd_path(a).is_none() => Ok(None),
            libc::SYS_truncate => self.refuse(number, a, libc::AT_FDCWD as u64),
            libc::SYS_linkat => self.refuse(number, args[3], c),
            libc::SYS_symlinkat => self.refuse(number, c, b),
            libc::SYS_openat2 | libc::SYS_renameat2 => self.refuse(number, b, a),
            _ => Err(unknown(&format!("system call {number}"))),
        }
    }

    /// A call that is not understood may only be about files that are not ours.
    fn refuse(&self, number: u64, path: u64, dir: u64) -> Prepared {
        let path = self.path_at(dir, path)?;
        if path.starts_with(self.root) {
            return Err(unknown(&format!("system call {number} on {}", path.display())));
        }
        Ok(None)
    }

    fn open(&self, path: PathBuf, flags: u64) -> Prepared {
        let flags = flags as i32;
        let has = |flag: i32| flags & flag == flag;
        if !path.starts_with(self.root) {
            return Ok(None);
        }
        if has(libc::O_TMPFILE) || has(libc::O_DSYNC) {
            return Err(unknown(&format!("open of {} with flags {flags:x}", path.display())));
        }
        if !has(libc::O_CREAT) && !has(libc::O_TRUNC) {
            return Ok(None);
        }
        let existed = fs::symlink_metadata(&path).ok().map(|found| found.len());
        Ok(Some(Pending::Open { path, existed, truncates: has(libc::O_TRUNC) }))
    }

    fn write(
        &self,
        fd: u64,
        offset: Option<u64>,
        bytes: impl FnOnce() -> Result<Vec<u8>, String>,
    ) -> Prepared {
        let Some(path) = self.fd_path(fd) else { return Ok(None) };
        let bytes = bytes()?;
        if path == self.marks {
            return Ok(Some(Pending::Write { to: Target::Marks, offset: 0, bytes }));
        }
        let Some(file) = self.file(fd)? else { return Ok(None) };
        let offset = match offset {
            Some(offset) => offset,
            None => self.position(fd)?,
        };
        Ok(Some(Pending::Write { to: Target::File(file), offset, bytes }))
    }

    /// Where the next write through a descriptor goes.
    fn position(&self, fd: u64) -> Result<u64, String> {
        let (pid, fd) = (self.pid, fd as i32);
        let info = fs::read_to_string(format!("/proc/{pid}/fdinfo/{fd}"))
            .map_err(|error| format!("read the position of a file: {error}"))?;
        let field = |name: &str| info.lines().find_map(|line| line.strip_prefix(name));
        let flags = field("flags:").and_then(|text| i32::from_str_radix(text.trim(), 8).ok());
        if flags.is_some_and(|flags| flags & libc::O_APPEND != 0) {
            let found = fs::metadata(format!("/proc/{pid}/fd/{fd}"));
            return found.map(|found| found.len()).map_err(|error| error.to_string());
        }
        let position = field("pos:").and_then(|text| text.trim().parse().ok());
        position.ok_or_else(|| "a file has no position".to_owned())
    }

    fn plain_file(&self, fd: u64, call: impl FnOnce(u32) -> Call) -> Prepared {
        Ok(self.file(fd)?.map(|file| Pending::Plain(call(file))))
    }

    fn allocate(&self, fd: u64, mode: u64, offset: u64, len: u64) -> Prepared {
        let Some(file) = self.file(fd)? else { return Ok(None) };
        let (keeps, punches) = (libc::FALLOC_FL_KEEP_SIZE, libc::FALLOC_FL_PUNCH_HOLE);
        match mode as i32 {
            0 => {
                let path = PathBuf::from(format!("/proc/{}/fd/{}", self.pid, fd as i32));
                let before = fs::metadata(&path).map_err(|error| error.to_string())?.len();
                Ok(Some(Pending::Grow(file, before, path)))
            }
            mode if mode == keeps => Ok(None),
            mode if mode == keeps | punches => {
                Ok(Some(Pending::Plain(Call::Punch(file, offset, len))))
            }
            mode => Err(unknown(&format!("fallocate with mode {mode:x}"))),
        }
    }

    fn sync(&self, fd: u64) -> Prepared {
        let Some(path) = self.fd_path(fd) else { return Ok(None) };
        if path.is_dir() {
            return Ok(self.under(path, Call::SyncDir));
        }
        self.plain_file(fd, Call::Sync)
    }

    fn rename(&self, from: PathBuf, to: PathBuf) -> Prepared {
        match (from.starts_with(self.root), to.starts_with(self.root)) {
            (false, false) => Ok(None),
            (true, true) if from.parent() == to.parent() => {
                let call = Call::Rename(relative(self.root, &from), relative(self.root, &to));
                Ok(Some(Pending::Plain(call)))
            }
            _ => Err(unknown(&format!("rename of {} to {}", from.display(), to.display()))),
        }
    }

    fn unlink(&self, path: PathBuf, flags: u64) -> Prepared {
        let is_dir = flags as i32 & libc::AT_REMOVEDIR != 0;
        Ok(self.under(path, if is_dir { Call::RemoveDir } else { Call::Unlink }))
    }

    fn under(&self, path: PathBuf, call: fn(String) -> Call) -> Option<Pending> {
        let is_ours = path.starts_with(self.root);
        is_ours.then(|| Pending::Plain(call(relative(self.root, &path))))
    }

    /// The number of an open file of ours.
    fn file(&self, fd: u64) -> Result<Option<u32>, String> {
        let Some(path) = self.fd_path(fd).filter(|path| path.starts_with(self.root)) else {
            return Ok(None);
        };
        let found = fs::metadata(format!("/proc/{}/fd/{}", self.pid, fd as i32));
        let found = found.map_err(|error| format!("{}: {error}", path.display()))?;
        let file = self.files.get(&(found.dev(), found.ino())).copied();
        file.map(Some).ok_or_else(|| format!("{} was not made in this run", path.display()))
    }

    /// The path of a descriptor, if it is ours or that of the marks.
    fn fd_path(&self, fd: u64) -> Option<PathBuf> {
        let path = fs::read_link(format!("/proc/{}/fd/{}", self.pid, fd as i32)).ok()?;
        (path.starts_with(self.root) || path == self.marks).then_some(path)
    }

    /// An absolute path without `.` and `..`, of a path in memory relative to an open directory.
    fn path_at(&self, dir: u64, path: u64) -> Result<PathBuf, String> {
        let path = self.text(path)?;
        let base = match dir as i32 {
            _ if path.is_absolute() => PathBuf::new(),
            libc::AT_FDCWD => self.link("cwd")?,
            fd => self.link(&format!("fd/{fd}"))?,
        };
        let mut clean = PathBuf::new();
        for part in base.join(path).components() {
            match part {
                Component::ParentDir => drop(clean.pop()),
                Component::CurDir => {}
                other => clean.push(other),
            }
        }
        Ok(clean)
    }

    fn link(&self, name: &str) -> Result<PathBuf, String> {
        let link = format!("/proc/{}/{name}", self.pid);
        fs::read_link(&link).map_err(|error| format!("{link}: {error}"))
    }

    fn text(&self, mut from: u64) -> Result<PathBuf, String> {
        let mut bytes = Vec::new();
        while bytes.len() < PATH_BYTES_MAX {
            // Up to a multiple only: what lies behind the text may not be readable.
            let step = PATH_STEP - from % PATH_STEP;
            let more = self.memory(from, step)?;
            if let Some(end) = more.iter().position(|byte| *byte == 0) {
                bytes.extend_from_slice(&more[..end]);
                let text =
                    String::from_utf8(bytes).map_err(|_| unknown("a path that is no text"))?;
                return Ok(text.into());
            }
            bytes.extend(more);
            from += step;
        }
        Err(unknown("a path without an end"))
    }

    /// The bytes of an array of `iovec`.
    fn vector(&self, from: u64, count: u64) -> Result<Vec<u8>, String> {
        let array = self.memory(from, count * 16)?;
        let word = |at: usize| {
            let bytes = array[at..at + 8].try_into().expect("eight bytes are eight bytes");
            u64::from_ne_bytes(bytes)
        };
        let mut bytes = Vec::new();
        for at in (0..array.len()).step_by(16) {
            bytes.extend(self.memory(word(at), word(at + 8))?);
        }
        Ok(bytes)
    }

    fn memory(&self, from: u64, len: u64) -> Result<Vec<u8>, String> {
        if len > WRITE_BYTES_MAX {
            return Err(unknown(&format!("a write of {len} bytes")));
        }
        let mut bytes = vec![0; len as usize];
        let memory = File::open(format!("/proc/{}/mem", self.pid));
        let read = memory.and_then(|memory| memory.read_exact_at(&mut bytes, from));
        read.map_err(|error| format!("read the memory of the member: {error}"))?;
        Ok(bytes)
    }
}

fn unknown(what: &str) -> String {
    format!("the recorder does not know what {what} does to files: teach it, or avoid the call")
}

/// Calls that are looked at more closely.
fn concerns_files(number: u64) -> bool {
    #[cfg(target_arch = "x86_64")]
    if matches!(
        number as i64,
        libc::SYS_open
            | libc::SYS_creat
            | libc::SYS_rename
            | libc::SYS_unlink
            | libc::SYS_rmdir
            | libc::SYS_mkdir
            | libc::SYS_link
            | libc::SYS_symlink
    ) {
        return true;
    }
    matches!(
        number as i64,
        libc::SYS_openat
            | libc::SYS_openat2
            | libc::SYS_write
            | libc::SYS_pwrite64
            | libc::SYS_writev
            | libc::SYS_pwritev
            | libc::SYS_pwritev2
            | libc::SYS_truncate
            | libc::SYS_ftruncate
            | libc::SYS_fallocate
            | libc::SYS_fsync
            | libc::SYS_fdatasync
            | libc::SYS_sync_file_range
            | libc::SYS_sync
            | libc::SYS_syncfs
            | libc::SYS_renameat
            | libc::SYS_renameat2
            | libc::SYS_unlinkat
            | libc::SYS_mkdirat
            | libc::SYS_linkat
            | libc::SYS_symlinkat
            | libc::SYS_mmap
            | libc::SYS_io_uring_setup
            | libc::SYS_sendfile
            | libc::SYS_copy_file_range
            | libc::SYS_splice
    )
}
