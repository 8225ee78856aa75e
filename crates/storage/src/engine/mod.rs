//! The seam to the embedded database: an ordered map of bytes with one owner, whose writes become
//! durable together at `flush`. Two implementations: sled for members, and one in memory for tests
//! that loses power and fails on demand. Nothing outside this folder names sled; nothing inside it
//! knows what the bytes mean.

#[cfg(test)]
pub(crate) mod faulty;
pub(crate) mod sled;
pub(crate) mod watchdog;

use std::ops::Range;

use bytes::Bytes;

use crate::keys::Pair;

/// The database failed. There is no way back: whoever sees it reports it and ends the process, or,
/// while opening, sets the directory aside.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{doing}: {cause}")]
pub(crate) struct EngineError {
    pub(crate) doing: &'static str,
    pub(crate) cause: String,
}

/// Pairs in key order.
pub(crate) type Pairs = Vec<(Bytes, Bytes)>;

/// An ordered map on disk. A handle is used by one thread at a time.
pub(crate) trait Backend: Send {
    /// Puts all pairs, atomically. Durable at the next `flush`.
    fn write(&mut self, puts: Vec<Pair>) -> Result<(), EngineError>;

    /// Removes one key and returns its value. Durable at the next `flush`.
    fn remove(&mut self, key: &[u8]) -> Result<Option<Bytes>, EngineError>;

    /// Makes everything written so far durable, as a whole or not at all.
    fn flush(&mut self) -> Result<(), EngineError>;

    /// One value.
    fn get(&mut self, key: &[u8]) -> Result<Option<Bytes>, EngineError>;

    /// Pairs of a key range in order, until `limit` pairs or about `limit_bytes` bytes; at least one
    /// pair if there is any.
    fn scan(
        &mut self,
        range: Range<Vec<u8>>,
        limit: usize,
        limit_bytes: usize,
    ) -> Result<Pairs, EngineError>;

    /// Calls `each` on every pair in key order until it returns false.
    fn scan_all(&mut self, each: &mut dyn FnMut(Bytes, Bytes) -> bool) -> Result<(), EngineError>;

    /// A handle for another thread, for reading only.
    fn reader(&self) -> Box<dyn Backend>;

    /// Lets go of the files; what was not flushed may or may not be there at the next opening. The
    /// handle that is closed last must be the writer's.
    fn close(self: Box<Self>);
}
