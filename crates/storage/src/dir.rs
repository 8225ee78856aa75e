//! The data directory: who may use it, whose it is, and small files that change as a whole. It is
//! opened before the log and the state and stays locked until dropped. It never looks inside the
//! log or the state, and never deletes what it did not make.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};

use crate::open::OpenError;

/// First line of the identity file.
const MAGIC: &str = "kelson member";
/// Layout of the data directory that this program writes.
const FORMAT: u32 = 1;

/// How long the last user of a directory may take to leave it: a process that was forked meanwhile
/// holds the lock, too, until it runs its own program.
const LOCK_WAIT_MAX: Duration = Duration::from_secs(1);
/// Pause between two attempts.
const LOCK_RETRY: Duration = Duration::from_millis(10);

/// The cluster and the member that a data directory belongs to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Identity {
    /// Cluster id, as in every response header.
    pub cluster_id: u64,
    /// Member id, as in every response header.
    pub member_id: u64,
}

/// A data directory that this process alone uses, until dropped.
#[derive(Debug)]
pub struct DataDir {
    member_dir: PathBuf,
    /// Holds the lock; the kernel lets go of it when the process ends, however it ends.
    _lock: File,
    storage_uuid: [u8; 16],
    identity: parking_lot::Mutex<Option<Identity>>,
}

impl DataDir {
    /// Locks `data_dir`, creating it with mode 0700 if it is missing, and reads whose it is. A new
    /// directory gets a random storage uuid.
    ///
    /// # Errors
    /// `Locked` if another process uses it and does not leave within a second, `ForeignData` if it
    /// holds files of etcd, `NewerVersion` and `Damaged` if the identity file cannot be used. Nothing
    /// is changed in these cases.
    pub fn open(data_dir: &Path) -> Result<Self, OpenError> {
        let member_dir = data_dir.join("member");
        refuse_etcd(&member_dir)?;
        make_dir(data_dir)?;
        make_dir(&member_dir)?;
        let lock = lock(data_dir, &member_dir)?;
        let path = identity_path(&member_dir);
        let (storage_uuid, identity) = match fs::read_to_string(&path) {
            Ok(text) => parse(&path, &text)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => create(&member_dir)?,
            Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                return Err(damaged(&path, "it is not text"));
            }
            Err(error) => return Err(OpenError::io("read", &path, error)),
        };
        let identity = parking_lot::Mutex::new(identity);
        Ok(Self { member_dir, _lock: lock, storage_uuid, identity })
    }

    /// Random name of this data directory, made with it and never changed.
    pub fn storage_uuid(&self) -> [u8; 16] {
        self.storage_uuid
    }

    /// Where the raft log lives.
    pub fn wal_dir(&self) -> PathBuf {
        self.member_dir.join("wal")
    }

    /// Where the state lives.
    pub(crate) fn state_dir(&self) -> PathBuf {
        self.member_dir.join("state")
    }

    /// As [`DataDir::open`], but only a directory that holds a member; nothing is made.
    ///
    /// # Errors
    /// As there; `NoMember` if there is none.
    pub fn open_existing(data_dir: &Path) -> Result<Self, OpenError> {
        let member_dir = data_dir.join("member");
        refuse_etcd(&member_dir)?;
        let has = |name: &str| member_dir.join(name).exists();
        if !["identity", "wal", "state"].into_iter().any(has) {
            return Err(OpenError::NoMember { path: data_dir.to_owned() });
        }
        Self::open(data_dir)
    }

    /// Whose directory it is; `None` until `set_identity` was called once.
    pub fn identity(&self) -> Option<Identity> {
        *self.identity.lock()
    }

    /// Records whose directory it is. On disk when this returns.
    ///
    /// # Errors
    /// `Io` if the file cannot be written.
    pub fn set_identity(&self, identity: Identity) -> Result<(), OpenError> {
        let mut held = self.identity.lock();
        write_identity(&self.member_dir, self.storage_uuid, Some(identity))?;
        *held = Some(identity);
        Ok(())
    }
}

fn identity_path(member_dir: &Path) -> PathBuf {
    member_dir.join("identity")
}

/// Creates a directory that only its owner may enter, and makes its name durable.
pub(crate) fn make_dir(path: &Path) -> Result<(), OpenError> {
    if path.is_dir() {
        return Ok(());
    }
    let made = DirBuilder::new().mode(0o700).recursive(true).create(path);
    made.map_err(|error| OpenError::io("create directory", path, error))?;
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    sync_dir(parent.unwrap_or(Path::new(".")))
}

/// Makes names created, renamed or removed in a directory durable.
pub(crate) fn sync_dir(path: &Path) -> Result<(), OpenError> {
    let synced = File::open(path).and_then(|dir| dir.sync_all());
    synced.map_err(|error| OpenError::io("sync directory", path, error))
}

