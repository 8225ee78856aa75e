//! `jepsen mutants`: shows that the tests can fail. For each broken variant of the sabotage build (see
//! crates/storage/src/sabotage.rs) it runs the test that must notice, first without a variant, when the
//! test must pass, then with it, when it must not. A variant that survives is a hole in the tests. It
//! builds the tests but not the binary, and judges nothing itself: the tests do.

mod table;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process_group};

use crate::args::Args;
use crate::sys;
use table::{MUTANTS, Mutant, Test};

/// Tells a member what to break.
const VARIABLE: &str = "KELSON_SABOTAGE";
/// A test that takes longer has not noticed anything.
const LIMIT: Duration = Duration::from_secs(240);
/// How often a test is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// Tests that repeat themselves need not do so for as long as usual.
const SHORTER: [(&str, &str); 2] = [("KELSON_CRASH_ROUNDS", "6"), ("KELSON_POWER_ROUNDS", "4")];

/// What became of one run of a test.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Passed,
    Failed,
    /// It could not be run, or was given up.
    Useless,
}

/// A line of the result.
struct Row {
    variant: &'static str,
    claim: String,
    test: String,
    verdict: &'static str,
    seconds: f64,
}

pub(crate) fn run(mut args: Args) -> Result<bool, String> {
    let root = root();
    let bin = root.join("target/sabotage/kelson").display().to_string();
    let bin = PathBuf::from(args.text("bin", &bin)?);
    let store = std::env::temp_dir().join("kelson-mutants").display().to_string();
    let store = PathBuf::from(args.text("store", &store)?);
    let only = args.many("only");
    args.done()?;
    if !rustix::process::geteuid().is_root() {
        // Tests that cannot cut power say so and pass: variants would survive for that reason.
        return Err(
            "mutants needs root: some tests make networks, or cut the power of a disk".into()
        );
    }
    let claims = claims(&bin)?;
    let chosen = chosen(&only)?;
    std::fs::create_dir_all(&store).map_err(|error| format!("{}: {error}", store.display()))?;
    let runner = Runner { executables: executables(&root)?, bin, store };
    let rows = runner.all(&chosen, &claims);
    let table = report(&rows);
    println!("\n{table}");
    let path = runner.store.join("mutants.md");
    std::fs::write(&path, table).map_err(|error| format!("{}: {error}", path.display()))?;
    println!("table in {}; what the tests said lies beside it", path.display());
    Ok(rows.iter().all(|row| row.verdict == "caught"))
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("jepsen/ lies in the root").to_owned()
}

/// The claim that each variant of the binary breaks. The table must name exactly these variants.
fn claims(bin: &Path) -> Result<BTreeMap<String, String>, String> {
    let hint = "build it with `cargo xtask sabotage`";
    let asked = Command::new(bin).arg("--version").env(VARIABLE, "?").output();
    let output = asked.map_err(|error| format!("{}: {error}; {hint}", bin.display()))?;
    if output.status.success() {
        return Err(format!("{} is no sabotage build; {hint}", bin.display()));
    }
    let list = String::from_utf8_lossy(&output.stderr);
    let words = list.lines().skip(1).map(str::split_whitespace);
    let pair = |mut words: std::str::SplitWhitespace<'_>| {
        Some((words.next()?.to_owned(), words.next()?.to_owned()))
    };
    let claims: BTreeMap<String, String> = words.filter_map(pair).collect();
    let known: BTreeSet<&str> = MUTANTS.iter().map(|mutant| mutant.variant).collect();
    let has: BTreeSet<&str> = claims.keys().map(String::as_str).collect();
    if known != has || known.len() != MUTANTS.len() {
        let differ: Vec<&&str> = known.symmetric_difference(&has).collect();
        return Err(format!("the table of mutants and {} differ: {differ:?}", bin.display()));
    }
    Ok(claims)
}

fn chosen(only: &[String]) -> Result<Vec<Mutant>, String> {
    let known = |name: &&String| MUTANTS.iter().any(|mutant| mutant.variant == **name);
    if let Some(stray) = only.iter().find(|name| !known(name)) {
        return Err(format!("--only {stray}: there is no such variant"));
    }
    let wanted = |mutant: &&Mutant| only.is_empty() || only.iter().any(|n| n == mutant.variant);
    Ok(MUTANTS.iter().filter(wanted).copied().collect())
}

/// The programs of the integration tests by name, built if need be.
fn executables(root: &Path) -> Result<BTreeMap<String, PathBuf>, String> {
    let mut cargo = Command::new("cargo");
    cargo.args(["test", "--no-run", "--package", "kelson-tests", "--message-format", "json"]);
    let built = cargo.current_dir(root).stderr(Stdio::inherit()).output();
    let built = built.map_err(|error| format!("cargo: {error}"))?;
    if !built.status.success() {
        return Err(format!("the tests cannot be built: {}", built.status));
    }
    let mut found = BTreeMap::new();
    for line in String::from_utf8_lossy(&built.stdout).lines() {
        let Ok(message) = serde_json::from_str::<serde_json::Value>(line) else { continue };
        let (target, program) = (&message["target"], &message["executable"]);
        let is_program = target["kind"][0] == "test" || message["profile"]["test"] == false;
        if let (true, Some(name), Some(path)) =
            (is_program, target["name"].as_str(), program.as_str())
        {
            // The golden scripts are run by the program, for it takes names; the test has them all.
            let kind = target["kind"][0].as_str().unwrap_or_default();
            found.insert(format!("{kind}/{name}"), PathBuf::from(path));
        }
    }
    Ok(found)
}

