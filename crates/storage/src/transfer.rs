//! The whole state on its way to another member: `Transfer` reads it out in chunks at one applied
//! position while writes and compactions go on, `Receiver` writes the chunks into a new generation
//! beside the live one, and `Store::install` puts that generation into force. This module never
//! opens a connection and never trusts a chunk.
//!
//! Neither side holds the state in memory. The sender holds one chunk, one batch of rows, and the
//! tables (leases, members, alarms), which are in memory anyway. The receiver holds one chunk and what
//! the engine holds for writes, which is bounded by closing and opening it. Only `Receiver::finish`
//! builds the index of the new state: from then until the installation is over there are two of them,
//! the live one and the new one.

mod install;
mod receive;
mod send;
mod wire;

pub use receive::{Received, Receiver};
pub use send::Transfer;
pub(crate) use wire::fuzz;

/// Why a state cannot be received. The live state is untouched in all cases.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum TransferError {
    /// Another transfer, or a rewrite of the files, is under way.
    #[error("another transfer to this member, or a defragmentation, is under way")]
    Busy,
    /// A chunk is not what a member sends, or not the next one.
    #[error("chunk {number} of the state cannot be used: {reason}")]
    BadChunk {
        /// Which chunk was expected, from 0.
        number: u64,
        /// What is wrong with it.
        reason: String,
    },
    /// The sender is of a newer version.
    #[error("the state is sent in layout {found}, which is newer than the {known} of this version")]
    NewerVersion {
        /// What the sender says.
        found: u32,
        /// The newest that this version knows.
        known: u32,
    },
    /// `finish` came before the last chunk, or anything came after an error.
    #[error("the transfer of the state is not complete")]
    Incomplete,
    /// The disk is so full that a second state may not fit.
    #[error("the disk is too full to receive a state")]
    NoSpace,
    /// The new files cannot be written or read, or the store was shut down.
    #[error("the state cannot be received: {0}")]
    Storage(String),
}

impl From<crate::engine::EngineError> for TransferError {
    fn from(error: crate::engine::EngineError) -> Self {
        Self::Storage(error.to_string())
    }
}

impl From<crate::types::Fatal> for TransferError {
    fn from(fatal: crate::types::Fatal) -> Self {
        Self::Storage(fatal.0)
    }
}
