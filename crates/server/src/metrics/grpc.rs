//! Counters of gRPC calls as the go-grpc-prometheus middleware names them, since alerts and
//! dashboards are written against those. Every method of every service exists at zero from the
//! start, so that rates are right from the first call; those of locks and elections exist from
//! their first call on, as in etcd. Bumped by `grpc_layer` alone.

use std::collections::HashMap;
use std::sync::OnceLock;

use prometheus::{
    Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, Opts, Registry,
    exponential_buckets,
};

use super::Outcomes;

/// Names of gRPC codes 0..=16 as Go prints them.
pub const CODES: [&str; 17] = [
    "OK",
    "Canceled",
    "Unknown",
    "InvalidArgument",
    "DeadlineExceeded",
    "NotFound",
    "AlreadyExists",
    "PermissionDenied",
    "ResourceExhausted",
    "FailedPrecondition",
    "Aborted",
    "OutOfRange",
    "Unimplemented",
    "Internal",
    "Unavailable",
    "DataLoss",
    "Unauthenticated",
];

/// Code of a call whose client went away before its end.
pub const CANCELED: usize = 1;

const UNARY: &str = "unary";
const SERVER_STREAM: &str = "server_stream";
const BIDI_STREAM: &str = "bidi_stream";

/// Every method we serve: service, method, kind.
const METHODS: &[(&str, &[(&str, &str)])] = &[
    (
        "etcdserverpb.KV",
        &[
            ("Range", UNARY),
            ("RangeStream", SERVER_STREAM),
            ("Put", UNARY),
            ("DeleteRange", UNARY),
            ("Txn", UNARY),
            ("Compact", UNARY),
        ],
    ),
    ("etcdserverpb.Watch", &[("Watch", BIDI_STREAM)]),
    (
        "etcdserverpb.Lease",
        &[
            ("LeaseGrant", UNARY),
            ("LeaseRevoke", UNARY),
            ("LeaseKeepAlive", BIDI_STREAM),
            ("LeaseTimeToLive", UNARY),
            ("LeaseLeases", UNARY),
        ],
    ),
    (
        "etcdserverpb.Cluster",
        &[
            ("MemberAdd", UNARY),
            ("MemberRemove", UNARY),
            ("MemberUpdate", UNARY),
            ("MemberList", UNARY),
            ("MemberPromote", UNARY),
        ],
    ),
    (
        "etcdserverpb.Maintenance",
        &[
            ("Alarm", UNARY),
            ("Status", UNARY),
            ("Defragment", UNARY),
            ("Hash", UNARY),
            ("HashKV", UNARY),
            ("Snapshot", SERVER_STREAM),
            ("MoveLeader", UNARY),
            ("Downgrade", UNARY),
        ],
    ),
    (
        "etcdserverpb.Auth",
        &[
            ("AuthEnable", UNARY),
            ("AuthDisable", UNARY),
            ("AuthStatus", UNARY),
            ("Authenticate", UNARY),
            ("UserAdd", UNARY),
            ("UserGet", UNARY),
            ("UserList", UNARY),
            ("UserDelete", UNARY),
            ("UserChangePassword", UNARY),
            ("UserGrantRole", UNARY),
            ("UserRevokeRole", UNARY),
            ("RoleAdd", UNARY),
            ("RoleGet", UNARY),
            ("RoleList", UNARY),
            ("RoleDelete", UNARY),
            ("RoleGrantPermission", UNARY),
            ("RoleRevokePermission", UNARY),
        ],
    ),
    ("grpc.health.v1.Health", &[("Check", UNARY), ("Watch", SERVER_STREAM)]),
];

/// Methods that are shown from their first call on.
const SHOWN_WHEN_USED: &[(&str, &[(&str, &str)])] = &[
    ("v3lockpb.Lock", &[("Lock", UNARY), ("Unlock", UNARY)]),
    (
        "v3electionpb.Election",
        &[
            ("Campaign", UNARY),
            ("Proclaim", UNARY),
            ("Leader", UNARY),
            ("Observe", SERVER_STREAM),
            ("Resign", UNARY),
        ],
    ),
];

/// The counters of one method, resolved once so that a call costs a few atomic additions.
pub struct MethodMetrics {
    /// `unary`, `server_stream` or `bidi_stream`.
    pub kind: &'static str,
    /// `grpc_server_started_total`.
    pub started: IntCounter,
    /// `grpc_server_msg_received_total`.
    pub received: IntCounter,
    /// `grpc_server_msg_sent_total`.
    pub sent: IntCounter,
    /// `grpc_server_handled_total` by code number.
    pub handled: [IntCounter; 17],
    /// `grpc_server_handling_seconds`, with `--metrics=extensive` only.
    pub handling: Option<Histogram>,
    /// `etcd_server_request_duration_seconds`, for the calls that etcd counts there.
    pub duration: Option<Outcomes>,
}

/// The calls whose whole duration is shown, and etcd's names of their types.
const TIMED: [(&str, &str); 8] = [
    ("Range", "Range"),
    ("Put", "Put"),
    ("DeleteRange", "DeleteRange"),
    ("Txn", "Txn"),
    ("Compact", "Compaction"),
    ("LeaseGrant", "LeaseGrant"),
    ("LeaseRevoke", "LeaseRevoke"),
    ("Alarm", "Alarm"),
];

/// All methods by their HTTP/2 path, `/service/method`.
pub struct GrpcMetrics {
    families: Families,
    methods: HashMap<String, Method>,
}

/// One method, and its counters once they are shown.
struct Method {
    kind: &'static str,
    service: &'static str,
    name: &'static str,
    metrics: OnceLock<MethodMetrics>,
}

