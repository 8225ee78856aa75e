//! Power cuts between any two calls to the disk: the log always opens, with everything that was
//! acknowledged, nothing that was never asked for, and in the order it was asked.

mod log_support;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use kelson_storage::LogId;
use kelson_storage::log::{Call, Crash, Done, Entry, Log, Opened, SimDisk};
use log_support::*;

/// One operation of the script.
#[derive(Clone, Debug)]
enum Step {
    Vote(u8),
    Append(Vec<Entry>),
    TruncateAfter(u64),
    Purge(LogId),
}

/// What the log should hold.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Model {
    vote: Option<Bytes>,
    purged: LogId,
    entries: Vec<Entry>,
}

impl Model {
    fn last(&self) -> LogId {
        self.entries.last().map_or(self.purged, |entry| entry.id)
    }

    fn apply(&mut self, step: &Step) {
        match step {
            Step::Vote(vote) => self.vote = Some(vote_bytes(*vote)),
            Step::Append(entries) => self.entries.extend(entries.clone()),
            Step::TruncateAfter(index) => self.entries.retain(|entry| entry.id.index <= *index),
            Step::Purge(upto) => {
                self.purged = *upto;
                self.entries.retain(|entry| entry.id.index > upto.index);
            }
        }
    }

    fn read(opened: &Opened) -> Model {
        let entries = all(&opened.log);
        let model = Model { vote: opened.vote.clone(), purged: opened.purged, entries };
        assert_eq!(model.last(), opened.last);
        model
    }
}

fn vote_bytes(vote: u8) -> Bytes {
    Bytes::from(vec![vote; 8 + usize::from(vote % 16)])
}

/// A small generator, so that a seed names a script for ever.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % bound
    }
}

fn script(seed: u64, steps: usize) -> Vec<Step> {
    let mut random = Random(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1);
    let mut model = Model::default();
    let mut script = vec![Step::Vote(1)];
    let mut term = 1;
    model.apply(&script[0]);
    while script.len() < steps {
        let last = model.last();
        let step = match random.below(16) {
            0 | 1 => Step::Vote(random.below(200) as u8),
            2 => {
                term += 1;
                let room = last.index - model.purged.index;
                Step::TruncateAfter(last.index - random.below(room.min(9) + 1))
            }
            3 | 4 if !model.entries.is_empty() => {
                let upto = random.below(model.entries.len() as u64) as usize;
                Step::Purge(model.entries[upto].id)
            }
            5 if random.below(6) == 0 => Step::Purge(id(term, last.index + 1 + random.below(9))),
            _ => {
                let (count, bytes) = (1 + random.below(6), 20 + random.below(900) as usize);
                let range = last.index + 1..=last.index + count;
                Step::Append(entries(term.max(last.term), range, bytes))
            }
        };
        model.apply(&step);
        script.push(step);
    }
    script
}

/// Runs the script in groups of up to three steps without waiting, noting every acknowledgement.
fn run(script: &[Step]) -> Vec<Call> {
    let disk = SimDisk::new();
    let opened = open(&disk).expect("a new log");
    let acknowledged = Arc::new(AtomicU64::new(0));
    for (number, step) in (1u64..).zip(script) {
        let (disk, counter) = (disk.clone(), Arc::clone(&acknowledged));
        let done: Done = Box::new(move |result| {
            result.expect("every step is right");
            disk.note(number);
            counter.store(number, Ordering::SeqCst);
        });
        issue(&opened.log, step, done);
        if number % 3 == 0 {
            eventually("the group is durable", || acknowledged.load(Ordering::SeqCst) == number);
        }
    }
    opened.log.shutdown();
    disk.calls()
}

fn issue(log: &Log, step: &Step, done: Done) {
    match step {
        Step::Vote(vote) => log.save_vote(vote_bytes(*vote), done),
        Step::Append(entries) => log.append(entries.clone(), done),
        Step::TruncateAfter(index) => log.truncate_after(*index, done),
        Step::Purge(upto) => log.purge(*upto, done),
    }
}

/// Whether this is the state after at least `acknowledged` steps, or in the middle of an append.
fn is_possible(found: &Model, script: &[Step], acknowledged: usize) -> bool {
    let mut model = Model::default();
    for step in &script[..acknowledged] {
        model.apply(step);
    }
    for step in &script[acknowledged..] {
        if *found == model {
            return true;
        }
        if let Step::Append(entries) = step {
            let mut part = model.clone();
            for entry in entries {
                part.entries.push(entry.clone());
                if *found == part {
                    return true;
                }
            }
        }
        model.apply(step);
    }
    *found == model
}

fn check_every_cut(seed: u64, steps: usize) {
    let script = script(seed, steps);
    let calls = run(&script);
    let mut acknowledged = 0;
    for cut in 0..=calls.len() {
        if let Some(Call::Note(number)) = cut.checked_sub(1).map(|at| &calls[at]) {
            acknowledged = *number as usize;
        }
        let torn = [3 * cut as u64, 3 * cut as u64 + 1, 3 * cut as u64 + 2].map(Crash::Torn);
        for crash in [Crash::Lost, Crash::Kept].into_iter().chain(torn) {
            let disk = SimDisk::after(&calls[..cut], crash);
            let case = format!("seed {seed}, cut after call {cut}, {crash:?}");
            let opened = open(&disk).unwrap_or_else(|error| panic!("{case}: {error}"));
            let found = Model::read(&opened);
            assert!(
                is_possible(&found, &script, acknowledged),
                "{case}: {acknowledged} steps were acknowledged, found {:?} to {:?}, vote {:?}",
                found.purged,
                found.last(),
                found.vote,
            );
            continues(opened, &disk, found, &case);
        }
    }
}

/// The recovered log takes a vote and an entry and gives both back.
fn continues(opened: Opened, disk: &SimDisk, mut model: Model, case: &str) {
    let last = model.last();
    let steps = [Step::Vote(9), Step::Append(vec![entry(last.term + 1, last.index + 1, 5)])];
    for step in &steps {
        wait(|done| issue(&opened.log, step, done)).unwrap_or_else(|it| panic!("{case}: {it}"));
        model.apply(step);
    }
    drop(opened);
    let opened = open(disk).unwrap_or_else(|error| panic!("{case}, again: {error}"));
    assert_eq!(Model::read(&opened), model, "{case}, again");
}

#[test]
fn every_cut_of_a_short_script() {
    check_every_cut(1, 12);
}

#[test]
fn every_cut_of_a_script_over_many_segments() {
    check_every_cut(2, 90);
}

#[test]
fn every_cut_of_another_script() {
    check_every_cut(3, 90);
}

#[test]
fn scripts_run_as_the_model_says() {
    for seed in 10..40 {
        let script = script(seed, 150);
        let disk = SimDisk::after(&run(&script), Crash::Lost);
        let mut model = Model::default();
        script.iter().for_each(|step| model.apply(step));
        let opened = open(&disk).expect("it reopens");
        assert_eq!(Model::read(&opened), model, "seed {seed}");
    }
}
