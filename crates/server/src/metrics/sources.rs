//! Metrics that are read where they live when somebody asks: the member's status, the store, the
//! log, the process. Nothing is counted here, and reading costs a few locks and files of `/proc`.

use std::fs;

use prometheus::proto::{
    Bucket, Counter, Gauge, Histogram, LabelPair, Metric, MetricFamily, MetricType,
};

use kelson_storage::{StoreTimes, TimesRead};

use crate::app::App;
use crate::config::FeatureGates;
use crate::version::{ETCD_VERSION, KELSON_VERSION};

/// Families in the making.
#[derive(Default)]
struct Families(Vec<MetricFamily>);

/// Everything that has a source. `app` is absent while the member is starting.
#[must_use]
pub fn collect(app: Option<&App>, gates: &FeatureGates) -> Vec<MetricFamily> {
    let mut families = Families::default();
    versions(&mut families, gates);
    process(&mut families);
    match app {
        Some(app) => {
            consensus(&mut families, app);
            store(&mut families, app);
            log(&mut families, app);
        }
        None => families.gauge("etcd_server_has_leader", HAS_LEADER, 0.0),
    }
    families.0
}

const HAS_LEADER: &str = "Whether or not a leader exists. 1 is existence, 0 is not.";

fn versions(families: &mut Families, gates: &FeatureGates) {
    families.labeled(
        "etcd_server_version",
        "Which version is running. 1 for 'server_version' label with current version.",
        vec![(labels(&[("server_version", ETCD_VERSION)]), 1.0)],
    );
    families.labeled(
        "kelson_build_info",
        "Version of this program itself.",
        vec![(labels(&[("version", KELSON_VERSION)]), 1.0)],
    );
    let features = gates.all().map(|(name, stage, enabled)| {
        (labels(&[("name", name), ("stage", stage)]), f64::from(u8::from(enabled)))
    });
    families.labeled(
        "etcd_server_feature_enabled",
        "Whether or not a feature is enabled. 1 is enabled, 0 is not.",
        features.collect(),
    );
}

fn consensus(families: &mut Families, app: &App) {
    let status = app.node.status();
    let flag = |is_set: bool| f64::from(u8::from(is_set));
    families.gauge("etcd_server_has_leader", HAS_LEADER, flag(status.leader.is_some()));
    families.gauge(
        "etcd_server_is_leader",
        "Whether or not this member is a leader. 1 if is, 0 otherwise.",
        flag(status.is_leader),
    );
    families.gauge(
        "etcd_server_is_learner",
        "Whether or not this member is a learner. 1 if is, 0 otherwise.",
        flag(status.is_learner),
    );
    families.counter(
        "etcd_server_leader_changes_seen_total",
        "The number of leader changes seen.",
        status.leader_changes,
    );
    families.gauge(
        "etcd_server_proposals_committed_total",
        "The total number of consensus proposals committed.",
        status.committed_index as f64,
    );
    families.gauge(
        "etcd_server_proposals_applied_total",
        "The total number of consensus proposals applied.",
        status.applied_index as f64,
    );
    let counted = app.node.counters();
    families.gauge(
        "etcd_server_proposals_pending",
        "The current number of pending proposals to commit.",
        counted.proposals_pending as f64,
    );
    let counters = [
        (
            "etcd_server_proposals_failed_total",
            "The total number of failed proposals seen.",
            counted.proposals_failed,
        ),
        (
            "etcd_server_read_indexes_failed_total",
            "The total number of failed read indexes seen.",
            counted.reads_failed,
        ),
        (
            "etcd_server_slow_read_indexes_total",
            "The total number of pending read indexes not in sync with leader's or timed out.",
            counted.reads_slow,
        ),
    ];
    for (name, help, value) in counters {
        families.counter(name, help, value);
    }
    families.labeled(
        "etcd_server_id",
        "Server or member ID in hexadecimal format. 1 for 'server_id' label with current ID.",
        vec![(labels(&[("server_id", &format!("{:x}", status.member_id))]), 1.0)],
    );
    if let Some(version) = app.reader.cluster_version() {
        let minor = version.rsplit_once('.').map_or(version.as_str(), |(minor, _)| minor);
        families.labeled(
            "etcd_cluster_version",
            "Which version is running. 1 for 'cluster_version' label with current cluster version.",
            vec![(labels(&[("cluster_version", minor)]), 1.0)],
        );
    }
    let alarms = app.reader.alarms();
    if !alarms.is_empty() {
        let rows = alarms.iter().map(|alarm| {
            let id = format!("{:x}", alarm.member_id);
            let kind = alarm.alarm().as_str_name().to_owned();
            (labels(&[("server_id", &id), ("alarm_type", &kind)]), 1.0)
        });
        families.labeled(
            "etcd_debugging_server_alarms",
            "Alarms for every member in cluster. 1 for 'server_id' label with current ID.",
            rows.collect(),
        );
    }
}

