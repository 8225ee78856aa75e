//! Sets: what was added stays. From values and times alone: an element that was acknowledged, or that
//! any read has shown, is in every read that starts later; nothing is in a set that nobody added, and
//! nothing twice. It asks neither the log nor revisions.

use std::collections::{BTreeMap, HashMap, HashSet};

use super::order::name;
use super::{Findings, Rule};
use crate::history::{Call, Op, Outcome};
use crate::workload::SETS;

pub(super) fn check(ops: &[Op], findings: &mut Findings) {
    let mut sets: BTreeMap<&str, Vec<&Op>> = BTreeMap::new();
    for op in ops {
        if let Call::Get { key, .. } | Call::Cas { key, .. } = &op.call
            && key.starts_with(SETS)
        {
            sets.entry(key).or_default().push(op);
        }
    }
    sets.into_values().for_each(|ops| check_set(&ops, findings));
}

/// The element that an operation adds.
fn added(op: &Op) -> Option<&str> {
    match &op.call {
        Call::Cas { value, .. } => value.split(' ').next_back(),
        _ => None,
    }
}

/// The elements that an operation shows, if it shows any state.
fn shown(op: &Op) -> Option<Vec<&str>> {
    if op.outcome != Outcome::Ok || op.wrote() {
        return None;
    }
    Some(op.rows.first().map_or(Vec::new(), |row| row.value.split(' ').collect()))
}

fn check_set(ops: &[&Op], findings: &mut Findings) {
    let mut adders: HashMap<&str, &Op> = HashMap::new();
    // Moments from which on elements are known to be there.
    let mut known: Vec<(u64, &str, &Op)> = Vec::new();
    let mut reads: Vec<(&Op, Vec<&str>)> = Vec::new();
    for op in ops {
        if let Some(element) = added(op) {
            adders.insert(element, op);
            if op.wrote() {
                known.push((op.end, element, op));
            }
        }
        if let Some(elements) = shown(op) {
            known.extend(elements.iter().map(|element| (op.end, *element, *op)));
            reads.push((op, elements));
        }
    }
    for (op, elements) in &reads {
        check_elements(op, elements, &adders, findings);
    }
    known.sort_by_key(|(at, ..)| *at);
    reads.sort_by_key(|(op, _)| op.start);
    let mut known = known.into_iter().peekable();
    let mut must: HashMap<&str, &Op> = HashMap::new();
    for (op, elements) in reads.into_iter().filter(|(op, _)| !op.call.is_serializable()) {
        while let Some((_, element, by)) = known.next_if(|(at, ..)| *at < op.start) {
            must.entry(element).or_insert(by);
        }
        let has: HashSet<&str> = elements.into_iter().collect();
        // Sets are small by design, so looking at all that must be there is bounded.
        if let Some((element, by)) = must.iter().find(|(element, _)| !has.contains(*element)) {
            let proof = format!("{} lacks {element}, known by {}", name(op), name(by));
            findings.add(Rule::SetLost, proof);
        }
    }
}

/// Every element of a read was added once, by somebody who had asked before the read was over.
fn check_elements(
    op: &Op,
    elements: &[&str],
    adders: &HashMap<&str, &Op>,
    findings: &mut Findings,
) {
    let mut seen = HashSet::new();
    for element in elements {
        let wrong = match adders.get(element) {
            None => Some("nobody added it".to_owned()),
            Some(by) if by.outcome == Outcome::Fail => Some(format!("{} failed", name(by))),
            Some(by) if by.outcome == Outcome::Ok && !by.wrote() => {
                Some(format!("{} did not hold", name(by)))
            }
            Some(by) if by.start > op.end => Some(format!("{} came later", name(by))),
            Some(_) if !seen.insert(element) => Some("it is there twice".into()),
            Some(_) => None,
        };
        if let Some(wrong) = wrong {
            findings.add(Rule::SetPhantom, format!("{} shows {element}: {wrong}", name(op)));
        }
    }
}
