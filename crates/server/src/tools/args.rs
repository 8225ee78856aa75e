//! The command line of the tools: etcdutl's flags, and those of `etcdctl snapshot` before etcd 3.6.
//! Flags stand anywhere, as there. What has no meaning for our files is accepted and said so.

use std::ffi::OsString;
use std::process::ExitCode;

use clap::builder::PossibleValuesParser;
use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Arg, ArgAction, ArgMatches, Command, value_parser};

use super::{BAD_ARGUMENTS, CalledAs, print};

/// Words that make this program a tool.
pub(super) const COMMANDS: [&str; 6] =
    ["snapshot", "check", "hashkv", "defrag", "export", "version"];

/// Flags of etcdctl about servers, which scripts give to `snapshot restore` as well.
const OF_SERVERS: [&str; 11] = [
    "endpoints",
    "cacert",
    "cert",
    "key",
    "user",
    "password",
    "auth-jwt-token",
    "command-timeout",
    "dial-timeout",
    "keepalive-time",
    "keepalive-timeout",
];
const SWITCHES_OF_SERVERS: [&str; 4] =
    ["insecure-transport", "insecure-skip-tls-verify", "insecure-discovery", "debug"];

/// Parses the command line; `Err` = all is said already.
pub(super) fn parse(called_as: CalledAs, arguments: &[String]) -> Result<ArgMatches, ExitCode> {
    let name = match called_as {
        CalledAs::Kelson => "kelson",
        CalledAs::Etcdutl => "etcdutl",
        CalledAs::Etcdctl => "etcdctl",
    };
    // Go takes long flags with one dash only in etcd itself, not in its tools.
    let words = std::iter::once(name).chain(arguments.iter().map(String::as_str));
    let words = words.map(OsString::from);
    command(called_as, name).try_get_matches_from(words).map_err(|error| match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            print::out(&error.to_string());
            ExitCode::SUCCESS
        }
        _ => refuse(called_as, name, &error),
    })
}

/// The words of etcd's tools for the mistakes that scripts look for.
fn refuse(called_as: CalledAs, name: &str, error: &clap::Error) -> ExitCode {
    let context = |kind| match error.get(kind) {
        Some(ContextValue::String(text)) => text.clone(),
        Some(ContextValue::Strings(texts)) => texts.join(", "),
        _ => String::new(),
    };
    let (argument, value) = (context(ContextKind::InvalidArg), context(ContextKind::InvalidValue));
    let (text, code) = match error.kind() {
        ErrorKind::UnknownArgument if argument.starts_with('-') => {
            (format!("unknown flag: {argument}"), 1)
        }
        ErrorKind::UnknownArgument => (format!("too many arguments: {argument:?}"), BAD_ARGUMENTS),
        ErrorKind::InvalidSubcommand => {
            let command = context(ContextKind::InvalidSubcommand);
            let mut text = format!("unknown command {command:?} for {name:?}");
            if called_as == CalledAs::Etcdctl {
                text += ": this program restores snapshots; for requests to a server use etcd's etcdctl";
            }
            (text, 1)
        }
        ErrorKind::InvalidValue if argument.starts_with("--write-out") => {
            ("unsupported output format".to_owned(), super::BAD_FEATURE)
        }
        ErrorKind::InvalidValue | ErrorKind::ValueValidation => {
            let flag = argument.split(' ').next().unwrap_or_default();
            (format!("invalid argument {value:?} for {flag:?} flag"), 1)
        }
        ErrorKind::MissingRequiredArgument => {
            let flag = argument.trim_start_matches('-').split(' ').next().unwrap_or_default();
            (format!("required flag(s) {flag:?} not set"), 1)
        }
        _ => {
            let text = error.to_string();
            let line = text.lines().next().unwrap_or_default();
            (line.trim_start_matches("error: ").to_owned(), 1)
        }
    };
    eprintln!("Error: {text}\nRun '{name} --help' for usage.");
    ExitCode::from(code)
}

fn command(called_as: CalledAs, name: &'static str) -> Command {
    let mut tool = Command::new(name)
        .about("Commands on the files of a member that does not run, and on snapshots.")
        .disable_version_flag(true)
        .args_override_self(true)
        .subcommand_required(true)
        .arg_required_else_help(true)
        .arg(write_out())
        .arg(
            text("timeout", "10s")
                .help("accepted; a lock is waited for one second")
                .global(true)
                .hide(true),
        )
        .subcommand(snapshot())
        .subcommand(hashkv())
        .subcommand(defrag())
        .subcommand(Command::new("version").about("Says what this program is."));
    if called_as == CalledAs::Etcdctl {
        for flag in OF_SERVERS {
            tool = tool.arg(Arg::new(flag).long(flag).global(true).hide(true));
        }
        for flag in SWITCHES_OF_SERVERS {
            tool = tool.arg(switch(flag).global(true).hide(true));
        }
        return tool;
    }
    tool.subcommand(export()).subcommand(
        Command::new("check")
            .about("Verifies every file of a member and says what is wrong where.")
            .arg(text("data-dir", "default.etcd").help("the directory of the member")),
    )
}

