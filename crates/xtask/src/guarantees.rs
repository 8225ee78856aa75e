//! `cargo xtask guarantees`: docs/GUARANTEES.md, made of jepsen/claims.md (what is promised and what
//! proves it) and jepsen/ledger.jsonl (what was run). Every test and variant that is named must exist;
//! `--check` says whether the document is current. It runs no test itself.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;

use serde_json::Value;

use crate::root;

const CLAIMS: &str = "jepsen/claims.md";
const LEDGER: &str = "jepsen/ledger.jsonl";
const VARIANTS: &str = "crates/storage/src/sabotage.rs";
const MUTANTS: &str = "jepsen/src/commands/mutants/table.rs";
const DOCUMENT: &str = "docs/GUARANTEES.md";

/// One promise.
#[derive(Debug, PartialEq, Eq)]
struct Claim {
    number: u32,
    promise: String,
    tests: Vec<String>,
    variants: Vec<String>,
}

pub(crate) fn run(args: &[String]) -> Result<(), String> {
    let is_check = match args {
        [] => false,
        [word] if word == "--check" => true,
        _ => return Err(format!("usage: cargo xtask guarantees [--check] (unexpected {args:?})")),
    };
    let claims = claims(&read(CLAIMS)?)?;
    let missing = missing(&claims)?;
    if !missing.is_empty() {
        return Err(format!("{CLAIMS}:\n  {}", missing.join("\n  ")));
    }
    let ledger = ledger(&read(LEDGER).unwrap_or_default())?;
    let document = document(&claims, &ledger);
    let path = root().join(DOCUMENT);
    if is_check {
        let is_current = std::fs::read_to_string(&path).is_ok_and(|found| found == document);
        let hint = format!("{DOCUMENT} is not current: run `cargo xtask guarantees`");
        return if is_current { Ok(()) } else { Err(hint) };
    }
    std::fs::write(&path, document).map_err(|error| format!("{DOCUMENT}: {error}"))
}

fn read(path: &str) -> Result<String, String> {
    std::fs::read_to_string(root().join(path)).map_err(|error| format!("{path}: {error}"))
}

/// The rows of the table of claims.
fn claims(text: &str) -> Result<Vec<Claim>, String> {
    let mut claims = Vec::new();
    for line in text.lines().filter(|line| line.starts_with("| ")) {
        let cells: Vec<&str> = line.trim_matches('|').split(" | ").map(str::trim).collect();
        let [number, promise, tests, variants] = cells[..] else {
            return Err(format!("{CLAIMS}: not four cells: {line}"));
        };
        if number == "#" {
            continue;
        }
        let number = number.parse().map_err(|_| format!("{CLAIMS}: {number:?} is no number"))?;
        let (promise, tests) = (promise.to_owned(), quoted(tests));
        claims.push(Claim { number, promise, tests, variants: quoted(variants) });
    }
    if claims.is_empty() {
        return Err(format!("{CLAIMS} has no table of claims"));
    }
    Ok(claims)
}

