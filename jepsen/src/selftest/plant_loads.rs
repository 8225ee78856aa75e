//! Errors planted in histories of single workloads, one per kind, with the rules that may name each.

use super::plant::{Kind, everywhere, ok, pick};
use crate::call::{Field, Part};
use crate::check::Rule;
use crate::history::{Call, History, ListTxn, Mop, Note, Op, Outcome, Row, WatchRecord, WatchWhat};
use crate::rng::Rng;
use crate::workload::Workload::{Append, Compact, Kube, Members, Range, Set, Txn};
use crate::workload::{BANK, Workload, balance};

pub(super) const fn kind(
    workload: Workload,
    name: &'static str,
    rules: &'static [Rule],
    plant: super::plant::Plant,
) -> Kind {
    Kind { workload, name, rules, plant }
}

/// What can show when a list transaction saw an old state.
const CYCLES: &[Rule] = &[Rule::CycleGSingle, Rule::CycleG2, Rule::CycleTime, Rule::CycleG1c];

pub(super) const KINDS: &[Kind] = &[
    kind(Range, "range: wrong count", &[Rule::WrongRead], count),
    kind(Range, "range: wrong more", &[Rule::WrongRead], more),
    kind(Range, "range: limit cuts too much", &[Rule::WrongRead], short_limit),
    kind(Range, "range: out of order", &[Rule::WrongRead], unsorted),
    kind(Range, "range: the past has changed", &[Rule::WrongRead], changed_past),
    kind(Range, "range: keys only with a value", &[Rule::WrongRead], not_keys_only),
    kind(Range, "range: a page skips a key", &[Rule::WrongRead], page_skips),
    kind(Txn, "txn: inner compare misjudged", &[Rule::WrongRead], inner_compare),
    kind(Txn, "txn: range inside lacks a key", &[Rule::WrongRead], inner_range),
    kind(Txn, "txn: delete shows another value", &[Rule::WrongRead], inner_delete),
    kind(Txn, "txn: the other branch", &[Rule::WrongCompare], other_branch),
    kind(Txn, "txn: one change lost", &[Rule::LostWrite], change_lost),
    kind(Txn, "txn: half done without an answer", &[Rule::LostWrite], unknown_half),
    kind(Txn, "bank: money made", &[Rule::Unbalanced], money_made),
    kind(Txn, "bank: account missing", &[Rule::Unbalanced], account_missing),
    kind(Set, "set: element lost", &[Rule::SetLost], element_lost),
    kind(Set, "set: element of nobody", &[Rule::SetPhantom], element_of_nobody),
    kind(Set, "set: element twice", &[Rule::SetPhantom], element_twice),
    kind(Set, "set: element of a failed add", &[Rule::SetPhantom], element_failed),
    kind(Append, "list: read of a failed append (G1a)", &[Rule::ListAborted], read_aborted),
    kind(Append, "list: read of nobody's append", &[Rule::ListAborted], read_of_nobody),
    kind(Append, "list: half of a transaction (G1b)", &[Rule::ListIntermediate], read_half),
    kind(Append, "list: own append unseen", &[Rule::ListInternal], own_unseen),
    kind(Append, "list: two orders", &[Rule::ListOrder], two_orders),
    kind(Append, "list: old state", CYCLES, old_list),
    kind(Kube, "cache: object missing", &[Rule::WrongCache], cache_lacks),
    kind(Kube, "cache: old object", &[Rule::WrongCache], cache_old),
    kind(Kube, "cache: event of no use", &[Rule::WrongCache], cache_broken),
    kind(Compact, "compact: compacted revision read", &[Rule::NotCompacted], read_compacted),
    kind(Compact, "compact: compacted twice", &[Rule::NotCompacted], compacted_twice),
    kind(Compact, "compact: refused for no reason", &[Rule::WrongRefusal], refused),
    kind(Compact, "compact: the present is future", &[Rule::WrongRefusal], future),
    kind(Compact, "compact: watch ended for no reason", &[Rule::WrongRefusal], watch_refused),
    kind(Compact, "compact: watch told too much", &[Rule::WrongRefusal], watch_told_too_much),
    kind(Members, "members: learner missing", &[Rule::WrongMembers], learner_missing),
    kind(Members, "members: removed one is back", &[Rule::WrongMembers], learner_back),
    kind(Members, "members: learner of nobody", &[Rule::WrongMembers], learner_of_nobody),
];

pub(super) type Planted = Option<()>;

