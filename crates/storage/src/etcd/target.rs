//! The directory that an import goes to. A member is built in `import.part` beside its final place and
//! gets its name, `member`, in one step when all of it is on disk: a crash leaves either nothing that
//! counts or a whole member. A `member` directory of etcd is moved aside first, to `member.etcd`, and
//! nothing in it is touched.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};

use crate::dir::{DataDir, has_etcd_log, make_dir, sync_dir};
use crate::open::OpenError;

/// Where a member is built.
const PART: &str = "import.part";
/// Where a member directory of etcd is kept.
const ASIDE: &str = "member.etcd";

/// A data directory in the making. Dropping it before `finish` removes what was built.
#[derive(Debug)]
pub struct Target {
    data_dir: PathBuf,
    /// `None` only after `finish`.
    built: Option<DataDir>,
}

impl Target {
    /// Prepares an empty or missing directory.
    ///
    /// # Errors
    /// It holds something, or is in use.
    pub fn empty(data_dir: &Path) -> Result<Self, OpenError> {
        refuse_used(data_dir)?;
        let entries = match fs::read_dir(data_dir) {
            Ok(entries) => entries.flatten().map(|entry| entry.file_name()).collect(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(error) => return Err(OpenError::io("read", data_dir, error)),
        };
        if entries.iter().any(|name| name != PART) {
            return Err(OpenError::NotEmpty { path: data_dir.to_owned() });
        }
        Self::build(data_dir)
    }

    /// Prepares a directory that holds a member of etcd.
    ///
    /// # Errors
    /// A member of etcd was moved aside there before, or an import is under way.
    pub fn beside_etcd(data_dir: &Path) -> Result<Self, OpenError> {
        let aside = data_dir.join(ASIDE);
        if aside.exists() {
            return Err(OpenError::Damaged {
                path: aside,
                reason: "it exists already, so the member of etcd cannot be kept there".to_owned(),
                advice: "move it out of the data directory",
            });
        }
        Self::build(data_dir)
    }

    fn build(data_dir: &Path) -> Result<Self, OpenError> {
        make_dir(data_dir)?;
        let part = data_dir.join(PART);
        refuse_used(&part)?;
        if part.exists() {
            // An import that was cut off: its source is whole.
            fs::remove_dir_all(&part).map_err(|error| OpenError::io("remove", &part, error))?;
        }
        let built = DataDir::open(&part)?;
        Ok(Self { data_dir: data_dir.to_owned(), built: Some(built) })
    }

    /// The directory to be filled; an open one, with an identity to be set.
    ///
    /// # Errors
    /// It was finished already.
    pub fn dir(&self) -> Result<&DataDir, OpenError> {
        self.built.as_ref().ok_or_else(|| OpenError::NotEmpty { path: self.data_dir.clone() })
    }

    /// The data directory as it is while it is built: what stands in its `member` is the new member.
    pub fn part_dir(&self) -> PathBuf {
        self.data_dir.join(PART)
    }

    /// Gives the member its place. A member of etcd that has it moves aside.
    ///
    /// # Errors
    /// The directories cannot be renamed.
    pub fn finish(mut self) -> Result<(), OpenError> {
        let built = self.built.take();
        sync_dir(&self.part_dir().join("member"))?;
        sync_dir(&self.part_dir())?;
        let member = self.data_dir.join("member");
        if member.exists() {
            let aside = self.data_dir.join(ASIDE);
            rename(&member, &aside)?;
            sync_dir(&self.data_dir)?;
        }
        put_in_place(&self.data_dir)?;
        // Held until the directory has its name.
        drop(built);
        Ok(())
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        if self.built.take().is_some()
            && let Err(error) = fs::remove_dir_all(self.part_dir())
        {
            // The next attempt tries again.
            tracing::warn!(path = %self.part_dir().display(), %error, "cannot remove a part");
        }
    }
}

fn rename(from: &Path, to: &Path) -> Result<(), OpenError> {
    fs::rename(from, to).map_err(|error| OpenError::io("rename", from, error))
}

fn put_in_place(data_dir: &Path) -> Result<(), OpenError> {
    let part = data_dir.join(PART);
    rename(&part.join("member"), &data_dir.join("member"))?;
    sync_dir(data_dir)?;
    // Empty now.
    fs::remove_dir_all(&part).map_err(|error| OpenError::io("remove", &part, error))?;
    sync_dir(data_dir)
}

/// Whether a data directory holds a member of etcd that was not moved aside.
pub fn is_etcd_dir(data_dir: &Path) -> bool {
    let member = data_dir.join("member");
    !member.join("identity").exists()
        && (member.join("snap").exists() || has_etcd_log(&member.join("wal")))
}

/// Ends an import that a crash cut off between its two renames: by then the new member was whole.
///
/// # Errors
/// The directories cannot be renamed.
pub fn finish_adoption(data_dir: &Path) -> Result<bool, OpenError> {
    let is_between = !data_dir.join("member").exists()
        && data_dir.join(ASIDE).exists()
        && data_dir.join(PART).join("member").join("identity").exists();
    if is_between {
        put_in_place(data_dir)?;
    }
    Ok(is_between)
}

/// Refuses a directory whose member runs.
fn refuse_used(data_dir: &Path) -> Result<(), OpenError> {
    let path = data_dir.join("member").join("lock");
    let Ok(file) = fs::File::open(&path) else { return Ok(()) };
    match flock(&file, FlockOperation::NonBlockingLockShared) {
        Err(rustix::io::Errno::WOULDBLOCK) => Err(OpenError::Locked { path: data_dir.to_owned() }),
        _ => Ok(()),
    }
}
