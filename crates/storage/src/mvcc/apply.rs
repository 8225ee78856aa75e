//! One command of the log, carried out. A plain function of state and command: it reads no clock and
//! no random source, proposes nothing and never panics on a command that could be decoded. A refusal
//! changes nothing.

use kelson_api::Error;
use kelson_api::command::command::Op;
use kelson_api::command::{ClusterVersionSet, Command, MemberPublish, MembersChange};
use kelson_api::etcdserverpb::alarm_request::AlarmAction;
use kelson_api::etcdserverpb::{
    AlarmMember, AlarmRequest, AlarmResponse, AlarmType, CompactionRequest, LeaseCheckpointRequest,
    LeaseGrantRequest, LeaseGrantResponse, PutRequest, TxnRequest,
};

use super::state::{Failure, State, count};
use super::txn;
use super::write::Writer;
use crate::auth;
use crate::failpoint;
use crate::sabotage::{self, Variant};
use crate::types::{CompactionTicket, Delta, Fatal, LeaseRow, MetaChange, Outcome, Reply};

/// Longest TTL of a lease. Unit: seconds.
pub(crate) const TTL_MAX: i64 = 9_000_000_000;

/// Applies one command and adds what it changed to the entry's delta.
pub(crate) fn apply(
    state: &State,
    command: &Command,
    delta: &mut Delta,
    scratch: &mut Vec<u8>,
) -> Result<Outcome, Fatal> {
    let mut writer = Writer::new(state, delta, scratch);
    let result = match &command.op {
        Some(op) => {
            check(state, command, op).map_err(Failure::from).and_then(|()| run(&mut writer, op))
        }
        // Only a newer version writes commands that this one does not know.
        None => Err(Error::UnknownMethod.into()),
    };
    if let (Err(Failure::Refused(error)), true) = (&result, writer.has_changed()) {
        return Err(Fatal(format!("a command was refused half way: {error}")));
    }
    let revision = writer.publish();
    match result {
        Ok(reply) => Ok(Outcome { revision, result: Ok(reply) }),
        Err(Failure::Refused(error)) => Ok(Outcome { revision, result: Err(error) }),
        Err(Failure::Storage(fatal)) => Err(fatal),
    }
}

fn run(writer: &mut Writer<'_>, op: &Op) -> Result<Reply, Failure> {
    match op {
        Op::Put(request) => put(writer, request),
        Op::DeleteRange(request) => txn::delete_range(writer, request).map(Reply::DeleteRange),
        Op::Txn(request) => transact(writer, request),
        Op::Compaction(request) => compact(writer, request),
        Op::LeaseGrant(request) => grant(writer, request),
        Op::LeaseRevoke(request) => revoke(writer, request.id),
        Op::LeaseCheckpoint(request) => Ok(checkpoint(writer, request)),
        Op::Alarm(request) => Ok(Reply::Alarm(alarm(writer, request))),
        Op::MembersChange(change) => {
            change_members(writer.state, writer.delta, change);
            Ok(Reply::Members(writer.state.cluster.read().members()))
        }
        Op::MemberPublish(publish) => Ok(publish_member(writer, publish)),
        Op::ClusterVersionSet(set) => Ok(set_version(writer, set)),
        Op::AuthEnable(_)
        | Op::AuthDisable(_)
        | Op::Login(_)
        | Op::UserAdd(_)
        | Op::UserDelete(_)
        | Op::UserChangePassword(_)
        | Op::UserGrantRole(_)
        | Op::UserRevokeRole(_)
        | Op::RoleAdd(_)
        | Op::RoleDelete(_)
        | Op::RoleGrantPermission(_)
        | Op::RoleRevokePermission(_) => Ok(auth::carry_out(writer.state, writer.delta, op)?),
    }
}

/// What forbids a command: the client on whose behalf it was proposed, or an alarm. A member's own
/// commands need no rights.
fn check(state: &State, command: &Command, op: &Op) -> Result<(), Error> {
    let Some(asker) = &command.asker else { return check_alarms(state, op) };
    auth::check::check_standing(state, asker, op)?;
    check_alarms(state, op)?;
    auth::check::check_keys(state, asker, op)
}

/// What active alarms of any member forbid. CORRUPT is the stricter one and comes first.
fn check_alarms(state: &State, op: &Op) -> Result<(), Error> {
    let (grows, writes) = match op {
        Op::Put(_) | Op::LeaseGrant(_) => (true, true),
        Op::Txn(request) => (txn::has_put(request), true),
        Op::DeleteRange(_) | Op::Compaction(_) | Op::LeaseRevoke(_) => (false, true),
        _ => return Ok(()),
    };
    let cluster = state.cluster.read();
    if writes && cluster.has_alarm(AlarmType::Corrupt) {
        return Err(Error::Corrupt);
    }
    if grows && cluster.has_alarm(AlarmType::Nospace) {
        return Err(Error::NoSpace);
    }
    Ok(())
}

fn put(writer: &mut Writer<'_>, request: &PutRequest) -> Result<Reply, Failure> {
    txn::check_lease(writer.state, request)?;
    txn::check_kept(writer.state, request, writer.before())?;
    Ok(Reply::Put(txn::put(writer, request)))
}

fn transact(writer: &mut Writer<'_>, request: &TxnRequest) -> Result<Reply, Failure> {
    count(&writer.state.counters.txns, 1);
    let before = writer.before();
    let choice = txn::choose(writer.state, request, before)?;
    txn::check(writer.state, request, &choice, before)?;
    txn::run(writer, request, &choice).map(Reply::Txn)
}

