//! Starts a member on what a cut left, compares all that it finds with the plan, and lets it go on. It
//! does not know what was promised; the judge of that is `promise`.

use std::collections::BTreeSet;
use std::path::Path;

use bytes::Bytes;
use kelson_api::command::command::Op;
use kelson_api::etcdserverpb::{PutRequest, RangeRequest};
use kelson_api::mvccpb::event::EventType;
use kelson_storage::log::Log;
use kelson_storage::{LogId, Reader};

use crate::member::{Member, OPERATION, STRANGER, Scratch, set_aside, settled};
use crate::model::Event;
use crate::plan::{Plan, command, payload};
use crate::promise::Found;

/// Key that is put after a cut.
const AFTER: &str = "written after the cut";
/// Revisions and bytes of one piece of history.
const PIECE: (usize, usize) = (1_000, 8 << 20);

/// What a member must find, by operation.
pub struct Expected {
    /// Operations and states.
    pub plan: Plan,
    /// HashKV after each operation, from none on.
    pub hashes: Vec<u32>,
}

/// How the recovery itself is broken, to see that this is found.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Sabotage {
    /// Not at all.
    #[default]
    None,
    /// The log is not applied to the state.
    SkipReplay,
    /// The process ends.
    Die,
}

/// The hash of the store after each operation, by a store that never stops.
pub fn hashes(plan: &Plan) -> Result<Vec<u32>, String> {
    let Scratch { home, mut store, reader } = Scratch::new()?;
    let mut hashes = vec![hash(&reader)?];
    for (index, op) in (1..).zip(&plan.operations) {
        let applied = store.apply(LogId { term: 1, index }, &[command(op.clone())]);
        applied.map_err(|error| error.to_string())?;
        hashes.push(hash(&reader)?);
    }
    store.shutdown();
    drop(home);
    Ok(hashes)
}

fn hash(reader: &Reader) -> Result<u32, String> {
    reader.hash_kv(0).map(|found| found.hash).map_err(|error| format!("hash: {error}"))
}

/// Starts a member in a directory, compares what it has, writes and starts it again.
///
/// # Errors
/// It does not start by itself, or what it has was never there; in words.
pub fn recover(dir: &Path, expected: &Expected, sabotage: Sabotage) -> Result<Found, String> {
    if sabotage == Sabotage::Die {
        std::process::abort();
    }
    let mut member = open(dir)?;
    let found = look(&mut member, expected, sabotage)?;
    member.close();
    // A start is a write, too: what it left must be as good as what it found.
    let member = again(dir, expected, &found, sabotage);
    let member = member.map_err(|text| format!("the second time: {text}"))?;
    go_on(member, dir, expected, &found)?;
    Ok(found)
}

fn open(dir: &Path) -> Result<Member, String> {
    let member = Member::open(dir).map_err(|error| format!("it does not start: {error}"))?;
    match set_aside(dir) {
        Some(path) => Err(format!("the state was found damaged and set aside: {}", path.display())),
        None => Ok(member),
    }
}

/// Compares log and state with the plan.
fn look(member: &mut Member, expected: &Expected, sabotage: Sabotage) -> Result<Found, String> {
    let purged = member.log.purged().index;
    let (last, strangers) = entries(&member.log, &expected.plan)?;
    if strangers > 0 {
        // As the next leader would.
        settled(|done| member.log.truncate_after(last, done))?;
    }
    let applied = member.store.applied().index;
    if applied > last {
        return Err(format!("the state is at {applied}, beyond the end of the log at {last}"));
    }
    compare(&member.reader, expected, applied).map_err(|text| format!("state on disk: {text}"))?;
    let last = if sabotage == Sabotage::SkipReplay { applied } else { last };
    member.replay(last)?;
    compare(&member.reader, expected, last).map_err(|text| format!("after the log: {text}"))?;
    Ok(Found { last, vote: member.vote, purged, strangers })
}

/// The last operation in the log, and the number of strangers behind it.
fn entries(log: &Log, plan: &Plan) -> Result<(u64, u64), String> {
    let (first, end) = (log.first_index(), log.last_id().index);
    let (mut last, mut strangers) = (log.purged().index, 0);
    let mut next = first;
    while next <= end {
        let entries = log.read(next, end + 1, 1 << 20).map_err(|error| error.to_string())?;
        for entry in &entries {
            let index = entry.id.index;
            if index != next {
                return Err(format!("entry {index} stands at {next}"));
            }
            if entry.kind == STRANGER {
                strangers += 1;
            } else if strangers > 0 || index > plan.operations.len() as u64 {
                return Err(format!("entry {index} was never written there"));
            } else if entry.payload != plan.payload(index as usize) {
                return Err(format!("entry {index} is not as it was written"));
            } else {
                last = index;
            }
            next += 1;
        }
    }
    Ok((last, strangers))
}

