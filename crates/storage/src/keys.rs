//! Every key and value that the state keeps on disk, as bytes. One tree holds all: the first byte of
//! a key names the table. Each value ends in a CRC-32C of its key and payload, so that a byte that
//! changed on disk, or a value that moved to another key, is refused. This file never does I/O and
//! never panics on bytes from a file. The layout is promised in docs/STORAGE_FORMAT.md; codes are
//! numbered by hand and never used again.

use std::ops::Range;

use bytes::Bytes;
use kelson_api::Message;
use kelson_api::authpb::{Role, User};
use kelson_api::etcdserverpb::{AlarmMember, Member};

use crate::auth::AuthRows;
use crate::chain::Chain;
use crate::types::{LeaseRow, LogId, MetaChange, RevisionKey, Row};

/// History: one row per change of a key.
const ROW: u8 = b'k';
/// Leases by id.
const LEASE: u8 = b'l';
/// Single values by name.
const META: u8 = b'm';
/// Users by name.
const USER: u8 = b'n';
/// Roles by name.
const ROLE: u8 = b'o';
/// Members (peers) by id.
const MEMBER: u8 = b'p';
/// Ids of removed members.
const REMOVED: u8 = b'r';
/// Identities of the members' data directories by member id.
const UUID: u8 = b'u';
/// Alarms that are on.
const ALARM: u8 = b'x';

const APPLIED: &[u8] = b"mapplied";
const MEMBERSHIP: &[u8] = b"mmembership";
const CLUSTER_VERSION: &[u8] = b"mcluster_version";
const SCHEDULED: &[u8] = b"mcompact_scheduled";
const FINISHED: &[u8] = b"mcompact_finished";
const SCHEMA: &[u8] = b"mschema";
const TALLY: &[u8] = b"mtally";
const CHAIN: &[u8] = b"mchain";
const INSTALLED: &[u8] = b"minstalled";
const AUTH_ENABLED: &[u8] = b"mauth_enabled";
const AUTH_REVISION: &[u8] = b"mauth_revision";

/// The layout that this file describes. A store that says a higher number is not opened; 1 had no
/// hash chain, 2 no users and roles.
pub(crate) const SCHEMA_VERSION: u32 = 3;

/// Bytes of the checksum behind each payload.
const SEAL_LEN: usize = 4;
/// Bytes of etcd's revision key without the mark of a deletion.
const REVISION_LEN: usize = 17;

/// A key with its sealed value.
pub(crate) type Pair = (Vec<u8>, Vec<u8>);

/// What is wrong with a pair read from disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub(crate) enum Malformed {
    /// The checksum does not fit key and payload.
    #[error("checksum mismatch")]
    Checksum,
    /// The key is of no known table or has the wrong length.
    #[error("unknown key")]
    Key,
    /// The payload does not decode.
    #[error("undecodable value")]
    Value,
}

/// etcd's name of a revision: main, an underscore, sub, and `t` behind a deletion.
pub(crate) fn revision_bytes(key: RevisionKey, tombstone: bool) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(REVISION_LEN + 1);
    push_revision(&mut bytes, key, tombstone);
    bytes
}

fn push_revision(out: &mut Vec<u8>, key: RevisionKey, tombstone: bool) {
    out.extend_from_slice(&key.main.to_be_bytes());
    out.push(b'_');
    out.extend_from_slice(&key.sub.to_be_bytes());
    if tombstone {
        out.push(b't');
    }
}

/// Reads back what `revision_bytes` wrote.
pub(crate) fn parse_revision(bytes: &[u8]) -> Option<(RevisionKey, bool)> {
    let tombstone = match bytes.len() {
        REVISION_LEN => false,
        len if len == REVISION_LEN + 1 && bytes[REVISION_LEN] == b't' => true,
        _ => return None,
    };
    if bytes[8] != b'_' {
        return None;
    }
    let main = i64::from_be_bytes(bytes[..8].try_into().ok()?);
    let sub = i64::from_be_bytes(bytes[9..REVISION_LEN].try_into().ok()?);
    (main >= 0 && sub >= 0).then_some((RevisionKey { main, sub }, tombstone))
}