struct Runner {
    executables: BTreeMap<String, PathBuf>,
    bin: PathBuf,
    store: PathBuf,
}

impl Runner {
    fn all(&self, chosen: &[Mutant], claims: &BTreeMap<String, String>) -> Vec<Row> {
        let mut sound: BTreeMap<Test, End> = BTreeMap::new();
        let mut rows = Vec::new();
        for Mutant { variant, test } in chosen {
            let whole = *sound.entry(*test).or_insert_with(|| {
                let (end, seconds) = self.one(test, "");
                println!("{:26} {end:?} after {seconds:.1} s: {}", "(nothing broken)", name(test));
                end
            });
            let (verdict, seconds) = match whole {
                End::Passed => {
                    let (end, seconds) = self.one(test, variant);
                    (verdict(end), seconds)
                }
                End::Failed => ("NOT TRIED: the test fails on what is whole", 0.0),
                End::Useless => ("NOT TRIED: the test cannot be run", 0.0),
            };
            println!("{variant:26} {verdict} after {seconds:.1} s: {}", name(test));
            let claim = claims[*variant].clone();
            rows.push(Row { variant, claim, test: name(test), verdict, seconds });
        }
        rows
    }

    /// Runs a test with a variant (empty = none); what it says goes into a file.
    fn one(&self, test: &Test, variant: &str) -> (End, f64) {
        let begun = Instant::now();
        let end = self.start(test, variant).and_then(|child| wait(child, begun + LIMIT));
        let end = end.unwrap_or_else(|error| {
            println!("{}: {error}", name(test));
            End::Useless
        });
        (end, begun.elapsed().as_secs_f64())
    }

    fn start(&self, test: &Test, variant: &str) -> io::Result<Child> {
        let mut command = self.command(test)?;
        let label = if variant.is_empty() { "whole" } else { variant };
        let file: String =
            name(test).chars().map(|c| if c.is_alphanumeric() { c } else { '-' }).collect();
        let out = File::create(self.store.join(format!("{label}.{file}.txt")))?;
        command.envs(SHORTER).env("KELSON_BIN", &self.bin).env(VARIABLE, variant);
        command.stdin(Stdio::null()).stdout(out.try_clone()?).stderr(out);
        sys::tie(&mut command);
        command.process_group(0);
        command.spawn()
    }

    fn command(&self, test: &Test) -> io::Result<Command> {
        let program = |name: String| {
            let found = self.executables.get(&name);
            found.ok_or_else(|| io::Error::other(format!("cargo built no {name}")))
        };
        Ok(match test {
            Test::Script(script) => {
                let mut command = Command::new(program("bin/golden".into())?);
                command.arg(&self.bin).arg(script);
                command
            }
            Test::Cargo(file, name) => {
                let mut command = Command::new(program(format!("test/{file}"))?);
                command.args(["--exact", "--include-ignored", name]);
                command
            }
            Test::Jepsen(words) => {
                let mut command = Command::new(std::env::current_exe()?);
                command.args(*words).arg("--bin").arg(&self.bin);
                command.arg("--store").arg(self.store.join("runs"));
                command
            }
            Test::Sim(seeds) => {
                let mut command = Command::new(self.bin.with_file_name("kelson-sim"));
                command.args(["turmoil", "--seeds", seeds, "--keep"]).arg(self.store.join("sim"));
                command
            }
        })
    }
}

fn name(test: &Test) -> String {
    match test {
        Test::Script(script) => format!("golden {script}"),
        Test::Cargo(file, name) => format!("{file} {name}"),
        Test::Jepsen(words) => format!("jepsen {}", words.join(" ")),
        Test::Sim(seeds) => format!("kelson-sim turmoil --seeds {seeds}"),
    }
}

/// Waits for a test until its time is up.
fn wait(mut child: Child, until: Instant) -> io::Result<End> {
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(match status.code() {
                Some(0) => End::Passed,
                // Our own commands say 2 if nothing could be tested.
                Some(2) | None => End::Useless,
                Some(_) => End::Failed,
            });
        }
        if Instant::now() >= until {
            // Its members with it: they are of its group.
            kill_process_group(Pid::from_child(&child), Signal::KILL)?;
            child.wait()?;
            return Ok(End::Useless);
        }
        std::thread::sleep(LOOK_EVERY);
    }
}

fn verdict(end: End) -> &'static str {
    match end {
        End::Failed => "caught",
        End::Passed => "SURVIVED",
        End::Useless => "GIVEN UP",
    }
}

fn report(rows: &[Row]) -> String {
    let mut out = String::from("| variant | claim | test | verdict | seconds |\n");
    out += "|---|---|---|---|---|\n";
    for Row { variant, claim, test, verdict, seconds } in rows {
        out += &format!("| {variant} | {claim} | {test} | {verdict} | {seconds:.1} |\n");
    }
    let caught = rows.iter().filter(|row| row.verdict == "caught").count();
    out + &format!("\n{caught} of {} caught\n", rows.len())
}
