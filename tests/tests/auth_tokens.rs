//! Tokens from outside: known to every member of a cluster, lasting as long as they are used, and
//! signed ones that a member can check without having made them.

use std::path::Path;
use std::time::{Duration, Instant};

use kelson_api::authpb::{Permission, permission::Type};
use kelson_api::etcdserverpb as pb;
use kelson_tests::cluster::Cluster;
use kelson_tests::runtime;
use kelson_tests::server::{Server, kelson_binary};
use pb::auth_client::AuthClient;
use pb::kv_client::KvClient;
use tonic::transport::Channel;
use tonic::{Code, Request, Status};

const COST: &str = "--bcrypt-cost=4";

async fn connect(endpoint: &str) -> Channel {
    let endpoint = Channel::from_shared(endpoint.to_owned()).expect("a URL");
    endpoint.connect().await.expect("the member listens")
}

/// Root and ann, who may do everything with keys that begin with `a`; auth is on.
async fn make_users(channel: &Channel) {
    let mut auth = AuthClient::new(channel.clone());
    for name in ["root", "ann"] {
        let (name, password) = (name.to_owned(), "secret".to_owned());
        let request = pb::AuthUserAddRequest { name, password, ..Default::default() };
        auth.user_add(request).await.expect("a new user");
    }
    auth.role_add(pb::AuthRoleAddRequest { name: "a".into() }).await.expect("a new role");
    let perm_type = Type::Readwrite as i32;
    let perm = Some(Permission { perm_type, key: "a".into(), range_end: "b".into() });
    let allow = pb::AuthRoleGrantPermissionRequest { name: "a".into(), perm };
    auth.role_grant_permission(allow).await.expect("a new permission");
    for (user, role) in [("root", "root"), ("ann", "a")] {
        let grant = pb::AuthUserGrantRoleRequest { user: user.into(), role: role.into() };
        auth.user_grant_role(grant).await.expect("a role granted");
    }
    auth.auth_enable(pb::AuthEnableRequest {}).await.expect("auth on");
}

async fn log_in(channel: &Channel, name: &str, password: &str) -> Result<String, Status> {
    let request = pb::AuthenticateRequest { name: name.into(), password: password.into() };
    let answer = AuthClient::new(channel.clone()).authenticate(request).await?;
    Ok(answer.into_inner().token)
}

fn with<T>(token: &str, message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("token", token.parse().expect("ASCII"));
    request
}

async fn put(channel: &Channel, token: &str, key: &str) -> Result<(), Status> {
    let request = pb::PutRequest { key: key.to_owned().into(), ..Default::default() };
    KvClient::new(channel.clone()).put(with(token, request)).await.map(drop)
}

async fn read_here(channel: &Channel, token: &str, key: &str) -> Result<(), Status> {
    let (key, serializable) = (key.to_owned().into(), true);
    let request = pb::RangeRequest { key, serializable, ..Default::default() };
    KvClient::new(channel.clone()).range(with(token, request)).await.map(drop)
}

#[test]
fn a_token_is_good_at_every_member_at_once() {
    let cluster = Cluster::start(&kelson_binary(), 3, "http", &[COST.to_owned()]);
    runtime().block_on(async {
        let mut members = Vec::new();
        for index in 0..3 {
            members.push(connect(&cluster.endpoint(index)).await);
        }
        make_users(&members[0]).await;
        for round in 0..20 {
            let token = log_in(&members[round % 3], "ann", "secret").await.expect("a token");
            // At once, and by a read that waits for nobody: the token itself says what to wait for.
            for other in [1, 2, 0] {
                let member = &members[(round + other) % 3];
                read_here(member, &token, "a").await.expect("a token that was just given");
                put(member, &token, "a").await.expect("her key");
                let denied = put(member, &token, "b").await.expect_err("not her key");
                assert_eq!(denied.code(), Code::PermissionDenied);
            }
        }
        let token = log_in(&members[0], "ann", "secret").await.expect("a token");
        let root = log_in(&members[1], "root", "secret").await.expect("a token");
        let gone = pb::AuthUserDeleteRequest { name: "ann".into() };
        AuthClient::new(members[2].clone()).user_delete(with(&root, gone)).await.expect("deleted");
        for member in &members {
            // A write is decided where it is applied, behind the deletion.
            let refused = put(member, &token, "a").await.expect_err("she is gone");
            let codes = [Code::Unauthenticated, Code::PermissionDenied, Code::InvalidArgument];
            assert!(codes.contains(&refused.code()), "{refused}");
        }
    });
}

#[test]
fn rights_that_change_count_at_every_member() {
    let cluster = Cluster::start(&kelson_binary(), 3, "http", &[COST.to_owned()]);
    runtime().block_on(async {
        let first = connect(&cluster.endpoint(0)).await;
        let last = connect(&cluster.endpoint(2)).await;
        make_users(&first).await;
        let root = log_in(&first, "root", "secret").await.expect("a token");
        let token = log_in(&last, "ann", "secret").await.expect("a token");
        let mut auth = AuthClient::new(first.clone());
        for _ in 0..20 {
            let grant = pb::AuthUserGrantRoleRequest { user: "ann".into(), role: "a".into() };
            auth.user_grant_role(with(&root, grant)).await.expect("granted");
            // The member may not have heard of it yet: then it says so, and the client asks again.
            while let Err(status) = put(&last, &token, "a").await {
                assert_eq!(status.message(), "etcdserver: revision of auth store is old");
            }
            let revoke = pb::AuthUserRevokeRoleRequest { name: "ann".into(), role: "a".into() };
            auth.user_revoke_role(with(&root, revoke)).await.expect("revoked");
            put(&last, &token, "a").await.expect_err("what was revoked is never carried out");
        }
    });
}

