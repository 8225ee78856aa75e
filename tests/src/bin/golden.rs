//! Runs golden scripts against a binary: `golden BINARY [--bless] [FILTER ...]`. `--bless` writes what
//! came back into the files (only ever done with a real etcd as BINARY); without it differences fail.

use std::process::ExitCode;

use kelson_tests::script::{self, Script};

fn main() -> ExitCode {
    let mut args: Vec<String> = std::env::args().skip(1).collect();
    let bless = args.iter().any(|arg| arg == "--bless");
    args.retain(|arg| arg != "--bless");
    let Some(binary) = args.first().cloned() else {
        eprintln!("usage: golden BINARY [--bless] [FILTER ...]");
        return ExitCode::FAILURE;
    };
    let (mut passed, mut failed, mut pairs) = (0, 0, 0);
    for path in script::all() {
        let name = path.display().to_string();
        if args.len() > 1 && !args[1..].iter().any(|filter| name.contains(filter)) {
            continue;
        }
        let script = Script::load(&path);
        let (text, verdict) = script.run(binary.as_ref());
        pairs += script.pairs();
        match verdict {
            Ok(()) => passed += 1,
            Err(difference) => {
                failed += 1;
                println!("{difference}");
            }
        }
        if bless {
            std::fs::write(&path, text).expect("the script file is writable");
        }
    }
    println!("golden: {pairs} request/response pairs");
    println!("{passed} passed, {failed} failed");
    if failed == 0 || bless { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
