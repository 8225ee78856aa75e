//! `kelson-sim`: the command line of the enumeration and of the simulated clusters. The commands
//! `member`, `worker` and `cluster` are for the processes that it starts itself.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use kelson_sim::args::Args;
use kelson_sim::cluster::command;
use kelson_sim::cuts::{Choice, Only};
use kelson_sim::enumerate::{self, Extent, Report, Violation};
use kelson_sim::plan::Scale;
use kelson_sim::recover::Sabotage;
use kelson_sim::trace::{self, Call};
use kelson_sim::worker::{self, Task};
use kelson_sim::{image, run};

const USAGE: &str = "\
usage: kelson-sim crash-points [--operations 1000] [--seed 1] [--subsets 1] [--only kill|power]
                               [--from CALL] [--to CALL] [--cut NAME] [--trace FILE]
                               [--workers 2] [--keep DIR]
  Records a run of one member, cuts it after every storage call, starts a member on what is left, and
  judges it. --trace cuts a trace that an earlier enumeration kept, with the seed and the number of
  operations of that one.

       kelson-sim turmoil [--seed 1 | --seeds A..B] [--members 3|5] [--seconds 20] [--workers 2]
                          [--without STEP,...] [--shrink]
                          [--flaw no-sync|early-ack|local-reads|panic]
                          [--trace FILE] [--log FILTER] [--keep DIR]
  Runs clusters of whole members on a simulated network, disk and clock, one for each seed, under faults
  that the seed draws, heals them, and judges what clients and members showed. --without leaves steps of
  the schedule out, --shrink looks for the fewest that break the same rule, --flaw plants an error.

  Exit code 0: nothing was found; 1: violations; 2: nothing could be tested.";

#[allow(unsafe_code, reason = "the variable of this process has no safe form")]
fn main() -> ExitCode {
    // The storage engine would run `sync`, which makes durable what other tests on the machine count on
    // not to be. SAFETY: nothing was started yet; no other thread could read the environment.
    unsafe { std::env::set_var("PATH", "/dev/null") };
    let mut words = std::env::args().skip(1);
    let word = kelson_storage::sabotage::check().map(|_| words.next());
    let outcome = word.and_then(|word| run_command(word.as_deref(), words));
    outcome.unwrap_or_else(|text| {
        eprintln!("kelson-sim: {text}");
        ExitCode::from(2)
    })
}

fn run_command(
    word: Option<&str>,
    words: std::iter::Skip<std::env::Args>,
) -> Result<ExitCode, String> {
    match word {
        Some("crash-points") => crash_points(Args::new(words)),
        Some("member") => member(&words.collect::<Vec<_>>()),
        Some("turmoil") => command::turmoil(Args::new(words)),
        Some("cluster") => command::cluster(&words.collect::<Vec<_>>()),
        Some("worker") => work(&words.collect::<Vec<_>>()),
        _ => Err(USAGE.to_owned()),
    }
}

/// The recorded process.
fn member(words: &[String]) -> Result<ExitCode, String> {
    let [dir, marks, from, seed, operations] = words else { return Err(USAGE.to_owned()) };
    let number = |text: &String| text.parse::<u64>().map_err(|_| format!("{text:?} is no number"));
    let scale = Scale { seed: number(seed)?, operations: number(operations)? as usize };
    let code = run::run(Path::new(dir), Path::new(marks), scale, number(from)? as usize)?;
    // Nothing is shut down: a process that dies by plan has no time for it.
    std::process::exit(i32::from(code))
}

fn work(words: &[String]) -> Result<ExitCode, String> {
    tracing_subscriber::fmt().with_writer(std::io::stderr).with_env_filter("warn").init();
    worker::serve(Task::from_words(words)?)?;
    Ok(ExitCode::SUCCESS)
}

/// What the command line asks for.
struct Wish {
    scale: Scale,
    choice: Choice,
    from: Option<u64>,
    to: Option<u64>,
    trace: Option<PathBuf>,
    workers: usize,
    keep: PathBuf,
}

fn wish(mut args: Args) -> Result<Wish, String> {
    let operations = args.number("operations")?.unwrap_or(1_000);
    let scale = Scale { seed: args.number("seed")?.unwrap_or(1), operations: operations as usize };
    let only = match args.take("only")?.as_deref() {
        None => Only::All,
        Some("kill") => Only::Kill,
        Some("power") => Only::Power,
        Some(other) => return Err(format!("--only {other:?}: it is kill or power")),
    };
    let subsets = args.number("subsets")?.unwrap_or(1);
    let choice = Choice { only, subsets, one: args.take("cut")? };
    let keep =
        args.take("keep")?.map_or_else(|| std::env::temp_dir().join("kelson-sim"), Into::into);
    let wish = Wish {
        scale,
        choice,
        from: args.number("from")?,
        to: args.number("to")?,
        trace: args.take("trace")?.map(Into::into),
        workers: args.number("workers")?.unwrap_or(2).clamp(1, 64) as usize,
        keep,
    };
    args.done()?;
    if wish.choice.at(0, 0).is_empty() {
        let known = "kill, kill-within, power-none, power-all, power-some-0 and so on";
        return Err(format!("--cut: there is no such cut; known are {known}"));
    }
    Ok(wish)
}

