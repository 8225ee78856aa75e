//! Kelson beside real etcd in one run on one machine, fsync on, with etcd's own `benchmark` tool.
//! Prints the tables of docs/PERFORMANCE.md. It holds cargo's build locks meanwhile, so that no build
//! disturbs a timing. Absolute numbers are this machine's; the ratio is what counts.
//!
//! `cargo xtask compare [put] [range] [million] [cluster]`, all by default; `cluster` is put and range on
//! three members, with the load spread over all of them.

use std::fs::{self, File};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::{peers, root};

/// Rounds of every load, alternating between the two servers; the table shows the median.
const ROUNDS: usize = 3;
/// Kernel ticks per second in /proc/PID/stat.
const TICKS_PER_SECOND: f64 = 100.0;

struct Peer {
    name: &'static str,
    binary: PathBuf,
}

/// A running server; `dir` holds its data and its log.
pub(crate) struct Server {
    pub(crate) child: Child,
    pub(crate) port: u16,
    pub(crate) peer_port: u16,
    pub(crate) dir: PathBuf,
}

/// One run of the load generator.
#[derive(Clone)]
struct Sample {
    per_second: f64,
    p50_ms: f64,
    p99_ms: f64,
    cpu_us: f64,
}

pub(crate) fn run(args: &[String]) -> Result<(), String> {
    let bin = peers::ensure()?;
    let kelson = root().join("target/release/kelson");
    if !kelson.exists() {
        return Err("target/release/kelson is missing: run `cargo build --release`".into());
    }
    let _locks = build_locks()?;
    let pair =
        [Peer { name: "etcd", binary: bin.join("etcd") }, Peer { name: "kelson", binary: kelson }];
    let benchmark = bin.join("benchmark");
    let wanted = |name: &str| args.is_empty() || args.iter().any(|arg| arg == name);
    if wanted("put") {
        loads(&pair, &benchmark, "put", 1, &put_args)?;
    }
    if wanted("range") {
        loads(&pair, &benchmark, "range", 1, &range_args)?;
    }
    if wanted("cluster") {
        loads(&pair, &benchmark, "put", 3, &put_args)?;
        loads(&pair, &benchmark, "range", 3, &range_args)?;
    }
    if wanted("million") {
        million(&pair, &benchmark)?;
    }
    Ok(())
}

fn build_locks() -> Result<Vec<File>, String> {
    let mut locks = Vec::new();
    for profile in ["debug", "release"] {
        let path = root().join("target").join(profile).join(".cargo-lock");
        if let Ok(file) = File::options().write(true).open(&path) {
            file.lock().map_err(|e| format!("lock {}: {e}", path.display()))?;
            locks.push(file);
        }
    }
    Ok(locks)
}

fn put_args(clients: usize) -> Vec<String> {
    let total = match clients {
        1 => 4_000,
        100 => 60_000,
        _ => 80_000,
    };
    let words = ["put", "--key-size=16", "--val-size=256", "--key-space-size=100000"];
    words.iter().map(ToString::to_string).chain([format!("--total={total}")]).collect()
}

fn range_args(clients: usize) -> Vec<String> {
    let total = if clients == 1 { 8_000 } else { 80_000 };
    ["range", "foo", "--consistency=l"]
        .iter()
        .map(ToString::to_string)
        .chain([format!("--total={total}")])
        .collect()
}

fn loads(
    pair: &[Peer; 2],
    benchmark: &Path,
    what: &str,
    members: usize,
    args: &dyn Fn(usize) -> Vec<String>,
) -> Result<(), String> {
    let on = if members == 1 { String::new() } else { format!(", {members} members") };
    println!("\n| {what}, 256 B{on} | server | ops/s | p50 ms | p99 ms | server CPU us/op |");
    println!("|---|---|---|---|---|---|");
    for clients in [1, 100, 1000] {
        let mut samples: [Vec<Sample>; 2] = [Vec::new(), Vec::new()];
        for _ in 0..ROUNDS {
            for (peer, samples) in pair.iter().zip(&mut samples) {
                let mut servers = start_members(&peer.binary, members)?;
                let sample = load(&servers, benchmark, clients, &args(clients));
                for server in &mut servers {
                    stop(server, "-KILL");
                    let _ = fs::remove_dir_all(&server.dir);
                }
                samples.push(sample?);
            }
        }
        let medians = samples.map(median);
        for (peer, sample) in pair.iter().zip(&medians) {
            println!(
                "| {clients} clients | {} | {:.0} | {:.2} | {:.2} | {:.0} |",
                peer.name, sample.per_second, sample.p50_ms, sample.p99_ms, sample.cpu_us
            );
        }
        let [etcd, kelson] = &medians;
        println!(
            "| | ratio | {:.2} | {:.2} | {:.2} | {:.2} |",
            kelson.per_second / etcd.per_second,
            kelson.p50_ms / etcd.p50_ms,
            kelson.p99_ms / etcd.p99_ms,
            kelson.cpu_us / etcd.cpu_us
        );
    }
    Ok(())
}

