//! What clients did and what members showed, and the rules that both must keep. It is told everything
//! and touches nothing; the first broken rule is the run's violation.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::sync::Arc;

use kelson_api::Error;
use kelson_api::mvccpb::event::EventType;
use kelson_raft::Status;
use kelson_storage::{Reader, Recent, Revised};

/// Lines kept for a report.
const LINES_SHOWN: usize = 40;

/// What became of a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// It is in the store at this revision; 0 if it changed nothing.
    Done(i64),
    /// It surely is not.
    Failed,
}

/// Key and value; a deletion has none.
pub(super) type Change = (Vec<u8>, Option<Vec<u8>>);

/// The changes of one revision, in the order in which they are made.
pub(super) type Changes = Vec<Change>;

/// A write of unique values.
#[derive(Debug)]
pub(super) struct Write {
    /// All of it, or nothing.
    pub(super) changes: Changes,
    /// The lease that its key hangs on.
    pub(super) lease: Option<i64>,
    /// `None`: nobody knows.
    pub(super) outcome: Option<Outcome>,
}

/// A linearizable read that was answered.
#[derive(Debug)]
pub(super) struct Read {
    /// The newest revision that anybody had been told of when it began.
    pub(super) floor: i64,
    pub(super) revision: i64,
    pub(super) key: Vec<u8>,
    pub(super) value: Option<Vec<u8>>,
}

/// What one life of a member has shown.
#[derive(Clone, Debug)]
pub(super) struct Shown {
    applied: u64,
    revision: i64,
    term: u64,
    committed: u64,
    /// Revisions up to here were compared.
    seen: i64,
    line: String,
}

impl Default for Shown {
    fn default() -> Self {
        // An empty store stands at revision 1.
        let (line, seen) = (String::new(), 1);
        Self { applied: 0, revision: 0, term: 0, committed: 0, seen, line }
    }
}

/// All that is known of a run.
#[derive(Default)]
pub(super) struct History {
    pub(super) writes: BTreeMap<u64, Write>,
    pub(super) reads: Vec<Read>,
    /// Leases that somebody asked to revoke, and was not surely refused.
    pub(super) revoked: BTreeSet<i64>,
    /// The newest revision that anybody was told of, by a write or by a linearizable read.
    pub(super) told: i64,
    pub(super) operations: u64,
    pub(super) unknown: u64,
    leaders: BTreeMap<u64, usize>,
    chains: BTreeMap<u64, (u64, i64)>,
    events: BTreeMap<i64, Changes>,
    /// The highest term that a member has led: it voted for itself, and must remember that.
    led: BTreeMap<usize, u64>,
    trace: String,
    violation: Option<String>,
    /// Simulated time. Unit: milliseconds.
    pub(super) now: u64,
}

impl History {
    pub(super) fn violate(&mut self, text: impl Into<String>) {
        let text = text.into();
        self.say(&format!("VIOLATION {text}"));
        self.violation.get_or_insert(text);
    }

    pub(super) fn violation(&self) -> Option<&str> {
        self.violation.as_deref()
    }

    /// Adds a line to the trace.
    pub(super) fn say(&mut self, line: &str) {
        // Writing to a string does not fail.
        let _ = writeln!(self.trace, "{} {line}", self.now);
    }

    pub(super) fn trace(&self) -> &str {
        &self.trace
    }

    /// The end of the trace.
    pub(super) fn last_lines(&self) -> Vec<&str> {
        let mut lines: Vec<&str> = self.trace.lines().rev().take(LINES_SHOWN).collect();
        lines.reverse();
        lines
    }

    /// A linearizable read was answered. One that begins later must not show less, even if the answer
    /// to the write that it saw was lost.
    pub(super) fn answer(&mut self, read: Read) {
        self.told = self.told.max(read.revision);
        self.reads.push(read);
    }

    /// A member has started.
    pub(super) fn born(&mut self, member: usize, status: &Status) {
        let led = self.led.get(&member).copied().unwrap_or(0);
        if status.term < led {
            self.violate(format!(
                "member {member} starts in term {}, and has led term {led}: it forgot its vote",
                status.term
            ));
        }
    }

