//! Developer commands: code generation, test peers, golden scripts, everything CI runs.
//! It never ships: nothing here is linked into `kelson`.

mod codegen;
mod peers;

use std::process::ExitCode;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let rest = args.get(1..).unwrap_or_default();
    let outcome = match args.first().map(String::as_str) {
        Some("codegen") => codegen::run(rest),
        Some("peers") => peers::run(rest),
        _ => Err("usage: cargo xtask codegen [--check]".to_string()),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("xtask: {message}");
            ExitCode::FAILURE
        }
    }
}

/// Root of the checkout: two levels above this crate.
pub(crate) fn root() -> std::path::PathBuf {
    let crate_dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    crate_dir.ancestors().nth(2).expect("crates/xtask lies two levels below the root").to_path_buf()
}
