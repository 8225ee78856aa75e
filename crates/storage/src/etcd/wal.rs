//! Reads etcd's write-ahead log: files of framed records with a running checksum, as 3.4 to 3.7 write
//! them. It gives the hard state and all entries behind a position, each as the command that it is
//! here. It changes nothing and decides nothing about what is committed: that is for consensus.
//! Stands beside `database`; the raft crate makes log entries of what it finds. Over 600 lines, because
//! files, records and requests are one format that nobody else reads.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};

use kelson_api::Message;
use kelson_api::command::command::Op;
use kelson_api::command::{ClusterVersionSet, MemberPublish};
use kelson_api::etcdserverpb::{
    AlarmRequest, CompactionRequest, DeleteRangeRequest, LeaseCheckpointRequest, LeaseGrantRequest,
    LeaseRevokeRequest, Member, PutRequest, TxnRequest,
};

use super::EtcdFileError;
use super::database::parse_member;
use crate::types::LogId;

/// Length of a record's length.
const FRAME: u64 = 8;
/// Writes reach the disk in pieces of this size; one that is all zero was never written.
const SECTOR: u64 = 512;
/// Entries behind the position that may be held. etcd's database follows its log within a second, so
/// there are few. Unit: bytes.
const HELD_BYTES_MAX: usize = 1 << 30;

pub(super) const METADATA: i64 = 1;
pub(super) const ENTRY: i64 = 2;
pub(super) const STATE: i64 = 3;
pub(super) const CRC: i64 = 4;
pub(super) const SNAPSHOT: i64 = 5;

const NORMAL: i32 = 0;
pub(super) const CONF_CHANGE: i32 = 1;

impl Record {
    /// Appends the record as it stands in a file.
    pub(super) fn frame_into(&self, file: &mut Vec<u8>) {
        let bytes = self.encode_to_vec();
        let padding = (8 - bytes.len() % 8) % 8;
        let mut frame = bytes.len() as u64;
        if padding != 0 {
            frame |= (0x80 | padding as u64) << 56;
        }
        file.extend_from_slice(&frame.to_le_bytes());
        file.extend_from_slice(&bytes);
        file.resize(file.len() + padding, 0);
    }
}

/// What the log says.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct EtcdLog {
    /// Whose log it is.
    pub member_id: u64,
    /// Of which cluster.
    pub cluster_id: u64,
    /// Raft term.
    pub term: u64,
    /// For whom the member voted in it; 0 = nobody.
    pub vote: u64,
    /// Everything up to here is committed; there may be more.
    pub commit: u64,
    /// The entry at the position asked for, if the log still knows it.
    pub at_position: Option<LogId>,
    /// The last entry.
    pub last: LogId,
    /// All entries behind the position.
    pub entries: Vec<EtcdEntry>,
}

/// One entry.
#[derive(Clone, PartialEq, Debug)]
pub struct EtcdEntry {
    /// Term and index.
    pub id: LogId,
    /// What it does.
    pub payload: Payload,
}

/// What an entry does here.
#[derive(Clone, PartialEq, Debug)]
pub enum Payload {
    /// Nothing: the first entry of a term, or a request without an effect on what we keep.
    Blank,
    /// A change of the store.
    Command(Box<Op>),
    /// A change of the members.
    Members(ConfChange),
}

/// A change of the members.
#[derive(Clone, PartialEq, Debug)]
pub struct ConfChange {
    /// What changes.
    pub kind: ConfChangeKind,
    /// For which member.
    pub member_id: u64,
    /// What etcd noted about it.
    pub member: Option<Member>,
    /// A learner becomes a voter.
    pub is_promote: bool,
}

/// Kinds of changes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ConfChangeKind {
    /// A voter comes, or a learner is promoted.
    AddVoter,
    /// A member goes.
    Remove,
    /// A member has other peer URLs.
    Update,
    /// A learner comes.
    AddLearner,
}

#[derive(Clone, PartialEq, kelson_api::Message)]
pub(super) struct Record {
    #[prost(int64, tag = "1")]
    pub(super) kind: i64,
    #[prost(uint32, tag = "2")]
    pub(super) crc: u32,
    #[prost(bytes = "vec", tag = "3")]
    pub(super) data: Vec<u8>,
}

