//! `kelson-sim turmoil`: runs seeds, each in a process of its own, so that one that aborts or hangs is a
//! violation like any other; prints what broke and how to see it again; makes schedules smaller.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::{Flaw, Report, Run, panics, simulate};
use crate::args::Args;
use crate::image::fast_dir;

/// Real time for one seed.
const PATIENCE: Duration = Duration::from_secs(120);
/// What members say in a report.
const LOG: &str = "error,kelson_raft=warn,kelson_storage=warn";
/// Runs that are spent on making one schedule smaller.
const SHRINK_RUNS: usize = 200;
/// Exit code of a child that could not do its work, which says nothing of members.
const NOT_TESTED: i32 = 2;
/// Words by which a violation tells which rule was broken.
const RULE_WORDS: usize = 4;

/// What the command line asks for.
struct Wish {
    seeds: std::ops::Range<u64>,
    run: Run,
    workers: usize,
    keep: PathBuf,
    trace: Option<PathBuf>,
    log: String,
    is_to_shrink: bool,
}

fn wish(mut args: Args) -> Result<Wish, String> {
    let seeds = match (args.take("seeds")?, args.number("seed")?) {
        (Some(_), Some(_)) => return Err("--seed and --seeds exclude each other".into()),
        (None, seed) => {
            let seed = seed.unwrap_or(1);
            seed..seed.checked_add(1).ok_or("--seed: it is the largest number, take another")?
        }
        (Some(text), None) => range(&text)?,
    };
    let members = args.number("members")?.unwrap_or(3) as usize;
    if !matches!(members, 3 | 5) {
        return Err(format!("--members {members}: it is 3 or 5"));
    }
    let without = match args.take("without")? {
        None => Vec::new(),
        Some(text) => numbers(&text)?,
    };
    let flaw = match args.take("flaw")? {
        None => None,
        Some(name) => Some(Flaw::from_name(&name).ok_or_else(|| {
            let known: Vec<&str> = Flaw::ALL.iter().map(|(name, _)| *name).collect();
            format!("--flaw {name:?}: known are {}", known.join(", "))
        })?),
    };
    let seconds = args.number("seconds")?.unwrap_or(20);
    if !(4..=3_600).contains(&seconds) {
        return Err(format!("--seconds {seconds}: it is 4 to 3600"));
    }
    let keep =
        args.take("keep")?.map_or_else(|| std::env::temp_dir().join("kelson-sim"), Into::into);
    let wish = Wish {
        run: Run { seed: seeds.start, members, seconds, without, flaw },
        seeds,
        workers: args.number("workers")?.unwrap_or(2).clamp(1, 64) as usize,
        keep,
        trace: args.take("trace")?.map(Into::into),
        log: args.take("log")?.unwrap_or_else(|| LOG.to_owned()),
        is_to_shrink: args.take_flag("shrink"),
    };
    args.done()?;
    Ok(wish)
}

fn range(text: &str) -> Result<std::ops::Range<u64>, String> {
    let ends = text
        .split_once("..")
        .and_then(|(from, to)| Some(from.parse::<u64>().ok()?..to.parse().ok()?));
    let seeds = ends.ok_or_else(|| format!("--seeds {text:?}: it is A..B, without B"))?;
    if seeds.is_empty() {
        return Err(format!("--seeds {text:?}: no seed lies in it, since B itself does not"));
    }
    Ok(seeds)
}

fn numbers(text: &str) -> Result<Vec<usize>, String> {
    let number = |word: &str| word.parse().map_err(|_| format!("{word:?} is no number"));
    text.split(',').filter(|word| !word.is_empty() && *word != "-").map(number).collect()
}

fn list(numbers: &[usize]) -> String {
    let words: Vec<String> = numbers.iter().map(ToString::to_string).collect();
    if words.is_empty() { "-".to_owned() } else { words.join(",") }
}

