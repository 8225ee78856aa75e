//! What probes ask: `/health` in etcd's old form, `/livez` and `/readyz` with their checks. Each
//! check looks at the member as a client would; none of them is remembered.

use http::{Method, Request, StatusCode};
use kelson_api::etcdserverpb::{AlarmType, RangeRequest};

use super::{Shared, error, method_not_allowed, with_type};
use crate::app::App;
use crate::listen::HttpResponse;

/// Text type of all answers here.
const TEXT: &str = "text/plain; charset=utf-8";

/// What a check says while the member replays its log.
const STARTING: &str = "the member is starting";

/// One check of `/livez` or `/readyz`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Check {
    DataCorruption,
    SerializableRead,
    LinearizableRead,
    NonLearner,
}

/// Why a member that was just added is not healthy yet.
const AWAITS_VOTE: &str = "the member has no vote yet: it has still to catch up";

const LIVE: [Check; 1] = [Check::SerializableRead];
const READY: [Check; 4] =
    [Check::DataCorruption, Check::SerializableRead, Check::LinearizableRead, Check::NonLearner];

/// The checks of a path, `None` for a path of something else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Checks {
    kind: &'static str,
    checks: &'static [Check],
}

/// Resolves `/livez`, `/readyz` and their sub-paths with one check.
pub(super) fn checks_of(path: &str) -> Option<Checks> {
    let (head, name) = match path.strip_prefix('/')?.split_once('/') {
        Some((head, name)) => (head, Some(name)),
        None => (path.strip_prefix('/')?, None),
    };
    let (kind, checks): (_, &'static [Check]) = match head {
        "livez" => ("livez", &LIVE),
        "readyz" => ("readyz", &READY),
        _ => return None,
    };
    let checks = match name {
        None => checks,
        Some(name) => {
            let index = checks.iter().position(|check| check.name() == name)?;
            &checks[index..=index]
        }
    };
    Some(Checks { kind, checks })
}

/// Runs the checks of a path that `exclude` does not name.
pub(super) async fn report<B>(
    shared: &Shared,
    request: &Request<B>,
    Checks { kind, checks }: Checks,
) -> HttpResponse {
    if request.method() != Method::GET {
        return method_not_allowed();
    }
    let query = request.uri().query().unwrap_or_default();
    let excluded: Vec<&str> = values(query, "exclude").collect();
    let is_verbose = values(query, "verbose").next().is_some();
    let mut text = String::new();
    let mut is_fine = true;
    for check in checks.iter().filter(|check| !excluded.contains(&check.name())) {
        let result = match shared.app.get() {
            Some(app) => check.run(app).await,
            None => Err(STARTING.to_owned()),
        };
        count(shared, kind, *check, result.is_ok());
        match result {
            Ok(()) => text.push_str(&format!("[+]{} ok\n", check.name())),
            Err(reason) => {
                is_fine = false;
                text.push_str(&format!("[-]{} failed: {reason}\n", check.name()));
            }
        }
    }
    if !is_fine {
        tracing::warn!(path = kind, report = text, "Health check error");
        return error(StatusCode::SERVICE_UNAVAILABLE, &text);
    }
    if !is_verbose {
        text.clear();
    }
    text.push_str("ok\n");
    with_type(TEXT, text)
}

fn count(shared: &Shared, kind: &str, check: Check, is_fine: bool) {
    let metrics = &shared.metrics;
    let last = metrics.server_healthcheck.with_label_values(&[kind, check.name()]);
    last.set(i64::from(is_fine));
    let status = if is_fine { "success" } else { "error" };
    metrics.server_healthchecks.with_label_values(&[kind, check.name(), status]).inc();
}

impl Check {
    fn name(self) -> &'static str {
        match self {
            Self::DataCorruption => "data_corruption",
            Self::SerializableRead => "serializable_read",
            Self::LinearizableRead => "linearizable_read",
            Self::NonLearner => "non_learner",
        }
    }

    async fn run(self, app: &App) -> Result<(), String> {
        match self {
            Self::DataCorruption => {
                let is_corrupt =
                    app.reader.alarms().iter().any(|row| row.alarm() == AlarmType::Corrupt);
                if is_corrupt { Err("alarm activated: CORRUPT".to_owned()) } else { Ok(()) }
            }
            Self::SerializableRead => read(app, true).await,
            Self::LinearizableRead => read(app, false).await,
            Self::NonLearner => {
                let status = app.node.status();
                if status.awaits_vote {
                    return Err(AWAITS_VOTE.to_owned());
                }
                if status.is_learner { Err("not supported for learner".to_owned()) } else { Ok(()) }
            }
        }
    }
}

