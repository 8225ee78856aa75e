//! Where settings come from: Go-style command line, `ETCD_*` environment, or a config file that
//! replaces both. Decides between two spellings of one setting and says which exit code a
//! mistake has. It touches nothing but the config file.

use std::collections::{BTreeMap, BTreeSet};

use super::flags::{self, Effect, FLAGS, OldName};
use super::value::{Kind, Value, parse_duration};
use super::{Config, check, file};
use crate::limits::PROGRESS_NOTIFY_MIN;

/// What the command line asks for.
#[derive(Debug)]
pub enum Command {
    /// `--help`.
    Help,
    /// `--version`.
    Version,
    /// Start a member with these settings.
    Run(Box<Loaded>),
}

/// Checked settings, and what the log should say about them.
#[derive(Debug)]
pub struct Loaded {
    /// The settings.
    pub config: Config,
    /// To be logged once logging stands.
    pub notices: Vec<Notice>,
}

/// One line for the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Notice {
    /// Whether it is a warning rather than information.
    pub is_warning: bool,
    /// The message.
    pub message: String,
    /// Name of the one field, empty for none.
    pub field: &'static str,
    /// Value of that field.
    pub value: String,
}

impl Notice {
    fn warning(message: impl Into<String>, field: &'static str, value: impl Into<String>) -> Self {
        Self { is_warning: true, message: message.into(), field, value: value.into() }
    }

    pub(super) fn unknown_key(name: &str) -> Self {
        Self::warning("unknown key in the config file", "key", name)
    }

    fn info(message: impl Into<String>, field: &'static str, value: impl Into<String>) -> Self {
        Self { is_warning: false, message: message.into(), field, value: value.into() }
    }
}

/// Why there are no settings.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Failure {
    /// Unknown flag or a value that does not parse: exit code 2, with a hint at `--help`.
    Usage(String),
    /// Everything else: exit code 1.
    Invalid(Notice),
}

impl Failure {
    pub(super) fn invalid(message: impl Into<String>) -> Self {
        Self::Invalid(Notice::warning(message, "", ""))
    }

    /// The exit code etcd uses.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Usage(_) => 2,
            Self::Invalid(_) => 1,
        }
    }
}

/// Reads settings as etcd does: command line, then environment for what was not given there; or
/// a config file instead of both. `arguments` is without the program's name.
///
/// # Errors
/// [`Failure::Usage`] for a command line that does not parse, [`Failure::Invalid`] for anything
/// wrong in environment, file or the combination of settings.
pub fn load(
    arguments: &[String],
    environment: impl IntoIterator<Item = (String, String)>,
) -> Result<Command, Failure> {
    let environment: BTreeMap<String, String> = environment
        .into_iter()
        .filter(|(name, value)| name.starts_with("ETCD_") && !value.is_empty())
        .collect();
    let mut settings = Settings::default();
    let stray = match parse_arguments(arguments, &mut settings)? {
        Parsed::Help => return Ok(Command::Help),
        Parsed::Version => return Ok(Command::Version),
        Parsed::Flags { stray } => stray,
    };
    if let Some(stray) = stray {
        return Err(Failure::invalid(format!("\"{stray}\" is not a valid flag")));
    }
    let file_from_flag = settings.config.config_file.clone();
    let file_from_env = environment.get("ETCD_CONFIG_FILE").cloned().unwrap_or_default();
    let path = if file_from_flag.is_empty() { file_from_env } else { file_from_flag };
    if path.is_empty() {
        settings.read_environment(&environment)?;
    } else {
        settings = Settings::default();
        settings.notices.push(Notice::info(
            "loading server configuration from file; flags and environment variables are ignored",
            "path",
            path.clone(),
        ));
        file::read(&path, &mut settings)?;
        settings.config.config_file = path;
    }
    settings.finish().map(|loaded| Command::Run(Box::new(loaded)))
}

/// Settings while they are being read.
#[derive(Default)]
pub(super) struct Settings {
    pub(super) config: Config,
    /// Canonical names of what was set, and the name each was set by.
    set: BTreeMap<&'static str, String>,
    /// Gates set by their old boolean flags: that flag, the gate, its value. Joined with
    /// `--feature-gates` at the end, since either may be read first.
    old_gates: Vec<(String, &'static str, bool)>,
    pub(super) notices: Vec<Notice>,
}

/// Why one setting could not be taken.
pub(super) enum SetError {
    Unknown,
    Value(String),
    Conflict(String),
}

impl Settings {
    /// Whether a setting was given at all; takes the current name of it.
    pub(super) fn is_set(&self, name: &str) -> bool {
        self.set.contains_key(name)
    }

