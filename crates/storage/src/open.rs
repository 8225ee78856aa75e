//! The front door of the state: errors and `open`. It expects the data directory locked and
//! the log open; it never touches either.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::log::Durable;
use crate::mvcc::state::Home;
use crate::options::Options;
use crate::persist::{PersistConfig, Place};
use crate::recover::{RecoverConfig, recover};
use crate::store::{self, Loader};
use crate::types::Fatal;
use crate::{Reader, Store};

/// Why a data directory or the state in it cannot be used. Each text is for the operator.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Another process uses it.
    #[error("data directory {} is in use by another process", path.display())]
    Locked {
        /// The data directory.
        path: PathBuf,
    },
    /// It holds files of etcd.
    #[error(
        "{} holds data of etcd: start Kelson on it once, which takes them over, or restore a snapshot \
         into an empty data directory", path.display()
    )]
    ForeignData {
        /// The `member` directory.
        path: PathBuf,
    },
    /// It holds something, and should hold nothing.
    #[error("data-dir {:?} not empty or could not be read", path.display().to_string())]
    NotEmpty {
        /// The data directory.
        path: PathBuf,
    },
    /// It holds no member.
    #[error("{} holds no member of Kelson", path.display())]
    NoMember {
        /// The data directory.
        path: PathBuf,
    },
    /// It was written by a newer version.
    #[error(
        "{} has format {found}, which is newer than the {known} of this version of Kelson",
        path.display()
    )]
    NewerVersion {
        /// The file that says so.
        path: PathBuf,
        /// What it says.
        found: u32,
        /// The newest that this version writes.
        known: u32,
    },
    /// Its content cannot be trusted.
    #[error("{} cannot be used: {reason}; {advice}", path.display())]
    Damaged {
        /// The damaged file or directory.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
        /// What to do.
        advice: &'static str,
    },
    /// The rest of the store cannot start.
    #[error(transparent)]
    Start(#[from] Fatal),
    /// The operating system refused.
    #[error("cannot {doing} {}: {source}", path.display())]
    Io {
        /// What was tried.
        doing: &'static str,
        /// On which file or directory.
        path: PathBuf,
        /// The answer.
        source: io::Error,
    },
}

impl OpenError {
    pub(crate) fn io(doing: &'static str, path: &Path, source: io::Error) -> Self {
        Self::Io { doing, path: path.to_owned(), source }
    }
}

/// Opens the state of a member whose data directory is locked and whose log is open; makes an empty
/// one in a new directory. Reads everything back, which takes seconds per million keys.
///
/// # Errors
/// See `OpenError`. After an error the directory is as it was, except that a damaged state which the
/// log can rebuild has been moved to `member/state.bad-N`.
pub fn open(options: &Options, durable: Durable) -> Result<(Store, Reader), OpenError> {
    let place = Place {
        state_dir: options.data_dir.join("member").join("state"),
        cache_bytes: options.sled_cache_bytes,
        claimed: Arc::default(),
    };
    let persist = PersistConfig {
        checkpoint_bytes: options.checkpoint_bytes,
        checkpoint_interval: options.checkpoint_interval,
        place: Some(place.clone()),
        in_step: options.in_step,
    };
    let home = Home { place: place.clone(), persist: persist.clone(), durable: durable.clone() };
    let config = RecoverConfig { persist, log_purged: options.log_purged };
    let (loader, recovered, persister) =
        recover(&place, config, durable, Loader::new, |loader, row| loader.row(row))?;
    Ok(store::assemble(loader.finish(recovered), persister.into(), home, options)?)
}