    /// Looks at a member.
    pub(super) fn observe(
        &mut self,
        member: usize,
        shown: &mut Shown,
        status: &Status,
        reader: &Reader,
    ) {
        self.observe_positions(member, shown, status, reader);
        self.observe_events(member, shown, reader);
        let role = match (status.is_leader, status.is_learner) {
            (true, _) => 'L',
            (_, true) => 'l',
            _ => 'f',
        };
        let (term, committed, applied) = (status.term, shown.committed, shown.applied);
        let line = format!("m{member} {role}{term} c{committed} a{applied} r{}", shown.revision);
        if line != shown.line {
            self.say(&line);
            shown.line = line;
        }
    }

    fn observe_positions(
        &mut self,
        member: usize,
        shown: &mut Shown,
        status: &Status,
        reader: &Reader,
    ) {
        if status.is_leader {
            let leader = *self.leaders.entry(status.term).or_insert(member);
            if leader != member {
                self.violate(format!("term {} has two leaders: {leader}, {member}", status.term));
            }
            self.led.insert(member, status.term);
        }
        let (applied, revision) = (reader.applied().index, reader.revision());
        if (status.term, status.committed_index) < (shown.term, shown.committed)
            || status.committed_index < shown.committed
            || applied < shown.applied
            || revision < shown.revision
        {
            self.violate(format!(
                "member {member} went back: {shown:?}, then {status:?} at revision {revision}"
            ));
        }
        (shown.term, shown.committed) = (status.term, status.committed_index);
        (shown.applied, shown.revision) = (applied, revision);
        if let Some(chain) = reader.chain_at(applied) {
            let known = *self.chains.entry(applied).or_insert((chain, revision));
            if known != (chain, revision) {
                self.violate(format!(
                    "members differ at entry {applied}: {known:?}, and member {member} has \
                     {chain} at revision {revision}"
                ));
            }
        }
    }

    /// Each member must show every revision from the first on that it did not compact away.
    fn observe_events(&mut self, member: usize, shown: &mut Shown, reader: &Reader) {
        while shown.seen < reader.revision() {
            let before = shown.seen;
            let batches = match unseen(shown, reader) {
                Ok(batches) => batches,
                Err(error) => {
                    let text = format!("member {member} does not show what came after {before}");
                    return self.violate(format!("{text}: {error}"));
                }
            };
            for revised in batches {
                if let Err(text) = self.compare(member, shown, &revised) {
                    return self.violate(text);
                }
            }
            if shown.seen == before {
                return self.violate(format!(
                    "member {member} shows nothing after revision {before} and stands at {}",
                    reader.revision()
                ));
            }
        }
    }

    /// Compares the next revision that a member shows with what others have shown.
    fn compare(
        &mut self,
        member: usize,
        shown: &mut Shown,
        revised: &Revised,
    ) -> Result<(), String> {
        let (revision, due) = (revised.revision, shown.seen + 1);
        if revision != due {
            return Err(format!(
                "member {member} shows revision {revision} where {due} was to come"
            ));
        }
        let change = |event: &kelson_storage::FeedEvent| {
            let is_put = event.kind == EventType::Put;
            (event.kv.key.to_vec(), is_put.then(|| event.kv.value.to_vec()))
        };
        let changes: Changes = revised.events.iter().map(change).collect();
        let known = self.events.entry(revision).or_insert_with(|| changes.clone());
        if *known != changes {
            let (known, changes) = (text_of(known), text_of(&changes));
            return Err(format!("revision {revision} was {known} and is {changes} on m{member}"));
        }
        shown.seen = revision;
        Ok(())
    }

    /// Judges the whole, when all members have shown everything.
    pub(super) fn judge(&mut self) {
        let found = self.holes().or_else(|| self.judge_writes()).or_else(|| self.judge_reads());
        if let Some(text) = found {
            self.violate(text);
        }
    }

    fn holes(&self) -> Option<String> {
        let newest = *self.events.keys().next_back()?;
        let hole = (2..=newest).find(|revision| !self.events.contains_key(revision))?;
        Some(format!("revision {hole} was never seen, and the newest is {newest}"))
    }

