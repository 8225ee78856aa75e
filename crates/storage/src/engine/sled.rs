//! sled behind the seam. It turns sled's panics into errors, and lets sled write only when it is told
//! to.
//!
//! Two habits of this release decide how it is used here:
//! - With `flush_every_ms(None)` every dropped handle *and every dropped iterator* flushes. A scan on
//!   another thread would then race the checkpoint's flush, which sled answers with a panic, and put
//!   rows on disk without the applied position. So the interval is set to about a century: the helper
//!   thread sleeps until the last handle is closed, and the only flushes are ours.
//! - That helper thread ends the process if its last flush fails, which any earlier read error causes.
//!   So a handle that saw an error is leaked on purpose, not closed.

use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use bytes::Bytes;
use sled::{Config, Db, InlineArray};

use super::{Backend, EngineError, Pairs};
use crate::keys::Pair;

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
        let db = guard("open", || config.open::<FANOUT>())?;
        Ok(Self { db: Some(db), is_broken: false })
    }

    fn run<T>(
        &mut self,
        doing: &'static str,
        step: impl FnOnce(&Db<FANOUT>) -> std::io::Result<T>,
    ) -> Result<T, EngineError> {
        let db = self.db.as_ref().expect("only close takes the handle");
        let result = guard(doing, || step(db));
        self.is_broken |= result.is_err();
        result
    }
}

/// Runs one call into sled; an error or a panic comes back as `EngineError`.
fn guard<T>(
    doing: &'static str,
    step: impl FnOnce() -> std::io::Result<T>,
) -> Result<T, EngineError> {
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