/// A range that was answered and fits.
fn range<'a>(
    history: &'a mut History,
    rng: &mut Rng,
    fits: impl Fn(&crate::call::Range, &Op) -> bool,
) -> Option<&'a mut Op> {
    let index = pick(history, rng, |op| match &op.call {
        Call::Range(range) => ok(op) && fits(range, op),
        _ => false,
    })?;
    Some(&mut history.ops[index])
}

fn count(history: &mut History, rng: &mut Rng) -> Planted {
    range(history, rng, |_, _| true)?.detail.count += 1;
    Some(())
}

fn more(history: &mut History, rng: &mut Rng) -> Planted {
    range(history, rng, |_, op| op.detail.more)?.detail.more = false;
    Some(())
}

fn short_limit(history: &mut History, rng: &mut Rng) -> Planted {
    range(history, rng, |range, op| range.limit > 0 && op.rows.len() > 1)?.rows.pop().map(drop)
}

fn unsorted(history: &mut History, rng: &mut Rng) -> Planted {
    let strict = |range: &crate::call::Range| match range.sort {
        Some((Field::Version | Field::Create | Field::Value, _)) => false,
        // Rows of one revision may stand in any order.
        Some((Field::Mod, _)) => true,
        _ => true,
    };
    let far = |op: &Op| {
        let (first, last) = (op.rows.first(), op.rows.last());
        first.map(|row| row.modified) != last.map(|row| row.modified)
    };
    let op = range(history, rng, |range, op| strict(range) && far(op))?;
    let last = op.rows.len() - 1;
    op.rows.swap(0, last);
    Some(())
}

fn changed_past(history: &mut History, rng: &mut Rng) -> Planted {
    let op = range(history, rng, |range, op| range.revision > 0 && !op.rows.is_empty())?;
    op.rows[0].version += 1;
    Some(())
}

fn not_keys_only(history: &mut History, rng: &mut Rng) -> Planted {
    let op = range(history, rng, |range, op| range.keys_only && !op.rows.is_empty())?;
    op.rows[0].value = "here".into();
    Some(())
}

fn page_skips(history: &mut History, rng: &mut Rng) -> Planted {
    let op = range(history, rng, |range, op| range.key.ends_with('\0') && !op.rows.is_empty())?;
    op.rows.remove(0);
    Some(())
}

/// The parts of an answered transaction that fits.
fn parts<'a>(
    history: &'a mut History,
    rng: &mut Rng,
    fits: impl Fn(&Part) -> bool,
) -> Option<&'a mut Part> {
    let index = pick(history, rng, |op| ok(op) && op.detail.parts.iter().any(&fits))?;
    history.ops[index].detail.parts.iter_mut().find(|part| fits(part))
}

fn inner_compare(history: &mut History, rng: &mut Rng) -> Planted {
    match parts(history, rng, |part| matches!(part, Part::Txn { .. }))? {
        Part::Txn { succeeded, .. } => *succeeded = !*succeeded,
        _ => return None,
    }
    Some(())
}

fn inner_range(history: &mut History, rng: &mut Rng) -> Planted {
    let some = |part: &Part| matches!(part, Part::Range { rows, .. } if !rows.is_empty());
    match parts(history, rng, some)? {
        Part::Range { rows, .. } => rows.pop().map(drop),
        _ => None,
    }
}

fn inner_delete(history: &mut History, rng: &mut Rng) -> Planted {
    let some = |part: &Part| matches!(part, Part::Delete { rows } if !rows.is_empty());
    match parts(history, rng, some)? {
        Part::Delete { rows } => rows[0].value.push('?'),
        _ => return None,
    }
    Some(())
}

fn other_branch(history: &mut History, rng: &mut Rng) -> Planted {
    let index = pick(history, rng, |op| ok(op) && matches!(op.call, Call::Txn(_)))?;
    let op = &mut history.ops[index];
    op.succeeded = !op.succeeded;
    Some(())
}

/// Takes the last event of a revision out of all streams.
pub(super) fn lose_one(history: &mut History, revision: i64) {
    everywhere(history, revision, |events| {
        let last = events.iter().rposition(|event| event.revision == revision);
        last.map(|at| events.remove(at));
    });
}

fn change_lost(history: &mut History, rng: &mut Rng) -> Planted {
    let index = pick(history, rng, |op| op.wrote() && matches!(op.call, Call::Txn(_)))?;
    let revision = history.ops[index].revision;
    lose_one(history, revision);
    Some(())
}

