//! Who may call what: every call of every service that the proto files define, by everybody. A call
//! without a row in the table fails the test, and so does a row without a call.
//!
//! Beside it, one test for each way around the checks that etcd had to close. Over 600 lines, because the
//! table is long and nobody should have to look for a row elsewhere.

use std::collections::BTreeSet;
use std::time::Duration;

use kelson_api::Message;
use kelson_api::authpb::{Permission, permission::Type};
use kelson_api::etcdserverpb as pb;
use kelson_api::health::HealthCheckRequest;
use kelson_api::{v3electionpb as election, v3lockpb as lock};
use kelson_tests::server::{Server, kelson_binary, root};
use pb::request_op::Request as Operation;
use pb::watch_request::RequestUnion;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::transport::Channel;
use tonic::{Code, Request, Status};

/// How long one call may take.
const PATIENCE: Duration = Duration::from_secs(20);

/// Messages as they are on the wire.
#[derive(Clone, Copy, Default)]
struct Raw;

impl Codec for Raw {
    type Encode = Vec<u8>;
    type Decode = Vec<u8>;
    type Encoder = Raw;
    type Decoder = Raw;

    fn encoder(&mut self) -> Raw {
        Raw
    }

    fn decoder(&mut self) -> Raw {
        Raw
    }
}

impl Encoder for Raw {
    type Item = Vec<u8>;
    type Error = Status;

    fn encode(&mut self, item: Vec<u8>, out: &mut EncodeBuf<'_>) -> Result<(), Status> {
        bytes::BufMut::put_slice(out, &item);
        Ok(())
    }
}

impl Decoder for Raw {
    type Item = Vec<u8>;
    type Error = Status;

    fn decode(&mut self, input: &mut DecodeBuf<'_>) -> Result<Option<Vec<u8>>, Status> {
        let mut message = vec![0; bytes::Buf::remaining(input)];
        bytes::Buf::copy_to_slice(input, &mut message);
        Ok(Some(message))
    }
}

/// Who must be what to make a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rule {
    /// Nobody is asked who he is.
    Open,
    /// Anybody, but a token must be right.
    Anybody,
    /// Any user.
    User,
    /// A right to a key that the plain user does not have.
    Key,
    /// The role root.
    Root,
    /// A right to such a key, asked for by services that hand errors on without their code, as etcd's do.
    Contest,
}

/// One call with one request.
struct Row {
    path: &'static str,
    /// What is special about the request, for messages.
    what: &'static str,
    request: Vec<u8>,
    rule: Rule,
    /// What comes back from a call that is let through.
    passed: Code,
}

fn row(path: &'static str, what: &'static str, rule: Rule, request: impl Message) -> Row {
    Row { path, what, request: request.encode_to_vec(), rule, passed: Code::Ok }
}

impl Row {
    /// Let through, the call fails for a reason that has nothing to do with who calls.
    fn then(mut self, passed: Code) -> Row {
        self.passed = passed;
        self
    }
}

/// The columns of the matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Who {
    /// Anybody while auth is off.
    WhileOff,
    NoToken,
    WrongToken,
    /// A user who has no right to the keys of the requests.
    Plain,
    Root,
}

const EMPTY: (Code, &str) = (Code::InvalidArgument, "etcdserver: user name is empty");
const WRONG: (Code, &str) = (Code::Unauthenticated, "etcdserver: invalid auth token");
const DENIED: (Code, &str) = (Code::PermissionDenied, "etcdserver: permission denied");

/// The refusal that this rule has for somebody; `None` = let through.
fn refusal(rule: Rule, who: Who) -> Option<(Code, &'static str)> {
    if rule == Rule::Contest {
        let refusal = refusal(Rule::Key, who);
        return refusal.map(|(_, text)| (Code::Unknown, text));
    }
    match (who, rule) {
        (Who::WhileOff | Who::Root, _) | (_, Rule::Open) => None,
        (Who::WrongToken, _) => Some(WRONG),
        (_, Rule::Anybody) => None,
        (Who::NoToken, _) => Some(EMPTY),
        (Who::Plain, Rule::User) => None,
        (Who::Plain, Rule::Key | Rule::Root | Rule::Contest) => Some(DENIED),
    }
}

