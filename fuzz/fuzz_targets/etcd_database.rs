//! Arbitrary bytes as a database file of etcd: read to the end or refused, never a panic, never more memory than
//! the file has.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let file = std::env::temp_dir().join(format!("kelson-fuzz-{}", std::process::id()));
    kelson_storage::fuzz_bolt(data, &file);
});
