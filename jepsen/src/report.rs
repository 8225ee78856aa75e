//! The readable end of a run: `report.md` for people and `summary.json` for tables, violations
//! first. It judges nothing.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::history::{History, WatchWhat};
use crate::nemesis::Outcome;
use crate::run::{Plan, Run, Verdict, tally};
use crate::timeline::{Picture, html};

/// What a command measured: rows of name, value and unit, in order.
pub(crate) type Extra = Vec<(String, f64, String)>;

/// The part of a run that other runs are compared with.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Summary {
    pub(crate) command: String,
    pub(crate) target: String,
    pub(crate) version: String,
    pub(crate) members: usize,
    pub(crate) seed: u64,
    pub(crate) valid: bool,
    pub(crate) violations: usize,
    pub(crate) measured: Extra,
    /// In one word; older summaries have none.
    #[serde(default)]
    pub(crate) verdict: String,
    /// How often each fault was in force.
    #[serde(default)]
    pub(crate) faults: BTreeMap<String, usize>,
    /// Operations with an answer, and events that watchers were sent.
    #[serde(default)]
    pub(crate) operations: usize,
    #[serde(default)]
    pub(crate) events: usize,
}

/// Writes `run.json`: what was asked, of what, where.
pub(crate) fn describe(plan: &Plan, dir: &Path) -> io::Result<()> {
    let bin = std::fs::metadata(&plan.bin).ok();
    let built = bin.as_ref().and_then(|bin| bin.modified().ok());
    let since = built.and_then(|time| time.duration_since(std::time::UNIX_EPOCH).ok());
    let text = |path: &str| std::fs::read_to_string(path).unwrap_or_default().trim().to_owned();
    let description = serde_json::json!({
        "command": plan.name,
        "arguments": std::env::args().skip(1).collect::<Vec<_>>(),
        "target": plan.target.name(),
        "program": plan.bin,
        "program_bytes": bin.map(|bin| bin.len()),
        "program_built": since.map(|since| since.as_secs()),
        "members": plan.members,
        "flags": plan.extra,
        "disk": plan.disk.map(kelson_image::Kind::name),
        "seed": plan.seed,
        "kernel": text("/proc/sys/kernel/osrelease"),
        "processors": std::thread::available_parallelism().map_or(0, usize::from),
    });
    let json = serde_json::to_vec_pretty(&description).expect("a description is plain data");
    std::fs::write(dir.join("run.json"), json)
}

fn installed(run: &Run) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    run.faults.with(|faults| {
        for fault in faults.iter().filter(|fault| fault.outcome == Outcome::Installed) {
            *counts.entry(fault.fault.clone()).or_default() += 1;
        }
    });
    counts
}

fn events(history: &History) -> usize {
    let count = |what: &WatchWhat| match what {
        WatchWhat::Events { events, .. } => events.len(),
        _ => 0,
    };
    history.watches.iter().map(|record| count(&record.what)).sum()
}

/// Writes both files and prints the report.
pub(crate) fn write(
    run: &Run,
    history: &History,
    verdict: &Verdict,
    mut measured: Extra,
) -> io::Result<()> {
    let ok = history.ops.iter().filter(|op| op.outcome == crate::history::Outcome::Ok).count();
    measured.push(("operations answered".into(), ok as f64, String::new()));
    measured.push(("run time".into(), run.clock.seconds(), "s".into()));
    let summary = Summary {
        command: run.plan.name.clone(),
        target: run.plan.target.name().into(),
        version: run.monitor.version(),
        members: run.plan.members,
        seed: run.plan.seed,
        valid: verdict.valid(),
        violations: verdict.violations.len() + verdict.findings.len(),
        measured,
        verdict: verdict.word().into(),
        faults: installed(run),
        operations: ok,
        events: events(history),
    };
    let json = serde_json::to_vec_pretty(&summary).expect("a summary is plain data");
    std::fs::write(run.dir.join("summary.json"), json)?;
    let text = text(run, history, verdict, &summary).expect("a string takes all that is written");
    std::fs::write(run.dir.join("report.md"), &text)?;
    std::fs::write(run.dir.join("timeline.html"), timeline(run, history, verdict)?)?;
    println!("\n{text}");
    println!("report in {}", run.dir.display());
    Ok(())
}

fn timeline(run: &Run, history: &History, verdict: &Verdict) -> io::Result<String> {
    let faults = run.faults.all()?;
    let remarks = [verdict.findings.clone(), verdict.gaps.clone()].concat();
    let title = format!("{}, {}, seed {}", run.plan.name, run.plan.target.name(), run.plan.seed);
    Ok(html(&Picture {
        title: &title,
        verdict: verdict.word(),
        history,
        violations: &verdict.violations,
        remarks: &remarks,
        faults: &faults,
    }))
}

fn text(
    run: &Run,
    history: &History,
    verdict: &Verdict,
    summary: &Summary,
) -> Result<String, std::fmt::Error> {
    let mut out = String::new();
    let Summary { command, target, version, members, seed, .. } = summary;
    writeln!(out, "# {command}: {target} {version}, {members} members, seed {seed}\n")?;
    writeln!(out, "Verdict: **{}**\n", verdict.word())?;
    for violation in &verdict.violations {
        writeln!(out, "- {violation}")?;
    }
    for finding in &verdict.findings {
        writeln!(out, "- {finding}")?;
    }
    for gap in &verdict.gaps {
        writeln!(out, "- not covered: {gap}")?;
    }
    writeln!(out, "\n## Measured\n")?;
    for (name, value, unit) in &summary.measured {
        writeln!(out, "- {name}: {} {unit}", number(*value))?;
    }
    let (passed, dropped) = run.fabric.counts();
    writeln!(out, "- packets carried: {passed}, dropped: {dropped}")?;
    if run.fabric.missed() > 0 {
        writeln!(out, "- packets missing from the capture: {}", run.fabric.missed())?;
    }
    writeln!(out, "\n## Steps\n")?;
    writeln!(
        out,
        "| step | from s | to s | dropped | writes acknowledged | serves again after s | leader changes in 10 s after | note |"
    )?;
    writeln!(out, "|---|---|---|---|---|---|---|---|")?;
    run.steps.with(|steps| {
        steps.iter().try_for_each(|step| {
            let recovery = step.recovery.map_or("-".into(), |seconds| format!("{seconds:.2}"));
            let changes = step.changes.map_or("-".into(), |count| count.to_string());
            let (name, from, to, note) = (&step.name, step.from, step.to, &step.note);
            let (dropped, writes) = (step.dropped, step.writes);
            writeln!(
                out,
                "| {name} | {from:.1} | {to:.1} | {dropped} | {writes} | {recovery} | {changes} | {note} |"
            )
        })
    })?;
    writeln!(out, "\n## Operations\n\n| kind | ok | fail | unknown |\n|---|---|---|---|")?;
    for (kind, [ok, fail, unknown]) in tally(history) {
        writeln!(out, "| {kind} | {ok} | {fail} | {unknown} |")?;
    }
    let streams = history
        .watches
        .iter()
        .filter(|record| matches!(record.what, WatchWhat::Started { .. }))
        .count();
    writeln!(out, "\nWatch streams: {streams}, events received: {}.", summary.events)?;
    Ok(out)
}

/// Three significant digits are more than a run on a shared machine supports.
pub(crate) fn number(value: f64) -> String {
    if value.fract() == 0.0 || value.abs() >= 1000.0 {
        format!("{value:.0}")
    } else {
        format!("{value:.3}")
    }
}
