//! What the file system says: how much a directory takes and how much is left. It changes nothing.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// Free space below which clients should stop writing, whatever the size of the disk. Unit: bytes.
const FREE_BYTES_MIN: u64 = 256 << 20;
/// The same as a share of the disk: one fiftieth ...
const FREE_SHARE_MIN: u64 = 50;
/// ... but no more than this: what is written between two looks does not grow with the disk, and a
/// member must not refuse to work beside hundreds of free gigabytes. Unit: bytes.
const FREE_SHARE_MAX: u64 = 1 << 30;

/// Bytes that the files below `dir` take on disk. Files that vanish meanwhile count nothing.
pub(crate) fn used_bytes(dir: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(dir) else { return 0 };
    let used = entries.flatten().map(|entry| match entry.metadata() {
        Ok(metadata) if metadata.is_dir() => used_bytes(&entry.path()),
        // Blocks, not length: the files have holes. The unit of `blocks` is 512 bytes on every disk.
        Ok(metadata) => metadata.blocks() * 512,
        Err(_) => 0,
    });
    used.sum()
}

/// Bytes that the file system of `dir` still has; without limit if it does not say.
pub(crate) fn free_bytes(dir: &Path) -> u64 {
    rustix::fs::statvfs(dir).map_or(u64::MAX, |stat| stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// Whether less than 256 MiB is free where `dir` lies, or less than 2 % and 1 GiB. A file system that
/// does not say counts as not low.
pub(crate) fn is_low(dir: &Path) -> bool {
    rustix::fs::statvfs(dir).is_ok_and(|stat| {
        below(
            stat.f_bavail.saturating_mul(stat.f_frsize),
            stat.f_blocks.saturating_mul(stat.f_frsize),
        )
    })
}

fn below(free: u64, total: u64) -> bool {
    free < (total / FREE_SHARE_MIN).clamp(FREE_BYTES_MIN, FREE_SHARE_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guard_grows_with_the_disk_up_to_a_gibibyte() {
        let gib = 1 << 30;
        assert!(below(255 << 20, gib) && !below(256 << 20, gib));
        assert!(below(gib / 2 - 1, 25 * gib) && !below(gib / 2, 25 * gib));
        assert!(below(gib - 1, 1_000 * gib) && !below(gib, 1_000 * gib));
        assert!(!below(u64::MAX, u64::MAX));
    }

    #[test]
    fn used_bytes_counts_blocks_of_all_levels() {
        let temp = tempfile::tempdir().expect("temporary directory");
        assert_eq!(used_bytes(temp.path()), 0);
        fs::create_dir(temp.path().join("inner")).expect("creates");
        let file = fs::File::create(temp.path().join("inner/file")).expect("creates");
        file.set_len(1 << 20).expect("makes a hole");
        assert!(used_bytes(temp.path()) < 1 << 20, "a hole takes no space");
        fs::write(temp.path().join("inner/full"), vec![1; 100_000]).expect("writes");
        fs::File::open(temp.path().join("inner/full")).and_then(|f| f.sync_all()).expect("syncs");
        assert!(used_bytes(temp.path()) >= 100_000);
    }
}
