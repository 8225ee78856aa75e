//! The enumeration: records a run, hands the places of its trace to worker processes, and collects
//! what they say. A worker that dies or does not answer is a violation at the cut that it had named;
//! another one takes over behind it. Nothing here looks into the files of a member.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;

use crate::image::{check_complete, fast_dir};
use crate::plan::{Plan, Scale};
use crate::record::Recorder;
use crate::recover::hashes;
use crate::run::DIED;
use crate::trace::{self, Call};
use crate::worker::{Task, disk_after, said};

/// Calls that a worker takes at a time.
const RANGE: usize = 24;
/// Longest time that one cut may take.
const CUT_MAX: Duration = Duration::from_secs(150);
/// Violations after which an enumeration gives up.
const VIOLATIONS_MAX: usize = 20;

/// A cut after which a member was not what it had promised to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// Number of calls that took effect.
    pub place: usize,
    /// Name of the cut.
    pub cut: String,
    /// What was wrong.
    pub text: String,
}

/// What an enumeration did.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Cuts made and judged, by name.
    pub cuts: BTreeMap<String, u64>,
    /// Different images among them, on each of which a member was started twice.
    pub images: u64,
    /// In the order in which they were found.
    pub violations: Vec<Violation>,
    /// It ended early, since there were so many.
    pub gave_up: bool,
}

impl Report {
    /// All cuts.
    pub fn cut_count(&self) -> u64 {
        self.cuts.values().sum()
    }
}

/// Which part of a trace is cut, and how.
#[derive(Clone, Copy, Debug)]
pub struct Extent {
    /// First and last number of calls after which cuts are made.
    pub places: (usize, usize),
    /// Worker processes.
    pub workers: usize,
    /// Violations after which it ends.
    pub violations_max: usize,
}

impl Extent {
    /// All places of a trace.
    pub fn all(calls: &[Call], workers: usize) -> Self {
        Self { places: (0, calls.len()), workers, violations_max: VIOLATIONS_MAX }
    }
}

/// Records a run of a plan and checks that nothing was missed. `program` is this program.
pub fn record(program: &Path, scale: Scale) -> Result<Vec<Call>, String> {
    let home = tempfile::tempdir_in(fast_dir()).map_err(|error| error.to_string())?;
    let (root, marks) = (home.path().join("disk"), home.path().join("marks"));
    std::fs::create_dir(&root).map_err(|error| error.to_string())?;
    let mut recorder = Recorder::new(&root, &marks).map_err(|error| error.to_string())?;
    let mut step = 0;
    loop {
        let mut command = Command::new(program);
        command.arg("member").arg(root.join("data")).arg(&marks).arg(step.to_string());
        command.args([scale.seed.to_string(), scale.operations.to_string()]);
        without_sync(&mut command);
        match recorder.run(&mut command)? {
            0 => break,
            code if code == i32::from(DIED) => step = last_step(&marks)?,
            code => return Err(format!("the run ended with code {code} behind step {step}")),
        }
    }
    let calls = recorder.into_calls();
    check_complete(&calls, &root)?;

    Ok(calls)
}

/// The database runs the program `sync` whenever it is opened. It would hide missing syncs of its own,
/// and it may be missing on the machine of a user: here it is always missing.
fn without_sync(command: &mut Command) {
    command.env("PATH", "/nonexistent");
}

fn last_step(marks: &Path) -> Result<usize, String> {
    let text = std::fs::read_to_string(marks).map_err(|error| error.to_string())?;
    let step = text.lines().rev().find_map(|line| line.strip_prefix("step ")?.parse().ok());
    step.ok_or_else(|| "the run died before its first step".to_owned())
}

/// Prepares the home of a task: trace and hashes.
pub fn prepare(task: &Task, calls: &[Call]) -> Result<(), String> {
    trace::save(&task.home.join("trace"), calls).map_err(|error| format!("save: {error}"))?;
    let lines: String =
        hashes(&Plan::new(task.scale))?.iter().map(|hash| format!("{hash}\n")).collect();
    std::fs::write(task.home.join("hashes"), lines).map_err(|error| format!("save: {error}"))
}

