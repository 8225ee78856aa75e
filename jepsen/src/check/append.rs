//! Lists: from what transactions read, the order of appends follows, and from that who must come
//! before whom. A cycle means that no order of whole transactions explains what they saw; further
//! anomalies need no cycle. It knows neither the store nor its revisions. After Adya, Liskov and
//! O'Neil (2000) and Kingsbury and Alvaro (Elle, 2020), whose names for anomalies it uses.

use std::collections::{BTreeMap, HashMap, HashSet};

use super::cycle::{Edge, Graph, Kind};
use super::{Findings, Rule};
use crate::history::{ListTxn, Mop, Note, Outcome};

pub(super) fn check(notes: &[Note], findings: &mut Findings) {
    let mut txns: Vec<&ListTxn> = Vec::new();
    for note in notes {
        if let Note::Lists(txn) = note {
            txns.push(txn);
        }
    }
    if txns.is_empty() {
        return;
    }
    let writers = writers(&txns);
    let mut longest: BTreeMap<&str, &[String]> = BTreeMap::new();
    for txn in txns.iter().filter(|txn| txn.outcome == Outcome::Ok) {
        inside(txn, findings);
        for (mop, read) in reads(txn) {
            check_read(txn, mop, read, &txns, &writers, findings);
            let known = longest.entry(&mop.key).or_default();
            if read.len() > known.len() {
                *known = read;
            }
        }
    }
    for txn in txns.iter().filter(|txn| txn.outcome == Outcome::Ok) {
        for (mop, read) in reads(txn) {
            if !longest[mop.key.as_str()].starts_with(read) {
                let proof = format!(
                    "{} read {} = {read:?}; another read {:?}",
                    name(txn),
                    mop.key,
                    longest[mop.key.as_str()]
                );
                findings.add(Rule::ListOrder, proof);
            }
        }
    }
    for cycle in graph(&txns, &writers, &longest).cycles() {
        let steps: Vec<String> = cycle.edges.iter().map(|edge| step(edge, &txns)).collect();
        findings.add(cycle.rule, steps.join(" "));
    }
}

fn name(txn: &ListTxn) -> String {
    let (start, end) = (txn.start as f64 / 1e9, txn.end as f64 / 1e9);
    format!("[{start:.4}-{end:.4} process {}]", txn.process)
}

fn step(edge: &Edge, txns: &[&ListTxn]) -> String {
    let why = match edge.kind {
        Kind::WriteWrite => "is overwritten by",
        Kind::WriteRead => "is read by",
        Kind::ReadWrite => "did not see",
        Kind::Time => "ended before",
    };
    let show = |index: usize| txns.get(index).map_or("..".into(), |txn| name(txn));
    format!("{} {why} {};", show(edge.from), show(edge.to))
}

fn reads(txn: &ListTxn) -> impl Iterator<Item = (&Mop, &[String])> {
    txn.mops.iter().filter_map(|mop| Some((mop, mop.read.as_deref()?)))
}

/// Elements to the transactions that append them, and whether each was the last one to its list.
fn writers<'a>(txns: &[&'a ListTxn]) -> HashMap<&'a str, (usize, bool)> {
    let mut writers = HashMap::new();
    for (index, txn) in txns.iter().enumerate() {
        for (at, mop) in txn.mops.iter().enumerate() {
            let Some(element) = &mop.append else { continue };
            let later = &txn.mops[at + 1..];
            let last = !later.iter().any(|other| other.key == mop.key && other.append.is_some());
            writers.insert(element.as_str(), (index, last));
        }
    }
    writers
}

/// What a read shows was appended once, by a transaction that did not fail, and as a whole.
fn check_read(
    txn: &ListTxn,
    mop: &Mop,
    read: &[String],
    txns: &[&ListTxn],
    writers: &HashMap<&str, (usize, bool)>,
    findings: &mut Findings,
) {
    let mut seen = HashSet::new();
    for element in read {
        match writers.get(element.as_str()) {
            None => {
                let proof = format!("{} read {element} in {}: nobody's", name(txn), mop.key);
                findings.add(Rule::ListAborted, proof);
            }
            Some((by, _)) if txns[*by].outcome == Outcome::Fail => {
                let proof = format!("{} read {element} of failed {}", name(txn), name(txns[*by]));
                findings.add(Rule::ListAborted, proof);
            }
            Some(_) => {}
        }
        if !seen.insert(element) {
            let proof = format!("{} read {element} in {} twice", name(txn), mop.key);
            findings.add(Rule::ListOrder, proof);
        }
    }
    // The end of a list that another transaction had not yet finished.
    if let Some((by, false)) = read.last().and_then(|last| writers.get(last.as_str()))
        && !std::ptr::eq(txns[*by], txn)
    {
        let proof = format!("{} read {} half done by {}", name(txn), mop.key, name(txns[*by]));
        findings.add(Rule::ListIntermediate, proof);
    }
}

