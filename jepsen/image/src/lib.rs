//! A small file system of one's own in a loop-mounted image, whose power can be cut: the shutdown
//! call of ext4 and xfs drops everything that was not synced, as a power loss would. It knows nothing
//! of what is stored there; tests and fault runs put members' data on it. Needs root, mkfs.ext4,
//! mkfs.xfs and xfs_io.

use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// Looks at a file system that is still in use, before unmounting is given up: two seconds in all.
const BUSY_LOOKS: u32 = 100;
const BUSY_WAIT: Duration = Duration::from_millis(20);

/// File system of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// ext4 with its default journal mode.
    Ext4,
    /// xfs.
    Xfs,
}

impl Kind {
    /// As in `/proc/mounts`.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Ext4 => "ext4",
            Kind::Xfs => "xfs",
        }
    }
}

/// A mounted image; unmounted when dropped. Its files stay, for whoever made the directory.
#[derive(Debug)]
pub struct Image {
    dir: PathBuf,
    mounted: bool,
}

impl Image {
    /// Makes and mounts an image of `megabytes` in a directory of its own. The file is sparse: it
    /// takes what is written to it.
    ///
    /// # Errors
    /// A program that is missing or fails; the text has its words.
    pub fn create(dir: &Path, kind: Kind, megabytes: u64) -> io::Result<Image> {
        std::fs::create_dir_all(dir.join("mnt"))?;
        let file = dir.join("image");
        std::fs::File::create(&file)?.set_len(megabytes << 20)?;
        let mut make = match kind {
            Kind::Ext4 => Command::new("mkfs.ext4"),
            Kind::Xfs => Command::new("mkfs.xfs"),
        };
        make.arg("-q").arg(if kind == Kind::Ext4 { "-F" } else { "-f" });
        run(make.arg(&file))?;
        let mut image = Image { dir: dir.to_owned(), mounted: false };
        image.mount()?;
        Ok(image)
    }

    /// Directory where the file system is mounted.
    pub fn mount_point(&self) -> PathBuf {
        self.dir.join("mnt")
    }

    /// Mounts it again; the journal is replayed as after a power cut.
    ///
    /// # Errors
    /// As [`Image::create`].
    pub fn mount(&mut self) -> io::Result<()> {
        let mut mount = Command::new("mount");
        run(mount.args(["-o", "loop"]).arg(self.dir.join("image")).arg(self.mount_point()))?;
        self.mounted = true;
        Ok(())
    }

    /// Cuts the power: from now on every write fails and nothing unsynced will be found again.
    ///
    /// # Errors
    /// As [`Image::create`].
    pub fn cut_power(&self) -> io::Result<()> {
        run(Command::new("xfs_io").args(["-x", "-c", "shutdown"]).arg(self.mount_point()))
    }

    /// Unmounts; no process may have files open there.
    ///
    /// # Errors
    /// It is still in use after two seconds.
    pub fn unmount(&mut self) -> io::Result<()> {
        let mut looks = 0;
        // A just killed process may hold its files a moment longer.
        while let Err(error) = run(Command::new("umount").arg(self.mount_point())) {
            looks += 1;
            if looks == BUSY_LOOKS {
                return Err(error);
            }
            std::thread::sleep(BUSY_WAIT);
        }
        self.mounted = false;
        Ok(())
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        if self.mounted {
            run(Command::new("umount").arg("-l").arg(self.mount_point())).ok();
        }
    }
}

/// For a new mount namespace: lets go of the images of others there. It holds copies of all that is
/// mounted, and whoever unmounts an image to mount it again after a cut would find it as dead as
/// before. In the namespace of others it would unmount theirs. Paths with blanks are not understood.
///
/// # Errors
/// The mounts cannot be read. One that cannot be let go of stays.
pub fn release_copies() -> io::Result<()> {
    for mount in std::fs::read_to_string("/proc/self/mounts")?.lines() {
        let Some(point) = mount.split(' ').nth(1).map(Path::new) else { continue };
        if point.ends_with("mnt") && point.with_file_name("image").is_file() {
            run(Command::new("umount").arg("-l").arg(point)).ok();
        }
    }
    Ok(())
}

fn run(command: &mut Command) -> io::Result<()> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command.output().map_err(|error| {
        io::Error::other(format!("{program} is needed and cannot be run: {error}"))
    })?;
    if output.status.success() {
        return Ok(());
    }
    let words = String::from_utf8_lossy(&output.stderr);
    Err(io::Error::other(format!("{command:?}: {}", words.trim())))
}