/// What stands between backquotes.
fn quoted(cell: &str) -> Vec<String> {
    cell.split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

/// Everything that is named and does not exist, and variants that nothing names.
fn missing(claims: &[Claim]) -> Result<Vec<String>, String> {
    let mut missing = Vec::new();
    let known = variants(&read(VARIANTS)?);
    let mutants = read(MUTANTS)?;
    let mut named = BTreeSet::new();
    for claim in claims {
        for test in &claim.tests {
            if !exists(test)? {
                missing.push(format!("claim {}: there is no test `{test}`", claim.number));
            }
        }
        for variant in &claim.variants {
            named.insert(variant.clone());
            if known.get(variant) != Some(&claim.number) {
                let text = format!("claim {}: {VARIANTS} has no `{variant}`", claim.number);
                missing.push(text);
            }
            if !mutants.contains(&format!("\"{variant}\"")) {
                missing.push(format!("`{variant}` is not in {MUTANTS}"));
            }
        }
    }
    let unnamed = known.keys().filter(|variant| !named.contains(*variant));
    missing.extend(unnamed.map(|variant| format!("variant `{variant}` proves no claim")));
    Ok(missing)
}

/// Name and claim of each row of the table of variants, as the source has it.
fn variants(source: &str) -> BTreeMap<String, u32> {
    let mut found = BTreeMap::new();
    for row in source.split("V::").skip(1) {
        let mut cells = row.splitn(4, ',').skip(1).map(str::trim);
        let (Some(name), Some(claim)) = (cells.next(), cells.next()) else { continue };
        if let Ok(claim) = claim.parse() {
            found.insert(name.trim_matches('"').to_owned(), claim);
        }
    }
    found
}

fn exists(test: &str) -> Result<bool, String> {
    let defines = |text: &str, name: &str| text.contains(&format!("fn {name}("));
    if let Some((file, name)) = test.split_once("::") {
        let file = read(&format!("tests/tests/{file}.rs"));
        return Ok(file.is_ok_and(|text| defines(&text, name)));
    }
    if let Some(path) = test.strip_prefix("script ") {
        return Ok(root().join("tests/scripts").join(path).is_file());
    }
    if let Some(words) = test.strip_prefix("jepsen ") {
        return jepsen_knows(words);
    }
    let Some((package, name)) = test.split_once(": ") else { return Ok(false) };
    let Some(folder) = package.strip_prefix("kelson-") else { return Ok(false) };
    let sources = sources(&root().join("crates").join(folder));
    Ok(sources.iter().any(|text| defines(text, name)))
}

/// Whether the command exists, and each fault that it is given.
fn jepsen_knows(words: &str) -> Result<bool, String> {
    let mut words = words.split(' ');
    let command = words.next().unwrap_or_default();
    let sources = sources(&root().join("jepsen/src"));
    let is_known = |word: &str| {
        word.starts_with("--") || sources.iter().any(|text| text.contains(&format!("\"{word}\"")))
    };
    let has_command = read("jepsen/src/main.rs")?.contains(&format!("\"{command}\" =>"));
    Ok(has_command && words.all(is_known))
}

/// All Rust files below a folder.
fn sources(folder: &std::path::Path) -> Vec<String> {
    let mut texts = Vec::new();
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            texts.extend(sources(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            texts.extend(std::fs::read_to_string(&path));
        }
    }
    texts
}

/// What runs against clusters of one size amount to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Runs {
    minutes: u64,
    episodes: u64,
    faults: u64,
    operations: u64,
    events: u64,
    /// Episodes that prove nothing, because a fault did not happen or a result is missing.
    inconclusive: u64,
    /// Lines that end with a violation.
    violated: u64,
}

/// By number of members.
type Ledger = BTreeMap<u64, Runs>;

/// Adds up the lines of the ledger that are about Kelson, as `jepsen soak` writes them; one that lacks
/// a field is an error, not zero.
fn ledger(text: &str) -> Result<Ledger, String> {
    let mut ledger = Ledger::new();
    for (number, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let lacks = |what: &str| format!("{LEDGER}, line {}: no {what}", number + 1);
        let hour: Value = serde_json::from_str(line).map_err(|error| lacks(&error.to_string()))?;
        let count = |name: &str| hour[name].as_u64().ok_or_else(|| lacks(name));
        let text = |name: &str| hour[name].as_str().ok_or_else(|| lacks(name));
        if text("target")? != "kelson" {
            continue;
        }
        let sum = ledger.entry(count("members")?).or_default();
        sum.minutes += count("minutes")?;
        sum.episodes += count("episodes")?;
        sum.faults += count("faults")?;
        sum.operations += count("operations")?;
        sum.events += count("events")?;
        sum.inconclusive += count("inconclusive")?;
        sum.violated += u64::from(text("verdict")? != "valid");
    }
    Ok(ledger)
}

