//! Runs the scripts of tests/clients/etcdctl against the server under test and against real etcd,
//! and compares what etcdctl prints. The two servers run one after the other on the same ports, so that
//! even member and cluster ids have to agree. It never judges an answer by itself.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use crate::interop::{Server, free_ports};
use crate::root;

/// How long one command, or a watch for its lines, may take.
const PATIENCE: Duration = Duration::from_secs(90);

/// How two runs of a line are compared.
#[derive(Clone, Copy, PartialEq)]
enum Likeness {
    Exact,
    Shape,
    Success,
}

struct Step {
    line: usize,
    text: String,
    likeness: Likeness,
    utility: bool,
    lease: Option<String>,
    /// Lines after which a watch in the background is taken to be complete.
    watch_lines: Option<usize>,
    args: Vec<String>,
    stdin: String,
}

/// What a step did: exit code, output, errors without log lines.
#[derive(PartialEq)]
struct Answer {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

/// Compares one script, named without its extension; each run has fresh servers.
pub(crate) fn compare(
    script: &str,
    server: &Path,
    peers: &Path,
    scratch: &Path,
) -> Result<(), String> {
    let steps = parse(script)?;
    let scratch = &scratch.join(script);
    let ports = free_ports()?;
    let ours = play(&steps, server, peers, &scratch.join("ours"), ports)?;
    let theirs = play(&steps, &peers.join("etcd"), peers, &scratch.join("etcd"), ports)?;
    let mut differences = Vec::new();
    for ((step, ours), theirs) in steps.iter().zip(&ours).zip(&theirs) {
        let same = match step.likeness {
            Likeness::Success => ours.code == Some(0) && theirs.code == Some(0),
            Likeness::Exact | Likeness::Shape => ours == theirs,
        };
        if !same {
            differences.push(format!(
                "line {}: {}\n  server under test:\n{}  etcd:\n{}",
                step.line,
                step.text,
                ours.shown(),
                theirs.shown()
            ));
        }
    }
    if differences.is_empty() {
        println!("{script}.txt: {} steps agree", steps.len());
        return Ok(());
    }
    Err(format!(
        "{} of {} steps differ\n{}",
        differences.len(),
        steps.len(),
        differences.join("\n")
    ))
}

fn parse(script: &str) -> Result<Vec<Step>, String> {
    let file = root().join("tests/clients/etcdctl").join(script).with_extension("txt");
    let text = fs::read_to_string(&file).map_err(|e| format!("read {}: {e}", file.display()))?;
    let mut steps: Vec<Step> = Vec::new();
    for (index, line) in text.lines().enumerate() {
        let at = |what: &str| format!("{}:{}: {what}", file.display(), index + 1);
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        if let Some(input) = line.strip_prefix('<') {
            let step = steps.last_mut().ok_or_else(|| at("input without a command"))?;
            step.stdin.push_str(input.strip_prefix(' ').unwrap_or(input));
            step.stdin.push('\n');
            continue;
        }
        let mut words = split(line).into_iter();
        let mut step = Step {
            line: index + 1,
            text: line.to_string(),
            likeness: Likeness::Exact,
            utility: false,
            lease: None,
            watch_lines: None,
            args: Vec::new(),
            stdin: String::new(),
        };
        match words.next().as_deref() {
            Some("=") => {}
            Some("~") => step.likeness = Likeness::Shape,
            Some("!") => step.likeness = Likeness::Success,
            Some("utl") => step.utility = true,
            Some("lease") => step.lease = words.next(),
            Some("watch") => {
                let lines = words.next().and_then(|count| count.parse().ok());
                step.watch_lines = Some(lines.ok_or_else(|| at("watch needs a number"))?);
            }
            other => return Err(at(&format!("unknown mark {other:?}"))),
        }
        step.args = words.collect();
        steps.push(step);
    }
    Ok(steps)
}

/// Words are separated by blanks; double quotes hold one word together and may be empty.
fn split(line: &str) -> Vec<String> {
    let mut words = Vec::new();
    let mut word = String::new();
    let (mut quoted, mut started) = (false, false);
    for c in line.chars() {
        match c {
            '"' => (quoted, started) = (!quoted, true),
            ' ' if !quoted => {
                if started {
                    words.push(std::mem::take(&mut word));
                }
                started = false;
            }
            other => {
                word.push(other);
                started = true;
            }
        }
    }
    if started {
        words.push(word);
    }
    words
}

/// One pass over the script with a server of its own.
struct Play<'a> {
    peers: &'a Path,
    dir: PathBuf,
    endpoint: String,
    leases: BTreeMap<String, String>,
    watch: Option<(usize, Watch)>,
}

