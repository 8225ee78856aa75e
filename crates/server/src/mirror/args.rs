//! The command line of `kelson mirror`: two clusters with the flags that etcdctl has for one. It only
//! reads words and environment; nobody is called here.

use std::time::Duration;

use clap::{Arg, ArgAction, ArgMatches, Command};

const ABOUT: &str = "\
Makes the target follow the source, an etcd or a Kelson, with all revisions kept, until clients are moved.

The target must be empty, or hold an earlier state of the source: restore a snapshot of the source into it
with `kelson snapshot restore`. Nobody else may write to it. Users, roles and members are not followed; a
snapshot brings users and roles as they were.

To move over: stop what writes to the source, wait until the lag is 0, end this program with Ctrl-C (SIGINT
or SIGTERM). It compares both and exits with 0 only if they hold the same. Then start the clients on the
target; it keeps its leases for their whole time from then on.";

/// Flags of one cluster: name, what it is for. Each exists for the source and for the target.
const OF_A_SIDE: [(&str, &str, &str); 4] = [
    ("cacert", "FILE", "authorities that its certificates must come from"),
    ("cert", "FILE", "client certificate"),
    ("key", "FILE", "private key of that certificate"),
    ("user", "NAME:PASSWORD", "who to be there, if it has users; root can do all that is needed"),
];

/// One of the two clusters.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Side {
    /// `source` or `target`.
    pub(crate) name: &'static str,
    /// Client URLs.
    pub(crate) endpoints: Vec<String>,
    /// Files of its TLS; empty where there is none.
    pub(crate) cacert: String,
    pub(crate) cert: String,
    pub(crate) key: String,
    /// Name and password.
    pub(crate) user: Option<(String, String)>,
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Settings {
    pub(crate) source: Side,
    pub(crate) target: Side,
    /// Ends by itself once both are equal, instead of at a signal.
    pub(crate) is_once: bool,
    /// Time between two comparisons of everything; zero is never, but at both ends.
    pub(crate) check_interval: Duration,
}

/// What the command line asks for.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Asked {
    /// A text to print.
    Help(String),
    /// A run.
    Mirror(Box<Settings>),
}

/// Reads the words behind `kelson mirror`.
///
/// # Errors
/// A text for the user: what is wrong with which word.
pub(crate) fn parse(words: &[String]) -> Result<Asked, String> {
    let all = std::iter::once("kelson mirror".to_owned()).chain(words.iter().cloned());
    let found = match command().try_get_matches_from(all) {
        Ok(found) => found,
        Err(error) if error.use_stderr() => return Err(error.to_string()),
        Err(help) => return Ok(Asked::Help(help.to_string())),
    };
    let seconds = text(&found, "check-interval");
    let seconds: u64 = seconds
        .parse()
        .map_err(|_| format!("--check-interval takes a number of seconds, not {seconds:?}"))?;
    Ok(Asked::Mirror(Box::new(Settings {
        source: side(&found, "source")?,
        target: side(&found, "target")?,
        is_once: found.get_flag("until-caught-up"),
        check_interval: Duration::from_secs(seconds),
    })))
}

fn command() -> Command {
    let mut command = Command::new("kelson mirror").about(ABOUT).no_binary_name(false);
    for name in ["source", "target"] {
        let urls = Arg::new(name).long(name).value_name("URLS").required(true);
        command = command.arg(urls.help(format!("client URLs of the {name}, with commas between")));
        for (flag, value, help) in OF_A_SIDE {
            let flag: &'static str = format!("{name}-{flag}").leak();
            command = command.arg(Arg::new(flag).long(flag).value_name(value).help(help));
        }
    }
    command
        .arg(
            Arg::new("until-caught-up")
                .long("until-caught-up")
                .action(ArgAction::SetTrue)
                .help("end as soon as both hold the same"),
        )
        .arg(
            Arg::new("check-interval")
                .long("check-interval")
                .value_name("SECONDS")
                .default_value("600")
                .help("time between two comparisons of all keys, which cost a read of both; 0: never"),
        )
        .after_help(
            "The environment variables KELSON_SOURCE_USER and KELSON_TARGET_USER keep passwords out of \
             the list of processes.",
        )
}

fn text(found: &ArgMatches, flag: &str) -> String {
    found.get_one::<String>(flag).cloned().unwrap_or_default()
}

fn side(found: &ArgMatches, name: &'static str) -> Result<Side, String> {
    let of = |flag: &str| text(found, &format!("{name}-{flag}"));
    let endpoints: Vec<String> =
        text(found, name).split(',').filter(|url| !url.is_empty()).map(with_scheme).collect();
    if endpoints.is_empty() {
        return Err(format!("--{name} needs at least one URL, as in http://127.0.0.1:2379"));
    }
    let (cert, key) = (of("cert"), of("key"));
    if cert.is_empty() != key.is_empty() {
        return Err(format!("--{name}-cert and --{name}-key belong together"));
    }
    let variable = format!("KELSON_{}_USER", name.to_uppercase());
    let user = match of("user") {
        empty if empty.is_empty() => std::env::var(&variable).unwrap_or_default(),
        user => user,
    };
    let user = match user.split_once(':') {
        _ if user.is_empty() => None,
        Some((name, password)) => Some((name.to_owned(), password.to_owned())),
        None => return Err(format!("--{name}-user (or {variable}) takes NAME:PASSWORD")),
    };
    Ok(Side { name, endpoints, cacert: of("cacert"), cert, key, user })
}

/// As etcdctl does, an address alone is taken for plain HTTP.
fn with_scheme(url: &str) -> String {
    if url.contains("://") { url.to_owned() } else { format!("http://{url}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(line: &str) -> Vec<String> {
        line.split_whitespace().map(str::to_owned).collect()
    }

    #[test]
    fn two_clusters_have_flags_of_their_own() {
        let line = "--source https://a:2379,b:2379 --source-cacert ca --source-cert c --source-key k \
                    --target c:1 --target-user root:a:b --until-caught-up --check-interval 0";
        let Ok(Asked::Mirror(settings)) = parse(&words(line)) else { panic!("it is understood") };
        assert_eq!(settings.source.endpoints, ["https://a:2379", "http://b:2379"]);
        assert_eq!(settings.source.cacert, "ca");
        assert_eq!(settings.target.endpoints, ["http://c:1"]);
        assert_eq!(settings.target.user, Some(("root".into(), "a:b".into())));
        assert!(settings.is_once && settings.check_interval.is_zero());
    }

    #[test]
    fn what_is_missing_is_named() {
        let refused = |line: &str| parse(&words(line)).expect_err("it is refused");
        assert!(refused("--target b:1").contains("--source"));
        assert!(refused("--source , --target b:1").contains("--source needs at least one URL"));
        let half = "--source a:1 --target b:1 --source-cert c";
        assert!(refused(half).contains("--source-cert and --source-key"));
        assert!(refused("--source a:1 --target b:1 --target-user me").contains("NAME:PASSWORD"));
        assert!(refused("--source a:1 --target b:1 --check-interval x").contains("\"x\""));
        let Ok(Asked::Help(text)) = parse(&words("--help")) else { panic!("a text") };
        assert!(text.contains("--source-cacert"), "{text}");
    }
}