fn put(key: &str) -> pb::PutRequest {
    pb::PutRequest { key: key.to_owned().into(), ..Default::default() }
}

fn get(key: &str) -> pb::RangeRequest {
    pb::RangeRequest { key: key.to_owned().into(), ..Default::default() }
}

fn delete(key: &str) -> pb::DeleteRangeRequest {
    pb::DeleteRangeRequest { key: key.to_owned().into(), ..Default::default() }
}

fn then(operation: Operation) -> pb::TxnRequest {
    let success = vec![pb::RequestOp { request: Some(operation) }];
    pb::TxnRequest { success, ..Default::default() }
}

fn watch(key: &str, range_end: &str) -> pb::WatchRequest {
    let (key, range_end) = (key.to_owned().into(), range_end.to_owned().into());
    let create = pb::WatchCreateRequest { key, range_end, ..Default::default() };
    pb::WatchRequest { request_union: Some(RequestUnion::CreateRequest(create)) }
}

fn allow(name: &str, kind: Type, key: &str, range_end: &str) -> pb::AuthRoleGrantPermissionRequest {
    let (key, range_end) = (key.to_owned().into(), range_end.to_owned().into());
    let perm = Some(Permission { perm_type: kind as i32, key, range_end });
    pb::AuthRoleGrantPermissionRequest { name: name.into(), perm }
}

fn add_user(name: &str) -> pb::AuthUserAddRequest {
    let password = "secret".into();
    pb::AuthUserAddRequest { name: name.into(), password, ..Default::default() }
}

fn grant_role(user: &str, role: &str) -> pb::AuthUserGrantRoleRequest {
    pb::AuthUserGrantRoleRequest { user: user.into(), role: role.into() }
}

const KV: [&str; 6] = [
    "/etcdserverpb.KV/Range",
    "/etcdserverpb.KV/RangeStream",
    "/etcdserverpb.KV/Put",
    "/etcdserverpb.KV/DeleteRange",
    "/etcdserverpb.KV/Txn",
    "/etcdserverpb.KV/Compact",
];

/// Reads and writes of keys. The plain user may read and write `p`, read `r` and write `w`; `k` is
/// not his, nor is lease 1.
fn key_rows() -> Vec<Row> {
    let [range, stream, put_path, del, txn, compact] = KV;
    let with_prev = |key| pb::PutRequest { prev_kv: true, ..put(key) };
    let with_lease = |key| pb::PutRequest { lease: 1, ..put(key) };
    let del_prev = |key| pb::DeleteRangeRequest { prev_kv: true, ..delete(key) };
    let compare = |key: &str| pb::Compare { key: key.to_owned().into(), ..Default::default() };
    let guess = |key| pb::TxnRequest { compare: vec![compare(key)], ..Default::default() };
    let otherwise = pb::TxnRequest { failure: then(put("k").into_op()).success, ..guess("p") };
    let nested = |inner: pb::TxnRequest| then(Operation::RequestTxn(inner));
    vec![
        row(range, "", Rule::Key, get("k")),
        row(range, "serializable", Rule::Key, pb::RangeRequest { serializable: true, ..get("k") }),
        row(range, "his own", Rule::User, get("p")),
        row(
            range,
            "more than his own",
            Rule::Key,
            pb::RangeRequest { range_end: "q".into(), ..get("p") },
        ),
        row(stream, "", Rule::Key, get("k")),
        row(put_path, "", Rule::Key, put("k")),
        row(put_path, "his own", Rule::User, put("w")),
        row(put_path, "prev_kv", Rule::Key, with_prev("w")),
        row(put_path, "lease", Rule::Key, with_lease("w")),
        row(del, "", Rule::Key, delete("k")),
        row(del, "prev_kv", Rule::Key, del_prev("w")),
        row(txn, "reads", Rule::Key, then(Operation::RequestRange(get("k")))),
        row(txn, "compares", Rule::Key, guess("k")),
        row(txn, "writes", Rule::Key, then(put("k").into_op())),
        row(txn, "writes his own", Rule::User, then(put("w").into_op())),
        row(txn, "else", Rule::Key, otherwise),
        row(txn, "prev_kv", Rule::Key, then(with_prev("w").into_op())),
        row(txn, "lease", Rule::Key, then(with_lease("w").into_op())),
        row(txn, "deletes", Rule::Key, then(Operation::RequestDeleteRange(delete("k")))),
        row(txn, "delete prev_kv", Rule::Key, then(Operation::RequestDeleteRange(del_prev("w")))),
        row(txn, "nested read", Rule::Key, nested(then(Operation::RequestRange(get("k"))))),
        row(txn, "nested write", Rule::Key, nested(then(put("k").into_op()))),
        row(txn, "nested twice", Rule::Key, nested(nested(then(put("k").into_op())))),
        row(txn, "nested compare", Rule::Key, nested(guess("k"))),
        row(txn, "nested prev_kv", Rule::Key, nested(then(with_prev("w").into_op()))),
        row(txn, "nested lease", Rule::Key, nested(then(with_lease("w").into_op()))),
        row(txn, "no key", Rule::Anybody, pb::TxnRequest::default()),
        row(compact, "", Rule::Root, pb::CompactionRequest { revision: 2, physical: true }),
        row("/etcdserverpb.Watch/Watch", "one key", Rule::Key, watch("k", "")),
        row("/etcdserverpb.Watch/Watch", "open end", Rule::Key, watch("p", "\0")),
        row("/etcdserverpb.Watch/Watch", "everything", Rule::Key, watch("", "\0")),
        row("/etcdserverpb.Watch/Watch", "his own", Rule::User, watch("p", "")),
    ]
}

