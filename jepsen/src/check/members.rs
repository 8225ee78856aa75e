//! Membership as clients see it: who was added is in every list that starts later, until a removal of
//! it is asked for; who was removed never comes back; and nobody is there whom nobody added. From
//! answers and times alone, and only of the place where the workload adds members: others may come
//! and go as faults.

use std::collections::{BTreeMap, HashMap};

use super::order::name;
use super::{Findings, Rule};
use crate::history::{Call, Op, Outcome};

/// What is known of one member.
#[derive(Default)]
struct Life<'a> {
    /// When it was known to be there first, and by what.
    known: Option<(u64, &'a Op)>,
    /// When its removal was asked for first.
    leaving: Option<u64>,
    /// When its removal was done, and by what.
    gone: Option<(u64, &'a Op)>,
}

pub(super) fn check(ops: &[Op], findings: &mut Findings) {
    let added = ops.iter().find_map(|op| match &op.call {
        Call::MemberAdd { url } => Some(place(url)),
        _ => None,
    });
    let Some(at) = added else { return };
    let lists: Vec<&Op> = ops.iter().filter(|op| !op.detail.members.is_empty()).collect();
    let lives = lives(ops, &lists, at);
    phantoms(ops, &lists, at, findings);
    let mut reads: Vec<&Op> = lists.into_iter().filter(|op| op.call == Call::Members).collect();
    reads.sort_by_key(|op| op.start);
    for list in &reads {
        for row in &list.detail.members {
            let gone = lives.get(&row.id).and_then(|life| life.gone);
            if let Some((_, by)) = gone.filter(|(at, _)| *at < list.start) {
                let proof = format!("{} shows {:x} after {}", name(list), row.id, name(by));
                findings.add(Rule::WrongMembers, proof);
            }
        }
    }
    missing(&reads, &lives, findings);
}

/// Lists, in the order of their starts, that lack somebody who was there and whom nobody had asked to
/// remove.
fn missing(reads: &[&Op], lives: &HashMap<u64, Life<'_>>, findings: &mut Findings) {
    let mut known: Vec<(u64, u64, &Op)> = Vec::new();
    for (id, life) in lives {
        known.extend(life.known.map(|(at, by)| (at, *id, by)));
    }
    known.sort_by_key(|(at, id, _)| (*at, *id));
    let mut known = known.into_iter().peekable();
    let mut present: BTreeMap<u64, &Op> = BTreeMap::new();
    for list in reads {
        while let Some((_, id, by)) = known.next_if(|(at, ..)| *at < list.start) {
            present.insert(id, by);
        }
        let leaving = |id: &u64| lives[id].leaving.unwrap_or(u64::MAX);
        // Later lists start even later, so whoever was leaving by now is of no more interest.
        present.retain(|id, _| leaving(id) >= list.start);
        for (id, by) in present.iter().filter(|(id, _)| leaving(id) >= list.end) {
            if !list.detail.members.iter().any(|row| row.id == *id) {
                let proof = format!("{} lacks {id:x}, known by {}", name(list), name(by));
                findings.add(Rule::WrongMembers, proof);
            }
        }
    }
}

/// A URL without its port.
fn place(url: &str) -> &str {
    url.rsplit_once(':').map_or(url, |(place, _)| place)
}

fn lives<'a>(ops: &'a [Op], lists: &[&'a Op], at: &str) -> HashMap<u64, Life<'a>> {
    let mut lives: HashMap<u64, Life<'a>> = HashMap::new();
    for op in lists {
        for row in op.detail.members.iter().filter(|row| place(&row.url) == at) {
            let life = lives.entry(row.id).or_default();
            if life.known.is_none_or(|(at, _)| op.end < at) {
                life.known = Some((op.end, op));
            }
        }
    }
    for op in ops {
        let Call::MemberRemove { id } = op.call else { continue };
        let life = lives.entry(id).or_default();
        if op.outcome != Outcome::Fail {
            life.leaving = Some(life.leaving.map_or(op.start, |at| at.min(op.start)));
        }
        if op.outcome == Outcome::Ok && life.gone.is_none_or(|(at, _)| op.end < at) {
            life.gone = Some((op.end, op));
        }
    }
    lives
}

/// Learners that nobody asked for, or whose addition was refused.
fn phantoms(ops: &[Op], lists: &[&Op], at: &str, findings: &mut Findings) {
    let mut added: HashMap<&str, &Op> = HashMap::new();
    for op in ops {
        if let Call::MemberAdd { url } = &op.call {
            added.insert(url, op);
        }
    }
    for list in lists {
        for row in list.detail.members.iter().filter(|row| place(&row.url) == at) {
            let wrong = match added.get(row.url.as_str()) {
                None => "nobody added it",
                Some(by) if by.outcome == Outcome::Fail => "its addition was refused",
                Some(by) if by.start > list.end => "it was added later",
                Some(_) => continue,
            };
            let proof = format!("{} shows {:x} ({}): {wrong}", name(list), row.id, row.url);
            findings.add(Rule::WrongMembers, proof);
        }
    }
}
