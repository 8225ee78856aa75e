//! One server process under test, real etcd or Kelson alike: same flags, fresh directory, loopback
//! ports of its own. The process is killed when the handle is dropped.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// Answers 200 once the member serves, alarms or not.
const HEALTH: &str = "/health?exclude=NOSPACE&exclude=CORRUPT";

/// A running member and its directory.
pub struct Server {
    binary: PathBuf,
    dir: tempfile::TempDir,
    data_dir: PathBuf,
    extra: Vec<String>,
    client_port: u16,
    peer_port: u16,
    child: Option<Child>,
}

/// The binary under test: `KELSON_BIN`, else the release build of this checkout.
pub fn kelson_binary() -> PathBuf {
    std::env::var_os("KELSON_BIN")
        .map_or_else(|| root().join("target/release/kelson"), PathBuf::from)
}

/// The real etcd built by `cargo xtask peers`.
pub fn etcd_binary() -> PathBuf {
    root().join("target/peers/bin/etcd")
}

/// Root of the checkout.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ lies in the root").to_path_buf()
}

/// Ports below those that the kernel gives to outgoing connections: while a member is down, nobody who
/// tries to reach it may happen to take its port.
const PORTS: std::ops::Range<u32> = 12_000..32_000;

/// A port that nobody listens on; never the same twice in this process.
pub fn free_port() -> u16 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    loop {
        // Processes that run at the same time begin in different places.
        let number = std::process::id() * 37 + NEXT.fetch_add(1, Ordering::Relaxed);
        let port = (PORTS.start + number % (PORTS.end - PORTS.start)) as u16;
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}

impl Server {
    /// Starts `binary` in a fresh directory and waits until it answers on its client port.
    pub fn start(binary: &Path, extra: &[String]) -> Server {
        let dir = tempfile::Builder::new().prefix("kelson-test-").tempdir().expect("temp dir");
        let data_dir = dir.path().join("data");
        Server::start_in(binary, extra, dir, data_dir)
    }

    /// As [`Server::start`] with the data directory elsewhere, e.g. on a mounted image.
    pub fn start_on(binary: &Path, extra: &[String], data_dir: PathBuf) -> Server {
        let dir = tempfile::Builder::new().prefix("kelson-test-").tempdir().expect("temp dir");
        Server::start_in(binary, extra, dir, data_dir)
    }

    fn start_in(
        binary: &Path,
        extra: &[String],
        dir: tempfile::TempDir,
        data_dir: PathBuf,
    ) -> Server {
        let mut server = Server {
            binary: binary.to_path_buf(),
            dir,
            data_dir,
            extra: extra.to_vec(),
            client_port: free_port(),
            peer_port: free_port(),
            child: None,
        };
        server.spawn();
        server
    }

    /// The client endpoint, e.g. `http://127.0.0.1:40123`.
    pub fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.client_port)
    }

    /// The data directory given to the member.
    pub fn data_dir(&self) -> PathBuf {
        self.data_dir.clone()
    }

    /// File that collects what the process writes to stderr.
    pub fn log_path(&self) -> PathBuf {
        self.dir.path().join("log")
    }

    /// Process id, while it runs.
    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    /// Starts the process again on the same directory and ports.
    pub fn spawn(&mut self) {
        self.spawn_process();
        self.wait_ready();
    }

    /// Starts the process again and waits for its end or its readiness: `Err` holds its log.
    pub fn try_spawn(&mut self) -> Result<(), String> {
        self.spawn_process();
        let deadline = Instant::now() + Duration::from_secs(30);
        while Instant::now() < deadline {
            if http_ok(self.client_port, HEALTH) {
                return Ok(());
            }
            let child = self.child.as_mut().expect("the process was just started");
            if let Some(status) = child.try_wait().expect("wait for the member") {
                self.child = None;
                return Err(format!("{status}\n{}", self.log_tail()));
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        self.kill();
        Err(format!("hangs: neither serves nor ends within 30 s\n{}", self.log_tail()))
    }

    fn spawn_process(&mut self) {
        let log = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.log_path())
            .expect("open the log file");
        let peer = format!("http://127.0.0.1:{}", self.peer_port);
        let client = self.endpoint();
        let mut command = Command::new(&self.binary);
        command
            .arg("--name=m1")
            .arg(format!("--data-dir={}", self.data_dir().display()))
            .arg(format!("--listen-client-urls={client}"))
            .arg(format!("--advertise-client-urls={client}"))
            .arg(format!("--listen-peer-urls={peer}"))
            .arg(format!("--initial-advertise-peer-urls={peer}"))
            .arg(format!("--initial-cluster=m1={peer}"))
            .arg("--log-level=warn")
            .args(&self.extra)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log);
        let child =
            command.spawn().unwrap_or_else(|e| panic!("start {}: {e}", self.binary.display()));
        self.child = Some(child);
    }

    /// SIGKILL, at once.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            child.wait().expect("reap the member");
        }
    }

    /// SIGTERM, then waits for the end (20 s at most). Returns the exit status text.
    pub fn stop(&mut self) -> String {
        let Some(mut child) = self.child.take() else { return "not running".into() };
        let pid = rustix::process::Pid::from_raw(child.id() as i32).expect("a child has a pid");
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).expect("send SIGTERM");
        let deadline = Instant::now() + Duration::from_secs(20);
        while Instant::now() < deadline {
            if let Some(status) = child.try_wait().expect("wait for the member") {
                return status.to_string();
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        let _ = child.kill();
        let _ = child.wait();
        panic!("the member did not stop within 20 s of SIGTERM\n{}", self.log_tail());
    }

    /// Last part of the member's log, for failure messages.
    pub fn log_tail(&self) -> String {
        let text = std::fs::read_to_string(self.log_path()).unwrap_or_default();
        let tail: Vec<&str> = text.lines().rev().take(30).collect();
        tail.into_iter().rev().collect::<Vec<_>>().join("\n")
    }

    fn wait_ready(&mut self) {
        let deadline = Instant::now() + Duration::from_secs(60);
        while Instant::now() < deadline {
            if http_ok(self.client_port, HEALTH) {
                return;
            }
            let child = self.child.as_mut().expect("the process was just started");
            if let Some(status) = child.try_wait().expect("wait for the member") {
                panic!("{} ended with {status}:\n{}", self.binary.display(), self.log_tail());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        panic!("{} is not ready after 60 s:\n{}", self.binary.display(), self.log_tail());
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Plain HTTP/1.1 GET on loopback; true for status 200.
pub fn http_ok(port: u16, path: &str) -> bool {
    http_get(port, path).is_some_and(|(status, _)| status == 200)
}

/// Plain HTTP/1.1 GET on loopback: status and body, `None` when nobody answers.
pub fn http_get(port: u16, path: &str) -> Option<(u16, String)> {
    use std::io::{Read, Write};
    let address = std::net::SocketAddr::from(([127, 0, 0, 1], port));
    let mut stream =
        std::net::TcpStream::connect_timeout(&address, Duration::from_millis(500)).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(3))).ok()?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n").ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    let status = answer.split(' ').nth(1)?.parse().ok()?;
    let body = answer.split_once("\r\n\r\n").map_or("", |(_, body)| body).to_string();
    Some((status, body))
}
