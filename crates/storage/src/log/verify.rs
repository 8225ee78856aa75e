//! Reads a log the way a start does, by the same rules, and changes nothing: a torn tail is accepted and
//! left as it is. For `kelson check`, which must say today what a start will say tomorrow.

use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;

use crate::types::LogId;

use super::disk::{Disk, LogFile, RealDisk};
use super::recovery::{recover, segment_numbers};
use super::{LogError, LogOptions};

/// What a sound log says of itself.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Verified {
    /// The last vote; opaque bytes of the raft crate.
    pub vote: Option<Bytes>,
    /// Everything up to here was purged; index 0 = nothing.
    pub purged: LogId,
    /// The last entry, or the purge mark.
    pub last: LogId,
    /// Number of segments; 0 = there is no log.
    pub segments: usize,
}

/// Checks every record of a log. The caller holds the lock of the data directory. Blocking.
///
/// # Errors
/// What a start would refuse, with the file and the place.
pub fn verify(options: &LogOptions) -> Result<Verified, LogError> {
    let dir = options.dir.as_path();
    let nothing =
        Verified { vote: None, purged: LogId::default(), last: LogId::default(), segments: 0 };
    let names = match RealDisk.list(dir) {
        Ok(names) => names,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(nothing),
        Err(error) => return Err(LogError::io("list", dir, error)),
    };
    if segment_numbers(dir, &names)?.is_empty() && !names.iter().any(|name| name.ends_with(".next"))
    {
        return Ok(nothing);
    }
    let recovered = recover(&ReadOnly, options)?;
    Ok(Verified {
        vote: recovered.vote,
        purged: recovered.purged,
        last: recovered.last.max(recovered.purged),
        segments: recovered.segments.len(),
    })
}

/// The file system, with everything that changes it left out.
#[derive(Clone, Copy, Debug)]
struct ReadOnly;

struct ReadOnlyFile(std::fs::File);

impl Disk for ReadOnly {
    fn create_dir(&self, _dir: &Path) -> io::Result<()> {
        Ok(())
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<String>> {
        RealDisk.list(dir)
    }

    fn create(&self, _path: &Path) -> io::Result<Arc<dyn LogFile>> {
        // Only a log without segments would be given a file, and that one is never opened here.
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn open(&self, path: &Path) -> io::Result<Arc<dyn LogFile>> {
        Ok(Arc::new(ReadOnlyFile(std::fs::File::open(path)?)))
    }

    fn rename(&self, _from: &Path, _to: &Path) -> io::Result<()> {
        Ok(())
    }

    fn remove(&self, _path: &Path) -> io::Result<()> {
        Ok(())
    }

    fn sync_dir(&self, _dir: &Path) -> io::Result<()> {
        Ok(())
    }
}

impl LogFile for ReadOnlyFile {
    fn size(&self) -> io::Result<u64> {
        Ok(self.0.metadata()?.len())
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        FileExt::read_at(&self.0, buffer, offset)
    }

    fn write_at(&self, bytes: &[u8], _offset: u64) -> io::Result<usize> {
        Ok(bytes.len())
    }

    fn sync_data(&self) -> io::Result<()> {
        Ok(())
    }
}
