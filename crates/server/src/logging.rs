//! Log lines as etcd's: one JSON object per line with level, time, caller, message and fields, or
//! tab-separated text with `--log-format=console`. Log collectors parse these, so the shape is
//! part of the contract. It writes to standard error, standard output or files; it never rotates
//! and never drops a line.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use parking_lot::Mutex;
use serde_json::{Map, Value};
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Metadata, Subscriber};
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;

use crate::config::Config;

/// Libraries that speak too much at `info`; they are heard from `warn` on, unless the level is
/// `debug`.
const QUIET_TARGETS: [&str; 6] = ["openraft", "h2", "hyper", "hyper_util", "rustls", "tonic"];

/// Parts of openraft that repeat themselves at each heartbeat that a member does not answer; the
/// connection to that member says it once. And the storage engine, whose one warning is that it found no
/// program `sync`, on purpose (see `main`). They are heard from `error` on.
const SILENT_TARGETS: [&str; 4] = [
    "sled",
    "openraft::core::heartbeat",
    "openraft::replication",
    "openraft::engine::handler::replication_handler",
];

/// What openraft says of calls that come while it is being stopped; their callers are told, and a
/// consensus core that stopped by itself is logged where that ends the process.
const MUTE_TARGET: &str = "openraft::raft::raft_inner";

/// Where lines go.
enum Output {
    Stderr,
    Stdout,
    File(Mutex<File>),
}

/// Starts logging for the process.
///
/// # Errors
/// A log file that cannot be opened.
pub fn start(config: &Config) -> io::Result<()> {
    let outputs = config.log_outputs.iter().map(|name| open(name)).collect::<io::Result<_>>()?;
    let layer = ZapLayer { outputs: Arc::new(outputs), is_json: config.log_format == "json" };
    install(layer, &config.log_level);
    Ok(())
}

/// Starts logging with the defaults, for what must be said before there are settings.
pub fn start_default() {
    install(ZapLayer { outputs: Arc::new(vec![Output::Stderr]), is_json: true }, "info");
}

fn install(layer: ZapLayer, level: &str) {
    let level = match level {
        "debug" => LevelFilter::DEBUG,
        "info" => LevelFilter::INFO,
        "warn" => LevelFilter::WARN,
        _ => LevelFilter::ERROR,
    };
    let at_most = |most| if level == LevelFilter::DEBUG { level } else { level.min(most) };
    let quiet = QUIET_TARGETS.map(|target| (target, at_most(LevelFilter::WARN)));
    let silent = SILENT_TARGETS.map(|target| (target, at_most(LevelFilter::ERROR)));
    let filter = Targets::new()
        .with_default(level)
        .with_targets(quiet)
        .with_targets(silent)
        .with_target(MUTE_TARGET, at_most(LevelFilter::OFF));
    // A second call (a test in the same process) keeps the first logger.
    let _already_set = tracing_subscriber::registry().with(layer.with_filter(filter)).try_init();
}

/// `systemd/journal` goes to standard error, which systemd reads into the journal.
fn open(name: &str) -> io::Result<Output> {
    Ok(match name {
        "stderr" | "default" | "systemd/journal" => Output::Stderr,
        "stdout" => Output::Stdout,
        path => {
            let path = path.strip_prefix("file://").unwrap_or(path);
            let file = OpenOptions::new().append(true).create(true).mode(0o600).open(path);
            let named = |error: io::Error| io::Error::new(error.kind(), format!("{path}: {error}"));
            Output::File(Mutex::new(file.map_err(named)?))
        }
    })
}

/// Formats an event and writes it to every output in one call.
struct ZapLayer {
    outputs: Arc<Vec<Output>>,
    is_json: bool,
}

impl<S: Subscriber> Layer<S> for ZapLayer {
    fn on_event(&self, event: &Event<'_>, _context: Context<'_, S>) {
        let mut fields = Fields::default();
        event.record(&mut fields);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let time = timestamp(now.as_secs(), now.subsec_micros());
        let line = if self.is_json {
            json_line(event.metadata(), &time, fields)
        } else {
            console_line(event.metadata(), &time, fields)
        };
        for output in self.outputs.iter() {
            // A full disk or a closed pipe must not stop the member.
            let _unwritten = match output {
                Output::Stderr => io::stderr().lock().write_all(line.as_bytes()),
                Output::Stdout => io::stdout().lock().write_all(line.as_bytes()),
                Output::File(file) => file.lock().write_all(line.as_bytes()),
            };
        }
    }
}

/// Fields in the order they were given.
#[derive(Default)]
struct Fields {
    message: String,
    others: Map<String, Value>,
}

