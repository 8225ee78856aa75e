//! `cargo xtask interop [--bin PATH] [--only NAME]`: real client libraries and etcdctl against one
//! server, with a line per client and a count at the end; `--only` leaves out the clients whose name
//! does not contain NAME. It knows nothing of what the server is.
//!
//! Everything that a client needs is installed below target/clients from the lock files under
//! tests/clients. A client that cannot be installed is skipped with its reason, but where CI is set
//! in the environment that is a failure like any other.

use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::{etcdctl, peers, restore, root};

/// How long a server may take to answer, and a client to finish.
const PATIENCE: Duration = Duration::from_secs(120);

const USAGE: &str = "usage: cargo xtask interop [--bin PATH] [--only NAME]";

pub(crate) fn run(args: &[String]) -> Result<(), String> {
    let (mut bin, mut only) = (None, "");
    let mut rest = args.iter();
    while let Some(arg) = rest.next() {
        match (arg.as_str(), rest.as_slice().first()) {
            ("--bin", Some(path)) => {
                bin = Some(path.as_str());
                rest.next();
            }
            ("--only", Some(name)) => {
                only = name.as_str();
                rest.next();
            }
            _ => return Err(USAGE.to_string()),
        }
    }
    let server_bin = server_binary(bin)?;
    let peers = peers::ensure()?;
    let scratch = tempfile::tempdir().map_err(|e| format!("make a scratch directory: {e}"))?;
    let server = Server::start(&server_bin, &scratch.path().join("clients"), free_ports()?)?;
    server.wait_ready(&peers)?;

    let mut tally = Tally::default();
    for (name, install) in CLIENTS {
        if !name.contains(only) {
            continue;
        }
        match install() {
            Ok(command) => tally.count(name, run_client(command, &server.endpoint())),
            Err(reason) if std::env::var_os("CI").is_none() => {
                println!("skip {name}: {reason}");
            }
            Err(reason) => tally.count(name, Err(reason)),
        }
    }
    // After the clients the store holds deletions, transactions, large values and a compaction.
    let saved = restore::save(&server, &peers, scratch.path());
    drop(server);
    let proof = saved.and_then(|saved| restore::prove(&saved, &peers, scratch.path()));
    tally.count("snapshot into etcd", proof);
    for script in ["script", "auth"].into_iter().filter(|_| "etcdctl".contains(only)) {
        for (etcdctl, outcome) in etcdctl::compare_all(script, &server_bin, &peers, scratch.path())
        {
            tally.count(&format!("{etcdctl} {script}.txt"), outcome);
        }
    }
    println!("{} passed, {} failed", tally.passed, tally.failed);
    if tally.failed == 0 { Ok(()) } else { Err("some clients failed".to_string()) }
}

#[derive(Default)]
struct Tally {
    passed: u32,
    failed: u32,
}

impl Tally {
    fn count(&mut self, name: &str, outcome: Result<(), String>) {
        match outcome {
            Ok(()) => {
                self.passed += 1;
                println!("ok {name}");
            }
            Err(reason) => {
                self.failed += 1;
                println!("FAILED {name}: {}", reason.trim_end());
            }
        }
    }
}

type Install = fn() -> Result<Command, String>;

/// Python comes before Rust: it brings the protoc that the Rust client's build asks for.
const CLIENTS: [(&str, Install); 7] = [
    ("go", install_go),
    ("python etcd3", install_python),
    ("python aetcd", || install_modern_python("check_aetcd.py")),
    ("python etcd3gw", || install_modern_python("check_gateway.py")),
    ("node", install_node),
    ("java", install_java),
    ("rust", install_rust),
];

fn install_go() -> Result<Command, String> {
    let output = clients_target()?.join("go-client");
    let mut build = Command::new("go");
    build.args(["build", "-p", "2", "-trimpath", "-buildvcs=false", "-o"]).arg(&output).arg(".");
    peers::capture(build.current_dir(source("go")))?;
    Ok(Command::new(output))
}

fn install_python() -> Result<Command, String> {
    let python = python_environment()?;
    let mut command = Command::new(python);
    // The package's generated code predates the compiled parser.
    command.arg(source("python").join("check.py"));
    command.env("PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION", "python");
    command.env("PYTHONDONTWRITEBYTECODE", "1");
    Ok(command)
}

/// A client whose libraries do not go together with those of etcd3.
fn install_modern_python(check: &str) -> Result<Command, String> {
    let python = virtual_environment("python-modern", "requirements-modern.txt")?;
    let mut command = Command::new(python);
    command.arg(source("python").join(check)).env("PYTHONDONTWRITEBYTECODE", "1");
    Ok(command)
}

fn python_environment() -> Result<PathBuf, String> {
    virtual_environment("python", "requirements.txt")
}