/// The command.
///
/// # Errors
/// Wrong words, or nothing could be run.
pub fn turmoil(args: Args) -> Result<ExitCode, String> {
    let wish = wish(args)?;
    let program = std::env::current_exe().map_err(|error| format!("find myself: {error}"))?;
    let begun = Instant::now();
    let next = AtomicU64::new(wish.seeds.start);
    let total = Mutex::new(Total::default());
    std::thread::scope(|scope| {
        let work = || loop {
            let seed = next.fetch_add(1, Ordering::SeqCst);
            if seed >= wish.seeds.end {
                return Ok::<(), String>(());
            }
            let run = Run { seed, ..wish.run.clone() };
            let report = in_a_process(&program, &run, wish.trace.as_deref(), &wish.log)?;
            total.lock().map_err(|_| "a worker panicked")?.add(&report);
            if report.violation.is_some() {
                print_violation(&wish, &run, &report)?;
                if wish.is_to_shrink {
                    shrink(&program, &run, &wish, &report)?;
                }
            }
        };
        let workers: Vec<_> = (0..wish.workers).map(|_| scope.spawn(work)).collect();
        workers
            .into_iter()
            .try_for_each(|worker| worker.join().map_err(|_| "a worker panicked".to_owned())?)
    })?;
    let total = total.into_inner().map_err(|_| "a worker panicked")?;
    let took = begun.elapsed().as_secs_f64();
    println!("{}", total.line(took));
    Ok(if total.violations == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

#[derive(Default)]
struct Total {
    seeds: u64,
    operations: u64,
    unknown: u64,
    reads: u64,
    simulated: u64,
    violations: u64,
    counts: BTreeMap<String, u64>,
}

impl Total {
    fn add(&mut self, report: &Report) {
        self.seeds += 1;
        self.operations += report.operations;
        self.unknown += report.unknown;
        self.reads += report.reads;
        self.simulated += report.simulated;
        self.violations += u64::from(report.violation.is_some());
        for (kind, count) in &report.counts {
            *self.counts.entry(kind.clone()).or_default() += count;
        }
    }

    fn line(&self, took: f64) -> String {
        let faults: u64 = self.counts.values().sum();
        let kinds: Vec<String> =
            self.counts.iter().map(|(kind, count)| format!("{kind} {count}")).collect();
        format!(
            "seeds {}, operations {} ({} unknown, {} linearizable reads), simulated {} s, faults \
             {faults} ({}), violations {}, {took:.1} s",
            self.seeds,
            self.operations,
            self.unknown,
            self.reads,
            self.simulated / 1_000,
            kinds.join(", "),
            self.violations
        )
    }
}

fn again(run: &Run) -> String {
    // The children have it from this process, and whoever sees it again needs it, too.
    let mut text = match kelson_storage::sabotage::check() {
        Ok(Some(variant)) => format!("KELSON_SABOTAGE={variant} "),
        _ => String::new(),
    };
    text += &format!(
        "kelson-sim turmoil --seed {} --members {} --seconds {}",
        run.seed, run.members, run.seconds
    );
    if !run.without.is_empty() {
        text += &format!(" --without {}", list(&run.without));
    }
    if let Some(flaw) = run.flaw {
        text += &format!(" --flaw {}", flaw.name());
    }
    text
}

fn print_violation(wish: &Wish, run: &Run, report: &Report) -> Result<(), String> {
    let mut text = String::new();
    let violation = report.violation.as_deref().unwrap_or_default();
    // Writing to a string does not fail.
    let _ = writeln!(text, "VIOLATION seed {}: {violation}", run.seed);
    for line in &report.lines {
        let _ = writeln!(text, "    {line}");
    }
    let _ = write!(text, "  again: {}", again(run));
    println!("{text}");
    let io = |error: std::io::Error| format!("keep what was found: {error}");
    fs::create_dir_all(&wish.keep).map_err(io)?;
    let path = wish.keep.join(format!("seed-{}", run.seed));
    let steps: String = run.steps().iter().map(|step| format!("{step}\n")).collect();
    fs::write(&path, format!("{text}\n\n{steps}\n{}", report.trace)).map_err(io)?;
    println!("  trace: {}", path.display());
    Ok(())
}

/// The rule that a violation speaks of: its first words, without numbers and names of members and keys,
/// which are other ones in another schedule.
fn rule(report: &Report) -> Vec<&str> {
    let words = report.violation.as_deref().unwrap_or_default().split_whitespace();
    let words = words.filter(|word| !word.contains(|it: char| it.is_ascii_digit()));
    words.take(RULE_WORDS).collect()
}

/// Leaves faults out as long as what is left still breaks the same rule: halves first, then smaller
/// parts.
fn shrink(program: &Path, run: &Run, wish: &Wish, found: &Report) -> Result<(), String> {
    let count = super::schedule::draw(run.seed, run.members, run.seconds).len();
    let mut kept: Vec<usize> = (0..count).filter(|at| !run.without.contains(at)).collect();
    let (mut parts, mut runs) = (2, 0);
    let without = |kept: &[usize]| (0..count).filter(|at| !kept.contains(at)).collect();
    while kept.len() > 1 && runs < SHRINK_RUNS {
        let size = kept.len().div_ceil(parts);
        let mut smaller = None;
        for at in (0..kept.len()).step_by(size) {
            let rest: Vec<usize> =
                kept[..at].iter().chain(&kept[(at + size).min(kept.len())..]).copied().collect();
            let tried = Run { without: without(&rest), ..run.clone() };
            runs += 1;
            if rule(&in_a_process(program, &tried, None, &wish.log)?) == rule(found) {
                smaller = Some(rest);
                break;
            }
        }
        match smaller {
            Some(rest) => (kept, parts) = (rest, 2.max(parts - 1)),
            None if size == 1 => break,
            None => parts = (parts * 2).min(kept.len()),
        }
    }
    let small = Run { without: without(&kept), ..run.clone() };
    println!("  smallest schedule that still fails, of {count} faults, in {runs} runs:");
    for step in small.steps() {
        println!("    {step}");
    }
    println!("  again: {}", again(&small));
    Ok(())
}

/// Runs a seed in a child.
fn in_a_process(
    program: &Path,
    run: &Run,
    trace: Option<&Path>,
    log: &str,
) -> Result<Report, String> {
    let io = |error: std::io::Error| format!("run seed {}: {error}", run.seed);
    let home = tempfile::tempdir_in(fast_dir()).map_err(io)?;
    let own_trace = home.path().join("trace");
    let errors = home.path().join("errors");
    let mut child = Command::new(program)
        .arg("cluster")
        .args([run.seed, run.members as u64, run.seconds].map(|number| number.to_string()))
        .arg(list(&run.without))
        .arg(run.flaw.map_or("-", Flaw::name))
        .arg(home.path())
        .env("KELSON_SIM_LOG", log)
        .env("RUST_BACKTRACE", "1")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(File::create(&errors).map_err(io)?)
        .spawn()
        .map_err(io)?;
    let begun = Instant::now();
    let ended = loop {
        if let Some(status) = child.try_wait().map_err(io)? {
            break Some(status);
        }
        if begun.elapsed() > PATIENCE {
            child.kill().and_then(|()| child.wait()).map_err(io)?;
            break None;
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    let reported = fs::read_to_string(home.path().join("report"));
    let has_reported = reported.is_ok();
    let mut report = parse(&reported.unwrap_or_default());
    report.trace = fs::read_to_string(&own_trace).unwrap_or_default();
    let said = fs::read_to_string(&errors).unwrap_or_default();
    if ended.and_then(|status| status.code()) == Some(NOT_TESTED) {
        let last = said.lines().last().unwrap_or_default();
        return Err(format!("seed {} could not be run: {last}", run.seed));
    }
    let broken = match ended {
        None => Some(format!("it did not end within {} s", PATIENCE.as_secs())),
        Some(status) if !status.success() => Some(format!("the process ended: {status}")),
        Some(_) if !has_reported => Some("the process ended without a report".to_owned()),
        Some(_) => None,
    };
    if let Some(text) = broken {
        report.violation = Some(text);
        let lines = said.lines().rev().take(30).map(ToOwned::to_owned);
        report.lines = lines.collect::<Vec<_>>().into_iter().rev().collect();
    }
    if report.violation.is_some() {
        report.trace += &said;
    }
    if let Some(path) = trace {
        fs::write(path, &report.trace).map_err(io)?;
        if log != LOG {
            eprint!("{said}");
        }
    }
    Ok(report)
}

/// The child: one seed, and then the process ends.
///
/// # Errors
/// Wrong words, or the report could not be written.
pub fn cluster(words: &[String]) -> Result<ExitCode, String> {
    let [seed, members, seconds, without, flaw, home] = words else {
        return Err("a cluster takes six words".to_owned());
    };
    let number = |text: &String| text.parse::<u64>().map_err(|_| format!("{text:?} is no number"));
    let run = Run {
        seed: number(seed)?,
        members: number(members)? as usize,
        seconds: number(seconds)?,
        without: numbers(without)?,
        flaw: Flaw::from_name(flaw),
    };
    let log = std::env::var("KELSON_SIM_LOG").unwrap_or_else(|_| LOG.to_owned());
    tracing_subscriber::fmt()
        .with_ansi(false)
        .with_writer(std::io::stderr)
        .with_env_filter(log)
        .init();
    let home = Path::new(home);
    panics::watch();
    let mut report = simulate(&run, home).unwrap_or_else(|text| Report {
        violation: Some(panics::first().unwrap_or(text)),
        ..Report::default()
    });
    // In the very end, when nobody looked any more.
    report.violation = report.violation.or_else(panics::first);
    let io = |error: std::io::Error| format!("write the report: {error}");
    fs::write(home.join("trace"), &report.trace).map_err(io)?;
    fs::write(home.join("report"), text_of(&report)).map_err(io)?;
    // Members still run; their threads go with the process.
    std::process::exit(0)
}

fn text_of(report: &Report) -> String {
    let mut text = format!(
        "operations {}\nunknown {}\nreads {}\nsimulated {}\n",
        report.operations, report.unknown, report.reads, report.simulated
    );
    for (kind, count) in &report.counts {
        text += &format!("fault {kind} {count}\n");
    }
    for line in &report.lines {
        text += &format!("line {line}\n");
    }
    if let Some(violation) = &report.violation {
        text += &format!("violation {}\n", violation.replace('\n', " "));
    }
    text
}

fn parse(text: &str) -> Report {
    let mut report = Report::default();
    for line in text.lines() {
        let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
        let number = || rest.parse().unwrap_or(0);
        match word {
            "operations" => report.operations = number(),
            "unknown" => report.unknown = number(),
            "reads" => report.reads = number(),
            "simulated" => report.simulated = number(),
            "line" => report.lines.push(rest.to_owned()),
            "violation" => report.violation = Some(rest.to_owned()),
            "fault" => {
                let (kind, count) = rest.split_once(' ').unwrap_or((rest, "0"));
                report.counts.insert(kind.to_owned(), count.parse().unwrap_or(0));
            }
            _ => {}
        }
    }
    report
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(violation: &str) -> Report {
        Report { violation: Some(violation.to_owned()), ..Report::default() }
    }

    #[test]
    fn a_rule_is_known_by_its_words() {
        let found = report("member 2 does not start: the log ends at 7");
        assert_eq!(rule(&found), ["member", "does", "not", "start:"]);
        assert_eq!(rule(&found), rule(&report("member 0 does not start: segment 3 is torn")));
        assert_ne!(rule(&found), rule(&report("member 2 went back: 7, then 6")));
        assert_ne!(rule(&found), rule(&Report::default()));
        let lost = report("revision 9 was k1=4:xxx, k2=4:xxx and is k1=4:xxx on m1");
        assert_eq!(rule(&lost), ["revision", "was", "and", "is"]);
    }

    #[test]
    fn a_child_that_could_not_do_its_work_says_nothing_of_members() {
        let run = Run { seed: 1, members: 3, seconds: 4, without: Vec::new(), flaw: None };
        let run = |program: &str| in_a_process(Path::new(program), &run, None, LOG);
        // These words are nothing that could be tested, which ends this program with 2.
        let refused = run("test").expect_err("it tested nothing");
        assert!(refused.contains("seed 1 could not be run: "), "{refused}");
        for (program, text) in [("false", "ended: exit status: 1"), ("true", "without a report")] {
            let ended = run(program).expect("it ran").violation.expect("it reported nothing");
            assert!(ended.contains(text), "{program}: {ended}");
        }
    }
}
