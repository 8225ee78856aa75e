//! A small file system of one's own in a loop-mounted image, whose power can be cut: the shutdown
//! call of ext4 and xfs drops everything that was not synced, as a power loss would. Needs root,
//! mkfs.ext4, mkfs.xfs and xfs_io.

use std::path::{Path, PathBuf};
use std::process::Command;

/// File system of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// ext4 with its default journal mode.
    Ext4,
    /// xfs.
    Xfs,
}

/// A mounted image; unmounted and deleted when dropped.
pub struct Image {
    dir: tempfile::TempDir,
    mounted: bool,
}

impl Image {
    /// Makes and mounts an image of `megabytes`.
    pub fn new(kind: Kind, megabytes: u64) -> Image {
        let dir = tempfile::Builder::new().prefix("kelson-image-").tempdir().expect("temp dir");
        let file = dir.path().join("image");
        std::fs::File::create(&file)
            .and_then(|file| file.set_len(megabytes << 20))
            .expect("make the image file");
        std::fs::create_dir(dir.path().join("mnt")).expect("make the mount point");
        match kind {
            Kind::Ext4 => run("mkfs.ext4", &["-q", "-F", path(&file)]),
            Kind::Xfs => run("mkfs.xfs", &["-q", "-f", path(&file)]),
        }
        let mut image = Image { dir, mounted: false };
        image.mount();
        image
    }

    /// Directory where the file system is mounted.
    pub fn mount_point(&self) -> PathBuf {
        self.dir.path().join("mnt")
    }

    /// Mounts it again; the journal is replayed as after a power cut.
    pub fn mount(&mut self) {
        run(
            "mount",
            &["-o", "loop", path(&self.dir.path().join("image")), path(&self.mount_point())],
        );
        self.mounted = true;
    }

    /// Cuts the power: from now on every write fails and nothing unsynced will be found again.
    pub fn cut_power(&self) {
        run("xfs_io", &["-x", "-c", "shutdown", path(&self.mount_point())]);
    }

    /// Unmounts; no process may have files open there.
    pub fn unmount(&mut self) {
        // A just killed process may hold its files a moment longer.
        for _ in 0..100 {
            let status =
                Command::new("umount").arg(self.mount_point()).output().expect("run umount");
            if status.status.success() {
                self.mounted = false;
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        panic!("{} stays busy", self.mount_point().display());
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        if self.mounted {
            let _ = Command::new("umount").arg("-l").arg(self.mount_point()).status();
        }
    }
}

fn path(path: &Path) -> &str {
    path.to_str().expect("temporary paths are UTF-8")
}

fn run(program: &str, args: &[&str]) {
    let output = Command::new(program)
        .args(args)
        .output()
        .unwrap_or_else(|e| panic!("{program} is needed for this test and cannot be run: {e}"));
    assert!(
        output.status.success(),
        "{program} {args:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// True when images can be mounted here (root). With `CI` set it must be possible.
pub fn available() -> bool {
    let root = rustix::process::geteuid().is_root();
    assert!(root || std::env::var_os("CI").is_none(), "power-loss tests need root in CI");
    root
}

/// Cuts power so many times: `KELSON_POWER_ROUNDS`, else this.
pub fn rounds(usual: u64) -> u64 {
    std::env::var("KELSON_POWER_ROUNDS")
        .map_or(usual, |text| text.parse().expect("KELSON_POWER_ROUNDS is a number"))
}

/// Runs a test that cuts power and judges with the flags it is given; it returns how many writes were
/// acknowledged, or the first violation. None may be found.
pub fn nothing_is_lost(kind: Kind, test: impl FnOnce(&[String]) -> Result<usize, String>) {
    if !available() {
        println!("not root: no power can be cut here");
        return;
    }
    // Frequent checkpoints: the cut often falls into one.
    let acknowledged = test(&["--backend-batch-interval=50ms".to_owned()]).expect("no violation");
    println!("{kind:?}: {acknowledged} acknowledged writes, all there");
    assert!(acknowledged > 100, "only {acknowledged} writes were acknowledged");
}

/// As [`nothing_is_lost`], without fsync: a violation must be found, which proves that it can be.
pub fn losses_are_found(test: impl FnOnce(&[String]) -> Result<usize, String>) {
    if !available() {
        println!("not root: no power can be cut here");
        return;
    }
    let verdict = test(&["--unsafe-no-fsync".to_owned()]);
    let violation = verdict.expect_err("losing unsynced writes went unnoticed");
    println!("found as it should be: {violation}");
}
