//! The numbers operators watch, under etcd's names, labels and buckets: one registry, the metrics
//! that code bumps as things happen (here), those read from their source at scrape time
//! (`sources`), and the gRPC counters (`grpc`). Nothing here decides anything and nothing in the
//! request path waits for it.

pub mod grpc;
pub mod peers;
pub mod sources;

use std::time::Instant;

use prometheus::core::Collector;
use prometheus::proto::MetricFamily;
use prometheus::{
    Encoder, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge,
    IntGaugeVec, Opts, Registry, TextEncoder, exponential_buckets,
};

/// Every metric that code bumps itself. Fields carry the metric's name without `etcd_`.
pub struct Metrics {
    registry: Registry,
    /// Counters of gRPC calls by method and code, kept by the layer around all services.
    pub grpc: grpc::GrpcMetrics,
    /// Traffic between members.
    pub peers: peers::PeerMetrics,

    /// `etcd_server_health_success`: answered `/health` calls that said true.
    pub server_health_success: IntCounter,
    /// `etcd_server_health_failures`: answered `/health` calls that said false.
    pub server_health_failures: IntCounter,
    /// `etcd_server_healthcheck{type,name}`: last result of a livez or readyz check (1 = ok).
    pub server_healthcheck: IntGaugeVec,
    /// `etcd_server_healthchecks_total{type,name,status}`.
    pub server_healthchecks: IntCounterVec,
    /// `etcd_server_client_requests_total{type,client_api_version}`.
    pub server_client_requests: IntCounterVec,

    /// `etcd_server_range_duration_seconds{success}`: reads of ranges, without waiting for consensus.
    pub server_range_duration: Outcomes,

    /// `etcd_network_client_grpc_received_bytes_total`: request bytes of all gRPC calls.
    pub network_client_grpc_received_bytes: IntCounter,
    /// `etcd_network_client_grpc_sent_bytes_total`: response bytes of all gRPC calls.
    pub network_client_grpc_sent_bytes: IntCounter,

    /// `etcd_mvcc_hash_duration_seconds`: Maintenance.Hash.
    pub mvcc_hash_duration: Histogram,
    /// `etcd_mvcc_hash_rev_duration_seconds`: Maintenance.HashKV.
    pub mvcc_hash_rev_duration: Histogram,

    /// `etcd_disk_backend_defrag_duration_seconds`.
    pub disk_backend_defrag_duration: Histogram,
    /// `etcd_disk_backend_snapshot_duration_seconds`: Maintenance.Snapshot, first byte to last.
    pub disk_backend_snapshot_duration: Histogram,
    /// `etcd_disk_backend_commit_duration_seconds`: checkpoints of the store.
    pub disk_backend_commit_duration: Histogram,
    /// `etcd_disk_defrag_inflight`.
    pub disk_defrag_inflight: IntGauge,

    /// `etcd_debugging_mvcc_watch_stream_total`: open watch streams.
    pub mvcc_watch_stream: IntGauge,
    /// `etcd_debugging_mvcc_watcher_total`: watchers on all streams.
    pub mvcc_watcher: IntGauge,
    /// `etcd_debugging_mvcc_slow_watcher_total`: watchers that read history to catch up.
    pub mvcc_slow_watcher: IntGauge,
    /// `etcd_debugging_mvcc_pending_events_total`: events queued for streams.
    pub mvcc_pending_events: IntGauge,
    /// `etcd_debugging_mvcc_events_total`: events sent to watchers.
    pub mvcc_events: IntCounter,

    /// `etcd_debugging_lease_granted_total`.
    pub lease_granted: IntCounter,
    /// `etcd_debugging_lease_renewed_total`.
    pub lease_renewed: IntCounter,
    /// `etcd_debugging_lease_revoked_total`.
    pub lease_revoked: IntCounter,
    /// `etcd_debugging_lease_ttl_total`: granted TTLs in seconds.
    pub lease_ttl: Histogram,
    /// `etcd_debugging_server_lease_expired_total`: leases whose end we proposed.
    pub server_lease_expired: IntCounter,
}

