//! Filling a new database with the content of another. The engine keeps every leaf that was written
//! until it is closed, flushed or not; so the copy is closed and opened on the way, and memory stays
//! bounded however much there is. The copy counts for nothing until the caller names it current.

use crate::engine::{Backend, EngineError};
use crate::keys::Pair;

/// Pairs per call, and bytes; also what is not on disk yet.
const STEP_PAIRS: usize = 4096;
const STEP_BYTES: usize = 4 << 20;
/// Memory of a pair in a leaf beside its bytes. Unit: bytes.
const PAIR_COST: u64 = 64;
/// Part of all that was written which may be held before the copy is opened anew: opening takes time
/// in proportion to the files, which are a few times smaller than what was written.
const HELD_PART: u64 = 64;

/// A database in the making.
pub(crate) struct Copy<F> {
    open: F,
    /// `None` only while it is opened anew.
    backend: Option<Box<dyn Backend>>,
    /// What may be held in any case. Unit: bytes.
    held_max: u64,
    held: u64,
    written: u64,
}

impl<F: FnMut() -> Result<Box<dyn Backend>, EngineError>> Copy<F> {
    /// Opens it for the first time. `held_max` is the memory that it may take, in bytes; for very
    /// much content it becomes a 64th of that.
    pub(crate) fn begin(mut open: F, held_max: u64) -> Result<Self, EngineError> {
        let backend = Some(open()?);
        Ok(Self { open, backend, held_max, held: 0, written: 0 })
    }

    /// Adds pairs and flushes them.
    pub(crate) fn put(&mut self, pairs: Vec<Pair>) -> Result<(), EngineError> {
        let bytes: u64 =
            pairs.iter().map(|(key, value)| (key.len() + value.len()) as u64 + PAIR_COST).sum();
        let backend = self.backend.as_mut().expect("only reopening takes the handle");
        backend.write(pairs)?;
        backend.flush()?;
        self.held += bytes;
        self.written += bytes;
        if self.held > self.held_max.max(self.written / HELD_PART) {
            self.reopen()?;
        }
        Ok(())
    }

    /// Adds everything that another database holds.
    pub(crate) fn put_all(&mut self, old: &mut dyn Backend) -> Result<(), EngineError> {
        let mut from = Vec::new();
        loop {
            let pairs = old.scan(from..vec![u8::MAX; 64], STEP_PAIRS, STEP_BYTES)?;
            let Some((last, _)) = pairs.last() else { return Ok(()) };
            from = [last.as_ref(), &[0]].concat();
            self.put(pairs.iter().map(|(key, value)| (key.to_vec(), value.to_vec())).collect())?;
        }
    }

    /// Lets go of the files. All that was put is flushed.
    pub(crate) fn close(&mut self) {
        if let Some(backend) = self.backend.take() {
            backend.close();
        }
    }

    fn reopen(&mut self) -> Result<(), EngineError> {
        self.close();
        self.backend = Some((self.open)()?);
        self.held = 0;
        Ok(())
    }

    /// The handle of the finished copy, which holds nothing in memory yet. All of it was flushed; the
    /// names of its files were not synced.
    pub(crate) fn finish(mut self) -> Result<Box<dyn Backend>, EngineError> {
        self.reopen()?;
        Ok(self.backend.expect("it was just opened"))
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;
    use crate::engine::faulty::FaultyBackend;

    fn filled(pairs: u32) -> FaultyBackend {
        let mut backend = FaultyBackend::default();
        let pair = |n: u32| (n.to_be_bytes().to_vec(), vec![n as u8; (n % 300) as usize]);
        backend.write((0..pairs).map(pair).collect()).expect("writes");
        backend
    }

    #[test]
    fn a_copy_holds_little_and_is_whole() {
        let old = filled(20_000);
        let fresh = FaultyBackend::default();
        let opened = Cell::new(0);
        let open = || {
            opened.set(opened.get() + 1);
            Ok(Box::new(fresh.clone()) as Box<dyn Backend>)
        };
        let mut copy = Copy::begin(open, 256 << 10).expect("opens");
        copy.put_all(&mut old.clone()).expect("copies");
        let mut handle = copy.finish().expect("opens");
        assert_eq!(fresh.live(), old.live());
        let (_, durable) = fresh.calls().pop().expect("there were calls");
        assert_eq!(*durable, old.live(), "all of it is on disk");
        assert!(opened.get() > 4, "opened {} times", opened.get());
        assert_eq!(handle.get(&7_u32.to_be_bytes()).expect("reads").map(|v| v.len()), Some(7));
    }

    #[test]
    fn whatever_fails_ends_the_copy() {
        let old = filled(10_000);
        let calls = {
            let fresh = FaultyBackend::default();
            let open = || Ok(Box::new(fresh.clone()) as Box<dyn Backend>);
            let mut copy = Copy::begin(open, 1).expect("opens");
            copy.put_all(&mut old.clone()).expect("copies");
            fresh.calls().len()
        };
        assert!(calls > 4);
        for call in 0..calls {
            let fresh = FaultyBackend::default();
            fresh.fail_at(call);
            let open = || Ok(Box::new(fresh.clone()) as Box<dyn Backend>);
            let mut copy = Copy::begin(open, 1).expect("opens");
            assert!(copy.put_all(&mut old.clone()).is_err(), "call {call}");
        }
        let mut left = 3;
        let open = || {
            left -= 1;
            let failed = EngineError { doing: "open", cause: "test".to_owned() };
            let fresh = FaultyBackend::default();
            if left == 0 { Err(failed) } else { Ok(Box::new(fresh) as Box<dyn Backend>) }
        };
        let mut copy = Copy::begin(open, 1).expect("opens");
        assert!(copy.put_all(&mut old.clone()).is_err(), "the second opening on the way fails");
    }
}