/// Number of calls of each kind.
pub fn kinds(calls: &[Call]) -> BTreeMap<&'static str, usize> {
    let mut kinds = BTreeMap::new();
    calls.iter().for_each(|call| *kinds.entry(call.kind()).or_default() += 1);
    kinds
}

/// What is left to do, and what was found.
struct Work {
    next: usize,
    last: usize,
    violations_max: usize,
    report: Report,
}

impl Work {
    fn take(&mut self) -> Option<(usize, usize)> {
        self.report.gave_up = self.report.violations.len() >= self.violations_max;
        if self.next > self.last || self.report.gave_up {
            return None;
        }
        let from = self.next;
        let to = (from + RANGE - 1).min(self.last);
        self.next = to + 1;
        Some((from, to))
    }

    fn left(&self) -> usize {
        self.last + 1 - self.next
    }
}

/// Makes all cuts of a task that was prepared. `progress` is told after each range how many places are
/// left.
pub fn enumerate(
    program: &Path,
    task: &Task,
    extent: Extent,
    progress: &(dyn Fn(usize) + Sync),
) -> Result<Report, String> {
    let (next, last) = extent.places;
    let violations_max = extent.violations_max;
    let work = Mutex::new(Work { next, last, violations_max, report: Report::default() });
    let serve = |number| serve_ranges(program, task, number, &work, progress);
    let results: Vec<Result<(), String>> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..extent.workers).map(|n| scope.spawn(move || serve(n))).collect();
        let join = |thread: std::thread::ScopedJoinHandle<'_, _>| {
            thread.join().unwrap_or_else(|_| Err("a thread of the enumeration panicked".to_owned()))
        };
        threads.into_iter().map(join).collect()
    });
    results.into_iter().collect::<Result<Vec<_>, _>>()?;
    let mut report = lock(&work).report.clone();
    report.violations.sort_by(|a, b| (a.place, &a.cut).cmp(&(b.place, &b.cut)));
    Ok(report)
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Keeps one worker busy, or its successors.
fn serve_ranges(
    program: &Path,
    task: &Task,
    number: usize,
    work: &Mutex<Work>,
    progress: &(dyn Fn(usize) + Sync),
) -> Result<(), String> {
    let mut worker = WorkerProcess::start(program, task, number)?;
    loop {
        let Some((mut from, to)) = lock(work).take() else { return worker.stop() };
        while from <= to {
            let (done, violations) = worker.range(from, to)?;
            let mut work = lock(work);
            work.report.violations.extend(violations);
            match done {
                Done::All { cuts, images } => {
                    for (name, count) in cuts {
                        *work.report.cuts.entry(name).or_default() += count;
                    }
                    work.report.images += images;
                    from = to + 1;
                }
                // The rest of the cuts at that place is left out.
                Done::DiedAt(violation) => {
                    from = violation.place + 1;
                    *work.report.cuts.entry(violation.cut.clone()).or_default() += 1;
                    work.report.images += 1;
                    work.report.violations.push(violation);
                    drop(work);
                    worker = WorkerProcess::start(program, task, number)?;
                }
            }
        }
        let left = lock(work).left();
        progress(left);
    }
}

/// How a range ended.
enum Done {
    All { cuts: BTreeMap<String, u64>, images: u64 },
    DiedAt(Violation),
}

struct WorkerProcess {
    child: Child,
    input: Option<ChildStdin>,
    lines: Receiver<String>,
    log: PathBuf,
}

