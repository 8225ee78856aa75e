//! What an entry of etcd's log asks for, as the command that it is here: etcd's union of requests,
//! those of its old API that still mean something, and changes of the members. A request that etcd
//! judges by the rights of its user when it applies it carries that user, so it comes to the same
//! end here. It reads no file and decides nothing. Called by `wal` for each entry.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use kelson_api::Message;
use kelson_api::command::command::Op;
use kelson_api::command::{Asker, Batch, ClusterVersionSet, Command, Login, MemberPublish};
use kelson_api::etcdserverpb::{
    AlarmRequest, AuthDisableRequest, AuthEnableRequest, AuthRoleAddRequest, AuthRoleDeleteRequest,
    AuthRoleGrantPermissionRequest, AuthRoleRevokePermissionRequest, AuthUserAddRequest,
    AuthUserChangePasswordRequest, AuthUserDeleteRequest, AuthUserGrantRoleRequest,
    AuthUserRevokeRoleRequest, CompactionRequest, DeleteRangeRequest, LeaseCheckpointRequest,
    LeaseGrantRequest, LeaseRevokeRequest, Member, PutRequest, TxnRequest,
};
use sha2::{Digest, Sha256};

use super::database::parse_member;
use super::wal::{CONF_CHANGE, ConfChangeRecord, RaftEntry};

const NORMAL: i32 = 0;

/// Cost of the hashes made here: etcd's own default.
const PASSWORD_COST: u32 = 10;
/// Passwords that are hashed here at most, each for some 50 ms. Only etcd 3.4 logs them as they are.
const PASSWORDS_MAX: usize = 256;

/// What an entry does here.
#[derive(Clone, PartialEq, Debug)]
pub enum Payload {
    /// Nothing: the first entry of a term, or a request without an effect on what we keep.
    Blank,
    /// A change of the store: a marshalled `Batch` of one command. Decoded, some would take a hundred
    /// times the room, and a log may hold many.
    Commands(Bytes),
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

/// A user whose password etcd had checked before it proposed this.
#[derive(Clone, PartialEq, kelson_api::Message)]
struct Authenticate {
    #[prost(string, tag = "1")]
    name: String,
    /// The first part of the token; empty if tokens are signed, or there are none.
    #[prost(string, tag = "3")]
    simple_token: String,
}

/// Who asked. Empty: nobody that etcd knew, or users did not count.
#[derive(Clone, PartialEq, kelson_api::Message)]
struct Header {
    #[prost(string, tag = "2")]
    user: String,
    #[prost(uint64, tag = "3")]
    auth_revision: u64,
}

/// etcd's union of requests. Those that only read are looked at no further than that they are there.
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
    #[prost(message, optional, tag = "100")]
    header: Option<Header>,
    #[prost(message, optional, tag = "1000")]
    auth_enable: Option<AuthEnableRequest>,
    #[prost(message, optional, tag = "1011")]
    auth_disable: Option<AuthDisableRequest>,
    #[prost(message, optional, tag = "1012")]
    authenticate: Option<Authenticate>,
    #[prost(bytes = "vec", optional, tag = "1013")]
    auth_status: Option<Vec<u8>>,
    #[prost(message, optional, tag = "1100")]
    user_add: Option<AuthUserAddRequest>,
    #[prost(message, optional, tag = "1101")]
    user_delete: Option<AuthUserDeleteRequest>,
    #[prost(bytes = "vec", optional, tag = "1102")]
    user_get: Option<Vec<u8>>,
    #[prost(message, optional, tag = "1103")]
    user_change_password: Option<AuthUserChangePasswordRequest>,
    #[prost(message, optional, tag = "1104")]
    user_grant_role: Option<AuthUserGrantRoleRequest>,
    #[prost(message, optional, tag = "1105")]
    user_revoke_role: Option<AuthUserRevokeRoleRequest>,
    #[prost(bytes = "vec", optional, tag = "1106")]
    user_list: Option<Vec<u8>>,
    #[prost(bytes = "vec", optional, tag = "1107")]
    role_list: Option<Vec<u8>>,
    #[prost(message, optional, tag = "1200")]
    role_add: Option<AuthRoleAddRequest>,
    #[prost(message, optional, tag = "1201")]
    role_delete: Option<AuthRoleDeleteRequest>,
    #[prost(bytes = "vec", optional, tag = "1202")]
    role_get: Option<Vec<u8>>,
    #[prost(message, optional, tag = "1203")]
    role_grant_permission: Option<AuthRoleGrantPermissionRequest>,
    #[prost(message, optional, tag = "1204")]
    role_revoke_permission: Option<AuthRoleRevokePermissionRequest>,
    #[prost(message, optional, tag = "1300")]
    version_set: Option<VersionSet>,
    #[prost(message, optional, tag = "1301")]
    attributes_set: Option<AttributesSet>,
    #[prost(bytes = "vec", optional, tag = "1302")]
    downgrade_set: Option<Vec<u8>>,
    #[prost(bytes = "vec", optional, tag = "9900")]
    downgrade_test: Option<Vec<u8>>,
}

