//! Arbitrary bytes as a log file of etcd: read to the end or refused, never a panic, never more memory than
//! the file has.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let dir = std::env::temp_dir().join(format!("kelson-fuzz-{}", std::process::id()));
    if std::fs::create_dir_all(&dir).is_err() {
        return;
    }
    kelson_storage::fuzz_wal(data, &dir);
});