    /// Takes one setting by any of its names; the last one given wins, as in Go.
    pub(super) fn set(&mut self, name: &str, text: &str) -> Result<(), SetError> {
        if let Some(flag) = flags::find(name) {
            return self.set_flag(flag.name, name, text);
        }
        match flags::find_old(name).ok_or(SetError::Unknown)? {
            OldName::Flag(new) => {
                self.notices.push(Notice::warning(
                    format!("--{name} is an old name, use --{new}"),
                    "flag",
                    name,
                ));
                self.set_flag(new, name, text)
            }
            OldName::Gate(gate) => self.set_old_gate(name, gate, text),
            OldName::OnlyValue(only) if text.is_empty() || text == only => Ok(()),
            OldName::OnlyValue(_) => Err(SetError::Conflict(format!(
                "--{name}={text} is not supported: this part of etcd 2 no longer exists"
            ))),
            OldName::Gone(_) => {
                self.notices.push(Notice::warning(
                    format!("--{name} is accepted without effect: it no longer exists in etcd"),
                    "flag",
                    name,
                ));
                Ok(())
            }
        }
    }

    fn set_flag(&mut self, name: &'static str, given: &str, text: &str) -> Result<(), SetError> {
        if let Some(before) = self.set.get(name)
            && before != given
        {
            return Err(SetError::Conflict(format!(
                "cannot specify both flags: --{before} and --{given}"
            )));
        }
        let flag = flags::find(name).ok_or(SetError::Unknown)?;
        let choices = flags::CHOICES.iter().find(|(flag, _)| *flag == name);
        if choices.is_some_and(|(_, choices)| !choices.contains(&text)) {
            return Err(SetError::Value(format!("invalid value \"{text}\"")));
        }
        (flag.parse)(&mut self.config, text).map_err(SetError::Value)?;
        self.set.insert(name, given.to_owned());
        Ok(())
    }

    fn set_old_gate(&mut self, name: &str, gate: &'static str, text: &str) -> Result<(), SetError> {
        let enabled = bool::parse(text).map_err(SetError::Value)?;
        self.notices.push(Notice::warning(
            format!("--{name} is an old name, use --feature-gates={gate}={text}"),
            "flag",
            name,
        ));
        self.old_gates.retain(|(old, ..)| old != name);
        self.old_gates.push((name.to_owned(), gate, enabled));
        Ok(())
    }

    /// Applies the old booleans to the gates.
    fn join_gates(&mut self) -> Result<(), Failure> {
        for (old, gate, enabled) in std::mem::take(&mut self.old_gates) {
            if self.config.feature_gates.is_set(gate) {
                return Err(Failure::invalid(format!(
                    "cannot specify both flags: --{old}={enabled} and --feature-gates={gate}"
                )));
            }
            self.config.feature_gates.set(gate, enabled).map_err(Failure::invalid)?;
        }
        Ok(())
    }

    /// Takes from the environment what the command line left open.
    fn read_environment(&mut self, environment: &BTreeMap<String, String>) -> Result<(), Failure> {
        let from_command_line: BTreeSet<&'static str> = self.set.keys().copied().collect();
        let gates_from_command_line: Vec<&'static str> =
            self.old_gates.iter().map(|(_, gate, _)| *gate).collect();
        for (variable, text) in environment {
            if matches!(variable.as_str(), "ETCD_VERSION" | "ETCD_UNSUPPORTED_ARCH") {
                continue;
            }
            let name = variable["ETCD_".len()..].to_ascii_lowercase().replace('_', "-");
            let canonical = canonical(&name);
            let shadowed = canonical.is_some_and(|name| from_command_line.contains(name))
                || matches!(flags::find_old(&name), Some(OldName::Gate(gate))
                    if gates_from_command_line.contains(&gate));
            if shadowed {
                return Err(Failure::Invalid(Notice::warning(
                    "conflicting environment variable is shadowed by corresponding command-line \
                     flag (either unset environment variable or disable flag))",
                    "environment-variable",
                    variable,
                )));
            }
            match self.set(&name, text) {
                Ok(()) => self.notices.push(Notice::info(
                    "recognized and used environment variable",
                    "environment-variable",
                    variable,
                )),
                Err(SetError::Unknown) => self.notices.push(Notice::warning(
                    "unrecognized environment variable",
                    "environment-variable",
                    variable,
                )),
                Err(SetError::Value(error)) => {
                    return Err(Failure::invalid(format!(
                        "invalid value \"{text}\" for {variable}: {error}"
                    )));
                }
                Err(SetError::Conflict(error)) => return Err(Failure::invalid(error)),
            }
        }
        Ok(())
    }