fn store(families: &mut Families, app: &App) {
    let (reader, sizes) = (&app.reader, app.reader.sizes());
    for took in reader.take_checkpoints() {
        app.metrics.disk_backend_commit_duration.observe(took.as_secs_f64());
    }
    let quota = app.limits.quota_backend_bytes.max(0);
    families.gauge(
        "etcd_server_quota_backend_bytes",
        "Current backend storage quota size in bytes.",
        quota as f64,
    );
    let physical = "Total size of the underlying database physically allocated in bytes.";
    families.gauge("etcd_mvcc_db_total_size_in_bytes", physical, sizes.total as f64);
    // Old public dashboards still ask for this name.
    families.gauge("etcd_debugging_mvcc_db_total_size_in_bytes", physical, sizes.total as f64);
    families.gauge(
        "etcd_mvcc_db_total_size_in_use_in_bytes",
        "Total size of the underlying database logically in use in bytes.",
        sizes.in_use as f64,
    );
    let keys = reader.key_count() as f64;
    families.gauge("etcd_debugging_mvcc_keys_total", "Total number of keys.", keys);
    families.gauge(
        "etcd_debugging_mvcc_current_revision",
        "The current revision of store.",
        reader.revision() as f64,
    );
    families.gauge(
        "etcd_debugging_mvcc_compact_revision",
        "The revision of the last compaction in store.",
        reader.compacted() as f64,
    );
    families.gauge(
        "etcd_debugging_auth_revision",
        "The current revision of auth store.",
        reader.auth_revision() as f64,
    );
    let stats = reader.stats();
    families.gauge(
        "etcd_debugging_mvcc_total_put_size_in_bytes",
        "The total size of put kv pairs seen by this member.",
        stats.put_bytes as f64,
    );
    families.gauge(
        "etcd_mvcc_db_open_read_transactions",
        "The number of readers that hold an old revision.",
        reader.open_pins() as f64,
    );
    times(families, &reader.times());
    let counters = [
        ("etcd_mvcc_put_total", "Total number of puts seen by this member.", stats.puts),
        ("etcd_mvcc_delete_total", "Total number of deletes seen by this member.", stats.deletes),
        ("etcd_mvcc_range_total", "Total number of ranges seen by this member.", stats.ranges),
        ("etcd_mvcc_txn_total", "Total number of txns seen by this member.", stats.txns),
        (
            "etcd_debugging_mvcc_db_compaction_keys_total",
            "Total number of db keys compacted.",
            stats.compacted_rows,
        ),
    ];
    for (name, help, value) in counters {
        families.counter(name, help, value);
    }
}

fn times(families: &mut Families, times: &StoreTimes) {
    let rows = times.apply.iter().map(|(op, is_success, read)| {
        let success = if *is_success { "true" } else { "false" };
        let labels = labels(&[("version", "v3"), ("op", op), ("success", success)]);
        (labels, read.clone())
    });
    families.timed(
        "etcd_server_apply_duration_seconds",
        "The latency distributions of commands applied.",
        rows.collect(),
    );
    families.counter(
        "etcd_server_slow_apply_total",
        "The total number of slow apply requests.",
        times.slow_applies,
    );
    families.gauge(
        "etcd_debugging_mvcc_db_compaction_last",
        "The unix time of the last db compaction. Resets to 0 on start.",
        times.last_compaction as f64,
    );
    families.timed(
        "etcd_debugging_mvcc_db_compaction_total_duration_milliseconds",
        "Bucketed histogram of db compaction total duration.",
        vec![(Vec::new(), in_milliseconds(&times.compaction))],
    );
    families.timed(
        "etcd_debugging_mvcc_index_compaction_pause_duration_milliseconds",
        "Bucketed histogram of index compaction pause duration.",
        vec![(Vec::new(), in_milliseconds(&times.index_compaction))],
    );
}

fn in_milliseconds(times: &TimesRead) -> TimesRead {
    TimesRead {
        buckets: times.buckets.iter().map(|(bound, calls)| (bound * 1000.0, *calls)).collect(),
        count: times.count,
        seconds: times.seconds * 1000.0,
    }
}

