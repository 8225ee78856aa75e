//! Reads of old rows: callers ask through a bounded channel, one thread answers from its own handle
//! to the database. It never writes.

use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use bytes::Bytes;

use super::{die, stopped};
use crate::engine::{Backend, EngineError};
use crate::keys;
use crate::types::{Fatal, RevisionKey, Row};

/// Reads waiting for the thread. At the bound the asking thread waits.
const WAITING: usize = 128;

/// What the thread is asked for.
pub(super) enum Job {
    Get(RevisionKey, SyncSender<Option<Bytes>>),
    Scan {
        from: RevisionKey,
        rows: usize,
        bytes: usize,
        answer: SyncSender<Vec<Row>>,
    },
    /// Close the handle and wait for a new one (`None` = end).
    Pause {
        closed: SyncSender<()>,
        next: Receiver<Option<Box<dyn Backend>>>,
    },
}

/// The asking side.
pub(super) struct Reads {
    jobs: SyncSender<Job>,
}

impl Reads {
    pub(super) fn new() -> (Self, Receiver<Job>) {
        let (jobs, receiver) = sync_channel(WAITING);
        (Self { jobs }, receiver)
    }

    pub(super) fn get(&self, key: RevisionKey) -> Result<Option<Bytes>, Fatal> {
        let (answer, wait) = sync_channel(1);
        self.jobs.send(Job::Get(key, answer)).map_err(|_| stopped())?;
        wait.recv().map_err(|_| stopped())
    }

    pub(super) fn scan(
        &self,
        from: RevisionKey,
        rows: usize,
        bytes: usize,
    ) -> Result<Vec<Row>, Fatal> {
        let (answer, wait) = sync_channel(1);
        let job = Job::Scan { from, rows: rows.max(1), bytes, answer };
        self.jobs.send(job).map_err(|_| stopped())?;
        wait.recv().map_err(|_| stopped())
    }

    /// Makes the thread close its handle. Returns where to send the next one; `None` ends it.
    pub(super) fn pause(&self) -> SyncSender<Option<Box<dyn Backend>>> {
        let (closed, wait) = sync_channel(1);
        let (give, next) = sync_channel(1);
        if self.jobs.send(Job::Pause { closed, next }).is_ok() {
            // The thread answers or is gone; in both cases it holds no handle any more.
            let _ = wait.recv();
        }
        give
    }
}

/// The thread: answers until it is told to end or nobody can ask any more.
pub(super) fn serve(mut backend: Box<dyn Backend>, jobs: &Receiver<Job>) {
    while let Ok(job) = jobs.recv() {
        // An asker that gave up takes no answer, which is fine.
        match job {
            Job::Get(key, answer) => {
                let row = get(backend.as_mut(), key).unwrap_or_else(|error| die(&error));
                let _ = answer.send(row);
            }
            Job::Scan { from, rows, bytes, answer } => {
                let rows = scan(backend.as_mut(), from, rows, bytes);
                let _ = answer.send(rows.unwrap_or_else(|error| die(&error)));
            }
            Job::Pause { closed, next } => {
                backend.close();
                let _ = closed.send(());
                match next.recv() {
                    Ok(Some(other)) => backend = other,
                    Ok(None) | Err(_) => return,
                }
            }
        }
    }
    backend.close();
}

fn get(backend: &mut dyn Backend, key: RevisionKey) -> Result<Option<Bytes>, EngineError> {
    for tombstone in [false, true] {
        let name = keys::row_key(key, tombstone);
        if let Some(value) = backend.get(&name)? {
            return Ok(Some(decode(&name, value)?.kv));
        }
    }
    Ok(None)
}

fn scan(
    backend: &mut dyn Backend,
    from: RevisionKey,
    rows: usize,
    bytes: usize,
) -> Result<Vec<Row>, EngineError> {
    let pairs = backend.scan(keys::rows_from(from), rows, bytes)?;
    pairs.into_iter().map(|(key, value)| decode(&key, value)).collect()
}

fn decode(key: &[u8], value: Bytes) -> Result<Row, EngineError> {
    keys::decode_row(key, value).map_err(|malformed| EngineError {
        doing: "read a row",
        cause: format!("{malformed} at {key:02x?}"),
    })
}
