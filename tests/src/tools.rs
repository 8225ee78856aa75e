//! Programs that are run to their end: the tools under test, and those of the etcd world that
//! `cargo xtask peers` built. Nothing here knows what they should say.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::server::root;

/// What a program said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Said {
    /// Exit code; `None` = it was killed by a signal.
    pub code: Option<i32>,
    /// Standard output.
    pub out: String,
    /// Standard error.
    pub err: String,
}

impl Said {
    /// Standard output of a program that had to succeed.
    pub fn ok(self) -> String {
        assert_eq!(self.code, Some(0), "{self:?}");
        self.out
    }

    /// Standard error of a program that had to fail in order.
    pub fn failure(self, code: i32) -> String {
        assert_eq!(self.code, Some(code), "{self:?}");
        assert!(!self.err.contains("panicked"), "{self:?}");
        self.err
    }
}

/// One of the programs of the etcd world.
pub fn peer(name: &str) -> PathBuf {
    let path = root().join("target/peers/bin").join(name);
    assert!(path.exists(), "{name} is missing: run `cargo xtask peers`");
    path
}

/// Runs a program to its end.
pub fn run<S: AsRef<OsStr>>(program: &Path, arguments: impl IntoIterator<Item = S>) -> Said {
    let mut command = Command::new(program);
    let done = command.args(arguments).output();
    let done = done.unwrap_or_else(|error| panic!("start {}: {error}", program.display()));
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Said { code: done.status.code(), out: text(&done.stdout), err: text(&done.stderr) }
}

/// Runs etcdctl against an endpoint and returns what it prints.
pub fn etcdctl(endpoint: &str, arguments: &[&str]) -> String {
    let endpoint = format!("--endpoints={endpoint}");
    let words = std::iter::once(endpoint.as_str()).chain(arguments.iter().copied());
    run(&peer("etcdctl"), words).ok()
}

/// The hash of the key space at a revision, 0 = the newest, as (hash, compact revision).
pub fn hash_kv(endpoint: &str, revision: i64) -> (u64, i64) {
    hash_kv_for(endpoint, revision, &[])
}

/// As [`hash_kv`], with further flags of etcdctl.
pub fn hash_kv_for(endpoint: &str, revision: i64, flags: &[&str]) -> (u64, i64) {
    let revision = format!("--rev={revision}");
    let words = ["endpoint", "hashkv", "-w", "json", &revision];
    let text = etcdctl(endpoint, &[flags, &words].concat());
    let number = |name: &str| {
        let rest = text.split(&format!("\"{name}\":")).nth(1);
        let rest = rest.unwrap_or_else(|| panic!("no {name} in {text}"));
        let end = rest.find(|c: char| c != '-' && !c.is_ascii_digit()).unwrap_or(rest.len());
        rest[..end].parse::<i64>().unwrap_or_else(|error| panic!("{name} in {text}: {error}"))
    };
    (number("hash").unsigned_abs(), number("compact_revision"))
}

/// All files below a directory with their bytes, by path.
pub fn files(dir: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut found = Vec::new();
    let mut waiting = vec![dir.to_path_buf()];
    while let Some(dir) = waiting.pop() {
        for entry in std::fs::read_dir(&dir).expect("list a directory").flatten() {
            let path = entry.path();
            if path.is_dir() {
                waiting.push(path);
            } else {
                found.push((path.clone(), std::fs::read(&path).expect("read a file")));
            }
        }
    }
    found.sort();
    found
}

/// Copies a directory with all that is in it.
pub fn copy_dir(from: &Path, to: &Path) {
    for (path, bytes) in files(from) {
        let path = to.join(path.strip_prefix(from).expect("it is below"));
        std::fs::create_dir_all(path.parent().expect("it has one")).expect("make a directory");
        std::fs::write(path, bytes).expect("write a file");
    }
}
