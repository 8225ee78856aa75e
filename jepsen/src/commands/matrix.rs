//! `jepsen run --matrix`: every workload against every class of faults, each cell a run in a process
//! of its own, and a table of what was covered. Cells that have passed are not run again, so a matrix
//! that was interrupted goes on where it stopped.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;
use std::process::Command;

use crate::args::Args;
use crate::nemesis::{Class, Fault};
use crate::report::Summary;
use crate::run::Plan;
use crate::scenario::Scenario;
use crate::sys;
use crate::workload::Workload;

/// A run in the table.
struct Cell {
    row: String,
    column: String,
    /// The words after `jepsen` that make it.
    words: Vec<String>,
}

pub(crate) fn run(mut args: Args) -> Result<bool, String> {
    let (workloads, classes) = (args.many("workload"), args.many("class"));
    // Whoever picks rows or columns wants those and no more.
    let whole = workloads.is_empty() && classes.is_empty();
    let seconds = args.number("seconds", 30)?.to_string();
    let (rate, disk) = (args.text("rate", "300")?, args.text("disk", "auto")?);
    let plan = Plan::from_args("matrix", &mut args)?;
    args.done()?;
    let workloads = chosen(&workloads, Workload::ALL.to_vec(), Workload::named)?;
    let classes = chosen(&classes, Class::ALL.to_vec(), Class::named)?;
    let dir = plan
        .into
        .clone()
        .unwrap_or_else(|| plan.store.join(format!("matrix-{}-{}", plan.target.name(), plan.seed)));
    let mut cells = Vec::new();
    for workload in &workloads {
        for class in &classes {
            let words = ["run", "--workload", workload.name(), "--class", class.name()];
            let mut words: Vec<String> = words.map(str::to_owned).to_vec();
            words.extend(
                ["--seconds", &seconds, "--rate", &rate, "--disk", &disk].map(str::to_owned),
            );
            // Another seed for each cell, so that all faults of a class come up in some row.
            let seed = plan.seed + cells.len() as u64;
            words.extend(["--seed".to_owned(), seed.to_string()]);
            cells.push(Cell { row: workload.name().into(), column: class.name().into(), words });
        }
    }
    let mut results = BTreeMap::new();
    for (number, cell) in cells.iter().enumerate() {
        let place = dir.join(format!("{}-{}", cell.row, cell.column));
        println!("cell {} of {}: {} against {}", number + 1, cells.len(), cell.row, cell.column);
        let summary = episode(&plan, &cell.words, &place)?;
        results.insert((cell.row.clone(), cell.column.clone()), summary);
        let table = table(&results);
        std::fs::create_dir_all(&dir).map_err(|error| error.to_string())?;
        std::fs::write(dir.join("matrix.md"), &table).map_err(|error| error.to_string())?;
    }
    let scenarios = match whole {
        true => {
            let plan = Plan { into: Some(dir.join("scenarios")), ..plan };
            super::scenario::several(&plan, &Scenario::all())?
        }
        false => true,
    };
    println!("\n{}\ntable in {}", table(&results), dir.join("matrix.md").display());
    Ok(scenarios
        && results.values().all(|summary| summary.as_ref().is_some_and(|summary| summary.valid)))
}

fn chosen<T: Copy>(
    names: &[String],
    all: Vec<T>,
    named: impl Fn(&str) -> Result<T, String>,
) -> Result<Vec<T>, String> {
    if names.is_empty() { Ok(all) } else { names.iter().map(|name| named(name)).collect() }
}

/// Runs `jepsen` in a process of its own and reads its summary; none if it left none. A run that has
/// passed before is only read.
pub(super) fn episode(
    plan: &Plan,
    words: &[String],
    place: &Path,
) -> Result<Option<Summary>, String> {
    if let Some(summary) = summary(place).filter(|summary| summary.valid) {
        println!("passed before: {}", place.display());
        return Ok(Some(summary));
    }
    if place.exists() {
        std::fs::remove_dir_all(place).map_err(|error| error.to_string())?;
    }
    let program = std::env::current_exe().map_err(|error| error.to_string())?;
    let mut child = Command::new(program);
    child.args(words).arg("--into").arg(place);
    child.args(["--target", plan.target.name(), "--members", &plan.members.to_string()]);
    child.arg("--bin").arg(&plan.bin);
    for flag in &plan.extra {
        child.args(["--flag", flag]);
    }
    if plan.keep {
        child.arg("--keep-data");
    }
    if plan.local_reads {
        child.arg("--sabotage-local-reads");
    }
    sys::tie(&mut child);
    let status = child.status().map_err(|error| error.to_string())?;
    let summary = summary(place);
    if summary.is_none() {
        println!("the run left no summary: {status}");
    }
    Ok(summary)
}

fn summary(place: &Path) -> Option<Summary> {
    serde_json::from_slice(&std::fs::read(place.join("summary.json")).ok()?).ok()
}

type Results = BTreeMap<(String, String), Option<Summary>>;

fn table(results: &Results) -> String {
    let mut out = String::from("# Workloads against classes of faults\n\n");
    let mut columns: Vec<&String> = results.keys().map(|(_, column)| column).collect();
    columns.sort();
    columns.dedup();
    let mut rows: Vec<&String> = results.keys().map(|(row, _)| row).collect();
    rows.dedup();
    let heads = columns.iter().map(|column| format!(" {column} |")).collect::<String>();
    writeln!(out, "| workload |{heads}").expect("a string takes all");
    writeln!(out, "|---|{}", "---|".repeat(columns.len())).expect("a string takes all");
    for row in rows {
        let cells = columns.iter().map(|column| {
            let found = results.get(&(row.clone(), (*column).clone()));
            found.map_or(" - |".into(), |summary| format!(" {} |", cell(summary.as_ref())))
        });
        writeln!(out, "| {row} |{}", cells.collect::<String>()).expect("a string takes all");
    }
    out + "\n" + &faults(results)
}

fn cell(summary: Option<&Summary>) -> String {
    let Some(summary) = summary else { return "no result".into() };
    let faults: usize = summary.faults.values().sum();
    if faults == 0 {
        return format!("{}: no fault possible", summary.verdict);
    }
    format!("{}: {faults} faults, {} operations", summary.verdict, summary.operations)
}

/// How often each fault was in force, those that never were first.
fn faults(results: &Results) -> String {
    let mut counts: BTreeMap<&str, usize> = Fault::all().map(|fault| (fault.name(), 0)).collect();
    for summary in results.values().flatten() {
        for (name, count) in &summary.faults {
            if let Some(sum) = counts.get_mut(name.as_str()) {
                *sum += count;
            }
        }
    }
    let never: Vec<&str> =
        counts.iter().filter(|(_, count)| **count == 0).map(|(name, _)| *name).collect();
    let had = counts.values().filter(|count| **count > 0).count();
    let sum: usize = counts.values().sum();
    let mut out = format!("{had} of {} kinds of faults were in force, {sum} times.", counts.len());
    if !never.is_empty() {
        write!(out, " Never: {}.", never.join(", ")).expect("a string takes all");
    }
    out.push_str("\n\n");
    for (name, count) in counts.iter().filter(|(_, count)| **count > 0) {
        writeln!(out, "- {name}: {count}").expect("a string takes all");
    }
    out
}