#[test]
fn a_token_lasts_as_long_as_it_is_used() {
    let flags = [COST.to_owned(), "--auth-token-ttl=2".to_owned()];
    let server = Server::start(&kelson_binary(), &flags);
    runtime().block_on(async {
        let channel = connect(&server.endpoint()).await;
        make_users(&channel).await;
        let (used, unused) = (
            log_in(&channel, "ann", "secret").await.expect("a token"),
            log_in(&channel, "ann", "secret").await.expect("a token"),
        );
        let until = Instant::now() + Duration::from_secs(6);
        while Instant::now() < until {
            put(&channel, &used, "a").await.expect("it is in use");
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        let refused = put(&channel, &unused, "a").await.expect_err("nobody used it");
        assert_eq!(refused.code(), Code::Unauthenticated);
        tokio::time::sleep(Duration::from_secs(5)).await;
        put(&channel, &used, "a").await.expect_err("its time is over");
    });
}

fn write(dir: &Path, name: &str, text: &str) -> String {
    let path = dir.join(name);
    std::fs::write(&path, text).expect("written");
    path.display().to_string()
}

#[test]
fn signed_tokens_are_checked_by_whoever_has_the_key() {
    let dir = tempfile::tempdir().expect("a directory");
    let pair = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).expect("a key");
    let private = write(dir.path(), "private.pem", &pair.serialize_pem());
    let public = write(dir.path(), "public.pem", &pair.public_key_pem());
    let signing =
        format!("--auth-token=jwt,sign-method=ES256,priv-key={private},pub-key={public},ttl=3s");
    let checking = format!("--auth-token=jwt,sign-method=ES256,pub-key={public}");
    let signer = Server::start(&kelson_binary(), &[COST.to_owned(), signing]);
    // Another cluster with the same users: what counts is the key.
    let checker = Server::start(&kelson_binary(), &[COST.to_owned(), checking]);
    runtime().block_on(async {
        let (signer, checker) =
            (connect(&signer.endpoint()).await, connect(&checker.endpoint()).await);
        make_users(&signer).await;
        make_users(&checker).await;
        let token = log_in(&signer, "ann", "secret").await.expect("a token");
        assert_eq!(token.split('.').count(), 3);
        for member in [&signer, &checker] {
            put(member, &token, "a").await.expect("a right token");
            put(member, &token, "b").await.expect_err("not her key");
            put(member, &format!("{token}x"), "a").await.expect_err("a changed token");
        }
        log_in(&signer, "ann", "wrong").await.expect_err("a wrong password");
        let unable = log_in(&checker, "ann", "secret").await.expect_err("it has no private key");
        assert_eq!(unable.code(), Code::Unknown);
        assert_eq!(unable.message(), "auth: token signing attempted with verify-only key");
        // A change of users makes it old: it says at which revision it was given.
        let root = log_in(&signer, "root", "secret").await.expect("a token");
        let role = pb::AuthRoleAddRequest { name: "other".into() };
        AuthClient::new(signer.clone()).role_add(with(&root, role)).await.expect("a new role");
        let old = put(&signer, &token, "a").await.expect_err("an old token");
        assert_eq!(old.message(), "etcdserver: revision of auth store is old");
        let token = log_in(&signer, "ann", "secret").await.expect("a token");
        put(&signer, &token, "a").await.expect("a fresh token");
        tokio::time::sleep(Duration::from_secs(4)).await;
        let expired = put(&signer, &token, "a").await.expect_err("its time is over");
        assert_eq!(expired.code(), Code::Unauthenticated);
    });
}

/// Once from the log alone, as a member that is killed a moment later has no checkpoint of it yet, and
/// once from the state alone, as an orderly end leaves nothing to do in the log.
#[test]
fn users_survive_a_crash_and_an_orderly_end() {
    let mut server = Server::start(&kelson_binary(), &[COST.to_owned()]);
    let runtime = runtime();
    runtime.block_on(async {
        make_users(&connect(&server.endpoint()).await).await;
    });
    let ends: [fn(&mut Server); 2] = [Server::kill, |server| drop(server.stop())];
    for end in ends {
        end(&mut server);
        server.spawn();
        runtime.block_on(async {
            let channel = connect(&server.endpoint()).await;
            let unsaid = pb::PutRequest { key: "a".into(), ..Default::default() };
            let nobody = KvClient::new(channel.clone()).put(unsaid).await;
            assert_eq!(nobody.expect_err("auth is on").code(), Code::InvalidArgument);
            let token = log_in(&channel, "ann", "secret").await.expect("a token");
            put(&channel, &token, "a").await.expect("her key");
            put(&channel, &token, "b").await.expect_err("not her key");
        });
    }
}
