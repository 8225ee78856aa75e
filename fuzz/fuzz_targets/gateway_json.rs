//! Arbitrary bytes as the body of a request to the JSON gateway: refused, or requests that are shown in
//! a form that is read again. The first byte names the path, the second how the body is cut.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let _requests = kelson_server::fuzz::gateway_json(data);
});
