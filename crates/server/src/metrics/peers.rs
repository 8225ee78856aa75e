//! Metrics of the traffic between members, under etcd's names: labels are member ids in lower-case
//! hex, with a capital first letter in the label's own name. Who is connected is read from the
//! probes at scrape time.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use kelson_raft::PeerCounters;
use parking_lot::Mutex;
use prometheus::{
    HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry,
    exponential_buckets,
};

use crate::app::App;
use crate::housekeeping::probe;

/// Metrics that code bumps.
pub struct PeerMetrics {
    /// `etcd_network_peer_round_trip_time_seconds{To}`.
    pub round_trip: HistogramVec,
    /// `etcd_network_peer_sent_failures_total{To}`.
    pub sent_failures: IntCounterVec,
    /// `etcd_network_peer_sent_bytes_total{To}`.
    pub sent_bytes: IntCounterVec,
    /// `etcd_network_peer_received_bytes_total{From}`.
    pub received_bytes: IntCounterVec,
    /// `etcd_network_disconnected_peers_total{Local,Remote}`.
    pub disconnected: IntCounterVec,
    /// `etcd_network_active_peers{Local,Remote}`: set at scrape time.
    active: IntGaugeVec,
    /// `etcd_network_known_peers{Local,Remote}`: set at scrape time.
    known: IntGaugeVec,
    /// `etcd_server_heartbeat_send_failures_total`.
    heartbeat_failures: IntCounter,
    /// `etcd_server_snapshot_apply_in_progress_total`: set at scrape time.
    applying: IntGauge,
    /// `etcd_network_snapshot_send_*{To}` and `..._receive_*{From}`.
    sending: SnapshotMetrics,
    receiving: SnapshotMetrics,
    /// What the member had counted at the last scrape.
    seen: Mutex<BTreeMap<u64, PeerCounters>>,
    /// `etcd_server_learner_promote_successes`.
    pub promote_successes: IntCounter,
    /// `etcd_server_learner_promote_failures{Reason}`.
    pub promote_failures: IntCounterVec,
}

/// Whole states that go to or come from other members.
struct SnapshotMetrics {
    inflights: IntGaugeVec,
    successes: IntCounterVec,
    failures: IntCounterVec,
    durations: HistogramVec,
}

impl SnapshotMetrics {
    fn new(registry: &Registry, way: &str, label: &str) -> Self {
        let name = |what: &str| format!("etcd_network_snapshot_{way}_{what}");
        let counters = |what: &str, help: &str| {
            keep(registry, IntCounterVec::new(Opts::new(name(what), help), &[label]))
        };
        let inflights = Opts::new(name("inflights_total"), "Snapshots under way.");
        let durations = HistogramOpts::new(
            name("total_duration_seconds"),
            "Time of a snapshot between members, first byte to last.",
        );
        let buckets = exponential_buckets(0.1, 2.0, 10).expect("positive start and count");
        Self {
            inflights: keep(registry, IntGaugeVec::new(inflights, &[label])),
            successes: counters("success", "Snapshots that were taken."),
            failures: counters("failures", "Snapshots that were not taken."),
            durations: keep(registry, HistogramVec::new(durations.buckets(buckets), &[label])),
        }
    }

    fn add(&self, member: &str, now: i64, successes: u64, failures: u64, took: &[Duration]) {
        self.inflights.with_label_values(&[member]).set(now);
        self.successes.with_label_values(&[member]).inc_by(successes);
        self.failures.with_label_values(&[member]).inc_by(failures);
        for took in took {
            self.durations.with_label_values(&[member]).observe(took.as_secs_f64());
        }
    }
}

fn keep<T: prometheus::core::Collector + Clone + 'static>(
    registry: &Registry,
    made: prometheus::Result<T>,
) -> T {
    let metric = made.expect("metric names of this file are valid");
    registry.register(Box::new(metric.clone())).expect("each name of this file is new");
    metric
}