#[derive(Clone, PartialEq, kelson_api::Message)]
pub(super) struct RaftEntry {
    #[prost(int32, tag = "1")]
    pub(super) kind: i32,
    #[prost(uint64, tag = "2")]
    pub(super) term: u64,
    #[prost(uint64, tag = "3")]
    pub(super) index: u64,
    #[prost(bytes = "vec", tag = "4")]
    pub(super) data: Vec<u8>,
}

#[derive(Clone, PartialEq, kelson_api::Message)]
pub(super) struct HardState {
    #[prost(uint64, tag = "1")]
    pub(super) term: u64,
    #[prost(uint64, tag = "2")]
    pub(super) vote: u64,
    #[prost(uint64, tag = "3")]
    pub(super) commit: u64,
}

#[derive(Clone, PartialEq, kelson_api::Message)]
pub(super) struct Metadata {
    #[prost(uint64, tag = "1")]
    pub(super) member_id: u64,
    #[prost(uint64, tag = "2")]
    pub(super) cluster_id: u64,
}

#[derive(Clone, PartialEq, kelson_api::Message)]
pub(super) struct SnapshotMark {
    #[prost(uint64, tag = "1")]
    pub(super) index: u64,
    #[prost(uint64, tag = "2")]
    pub(super) term: u64,
}

#[derive(Clone, PartialEq, kelson_api::Message)]
pub(super) struct ConfChangeRecord {
    #[prost(int32, tag = "2")]
    pub(super) kind: i32,
    #[prost(uint64, tag = "3")]
    pub(super) member_id: u64,
    #[prost(bytes = "vec", tag = "4")]
    pub(super) context: Vec<u8>,
}

/// What etcd adds to the JSON of a member.
#[derive(serde::Deserialize)]
struct ConfChangeContext {
    #[serde(rename = "isPromote", default)]
    is_promote: bool,
}

/// A request of the old API, by which etcd 3.4 and 3.5 publish members and versions.
#[derive(Clone, PartialEq, kelson_api::Message)]
struct RequestV2 {
    #[prost(string, tag = "2")]
    method: String,
    #[prost(string, tag = "3")]
    path: String,
    #[prost(string, tag = "4")]
    value: String,
}

#[derive(Clone, PartialEq, kelson_api::Message)]
struct VersionSet {
    #[prost(string, tag = "1")]
    version: String,
}

#[derive(Clone, PartialEq, kelson_api::Message)]
struct Attributes {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(string, repeated, tag = "2")]
    client_urls: Vec<String>,
}

#[derive(Clone, PartialEq, kelson_api::Message)]
struct AttributesSet {
    #[prost(uint64, tag = "1")]
    member_id: u64,
    #[prost(message, optional, tag = "2")]
    attributes: Option<Attributes>,
}

