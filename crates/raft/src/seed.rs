//! A member whose life does not begin with an empty store: `restore` makes one from a snapshot, `adopt`
//! from the data directory of an etcd. Here is what both do in the end: identity, vote and log of a
//! member in a directory that is being built. Nothing of it counts before the directory has its name.

use std::collections::{BTreeMap, BTreeSet};

use kelson_api::etcdserverpb::Member;
use kelson_storage::etcd::Target;
use kelson_storage::log::{self, Log, LogError, LogOptions};
use kelson_storage::{Identity, LogId as Position, OpenError};

use crate::codec;
use crate::types::{Membership, Peer, Vote};

/// Bytes of entries handed to the log in one step.
const STEP_BYTES: usize = 4 << 20;

/// Why it could not be written.
#[derive(Debug, thiserror::Error)]
pub enum SeedError {
    /// The directory.
    #[error(transparent)]
    Dir(#[from] OpenError),
    /// The log.
    #[error("write the log: {0}")]
    Log(#[from] LogError),
    /// The members are none that can make a cluster.
    #[error("impossible membership: {0}")]
    Membership(String),
}

/// The raft membership of rows of the members table.
pub(crate) fn membership(members: &BTreeMap<u64, Member>) -> Result<Membership, SeedError> {
    let voters = members.values().filter(|member| !member.is_learner).map(|member| member.id);
    let peer =
        |member: &Member| Peer { name: member.name.clone(), peer_urls: member.peer_ur_ls.clone() };
    let nodes: BTreeMap<u64, Peer> =
        members.values().map(|member| (member.id, peer(member))).collect();
    Membership::new(vec![voters.collect::<BTreeSet<u64>>()], nodes)
        .map_err(|error| SeedError::Membership(error.to_string()))
}

/// Writes identity and log: the vote, the position behind which the log begins, and its entries.
pub(crate) fn write(
    target: &Target,
    identity: Identity,
    vote: &Vote,
    applied: Position,
    entries: Vec<log::Entry>,
) -> Result<(), SeedError> {
    let dir = target.dir()?;
    dir.set_identity(identity)?;
    let log = Log::open(LogOptions::new(dir.wal_dir(), dir.storage_uuid()))?.log;
    settled(|done| log.save_vote(codec::encode_vote(vote), done))?;
    settled(|done| log.purge(applied, done))?;
    let mut step = Vec::new();
    let mut bytes = 0;
    for entry in entries {
        bytes += entry.payload.len();
        step.push(entry);
        if bytes >= STEP_BYTES {
            bytes = 0;
            let step = std::mem::take(&mut step);
            settled(|done| log.append(step, done))?;
        }
    }
    if !step.is_empty() {
        settled(|done| log.append(step, done))?;
    }
    log.shutdown();
    Ok(())
}

/// A step of the log, until it is on disk.
fn settled(start: impl FnOnce(log::Done)) -> Result<(), LogError> {
    let (sender, receiver) = std::sync::mpsc::channel();
    // The receiver waits below.
    start(Box::new(move |result| drop(sender.send(result))));
    receiver.recv().unwrap_or(Err(LogError::Closed))
}
