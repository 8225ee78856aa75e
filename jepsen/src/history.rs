//! What a run recorded: every operation with its times and answer, and all that the watchers were
//! sent. It never judges; clients write it, the checks read it, and `jepsen check` reads it again
//! from the files.

use std::fs::File;
use std::io::{self, BufRead, BufReader, BufWriter, Write};
use std::path::Path;
use std::time::Instant;

use parking_lot::Mutex;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

pub(crate) use crate::call::{Call, MemberRow, Part};
use crate::call::{Range, covers};
pub(crate) use crate::monitor::Sighting;

/// One operation of one client process. A process has at most one at a time, and takes a new number
/// after an outcome that it cannot know.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Op {
    pub(crate) process: u64,
    /// The member that was asked, from 1.
    pub(crate) member: usize,
    pub(crate) call: Call,
    /// Nanoseconds since the run began.
    pub(crate) start: u64,
    pub(crate) end: u64,
    pub(crate) outcome: Outcome,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) error: Option<String>,
    /// Revision in the header of the answer; 0 without an answer.
    #[serde(default)]
    pub(crate) revision: i64,
    /// A compare held, or a delete found its key; true for plain writes.
    #[serde(default)]
    pub(crate) succeeded: bool,
    /// What a read saw; for a compare that failed, the key as its else branch found it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) rows: Vec<Row>,
    #[serde(default, skip_serializing_if = "Detail::is_empty")]
    pub(crate) detail: Detail,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Outcome {
    Ok,
    /// Certainly without effect.
    Fail,
    /// It may have happened, or may still happen.
    Unknown,
}

/// The parts of an answer that only some calls have.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Detail {
    /// Keys in a range, whatever was left out of the answer.
    #[serde(skip_serializing_if = "is_zero")]
    pub(crate) count: i64,
    /// The limit cut something off.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub(crate) more: bool,
    /// One per step of the branch that a transaction took.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) parts: Vec<Part>,
    /// The lease that was granted.
    #[serde(skip_serializing_if = "is_zero")]
    pub(crate) lease: i64,
    /// Seconds: granted, or left.
    #[serde(skip_serializing_if = "is_zero")]
    pub(crate) ttl: i64,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) members: Vec<MemberRow>,
    /// The member that was added.
    #[serde(skip_serializing_if = "is_nobody")]
    pub(crate) id: u64,
}

impl Detail {
    fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

fn is_zero(number: &i64) -> bool {
    *number == 0
}

fn is_nobody(id: &u64) -> bool {
    *id == 0
}

impl Op {
    /// True if the answer says that a new revision was made.
    pub(crate) fn wrote(&self) -> bool {
        self.outcome == Outcome::Ok
            && match &self.call {
                Call::Txn(_) => changed(&self.detail.parts),
                call => call.is_write() && self.succeeded,
            }
    }

    /// All rows that the answer shows, those inside of transactions included.
    pub(crate) fn shown(&self) -> Vec<&Row> {
        let mut rows: Vec<&Row> = self.rows.iter().collect();
        show(&self.detail.parts, &mut rows);
        rows
    }
}

/// True if one of the steps changed a key.
pub(crate) fn changed(parts: &[Part]) -> bool {
    parts.iter().any(|part| match part {
        Part::Put => true,
        Part::Delete { rows } => !rows.is_empty(),
        Part::Range { .. } => false,
        Part::Txn { parts, .. } => changed(parts),
    })
}

fn show<'a>(parts: &'a [Part], into: &mut Vec<&'a Row>) {
    for part in parts {
        match part {
            Part::Put => {}
            Part::Delete { rows } | Part::Range { rows, .. } => into.extend(rows),
            Part::Txn { parts, .. } => show(parts, into),
        }
    }
}

/// A key as a read or a watch event shows it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Row {
    pub(crate) key: String,
    pub(crate) value: String,
    pub(crate) create: i64,
    #[serde(rename = "mod")]
    pub(crate) modified: i64,
    pub(crate) version: i64,
    #[serde(default, skip_serializing_if = "is_zero")]
    pub(crate) lease: i64,
}

/// One message of one watch stream. Every stream has a number of its own; a watcher that lost its
/// stream goes on with a new one.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct WatchRecord {
    pub(crate) stream: u64,
    pub(crate) member: usize,
    pub(crate) at: u64,
    #[serde(flatten)]
    pub(crate) what: WatchWhat,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "what", rename_all = "kebab-case")]
pub(crate) enum WatchWhat {
    /// Asked for everything from this revision on.
    Started {
        from: i64,
        #[serde(default, skip_serializing_if = "Spec::is_base")]
        spec: Spec,
    },
    /// One response with events.
    Events {
        revision: i64,
        events: Vec<Event>,
        /// A fragment that others follow.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        more: bool,
    },
    /// A response without events that promises all up to this revision were sent.
    Progress {
        revision: i64,
    },
    /// The stream asked for what was compacted away, up to and without this revision.
    Compacted {
        revision: i64,
    },
    Ended {
        error: String,
    },
}

/// What a stream asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Spec {
    pub(crate) key: String,
    /// Empty for one key.
    pub(crate) end: String,
    pub(crate) no_put: bool,
    pub(crate) no_delete: bool,
    pub(crate) prev_kv: bool,
    pub(crate) progress: bool,
    pub(crate) fragment: bool,
}

impl Default for Spec {
    /// All keys with all that there is to see: the streams of which the log is made.
    fn default() -> Self {
        let all = Range::prefix(crate::client::PREFIX);
        Self {
            key: all.key,
            end: all.end,
            no_put: false,
            no_delete: false,
            prev_kv: true,
            progress: true,
            fragment: false,
        }
    }
}