/// Reads entries of one log.
pub(super) struct Requests {
    /// Cost of a hash made here.
    cost: u32,
    /// Passwords hashed so far.
    passwords: usize,
}

impl Default for Requests {
    fn default() -> Self {
        Self { cost: PASSWORD_COST, passwords: 0 }
    }
}

impl Requests {
    /// For tests, which have no time: the hashes are of no use to anybody else.
    pub(super) fn with_cheap_hashes() -> Self {
        Self { cost: 4, ..Self::default() }
    }

    /// What an entry does here. The error tells why it cannot.
    pub(super) fn payload(&mut self, cluster_id: u64, entry: RaftEntry) -> Result<Payload, String> {
        match entry.kind {
            NORMAL if entry.data.is_empty() => Ok(Payload::Blank),
            NORMAL => match Request::decode(entry.data.as_slice()) {
                Ok(request) => self.command(request, &Salt { cluster_id, index: entry.index }),
                // etcd 3.4 and 3.5 write requests of the old API as they are.
                Err(_) => match RequestV2::decode(entry.data.as_slice()) {
                    Ok(request) => v2_command(request),
                    Err(_) => Err("its request does not decode".to_owned()),
                },
            },
            CONF_CHANGE => members(&entry.data).map(Payload::Members),
            kind => Err(format!("entries of type {kind} are not known")),
        }
    }

    fn command(&mut self, mut request: Request, salt: &Salt) -> Result<Payload, String> {
        let Header { user, auth_revision } = request.header.take().unwrap_or_default();
        let asker = Asker { user, auth_revision };
        let op = match request {
            Request { put: Some(request), .. } => Op::Put(request),
            Request { delete_range: Some(request), .. } => Op::DeleteRange(request),
            Request { txn: Some(request), .. } => Op::Txn(request),
            Request { lease_revoke: Some(request), .. } => {
                return Ok(command(Op::LeaseRevoke(request), Some(asker_of_revoke(asker))));
            }
            Request { auth_enable: Some(request), .. } => Op::AuthEnable(request),
            Request { auth_disable: Some(request), .. } => Op::AuthDisable(request),
            Request { user_add: Some(mut add), .. } => {
                // Without a password there is nothing to hash, whatever the request says.
                if add.options.unwrap_or_default().no_password {
                    add.password.clear();
                }
                self.hash(salt, &add.name, &mut add.password, &mut add.hashed_password)?;
                Op::UserAdd(add)
            }
            Request { user_delete: Some(request), .. } => Op::UserDelete(request),
            Request { user_change_password: Some(mut change), .. } => {
                let (password, hashed) = (&mut change.password, &mut change.hashed_password);
                self.hash(salt, &change.name, password, hashed)?;
                Op::UserChangePassword(change)
            }
            Request { user_grant_role: Some(request), .. } => Op::UserGrantRole(request),
            Request { user_revoke_role: Some(request), .. } => Op::UserRevokeRole(request),
            Request { role_add: Some(request), .. } => Op::RoleAdd(request),
            Request { role_delete: Some(request), .. } => Op::RoleDelete(request),
            Request { role_grant_permission: Some(request), .. } => {
                Op::RoleGrantPermission(request)
            }
            Request { role_revoke_permission: Some(request), .. } => {
                Op::RoleRevokePermission(request)
            }
            other => return unjudged(other),
        };
        Ok(command(op, Some(asker)))
    }

    /// Puts the hash of a password in its place: etcd 3.4 made it when it applied the request, each
    /// member another one. Here all members have the same, because the salt comes from the entry.
    fn hash(
        &mut self,
        salt: &Salt,
        user: &str,
        password: &mut String,
        hashed: &mut String,
    ) -> Result<(), String> {
        let password = std::mem::take(password);
        if password.is_empty() || !hashed.is_empty() {
            return Ok(());
        }
        self.passwords += 1;
        if self.passwords > PASSWORDS_MAX {
            return Err(format!(
                "more than {PASSWORDS_MAX} passwords wait to be hashed: start etcd, let it catch \
                 up, and stop it in order"
            ));
        }
        let parts = bcrypt::hash_with_salt(password, self.cost, salt.bytes(user));
        let parts = parts.map_err(|error| format!("the password of user {user:?}: {error}"))?;
        *hashed = STANDARD.encode(parts.format_for_version(bcrypt::Version::TwoA));
        Ok(())
    }
}

