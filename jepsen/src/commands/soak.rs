//! `jepsen soak`: episodes with a fresh cluster and another seed each, every workload in turn against
//! all faults, for hours. Each hour leaves a line in the ledger; the first violation ends it, and its
//! run directory stays.

use std::collections::BTreeSet;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant, SystemTime};

use serde::Serialize;

use super::matrix::episode;
use crate::args::Args;
use crate::report::Summary;
use crate::run::Plan;
use crate::workload::Workload;

const HOUR: Duration = Duration::from_secs(3600);

/// One line of the ledger.
#[derive(Debug, Default, Serialize)]
struct Hour {
    /// Seconds since 1970 at the end of the hour.
    ended: u64,
    target: String,
    version: String,
    /// Commit of the checkout in which this ran, and whether it had changes; empty outside of one.
    checkout: String,
    /// Length and time of change of the program.
    program_bytes: u64,
    program_built: u64,
    members: usize,
    first_seed: u64,
    last_seed: u64,
    workloads: BTreeSet<String>,
    minutes: u64,
    episodes: usize,
    faults: usize,
    operations: usize,
    events: usize,
    /// Episodes that were not covered, or left no result: no pass and no violation.
    inconclusive: usize,
    verdict: String,
}

pub(crate) fn run(mut args: Args) -> Result<bool, String> {
    let hours = args.text("hours", "1")?;
    let hours: f64 = hours.parse().map_err(|_| format!("--hours: {hours:?} is no number"))?;
    let seconds = args.number("episode", 300)?;
    let ledger = PathBuf::from(args.text("ledger", "jepsen/ledger.jsonl")?);
    let plan = Plan::from_args("soak", &mut args)?;
    args.done()?;
    if !(hours > 0.0 && hours <= 10_000.0) {
        return Err("--hours is more than 0 and at most 10000".into());
    }
    // Before hours are spent on what cannot be written down.
    append(&ledger, "")?;
    let dir = plan
        .into
        .clone()
        .unwrap_or_else(|| plan.store.join(format!("soak-{}-{}", plan.target.name(), plan.seed)));
    let (begun, length) = (Instant::now(), HOUR.mul_f64(hours));
    let (mut hour, mut since) = (Hour::default(), Instant::now());
    let mut number = 0;
    while begun.elapsed() < length {
        let workload = Workload::ALL[number as usize % Workload::ALL.len()];
        let seed = plan.seed + number;
        number += 1;
        let words = [
            "run",
            "--workload",
            workload.name(),
            "--seconds",
            &seconds.to_string(),
            "--seed",
            &seed.to_string(),
        ];
        let words: Vec<String> = words.iter().map(|word| (*word).to_owned()).collect();
        let place = dir.join(format!("{seed}-{}", workload.name()));
        let summary = episode(&plan, &words, &place)?;
        hour.take(summary.as_ref(), workload, seed);
        let broken = hour.verdict == "VIOLATED";
        if summary.is_some_and(|summary| summary.valid) {
            std::fs::remove_dir_all(&place).map_err(|error| error.to_string())?;
        }
        if broken || since.elapsed() >= HOUR || begun.elapsed() >= length {
            hour.minutes = since.elapsed().as_secs() / 60;
            hour.close(&plan);
            append(&ledger, &(serde_json::to_string(&hour).expect("plain data") + "\n"))?;
            println!("ledger: {hour:?}");
            (hour, since) = (Hour::default(), Instant::now());
        }
        if broken {
            println!("violated: {}", place.display());
            return Ok(false);
        }
    }
    Ok(true)
}

impl Hour {
    fn take(&mut self, summary: Option<&Summary>, workload: Workload, seed: u64) {
        if self.episodes == 0 {
            self.first_seed = seed;
        }
        self.last_seed = seed;
        self.episodes += 1;
        self.workloads.insert(workload.name().to_owned());
        if self.verdict.is_empty() {
            self.verdict = "valid".into();
        }
        let Some(summary) = summary else {
            self.inconclusive += 1;
            return;
        };
        self.version.clone_from(&summary.version);
        self.faults += summary.faults.values().sum::<usize>();
        self.operations += summary.operations;
        self.events += summary.events;
        match summary.verdict.as_str() {
            "valid" => {}
            "VIOLATED" => self.verdict = "VIOLATED".into(),
            _ => self.inconclusive += 1,
        }
    }

    fn close(&mut self, plan: &Plan) {
        self.ended = seconds(SystemTime::now());
        self.target = plan.target.name().into();
        self.members = plan.members;
        self.checkout = checkout().unwrap_or_default();
        if let Ok(bin) = std::fs::metadata(&plan.bin) {
            self.program_bytes = bin.len();
            self.program_built = bin.modified().map_or(0, seconds);
        }
    }
}

fn checkout() -> Option<String> {
    let git = |words: &[&str]| {
        let output = Command::new("git").args(words).output().ok()?;
        output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let commit = git(&["rev-parse", "--short=12", "HEAD"])?;
    // The ledger itself grows while this runs.
    let changes = git(&["status", "--porcelain", "--untracked-files=no", ":!jepsen/ledger.jsonl"])?;
    Some(if changes.is_empty() { commit } else { commit + " with changes" })
}

/// Since 1970.
fn seconds(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

fn append(ledger: &Path, text: &str) -> Result<(), String> {
    let written = std::fs::File::options().create(true).append(true).open(ledger);
    let written = written.and_then(|mut file| file.write_all(text.as_bytes()));
    written.map_err(|error| format!("--ledger {}: {error}", ledger.display()))
}