trait IntoOp {
    fn into_op(self) -> Operation;
}

impl IntoOp for pb::PutRequest {
    fn into_op(self) -> Operation {
        Operation::RequestPut(self)
    }
}

fn lease_rows() -> Vec<Row> {
    let ttl = |keys| pb::LeaseTimeToLiveRequest { id: 1, keys };
    vec![
        row(
            "/etcdserverpb.Lease/LeaseGrant",
            "",
            Rule::User,
            pb::LeaseGrantRequest { ttl: 100, id: 0 },
        ),
        row(
            "/etcdserverpb.Lease/LeaseKeepAlive",
            "",
            Rule::Key,
            pb::LeaseKeepAliveRequest { id: 1 },
        ),
        row(
            "/etcdserverpb.Lease/LeaseKeepAlive",
            "no keys",
            Rule::User,
            pb::LeaseKeepAliveRequest { id: 2 },
        ),
        row("/etcdserverpb.Lease/LeaseTimeToLive", "", Rule::User, ttl(false)),
        row("/etcdserverpb.Lease/LeaseTimeToLive", "keys", Rule::Key, ttl(true)),
        row("/etcdserverpb.Lease/LeaseLeases", "", Rule::Key, pb::LeaseLeasesRequest {}),
        row("/etcdserverpb.Lease/LeaseRevoke", "", Rule::Key, pb::LeaseRevokeRequest { id: 1 }),
        row(
            "/etcdserverpb.Lease/LeaseRevoke",
            "unknown",
            Rule::User,
            pb::LeaseRevokeRequest { id: 99 },
        )
        .then(Code::NotFound),
    ]
}

