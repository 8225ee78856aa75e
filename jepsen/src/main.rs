//! `jepsen`: attacks a cluster of real processes and judges what its clients saw. It stands outside
//! of everything: it knows members only by their ports, flags and signals, and runs against etcd as
//! it runs against Kelson.

mod args;
mod attack;
mod bulk;
mod call;
mod capture;
mod check;
mod client;
mod cluster;
mod commands;
mod fabric;
mod history;
mod monitor;
mod nemesis;
mod page;
mod report;
mod rng;
mod run;
mod scenario;
mod schedule;
mod selftest;
mod sys;
mod timeline;
mod watcher;
mod wire;
mod workload;

use std::process::ExitCode;

use args::Args;

const USAGE: &str = "\
usage: jepsen COMMAND [--target kelson|etcd] [--bin PATH] [--members N] [--seed N] [--store DIR]
                      [--into DIR] [--flag=--name=value]... [--keep-data]
                      [--sabotage-local-reads]  (send linearizable reads as serializable: must fail)
  run [--workload mixed] [--class CLASS]... [--fault FAULT]... [--calm] [--seconds 30] [--rate 300]
      [--disk ext4|xfs|none|auto] [--schedule FILE] [--rootless]
                                           one workload against faults; --calm is without any
  run --smoke                              ten faults of six classes, about a minute
  run --matrix [--workload W]... [--class C]... [--seconds 30] [--rate 300] [--disk auto]
                                           every workload against every class, and a table
  scenario [NAME]... [--rate 300] [--old-etcd]
                                           directed scenarios, all if none is named
  soak [--hours 1] [--episode 300] [--ledger jepsen/ledger.jsonl]
                                           fresh clusters and seeds until something is violated
  replay DIR [--times 5]                   the seed and schedule of a recorded run again
  check DIR                                judge a recorded run again
  shrink DIR                               leave out of a bad history what its rule does not need
  report DIR                               judge a recorded run again and draw its timeline
  failover [--rounds 50] [--rate 200]      kill the leader under load, time to the next write
  smoke [--seconds 10] [--rate 300]        partitions, loss, delay, pause, one after the other
  replace [--rounds 3] [--mib 2048] [--rate 200]
                                           replace members under load; catch up a large database
  storm [--seconds 120] [--rate 300] [--only FAULT]...
                                           faults drawn at random, up to two at a time
  wiped [--existing]                       a follower comes back with an empty disk
  both COMMAND ...                         the same against etcd and Kelson, and a table
  mutants [--only VARIANT]...              break one promise at a time; each must be noticed
  known-bad [--old PATH]                   stores with known flaws; each flaw must be found
  selftest [--seeds 40]                    plant errors in valid histories; each must be found";

fn main() -> ExitCode {
    let mut words = std::env::args().skip(1);
    let command = words.next().unwrap_or_default();
    let args = Args::new(words);
    let valid = match command.as_str() {
        "run" => commands::run::run(args),
        "scenario" => commands::scenario::run(args),
        "soak" => commands::soak::run(args),
        "replay" => commands::replay::run(args),
        "shrink" => commands::shrink::run(args),
        "report" => commands::report::run(args),
        "failover" => commands::failover::run(args),
        "smoke" => commands::smoke::run(args),
        "replace" => commands::replace::run(args),
        "storm" => commands::storm::run(args),
        "wiped" => commands::wiped::run(args),
        "both" => commands::both::run(args),
        "check" => check_again(args),
        "mutants" => commands::mutants::run(args),
        "known-bad" => commands::known_bad::run(args),
        "selftest" => selftest::run(args),
        _ => Err(USAGE.into()),
    };
    match valid {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("jepsen: {error}");
            ExitCode::from(2)
        }
    }
}

fn check_again(mut args: Args) -> Result<bool, String> {
    let dir = args.word().ok_or("check needs a run directory")?;
    args.done()?;
    let dir = run::existing(&dir)?;
    let history = history::History::load(dir).map_err(|error| error.to_string())?;
    let violations = check::judge(&history);
    for violation in &violations {
        println!("{violation}");
    }
    println!("{} operations, {} violations", history.ops.len(), violations.len());
    Ok(violations.is_empty())
}
