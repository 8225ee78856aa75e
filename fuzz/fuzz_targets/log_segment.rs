//! Arbitrary bytes as a segment of the raft log: it opens or refuses, and never panics.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| kelson_storage::log::fuzz_segment(data));