impl Metrics {
    /// All metrics at zero. `extensive` is `--metrics=extensive`: adds the histogram of handling
    /// times by method.
    #[must_use]
    pub fn new(extensive: bool) -> Self {
        let registry = Registry::new();
        let made = Maker { registry: &registry };
        Self {
            grpc: grpc::GrpcMetrics::new(&registry, extensive),
            peers: peers::PeerMetrics::new(&registry),
            server_health_success: made
                .counter("etcd_server_health_success", "The number of successful health checks."),
            server_health_failures: made
                .counter("etcd_server_health_failures", "The number of failed health checks."),
            server_healthcheck: made.gauges(
                "etcd_server_healthcheck",
                "The last result of each kind of health check (1 = ok).",
                &["type", "name"],
            ),
            server_healthchecks: made.counters(
                "etcd_server_healthchecks_total",
                "The number of health checks by kind and result.",
                &["type", "name", "status"],
            ),
            server_client_requests: made.counters(
                "etcd_server_client_requests_total",
                "The number of client requests by kind and client API version.",
                &["type", "client_api_version"],
            ),
            server_range_duration: made.outcomes(
                "etcd_server_range_duration_seconds",
                "The latency distributions of txn.Range",
                (0.0001, 20),
            ),
            network_client_grpc_received_bytes: made.counter(
                "etcd_network_client_grpc_received_bytes_total",
                "The number of bytes received from gRPC clients.",
            ),
            network_client_grpc_sent_bytes: made.counter(
                "etcd_network_client_grpc_sent_bytes_total",
                "The number of bytes sent to gRPC clients.",
            ),
            mvcc_hash_duration: made.histogram(
                "etcd_mvcc_hash_duration_seconds",
                "Time of a hash of the whole store.",
                (0.01, 15),
            ),
            mvcc_hash_rev_duration: made.histogram(
                "etcd_mvcc_hash_rev_duration_seconds",
                "Time of a hash of the keys at a revision.",
                (0.01, 15),
            ),
            disk_backend_defrag_duration: made.histogram(
                "etcd_disk_backend_defrag_duration_seconds",
                "Time of a defragmentation.",
                (0.1, 13),
            ),
            disk_backend_snapshot_duration: made.histogram(
                "etcd_disk_backend_snapshot_duration_seconds",
                "Time of a snapshot sent to a client.",
                (0.01, 17),
            ),
            disk_backend_commit_duration: made.histogram(
                "etcd_disk_backend_commit_duration_seconds",
                "The latency distributions of commit called by backend.",
                (0.001, 14),
            ),
            disk_defrag_inflight: made.gauge(
                "etcd_disk_defrag_inflight",
                "Whether a defragmentation runs (1) or not (0).",
            ),
            mvcc_watch_stream: made.gauge(
                "etcd_debugging_mvcc_watch_stream_total",
                "The number of open watch streams.",
            ),
            mvcc_watcher: made
                .gauge("etcd_debugging_mvcc_watcher_total", "The number of watchers."),
            mvcc_slow_watcher: made.gauge(
                "etcd_debugging_mvcc_slow_watcher_total",
                "The number of watchers that catch up from history.",
            ),
            mvcc_pending_events: made.gauge(
                "etcd_debugging_mvcc_pending_events_total",
                "The number of events queued for watch streams.",
            ),
            mvcc_events: made.counter(
                "etcd_debugging_mvcc_events_total",
                "The number of events sent to watchers.",
            ),
            lease_granted: made
                .counter("etcd_debugging_lease_granted_total", "The number of granted leases."),
            lease_renewed: made
                .counter("etcd_debugging_lease_renewed_total", "The number of lease renewals."),
            lease_revoked: made
                .counter("etcd_debugging_lease_revoked_total", "The number of revoked leases."),
            lease_ttl: made.histogram(
                "etcd_debugging_lease_ttl_total",
                "Granted lease times in seconds.",
                (1.0, 24),
            ),
            server_lease_expired: made.counter(
                "etcd_debugging_server_lease_expired_total",
                "The number of leases that ran out.",
            ),
            registry,
        }
    }

    /// The registry and the families read from their sources, in Prometheus text format 0.0.4.
    #[must_use]
    pub fn render(&self, sources: Vec<MetricFamily>) -> Vec<u8> {
        let mut families = self.registry.gather();
        families.extend(sources);
        families.sort_by(|left, right| left.name().cmp(right.name()));
        let mut text = Vec::with_capacity(64 * 1024);
        TextEncoder::new()
            .encode(&families, &mut text)
            .expect("writing to memory cannot fail and every family has a sample");
        text
    }
}

/// Times of something that succeeds or fails, resolved once so that counting costs little.
pub struct Outcomes {
    failed: Histogram,
    succeeded: Histogram,
}

impl Outcomes {
    /// The histograms of one kind: `labels` without the last one, which is `success`.
    fn new(family: &HistogramVec, labels: &[&str]) -> Self {
        let of = |success| family.with_label_values(&[labels, &[success]].concat());
        Self { failed: of("false"), succeeded: of("true") }
    }

    /// Counts one that began at `start` and has just ended.
    pub fn observe(&self, is_success: bool, start: Instant) {
        let times = if is_success { &self.succeeded } else { &self.failed };
        times.observe(start.elapsed().as_secs_f64());
    }
}

/// Makes and registers metrics of fixed names: a clash would be a mistake in this file.
struct Maker<'a> {
    registry: &'a Registry,
}

impl Maker<'_> {
    fn keep<T: Collector + Clone + 'static>(&self, made: prometheus::Result<T>) -> T {
        let metric = made.expect("metric names of this file are valid");
        self.registry.register(Box::new(metric.clone())).expect("each name of this file is new");
        metric
    }

    fn counter(&self, name: &str, help: &str) -> IntCounter {
        self.keep(IntCounter::new(name, help))
    }

    fn gauge(&self, name: &str, help: &str) -> IntGauge {
        self.keep(IntGauge::new(name, help))
    }

    fn counters(&self, name: &str, help: &str, labels: &[&str]) -> IntCounterVec {
        self.keep(IntCounterVec::new(Opts::new(name, help), labels))
    }

    fn gauges(&self, name: &str, help: &str, labels: &[&str]) -> IntGaugeVec {
        self.keep(IntGaugeVec::new(Opts::new(name, help), labels))
    }

    fn outcomes(&self, name: &str, help: &str, (first, count): (f64, usize)) -> Outcomes {
        let buckets = exponential_buckets(first, 2.0, count).expect("first > 0 and count > 0");
        let options = HistogramOpts::new(name, help).buckets(buckets);
        Outcomes::new(&self.keep(HistogramVec::new(options, &["success"])), &[])
    }

    /// Buckets double from `first`, `count` times.
    fn histogram(&self, name: &str, help: &str, (first, count): (f64, usize)) -> Histogram {
        let buckets = exponential_buckets(first, 2.0, count).expect("first > 0 and count > 0");
        self.keep(Histogram::with_opts(HistogramOpts::new(name, help).buckets(buckets)))
    }
}
