//! The way out: a data directory on which etcd starts. The database is the snapshot file with the
//! members of the new cluster in it; the log is that of a cluster just founded, one entry per
//! member, which the database already contains. It is built beside its final place and appears in
//! one step. Called by the raft crate, which knows the ids.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use kelson_api::Message;
use kelson_api::etcdserverpb::Member;

use super::wal::{CONF_CHANGE, CRC, ENTRY, METADATA, SNAPSHOT, STATE};
use super::wal::{ConfChangeRecord, HardState, Metadata, RaftEntry, SnapshotMark, file_of};
use crate::Identity;
use crate::dir::{make_dir, sync_dir};
use crate::open::OpenError;
use crate::reader::Reader;
use crate::snapshot::member_json;
use crate::types::LogId;

/// Where the directory is built.
const PART: &str = "export.part";

/// Releases of etcd that a directory can be made for.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum EtcdVersion {
    /// 3.4 and 3.5, which know no storage version.
    V3_5,
    /// 3.6.
    V3_6,
    /// 3.7.
    #[default]
    V3_7,
}

impl EtcdVersion {
    /// The cluster version, and the storage version if the release knows one.
    pub(crate) fn texts(self) -> (&'static str, Option<&'static str>) {
        match self {
            Self::V3_5 => ("3.5.0", None),
            Self::V3_6 => ("3.6.0", Some("3.6.0")),
            Self::V3_7 => ("3.7.0", Some("3.7.0")),
        }
    }
}

/// What a directory is made for.
#[derive(Clone, Debug)]
pub struct Founding {
    /// Whose directory it becomes.
    pub identity: Identity,
    /// All members of the new cluster.
    pub members: Vec<Member>,
    /// For which etcd.
    pub version: EtcdVersion,
}

impl Founding {
    /// The entry that the database ends with.
    pub(crate) fn applied(&self) -> LogId {
        LogId { term: 1, index: self.members.len() as u64 }
    }
}

/// Writes a data directory of etcd from everything that the reader sees. Blocking.
///
/// # Errors
/// The target holds something or cannot be written, or the state cannot be read.
pub fn export(reader: &Reader, founding: &Founding, target: &Path) -> Result<(), OpenError> {
    let is_empty = fs::read_dir(target).is_ok_and(|mut entries| entries.next().is_none());
    if target.exists() && !is_empty {
        return Err(OpenError::NotEmpty { path: target.to_owned() });
    }
    make_dir(target)?;
    let part = target.join(PART);
    let written = write(reader, founding, &part).and_then(|()| {
        let member = target.join("member");
        fs::rename(&part, &member).map_err(|error| OpenError::io("rename", &part, error))?;
        sync_dir(target)
    });
    if written.is_err()
        && part.exists()
        && let Err(error) = fs::remove_dir_all(&part)
    {
        tracing::warn!(path = %part.display(), %error, "cannot remove a part");
    }
    written
}

fn write(reader: &Reader, founding: &Founding, member_dir: &Path) -> Result<(), OpenError> {
    let (snap, wal) = (member_dir.join("snap"), member_dir.join("wal"));
    for dir in [member_dir, &snap, &wal] {
        make_dir(dir)?;
    }
    let chunks = reader.exported(founding)?.chunks;
    write_file(&snap.join("db"), chunks)?;
    let log = std::iter::once(Ok(log(founding).into()));
    write_file(&wal.join("0000000000000000-0000000000000000.wal"), log)?;
    [snap, wal, member_dir.to_owned()].iter().try_for_each(|dir| sync_dir(dir))
}

fn write_file(
    path: &Path,
    chunks: impl Iterator<Item = std::io::Result<bytes::Bytes>>,
) -> Result<(), OpenError> {
    let failed = |error| OpenError::io("write", path, error);
    let mut options = OpenOptions::new();
    let file = options.write(true).create_new(true).mode(0o600).open(PathBuf::from(path));
    let mut file = file.map_err(failed)?;
    for chunk in chunks {
        file.write_all(&chunk.map_err(failed)?).map_err(failed)?;
    }
    file.sync_all().map_err(failed)
}

/// The log of a cluster that was just founded.
fn log(founding: &Founding) -> Vec<u8> {
    let Identity { cluster_id, member_id } = founding.identity;
    let applied = founding.applied();
    let metadata = Metadata { member_id, cluster_id }.encode_to_vec();
    let mut records = vec![
        (CRC, Vec::new()),
        (METADATA, metadata),
        (SNAPSHOT, SnapshotMark::default().encode_to_vec()),
    ];
    for (member, index) in founding.members.iter().zip(1..) {
        let change =
            ConfChangeRecord { kind: 0, member_id: member.id, context: member_json(member) };
        let data = change.encode_to_vec();
        let entry = RaftEntry { kind: CONF_CHANGE, term: applied.term, index, data };
        records.push((ENTRY, entry.encode_to_vec()));
    }
    let state = HardState { term: applied.term, vote: member_id, commit: applied.index };
    records.push((STATE, state.encode_to_vec()));
    file_of(records)
}
