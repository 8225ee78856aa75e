//! Stands in for the persister in tests of this crate's logic: rows in a map, nothing on disk.

use std::collections::BTreeMap;

use bytes::Bytes;
use kelson_api::etcdserverpb::{AlarmMember, Member};
use parking_lot::Mutex;
use tokio::sync::watch;

use crate::types::{Delta, Fatal, LeaseRow, LogId, RevisionKey, Row};

#[derive(Clone, Default)]
pub(crate) struct Recovered {
    pub(crate) applied: LogId,
    pub(crate) membership: Option<(LogId, Bytes)>,
    pub(crate) leases: Vec<LeaseRow>,
    pub(crate) alarms: Vec<AlarmMember>,
    pub(crate) members: Vec<Member>,
    pub(crate) removed: Vec<u64>,
    pub(crate) uuids: Vec<(u64, Bytes)>,
    pub(crate) cluster_version: Option<String>,
    pub(crate) scheduled_compaction: Option<i64>,
    pub(crate) finished_compaction: Option<i64>,
    pub(crate) current_revision_floor: i64,
}

pub(crate) struct Persister {
    rows: Mutex<BTreeMap<RevisionKey, Row>>,
    durable: watch::Sender<LogId>,
    finished: watch::Sender<i64>,
}

impl Persister {
    pub(crate) fn new() -> Self {
        Self {
            rows: Mutex::default(),
            durable: watch::Sender::new(LogId::default()),
            finished: watch::Sender::new(-1),
        }
    }
    pub(crate) fn push(&self, delta: Delta) -> Result<(), Fatal> {
        let mut rows = self.rows.lock();
        rows.extend(delta.rows.into_iter().map(|row| (row.key, row)));
        self.durable.send_replace(delta.id);
        Ok(())
    }
    pub(crate) fn remove_rows(&self, gone: Vec<(RevisionKey, bool)>, done: i64, last: bool) {
        let mut rows = self.rows.lock();
        for (key, _) in gone {
            rows.remove(&key);
        }
        if last {
            self.finished.send_replace(done);
        }
    }
    pub(crate) fn get(&self, key: RevisionKey) -> Result<Option<Bytes>, Fatal> {
        Ok(self.rows.lock().get(&key).map(|row| row.kv.clone()))
    }
    pub(crate) fn scan(
        &self,
        from: RevisionKey,
        limit_rows: usize,
        _limit_bytes: usize,
    ) -> Result<Vec<Row>, Fatal> {
        Ok(self.rows.lock().range(from..).take(limit_rows).map(|(_, row)| row.clone()).collect())
    }
    pub(crate) fn durable_watch(&self) -> watch::Receiver<LogId> {
        self.durable.subscribe()
    }
    pub(crate) fn finished_compaction(&self) -> watch::Receiver<i64> {
        self.finished.subscribe()
    }
    pub(crate) fn disk_bytes(&self) -> u64 {
        0
    }
    pub(crate) fn shutdown(&self) {}
}
