//! What can be set about the state when it is opened. Only data and defaults; each field is read in
//! exactly one place.

use std::path::PathBuf;
use std::time::Duration;

use crate::types::LogId;

/// Settings of the state.
#[derive(Clone, Debug)]
pub struct Options {
    /// Data directory of the member; the store keeps to its `member` folder.
    pub data_dir: PathBuf,
    /// Changed bytes after which the persister makes a checkpoint.
    pub checkpoint_bytes: u64,
    /// Longest time between a change and the checkpoint that holds it.
    pub checkpoint_interval: Duration,
    /// Revisions that a compaction removes at a time.
    pub compaction_batch_limit: usize,
    /// Pause of a compaction between batches.
    pub compaction_sleep: Duration,
    /// A command that takes longer to apply is logged and counted; zero is never.
    pub slow_apply: Duration,
    /// Bytes of recent revisions kept for watchers; older ones are read from disk.
    pub recent_bytes: usize,
    /// Memory that the engine may use for clean pages, and about as much again for pages written
    /// since it was opened. Unit: bytes.
    pub sled_cache_bytes: u64,
    /// Whoever applies an entry waits until the persister has nothing to do: in a simulation nothing may
    /// happen at a time of its own.
    pub in_step: bool,
    /// Everything up to this entry is gone from the log. A damaged or missing state is rebuilt only
    /// if nothing is.
    pub log_purged: LogId,
}

impl Options {
    /// The defaults for a data directory.
    pub fn new(data_dir: impl Into<PathBuf>) -> Self {
        Self {
            data_dir: data_dir.into(),
            checkpoint_bytes: 32 << 20,
            checkpoint_interval: Duration::from_secs(1),
            compaction_batch_limit: 1000,
            compaction_sleep: Duration::from_millis(10),
            slow_apply: Duration::from_millis(100),
            recent_bytes: 64 << 20,
            sled_cache_bytes: 16 << 20,
            in_step: false,
            log_purged: LogId::default(),
        }
    }
}
