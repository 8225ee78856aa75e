//! The settings of one member: every flag of etcd as one field with one default. Read from the
//! command line, the environment or a file (`source`, `file`), cross-checked before any file or
//! socket is touched (`check`), and only then turned into what the rooms to the right take
//! (`derive`). It logs nothing itself: what should be told comes back as notices.

mod check;
mod derive;
mod file;
mod flags;
mod gates;
mod source;
mod url;
mod value;

use std::time::Duration;

pub use derive::parse_members;
pub use flags::{Effect, FLAGS, Flag, OLD_NAMES, OldName, help_text};
pub use gates::FeatureGates;
pub use source::{Command, Failure, Loaded, Notice, load};
pub use url::{Scheme, Url};
pub use value::{Kind, Value, parse_duration, show_duration};

/// Files and rules of TLS on one side, clients or peers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TlsSettings {
    /// Certificate chain shown to connecting clients.
    pub cert_file: String,
    /// Its private key.
    pub key_file: String,
    /// Certificate for outgoing connections; empty means `cert_file`.
    pub client_cert_file: String,
    /// Its private key.
    pub client_key_file: String,
    /// Demand a client certificate.
    pub client_cert_auth: bool,
    /// Authorities that client certificates must come from.
    pub trusted_ca_file: String,
    /// Revoked certificates.
    pub crl_file: String,
    /// Common names a client certificate may have; empty means any.
    pub allowed_cn: Vec<String>,
    /// Names a client certificate may be valid for; empty means any.
    pub allowed_hostname: Vec<String>,
    /// Make and use a self-signed certificate.
    pub auto_tls: bool,
    /// Do not compare a peer's address with its certificate.
    pub skip_client_san_verification: bool,
}

/// Every setting; the flag of the same name documents it (`flags`).
#[allow(missing_docs, reason = "each field is the flag of its name, documented in the flag table")]
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    // Member.
    pub name: String,
    pub data_dir: String,
    pub wal_dir: String,
    pub snapshot_count: u64,
    pub snapshot_catchup_entries: u64,
    pub max_snapshots: u64,
    pub max_wals: u64,
    pub heartbeat_interval_ms: u64,
    pub election_timeout_ms: u64,
    pub initial_election_tick_advance: bool,
    pub listen_peer_urls: Vec<Url>,
    pub listen_client_urls: Vec<Url>,
    pub listen_client_http_urls: Vec<Url>,
    pub listen_metrics_urls: Vec<Url>,
    pub quota_backend_bytes: i64,
    pub backend_bbolt_freelist_type: String,
    pub backend_batch_interval: Duration,
    pub backend_batch_limit: u64,
    pub max_txn_ops: usize,
    pub max_request_bytes: usize,
    pub max_concurrent_streams: u32,
    pub grpc_keepalive_min_time: Duration,
    pub grpc_keepalive_interval: Duration,
    pub grpc_keepalive_timeout: Duration,
    pub socket_reuse_port: bool,
    pub socket_reuse_address: bool,
    pub raft_read_timeout: Duration,
    pub raft_write_timeout: Duration,
    pub memory_mlock: bool,
    pub bootstrap_defrag_threshold_megabytes: u64,
    pub max_learners: usize,
    pub unsafe_no_fsync: bool,
    pub force_new_cluster: bool,
    pub v2_deprecation: String,
    pub feature_gates: FeatureGates,
    pub config_file: String,
    // Clustering.
    pub initial_advertise_peer_urls: Vec<Url>,
    pub advertise_client_urls: Vec<Url>,
    pub initial_cluster: String,
    pub initial_cluster_state: String,
    pub initial_cluster_token: String,
    pub discovery_endpoints: Vec<String>,
    pub discovery_token: String,
    pub discovery_dial_timeout: Duration,
    pub discovery_request_timeout: Duration,
    pub discovery_keepalive_time: Duration,
    pub discovery_keepalive_timeout: Duration,
    pub discovery_insecure_transport: bool,
    pub discovery_insecure_skip_tls_verify: bool,
    pub discovery_cert: String,
    pub discovery_key: String,
    pub discovery_cacert: String,
    pub discovery_user: String,
    pub discovery_password: String,
    pub discovery_srv: String,
    pub discovery_srv_name: String,
    pub discovery_fallback: String,
    pub strict_reconfig_check: bool,
    pub pre_vote: bool,
    pub auto_compaction_mode: String,
    pub auto_compaction_retention: String,
    pub compaction_batch_limit: usize,
    pub compaction_sleep_interval: Duration,
    pub watch_progress_notify_interval: Duration,
    pub corrupt_check_time: Duration,
    pub compact_hash_check_time: Duration,
    pub downgrade_check_time: Duration,
    pub warning_apply_duration: Duration,
    pub warning_unary_request_duration: Duration,
    // Security.
    pub client_tls: TlsSettings,
    pub peer_tls: TlsSettings,
    pub self_signed_cert_validity: u32,
    pub cipher_suites: Vec<String>,
    pub tls_min_version: String,
    pub tls_max_version: String,
    pub cors: Vec<String>,
    pub host_whitelist: Vec<String>,
    pub auth_token: String,
    pub bcrypt_cost: u32,
    pub auth_token_ttl: u32,
    // Logs, metrics, tracing.
    pub enable_pprof: bool,
    pub metrics: String,
    pub enable_grpc_gateway: bool,
    pub logger: String,
    pub log_outputs: Vec<String>,
    pub log_level: String,
    pub log_format: String,
    pub enable_log_rotation: bool,
    pub log_rotation_config_json: String,
    pub enable_distributed_tracing: bool,
    pub distributed_tracing_address: String,
    pub distributed_tracing_service_name: String,
    pub distributed_tracing_instance_id: String,
    pub distributed_tracing_sampling_rate: u32,
}

