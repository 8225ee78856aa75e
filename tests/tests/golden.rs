//! Every golden script, recorded from a real etcd, must read the same against Kelson.

use kelson_tests::script::{self, Script};
use kelson_tests::server::kelson_binary;

#[test]
fn scripts_equal_the_recorded_answers() {
    let mut differences = Vec::new();
    let mut pairs = 0;
    for path in script::all() {
        let script = Script::load(&path);
        pairs += script.pairs();
        let (_, verdict) = script.run(&kelson_binary());
        differences.extend(verdict.err());
    }
    assert!(pairs >= 300, "only {pairs} request/response pairs");
    assert!(
        differences.is_empty(),
        "{} scripts differ\n{}",
        differences.len(),
        differences.join("\n")
    );
}
