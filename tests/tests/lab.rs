//! `kelson lab` from outside, as a script would use it: a lab of one and a lab of three members,
//! commands over its socket and over standard input, the same data after a second start, and no
//! process left behind.

use std::io::Write;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::{Duration, Instant};

use kelson_tests::client::Session;
use kelson_tests::runtime;
use kelson_tests::server::kelson_binary;
use serde_json::Value;

/// Ports that a lab of five members takes.
const PORTS: u16 = 50;

/// A lab that runs; it is killed when this is dropped, and its members with it.
struct Lab {
    dir: PathBuf,
    child: Child,
    input: ChildStdin,
}

/// A first port behind which all ports are free, different in each test.
fn free_base(seed: u16) -> u16 {
    // Below the ports that the system hands out by itself.
    let start = 10_000 + seed * 4_000 + (std::process::id() % 60) as u16 * 50;
    let free = |base: &u16| {
        (*base..base + PORTS).all(|port| TcpListener::bind(("127.0.0.1", port)).is_ok())
    };
    (start..start + 1_000).step_by(usize::from(PORTS)).find(free).expect("free ports")
}

impl Lab {
    fn start(dir: &Path, flags: &[&str]) -> Lab {
        let mut child = Command::new(kelson_binary())
            .args(["lab", "--dir"])
            .arg(dir)
            .args(flags)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::inherit())
            .spawn()
            .expect("start the lab");
        let input = child.stdin.take().expect("standard input is a pipe");
        let lab = Lab { dir: dir.to_path_buf(), child, input };
        let deadline = Instant::now() + Duration::from_secs(20);
        while lab.ask(&["status"]).is_err() {
            assert!(Instant::now() < deadline, "the lab does not answer");
            std::thread::sleep(Duration::from_millis(20));
        }
        lab.tell(&["wait"]);
        lab
    }

    /// Runs a command as another shell would: the output, or the complaint.
    fn ask(&self, words: &[&str]) -> Result<String, String> {
        let output = Command::new(kelson_binary())
            .args(["lab", "--dir"])
            .arg(&self.dir)
            .args(words)
            .output()
            .expect("run a command");
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
    }

    fn tell(&self, words: &[&str]) -> String {
        self.ask(words).unwrap_or_else(|error| panic!("{words:?}: {error}\n{}", self.logs()))
    }

    fn status(&self) -> Value {
        serde_json::from_str(&self.tell(&["status", "--json"])).expect("JSON")
    }

    fn member(&self, name: &str) -> Value {
        let status = self.status();
        let members = status["members"].as_array().expect("a list").clone();
        members.into_iter().find(|member| member["name"] == name).expect("the member")
    }

    /// Waits until `seen` is true of the lab's status.
    fn until(&self, what: &str, seen: impl Fn(&Value) -> bool) {
        let deadline = Instant::now() + Duration::from_secs(60);
        while !seen(&self.status()) {
            assert!(Instant::now() < deadline, "{what}:\n{}\n{}", self.status(), self.logs());
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    fn leader(&self) -> String {
        self.status()["leader"].as_str().expect("a leader").to_owned()
    }

    /// Runs a line of a script against one member.
    fn client(&self, member: &str, line: &str) -> Vec<String> {
        let url = self.member(member)["client_url"].as_str().expect("a URL").to_owned();
        let runtime = runtime();
        runtime.block_on(async { Session::new(&url).run(line).await })
    }

    fn read(&self, member: &str, key: &str, value: &str) {
        let answer = self.client(member, &format!("range {key}"));
        let found = answer.iter().any(|line| line.contains(&format!("{key}={value} ")));
        assert!(found, "{member}: {answer:?}\n{}", self.logs());
    }

    fn write(&self, member: &str, key: &str, value: &str) {
        let answer = self.client(member, &format!("put {key} {value}"));
        assert!(answer[0].starts_with("rev="), "{member}: {answer:?}\n{}", self.logs());
    }

    fn pids(&self) -> Vec<u64> {
        let status = self.status();
        let members = status["members"].as_array().expect("a list").clone();
        members.iter().filter_map(|member| member["pid"].as_u64()).collect()
    }

    /// Waits for the lab's own end, which must be a good one.
    fn ended(mut self) {
        let deadline = Instant::now() + Duration::from_secs(30);
        let status = loop {
            if let Some(status) = self.child.try_wait().expect("wait for the lab") {
                break status;
            }
            assert!(Instant::now() < deadline, "the lab does not end\n{}", self.logs());
            std::thread::sleep(Duration::from_millis(20));
        };
        assert!(status.success(), "{status}");
    }

    /// The ends of the members' logs, for failure messages.
    fn logs(&self) -> String {
        let logs = (1..6).filter_map(|number| {
            let text = std::fs::read_to_string(self.dir.join(format!("m{number}.log"))).ok()?;
            let tail: Vec<&str> = text.lines().rev().take(12).collect();
            let tail: Vec<&str> = tail.into_iter().rev().collect();
            Some(format!("-- m{number}\n{}", tail.join("\n")))
        });
        logs.collect::<Vec<_>>().join("\n")
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        let _ended = self.child.kill();
        let _reaped = self.child.wait();
    }
}

fn is_gone(pid: u64) -> bool {
    // A process that has ended but was not yet reaped counts as gone.
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_none_or(|(_, rest)| rest.starts_with('Z'))
}

fn wait_gone(pids: &[u64]) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !pids.iter().all(|pid| is_gone(*pid)) {
        assert!(Instant::now() < deadline, "members outlive their lab: {pids:?}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_lab_of_one_keeps_its_data_and_leaves_no_process() {
    let temp = tempfile::tempdir().expect("temp dir");
    let dir = temp.path().join("lab");
    let base = free_base(0).to_string();
    let lab = Lab::start(&dir, &["--members", "1", "--base-port", &base]);
    lab.write("m1", "greeting", "hello");
    let before = lab.member("m1")["pid"].clone();
    assert_eq!(lab.tell(&["kill", "m1"]), "m1 killed\n");
    assert_eq!(lab.member("m1")["state"], "killed");
    assert!(lab.ask(&["kill", "m1"]).expect_err("it is dead").contains("does not run"));
    assert!(lab.ask(&["wait"]).expect_err("nothing runs").contains("no member runs"));
    lab.tell(&["start", "m1"]);
    lab.tell(&["wait"]);
    assert_ne!(lab.member("m1")["pid"], before);
    lab.read("m1", "greeting", "hello");
    lab.tell(&["restart", "leader"]);
    lab.tell(&["wait"]);
    lab.tell(&["pause", "m1"]);
    lab.until("it stands still", |status| status["members"][0]["state"] == "paused");
    lab.tell(&["resume", "m1"]);
    lab.tell(&["wait"]);
    let pids = lab.pids();
    let mut lab = lab;
    writeln!(lab.input, "quit").expect("standard input is read");
    lab.ended();
    wait_gone(&pids);

    // Only the folder is named: the lab knows the rest.
    let lab = Lab::start(&dir, &[]);
    lab.read("m1", "greeting", "hello");
    let second = Command::new(kelson_binary()).args(["lab", "--dir"]).arg(&dir).output();
    let second = second.expect("run");
    assert!(!second.status.success());
    assert!(String::from_utf8_lossy(&second.stderr).contains("runs in"), "{second:?}");
    // A lab that is killed takes its members along, a paused one too.
    lab.tell(&["pause", "m1"]);
    let pids = lab.pids();
    drop(lab);
    wait_gone(&pids);
    let lab = Lab::start(&dir, &[]);
    lab.read("m1", "greeting", "hello");
    drop(lab);

    let lab = Lab::start(&dir, &["--reset", "--members", "1", "--base-port", &base]);
    assert_eq!(lab.client("m1", "range greeting"), ["rev=1 count=0"]);
}

#[test]
fn a_lab_of_three_loses_members_and_gets_one_more() {
    let temp = tempfile::tempdir().expect("temp dir");
    let base = free_base(1).to_string();
    let lab = Lab::start(&temp.path().join("lab"), &["--base-port", &base]);
    let first = lab.leader();
    lab.write("m1", "a", "1");

    lab.tell(&["isolate", &first]);
    lab.until("the others choose a leader", |status| {
        status["leader"].as_str().is_some_and(|leader| leader != first)
    });
    let second = lab.leader();
    lab.write(&second, "a", "2");
    assert_eq!(lab.member(&first)["isolated"], true);
    lab.tell(&["heal", &first]);
    lab.tell(&["wait"]);
    lab.read(&first, "a", "2");

    lab.tell(&["kill", "leader"]);
    lab.tell(&["wait"]);
    let third = lab.leader();
    lab.write(&third, "a", "3");
    for member in ["m1", "m2", "m3"] {
        if lab.member(member)["pid"].is_null() {
            lab.tell(&["start", member]);
        }
    }
    lab.tell(&["wait"]);

    lab.tell(&["add"]);
    lab.tell(&["wait"]);
    lab.until("m4 has a vote and all data", |status| {
        status["members"][3]["role"] == "follower" && status["members"][3]["lag"] == 0
    });
    lab.read("m4", "a", "3");
    lab.tell(&["remove", "m4"]);
    assert_eq!(lab.status()["members"].as_array().map(Vec::len), Some(3));
    lab.tell(&["wait"]);
    lab.read("m1", "a", "3");
    let pids = lab.pids();
    lab.tell(&["quit"]);
    lab.ended();
    wait_gone(&pids);
}

#[test]
fn a_lab_with_tls_serves_only_those_who_show_its_certificates() {
    let temp = tempfile::tempdir().expect("temp dir");
    let base = free_base(2).to_string();
    let lab = Lab::start(&temp.path().join("lab"), &["--tls", "--base-port", &base]);
    // The lab itself asks members as a client with certificates, and peers found each other.
    lab.tell(&["kill", "leader"]);
    lab.tell(&["wait"]);
    let leader = lab.leader();
    let url = lab.member(&leader)["client_url"].as_str().expect("a URL").to_owned();
    assert!(url.starts_with("https://"), "{url}");
    let runtime = runtime();
    let plain = url.replace("https", "http");
    let answer = runtime.block_on(async { Session::new(&plain).run("put a 1").await });
    assert!(!answer[0].starts_with("rev="), "{answer:?}");
    let lines = lab.tell(&["lines"]);
    for flag in ["--cacert=", "--cert=", "--key="] {
        let file = lines.split(flag).nth(1).and_then(|rest| rest.split_whitespace().next());
        assert!(file.is_some_and(|file| Path::new(file).is_file()), "{flag}: {lines}");
    }
}
