//! `check`, `hashkv` and `defrag` on the files of a member that does not run.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::ArgMatches;
use kelson_storage::etcd::{Database, Imported};
use kelson_storage::log::{LogOptions, verify};
use kelson_storage::offline::{Stopped, open_stopped};
use kelson_storage::{HashKv, OpenError};
use serde_json::Value;

use super::Failure;
use super::print::{self, Column};
use super::snapshot::file;

/// Pause between two lines about the progress.
const TELL_EVERY: Duration = Duration::from_secs(2);

/// Says now and then how far an import is.
pub(super) struct Teller(Instant);

impl Default for Teller {
    fn default() -> Self {
        Self(Instant::now())
    }
}

impl Teller {
    pub(super) fn tell(&mut self, done: Imported) {
        if self.0.elapsed() >= TELL_EVERY {
            self.0 = Instant::now();
            let (rows, bytes) = (done.rows, print::human(done.bytes));
            eprintln!("{rows} rows, {bytes}, up to revision {}", done.revision);
        }
    }
}

/// A file that is not there gets the words of etcd's tools.
pub(super) fn must_exist(path: &Path) -> Result<(), Failure> {
    match std::fs::metadata(path) {
        Ok(_) => Ok(()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            Err(Failure::new(format!("stat {}: no such file or directory", path.display())))
        }
        Err(error) => Err(Failure::new(format!("stat {}: {error}", path.display()))),
    }
}

fn data_dir(matches: &ArgMatches) -> Option<PathBuf> {
    let dir = matches.get_one::<String>("data-dir").filter(|dir| !dir.is_empty());
    dir.map(PathBuf::from)
}

pub(super) fn check(matches: &ArgMatches) -> Result<(), Failure> {
    let dir = data_dir(matches).unwrap_or_else(|| "default.etcd".into());
    let checked = kelson_raft::check(&dir).map_err(Failure::new)?;
    for fact in &checked.facts {
        print::out(&format!("{fact}\n"));
    }
    if checked.problems.is_empty() {
        print::out(&format!("{}: all files are sound\n", dir.display()));
        return Ok(());
    }
    let texts: Vec<String> = checked.problems.iter().map(|text| format!("\n  - {text}")).collect();
    let count = checked.problems.len();
    let what = if count == 1 { "problem" } else { "problems" };
    Err(Failure::new(format!("{}: {count} {what}{}", dir.display(), texts.concat())))
}

pub(super) fn hashkv(matches: &ArgMatches) -> Result<(), Failure> {
    print::check_format(matches)?;
    let revision = matches.get_one::<i64>("rev").copied().unwrap_or(0);
    let hash = match data_dir(matches) {
        Some(dir) => {
            if matches.get_many::<String>("filename").is_some() {
                return Err(Failure::arguments("hashkv takes a file or --data-dir, not both"));
            }
            hash_of_member(&dir, revision)?
        }
        None => {
            let path = file(matches, "hashkv")?;
            must_exist(&path)?;
            let database = Database::open(&path).map_err(Failure::new)?;
            database.hash_kv(revision).map_err(Failure::new)?
        }
    };
    let column = |title, field, json, number: i64| Column {
        title,
        field,
        json,
        shown: number.to_string(),
        exact: Value::from(number),
    };
    let columns = [
        column("hash", "Hash", "hash", i64::from(hash.hash)),
        column("hash revision", "Hash revision", "hashRevision", hash.hash_revision),
        column("compact revision", "Compact revision", "compactRevision", hash.compact_revision),
    ];
    print::answer(matches, &columns)
}

fn hash_of_member(dir: &Path, revision: i64) -> Result<HashKv, Failure> {
    let stopped = open(dir)?;
    tell_if_behind(&stopped)?;
    stopped.reader.hash_kv(revision).map_err(Failure::new)
}

/// A member that was killed has entries in its log that its state has not.
pub(super) fn tell_if_behind(stopped: &Stopped) -> Result<(), Failure> {
    let applied = stopped.reader.applied().index;
    let log = LogOptions::new(stopped.data_dir.wal_dir(), stopped.data_dir.storage_uuid());
    let last = verify(&log).map_err(Failure::new)?.last.index;
    if last > applied {
        eprintln!(
            "warning: the state ends with entry {applied}, the log with {last}: the member was not \
             stopped in order, and a start would add what is missing"
        );
    }
    Ok(())
}

pub(super) fn open(dir: &Path) -> Result<Stopped, Failure> {
    open_stopped(dir).map_err(|error| match error {
        OpenError::NoMember { .. } if !dir.exists() => {
            Failure::new(format!("stat {}: no such file or directory", dir.display()))
        }
        error => Failure::new(error),
    })
}

pub(super) fn defrag(matches: &ArgMatches) -> Result<(), Failure> {
    let dir = data_dir(matches).unwrap_or_default();
    let failed = |error: &dyn std::fmt::Display| {
        Failure::new(format!("Failed to defragment etcd data[{}] ({error})", dir.display()))
    };
    let stopped = open(&dir).map_err(|failure| failed(&failure.text))?;
    let size = || u64::try_from(stopped.reader.sizes().total).unwrap_or(0);
    let (before, begun) = (size(), Instant::now());
    stopped.reader.defragment().map_err(|error| failed(&error))?;
    let after = size();
    eprintln!(
        "defragmented {}: {} before, {} after, in {:?}",
        dir.display(),
        print::human(before),
        print::human(after),
        begun.elapsed()
    );
    Ok(())
}