fn compact(writer: &mut Writer<'_>, request: &CompactionRequest) -> Result<Reply, Failure> {
    let state = writer.state;
    if request.revision <= state.compaction.compacted() {
        return Err(Error::Compacted.into());
    }
    if request.revision > writer.before() {
        return Err(Error::FutureRevision.into());
    }
    failpoint::hit("compactBeforeCommitScheduledCompact");
    writer.delta.meta.push(MetaChange::ScheduledCompaction(request.revision));
    state.compaction.schedule(request.revision);
    failpoint::hit("compactAfterCommitScheduledCompact");
    Ok(Reply::Compact(request.physical.then(|| ticket(state, request.revision))))
}

/// A ticket for the removal of everything up to a compaction.
pub(crate) fn ticket(state: &State, revision: i64) -> CompactionTicket {
    CompactionTicket { revision, finished: state.persister().finished_compaction() }
}

fn grant(writer: &mut Writer<'_>, request: &LeaseGrantRequest) -> Result<Reply, Failure> {
    if request.id == 0 {
        // The proposing member chooses an id before it proposes; 0 can be no lease.
        return Err(Error::LeaseNotFound.into());
    }
    if request.ttl > TTL_MAX {
        return Err(Error::LeaseTtlTooLarge.into());
    }
    let row = LeaseRow { id: request.id, ttl: request.ttl, remaining_ttl: 0 };
    {
        let mut leases = writer.state.leases.write();
        if leases.contains(request.id) && !sabotage::is(Variant::LeaseIdReused) {
            return Err(Error::LeaseExists.into());
        }
        leases.put(row);
    }
    writer.delta.meta.push(MetaChange::LeasePut(row));
    writer.state.announce_lease_change();
    let response = LeaseGrantResponse { id: row.id, ttl: row.ttl, ..LeaseGrantResponse::default() };
    Ok(Reply::LeaseGrant(response))
}

fn revoke(writer: &mut Writer<'_>, id: i64) -> Result<Reply, Failure> {
    writer.revoke(id)?;
    writer.delta.meta.push(MetaChange::LeaseRemove(id));
    writer.state.announce_lease_change();
    Ok(Reply::LeaseRevoke)
}

/// Records remaining times; leases that are gone by now are passed over.
fn checkpoint(writer: &mut Writer<'_>, request: &LeaseCheckpointRequest) -> Reply {
    let mut leases = writer.state.leases.write();
    for point in &request.checkpoints {
        if let Some(mut row) = leases.get(point.id) {
            row.remaining_ttl = point.remaining_ttl;
            leases.put(row);
            writer.delta.meta.push(MetaChange::LeasePut(row));
        }
    }
    Reply::LeaseCheckpoint
}

/// Lists, raises or clears. Raising answers with the alarm, new or not; clearing answers with it only
/// if it was there; an unknown action answers with nothing.
fn alarm(writer: &mut Writer<'_>, request: &AlarmRequest) -> AlarmResponse {
    let mut cluster = writer.state.cluster.write();
    let alarm = AlarmMember { member_id: request.member_id, alarm: request.alarm };
    let key = (request.alarm, request.member_id);
    let alarms = match AlarmAction::try_from(request.action) {
        Ok(AlarmAction::Get) => cluster.alarms(request.alarm),
        Ok(AlarmAction::Activate) if request.alarm != AlarmType::None as i32 => {
            if cluster.alarms.insert(key) {
                writer.delta.meta.push(MetaChange::AlarmPut(alarm));
            }
            vec![alarm]
        }
        Ok(AlarmAction::Deactivate) if cluster.alarms.remove(&key) => {
            writer.delta.meta.push(MetaChange::AlarmRemove(alarm));
            vec![alarm]
        }
        _ => Vec::new(),
    };
    AlarmResponse { header: None, alarms }
}

/// Changes the members table. A removed id stays removed for ever.
pub(crate) fn change_members(state: &State, delta: &mut Delta, change: &MembersChange) {
    let mut cluster = state.cluster.write();
    for member in &change.put {
        if cluster.removed.contains(&member.id) {
            continue;
        }
        let mut member = member.clone();
        // Name and client URLs are the member's own word; it may have published them while the change
        // was under way.
        if let Some(known) = cluster.members.get(&member.id) {
            member.name.clone_from(&known.name);
            member.client_ur_ls.clone_from(&known.client_ur_ls);
        }
        cluster.members.insert(member.id, member.clone());
        delta.meta.push(MetaChange::MemberPut(member));
    }
    for &id in &change.remove {
        cluster.members.remove(&id);
        cluster.uuids.remove(&id);
        if cluster.removed.insert(id) {
            delta.meta.push(MetaChange::MemberRemove(id));
        }
    }
}

/// Records what a member tells of itself; one that is not (or no longer) a member is passed over.
fn publish_member(writer: &mut Writer<'_>, publish: &MemberPublish) -> Reply {
    let mut cluster = writer.state.cluster.write();
    let Some(member) = cluster.members.get_mut(&publish.id) else { return Reply::Published };
    member.name.clone_from(&publish.name);
    member.client_ur_ls.clone_from(&publish.client_urls);
    writer.delta.meta.push(MetaChange::MemberPut(member.clone()));
    if !publish.storage_uuid.is_empty() {
        // Copied: the command's bytes are a slice of a whole log batch.
        let uuid = bytes::Bytes::copy_from_slice(&publish.storage_uuid);
        cluster.uuids.insert(publish.id, uuid.clone());
        writer.delta.meta.push(MetaChange::MemberUuid(publish.id, uuid));
    }
    Reply::Published
}

fn set_version(writer: &mut Writer<'_>, set: &ClusterVersionSet) -> Reply {
    writer.state.cluster.write().version = Some(set.version.clone());
    writer.delta.meta.push(MetaChange::ClusterVersion(set.version.clone()));
    Reply::ClusterVersion
}
