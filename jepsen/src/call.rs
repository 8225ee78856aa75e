//! What a client can ask of a member, as it is recorded: plain data that the workloads draw, the wire
//! sends and the judges judge. It knows neither the protocol nor what a right answer is.

use serde::{Deserialize, Serialize};

use crate::history::Row;

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
    Range(Range),
    Txn(Txn),
    /// A lease of `ttl` seconds.
    Grant {
        ttl: i64,
    },
    KeepAlive {
        lease: i64,
    },
    Revoke {
        lease: i64,
    },
    TimeToLive {
        lease: i64,
    },
    Compact {
        revision: i64,
    },
    Members,
    /// Adds a learner.
    MemberAdd {
        url: String,
    },
    MemberPromote {
        id: u64,
    },
    MemberRemove {
        id: u64,
    },
}

/// A read of one key (`end` empty) or of all from `key` up to and without `end`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Range {
    pub(crate) key: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(crate) end: String,
    /// 0 for the newest.
    #[serde(skip_serializing_if = "zero")]
    pub(crate) revision: i64,
    #[serde(skip_serializing_if = "zero")]
    pub(crate) limit: i64,
    #[serde(skip_serializing_if = "plain")]
    pub(crate) sort: Option<(Field, bool)>,
    #[serde(skip_serializing_if = "no")]
    pub(crate) serializable: bool,
    #[serde(skip_serializing_if = "no")]
    pub(crate) keys_only: bool,
    #[serde(skip_serializing_if = "no")]
    pub(crate) count_only: bool,
    /// Bounds of the mod revision, both included, 0 for none.
    #[serde(skip_serializing_if = "open")]
    pub(crate) modified: (i64, i64),
    /// Bounds of the create revision.
    #[serde(skip_serializing_if = "open")]
    pub(crate) created: (i64, i64),
}

/// What a range is sorted by; with `true` beside it, downward.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Field {
    Key,
    Version,
    Create,
    Mod,
    Value,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Txn {
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) compare: Vec<Compare>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) success: Vec<TxnOp>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) failure: Vec<TxnOp>,
}

/// Holds if each key in the range fits; a range without keys counts as one absent key.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Compare {
    pub(crate) key: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub(crate) end: String,
    pub(crate) is: Is,
    pub(crate) to: Operand,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Is {
    Equal,
    Unequal,
    Greater,
    Less,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Operand {
    Version(i64),
    Create(i64),
    Mod(i64),
    Lease(i64),
    Value(String),
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "lowercase")]
pub(crate) enum TxnOp {
    Put {
        key: String,
        value: String,
        #[serde(default, skip_serializing_if = "zero")]
        lease: i64,
    },
    /// Deletes one key or a range, and answers with what was there.
    Delete {
        key: String,
        #[serde(default, skip_serializing_if = "String::is_empty")]
        end: String,
    },
    Range(Range),
    Txn(Txn),
}

/// What one step of a transaction answered.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "lowercase")]
pub(crate) enum Part {
    Put,
    Delete { rows: Vec<Row> },
    Range { rows: Vec<Row>, count: i64, more: bool },
    Txn { succeeded: bool, parts: Vec<Part> },
}

/// A member as the member list shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct MemberRow {
    pub(crate) id: u64,
    pub(crate) url: String,
    pub(crate) learner: bool,
}

fn zero(number: &i64) -> bool {
    *number == 0
}

fn no(switch: &bool) -> bool {
    !*switch
}

fn open(bounds: &(i64, i64)) -> bool {
    *bounds == (0, 0)
}

fn plain(sort: &Option<(Field, bool)>) -> bool {
    sort.is_none()
}

/// The first key behind all that begin with `prefix`.
pub(crate) fn end_of(prefix: &str) -> String {
    let mut end = prefix.to_owned();
    // All prefixes end with a plain character, so there is a next one.
    let last = end.pop().map_or('\u{1}', |last| char::from(last as u8 + 1));
    end.push(last);
    end
}

impl Range {
    pub(crate) fn one(key: &str) -> Self {
        Self { key: key.to_owned(), ..Self::default() }
    }

    pub(crate) fn prefix(prefix: &str) -> Self {
        Self { key: prefix.to_owned(), end: end_of(prefix), ..Self::default() }
    }

    pub(crate) fn covers(&self, key: &str) -> bool {
        covers(&self.key, &self.end, key)
    }

    /// True if the answer shows every key of the range with its newest value.
    pub(crate) fn is_whole(&self) -> bool {
        let cut = self.limit > 0 || self.keys_only || self.count_only;
        !cut && self.revision == 0 && self.modified == (0, 0) && self.created == (0, 0)
    }
}

/// True if a key lies in a range as the protocol writes it.
pub(crate) fn covers(from: &str, end: &str, key: &str) -> bool {
    if end.is_empty() { key == from } else { key >= from && key < end }
}

