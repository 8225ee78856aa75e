//! `jepsen shrink DIR`: leaves out of a history that broke a rule whatever the rule does not need:
//! writes with their events, then reads, in ever smaller groups, as long as the same rule is broken
//! and no other that was not broken before. What is left lies in `DIR/shrunk`, for `jepsen check`.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::args::Args;
use crate::check::{Rule, judge};
use crate::history::{History, Op, Recorder, SPARSE, WatchWhat};
use crate::run;

/// The search ends after this; what it has found by then is shown.
const PATIENCE: Duration = Duration::from_secs(120);

pub(crate) fn run(mut args: Args) -> Result<bool, String> {
    let dir = args.word().ok_or("shrink needs a run directory")?;
    args.done()?;
    let dir = run::existing(&dir)?;
    let mut history = History::load(dir).map_err(|error| error.to_string())?;
    let before: BTreeSet<Rule> = rules(&history);
    let Some(rule) = judge(&history).first().map(|violation| violation.rule) else {
        println!("nothing is violated in {}", dir.display());
        return Ok(true);
    };
    // Revisions will be missing.
    history.sparse = true;
    let allowed: BTreeSet<Rule> = before.union(&rules(&history)).copied().collect();
    let (count, begun) = (history.ops.len(), Instant::now());
    let still = |history: &History| {
        let broken = rules(history);
        broken.contains(&rule) && broken.is_subset(&allowed)
    };
    if !still(&history) {
        return Err(format!("{rule:?} does not show once revisions may be missing"));
    }
    for writes in [true, false, true] {
        reduce(&mut history, writes, &still, begun + PATIENCE);
    }
    for violation in judge(&history).iter().filter(|violation| violation.rule == rule) {
        println!("{violation}");
    }
    let place = dir.join("shrunk");
    save(&history, &place).map_err(|error| error.to_string())?;
    let took = begun.elapsed().as_secs_f64();
    println!("{rule:?}: {count} operations became {} in {took:.1} s", history.ops.len());
    println!("what is left is in {}", place.display());
    Ok(false)
}

fn rules(history: &History) -> BTreeSet<Rule> {
    judge(history).into_iter().map(|violation| violation.rule).collect()
}

/// Leaves out groups of operations, half of them at first, single ones at last.
fn reduce(
    history: &mut History,
    writes: bool,
    still: &impl Fn(&History) -> bool,
    deadline: Instant,
) {
    let mut size = history.ops.len().div_ceil(2);
    while size > 0 {
        let mut at = 0;
        while at < history.ops.len() {
            if Instant::now() > deadline {
                return;
            }
            let end = (at + size).min(history.ops.len());
            let chosen = |op: &Op| op.call.is_write() == writes;
            if !history.ops[at..end].iter().any(chosen) {
                at = end;
                continue;
            }
            let smaller = without(history, at, end, writes);
            if still(&smaller) {
                *history = smaller;
            } else {
                at = end;
            }
        }
        size /= 2;
    }
}

/// The history without the writes or the reads of a range, and without the events of those writes.
fn without(history: &History, from: usize, to: usize, writes: bool) -> History {
    let gone = |(at, op): &(usize, &Op)| (from..to).contains(at) && op.call.is_write() == writes;
    let numbered = || history.ops.iter().enumerate();
    let revisions: BTreeSet<i64> =
        numbered().filter(gone).filter(|(_, op)| op.wrote()).map(|(_, op)| op.revision).collect();
    let ops = numbered().filter(|one| !gone(one)).map(|(_, op)| op.clone()).collect();
    let mut watches = history.watches.clone();
    watches.retain_mut(|record| match &mut record.what {
        WatchWhat::Events { events, .. } => {
            events.retain(|event| !revisions.contains(&event.revision));
            !events.is_empty()
        }
        _ => true,
    });
    History { ops, watches, finals: history.finals.clone(), sparse: history.sparse }
}

fn save(history: &History, place: &Path) -> std::io::Result<()> {
    std::fs::create_dir_all(place)?;
    let ops = Recorder::create(&place.join("history.jsonl"))?;
    history.ops.iter().for_each(|op| ops.add(op.clone()));
    ops.all()?;
    let watches = Recorder::create(&place.join("watch.jsonl"))?;
    history.watches.iter().for_each(|record| watches.add(record.clone()));
    watches.all()?;
    let finals = Recorder::create(&place.join("finals.jsonl"))?;
    history.finals.iter().for_each(|last| finals.add(last.clone()));
    finals.all()?;
    std::fs::write(place.join(SPARSE), "")
}
