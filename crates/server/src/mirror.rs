//! `kelson mirror`: makes one cluster follow another, revision by revision, until clients are moved
//! over. It is a client of both and nothing else: it opens no file, and every change of the source
//! becomes one transaction of the target, so that revisions, versions and leases stay what they were.
//! What cannot be carried over exactly ends it with the reason.

mod args;
mod door;
mod follow;
mod leases;
mod replay;

use std::process::ExitCode;

use args::Asked;

/// Exit code for a command line that cannot be understood, as for the server's own flags.
const USAGE: u8 = 2;

/// Runs `kelson mirror` with what stands behind the word. The exit code is 0 only if both clusters
/// held the same at the end.
pub(crate) fn run(arguments: &[String]) -> ExitCode {
    let settings = match args::parse(arguments) {
        Ok(Asked::Mirror(settings)) => settings,
        Ok(Asked::Help(text)) => {
            print!("{text}");
            return ExitCode::SUCCESS;
        }
        Err(text) => {
            eprintln!("{text}");
            return ExitCode::from(USAGE);
        }
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let ended = match runtime {
        Ok(runtime) => runtime.block_on(follow::run(*settings)),
        Err(error) => Err(format!("cannot start the runtime: {error}")),
    };
    match ended {
        Ok(text) => {
            println!("{text}");
            ExitCode::SUCCESS
        }
        Err(text) => {
            eprintln!("kelson mirror: {text}");
            ExitCode::FAILURE
        }
    }
}
