//! The command line of `kelson lab`: flags that start a lab, or a command for one that runs. It
//! only reads words; nothing is looked up on disk here.

use super::command::Command;

/// Folder of a lab when none is named.
const DIR: &str = "kelson-lab";

/// First port of a lab when none is named.
pub(crate) const BASE_PORT: u16 = 23790;

/// Most members at one time: what the number keys reach. Raft clusters beyond seven gain nothing.
pub(crate) const MEMBERS_MAX: usize = 9;

/// Members of a new lab when no number is given.
pub(crate) const MEMBERS: usize = 3;

/// Highest first port: every number a member can have still finds its ports above it.
const BASE_PORT_MAX: u16 = 64_000;

/// What `kelson lab --help` prints.
pub(crate) const HELP: &str = "\
A cluster on this machine: members as processes of this program, data in one folder.

Usage:

  kelson lab [flags] [-- server flags]   start a lab, or bring back the one in the folder
  kelson lab [--dir DIR] COMMAND         talk to the running lab from another shell

Flags:

  --members 3         members of a new lab, 1 to 9; odd numbers are what you want
  --dir 'kelson-lab'  the folder with data, logs, certificates and the control socket
  --tls               make a CA and certificates; clients and members must show theirs
  --base-port 23790   member n takes four ports from here + 10 * (n - 1) on 127.0.0.1:
                      clients, peers as advertised, peers behind the lab's links, metrics
  --server-bin PATH   run this server instead, Kelson or etcd
  --reset             stop remembering: delete what a lab left in the folder and start anew
  --plain             lines instead of the live view, also in a terminal
  -h, --help          this text

What stands behind -- goes to every member as it is, e.g. -- --heartbeat-interval=50.
The folder remembers all of this; a lab that is started again needs only --dir.

Commands (MEMBER is m2, 2, or the word leader):

  status [--json]     one line per member
  lines               lines to copy for etcdctl and kube-apiserver
  wait                return once all members serve and follow one leader
  kill MEMBER         end its process at once (SIGKILL)
  stop MEMBER         let it stop in order (SIGTERM)
  start [MEMBER]      start it after kill or stop, or all that do not run
  restart MEMBER      stop it in order, then start it
  pause MEMBER        freeze its process (SIGSTOP)
  resume MEMBER       let it go on
  isolate MEMBER      cut it off from all other members; clients still reach it
  heal [MEMBER]       end its isolation, or everyone's
  add [--learner]     add a member: a learner first, promoted once it has caught up;
                      with --learner it stays one
  promote MEMBER      make a learner a voting member
  remove MEMBER       take it out of the cluster and delete its data
  quit                stop all members in order and end the lab; the data stays

Without a terminal, or with --plain, the same commands are read from standard input.
When the lab itself is killed, its members are killed with it.
";

/// What the command line asks for.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Asked {
    /// The text above.
    Help,
    /// Run a lab.
    Start(Start),
    /// Send a command to the lab that runs in `dir`.
    Tell {
        /// Its folder.
        dir: String,
        /// The command's words.
        line: String,
    },
}

/// How to start; `None` means: as the folder remembers, else the default.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Start {
    /// The folder.
    pub(crate) dir: String,
    /// Number of members.
    pub(crate) members: Option<usize>,
    /// Certificates for everything.
    pub(crate) tls: bool,
    /// First port.
    pub(crate) base_port: Option<u16>,
    /// The server's program.
    pub(crate) server_bin: Option<String>,
    /// Delete what is there.
    pub(crate) reset: bool,
    /// No live view.
    pub(crate) plain: bool,
    /// Flags for every member; `None` when there was no `--`.
    pub(crate) server_flags: Option<Vec<String>>,
}

/// Reads the words behind `kelson lab`.
///
/// # Errors
/// A text for the user: what is wrong with which word.
pub(crate) fn parse(words: &[String]) -> Result<Asked, String> {
    let mut start = Start { dir: DIR.to_owned(), ..Start::default() };
    let mut starting = None;
    let mut rest = words.iter();
    while let Some(word) = rest.next() {
        if word == "--" {
            start.server_flags = Some(checked_server_flags(rest.as_slice())?);
            return Ok(Asked::Start(start));
        }
        if !word.starts_with('-') {
            let command = std::iter::once(word).chain(rest).cloned().collect::<Vec<_>>().join(" ");
            Command::parse(&command)?;
            return match starting {
                Some(flag) => Err(format!("{flag} starts a lab; it cannot go with '{command}'")),
                None => Ok(Asked::Tell { dir: start.dir, line: command }),
            };
        }
        let (name, attached) = match word.split_once('=') {
            Some((name, value)) => (name, Some(value)),
            None => (word.as_str(), None),
        };
        if !matches!(name, "--dir" | "-h" | "--help") {
            starting = Some(name);
        }
        if switch(&mut start, name, attached)? {
            continue;
        }
        match name {
            "-h" | "--help" => return Ok(Asked::Help),
            "--dir" | "--members" | "--base-port" | "--server-bin" => {}
            _ => return Err(format!("kelson lab knows no flag {name}")),
        }
        let value = attached.or_else(|| rest.next().map(String::as_str));
        let value = value.filter(|value| !value.is_empty());
        set(&mut start, name, value.ok_or_else(|| format!("{name} needs a value"))?)?;
    }
    Ok(Asked::Start(start))
}