fn play(
    steps: &[Step],
    server: &Path,
    peers: &Path,
    dir: &Path,
    ports: [u16; 2],
) -> Result<Vec<Answer>, String> {
    let server = Server::start(server, dir, ports)?;
    server.wait_ready(peers)?;
    let mut play = Play {
        peers,
        dir: dir.to_path_buf(),
        endpoint: server.endpoint(),
        leases: BTreeMap::new(),
        watch: None,
    };
    let mut answers = Vec::new();
    for (index, step) in steps.iter().enumerate() {
        let raw = match step.watch_lines {
            Some(lines) => {
                // Filled in after the next step, which is what the watch is to see.
                play.watch = Some((index, Watch::start(play.command(step), lines)?));
                Answer { code: None, stdout: String::new(), stderr: String::new() }
            }
            None => play.run(step)?,
        };
        answers.push(play.masked(step, raw));
        if step.watch_lines.is_none()
            && let Some((at, watch)) = play.watch.take()
        {
            let seen = watch.finish()?;
            answers[at] = play.masked(&steps[at], seen);
        }
    }
    Ok(answers)
}

impl Play<'_> {
    fn command(&self, step: &Step) -> Command {
        let tool = if step.utility { "etcdutl" } else { "etcdctl" };
        let mut command = Command::new(self.peers.join(tool));
        if !step.utility && !step.args.iter().any(|arg| arg == "--endpoints") {
            command.arg("--endpoints").arg(&self.endpoint);
        }
        for arg in &step.args {
            let mut arg = arg.replace("$DIR", &self.dir.to_string_lossy());
            for (name, id) in &self.leases {
                arg = arg.replace(&format!("${name}"), id);
            }
            command.arg(arg);
        }
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).stdin(Stdio::piped());
        command
    }

    fn run(&mut self, step: &Step) -> Result<Answer, String> {
        let mut child = self.command(step).spawn().map_err(|e| format!("start etcdctl: {e}"))?;
        let mut stdin = child.stdin.take().expect("the input was asked for");
        // A command that ends without reading its input breaks the pipe, which is its own business.
        let _ = stdin.write_all(step.stdin.as_bytes());
        drop(stdin);
        let answer = finish(child, &step.text)?;
        if let (Some(name), Some(id)) = (&step.lease, answer.stdout.split(' ').nth(1)) {
            self.leases.insert(name.clone(), id.to_string());
        }
        Ok(answer)
    }

    /// Takes out what may differ between two servers: paths, lease ids, terms and, if asked for,
    /// every number.
    fn masked(&self, step: &Step, raw: Answer) -> Answer {
        let mask = |text: &str| {
            let mut text = text.replace(&*self.dir.to_string_lossy(), "$DIR");
            for (name, id) in &self.leases {
                text = text.replace(id, &format!("${name}"));
                if let Ok(number) = i64::from_str_radix(id, 16) {
                    text = text.replace(&number.to_string(), &format!("${name}"));
                }
            }
            text = masked_number(&masked_number(&text, "\"raft_term\":"), "\"RaftTerm\" : ");
            if step.utility {
                // Both cover bytes that no client sees, such as random lease ids.
                text = masked_number(&masked_number(&text, "\"hash\":"), "\"totalSize\":");
            }
            if step.likeness == Likeness::Shape { shape(&text) } else { text }
        };
        Answer {
            code: raw.code,
            stdout: mask(&raw.stdout),
            stderr: mask(&without_logs(&raw.stderr)),
        }
    }
}