/// One listen or advertise default; the texts are constants of this file.
fn urls(text: &str) -> Vec<Url> {
    vec![Url::parse(text).expect("default URLs are valid")]
}

impl Default for Config {
    fn default() -> Self {
        let seconds = Duration::from_secs;
        let millis = Duration::from_millis;
        Self {
            name: "default".into(),
            data_dir: String::new(),
            wal_dir: String::new(),
            snapshot_count: 10_000,
            snapshot_catchup_entries: 5_000,
            max_snapshots: 5,
            max_wals: 5,
            heartbeat_interval_ms: 100,
            election_timeout_ms: 1_000,
            initial_election_tick_advance: true,
            listen_peer_urls: urls("http://localhost:2380"),
            listen_client_urls: urls("http://localhost:2379"),
            listen_client_http_urls: Vec::new(),
            listen_metrics_urls: Vec::new(),
            quota_backend_bytes: 0,
            backend_bbolt_freelist_type: "map".into(),
            backend_batch_interval: Duration::ZERO,
            backend_batch_limit: 0,
            max_txn_ops: 128,
            max_request_bytes: 1_572_864,
            max_concurrent_streams: u32::MAX,
            grpc_keepalive_min_time: seconds(5),
            grpc_keepalive_interval: seconds(2 * 3600),
            grpc_keepalive_timeout: seconds(20),
            socket_reuse_port: false,
            socket_reuse_address: false,
            raft_read_timeout: seconds(5),
            raft_write_timeout: seconds(5),
            memory_mlock: false,
            bootstrap_defrag_threshold_megabytes: 0,
            max_learners: 1,
            unsafe_no_fsync: false,
            force_new_cluster: false,
            v2_deprecation: String::new(),
            feature_gates: FeatureGates::default(),
            config_file: String::new(),
            initial_advertise_peer_urls: urls("http://localhost:2380"),
            advertise_client_urls: urls("http://localhost:2379"),
            initial_cluster: String::new(),
            initial_cluster_state: "new".into(),
            initial_cluster_token: "etcd-cluster".into(),
            discovery_endpoints: Vec::new(),
            discovery_token: String::new(),
            discovery_dial_timeout: seconds(2),
            discovery_request_timeout: seconds(5),
            discovery_keepalive_time: seconds(2),
            discovery_keepalive_timeout: seconds(6),
            discovery_insecure_transport: true,
            discovery_insecure_skip_tls_verify: false,
            discovery_cert: String::new(),
            discovery_key: String::new(),
            discovery_cacert: String::new(),
            discovery_user: String::new(),
            discovery_password: String::new(),
            discovery_srv: String::new(),
            discovery_srv_name: String::new(),
            discovery_fallback: "exit".into(),
            strict_reconfig_check: true,
            pre_vote: true,
            auto_compaction_mode: "periodic".into(),
            auto_compaction_retention: "0".into(),
            compaction_batch_limit: 0,
            compaction_sleep_interval: Duration::ZERO,
            watch_progress_notify_interval: Duration::ZERO,
            corrupt_check_time: Duration::ZERO,
            compact_hash_check_time: seconds(60),
            downgrade_check_time: seconds(5),
            warning_apply_duration: millis(100),
            warning_unary_request_duration: millis(300),
            client_tls: TlsSettings::default(),
            peer_tls: TlsSettings::default(),
            self_signed_cert_validity: 1,
            cipher_suites: Vec::new(),
            tls_min_version: "TLS1.2".into(),
            tls_max_version: String::new(),
            cors: vec!["*".into()],
            host_whitelist: vec!["*".into()],
            auth_token: "simple".into(),
            bcrypt_cost: 10,
            auth_token_ttl: 300,
            enable_pprof: false,
            metrics: "basic".into(),
            enable_grpc_gateway: true,
            logger: "zap".into(),
            log_outputs: vec!["default".into()],
            log_level: "info".into(),
            log_format: "json".into(),
            enable_log_rotation: false,
            log_rotation_config_json: "{\"maxsize\":100,\"maxage\":0,\"maxbackups\":0,\
                                       \"localtime\":false,\"compress\":false}"
                .into(),
            enable_distributed_tracing: false,
            distributed_tracing_address: "localhost:4317".into(),
            distributed_tracing_service_name: "etcd".into(),
            distributed_tracing_instance_id: String::new(),
            distributed_tracing_sampling_rate: 0,
        }
    }
}
