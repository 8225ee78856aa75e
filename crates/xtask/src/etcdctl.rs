//! Runs the scripts of tests/clients/etcdctl against the server under test and against real etcd,
//! with etcdctl of several releases, and compares what etcdctl prints. The two servers run one
//! after the other on the same ports, so that even member and cluster ids have to agree. It never
//! judges an answer by itself.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use crate::interop::{Server, free_ports};
use crate::peers::ETCDCTLS;
use crate::root;

/// How long one command, or a watch for its lines, may take.
const PATIENCE: Duration = Duration::from_secs(90);

/// How two runs of a line are compared.
#[derive(Clone, Copy, PartialEq)]
enum Likeness {
    Exact,
    Shape,
    /// As `Shape`, in any order: lists are sorted by random ids.
    Words,
    Success,
}

/// What a step does besides running its command to the end.
#[derive(Clone, PartialEq)]
enum Kind {
    Command,
    /// Runs etcdutl.
    Utility,
    /// The output names an id, which is known by this name from here on.
    Id(String),
    /// Runs beside the next step until it has printed so many lines.
    Beside(usize),
    /// Runs beside all steps up to the next `end`.
    Hold,
    /// Runs again and again until it prints so many lines.
    Until(usize),
}

/// The output formats that every command is asked for.
const FORMATS: [&str; 4] = ["simple", "json", "table", "fields"];

#[derive(Clone)]
struct Step {
    line: usize,
    text: String,
    likeness: Likeness,
    kind: Kind,
    args: Vec<String>,
    stdin: String,
    /// Ends what runs since a `hold`, before the step itself.
    ends_hold: bool,
}

/// What a step did: exit code, output, errors without log lines.
#[derive(PartialEq)]
struct Answer {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

/// Compares one script, named without its extension, by every etcdctl at the same time. Returns an
/// outcome for each of them.
pub(crate) fn compare_all(
    script: &str,
    server: &Path,
    peers: &Path,
    scratch: &Path,
) -> Vec<(&'static str, Result<(), String>)> {
    let lost = || Err("the comparison panicked".to_string());
    std::thread::scope(|scope| {
        let start = |etcdctl: &'static str| {
            let dir = scratch.join(etcdctl);
            (etcdctl, scope.spawn(move || compare(script, etcdctl, server, peers, &dir)))
        };
        let runs: Vec<_> = ETCDCTLS.into_iter().map(start).collect();
        let join = |(etcdctl, run): (_, std::thread::ScopedJoinHandle<'_, _>)| {
            (etcdctl, run.join().unwrap_or_else(|_| lost()))
        };
        runs.into_iter().map(join).collect()
    })
}