/// A range of one key, as a client would ask for it.
async fn read(app: &App, serializable: bool) -> Result<(), String> {
    if !serializable {
        let barrier = tokio::time::timeout(app.limits.request_timeout, app.node.read_barrier());
        match barrier.await {
            Ok(Ok(_)) => {}
            Ok(Err(error)) => return Err(error.to_string()),
            Err(_) => return Err("etcdserver: request timed out".to_owned()),
        }
    }
    let request = RangeRequest {
        key: bytes::Bytes::from_static(b"a"),
        limit: 1,
        serializable,
        ..Default::default()
    };
    app.reader.range(&request).map(drop).map_err(|error| error.to_string())
}

/// The old form: one word and the first reason.
pub(super) async fn health<B>(shared: &Shared, request: &Request<B>) -> HttpResponse {
    if request.method() != Method::GET {
        return method_not_allowed();
    }
    let query = request.uri().query().unwrap_or_default();
    let excluded: Vec<&str> = values(query, "exclude").collect();
    let is_serializable = values(query, "serializable").next() == Some("true");
    let Err(reason) = healthy(shared, &excluded, is_serializable).await else {
        shared.metrics.server_health_success.inc();
        return with_type(TEXT, "{\"health\":\"true\",\"reason\":\"\"}");
    };
    shared.metrics.server_health_failures.inc();
    tracing::warn!(reason, "serving /health false");
    let text = serde_json::json!({ "health": "false", "reason": reason }).to_string();
    error(StatusCode::SERVICE_UNAVAILABLE, &text)
}

/// Alarms first, then the leader, then a read; the first failure is the reason.
async fn healthy(shared: &Shared, excluded: &[&str], is_serializable: bool) -> Result<(), String> {
    let Some(app) = shared.app.get() else { return Err("RAFT NO LEADER".to_owned()) };
    for row in app.reader.alarms() {
        let name = match row.alarm() {
            AlarmType::Nospace => "NOSPACE",
            AlarmType::Corrupt => "CORRUPT",
            AlarmType::None => "UNKNOWN",
        };
        if !excluded.contains(&name) {
            return Err(format!("ALARM {name}"));
        }
    }
    let status = app.node.status();
    if !is_serializable && status.leader.is_none() {
        return Err("RAFT NO LEADER".to_owned());
    }
    // Whoever waits for a new member to be healthy before the next one is stopped counts on its vote.
    if !is_serializable && status.awaits_vote {
        return Err(AWAITS_VOTE.to_owned());
    }
    read(app, is_serializable).await.map_err(|error| format!("RANGE ERROR:{error}"))
}

/// Values of a repeatable query parameter; probes use names that need no unescaping.
fn values<'a>(query: &'a str, name: &'a str) -> impl Iterator<Item = &'a str> {
    query.split('&').filter_map(move |pair| {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        (key == name).then_some(value)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_name_their_checks() {
        assert_eq!(checks_of("/livez").map(|found| found.checks), Some(&LIVE[..]));
        assert_eq!(checks_of("/readyz").map(|found| found.checks), Some(&READY[..]));
        let one = checks_of("/readyz/non_learner").map(|found| found.checks);
        assert_eq!(one, Some(&[Check::NonLearner][..]));
        for path in ["/livez/non_learner", "/readyz/", "/readyz/x", "/livez2", "/", ""] {
            assert_eq!(checks_of(path), None, "{path}");
        }
    }

    #[test]
    fn query_values_may_repeat_and_be_empty() {
        let found: Vec<&str> = values("exclude=A&verbose&exclude=B", "exclude").collect();
        assert_eq!(found, ["A", "B"]);
        assert_eq!(values("verbose", "verbose").next(), Some(""));
        assert_eq!(values("", "verbose").next(), None);
    }
}
