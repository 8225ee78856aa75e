//! A loaded store for the benches of the state, with keys as kube-apiserver makes them. It measures
//! nothing itself.

use bytes::Bytes;
use kelson_api::command::Command;
use kelson_api::command::command::Op;
use kelson_api::etcdserverpb::PutRequest;
use kelson_storage::log::{Durable, DurablePublisher};
use kelson_storage::{LogId, Options, Outcome, Reader, Store};
use tempfile::TempDir;

/// Key of a pod: 58 bytes, spread over a thousand namespaces.
pub fn key(number: u64) -> Bytes {
    let spread = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40;
    let namespace = spread % 1000;
    format!("/registry/pods/namespace-{namespace:04}/deployment-{number:08}-{spread:08}").into()
}

/// 256 bytes that do not compress.
pub fn value(number: u64) -> Bytes {
    let mut state = number ^ 0x1234_5678;
    let next = |_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        state.to_be_bytes()[0]
    };
    (0..256).map(next).collect()
}

/// A put of the value of that number.
pub fn put(number: u64) -> Op {
    Op::Put(PutRequest { key: key(number), value: value(number), ..PutRequest::default() })
}

/// A store in a temporary directory.
pub struct Loaded {
    store: Store,
    reader: Reader,
    index: u64,
    /// The log that the persister believes in: durable up to any entry.
    _log: DurablePublisher,
    _dir: TempDir,
}

impl Loaded {
    /// A store with that many keys.
    ///
    /// # Panics
    /// The disk does not work.
    pub fn with_keys(keys: u64) -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        std::fs::create_dir(dir.path().join("member")).expect("a member directory");
        let (durable, log) = Durable::manual(u64::MAX);
        let (store, reader) =
            kelson_storage::open(&Options::new(dir.path()), durable).expect("a new store");
        let mut loaded = Self { store, reader, index: 0, _log: log, _dir: dir };
        for first in (0..keys).step_by(100) {
            loaded.apply((first..keys.min(first + 100)).map(put).collect());
        }
        loaded
    }

    /// Applies commands as one entry.
    ///
    /// # Panics
    /// The disk does not work.
    pub fn apply(&mut self, ops: Vec<Op>) -> Vec<Outcome> {
        self.index += 1;
        let command = |op| Command { op: Some(op), ..Command::default() };
        let commands: Vec<_> = ops.into_iter().map(command).collect();
        let id = LogId { term: 1, index: self.index };
        self.store.apply(id, &commands).expect("the disk works")
    }

    /// A reader of the store.
    pub fn reader(&self) -> Reader {
        self.reader.clone()
    }
}
