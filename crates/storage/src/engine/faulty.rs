//! The database of the tests: in memory, it remembers what was durable after every call, loses the
//! rest like a power cut, and fails at a chosen call. It never touches a file.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use parking_lot::Mutex;

use super::{Backend, EngineError, Pairs};
use crate::keys::Pair;

/// What is on the imagined disk.
pub(crate) type Image = Arc<BTreeMap<Vec<u8>, Bytes>>;

/// One mutating call, in the order in which they came.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Call {
    Write { puts: usize },
    Remove,
    Flush,
}

#[derive(Default)]
struct Disk {
    /// What a handle sees.
    live: BTreeMap<Vec<u8>, Bytes>,
    /// What survives a power cut now.
    durable: Image,
    /// Each call, with what would have survived a power cut right after it.
    calls: Vec<(Call, Image)>,
    fail_at: Option<usize>,
}

/// A handle; clones share one disk.
#[derive(Clone, Default)]
pub(crate) struct FaultyBackend {
    disk: Arc<Mutex<Disk>>,
}

impl FaultyBackend {
    /// A machine that comes back with this disk.
    pub(crate) fn after_power_cut(image: &Image) -> Self {
        let backend = Self::default();
        backend.disk.lock().live = image.as_ref().clone();
        backend.disk.lock().durable = image.clone();
        backend
    }

    /// Makes the mutating call with this number (from 0), and all after it, fail.
    pub(crate) fn fail_at(&self, call: usize) {
        self.disk.lock().fail_at = Some(call);
    }

    /// All mutating calls so far, each with the disk after it.
    pub(crate) fn calls(&self) -> Vec<(Call, Image)> {
        self.disk.lock().calls.clone()
    }

    /// What a handle would read now.
    pub(crate) fn live(&self) -> BTreeMap<Vec<u8>, Bytes> {
        self.disk.lock().live.clone()
    }
}

impl Disk {
    fn record(&mut self, call: Call) -> Result<(), EngineError> {
        if self.fail_at.is_some_and(|at| self.calls.len() >= at) {
            return Err(EngineError { doing: "test", cause: format!("{call:?} fails") });
        }
        if call == Call::Flush {
            self.durable = Arc::new(self.live.clone());
        }
        let durable = self.durable.clone();
        self.calls.push((call, durable));
        Ok(())
    }
}

impl Backend for FaultyBackend {
    fn write(&mut self, puts: Vec<Pair>) -> Result<(), EngineError> {
        let mut disk = self.disk.lock();
        disk.record(Call::Write { puts: puts.len() })?;
        disk.live.extend(puts.into_iter().map(|(key, value)| (key, Bytes::from(value))));
        Ok(())
    }

    fn remove(&mut self, key: &[u8]) -> Result<Option<Bytes>, EngineError> {
        let mut disk = self.disk.lock();
        disk.record(Call::Remove)?;
        Ok(disk.live.remove(key))
    }

    fn flush(&mut self) -> Result<(), EngineError> {
        self.disk.lock().record(Call::Flush)
    }

    fn get(&mut self, key: &[u8]) -> Result<Option<Bytes>, EngineError> {
        Ok(self.disk.lock().live.get(key).cloned())
    }

    fn scan(
        &mut self,
        range: Range<Vec<u8>>,
        limit: usize,
        limit_bytes: usize,
    ) -> Result<Pairs, EngineError> {
        let disk = self.disk.lock();
        let (mut pairs, mut bytes) = (Pairs::new(), 0);
        for (key, value) in disk.live.range(range).take(limit) {
            bytes += key.len() + value.len();
            pairs.push((Bytes::from(key.clone()), value.clone()));
            if bytes >= limit_bytes {
                break;
            }
        }
        Ok(pairs)
    }

    fn scan_all(&mut self, each: &mut dyn FnMut(Bytes, Bytes) -> bool) -> Result<(), EngineError> {
        for (key, value) in &self.live() {
            if !each(Bytes::from(key.clone()), value.clone()) {
                break;
            }
        }
        Ok(())
    }

    fn reader(&self) -> Box<dyn Backend> {
        Box::new(self.clone())
    }

    fn close(self: Box<Self>) {}
}
