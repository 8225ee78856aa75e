//! Users, roles and rights as commands change them and as they decide about commands; and that all of
//! it is there again after the state was closed, sent to another member, or written as a snapshot.

mod support;

use kelson_api::Error::{self, *};
use kelson_api::authpb::{Permission, UserAddOptions, permission::Type};
use kelson_api::command::command::Op;
use kelson_api::command::{Asker, Login};
use kelson_api::etcdserverpb::compare::TargetUnion;
use kelson_api::etcdserverpb::request_op::Request;
use kelson_api::etcdserverpb::*;
use kelson_storage::Reply;
use support::{Fixture, bytes, put_op};

/// The base64 of a bcrypt hash.
const HASH: &str =
    "JDJhJDA1JENDQ0NDQ0NDQ0NDQ0NDQ0NDQ0NDQy5FNVlQTzlrbXl1Ukd5aDBYb3VRWWI0WU1KS3Z5T2VX";

fn add_user(name: &str) -> Op {
    let hashed_password = HASH.to_owned();
    Op::UserAdd(AuthUserAddRequest { name: name.into(), hashed_password, ..Default::default() })
}

fn grant_role(user: &str, role: &str) -> Op {
    Op::UserGrantRole(AuthUserGrantRoleRequest { user: user.into(), role: role.into() })
}

fn revoke_role(name: &str, role: &str) -> Op {
    Op::UserRevokeRole(AuthUserRevokeRoleRequest { name: name.into(), role: role.into() })
}

fn add_role(name: &str) -> Op {
    Op::RoleAdd(AuthRoleAddRequest { name: name.into() })
}

fn allow(role: &str, kind: Type, key: &str, end: &str) -> Op {
    let perm = Permission { perm_type: kind as i32, key: bytes(key), range_end: bytes(end) };
    let name = role.into();
    Op::RoleGrantPermission(AuthRoleGrantPermissionRequest { name, perm: Some(perm) })
}

fn enable() -> Op {
    Op::AuthEnable(AuthEnableRequest {})
}

/// A store with root, and with `ann` who may write `w..x` and read `r..s`; auth is on.
fn with_users() -> Fixture {
    let mut state = Fixture::new();
    for op in [
        add_user("root"),
        grant_role("root", "root"),
        add_user("ann"),
        add_role("plain"),
        allow("plain", Type::Write, "w", "x"),
        allow("plain", Type::Read, "r", "s"),
        grant_role("ann", "plain"),
        enable(),
    ] {
        state.ok(op);
    }
    state
}

/// A client that was recognized just now.
fn now(state: &Fixture, user: &str) -> Asker {
    Asker { user: user.into(), auth_revision: state.reader.auth_revision() }
}

fn told(state: &mut Fixture, user: &str, op: Op) -> Result<(), Error> {
    let asker = now(state, user);
    state.apply_for(&asker, op).result.map(drop)
}

fn txn(success: Vec<Request>) -> TxnRequest {
    let op = |request| RequestOp { request: Some(request) };
    TxnRequest { success: success.into_iter().map(op).collect(), ..Default::default() }
}

#[test]
fn the_revision_counts_changes_of_users_and_roles() {
    let mut state = Fixture::new();
    assert_eq!(state.reader.auth_revision(), 1);
    assert_eq!(state.refused(enable()), RootUserNotExist);
    state.ok(add_user("root"));
    assert_eq!(state.refused(enable()), RootRoleNotExist);
    state.ok(grant_role("root", "root"));
    state.ok(grant_role("root", "root"));
    assert_eq!(state.reader.auth_revision(), 3, "a role granted twice is granted once");
    state.ok(enable());
    state.ok(enable());
    assert!(state.reader.is_auth_enabled());
    assert_eq!(state.reader.auth_revision(), 3, "enabling changes no rights");
    for _ in 0..2 {
        state.ok(Op::AuthDisable(AuthDisableRequest {}));
    }
    assert_eq!((state.reader.auth_revision(), state.reader.revision()), (4, 1));
}

