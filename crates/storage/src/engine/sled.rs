//! sled behind the seam. It turns sled's panics into errors, and lets sled write only when it is told
//! to.
//!
//! Four habits of this release decide how it is used here:
//! - With `flush_every_ms(None)` every dropped handle *and every dropped iterator* flushes. A scan on
//!   another thread would then race the checkpoint's flush, which sled answers with a panic, and put
//!   rows on disk without the applied position. So the interval is set to about a century: the helper
//!   thread sleeps until the last handle is closed, and the only flushes are ours.
//! - A database whose metadata has no log behind its newest snapshot loses everything when it is opened:
//!   sled writes the snapshot again under the same name and then removes it as the old one. A process
//!   leaves that behind if it ends in the midst of an opening, as does a power cut before the first
//!   flush. So such a log is made, empty, before sled looks.
//! - That helper thread ends the process if its last flush fails, which any earlier read error causes.
//!   So a handle that saw an error is leaked on purpose, not closed.
//! - Opening runs the program `sync` of the machine first, twice, and goes on without it. The binaries hide
//!   it: a disk of somebody else that hangs would hold a member up. Nothing is lost by that: slabs are
//!   synced before the metadata that names them, and opening writes and syncs all metadata anew.

use std::fs;
use std::io;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use bytes::Bytes;
use sled::{Config, Db, InlineArray};

use super::{Backend, EngineError, Pairs};
use crate::keys::Pair;

/// Files of one size class each that every database has from its creation on.
const SLABS: usize = 78;
/// Pairs per leaf. Fixed when a database is created; a leaf is rewritten whole, so small is better
/// for appends in revision order.
const FANOUT: usize = 128;
/// One of so many pairs that a scan found is read once more, so that sled learns which leaves are in
/// memory: an iterator forgets its last 31 accesses when it is dropped, and a leaf of which sled does
/// not know stays in memory for ever. Small, since leaves may have lost pairs to a compaction.
const NOTED_EVERY: usize = 16;
/// About a century. Unit: milliseconds.
const NEVER_MS: usize = 100 * 365 * 24 * 3600 * 1000;
/// zstd level: the cheapest, since values are mostly small and written once.
const ZSTD_LEVEL: i32 = 1;

/// A handle to one sled database.
pub(crate) struct SledBackend {
    /// `None` only while closing.
    db: Option<Db<FANOUT>>,
    is_broken: bool,
}

impl SledBackend {
    /// Opens or creates the database in `path`.
    ///
    /// `cache_bytes` bounds clean pages; dirty ones are bounded by the caller's checkpoints.
    pub(crate) fn open(path: &Path, cache_bytes: u64) -> Result<Self, EngineError> {
        let config = Config::new()
            .path(path)
            .cache_capacity_bytes(usize::try_from(cache_bytes).unwrap_or(usize::MAX))
            .zstd_compression_level(ZSTD_LEVEL)
            .flush_every_ms(Some(NEVER_MS));
        let db = guard("open", || {
            follow_snapshot(&path.join("metadata"))?;
            config.open::<FANOUT>()
        })?;
        Ok(Self { db: Some(db), is_broken: false })
    }

    fn run<T>(
        &mut self,
        doing: &'static str,
        step: impl FnOnce(&Db<FANOUT>) -> io::Result<T>,
    ) -> Result<T, EngineError> {
        let db = self.db.as_ref().expect("only close takes the handle");
        let result = guard(doing, || step(db));
        self.is_broken |= result.is_err();
        result
    }
}

/// Says whether a finished database in `path` still has all its files but the logs of its metadata. sled
/// would make what is missing anew, and find out at the first row that lay there, if any did.
pub(crate) fn check_files(path: &Path) -> Result<(), EngineError> {
    let failed = |cause: String| EngineError { doing: "open", cause };
    let names = |dir: &Path| -> Result<Vec<String>, EngineError> {
        let entries =
            fs::read_dir(dir).map_err(|error| failed(format!("{}: {error}", dir.display())))?;
        Ok(entries.flatten().map(|entry| entry.file_name().to_string_lossy().into()).collect())
    };
    let settings = path.join("durability_cookie");
    if !settings.exists() {
        return Err(failed(format!("{} is missing", settings.display())));
    }
    let metadata = path.join("metadata");
    if !names(&metadata)?.iter().any(|name| number(name, "snapshot_").is_some()) {
        return Err(failed(format!("the snapshot is missing in {}", metadata.display())));
    }
    let slabs = path.join("slabs");
    let found = names(&slabs)?.len();
    if found < SLABS {
        let cause =
            format!("{} of {SLABS} files are missing in {}", SLABS - found, slabs.display());
        return Err(failed(cause));
    }
    Ok(())
}

/// Makes the log that must follow the newest snapshot of the metadata, if there is none.
fn follow_snapshot(metadata: &Path) -> io::Result<()> {
    let entries = match fs::read_dir(metadata) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other?,
    };
    let (mut snapshot, mut log) = (None, None);
    for entry in entries {
        let name = entry?.file_name();
        let name = name.to_string_lossy();
        snapshot = snapshot.max(number(&name, "snapshot_"));
        log = log.max(number(&name, "log_"));
    }
    let Some(newest) = snapshot.filter(|_| log <= snapshot) else { return Ok(()) };
    fs::File::create_new(metadata.join(format!("log_{:016x}", newest + 1)))?;
    fs::File::open(metadata)?.sync_all()
}