/// Each run has fresh servers.
fn compare(
    script: &str,
    etcdctl: &str,
    server: &Path,
    peers: &Path,
    scratch: &Path,
) -> Result<(), String> {
    let steps = parse(script, etcdctl)?;
    let scratch = &scratch.join(script);
    let ports = free_ports()?;
    let tools = Tools { peers, etcdctl };
    let ours = play(&steps, server, &tools, &scratch.join("ours"), ports)?;
    let theirs = play(&steps, &peers.join("etcd"), &tools, &scratch.join("etcd"), ports)?;
    let mut differences = Vec::new();
    for ((step, ours), theirs) in steps.iter().zip(&ours).zip(&theirs) {
        let same = match step.likeness {
            Likeness::Success => ours.code == Some(0) && theirs.code == Some(0),
            Likeness::Exact | Likeness::Shape | Likeness::Words => ours == theirs,
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
        println!("{script}.txt: {} steps of {etcdctl} agree", steps.len());
        return Ok(());
    }
    Err(format!(
        "{} of {} steps differ\n{}",
        differences.len(),
        steps.len(),
        differences.join("\n")
    ))
}

fn parse(script: &str, etcdctl: &str) -> Result<Vec<Step>, String> {
    let file = root().join("tests/clients/etcdctl").join(script).with_extension("txt");
    let text = fs::read_to_string(&file).map_err(|e| format!("read {}: {e}", file.display()))?;
    let mut steps: Vec<Step> = Vec::new();
    // Steps that the last line of the script stands for.
    let mut copies = 1;
    let mut ends_hold = false;
    for (index, line) in text.lines().enumerate() {
        let at = |what: &str| format!("{}:{}: {what}", file.display(), index + 1);
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        if let Some(input) = line.strip_prefix('<') {
            let first =
                steps.len().checked_sub(copies).ok_or_else(|| at("input without a command"))?;
            for step in &mut steps[first..] {
                step.stdin.push_str(input.strip_prefix(' ').unwrap_or(input));
                step.stdin.push('\n');
            }
            continue;
        }
        let (but, line) = match line.strip_prefix("not ").and_then(|rest| rest.split_once(' ')) {
            Some((release, line)) => (Some(format!("etcdctl-{release}")), line),
            None => (None, line),
        };
        if but.as_deref() == Some(etcdctl) {
            continue;
        }
        if line == "end" {
            ends_hold = true;
            continue;
        }
        let mut words = split(line).into_iter();
        let mark = words.next().unwrap_or_default();
        let (each, mark) = match mark.strip_prefix("each") {
            Some(rest) => (true, rest),
            None => (false, mark.as_str()),
        };
        let (mark, likeness) = match mark.char_indices().last() {
            Some((end, '=')) => (&mark[..end], Likeness::Exact),
            Some((end, '~')) => (&mark[..end], Likeness::Shape),
            Some((end, '%')) => (&mark[..end], Likeness::Words),
            Some((end, '!')) => (&mark[..end], Likeness::Success),
            _ => (mark, Likeness::Exact),
        };
        let mut number = || {
            let lines = words.next().and_then(|count| count.parse().ok());
            lines.ok_or_else(|| at(&format!("{mark} needs a number")))
        };
        let kind = match mark {
            "" => Kind::Command,
            "utl" => Kind::Utility,
            "beside" => Kind::Beside(number()?),
            "until" => Kind::Until(number()?),
            "hold" => Kind::Hold,
            "id" => Kind::Id(words.next().ok_or_else(|| at("id needs a name"))?),
            other => return Err(at(&format!("unknown mark {other:?}"))),
        };
        let step = Step {
            line: index + 1,
            text: line.to_string(),
            likeness,
            kind,
            args: words.collect(),
            stdin: String::new(),
            ends_hold: std::mem::take(&mut ends_hold),
        };
        if each && step.kind != Kind::Command {
            return Err(at("each goes with a plain command only"));
        }
        copies = if each { FORMATS.len() } else { 1 };
        steps.extend(formats(step, each));
    }
    if ends_hold {
        return Err(format!("{}: nothing follows the last end", file.display()));
    }
    Ok(steps)
}

/// The step itself, or one for each output format.
fn formats(step: Step, each: bool) -> Vec<Step> {
    if !each {
        return vec![step];
    }
    let in_format = |format: &str| {
        let mut step = step.clone();
        step.text.push_str(&format!(" (-w {format})"));
        // In front: behind `--` it would be an argument.
        step.args.insert(0, format!("--write-out={format}"));
        step.ends_hold &= format == FORMATS[0];
        step
    };
    FORMATS.into_iter().map(in_format).collect()
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

/// Where the programs are, and which etcdctl is meant.
struct Tools<'a> {
    peers: &'a Path,
    etcdctl: &'a str,
}

/// One pass over the script with a server of its own.
struct Play<'a> {
    tools: &'a Tools<'a>,
    dir: PathBuf,
    endpoint: String,
    ids: BTreeMap<String, String>,
    /// Index of a step that runs beside the next one.
    beside: Option<(usize, Background)>,
    held: Option<(usize, Background)>,
}

fn play(
    steps: &[Step],
    server: &Path,
    tools: &Tools,
    dir: &Path,
    ports: [u16; 2],
) -> Result<Vec<Answer>, String> {
    let server = Server::start(server, dir, ports)?;
    server.wait_ready(tools.peers)?;
    let mut play = Play {
        tools,
        dir: dir.to_path_buf(),
        endpoint: server.endpoint(),
        ids: BTreeMap::new(),
        beside: None,
        held: None,
    };
    let mut answers: Vec<Answer> = Vec::new();
    let nothing = || Answer { code: None, stdout: String::new(), stderr: String::new() };
    for (index, step) in steps.iter().enumerate() {
        if step.ends_hold
            && let Some((at, held)) = play.held.take()
        {
            answers[at] = play.masked(&steps[at], held.finish()?);
        }
        // What runs in the background is filled in when it has ended.
        let beside = play.beside.take();
        let raw = match step.kind {
            Kind::Beside(lines) => {
                play.beside = Some((index, Background::start(play.command(step), lines)?));
                nothing()
            }
            Kind::Hold => {
                play.held = Some((index, Background::start(play.command(step), 0)?));
                nothing()
            }
            Kind::Until(lines) => play.until(step, lines)?,
            Kind::Command | Kind::Utility | Kind::Id(_) => play.run(step)?,
        };
        answers.push(play.masked(step, raw));
        if let Some((at, background)) = beside {
            answers[at] = play.masked(&steps[at], background.finish()?);
        }
    }
    Ok(answers)
}