fn member_rows() -> Vec<Row> {
    let urls = || vec!["http://127.0.0.1:9".to_owned()];
    let alarm = |action| pb::AlarmRequest { action, member_id: 1, alarm: 0 };
    let update = pb::MemberUpdateRequest { id: 1, peer_ur_ls: urls() };
    let add = pb::MemberAddRequest { peer_ur_ls: urls(), is_learner: true };
    let list = |linearizable| pb::MemberListRequest { linearizable };
    let downgrade = pb::DowngradeRequest { action: 0, version: "1.0".into() };
    vec![
        row("/etcdserverpb.Cluster/MemberList", "", Rule::User, list(true)),
        row("/etcdserverpb.Cluster/MemberList", "local", Rule::User, list(false)),
        row(
            "/etcdserverpb.Cluster/MemberRemove",
            "",
            Rule::Root,
            pb::MemberRemoveRequest { id: 1 },
        )
        .then(Code::NotFound),
        row("/etcdserverpb.Cluster/MemberUpdate", "", Rule::Root, update).then(Code::NotFound),
        row(
            "/etcdserverpb.Cluster/MemberPromote",
            "",
            Rule::Root,
            pb::MemberPromoteRequest { id: 1 },
        )
        .then(Code::NotFound),
        row("/etcdserverpb.Cluster/MemberAdd", "", Rule::Root, add),
        row("/etcdserverpb.Maintenance/Alarm", "list", Rule::User, alarm(0)),
        row("/etcdserverpb.Maintenance/Alarm", "raise", Rule::Root, alarm(1)),
        row("/etcdserverpb.Maintenance/Alarm", "clear", Rule::Root, alarm(2)),
        row("/etcdserverpb.Maintenance/Status", "", Rule::User, pb::StatusRequest {}),
        row("/etcdserverpb.Maintenance/Defragment", "", Rule::Root, pb::DefragmentRequest {}),
        row("/etcdserverpb.Maintenance/Hash", "", Rule::Root, pb::HashRequest {}),
        row("/etcdserverpb.Maintenance/HashKV", "", Rule::Root, pb::HashKvRequest { revision: 0 }),
        row("/etcdserverpb.Maintenance/Snapshot", "", Rule::Root, pb::SnapshotRequest {}),
        row(
            "/etcdserverpb.Maintenance/MoveLeader",
            "",
            Rule::Root,
            pb::MoveLeaderRequest { target_id: 1 },
        )
        .then(Code::FailedPrecondition),
        row("/etcdserverpb.Maintenance/Downgrade", "", Rule::Root, downgrade)
            .then(Code::InvalidArgument),
        row("/grpc.health.v1.Health/Check", "", Rule::Open, HealthCheckRequest::default()),
        row("/grpc.health.v1.Health/Watch", "", Rule::Open, HealthCheckRequest::default()),
    ]
}

fn auth_rows() -> Vec<Row> {
    let get_user = |name: &str| pb::AuthUserGetRequest { name: name.into() };
    let get_role = |role: &str| pb::AuthRoleGetRequest { role: role.into() };
    let login = pb::AuthenticateRequest { name: "plain".into(), password: "wrong".into() };
    let password = pb::AuthUserChangePasswordRequest {
        name: "gone".into(),
        password: "new".into(),
        ..Default::default()
    };
    let revoke = pb::AuthRoleRevokePermissionRequest {
        role: "spare".into(),
        key: "x".into(),
        range_end: Default::default(),
    };
    let revoke_role = pb::AuthUserRevokeRoleRequest { name: "gone".into(), role: "spare".into() };
    vec![
        row("/etcdserverpb.Auth/AuthStatus", "", Rule::Anybody, pb::AuthStatusRequest {}),
        // While auth is off the state forbids it, not who calls.
        row("/etcdserverpb.Auth/Authenticate", "", Rule::Open, login).then(Code::InvalidArgument),
        row("/etcdserverpb.Auth/UserGet", "another", Rule::Root, get_user("gone")),
        row("/etcdserverpb.Auth/UserGet", "himself", Rule::User, get_user("plain")),
        row("/etcdserverpb.Auth/UserList", "", Rule::Root, pb::AuthUserListRequest {}),
        row("/etcdserverpb.Auth/RoleGet", "another", Rule::Root, get_role("spare")),
        row("/etcdserverpb.Auth/RoleGet", "his own", Rule::User, get_role("plain")),
        row("/etcdserverpb.Auth/RoleList", "", Rule::Root, pb::AuthRoleListRequest {}),
        row("/etcdserverpb.Auth/UserAdd", "", Rule::Root, add_user("new")),
        row("/etcdserverpb.Auth/UserChangePassword", "", Rule::Root, password),
        row("/etcdserverpb.Auth/UserRevokeRole", "", Rule::Root, revoke_role),
        row("/etcdserverpb.Auth/UserGrantRole", "", Rule::Root, grant_role("gone", "spare")),
        row(
            "/etcdserverpb.Auth/UserDelete",
            "",
            Rule::Root,
            pb::AuthUserDeleteRequest { name: "gone".into() },
        ),
        row(
            "/etcdserverpb.Auth/RoleAdd",
            "",
            Rule::Root,
            pb::AuthRoleAddRequest { name: "new".into() },
        ),
        row(
            "/etcdserverpb.Auth/RoleGrantPermission",
            "",
            Rule::Root,
            allow("spare", Type::Read, "y", ""),
        ),
        row("/etcdserverpb.Auth/RoleRevokePermission", "", Rule::Root, revoke),
        row(
            "/etcdserverpb.Auth/RoleDelete",
            "",
            Rule::Root,
            pb::AuthRoleDeleteRequest { role: "spare".into() },
        ),
        row("/etcdserverpb.Auth/AuthEnable", "", Rule::Root, pb::AuthEnableRequest {}),
        // Last: behind it everything is allowed.
        row("/etcdserverpb.Auth/AuthDisable", "", Rule::Root, pb::AuthDisableRequest {}),
    ]
}

