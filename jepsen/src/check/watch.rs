//! What each watch stream owes by itself: only what it asked for, in order, every event once, none
//! missing, whole revisions, true contents, honest progress. Streams are measured against the merged
//! log, so a stream that all members get wrong alike shows up as a hole or a lost write instead.

use std::collections::BTreeMap;

use super::log::brief;
use super::{Findings, Log, Rule};
use crate::history::{Event, Spec, WatchRecord, WatchWhat};

/// Where a stream stands.
#[derive(Default)]
struct Stream {
    number: u64,
    member: usize,
    from: i64,
    spec: Spec,
    /// Newest revision sent, with the response that sent it.
    last: Option<(i64, usize)>,
    /// All up to here were promised to be sent.
    promised: i64,
    /// Responses; the fragments of one count once.
    responses: usize,
    /// Events of a response of which more fragments follow.
    pending: Vec<Event>,
}

pub(super) fn check(watches: &[WatchRecord], log: &Log, compacted: i64, findings: &mut Findings) {
    let mut streams: BTreeMap<u64, Stream> = BTreeMap::new();
    let mut wanted = Wanted::default();
    for record in watches {
        let stream = streams.entry(record.stream).or_insert_with(|| Stream {
            number: record.stream,
            member: record.member,
            from: 1,
            ..Stream::default()
        });
        match &record.what {
            WatchWhat::Started { from, spec } => {
                (stream.from, stream.spec) = (*from, spec.clone());
            }
            WatchWhat::Events { events, more, .. } => {
                stream.pending.extend(events.iter().cloned());
                if *more {
                    continue;
                }
                stream.responses += 1;
                let events = std::mem::take(&mut stream.pending);
                for group in events.chunk_by(|a, b| a.revision == b.revision) {
                    stream.take(group[0].revision, wanted.of(&stream.spec, log), findings);
                    stream.contents(group, log, compacted, findings);
                    stream.twice(group, findings);
                }
            }
            WatchWhat::Progress { revision } => {
                stream.promise(*revision, wanted.of(&stream.spec, log), findings);
            }
            WatchWhat::Compacted { .. } | WatchWhat::Ended { .. } => {}
        }
    }
}

/// Revisions with events that a stream asked for, by what it asked. Streams draw from few ranges and
/// filters, so there are few of these.
#[derive(Default)]
struct Wanted(BTreeMap<(String, String, bool, bool), Vec<i64>>);

impl Wanted {
    fn of(&mut self, spec: &Spec, log: &Log) -> &[i64] {
        let name = (spec.key.clone(), spec.end.clone(), spec.no_put, spec.no_delete);
        self.0.entry(name).or_insert_with(|| {
            let some = |events: &[Event]| events.iter().any(|event| spec.wants(event));
            log.revisions()
                .filter(|(_, events)| some(events))
                .map(|(revision, _)| revision)
                .collect()
        })
    }
}

/// The first of the revisions between two, both included.
fn first(revisions: &[i64], from: i64, to: i64) -> Option<i64> {
    let at = revisions.partition_point(|revision| *revision < from);
    revisions.get(at).copied().filter(|revision| *revision <= to)
}

impl Stream {
    fn name(&self) -> String {
        format!("stream {} (member {})", self.number, self.member)
    }

    /// The same key twice in one revision of one response.
    fn twice(&self, group: &[Event], findings: &mut Findings) {
        let mut keys: Vec<&str> = group.iter().map(|event| event.key.as_str()).collect();
        keys.sort_unstable();
        for pair in keys.windows(2) {
            if pair[0] == pair[1] {
                let (revision, name) = (group[0].revision, self.name());
                let proof = format!("{name}: {} twice at revision {revision}", pair[0]);
                findings.add(Rule::WatchTwice, proof);
            }
        }
    }

    /// A revision shows what the log has of it and the stream asked for, neither more nor less.
    fn contents(&self, group: &[Event], log: &Log, compacted: i64, findings: &mut Findings) {
        let revision = group[0].revision;
        if let Some(event) = group.iter().find(|event| !self.spec.wants(event)) {
            let proof = format!("{}: {} at {revision}, not asked for", self.name(), event.key);
            return findings.add(Rule::WatchFilter, proof);
        }
        // Streams of all make the log, and were compared when they did.
        if self.spec.is_base() {
            return;
        }
        let wants = |event: &&Event| self.spec.wants(event);
        let want: Vec<Event> = log.events(revision).iter().filter(wants).cloned().collect();
        let same = |(got, want): (&Event, &Event)| self.same(got, want, compacted);
        if group.len() != want.len() || !group.iter().zip(&want).all(same) {
            let (name, got, want) = (self.name(), brief(group), brief(&want));
            let proof = format!("{name}: revision {revision} shows {got}, the log has {want}");
            findings.add(Rule::WatchContent, proof);
        }
    }

    fn same(&self, got: &Event, want: &Event, compacted: i64) -> bool {
        let before = match (&got.before, self.spec.prev_kv) {
            (before, false) => before.is_none(),
            // What was before a compacted revision may be gone.
            (None, true) if got.revision <= compacted => true,
            (before, true) => *before == want.before,
        };
        (&got.key, &got.put) == (&want.key, &want.put) && before
    }

    fn take(&mut self, revision: i64, wanted: &[i64], findings: &mut Findings) {
        let name = self.name();
        let next = self.last.map_or(self.from, |(last, _)| last + 1);
        if revision < self.from {
            let proof = format!("{name}: revision {revision}, asked for {} on", self.from);
            findings.add(Rule::WatchOrder, proof);
        }
        match self.last {
            Some((last, _)) if revision < last => {
                findings.add(Rule::WatchOrder, format!("{name}: {revision} after {last}"));
            }
            Some((last, response)) if revision == last && response == self.responses => {
                findings.add(Rule::WatchTwice, format!("{name}: revision {revision} twice"));
            }
            Some((last, _)) if revision == last => {
                let proof = format!("{name}: revision {revision} in two responses");
                findings.add(Rule::WatchSplit, proof);
            }
            _ => {
                if let Some(missing) = first(wanted, next, revision - 1) {
                    let proof = format!("{name}: {missing} missing before {revision}");
                    findings.add(Rule::WatchGap, proof);
                }
            }
        }
        if revision <= self.promised {
            let proof = format!("{name}: {revision} after progress to {}", self.promised);
            findings.add(Rule::WatchProgress, proof);
        }
        if self.last.is_none_or(|(last, _)| revision >= last) {
            self.last = Some((revision, self.responses));
        }
    }

    fn promise(&mut self, revision: i64, wanted: &[i64], findings: &mut Findings) {
        let next = self.last.map_or(self.from, |(last, _)| last + 1);
        let missing = first(wanted, next, revision);
        if let Some(missing) = missing.filter(|_| self.pending.is_empty()) {
            let proof = format!("{}: progress to {revision} without {missing}", self.name());
            findings.add(Rule::WatchProgress, proof);
        }
        self.promised = self.promised.max(revision);
    }
}