impl Play<'_> {
    fn command(&self, step: &Step) -> Command {
        let utility = step.kind == Kind::Utility;
        let tool = if utility { "etcdutl" } else { self.tools.etcdctl };
        let mut command = Command::new(self.tools.peers.join(tool));
        if !utility && !step.args.iter().any(|arg| arg == "--endpoints") {
            // etcdctl 3.4 would make the whole URL the authority of its maintenance calls, which is no
            // authority to HTTP/2 (docs/COMPATIBILITY.md).
            let bare = self.tools.etcdctl == "etcdctl-3.4";
            let endpoint = self.endpoint.trim_start_matches(if bare { "http://" } else { "" });
            command.arg("--endpoints").arg(endpoint);
        }
        for arg in &step.args {
            let mut arg = arg.replace("$DIR", &self.dir.to_string_lossy());
            arg = arg.replace("$ENDPOINT", &self.endpoint);
            for (name, id) in &self.ids {
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
        if let (Kind::Id(name), Some(id)) = (&step.kind, named_id(&answer.stdout)) {
            self.ids.insert(name.clone(), id);
        }
        Ok(answer)
    }

    fn until(&mut self, step: &Step, lines: usize) -> Result<Answer, String> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let answer = self.run(step)?;
            if answer.stdout.lines().count() == lines || Instant::now() > deadline {
                return Ok(answer);
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Takes out what may differ between two servers: paths, ids that a server draws, terms and, if
    /// asked for, every number.
    fn masked(&self, step: &Step, raw: Answer) -> Answer {
        let mask = |text: &str| {
            let mut text = text.replace(&*self.dir.to_string_lossy(), "$DIR");
            for (name, id) in &self.ids {
                text = masked_id(&text, id, name);
            }
            text = masked_number(&masked_number(&text, "\"raft_term\":"), "\"RaftTerm\" : ");
            if step.kind == Kind::Utility {
                // Both cover bytes that no client sees, such as random lease ids.
                for name in ["\"hash\":", "\"totalSize\":", "\"Hash\" : ", "\"Size\" : "] {
                    text = masked_number(&text, name);
                }
            }
            match step.likeness {
                Likeness::Exact | Likeness::Success => text,
                Likeness::Shape => shape(&text),
                Likeness::Words => sorted_words(&shape(&text)),
            }
        };
        Answer {
            code: raw.code,
            stdout: mask(&raw.stdout),
            stderr: mask(&without_logs(&raw.stderr)),
        }
    }
}

/// Puts the name of an id in its place, in hexadecimal and decimal. Some texts of etcdctl 3.4 pad an id
/// that begins with a zero.
fn masked_id(text: &str, id: &str, name: &str) -> String {
    let text = text.replace(&format!(" {id:>16}"), &format!(" ${name}"));
    let text = text.replace(id, &format!("${name}"));
    match u64::from_str_radix(id, 16) {
        Ok(number) => text.replace(&number.to_string(), &format!("${name}")),
        Err(_) => text,
    }
}

/// The id that a new lease or member was given, in hexadecimal, from the output in any format.
fn named_id(stdout: &str) -> Option<String> {
    for before in ["\"ID\":", "\"ID\" : "] {
        if let Some((_, rest)) = stdout.split_once(before) {
            let end = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
            return rest[..end].parse::<u64>().ok().map(|id| format!("{id:x}"));
        }
    }
    let word = stdout.split_whitespace().nth(1)?;
    u64::from_str_radix(word, 16).ok().map(|_| word.to_string())
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

/// A command that runs until it has printed enough lines, such as a watch.
struct Background {
    child: Child,
    lines: mpsc::Receiver<String>,
    want: usize,
}

impl Background {
    fn start(mut command: Command, want: usize) -> Result<Background, String> {
        let mut child = command
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|e| format!("start a command in the background: {e}"))?;
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
        std::thread::sleep(Duration::from_secs(1));
        Ok(Background { child, lines, want })
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
        self.child.kill().map_err(|e| format!("end a command in the background: {e}"))?;
        let _ = self.child.wait();
        let mut stderr = String::new();
        if let Some(mut errors) = self.child.stderr.take() {
            errors.read_to_string(&mut stderr).map_err(|e| format!("read its errors: {e}"))?;
        }
        Ok(Answer { code: None, stdout, stderr })
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

fn sorted_words(text: &str) -> String {
    let mut words: Vec<&str> = text.split_whitespace().collect();
    words.sort_unstable();
    words.join(" ")
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_taken_out_with_its_padding() {
        let id = "bab54101682a3a8";
        for text in ["Member  bab54101682a3a8 gone", "Member bab54101682a3a8 gone"] {
            assert_eq!(masked_id(text, id, "M"), "Member $M gone");
        }
        assert_eq!(masked_id("\"ID\":840858183508599720}", id, "M"), "\"ID\":$M}");
    }
}