fn log(families: &mut Families, app: &App) {
    use kelson_storage::log::fsync_bucket_bound;
    let stats = app.node.log().stats();
    families.timed(
        "etcd_disk_wal_write_duration_seconds",
        "The latency distributions of write called by WAL.",
        vec![(Vec::new(), app.node.log().write_times())],
    );
    let bounds = (0..stats.fsync_buckets.len() - 1).map(fsync_bucket_bound);
    let fsyncs = TimesRead {
        buckets: bounds.zip(stats.fsync_buckets).collect(),
        count: stats.fsyncs,
        seconds: stats.fsync_seconds,
    };
    families.timed(
        "etcd_disk_wal_fsync_duration_seconds",
        "The latency distributions of fsync called by WAL.",
        vec![(Vec::new(), fsyncs)],
    );
    families.gauge(
        "etcd_disk_wal_write_bytes_total",
        "Total number of bytes written in WAL.",
        stats.bytes_written as f64,
    );
}

/// What Prometheus' client libraries tell of every process, from `/proc/self`.
fn process(families: &mut Families) {
    use rustix::process::{Resource, getrlimit};
    let files = fs::read_dir("/proc/self/fd").map_or(0, Iterator::count) as f64;
    let files_max = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX) as f64;
    families.gauge("process_open_fds", "Number of open file descriptors.", files);
    families.gauge("process_max_fds", "Maximum number of open file descriptors.", files_max);
    families.gauge("os_fd_used", "The number of used file descriptors.", files);
    families.gauge("os_fd_limit", "The file descriptor limit.", files_max);
    let memory_max = getrlimit(Resource::As).current.map_or(-1.0, |bytes| bytes as f64);
    families.gauge(
        "process_virtual_memory_max_bytes",
        "Maximum amount of virtual memory available in bytes.",
        memory_max,
    );
    if let Some((received, sent)) = network_octets() {
        families.float_counter(
            "process_network_receive_bytes_total",
            "Number of bytes received by the process over the network.",
            received,
        );
        families.float_counter(
            "process_network_transmit_bytes_total",
            "Number of bytes sent by the process over the network.",
            sent,
        );
    }
    let Some(stat) = ProcessStat::read() else { return };
    families.gauge(
        "process_resident_memory_bytes",
        "Resident memory size in bytes.",
        stat.resident_bytes,
    );
    families.gauge(
        "process_virtual_memory_bytes",
        "Virtual memory size in bytes.",
        stat.virtual_bytes,
    );
    families.gauge(
        "process_start_time_seconds",
        "Start time of the process since unix epoch in seconds.",
        stat.start_seconds,
    );
    families.float_counter(
        "process_cpu_seconds_total",
        "Total user and system CPU time spent in seconds.",
        stat.cpu_seconds,
    );
}

/// IP bytes received and sent in this network namespace, as Prometheus' Go client shows them.
fn network_octets() -> Option<(f64, f64)> {
    octets_of(&fs::read_to_string("/proc/self/net/netstat").ok()?)
}

/// The file has a line of names and a line of numbers for each protocol.
fn octets_of(netstat: &str) -> Option<(f64, f64)> {
    let mut lines = netstat.lines().filter_map(|line| line.strip_prefix("IpExt: "));
    let (names, numbers) = (lines.next()?, lines.next()?);
    let column = |wanted| {
        let mut columns = names.split(' ').zip(numbers.split(' '));
        columns.find(|(name, _)| *name == wanted)?.1.parse::<f64>().ok()
    };
    Some((column("InOctets")?, column("OutOctets")?))
}

/// The numbers of `/proc/self/stat` that are shown.
struct ProcessStat {
    cpu_seconds: f64,
    start_seconds: f64,
    virtual_bytes: f64,
    resident_bytes: f64,
}

impl ProcessStat {
    fn read() -> Option<Self> {
        let stat = fs::read_to_string("/proc/self/stat").ok()?;
        let uptime_base = fs::read_to_string("/proc/stat").ok()?;
        let booted = uptime_base.lines().find_map(|line| line.strip_prefix("btime "))?;
        Self::parse(&stat, booted.trim().parse().ok()?)
    }

    /// Parses the line; the process name in parentheses may hold anything, so fields are counted
    /// after the last one.
    fn parse(stat: &str, booted_seconds: f64) -> Option<Self> {
        let ticks = rustix::param::clock_ticks_per_second() as f64;
        let page = rustix::param::page_size() as f64;
        let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
        let number = |index: usize| fields.get(index)?.parse::<f64>().ok();
        Some(Self {
            cpu_seconds: (number(11)? + number(12)?) / ticks,
            start_seconds: booted_seconds + number(19)? / ticks,
            virtual_bytes: number(20)?,
            resident_bytes: number(21)? * page,
        })
    }
}

fn labels(pairs: &[(&str, &str)]) -> Vec<LabelPair> {
    let pair = |(name, value): &(&str, &str)| {
        let mut label = LabelPair::default();
        label.set_name((*name).to_owned());
        label.set_value((*value).to_owned());
        label
    };
    pairs.iter().map(pair).collect()
}

