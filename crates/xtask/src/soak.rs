//! Soak: a real server under everything that its persister does - writes, compactions, checkpoints,
//! reads of old revisions, snapshot streams - with its memory and the size of its files sampled every
//! second. It judges whether both level off, and whether every acknowledged write is there at the end
//! and after a restart. It talks to its own server on loopback only and never to a cluster.
//!
//! `cargo xtask soak [--minutes N] [--keys N] [--rate N] [--bin PATH] [--out DIR]`: ten minutes,
//! 50 000 keys and 3000 writes a second by default. The figures and the plot go to `target/soak`.
//! `--beside KIND,KIND` leaves out everything beside the writers that it does not name, to tell which
//! load makes something grow.

mod load;
mod plot;
mod sample;
mod values;
mod verify;

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::compare::{self, Server};
use crate::root;
use load::{Kind, Load};
use sample::Sample;

/// A shorter run is not judged: caches still fill, and a third of it holds less than two compactions.
const JUDGED_FROM: Duration = Duration::from_secs(240);
/// Most that the mean of the last third may lie above the mean of the middle third.
const GROWTH_MAX: f64 = 0.08;
/// Growth below this many MiB is noise whatever the share.
const GROWTH_NOISE: f64 = 16.0;

pub(crate) struct Options {
    length: Duration,
    keys: usize,
    /// Writes per second.
    rate: usize,
    binary: PathBuf,
    out: PathBuf,
    /// What happens beside the writers.
    kinds: Vec<Kind>,
}

impl Options {
    fn parse(args: &[String]) -> Result<Self, String> {
        let mut options = Self {
            length: Duration::from_secs(600),
            keys: 50_000,
            rate: 3000,
            binary: root().join("target/release/kelson"),
            out: root().join("target/soak"),
            kinds: load::KINDS.iter().map(|(_, kind)| *kind).collect(),
        };
        let mut words = args.iter();
        while let Some(flag) = words.next() {
            let value = words.next().ok_or_else(|| format!("{flag} takes a value"))?;
            let wrong = |_| format!("{flag} takes a number, not {value:?}");
            match flag.as_str() {
                "--minutes" => {
                    let minutes: f64 = value.parse().map_err(|_| format!("{flag} {value:?}"))?;
                    options.length = Duration::try_from_secs_f64(minutes * 60.0)
                        .map_err(|error| format!("{flag} {value}: {error}"))?;
                }
                "--keys" => options.keys = value.parse().map_err(wrong)?,
                "--rate" => options.rate = value.parse().map_err(wrong)?,
                "--bin" => options.binary = value.into(),
                "--out" => options.out = value.into(),
                "--beside" => options.kinds = kinds(value)?,
                other => return Err(format!("soak knows no option {other:?}")),
            }
        }
        if options.keys < load::WRITERS || options.rate == 0 {
            return Err(format!("at least {} keys and one write a second", load::WRITERS));
        }
        Ok(options)
    }
}

/// The kinds of load with these names, separated by commas.
fn kinds(names: &str) -> Result<Vec<Kind>, String> {
    let mut found = Vec::new();
    for name in names.split(',').filter(|name| !name.is_empty()) {
        let before = found.len();
        found.extend(load::KINDS.iter().filter(|(known, _)| *known == name).map(|(_, kind)| *kind));
        if found.len() == before {
            return Err(format!("there is no load called {name:?}"));
        }
    }
    Ok(found)
}

pub(crate) fn run(args: &[String]) -> Result<(), String> {
    let options = Options::parse(args)?;
    if !options.binary.exists() {
        return Err(format!("{} is missing: build it first", options.binary.display()));
    }
    fs::create_dir_all(&options.out).map_err(|e| format!("{}: {e}", options.out.display()))?;
    let mut server = compare::start(&options.binary, None)?;
    let outcome = soak(&options, &mut server);
    compare::stop(&mut server, "-KILL");
    if outcome.is_ok() {
        let _ = fs::remove_dir_all(&server.dir);
    } else {
        eprintln!("the server's directory is kept: {}", server.dir.display());
    }
    outcome
}

