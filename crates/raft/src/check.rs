//! `kelson check`: every file of a stopped member, read by the rules of a start. It says everything that
//! is wrong, not only the first thing, and repairs nothing.

use std::path::Path;

use kelson_api::Message;
use kelson_api::command::Batch;
use kelson_storage::log::{Dumped, LogError, LogOptions, Verified, dump, verify};
use kelson_storage::offline::{StateFacts, examine};
use kelson_storage::{DataDir, OpenError};

use crate::codec;
use crate::types::Payload;

/// What was found.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Checked {
    /// What is sound, one line each.
    pub facts: Vec<String>,
    /// What is not, each with the file, the place, and what to do.
    pub problems: Vec<String>,
}

/// Names that a member's directory may have; others are of somebody else.
const KNOWN: [&str; 4] = ["lock", "identity", "wal", "state"];

/// What to do about a member whose files contradict each other.
const REPLACE: &str = "replace this member (remove it from the cluster, delete its data directory, \
     add it again as a new member), or restore the cluster from a backup";

/// Checks a member. Blocking, about as long as a start.
///
/// # Errors
/// There is nothing to check: the directory is in use or holds no member.
pub fn check(data_dir: &Path) -> Result<Checked, OpenError> {
    let mut checked = Checked::default();
    let dir = match DataDir::open_existing(data_dir) {
        Ok(dir) => Some(dir),
        Err(error @ (OpenError::Damaged { .. } | OpenError::NewerVersion { .. })) => {
            checked.problems.push(error.to_string());
            None
        }
        Err(error) => return Err(error),
    };
    let member_dir = data_dir.join("member");
    if let Some(dir) = &dir {
        match dir.identity() {
            Some(identity) => checked.facts.push(format!(
                "identity: member {:x} of cluster {:x}",
                identity.member_id, identity.cluster_id
            )),
            None => checked.facts.push("identity: of no cluster yet".to_owned()),
        }
    }
    strangers(&member_dir, &mut checked);
    let log = dir.as_ref().and_then(|dir| check_log(dir, &mut checked));
    check_entries(&member_dir.join("wal"), &mut checked);
    let state = match examine(data_dir) {
        Ok(Some(state)) => {
            checked.facts.push(format!(
                "state: applied entry {} of term {}, revision {}, compacted {}, {} rows, {} leases, {} \
                 members",
                state.applied.index,
                state.applied.term,
                state.revision,
                state.compacted,
                state.rows,
                state.leases,
                state.members
            ));
            Some(state)
        }
        Ok(None) => {
            checked.facts.push("state: none yet".to_owned());
            None
        }
        Err(error) => {
            checked.problems.push(error.to_string());
            None
        }
    };
    if let (Some(state), Some(log)) = (&state, &log) {
        compare(state, log, &mut checked);
    }
    Ok(checked)
}

/// Files that no member makes.
fn strangers(member_dir: &Path, checked: &mut Checked) {
    let Ok(entries) = std::fs::read_dir(member_dir) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with("state.bad-") {
            let text = "a damaged state that was set aside; it may be deleted";
            checked.facts.push(format!("{}: {text}", entry.path().display()));
        } else if !KNOWN.contains(&name.as_str()) {
            checked.facts.push(format!("{}: not ours, not looked at", entry.path().display()));
        }
    }
}

/// Records, checksums, segments: as a start sees them.
fn check_log(dir: &DataDir, checked: &mut Checked) -> Option<Verified> {
    match verify(&LogOptions::new(dir.wal_dir(), dir.storage_uuid())) {
        Ok(log) => {
            let (first, last) = (log.purged.index + 1, log.last.index);
            checked.facts.push(match first > last {
                true => format!("log: no entries behind {last}"),
                false => format!(
                    "log: entries {first} to {last}, term {}, in {} segments",
                    log.last.term, log.segments
                ),
            });
            if let Some(Err(error)) = log.vote.clone().map(codec::decode_vote) {
                let path = dir.wal_dir();
                checked.problems.push(format!("{}: {error}; {REPLACE}", path.display()));
            }
            Some(log)
        }
        // A file that is not ours by its first bytes may be one of ours whose first bytes have changed.
        Err(error @ (LogError::Foreign { .. } | LogError::OtherMember { .. })) => {
            let text = "if nobody put it there";
            checked.problems.push(format!("{error}; {text}, {REPLACE}"));
            None
        }
        Err(error) => {
            checked.problems.push(error.to_string());
            None
        }
    }
}

/// What the entries hold.
fn check_entries(wal_dir: &Path, checked: &mut Checked) {
    let mut bad = None;
    let read = dump(wal_dir, &mut |dumped| {
        let Dumped::Entry(entry) = dumped else { return };
        if bad.is_some() {
            return;
        }
        let index = entry.id.index;
        let commands = match codec::decode_entry(entry) {
            Ok(entry) => match entry.payload {
                Payload::Blank => return,
                Payload::Commands(commands) | Payload::Membership(_, commands) => commands,
            },
            Err(error) => {
                bad = Some(format!("entry {index}: {error}"));
                return;
            }
        };
        if let Err(error) = Batch::decode(commands.0) {
            bad = Some(format!("entry {index}: malformed commands: {error}"));
        }
    });
    if let Some(bad) = bad {
        checked.problems.push(format!("{}: {bad}; {REPLACE}", wal_dir.display()));
    }
    // Damage of the files was told by `check_log`, unless the owner is unknown.
    if let (Err(error), true) = (read, checked.problems.is_empty() && wal_dir.exists()) {
        checked.problems.push(error.to_string());
    }
}

/// Whether log and state belong together.
fn compare(state: &StateFacts, log: &Verified, checked: &mut Checked) {
    let (applied, last, purged) = (state.applied, log.last, log.purged);
    let path = state.path.display();
    if applied.index > last.index {
        checked.problems.push(format!(
            "{path}: the state has applied entry {}, but the log ends with {}: the log was lost or \
             replaced; {REPLACE}",
            applied.index, last.index
        ));
    } else if applied.index < purged.index {
        checked.problems.push(format!(
            "{path}: the state has applied entry {}, but the log begins behind {}: the state was lost \
             or replaced; {REPLACE}",
            applied.index, purged.index
        ));
    }
    match state.membership.clone().map(|(at, bytes)| (at, codec::decode_membership(bytes))) {
        Some((at, _)) if at > applied => checked.problems.push(format!(
            "{path}: the members are those of entry {}, but the state ends with {}; {REPLACE}",
            at.index, applied.index
        )),
        Some((_, Err(error))) => checked.problems.push(format!("{path}: {error}; {REPLACE}")),
        _ => {}
    }
}