/// Where a password was set: no two have the same.
struct Salt {
    cluster_id: u64,
    index: u64,
}

impl Salt {
    fn bytes(&self, user: &str) -> [u8; 16] {
        let mut hash = Sha256::new();
        hash.update(self.cluster_id.to_be_bytes());
        hash.update(self.index.to_be_bytes());
        hash.update(user);
        let (digest, mut salt) = (hash.finalize(), [0; 16]);
        salt.copy_from_slice(&digest[..16]);
        salt
    }
}

fn command(op: Op, asker: Option<Asker>) -> Payload {
    let command = Command { asker, op: Some(op), ..Command::default() };
    Payload::Commands(Batch { commands: vec![command] }.encode_to_vec().into())
}

/// By etcd's rule a lease may be revoked by who may write all its keys; one without keys by
/// anybody, even by somebody without a name. Ours wants a name or a revision first, so nobody gets
/// a revision that is too old for any key.
fn asker_of_revoke(asker: Asker) -> Asker {
    let auth_revision = if asker.user.is_empty() { 1 } else { asker.auth_revision };
    Asker { auth_revision, ..asker }
}

/// What etcd carries out for whoever is in its log: it asked for rights before, or a member proposed it.
fn unjudged(request: Request) -> Result<Payload, String> {
    let op = match request {
        Request { compaction: Some(request), .. } => Op::Compaction(request),
        Request { lease_grant: Some(request), .. } => Op::LeaseGrant(request),
        Request { lease_checkpoint: Some(request), .. } => Op::LeaseCheckpoint(request),
        Request { alarm: Some(request), .. } => Op::Alarm(request),
        Request { authenticate: Some(Authenticate { name, simple_token }), .. } => {
            if simple_token.is_empty() {
                return Ok(Payload::Blank);
            }
            Op::Login(Login { user: name, token: simple_token })
        }
        Request { version_set: Some(VersionSet { version }), .. } => version_set(version),
        Request { attributes_set: Some(set), .. } => {
            let attributes = set.attributes.unwrap_or_default();
            publish(set.member_id, attributes.name, attributes.client_urls)
        }
        Request { v2: Some(v2), .. } => return v2_command(v2),
        other if has_no_effect(&other) => return Ok(Payload::Blank),
        _ => return Err("its request is of a kind that this version does not know".to_owned()),
    };
    Ok(command(op, None))
}

fn has_no_effect(request: &Request) -> bool {
    let requests = [
        &request.range,
        &request.auth_status,
        &request.user_get,
        &request.user_list,
        &request.role_list,
        &request.role_get,
        // What a downgrade of etcd would need; our members are all of one kind.
        &request.downgrade_set,
        &request.downgrade_test,
    ];
    requests.iter().any(|request| request.is_some())
}

fn version_set(version: String) -> Op {
    Op::ClusterVersionSet(ClusterVersionSet { version })
}

fn publish(id: u64, name: String, client_urls: Vec<String>) -> Op {
    Op::MemberPublish(MemberPublish { id, name, client_urls, storage_uuid: Default::default() })
}

/// The only requests of the old API that mean something here: a member says its name and URLs, the
/// leader says the cluster's version.
fn v2_command(request: RequestV2) -> Result<Payload, String> {
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
        return Ok(command(version_set(request.value), None));
    }
    let member = request.path.strip_prefix("/0/members/");
    let Some(id) = member.and_then(|path| path.strip_suffix("/attributes")) else {
        return Ok(Payload::Blank);
    };
    let id = u64::from_str_radix(id, 16).map_err(|_| format!("{id:?} is no member id"))?;
    let json: AttributesJson = serde_json::from_str(&request.value)
        .map_err(|error| format!("the attributes of member {id:x}: {error}"))?;
    Ok(command(publish(id, json.name, json.client_urls.unwrap_or_default()), None))
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

/// For the fuzz target: the records of a log with one entry for each request, behind what says
/// whose it is.
pub(super) fn entries_of(data: &[u8]) -> Vec<RaftEntry> {
    let (mut entries, mut rest) = (Vec::new(), data);
    while let [len, after @ ..] = rest {
        let (body, after) = after.split_at(after.len().min(usize::from(*len)));
        rest = after;
        let (kind, index) = (NORMAL, entries.len() as u64 + 1);
        entries.push(RaftEntry { kind, term: 1, index, data: body.to_vec() });
    }
    entries
}

#[cfg(test)]
mod tests;
