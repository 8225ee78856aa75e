//! Images whose power can be cut (`kelson-image`) as tests use them: in a temporary directory, and any
//! failure ends the test. Also what all tests of power loss share.

use std::path::PathBuf;

pub use kelson_image::Kind;

/// A mounted image; unmounted and deleted when dropped.
pub struct Image {
    // Before the directory, so that it is unmounted before it is deleted.
    image: kelson_image::Image,
    _dir: tempfile::TempDir,
}

impl Image {
    /// Makes and mounts an image of `megabytes`.
    pub fn new(kind: Kind, megabytes: u64) -> Image {
        let dir = tempfile::Builder::new().prefix("kelson-image-").tempdir().expect("temp dir");
        let image = kelson_image::Image::create(dir.path(), kind, megabytes);
        Image { image: image.expect("make and mount an image"), _dir: dir }
    }

    /// Directory where the file system is mounted.
    pub fn mount_point(&self) -> PathBuf {
        self.image.mount_point()
    }

    /// Mounts it again; the journal is replayed as after a power cut.
    pub fn mount(&mut self) {
        self.image.mount().expect("mount the image again");
    }

    /// Cuts the power: from now on every write fails and nothing unsynced will be found again.
    pub fn cut_power(&self) {
        self.image.cut_power().expect("cut the power");
    }

    /// Unmounts; no process may have files open there.
    pub fn unmount(&mut self) {
        self.image.unmount().expect("unmount the image");
    }
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
