//! Credentials of a call, and the keys that check them: any bytes are refused or read, never believed.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| kelson_server::fuzz::auth_token(data));