/// A virtual environment with exactly the pinned packages; made anew when the pins change.
fn virtual_environment(name: &str, requirements: &str) -> Result<PathBuf, String> {
    let dir = clients_target()?.join(name);
    let python = dir.join("bin/python");
    let pins = source("python").join(requirements);
    if up_to_date(&dir, &[&pins])? {
        return Ok(python);
    }
    require_apt("ensurepip of python3", "python3-venv", || {
        Command::new("python3")
            .args(["-c", "import ensurepip"])
            .output()
            .map(|o| o.status.success())
    })?;
    peers::capture(Command::new("python3").args(["-m", "venv", "--clear"]).arg(&dir))?;
    let mut pip = Command::new(&python);
    pip.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r"]).arg(&pins);
    peers::capture(&mut pip)?;
    stamp(&dir, &[&pins])?;
    Ok(python)
}

fn install_node() -> Result<Command, String> {
    let dir = clients_target()?.join("node");
    fs::create_dir_all(&dir).map_err(|e| format!("make {}: {e}", dir.display()))?;
    let (manifest, lock) =
        (source("node").join("package.json"), source("node").join("package-lock.json"));
    // A module finds its packages beside itself, so the check runs from a copy.
    for file in ["package.json", "package-lock.json", "check.js"] {
        fs::copy(source("node").join(file), dir.join(file))
            .map_err(|e| format!("copy {file}: {e}"))?;
    }
    if !up_to_date(&dir, &[&manifest, &lock])? {
        let mut npm = Command::new("npm");
        npm.args(["ci", "--no-audit", "--no-fund", "--ignore-scripts", "--silent"]);
        peers::capture(npm.current_dir(&dir))?;
        stamp(&dir, &[&manifest, &lock])?;
    }
    let mut command = Command::new("node");
    command.arg(dir.join("check.js"));
    Ok(command)
}

/// jetcd from Maven Central; Maven keeps what it fetches below target/ and is asked only when the
/// project changes.
fn install_java() -> Result<Command, String> {
    let dir = clients_target()?.join("java");
    let (project, check) =
        (source("java").join("pom.xml"), source("java").join("src/main/java/Check.java"));
    fs::create_dir_all(&dir).map_err(|e| format!("make {}: {e}", dir.display()))?;
    if !up_to_date(&dir, &[&project, &check])? {
        require_apt("mvn", "maven", || {
            Command::new("mvn").arg("--version").output().map(|o| o.status.success())
        })?;
        let mut maven = Command::new("mvn");
        maven.args(["--batch-mode", "--quiet", "--file"]).arg(&project);
        maven.arg(format!("-Dmaven.repo.local={}", clients_target()?.join("m2").display()));
        maven.arg(format!("-DbuildDirectory={}", dir.display()));
        maven.args(["compile", "dependency:copy-dependencies"]);
        peers::capture(&mut maven)?;
        stamp(&dir, &[&project, &check])?;
    }
    let mut command = Command::new("java");
    let (classes, jars) = (dir.join("classes"), dir.join("dependency"));
    command.arg("-cp").arg(format!("{}:{}/*", classes.display(), jars.display())).arg("Check");
    Ok(command)
}

fn install_rust() -> Result<Command, String> {
    let python = python_environment()?;
    // etcd-client compiles the protocol with protoc while it builds.
    let protoc = clients_target()?.join("protoc");
    let script = format!("#!/bin/sh\nexec '{}' -m grpc_tools.protoc \"$@\"\n", python.display());
    fs::write(&protoc, script).map_err(|e| format!("write {}: {e}", protoc.display()))?;
    peers::capture(Command::new("chmod").arg("+x").arg(&protoc))?;
    let target = clients_target()?.join("rust");
    let mut build = Command::new("nice");
    build.args(["cargo", "build", "--quiet", "--locked", "--target-dir"]).arg(&target);
    build.current_dir(source("rust")).env("PROTOC", &protoc);
    peers::capture(&mut build)?;
    Ok(Command::new(target.join("debug/kelson-client-check")))
}

fn source(client: &str) -> PathBuf {
    root().join("tests/clients").join(client)
}

fn clients_target() -> Result<PathBuf, String> {
    let dir = root().join("target/clients");
    fs::create_dir_all(&dir).map_err(|e| format!("make {}: {e}", dir.display()))?;
    Ok(dir)
}

fn up_to_date(dir: &Path, pins: &[&Path]) -> Result<bool, String> {
    let wanted = joined(pins)?;
    Ok(fs::read_to_string(dir.join(".stamp")).is_ok_and(|old| old == wanted))
}

fn stamp(dir: &Path, pins: &[&Path]) -> Result<(), String> {
    fs::write(dir.join(".stamp"), joined(pins)?)
        .map_err(|e| format!("stamp {}: {e}", dir.display()))
}