/// Collects the output of a child that has to end within the patience.
fn finish(mut child: Child, what: &str) -> Result<Answer, String> {
    let mut out = child.stdout.take().expect("the output was asked for");
    let mut err = child.stderr.take().expect("the errors were asked for");
    let reader = std::thread::spawn(move || {
        let mut text = String::new();
        out.read_to_string(&mut text).map(|_| text)
    });
    let errors = std::thread::spawn(move || {
        let mut text = String::new();
        err.read_to_string(&mut text).map(|_| text)
    });
    let deadline = Instant::now() + PATIENCE;
    let code = loop {
        match child.try_wait().map_err(|e| format!("wait for {what}: {e}"))? {
            Some(status) => break status.code(),
            None if Instant::now() > deadline => {
                let _ = child.kill();
                break None;
            }
            None => std::thread::sleep(Duration::from_millis(5)),
        }
    };
    let _ = child.wait();
    let join = |thread: std::thread::JoinHandle<std::io::Result<String>>| {
        thread.join().expect("a reader does not panic").map_err(|e| format!("read {what}: {e}"))
    };
    Ok(Answer { code, stdout: join(reader)?, stderr: join(errors)? })
}

/// A watch that runs until it has printed enough lines.
struct Watch {
    child: Child,
    lines: mpsc::Receiver<String>,
    want: usize,
}

impl Watch {
    fn start(mut command: Command, want: usize) -> Result<Watch, String> {
        let mut child = command
            .stdin(Stdio::null())
            .stderr(Stdio::inherit())
            .spawn()
            .map_err(|e| format!("start a watch: {e}"))?;
        let out = child.stdout.take().expect("the output was asked for");
        let (sender, lines) = mpsc::channel();
        std::thread::spawn(move || {
            for line in BufReader::new(out).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        // etcdctl does not say when its watch stands, so the change it is to see comes later.
        std::thread::sleep(Duration::from_millis(500));
        Ok(Watch { child, lines, want })
    }

    fn finish(mut self) -> Result<Answer, String> {
        let deadline = Instant::now() + PATIENCE;
        let mut stdout = String::new();
        for _ in 0..self.want {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left) {
                Ok(line) => stdout.push_str(&(line + "\n")),
                Err(_) => break,
            }
        }
        self.child.kill().map_err(|e| format!("end a watch: {e}"))?;
        let _ = self.child.wait();
        Ok(Answer { code: None, stdout, stderr: String::new() })
    }
}

impl Answer {
    fn shown(&self) -> String {
        let code = self.code.map_or("none".to_string(), |code| code.to_string());
        let mut text = format!("    exit code {code}\n");
        for line in self.stdout.lines().chain(self.stderr.lines()) {
            text.push_str(&format!("    | {line}\n"));
        }
        text
    }
}

/// etcdctl logs in JSON lines between its messages, etcdutl in lines of tab-separated fields behind
/// the date; their times and addresses always differ.
fn without_logs(text: &str) -> String {
    let is_log = |line: &str| {
        line.starts_with("{\"level\"") || (line.starts_with("20") && line.contains('\t'))
    };
    text.lines().filter(|line| !is_log(line)).map(|line| format!("{line}\n")).collect()
}

fn masked_number(text: &str, before: &str) -> String {
    let mut parts = text.split(before);
    let mut masked = parts.next().unwrap_or_default().to_string();
    for part in parts {
        masked.push_str(before);
        masked.push('#');
        masked.push_str(part.trim_start_matches(|c: char| c.is_ascii_digit()));
    }
    masked
}

/// Words with a digit become # together with a unit behind them, and frames and blanks go, so
/// tables and sizes of other widths stay comparable.
fn shape(text: &str) -> String {
    let mut lines = Vec::new();
    for line in text.lines() {
        let separators = |c: char| " ,|:[]\"=".contains(c);
        let words: Vec<&str> = line
            .split(separators)
            .filter(|word| !word.is_empty() && !word.starts_with(['-', '─', '┌', '├', '└', '+']))
            .map(|word| if word.contains(|c: char| c.is_ascii_digit()) { "#" } else { word })
            .collect();
        let mut line = words.join(" ");
        for unit in ["# B", "# kB", "# MB", "# GB"] {
            line = line.replace(unit, "#");
        }
        lines.push(line);
    }
    lines.join("\n")
}