/// The disk key of a row.
pub(crate) fn row_key(key: RevisionKey, tombstone: bool) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(REVISION_LEN + 2);
    bytes.push(ROW);
    push_revision(&mut bytes, key, tombstone);
    bytes
}

/// Disk keys of all rows from a revision on.
pub(crate) fn rows_from(from: RevisionKey) -> Range<Vec<u8>> {
    row_key(from, false)..vec![ROW + 1]
}

/// Disk keys of everything but rows.
pub(crate) fn tables_range() -> Range<Vec<u8>> {
    vec![ROW + 1]..vec![ALARM + 1]
}

/// A row as disk holds it.
pub(crate) fn encode_row(row: &Row) -> Pair {
    let key = row_key(row.key, row.tombstone);
    let value = seal(&key, &row.kv);
    (key, value)
}

/// Checks and reads a pair of the row table. `value` is cut, not copied.
pub(crate) fn decode_row(key: &[u8], value: Bytes) -> Result<Row, Malformed> {
    let revision = key.strip_prefix(&[ROW]).ok_or(Malformed::Key)?;
    let (revision, tombstone) = parse_revision(revision).ok_or(Malformed::Key)?;
    let payload_len = check(key, &value)?.len();
    Ok(Row { key: revision, tombstone, kv: value.slice(..payload_len) })
}

/// Whether a key belongs to the row table.
pub(crate) fn is_row(key: &[u8]) -> bool {
    key.first() == Some(&ROW)
}

/// Appends the checksum.
fn seal(key: &[u8], payload: &[u8]) -> Vec<u8> {
    let mut value = Vec::with_capacity(payload.len() + SEAL_LEN);
    value.extend_from_slice(payload);
    value.extend_from_slice(&checksum(key, payload).to_le_bytes());
    value
}

fn checksum(key: &[u8], payload: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(key), payload)
}

/// Returns the payload if the checksum fits.
fn check<'a>(key: &[u8], value: &'a [u8]) -> Result<&'a [u8], Malformed> {
    let payload_len = value.len().checked_sub(SEAL_LEN).ok_or(Malformed::Checksum)?;
    let (payload, sum) = value.split_at(payload_len);
    let fits = sum == checksum(key, payload).to_le_bytes();
    fits.then_some(payload).ok_or(Malformed::Checksum)
}

/// What one meta change does to the tree.
#[derive(Default, PartialEq, Debug)]
pub(crate) struct MetaWrites {
    pub(crate) puts: Vec<Pair>,
    pub(crate) removes: Vec<Vec<u8>>,
}

/// Turns a meta change into puts and removals.
pub(crate) fn encode_meta(change: &MetaChange) -> MetaWrites {
    let mut writes = MetaWrites::default();
    let mut put = |key: Vec<u8>, payload: &[u8]| {
        let value = seal(&key, payload);
        writes.puts.push((key, value));
    };
    match change {
        MetaChange::LeasePut(row) => put(id_key(LEASE, row.id.cast_unsigned()), &encode_lease(row)),
        MetaChange::LeaseRemove(id) => writes.removes.push(id_key(LEASE, id.cast_unsigned())),
        MetaChange::AlarmPut(alarm) => put(alarm_key(alarm), &[]),
        MetaChange::AlarmRemove(alarm) => writes.removes.push(alarm_key(alarm)),
        MetaChange::MemberPut(member) => put(id_key(MEMBER, member.id), &member.encode_to_vec()),
        MetaChange::MemberRemove(id) => {
            put(id_key(REMOVED, *id), &[]);
            writes.removes.extend([id_key(MEMBER, *id), id_key(UUID, *id)]);
        }
        MetaChange::MemberUuid(id, uuid) => put(id_key(UUID, *id), uuid),
        MetaChange::Membership(at, bytes) => {
            put(MEMBERSHIP.to_vec(), &[&encode_log_id(*at), bytes.as_ref()].concat());
        }
        MetaChange::ClusterVersion(version) => put(CLUSTER_VERSION.to_vec(), version.as_bytes()),
        MetaChange::ScheduledCompaction(at) => put(SCHEDULED.to_vec(), &at.to_be_bytes()),
        MetaChange::FinishedCompaction(at) => put(FINISHED.to_vec(), &at.to_be_bytes()),
        MetaChange::AuthEnabled(enabled) => put(AUTH_ENABLED.to_vec(), &[u8::from(*enabled)]),
        MetaChange::AuthRevision(revision) => put(AUTH_REVISION.to_vec(), &revision.to_be_bytes()),
        MetaChange::UserPut(user) => put(name_key(USER, &user.name), &user.encode_to_vec()),
        MetaChange::UserRemove(name) => writes.removes.push(name_key(USER, name.as_bytes())),
        MetaChange::RolePut(role) => put(name_key(ROLE, &role.name), &role.encode_to_vec()),
        MetaChange::RoleRemove(name) => writes.removes.push(name_key(ROLE, name.as_bytes())),
    }
    writes
}

