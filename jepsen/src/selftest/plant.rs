//! The errors that are planted, one per kind, and the rules that may name each. A plant changes one
//! thing in a valid history and gives none if the history has no place for it.

use crate::check::Rule;
use crate::history::{Call, Event, History, Op, Outcome, Row, WatchRecord, WatchWhat};
use crate::rng::Rng;
use crate::workload::Workload;

pub(super) type Plant = fn(&mut History, &mut Rng) -> Option<()>;

/// One kind of error.
pub(super) struct Kind {
    pub(super) workload: Workload,
    pub(super) name: &'static str,
    pub(super) rules: &'static [Rule],
    pub(super) plant: Plant,
}

const fn kind(name: &'static str, rules: &'static [Rule], plant: Plant) -> Kind {
    Kind { workload: Workload::Mixed, name, rules, plant }
}

pub(super) const KINDS: &[Kind] = &[
    kind("stale read, old revision", &[Rule::Stale], stale_old),
    kind("stale read, fresh revision", &[Rule::WrongRead], stale_fresh),
    kind("overwritten value, revisions aside", &[Rule::NotLinearizable], overwritten),
    kind("value never written, revisions aside", &[Rule::NotLinearizable], unwritten),
    kind("serializable read of no state", &[Rule::WrongRead], serializable_wrong),
    kind("read shows another key's value", &[Rule::WrongRead], foreign_value),
    kind("read lacks a key", &[Rule::WrongRead], short_list),
    kind("acknowledged write not in the log", &[Rule::LostWrite], ack_without_write),
    kind("acknowledged write lost at the end", &[Rule::LostWrite], lost_tail),
    kind("half of a transaction lost", &[Rule::LostWrite], half_lost),
    kind("failed write took effect", &[Rule::FailedWrite], failed_applied),
    kind("failed delete took effect", &[Rule::Unexplained], failed_delete),
    kind("value took effect twice", &[Rule::Unexplained], applied_twice),
    kind("value that nobody wrote", &[Rule::Unexplained], from_nowhere),
    kind("write before it was sent", &[Rule::Stale], early_write),
    kind("unknown write before it was sent", &[Rule::Stale], early_unknown),
    kind("compare held against the state", &[Rule::WrongCompare], compare_held),
    kind("compare failed against the state", &[Rule::WrongCompare], compare_failed),
    kind("delete missed an existing key", &[Rule::WrongRead], delete_missed),
    kind("revision missing everywhere", &[Rule::Hole], hole),
    kind("event without its previous value", &[Rule::WrongEvent], no_previous),
    kind("version does not count", &[Rule::WrongEvent], wrong_version),
    kind("watch: event dropped", &[Rule::WatchGap], watch_dropped),
    kind("watch: event twice", &[Rule::WatchTwice, Rule::WatchSplit], watch_twice),
    kind("watch: events swapped", &[Rule::WatchOrder], watch_swapped),
    kind("watch: goes back in time", &[Rule::WatchOrder], watch_back),
    kind("watch: revision in two responses", &[Rule::WatchSplit], watch_split),
    kind("watch: progress before the events", &[Rule::WatchProgress], watch_progress),
    kind("watch: one member shows another value", &[Rule::Divergence], watch_diverges),
    kind("watch: resumes too late", &[Rule::WatchGap], watch_resumes_late),
    kind("watch: never reaches the end", &[Rule::WatchBehind], watch_behind),
    kind("hashes differ", &[Rule::FinalState], hash_differs),
    kind("contents differ", &[Rule::FinalState], contents_differ),
];

/// An operation that fits, from a random place on.
pub(super) fn pick(
    history: &mut History,
    rng: &mut Rng,
    fits: impl Fn(&Op) -> bool,
) -> Option<usize> {
    let count = history.ops.len();
    let from = rng.below(count as u64) as usize;
    (0..count).map(|step| (from + step) % count).find(|index| fits(&history.ops[*index]))
}

pub(super) fn ok(op: &Op) -> bool {
    op.outcome == Outcome::Ok
}

