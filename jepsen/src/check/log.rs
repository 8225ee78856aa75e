//! One log out of many watch streams: revision to events, and the state of the store at every
//! revision. All members must have shown the same; the other checks measure against this log.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ops::Bound;

use super::{Findings, Rule};
use crate::history::{Event, Row, WatchRecord, WatchWhat};

/// The merged log and the states that follow from it.
#[derive(Default)]
pub(crate) struct Log {
    revisions: BTreeMap<i64, Vec<Event>>,
    /// Per key: revisions at which it changed, and what it was from then on.
    keys: BTreeMap<String, Vec<(i64, Option<Row>)>>,
}

impl Log {
    /// Merges all streams that show everything. Two contents for one revision are a divergence; the
    /// first one stays. Up to the compacted revision an event may lack its previous value.
    pub(crate) fn merge(watches: &[WatchRecord], compacted: i64, findings: &mut Findings) -> Self {
        let mut shown: HashMap<i64, usize> = HashMap::new();
        let mut parts: HashSet<u64> = HashSet::new();
        let mut log = Self::default();
        for record in watches {
            if let WatchWhat::Started { spec, .. } = &record.what
                && !spec.is_base()
            {
                parts.insert(record.stream);
            }
            let WatchWhat::Events { events, .. } = &record.what else { continue };
            if parts.contains(&record.stream) {
                continue;
            }
            for group in events.chunk_by(|a, b| a.revision == b.revision) {
                let revision = group[0].revision;
                match log.revisions.get(&revision) {
                    None => {
                        log.revisions.insert(revision, group.to_vec());
                        shown.insert(revision, record.member);
                    }
                    Some(known) if lacks_before(known, group) && revision <= compacted => {
                        log.revisions.insert(revision, group.to_vec());
                    }
                    Some(known) if lacks_before(group, known) && revision <= compacted => {}
                    Some(known) if known != group => findings.add(
                        Rule::Divergence,
                        format!(
                            "revision {revision}: member {} showed {}, member {} (stream {}) {}",
                            shown[&revision],
                            brief(known),
                            record.member,
                            record.stream,
                            brief(group)
                        ),
                    ),
                    Some(_) => {}
                }
            }
        }
        log.replay();
        log
    }

    fn replay(&mut self) {
        for (revision, events) in &self.revisions {
            for event in events {
                let states = self.keys.entry(event.key.clone()).or_default();
                states.push((*revision, event.put.clone()));
            }
        }
    }

    /// Checks that the log makes sense by itself: no holes, versions that count, true previous values.
    pub(super) fn check(&self, sparse: bool, findings: &mut Findings) {
        let mut before = None;
        for (revision, events) in &self.revisions {
            // The store begins at revision 1, so the first write makes 2.
            let expected = before.unwrap_or(1) + 1;
            if *revision != expected && !sparse {
                let proof = format!("revisions {expected} to {} were never shown", revision - 1);
                findings.add(Rule::Hole, proof);
            }
            before = Some(*revision);
            for event in events {
                self.check_event(event, findings);
            }
        }
    }

    fn check_event(&self, event: &Event, findings: &mut Findings) {
        let before = self.at(&event.key, event.revision - 1);
        if event.before.as_ref() != before {
            let proof = format!(
                "revision {}: previous {} of {} was {} in the log",
                event.revision,
                show(event.before.as_ref()),
                event.key,
                show(before)
            );
            findings.add(Rule::WrongEvent, proof);
        }
        let Some(put) = &event.put else {
            if before.is_none() {
                let proof = format!("revision {} deletes {}, absent", event.revision, event.key);
                findings.add(Rule::WrongEvent, proof);
            }
            return;
        };
        let (create, version) =
            before.map_or((event.revision, 1), |row| (row.create, row.version + 1));
        if (put.create, put.version, put.modified) != (create, version, event.revision) {
            let proof = format!(
                "revision {}: {} should have create {create}, version {version}",
                event.revision,
                show(Some(put))
            );
            findings.add(Rule::WrongEvent, proof);
        }
    }

    /// The newest revision that anybody showed; 1 for an empty store.
    pub(crate) fn last(&self) -> i64 {
        self.revisions.last_key_value().map_or(1, |(revision, _)| *revision)
    }

    pub(crate) fn revisions(&self) -> impl Iterator<Item = (i64, &[Event])> {
        self.revisions.iter().map(|(revision, events)| (*revision, events.as_slice()))
    }

    pub(crate) fn events(&self, revision: i64) -> &[Event] {
        self.revisions.get(&revision).map_or(&[], Vec::as_slice)
    }

    /// A key as it was at a revision.
    pub(crate) fn at(&self, key: &str, revision: i64) -> Option<&Row> {
        state(self.keys.get(key)?, revision)
    }

    /// Keys of a range as they were at a revision, in order; an empty `end` means one key.
    pub(crate) fn range_at(&self, key: &str, end: &str, revision: i64) -> Vec<&Row> {
        if end.is_empty() {
            return self.at(key, revision).into_iter().collect();
        }
        if end <= key {
            return Vec::new();
        }
        let bounds = (Bound::Included(key), Bound::Excluded(end));
        let states = self.keys.range::<str, _>(bounds);
        states.filter_map(|(_, states)| state(states, revision)).collect()
    }

    /// All keys as they were at a revision, in order.
    pub(crate) fn all_at(&self, revision: i64) -> Vec<&Row> {
        self.keys.values().filter_map(|states| state(states, revision)).collect()
    }
}

fn state(states: &[(i64, Option<Row>)], revision: i64) -> Option<&Row> {
    let until = states.partition_point(|(changed, _)| *changed <= revision);
    states[..until].last()?.1.as_ref()
}

/// True if the only difference is that the first one does not tell previous values.
fn lacks_before(poor: &[Event], rich: &[Event]) -> bool {
    let same = |(poor, rich): (&Event, &Event)| {
        let before = poor.before.is_none() || poor.before == rich.before;
        before && (&poor.key, &poor.put) == (&rich.key, &rich.put)
    };
    poor != rich && poor.len() == rich.len() && poor.iter().zip(rich).all(same)
}

pub(super) fn brief(events: &[Event]) -> String {
    let one = |event: &Event| match &event.put {
        Some(row) => show(Some(row)),
        None => format!("delete {}", event.key),
    };
    events.iter().map(one).collect::<Vec<_>>().join(", ")
}

pub(super) fn show(row: Option<&Row>) -> String {
    row.map_or_else(
        || "nothing".into(),
        |row| {
            let Row { key, value, create, modified, version, lease } = row;
            let lease = if *lease == 0 { String::new() } else { format!(", lease {lease:x}") };
            format!("{key}={value} (create {create}, mod {modified}, version {version}{lease})")
        },
    )
}