impl PeerMetrics {
    /// All metrics at zero.
    pub(super) fn new(registry: &Registry) -> Self {
        let counters = |name: &str, help: &str, labels: &[&str]| {
            keep(registry, IntCounterVec::new(Opts::new(name, help), labels))
        };
        let gauges = |name: &str, help: &str, labels: &[&str]| {
            keep(registry, IntGaugeVec::new(Opts::new(name, help), labels))
        };
        let buckets = exponential_buckets(0.0001, 2.0, 16).expect("positive start and count");
        let round_trip = HistogramOpts::new(
            "etcd_network_peer_round_trip_time_seconds",
            "Round-Trip-Time histogram between peers",
        );
        Self {
            round_trip: keep(registry, HistogramVec::new(round_trip.buckets(buckets), &["To"])),
            sent_failures: counters(
                "etcd_network_peer_sent_failures_total",
                "The number of messages to other members that got no answer.",
                &["To"],
            ),
            sent_bytes: counters(
                "etcd_network_peer_sent_bytes_total",
                "The number of bytes sent to other members.",
                &["To"],
            ),
            received_bytes: counters(
                "etcd_network_peer_received_bytes_total",
                "The number of bytes received from other members.",
                &["From"],
            ),
            disconnected: counters(
                "etcd_network_disconnected_peers_total",
                "The number of times that a connected member was lost.",
                &["Local", "Remote"],
            ),
            active: gauges(
                "etcd_network_active_peers",
                "Whether another member is connected (1) or not (0).",
                &["Local", "Remote"],
            ),
            known: gauges(
                "etcd_network_known_peers",
                "The other members that are known.",
                &["Local", "Remote"],
            ),
            heartbeat_failures: keep(
                registry,
                IntCounter::new(
                    "etcd_server_heartbeat_send_failures_total",
                    "The number of heartbeats that got no answer.",
                ),
            ),
            applying: keep(
                registry,
                IntGauge::new(
                    "etcd_server_snapshot_apply_in_progress_total",
                    "Whether a snapshot of the leader is being taken (1) or not (0).",
                ),
            ),
            sending: SnapshotMetrics::new(registry, "send", "To"),
            receiving: SnapshotMetrics::new(registry, "receive", "From"),
            seen: Mutex::default(),
            promote_successes: keep(
                registry,
                IntCounter::new(
                    "etcd_server_learner_promote_successes",
                    "The number of learners that this member promoted.",
                ),
            ),
            promote_failures: counters(
                "etcd_server_learner_promote_failures",
                "The number of promotions that this member refused, by reason.",
                &["Reason"],
            ),
        }
    }

    /// Sets what is read from the member: who is known and connected, and what was sent by
    /// connections that this member opened.
    pub fn refresh(&self, app: &App) {
        self.active.reset();
        self.known.reset();
        let own = format!("{:x}", app.node.status().member_id);
        for (member, is_active) in probe::connections(app) {
            let labels = [own.as_str(), &format!("{member:x}")];
            self.active.with_label_values(&labels).set(i64::from(is_active));
            self.known.with_label_values(&labels).set(1);
        }
        self.take(app.node.take_peer_counters());
        for (urls, member) in app.reader.members().into_iter().map(|m| (m.peer_ur_ls, m.id)) {
            for traffic in urls.iter().filter_map(|url| app.traffic.of(url)) {
                let member = format!("{member:x}");
                let (sent, received) = traffic.take();
                self.sent_bytes.with_label_values(&[&member]).inc_by(sent);
                self.received_bytes.with_label_values(&[&member]).inc_by(received);
            }
        }
    }
}

impl PeerMetrics {
    /// Adds what was counted since the last time.
    fn take(&self, counted: Vec<(u64, PeerCounters)>) {
        let mut seen = self.seen.lock();
        let mut receiving = 0;
        for (id, now) in counted {
            let before = seen.remove(&id).unwrap_or_default();
            let member = format!("{id:x}");
            let failures = now.send_failures.saturating_sub(before.send_failures);
            self.sent_failures.with_label_values(&[&member]).inc_by(failures);
            let failures = now.heartbeat_failures.saturating_sub(before.heartbeat_failures);
            self.heartbeat_failures.inc_by(failures);
            for took in &now.round_trips {
                self.round_trip.with_label_values(&[&member]).observe(took.as_secs_f64());
            }
            self.sending.add(
                &member,
                now.snapshots_sending.try_into().unwrap_or(i64::MAX),
                now.snapshots_sent.saturating_sub(before.snapshots_sent),
                now.snapshot_send_failures.saturating_sub(before.snapshot_send_failures),
                &now.snapshot_send_times,
            );
            self.receiving.add(
                &member,
                now.snapshots_receiving.try_into().unwrap_or(i64::MAX),
                now.snapshots_received.saturating_sub(before.snapshots_received),
                now.snapshot_receive_failures.saturating_sub(before.snapshot_receive_failures),
                &now.snapshot_receive_times,
            );
            receiving += now.snapshots_receiving;
            seen.insert(id, now);
        }
        self.applying.set(i64::from(receiving > 0));
    }
}

/// Bytes that passed since they were last taken.
#[derive(Debug, Default)]
pub struct Traffic {
    sent: AtomicU64,
    received: AtomicU64,
}

impl Traffic {
    /// Counts bytes that were written.
    pub fn sent(&self, bytes: usize) {
        self.sent.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// Counts bytes that were read.
    pub fn received(&self, bytes: usize) {
        self.received.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    fn take(&self) -> (u64, u64) {
        (self.sent.swap(0, Ordering::Relaxed), self.received.swap(0, Ordering::Relaxed))
    }
}

/// Traffic of the connections that this member opened, by URL: what a URL means may change while a
/// connection is open, so members are put to it only when somebody asks.
#[derive(Clone, Debug, Default)]
pub struct TrafficByUrl(Arc<Mutex<HashMap<String, Arc<Traffic>>>>);

impl TrafficByUrl {
    /// The counters of a URL, made when they are first asked for. URLs come from the members table
    /// and the flags, so they are few.
    #[must_use]
    pub fn for_url(&self, url: &str) -> Arc<Traffic> {
        Arc::clone(self.0.lock().entry(url.to_owned()).or_default())
    }

    fn of(&self, url: &str) -> Option<Arc<Traffic>> {
        self.0.lock().get(url).cloned()
    }
}
