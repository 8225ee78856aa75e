//! The body of the fuzz target `etcd_restore`: bytes become a snapshot file whose checksums all fit, so
//! that what stands behind them is reached, and the file goes the way of `snapshot restore` to the end:
//! digest, status, hash, import, and the first opening of what was imported. It promises that nothing
//! panics on the way and that what was taken can be opened and holds what the file held. It makes no
//! file of use to anybody.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use bytes::Bytes;
use kelson_api::Message;
use kelson_api::mvccpb::KeyValue;
use sha2::Digest as _;

use super::bolt;
use super::database::{Database, Digest, check_digest};
use super::import::{Plan, import};
use crate::dir::DataDir;
use crate::keys::revision_bytes;
use crate::log::Durable;
use crate::options::Options;
use crate::snapshot::file_of;
use crate::types::RevisionKey;

/// Buckets that a file may get: those of etcd, and one that it does not have.
const BUCKETS: [&str; 11] = [
    "key",
    "meta",
    "lease",
    "alarm",
    "members",
    "members_removed",
    "cluster",
    "auth",
    "authUsers",
    "authRoles",
    "other",
];

/// Pairs by bucket and key.
type Content = BTreeMap<&'static str, BTreeMap<Vec<u8>, Vec<u8>>>;

/// Carries any bytes through a restore in `dir`, which must be empty and is emptied again. The first
/// byte says what is made of the others: a file that they are already, or pairs for a sound one.
pub(crate) fn restore(data: &[u8], dir: &Path) {
    let Some((&kind, rest)) = data.split_first() else { return };
    let mut file = match kind % 4 {
        0 => bolt::sealed(rest),
        _ => file_of(&content(rest)),
    };
    let digest = sha2::Sha256::digest(&file);
    file.extend_from_slice(&digest);
    let path = dir.join("snapshot.db");
    if fs::write(&path, file).is_err() {
        return;
    }
    let fits = check_digest(&path).expect("the file is there");
    assert_eq!(fits, Digest::Fits, "its digest was just made");
    let raise = (kind >= 0x80).then_some(u64::from(kind & 0x7f) << 20);
    let target = dir.join("target");
    if let Ok(database) = Database::open(&path) {
        let _ = database.status();
        take_over(&database, raise, &target);
    }
    let _ = fs::remove_dir_all(&target);
    let _ = fs::remove_file(&path);
}

/// Imports a database, opens what came of it, and compares.
fn take_over(database: &Database, raise: Option<u64>, target: &Path) {
    let hash = database.hash_kv(0);
    let Ok(data_dir) = DataDir::open(target) else { return };
    let plan = Plan { raise, ..Plan::default() };
    let Ok(imported) = import(database, &data_dir, plan, &mut |_| {}) else { return };
    let hash = hash.expect("what can be imported can be read");
    let (durable, _log) = Durable::manual(u64::MAX);
    let mut options = Options::new(target);
    options.sled_cache_bytes = 1 << 20;
    let (store, reader) = crate::open(&options, durable).expect("what was imported can be opened");
    assert_eq!(reader.revision(), imported.revision);
    let found = reader.hash_kv(0).expect("it can be read");
    if raise.is_none() {
        assert_eq!(found.hash_revision, hash.hash_revision);
        // A row that `--bump-revision` left compacts as well.
        assert!(found.compact_revision >= hash.compact_revision);
    }
    store.shutdown();
}

/// Pairs out of any bytes: each begins with its bucket and the lengths of key and value. One in two is
/// a row of the key space that follows the one before, as only etcd writes them.
fn content(mut data: &[u8]) -> Content {
    // Without this bucket no file is one of etcd.
    let mut content = Content::from([("meta", BTreeMap::new()), ("key", BTreeMap::new())]);
    let mut at = RevisionKey { main: 2, sub: 0 };
    while let [kind, key_len, value_len, rest @ ..] = data {
        let (key, rest) = rest.split_at(rest.len().min(usize::from(*key_len)));
        let (value, rest) = rest.split_at(rest.len().min(usize::from(*value_len)));
        data = rest;
        if kind & 1 == 0 {
            let (key, value) = row(&mut at, *kind, key, value);
            content.entry("key").or_default().insert(key, value);
            continue;
        }
        let bucket = BUCKETS[usize::from(kind >> 1) % BUCKETS.len()];
        if !key.is_empty() {
            content.entry(bucket).or_default().insert(key.to_vec(), value.to_vec());
        }
    }
    content
}

/// The next row, a deletion now and then.
fn row(at: &mut RevisionKey, kind: u8, key: &[u8], value: &[u8]) -> (Vec<u8>, Vec<u8>) {
    match kind >> 1 & 3 {
        0 => at.sub += 1,
        step => *at = RevisionKey { main: at.main + i64::from(step), sub: 0 },
    }
    let is_deletion = kind >> 3 & 3 == 0;
    let kv = KeyValue {
        key: Bytes::copy_from_slice(key),
        mod_revision: if is_deletion { 0 } else { at.main },
        create_revision: if is_deletion { 0 } else { i64::from(kind >> 5) },
        version: i64::from(!is_deletion),
        lease: i64::from(value.first().copied().unwrap_or_default() % 4),
        value: Bytes::copy_from_slice(value),
    };
    (revision_bytes(*at, is_deletion), kv.encode_to_vec())
}
