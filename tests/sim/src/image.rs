//! Images as files: writes what a cut left into a directory, and reads a directory to compare the two.
//! It decides nothing about what survives.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::disk::{Cut, Disk, Image};
use crate::trace::Call;

/// Pieces of zeros are left out: files are sparse, and fast to make.
const PIECE: usize = 4096;

/// Where images are made: in memory if the machine has such a place.
pub fn fast_dir() -> PathBuf {
    let memory = PathBuf::from("/dev/shm");
    if memory.is_dir() { memory } else { std::env::temp_dir() }
}

impl Image {
    /// Writes all files below a directory, which is made.
    pub fn write(&self, root: &Path) -> io::Result<()> {
        fs::create_dir_all(root)?;
        for dir in &self.dirs {
            fs::create_dir(root.join(dir))?;
        }
        for (path, bytes) in &self.files {
            write_sparse(&root.join(path), bytes)?;
        }
        Ok(())
    }
}

fn write_sparse(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let file = File::create_new(path)?;
    file.set_len(bytes.len() as u64)?;
    let zeros = [0; PIECE];
    for (at, piece) in bytes.chunks(PIECE).enumerate() {
        if piece != &zeros[..piece.len()] {
            file.write_all_at(piece, (at * PIECE) as u64)?;
        }
    }
    Ok(())
}

/// Compares a directory with what the calls of its run must have made of it.
///
/// # Errors
/// They differ: the recording is not complete.
pub fn check_complete(calls: &[Call], root: &Path) -> Result<(), String> {
    let mut disk = Disk::default();
    for (number, call) in calls.iter().enumerate() {
        disk.apply(call).map_err(|text| format!("call {number}, {}: {text}", call.summary()))?;
    }
    let image = disk.image(Cut::Kill, None).expect("a kill makes sense everywhere");
    let mut wanted: Vec<(String, Option<&[u8]>)> =
        image.dirs.iter().map(|dir| (dir.clone(), None)).collect();
    wanted.extend(image.files.iter().map(|(path, bytes)| (path.clone(), Some(bytes.as_slice()))));
    wanted.sort();
    let mut found = Vec::new();
    list(root, root, &mut found).map_err(|error| format!("{}: {error}", root.display()))?;
    found.sort();
    let names = |list: &[(String, bool)]| list.iter().map(|it| it.0.clone()).collect::<Vec<_>>();
    if found.len() != wanted.len() {
        let text = format!("{} names are there, {} were recorded", found.len(), wanted.len());
        return Err(format!("the recording is not complete: {text}: {:?}", names(&found)));
    }
    for ((path, is_dir), (recorded, bytes)) in found.iter().zip(&wanted) {
        let same = path == recorded
            && match bytes {
                None => *is_dir,
                Some(bytes) => fs::read(root.join(path)).is_ok_and(|found| found == *bytes),
            };
        if !same {
            return Err(format!("the recording is not complete: {path} is not as recorded"));
        }
    }
    Ok(())
}

fn list(root: &Path, dir: &Path, found: &mut Vec<(String, bool)>) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        let name = path.strip_prefix(root).unwrap_or(&path).to_string_lossy().into_owned();
        let is_dir = path.is_dir();
        found.push((name, is_dir));
        if is_dir {
            list(root, &path, found)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_that_was_not_recorded_is_noticed() {
        let home = tempfile::tempdir().expect("a directory");
        let root = home.path().join("disk");
        let mut bytes = vec![0; 3 * PIECE];
        bytes[5000] = 1;
        let calls = vec![
            Call::MakeDir("a".into()),
            Call::Create("a/b".into(), 0),
            Call::Write(0, 0, bytes.clone()),
        ];
        let mut disk = Disk::default();
        calls.iter().for_each(|call| disk.apply(call).expect("fits"));
        disk.image(Cut::Kill, None).expect("always").write(&root).expect("writes");
        assert_eq!(fs::read(root.join("a/b")).expect("is there"), bytes);
        assert_eq!(check_complete(&calls, &root), Ok(()));
        for fewer in 1..3 {
            assert!(check_complete(&calls[..fewer], &root).is_err());
        }
        fs::write(root.join("a/b"), b"x").expect("writes");
        assert!(check_complete(&calls, &root).is_err());
    }
}