/// Locks and elections with leases that are there, under names that are not the plain user's.
fn contest_rows() -> Vec<Row> {
    let leader = election::LeaderKey { name: "e".into(), key: "e/2".into(), rev: 1, lease: 2 };
    let name = || election::LeaderRequest { name: "e".into() };
    vec![
        row(
            "/v3lockpb.Lock/Lock",
            "",
            Rule::Contest,
            lock::LockRequest { name: "l".into(), lease: 1 },
        ),
        row("/v3lockpb.Lock/Unlock", "", Rule::Contest, lock::UnlockRequest { key: "l/1".into() }),
        row(
            "/v3electionpb.Election/Campaign",
            "",
            Rule::Contest,
            election::CampaignRequest { name: "e".into(), lease: 2, value: "v".into() },
        ),
        row("/v3electionpb.Election/Leader", "", Rule::Contest, name()),
        row("/v3electionpb.Election/Observe", "", Rule::Contest, name()),
        row(
            "/v3electionpb.Election/Proclaim",
            "of another time",
            Rule::Contest,
            election::ProclaimRequest { leader: Some(leader.clone()), value: "w".into() },
        )
        .then(Code::Unknown),
        row(
            "/v3electionpb.Election/Resign",
            "of another time",
            Rule::Contest,
            election::ResignRequest { leader: Some(leader) },
        ),
    ]
}

fn rows() -> Vec<Row> {
    [key_rows(), contest_rows(), lease_rows(), member_rows(), auth_rows()]
        .into_iter()
        .flatten()
        .collect()
}

/// Paths of all calls in the proto files that clients know.
fn calls() -> BTreeSet<String> {
    let proto = root().join("proto");
    let files = std::fs::read_dir(proto.join("etcd")).expect("proto files");
    let names = files.map(|file| file.expect("a file").file_name().into_string().expect("text"));
    let names: Vec<String> = names.map(|name| format!("etcd/{name}")).collect();
    let compiled = protox::compile(names, [&proto]).expect("the proto files compile");
    let mut calls = BTreeSet::new();
    for file in &compiled.file {
        for service in &file.service {
            let service_name = format!("{}.{}", file.package(), service.name());
            let methods = service.method.iter();
            calls.extend(methods.map(|method| format!("/{service_name}/{}", method.name())));
        }
    }
    calls
}

/// A member with one plain user beside root, and a client that speaks for somebody.
struct Case {
    runtime: tokio::runtime::Runtime,
    channel: Channel,
    token: Option<String>,
    _server: Server,
}

