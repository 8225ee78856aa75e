//! Arbitrary bytes as a client's request: refused, or a command that survives the log. The first byte
//! names the kind of request.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let _command = kelson_server::fuzz::wire_to_command(data);
});
