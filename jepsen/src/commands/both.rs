//! `jepsen both COMMAND`: the same command with the same seed against etcd and then Kelson, each in
//! a process of its own so that neither inherits anything, and a table of what they measured.

use std::path::Path;
use std::process::Command;

use crate::args::Args;
use crate::report::{Summary, number};
use crate::sys;

pub(crate) fn run(mut args: Args) -> Result<bool, String> {
    let command = args.word().ok_or("both needs a command: failover, smoke or replace")?;
    let seed = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(1, |since| since.as_millis() as u64);
    let seed = args.number("seed", seed)?;
    let default = std::env::temp_dir().join("kelson-jepsen").display().to_string();
    let store = args.text("store", &default)?;
    let bins = [args.text("etcd-bin", "")?, args.text("kelson-bin", "")?];
    let rest = args.rest();
    let program = std::env::current_exe().map_err(|error| error.to_string())?;
    let mut summaries = Vec::new();
    for (target, bin) in ["etcd", "kelson"].into_iter().zip(bins) {
        let mut child = Command::new(&program);
        child.args([&command, "--target", target, "--store", &store]).args(&rest);
        child.args(["--seed", &seed.to_string()]);
        if !bin.is_empty() {
            child.args(["--bin", &bin]);
        }
        sys::tie(&mut child);
        let status = child.status().map_err(|error| error.to_string())?;
        let dir = Path::new(&store).join(format!("{command}-{target}-{seed}"));
        let summary = std::fs::read(dir.join("summary.json"))
            .map_err(|error| format!("{target} left no summary ({status}): {error}"))?;
        let summary = serde_json::from_slice(&summary).map_err(|error| error.to_string())?;
        summaries.push(summary);
    }
    let table = table(&summaries);
    println!("\n{table}");
    let path = Path::new(&store).join(format!("{command}-both-{seed}.md"));
    std::fs::write(&path, table).map_err(|error| error.to_string())?;
    println!("table in {}", path.display());
    Ok(summaries.iter().all(|summary| summary.valid))
}

fn table(summaries: &[Summary]) -> String {
    let row = |cells: Vec<String>| format!("| {} |\n", cells.join(" | "));
    let line = |name: &str, cell: &dyn Fn(&Summary) -> String| {
        row(std::iter::once(name.to_owned()).chain(summaries.iter().map(cell)).collect())
    };
    let mut out = line("", &|one| format!("{} {}", one.target, one.version));
    out += &line("---", &|_| "---".into());
    out += &line("members", &|one| one.members.to_string());
    out += &line("verdict", &|one| if one.valid { "valid" } else { "VIOLATED" }.into());
    let Some(first) = summaries.first() else { return out };
    for (name, _, unit) in &first.measured {
        out += &line(name, &|one| {
            let found = one.measured.iter().find(|(other, ..)| other == name);
            found.map_or("-".into(), |(_, value, _)| format!("{} {unit}", number(*value)))
        });
    }
    out
}