impl Case {
    /// Users are there; auth is off.
    fn new() -> Case {
        let server = Server::start(&kelson_binary(), &["--bcrypt-cost=4".to_owned()]);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.expect("a runtime can be built");
        let channel = runtime.block_on(async {
            Channel::from_shared(server.endpoint()).expect("a URL").connect_lazy()
        });
        let mut case = Case { runtime, channel, token: None, _server: server };
        for name in ["root", "plain", "gone"] {
            case.ok("/etcdserverpb.Auth/UserAdd", add_user(name));
        }
        for role in ["plain", "spare"] {
            case.ok("/etcdserverpb.Auth/RoleAdd", pb::AuthRoleAddRequest { name: role.into() });
        }
        for (role, kind, key) in [
            ("plain", Type::Readwrite, "p"),
            ("plain", Type::Read, "r"),
            ("plain", Type::Write, "w"),
            ("spare", Type::Read, "x"),
        ] {
            case.ok("/etcdserverpb.Auth/RoleGrantPermission", allow(role, kind, key, ""));
        }
        for (user, role) in [("root", "root"), ("plain", "plain"), ("gone", "spare")] {
            case.ok("/etcdserverpb.Auth/UserGrantRole", grant_role(user, role));
        }
        for id in [1, 2] {
            case.ok("/etcdserverpb.Lease/LeaseGrant", pb::LeaseGrantRequest { ttl: 1000, id });
        }
        for key in ["k", "p", "r", "w"] {
            let lease = i64::from(key == "k");
            case.ok("/etcdserverpb.KV/Put", pb::PutRequest { lease, ..put(key) });
        }
        case
    }

    fn enabled() -> Case {
        let mut case = Case::new();
        case.ok("/etcdserverpb.Auth/AuthEnable", pb::AuthEnableRequest {});
        case
    }

    fn become_user(&mut self, who: Who) {
        self.token = None;
        let name = match who {
            Who::WhileOff | Who::NoToken => return,
            Who::WrongToken => {
                self.token = Some("aaaaaaaaaaaaaaaa.1".to_owned());
                return;
            }
            Who::Plain => "plain",
            Who::Root => "root",
        };
        let login = pb::AuthenticateRequest { name: name.into(), password: "secret".into() };
        let answer = self.ok("/etcdserverpb.Auth/Authenticate", login);
        let answer = pb::AuthenticateResponse::decode(&answer[..]).expect("an answer");
        self.token = Some(answer.token);
    }

    /// The first message that comes back, whatever kind of call it is.
    fn call(&mut self, path: &str, request: Vec<u8>) -> Result<Vec<u8>, Status> {
        let call = async {
            let mut grpc = tonic::client::Grpc::new(self.channel.clone());
            grpc.ready().await.map_err(|error| Status::unavailable(error.to_string()))?;
            let mut request = Request::new(tokio_stream::iter([request]));
            if let Some(token) = &self.token {
                request.metadata_mut().insert("token", token.parse().expect("ASCII"));
            }
            let path = path.parse().expect("a path");
            let mut answers = grpc.streaming(request, path, Raw).await?.into_inner();
            let first = answers.message().await?;
            first.ok_or_else(|| Status::unknown("the call ended without an answer"))
        };
        let patient = async { tokio::time::timeout(PATIENCE, call).await };
        let answer = self.runtime.block_on(patient).expect("an answer in time")?;
        if path == "/etcdserverpb.Watch/Watch" {
            return refused_watch(&answer).map_or(Ok(answer), Err);
        }
        Ok(answer)
    }

    fn ok(&mut self, path: &str, request: impl Message) -> Vec<u8> {
        self.call(path, request.encode_to_vec()).unwrap_or_else(|status| panic!("{path}: {status}"))
    }

    /// A call that must be refused for want of rights.
    fn denied(&mut self, path: &str, request: impl Message) {
        let answer = self.call(path, request.encode_to_vec());
        let status = answer.expect_err("it is not allowed");
        assert_eq!((status.code(), status.message()), DENIED, "{path}");
    }

    /// Everything that a call could change.
    fn state(&mut self) -> (i64, u64, i64) {
        let answer = self.ok("/etcdserverpb.Auth/AuthStatus", pb::AuthStatusRequest {});
        let status = pb::AuthStatusResponse::decode(&answer[..]).expect("an answer");
        let header = status.header.as_ref().expect("a header");
        (header.revision, status.auth_revision, i64::from(status.enabled))
    }
}

