//! Proof that the checks can fail: histories that are right by construction, each with exactly one
//! error planted. A history that is right must pass, every planted error must be found by a rule
//! that names it.

mod corpus;
mod model;
mod plant;
mod plant_loads;
mod plant_streams;
mod store;

use crate::args::Args;
use crate::check::judge;
use crate::rng::Rng;
use crate::workload::Workload;

/// Operations of one made-up history.
const OPS: usize = 400;

pub(crate) fn run(mut args: Args) -> Result<bool, String> {
    let seeds = args.number("seeds", 40)?;
    args.done()?;
    let (files, wrong) = corpus::check()?;
    wrong.iter().for_each(|wrong| println!("{wrong}"));
    println!("{:40} {} of {files} judged wrong", "small histories of the corpus", wrong.len());
    let mut good = wrong.is_empty();
    let mut false_alarms = 0;
    for workload in Workload::ALL {
        let alarms = (0..seeds).filter(|seed| alarm(workload, *seed)).count();
        println!("valid history of {:23} {alarms} of {seeds} judged wrong", workload.name());
        false_alarms += alarms;
    }
    good &= false_alarms == 0;
    for kind in kinds() {
        // A history without a place for an error is passed over, but most must have one.
        let judged = (0..2 * seeds).filter_map(|seed| found(kind, seed)).take(seeds as usize);
        let found = judged.filter(|found| *found).count() as u64;
        println!("{:40} {found} of {seeds} found", kind.name);
        good &= found == seeds;
    }
    println!("{}", if good { "all errors found, no false alarm" } else { "SELFTEST FAILED" });
    Ok(good)
}

/// All kinds of errors that are planted.
fn kinds() -> impl Iterator<Item = &'static plant::Kind> {
    plant::KINDS.iter().chain(plant_loads::KINDS).chain(plant_streams::KINDS)
}

/// True if a history that is right is judged wrong.
fn alarm(workload: Workload, seed: u64) -> bool {
    let violations = judge(&model::history(workload, seed, OPS));
    let first = violations.first();
    if let Some(first) = first {
        println!("{} with seed {seed}: false alarm: {first}", workload.name());
    }
    first.is_some()
}

/// Plants one error and tells whether a rule that may name it did; none if the history has no place
/// for it.
fn found(kind: &plant::Kind, seed: u64) -> Option<bool> {
    let mut history = model::history(kind.workload, seed, OPS);
    let mut rng = Rng::fork(seed, 7);
    (kind.plant)(&mut history, &mut rng)?;
    let violations = judge(&history);
    let named = violations.iter().any(|violation| kind.rules.contains(&violation.rule));
    if !named {
        let rules: Vec<_> = violations.iter().map(|violation| violation.rule).collect();
        println!("seed {seed}: {:?} not found, only {rules:?}", kind.name);
    }
    Some(named)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_right_history_raises_no_alarm() {
        for workload in Workload::ALL {
            for seed in 0..10 {
                assert!(!alarm(workload, seed), "{} with seed {seed}", workload.name());
            }
        }
    }

    #[test]
    fn every_planted_error_is_found() {
        for kind in kinds() {
            for seed in 0..5 {
                assert_eq!(found(kind, seed), Some(true), "{} with seed {seed}", kind.name);
            }
        }
    }

    #[test]
    fn an_error_planted_in_the_history_survives_the_files() {
        let mut history = model::history(Workload::Mixed, 3, OPS);
        let kind = &plant::KINDS[0];
        (kind.plant)(&mut history, &mut Rng::fork(1, 0)).expect("the history has a place for it");
        let lines: Vec<String> =
            history.ops.iter().map(|op| serde_json::to_string(op).expect("plain data")).collect();
        let again: Vec<crate::history::Op> = lines
            .iter()
            .map(|line| serde_json::from_str(line).expect("written by the same types"))
            .collect();
        assert_eq!(again, history.ops);
    }
}