/// Revisions with more than one event, and the value of the first put of each.
fn large_revisions(history: &History) -> Vec<(i64, String)> {
    let mut found = Vec::new();
    for record in history.watches.iter().filter(|record| record.member == 1) {
        let WatchWhat::Events { events, .. } = &record.what else { continue };
        for group in events.chunk_by(|a, b| a.revision == b.revision) {
            if let (Some(row), true) = (&group[0].put, group.len() > 1) {
                found.push((group[0].revision, row.value.clone()));
            }
        }
    }
    found
}

fn unknown_half(history: &mut History, rng: &mut Rng) -> Planted {
    let revisions = large_revisions(history);
    let of = |op: &Op| {
        let puts = op.call.puts();
        let is = |value: &str| puts.iter().any(|(_, put)| *put == value);
        revisions.iter().find(|(_, value)| is(value)).map(|(revision, _)| *revision)
    };
    let txn = |op: &Op| op.outcome == Outcome::Unknown && matches!(op.call, Call::Txn(_));
    let index = pick(history, rng, |op| txn(op) && of(op).is_some())?;
    let revision = of(&history.ops[index])?;
    lose_one(history, revision);
    Some(())
}

fn money_made(history: &mut History, rng: &mut Rng) -> Planted {
    let op = range(history, rng, |range, op| range.key == BANK && !op.rows.is_empty())?;
    let value = &mut op.rows[0].value;
    *value = format!("{} {value}", balance(value)? + 1);
    Some(())
}

fn account_missing(history: &mut History, rng: &mut Rng) -> Planted {
    range(history, rng, |range, op| range.key == BANK && !op.rows.is_empty())?.rows.pop().map(drop)
}

/// A linearizable read of a set that has some elements.
fn set_read(history: &mut History, rng: &mut Rng) -> Option<usize> {
    pick(history, rng, |op| {
        let many = op.rows.first().is_some_and(|row| row.value.split(' ').count() > 12);
        ok(op) && many && matches!(op.call, Call::Get { .. })
    })
}

fn element_lost(history: &mut History, rng: &mut Rng) -> Planted {
    let index = set_read(history, rng)?;
    let value = &mut history.ops[index].rows[0].value;
    *value = value.split_once(' ')?.1.to_owned();
    Some(())
}

fn element_of_nobody(history: &mut History, rng: &mut Rng) -> Planted {
    let index = set_read(history, rng)?;
    history.ops[index].rows[0].value.push_str(" nobody's");
    Some(())
}

fn element_twice(history: &mut History, rng: &mut Rng) -> Planted {
    let index = set_read(history, rng)?;
    let value = &mut history.ops[index].rows[0].value;
    *value = format!("{value} {}", value.split_once(' ')?.0);
    Some(())
}

fn element_failed(history: &mut History, rng: &mut Rng) -> Planted {
    let failed = |op: &Op| op.outcome == Outcome::Fail && matches!(op.call, Call::Cas { .. });
    let by = pick(history, rng, failed)?;
    let element = history.ops[by].call.puts()[0].1.split(' ').next_back()?.to_owned();
    let index = set_read(history, rng)?;
    let value = &mut history.ops[index].rows[0].value;
    *value = format!("{value} {element}");
    Some(())
}

/// List transactions that ended well, and all of them.
fn lists(history: &mut History) -> Vec<&mut ListTxn> {
    let mut txns = Vec::new();
    for note in &mut history.notes {
        if let Note::Lists(txn) = note {
            txns.push(txn);
        }
    }
    txns
}

/// A read of a list that fits, in a transaction that ended well.
fn list_read<'a>(
    history: &'a mut History,
    rng: &mut Rng,
    fits: impl Fn(&str, &[String]) -> bool,
) -> Option<&'a mut Vec<String>> {
    let mut reads: Vec<&mut Vec<String>> = Vec::new();
    for txn in lists(history).into_iter().filter(|txn| txn.outcome == Outcome::Ok) {
        // A transaction that appends as well would break a second rule.
        if txn.mops.iter().any(|mop| mop.append.is_some()) {
            continue;
        }
        let keys: Vec<String> = txn.mops.iter().map(|mop| mop.key.clone()).collect();
        for Mop { key, read, .. } in &mut txn.mops {
            // So does one that reads a list twice.
            let once = keys.iter().filter(|other| *other == key).count() == 1;
            reads.extend(read.as_mut().filter(|read| once && fits(key, read)));
        }
    }
    let at = rng.below(reads.len().max(1) as u64) as usize;
    (at < reads.len()).then(|| reads.swap_remove(at))
}

fn read_aborted(history: &mut History, rng: &mut Rng) -> Planted {
    let failed = lists(history).into_iter().find_map(|txn| {
        let append = txn.mops.iter().find_map(|mop| mop.append.clone());
        append.filter(|_| txn.outcome == Outcome::Fail)
    })?;
    list_read(history, rng, |_, _| true)?.push(failed);
    Some(())
}