/// etcd's union of requests. Those that only read, and those of users and roles, are looked at no
/// further than that they are there.
#[derive(Clone, PartialEq, kelson_api::Message)]
struct Request {
    #[prost(message, optional, tag = "2")]
    v2: Option<RequestV2>,
    #[prost(bytes = "vec", optional, tag = "3")]
    range: Option<Vec<u8>>,
    #[prost(message, optional, tag = "4")]
    put: Option<PutRequest>,
    #[prost(message, optional, tag = "5")]
    delete_range: Option<DeleteRangeRequest>,
    #[prost(message, optional, tag = "6")]
    txn: Option<TxnRequest>,
    #[prost(message, optional, tag = "7")]
    compaction: Option<CompactionRequest>,
    #[prost(message, optional, tag = "8")]
    lease_grant: Option<LeaseGrantRequest>,
    #[prost(message, optional, tag = "9")]
    lease_revoke: Option<LeaseRevokeRequest>,
    #[prost(message, optional, tag = "10")]
    alarm: Option<AlarmRequest>,
    #[prost(message, optional, tag = "11")]
    lease_checkpoint: Option<LeaseCheckpointRequest>,
    #[prost(bytes = "vec", optional, tag = "1000")]
    auth_enable: Option<Vec<u8>>,
    #[prost(bytes = "vec", optional, tag = "1011")]
    auth_disable: Option<Vec<u8>>,
    #[prost(bytes = "vec", optional, tag = "1012")]
    authenticate: Option<Vec<u8>>,
    #[prost(bytes = "vec", optional, tag = "1013")]
    auth_status: Option<Vec<u8>>,
    #[prost(bytes = "vec", optional, tag = "1100")]
    user_add: Option<Vec<u8>>,
    #[prost(bytes = "vec", optional, tag = "1101")]
    user_delete: Option<Vec<u8>>,
    #[prost(bytes = "vec", optional, tag = "1102")]
    user_get: Option<Vec<u8>>,
    #[prost(bytes = "vec", optional, tag = "1103")]
    user_change_password: Option<Vec<u8>>,
    #[prost(bytes = "vec", optional, tag = "1104")]
    user_grant_role: Option<Vec<u8>>,
    #[prost(bytes = "vec", optional, tag = "1105")]
    user_revoke_role: Option<Vec<u8>>,
    #[prost(bytes = "vec", optional, tag = "1106")]
    user_list: Option<Vec<u8>>,
    #[prost(bytes = "vec", optional, tag = "1107")]
    role_list: Option<Vec<u8>>,
    #[prost(bytes = "vec", optional, tag = "1200")]
    role_add: Option<Vec<u8>>,
    #[prost(bytes = "vec", optional, tag = "1201")]
    role_delete: Option<Vec<u8>>,
    #[prost(bytes = "vec", optional, tag = "1202")]
    role_get: Option<Vec<u8>>,
    #[prost(bytes = "vec", optional, tag = "1203")]
    role_grant_permission: Option<Vec<u8>>,
    #[prost(bytes = "vec", optional, tag = "1204")]
    role_revoke_permission: Option<Vec<u8>>,
    #[prost(message, optional, tag = "1300")]
    version_set: Option<VersionSet>,
    #[prost(message, optional, tag = "1301")]
    attributes_set: Option<AttributesSet>,
    #[prost(bytes = "vec", optional, tag = "1302")]
    downgrade_set: Option<Vec<u8>>,
    #[prost(bytes = "vec", optional, tag = "9900")]
    downgrade_test: Option<Vec<u8>>,
}

/// Reads the log in a directory: everything that stands behind `position`.
///
/// # Errors
/// A file is missing or damaged, or an entry is none that we can carry out. An unfinished write at the
/// end of the last file is no damage.
pub fn read_wal(dir: &Path, position: u64) -> Result<EtcdLog, EtcdFileError> {
    let files = files(dir)?;
    let mut reading = Reading { position, ..Reading::default() };
    let last = files.len() - 1;
    for (place, (_, path)) in files.into_iter().enumerate() {
        reading.file(&path, place == last)?;
    }
    reading.finish(dir)
}

/// Files in order of their numbers, which have no gap.
fn files(dir: &Path) -> Result<BTreeMap<u64, PathBuf>, EtcdFileError> {
    let entries = fs::read_dir(dir).map_err(|error| EtcdFileError::io("read", dir, error))?;
    let mut files = BTreeMap::new();
    for entry in entries {
        let entry = entry.map_err(|error| EtcdFileError::io("read", dir, error))?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let stem = name.strip_suffix(".wal").and_then(|stem| stem.split_once('-'));
        let number = stem.and_then(|(number, index)| {
            u64::from_str_radix(index, 16).ok()?;
            u64::from_str_radix(number, 16).ok()
        });
        if let Some(number) = number {
            files.insert(number, entry.path());
        }
    }
    let foreign = |reason: String| EtcdFileError::Foreign {
        path: dir.to_owned(),
        expected: "a whole log of etcd",
        reason,
    };
    let Some(first) = files.keys().next().copied() else {
        return Err(foreign("it holds no log file".to_owned()));
    };
    for (number, wanted) in files.keys().zip(first..) {
        if *number != wanted {
            return Err(foreign(format!("the file with number {wanted:016x} is missing")));
        }
    }
    Ok(files)
}

#[derive(Default)]
struct Reading {
    position: u64,
    log: EtcdLog,
    has_metadata: bool,
    crc: u32,
    held: usize,
}

/// One record and where it stands.
struct Framed {
    record: Record,
    offset: u64,
}

impl Reading {
    fn file(&mut self, path: &Path, is_last: bool) -> Result<(), EtcdFileError> {
        let file = File::open(path).map_err(|error| EtcdFileError::io("open", path, error))?;
        let about = file.metadata().map_err(|error| EtcdFileError::io("read", path, error))?;
        let mut input = BufReader::with_capacity(1 << 18, file);
        let (mut offset, end) = (0, about.len());
        while let Some(framed) = self.record(path, &mut input, &mut offset, end, is_last)? {
            self.take(path, framed)?;
        }
        Ok(())
    }

