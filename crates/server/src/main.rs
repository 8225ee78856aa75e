//! The binary: reads the settings, starts log and runtime, and turns the end into an exit code.
//! It may be called `etcd`; called `etcdutl` or `etcdctl` it does what these do to files.

mod dump_log;
mod lab;
mod mirror;
mod tools;

use std::process::ExitCode;

use kelson_server::config::{self, Command, Failure, Loaded, Notice};
use kelson_server::{logging, serve, version};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    find_no_programs();
    let text = |text: std::ffi::OsString| text.to_string_lossy().into_owned();
    let mut words = std::env::args_os().map(text);
    let program = words.next().unwrap_or_default();
    let arguments: Vec<String> = words.collect();
    // etcd's command line has no words without dashes, so these cannot hide any of its own.
    match arguments.first().map(String::as_str) {
        Some("lab") => return lab::run(&arguments[1..]),
        Some("log") => return dump_log::run(&arguments[1..]),
        Some("mirror") => return mirror::run(&arguments[1..]),
        _ => {}
    }
    if let Some(code) = tools::run(&program, &arguments) {
        return code;
    }
    match kelson_storage::sabotage::check() {
        Ok(None) => {}
        Ok(Some(name)) => eprintln!("THIS MEMBER IS BROKEN ON PURPOSE: {name}"),
        Err(list) => {
            eprintln!("{list}");
            return ExitCode::FAILURE;
        }
    }
    keep_small_pages();
    let environment = std::env::vars_os().map(|(name, value)| (text(name), text(value)));
    match config::load(&arguments, environment) {
        Ok(Command::Help) => {
            let more = "A cluster on this machine to try out:\n\n  kelson lab --help\n\n\
                        The Raft log of a member, entry by entry:\n\n  kelson log --help\n\n\
                        Snapshots, and the files of a member that does not run:\n\n  \
                        kelson snapshot --help\n  kelson check --help\n  \
                        kelson hashkv --help\n  kelson defrag --help\n  kelson export --help\n\n\
                        Follow another cluster until clients are moved over:\n\n  kelson mirror --help\n";
            print(&format!("{}\n{more}", config::help_text()))
        }
        Ok(Command::Version) => print(&version::version_text()),
        Ok(Command::Run(loaded)) => run(*loaded),
        Err(failure) => refuse(&failure),
    }
}

/// Keeps the storage engine from running the program `sync`, as it does before it opens a database. That
/// waits for every disk of the machine, so a mount that hangs would keep a member from starting; it
/// would run whatever `PATH` calls by that name; and nothing here depends on it, since what is read back
/// is judged as it is. Programs that this one does run are named by their paths.
#[allow(unsafe_code, reason = "the variable of this process has no safe form")]
fn find_no_programs() {
    // SAFETY: called first in `main`; no other thread could read the environment.
    unsafe { std::env::set_var("PATH", "/dev/null") };
}

/// Keeps the kernel from backing the heap with huge pages, which the allocator asks for: a page that
/// is mostly given back would stay whole, about a sixth more memory under a million small values.
fn keep_small_pages() {
    // A kernel that refuses costs memory and nothing else.
    #[cfg(target_os = "linux")]
    let _refused = rustix::thread::disable_transparent_huge_pages(true);
}

/// Writes to standard output; a reader that has gone away is no failure.
fn print(text: &str) -> ExitCode {
    use std::io::Write;
    let _reader_is_gone = std::io::stdout().write_all(text.as_bytes());
    ExitCode::SUCCESS
}

fn refuse(failure: &Failure) -> ExitCode {
    match failure {
        Failure::Usage(text) => eprintln!("{text}\nRun 'etcd --help' for the list of flags."),
        Failure::Invalid(notice) => {
            logging::start_default();
            tell(notice);
        }
    }
    ExitCode::from(failure.exit_code())
}

/// Logs a notice; field names of log lines must be known when this is compiled.
fn tell(notice: &Notice) {
    macro_rules! tell {
        ($($name:literal)|*) => {
            match (notice.is_warning, notice.field) {
                $(
                    (true, $name) => tracing::warn!($name = notice.value, "{}", notice.message),
                    (false, $name) => tracing::info!($name = notice.value, "{}", notice.message),
                )*
                (true, _) => tracing::warn!("{}", notice.message),
                (false, _) => tracing::info!("{}", notice.message),
            }
        };
    }
    tell!("flag" | "environment-variable" | "feature-gate" | "key" | "path");
}

fn run(Loaded { config, notices }: Loaded) -> ExitCode {
    if let Err(error) = logging::start(&config) {
        eprintln!("cannot open the log: {error}");
        return ExitCode::FAILURE;
    }
    notices.iter().for_each(tell);
    #[cfg(feature = "failpoints")]
    if let Err(reason) = kelson_server::failpoints::start() {
        eprintln!("{reason}");
        return ExitCode::FAILURE;
    }
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            tracing::error!(%error, "cannot start the runtime");
            return ExitCode::FAILURE;
        }
    };
    let ended = runtime.block_on(async { tokio::spawn(serve::run(config)).await });
    match ended {
        Ok(Ok(end)) => {
            runtime.shutdown_background();
            match end {
                serve::End::Asked(asked) => asked.die(),
                serve::End::Removed => ExitCode::SUCCESS,
            }
        }
        Ok(Err(error)) => {
            tracing::error!(%error, "cannot start the member");
            ExitCode::FAILURE
        }
        Err(error) => {
            tracing::error!(%error, "the server failed");
            ExitCode::FAILURE
        }
    }
}
