//! Developer commands: code generation, test peers, golden scripts, everything CI runs.
//! It never ships: nothing here is linked into `kelson`.

mod ci;
mod codegen;
mod compare;
mod etcdctl;
mod golden;
mod guarantees;
mod interop;
mod kube;
mod peers;
mod restore;
mod sabotage;
mod soak;

use std::process::ExitCode;

const USAGE: &str = "usage: cargo xtask COMMAND
  ci                                       everything CI runs
  codegen [--check]                        Rust code from proto/
  golden [--against-etcd|--bless] [NAME]   golden scripts
  guarantees [--check]                     docs/GUARANTEES.md of the claims and the ledger
  peers                                    build etcd, etcdctl, etcdutl, benchmark, older etcdctl
  interop [--bin PATH] [--only NAME]       real client libraries and etcdctl
  kube [--bin PATH]                        a real kube-apiserver
  compare [put] [range] [million]          timings beside real etcd
  sabotage [--check]                       a build to break; none of it in the release
  soak [--minutes N] [--beside KIND,...]   memory and files under churn";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let rest = args.get(1..).unwrap_or_default();
    let outcome = match args.first().map(String::as_str) {
        Some("codegen") => codegen::run(rest),
        Some("ci") => ci::run(rest),
        Some("compare") => compare::run(rest),
        Some("golden") => golden::run(rest),
        Some("guarantees") => guarantees::run(rest),
        Some("sabotage") => sabotage::run(rest),
        Some("soak") => soak::run(rest),
        Some("peers") => peers::run(rest),
        Some("interop") => interop::run(rest),
        Some("kube") => kube::run(rest),
        _ => Err(USAGE.to_string()),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("xtask: {message}");
            ExitCode::FAILURE
        }
    }
}

/// Root of the checkout: two levels above this crate.
pub(crate) fn root() -> std::path::PathBuf {
    let crate_dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    crate_dir.ancestors().nth(2).expect("crates/xtask lies two levels below the root").to_path_buf()
}

/// Runs a command to its end; a non-zero exit is an error that names it.
pub(crate) fn run_command(command: &mut std::process::Command) -> Result<(), String> {
    let status = command.status().map_err(|e| format!("run {command:?}: {e}"))?;
    if status.success() { Ok(()) } else { Err(format!("{command:?} ended with {status}")) }
}