/// A watch that may not be is refused within its stream.
fn refused_watch(answer: &[u8]) -> Option<Status> {
    let answer = pb::WatchResponse::decode(answer).expect("a watch response");
    assert!(answer.created);
    let reason = answer.cancel_reason.strip_prefix("rpc error: code = ")?;
    let (code, text) = reason.split_once(" desc = ").expect("a status as Go writes it");
    assert_eq!((answer.watch_id, answer.canceled), (-1, true));
    let codes = [Code::InvalidArgument, Code::PermissionDenied, Code::Unauthenticated];
    let code = codes.into_iter().find(|known| format!("{known:?}") == code).expect("a known code");
    Some(Status::new(code, text))
}

/// Makes all calls as somebody. Returns what was not as expected.
fn differences(case: &mut Case, who: Who) -> Vec<String> {
    case.become_user(who);
    let mut found = Vec::new();
    let mut rows = rows();
    if who == Who::WhileOff {
        // The last two are off and on: here auth must stay off until the end.
        let last = rows.len() - 1;
        rows.swap(last - 1, last);
    }
    for row in rows {
        let answer = case.call(row.path, row.request.clone());
        let came = answer.as_ref().map_or_else(Status::code, |_| Code::Ok);
        let text =
            answer.as_ref().map_or_else(|status| status.message().to_owned(), |_| String::new());
        let is_login = row.path.ends_with("/Authenticate");
        let fits = match refusal(row.rule, who) {
            Some((code, refusal)) => came == code && text == refusal,
            None if is_login && who == Who::WhileOff => came == Code::FailedPrecondition,
            // Passing must not be mistaken for one of the refusals.
            None => came == row.passed && ![EMPTY.1, WRONG.1, DENIED.1].contains(&text.as_str()),
        };
        if !fits {
            found.push(format!("{who:?} {} {}: {came:?} {text}", row.path, row.what));
        }
    }
    found
}

#[test]
fn every_call_has_a_row() {
    let rows: BTreeSet<String> = rows().iter().map(|row| row.path.to_owned()).collect();
    assert_eq!(rows, calls());
}

#[test]
fn everybody_may_do_everything_while_auth_is_off() {
    let found = differences(&mut Case::new(), Who::WhileOff);
    assert!(found.is_empty(), "{}", found.join("\n"));
}

#[test]
fn without_a_right_token_nothing_is_told_or_changed() {
    let mut case = Case::enabled();
    let before = case.state();
    let mut found = differences(&mut case, Who::NoToken);
    found.extend(differences(&mut case, Who::WrongToken));
    case.become_user(Who::NoToken);
    assert_eq!(case.state(), before, "{}", found.join("\n"));
    assert!(found.is_empty(), "{}", found.join("\n"));
}

#[test]
fn a_plain_user_may_do_what_is_his() {
    let mut case = Case::enabled();
    let before = case.state();
    let found = differences(&mut case, Who::Plain);
    let after = case.state();
    // Two of his own puts: plain, and in a transaction.
    assert_eq!((after.0, after.1, after.2), (before.0 + 2, before.1, before.2));
    assert!(found.is_empty(), "{}", found.join("\n"));
}

#[test]
fn root_may_do_everything() {
    let mut case = Case::enabled();
    let found = differences(&mut case, Who::Root);
    assert!(found.is_empty(), "{}", found.join("\n"));
    case.token = None;
    assert_eq!(case.state().2, 0, "it ended with auth off");
}

/// Keys that a nested transaction touches.
#[test]
fn nesting_hides_no_operation() {
    let mut case = Case::enabled();
    case.become_user(Who::Plain);
    let mut request = then(put("k").into_op());
    for _ in 0..8 {
        case.denied(KV[4], request.clone());
        let read = then(Operation::RequestRange(get("k")));
        let beside = pb::RequestOp { request: Some(Operation::RequestTxn(read)) };
        case.denied(KV[4], pb::TxnRequest { failure: vec![beside], ..Default::default() });
        request = then(Operation::RequestTxn(request));
    }
    let mut own = then(put("w").into_op());
    for _ in 0..8 {
        case.ok(KV[4], own.clone());
        own = then(Operation::RequestTxn(own));
    }
}

