//! `--force-new-cluster`: makes the member in a data directory the only one of its cluster, for an
//! operator whose other members are gone for good. It appends one entry to the log before consensus
//! starts; nothing that the log holds is taken back, so no acknowledged write of this member is lost.
//! Writes that only the lost members had are lost with them: nothing here can know of them.

use std::collections::{BTreeMap, BTreeSet};

use kelson_api::Message;
use kelson_api::command::{Batch, Command, MembersChange, command::Op};
use kelson_storage::log::Log;
use kelson_storage::{Identity, LogId as Position, Reader};

use crate::codec;
use crate::error::StartError;
use crate::types::{Commands, Entry, Membership, Payload, Peer, raft_log_id};

/// Bytes of entries looked at in one step.
const READ_BYTES: usize = 1 << 20;

/// Appends the entry, if the member is not alone already. Blocks until it is on disk.
///
/// # Errors
/// The directory holds no member yet, or the log cannot be read or written.
pub(crate) fn alone(
    log: &Log,
    reader: &Reader,
    identity: Identity,
    peer: Peer,
) -> Result<(), StartError> {
    let own = identity.member_id;
    let Some(membership) = newest(log, reader)? else {
        return Err(StartError::Settings(
            "--force-new-cluster needs a data directory that holds a member".into(),
        ));
    };
    let others: Vec<u64> = membership.nodes().map(|(id, _)| *id).filter(|id| *id != own).collect();
    let rows = reader.members();
    let is_listed = rows.iter().any(|member| member.id != own);
    if others.is_empty() && !is_listed && membership.voter_ids().eq([own]) {
        return Ok(());
    }
    let remove: BTreeSet<u64> = others
        .iter()
        .copied()
        .chain(rows.iter().map(|row| row.id))
        .filter(|id| *id != own)
        .collect();
    tracing::warn!(
        "member-id" = format!("{own:x}"),
        removed = ?remove.iter().map(|id| format!("{id:x}")).collect::<Vec<_>>(),
        "forcing a new cluster of this member alone; discard the data of the others"
    );
    let put = rows.into_iter().filter(|row| row.id == own).map(|mut row| {
        row.is_learner = false;
        row
    });
    let change = MembersChange { put: put.collect(), remove: remove.into_iter().collect() };
    let command = Command { op: Some(Op::MembersChange(change)), ..Command::default() };
    let change = Commands(Batch { commands: vec![command] }.encode_to_vec().into());
    let sole = Membership::new(vec![BTreeSet::from([own])], BTreeMap::from([(own, peer)]))
        .map_err(|error| StartError::Consensus(error.to_string()))?;
    let last = log.last_id().max(log.purged()).max(reader.applied());
    let next = Position { term: last.term, index: last.index + 1 };
    let log_id = raft_log_id(next).expect("the index is above 0");
    let entry = codec::encode_entry(&Entry { log_id, payload: Payload::Membership(sole, change) });
    let (sender, receiver) = std::sync::mpsc::channel();
    // The receiver waits below.
    log.append(vec![entry], Box::new(move |result| drop(sender.send(result))));
    Ok(receiver.recv().unwrap_or(Err(kelson_storage::log::LogError::Closed))?)
}

/// The newest membership in log and state, committed or not: consensus goes by it.
fn newest(log: &Log, reader: &Reader) -> Result<Option<Membership>, StartError> {
    let mut newest = None;
    if let Some((_, bytes)) = reader.membership() {
        newest = Some(codec::decode_membership(bytes)?);
    }
    let end = log.last_id().index + 1;
    let mut from = log.first_index().max(reader.applied().index + 1);
    while from < end {
        let entries = log.read(from, end, READ_BYTES)?;
        if entries.is_empty() {
            break;
        }
        from += entries.len() as u64;
        for entry in entries {
            if let Payload::Membership(membership, _) = codec::decode_entry(entry)?.payload {
                newest = Some(membership);
            }
        }
    }
    Ok(newest)
}