fn stale_old(history: &mut History, rng: &mut Rng) -> Option<()> {
    let index = pick(history, rng, |op| {
        ok(op) && op.revision > 20 && matches!(op.call, Call::Get { serializable: false, .. })
    })?;
    // The same key as another client had read it long before.
    let op = history.ops[index].clone();
    let Call::Get { key, .. } = &op.call else { return None };
    let revision = op.revision - 15;
    history.ops[index].rows = state_of(history, key, revision).into_iter().collect();
    history.ops[index].revision = revision;
    Some(())
}

/// A key at a revision, out of the events.
fn state_of(history: &History, key: &str, revision: i64) -> Option<Row> {
    let mut row = None;
    for record in history.watches.iter().filter(|record| record.member == 1) {
        let WatchWhat::Events { events, .. } = &record.what else { continue };
        for event in events.iter().filter(|event| event.key == key && event.revision <= revision) {
            row.clone_from(&event.put);
        }
    }
    row
}

fn stale_fresh(history: &mut History, rng: &mut Rng) -> Option<()> {
    let index = pick(history, rng, |op| {
        let get = matches!(op.call, Call::Get { serializable: false, .. });
        ok(op) && get && op.rows.first().is_some_and(|row| row.version > 1)
    })?;
    let row = history.ops[index].rows[0].clone();
    let older = state_of(history, &row.key, row.modified - 1)?;
    history.ops[index].rows = vec![older];
    Some(())
}

fn overwritten(history: &mut History, rng: &mut Rng) -> Option<()> {
    // Far enough behind that no two of the operations overlap.
    let far = 20;
    let count = history.ops.len();
    let from = rng.below(count as u64) as usize;
    for index in (0..count).map(|step| (from + step) % count) {
        let op = &history.ops[index];
        let get = matches!(op.call, Call::Get { serializable: false, .. });
        let Some(row) = op.rows.first().filter(|row| get && ok(op) && row.version > 1) else {
            continue;
        };
        let writer = history.ops.iter().position(|op| op.wrote() && op.revision == row.modified);
        if writer.is_some_and(|writer| writer + far < index) {
            let older = state_of(history, &row.key, row.modified - 1)?;
            history.ops[index].rows[0].value = older.value;
            return Some(());
        }
    }
    None
}

fn unwritten(history: &mut History, rng: &mut Rng) -> Option<()> {
    let index = pick(history, rng, |op| {
        ok(op) && !op.rows.is_empty() && matches!(op.call, Call::List { serializable: false })
    })?;
    history.ops[index].rows[0].value.push('?');
    Some(())
}

fn serializable_wrong(history: &mut History, rng: &mut Rng) -> Option<()> {
    let index =
        pick(history, rng, |op| ok(op) && !op.rows.is_empty() && op.call.is_serializable())?;
    history.ops[index].rows[0].create -= 1;
    Some(())
}

fn foreign_value(history: &mut History, rng: &mut Rng) -> Option<()> {
    let index = pick(history, rng, |op| {
        ok(op) && op.rows.len() > 1 && matches!(op.call, Call::List { .. })
    })?;
    let rows = &mut history.ops[index].rows;
    rows[0].value = rows[1].value.clone();
    Some(())
}

fn short_list(history: &mut History, rng: &mut Rng) -> Option<()> {
    let index = pick(history, rng, |op| {
        ok(op) && !op.rows.is_empty() && matches!(op.call, Call::List { .. })
    })?;
    history.ops[index].rows.pop();
    Some(())
}

fn ack_without_write(history: &mut History, rng: &mut Rng) -> Option<()> {
    let index = pick(history, rng, |op| op.outcome == Outcome::Fail && !op.call.puts().is_empty())?;
    let end = history.ops[index].end;
    // An answer that looks right in time: the revision of a neighbor.
    let near = history.ops.iter().filter(|op| ok(op)).min_by_key(|op| op.end.abs_diff(end))?;
    let revision = near.revision;
    let op = &mut history.ops[index];
    (op.outcome, op.revision, op.succeeded) = (Outcome::Ok, revision, true);
    Some(())
}