/// Replaces a file as a whole: after a crash it holds the old bytes or the new ones.
pub(crate) fn replace_file(path: &Path, bytes: &[u8]) -> Result<(), OpenError> {
    let draft = path.with_extension("tmp");
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(0o600);
    let written = options.open(&draft).and_then(|mut file| {
        file.write_all(bytes)?;
        file.sync_all()
    });
    written.map_err(|error| OpenError::io("write", &draft, error))?;
    fs::rename(&draft, path).map_err(|error| OpenError::io("rename to", path, error))?;
    sync_dir(path.parent().unwrap_or(Path::new(".")))
}

/// A data directory of etcd keeps a bbolt file in `snap` and names its log files by two numbers.
fn refuse_etcd(member_dir: &Path) -> Result<(), OpenError> {
    // An etcd that was started on our directory by mistake leaves a `snap`; it is still ours.
    let is_ours = identity_path(member_dir).exists();
    let is_etcd = member_dir.join("snap").exists() || has_etcd_log(&member_dir.join("wal"));
    if is_etcd && !is_ours {
        return Err(OpenError::ForeignData { path: member_dir.to_owned() });
    }
    Ok(())
}

pub(crate) fn has_etcd_log(wal_dir: &Path) -> bool {
    let Ok(entries) = fs::read_dir(wal_dir) else { return false };
    let mut names = entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned());
    names.any(|name| {
        let stem = name.strip_suffix(".wal").and_then(|stem| stem.split_once('-'));
        let is_number =
            |text: &str| text.len() == 16 && text.bytes().all(|b| b.is_ascii_hexdigit());
        stem.is_some_and(|(sequence, index)| is_number(sequence) && is_number(index))
    })
}

fn lock(data_dir: &Path, member_dir: &Path) -> Result<File, OpenError> {
    let path = member_dir.join("lock");
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false).mode(0o600);
    let file = options.open(&path).map_err(|error| OpenError::io("open", &path, error))?;
    let until = Instant::now() + LOCK_WAIT_MAX;
    loop {
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(file),
            Err(rustix::io::Errno::WOULDBLOCK) if Instant::now() < until => {
                std::thread::sleep(LOCK_RETRY);
            }
            Err(rustix::io::Errno::WOULDBLOCK) => {
                return Err(OpenError::Locked { path: data_dir.to_owned() });
            }
            Err(error) => return Err(OpenError::io("lock", &path, error.into())),
        }
    }
}

/// Makes the identity of a new directory. Files of a log or a state without an identity are not new.
fn create(member_dir: &Path) -> Result<([u8; 16], Option<Identity>), OpenError> {
    for name in ["wal", "state"] {
        let path = member_dir.join(name);
        if fs::read_dir(&path).is_ok_and(|mut entries| entries.next().is_some()) {
            let path = identity_path(member_dir);
            return Err(damaged(&path, "it is missing although the directory holds data"));
        }
    }
    let mut storage_uuid = [0; 16];
    getrandom::fill(&mut storage_uuid).map_err(|error| {
        OpenError::io("make a uuid for", member_dir, io::Error::other(error.to_string()))
    })?;
    write_identity(member_dir, storage_uuid, None)?;
    Ok((storage_uuid, None))
}

fn write_identity(
    member_dir: &Path,
    storage_uuid: [u8; 16],
    identity: Option<Identity>,
) -> Result<(), OpenError> {
    let mut text =
        format!("{MAGIC}\nformat {FORMAT}\nuuid {:032x}\n", u128::from_be_bytes(storage_uuid));
    if let Some(Identity { cluster_id, member_id }) = identity {
        text += &format!("cluster {cluster_id:016x}\nmember {member_id:016x}\n");
    }
    text += &format!("crc {:08x}\n", crc32c::crc32c(text.as_bytes()));
    replace_file(&identity_path(member_dir), text.as_bytes())
}

fn parse(path: &Path, text: &str) -> Result<([u8; 16], Option<Identity>), OpenError> {
    let mut lines = text.lines();
    if lines.next() != Some(MAGIC) {
        return Err(damaged(path, "its first line is not the one Kelson writes"));
    }
    let format = lines.next().and_then(|line| line.strip_prefix("format ")?.parse::<u32>().ok());
    match format {
        Some(FORMAT) => {}
        Some(found) => {
            return Err(OpenError::NewerVersion { path: path.to_owned(), found, known: FORMAT });
        }
        None => return Err(damaged(path, "it names no format")),
    }
    let body_len = text.rfind("crc ").ok_or_else(|| damaged(path, "it has no checksum"))?;
    let (body, crc) = text.split_at(body_len);
    if crc != format!("crc {:08x}\n", crc32c::crc32c(body.as_bytes())) {
        return Err(damaged(path, "its checksum does not fit"));
    }
    let field = |name: &str| {
        let value = body.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        value.and_then(|hex| u128::from_str_radix(hex, 16).ok())
    };
    let uuid = field("uuid").ok_or_else(|| damaged(path, "it names no uuid"))?;
    let id = |name: &str| field(name).and_then(|id| u64::try_from(id).ok());
    let identity = match (id("cluster"), id("member")) {
        (Some(cluster_id), Some(member_id)) => Some(Identity { cluster_id, member_id }),
        _ => None,
    };
    Ok((uuid.to_be_bytes(), identity))
}

