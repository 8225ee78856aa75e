//! Deliberate errors, to see that the enumeration finds them: a trace is changed as if the program, or
//! the disk under it, had done something else than it should. Tests only; nothing else names them.

use crate::trace::Call;

const LOG: &str = "data/member/wal";
const STATE: &str = "data/member/state";

/// What is wrong.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Flaw {
    /// One sync of the log did not happen, in the middle of the run.
    LogSyncForgotten,
    /// No sync of the log's directory happens.
    LogNamesUnsynced,
    /// No file of the state is synced.
    StateUnsynced,
    /// The log is synced only once a checkpoint of the state is on disk.
    CheckpointFirst,
    /// Operations are acknowledged before the log is synced.
    ToldFirst,
    /// One vote is not synced.
    VoteUnsynced,
    /// The file that names the current state is removed before the new one gets its name.
    CurrentGone,
    /// One write to the log does not arrive.
    LogWriteLost,
    /// One purge is carried out and acknowledged before the checkpoint that allows it.
    PurgeFirst,
}

/// All of them.
pub const FLAWS: [Flaw; 9] = [
    Flaw::LogSyncForgotten,
    Flaw::LogNamesUnsynced,
    Flaw::StateUnsynced,
    Flaw::CheckpointFirst,
    Flaw::ToldFirst,
    Flaw::VoteUnsynced,
    Flaw::CurrentGone,
    Flaw::LogWriteLost,
    Flaw::PurgeFirst,
];

/// Whether a file of this trace was made below a directory.
struct Homes(Vec<(u32, String)>);

impl Homes {
    fn of(calls: &[Call]) -> Self {
        let made = calls.iter().filter_map(|call| match call {
            Call::Create(path, file) => Some((*file, path.clone())),
            _ => None,
        });
        Self(made.collect())
    }

    fn is_below(&self, file: u32, dir: &str) -> bool {
        self.0.iter().any(|(number, path)| *number == file && path.starts_with(dir))
    }

    fn is_sync_of(&self, call: &Call, dir: &str) -> bool {
        matches!(call, Call::Sync(file) if self.is_below(*file, dir))
    }
}

fn is_mark(call: &Call, word: &str) -> bool {
    matches!(call, Call::Mark(text) if text.split(' ').next() == Some(word))
}

/// The first place at or behind `from` for which this holds.
fn find(calls: &[Call], from: usize, holds: impl Fn(&Call) -> bool) -> Option<usize> {
    calls[from..].iter().position(holds).map(|at| from + at)
}

impl Flaw {
    /// The trace of a run with this flaw; `None` if the trace gives no opportunity for it.
    pub fn plant(self, calls: &[Call]) -> Option<Vec<Call>> {
        let homes = Homes::of(calls);
        let mut calls = calls.to_vec();
        let proposal = find(&calls, calls.len() / 2, |call| is_mark(call, "propose"));
        match self {
            Flaw::LogSyncForgotten => {
                let at = find(&calls, proposal?, |call| homes.is_sync_of(call, LOG))?;
                calls.remove(at);
            }
            Flaw::LogWriteLost => {
                let is_write = |call: &Call| matches!(call, Call::Write(file, ..) if homes.is_below(*file, LOG));
                let at = find(&calls, proposal?, is_write)?;
                calls.remove(at);
            }
            Flaw::LogNamesUnsynced => {
                calls.retain(|call| !matches!(call, Call::SyncDir(path) if path == LOG));
            }
            Flaw::StateUnsynced => calls.retain(|call| !homes.is_sync_of(call, STATE)),
            Flaw::VoteUnsynced => {
                let vote = find(&calls, calls.len() / 2, |call| is_mark(call, "vote"))?;
                let at = find(&calls, vote, |call| homes.is_sync_of(call, LOG))?;
                calls.remove(at);
            }
            Flaw::ToldFirst => told_first(&mut calls, &homes),
            Flaw::CheckpointFirst => calls = checkpoint_first(calls, &homes),
            Flaw::CurrentGone => current_gone(&mut calls)?,
            Flaw::PurgeFirst => calls = purge_first(&calls, &homes)?,
        }
        Some(calls)
    }
}

fn told_first(calls: &mut Vec<Call>, homes: &Homes) {
    let mut at = 0;
    while let Some(told) = find(calls, at, |call| is_mark(call, "told")) {
        let syncs = (0..told).rev().find(|place| homes.is_sync_of(&calls[*place], LOG));
        if let Some(sync) = syncs {
            let mark = calls.remove(told);
            calls.insert(sync, mark);
        }
        at = told + 1;
    }
}

