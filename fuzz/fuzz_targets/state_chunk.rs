//! Arbitrary bytes as a chunk of a state from another member: taken apart or refused, never a panic,
//! and what is accepted encodes to the same bytes again.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| kelson_storage::fuzz_chunk(data));