fn crash_points(args: Args) -> Result<ExitCode, String> {
    let wish = wish(args)?;
    let program = std::env::current_exe().map_err(|error| format!("find myself: {error}"))?;
    let begun = Instant::now();
    let calls = match &wish.trace {
        Some(path) => trace::load(path)?,
        None => enumerate::record(&program, wish.scale)?,
    };
    let recorded = begun.elapsed().as_secs_f64();
    let home = tempfile::tempdir_in(image::fast_dir()).map_err(|error| error.to_string())?;
    let task = Task {
        home: home.path().to_owned(),
        scale: wish.scale,
        choice: wish.choice.clone(),
        sabotage: Sabotage::default(),
    };
    enumerate::prepare(&task, &calls)?;
    let extent = extent(&wish, &calls)?;
    let progress = |left: usize| {
        if left.is_multiple_of(960) {
            eprintln!("{left} calls left, {} s", begun.elapsed().as_secs());
        }
    };
    let begun_cuts = Instant::now();
    let report = enumerate::enumerate(&program, &task, extent, &progress)?;
    if report.cuts.is_empty() {
        return Err("no cut was made: nothing of this kind can be cut off at these places".into());
    }
    print_calls(&wish, &calls, recorded);
    let took = begun_cuts.elapsed().as_secs_f64();
    let cuts: Vec<String> =
        report.cuts.iter().map(|(name, count)| format!("{name} {count}")).collect();
    let (count, images) = (report.cut_count(), report.images);
    println!("cuts {count} ({}), different images {images}, {took:.1} s", cuts.join(", "));
    keep_violations(&wish, &task, &calls, &report)?;
    Ok(if report.violations.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn extent(wish: &Wish, calls: &[Call]) -> Result<Extent, String> {
    let all = Extent::all(calls, wish.workers);
    let from = wish.from.map_or(all.places.0, |from| from as usize);
    let to = wish.to.map_or(all.places.1, |to| to as usize);
    if from > to || to > all.places.1 {
        return Err(format!("--from {from} --to {to}: the run has {} calls", all.places.1));
    }
    Ok(Extent { places: (from, to), ..all })
}

fn print_calls(wish: &Wish, calls: &[Call], recorded: f64) {
    let Scale { seed, operations } = wish.scale;
    println!("seed {seed}, {operations} operations, recorded in {recorded:.1} s");
    for (kind, count) in enumerate::kinds(calls) {
        println!("{count:>8}  {kind}");
    }
    println!("{:>8}  calls", calls.len());
}

/// Prints what is wrong and keeps what is needed to see it again.
fn keep_violations(
    wish: &Wish,
    task: &Task,
    calls: &[Call],
    report: &Report,
) -> Result<(), String> {
    if report.violations.is_empty() {
        println!("no violation");
        return Ok(());
    }
    let io = |error: std::io::Error| format!("keep what was found: {error}");
    std::fs::create_dir_all(&wish.keep).map_err(io)?;
    let home = tempfile::Builder::new().prefix("run-").tempdir_in(&wish.keep).map_err(io)?.keep();
    let kept_trace = home.join("trace");
    trace::save(&kept_trace, calls).map_err(io)?;
    for violation in &report.violations {
        print_violation(wish, calls, violation, &kept_trace);
        let dir = home.join(format!("{}-{}", violation.place, violation.cut));
        enumerate::keep(task, calls, violation, &dir)?;
        println!("  files as the cut left them: {}", dir.display());
    }
    let more = if report.gave_up { ", and then it gave up" } else { "" };
    println!("{} violations{more}", report.violations.len());
    Ok(())
}

fn print_violation(wish: &Wish, calls: &[Call], violation: &Violation, trace: &Path) {
    let Violation { place, cut, text } = violation;
    let Scale { seed, operations } = wish.scale;
    let call = |place: usize| calls.get(place).map_or("the end".to_owned(), Call::summary);
    println!("VIOLATION seed {seed} call {place} {cut}: {text}");
    let before = place.checked_sub(1).map_or("the beginning".to_owned(), call);
    println!("  between {before} and {}", call(*place));
    let subsets = wish.choice.subsets;
    println!(
        "  again: kelson-sim crash-points --trace {} --seed {seed} --operations {operations} \
         --subsets {subsets} --from {place} --to {place} --cut {cut}",
        trace.display()
    );
}