    fn judge_writes(&self) -> Option<String> {
        let mut values: BTreeMap<&[u8], i64> = BTreeMap::new();
        for (revision, changes) in &self.events {
            for value in changes.iter().filter_map(|(_, value)| value.as_deref()) {
                if let Some(before) = values.insert(value, *revision) {
                    return Some(format!(
                        "{} was written at revision {before} and again at {revision}",
                        String::from_utf8_lossy(value)
                    ));
                }
            }
        }
        self.judge_outcomes(&values).or_else(|| self.judge_authors())
    }

    /// What was acknowledged is there as it was asked for, what failed is not.
    fn judge_outcomes(&self, values: &BTreeMap<&[u8], i64>) -> Option<String> {
        let mut revisions = BTreeSet::new();
        for (id, write) in &self.writes {
            match write.outcome {
                Some(Outcome::Done(revision)) if revision > 0 => {
                    let there = self.events.get(&revision);
                    if there != Some(&write.changes) {
                        return Some(format!(
                            "write {id} was acknowledged at revision {revision} with {}; there is \
                             {:?}",
                            text_of(&write.changes),
                            there.map(|there| text_of(there))
                        ));
                    }
                    if !revisions.insert(revision) {
                        return Some(format!("revision {revision} was acknowledged twice"));
                    }
                }
                Some(Outcome::Failed) => {
                    let there = write.changes.iter().filter_map(|(_, value)| value.as_deref());
                    if let Some(revision) = there.filter_map(|value| values.get(value)).next() {
                        return Some(format!("write {id} failed and is at revision {revision}"));
                    }
                }
                _ => {}
            }
        }
        None
    }

    /// Whatever is there was asked for, all of it in one write: puts by the write that has their values,
    /// a deletion by one that was acknowledged or whose outcome nobody knows, or with the lease of its
    /// key.
    fn judge_authors(&self) -> Option<String> {
        let mut authors: BTreeMap<&[u8], &Write> = BTreeMap::new();
        let mut acknowledged = BTreeSet::new();
        let mut deletions: BTreeMap<&Changes, u64> = BTreeMap::new();
        for write in self.writes.values() {
            let values = write.changes.iter().filter_map(|(_, value)| value.as_deref());
            authors.extend(values.map(|value| (value, write)));
            match write.outcome {
                Some(Outcome::Done(revision)) => drop(acknowledged.insert(revision)),
                None => *deletions.entry(&write.changes).or_default() += 1,
                Some(Outcome::Failed) => {}
            }
        }
        // Who wrote what a key holds.
        let mut holds: BTreeMap<&[u8], Option<&Write>> = BTreeMap::new();
        for (revision, changes) in &self.events {
            let author = changes.iter().find_map(|(_, value)| authors.get(value.as_deref()?));
            let is_put = changes.iter().any(|(_, value)| value.is_some());
            let is_asked_for = match author {
                Some(author) => author.changes == *changes,
                None if is_put => false,
                None => {
                    acknowledged.contains(revision)
                        || self.is_end_of_lease(changes, &holds)
                        || take(&mut deletions, changes)
                }
            };
            if !is_asked_for {
                let wanted = author.map(|author| text_of(&author.changes));
                return Some(format!(
                    "nobody asked for revision {revision} as it is: {}; asked for was {wanted:?}",
                    text_of(changes)
                ));
            }
            holds.extend(changes.iter().map(|(key, _)| (key.as_slice(), author.copied())));
        }
        None
    }

    /// Whether these are the deletions with a lease that somebody wanted to end; each has one key.
    fn is_end_of_lease(&self, changes: &Changes, holds: &BTreeMap<&[u8], Option<&Write>>) -> bool {
        let [(key, None)] = changes.as_slice() else { return false };
        let author = holds.get(key.as_slice()).copied().flatten();
        author.and_then(|author| author.lease).is_some_and(|lease| self.revoked.contains(&lease))
    }

