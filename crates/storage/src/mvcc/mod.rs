//! The multi-version key space: what applying a command does to it, and what reads find in it. One
//! writer changes it; readers fix a revision and never wait longer than one small step of the writer.

pub(crate) mod apply;
mod blocks;
pub(crate) mod compact;
mod entry;
pub(crate) mod index;
pub(crate) mod range;
pub(crate) mod row;
pub(crate) mod span;
pub(crate) mod state;
pub(crate) mod txn;
pub(crate) mod walk;
pub(crate) mod write;
