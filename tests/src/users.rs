//! Users and roles of every kind on a member under test, made and looked at through etcdctl: what
//! must be the same wherever their data are served. Passwords are those of `KNOWN`, everywhere.

use std::fmt::Write;

use crate::tools::{etcdctl, peer, run};

/// The flag of a call by root.
pub const ROOT: &str = "--user=root:r00t";

/// Makes hashes cheap: servers and tests share a machine.
pub const CHEAP: &str = "--bcrypt-cost=4";

/// Who may do what: ann changes `ann/`, bob reads everything and writes `shared`, eve has no password.
const KNOWN: [(&str, &str); 3] = [("root", "r00t"), ("ann", "ann's"), ("bob", "bob's")];

/// Makes all of them on a member where nobody must log in yet.
pub fn make(endpoint: &str) {
    for (name, password) in KNOWN {
        etcdctl(endpoint, &["user", "add", &format!("{name}:{password}")]);
    }
    for words in [
        &["user", "add", "eve", "--no-password"][..],
        &["role", "add", "plain"],
        &["role", "add", "reader"],
        &["role", "add", "empty"],
        &["role", "grant-permission", "plain", "readwrite", "ann/", "--prefix"],
        &["role", "grant-permission", "plain", "write", "shared"],
        &["role", "grant-permission", "reader", "read", "", "--from-key"],
        &["role", "grant-permission", "reader", "write", "shared"],
        &["user", "grant-role", "root", "root"],
        &["user", "grant-role", "ann", "plain"],
        &["user", "grant-role", "bob", "reader"],
        &["user", "grant-role", "bob", "empty"],
        &["user", "grant-role", "eve", "plain"],
    ] {
        etcdctl(endpoint, words);
    }
}

/// From now on everybody must log in.
pub fn enable(endpoint: &str) {
    etcdctl(endpoint, &["auth", "enable"]);
}

/// Everything that etcdctl tells of them.
pub fn describe(endpoint: &str) -> String {
    etcdctl(endpoint, &[ROOT, "auth", "status"]) + &rights(endpoint)
}

/// The same without the revision of all users, which an etcd 3.4 does not tell.
pub fn rights(endpoint: &str) -> String {
    let ctl = |words: &[&str]| etcdctl(endpoint, &[&[ROOT], words].concat());
    let mut text = String::new();
    for kind in ["user", "role"] {
        for name in ctl(&[kind, "list"]).lines() {
            let about = ctl(&[kind, "get", name]);
            write!(text, "{kind} {name}\n{about}").expect("a String takes all");
        }
    }
    text
}

/// Sees that passwords and rights are what they were made.
pub fn check(endpoint: &str) {
    for (name, password) in KNOWN {
        log_in(endpoint, name, password);
    }
    let at = format!("--endpoints={endpoint}");
    let refused = |words: &[&str], why: &str| {
        let said = run(&peer("etcdctl"), [&[at.as_str()], words].concat());
        assert!(said.code != Some(0) && said.err.contains(why), "{words:?}: {said:?}");
    };
    let failed = "authentication failed, invalid user ID or password";
    refused(&["--user=ann:r00t", "get", "ann/x"], failed);
    refused(&["--user=eve:any", "get", "ann/x"], "no password user");
    refused(&["get", "ann/x"], "user name is empty");
    refused(&["--user=ann:ann's", "get", "other"], "permission denied");
    refused(&["--user=bob:bob's", "put", "ann/x", "no"], "permission denied");
    refused(&["--user=bob:bob's", "user", "list"], "permission denied");
}

/// Sees that a password is right.
pub fn log_in(endpoint: &str, name: &str, password: &str) {
    etcdctl(endpoint, &["--user", &format!("{name}:{password}"), "get", "ann/x"]);
}