/// The rows that close every checkpoint: the applied position, the hash chain there, the layout, and
/// the tally of all rows.
pub(crate) fn encode_checkpoint(applied: LogId, chain: Chain, tally: Tally) -> [Pair; 4] {
    let tally_bytes = [tally.rows.to_be_bytes(), tally.sum.to_be_bytes()].concat();
    [
        (APPLIED.to_vec(), seal(APPLIED, &encode_log_id(applied))),
        (CHAIN.to_vec(), seal(CHAIN, &encode_chain(chain))),
        (SCHEMA.to_vec(), seal(SCHEMA, &SCHEMA_VERSION.to_be_bytes())),
        (TALLY.to_vec(), seal(TALLY, &tally_bytes)),
    ]
}

/// The row that says that the state came from another member, at this position.
pub(crate) fn encode_installed(at: LogId) -> Pair {
    (INSTALLED.to_vec(), seal(INSTALLED, &encode_log_id(at)))
}

/// Whether a pair is one that each member writes for itself.
pub(crate) fn is_own(key: &[u8]) -> bool {
    matches!(key, APPLIED | CHAIN | INSTALLED | SCHEMA | TALLY)
}

/// The pairs of all tables, but for those that each member writes for itself, in key order.
pub(crate) fn encode_tables(tables: &Tables) -> Vec<Pair> {
    let mut changes = Vec::new();
    changes.extend(tables.leases.iter().map(|lease| MetaChange::LeasePut(*lease)));
    changes.extend(tables.members.iter().cloned().map(MetaChange::MemberPut));
    // Its removals name members that are in no table any more.
    changes.extend(tables.removed.iter().map(|id| MetaChange::MemberRemove(*id)));
    let uuids = tables.uuids.iter();
    changes.extend(uuids.map(|(id, uuid)| MetaChange::MemberUuid(*id, uuid.clone())));
    changes.extend(tables.alarms.iter().map(|alarm| MetaChange::AlarmPut(*alarm)));
    let membership = tables.membership.iter();
    changes.extend(membership.map(|(at, bytes)| MetaChange::Membership(*at, bytes.clone())));
    let version = tables.cluster_version.iter();
    changes.extend(version.map(|text| MetaChange::ClusterVersion(text.clone())));
    changes.extend(tables.scheduled_compaction.map(MetaChange::ScheduledCompaction));
    changes.extend(tables.finished_compaction.map(MetaChange::FinishedCompaction));
    changes.extend(tables.auth.enabled.map(MetaChange::AuthEnabled));
    changes.extend(tables.auth.revision.map(MetaChange::AuthRevision));
    changes.extend(tables.auth.users.iter().cloned().map(MetaChange::UserPut));
    changes.extend(tables.auth.roles.iter().cloned().map(MetaChange::RolePut));
    let mut pairs: Vec<_> = changes.iter().flat_map(|change| encode_meta(change).puts).collect();
    pairs.sort_unstable();
    pairs
}

/// An order-free summary of all rows on disk. It moves in the same flush as the rows, so a leaf of
/// the tree that went missing or came back from an older time is noticed at the next start.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Tally {
    pub(crate) rows: u64,
    sum: u64,
}

impl Tally {
    /// Counts a row in.
    pub(crate) fn add(&mut self, key: &[u8], value: &[u8]) {
        self.rows = self.rows.wrapping_add(1);
        self.sum = self.sum.wrapping_add(mark(key, value));
    }

    /// Counts a row out.
    pub(crate) fn subtract(&mut self, key: &[u8], value: &[u8]) {
        self.rows = self.rows.wrapping_sub(1);
        self.sum = self.sum.wrapping_sub(mark(key, value));
    }
}

