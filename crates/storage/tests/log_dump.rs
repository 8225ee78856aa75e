//! A log as a tool shows it: everything that was written, in order, whether it is still in force or
//! not, while its member runs and after it has ended.

mod log_support;

use std::path::Path;

use bytes::Bytes;
use kelson_storage::log::{Dumped, Log, LogError, LogOptions, dump};
use log_support::*;

fn shown(dir: &Path) -> Vec<Dumped> {
    let mut records = Vec::new();
    dump(dir, &mut |record| records.push(record)).expect("it shows");
    records
}

#[test]
fn everything_is_shown_in_order() {
    let temp = tempfile::tempdir().expect("a directory");
    let dir = temp.path().join("wal");
    let mut options = LogOptions::new(&dir, [7; 16]);
    options.segment_bytes = SEGMENT_BYTES;
    let log = Log::open(options.clone()).expect("it opens").log;
    wait(|done| log.save_vote(Bytes::from_static(b"first"), done)).expect("the vote");
    append(&log, entries(1, 1..=40, 900));
    wait(|done| log.truncate_after(38, done)).expect("the truncation");
    append(&log, entries(2, 39..=41, 10));
    let mut expected = vec![Dumped::Vote(Bytes::from_static(b"first"))];
    expected.extend(entries(1, 1..=40, 900).into_iter().map(Dumped::Entry));
    expected.push(Dumped::TruncatedAfter(38));
    expected.extend(entries(2, 39..=41, 10).into_iter().map(Dumped::Entry));
    // A new segment begins with the vote in force and the purge mark.
    let own = |records: Vec<Dumped>| -> Vec<Dumped> {
        let mut votes = 0;
        let mut fits = |record: &Dumped| match record {
            Dumped::Vote(_) => {
                votes += 1;
                votes == 1
            }
            Dumped::Purged(id) => id.index > 0,
            Dumped::Committed(_) => false,
            _ => true,
        };
        records.into_iter().filter(|record| fits(record)).collect()
    };
    assert_eq!(own(shown(&dir)), expected, "while it is open");
    assert!(std::fs::read_dir(&dir).expect("a directory").count() > 2, "it crosses segments");
    log.shutdown();
    assert_eq!(own(shown(&dir)), expected, "after it was closed");

    let log = Log::open(options).expect("nothing was changed").log;
    wait(|done| log.purge(id(1, 5), done)).expect("the purge");
    assert!(shown(&dir).contains(&Dumped::Purged(id(1, 5))));
}

#[test]
fn damage_is_named_and_an_unfinished_end_is_not_damage() {
    let temp = tempfile::tempdir().expect("a directory");
    let dir = temp.path().join("wal");
    let mut options = LogOptions::new(&dir, [7; 16]);
    options.segment_bytes = SEGMENT_BYTES;
    let log = Log::open(options).expect("it opens").log;
    wait(|done| log.save_vote(Bytes::from_static(b"first"), done)).expect("the vote");
    append(&log, entries(1, 1..=40, 900));
    log.shutdown();
    let names = || {
        let names = std::fs::read_dir(&dir).expect("a directory");
        let paths = names.map(|entry| entry.expect("an entry").path());
        let mut paths: Vec<_> =
            paths.filter(|path| path.extension().is_some_and(|it| it == "wal")).collect();
        paths.sort();
        paths
    };
    let spoil = |path: &Path| {
        let mut bytes = std::fs::read(path).expect("it reads");
        let middle = 6000;
        bytes[middle] ^= 1;
        std::fs::write(path, bytes).expect("it writes");
    };
    let whole = shown(&dir).len();
    let paths = names();
    assert!(paths.len() > 2);
    spoil(paths.last().expect("segments"));
    assert!(shown(&dir).len() < whole);
    spoil(&paths[0]);
    let refused = dump(&dir, &mut |_| {}).expect_err("a damaged segment in the middle");
    assert!(matches!(&refused, LogError::Corrupt { .. }), "{refused}");
    assert!(refused.to_string().contains(&paths[0].display().to_string()), "{refused}");

    let nowhere = dump(&temp.path().join("nothing"), &mut |_| {}).expect_err("no directory");
    assert!(nowhere.to_string().contains("nothing"), "{nowhere}");
}
