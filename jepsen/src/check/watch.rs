//! What each watch stream owes by itself: order, every event once, none missing, whole revisions,
//! honest progress. Streams are measured against the merged log, so a stream that all members get
//! wrong alike shows up as a hole or a lost write instead.

use std::collections::BTreeMap;

use super::{Findings, Log, Rule};
use crate::history::{WatchRecord, WatchWhat};

/// Where a stream stands.
struct Stream {
    member: usize,
    from: i64,
    /// Newest revision sent, with the response that sent it.
    last: Option<(i64, usize)>,
    /// All up to here were promised to be sent.
    promised: i64,
    responses: usize,
}

pub(super) fn check(watches: &[WatchRecord], log: &Log, findings: &mut Findings) {
    let mut streams: BTreeMap<u64, Stream> = BTreeMap::new();
    for record in watches {
        let stream = streams.entry(record.stream).or_insert(Stream {
            member: record.member,
            from: 1,
            last: None,
            promised: 0,
            responses: 0,
        });
        match &record.what {
            WatchWhat::Started { from } => stream.from = *from,
            WatchWhat::Events { events, .. } => {
                stream.responses += 1;
                for group in events.chunk_by(|a, b| a.revision == b.revision) {
                    stream.take(record.stream, group[0].revision, log, findings);
                    twice(record, group, findings);
                }
            }
            WatchWhat::Progress { revision } => {
                stream.promise(record.stream, *revision, log, findings)
            }
            WatchWhat::Ended { .. } => {}
        }
    }
}

/// The same key twice in one revision of one response.
fn twice(record: &WatchRecord, group: &[crate::history::Event], findings: &mut Findings) {
    let mut keys: Vec<&str> = group.iter().map(|event| event.key.as_str()).collect();
    keys.sort_unstable();
    for pair in keys.windows(2) {
        if pair[0] == pair[1] {
            let (revision, member) = (group[0].revision, record.member);
            let proof = format!(
                "stream {} (member {member}): {} twice at revision {revision}",
                record.stream, pair[0]
            );
            findings.add(Rule::WatchTwice, proof);
        }
    }
}

impl Stream {
    fn take(&mut self, number: u64, revision: i64, log: &Log, findings: &mut Findings) {
        let name = format!("stream {number} (member {})", self.member);
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
                if let Some(missing) = log.between(next, revision - 1).next() {
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

    fn promise(&mut self, number: u64, revision: i64, log: &Log, findings: &mut Findings) {
        let next = self.last.map_or(self.from, |(last, _)| last + 1);
        if let Some(missing) = log.between(next, revision).next() {
            let proof = format!(
                "stream {number} (member {}): progress to {revision} without {missing}",
                self.member
            );
            findings.add(Rule::WatchProgress, proof);
        }
        self.promised = self.promised.max(revision);
    }
}
