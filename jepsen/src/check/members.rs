//! Membership as clients see it: who was added is in every list that starts later, until a removal of
//! it is asked for; who was removed never comes back; and nobody is there whom nobody added. From
//! answers and times alone.

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
    let lists: Vec<&Op> = ops.iter().filter(|op| !op.detail.members.is_empty()).collect();
    let lives = lives(ops, &lists);
    phantoms(ops, &lists, findings);
    for list in lists.iter().filter(|op| matches!(op.call, Call::Members)) {
        let has: BTreeMap<u64, ()> = list.detail.members.iter().map(|row| (row.id, ())).collect();
        for (id, life) in &lives {
            if let Some((_, by)) =
                life.gone.filter(|(at, _)| *at < list.start && has.contains_key(id))
            {
                let proof = format!("{} shows {id:x} after {}", name(list), name(by));
                findings.add(Rule::WrongMembers, proof);
            }
            let must = life.known.filter(|(at, _)| *at < list.start);
            let may_lack = has.contains_key(id) || life.leaving.is_some_and(|at| at < list.end);
            if let Some((_, by)) = must.filter(|_| !may_lack) {
                let proof = format!("{} lacks {id:x}, known by {}", name(list), name(by));
                findings.add(Rule::WrongMembers, proof);
            }
        }
    }
}

fn lives<'a>(ops: &'a [Op], lists: &[&'a Op]) -> HashMap<u64, Life<'a>> {
    let mut lives: HashMap<u64, Life<'a>> = HashMap::new();
    for op in lists {
        for row in &op.detail.members {
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
fn phantoms(ops: &[Op], lists: &[&Op], findings: &mut Findings) {
    let mut added: HashMap<&str, &Op> = HashMap::new();
    for op in ops {
        if let Call::MemberAdd { url } = &op.call {
            added.insert(url, op);
        }
    }
    // Without a single addition nothing says which members the cluster began with.
    if added.is_empty() {
        return;
    }
    for list in lists {
        for row in list.detail.members.iter().filter(|row| row.learner) {
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
