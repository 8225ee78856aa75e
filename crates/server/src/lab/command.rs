//! The commands of a running lab, as typed at its standard input, sent over its socket, or bound to
//! a key. It reads words and says nothing about whether a command fits the lab's state.

/// What a user may ask of a running lab.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Command {
    /// Show all members.
    Status {
        /// As JSON.
        json: bool,
    },
    /// Show lines to copy.
    Lines,
    /// Answer once everything serves.
    Wait,
    /// Add a member.
    Add {
        /// Leave it a learner.
        learner: bool,
    },
    /// End one isolation, or all.
    Heal(Option<Who>),
    /// Start all members that do not run.
    StartAll,
    /// Do something to one member.
    On(Action, Who),
    /// End the lab.
    Quit,
}

/// What can be done to one member.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// SIGKILL.
    Kill,
    /// SIGTERM.
    Stop,
    /// Start after an end.
    Start,
    /// Stop, then start.
    Restart,
    /// SIGSTOP.
    Pause,
    /// SIGCONT.
    Resume,
    /// Cut its peer traffic.
    Isolate,
    /// Learner to voter.
    Promote,
    /// Out of the cluster.
    Remove,
}

/// Which member is meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Who {
    /// By number.
    Number(u16),
    /// Whoever leads at that moment.
    Leader,
}

/// All first words, for the help's completeness and the error below.
pub(crate) const WORDS: [&str; 15] = [
    "status", "lines", "wait", "kill", "stop", "start", "restart", "pause", "resume", "isolate",
    "heal", "add", "promote", "remove", "quit",
];

impl Command {
    /// Reads one line.
    ///
    /// # Errors
    /// A text for the user.
    pub(crate) fn parse(line: &str) -> Result<Self, String> {
        let words: Vec<&str> = line.split_whitespace().collect();
        let (&first, rest) = words.split_first().ok_or("an empty command")?;
        let action = match first {
            "status" => return option(first, rest, "--json").map(|json| Self::Status { json }),
            "add" => return option(first, rest, "--learner").map(|learner| Self::Add { learner }),
            "lines" => return alone(first, rest, Self::Lines),
            "wait" => return alone(first, rest, Self::Wait),
            "quit" => return alone(first, rest, Self::Quit),
            "heal" if rest.is_empty() => return Ok(Self::Heal(None)),
            "heal" => return who(first, rest).map(|who| Self::Heal(Some(who))),
            "start" if rest.is_empty() => return Ok(Self::StartAll),
            "kill" => Action::Kill,
            "stop" => Action::Stop,
            "start" => Action::Start,
            "restart" => Action::Restart,
            "pause" => Action::Pause,
            "resume" => Action::Resume,
            "isolate" => Action::Isolate,
            "promote" => Action::Promote,
            "remove" => Action::Remove,
            _ => {
                let words = WORDS.join(" ");
                return Err(format!("the lab knows no command '{first}'; it knows: {words}"));
            }
        };
        who(first, rest).map(|who| Self::On(action, who))
    }
}

fn alone(first: &str, rest: &[&str], command: Command) -> Result<Command, String> {
    if rest.is_empty() { Ok(command) } else { Err(format!("{first} takes nothing behind it")) }
}

fn option(first: &str, rest: &[&str], known: &str) -> Result<bool, String> {
    match rest {
        [] => Ok(false),
        [word] if *word == known => Ok(true),
        _ => Err(format!("{first} takes only {known} behind it")),
    }
}

fn who(first: &str, rest: &[&str]) -> Result<Who, String> {
    let [word] = rest else {
        return Err(format!("{first} needs a member: m2, 2 or leader"));
    };
    if *word == "leader" {
        return Ok(Who::Leader);
    }
    let number = word.strip_prefix('m').unwrap_or(word).parse();
    number.map(Who::Number).map_err(|_| format!("'{word}' is no member; say m2, 2 or leader"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_become_commands() {
        for (line, command) in [
            (" kill  m2 ", Command::On(Action::Kill, Who::Number(2))),
            ("restart 3", Command::On(Action::Restart, Who::Number(3))),
            ("pause leader", Command::On(Action::Pause, Who::Leader)),
            ("heal", Command::Heal(None)),
            ("start", Command::StartAll),
            ("start m2", Command::On(Action::Start, Who::Number(2))),
            ("heal m1", Command::Heal(Some(Who::Number(1)))),
            ("status --json", Command::Status { json: true }),
            ("add", Command::Add { learner: false }),
        ] {
            assert_eq!(Command::parse(line), Ok(command), "{line}");
        }
    }

    #[test]
    fn nonsense_is_refused() {
        for line in ["", "kill m", "kill -1", "kill m1 m2", "quit now", "add --voter", "halt"] {
            assert!(Command::parse(line).is_err(), "{line}");
        }
    }

    #[test]
    fn every_word_is_known() {
        for word in WORDS {
            let known =
                Command::parse(word).is_ok() || Command::parse(&format!("{word} m1")).is_ok();
            assert!(known, "{word}");
        }
    }
}
