//! A process that makes cuts and judges them, range by range, as its parent asks by standard input. It
//! says each cut before it makes it: a member that ends the process, as some are meant to, takes the
//! worker with it, and the parent must know where.

use std::collections::{BTreeMap, VecDeque};
use std::io::{BufRead, Write};
use std::path::{Path, PathBuf};

use crate::cuts::Choice;
use crate::disk::{Disk, Image, ImageKey};
use crate::plan::{Plan, Scale};
use crate::promise::{Found, Promise};
use crate::recover::{Expected, Sabotage, recover};
use crate::trace::{self, Call};

/// Results that are kept, for images that come again: some after a kill, some after a power cut.
const KEPT_RESULTS: usize = 16;

/// Before each line of a worker. The engine prints lines of its own, as where a file is too short.
const SAYS: &str = "> ";

/// What a worker has said, if it was the worker.
pub(crate) fn said(line: &str) -> Option<&str> {
    line.strip_prefix(SAYS)
}

/// Everything that a worker is started with.
#[derive(Clone, Debug)]
pub struct Task {
    /// Holds `trace` and `hashes`.
    pub home: PathBuf,
    /// The plan of the run.
    pub scale: Scale,
    /// Cuts at each place.
    pub choice: Choice,
    /// Breaks the recovery.
    pub sabotage: Sabotage,
}

impl Task {
    /// The task in words, for a command line.
    pub fn to_words(&self) -> Vec<String> {
        let mut words = vec![
            self.home.display().to_string(),
            self.scale.seed.to_string(),
            self.scale.operations.to_string(),
            format!("{:?}", self.sabotage),
        ];
        words.extend(self.choice.to_words());
        words
    }

    /// The task that these words say.
    pub fn from_words(words: &[String]) -> Result<Self, String> {
        let [home, seed, operations, sabotage, choice @ ..] = words else {
            return Err("a worker is started by crash-points only".to_owned());
        };
        let malformed = |word: &str| format!("{word:?} is no number");
        let seed = seed.parse().map_err(|_| malformed(seed))?;
        let operations = operations.parse().map_err(|_| malformed(operations))?;
        let kinds = [Sabotage::None, Sabotage::SkipReplay, Sabotage::Die];
        let sabotage = kinds.into_iter().find(|kind| format!("{kind:?}") == *sabotage);
        Ok(Self {
            home: home.into(),
            scale: Scale { seed, operations },
            choice: Choice::from_words(choice)?,
            sabotage: sabotage.ok_or("an unknown kind of sabotage")?,
        })
    }

    /// Reads the trace.
    pub fn trace(&self) -> Result<Vec<Call>, String> {
        trace::load(&self.home.join("trace"))
    }
}

/// Reads the hashes that the parent has computed.
fn read_hashes(path: &Path) -> Result<Vec<u32>, String> {
    let text = std::fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()))?;
    let hashes: Result<_, _> = text.lines().map(str::parse).collect();
    hashes.map_err(|_| format!("{} holds something else than hashes", path.display()))
}

/// The disk, and what was promised, after a number of calls.
struct Place {
    disk: Disk,
    promise: Promise,
    calls: usize,
}

impl Place {
    fn start() -> Self {
        Self { disk: Disk::default(), promise: Promise::default(), calls: 0 }
    }

    fn advance(&mut self, calls: &[Call], upto: usize) -> Result<(), String> {
        if upto < self.calls {
            *self = Self::start();
        }
        for call in &calls[self.calls..upto] {
            self.disk.apply(call)?;
            self.promise.see(call)?;
        }
        self.calls = upto;
        Ok(())
    }
}

/// The disk after a number of calls, for whoever wants the image of one cut.
pub fn disk_after(calls: &[Call], upto: usize) -> Result<Disk, String> {
    let mut place = Place::start();
    place.advance(calls, upto)?;
    Ok(place.disk)
}

/// What a member finds, or why it does not start.
type Verdict = Result<Found, String>;

struct Worker {
    task: Task,
    calls: Vec<Call>,
    expected: Expected,
    place: Place,
    /// Where images are made; removed with the worker.
    scratch: tempfile::TempDir,
    images: u64,
    results: VecDeque<(ImageKey, Verdict)>,
}

/// Serves ranges until standard input ends.
pub fn serve(task: Task) -> Result<(), String> {
    let expected =
        Expected { plan: Plan::new(task.scale), hashes: read_hashes(&task.home.join("hashes"))? };
    let scratch = tempfile::tempdir_in(&task.home).map_err(|error| error.to_string())?;
    let calls = task.trace()?;
    let (place, results) = (Place::start(), VecDeque::new());
    let mut worker = Worker { task, calls, expected, place, scratch, images: 0, results };
    for line in std::io::stdin().lock().lines() {
        let line = line.map_err(|error| error.to_string())?;
        let (from, to) = line.split_once(' ').ok_or("a range is two numbers")?;
        let number = |text: &str| text.parse::<usize>().map_err(|_| format!("{text:?}: no number"));
        worker.range(number(from)?, number(to)?)?;
    }
    Ok(())
}

/// Says something to the parent.
fn say(text: &str) -> Result<(), String> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{SAYS}{text}").and_then(|()| out.flush()).map_err(|error| error.to_string())
}

impl Worker {
    /// Makes all cuts after each of these numbers of calls, both ends included.
    fn range(&mut self, from: usize, to: usize) -> Result<(), String> {
        let (mut tried, images) = (BTreeMap::<String, u64>::new(), self.images);
        for place in from..=to {
            self.place.advance(&self.calls, place)?;
            for (name, cut) in self.task.choice.at(self.task.scale.seed, place) {
                let Some(image) = self.place.disk.image(cut, self.calls.get(place)) else {
                    continue;
                };
                let found = self.found(place, &name, &image)?;
                let verdict = found.and_then(|found| self.place.promise.judge(&found));
                if let Err(text) = verdict {
                    say(&format!("bad {place} {name} {}", text.replace('\n', " ")))?;
                }
                *tried.entry(name).or_default() += 1;
            }
        }
        for (name, count) in tried {
            say(&format!("cut {count} {name}"))?;
        }
        say(&format!("done {}", self.images - images))
    }

    /// What a member finds in an image; the same image is looked at once.
    fn found(&mut self, place: usize, name: &str, image: &Image) -> Result<Verdict, String> {
        let known = self.results.iter().find(|(key, _)| image.key.as_ref() == Some(key));
        if let Some((_, found)) = known {
            return Ok(found.clone());
        }
        say(&format!("at {place} {name}"))?;
        self.images += 1;
        let root = self.scratch.path().join(self.images.to_string());
        image.write(&root).map_err(|error| format!("make an image: {error}"))?;
        let found = recover(&root.join("data"), &self.expected, self.task.sabotage);
        // What a member may still hold open goes with the process.
        std::fs::remove_dir_all(&root).map_err(|error| format!("remove an image: {error}"))?;
        if let Some(key) = &image.key {
            self.results.push_front((key.clone(), found.clone()));
            self.results.truncate(KEPT_RESULTS);
        }
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_engine_prints_is_no_word_of_a_worker() {
        assert_eq!(said("failed to read 128 bytes at offset 0 from file with len 0"), None);
        assert_eq!(said("> done 7"), Some("done 7"));
    }
}