/// A transaction sees its own appends, and nothing changes under it.
fn inside(txn: &ListTxn, findings: &mut Findings) {
    // Per list: what it was when read first, if it was, and own appends since.
    let mut known: HashMap<&str, (Option<Vec<&str>>, Vec<&str>)> = HashMap::new();
    for mop in &txn.mops {
        let (base, own) = known.entry(&mop.key).or_default();
        if let Some(element) = &mop.append {
            own.push(element);
        }
        let Some(read) = &mop.read else { continue };
        let read: Vec<&str> = read.iter().map(String::as_str).collect();
        let right = match base {
            Some(base) => [&base[..], own].concat() == read,
            None => read.ends_with(own),
        };
        if !right {
            let proof = format!("{} read {} = {read:?} after {own:?}", name(txn), mop.key);
            findings.add(Rule::ListInternal, proof);
        }
        if base.is_none() {
            *base = Some(read[..read.len().saturating_sub(own.len())].to_vec());
        }
    }
}

/// Who must come before whom.
fn graph(
    txns: &[&ListTxn],
    writers: &HashMap<&str, (usize, bool)>,
    longest: &BTreeMap<&str, &[String]>,
) -> Graph {
    let mut graph = Graph::new(txns.len());
    let unread = unread(txns, longest);
    // Writers of each list in order, without those that failed: they are reported elsewhere.
    let mut orders: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
    let by = |element: &String| writers.get(element.as_str()).map(|(by, _)| *by);
    for (key, list) in longest {
        orders.insert(key, list.iter().filter_map(by).collect());
    }
    for (key, order) in &orders {
        for pair in order.windows(2) {
            graph.add(pair[0], pair[1], Kind::WriteWrite);
        }
        // What was acknowledged and is in no read must come behind all that was read.
        if let (Some(last), Some(late)) = (order.last(), unread.get(key)) {
            late.iter().for_each(|late| graph.add(*last, *late, Kind::WriteWrite));
        }
    }
    for (index, txn) in txns.iter().enumerate().filter(|(_, txn)| txn.outcome == Outcome::Ok) {
        let mut first: HashSet<&str> = HashSet::new();
        for (mop, read) in reads(txn).filter(|(mop, _)| first.insert(&mop.key)) {
            // Its own appends are no news to it.
            let foreign = read.iter().filter(|element| by(element) != Some(index)).count();
            if let Some(last) = foreign.checked_sub(1).and_then(|at| by(&read[at])) {
                graph.add(last, index, Kind::WriteRead);
            }
            let list = longest[mop.key.as_str()];
            let next = list[foreign.min(list.len())..].iter().filter_map(by);
            let next = next.filter(|other| *other != index).take(1);
            next.for_each(|other| graph.add(index, other, Kind::ReadWrite));
            if foreign == list.len() {
                let late = unread.get(mop.key.as_str()).into_iter().flatten();
                late.for_each(|other| graph.add(index, *other, Kind::ReadWrite));
            }
        }
    }
    let done = |txn: &ListTxn| (txn.start, (txn.outcome == Outcome::Ok).then_some(txn.end));
    graph.add_time(txns.iter().map(|txn| done(txn)));
    graph
}

/// Acknowledged appends that no read shows, by list.
fn unread<'a>(
    txns: &[&'a ListTxn],
    longest: &BTreeMap<&str, &[String]>,
) -> BTreeMap<&'a str, Vec<usize>> {
    let mut unread: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
    for (index, txn) in txns.iter().enumerate().filter(|(_, txn)| txn.outcome == Outcome::Ok) {
        for mop in &txn.mops {
            let Some(element) = &mop.append else { continue };
            let read = longest.get(mop.key.as_str()).copied().unwrap_or_default();
            if !read.contains(element) {
                unread.entry(&mop.key).or_default().push(index);
            }
        }
    }
    unread
}