fn read_of_nobody(history: &mut History, rng: &mut Rng) -> Planted {
    list_read(history, rng, |_, _| true)?.push("nobody's".into());
    Some(())
}

fn read_half(history: &mut History, rng: &mut Rng) -> Planted {
    let mut firsts: Vec<String> = Vec::new();
    for txn in lists(history).into_iter().filter(|txn| txn.outcome == Outcome::Ok) {
        for (at, mop) in txn.mops.iter().enumerate() {
            let twice = |other: &Mop| other.key == mop.key && other.append.is_some();
            firsts.extend(mop.append.clone().filter(|_| txn.mops[at + 1..].iter().any(twice)));
        }
    }
    let place = |read: &[String]| read.iter().position(|element| firsts.contains(element));
    let read = list_read(history, rng, |_, read| place(read).is_some())?;
    let until = place(read)?;
    read.truncate(until + 1);
    Some(())
}

fn own_unseen(history: &mut History, rng: &mut Rng) -> Planted {
    let mut places: Vec<&mut Vec<String>> = Vec::new();
    for txn in lists(history).into_iter().filter(|txn| txn.outcome == Outcome::Ok) {
        let own: Vec<String> = txn.mops.iter().filter_map(|mop| mop.append.clone()).collect();
        let reads = txn.mops.iter_mut().filter_map(|mop| mop.read.as_mut());
        places.extend(reads.filter(|read| read.last().is_some_and(|last| own.contains(last))));
    }
    let at = rng.below(places.len().max(1) as u64) as usize;
    places.get_mut(at)?.pop().map(drop)
}

fn two_orders(history: &mut History, rng: &mut Rng) -> Planted {
    list_read(history, rng, |_, read| read.len() > 3)?.swap(0, 2);
    Some(())
}

fn old_list(history: &mut History, rng: &mut Rng) -> Planted {
    let read = list_read(history, rng, |_, read| read.len() > 14)?;
    read.truncate(2);
    Some(())
}

/// Contents of a cache that has some.
fn cache<'a>(history: &'a mut History, rng: &mut Rng) -> Option<&'a mut Vec<Row>> {
    let mut caches: Vec<&mut Vec<Row>> = Vec::new();
    for note in &mut history.notes {
        if let Note::Cache { rows, .. } = note {
            caches.extend((!rows.is_empty()).then_some(rows));
        }
    }
    let at = rng.below(caches.len().max(1) as u64) as usize;
    (at < caches.len()).then(|| caches.swap_remove(at))
}

fn cache_lacks(history: &mut History, rng: &mut Rng) -> Planted {
    cache(history, rng)?.pop().map(drop)
}

fn cache_old(history: &mut History, rng: &mut Rng) -> Planted {
    let row = cache(history, rng)?.first_mut()?;
    row.modified -= 1;
    Some(())
}

fn cache_broken(history: &mut History, _: &mut Rng) -> Planted {
    let text = "no previous value".into();
    history.notes.push(Note::CacheBroken { member: 1, at: 1, text });
    Some(())
}

/// Revisions that were compacted for sure before a moment.
fn compacted(history: &History, before: u64) -> i64 {
    let done = history.ops.iter().filter(|op| ok(op) && op.end < before);
    done.filter_map(|op| match op.call {
        Call::Compact { revision } => Some(revision),
        _ => None,
    })
    .max()
    .unwrap_or(0)
}

fn accept(history: &mut History, index: usize) {
    let newest = history.finals.first().map_or(1, |last| last.revision);
    let op = &mut history.ops[index];
    (op.outcome, op.error, op.succeeded) = (Outcome::Ok, None, true);
    op.revision = newest;
}

fn read_compacted(history: &mut History, rng: &mut Rng) -> Planted {
    let copy = history.clone();
    let index = pick(history, rng, |op| match &op.call {
        Call::Range(range) => {
            let gone = range.revision > 0 && range.revision < compacted(&copy, op.start);
            op.outcome == Outcome::Fail && !range.serializable && gone
        }
        _ => false,
    })?;
    accept(history, index);
    Some(())
}

fn compacted_twice(history: &mut History, rng: &mut Rng) -> Planted {
    let copy = history.clone();
    let index = pick(history, rng, |op| match op.call {
        Call::Compact { revision } => {
            op.outcome == Outcome::Fail && revision <= compacted(&copy, op.start)
        }
        _ => false,
    })?;
    accept(history, index);
    Some(())
}

