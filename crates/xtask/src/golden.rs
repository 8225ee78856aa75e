//! Golden scripts: runs them against Kelson, or against the real etcd to see whether the recorded
//! text still holds. `--bless` re-records, and only ever from the real etcd.

use std::process::Command;

use crate::{peers, root, run_command};

pub(crate) fn run(args: &[String]) -> Result<(), String> {
    let bless = args.iter().any(|arg| arg == "--bless");
    let against_etcd = bless || args.iter().any(|arg| arg == "--against-etcd");
    let filters = args.iter().filter(|arg| !arg.starts_with("--"));
    let binary = if against_etcd {
        peers::ensure()?.join("etcd")
    } else {
        root().join("target/release/kelson")
    };
    let mut command = Command::new("cargo");
    command.args(["run", "--quiet", "-p", "kelson-tests", "--bin", "golden", "--"]).arg(binary);
    if bless {
        command.arg("--bless");
    }
    command.args(filters);
    run_command(&mut command)?;
    if bless {
        run_command(Command::new("git").args([
            "--no-pager",
            "diff",
            "--stat",
            "--",
            "tests/scripts",
        ]))?;
    }
    Ok(())
}