/// Sets a flag that takes no value; false when `name` is none of these.
fn switch(start: &mut Start, name: &str, attached: Option<&str>) -> Result<bool, String> {
    let field = match name {
        "--tls" => &mut start.tls,
        "--reset" => &mut start.reset,
        "--plain" => &mut start.plain,
        _ => return Ok(false),
    };
    *field = match attached {
        None | Some("true") => true,
        Some("false") => false,
        Some(other) => return Err(format!("{name} is on or off; it cannot be '{other}'")),
    };
    Ok(true)
}

fn set(start: &mut Start, name: &str, value: &str) -> Result<(), String> {
    match name {
        "--dir" => start.dir = value.to_owned(),
        "--server-bin" => start.server_bin = Some(value.to_owned()),
        "--members" => {
            let members = value.parse().ok().filter(|members| (1..=MEMBERS_MAX).contains(members));
            let text = || format!("--members must be a number from 1 to {MEMBERS_MAX}: '{value}'");
            start.members = Some(members.ok_or_else(text)?);
        }
        _ => {
            let port = value.parse().ok().filter(|port| (1..=BASE_PORT_MAX).contains(port));
            let text = || format!("--base-port must be from 1 to {BASE_PORT_MAX}: '{value}'");
            start.base_port = Some(port.ok_or_else(text)?);
        }
    }
    Ok(())
}

/// The flags that the lab itself gives to members; a second value would only break them.
const OURS: [&str; 10] = [
    "name",
    "data-dir",
    "listen-client-urls",
    "advertise-client-urls",
    "listen-peer-urls",
    "initial-advertise-peer-urls",
    "listen-metrics-urls",
    "initial-cluster",
    "initial-cluster-state",
    "initial-cluster-token",
];

fn checked_server_flags(flags: &[String]) -> Result<Vec<String>, String> {
    for flag in flags {
        let name = flag.trim_start_matches('-').split('=').next().unwrap_or_default();
        if OURS.contains(&name) {
            return Err(format!("--{name} is the lab's own business; leave it out"));
        }
    }
    Ok(flags.to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse_of(line: &str) -> Result<Asked, String> {
        parse(&line.split_whitespace().map(str::to_owned).collect::<Vec<_>>())
    }

    #[test]
    fn flags_start_a_lab_and_words_command_one() {
        let Ok(Asked::Start(start)) =
            parse_of("--members=5 --dir d --tls --base-port 4000 -- --heartbeat-interval=50")
        else {
            panic!("a start");
        };
        assert_eq!((start.members, start.dir.as_str(), start.tls), (Some(5), "d", true));
        assert_eq!(start.base_port, Some(4000));
        assert_eq!(start.server_flags, Some(vec!["--heartbeat-interval=50".to_owned()]));
        assert_eq!(
            parse_of("--dir x kill leader"),
            Ok(Asked::Tell { dir: "x".into(), line: "kill leader".into() })
        );
        assert_eq!(parse_of("--members 3 --help"), Ok(Asked::Help));
    }

    #[test]
    fn wrong_words_are_named() {
        for (line, part) in [
            ("--member 3", "no flag --member"),
            ("--members", "--members needs a value"),
            ("--members 0", "from 1 to 9"),
            ("--members ten", "from 1 to 9"),
            ("--base-port 65000", "--base-port"),
            ("--tls=maybe", "on or off"),
            ("--reset kill m1", "--reset starts a lab"),
            ("kil m1", "no command 'kil'"),
            ("kill", "kill needs a member"),
            ("-- --name=x", "--name is the lab's"),
        ] {
            let error = parse_of(line).expect_err(line);
            assert!(error.contains(part), "{line}: {error}");
        }
    }

    #[test]
    fn help_names_every_command() {
        for word in super::super::command::WORDS {
            assert!(HELP.contains(&format!("\n  {word} ")), "{word}");
        }
    }
}
