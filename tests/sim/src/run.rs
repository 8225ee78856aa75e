//! The run that is recorded: carries out a plan on the storage of one member and says before each
//! step what it is about to ask, and after it what it was told. It runs as a process of its own, since
//! a plan lets it die; the next process goes on behind the step at which the last one died.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::Path;

use kelson_api::command::Command;
use kelson_storage::{LogId, Transfer};

use crate::member::{Member, OPERATION, STRANGER, Scratch, settled};
use crate::plan::{Plan, Scale, Step, command};

/// The process died by plan and another one is to go on.
pub const DIED: u8 = 77;

/// The file by which a run speaks.
pub struct Marks(File);

impl Marks {
    /// Opens it; what was said before stays.
    pub fn open(path: &Path) -> Result<Self, String> {
        let file = OpenOptions::new().create(true).append(true).open(path);
        file.map(Self).map_err(|error| format!("open {}: {error}", path.display()))
    }

    /// Says something, in one write.
    pub fn say(&mut self, text: &str) -> Result<(), String> {
        let line = format!("{text}\n");
        self.0.write_all(line.as_bytes()).map_err(|error| format!("write a mark: {error}"))
    }
}

/// Carries out the plan from a step on. Returns the exit code of the process.
pub fn run(dir: &Path, marks: &Path, scale: Scale, from: usize) -> Result<u8, String> {
    let plan = Plan::new(scale);
    let mut marks = Marks::open(marks)?;
    let mut member = Member::open(dir)?;
    member.replay(member.log.last_id().index)?;
    marks.say("opened")?;
    for (number, step) in plan.steps.iter().enumerate().skip(from) {
        marks.say(&format!("step {}", number + 1))?;
        match step {
            // Nothing may be dropped: that would be a stop in good order.
            Step::Die => std::process::exit(i32::from(DIED)),
            Step::Restart => {
                member.close();
                member = Member::open(dir)?;
                member.replay(member.log.last_id().index)?;
                marks.say("opened")?;
            }
            other => carry_out(&plan, &mut member, &mut marks, other)?,
        }
    }
    let (found, wanted) = (member.reader.revision(), plan.model.state().revision);
    if found != wanted {
        return Err(format!("the run ended at revision {found}, its plan at {wanted}"));
    }
    member.close();
    Ok(0)
}

fn carry_out(
    plan: &Plan,
    member: &mut Member,
    marks: &mut Marks,
    step: &Step,
) -> Result<(), String> {
    match step {
        Step::Operations(from, to) => {
            marks.say(&format!("propose {to}"))?;
            let payloads = (*from..=*to).map(|number| plan.payload(number)).collect();
            let entries = member.append(OPERATION, payloads)?;
            for (number, entry) in (*from..).zip(&entries) {
                member.apply(entry)?;
                marks.say(&format!("told {number}"))?;
            }
        }
        Step::Vote => {
            let term = member.vote + 1;
            marks.say(&format!("vote {term}"))?;
            member.vote(term)?;
            marks.say(&format!("voted {term}"))?;
        }
        Step::Strangers(count) => {
            let last = member.log.last_id().index;
            marks.say(&format!("strangers {count}"))?;
            member.append(STRANGER, vec![b"stranger".as_slice().into(); *count])?;
            settled(|done| member.log.truncate_after(last, done))?;
            marks.say("strangers 0")?;
        }
        Step::Settle => member.settle()?,
        Step::Purge => {
            let upto = *member.store.durable_applied().borrow();
            if upto.index > 0 {
                marks.say(&format!("purge {}", upto.index))?;
                settled(|done| member.log.purge(upto, done))?;
                marks.say(&format!("purged {}", upto.index))?;
            }
        }
        Step::Rewrite => {
            member.reader.defragment().map_err(|error| error.to_string())?;
        }
        Step::Install(from, to) => install(plan, member, marks, (*from, *to))?,
        Step::Restart | Step::Die => unreachable!("the caller carries these out"),
    }
    Ok(())
}

/// Takes over a state that has some more operations, as from another member.
fn install(
    plan: &Plan,
    member: &mut Member,
    marks: &mut Marks,
    (from, to): (usize, usize),
) -> Result<(), String> {
    let mut transfer = sender(plan, member.vote, to)?;
    let mut receiver = member.reader.receive().map_err(|error| error.to_string())?;
    while let Some(chunk) = transfer.next_chunk().map_err(|error| error.to_string())? {
        receiver.take(chunk).map_err(|error| error.to_string())?;
    }
    let received = receiver.finish().map_err(|error| error.to_string())?;
    let upto = received.applied();
    marks.say(&format!("install {from} {to}"))?;
    member.store.install(received).map_err(|error| error.to_string())?;
    settled(|done| member.log.purge(upto, done))?;
    marks.say(&format!("told {to}"))?;
    marks.say(&format!("purged {to}"))
}

/// The state after an operation, made elsewhere.
fn sender(plan: &Plan, term: u64, upto: usize) -> Result<Transfer, String> {
    let Scratch { home, mut store, reader } = Scratch::new()?;
    for (index, op) in (1..).zip(&plan.operations[..upto]) {
        let commands: [Command; 1] = [command(op.clone())];
        let applied = store.apply(LogId { term, index }, &commands);
        applied.map_err(|error| error.to_string())?;
    }
    let transfer = reader.transfer().map_err(|error| error.to_string())?;
    // They live as long as the process: the transfer reads from them until its last chunk.
    std::mem::forget((store, home));
    Ok(transfer)
}
