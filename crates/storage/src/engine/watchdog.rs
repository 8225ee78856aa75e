//! Ends the process when the database does not come back from a call. After some failures its next
//! flush waits for ever, as may a read of a damaged tree: the member would look alive, keep its place
//! in the cluster and never again purge its log. It changes nothing in the calls it looks at.

use std::ops::Range;
use std::sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use bytes::Bytes;
use parking_lot::Mutex;

use super::{Backend, EngineError, Pairs};
use crate::keys::Pair;

/// Longest call. The largest writes 32 MiB and syncs them; a disk that takes longer for that than
/// this is as good as gone.
pub(crate) const CALL_MAX: Duration = Duration::from_secs(60);

/// What one handle is doing, and since when.
type Slot = Mutex<Option<(&'static str, Instant)>>;

/// Looks at all handles that it wrapped, until it is dropped.
pub(crate) struct Watchdog {
    slots: Arc<Mutex<Vec<Weak<Slot>>>>,
    /// Never used to send: its end tells the thread to stop.
    _stop: SyncSender<()>,
}

impl Watchdog {
    /// Starts the thread. It calls `end` with what a call was doing once it lasts longer than `most`.
    pub(crate) fn start(
        most: Duration,
        end: impl Fn(&'static str) + Send + 'static,
    ) -> Result<Self, std::io::Error> {
        let slots = Arc::new(Mutex::new(Vec::<Weak<Slot>>::new()));
        let (stop, stopped) = sync_channel(0);
        let looked_at = slots.clone();
        let look = move || {
            while stopped.recv_timeout(most / 8) == Err(RecvTimeoutError::Timeout) {
                looked_at.lock().retain(|slot| slot.strong_count() > 0);
                let slots: Vec<_> = looked_at.lock().iter().filter_map(Weak::upgrade).collect();
                let calls = slots.iter().filter_map(|slot| *slot.lock());
                if let Some((doing, _)) = calls.into_iter().find(|call| call.1.elapsed() > most) {
                    end(doing);
                }
            }
        };
        std::thread::Builder::new().name("state-watchdog".into()).spawn(look)?;
        Ok(Self { slots, _stop: stop })
    }

    /// A handle whose calls are looked at.
    pub(crate) fn wrap(&self, inner: Box<dyn Backend>) -> Box<dyn Backend> {
        wrap(&self.slots, inner)
    }
}

fn wrap(slots: &Arc<Mutex<Vec<Weak<Slot>>>>, inner: Box<dyn Backend>) -> Box<dyn Backend> {
    let slot = Arc::new(Slot::default());
    slots.lock().push(Arc::downgrade(&slot));
    Box::new(Watched { inner, slot, slots: slots.clone() })
}

/// A handle that notes what it is doing.
struct Watched {
    inner: Box<dyn Backend>,
    slot: Arc<Slot>,
    slots: Arc<Mutex<Vec<Weak<Slot>>>>,
}

impl Watched {
    fn note<T>(&mut self, doing: &'static str, call: impl FnOnce(&mut dyn Backend) -> T) -> T {
        *self.slot.lock() = Some((doing, Instant::now()));
        let result = call(self.inner.as_mut());
        *self.slot.lock() = None;
        result
    }
}

impl Backend for Watched {
    fn write(&mut self, puts: Vec<Pair>) -> Result<(), EngineError> {
        self.note("write", |inner| inner.write(puts))
    }

    fn remove(&mut self, key: &[u8]) -> Result<Option<Bytes>, EngineError> {
        self.note("remove", |inner| inner.remove(key))
    }

    fn flush(&mut self) -> Result<(), EngineError> {
        self.note("flush", |inner| inner.flush())
    }

    fn get(&mut self, key: &[u8]) -> Result<Option<Bytes>, EngineError> {
        self.note("get", |inner| inner.get(key))
    }

    fn scan(
        &mut self,
        range: Range<Vec<u8>>,
        limit: usize,
        limit_bytes: usize,
    ) -> Result<Pairs, EngineError> {
        self.note("scan", |inner| inner.scan(range, limit, limit_bytes))
    }

    fn scan_all(&mut self, each: &mut dyn FnMut(Bytes, Bytes) -> bool) -> Result<(), EngineError> {
        // Takes as long as its caller does with each pair.
        self.inner.scan_all(each)
    }

    fn reader(&self) -> Box<dyn Backend> {
        wrap(&self.slots, self.inner.reader())
    }

    fn close(self: Box<Self>) {
        let Self { inner, slot, .. } = *self;
        *slot.lock() = Some(("close", Instant::now()));
        inner.close();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, channel};

    use super::*;
    use crate::engine::faulty::FaultyBackend;

    const MOST: Duration = Duration::from_millis(80);
    const PATIENCE: Duration = Duration::from_secs(30);

    fn start() -> (Watchdog, Receiver<&'static str>) {
        let (told, tell) = channel();
        let end = move |doing| {
            let _ = told.send(doing);
        };
        (Watchdog::start(MOST, end).expect("a thread starts"), tell)
    }

    #[test]
    fn a_call_that_does_not_end_is_told() {
        let (watchdog, told) = start();
        let handle = watchdog.wrap(Box::new(FaultyBackend::default()));
        drop(handle.reader());
        let slot = watchdog.slots.lock().iter().find_map(Weak::upgrade).expect("the handle lives");
        *slot.lock() = Some(("flush", Instant::now()));
        assert_eq!(told.recv_timeout(PATIENCE), Ok("flush"));
    }

    #[test]
    fn calls_that_end_pass_through_and_leave_no_trace() {
        let (watchdog, told) = start();
        let backend = FaultyBackend::default();
        let mut handle = watchdog.wrap(Box::new(backend.clone()));
        let mut reader = handle.reader();
        handle.write(vec![(b"a".to_vec(), b"1".to_vec())]).expect("writes");
        handle.flush().expect("flushes");
        assert_eq!(reader.get(b"a").expect("reads"), Some(Bytes::from_static(b"1")));
        assert_eq!(reader.scan(vec![]..vec![255], 9, 99).expect("reads").len(), 1);
        assert_eq!(handle.remove(b"a").expect("removes"), Some(Bytes::from_static(b"1")));
        assert_eq!(backend.calls().len(), 3);
        let idle =
            watchdog.slots.lock().iter().filter_map(Weak::upgrade).all(|s| s.lock().is_none());
        assert!(idle, "nothing is under way");
        std::thread::sleep(3 * MOST);
        assert!(told.try_recv().is_err(), "idle handles may wait as long as they like");
        backend.fail_at(3);
        assert!(handle.flush().is_err(), "errors pass through too");
        reader.close();
        handle.close();
        drop(watchdog);
        assert!(told.recv_timeout(PATIENCE).is_err(), "the thread ends");
    }
}
