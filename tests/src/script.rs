//! Golden scripts: commands, a line `---`, what came back. The expected text was recorded from a real
//! etcd; the same file runs against Kelson. A script starts on an empty store.
//!
//! ```text
//! # A comment; `#!` lines add flags to the server.
//! put a 1
//! range a
//! ---
//! rev=2
//! rev=2 count=1
//!   a=1 mod=2 create=2 version=1
//! ```
//! `restart` (SIGTERM) and `crash` (SIGKILL) start the member again on its data.

use std::path::{Path, PathBuf};

use crate::client::Session;
use crate::server::{Server, root};

/// One block: commands and the text that must come back.
struct Block {
    /// Comment and blank lines before the commands, kept when recording.
    lead: Vec<String>,
    commands: Vec<String>,
    expected: Vec<String>,
}

/// A parsed script.
pub struct Script {
    path: PathBuf,
    flags: Vec<String>,
    blocks: Vec<Block>,
    trail: Vec<String>,
}

/// Every script file below tests/scripts, sorted.
pub fn all() -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut open = vec![root().join("tests/scripts")];
    while let Some(dir) = open.pop() {
        for entry in std::fs::read_dir(&dir).expect("tests/scripts is readable") {
            let path = entry.expect("a directory entry is readable").path();
            if path.is_dir() { open.push(path) } else { found.push(path) }
        }
    }
    found.sort();
    found
}

impl Script {
    /// Parses a file; panics on a malformed one, since scripts are ours.
    pub fn load(path: &Path) -> Script {
        let content = std::fs::read_to_string(path).expect("the script is readable");
        let mut script = Script {
            path: path.to_path_buf(),
            flags: Vec::new(),
            blocks: Vec::new(),
            trail: Vec::new(),
        };
        let mut lines = content.lines().peekable();
        let mut lead = Vec::new();
        while let Some(line) = lines.next() {
            if let Some(flag) = line.strip_prefix("#!") {
                script.flags.push(flag.trim().to_string());
            }
            if line.is_empty() || line.starts_with('#') {
                lead.push(line.to_string());
                continue;
            }
            let mut commands = vec![line.to_string()];
            for line in lines.by_ref() {
                if line == "---" {
                    break;
                }
                commands.push(line.to_string());
            }
            let mut expected = Vec::new();
            while let Some(line) = lines.next_if(|line| !line.is_empty()) {
                expected.push(line.to_string());
            }
            script.blocks.push(Block { lead: std::mem::take(&mut lead), commands, expected });
        }
        script.trail = lead;
        script
    }

    /// Number of commands, each a request with its answer.
    pub fn pairs(&self) -> usize {
        self.blocks
            .iter()
            .flat_map(|block| &block.commands)
            .filter(|command| !command.starts_with('#') && !command.is_empty())
            .count()
    }

    /// Runs the script on a fresh server of `binary`. `Ok` holds the script text with what really
    /// came back, `Err` lists the first differing block.
    pub fn run(&self, binary: &Path) -> (String, Result<(), String>) {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("a runtime can be built");
        let mut server = Server::start(binary, &self.flags);
        let mut text = String::new();
        let mut verdict = Ok(());
        let mut session = runtime.block_on(async { Session::new(&server.endpoint()) });
        for block in &self.blocks {
            let actual = runtime.block_on(run_block(block, &mut server, &mut session));
            for line in block.lead.iter().chain(&block.commands) {
                text.push_str(line);
                text.push('\n');
            }
            text.push_str("---\n");
            for line in &actual {
                text.push_str(line);
                text.push('\n');
            }
            if verdict.is_ok() && actual != block.expected {
                verdict = Err(difference(&self.path, block, &actual, &server));
            }
        }
        for line in &self.trail {
            text.push_str(line);
            text.push('\n');
        }
        (text, verdict)
    }
}

async fn run_block(block: &Block, server: &mut Server, session: &mut Session) -> Vec<String> {
    let mut actual = Vec::new();
    for command in &block.commands {
        if command.starts_with('#') {
            continue;
        }
        match command.as_str() {
            "restart" => {
                server.stop();
                server.spawn();
                session.reconnect(&server.endpoint());
            }
            "crash" => {
                server.kill();
                server.spawn();
                session.reconnect(&server.endpoint());
            }
            command => actual.extend(session.run(command).await),
        }
    }
    actual
}

fn difference(path: &Path, block: &Block, actual: &[String], server: &Server) -> String {
    format!(
        "{}\n  commands:\n    {}\n  expected:\n    {}\n  came back:\n    {}\n  log:\n{}",
        path.display(),
        block.commands.join("\n    "),
        block.expected.join("\n    "),
        actual.join("\n    "),
        server.log_tail()
    )
}
