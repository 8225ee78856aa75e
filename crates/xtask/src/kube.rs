//! `cargo xtask kube [--bin PATH] [--run PATTERN]`: builds the unmodified kube-apiserver from the
//! module tests/kube and runs that module's test on the store under test. The test itself never
//! builds anything, and it fails rather than skips when a program is missing.

use std::path::Path;
use std::process::Command;

use crate::interop::server_binary;
use crate::peers::{self, Program};
use crate::root;

const MODULE_DIR: &str = "tests/kube";

pub(crate) fn run(args: &[String]) -> Result<(), String> {
    let mut bin = None;
    let mut pattern = "^TestKube".to_string();
    let mut rest = args.iter();
    while let Some(arg) = rest.next() {
        match (arg.as_str(), rest.next()) {
            ("--bin", Some(path)) => bin = Some(path.as_str()),
            ("--run", Some(value)) => pattern = value.clone(),
            _ => return Err("usage: cargo xtask kube [--bin PATH] [--run PATTERN]".to_string()),
        }
    }
    let server = server_binary(bin)?;
    let apiserver = apiserver()?;
    println!("kube-apiserver on {}", server.display());
    let status = Command::new("nice")
        .args(["go", "test", "-p", "2", "-trimpath", "-buildvcs=false", "-count=1", "-v"])
        .args(["-timeout", "20m", "-run", &pattern, "."])
        .current_dir(root().join(MODULE_DIR))
        .env("KELSON_BIN", &server)
        .env("KUBE_APISERVER_BIN", &apiserver)
        .status()
        .map_err(|e| format!("start go test: {e}"))?;
    if status.success() { Ok(()) } else { Err(format!("the kube test ended with {status}")) }
}

fn apiserver() -> Result<std::path::PathBuf, String> {
    let module_dir = root().join(MODULE_DIR);
    let version = peers::required_version(&module_dir, "k8s.io/kubernetes")?;
    let mut numbers = version.trim_start_matches('v').split('.');
    let (major, minor) = (numbers.next().unwrap_or("0"), numbers.next().unwrap_or("0"));
    // What the project's own release build sets; otherwise the server takes itself for a prototype.
    let stamp = "k8s.io/component-base/version";
    let link = format!(
        "-s -w -X {stamp}.gitVersion={version} -X {stamp}.gitMajor={major} \
         -X {stamp}.gitMinor={minor} -X {stamp}.gitTreeState=archive"
    );
    let program = Program {
        name: "kube-apiserver",
        go_module_dir: MODULE_DIR,
        package: "k8s.io/kubernetes/cmd/kube-apiserver",
        versioned_by: "k8s.io/kubernetes",
        build_args: vec!["-ldflags".to_string(), link],
    };
    peers::build(&program, &root().join(Path::new("target/kube")).join(&version))
}