/// All methods of a table.
fn methods(
    table: &'static [(&'static str, &'static [(&'static str, &'static str)])],
) -> impl Iterator<Item = (String, Method)> {
    table.iter().flat_map(|(service, names)| {
        names.iter().map(move |(name, kind)| {
            let method = Method { kind, service, name, metrics: OnceLock::new() };
            (format!("/{service}/{name}"), method)
        })
    })
}

impl GrpcMetrics {
    /// Registers all families and creates every child at zero.
    pub(super) fn new(registry: &Registry, extensive: bool) -> Self {
        let families = Families::new(registry, extensive);
        let methods = methods(METHODS).chain(methods(SHOWN_WHEN_USED)).collect();
        let made = Self { families, methods };
        for (service, names) in METHODS {
            for (name, _) in *names {
                let _shown = made.method(&format!("/{service}/{name}"));
            }
        }
        made
    }

    /// The counters of a path; `None` for a path that no service has, which is not counted at all
    /// so that clients cannot grow the registry.
    #[must_use]
    pub fn method(&self, path: &str) -> Option<&MethodMetrics> {
        let Method { kind, service, name, metrics } = self.methods.get(path)?;
        Some(metrics.get_or_init(|| self.families.method(kind, service, name)))
    }
}

/// The metric families that methods share.
struct Families {
    started: IntCounterVec,
    received: IntCounterVec,
    sent: IntCounterVec,
    handled: IntCounterVec,
    handling: Option<HistogramVec>,
    duration: HistogramVec,
}

impl Families {
    fn new(registry: &Registry, extensive: bool) -> Self {
        let labels = ["grpc_type", "grpc_service", "grpc_method"];
        let with_code = ["grpc_type", "grpc_service", "grpc_method", "grpc_code"];
        let counters = |name: &str, help: &str, labels: &[&str]| {
            let made = IntCounterVec::new(Opts::new(name, help), labels).expect("a valid name");
            registry.register(Box::new(made.clone())).expect("each name of this file is new");
            made
        };
        let handling = extensive.then(|| {
            let name = "grpc_server_handling_seconds";
            let options = HistogramOpts::new(name, "Time from the start of a call to its end.");
            // The crate's default buckets are the ones the middleware uses: .005 to 10 seconds.
            let made = HistogramVec::new(options, &labels).expect("a valid name");
            registry.register(Box::new(made.clone())).expect("each name of this file is new");
            made
        });
        let duration = {
            let name = "etcd_server_request_duration_seconds";
            let help = "Response latency distribution in seconds for each type.";
            let buckets = exponential_buckets(0.001, 2.0, 14).expect("14 bounds above 0");
            let options = HistogramOpts::new(name, help).buckets(buckets);
            let made = HistogramVec::new(options, &["type", "success"]).expect("a valid name");
            registry.register(Box::new(made.clone())).expect("each name of this file is new");
            made
        };
        Self {
            duration,
            started: counters(
                "grpc_server_started_total",
                "Total number of RPCs started on the server.",
                &labels,
            ),
            received: counters(
                "grpc_server_msg_received_total",
                "Total number of RPC stream messages received on the server.",
                &labels,
            ),
            sent: counters(
                "grpc_server_msg_sent_total",
                "Total number of gRPC stream messages sent by the server.",
                &labels,
            ),
            handled: counters(
                "grpc_server_handled_total",
                "Total number of RPCs completed on the server, regardless of success or failure.",
                &with_code,
            ),
            handling,
        }
    }

    fn method(&self, kind: &'static str, service: &str, method: &str) -> MethodMetrics {
        let labels = [kind, service, method];
        let timed = TIMED.iter().find(|(timed, _)| *timed == method);
        MethodMetrics {
            kind,
            started: self.started.with_label_values(&labels),
            received: self.received.with_label_values(&labels),
            sent: self.sent.with_label_values(&labels),
            handled: CODES
                .map(|code| self.handled.with_label_values(&[kind, service, method, code])),
            handling: self.handling.as_ref().map(|family| family.with_label_values(&labels)),
            duration: timed.map(|(_, name)| Outcomes::new(&self.duration, &[name])),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_method_and_code_exists_at_zero() {
        let registry = Registry::new();
        let metrics = GrpcMetrics::new(&registry, false);
        let handled = registry
            .gather()
            .into_iter()
            .find(|family| family.name() == "grpc_server_handled_total")
            .expect("the family is registered");
        let shown: usize = METHODS.iter().map(|(_, names)| names.len()).sum();
        assert_eq!(handled.get_metric().len(), shown * CODES.len());
        assert!(metrics.method("/etcdserverpb.KV/Range").is_some());
        assert!(metrics.method("/nothing/Here").is_none());
    }

    #[test]
    fn locks_and_elections_exist_from_their_first_call_on() {
        let registry = Registry::new();
        let metrics = GrpcMetrics::new(&registry, false);
        let shown = || {
            let page = prometheus::TextEncoder::new().encode_to_string(&registry.gather());
            page.expect("text").contains("grpc_service=\"v3lockpb.Lock\"")
        };
        assert!(!shown());
        assert!(metrics.method("/v3lockpb.Lock/Lock").is_some());
        assert!(shown());
    }

    #[test]
    fn handling_times_are_kept_only_when_asked_for() {
        assert!(
            GrpcMetrics::new(&Registry::new(), false)
                .method("/etcdserverpb.KV/Put")
                .is_some_and(|method| method.handling.is_none())
        );
        assert!(
            GrpcMetrics::new(&Registry::new(), true)
                .method("/etcdserverpb.KV/Put")
                .is_some_and(|method| method.handling.is_some())
        );
    }
}