    /// The next record of a file; `None` behind the last one.
    fn record(
        &mut self,
        path: &Path,
        input: &mut impl Read,
        offset: &mut u64,
        end: u64,
        is_last: bool,
    ) -> Result<Option<Framed>, EtcdFileError> {
        let failed = |error| EtcdFileError::io("read", path, error);
        let damaged = |reason: &str| EtcdFileError::damaged(path, *offset, reason);
        if end - *offset < FRAME {
            return Ok(None);
        }
        let mut frame = [0; FRAME as usize];
        input.read_exact(&mut frame).map_err(failed)?;
        let frame = u64::from_le_bytes(frame);
        if frame == 0 {
            return Ok(None);
        }
        let record_len = frame & 0x00ff_ffff_ffff_ffff;
        let padding = if frame >> 63 == 1 { frame >> 56 & 7 } else { 0 };
        let len = record_len + padding;
        if len > end - *offset - FRAME {
            // A length is written as a whole, so this one is wrong, or the file was cut.
            let reason = "a record reaches beyond the end of its file; if etcd can repair it, start \
                          etcd once and stop it in order";
            return Err(damaged(reason));
        }
        // Bounded by the length of the file.
        let mut bytes = vec![0; len as usize];
        input.read_exact(&mut bytes).map_err(failed)?;
        let is_torn = || is_last && has_zero_sector(&bytes, *offset + FRAME);
        let Ok(record) = Record::decode(&bytes[..record_len as usize]) else {
            return if is_torn() { Ok(None) } else { Err(damaged("a record does not decode")) };
        };
        if record.kind != CRC {
            let crc = crc32c::crc32c_append(self.crc, &record.data);
            if crc != record.crc {
                return match is_torn() {
                    true => Ok(None),
                    false => Err(damaged("the checksum of a record does not fit")),
                };
            }
            self.crc = crc;
        }
        let framed = Framed { record, offset: *offset };
        *offset += FRAME + len;
        Ok(Some(framed))
    }

    fn take(&mut self, path: &Path, framed: Framed) -> Result<(), EtcdFileError> {
        let Framed { record, offset } = framed;
        let damaged = |reason: &str| EtcdFileError::damaged(path, offset, reason);
        match record.kind {
            CRC => {
                if self.crc != 0 && self.crc != record.crc {
                    return Err(damaged("the file does not continue the one before"));
                }
                self.crc = record.crc;
            }
            METADATA => {
                let metadata = Metadata::decode(record.data.as_slice());
                let metadata = metadata.map_err(|_| damaged("metadata do not decode"))?;
                let found = (metadata.member_id, metadata.cluster_id);
                if self.has_metadata && found != (self.log.member_id, self.log.cluster_id) {
                    return Err(damaged("the file belongs to another member"));
                }
                self.has_metadata = true;
                (self.log.member_id, self.log.cluster_id) = found;
            }
            STATE => {
                let state = HardState::decode(record.data.as_slice());
                let state = state.map_err(|_| damaged("a hard state does not decode"))?;
                self.log.term = state.term;
                self.log.vote = state.vote;
                self.log.commit = state.commit;
            }
            ENTRY => {
                let entry = RaftEntry::decode(record.data.as_slice());
                self.entry(path, offset, entry.map_err(|_| damaged("an entry does not decode"))?)?;
            }
            SNAPSHOT => {
                let mark = SnapshotMark::decode(record.data.as_slice());
                let mark = mark.map_err(|_| damaged("a snapshot mark does not decode"))?;
                self.snapshot(LogId { term: mark.term, index: mark.index });
            }
            _ => return Err(damaged("a record has a type that is not known")),
        }
        Ok(())
    }

    /// A snapshot that reaches beyond the entries replaces them.
    fn snapshot(&mut self, at: LogId) {
        if at.index == self.position && at.index > 0 {
            self.log.at_position = Some(at);
        }
        if at.index > self.log.last.index {
            self.log.last = at;
            self.forget(0);
        }
    }

    fn forget(&mut self, keep: usize) {
        self.log.entries.truncate(keep);
    }