/// The old value of a key that may be written but not read.
#[test]
fn prev_kv_is_a_read() {
    let mut case = Case::enabled();
    case.become_user(Who::Plain);
    case.ok(KV[2], put("w"));
    let with_prev = pb::PutRequest { prev_kv: true, ..put("w") };
    case.denied(KV[2], with_prev.clone());
    case.denied(KV[4], then(with_prev.into_op()));
    let deletion = pb::DeleteRangeRequest { prev_kv: true, ..delete("w") };
    case.denied(KV[3], deletion.clone());
    case.denied(KV[4], then(Operation::RequestDeleteRange(deletion)));
    case.ok(KV[2], pb::PutRequest { prev_kv: true, ..put("p") });
    case.ok(KV[3], delete("w"));
}

/// A lease that holds a key of somebody else's.
#[test]
fn no_key_is_attached_to_a_lease_of_others() {
    let mut case = Case::enabled();
    case.become_user(Who::Plain);
    let with = |lease| pb::PutRequest { lease, ..put("w") };
    case.denied(KV[2], with(1));
    case.denied(KV[4], then(with(1).into_op()));
    case.denied(KV[4], then(Operation::RequestTxn(then(with(1).into_op()))));
    case.denied("/etcdserverpb.Lease/LeaseRevoke", pb::LeaseRevokeRequest { id: 1 });
    case.denied("/etcdserverpb.Lease/LeaseKeepAlive", pb::LeaseKeepAliveRequest { id: 1 });
    case.ok(KV[2], with(2));
    case.ok("/etcdserverpb.Lease/LeaseKeepAlive", pb::LeaseKeepAliveRequest { id: 2 });
}

/// A watch of one key must not be one of all keys from there on.
#[test]
fn a_watch_of_one_key_shows_one_key() {
    let mut case = Case::enabled();
    case.become_user(Who::Plain);
    let token = case.token.clone().expect("a token");
    for end in ["\0", "q", "z"] {
        case.denied("/etcdserverpb.Watch/Watch", watch("p", end));
    }
    case.denied("/etcdserverpb.Watch/Watch", watch("", ""));
    let channel = case.channel.clone();
    let mut events = case.runtime.block_on(async {
        let mut client = pb::watch_client::WatchClient::new(channel);
        let requests = futures::StreamExt::chain(
            tokio_stream::iter([watch("p", "")]),
            tokio_stream::pending(),
        );
        let mut request = Request::new(requests);
        request.metadata_mut().insert("token", token.parse().expect("ASCII"));
        let mut events = client.watch(request).await.expect("a stream").into_inner();
        let created = events.message().await.expect("an answer").expect("a message");
        assert!(created.created && !created.canceled);
        events
    });
    case.become_user(Who::Root);
    for key in ["k", "q", "p\0", "z", "p"] {
        case.ok(KV[2], put(key));
    }
    let message = async { tokio::time::timeout(PATIENCE, events.message()).await };
    let message = case.runtime.block_on(message).expect("in time").expect("an answer");
    let keys: Vec<_> =
        message.expect("a message").events.into_iter().flat_map(|it| it.kv).collect();
    assert_eq!(keys.len(), 1);
    assert_eq!(&keys[0].key[..], b"p");
}

/// Who belongs to the cluster, and its alarms, are told to users only.
#[test]
fn members_and_alarms_are_for_users() {
    let mut case = Case::enabled();
    let list = pb::MemberListRequest { linearizable: false };
    for who in [Who::NoToken, Who::WrongToken] {
        case.become_user(who);
        let expected = refusal(Rule::User, who).expect("a refusal");
        for (path, request) in [
            ("/etcdserverpb.Cluster/MemberList", list.encode_to_vec()),
            ("/etcdserverpb.Maintenance/Alarm", pb::AlarmRequest::default().encode_to_vec()),
            ("/etcdserverpb.Maintenance/Status", Vec::new()),
        ] {
            let status = case.call(path, request).expect_err("refused");
            assert_eq!((status.code(), status.message()), expected, "{path}");
        }
    }
    case.become_user(Who::Plain);
    case.ok("/etcdserverpb.Cluster/MemberList", list);
    case.ok("/etcdserverpb.Maintenance/Alarm", pb::AlarmRequest::default());
    let raise = pb::AlarmRequest { action: 1, member_id: 1, alarm: 1 };
    case.denied("/etcdserverpb.Maintenance/Alarm", raise);
}
