//! Requests as etcd logs them, and the commands that they are here.

use kelson_api::authpb::UserAddOptions;
use kelson_api::etcdserverpb::CompactionRequest;

use super::*;

fn payload(requests: &mut Requests, index: u64, request: &Request) -> Result<Payload, String> {
    let (kind, data) = (NORMAL, request.encode_to_vec());
    requests.payload(7, RaftEntry { kind, term: 3, index, data })
}

fn read(request: &Request) -> Command {
    let read = payload(&mut Requests::with_cheap_hashes(), 1, request);
    command_in(read)
}

fn command_in(read: Result<Payload, String>) -> Command {
    let Ok(Payload::Commands(batch)) = read else { panic!("no command: {read:?}") };
    let mut commands = Batch::decode(batch).expect("a batch").commands;
    assert_eq!(commands.len(), 1);
    commands.remove(0)
}

fn of(user: &str, auth_revision: u64) -> Option<Header> {
    Some(Header { user: user.to_owned(), auth_revision })
}

fn asker(user: &str, auth_revision: u64) -> Option<Asker> {
    Some(Asker { user: user.to_owned(), auth_revision })
}

#[test]
fn what_etcd_judges_carries_who_asked() {
    let name = || "x".to_owned();
    let requests = [
        Request { put: Some(PutRequest::default()), ..Request::default() },
        Request { delete_range: Some(DeleteRangeRequest::default()), ..Request::default() },
        Request { txn: Some(TxnRequest::default()), ..Request::default() },
        Request { lease_revoke: Some(LeaseRevokeRequest { id: 4 }), ..Request::default() },
        Request { auth_enable: Some(AuthEnableRequest {}), ..Request::default() },
        Request { auth_disable: Some(AuthDisableRequest {}), ..Request::default() },
        Request { user_add: Some(AuthUserAddRequest::default()), ..Request::default() },
        Request { user_delete: Some(AuthUserDeleteRequest { name: name() }), ..Request::default() },
        Request {
            user_change_password: Some(AuthUserChangePasswordRequest::default()),
            ..Request::default()
        },
        Request {
            user_grant_role: Some(AuthUserGrantRoleRequest { user: name(), role: name() }),
            ..Request::default()
        },
        Request {
            user_revoke_role: Some(AuthUserRevokeRoleRequest { name: name(), role: name() }),
            ..Request::default()
        },
        Request { role_add: Some(AuthRoleAddRequest { name: name() }), ..Request::default() },
        Request { role_delete: Some(AuthRoleDeleteRequest { role: name() }), ..Request::default() },
        Request {
            role_grant_permission: Some(AuthRoleGrantPermissionRequest::default()),
            ..Request::default()
        },
        Request {
            role_revoke_permission: Some(AuthRoleRevokePermissionRequest::default()),
            ..Request::default()
        },
    ];
    for mut request in requests {
        request.header = of("ann", 9);
        assert_eq!(read(&request).asker, asker("ann", 9), "{request:?}");
        // Nobody, which is not the same as a member itself: that may do all.
        request.header = None;
        let revision = u64::from(request.lease_revoke.is_some());
        assert_eq!(read(&request).asker, asker("", revision), "{request:?}");
    }
}

#[test]
fn what_etcd_does_not_judge_is_carried_out() {
    for mut request in [
        Request { compaction: Some(CompactionRequest::default()), ..Request::default() },
        Request { lease_grant: Some(LeaseGrantRequest::default()), ..Request::default() },
        Request { lease_checkpoint: Some(LeaseCheckpointRequest::default()), ..Request::default() },
        Request { alarm: Some(AlarmRequest::default()), ..Request::default() },
        Request { version_set: Some(VersionSet { version: "3.7.0".into() }), ..Request::default() },
        Request { attributes_set: Some(AttributesSet::default()), ..Request::default() },
    ] {
        request.header = of("ann", 9);
        assert_eq!(read(&request).asker, None, "{request:?}");
    }
}

#[test]
fn a_login_brings_its_token_unless_that_was_signed() {
    let authenticate = |simple_token: &str| Request {
        authenticate: Some(Authenticate { name: "ann".into(), simple_token: simple_token.into() }),
        ..Request::default()
    };
    let login = Login { user: "ann".into(), token: "prefix".into() };
    assert_eq!(read(&authenticate("prefix")).op, Some(Op::Login(login)));
    let signed = payload(&mut Requests::default(), 1, &authenticate(""));
    assert_eq!(signed, Ok(Payload::Blank));
}

/// The password hash in a command.
fn hash_of(command: &Command) -> Vec<u8> {
    let (password, hashed) = match command.op.as_ref().expect("it has one") {
        Op::UserAdd(add) => (&add.password, &add.hashed_password),
        Op::UserChangePassword(change) => (&change.password, &change.hashed_password),
        other => panic!("no password: {other:?}"),
    };
    assert_eq!(password, "", "no password may get into our log");
    STANDARD.decode(hashed).expect("base64")
}

fn add(name: &str, password: &str, hashed: &str, no_password: bool) -> Request {
    let (name, password, hashed_password) = (name.into(), password.into(), hashed.into());
    let options = Some(UserAddOptions { no_password });
    let add = AuthUserAddRequest { name, password, options, hashed_password };
    Request { user_add: Some(add), ..Request::default() }
}

#[test]
fn passwords_of_etcd_3_4_are_hashed_alike_everywhere() {
    let hash = |index, request: &Request| {
        let read = payload(&mut Requests::with_cheap_hashes(), index, request);
        String::from_utf8(hash_of(&command_in(read))).expect("a hash is text")
    };
    let secret = hash(5, &add("ann", "secret", "", false));
    assert!(bcrypt::verify("secret", &secret).expect("a hash"), "{secret}");
    assert!(!bcrypt::verify("secret ", &secret).expect("a hash"), "{secret}");
    assert!(secret.starts_with("$2a$04$"), "{secret}");
    assert_eq!(hash(5, &add("ann", "secret", "", false)), secret, "as another member does it");
    assert_ne!(hash(6, &add("ann", "secret", "", false)), secret);
    assert_ne!(hash(5, &add("bob", "secret", "", false)), secret);
    let (name, password) = ("ann".to_owned(), "secret".to_owned());
    let change = AuthUserChangePasswordRequest { name, password, ..Default::default() };
    let change = Request { user_change_password: Some(change), ..Request::default() };
    assert_eq!(hash(5, &change), secret);
    // What is hashed already stays as it is, and who has no password gets none.
    assert_eq!(hash(5, &add("ann", "", "aGFzaA==", false)), "hash");
    assert_eq!(hash(5, &add("ann", "secret", "aGFzaA==", false)), "hash");
    assert_eq!(hash(5, &add("ann", "secret", "", true)), "");
    assert_eq!(hash(5, &add("ann", "", "", false)), "");
}

#[test]
fn passwords_to_be_hashed_are_counted() {
    let mut requests = Requests::with_cheap_hashes();
    for index in 1..=PASSWORDS_MAX as u64 {
        payload(&mut requests, index, &add("ann", "secret", "", false)).expect("one more");
    }
    payload(&mut requests, 999, &add("ann", "", "aGFzaA==", false)).expect("it is hashed");
    let error = payload(&mut requests, 1000, &add("ann", "secret", "", false));
    let error = error.expect_err("too many");
    assert!(error.contains("256 passwords") && error.contains("start etcd"), "{error}");
}