fn refuse(op: &mut Op, error: &str) {
    (op.outcome, op.error, op.succeeded) = (Outcome::Fail, Some(error.into()), false);
    op.revision = 0;
    op.rows.clear();
    op.detail = Default::default();
}

fn refused(history: &mut History, rng: &mut Rng) -> Planted {
    let asked = |op: &Op, revision: i64| {
        let all = history.ops.iter().filter(|other| other.outcome != Outcome::Fail);
        let mut all = all.filter(|other| other.start < op.end);
        all.any(|other| matches!(other.call, Call::Compact { revision: to } if to > revision))
    };
    let fits: Vec<bool> = history
        .ops
        .iter()
        .map(|op| match &op.call {
            Call::Range(range) => ok(op) && range.revision > 0 && !asked(op, range.revision),
            _ => false,
        })
        .collect();
    let from = rng.below(fits.len() as u64) as usize;
    let index = (0..fits.len()).map(|at| (from + at) % fits.len()).find(|at| fits[*at])?;
    refuse(&mut history.ops[index], "OutOfRange: required revision has been compacted");
    Some(())
}

fn future(history: &mut History, rng: &mut Rng) -> Planted {
    let op = range(history, rng, |range, op| {
        range.revision > 0 && range.revision + 15 < op.revision && !range.serializable
    })?;
    refuse(op, "OutOfRange: required revision is a future revision");
    Some(())
}

fn watch_refused(history: &mut History, rng: &mut Rng) -> Planted {
    let at = rng.below(history.watches.len() as u64) as usize;
    let what = WatchWhat::Compacted { revision: 1_000_000 };
    let record = WatchRecord { what, ..history.watches[at].clone() };
    history.watches.insert(at + 1, record);
    Some(())
}

/// A stream that was told "compacted" although it had asked for what was still there.
fn watch_told_too_much(history: &mut History, rng: &mut Rng) -> Planted {
    let told = history.finals.first()?.compacted;
    let mut starts: Vec<&mut i64> = Vec::new();
    for record in &mut history.watches {
        match &mut record.what {
            WatchWhat::Started { from, spec } if !spec.is_base() => starts.push(from),
            _ => {}
        }
    }
    let at = rng.below(starts.len().max(1) as u64) as usize;
    **starts.get_mut(at)? = told;
    Some(())
}

/// A member list that fits, with the learner that its cluster had for sure.
fn member_list(history: &mut History, rng: &mut Rng, learner: bool) -> Option<usize> {
    pick(history, rng, |op| {
        let has = op.detail.members.iter().any(|member| member.learner);
        ok(op) && op.call == Call::Members && has == learner
    })
}

fn learner_missing(history: &mut History, rng: &mut Rng) -> Planted {
    // One that started long after the addition was known and ended before any removal.
    let removals: Vec<(u64, u64)> = history
        .ops
        .iter()
        .filter_map(|op| match op.call {
            Call::MemberRemove { id } => Some((id, op.start)),
            _ => None,
        })
        .collect();
    let mut known: std::collections::HashMap<u64, u64> = Default::default();
    for op in &history.ops {
        for member in &op.detail.members {
            let first = known.entry(member.id).or_insert(op.end);
            *first = op.end.min(*first);
        }
    }
    let index = pick(history, rng, |op| {
        let learner = op.detail.members.iter().find(|member| member.learner);
        learner.is_some_and(|learner| {
            let stays = removals.iter().all(|(id, at)| *id != learner.id || *at > op.end);
            ok(op) && op.call == Call::Members && stays && known[&learner.id] < op.start
        })
    })?;
    history.ops[index].detail.members.retain(|member| !member.learner);
    Some(())
}

fn learner_back(history: &mut History, rng: &mut Rng) -> Planted {
    let index = pick(history, rng, |op| ok(op) && matches!(op.call, Call::MemberRemove { .. }))?;
    let Call::MemberRemove { id } = history.ops[index].call else { return None };
    let gone = history.ops[index].end;
    let rows = history.ops.iter().flat_map(|op| &op.detail.members);
    let row = rows.into_iter().find(|row| row.id == id)?.clone();
    let later = |op: &&mut Op| op.start > gone && ok(op) && op.call == Call::Members;
    let list = history.ops.iter_mut().find(later)?;
    list.detail.members.push(row);
    Some(())
}

fn learner_of_nobody(history: &mut History, rng: &mut Rng) -> Planted {
    let index = member_list(history, rng, true)?;
    let learner = history.ops[index].detail.members.iter_mut().find(|member| member.learner)?;
    learner.url.push('9');
    Some(())
}
