//! `jepsen report DIR`: judges a recorded run again and draws its timeline anew.

use std::path::Path;

use crate::args::Args;
use crate::attack::FaultRecord;
use crate::check::judge;
use crate::history::{History, load_lines};
use crate::run;
use crate::timeline::{Picture, html};

pub(crate) fn run(mut args: Args) -> Result<bool, String> {
    let dir = args.word().ok_or("report needs a run directory")?;
    args.done()?;
    let dir = run::existing(&dir)?;
    let history = History::load(dir).map_err(|error| error.to_string())?;
    let faults = faults(dir)?;
    let violations = judge(&history);
    let verdict = if violations.is_empty() { "nothing violated" } else { "VIOLATED" };
    let title = dir.file_name().unwrap_or_default().to_string_lossy();
    let picture = Picture {
        title: &title,
        verdict,
        history: &history,
        violations: &violations,
        remarks: &[],
        faults: &faults,
    };
    let path = dir.join("timeline.html");
    std::fs::write(&path, html(&picture)).map_err(|error| error.to_string())?;
    violations.iter().for_each(|violation| println!("{violation}"));
    let count = history.ops.len();
    println!("{verdict}: {count} operations, {} faults, drawn in {}", faults.len(), path.display());
    Ok(violations.is_empty())
}

/// A run of an older command has none.
fn faults(dir: &Path) -> Result<Vec<FaultRecord>, String> {
    let path = dir.join("faults.jsonl");
    if !path.exists() {
        return Ok(Vec::new());
    }
    load_lines(&path).map_err(|error| error.to_string())
}