fn median(mut samples: Vec<Sample>) -> Sample {
    samples.sort_by(|a, b| a.per_second.total_cmp(&b.per_second));
    samples[samples.len() / 2].clone()
}

fn load(
    servers: &[Server],
    benchmark: &Path,
    clients: usize,
    args: &[String],
) -> Result<Sample, String> {
    let conns = if clients == 1 { 1 } else { clients / 10 };
    let all_cpu = || servers.iter().map(|server| cpu_seconds(server.child.id())).sum::<f64>();
    let before = all_cpu();
    let endpoints: Vec<String> =
        servers.iter().map(|server| format!("127.0.0.1:{}", server.port)).collect();
    let output = Command::new(benchmark)
        .arg(format!("--endpoints={}", endpoints.join(",")))
        .args([format!("--conns={conns}"), format!("--clients={clients}")])
        .args(args)
        .output()
        .map_err(|e| format!("run {}: {e}", benchmark.display()))?;
    let cpu = all_cpu() - before;
    let text = String::from_utf8_lossy(&output.stdout);
    let number = |before: &str, after: &str| -> Option<f64> {
        let rest = &text[text.find(before)? + before.len()..];
        rest[..rest.find(after)?].trim().parse().ok()
    };
    let parse = || {
        let per_second = number("Requests/sec:", "\n")?;
        let total = number("Total:", "secs")? * per_second;
        Some(Sample {
            per_second,
            p50_ms: number("50% in ", " secs")? * 1e3,
            p99_ms: number("99% in ", " secs")? * 1e3,
            cpu_us: cpu * 1e6 / total,
        })
    };
    parse().ok_or_else(|| {
        format!(
            "unexpected output of benchmark:\n{text}\n{}",
            String::from_utf8_lossy(&output.stderr)
        )
    })
}

/// A million keys of 256 bytes: memory, disk, and the time from start to serving.
fn million(pair: &[Peer; 2], benchmark: &Path) -> Result<(), String> {
    println!(
        "\n| 1M x 256 B | server | loaded RSS MiB | disk MiB | restart after stop s | RSS MiB | restart after kill -9 s | RSS MiB |"
    );
    println!("|---|---|---|---|---|---|---|---|");
    for peer in pair {
        let mut server = start(&peer.binary, None)?;
        let args = ["put", "--key-size=16", "--val-size=256", "--sequential-keys"];
        let args: Vec<String> = args
            .iter()
            .map(ToString::to_string)
            .chain(["--key-space-size=1000000".to_string(), "--total=1000000".to_string()])
            .collect();
        load(std::slice::from_ref(&server), benchmark, 1000, &args)?;
        std::thread::sleep(Duration::from_secs(3));
        let loaded = rss_mib(server.child.id());
        let disk = disk_mib(&server.dir);
        let mut columns = Vec::new();
        for signal in ["-TERM", "-KILL"] {
            stop(&mut server, signal);
            let begin = Instant::now();
            let ports = (server.port, server.peer_port);
            server = start(&peer.binary, Some((server.dir.clone(), ports)))?;
            columns.push(format!("{:.2}", begin.elapsed().as_secs_f64()));
            std::thread::sleep(Duration::from_secs(2));
            columns.push(format!("{}", rss_mib(server.child.id())));
        }
        println!("| | {} | {loaded} | {disk} | {} |", peer.name, columns.join(" | "));
        stop(&mut server, "-KILL");
        let _ = fs::remove_dir_all(&server.dir);
    }
    Ok(())
}

pub(crate) type Ports = (u16, u16);

pub(crate) fn start(binary: &Path, again: Option<(PathBuf, Ports)>) -> Result<Server, String> {
    let fresh = again.is_none();
    let (dir, ports) = match again {
        Some(known) => known,
        None => new_place()?,
    };
    let server = spawn(binary, "m", dir, ports, &format!("m=http://127.0.0.1:{}", ports.1))?;
    wait(std::slice::from_ref(&server), binary, fresh)?;
    Ok(server)
}

