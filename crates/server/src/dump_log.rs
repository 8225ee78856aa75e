//! `kelson log DATA-DIR`: what the Raft log of a member says, entry by entry, for people and tools.
//! It reads files and nothing else; the member may be running.

use std::io::{self, BufWriter, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use kelson_api::Message;
use kelson_api::command::Command;
use kelson_api::command::command::Op;
use kelson_raft::{Shown, show_log};
use kelson_storage::LogId;
use serde_json::{Value, json};

const HELP: &str = "\
kelson log [--json] DATA-DIR

Shows the Raft log of a member, one line a record, in the order in which they were written. The member
may be running. Entries that a snapshot has replaced are shown as long as their file is there.

  --json  one JSON object a line; a request is the base64 of its protobuf message, as in etcd's API
";

/// What stands in the place of a secret.
const HIDDEN: &str = "(hidden)";

/// Exit code for a command line that cannot be understood, as for the server's own flags.
const USAGE: u8 = 2;

/// Runs `kelson log` with what stands behind the word.
pub(crate) fn run(arguments: &[String]) -> ExitCode {
    let (flags, paths): (Vec<&str>, Vec<&str>) =
        arguments.iter().map(String::as_str).partition(|word| word.starts_with('-'));
    let mut json = false;
    for flag in flags {
        match flag {
            "--json" => json = true,
            "--help" | "-h" => {
                print!("{HELP}");
                return ExitCode::SUCCESS;
            }
            _ => return refuse(&format!("unknown flag {flag}")),
        }
    }
    let [path] = paths[..] else { return refuse("one data directory is needed") };
    match show(&PathBuf::from(path), json) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("kelson log: {error}");
            ExitCode::FAILURE
        }
    }
}

fn refuse(reason: &str) -> ExitCode {
    eprint!("kelson log: {reason}\n\n{HELP}");
    ExitCode::from(USAGE)
}

fn show(data_dir: &std::path::Path, json: bool) -> Result<(), String> {
    let mut out = BufWriter::new(io::stdout().lock());
    let mut written = Ok(());
    let shown = show_log(data_dir, &mut |record| {
        if written.is_ok() {
            let line = if json { as_json(&record).to_string() } else { as_text(&record) };
            written = writeln!(out, "{line}");
        }
    });
    // A reader that has gone away is no failure.
    let _reader_is_gone = written.and_then(|()| out.flush());
    shown.map_err(|error| error.to_string())
}

fn as_text(record: &Shown) -> String {
    let at = |id: &LogId, what: &str| format!("{} term {} {what}", id.index, id.term);
    let all = |commands: &[Command]| {
        let ops = commands.iter().filter_map(|command| command.op.as_ref());
        ops.map(|op| format!(" {:?}", without_secrets(op))).collect::<String>()
    };
    match record {
        Shown::Commands(id, commands) => at(id, &format!("commands{}", all(commands))),
        Shown::Blank(id) => at(id, "blank"),
        Shown::Membership(id, commands) => at(id, &format!("membership{}", all(commands))),
        Shown::Vote { term, voted_for, granted } => {
            let outcome = if *granted { "who leads" } else { "asked for" };
            format!("vote term {term} for {voted_for:x}, {outcome}")
        }
        Shown::TruncatedAfter(index) => format!("entries behind {index} are void"),
        Shown::Purged(id) => at(id, "is the last that is no longer needed"),
        Shown::Committed(id) => at(id, "is committed"),
    }
}

fn as_json(record: &Shown) -> Value {
    let entry = |kind: &str, id: &LogId, commands: &[Command]| {
        let ops = commands.iter().filter_map(|command| command.op.as_ref());
        let commands: Vec<Value> = ops.map(op_as_json).collect();
        json!({ "index": id.index, "term": id.term, "kind": kind, "commands": commands })
    };
    match record {
        Shown::Commands(id, commands) => entry("commands", id, commands),
        Shown::Blank(id) => entry("blank", id, &[]),
        Shown::Membership(id, commands) => entry("membership", id, commands),
        Shown::Vote { term, voted_for, granted } => {
            json!({ "kind": "vote", "term": term, "for": format!("{voted_for:x}"), "granted": granted })
        }
        Shown::TruncatedAfter(index) => json!({ "kind": "truncated-after", "index": index }),
        Shown::Purged(id) => json!({ "kind": "purged", "index": id.index, "term": id.term }),
        Shown::Committed(id) => json!({ "kind": "committed", "index": id.index, "term": id.term }),
    }
}

/// What may be shown and passed on: neither hashes of passwords nor tokens.
fn without_secrets(op: &Op) -> Op {
    let mut op = op.clone();
    let secret = match &mut op {
        Op::Login(login) => &mut login.token,
        Op::UserAdd(request) => &mut request.hashed_password,
        Op::UserChangePassword(request) => &mut request.hashed_password,
        _ => return op,
    };
    HIDDEN.clone_into(secret);
    op
}

fn op_as_json(op: &Op) -> Value {
    let op = without_secrets(op);
    let (name, request) = match &op {
        Op::Put(request) => ("put", request.encode_to_vec()),
        Op::DeleteRange(request) => ("delete-range", request.encode_to_vec()),
        Op::Txn(request) => ("txn", request.encode_to_vec()),
        Op::Compaction(request) => ("compaction", request.encode_to_vec()),
        Op::LeaseGrant(request) => ("lease-grant", request.encode_to_vec()),
        Op::LeaseRevoke(request) => ("lease-revoke", request.encode_to_vec()),
        Op::LeaseCheckpoint(request) => ("lease-checkpoint", request.encode_to_vec()),
        Op::Alarm(request) => ("alarm", request.encode_to_vec()),
        Op::MembersChange(request) => ("members-change", request.encode_to_vec()),
        Op::MemberPublish(request) => ("member-publish", request.encode_to_vec()),
        Op::ClusterVersionSet(request) => ("cluster-version-set", request.encode_to_vec()),
        Op::AuthEnable(request) => ("auth-enable", request.encode_to_vec()),
        Op::AuthDisable(request) => ("auth-disable", request.encode_to_vec()),
        Op::Login(request) => ("login", request.encode_to_vec()),
        Op::UserAdd(request) => ("user-add", request.encode_to_vec()),
        Op::UserDelete(request) => ("user-delete", request.encode_to_vec()),
        Op::UserChangePassword(request) => ("user-change-password", request.encode_to_vec()),
        Op::UserGrantRole(request) => ("user-grant-role", request.encode_to_vec()),
        Op::UserRevokeRole(request) => ("user-revoke-role", request.encode_to_vec()),
        Op::RoleAdd(request) => ("role-add", request.encode_to_vec()),
        Op::RoleDelete(request) => ("role-delete", request.encode_to_vec()),
        Op::RoleGrantPermission(request) => ("role-grant-permission", request.encode_to_vec()),
        Op::RoleRevokePermission(request) => ("role-revoke-permission", request.encode_to_vec()),
    };
    json!({ "op": name, "request": STANDARD.encode(request) })
}
