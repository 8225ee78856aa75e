//! Users and roles in a database file of etcd: read as they stand there, and refused where they
//! cannot be what etcd wrote. A mistake here would lock people out, or let them in.

mod support;

use std::path::Path;

use kelson_api::authpb::{Permission, UserAddOptions};
use kelson_api::command::command::Op;
use kelson_api::etcdserverpb::*;
use kelson_storage::etcd::{Database, Imported, Plan, Target, import};
use support::{Fixture, put_op};

/// A store with users, as bytes of a database.
fn database() -> Vec<u8> {
    let mut state = Fixture::new();
    state.ok(put_op("k", "v"));
    for name in ["root", "ann"] {
        let hashed_password = "aGFzaA==".to_owned();
        let add = AuthUserAddRequest { name: name.into(), hashed_password, ..Default::default() };
        state.ok(Op::UserAdd(add));
    }
    let options = Some(UserAddOptions { no_password: true });
    let add = AuthUserAddRequest { name: "eve".into(), options, ..Default::default() };
    state.ok(Op::UserAdd(add));
    state.ok(Op::RoleAdd(AuthRoleAddRequest { name: "plain".into() }));
    let perm = Some(Permission { perm_type: 2, key: "k".into(), range_end: "l".into() });
    let grant = AuthRoleGrantPermissionRequest { name: "plain".into(), perm };
    state.ok(Op::RoleGrantPermission(grant));
    for (user, role) in [("root", "root"), ("ann", "plain")] {
        let (user, role) = (user.into(), role.into());
        state.ok(Op::UserGrantRole(AuthUserGrantRoleRequest { user, role }));
    }
    state.ok(Op::AuthEnable(AuthEnableRequest {}));
    let file = state.reader.snapshot().expect("a snapshot");
    file.chunks.flat_map(|chunk| chunk.expect("a chunk")).collect()
}

fn open(dir: &Path, bytes: &[u8]) -> Database {
    let path = dir.join("db");
    std::fs::write(&path, bytes).expect("write the database");
    Database::open(&path).expect("its pages are sound")
}

#[test]
fn they_become_ours() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let database = open(dir.path(), &database());
    let target = Target::empty(&dir.path().join("data")).expect("an empty directory");
    let plan = Plan::default();
    let done = import(&database, target.dir().expect("open"), plan, &mut |_: Imported| {});
    assert_eq!(done.expect("an import").users, 3);
    target.finish().expect("it gets its place");
    let ours = Fixture::at(&dir.path().join("data"), 0);
    let reader = &ours.reader;
    assert!(reader.is_auth_enabled());
    assert_eq!(reader.auth_revision(), 8);
    assert_eq!(reader.users(), ["ann", "eve", "root"]);
    let ann = reader.user("ann").expect("ann");
    assert_eq!((&ann.password[..], &ann.roles[..]), (&b"hash"[..], &["plain".to_owned()][..]));
    let eve = reader.user("eve").expect("eve");
    assert!(eve.password.is_empty() && eve.options == Some(UserAddOptions { no_password: true }));
    assert_eq!(reader.roles(), ["plain"]);
    let allowed = reader.role("plain").expect("plain");
    assert_eq!(allowed.len(), 1);
    assert_eq!((&allowed[0].key[..], &allowed[0].range_end[..]), (&b"k"[..], &b"l"[..]));
}

/// Replaces the only place where `from` stands.
fn replaced(bytes: &[u8], from: &[u8], to: &[u8]) -> Vec<u8> {
    assert_eq!(from.len(), to.len());
    let found: Vec<usize> =
        (0..bytes.len() - from.len()).filter(|at| bytes[*at..].starts_with(from)).collect();
    let [place] = found[..] else { panic!("{} places", found.len()) };
    let mut bytes = bytes.to_vec();
    bytes[place..place + to.len()].copy_from_slice(to);
    bytes
}

#[test]
fn what_etcd_never_writes_is_refused() {
    let good = database();
    let dir = tempfile::tempdir().expect("a temporary directory");
    open(dir.path(), &good).imprint().expect("it is sound");
    for (bucket, from, to) in [
        ("auth", &b"authEnabled\x01"[..], &b"authEnabled\x02"[..]),
        (
            "auth",
            b"authRevision\0\0\0\0\0\0\0\x08",
            b"authRevision\xff\xff\xff\xff\xff\xff\xff\xff",
        ),
        // Below another name than its own, with one that is no text, and not a user at all.
        ("authUsers", b"ann\x0a\x03ann", b"ann\x0a\x03amn"),
        ("authUsers", b"ann\x0a\x03ann", b"a\xffn\x0a\x03a\xffn"),
        ("authUsers", b"ann\x0a\x03ann", b"ann\x0a\xf3ann"),
        ("authRoles", b"plain\x0a\x05plain", b"plain\x0a\x05plaim"),
    ] {
        let error = open(dir.path(), &replaced(&good, from, to)).imprint();
        let error = error.expect_err("it must be refused").to_string();
        assert!(error.contains(&format!("bucket {bucket:?}")), "{error}");
        assert!(error.contains("db, bucket"), "it names the file: {error}");
    }
}