impl Fields {
    fn insert(&mut self, field: &Field, value: Value) {
        match field.name() {
            "message" => self.message = value.as_str().map_or(value.to_string(), str::to_owned),
            // Records of the `log` crate carry their origin in fields of this prefix.
            name if name.starts_with("log.") => {}
            name => {
                self.others.insert(name.to_owned(), value);
            }
        }
    }
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.insert(field, format!("{value:?}").into());
    }
    fn record_str(&mut self, field: &Field, value: &str) {
        self.insert(field, value.into());
    }
    fn record_bool(&mut self, field: &Field, value: bool) {
        self.insert(field, value.into());
    }
    fn record_i64(&mut self, field: &Field, value: i64) {
        self.insert(field, value.into());
    }
    fn record_u64(&mut self, field: &Field, value: u64) {
        self.insert(field, value.into());
    }
    fn record_f64(&mut self, field: &Field, value: f64) {
        self.insert(field, value.into());
    }
    fn record_error(&mut self, field: &Field, value: &(dyn std::error::Error + 'static)) {
        self.insert(field, value.to_string().into());
    }
}

fn level(metadata: &Metadata<'_>) -> &'static str {
    match *metadata.level() {
        Level::ERROR => "error",
        Level::WARN => "warn",
        Level::INFO => "info",
        Level::DEBUG | Level::TRACE => "debug",
    }
}

/// `dir/file.rs:NN`, the last two parts of the path as zap gives them.
fn caller(metadata: &Metadata<'_>) -> String {
    let file = metadata.file().unwrap_or("unknown");
    let mut parts = file.rsplitn(3, '/');
    let name = parts.next().unwrap_or(file);
    let short = parts.next().map_or(name.to_owned(), |directory| format!("{directory}/{name}"));
    format!("{short}:{}", metadata.line().unwrap_or(0))
}

fn json_line(metadata: &Metadata<'_>, time: &str, fields: Fields) -> String {
    let text = |value: &str| Value::from(value).to_string();
    let mut line = format!(
        "{{\"level\":\"{}\",\"ts\":\"{time}\",\"caller\":{},\"msg\":{}",
        level(metadata),
        text(&caller(metadata)),
        text(&fields.message)
    );
    for (name, value) in &fields.others {
        line.push(',');
        line.push_str(&text(name));
        line.push(':');
        line.push_str(&value.to_string());
    }
    line.push_str("}\n");
    line
}

fn console_line(metadata: &Metadata<'_>, time: &str, fields: Fields) -> String {
    let mut line = format!("{time}\t{}\t{}\t{}", level(metadata), caller(metadata), fields.message);
    if !fields.others.is_empty() {
        line.push('\t');
        line.push_str(&Value::Object(fields.others).to_string());
    }
    line.push('\n');
    line
}

/// `2006-01-02T15:04:05.000000Z` from seconds since 1970, by the civil-from-days algorithm.
fn timestamp(seconds: u64, micros: u32) -> String {
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    // Counting from 0000-03-01 puts the leap day at the end of the year.
    let days = days + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let (hour, minute, second) = (second / 3_600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{micros:06}Z")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timestamps_are_right_around_leap_days() {
        let cases = [
            (0, "1970-01-01T00:00:00.000000Z"),
            (951_782_400, "2000-02-29T00:00:00.000000Z"),
            (951_868_800, "2000-03-01T00:00:00.000000Z"),
            (1_709_164_800, "2024-02-29T00:00:00.000000Z"),
            (1_735_689_599, "2024-12-31T23:59:59.000000Z"),
        ];
        for (seconds, text) in cases {
            assert_eq!(timestamp(seconds, 0), text);
        }
        assert_eq!(timestamp(1, 42), "1970-01-01T00:00:01.000042Z");
    }

    #[test]
    fn lines_are_json_with_fields_after_the_message() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("log");
        let name = path.display().to_string();
        let outputs = Arc::new(vec![open(&name).expect("a file")]);
        let subscriber = tracing_subscriber::registry().with(ZapLayer { outputs, is_json: true });
        tracing::subscriber::with_default(subscriber, || {
            tracing::warn!("member-id" = "8e9e", took = 3u64, "slow \"disk\"");
        });
        let text = std::fs::read_to_string(path).expect("a log");
        let line: Value = serde_json::from_str(&text).expect("one JSON object");
        assert_eq!(line["level"], "warn");
        assert_eq!(line["msg"], "slow \"disk\"");
        assert_eq!(line["member-id"], "8e9e");
        assert_eq!(line["took"], 3);
        assert!(line["caller"].as_str().is_some_and(|text| text.starts_with("src/logging.rs:")));
        assert!(line["ts"].as_str().is_some_and(|text| text.ends_with('Z')));
    }
}
