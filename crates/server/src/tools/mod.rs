//! Commands on files, while no member runs: `kelson snapshot`, `check`, `hashkv`, `defrag`, `export`,
//! `version`.
//! The program does the same under the names `etcdutl` and `etcdctl`, whose flags, output and exit codes
//! these are. Nothing here opens a socket; what is done to files is done by the crates below.
//!
//! `args` knows the flags, `snapshot` and `offline` the commands, `print` the output.

mod args;
mod offline;
mod print;
mod snapshot;

use std::path::Path;
use std::process::ExitCode;

use clap::ArgMatches;
use kelson_server::version;

/// Exit code for an argument that is missing or contradicts another; source: etcd's tools.
const BAD_ARGUMENTS: u8 = 128;
/// Exit code for a flag with a value that is not offered; source: etcd's tools.
const BAD_FEATURE: u8 = 4;

/// Why a command failed.
#[derive(Debug)]
struct Failure {
    code: u8,
    text: String,
}

impl Failure {
    fn new(text: impl ToString) -> Self {
        Self { code: 1, text: text.to_string() }
    }

    fn arguments(text: impl ToString) -> Self {
        Self { code: BAD_ARGUMENTS, text: text.to_string() }
    }

    fn feature(text: impl ToString) -> Self {
        Self { code: BAD_FEATURE, text: text.to_string() }
    }
}

/// The name by which this program was called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum CalledAs {
    Kelson,
    Etcdutl,
    Etcdctl,
}

/// Runs a tool, if this is what the command line asks for: by its first word, or by the name of the
/// program.
pub(crate) fn run(program: &str, arguments: &[String]) -> Option<ExitCode> {
    let name = Path::new(program).file_name().map(|name| name.to_string_lossy().into_owned());
    let called_as = match name.as_deref() {
        Some("etcdutl") => CalledAs::Etcdutl,
        Some("etcdctl") => CalledAs::Etcdctl,
        // The server's own flags come first in that case; its command line has no other words.
        _ if is_tool(arguments) => CalledAs::Kelson,
        _ => return None,
    };
    let matches = match args::parse(called_as, arguments) {
        Ok(matches) => matches,
        Err(code) => return Some(code),
    };
    Some(match carry_out(called_as, &matches) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("Error: {}", failure.text);
            ExitCode::from(failure.code)
        }
    })
}

/// Whether the first word that is no flag is one of our commands; `-w json snapshot status` is one, too.
fn is_tool(arguments: &[String]) -> bool {
    let is_command = |word: &str| args::COMMANDS.contains(&word);
    match arguments {
        [first, ..] if is_command(first) => true,
        [flag, value, rest @ ..] if matches!(flag.as_str(), "-w" | "--write-out") => {
            !value.is_empty() && is_tool(rest)
        }
        [flag, rest @ ..] if flag.starts_with("-w") || flag.starts_with("--write-out=") => {
            is_tool(rest)
        }
        _ => false,
    }
}

fn carry_out(called_as: CalledAs, matches: &ArgMatches) -> Result<(), Failure> {
    // A command that the parser let through is one of these.
    let (name, matches) = matches.subcommand().unwrap_or(("version", matches));
    match name {
        "snapshot" => match matches.subcommand() {
            Some(("status", matches)) => snapshot::status(matches),
            Some(("restore", matches)) => snapshot::restore(matches),
            _ => Err(Failure::new("snapshot needs a command: status or restore")),
        },
        "check" => offline::check(matches),
        "hashkv" => offline::hashkv(matches),
        "defrag" => offline::defrag(matches),
        "export" => snapshot::export(matches),
        _ => {
            print::out(&match called_as {
                CalledAs::Kelson => version::version_text(),
                CalledAs::Etcdutl => tool_version("etcdutl"),
                CalledAs::Etcdctl => tool_version("etcdctl"),
            });
            Ok(())
        }
    }
}

/// What etcd's tools print.
fn tool_version(tool: &str) -> String {
    let api = version::ETCD_CLUSTER_VERSION.trim_end_matches(".0");
    format!("{tool} version: {}\nAPI version: {api}\n", version::ETCD_VERSION)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<String> {
        text.split_whitespace().map(str::to_owned).collect()
    }

    #[test]
    fn the_servers_flags_are_never_taken_for_a_tool() {
        for line in ["--name snapshot", "--data-dir=check", "--version", "", "lab", "-w json"] {
            assert!(!is_tool(&words(line)), "{line}");
        }
        for line in ["snapshot status f", "-w json snapshot status f", "-wjson check", "hashkv f"] {
            assert!(is_tool(&words(line)), "{line}");
        }
    }
}