#[test]
fn users_and_roles_follow_etcds_rules() {
    let mut state = with_users();
    let delete_user = |name: &str| Op::UserDelete(AuthUserDeleteRequest { name: name.into() });
    let delete_role = |role: &str| Op::RoleDelete(AuthRoleDeleteRequest { role: role.into() });
    for (op, error) in [
        (add_user(""), UserEmpty),
        (add_user("ann"), UserExists),
        (delete_user("nobody"), UserNotFound),
        (delete_user("root"), InvalidAuthManagement),
        (grant_role("nobody", "plain"), UserNotFound),
        (grant_role("ann", "none"), RoleNotFound),
        (revoke_role("ann", "none"), RoleNotGranted),
        (revoke_role("nobody", "plain"), UserNotFound),
        (revoke_role("root", "root"), InvalidAuthManagement),
        (add_role(""), RoleEmpty),
        (add_role("plain"), RoleExists),
        (delete_role("none"), RoleNotFound),
        (delete_role("root"), InvalidAuthManagement),
        (allow("none", Type::Read, "a", ""), RoleNotFound),
        (allow("plain", Type::Read, "", ""), InvalidAuthManagement),
        (allow("plain", Type::Read, "b", "a"), InvalidAuthManagement),
        (Op::RoleGrantPermission(AuthRoleGrantPermissionRequest::default()), PermissionNotGiven),
        (
            Op::RoleRevokePermission(AuthRoleRevokePermissionRequest {
                role: "plain".into(),
                key: bytes("w"),
                range_end: bytes("y"),
            }),
            PermissionNotGranted,
        ),
    ] {
        let before = state.reader.auth_revision();
        assert_eq!(state.refused(op.clone()), error, "{op:?}");
        assert_eq!(state.reader.auth_revision(), before, "{op:?}");
    }
    let bad_hash = AuthUserChangePasswordRequest {
        name: "ann".into(),
        hashed_password: "?".into(),
        ..Default::default()
    };
    assert_eq!(state.refused(Op::UserChangePassword(bad_hash)), NoPasswordUser);
    state.ok(delete_role("plain"));
    assert!(state.reader.user("ann").expect("there").roles.is_empty());
    assert_eq!(told(&mut state, "ann", put_op("w", "1")), Err(PermissionDenied));
}

#[test]
fn a_permission_granted_anew_replaces_the_one_of_the_same_range() {
    let mut state = with_users();
    for end in ["x", "y", "x", "y"] {
        state.ok(allow("plain", Type::Readwrite, "w", end));
    }
    let permissions = state.reader.role("plain").expect("there");
    assert_eq!(permissions.len(), 3);
    state.ok(allow("plain", Type::Read, "w", "y"));
    state.ok(allow("plain", Type::Read, "w", "x"));
    assert_eq!(told(&mut state, "ann", put_op("w", "1")), Err(PermissionDenied));
    state.ok(add_role("root"));
    let root = state.reader.role("root").expect("there");
    assert_eq!((&root[0].key[..], &root[0].range_end[..]), (&b""[..], &b"\0"[..]));
    assert_eq!(state.reader.roles(), ["plain", "root"]);
}

#[test]
fn a_command_is_judged_by_the_rights_of_its_place_in_the_log() {
    let mut state = with_users();
    let nobody = Asker::default();
    let refused = |state: &mut Fixture, asker: &Asker| {
        state.apply_for(asker, put_op("w", "1")).result.expect_err("refused")
    };
    assert_eq!(refused(&mut state, &nobody), UserEmpty);
    let ann = now(&state, "ann");
    assert!(state.apply_for(&ann, put_op("w", "1")).result.is_ok());
    state.ok(add_role("other"));
    assert_eq!(refused(&mut state, &ann), AuthOldRevision);
    assert_eq!(told(&mut state, "ann", put_op("w", "2")), Ok(()));
    assert_eq!(told(&mut state, "ann", put_op("v", "2")), Err(PermissionDenied));
    assert_eq!(told(&mut state, "gone", put_op("w", "2")), Err(PermissionDenied));
    assert_eq!(told(&mut state, "root", put_op("v", "2")), Ok(()));
    state.ok(put_op("v", "the member's own commands may do all"));
    state.ok(Op::AuthDisable(AuthDisableRequest {}));
    assert!(state.apply_for(&nobody, put_op("v", "3")).result.is_ok());
}

