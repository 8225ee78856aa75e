//! Proof that the checks can fail: histories that are right by construction, each with exactly one
//! error planted. A history that is right must pass, every planted error must be found by a rule
//! that names it.

mod model;
mod plant;

use crate::args::Args;
use crate::check::judge;
use crate::rng::Rng;

/// Operations of one made-up history.
const OPS: usize = 400;

pub(crate) fn run(mut args: Args) -> Result<bool, String> {
    let seeds = args.number("seeds", 40)?;
    args.done()?;
    let mut good = true;
    let mut false_alarms = 0;
    for seed in 0..seeds {
        let violations = judge(&model::history(seed, OPS));
        if let Some(first) = violations.first() {
            println!("seed {seed}: false alarm: {first}");
            false_alarms += 1;
        }
    }
    println!("{:40} {false_alarms} of {seeds} judged wrong", "valid history");
    good &= false_alarms == 0;
    for kind in plant::KINDS {
        let found = (0..seeds).filter(|seed| found(kind, *seed)).count() as u64;
        println!("{:40} {found} of {seeds} found", kind.name);
        good &= found == seeds;
    }
    println!("{}", if good { "all errors found, no false alarm" } else { "SELFTEST FAILED" });
    Ok(good)
}

/// Plants one error and tells whether a rule that may name it did.
fn found(kind: &plant::Kind, seed: u64) -> bool {
    let mut history = model::history(seed, OPS);
    let mut rng = Rng::fork(seed, 7);
    if (kind.plant)(&mut history, &mut rng).is_none() {
        println!("seed {seed}: no place for {:?}", kind.name);
        return false;
    }
    let violations = judge(&history);
    let named = violations.iter().any(|violation| kind.rules.contains(&violation.rule));
    if !named {
        let rules: Vec<_> = violations.iter().map(|violation| violation.rule).collect();
        println!("seed {seed}: {:?} not found, only {rules:?}", kind.name);
    }
    named
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_right_history_raises_no_alarm() {
        for seed in 0..10 {
            assert_eq!(judge(&model::history(seed, OPS)), []);
        }
    }

    #[test]
    fn every_planted_error_is_found() {
        for kind in plant::KINDS {
            for seed in 0..5 {
                assert!(found(kind, seed), "{} with seed {seed}", kind.name);
            }
        }
    }

    #[test]
    fn an_error_planted_in_the_history_survives_the_files() {
        let mut history = model::history(3, OPS);
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