fn document(claims: &[Claim], ledger: &Ledger) -> String {
    let mut out = String::from(
        "# Guarantees\n\n\
         Made by `cargo xtask guarantees` from jepsen/claims.md and jepsen/ledger.jsonl; do not edit.\n\n\
         ## What is promised\n\n\
         Behind each promise stand tests that fail if it is broken, and programs in which it is broken\n\
         on purpose, which those tests must notice (`jepsen mutants`).\n\n\
         | # | Promise | Tests | Broken on purpose as |\n|---|---|---|---|\n",
    );
    for claim in claims {
        let variants = if claim.variants.is_empty() {
            "nothing yet".to_owned()
        } else {
            claim.variants.join(", ")
        };
        let tests = match claim.tests.len() {
            0 => "none yet".to_owned(),
            number => number.to_string(),
        };
        let Claim { number, promise, .. } = claim;
        writeln!(out, "| {number} | {promise} | {tests} | {variants} |").expect("text grows");
    }
    let variants: usize = claims.iter().map(|claim| claim.variants.len()).sum();
    let unproven: Vec<String> = claims
        .iter()
        .filter(|claim| claim.tests.is_empty() || claim.variants.is_empty())
        .map(|claim| claim.number.to_string())
        .collect();
    writeln!(out, "\n{} promises, {variants} broken variants.", claims.len()).expect("text grows");
    if !unproven.is_empty() {
        let list = unproven.join(", ");
        writeln!(out, "Without a test or a variant so far: {list}. Take those as intentions.")
            .expect("text grows");
    }
    out + &runs(ledger)
}

fn runs(ledger: &Ledger) -> String {
    let mut out = String::from("\n## What was run\n\n");
    if ledger.is_empty() {
        out += "Nothing is in the ledger yet: no long run has been recorded.\n";
        return out;
    }
    out += "Real processes under faults, judged by what their clients saw (`jepsen soak`). An episode is\n\
            inconclusive if a planned fault did not happen or a result is missing; it counts for nothing.\n\
            A violation ends a run; the error behind it, and the test that guards it since, is in TESTING.md.\n\n\
            | Members | Hours | Episodes | Inconclusive | Faults | Operations | Watch events | Violations |\n\
            |---|---|---|---|---|---|---|---|\n";
    for (members, runs) in ledger {
        let Runs { minutes, episodes, faults, operations, events, inconclusive, violated } = runs;
        let hours = *minutes as f64 / 60.0;
        writeln!(
            out,
            "| {members} | {hours:.1} | {episodes} | {inconclusive} | {faults} | {operations} | \
             {events} | {violated} |"
        )
        .expect("text grows");
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROW: &str = "| 7 | It holds. | `crash::no_such_test`, `script kv/put` | `local-reads` |";

    #[test]
    fn a_row_is_taken_apart_and_checked() {
        let claims = claims(ROW).expect("a row");
        assert_eq!(claims[0].tests, ["crash::no_such_test", "script kv/put"]);
        let missing = missing(&claims).expect("the sources are there");
        let says = |text: &str| missing.iter().any(|line| line.contains(text));
        assert!(says("no test `crash::no_such_test`") && !says("kv/put"), "{missing:?}");
        assert!(says("has no `local-reads`"), "it belongs to another claim: {missing:?}");
        assert!(says("variant `skip-fsync` proves no claim"), "{missing:?}");
    }

    #[test]
    fn a_ledger_is_added_up_or_refused() {
        assert!(runs(&ledger("").expect("empty")).contains("Nothing is in the ledger"));
        let line = |target: &str, verdict: &str| {
            format!(
                r#"{{"target":"{target}","members":3,"minutes":30,"episodes":6,"faults":40,"operations":5,"events":7,"inconclusive":1,"verdict":"{verdict}"}}"#
            )
        };
        let (valid, bad) = (line("kelson", "valid"), line("kelson", "VIOLATED"));
        let other = line("etcd", "VIOLATED");
        let sum = ledger(&format!("{valid}\n{other}\n{bad}\n")).expect("three hours");
        assert_eq!((sum.len(), sum[&3].minutes, sum[&3].faults, sum[&3].violated), (1, 60, 80, 1));
        assert!(runs(&sum).contains("| 3 | 1.0 | 12 | 2 | 80 | 10 | 14 | 1 |"), "{}", runs(&sum));
        assert!(ledger(r#"{"target":"kelson","members":3}"#).is_err());
    }

    #[test]
    fn every_variant_of_the_source_is_read() {
        let known = variants(&read(VARIANTS).expect("the table"));
        assert_eq!(known.get("local-reads"), Some(&1));
        assert_eq!(known.get("events-lost-at-install"), Some(&10), "written over several lines");
        assert!(known.len() > 40, "{known:?}");
    }
}