#[test]
fn what_hides_in_a_request_is_judged_too() {
    let mut state = with_users();
    state.ok(put_op("w1", "secret"));
    let put = |key: &str| PutRequest { key: bytes(key), ..Default::default() };
    let with_prev = |key: &str| PutRequest { prev_kv: true, ..put(key) };
    assert_eq!(told(&mut state, "ann", Op::Put(with_prev("w1"))), Err(PermissionDenied));
    let delete = DeleteRangeRequest { key: bytes("w1"), prev_kv: true, ..Default::default() };
    let plain = |end: &str| DeleteRangeRequest {
        key: bytes("w"),
        range_end: bytes(end),
        ..Default::default()
    };
    for hidden in [
        Request::RequestPut(put("a")),
        Request::RequestPut(with_prev("w1")),
        Request::RequestDeleteRange(delete.clone()),
        Request::RequestDeleteRange(plain("x\0")),
        Request::RequestRange(RangeRequest { key: bytes("w1"), ..Default::default() }),
    ] {
        let inner = txn(vec![hidden.clone()]);
        let nested = txn(vec![Request::RequestTxn(txn(vec![Request::RequestTxn(inner.clone())]))]);
        let otherwise = TxnRequest { failure: nested.success.clone(), ..Default::default() };
        for request in [inner, nested, otherwise] {
            let result = told(&mut state, "ann", Op::Txn(request));
            assert_eq!(result, Err(PermissionDenied), "{hidden:?}");
        }
    }
    let compare = Compare {
        key: bytes("w1"),
        target_union: Some(TargetUnion::Value(bytes("secret"))),
        target: compare::CompareTarget::Value as i32,
        ..Default::default()
    };
    let guess = TxnRequest { compare: vec![compare], ..Default::default() };
    assert_eq!(told(&mut state, "ann", Op::Txn(guess)), Err(PermissionDenied));
    assert_eq!(told(&mut state, "ann", Op::DeleteRange(delete)), Err(PermissionDenied));
    assert_eq!(told(&mut state, "ann", Op::DeleteRange(plain("x"))), Ok(()));
    // Nothing is touched, so nobody need be known. Source: etcd.
    let nobody = Asker::default();
    assert!(state.apply_for(&nobody, Op::Txn(TxnRequest::default())).result.is_ok());
}

#[test]
fn a_lease_belongs_to_those_who_may_write_all_its_keys() {
    let mut state = with_users();
    let grant = |id| Op::LeaseGrant(LeaseGrantRequest { ttl: 100, id });
    let revoke = |id| Op::LeaseRevoke(LeaseRevokeRequest { id });
    assert_eq!(state.apply_for(&Asker::default(), grant(1)).result.err(), Some(UserEmpty));
    for id in 1..4 {
        assert_eq!(told(&mut state, "ann", grant(id)), Ok(()));
    }
    let with_lease =
        |key: &str, lease| Op::Put(PutRequest { key: bytes(key), lease, ..Default::default() });
    state.ok(with_lease("other", 1));
    assert_eq!(told(&mut state, "ann", with_lease("w", 1)), Err(PermissionDenied));
    let hidden = PutRequest { key: bytes("w"), lease: 1, ..Default::default() };
    let hidden = txn(vec![Request::RequestTxn(txn(vec![Request::RequestPut(hidden)]))]);
    assert_eq!(told(&mut state, "ann", Op::Txn(hidden)), Err(PermissionDenied));
    assert_eq!(told(&mut state, "ann", revoke(1)), Err(PermissionDenied));
    assert_eq!(told(&mut state, "ann", with_lease("w", 2)), Ok(()));
    let ann = now(&state, "ann");
    assert_eq!(state.reader.check_renewal(&ann, 1), Err(PermissionDenied));
    assert_eq!(state.reader.check_renewal(&ann, 2), Ok(()));
    assert_eq!(
        state.reader.check_lease_keys(&ann, &[2]),
        Err(PermissionDenied),
        "she may not read"
    );
    assert_eq!(state.reader.check_lease_keys(&ann, &[3, 9]), Ok(()));
    assert_eq!(told(&mut state, "ann", revoke(2)), Ok(()));
    assert_eq!(state.apply_for(&Asker::default(), revoke(3)).result.err(), Some(UserEmpty));
    assert_eq!(told(&mut state, "ann", revoke(9)), Err(LeaseNotFound));
    assert_eq!(told(&mut state, "root", revoke(1)), Ok(()));
}

#[test]
fn many_puts_may_name_a_lease_of_many_keys() {
    let mut state = with_users();
    state.ok(Op::LeaseGrant(LeaseGrantRequest { ttl: 100, id: 1 }));
    let put = |key: String| PutRequest { key: key.into(), lease: 1, ..Default::default() };
    for number in 0..5000 {
        state.ok(Op::Put(put(format!("w{number}"))));
    }
    let level = |level: usize| {
        let puts = (0..100).map(|number| Request::RequestPut(put(format!("w/{level}/{number}"))));
        Request::RequestTxn(txn(puts.collect()))
    };
    let request = txn((0..100).map(level).collect());
    assert_eq!(told(&mut state, "ann", Op::Txn(request)), Ok(()));
}