    fn entry(&mut self, path: &Path, offset: u64, entry: RaftEntry) -> Result<(), EtcdFileError> {
        let id = LogId { term: entry.term, index: entry.index };
        let damaged = |reason: &str| EtcdFileError::damaged(path, offset, reason);
        let is_first = self.log.last.index == 0;
        if id.index == 0 || (!is_first && id.index > self.log.last.index + 1) {
            return Err(damaged("entries are missing before this one"));
        }
        // A later entry of the same index replaces the earlier one and all behind it.
        self.log.last = id;
        if id.index == self.position {
            self.log.at_position = Some(id);
        }
        let Some(place) = id.index.checked_sub(self.position + 1) else {
            self.forget(0);
            return Ok(());
        };
        let place = usize::try_from(place).unwrap_or(usize::MAX);
        if place > self.log.entries.len() {
            let reason = format!(
                "the log begins with entry {}, but the database ends with entry {}",
                id.index, self.position
            );
            return Err(damaged(&reason));
        }
        self.forget(place);
        self.held += entry.data.len();
        if self.held > HELD_BYTES_MAX {
            let reason = "more than 1 GiB of entries wait to be applied: start etcd, let it catch \
                          up, and stop it in order";
            return Err(damaged(reason));
        }
        let index = id.index;
        let payload = payload(entry)
            .map_err(|reason| damaged(&format!("entry {index} cannot be carried out: {reason}")))?;
        self.log.entries.push(EtcdEntry { id, payload });
        Ok(())
    }

    fn finish(self, dir: &Path) -> Result<EtcdLog, EtcdFileError> {
        let foreign = |reason: String| EtcdFileError::Foreign {
            path: dir.to_owned(),
            expected: "the log that belongs to the database",
            reason,
        };
        if !self.has_metadata {
            return Err(foreign("it does not say whose it is".to_owned()));
        }
        if self.log.last.index < self.position {
            return Err(foreign(format!(
                "it ends with entry {}, but the database has applied entry {}",
                self.log.last.index, self.position
            )));
        }
        let expected = self.log.last.index - self.position;
        if self.log.entries.len() as u64 != expected {
            return Err(foreign(format!(
                "a snapshot up to entry {} was being received; the database still ends with entry \
                 {}: start etcd once so that it finishes, and stop it in order",
                self.log.last.index, self.position
            )));
        }
        Ok(self.log)
    }
}

/// Whether a part of a write never reached the disk.
fn has_zero_sector(bytes: &[u8], start: u64) -> bool {
    let first = (SECTOR - start % SECTOR) as usize;
    let (first, rest) = bytes.split_at(first.min(bytes.len()));
    let is_zero = |sector: &[u8]| !sector.is_empty() && sector.iter().all(|byte| *byte == 0);
    is_zero(first) || rest.chunks(SECTOR as usize).any(is_zero)
}

/// What an entry does here.
fn payload(entry: RaftEntry) -> Result<Payload, String> {
    match entry.kind {
        NORMAL if entry.data.is_empty() => Ok(Payload::Blank),
        NORMAL => match Request::decode(entry.data.as_slice()) {
            Ok(request) => command(request),
            // etcd 3.4 and 3.5 write requests of the old API as they are.
            Err(_) => match RequestV2::decode(entry.data.as_slice()) {
                Ok(request) => v2_command(&request),
                Err(_) => Err("its request does not decode".to_owned()),
            },
        },
        CONF_CHANGE => members(&entry.data).map(Payload::Members),
        kind => Err(format!("entries of type {kind} are not known")),
    }
}

fn command(request: Request) -> Result<Payload, String> {
    let op = match request {
        Request { put: Some(request), .. } => Op::Put(request),
        Request { delete_range: Some(request), .. } => Op::DeleteRange(request),
        Request { txn: Some(request), .. } => Op::Txn(request),
        Request { compaction: Some(request), .. } => Op::Compaction(request),
        Request { lease_grant: Some(request), .. } => Op::LeaseGrant(request),
        Request { lease_revoke: Some(request), .. } => Op::LeaseRevoke(request),
        Request { lease_checkpoint: Some(request), .. } => Op::LeaseCheckpoint(request),
        Request { alarm: Some(request), .. } => Op::Alarm(request),
        other => return other_command(&other),
    };
    Ok(Payload::Command(Box::new(op)))
}

