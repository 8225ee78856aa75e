//! What the tests of the state share: a store in a temporary directory, short ways to write commands,
//! and a model that does everything the slow and obvious way.

#![allow(dead_code, unreachable_pub, reason = "each test binary uses its part")]

pub mod model;

use std::path::Path;
use std::time::{Duration, Instant};

use bytes::Bytes;
use kelson_api::Error;
use kelson_api::command::command::Op;
use kelson_api::command::{Asker, Command};
use kelson_api::etcdserverpb::{
    CompactionRequest, DeleteRangeRequest, LeaseGrantRequest, LeaseRevokeRequest, PutRequest,
    RangeRequest, TxnRequest,
};
use kelson_storage::log::{Durable, DurablePublisher};
use kelson_storage::{LogId, Options, Outcome, Reader, Reply, Store};
use tempfile::TempDir;

/// A store with everything it stands on.
pub struct Fixture {
    pub store: Option<Store>,
    pub reader: Reader,
    pub index: u64,
    options: Options,
    /// Keeps the log durable index alive; it stands above all entries.
    _log: DurablePublisher,
    durable: Durable,
    _dir: TempDir,
}

impl Fixture {
    pub fn new() -> Self {
        Self::with(|_| {})
    }

    /// A store with other settings than the defaults.
    pub fn with(change: impl FnOnce(&mut Options)) -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        std::fs::create_dir(dir.path().join("member")).expect("a member directory");
        let mut options = Options::new(dir.path());
        change(&mut options);
        let (durable, log) = Durable::manual(u64::MAX);
        let (store, reader) =
            kelson_storage::open(&options, durable.clone()).expect("an empty store opens");
        Self { store: Some(store), reader, index: 0, options, _log: log, durable, _dir: dir }
    }

    /// The store in a directory that was copied, with `index` entries applied.
    pub fn at(data_dir: &Path, index: u64) -> Self {
        let options = Options::new(data_dir);
        let (durable, log) = Durable::manual(u64::MAX);
        let (store, reader) =
            kelson_storage::open(&options, durable.clone()).expect("what was copied opens");
        assert_eq!(reader.applied().index, index);
        let dir = tempfile::tempdir().expect("a temporary directory");
        Self { store: Some(store), reader, index, options, _log: log, durable, _dir: dir }
    }

    pub fn data_dir(&self) -> &Path {
        &self.options.data_dir
    }

    /// Closes the store and reads it back from disk.
    pub fn reopen(&mut self) {
        self.store.take().expect("open").shutdown();
        let deadline = Instant::now() + Duration::from_secs(10);
        let (store, reader) = loop {
            match kelson_storage::open(&self.options, self.durable.clone()) {
                Ok(opened) => break opened,
                // The engine's helper threads give the lock of the directory back a little later.
                Err(error) if error.to_string().contains("unavailable") => {
                    assert!(Instant::now() < deadline, "{error}");
                    std::thread::sleep(Duration::from_millis(5));
                }
                Err(error) => panic!("what was written cannot be read: {error}"),
            }
        };
        (self.store, self.reader) = (Some(store), reader);
        assert_eq!(self.reader.applied().index, self.index);
    }

    /// Applies commands as one entry.
    pub fn entry(&mut self, ops: Vec<Op>) -> Vec<Outcome> {
        self.index += 1;
        let command = |op| Command { op: Some(op), ..Command::default() };
        let commands: Vec<_> = ops.into_iter().map(command).collect();
        let id = LogId { term: 1, index: self.index };
        self.store.as_mut().expect("open").apply(id, &commands).expect("the disk works")
    }

    /// Applies a command on behalf of a client.
    pub fn apply_for(&mut self, asker: &Asker, op: Op) -> Outcome {
        self.index += 1;
        let command = Command { op: Some(op), asker: Some(asker.clone()), ..Command::default() };
        let id = LogId { term: 1, index: self.index };
        let store = self.store.as_mut().expect("open");
        let mut outcomes = store.apply(id, &[command]).expect("the disk works");
        outcomes.pop().expect("one outcome")
    }

    pub fn apply(&mut self, op: Op) -> Outcome {
        self.entry(vec![op]).pop().expect("one outcome")
    }

    /// Applies a command that must succeed; returns the revision.
    pub fn ok(&mut self, op: Op) -> i64 {
        let outcome = self.apply(op);
        outcome.result.expect("accepted");
        outcome.revision
    }

    pub fn refused(&mut self, op: Op) -> Error {
        self.apply(op).result.expect_err("refused")
    }

    pub fn reply(&mut self, op: Op) -> Reply {
        self.apply(op).result.expect("accepted")
    }

    pub fn txn(&mut self, request: TxnRequest) -> kelson_api::etcdserverpb::TxnResponse {
        match self.reply(Op::Txn(request)) {
            Reply::Txn(response) => response,
            other => panic!("no txn answer: {other:?}"),
        }
    }

    pub fn range(&self, request: RangeRequest) -> kelson_api::etcdserverpb::RangeResponse {
        self.reader.range(&request).expect("readable").0
    }

    /// Waits until the background removal of the last compaction is done.
    pub fn wait_for_compaction(&self) {
        let ticket = self.reader.compaction_ticket();
        let deadline = Instant::now() + Duration::from_secs(60);
        while !ticket.is_finished() {
            assert!(Instant::now() < deadline, "the compaction does not end");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

pub fn bytes(text: impl AsRef<[u8]>) -> Bytes {
    Bytes::copy_from_slice(text.as_ref())
}

pub fn put(key: &str, value: &str) -> PutRequest {
    PutRequest { key: bytes(key), value: bytes(value), ..PutRequest::default() }
}

pub fn put_op(key: &str, value: &str) -> Op {
    Op::Put(put(key, value))
}

pub fn delete(key: &str, range_end: &str) -> DeleteRangeRequest {
    DeleteRangeRequest { key: bytes(key), range_end: bytes(range_end), prev_kv: true }
}

pub fn delete_op(key: &str, range_end: &str) -> Op {
    Op::DeleteRange(delete(key, range_end))
}

pub fn compact_op(revision: i64) -> Op {
    Op::Compaction(CompactionRequest { revision, physical: true })
}

pub fn grant_op(id: i64) -> Op {
    Op::LeaseGrant(LeaseGrantRequest { ttl: 60, id })
}

pub fn revoke_op(id: i64) -> Op {
    Op::LeaseRevoke(LeaseRevokeRequest { id })
}

pub fn get(key: &str, range_end: &str) -> RangeRequest {
    RangeRequest { key: bytes(key), range_end: bytes(range_end), ..RangeRequest::default() }
}