fn damaged(path: &Path, reason: &str) -> OpenError {
    OpenError::Damaged {
        path: path.to_owned(),
        reason: reason.to_owned(),
        advice: "restore the directory from a snapshot or replace this member",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const IDENTITY: Identity = Identity { cluster_id: 0xcdf8_181e_3258_6a7c, member_id: 7 };

    fn refusal(data_dir: &Path) -> String {
        DataDir::open(data_dir).expect_err("must refuse").to_string()
    }

    #[test]
    fn a_new_directory_keeps_its_uuid_and_identity() {
        let temp = tempfile::tempdir().expect("temporary directory");
        let data_dir = temp.path().join("default.etcd");
        let first = DataDir::open(&data_dir).expect("creates");
        assert_eq!(first.identity(), None);
        let uuid = first.storage_uuid();
        assert_ne!(uuid, [0; 16]);
        first.set_identity(IDENTITY).expect("writes");
        assert_eq!(first.identity(), Some(IDENTITY));
        drop(first);
        let second = DataDir::open(&data_dir).expect("opens again");
        assert_eq!((second.storage_uuid(), second.identity()), (uuid, Some(IDENTITY)));
        use std::os::unix::fs::PermissionsExt;
        let mode = fs::metadata(&data_dir).expect("exists").permissions().mode();
        assert_eq!(mode & 0o777, 0o700);
    }

    #[test]
    fn a_second_user_is_told_which_directory_is_taken() {
        let temp = tempfile::tempdir().expect("temporary directory");
        let _first = DataDir::open(temp.path()).expect("opens");
        let refusal = refusal(temp.path());
        assert!(refusal.contains(&temp.path().display().to_string()), "{refusal}");
        assert!(refusal.contains("another process"), "{refusal}");
    }

    #[test]
    fn a_user_that_leaves_is_waited_for() {
        let temp = tempfile::tempdir().expect("temporary directory");
        let first = DataDir::open(temp.path()).expect("opens");
        std::thread::scope(|scope| {
            scope.spawn(move || {
                std::thread::sleep(LOCK_WAIT_MAX / 5);
                drop(first);
            });
            DataDir::open(temp.path()).expect("opens in time");
        });
    }

    #[test]
    fn etcd_data_is_refused_and_left_alone() {
        for file in ["snap/db", "wal/0000000000000000-0000000000000000.wal"] {
            let temp = tempfile::tempdir().expect("temporary directory");
            let file = temp.path().join("member").join(file);
            fs::create_dir_all(file.parent().expect("has one")).expect("creates");
            fs::write(&file, b"etcd").expect("writes");
            assert!(refusal(temp.path()).contains("etcd"));
            assert_eq!(fs::read(&file).expect("still there"), b"etcd");
            let left: Vec<_> = fs::read_dir(temp.path().join("member")).expect("lists").collect();
            assert_eq!(left.len(), 1, "nothing was added");
        }
    }

    #[test]
    fn newer_and_damaged_identities_are_refused() {
        let temp = tempfile::tempdir().expect("temporary directory");
        drop(DataDir::open(temp.path()).expect("creates"));
        let path = temp.path().join("member/identity");
        let good = fs::read_to_string(&path).expect("reads");
        fs::write(&path, good.replace("format 1", "format 2")).expect("writes");
        assert!(refusal(temp.path()).contains("newer"));
        for at in 0..good.len() {
            let mut bytes = good.clone().into_bytes();
            bytes[at] ^= 1;
            fs::write(&path, &bytes).expect("writes");
            refusal(temp.path());
        }
        for len in 0..good.len() {
            fs::write(&path, &good[..len]).expect("writes");
            refusal(temp.path());
        }
    }

    #[test]
    fn data_without_an_identity_is_not_taken_for_new() {
        let temp = tempfile::tempdir().expect("temporary directory");
        drop(DataDir::open(temp.path()).expect("creates"));
        fs::create_dir_all(temp.path().join("member/wal")).expect("creates");
        fs::write(temp.path().join("member/wal/1.wal"), b"x").expect("writes");
        fs::remove_file(temp.path().join("member/identity")).expect("removes");
        assert!(refusal(temp.path()).contains("identity"));
    }
}
