//! `jepsen replay DIR`: the same words, seed and schedule as a recorded run, several times, and how
//! often that failed. Runs of real processes do not repeat exactly; the number says how near they come.

use std::path::Path;

use serde_json::Value;

use super::matrix::episode;
use crate::args::Args;
use crate::run::{self, Plan};

pub(crate) fn run(mut args: Args) -> Result<bool, String> {
    let dir = args.word().ok_or("replay needs a run directory")?;
    let times = args.number("times", 5)?;
    args.done()?;
    let dir = run::existing(&dir)?;
    let schedule = dir.join("schedule.json");
    if !schedule.exists() {
        return Err(format!("{} is missing: only `run` can be replayed", schedule.display()));
    }
    let text = std::fs::read(dir.join("run.json")).map_err(|error| format!("run.json: {error}"))?;
    let about: Value =
        serde_json::from_slice(&text).map_err(|error| format!("run.json: {error}"))?;
    let (plan, mut words) = recorded(&about).ok_or("run.json does not tell how it was run")??;
    words.extend(["--seed".to_owned(), plan.seed.to_string(), "--schedule".to_owned()]);
    words.push(schedule.display().to_string());
    let mut failed = 0;
    for time in 1..=times {
        let place = replayed(dir, time);
        if place.exists() {
            std::fs::remove_dir_all(&place).map_err(|error| error.to_string())?;
        }
        let summary = episode(&plan, &words, &place)?;
        let verdict = summary.map_or("no result".to_owned(), |summary| summary.verdict);
        println!("replay {time} of {times}: {verdict}");
        failed += u64::from(verdict == "VIOLATED");
    }
    println!("violated {failed} times of {times}");
    Ok(failed == 0)
}

fn replayed(dir: &Path, time: u64) -> std::path::PathBuf {
    dir.join(format!("replay-{time}"))
}

/// The plan of a recorded run, and the words that are not part of every plan.
fn recorded(about: &Value) -> Option<Result<(Plan, Vec<String>), String>> {
    let words = about.get("arguments")?.as_array()?;
    let mut words = words.iter().filter_map(|word| word.as_str().map(str::to_owned));
    let command = words.next()?;
    let seed = about.get("seed")?.as_u64()?;
    let mut args = Args::new(words);
    let plan = Plan::from_args("replay", &mut args).and_then(|plan| {
        args.text("schedule", "")?;
        Ok(Plan { seed, into: None, ..plan })
    });
    Some(plan.map(|plan| (plan, [vec![command], args.rest()].concat())))
}