/// A row's share in the sum: place and checksum, stirred so that equal shares do not cancel.
fn mark(key: &[u8], value: &[u8]) -> u64 {
    let seal = &value[value.len().saturating_sub(SEAL_LEN)..];
    let place = u64::from(crc32c::crc32c(key)) << 32;
    let stirred = place | u64::from(crc32c::crc32c(seal));
    stirred.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29) ^ stirred
}

/// Everything outside the row table, read back.
#[derive(Default, Debug)]
pub(crate) struct Tables {
    pub(crate) applied: LogId,
    pub(crate) membership: Option<(LogId, Bytes)>,
    pub(crate) leases: Vec<LeaseRow>,
    pub(crate) alarms: Vec<AlarmMember>,
    pub(crate) members: Vec<Member>,
    pub(crate) removed: Vec<u64>,
    pub(crate) uuids: Vec<(u64, Bytes)>,
    pub(crate) auth: AuthRows,
    pub(crate) cluster_version: Option<String>,
    pub(crate) scheduled_compaction: Option<i64>,
    pub(crate) finished_compaction: Option<i64>,
    pub(crate) schema: Option<u32>,
    pub(crate) tally: Tally,
    /// `None` in a state of layout 1.
    pub(crate) chain: Option<Chain>,
    /// Where the state came from another member; (0, 0) = it never did.
    pub(crate) installed: LogId,
}

impl Tables {
    /// Takes in one pair that is not of the row table.
    pub(crate) fn take(&mut self, key: &[u8], value: &[u8]) -> Result<(), Malformed> {
        let payload = check(key, value)?;
        let (&table, name) = key.split_first().ok_or(Malformed::Key)?;
        match table {
            META => return self.take_meta(key, payload),
            LEASE => self.leases.push(decode_lease(id_of(name)?.cast_signed(), payload)?),
            MEMBER => {
                let member = Member::decode(payload).map_err(|_| Malformed::Value)?;
                self.members.push(member);
            }
            REMOVED => self.removed.push(id_of(name)?),
            UUID => self.uuids.push((id_of(name)?, Bytes::copy_from_slice(payload))),
            USER => {
                let user = User::decode(payload).map_err(|_| Malformed::Value)?;
                check_name(name, &user.name)?;
                self.auth.users.push(user);
            }
            ROLE => {
                let role = Role::decode(payload).map_err(|_| Malformed::Value)?;
                check_name(name, &role.name)?;
                self.auth.roles.push(role);
            }
            ALARM => self.alarms.push(AlarmMember::decode(name).map_err(|_| Malformed::Key)?),
            _ => return Err(Malformed::Key),
        }
        Ok(())
    }

    fn take_meta(&mut self, key: &[u8], payload: &[u8]) -> Result<(), Malformed> {
        match key {
            APPLIED => self.applied = decode_log_id(payload)?,
            MEMBERSHIP => {
                let (at, bytes) = payload.split_at_checked(16).ok_or(Malformed::Value)?;
                self.membership = Some((decode_log_id(at)?, Bytes::copy_from_slice(bytes)));
            }
            CLUSTER_VERSION => {
                let text = str::from_utf8(payload).map_err(|_| Malformed::Value)?;
                self.cluster_version = Some(text.to_owned());
            }
            SCHEDULED => self.scheduled_compaction = Some(i64::from_be_bytes(array(payload)?)),
            FINISHED => self.finished_compaction = Some(i64::from_be_bytes(array(payload)?)),
            SCHEMA => self.schema = Some(u32::from_be_bytes(array(payload)?)),
            TALLY => {
                let (rows, sum) = payload.split_at_checked(8).ok_or(Malformed::Value)?;
                let rows = u64::from_be_bytes(array(rows)?);
                self.tally = Tally { rows, sum: u64::from_be_bytes(array(sum)?) };
            }
            INSTALLED => self.installed = decode_log_id(payload)?,
            CHAIN => self.chain = Some(decode_chain(payload)?),
            AUTH_ENABLED => {
                self.auth.enabled = Some(match payload {
                    [0] => false,
                    [1] => true,
                    _ => return Err(Malformed::Value),
                });
            }
            AUTH_REVISION => self.auth.revision = Some(u64::from_be_bytes(array(payload)?)),
            _ => return Err(Malformed::Key),
        }
        Ok(())
    }
}