fn lost_tail(history: &mut History, _: &mut Rng) -> Option<()> {
    let last = history.finals.first()?.revision;
    let index = history
        .ops
        .iter()
        .rposition(|op| op.outcome != Outcome::Ok && matches!(op.call, Call::Put { .. }))?;
    let op = &mut history.ops[index];
    (op.outcome, op.revision, op.succeeded) = (Outcome::Ok, last + 1, true);
    Some(())
}

/// Changes the events of one revision in all streams.
pub(super) fn everywhere(history: &mut History, revision: i64, change: impl Fn(&mut Vec<Event>)) {
    for record in &mut history.watches {
        let WatchWhat::Events { events, .. } = &mut record.what else { continue };
        if events.iter().any(|event| event.revision == revision) {
            change(events);
        }
    }
    history.watches.retain(|record| match &record.what {
        WatchWhat::Events { events, .. } => !events.is_empty(),
        _ => true,
    });
}

fn half_lost(history: &mut History, rng: &mut Rng) -> Option<()> {
    let index = pick(history, rng, |op| op.wrote() && matches!(op.call, Call::PutTwo { .. }))?;
    let op = history.ops[index].clone();
    let Call::PutTwo { second, .. } = &op.call else { return None };
    everywhere(history, op.revision, |events| {
        events.retain(|event| event.revision != op.revision || event.key != second.0);
    });
    Some(())
}

fn failed_applied(history: &mut History, rng: &mut Rng) -> Option<()> {
    let index = pick(history, rng, |op| op.wrote() && !matches!(op.call, Call::Delete { .. }))?;
    refuse(&mut history.ops[index], Outcome::Fail);
    Some(())
}

fn failed_delete(history: &mut History, rng: &mut Rng) -> Option<()> {
    let delete = |op: &Op| op.wrote() && matches!(op.call, Call::Delete { .. });
    let index = pick(history, rng, delete)?;
    // Deletes look alike: one without an answer could explain this one.
    let Call::Delete { key } = history.ops[index].call.clone() else { return None };
    history.ops.retain(|op| {
        op.outcome != Outcome::Unknown || !matches!(&op.call, Call::Delete { key: k } if *k == key)
    });
    let index = pick(history, rng, |op| {
        op.wrote() && matches!(&op.call, Call::Delete { key: k } if *k == key)
    })?;
    refuse(&mut history.ops[index], Outcome::Fail);
    // Its own removals made by unknown deletes are unexplained as well, which is the same rule.
    Some(())
}

fn refuse(op: &mut Op, outcome: Outcome) {
    (op.outcome, op.revision, op.succeeded) = (outcome, 0, false);
    op.rows.clear();
    op.error = Some("planted".into());
}

/// Adds a revision at the end of all streams.
fn append(history: &mut History, value: Option<String>) -> Option<()> {
    let last = history.finals.first()?.revision;
    let before = history.finals.first()?.rows.first()?.clone();
    let put = Row {
        value: value.unwrap_or_else(|| "nobody's".into()),
        modified: last + 1,
        version: before.version + 1,
        ..before.clone()
    };
    let event = Event {
        revision: last + 1,
        key: before.key.clone(),
        put: Some(put.clone()),
        before: Some(before),
    };
    for member in history.finals.iter_mut() {
        member.revision = last + 1;
        member.watched = last + 1;
        member.rows[0] = put.clone();
        let stream = history.watches.iter().filter(|record| record.member == member.member);
        let tail = stream.max_by_key(|record| record.stream)?;
        let (stream, at) = (tail.stream, tail.at + 1_000_000);
        let what =
            WatchWhat::Events { revision: last + 1, events: vec![event.clone()], more: false };
        history.watches.push(WatchRecord { stream, member: member.member, at, what });
    }
    Some(())
}

fn applied_twice(history: &mut History, _: &mut Rng) -> Option<()> {
    // The newest value of the key to which it happens again.
    let value = history.finals.first()?.rows.first()?.value.clone();
    append(history, Some(value))
}

fn from_nowhere(history: &mut History, _: &mut Rng) -> Option<()> {
    append(history, None)
}

fn early_write(history: &mut History, rng: &mut Rng) -> Option<()> {
    late(history, rng, Outcome::Ok)
}