/// A new cluster that serves.
fn start_members(binary: &Path, members: usize) -> Result<Vec<Server>, String> {
    let places = (0..members).map(|_| new_place()).collect::<Result<Vec<_>, _>>()?;
    let named = |(at, (_, ports)): (usize, &(PathBuf, Ports))| {
        format!("m{at}=http://127.0.0.1:{}", ports.1)
    };
    let cluster = places.iter().enumerate().map(named).collect::<Vec<_>>().join(",");
    let spawned = places.into_iter().enumerate();
    let spawned =
        spawned.map(|(at, (dir, ports))| spawn(binary, &format!("m{at}"), dir, ports, &cluster));
    let servers = spawned.collect::<Result<Vec<_>, _>>()?;
    wait(&servers, binary, true)?;
    Ok(servers)
}

fn new_place() -> Result<(PathBuf, Ports), String> {
    let dir = tempfile::Builder::new().prefix("kelson-compare-").tempdir();
    Ok((dir.map_err(|e| e.to_string())?.keep(), (free_port()?, free_port()?)))
}

fn spawn(
    binary: &Path,
    name: &str,
    dir: PathBuf,
    (port, peer_port): Ports,
    cluster: &str,
) -> Result<Server, String> {
    let client = format!("http://127.0.0.1:{port}");
    let peer = format!("http://127.0.0.1:{peer_port}");
    let child = Command::new(binary)
        .args(["--log-level=error", "--quota-backend-bytes=8589934592"])
        .arg(format!("--name={name}"))
        .arg(format!("--data-dir={}", dir.join("data").display()))
        .arg(format!("--listen-client-urls={client}"))
        .arg(format!("--advertise-client-urls={client}"))
        .arg(format!("--listen-peer-urls={peer}"))
        .arg(format!("--initial-advertise-peer-urls={peer}"))
        .arg(format!("--initial-cluster={cluster}"))
        .stdout(Stdio::null())
        .stderr(File::create(dir.join("log")).map_err(|e| e.to_string())?)
        .spawn()
        .map_err(|e| format!("start {}: {e}", binary.display()))?;
    Ok(Server { child, port, peer_port, dir })
}

fn wait(servers: &[Server], binary: &Path, fresh: bool) -> Result<(), String> {
    let deadline = Instant::now() + Duration::from_secs(180);
    while !servers.iter().all(|server| healthy(server.port)) {
        if Instant::now() > deadline {
            return Err(format!("{} does not serve within 180 s", binary.display()));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    if fresh {
        // Elections and first checkpoints are no part of a load.
        std::thread::sleep(Duration::from_millis(1500));
    }
    Ok(())
}

fn free_port() -> Result<u16, String> {
    let listener = TcpListener::bind("127.0.0.1:0").map_err(|e| format!("bind a port: {e}"))?;
    listener.local_addr().map(|address| address.port()).map_err(|e| e.to_string())
}

/// True when a linearizable read is answered.
fn healthy(port: u16) -> bool {
    page(port, "/health").is_some()
}

/// A page of the server, header included; `None` unless it answers 200 within eight seconds.
pub(crate) fn page(port: u16, path: &str) -> Option<String> {
    use std::io::{Read, Write};
    let mut stream = TcpStream::connect(("127.0.0.1", port)).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(8))).ok()?;
    let request = format!("GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n");
    let mut answer = String::new();
    stream.write_all(request.as_bytes()).ok()?;
    stream.read_to_string(&mut answer).ok()?;
    answer.starts_with("HTTP/1.1 200").then_some(answer)
}

pub(crate) fn stop(server: &mut Server, signal: &str) {
    let _ = Command::new("kill").args([signal, &server.child.id().to_string()]).status();
    let _ = server.child.wait();
}

/// User and system time of a process so far.
pub(crate) fn cpu_seconds(pid: u32) -> f64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let fields: Vec<&str> =
        stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let ticks = |at: usize| fields.get(at).and_then(|text| text.parse::<f64>().ok()).unwrap_or(0.0);
    (ticks(11) + ticks(12)) / TICKS_PER_SECOND
}

pub(crate) fn rss_mib(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap_or_default();
    line.split_whitespace().next().and_then(|kb| kb.parse::<u64>().ok()).unwrap_or(0) / 1024
}

pub(crate) fn disk_mib(dir: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let mut blocks = 0;
    let mut open = vec![dir.to_path_buf()];
    while let Some(dir) = open.pop() {
        for entry in fs::read_dir(&dir).into_iter().flatten().flatten() {
            match entry.metadata() {
                Ok(meta) if meta.is_dir() => open.push(entry.path()),
                Ok(meta) => blocks += meta.blocks(),
                Err(_) => {}
            }
        }
    }
    blocks * 512 / (1 << 20)
}