fn id_key(table: u8, id: u64) -> Vec<u8> {
    let mut key = vec![table];
    key.extend_from_slice(&id.to_be_bytes());
    key
}

fn name_key(table: u8, name: &[u8]) -> Vec<u8> {
    [&[table], name].concat()
}

/// A user or a role stands under its own name, which is text.
fn check_name(stands_under: &[u8], name: &[u8]) -> Result<(), Malformed> {
    let is_name = stands_under == name && str::from_utf8(name).is_ok();
    is_name.then_some(()).ok_or(Malformed::Value)
}

fn id_of(name: &[u8]) -> Result<u64, Malformed> {
    Ok(u64::from_be_bytes(name.try_into().map_err(|_| Malformed::Key)?))
}

fn alarm_key(alarm: &AlarmMember) -> Vec<u8> {
    let mut key = vec![ALARM];
    key.extend_from_slice(&alarm.encode_to_vec());
    key
}

/// A log position as disk and transfers hold it.
pub(crate) fn encode_log_id(id: LogId) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&id.term.to_be_bytes());
    bytes[8..].copy_from_slice(&id.index.to_be_bytes());
    bytes
}

pub(crate) fn decode_log_id(bytes: &[u8]) -> Result<LogId, Malformed> {
    let (term, index) = bytes.split_at_checked(8).ok_or(Malformed::Value)?;
    let term = u64::from_be_bytes(array(term)?);
    Ok(LogId { term, index: u64::from_be_bytes(array(index)?) })
}

/// A chain as disk and transfers hold it.
pub(crate) fn encode_chain(chain: Chain) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&chain.hash.to_be_bytes());
    bytes[8..].copy_from_slice(&chain.since.to_be_bytes());
    bytes
}

pub(crate) fn decode_chain(bytes: &[u8]) -> Result<Chain, Malformed> {
    let (hash, since) = bytes.split_at_checked(8).ok_or(Malformed::Value)?;
    let hash = u64::from_be_bytes(array(hash)?);
    Ok(Chain { hash, since: u64::from_be_bytes(array(since)?) })
}

fn array<const N: usize>(bytes: &[u8]) -> Result<[u8; N], Malformed> {
    bytes.try_into().map_err(|_| Malformed::Value)
}

/// etcd's `leasepb.Lease`, the value of a lease on disk and in a snapshot file.
#[derive(Clone, PartialEq, kelson_api::Message)]
struct StoredLease {
    #[prost(int64, tag = "1")]
    id: i64,
    #[prost(int64, tag = "2")]
    ttl: i64,
    #[prost(int64, tag = "3")]
    remaining_ttl: i64,
}

/// A lease as etcd stores it.
pub(crate) fn encode_lease(row: &LeaseRow) -> Vec<u8> {
    let LeaseRow { id, ttl, remaining_ttl } = *row;
    StoredLease { id, ttl, remaining_ttl }.encode_to_vec()
}

fn decode_lease(id: i64, payload: &[u8]) -> Result<LeaseRow, Malformed> {
    let stored = StoredLease::decode(payload).map_err(|_| Malformed::Value)?;
    if stored.id != id {
        return Err(Malformed::Value);
    }
    Ok(LeaseRow { id, ttl: stored.ttl, remaining_ttl: stored.remaining_ttl })
}

/// Body of the fuzz target: any bytes, cut into key and value, are decoded or refused, and what is
/// accepted encodes to the same bytes again.
pub(crate) fn fuzz(data: &[u8]) {
    let Some((&key_len, rest)) = data.split_first() else { return };
    let (key, value) = rest.split_at(rest.len().min(usize::from(key_len)));
    // The second attempt is sealed, so that the decoders behind the checksum are reached too.
    for value in [value.to_vec(), seal(key, value)] {
        if let Ok(row) = decode_row(key, Bytes::from(value.clone())) {
            assert_eq!(encode_row(&row), (key.to_vec(), value.clone()));
        }
        let _ = Tables::default().take(key, &value);
    }
}

#[cfg(test)]
#[path = "keys_tests.rs"]
mod tests;