fn other_command(request: &Request) -> Result<Payload, String> {
    if let Some(v2) = &request.v2 {
        return v2_command(v2);
    }
    if let Some(VersionSet { version }) = &request.version_set {
        return Ok(version_set(version));
    }
    if let Some(set) = &request.attributes_set {
        let attributes = set.attributes.clone().unwrap_or_default();
        return Ok(publish(set.member_id, attributes.name, attributes.client_urls));
    }
    let r = request;
    let auth = [
        &r.auth_enable,
        &r.auth_disable,
        &r.user_add,
        &r.user_delete,
        &r.user_change_password,
        &r.user_grant_role,
        &r.user_revoke_role,
        &r.role_add,
        &r.role_delete,
        &r.role_grant_permission,
        &r.role_revoke_permission,
    ];
    if auth.iter().any(|change| change.is_some()) {
        let text = "it changes users or roles, which this version of Kelson does not keep";
        return Err(text.to_owned());
    }
    let harmless = [
        &r.range,
        &r.authenticate,
        &r.auth_status,
        &r.user_get,
        &r.user_list,
        &r.role_list,
        &r.role_get,
        // What a downgrade of etcd would need; our members are all of one kind.
        &r.downgrade_set,
        &r.downgrade_test,
    ];
    match harmless.iter().any(|request| request.is_some()) {
        true => Ok(Payload::Blank),
        false => Err("its request is of a kind that this version does not know".to_owned()),
    }
}

fn version_set(version: &str) -> Payload {
    let set = ClusterVersionSet { version: version.to_owned() };
    Payload::Command(Box::new(Op::ClusterVersionSet(set)))
}

fn publish(id: u64, name: String, client_urls: Vec<String>) -> Payload {
    let publish = MemberPublish { id, name, client_urls, storage_uuid: Default::default() };
    Payload::Command(Box::new(Op::MemberPublish(publish)))
}

/// The only requests of the old API that mean something here: a member says its name and URLs, the
/// leader says the cluster's version.
fn v2_command(request: &RequestV2) -> Result<Payload, String> {
    #[derive(serde::Deserialize)]
    struct AttributesJson {
        #[serde(default)]
        name: String,
        #[serde(rename = "clientURLs", default)]
        client_urls: Option<Vec<String>>,
    }
    if request.method != "PUT" {
        return Ok(Payload::Blank);
    }
    if request.path == "/0/version" {
        return Ok(version_set(&request.value));
    }
    let member = request.path.strip_prefix("/0/members/");
    let Some(id) = member.and_then(|path| path.strip_suffix("/attributes")) else {
        return Ok(Payload::Blank);
    };
    let id = u64::from_str_radix(id, 16).map_err(|_| format!("{id:?} is no member id"))?;
    let json: AttributesJson = serde_json::from_str(&request.value)
        .map_err(|error| format!("the attributes of member {id:x}: {error}"))?;
    Ok(publish(id, json.name, json.client_urls.unwrap_or_default()))
}

fn members(data: &[u8]) -> Result<ConfChange, String> {
    let record = ConfChangeRecord::decode(data);
    let record = record.map_err(|_| "its change of members does not decode".to_owned())?;
    let kind = match record.kind {
        0 => ConfChangeKind::AddVoter,
        1 => ConfChangeKind::Remove,
        2 => ConfChangeKind::Update,
        3 => ConfChangeKind::AddLearner,
        kind => return Err(format!("a change of members of type {kind} is not known")),
    };
    let context: Option<ConfChangeContext> = serde_json::from_slice(&record.context).ok();
    Ok(ConfChange {
        kind,
        member_id: record.member_id,
        member: parse_member(&record.context),
        is_promote: context.is_some_and(|context| context.is_promote),
    })
}

/// For the fuzz target: records with fitting checksums out of any bytes. The first byte of each is its
/// type, the second its length.
pub(super) fn with_sound_checksums(mut data: &[u8]) -> Vec<u8> {
    let mut file = Vec::new();
    let mut crc = 0;
    while let [kind, len, rest @ ..] = data {
        let (body, rest) = rest.split_at(rest.len().min(usize::from(*len)));
        data = rest;
        crc = crc32c::crc32c_append(crc, body);
        let record = Record { kind: i64::from(kind % 7), crc, data: body.to_vec() };
        if record.kind == CRC {
            continue;
        }
        record.frame_into(&mut file);
    }
    file
}
