//! Builds the programs of the etcd world that Kelson is compared with, from the Go modules under
//! tests/, whose go.sum pins every byte. It never installs anything outside target/.
//!
//! - `cargo xtask peers` makes etcd, etcdctl, etcdutl, benchmark, and etcd and etcdctl of older releases in
//!   target/peers/bin.
//! - kube.rs uses the same builder for kube-apiserver.
//!
//! A binary carries a stamp (module, version, Go release); the second call with the same stamp does
//! nothing, so callers may ask for the peers at the head of every run.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::root;

/// One program: where its module lies, which package it is, and the module that gives its version.
pub(crate) struct Program {
    pub(crate) name: &'static str,
    pub(crate) go_module_dir: &'static str,
    pub(crate) package: &'static str,
    pub(crate) versioned_by: &'static str,
    pub(crate) build_args: Vec<String>,
}

/// etcdctl of every release that is compared, oldest first; the last is that of the other programs.
pub(crate) const ETCDCTLS: [&str; 4] = ["etcdctl-3.4", "etcdctl-3.5", "etcdctl-3.6", "etcdctl"];

/// The load generator has its own module: its newest release still needs the libraries of 3.6. So
/// has each older etcdctl, and each older etcd, which is there for its data directories: Kelson
/// takes them over.
const PROGRAMS: [(&str, &str, &str, &str); 10] = [
    ("etcd", "tests/peers", "go.etcd.io/etcd/server/v3", "go.etcd.io/etcd/server/v3"),
    ("etcdctl", "tests/peers", "go.etcd.io/etcd/etcdctl/v3", "go.etcd.io/etcd/etcdctl/v3"),
    ("etcdutl", "tests/peers", "go.etcd.io/etcd/etcdutl/v3", "go.etcd.io/etcd/etcdutl/v3"),
    (
        "benchmark",
        "tests/peers/benchmark",
        "go.etcd.io/etcd/v3/tools/benchmark",
        "go.etcd.io/etcd/v3",
    ),
    ("etcd-3.4", "tests/peers/v3.4", "go.etcd.io/etcd", "go.etcd.io/etcd"),
    ("etcd-3.5", "tests/peers/v3.5", "go.etcd.io/etcd/server/v3", "go.etcd.io/etcd/server/v3"),
    ("etcd-3.6", "tests/peers/v3.6", "go.etcd.io/etcd/server/v3", "go.etcd.io/etcd/server/v3"),
    ("etcdctl-3.4", "tests/peers/etcdctl-3.4", "go.etcd.io/etcd/etcdctl", "go.etcd.io/etcd"),
    (
        "etcdctl-3.5",
        "tests/peers/etcdctl-3.5",
        "go.etcd.io/etcd/etcdctl/v3",
        "go.etcd.io/etcd/etcdctl/v3",
    ),
    (
        "etcdctl-3.6",
        "tests/peers/etcdctl-3.6",
        "go.etcd.io/etcd/etcdctl/v3",
        "go.etcd.io/etcd/etcdctl/v3",
    ),
];

pub(crate) fn run(args: &[String]) -> Result<(), String> {
    if let Some(stray) = args.first() {
        return Err(format!("usage: cargo xtask peers (unexpected {stray:?})"));
    }
    let bin = ensure()?;
    println!("peers are in {}", bin.display());
    Ok(())
}

/// Builds what is missing or stale and returns the directory with the programs.
pub(crate) fn ensure() -> Result<PathBuf, String> {
    let bin = root().join("target/peers/bin");
    for (name, go_module_dir, package, versioned_by) in PROGRAMS {
        let program =
            Program { name, go_module_dir, package, versioned_by, build_args: Vec::new() };
        build(&program, &bin)?;
    }
    Ok(bin)
}

/// Builds one program into `bin` unless its stamp says that it is already there.
pub(crate) fn build(program: &Program, bin: &Path) -> Result<PathBuf, String> {
    let module_dir = root().join(program.go_module_dir);
    let version = required_version(&module_dir, program.versioned_by)?;
    let go_release = capture(Command::new("go").args(["env", "GOVERSION"]))?;
    let stamp = format!(
        "{}@{version} {} {}\n",
        program.package,
        go_release.trim(),
        program.build_args.join(" ")
    );
    let output = bin.join(program.name);
    let stamp_file = bin.join(format!(".{}.stamp", program.name));
    if output.exists() && fs::read_to_string(&stamp_file).is_ok_and(|old| old == stamp) {
        return Ok(output);
    }
    fs::create_dir_all(bin).map_err(|e| format!("make {}: {e}", bin.display()))?;
    println!("building {} {version}", program.name);
    // `nice` and two compilers at a time: kube-apiserver alone would take the whole machine.
    let status = Command::new("nice")
        .args(["go", "build", "-p", "2", "-buildvcs=false", "-trimpath"])
        .args(&program.build_args)
        .arg("-o")
        .arg(&output)
        .arg(program.package)
        .current_dir(&module_dir)
        .status()
        .map_err(|e| format!("start go build: {e}"))?;
    if !status.success() {
        return Err(format!("go build {} ended with {status}", program.package));
    }
    fs::write(&stamp_file, stamp).map_err(|e| format!("write {}: {e}", stamp_file.display()))?;
    Ok(output)
}

/// Version that go.mod in `module_dir` selects for `module`.
pub(crate) fn required_version(module_dir: &Path, module: &str) -> Result<String, String> {
    let file = module_dir.join("go.mod");
    let text = fs::read_to_string(&file).map_err(|e| format!("read {}: {e}", file.display()))?;
    text.lines()
        .map(|line| line.trim().trim_start_matches("require "))
        .find_map(|line| line.strip_prefix(module)?.strip_prefix(' '))
        .and_then(|rest| rest.split_whitespace().next())
        .map(str::to_string)
        .ok_or_else(|| format!("{} does not require {module}", file.display()))
}

/// Standard output of a command that has to succeed.
pub(crate) fn capture(command: &mut Command) -> Result<String, String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command.output().map_err(|e| format!("start {program}: {e}"))?;
    if !output.status.success() {
        let errors = String::from_utf8_lossy(&output.stderr);
        return Err(format!("{program} ended with {}: {}", output.status, errors.trim()));
    }
    String::from_utf8(output.stdout).map_err(|e| format!("output of {program}: {e}"))
}