fn early_unknown(history: &mut History, rng: &mut Rng) -> Option<()> {
    late(history, rng, Outcome::Unknown)
}

/// Moves a write to a time at which newer revisions had been seen.
fn late(history: &mut History, rng: &mut Rng, outcome: Outcome) -> Option<()> {
    let last = history.finals.first()?.revision;
    let index = pick(history, rng, |op| {
        op.wrote() && op.revision < last - 20 && matches!(op.call, Call::Put { .. })
    })?;
    let op = &mut history.ops[index];
    op.start += 100_000;
    op.end += 100_000;
    if outcome == Outcome::Unknown {
        refuse(op, outcome);
    }
    Some(())
}

fn compare_held(history: &mut History, rng: &mut Rng) -> Option<()> {
    let index = pick(history, rng, |op| op.wrote() && matches!(op.call, Call::Cas { .. }))?;
    let Call::Cas { expect, .. } = &mut history.ops[index].call else { return None };
    *expect += 1;
    Some(())
}

fn compare_failed(history: &mut History, rng: &mut Rng) -> Option<()> {
    let index =
        pick(history, rng, |op| ok(op) && !op.succeeded && matches!(op.call, Call::Cas { .. }))?;
    let found = history.ops[index].rows.first().map_or(0, |row| row.modified);
    let Call::Cas { expect, .. } = &mut history.ops[index].call else { return None };
    *expect = found;
    Some(())
}

fn delete_missed(history: &mut History, rng: &mut Rng) -> Option<()> {
    let index = pick(history, rng, |op| {
        ok(op) && op.rows.len() == 1 && matches!(op.call, Call::Get { serializable: false, .. })
    })?;
    let op = &mut history.ops[index];
    op.call = Call::Delete { key: op.rows[0].key.clone() };
    op.succeeded = false;
    op.rows.clear();
    Some(())
}

fn hole(history: &mut History, rng: &mut Rng) -> Option<()> {
    let index = pick(history, rng, |op| op.wrote() && op.revision > 2)?;
    let revision = history.ops[index].revision;
    let last = history.finals.first()?.revision;
    if revision == last {
        return None;
    }
    everywhere(history, revision, |events| events.retain(|event| event.revision != revision));
    Some(())
}

fn no_previous(history: &mut History, rng: &mut Rng) -> Option<()> {
    let index = pick(history, rng, |op| op.wrote() && matches!(op.call, Call::Delete { .. }))?;
    let revision = history.ops[index].revision;
    everywhere(history, revision, |events| {
        for event in events.iter_mut().filter(|event| event.revision == revision) {
            event.before = None;
        }
    });
    Some(())
}

fn wrong_version(history: &mut History, rng: &mut Rng) -> Option<()> {
    let index = pick(history, rng, |op| op.wrote() && matches!(op.call, Call::Put { .. }))?;
    let revision = history.ops[index].revision;
    everywhere(history, revision, |events| {
        let of = events.iter_mut().filter(|event| event.revision == revision);
        of.filter_map(|event| event.put.as_mut()).for_each(|row| row.version += 1);
    });
    Some(())
}

/// A response with several revisions, neither the first nor the last of its stream.
fn response<'a>(history: &'a mut History, rng: &mut Rng) -> Option<&'a mut Vec<Event>> {
    let fits: Vec<usize> = (1..history.watches.len().saturating_sub(1))
        .filter(|index| {
            let same = |other: usize| {
                let (one, other) = (&history.watches[*index], &history.watches[other]);
                one.stream == other.stream && matches!(other.what, WatchWhat::Events { .. })
            };
            let WatchWhat::Events { events, .. } = &history.watches[*index].what else {
                return false;
            };
            let revisions = events.chunk_by(|a, b| a.revision == b.revision).count();
            same(index - 1) && same(index + 1) && revisions > 2
        })
        .collect();
    if fits.is_empty() {
        return None;
    }
    match &mut history.watches[*rng.pick(&fits)].what {
        WatchWhat::Events { events, .. } => Some(events),
        _ => None,
    }
}