    /// Checks the whole and fills in what follows from other settings.
    fn finish(mut self) -> Result<Loaded, Failure> {
        self.join_gates()?;
        for flag in FLAGS.iter() {
            if !self.is_set(flag.name) {
                continue;
            }
            if let Some((_, text)) = flags::DEPRECATED.iter().find(|(name, _)| *name == flag.name) {
                self.notices.push(Notice::warning(*text, "flag", flag.name));
            }
            let changed = (flag.show)(&self.config) != (flag.show)(&Config::default());
            let reason = match flag.effect {
                Effect::Full => None,
                Effect::None(reason) | Effect::Later(reason) => changed.then_some(reason),
            };
            if let Some(reason) = reason {
                self.notices.push(Notice::warning(
                    format!("--{} is accepted without effect: {reason}", flag.name),
                    "flag",
                    flag.name,
                ));
            }
        }
        for (gate, reason) in self.config.feature_gates.without_effect() {
            self.notices.push(Notice::warning(
                format!("feature gate {gate} is accepted without effect: {reason}"),
                "feature-gate",
                gate,
            ));
        }
        let notify = self.config.watch_progress_notify_interval;
        if !notify.is_zero() && notify < PROGRESS_NOTIFY_MIN {
            self.notices.push(Notice::warning(
                format!("--watch-progress-notify-interval is raised to {PROGRESS_NOTIFY_MIN:?}"),
                "flag",
                "watch-progress-notify-interval",
            ));
        }
        check::fill_in(&mut self);
        check::check(&self)?;
        Ok(Loaded { config: self.config, notices: self.notices })
    }
}

/// The current name of a flag given by its current or old name.
fn canonical(name: &str) -> Option<&'static str> {
    match flags::find_old(name) {
        Some(OldName::Flag(new)) => Some(new),
        _ => flags::find(name).map(|flag| flag.name),
    }
}

enum Parsed {
    Help,
    Version,
    Flags { stray: Option<String> },
}

/// Go's flag syntax: one or two dashes, `=value` or the next argument, booleans only with `=`,
/// and the first argument that is no flag ends it.
fn parse_arguments(arguments: &[String], settings: &mut Settings) -> Result<Parsed, Failure> {
    let mut wants_version = false;
    let mut rest = arguments.iter();
    while let Some(argument) = rest.next() {
        let Some(body) = argument.strip_prefix('-').filter(|body| !body.is_empty()) else {
            return Ok(Parsed::Flags { stray: Some(argument.clone()) });
        };
        let body = body.strip_prefix('-').unwrap_or(body);
        if body.is_empty() {
            let stray = rest.next().cloned();
            return Ok(if wants_version { Parsed::Version } else { Parsed::Flags { stray } });
        }
        if body.starts_with(['-', '=']) {
            return Err(Failure::Usage(format!("bad flag syntax: {argument}")));
        }
        let (name, value) = match body.split_once('=') {
            Some((name, value)) => (name, Some(value)),
            None => (body, None),
        };
        match name {
            "h" | "help" => return Ok(Parsed::Help),
            "version" => {
                let text = value.unwrap_or("true");
                wants_version = bool::parse(text).map_err(|error| {
                    let text = format!("invalid boolean value \"{text}\" for -version: {error}");
                    Failure::Usage(text)
                })?;
                continue;
            }
            _ => {}
        }
        let kind = kind_of(name)
            .ok_or_else(|| Failure::Usage(format!("flag provided but not defined: -{name}")))?;
        let text = match (value, kind) {
            (Some(value), _) => value,
            (None, Kind::Bool) => "true",
            (None, _) => rest
                .next()
                .ok_or_else(|| Failure::Usage(format!("flag needs an argument: -{name}")))?,
        };
        settings.set(name, text).map_err(|error| refused(name, kind, text, error))?;
    }
    Ok(if wants_version { Parsed::Version } else { Parsed::Flags { stray: None } })
}

/// The words of Go's flag package for a value that was not taken.
fn refused(name: &str, kind: Kind, text: &str, error: SetError) -> Failure {
    match error {
        SetError::Unknown => Failure::Usage(format!("flag provided but not defined: -{name}")),
        SetError::Value(error) if kind == Kind::Bool => {
            Failure::Usage(format!("invalid boolean value \"{text}\" for -{name}: {error}"))
        }
        SetError::Value(error) => {
            Failure::Usage(format!("invalid value \"{text}\" for flag -{name}: {error}"))
        }
        SetError::Conflict(error) => Failure::invalid(error),
    }
}

fn kind_of(name: &str) -> Option<Kind> {
    if let Some(flag) = flags::find(name) {
        return Some(flag.kind);
    }
    Some(match flags::find_old(name)? {
        OldName::Flag(new) => flags::find(new)?.kind,
        OldName::Gate(_) => Kind::Bool,
        OldName::Gone(kind) => kind,
        OldName::OnlyValue(_) => Kind::Text,
    })
}

/// Whether any flag, current or old, has this name.
pub(super) fn is_known(name: &str) -> bool {
    kind_of(name).is_some()
}

/// Text of a config file's scalar for the flag of this name: whole numbers are nanoseconds where
/// a duration is meant.
pub(super) fn file_text(name: &str, text: String) -> String {
    let is_number = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    if kind_of(name) == Some(Kind::Duration) && is_number && parse_duration(&text).is_none() {
        return format!("{text}ns");
    }
    text
}
