//! The page of memory through which a preloaded library (`shim/`) is told what to do to one member,
//! and tells what it did. It is a file that both sides share; nothing here touches a process. Faults
//! write it, coverage reads the counters.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Bytes of the page.
const LENGTH: u64 = 4096;
/// As in `shim/src/lib.rs`: the library of this layout has mapped the page.
const LAYOUT: u64 = 0x4b45_4c53_4f4e_0001;

/// What can be ordered; the numbers are those of the words in `shim/src/lib.rs`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    /// 1: syncs do not return.
    HoldSyncs = 0,
    /// Syncs take this many microseconds longer, a second at most.
    DelaySyncs = 1,
    /// Syncs fail with this error number.
    FailSyncs = 2,
    /// Writes to files fail with this error number.
    FailWrites = 3,
    /// The wall clock is off by this many nanoseconds, as an `i64`.
    ShiftClock = 4,
}

const LAYOUT_WORD: u64 = 8;

/// What the library counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Count {
    /// Syncs that were held, delayed or failed.
    SyncsHurt = 10,
    WritesFailed = 11,
    /// Readings of a wall clock that was off.
    ClockReads = 12,
}

/// One member's page.
#[derive(Debug)]
pub(crate) struct Page {
    file: File,
    path: PathBuf,
}

impl Page {
    /// Makes an empty page, which orders nothing.
    pub(crate) fn create(path: &Path) -> io::Result<Self> {
        let file = File::options().read(true).write(true).create(true).truncate(true).open(path)?;
        file.set_len(LENGTH)?;
        Ok(Self { file, path: path.to_owned() })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn again(&self) -> io::Result<Self> {
        Ok(Self { file: self.file.try_clone()?, path: self.path.clone() })
    }

    /// Zero takes an order back.
    pub(crate) fn set(&self, order: Order, value: i64) -> io::Result<()> {
        self.file.write_all_at(&value.to_ne_bytes(), order as u64 * 8)
    }

    /// Takes all orders back.
    pub(crate) fn clear(&self) -> io::Result<()> {
        self.file.write_all_at(&[0; 40], 0)
    }

    pub(crate) fn count(&self, what: Count) -> io::Result<u64> {
        self.word(what as u64)
    }

    /// True once the library runs in a process that shares the page.
    pub(crate) fn alive(&self) -> io::Result<bool> {
        Ok(self.word(LAYOUT_WORD)? == LAYOUT)
    }

    fn word(&self, number: u64) -> io::Result<u64> {
        let mut bytes = [0; 8];
        self.file.read_exact_at(&mut bytes, number * 8)?;
        Ok(u64::from_ne_bytes(bytes))
    }
}

/// The library as this repository builds it: beside the running program, as cargo puts both.
pub(crate) fn library() -> Result<PathBuf, String> {
    let program = std::env::current_exe().map_err(|error| error.to_string())?;
    let beside = program.with_file_name("libkelson_shim.so");
    if beside.exists() {
        return Ok(beside);
    }
    let profile = if program.components().any(|part| part.as_os_str() == "release") {
        " --release"
    } else {
        ""
    };
    let hint = format!("build it with `cargo build{profile} -p kelson-shim`");
    Err(format!("{} is missing; {hint}", beside.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_lie_where_the_library_looks_and_can_be_taken_back() {
        let dir = std::env::temp_dir().join(format!("kelson-page-{}", std::process::id()));
        let page = Page::create(&dir).expect("a page");
        page.set(Order::FailSyncs, 5).expect("an order");
        page.set(Order::ShiftClock, -3_600_000_000_000).expect("an order");
        assert_eq!(page.word(2).expect("a word"), 5);
        assert_eq!(page.word(4).expect("a word") as i64, -3_600_000_000_000);
        assert!(!page.alive().expect("a word"));
        page.clear().expect("cleared");
        assert_eq!(page.word(2).expect("a word") | page.word(4).expect("a word"), 0);
        std::fs::remove_file(dir).ok();
    }
}