impl Spec {
    pub(crate) fn is_base(&self) -> bool {
        *self == Self::default()
    }

    /// True if an event belongs into the stream.
    pub(crate) fn wants(&self, event: &Event) -> bool {
        let kind = if event.put.is_some() { self.no_put } else { self.no_delete };
        !kind && covers(&self.key, &self.end, &event.key)
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Event {
    pub(crate) revision: i64,
    pub(crate) key: String,
    /// The key as put; none for a delete.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) put: Option<Row>,
    /// The key as it was before, as the event says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) before: Option<Row>,
}

/// What a workload recorded beside its operations.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "note", rename_all = "kebab-case")]
pub(crate) enum Note {
    Lists(ListTxn),
    /// A cache made of a list and a watch, as it was when it had come to this revision.
    Cache {
        member: usize,
        at: u64,
        revision: i64,
        rows: Vec<Row>,
    },
    /// An event that a cache could not use.
    CacheBroken {
        member: usize,
        at: u64,
        text: String,
    },
    /// An event of etcd came without its previous value; right only if that was compacted.
    PreviousGone {
        member: usize,
        at: u64,
        revision: i64,
        key: String,
    },
}

/// A transaction on lists, of two operations on the store.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct ListTxn {
    pub(crate) process: u64,
    pub(crate) start: u64,
    pub(crate) end: u64,
    pub(crate) outcome: Outcome,
    pub(crate) mops: Vec<Mop>,
}

/// One step: an append of an element, or a read and what it saw.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Mop {
    pub(crate) key: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) append: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) read: Option<Vec<String>>,
}

/// What one member says at the end of a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Final {
    pub(crate) member: usize,
    /// The revision at which all were asked.
    pub(crate) revision: i64,
    pub(crate) hash: u32,
    pub(crate) compacted: i64,
    /// All keys at that revision, read from this member alone.
    pub(crate) rows: Vec<Row>,
    /// How far this member's watcher came.
    pub(crate) watched: i64,
}

/// A run directory with this file holds a sparse history.
pub(crate) const SPARSE: &str = "sparse";

/// Everything that the checks look at.
#[derive(Clone, Debug, Default)]
pub(crate) struct History {
    pub(crate) ops: Vec<Op>,
    pub(crate) watches: Vec<WatchRecord>,
    pub(crate) finals: Vec<Final>,
    pub(crate) notes: Vec<Note>,
    /// Who was seen to lead, in the order of time.
    pub(crate) leaders: Vec<Sighting>,
    /// Keys that no watcher covers were written too, so revisions may be missing from the log.
    pub(crate) sparse: bool,
}

impl History {
    /// Reads the files of a run directory.
    pub(crate) fn load(dir: &Path) -> io::Result<Self> {
        Ok(Self {
            ops: load_lines(&dir.join("history.jsonl"))?,
            watches: load_lines(&dir.join("watch.jsonl"))?,
            finals: load_lines(&dir.join("finals.jsonl"))?,
            notes: load_lines(&dir.join("notes.jsonl"))?,
            leaders: load_lines(&dir.join("leaders.jsonl"))?,
            sparse: dir.join(SPARSE).exists(),
        })
    }
}

pub(crate) fn load_lines<T: DeserializeOwned>(path: &Path) -> io::Result<Vec<T>> {
    let name = path.display();
    let file = File::open(path).map_err(|error| io::Error::other(format!("{name}: {error}")))?;
    let mut rows = Vec::new();
    for (number, line) in BufReader::new(file).lines().enumerate() {
        let row = serde_json::from_str(&line?)
            .map_err(|error| io::Error::other(format!("{name}:{}: {error}", number + 1)))?;
        rows.push(row);
    }
    Ok(rows)
}

/// Takes records from all clients and keeps them in memory and in a file. Memory grows with the run:
/// about 300 bytes per operation, so hours at the bounded rate of the workload fit.
pub(crate) struct Recorder<T> {
    inner: Mutex<(Vec<T>, BufWriter<File>)>,
}

impl<T: Serialize + Clone> Recorder<T> {
    pub(crate) fn create(path: &Path) -> io::Result<Self> {
        Ok(Self { inner: Mutex::new((Vec::new(), BufWriter::new(File::create(path)?))) })
    }

    pub(crate) fn add(&self, record: T) {
        let mut line = serde_json::to_vec(&record).expect("records are plain data");
        line.push(b'\n');
        let mut inner = self.inner.lock();
        // A run whose record cannot be written proves nothing, so it must not go on.
        inner.1.write_all(&line).expect("the run directory takes the history");
        inner.0.push(record);
    }

    /// Flushes the file and gives what was recorded so far.
    pub(crate) fn all(&self) -> io::Result<Vec<T>> {
        let mut inner = self.inner.lock();
        inner.1.flush()?;
        Ok(inner.0.clone())
    }

    /// Looks at the records in place.
    pub(crate) fn with<R>(&self, look: impl FnOnce(&[T]) -> R) -> R {
        look(&self.inner.lock().0)
    }
}

/// The one clock of a run: nanoseconds since it began.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Clock(Instant);

impl Clock {
    pub(crate) fn start() -> Self {
        Self(Instant::now())
    }

    pub(crate) fn now(&self) -> u64 {
        self.0.elapsed().as_nanos() as u64
    }

    pub(crate) fn seconds(&self) -> f64 {
        self.0.elapsed().as_secs_f64()
    }
}