fn soak(options: &Options, server: &mut Server) -> Result<(), String> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|e| format!("start the client: {e}"))?;
    let _entered = runtime.enter();
    let load = Arc::new(Load::new(server.port)?);
    let ledger = runtime.block_on(load::fill(&load, options.keys))?;
    println!("{} keys are filled in; the soak begins", options.keys);
    let sampler = sample::Sampler::new(server, load.clone());
    let (ledger, samples) = runtime.block_on(load::drive(
        &load,
        ledger,
        &options.kinds,
        (options.rate, options.length),
        sampler,
    ))?;
    let names = (options.out.join("soak.csv"), options.out.join("soak.svg"));
    fs::write(&names.0, sample::csv(&samples)).map_err(|e| format!("write the samples: {e}"))?;
    let drawn = plot::svg(&samples, &load.marks());
    fs::write(&names.1, drawn).map_err(|e| format!("write the plot: {e}"))?;
    println!("{} and {} are written", names.0.display(), names.1.display());
    for line in load.summary() {
        println!("{line}");
    }
    runtime.block_on(verify::no_streams(server.port))?;
    runtime.block_on(verify::verify(&load, &ledger, "before a restart"))?;
    let hash = runtime.block_on(verify::hash(&load))?;
    for signal in ["-KILL", "-TERM"] {
        compare::stop(server, signal);
        let again = (server.dir.clone(), (server.port, server.peer_port));
        *server = compare::start(&options.binary, Some(again))?;
        let found = runtime.block_on(verify::hash_at(&load, hash.revision))?;
        if found != hash {
            return Err(format!("the hash after {signal} is {found:?}, it was {hash:?}"));
        }
        runtime.block_on(verify::verify(&load, &ledger, "after a restart"))?;
    }
    judge(&samples, options.length)
}

/// Whether memory and files level off.
fn judge(samples: &[Sample], length: Duration) -> Result<(), String> {
    println!("\n| mean of the third | first | middle | last | last to middle |");
    println!("|---|---|---|---|---|");
    let third = samples.len() / 3;
    let mut grown = Vec::new();
    for column in &sample::COLUMNS {
        let mean = |part: usize| {
            let part = &samples[part * third..(part + 1) * third];
            part.iter().map(column.of).sum::<f64>() / part.len().max(1) as f64
        };
        let (first, middle, last) = (mean(0), mean(1), mean(2));
        let growth = last / middle.max(f64::MIN_POSITIVE) - 1.0;
        let name = column.name;
        println!("| {name} | {first:.1} | {middle:.1} | {last:.1} | {:+.1} % |", growth * 100.0);
        if column.is_judged && growth > GROWTH_MAX && last - middle > GROWTH_NOISE {
            grown.push(name);
        }
    }
    if length < JUDGED_FROM {
        println!("too short to be judged");
        return Ok(());
    }
    if grown.is_empty() {
        println!("level: none grew by more than {:.0} %", GROWTH_MAX * 100.0);
        return Ok(());
    }
    Err(format!("not level: {}", grown.join(", ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn samples(memory: impl Fn(f64) -> f64) -> Vec<Sample> {
        let at = |second: u32| {
            let seconds = f64::from(second);
            Sample { seconds, rss_mib: memory(seconds), ..Sample::default() }
        };
        (0..300).map(at).collect()
    }

    #[test]
    fn growth_is_found_and_a_sawtooth_is_not() {
        let long = Duration::from_secs(300);
        assert!(judge(&samples(|_| 400.0), long).is_ok());
        assert!(judge(&samples(|s| 400.0 + (s % 25.0) * 8.0), long).is_ok());
        assert!(judge(&samples(|s| 400.0 + s), long).is_err());
        assert!(judge(&samples(|s| 400.0 + s), Duration::from_secs(60)).is_ok(), "too short");
    }

    #[test]
    fn options_are_refused_with_their_name() {
        let parse = |text: &str| {
            let words: Vec<String> = text.split_whitespace().map(str::to_owned).collect();
            Options::parse(&words)
        };
        assert_eq!(parse("--minutes 0.5").expect("fine").length, Duration::from_secs(30));
        assert_eq!(parse("").expect("fine").kinds.len(), load::KINDS.len());
        let named = parse("--beside hashes,watches").expect("fine").kinds;
        assert_eq!(named, [Kind::Hashes, Kind::Watch(1), Kind::Watch(2)]);
        for wrong in
            ["--minutes -1", "--minutes", "--keys x", "--rate 0", "--beside all", "--else 1"]
        {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }
}