    fn judge_reads(&self) -> Option<String> {
        let mut keys: BTreeMap<&[u8], BTreeMap<i64, Option<&[u8]>>> = BTreeMap::new();
        for (revision, changes) in &self.events {
            for (key, value) in changes {
                keys.entry(key).or_default().insert(*revision, value.as_deref());
            }
        }
        self.reads.iter().find_map(|read| {
            if read.revision < read.floor {
                return Some(format!(
                    "a read was stale: revision {} had been told of before it began: {read:?}",
                    read.floor
                ));
            }
            let history = keys.get(read.key.as_slice());
            let newest = history.and_then(|history| history.range(..=read.revision).next_back());
            let expected = newest.and_then(|(_, value)| *value);
            (expected != read.value.as_deref()).then(|| {
                let expected = expected.map(String::from_utf8_lossy);
                format!("a read saw something else than {expected:?}: {read:?}")
            })
        })
    }
}

/// What a member shows behind the revisions that were compared; those that it has compacted need not
/// come any more.
fn unseen(shown: &mut Shown, reader: &Reader) -> Result<Vec<Arc<Revised>>, Error> {
    match reader.feed().recent(shown.seen) {
        Recent::Batches(batches) => Ok(batches),
        // From its files: it began later than that, or took over a whole state.
        Recent::TooOld => {
            shown.seen = shown.seen.max(reader.compacted());
            Ok(reader.changes(shown.seen + 1, usize::MAX, usize::MAX)?.batches)
        }
    }
}

/// Takes one of these deletions, if any is left.
fn take(deletions: &mut BTreeMap<&Changes, u64>, changes: &Changes) -> bool {
    let left = deletions.get_mut(changes).filter(|left| **left > 0);
    left.map(|left| *left -= 1).is_some()
}

