//! `cargo xtask sabotage`: builds the programs that can be broken on purpose, the server and the
//! simulation, to where `jepsen mutants` looks for them. `--check` looks into the release binary
//! instead: nothing of it may be there.

use std::path::{Path, PathBuf};
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

fn build() -> Result<(), String> {
    let server = build_one("kelson-server", "kelson")?;
    let marks = marks_in(&server)?;
    if marks.len() < MARKS.len() {
        return Err(format!("the sabotage build has only {marks:?}: --check would find nothing"));
    }
    build_one("kelson-sim", "kelson-sim")?;
    Ok(())
}

/// Built beside the usual program, so that the crates below it are shared; one package at a time, since
/// two together would ask for other features of those.
fn build_one(package: &str, program: &str) -> Result<PathBuf, String> {
    let mut cargo = Command::new("cargo");
    cargo.args(["build", "-p", package, "--features", "sabotage"]).current_dir(root());
    run_command(&mut cargo)?;
    let target = root().join("target");
    let dir = target.join("sabotage");
    let (built, new) = (target.join("debug").join(program), dir.join(format!("{program}.new")));
    let path = dir.join(program);
    let copied = std::fs::create_dir_all(&dir)
        .and_then(|()| std::fs::copy(built, &new))
        .and_then(|_| std::fs::rename(&new, &path));
    copied.map_err(|error| format!("copy {program} to {}: {error}", dir.display()))?;
    println!("{}", path.display());
    Ok(path)
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