/// Compares the whole state with that of the plan after an operation.
fn compare(reader: &Reader, expected: &Expected, last: u64) -> Result<(), String> {
    let plan = &expected.plan;
    let wanted = plan.states.get(last as usize).ok_or("it has operations that nobody planned")?;
    same("revision", &reader.revision(), &wanted.revision)?;
    same("compaction revision", &reader.compacted(), &wanted.compacted)?;
    let leases: BTreeSet<i64> = reader.leases().iter().map(|lease| lease.id).collect();
    same("leases", &leases, &wanted.leases)?;
    for lease in &leases {
        let attached = wanted.keys.values().filter(|kv| kv.lease == *lease);
        let attached: Vec<Bytes> = attached.map(|kv| kv.key.clone()).collect();
        same("keys of a lease", &reader.lease_keys(*lease), &attached)?;
    }
    compare_keys(reader, plan, 0, wanted.revision)?;
    if wanted.compacted > 0 {
        compare_keys(reader, plan, wanted.compacted, wanted.compacted)?;
    }
    compare_history(reader, plan, wanted.compacted.max(1) + 1, wanted.revision)?;
    let hashed = expected.hashes.get(last as usize).copied();
    same("HashKV", &Some(hash(reader)?), &hashed)
}

fn same<T: PartialEq + std::fmt::Debug>(what: &str, found: &T, wanted: &T) -> Result<(), String> {
    if found == wanted {
        return Ok(());
    }
    let brief = |value: &T| format!("{value:?}").chars().take(200).collect::<String>();
    Err(format!("{what}: found {}, wanted {}", brief(found), brief(wanted)))
}

/// All keys at a revision; `asked` is how a client asks for it.
fn compare_keys(reader: &Reader, plan: &Plan, asked: i64, revision: i64) -> Result<(), String> {
    let everything = Bytes::from_static(&[0]);
    let (key, range_end) = (everything.clone(), everything);
    let request = RangeRequest { key, range_end, revision: asked, ..RangeRequest::default() };
    let (response, _) = reader.range(&request).map_err(|error| format!("range: {error}"))?;
    let wanted = plan.model.at.get(&revision).ok_or("a revision that nobody planned")?;
    same("number of keys", &response.kvs.len(), &wanted.len())?;
    for (found, wanted) in response.kvs.iter().zip(wanted.values()) {
        same(&format!("key at revision {revision}"), found, wanted)?;
    }
    Ok(())
}

/// All changes between two revisions.
fn compare_history(reader: &Reader, plan: &Plan, from: i64, to: i64) -> Result<(), String> {
    let mut next = from;
    while next <= to {
        let changes =
            reader.changes(next, PIECE.0, PIECE.1).map_err(|e| format!("history: {e}"))?;
        for revised in changes.batches.iter().take_while(|revised| revised.revision <= to) {
            same("revision of history", &revised.revision, &next)?;
            let event = |event: &kelson_storage::FeedEvent| Event {
                is_delete: event.kind == EventType::Delete,
                kv: event.kv.clone(),
            };
            let found: Vec<Event> = revised.events.iter().map(event).collect();
            let wanted = plan.model.events.get(&next).cloned().unwrap_or_default();
            same(&format!("changes of revision {next}"), &found, &wanted)?;
            next += 1;
        }
        if changes.batches.is_empty() {
            return Err(format!("history ends before revision {next}, not at {to}"));
        }
    }
    Ok(())
}

/// Starts it once more and looks at everything again: it must have what it had.
fn again(
    dir: &Path,
    expected: &Expected,
    found: &Found,
    sabotage: Sabotage,
) -> Result<Member, String> {
    let mut member = open(dir)?;
    let again = look(&mut member, expected, sabotage)?;
    // Those were cut off the first time.
    let wanted = Found { strangers: 0, ..found.clone() };
    same("last operation, vote, purge and entries to cut off", &again, &wanted)?;
    Ok(member)
}

/// Writes one more operation, stops, starts again and finds it beside all others.
fn go_on(mut member: Member, dir: &Path, expected: &Expected, found: &Found) -> Result<(), String> {
    let put = PutRequest { key: AFTER.into(), value: "1".into(), ..PutRequest::default() };
    let entries = member.append(OPERATION, vec![payload(Op::Put(put))])?;
    entries.iter().try_for_each(|entry| member.apply(entry))?;
    member.close();
    let mut member = open(dir).map_err(|text| format!("the third time: {text}"))?;
    member.replay(found.last + 1).map_err(|text| format!("the third time: {text}"))?;
    same("vote after going on", &member.vote, &found.vote)?;
    let before = &expected.plan.states[found.last as usize];
    same("revision after going on", &member.reader.revision(), &(before.revision + 1))?;
    same("keys after going on", &member.reader.key_count(), &(before.keys.len() as u64 + 1))?;
    let request = RangeRequest { key: AFTER.into(), ..RangeRequest::default() };
    let (response, _) = member.reader.range(&request).map_err(|error| format!("range: {error}"))?;
    same("keys written after the cut", &response.kvs.len(), &1)?;
    let first = before.compacted.max(1) + 1;
    compare_history(&member.reader, &expected.plan, first, before.revision)?;
    member.close();
    Ok(())
}
