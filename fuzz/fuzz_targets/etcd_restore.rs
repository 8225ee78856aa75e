//! Arbitrary bytes as a snapshot of etcd with fitting checksums: restored or refused, never a panic, and
//! what is restored can be opened. Slow, because each input makes a directory: give it a TMPDIR in
//! memory.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let dir = std::env::temp_dir().join(format!("kelson-fuzz-{}", std::process::id()));
    if std::fs::create_dir_all(&dir).is_err() {
        return;
    }
    kelson_storage::fuzz_restore(data, &dir);
});
