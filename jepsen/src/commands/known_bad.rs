//! `jepsen known-bad`: stores that are known to break a promise are put before the judges, which must
//! notice. A harness that finds nothing wrong with these proves nothing about any other.

use std::path::PathBuf;

use super::matrix::episode;
use crate::args::Args;
use crate::cluster::Target;
use crate::run::Plan;

/// Chance is part of it: so often may a run come out valid before it counts as missed.
const TRIES: u64 = 3;

/// A store with a known flaw, and the words that show it.
struct Bad {
    name: &'static str,
    flaw: &'static str,
    /// Of the program that `--old` names.
    is_old: bool,
    words: &'static [&'static str],
}

const KNOWN: [Bad; 2] = [
    Bad {
        name: "no-fsync",
        flaw: "etcd with --unsafe-no-fsync acknowledges what no disk has",
        is_old: false,
        words: &["scenario", "forget", "--flag", "--unsafe-no-fsync"],
    },
    Bad {
        name: "watch-goes-back",
        flaw: "the watch of etcd 3.5.1 goes back in time after the transfer of a state \
               (etcd-io/etcd issue 15271)",
        is_old: true,
        words: &["scenario", "blackhole", "--old-etcd", "--rate", "1500"],
    },
];

pub(crate) fn run(mut args: Args) -> Result<bool, String> {
    let old = args.text("old", "")?;
    let mut plan = Plan::from_args("known-bad", &mut args)?;
    args.done()?;
    if plan.bin == plan.target.default_bin() {
        plan.bin = Target::Etcd.default_bin();
    }
    plan.target = Target::Etcd;
    let dir = plan.into.clone().unwrap_or_else(|| plan.store.join(format!("bad-{}", plan.seed)));
    let (mut missed, mut untried) = (Vec::new(), Vec::new());
    for bad in &KNOWN {
        if bad.is_old && old.is_empty() {
            println!("{}: needs --old, a program of etcd 3.5.1", bad.name);
            untried.push(bad.name);
            continue;
        }
        let mut plan = plan.clone();
        if bad.is_old {
            plan.bin = PathBuf::from(&old);
        }
        match tries(&plan, bad, &dir)? {
            Some(number) => println!("{}: FOUND in run {number}: {}", bad.name, bad.flaw),
            None => {
                println!("{}: MISSED in {TRIES} runs: {}", bad.name, bad.flaw);
                missed.push(bad.name);
            }
        }
    }
    match untried.is_empty() {
        true => Ok(missed.is_empty()),
        false => Err(format!("not tried: {}", untried.join(", "))),
    }
}

/// The number of the run that found the flaw.
fn tries(plan: &Plan, bad: &Bad, dir: &std::path::Path) -> Result<Option<u64>, String> {
    for number in 1..=TRIES {
        let mut words: Vec<String> = bad.words.iter().map(|word| (*word).to_owned()).collect();
        words.extend(["--seed".to_owned(), (plan.seed + number).to_string()]);
        let place = dir.join(format!("{}-{number}", bad.name));
        let summary = episode(plan, &words, &place)?;
        if summary.is_some_and(|summary| summary.verdict == "VIOLATED") {
            return Ok(Some(number));
        }
    }
    Ok(None)
}
