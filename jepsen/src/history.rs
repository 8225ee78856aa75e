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

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "f", rename_all = "kebab-case")]
pub(crate) enum Call {
    Put {
        key: String,
        value: String,
    },
    /// Two puts in one transaction: one revision, both or neither.
    PutTwo {
        first: (String, String),
        second: (String, String),
    },
    /// Put if the key's mod revision is `expect` (0: absent), else read the key.
    Cas {
        key: String,
        expect: i64,
        value: String,
    },
    Delete {
        key: String,
    },
    Get {
        key: String,
        serializable: bool,
    },
    /// All keys of the workload.
    List {
        serializable: bool,
    },
}

impl Call {
    /// Keys and values that this call puts when it takes effect.
    pub(crate) fn puts(&self) -> Vec<(&str, &str)> {
        match self {
            Self::Put { key, value } | Self::Cas { key, value, .. } => vec![(key, value)],
            Self::PutTwo { first, second } => {
                vec![(&first.0, &first.1), (&second.0, &second.1)]
            }
            Self::Delete { .. } | Self::Get { .. } | Self::List { .. } => Vec::new(),
        }
    }

    /// True for calls that can change the store.
    pub(crate) fn is_write(&self) -> bool {
        !matches!(self, Self::Get { .. } | Self::List { .. })
    }

    /// True for reads that any member may answer from what it has.
    pub(crate) fn is_serializable(&self) -> bool {
        matches!(self, Self::Get { serializable: true, .. } | Self::List { serializable: true })
    }

    pub(crate) fn kind(&self) -> &'static str {
        match self {
            Self::Put { .. } => "put",
            Self::PutTwo { .. } => "put-two",
            Self::Cas { .. } => "cas",
            Self::Delete { .. } => "delete",
            Self::Get { serializable: false, .. } => "get",
            Self::Get { serializable: true, .. } => "get-serializable",
            Self::List { serializable: false } => "list",
            Self::List { serializable: true } => "list-serializable",
        }
    }
}

impl Op {
    /// True if the answer says that a new revision was made.
    pub(crate) fn wrote(&self) -> bool {
        self.outcome == Outcome::Ok && self.call.is_write() && self.succeeded
    }
}

/// A key as a read or a watch event shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Row {
    pub(crate) key: String,
    pub(crate) value: String,
    pub(crate) create: i64,
    #[serde(rename = "mod")]
    pub(crate) modified: i64,
    pub(crate) version: i64,
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
    },
    /// One response with events.
    Events {
        revision: i64,
        events: Vec<Event>,
    },
    /// A response without events that promises all up to this revision were sent.
    Progress {
        revision: i64,
    },
    Ended {
        error: String,
    },
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