fn text_of(changes: &[Change]) -> String {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let one = |(key, value): &Change| match value {
        Some(value) => format!("{}={}", text(key), text(value)),
        None => format!("{} deleted", text(key)),
    };
    changes.iter().map(one).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use kelson_api::mvccpb::KeyValue;
    use kelson_storage::FeedEvent;

    use super::*;

    fn put(key: &str, value: &str) -> Change {
        (key.into(), Some(value.into()))
    }

    fn deletion(key: &str) -> Change {
        (key.into(), None)
    }

    fn write(changes: &[Change], outcome: Option<Outcome>) -> Write {
        Write { changes: changes.to_vec(), lease: None, outcome }
    }

    /// Two acknowledged puts.
    fn history() -> History {
        let mut history = History::default();
        for (id, revision, value) in [(1, 2, "1"), (2, 3, "2")] {
            let changes = vec![put("k", value)];
            history.writes.insert(id, write(&changes, Some(Outcome::Done(revision))));
            history.events.insert(revision, changes);
        }
        history
    }

    fn read(floor: i64, revision: i64, value: &str) -> Read {
        let (key, value) = (b"k".to_vec(), Some(value.as_bytes().to_vec()));
        Read { floor, revision, key, value }
    }

    #[test]
    fn a_good_history_is_good() {
        let mut history = history();
        history.reads.extend([read(2, 2, "1"), read(2, 3, "2"), read(3, 3, "2")]);
        // Whatever nobody knows of may be there, deletions too; that of a lease takes its key along.
        history.writes.insert(3, write(&[put("k", "3/0"), put("l", "3/1")], None));
        history.events.insert(4, vec![put("k", "3/0"), put("l", "3/1")]);
        history.writes.insert(4, write(&[deletion("k")], None));
        history.events.insert(5, vec![deletion("k")]);
        history.writes.insert(5, write(&[deletion("k")], Some(Outcome::Done(0))));
        history.writes.insert(6, write(&[deletion("l")], Some(Outcome::Done(6))));
        history.events.insert(6, vec![deletion("l")]);
        let leased = write(&[put("l", "7")], Some(Outcome::Done(7)));
        history.writes.insert(7, Write { lease: Some(9), ..leased });
        history.events.insert(7, vec![put("l", "7")]);
        history.revoked.insert(9);
        history.events.insert(8, vec![deletion("l")]);
        history.writes.insert(8, write(&[put("l", "8")], Some(Outcome::Failed)));
        history.judge();
        assert_eq!(history.violation(), None);
    }

    #[test]
    fn a_member_shows_every_revision_once_and_in_order() {
        let shows = |revision, value: &str| {
            let (key, value) = (b"k".as_slice().into(), value.as_bytes().to_vec().into());
            let kv = KeyValue { key, value, ..KeyValue::default() };
            let events = vec![FeedEvent { kind: EventType::Put, kv, prev_kv: None }];
            Revised { revision, events }
        };
        let (mut history, mut shown) = (history(), Shown::default());
        let mut compare = |revised: &Revised| history.compare(0, &mut shown, revised);
        assert_eq!(compare(&shows(2, "1")), Ok(()));
        let skipped = compare(&shows(4, "3")).expect_err("3 is missing");
        assert!(skipped.contains("revision 4 where 3 was to come"), "{skipped}");
        let repeated = compare(&shows(2, "1")).expect_err("2 came before");
        assert!(repeated.contains("revision 2 where 3 was to come"), "{repeated}");
        let other = compare(&shows(3, "9")).expect_err("others have a 2 there");
        assert!(other.contains("revision 3 was k=2 and is k=9"), "{other}");
        assert_eq!(compare(&shows(3, "2")), Ok(()));
    }

    #[test]
    fn a_read_shows_no_less_than_one_before_it() {
        let mut history = history();
        for write in history.writes.values_mut() {
            write.outcome = None;
        }
        history.answer(read(history.told, 3, "2"));
        history.answer(read(history.told, 2, "1"));
        history.judge();
        let found = history.violation().unwrap_or("nothing");
        assert!(found.contains("a read was stale"), "{found}");
    }

    #[test]
    fn each_rule_can_be_broken() {
        type Break = (&'static str, fn(&mut History));
        let breaks: [Break; 14] = [
            ("stale", |history| history.reads.push(read(3, 2, "1"))),
            ("something else", |history| history.reads.push(read(2, 3, "1"))),
            ("never seen", |history| drop(history.events.remove(&2))),
            ("again", |history| drop(history.events.insert(4, history.events[&3].clone()))),
            ("was acknowledged at", |history| {
                history.writes.get_mut(&2).expect("there").outcome = Some(Outcome::Done(2));
            }),
            // It was asked for one of the two.
            ("was acknowledged at", |history| {
                history.events.get_mut(&3).expect("there").push(deletion("l"));
            }),
            ("failed and is", |history| {
                history.writes.get_mut(&2).expect("there").outcome = Some(Outcome::Failed);
            }),
            ("acknowledged twice", |history| {
                let changes = history.events[&3].clone();
                history.writes.insert(3, write(&changes, Some(Outcome::Done(3))));
            }),
            // Half of a write whose outcome nobody knows.
            ("nobody asked", |history| {
                history.writes.insert(3, write(&[put("k", "3/0"), put("l", "3/1")], None));
                history.events.insert(4, vec![put("k", "3/0")]);
            }),
            ("nobody asked", |history| drop(history.events.insert(4, vec![put("k", "3")]))),
            ("nobody asked", |history| drop(history.events.insert(4, vec![deletion("k")]))),
            ("nobody asked", |history| {
                history.writes.insert(3, write(&[deletion("k")], Some(Outcome::Failed)));
                history.events.insert(4, vec![deletion("k")]);
            }),
            // One deletion, carried out twice.
            ("nobody asked", |history| {
                history.writes.insert(3, write(&[deletion("k")], None));
                history.writes.insert(4, write(&[put("k", "4")], Some(Outcome::Done(5))));
                history.events.insert(4, vec![deletion("k")]);
                history.events.insert(5, vec![put("k", "4")]);
                history.events.insert(6, vec![deletion("k")]);
            }),
            // With a lease that nobody wanted to end.
            ("nobody asked", |history| {
                history.writes.get_mut(&2).expect("there").lease = Some(7);
                history.events.insert(4, vec![deletion("k")]);
            }),
        ];
        for (at, (text, break_it)) in breaks.into_iter().enumerate() {
            let mut history = history();
            break_it(&mut history);
            history.judge();
            let found = history.violation().unwrap_or("nothing");
            assert!(found.contains(text), "{at}: {text}: {found}");
        }
    }
}
