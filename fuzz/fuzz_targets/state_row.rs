//! Arbitrary bytes as a key and a value of the state: decoded or refused, never a panic, and what is
//! accepted encodes to the same bytes again.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| kelson_storage::fuzz_row(data));
