//! `jepsen shrink DIR`: leaves out of a history that broke a rule whatever the rule does not need: all
//! behind some revision, then notes of the workload, reads, writes without effect, whole keys, and single writes with their
//! events, in ever smaller groups, as long as the same rule is broken and no other that was not broken
//! before. What is left lies in `DIR/shrunk`, for `jepsen check`.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::args::Args;
use crate::check::{Rule, judge};
use crate::history::{Event, History, Op, Recorder, SPARSE, WatchRecord, WatchWhat};
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
    let deadline = begun + PATIENCE;
    shorten(&mut history, &still, deadline);
    fewer_notes(&mut history, &still, deadline);
    reduce(&mut history, |op| !op.call.is_write(), &still, deadline);
    reduce(&mut history, |op| op.call.is_write() && !op.wrote(), &still, deadline);
    drop_keys(&mut history, &still, deadline);
    reduce(&mut history, |op| op.call.is_write(), &still, deadline);
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

/// Looks for the lowest revision behind which everything can go.
fn shorten(history: &mut History, still: &impl Fn(&History) -> bool, deadline: Instant) {
    let newest = history.ops.iter().map(|op| op.revision).max().unwrap_or(0);
    let (mut low, mut high) = (0, newest);
    while low < high && Instant::now() < deadline {
        let middle = low + (high - low) / 2;
        match still(&until(history, middle)) {
            true => high = middle,
            false => low = middle + 1,
        }
    }
    let shorter = until(history, high);
    if still(&shorter) {
        *history = shorter;
    }
}

/// The history up to a revision, without the end of the run.
fn until(history: &History, revision: i64) -> History {
    let ops = history.ops.iter().filter(|op| op.revision <= revision).cloned().collect();
    let watches = events(history, |event| event.revision <= revision);
    History { ops, watches, finals: Vec::new(), ..beside(history) }
}

/// Leaves out groups of operations of one sort, half of all at first, single ones at last.
fn reduce(
    history: &mut History,
    sort: impl Fn(&Op) -> bool,
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
            let any = history.ops[at..end].iter().any(&sort);
            let smaller = any.then(|| without(history, at, end, &sort));
            match smaller.filter(still) {
                Some(smaller) => *history = smaller,
                None => at = end,
            }
        }
        size /= 2;
    }
}

/// The history without the operations of one sort in a range, and without the events of those writes.
fn without(history: &History, from: usize, to: usize, sort: &impl Fn(&Op) -> bool) -> History {
    let gone = |(at, op): &(usize, &Op)| (from..to).contains(at) && sort(op);
    let numbered = || history.ops.iter().enumerate();
    let revisions: BTreeSet<i64> =
        numbered().filter(gone).filter(|(_, op)| op.wrote()).map(|(_, op)| op.revision).collect();
    let ops = numbered().filter(|one| !gone(one)).map(|(_, op)| op.clone()).collect();
    let watches = events(history, |event| !revisions.contains(&event.revision));
    History { ops, watches, ..beside(history) }
}

/// What a history has beside its operations and watches.
fn beside(history: &History) -> History {
    History {
        ops: Vec::new(),
        watches: Vec::new(),
        finals: history.finals.clone(),
        notes: history.notes.clone(),
        leaders: history.leaders.clone(),
        sparse: history.sparse,
    }
}

/// Leaves out groups of what workloads noted beside their operations.
fn fewer_notes(history: &mut History, still: &impl Fn(&History) -> bool, deadline: Instant) {
    let mut size = history.notes.len();
    while size > 0 {
        let mut at = 0;
        while at < history.notes.len() {
            if Instant::now() > deadline {
                return;
            }
            let mut smaller = history.clone();
            smaller.notes.drain(at..(at + size).min(history.notes.len()));
            match still(&smaller) {
                true => *history = smaller,
                false => at += size,
            }
        }
        size /= 2;
    }
}

/// Leaves out keys that have nothing to do with it: their events, the writes that made them, and
/// their rows in what is read.
fn drop_keys(history: &mut History, still: &impl Fn(&History) -> bool, deadline: Instant) {
    let of = |record: &WatchRecord| match &record.what {
        WatchWhat::Events { events, .. } => events.clone(),
        _ => Vec::new(),
    };
    let all: BTreeSet<(i64, String)> =
        history.watches.iter().flat_map(of).map(|event| (event.revision, event.key)).collect();
    let keys: BTreeSet<&String> = all.iter().map(|(_, key)| key).collect();
    for key in keys {
        if Instant::now() > deadline {
            return;
        }
        let here = all.iter().filter(|(_, other)| other == key).map(|(revision, _)| *revision);
        let revisions: BTreeSet<i64> = here.collect();
        let mut smaller = history.clone();
        smaller.ops.retain(|op| !(op.wrote() && revisions.contains(&op.revision)));
        smaller.ops.iter_mut().for_each(|op| op.rows.retain(|row| row.key != *key));
        smaller.watches = events(history, |event| !revisions.contains(&event.revision));
        if still(&smaller) {
            *history = smaller;
        }
    }
}

/// The watch records with some of the events; a response that has none left is gone.
fn events(history: &History, keep: impl Fn(&Event) -> bool) -> Vec<WatchRecord> {
    let mut watches = history.watches.clone();
    watches.retain_mut(|record| match &mut record.what {
        WatchWhat::Events { events, .. } => {
            events.retain(&keep);
            !events.is_empty()
        }
        WatchWhat::Started { .. }
        | WatchWhat::Progress { .. }
        | WatchWhat::Compacted { .. }
        | WatchWhat::Ended { .. } => true,
    });
    watches
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
    let notes = Recorder::create(&place.join("notes.jsonl"))?;
    history.notes.iter().for_each(|note| notes.add(note.clone()));
    notes.all()?;
    let leaders = Recorder::create(&place.join("leaders.jsonl"))?;
    history.leaders.iter().for_each(|sighting| leaders.add(sighting.clone()));
    leaders.all()?;
    std::fs::write(place.join(SPARSE), "")
}