impl WorkerProcess {
    fn start(program: &Path, task: &Task, number: usize) -> Result<Self, String> {
        let log = task.home.join(format!("worker-{number}.log"));
        let errors = File::options().create(true).append(true).open(&log);
        let errors = errors.map_err(|error| format!("{}: {error}", log.display()))?;
        let mut command = Command::new(program);
        command.arg("worker").args(task.to_words());
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(errors);
        without_sync(&mut command);
        let mut child = command.spawn().map_err(|error| format!("start a worker: {error}"))?;
        let (sender, lines) = channel();
        let output = child.stdout.take().expect("it was asked for");
        // Ends with the worker's output.
        std::thread::spawn(move || {
            let lines = BufReader::new(output).lines().map_while(Result::ok);
            let mut words = lines.filter_map(|line| said(&line).map(ToOwned::to_owned));
            while words.next().is_some_and(|words| sender.send(words).is_ok()) {}
        });
        Ok(Self { input: child.stdin.take(), child, lines, log })
    }

    /// Has all cuts of a range made. What was found is returned even if the worker did not survive.
    fn range(&mut self, from: usize, to: usize) -> Result<(Done, Vec<Violation>), String> {
        let input = self.input.as_mut().expect("only stopping takes it");
        let asked = writeln!(input, "{from} {to}").and_then(|()| input.flush());
        asked.map_err(|error| format!("ask a worker: {error}; see {}", self.log.display()))?;
        let (mut at, mut violations, mut cuts) = (None, Vec::new(), BTreeMap::new());
        loop {
            let line = match self.lines.recv_timeout(CUT_MAX) {
                Ok(line) => line,
                Err(error) => return Ok((Done::DiedAt(self.death(at, error)?), violations)),
            };
            let mut words = line.splitn(4, ' ');
            let word = words.next().unwrap_or_default();
            let first = words.next().and_then(|word| word.parse::<u64>().ok());
            let (second, rest) = (words.next().unwrap_or_default(), words.next());
            match (word, first) {
                ("at", Some(place)) => at = Some((place as usize, second.to_owned())),
                ("bad", Some(place)) => violations.push(Violation {
                    place: place as usize,
                    cut: second.to_owned(),
                    text: rest.unwrap_or_default().to_owned(),
                }),
                ("cut", Some(count)) => drop(cuts.insert(second.to_owned(), count)),
                ("done", Some(images)) => return Ok((Done::All { cuts, images }, violations)),
                _ => return Err(format!("a worker says {line:?}")),
            }
        }
    }

    /// The violation that a worker met which ended or does not answer.
    fn death(
        &mut self,
        at: Option<(usize, String)>,
        error: RecvTimeoutError,
    ) -> Result<Violation, String> {
        // It may have ended by itself.
        let _ = self.child.kill();
        let status = self.child.wait().map_err(|error| error.to_string())?;
        let text = match error {
            RecvTimeoutError::Timeout => format!("the member did not come back in {CUT_MAX:?}"),
            RecvTimeoutError::Disconnected => format!("the member ended its process: {status}"),
        };
        let last = std::fs::read_to_string(&self.log).unwrap_or_default();
        let last = last.lines().last().unwrap_or_default().to_owned();
        let Some((place, cut)) = at else {
            return Err(format!("a worker ended before its first cut: {status}: {last}"));
        };
        Ok(Violation { place, cut, text: format!("{text}; its last words: {last}") })
    }

    fn stop(mut self) -> Result<(), String> {
        drop(self.input.take());
        let status = self.child.wait().map_err(|error| error.to_string())?;
        let text = || format!("a worker ended with {status}; see {}", self.log.display());
        if status.success() { Ok(()) } else { Err(text()) }
    }
}

impl Drop for WorkerProcess {
    fn drop(&mut self) {
        // One that has ended already needs neither.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Writes the files of a cut again, untouched by any member, for whoever looks into it.
pub fn keep(task: &Task, calls: &[Call], violation: &Violation, to: &Path) -> Result<(), String> {
    let cuts = task.choice.at(task.scale.seed, violation.place);
    let cut = cuts.into_iter().find(|(name, _)| *name == violation.cut);
    let disk = disk_after(calls, violation.place)?;
    let image = cut.and_then(|(_, cut)| disk.image(cut, calls.get(violation.place)));
    let image = image.ok_or_else(|| format!("there is no cut {}", violation.cut))?;
    image.write(to).map_err(|error| format!("write {}: {error}", to.display()))
}
