//! Walks the keys of a span as they were at one revision. The index lock is given up after each few
//! hundred keys, so that a walk over millions never holds up the writer. That is sound because the
//! revision is fixed: later changes are passed over by number, and only a compaction takes anything
//! away, which the walk looks for after each step.

use kelson_api::Error;
use kelson_api::mvccpb::KeyValue;

use super::index::{Entry, Visible};
use super::row::{self, Held};
use super::span::Span;
use super::state::{Failure, State, count};
use crate::types::{Fatal, RevisionKey};

/// Keys per step: long enough to pay for the lock, short enough for the writer to wait out.
const STEP: usize = 256;

/// A key that existed at the revision of the walk.
pub(crate) enum Found {
    /// Its row is the newest one, in memory.
    Newest(Held),
    /// Its row has been replaced since.
    Older { at: RevisionKey, successor: RevisionKey },
}

impl Found {
    /// The row as an answer. Reads the disk if it was replaced longer ago than the feed remembers.
    pub(crate) fn resolve(&self, state: &State, revision: i64) -> Result<KeyValue, Failure> {
        match self {
            Self::Newest(row) => Ok(row::key_value(row)),
            Self::Older { at, successor } => older(state, *at, *successor, revision),
        }
    }
}

fn older(
    state: &State,
    at: RevisionKey,
    successor: RevisionKey,
    revision: i64,
) -> Result<KeyValue, Failure> {
    if let Some(kv) = state.feed.replaced_by(successor) {
        return Ok(kv);
    }
    count(&state.counters.disk_reads, 1);
    let row = state.persister().get(at)?;
    if state.compaction.compacted() > revision {
        return Err(Error::Compacted.into());
    }
    row.as_ref().and_then(row::key_value_of).ok_or_else(|| {
        let text = format!("revision {}.{} is missing or damaged on disk", at.main, at.sub);
        Fatal(text).into()
    })
}

/// A walk in key order, in steps.
pub(crate) struct Walk {
    span: Span,
    revision: i64,
    /// Row and key of the last entry passed, held so that no key is copied.
    last: Option<Entry>,
    done: bool,
}

impl Walk {
    /// Starts at the beginning of the span. The caller has checked the revision.
    pub(crate) fn new(span: Span, revision: i64) -> Self {
        Self { span, revision, last: None, done: false }
    }

    pub(crate) fn is_done(&self) -> bool {
        self.done
    }

    /// Takes one step, adding at most `wanted` keys to `found`.
    pub(crate) fn step(
        &mut self,
        state: &State,
        wanted: usize,
        found: &mut Vec<Found>,
    ) -> Result<(), Error> {
        let full = found.len().saturating_add(wanted);
        let last = {
            let index = state.index.read();
            let Some(bounds) = self.span.bounds(self.last.as_ref().map(Entry::key)) else {
                self.done = true;
                return self.check(state);
            };
            let mut entries = index.range(bounds);
            let mut passed = 0;
            let mut last = None;
            while passed < STEP && found.len() < full {
                let Some(entry) = entries.next() else {
                    self.done = true;
                    break;
                };
                passed += 1;
                last = Some(entry);
                match index.visible(entry, self.revision) {
                    Visible::Absent => {}
                    Visible::Newest => found.push(Found::Newest(entry.row().clone())),
                    Visible::Older { at, successor } => found.push(Found::Older { at, successor }),
                }
            }
            last.cloned()
        };
        if last.is_some() {
            self.last = last;
        }
        self.check(state)
    }

    fn check(&self, state: &State) -> Result<(), Error> {
        if state.compaction.compacted() > self.revision { Err(Error::Compacted) } else { Ok(()) }
    }
}

/// The state of one key at a revision.
pub(crate) fn find(state: &State, key: &[u8], revision: i64) -> Result<Option<KeyValue>, Failure> {
    let found = {
        let index = state.index.read();
        index.get(key).and_then(|entry| match index.visible(entry, revision) {
            Visible::Absent => None,
            Visible::Newest => Some(Found::Newest(entry.row().clone())),
            Visible::Older { at, successor } => Some(Found::Older { at, successor }),
        })
    };
    if state.compaction.compacted() > revision {
        return Err(Error::Compacted.into());
    }
    found.map(|found| found.resolve(state, revision)).transpose()
}

/// Number of keys of a span at a revision: from the block counts corrected by what the feed knows to
/// have changed since, or by a walk if the revision is older than the feed.
pub(crate) fn count_keys(state: &State, span: &Span, revision: i64) -> Result<i64, Error> {
    if let Some(key) = span.single() {
        let index = state.index.read();
        let found = index.get(key).map(|entry| index.visible(entry, revision));
        return Ok(i64::from(!matches!(found, None | Some(Visible::Absent))));
    }
    {
        // Under this lock no change can enter the index that the feed has not staged.
        let index = state.index.read();
        if let Some(born) = state.feed.born_after(revision, span) {
            return Ok(index.count(span).cast_signed() - born);
        }
    }
    let mut walk = Walk::new(span.clone(), revision);
    let mut found = Vec::new();
    let mut total = 0;
    while !walk.is_done() {
        walk.step(state, STEP, &mut found)?;
        total += found.len();
        found.clear();
    }
    Ok(i64::try_from(total).expect("fewer keys than 2^63"))
}
