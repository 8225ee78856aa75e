//! `cargo xtask sabotage`: builds the binary that can be broken on purpose, to where `jepsen mutants`
//! looks for it. `--check` looks into the release binary instead: nothing of it may be there.

use std::path::Path;
use std::process::Command;

use crate::{root, run_command};

/// What only a sabotage build contains: the variable that chooses what is broken, and what it says.
const MARKS: [&str; 2] = ["KELSON_SABOTAGE", "BROKEN ON PURPOSE"];

pub(crate) fn run(args: &[String]) -> Result<(), String> {
    match args {
        [] => build(),
        [word] if word == "--check" => check(),
        _ => Err(format!("usage: cargo xtask sabotage [--check] (unexpected {args:?})")),
    }
}

/// Built beside the usual binary, so that the crates below it are shared.
fn build() -> Result<(), String> {
    let mut cargo = Command::new("cargo");
    cargo.args(["build", "-p", "kelson-server", "--features", "sabotage"]).current_dir(root());
    run_command(&mut cargo)?;
    let target = root().join("target");
    let dir = target.join("sabotage");
    let copied = std::fs::create_dir_all(&dir)
        .and_then(|()| std::fs::copy(target.join("debug/kelson"), dir.join("kelson.new")))
        .and_then(|_| std::fs::rename(dir.join("kelson.new"), dir.join("kelson")));
    copied.map_err(|error| format!("copy the binary to {}: {error}", dir.display()))?;
    let marks = marks_in(&dir.join("kelson"))?;
    if marks.len() < MARKS.len() {
        return Err(format!("the sabotage build has only {marks:?}: --check would find nothing"));
    }
    println!("{}", dir.join("kelson").display());
    Ok(())
}

pub(crate) fn check() -> Result<(), String> {
    let binary = root().join("target/release/kelson");
    let marks = marks_in(&binary)?;
    if !marks.is_empty() {
        let text = "it was built with the feature sabotage; build it again without";
        return Err(format!("{} contains {marks:?}: {text}", binary.display()));
    }
    println!("nothing of sabotage in {}", binary.display());
    Ok(())
}

fn marks_in(binary: &Path) -> Result<Vec<&'static str>, String> {
    let bytes = std::fs::read(binary).map_err(|error| format!("{}: {error}", binary.display()))?;
    let contains = |mark: &&str| bytes.windows(mark.len()).any(|part| part == mark.as_bytes());
    Ok(MARKS.into_iter().filter(contains).collect())
}