/// The number in the name of a file of the metadata.
fn number(name: &str, kind: &str) -> Option<u64> {
    let digits = name.strip_prefix(kind).filter(|digits| digits.len() == 16)?;
    u64::from_str_radix(digits, 16).ok()
}

/// Runs one call into sled; an error or a panic comes back as `EngineError`.
fn guard<T>(doing: &'static str, step: impl FnOnce() -> io::Result<T>) -> Result<T, EngineError> {
    match catch_unwind(AssertUnwindSafe(step)) {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(EngineError { doing, cause: first_line(&error.to_string()) }),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().map(String::as_str);
            let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
            let cause = format!("panic: {}", first_line(text.unwrap_or("without a message")));
            Err(EngineError { doing, cause })
        }
    }
}

/// sled's errors may carry a whole backtrace in their text.
fn first_line(text: &str) -> String {
    text.lines().next().unwrap_or_default().to_owned()
}

/// Shares a value without copying it unless it is small enough for sled to hold it inline.
fn share(array: InlineArray) -> Bytes {
    Bytes::from_owner(array)
}

impl Backend for SledBackend {
    fn write(&mut self, puts: Vec<Pair>) -> Result<(), EngineError> {
        self.run("write", |db| {
            let mut batch = sled::Batch::default();
            for (key, value) in puts {
                batch.insert(key, value);
            }
            db.apply_batch(batch)
        })
    }

    fn remove(&mut self, key: &[u8]) -> Result<Option<Bytes>, EngineError> {
        // Not a batch: removals in a batch leave empty leaves behind for ever.
        Ok(self.run("remove", |db| db.remove(key))?.map(share))
    }

    fn flush(&mut self) -> Result<(), EngineError> {
        self.run("flush", |db| db.flush().map(drop))
    }

    fn get(&mut self, key: &[u8]) -> Result<Option<Bytes>, EngineError> {
        Ok(self.run("get", |db| db.get(key))?.map(share))
    }

    fn scan(
        &mut self,
        range: Range<Vec<u8>>,
        limit: usize,
        limit_bytes: usize,
    ) -> Result<Pairs, EngineError> {
        self.run("scan", |db| {
            let (mut pairs, mut bytes) = (Pairs::new(), 0);
            // A range end is not passed on: with one, sled walks to the end of the tree anyway.
            for pair in db.range(range.start.clone()..) {
                let (key, value) = pair?;
                if key.as_ref() >= range.end.as_slice() || pairs.len() >= limit {
                    break;
                }
                bytes += key.len() + value.len();
                pairs.push((share(key), share(value)));
                if bytes >= limit_bytes {
                    break;
                }
            }
            for (key, _) in pairs.iter().step_by(NOTED_EVERY).chain(pairs.last()) {
                db.get(key)?;
            }
            Ok(pairs)
        })
    }

    fn scan_all(&mut self, each: &mut dyn FnMut(Bytes, Bytes) -> bool) -> Result<(), EngineError> {
        self.run("scan", |db| {
            for pair in db.iter() {
                let (key, value) = pair?;
                if !each(share(key), share(value)) {
                    break;
                }
            }
            Ok(())
        })
    }

    fn reader(&self) -> Box<dyn Backend> {
        Box::new(Self { db: self.db.clone(), is_broken: self.is_broken })
    }

    fn close(mut self: Box<Self>) {
        if !self.is_broken {
            drop(self.db.take());
        }
    }
}

impl Drop for SledBackend {
    fn drop(&mut self) {
        // Only a handle that was not closed in good order still has its database.
        std::mem::forget(self.db.take());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recover::open_patiently;

    const CACHE: u64 = 1 << 20;
    const PAIRS: u32 = 2_000;

    fn filled(dir: &Path) -> Box<SledBackend> {
        let mut backend = Box::new(SledBackend::open(dir, CACHE).expect("opens"));
        let pair = |n: u32| (n.to_be_bytes().to_vec(), n.to_le_bytes().to_vec());
        backend.write((0..PAIRS).map(pair).collect()).expect("writes");
        backend.flush().expect("flushes");
        backend
    }

    fn count(backend: &mut SledBackend) -> u32 {
        let mut found = 0;
        let counted = backend.scan_all(&mut |_, _| {
            found += 1;
            true
        });
        counted.map(|()| found).expect("reads")
    }

    /// What a process leaves that ends while it opens a database: the logs of the metadata are gone
    /// or superseded, the next one is not there yet.
    fn without_a_new_log(dir: &Path) {
        let logs = fs::read_dir(dir.join("metadata")).expect("lists").flatten();
        for log in logs.filter(|entry| entry.file_name().to_string_lossy().starts_with("log_")) {
            fs::remove_file(log.path()).expect("removes");
        }
    }

    #[test]
    fn an_opening_that_was_cut_short_costs_nothing() {
        let temp = tempfile::tempdir().expect("a directory");
        let dir = temp.path().join("database");
        Backend::close(filled(&dir));
        Backend::close(Box::new(open_patiently(&dir, CACHE).expect("opens")));
        without_a_new_log(&dir);
        for opening in 1..=3 {
            let mut backend = Box::new(open_patiently(&dir, CACHE).expect("opens"));
            assert_eq!(count(&mut backend), PAIRS, "opening {opening}");
            Backend::close(backend);
        }
    }
}
