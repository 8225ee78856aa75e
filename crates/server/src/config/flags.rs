//! The one table of flags: name, field, what setting it does here, and its help line. Command
//! line, environment and config file are all read through it, `--help` is printed from it, and a
//! flag that has no effect says why. Over 600 lines, because it is one table.

use std::sync::LazyLock;

use super::Config;
use super::value::{Kind, Value};

/// What setting a flag does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// What its help line says.
    Full,
    /// Nothing, and it never will, for this reason. Told once when it is set.
    None(&'static str),
    /// Nothing yet, for this reason. Told once when it is set to something else than the default.
    Later(&'static str),
}

/// One flag.
pub struct Flag {
    /// Name without dashes.
    pub name: &'static str,
    /// How its value is written.
    pub kind: Kind,
    /// What setting it does.
    pub effect: Effect,
    /// One line for `--help`.
    pub help: &'static str,
    /// Parses text into the field.
    pub parse: fn(&mut Config, &str) -> Result<(), String>,
    /// The field as text.
    pub show: fn(&Config) -> String,
}

/// What an old or foreign name stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OldName {
    /// Another name of this flag.
    Flag(&'static str),
    /// A boolean that became a feature gate.
    Gate(&'static str),
    /// Gone; any value is accepted and has no effect.
    Gone(Kind),
    /// Gone; only these values (the empty one included) mean nothing, others are refused.
    OnlyValue(&'static str),
}

fn kind_of<T: Value>(_field: fn(&Config) -> &T) -> Kind {
    T::KIND
}

macro_rules! flag {
    ($name:literal, $($field:ident).+, $effect:expr, $help:literal) => {
        Flag {
            name: $name,
            kind: kind_of(|config| &config.$($field).+),
            effect: $effect,
            help: $help,
            parse: |config, text| {
                config.$($field).+ = Value::parse(text)?;
                Ok(())
            },
            show: |config| Value::show(&config.$($field).+),
        }
    };
}

/// Flags that a later release of etcd will not know, with what is logged of them.
pub(super) const DEPRECATED: [(&str, &str); 2] = [
    ("max-snapshots", "--max-snapshots is deprecated in 3.6 and will be decommissioned in 3.8."),
    (
        "v2-deprecation",
        "--v2-deprecation is deprecated and scheduled for removal in v3.8. The default value is \
         enforced, ignoring user input.",
    ),
];

/// Flags that take one of some words, although nothing depends on which.
pub(super) const CHOICES: [(&str, &[&str]); 1] =
    [("v2-deprecation", &["write-only", "write-only-drop-data", "gone"])];

const NO_TRACING: Effect = Effect::Later("distributed tracing is not offered yet");
const NO_BBOLT: Effect = Effect::None("the store is not bbolt and writes in its own checkpoints");
const NO_PEER_CLIENT: Effect =
    Effect::None("no connection is made with it: requests over HTTP are served in the process");

/// All flags, in the order of `--help`.
pub static FLAGS: LazyLock<Vec<Flag>> = LazyLock::new(|| {
    use Effect::{Full, Later, None as Never};
    let mut flags = vec![
        flag!("name", name, Full, "Human-readable name of this member."),
        flag!("data-dir", data_dir, Full, "Directory of the data; empty means <name>.etcd."),
        flag!(
            "wal-dir",
            wal_dir,
            Later("the log lives in the data directory for now"),
            "Directory of the log."
        ),
        flag!(
            "snapshot-count",
            snapshot_count,
            Never("the log is purged behind each checkpoint of the store"),
            "Log entries between two purges of the log."
        ),
        flag!(
            "snapshot-catchup-entries",
            snapshot_catchup_entries,
            Full,
            "Log entries kept for slow followers after a purge."
        ),
        flag!(
            "max-snapshots",
            max_snapshots,
            Never("snapshots are made when they are needed and not kept in files"),
            "Snapshot files to keep."
        ),
        flag!(
            "max-wals",
            max_wals,
            Never("log files are recycled as soon as their entries are stored"),
            "Log files to keep."
        ),
        flag!(
            "heartbeat-interval",
            heartbeat_interval_ms,
            Full,
            "Time between heartbeats, in milliseconds."
        ),
        flag!(
            "election-timeout",
            election_timeout_ms,
            Full,
            "Time without a leader before an election, in milliseconds."
        ),
        flag!(
            "initial-election-tick-advance",
            initial_election_tick_advance,
            Never("a member that starts waits for one election timeout at most"),
            "Shorten the first election."
        ),
        flag!("listen-peer-urls", listen_peer_urls, Full, "URLs to listen on for other members."),
        flag!(
            "listen-client-urls",
            listen_client_urls,
            Full,
            "URLs to listen on for clients (gRPC and HTTP)."
        ),
        flag!(
            "listen-client-http-urls",
            listen_client_http_urls,
            Full,
            "URLs for HTTP clients only; then listen-client-urls serves gRPC only."
        ),
        flag!(
            "listen-metrics-urls",
            listen_metrics_urls,
            Full,
            "Further URLs that answer /metrics, /health, /livez and /readyz."
        ),
        flag!(
            "quota-backend-bytes",
            quota_backend_bytes,
            Full,
            "Size that raises the NOSPACE alarm; 0 means 2 GiB, less than 0 none."
        ),
        flag!(
            "backend-bbolt-freelist-type",
            backend_bbolt_freelist_type,
            NO_BBOLT,
            "Kind of bbolt's free list, array or map."
        ),
        flag!(
            "backend-batch-interval",
            backend_batch_interval,
            Full,
            "Longest time before a checkpoint of the state; 0 means 1 s."
        ),
        flag!(
            "backend-batch-limit",
            backend_batch_limit,
            NO_BBOLT,
            "Most operations before a commit of the backend."
        ),
        flag!("max-txn-ops", max_txn_ops, Full, "Most operations in a transaction."),
        flag!("max-request-bytes", max_request_bytes, Full, "Largest request in bytes."),
        flag!(
            "max-concurrent-streams",
            max_concurrent_streams,
            Full,
            "Most streams a connection may have open."
        ),
        flag!(
            "grpc-keepalive-min-time",
            grpc_keepalive_min_time,
            Full,
            "Shortest time between a client's pings."
        ),
        flag!(
            "grpc-keepalive-interval",
            grpc_keepalive_interval,
            Full,
            "Time between pings to quiet clients; 0 means none."
        ),
        flag!(
            "grpc-keepalive-timeout",
            grpc_keepalive_timeout,
            Full,
            "Time without an answer to a ping before closing; 0 means none."
        ),
        flag!(
            "socket-reuse-port",
            socket_reuse_port,
            Full,
            "Set SO_REUSEPORT on listening sockets."
        ),
        flag!(
            "socket-reuse-address",
            socket_reuse_address,
            Full,
            "Set SO_REUSEADDR on listening sockets."
        ),
        flag!(
            "raft-read-timeout",
            raft_read_timeout,
            Never("a quiet peer connection is watched by its own keepalive"),
            "Read timeout of peer connections."
        ),
        flag!(
            "raft-write-timeout",
            raft_write_timeout,
            Never("a quiet peer connection is watched by its own keepalive"),
            "Write timeout of peer connections."
        ),
        flag!(
            "memory-mlock",
            memory_mlock,
            Later("memory is not locked yet"),
            "Keep memory from being swapped out."
        ),
        flag!(
            "bootstrap-defrag-threshold-megabytes",
            bootstrap_defrag_threshold_megabytes,
            Full,
            "Defragment at start if that frees so much; 0 means never."
        ),
        flag!("max-learners", max_learners, Full, "Most learners in the cluster."),
        flag!(
            "unsafe-no-fsync",
            unsafe_no_fsync,
            Full,
            "Do not sync files: unsafe, loses data at power loss."
        ),
        flag!(
            "force-new-cluster",
            force_new_cluster,
            Full,
            "Make a one-member cluster of the data."
        ),
        flag!(
            "v2-deprecation",
            v2_deprecation,
            Never("the v2 store does not exist here"),
            "Phase of v2's removal."
        ),
        flag!("feature-gates", feature_gates, Full, "Feature gates, as A=true,B=false."),
        flag!(
            "config-file",
            config_file,
            Full,
            "Read all settings from this YAML file; other flags and ETCD_* are ignored."
        ),
    ];
    flags.extend(cluster_flags());
    flags.extend(security_flags());
    flags.extend(observability_flags());
    flags
});

fn cluster_flags() -> Vec<Flag> {
    use Effect::{Full, Later, None as Never};
    vec![
        flag!(
            "initial-advertise-peer-urls",
            initial_advertise_peer_urls,
            Full,
            "Peer URLs told to the rest of the cluster."
        ),
        flag!(
            "advertise-client-urls",
            advertise_client_urls,
            Full,
            "Client URLs told to the cluster and to clients."
        ),
        flag!(
            "initial-cluster",
            initial_cluster,
            Full,
            "Members of a new cluster, as name=url,name=url."
        ),
        flag!("initial-cluster-state", initial_cluster_state, Full, "new or existing."),
        flag!(
            "initial-cluster-token",
            initial_cluster_token,
            Full,
            "Text that makes the ids of this cluster its own."
        ),
        flag!(
            "discovery-endpoints",
            discovery_endpoints,
            Full,
            "Endpoints of the discovery service."
        ),
        flag!("discovery-token", discovery_token, Full, "Token of the discovery service."),
        flag!(
            "discovery-dial-timeout",
            discovery_dial_timeout,
            Full,
            "Timeout of connecting to the discovery service."
        ),
        flag!(
            "discovery-request-timeout",
            discovery_request_timeout,
            Full,
            "Timeout of its requests."
        ),
        flag!(
            "discovery-keepalive-time",
            discovery_keepalive_time,
            Full,
            "Time between its pings."
        ),
        flag!(
            "discovery-keepalive-timeout",
            discovery_keepalive_timeout,
            Full,
            "Timeout of its pings."
        ),
        flag!(
            "discovery-insecure-transport",
            discovery_insecure_transport,
            Full,
            "Reach it without TLS."
        ),
        flag!(
            "discovery-insecure-skip-tls-verify",
            discovery_insecure_skip_tls_verify,
            Full,
            "Do not verify its certificate."
        ),
        flag!("discovery-cert", discovery_cert, Full, "Certificate shown to it."),
        flag!("discovery-key", discovery_key, Full, "Key of that certificate."),
        flag!("discovery-cacert", discovery_cacert, Full, "Authorities for its certificate."),
        flag!("discovery-user", discovery_user, Full, "User name for it."),
        flag!("discovery-password", discovery_password, Full, "Password for it."),
        flag!("discovery-srv", discovery_srv, Full, "DNS domain to find members by."),
        flag!("discovery-srv-name", discovery_srv_name, Full, "Suffix of the DNS service name."),
        flag!(
            "discovery-fallback",
            discovery_fallback,
            Full,
            "What to do when discovery fails: exit."
        ),
        flag!(
            "strict-reconfig-check",
            strict_reconfig_check,
            Full,
            "Refuse member changes that would lose the quorum."
        ),
        flag!(
            "pre-vote",
            pre_vote,
            Never("elections always ask first whether they can be won"),
            "Ask before an election."
        ),
        flag!("auto-compaction-mode", auto_compaction_mode, Full, "periodic or revision."),
        flag!(
            "auto-compaction-retention",
            auto_compaction_retention,
            Full,
            "History to keep: hours or a duration, or revisions; 0 means all."
        ),
        flag!(
            "compaction-batch-limit",
            compaction_batch_limit,
            Full,
            "Most revisions removed in one step; 0 means 1000."
        ),
        flag!(
            "compaction-sleep-interval",
            compaction_sleep_interval,
            Full,
            "Pause between two such steps; 0 means 10ms."
        ),
        flag!(
            "watch-progress-notify-interval",
            watch_progress_notify_interval,
            Full,
            "Time between progress notices to idle watchers; 0 means 10m."
        ),
        flag!(
            "corrupt-check-time",
            corrupt_check_time,
            Full,
            "Time between comparisons of the members' data; 0 means never."
        ),
        flag!(
            "compact-hash-check-time",
            compact_hash_check_time,
            Full,
            "Time between comparisons of compaction hashes."
        ),
        flag!(
            "downgrade-check-time",
            downgrade_check_time,
            Later("downgrades are not offered yet"),
            "Time between checks of a downgrade."
        ),
        flag!(
            "warning-apply-duration",
            warning_apply_duration,
            Later("applying an entry is not timed by itself yet"),
            "Log applies that take longer."
        ),
        flag!(
            "warning-unary-request-duration",
            warning_unary_request_duration,
            Full,
            "Log unary requests that take longer."
        ),
    ]
}

fn security_flags() -> Vec<Flag> {
    use Effect::Full;
    vec![
        flag!("cert-file", client_tls.cert_file, Full, "Certificate of the client listener."),
        flag!("key-file", client_tls.key_file, Full, "Key of that certificate."),
        flag!(
            "client-cert-file",
            client_tls.client_cert_file,
            NO_PEER_CLIENT,
            "Certificate for connections of the gateway."
        ),
        flag!(
            "client-key-file",
            client_tls.client_key_file,
            NO_PEER_CLIENT,
            "Key of that certificate."
        ),
        flag!(
            "client-cert-auth",
            client_tls.client_cert_auth,
            Full,
            "Demand certificates of clients."
        ),
        flag!("client-crl-file", client_tls.crl_file, Full, "Revoked client certificates."),
        flag!(
            "client-cert-allowed-cn",
            client_tls.allowed_cn,
            Full,
            "Common names a client certificate may have."
        ),
        flag!(
            "client-cert-allowed-hostname",
            client_tls.allowed_hostname,
            Full,
            "Names a client certificate may be for."
        ),
        flag!(
            "trusted-ca-file",
            client_tls.trusted_ca_file,
            Full,
            "Authorities for client certificates."
        ),
        flag!("auto-tls", client_tls.auto_tls, Full, "Make a self-signed certificate for clients."),
        flag!("peer-cert-file", peer_tls.cert_file, Full, "Certificate of the peer listener."),
        flag!("peer-key-file", peer_tls.key_file, Full, "Key of that certificate."),
        flag!(
            "peer-client-cert-file",
            peer_tls.client_cert_file,
            Full,
            "Certificate for connections to peers."
        ),
        flag!("peer-client-key-file", peer_tls.client_key_file, Full, "Key of that certificate."),
        flag!(
            "peer-client-cert-auth",
            peer_tls.client_cert_auth,
            Full,
            "Demand certificates of peers."
        ),
        flag!(
            "peer-trusted-ca-file",
            peer_tls.trusted_ca_file,
            Full,
            "Authorities for peer certificates."
        ),
        flag!(
            "peer-auto-tls",
            peer_tls.auto_tls,
            Full,
            "Make a self-signed certificate for peers."
        ),
        flag!("peer-crl-file", peer_tls.crl_file, Full, "Revoked peer certificates."),
        flag!(
            "peer-cert-allowed-cn",
            peer_tls.allowed_cn,
            Full,
            "Common names a peer certificate may have."
        ),
        flag!(
            "peer-cert-allowed-hostname",
            peer_tls.allowed_hostname,
            Full,
            "Names a peer certificate may be for."
        ),
        flag!(
            "peer-skip-client-san-verification",
            peer_tls.skip_client_san_verification,
            Full,
            "Do not compare a peer's address with its certificate."
        ),
        flag!(
            "self-signed-cert-validity",
            self_signed_cert_validity,
            Full,
            "Years that self-signed certificates live."
        ),
        flag!(
            "cipher-suites",
            cipher_suites,
            Full,
            "TLS 1.2 cipher suites, by their IANA names; empty means all safe ones."
        ),
        flag!("tls-min-version", tls_min_version, Full, "Lowest TLS version: TLS1.2 or TLS1.3."),
        flag!(
            "tls-max-version",
            tls_max_version,
            Full,
            "Highest TLS version; empty means the newest."
        ),
        flag!("cors", cors, Full, "Origins that browsers may call from."),
        flag!(
            "host-whitelist",
            host_whitelist,
            Full,
            "Host names that plain HTTP clients may use."
        ),
        flag!("auth-token", auth_token, Full, "Kind of auth tokens: simple, or jwt with options."),
        flag!("bcrypt-cost", bcrypt_cost, Full, "Cost of password hashes, 4 to 31."),
        flag!("auth-token-ttl", auth_token_ttl, Full, "Seconds that a simple token lives."),
    ]
}

fn observability_flags() -> Vec<Flag> {
    use Effect::{Full, Later, None as Never};
    vec![
        flag!(
            "enable-pprof",
            enable_pprof,
            Never("there is no Go runtime to profile"),
            "Serve /debug/pprof/."
        ),
        flag!("metrics", metrics, Full, "basic, or extensive for times of every method."),
        flag!("enable-grpc-gateway", enable_grpc_gateway, Full, "Serve JSON under /v3/."),
        flag!("logger", logger, Full, "zap is the only one."),
        flag!("log-outputs", log_outputs, Full, "stdout, stderr, default or file names."),
        flag!("log-level", log_level, Full, "debug, info, warn, error, panic or fatal."),
        flag!("log-format", log_format, Full, "json or console."),
        flag!(
            "enable-log-rotation",
            enable_log_rotation,
            Later("log files are not rotated by this program yet; use logrotate with copytruncate"),
            "Rotate log files."
        ),
        flag!(
            "log-rotation-config-json",
            log_rotation_config_json,
            Later("log files are not rotated by this program yet; use logrotate with copytruncate"),
            "How to rotate them."
        ),
        flag!(
            "enable-distributed-tracing",
            enable_distributed_tracing,
            NO_TRACING,
            "Send traces by OpenTelemetry."
        ),
        flag!(
            "distributed-tracing-address",
            distributed_tracing_address,
            NO_TRACING,
            "Address of the collector."
        ),
        flag!(
            "distributed-tracing-service-name",
            distributed_tracing_service_name,
            NO_TRACING,
            "Service name in traces."
        ),
        flag!(
            "distributed-tracing-instance-id",
            distributed_tracing_instance_id,
            NO_TRACING,
            "Instance in traces."
        ),
        flag!(
            "distributed-tracing-sampling-rate",
            distributed_tracing_sampling_rate,
            NO_TRACING,
            "Traces kept per million."
        ),
    ]
}

/// Names of older versions and of other tools, and what they stand for.
pub const OLD_NAMES: &[(&str, OldName)] = &[
    (
        "experimental-bootstrap-defrag-threshold-megabytes",
        OldName::Flag("bootstrap-defrag-threshold-megabytes"),
    ),
    ("experimental-compact-hash-check-time", OldName::Flag("compact-hash-check-time")),
    ("experimental-compaction-batch-limit", OldName::Flag("compaction-batch-limit")),
    ("experimental-compaction-sleep-interval", OldName::Flag("compaction-sleep-interval")),
    ("experimental-corrupt-check-time", OldName::Flag("corrupt-check-time")),
    ("experimental-distributed-tracing-address", OldName::Flag("distributed-tracing-address")),
    (
        "experimental-distributed-tracing-instance-id",
        OldName::Flag("distributed-tracing-instance-id"),
    ),
    (
        "experimental-distributed-tracing-sampling-rate",
        OldName::Flag("distributed-tracing-sampling-rate"),
    ),
    (
        "experimental-distributed-tracing-service-name",
        OldName::Flag("distributed-tracing-service-name"),
    ),
    ("experimental-enable-distributed-tracing", OldName::Flag("enable-distributed-tracing")),
    ("experimental-downgrade-check-time", OldName::Flag("downgrade-check-time")),
    ("experimental-memory-mlock", OldName::Flag("memory-mlock")),
    (
        "experimental-peer-skip-client-san-verification",
        OldName::Flag("peer-skip-client-san-verification"),
    ),
    ("experimental-warning-apply-duration", OldName::Flag("warning-apply-duration")),
    (
        "experimental-warning-unary-request-duration",
        OldName::Flag("warning-unary-request-duration"),
    ),
    (
        "experimental-watch-progress-notify-interval",
        OldName::Flag("watch-progress-notify-interval"),
    ),
    ("experimental-snapshot-catchup-entries", OldName::Flag("snapshot-catchup-entries")),
    ("experimental-snapshot-catch-up-entries", OldName::Flag("snapshot-catchup-entries")),
    ("experimental-max-learners", OldName::Flag("max-learners")),
    ("experimental-stop-grpc-service-on-defrag", OldName::Gate("StopGRPCServiceOnDefrag")),
    ("experimental-initial-corrupt-check", OldName::Gate("InitialCorruptCheck")),
    ("experimental-compact-hash-check-enabled", OldName::Gate("CompactHashCheck")),
    (
        "experimental-txn-mode-write-with-shared-buffer",
        OldName::Gate("TxnModeWriteWithSharedBuffer"),
    ),
    ("experimental-enable-lease-checkpoint", OldName::Gate("LeaseCheckpoint")),
    ("experimental-enable-lease-checkpoint-persist", OldName::Gate("LeaseCheckpointPersist")),
    ("discovery", OldName::OnlyValue("")),
    ("discovery-proxy", OldName::OnlyValue("")),
    ("proxy", OldName::OnlyValue("off")),
    ("proxy-dial-timeout", OldName::Gone(Kind::Number)),
    ("proxy-failure-wait", OldName::Gone(Kind::Number)),
    ("proxy-read-timeout", OldName::Gone(Kind::Number)),
    ("proxy-refresh-interval", OldName::Gone(Kind::Number)),
    ("proxy-write-timeout", OldName::Gone(Kind::Number)),
    ("enable-v2", OldName::Gone(Kind::Bool)),
    ("experimental-enable-v2v3", OldName::Gone(Kind::Text)),
    ("next-cluster-version-compatible", OldName::Gone(Kind::Bool)),
    // Without a meaning since etcd 2; they take no separate value, as in etcd.
    ("cluster-active-size", OldName::Gone(Kind::Bool)),
    ("cluster-remove-delay", OldName::Gone(Kind::Bool)),
    ("cluster-sync-interval", OldName::Gone(Kind::Bool)),
    ("config", OldName::Gone(Kind::Bool)),
    ("force", OldName::Gone(Kind::Bool)),
    ("max-result-buffer", OldName::Gone(Kind::Bool)),
    ("max-retry-attempts", OldName::Gone(Kind::Bool)),
    ("peer-heartbeat-interval", OldName::Gone(Kind::Bool)),
    ("peer-election-timeout", OldName::Gone(Kind::Bool)),
    ("retry-interval", OldName::Gone(Kind::Bool)),
    ("snapshot", OldName::Gone(Kind::Bool)),
    ("v", OldName::Gone(Kind::Bool)),
    ("vv", OldName::Gone(Kind::Bool)),
];

/// The flag of this name.
#[must_use]
pub(super) fn find(name: &str) -> Option<&'static Flag> {
    FLAGS.iter().find(|flag| flag.name == name)
}

/// What an old name stands for.
#[must_use]
pub(super) fn find_old(name: &str) -> Option<OldName> {
    OLD_NAMES.iter().find(|(old, _)| *old == name).map(|(_, meaning)| *meaning)
}

/// The text of `--help`.
#[must_use]
pub fn help_text() -> String {
    use std::fmt::Write;
    let defaults = Config::default();
    let mut text = String::from(
        "Usage:\n\n  etcd [flags]\n    Start an etcd server.\n\n  etcd --version\n    Show the \
         version.\n\n  etcd -h | --help\n    Show the help information about etcd.\n\n  \
         etcd --config-file\n    Path to the server configuration file. Note that if a \
         configuration file is provided,\n    other command line flags and environment variables \
         will be ignored.\n\nFlags:\n\n",
    );
    for flag in FLAGS.iter() {
        let default = (flag.show)(&defaults);
        let quoted = if default.is_empty() { "''" } else { &default };
        writeln!(text, "  --{} {quoted}\n    {}", flag.name, flag.help)
            .expect("writing to memory cannot fail");
        let reason = match flag.effect {
            Effect::Full => None,
            Effect::None(reason) | Effect::Later(reason) => Some(reason),
        };
        if let Some(reason) = reason {
            writeln!(text, "    Accepted without effect: {reason}.")
                .expect("writing to memory cannot fail");
        }
    }
    text
}
