//! `kelson lab`: a whole cluster on this machine in one command, to try, break and watch. The lab is
//! a parent process: it starts members as child processes with etcd's flags, carries their peer
//! traffic so that it can cut it, asks them for their state, and takes commands from the keyboard,
//! from standard input and from other shells. It serves no client itself, and no member knows of it:
//! everything it learns comes from the members' public doors.
//!
//! | file | part |
//! |---|---|
//! | `args` | the command line and its help |
//! | `command` | the commands, as typed anywhere |
//! | `folder` | what a lab remembers on disk, its lock, and `--reset` |
//! | `certs` | the lab's own CA and certificates |
//! | `process` | one member's process, from start to end |
//! | `links`, `sockets` | the carried peer traffic, and who is behind a connection |
//! | `dial`, `probe`, `fsync` | asking members for state and metrics |
//! | `cluster` | adding, promoting and removing members through the cluster's API |
//! | `host`, `actions` | the one loop that owns all of it, and what the commands do |
//! | `control` | the socket for other shells |
//! | `view`, `screen`, `hints` | what is shown, and the lines to copy |

mod actions;
mod args;
mod certs;
mod cluster;
mod command;
mod control;
mod dial;
mod folder;
mod fsync;
mod hints;
mod host;
mod links;
mod probe;
mod process;
mod screen;
mod sockets;
mod view;

use std::io::Write;
use std::process::ExitCode;

use args::Asked;
use folder::Folder;

/// Exit code for a command line that cannot be understood, as for the server's own flags.
const USAGE: u8 = 2;

/// Runs `kelson lab` with what stands behind the word.
pub(crate) fn run(arguments: &[String]) -> ExitCode {
    if let Some((process::MEMBER_WORD, rest)) =
        arguments.split_first().map(|(word, rest)| (word.as_str(), rest))
    {
        return process::become_member(rest);
    }
    match args::parse(arguments) {
        Ok(Asked::Help) => {
            say(args::HELP);
            ExitCode::SUCCESS
        }
        Ok(Asked::Tell { dir, line }) => end(control::tell(&dir, &line)),
        Ok(Asked::Start(start)) => end(begin(start)),
        Err(text) => {
            complain(&format!("{text}\nRun 'kelson lab --help' for flags and commands."));
            ExitCode::from(USAGE)
        }
    }
}

fn end(result: Result<(), String>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(text) => {
            complain(&text);
            ExitCode::FAILURE
        }
    }
}

fn begin(start: args::Start) -> Result<(), String> {
    let folder = Folder::open(&start)?;
    // The members are started by the thread that runs the lab's loop, this one: a member dies with
    // the thread that started it.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|error| format!("cannot start the runtime: {error}"))?;
    let result = runtime.block_on(host::run(folder, start.plain));
    // A read of standard input may still be waiting.
    runtime.shutdown_background();
    result
}

/// Writes one text to standard output; a reader that has gone away is no failure.
fn say(text: &str) {
    let mut out = std::io::stdout().lock();
    let _reader_is_gone = writeln!(out, "{}", text.trim_end_matches('\n'));
}

/// Writes one text to standard error.
fn complain(text: &str) {
    let _reader_is_gone = writeln!(std::io::stderr().lock(), "{text}");
}