fn write_out() -> Arg {
    let formats = ["simple", "table", "json", "fields", "protobuf"];
    Arg::new("write-out")
        .long("write-out")
        .short('w')
        .default_value("simple")
        .value_parser(PossibleValuesParser::new(formats))
        .hide_possible_values(true)
        .help("set the output format (fields, json, simple, table)")
        .global(true)
}

fn text(name: &'static str, default: &'static str) -> Arg {
    Arg::new(name).long(name).default_value(default)
}

/// As Go's: alone, or with `=true` or `=false`.
fn switch(name: &'static str) -> Arg {
    let parse = |text: &str| match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok(false),
        other => Err(format!("{other:?} is neither true nor false")),
    };
    Arg::new(name)
        .long(name)
        .num_args(0..=1)
        .require_equals(true)
        .default_value("false")
        .default_missing_value("true")
        .hide_default_value(true)
        .hide_possible_values(true)
        .action(ArgAction::Set)
        .value_parser(parse)
}

fn file() -> Arg {
    // How many there are is checked with etcd's words.
    Arg::new("filename").num_args(0..).help("the file")
}

fn snapshot() -> Command {
    let restore = Command::new("restore")
        .about("Makes the data directory of a new member from a snapshot, of etcd or of Kelson.")
        .arg(file())
        .arg(Arg::new("data-dir").long("data-dir").help("directory to make; empty: <name>.etcd"))
        .arg(Arg::new("wal-dir").long("wal-dir").help("accepted; the log is in the data directory"))
        .arg(switch("skip-hash-check").help("take a file without a hash, or with another one"))
        .arg(
            Arg::new("bump-revision")
                .long("bump-revision")
                .default_value("0")
                .value_parser(value_parser!(u64))
                .help("raise the revision by this much"),
        )
        .arg(switch("mark-compacted").help("compact at the raised revision"))
        .arg(
            Arg::new("initial-memory-map-size")
                .long("initial-memory-map-size")
                .value_parser(value_parser!(u64))
                .hide(true),
        );
    let status = Command::new("status").about("Sums up a snapshot file.").arg(file());
    Command::new("snapshot")
        .about("Snapshot files: their status, and the way back to a member.")
        .subcommand_required(true)
        .arg_required_else_help(true)
        .subcommand(membership(restore))
        .subcommand(status)
}

/// Who the member is and in which company.
fn membership(command: Command) -> Command {
    command
        .arg(Arg::new("name").long("name").help("name of this member [default: default]"))
        .arg(
            text("initial-cluster", "default=http://localhost:2380")
                .help("all members of the new cluster"),
        )
        .arg(text("initial-cluster-token", "etcd-cluster").help("name of the new cluster"))
        .arg(
            text("initial-advertise-peer-urls", "http://localhost:2380")
                .help("peer URLs of this member"),
        )
}

fn export() -> Command {
    let command = Command::new("export")
        .about("Makes a data directory of etcd from the state of a member that does not run.")
        .long_about(
            "Makes a data directory of etcd from the state of a member that does not run: one member \
             of a new cluster. Without --initial-cluster that member is alone, with the name and the \
             peer URLs that it has now. For several, run it once for each on the same state.",
        )
        .arg(Arg::new("data-dir").long("data-dir").required(true).help("the member's directory"))
        .arg(Arg::new("to").long("to").required(true).help("the directory to make"))
        .arg(
            text("etcd-version", "3.7")
                .value_parser(PossibleValuesParser::new(["3.4", "3.5", "3.6", "3.7"]))
                .help("release that will start on it"),
        );
    membership(command)
}

fn hashkv() -> Command {
    Command::new("hashkv")
        .about("Prints the hash of the key space, of a snapshot file or of a member.")
        .arg(file())
        .arg(Arg::new("data-dir").long("data-dir").help("the directory of the member"))
        .arg(
            Arg::new("rev")
                .long("rev")
                .default_value("0")
                .allow_negative_numbers(true)
                .value_parser(value_parser!(i64))
                .help("revision to hash; 0: the newest"),
        )
}

fn defrag() -> Command {
    Command::new("defrag")
        .about("Rewrites the files of a member without what was deleted.")
        .arg(Arg::new("data-dir").long("data-dir").required(true).help("the member's directory"))
}
