//! The state with a database that is closed and opened at every checkpoint, under writes, reads of old
//! revisions and compactions: nothing that anybody asks may come out differently for it.

mod support;

use std::time::Duration;

use bytes::Bytes;
use kelson_api::etcdserverpb::RangeRequest;
use support::{Fixture, compact_op, delete_op, put_op};

/// Checkpoints of a few rows, and after each of them more is held than may be.
fn restless() -> Fixture {
    Fixture::with(|options| {
        options.checkpoint_bytes = 4 << 10;
        options.checkpoint_interval = Duration::from_millis(5);
        options.compaction_batch_limit = 50;
        options.compaction_sleep = Duration::from_millis(1);
        options.sled_cache_bytes = 1;
    })
}

/// A store that keeps all its history in memory.
fn calm() -> Fixture {
    Fixture::with(|options| options.checkpoint_interval = Duration::from_secs(3600))
}

fn all_at(fixture: &Fixture, revision: i64) -> Vec<(Bytes, Bytes, i64)> {
    let (key, range_end) = (support::bytes("\0"), support::bytes("\0"));
    let request = RangeRequest { key, range_end, revision, ..Default::default() };
    let kvs = fixture.range(request).kvs;
    kvs.into_iter().map(|kv| (kv.key, kv.value, kv.mod_revision)).collect()
}

#[test]
fn answers_do_not_depend_on_reopening() {
    let (mut restless, mut calm) = (restless(), calm());
    let mut compacted = 1;
    for round in 0..3000_u32 {
        let key = format!("key{:03}", round.wrapping_mul(7919) % 400);
        let value = format!("{round} {}", "x".repeat((round % 300) as usize));
        let op = if round % 11 == 5 { delete_op(&key, "") } else { put_op(&key, &value) };
        let revision = restless.apply(op.clone()).revision;
        assert_eq!(revision, calm.apply(op).revision);
        if round % 100 == 99 {
            for old in [compacted + 1, (compacted + revision) / 2, revision - 1] {
                assert_eq!(all_at(&restless, old), all_at(&calm, old), "revision {old}");
            }
        }
        if round % 700 == 699 {
            compacted = revision - 300;
            restless.ok(compact_op(compacted));
            calm.ok(compact_op(compacted));
        }
    }
    for fixture in [&restless, &calm] {
        fixture.wait_for_compaction();
    }
    let right = calm.reader.hash_kv(0).expect("readable");
    assert_eq!(restless.reader.hash_kv(0).expect("readable"), right);
    restless.reopen();
    assert_eq!(restless.reader.hash_kv(0).expect("readable"), right);
}