/// Syncs of the log, and what they allowed to be said, wait for the end of the next checkpoint.
fn checkpoint_first(calls: Vec<Call>, homes: &Homes) -> Vec<Call> {
    let (mut changed, mut held) = (Vec::new(), Vec::new());
    let mut is_open = false;
    for call in calls {
        is_open |= is_mark(&call, "propose");
        let waits = is_mark(&call, "told") || homes.is_sync_of(&call, LOG);
        if is_open && waits {
            held.push(call);
            continue;
        }
        let ends = matches!(&call, Call::SyncDir(path) if path.ends_with("metadata"));
        // Any other mark means that the run went on to something else.
        let gives_up = matches!(&call, Call::Mark(_)) && !is_mark(&call, "propose");
        if gives_up {
            changed.append(&mut held);
        }
        changed.push(call);
        if ends {
            changed.append(&mut held);
        }
    }
    changed.append(&mut held);
    changed
}

fn current_gone(calls: &mut Vec<Call>) -> Option<()> {
    let is_naming =
        |call: &Call| matches!(call, Call::Rename(_, to) if to == &format!("{STATE}/CURRENT"));
    let first = find(calls, 0, is_naming)?;
    let second = find(calls, first + 1, is_naming)?;
    calls.insert(second, Call::Unlink(format!("{STATE}/CURRENT")));
    Some(())
}

/// A purge with all that belongs to it comes before the checkpoint that allows it.
fn purge_first(calls: &[Call], homes: &Homes) -> Option<Vec<Call>> {
    let from = find(calls, calls.len() / 2, |call| is_mark(call, "purge"))?;
    let to = find(calls, from, |call| is_mark(call, "purged"))?;
    let ends =
        |at: &usize| matches!(&calls[*at], Call::SyncDir(path) if path.ends_with("metadata"));
    let checkpoint = (0..from).rev().find(ends)?;
    let before = (0..checkpoint).rev().find(ends)?;
    let is_state = |call: &Call| match call {
        Call::Write(file, ..)
        | Call::SetLen(file, _)
        | Call::Punch(file, ..)
        | Call::Sync(file)
        | Call::SyncRange(file) => homes.is_below(*file, STATE),
        // With these the order stays possible: a replaced state may go at this moment.
        Call::MakeDir(path)
        | Call::Create(path, _)
        | Call::Rename(path, _)
        | Call::Unlink(path)
        | Call::RemoveDir(path)
        | Call::SyncDir(path) => path.starts_with(STATE),
        Call::SyncAll | Call::Mark(_) => false,
    };
    let mut changed = calls[..=before].to_vec();
    let (late, rest): (Vec<Call>, Vec<Call>) =
        calls[before + 1..=to].iter().cloned().partition(is_state);
    changed.extend(rest);
    changed.extend(late);
    changed.extend_from_slice(&calls[to + 1..]);
    Some(changed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::Disk;

    #[test]
    fn a_replaced_state_may_go_while_the_log_is_purged() {
        let dir = |name: &str| format!("{STATE}/{name}");
        let mut calls: Vec<Call> =
            ["data", "data/member", STATE, LOG].map(|path| Call::MakeDir(path.to_owned())).into();
        calls.push(Call::Create(format!("{LOG}/1.wal"), 0));
        for state in ["1", "2"] {
            calls.push(Call::MakeDir(dir(state)));
            calls.push(Call::MakeDir(dir(&format!("{state}/metadata"))));
        }
        calls.extend([
            Call::SyncDir(dir("2/metadata")),
            Call::SyncDir(dir("2/metadata")),
            Call::Mark("purge 5".to_owned()),
            Call::SyncDir(dir("1/metadata")),
            Call::RemoveDir(dir("1/metadata")),
            Call::RemoveDir(dir("1")),
            Call::Unlink(format!("{LOG}/1.wal")),
            Call::Mark("purged 5".to_owned()),
        ]);
        let planted = Flaw::PurgeFirst.plant(&calls).expect("there is a purge");
        let place = |call: &Call| planted.iter().position(|planted| planted == call);
        let purged = place(&Call::Unlink(format!("{LOG}/1.wal")));
        assert!(purged < place(&Call::RemoveDir(dir("1"))), "{planted:?}");
        let mut disk = Disk::default();
        planted.iter().for_each(|call| disk.apply(call).expect("the calls fit together"));
    }
}
