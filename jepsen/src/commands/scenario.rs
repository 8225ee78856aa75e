//! `jepsen scenario`: one directed scenario, or all of them, each in a process of its own.

use std::io;

use kelson_image::Kind;

use super::matrix::episode;
use crate::args::Args;
use crate::capture::{CAPTURE, Capture};
use crate::cluster::Target;
use crate::history::SPARSE;
use crate::page;
use crate::run::{Plan, Run, Verdict, inside};
use crate::scenario::Scenario;
use crate::workload::Shape;

pub(crate) fn run(mut args: Args) -> Result<bool, String> {
    // Names come first, before any option.
    let names: Vec<String> = std::iter::from_fn(|| args.leading()).collect();
    let plan = Plan::from_args("scenario", &mut args)?;
    let (rate, is_old) = (args.number("rate", Shape::default().rate)?, args.switch("old-etcd"));
    args.done()?;
    let chosen: Result<Vec<Scenario>, String> =
        names.iter().map(|name| Scenario::named(name)).collect();
    match chosen?.as_slice() {
        [one] => play(plan, *one, rate, is_old),
        _ if is_old || rate != Shape::default().rate => {
            Err("--rate and --old-etcd are for one scenario".into())
        }
        [] => several(&plan, &Scenario::all()),
        some => several(&plan, some),
    }
}

/// With `is_old` the members get none of the flags that etcd before 3.6 refuses; it keeps 5,000 entries
/// whatever is asked of it, so such a scenario needs more load.
fn play(mut plan: Plan, scenario: Scenario, rate: u64, is_old: bool) -> Result<bool, String> {
    plan.name = format!("scenario-{}", scenario.name());
    if let Some(reason) = scenario.impossible(&plan) {
        return Err(format!("{}: {reason}", scenario.name()));
    }
    plan.spare = 2;
    let workload = scenario.workload();
    let little_log = scenario.flags().iter().filter(|flag| !(is_old && flag.contains("catchup")));
    let flags = little_log.chain(workload.flags());
    plan.extra.extend(flags.map(|flag| (*flag).to_owned()));
    if scenario.needs_image() {
        plan.disk = Some(if plan.seed.is_multiple_of(2) { Kind::Ext4 } else { Kind::Xfs });
    }
    if scenario.needs_page() && plan.target == Target::Kelson {
        plan.shim = Some(page::library()?);
    }
    let verdict = inside(&plan.clone(), async |fabric| {
        let run = Run::start(plan, fabric).await?;
        run.fabric.capture(Capture::create(&run.dir.join(CAPTURE))?);
        if scenario.sparse() {
            std::fs::write(run.dir.join(SPARSE), "")?;
        }
        run.begin(Shape { workload, rate, ..Shape::default() });
        staged(&run, scenario).await
    });
    verdict.map_err(|error| error.to_string())?.end()
}

async fn staged(run: &Run, scenario: Scenario) -> io::Result<Verdict> {
    run.say(&format!("{}: {}", scenario.name(), scenario.claim()));
    tokio::time::sleep(std::time::Duration::from_secs(3)).await;
    if let Err(error) = scenario.play(run).await {
        run.gap(format!("{}: {error}", scenario.name()));
    }
    tokio::time::sleep(std::time::Duration::from_secs(1)).await;
    run.finish(Vec::new()).await
}

/// Each in a process of its own, and a table.
pub(super) fn several(plan: &Plan, scenarios: &[Scenario]) -> Result<bool, String> {
    let named = format!("scenarios-{}-{}", plan.target.name(), plan.seed);
    let dir = plan.into.clone().unwrap_or_else(|| plan.store.join(named));
    let (mut table, mut good) =
        (String::from("| scenario | claim | verdict |\n|---|---|---|\n"), true);
    for scenario in scenarios {
        let verdict = match scenario.impossible(plan) {
            Some(reason) => format!("left out: {reason}"),
            None => {
                let seed = plan.seed.to_string();
                let words = ["scenario", scenario.name(), "--seed", &seed].map(str::to_owned);
                let summary = episode(plan, &words, &dir.join(scenario.name()))?;
                good &= summary.as_ref().is_some_and(|summary| summary.valid);
                summary.map_or("no result".into(), |summary| summary.verdict)
            }
        };
        table += &format!("| {} | {} | {verdict} |\n", scenario.name(), scenario.claim());
    }
    println!("\n{table}");
    std::fs::create_dir_all(&dir).map_err(|error| error.to_string())?;
    std::fs::write(dir.join("scenarios.md"), table).map_err(|error| error.to_string())?;
    Ok(good)
}