fn watch_dropped(history: &mut History, rng: &mut Rng) -> Option<()> {
    let events = response(history, rng)?;
    let gone = events[0].revision;
    events.retain(|event| event.revision != gone);
    Some(())
}

fn watch_twice(history: &mut History, rng: &mut Rng) -> Option<()> {
    let events = response(history, rng)?;
    let again = events[0].clone();
    events.insert(1, again);
    Some(())
}

fn watch_swapped(history: &mut History, rng: &mut Rng) -> Option<()> {
    let events = response(history, rng)?;
    let first = events[0].revision;
    let count = events.iter().filter(|event| event.revision == first).count();
    events.rotate_left(count);
    Some(())
}

fn watch_back(history: &mut History, rng: &mut Rng) -> Option<()> {
    // Not one of the last, since something newer must come before it.
    let late = history.finals.first()?.revision - 50;
    let draws = (0..100)
        .find_map(|_| response(history, rng).filter(|events| events[0].revision < late).cloned());
    let old = draws?;
    let at = history.watches.iter().rposition(|record| {
        matches!(&record.what, WatchWhat::Events { events, .. }
            if events[0].revision > old[0].revision + 10)
    })?;
    if let WatchWhat::Events { events, .. } = &mut history.watches[at].what {
        events.extend(old);
    }
    Some(())
}

fn watch_split(history: &mut History, rng: &mut Rng) -> Option<()> {
    let places: Vec<(usize, usize)> = history
        .watches
        .iter()
        .enumerate()
        .filter_map(|(index, record)| {
            let WatchWhat::Events { events, .. } = &record.what else { return None };
            let inside = events.windows(2).position(|two| two[0].revision == two[1].revision)?;
            Some((index, inside + 1))
        })
        .collect();
    let (index, at) = *places.get(rng.below(places.len().max(1) as u64) as usize)?;
    let mut second = history.watches[index].clone();
    let (WatchWhat::Events { events: first, .. }, WatchWhat::Events { events: rest, .. }) =
        (&mut history.watches[index].what, &mut second.what)
    else {
        return None;
    };
    *rest = first.split_off(at);
    history.watches.insert(index + 1, second);
    Some(())
}

fn watch_progress(history: &mut History, rng: &mut Rng) -> Option<()> {
    let revision = response(history, rng)?[0].revision;
    let index = history.watches.iter().position(|record| {
        matches!(&record.what, WatchWhat::Events { events, .. } if events[0].revision == revision)
    })?;
    let record =
        WatchRecord { what: WatchWhat::Progress { revision }, ..history.watches[index].clone() };
    history.watches.insert(index, record);
    Some(())
}

fn watch_diverges(history: &mut History, rng: &mut Rng) -> Option<()> {
    let count = history.watches.len();
    let from = rng.below(count as u64) as usize;
    let (before, after) = history.watches.split_at_mut(from);
    let shown = after.iter_mut().chain(before).find_map(|record| match &mut record.what {
        WatchWhat::Events { events, .. } => events.iter_mut().find_map(|event| event.put.as_mut()),
        _ => None,
    })?;
    shown.value.push('?');
    Some(())
}

fn watch_resumes_late(history: &mut History, rng: &mut Rng) -> Option<()> {
    // The second one of a member.
    let stream = 2 + 2 * rng.below(3);
    let first = history.watches.iter().position(|record| {
        record.stream == stream && matches!(record.what, WatchWhat::Events { .. })
    })?;
    history.watches.remove(first);
    Some(())
}

fn watch_behind(history: &mut History, rng: &mut Rng) -> Option<()> {
    let index = rng.below(history.finals.len() as u64) as usize;
    history.finals[index].watched -= 1;
    Some(())
}

fn hash_differs(history: &mut History, rng: &mut Rng) -> Option<()> {
    let index = rng.below(history.finals.len() as u64) as usize;
    history.finals[index].hash ^= 1;
    Some(())
}

fn contents_differ(history: &mut History, rng: &mut Rng) -> Option<()> {
    let index = rng.below(history.finals.len() as u64) as usize;
    history.finals[index].rows.first_mut()?.value.push('?');
    Some(())
}