impl Compare {
    pub(crate) fn one(key: &str, is: Is, to: Operand) -> Self {
        Self { key: key.to_owned(), end: String::new(), is, to }
    }
}

impl TxnOp {
    pub(crate) fn put(key: &str, value: &str) -> Self {
        Self::Put { key: key.to_owned(), value: value.to_owned(), lease: 0 }
    }

    pub(crate) fn delete(key: &str) -> Self {
        Self::Delete { key: key.to_owned(), end: String::new() }
    }

    pub(crate) fn get(key: &str) -> Self {
        Self::Range(Range::one(key))
    }
}

impl Txn {
    /// All steps of both branches, those of transactions inside included.
    pub(crate) fn steps(&self) -> Vec<&TxnOp> {
        let mut steps = Vec::new();
        for step in self.success.iter().chain(&self.failure) {
            steps.push(step);
            if let TxnOp::Txn(inner) = step {
                steps.extend(inner.steps());
            }
        }
        steps
    }

    /// Keys, values and leases that it may put.
    pub(crate) fn puts(&self) -> Vec<(&str, &str, i64)> {
        let mut puts = Vec::new();
        for step in self.steps() {
            if let TxnOp::Put { key, value, lease } = step {
                puts.push((key.as_str(), value.as_str(), *lease));
            }
        }
        puts
    }

    /// Ranges that it may delete.
    pub(crate) fn deletes(&self) -> Vec<(&str, &str)> {
        let mut deletes = Vec::new();
        for step in self.steps() {
            if let TxnOp::Delete { key, end } = step {
                deletes.push((key.as_str(), end.as_str()));
            }
        }
        deletes
    }
}

impl Call {
    /// Keys and values that this call may put when it takes effect.
    pub(crate) fn puts(&self) -> Vec<(&str, &str)> {
        match self {
            Self::Put { key, value } | Self::Cas { key, value, .. } => vec![(key, value)],
            Self::PutTwo { first, second } => {
                vec![(&first.0, &first.1), (&second.0, &second.1)]
            }
            Self::Txn(txn) => txn.puts().into_iter().map(|(key, value, _)| (key, value)).collect(),
            _ => Vec::new(),
        }
    }

    /// Ranges (key and end) that this call may delete when it takes effect.
    pub(crate) fn deletes(&self) -> Vec<(&str, &str)> {
        match self {
            Self::Delete { key } => vec![(key, "")],
            Self::Txn(txn) => txn.deletes(),
            _ => Vec::new(),
        }
    }

    /// True for calls that can change keys.
    pub(crate) fn is_write(&self) -> bool {
        !self.puts().is_empty() || !self.deletes().is_empty()
    }

    /// True for calls that change something when they take effect, keys or not: without an answer
    /// nobody knows whether they did.
    pub(crate) fn has_effect(&self) -> bool {
        match self {
            Self::Range(_) | Self::Get { .. } | Self::List { .. } => false,
            Self::TimeToLive { .. } | Self::Members => false,
            Self::Txn(_) => self.is_write(),
            _ => true,
        }
    }

    /// True for calls whose answers show a revision that need not be the newest one.
    pub(crate) fn is_serializable(&self) -> bool {
        match self {
            Self::Get { serializable, .. } | Self::List { serializable } => *serializable,
            Self::Range(range) => range.serializable,
            // What a member knows by itself stands in their headers.
            Self::KeepAlive { .. } | Self::TimeToLive { .. } => true,
            _ => false,
        }
    }

    pub(crate) fn is_about_members(&self) -> bool {
        matches!(
            self,
            Self::Members
                | Self::MemberAdd { .. }
                | Self::MemberPromote { .. }
                | Self::MemberRemove { .. }
        )
    }

    /// A read as a range; none for all else.
    pub(crate) fn range(&self) -> Option<Range> {
        match self {
            Self::Get { key, serializable } => {
                Some(Range { serializable: *serializable, ..Range::one(key) })
            }
            Self::List { serializable } => {
                let all = Range::prefix(crate::client::PREFIX);
                Some(Range { serializable: *serializable, ..all })
            }
            Self::Range(range) => Some(range.clone()),
            _ => None,
        }
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
            Self::Range(Range { serializable: false, .. }) => "range",
            Self::Range(Range { serializable: true, .. }) => "range-serializable",
            Self::Txn(_) if self.is_write() => "txn",
            Self::Txn(_) => "txn-reading",
            Self::Grant { .. } => "grant",
            Self::KeepAlive { .. } => "keep-alive",
            Self::Revoke { .. } => "revoke",
            Self::TimeToLive { .. } => "time-to-live",
            Self::Compact { .. } => "compact",
            Self::Members => "members",
            Self::MemberAdd { .. } => "member-add",
            Self::MemberPromote { .. } => "member-promote",
            Self::MemberRemove { .. } => "member-remove",
        }
    }
}
