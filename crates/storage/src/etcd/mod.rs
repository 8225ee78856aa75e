//! Files of etcd, read and made, never changed: its database (`member/snap/db`, and snapshot files,
//! which hold the same), and its write-ahead log. `import` fills a new state of ours from a
//! database. No byte of these files is trusted: whatever does not fit is an error that names the
//! file and the place, and memory stays bounded by what the file really holds.
//!
//! Rooms: `bolt` knows pages and buckets, `database` what etcd keeps in them, `wal` the log, `requests`
//! what its entries ask for, `import` the way into our own state, `target` the directory that it goes
//! to, `export` the way out.

mod bolt;
mod database;
mod export;
mod fuzz;
mod import;
mod requests;
mod target;
mod wal;

use std::io;
use std::path::{Path, PathBuf};

pub use database::{Compactions, Database, DatabaseStatus, Digest, Imprint, check_digest};
pub use export::{EtcdVersion, Founding, export};
pub(crate) use fuzz::restore as fuzz_restore;
pub use import::{ImportError, Imported, Plan, import};
pub use requests::{ConfChange, ConfChangeKind, Payload};
pub use target::{Target, finish_adoption, is_etcd_dir};
pub use wal::{EtcdEntry, EtcdLog, read_wal};

/// Why a file of etcd cannot be used. Nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum EtcdFileError {
    /// The operating system refused.
    #[error("cannot {doing} {}: {source}", path.display())]
    Io {
        /// What was tried.
        doing: &'static str,
        /// On which file.
        path: PathBuf,
        /// The answer.
        source: io::Error,
    },
    /// It is no file of the expected kind.
    #[error("{} is not {expected}: {reason}", path.display())]
    Foreign {
        /// The file.
        path: PathBuf,
        /// What it should be.
        expected: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// It was such a file once.
    #[error("{} is damaged at byte {offset}: {reason}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Where. Unit: bytes from the start.
        offset: u64,
        /// What does not fit.
        reason: String,
    },
    /// Its pages are sound, but not what etcd keeps in them.
    #[error("{}, bucket {bucket:?}, key {key}: {reason}", path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// Name of the bucket.
        bucket: String,
        /// The key, escaped.
        key: String,
        /// What does not fit.
        reason: String,
    },
    /// A question that it cannot answer.
    #[error("{0}")]
    Asked(&'static str),
    /// Somebody uses it.
    #[error("{} is in use by another process: stop etcd first", path.display())]
    InUse {
        /// The file.
        path: PathBuf,
    },
}

impl EtcdFileError {
    fn io(doing: &'static str, path: &Path, source: io::Error) -> Self {
        Self::Io { doing, path: path.to_owned(), source }
    }

    fn damaged(path: &Path, offset: u64, reason: impl Into<String>) -> Self {
        Self::Damaged { path: path.to_owned(), offset, reason: reason.into() }
    }
}

/// Body of a fuzz target: any bytes as a database file are read to the end or refused. The second
/// attempt has sound meta pages in front, so that what stands behind them is reached, too.
pub(crate) fn fuzz_bolt(data: &[u8], file: &Path) {
    for bytes in [data.to_vec(), bolt::with_sound_meta(data)] {
        if std::fs::write(file, bytes).is_err() {
            return;
        }
        let Ok(database) = Database::open(file) else { continue };
        let _ = database.status();
        let _ = database.hash_kv(0);
        let _ = database.imprint();
    }
}

/// Body of a fuzz target: any bytes as a file of etcd's log are read to the end or refused. Records
/// get their checksums first, and then entries their records, so that the decoders behind them are
/// reached.
pub(crate) fn fuzz_wal(data: &[u8], dir: &Path) {
    let file = dir.join("0000000000000000-0000000000000000.wal");
    for bytes in [data.to_vec(), wal::with_sound_checksums(data), wal::with_sound_entries(data)] {
        if std::fs::write(&file, bytes).is_err() {
            return;
        }
        let _ = wal::read(dir, 0, requests::Requests::with_cheap_hashes());
    }
}