impl Families {
    fn push(&mut self, name: &str, help: &str, kind: MetricType, metrics: Vec<Metric>) {
        let mut family = MetricFamily::default();
        family.set_name(name.to_owned());
        family.set_help(help.to_owned());
        family.set_field_type(kind);
        family.set_metric(metrics);
        self.0.push(family);
    }

    fn gauge(&mut self, name: &str, help: &str, value: f64) {
        self.labeled(name, help, vec![(Vec::new(), value)]);
    }

    /// A gauge with one sample per set of labels; at least one.
    fn labeled(&mut self, name: &str, help: &str, rows: Vec<(Vec<LabelPair>, f64)>) {
        let metric = |(labels, value)| {
            let mut gauge = Gauge::default();
            gauge.set_value(value);
            let mut metric = Metric::from_label(labels);
            metric.set_gauge(gauge);
            metric
        };
        let metrics = rows.into_iter().map(metric).collect();
        self.push(name, help, MetricType::GAUGE, metrics);
    }

    fn counter(&mut self, name: &str, help: &str, value: u64) {
        self.float_counter(name, help, value as f64);
    }

    fn float_counter(&mut self, name: &str, help: &str, value: f64) {
        let mut counter = Counter::default();
        counter.set_value(value);
        let mut metric = Metric::default();
        metric.set_counter(counter);
        self.push(name, help, MetricType::COUNTER, vec![metric]);
    }

    /// A histogram per set of labels; left out while there is none.
    fn timed(&mut self, name: &str, help: &str, rows: Vec<(Vec<LabelPair>, TimesRead)>) {
        if rows.is_empty() {
            return;
        }
        let metric = |(labels, times): (Vec<LabelPair>, TimesRead)| {
            let mut seen = 0;
            let cumulative = times.buckets.iter().map(|(bound, calls)| {
                seen += calls;
                let mut bucket = Bucket::default();
                bucket.set_upper_bound(*bound);
                bucket.set_cumulative_count(seen);
                bucket
            });
            let mut histogram = Histogram::default();
            histogram.set_bucket(cumulative.collect());
            histogram.set_sample_count(times.count);
            histogram.set_sample_sum(times.seconds);
            let mut metric = Metric::from_label(labels);
            metric.set_histogram(histogram);
            metric
        };
        let metrics = rows.into_iter().map(metric).collect();
        self.push(name, help, MetricType::HISTOGRAM, metrics);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn process_numbers_are_read_behind_any_process_name() {
        let fields: Vec<String> = (3..=52).map(|n| n.to_string()).collect();
        let line = format!("42 (odd) name)) {}", fields.join(" "));
        let stat = ProcessStat::parse(&line, 1000.0).expect("parsed");
        let ticks = rustix::param::clock_ticks_per_second() as f64;
        assert_eq!(stat.cpu_seconds, (14.0 + 15.0) / ticks);
        assert_eq!(stat.start_seconds, 1000.0 + 22.0 / ticks);
        assert_eq!(stat.virtual_bytes, 23.0);
        assert_eq!(stat.resident_bytes, 24.0 * rustix::param::page_size() as f64);
        assert!(ProcessStat::parse("42 (cut", 0.0).is_none());
    }

    #[test]
    fn this_process_has_memory_and_files() {
        let mut families = Families::default();
        process(&mut families);
        for name in ["process_resident_memory_bytes", "process_open_fds", "process_max_fds"] {
            let family = families.0.iter().find(|family| family.name() == name).expect(name);
            assert!(family.get_metric()[0].get_gauge().get_value() > 0.0, "{name}");
        }
    }

    #[test]
    fn network_bytes_are_found_by_name() {
        let text = "TcpExt: A InOctets\nTcpExt: 1 2\nIpExt: X InOctets OutOctets\nIpExt: 3 4 5\n";
        assert_eq!(octets_of(text), Some((4.0, 5.0)));
        assert_eq!(octets_of("IpExt: InOctets\nIpExt: 4\n"), None);
        assert_eq!(octets_of(""), None);
    }

    #[test]
    fn histograms_are_cumulative() {
        let mut families = Families::default();
        let times = TimesRead { buckets: vec![(1.0, 2), (2.0, 3)], count: 6, seconds: 9.5 };
        families.timed("h", "", vec![(labels(&[("op", "x")]), times)]);
        families.timed("none", "", Vec::new());
        assert_eq!(families.0.len(), 1);
        let histogram = families.0[0].get_metric()[0].get_histogram().clone();
        let counts: Vec<u64> =
            histogram.get_bucket().iter().map(Bucket::cumulative_count).collect();
        assert_eq!(counts, [2, 5]);
        assert_eq!(histogram.get_sample_count(), 6);
    }
}