fn joined(files: &[&Path]) -> Result<String, String> {
    files
        .iter()
        .map(|file| fs::read_to_string(file).map_err(|e| format!("read {}: {e}", file.display())))
        .collect()
}

/// Installs a Debian package if `present` says no and we may; otherwise says what is missing.
fn require_apt(
    what: &str,
    package: &str,
    present: impl Fn() -> std::io::Result<bool>,
) -> Result<(), String> {
    if present().unwrap_or(false) {
        return Ok(());
    }
    let user = peers::capture(Command::new("id").arg("-u"))?;
    if user.trim() != "0" {
        return Err(format!("{what} is missing: install {package}"));
    }
    peers::capture(Command::new("apt-get").args(["update", "-qq"]))?;
    peers::capture(Command::new("apt-get").args(["install", "-y", "-qq", package]))?;
    if present().unwrap_or(false) { Ok(()) } else { Err(format!("{package} did not bring {what}")) }
}

fn run_client(mut command: Command, endpoint: &str) -> Result<(), String> {
    command.env("ENDPOINT", endpoint).stdin(Stdio::null());
    // Each client switches users on, and off again, as the last thing that it does.
    command.env("AUTH", "1");
    peers::capture(&mut command).map(|_| ())
}

/// The server under test: what `--bin` or KELSON_BIN says, else our release build.
pub(crate) fn server_binary(flag: Option<&str>) -> Result<PathBuf, String> {
    let path = flag
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("KELSON_BIN").map(PathBuf::from))
        .unwrap_or_else(|| root().join("target/release/kelson"));
    path.canonicalize().map_err(|e| format!("the server under test, {}: {e}", path.display()))
}

/// One server on loopback; it ends with this value.
pub(crate) struct Server {
    child: Child,
    client_port: u16,
    log: PathBuf,
}

impl Server {
    /// `ports` are for clients and for peers. The same ports give the same member and cluster ids.
    pub(crate) fn start(bin: &Path, dir: &Path, ports: [u16; 2]) -> Result<Server, String> {
        let data = dir.join("data");
        fs::create_dir_all(dir).map_err(|e| format!("make {}: {e}", dir.display()))?;
        Server::start_on(bin, &data, &dir.join("server.log"), ports)
    }

    /// Starts on a data directory that may already hold data.
    pub(crate) fn start_on(
        bin: &Path,
        data: &Path,
        log: &Path,
        [client_port, peer_port]: [u16; 2],
    ) -> Result<Server, String> {
        let (client, peer) =
            (format!("http://127.0.0.1:{client_port}"), format!("http://127.0.0.1:{peer_port}"));
        let output = fs::File::create(log).map_err(|e| format!("create {}: {e}", log.display()))?;
        let errors = output.try_clone().map_err(|e| format!("share {}: {e}", log.display()))?;
        let child = Command::new(bin)
            .arg("--name=default")
            .arg(format!("--data-dir={}", data.display()))
            .arg(format!("--listen-client-urls={client}"))
            .arg(format!("--advertise-client-urls={client}"))
            .arg(format!("--listen-peer-urls={peer}"))
            .arg(format!("--initial-advertise-peer-urls={peer}"))
            .arg(format!("--initial-cluster=default={peer}"))
            .stdin(Stdio::null())
            .stdout(output)
            .stderr(errors)
            .spawn()
            .map_err(|e| format!("start {}: {e}", bin.display()))?;
        Ok(Server { child, client_port, log: log.to_path_buf() })
    }

    pub(crate) fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.client_port)
    }

    /// Waits until etcdctl calls the server healthy.
    pub(crate) fn wait_ready(&self, peers: &Path) -> Result<(), String> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let mut health = Command::new(peers.join("etcdctl"));
            health.args(["endpoint", "health", "--command-timeout=2s"]);
            let outcome = peers::capture(health.arg("--endpoints").arg(self.endpoint()));
            match outcome {
                Ok(_) => return Ok(()),
                Err(reason) if Instant::now() > deadline => {
                    let log = fs::read_to_string(&self.log).unwrap_or_default();
                    return Err(format!("the server is not healthy: {reason}\n{log}"));
                }
                Err(_) => std::thread::sleep(Duration::from_millis(100)),
            }
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Fails only if the server has ended by itself, and then there is nothing to end.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Two loopback ports that nobody listens on now.
pub(crate) fn free_ports() -> Result<[u16; 2], String> {
    let bind = || TcpListener::bind("127.0.0.1:0").map_err(|e| format!("find a port: {e}"));
    let (first, second) = (bind()?, bind()?);
    let port = |listener: &TcpListener| {
        listener.local_addr().map(|a| a.port()).map_err(|e| format!("find a port: {e}"))
    };
    Ok([port(&first)?, port(&second)?])
}