#[test]
fn only_root_administers() {
    let mut state = with_users();
    state.ok(put_op("a", "1"));
    let alarm = |action| Op::Alarm(AlarmRequest { action, member_id: 1, alarm: 0 });
    for op in [
        add_user("bob"),
        add_role("mine"),
        grant_role("ann", "root"),
        allow("plain", Type::Readwrite, "a", "\0"),
        Op::AuthDisable(AuthDisableRequest {}),
        Op::Compaction(CompactionRequest { revision: 2, physical: false }),
        alarm(1),
        alarm(2),
    ] {
        assert_eq!(told(&mut state, "ann", op.clone()), Err(PermissionDenied), "{op:?}");
        assert_eq!(told(&mut state, "gone", op.clone()), Err(UserNotFound), "{op:?}");
        let nobody = state.apply_for(&Asker::default(), op.clone()).result;
        assert_eq!(nobody.err(), Some(UserEmpty), "{op:?}");
    }
    assert_eq!(told(&mut state, "ann", alarm(0)), Ok(()));
    assert_eq!(state.apply_for(&Asker::default(), alarm(0)).result.err(), Some(UserEmpty));
    let compact = Op::Compaction(CompactionRequest { revision: 2, physical: false });
    assert_eq!(told(&mut state, "root", compact), Ok(()));
}

#[test]
fn tokens_end_with_what_they_were_given_for() {
    let mut state = with_users();
    let login = |state: &mut Fixture, user: &str| {
        let login = Login { user: user.into(), token: "abc".into() };
        match state.reply(Op::Login(login)) {
            Reply::Login(token) => token,
            other => panic!("no token: {other:?}"),
        }
    };
    let token = login(&mut state, "ann");
    assert_eq!(token, format!("abc.{}", state.reader.applied().index));
    let root = login(&mut state, "root");
    assert_eq!(state.reader.use_token(&token, 1).as_deref(), Some("ann"));
    let password = AuthUserChangePasswordRequest {
        name: "ann".into(),
        hashed_password: HASH.into(),
        ..Default::default()
    };
    state.ok(Op::UserChangePassword(password));
    assert_eq!(state.reader.use_token(&token, 1), None);
    let token = login(&mut state, "ann");
    state.ok(Op::UserDelete(AuthUserDeleteRequest { name: "ann".into() }));
    assert_eq!(state.reader.use_token(&token, 1), None);
    assert_eq!(state.reader.use_token(&root, 1).as_deref(), Some("root"));
    let gone = Op::Login(Login { user: "ann".into(), token: "abc".into() });
    assert_eq!(state.refused(gone), AuthFailed);
    let options = Some(UserAddOptions { no_password: true });
    let by_certificate = AuthUserAddRequest { name: "cn".into(), options, ..Default::default() };
    state.ok(Op::UserAdd(by_certificate));
    let without = Op::Login(Login { user: "cn".into(), token: "abc".into() });
    assert_eq!(state.refused(without), AuthFailed);
    state.ok(Op::AuthDisable(AuthDisableRequest {}));
    assert_eq!(state.reader.use_token(&root, 1), None);
    let off = Op::Login(Login { user: "root".into(), token: "abc".into() });
    assert_eq!(state.refused(off), AuthNotEnabled);
}

#[test]
fn users_are_there_again_after_a_restart() {
    let mut state = with_users();
    state.ok(add_user("bob"));
    state.ok(Op::UserDelete(AuthUserDeleteRequest { name: "bob".into() }));
    let before = (state.reader.auth_revision(), state.reader.user("ann"), state.reader.users());
    let role = state.reader.role("plain");
    state.reopen();
    assert!(state.reader.is_auth_enabled());
    let after = (state.reader.auth_revision(), state.reader.user("ann"), state.reader.users());
    assert_eq!(after, before);
    assert_eq!(state.reader.users(), ["ann", "root"]);
    assert_eq!(state.reader.role("plain"), role);
    assert_eq!(told(&mut state, "ann", put_op("w", "1")), Ok(()));
    assert_eq!(told(&mut state, "ann", put_op("a", "1")), Err(PermissionDenied));
}
