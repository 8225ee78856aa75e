//! What is looked at every second: the process as the kernel sees it, its files, what the server says
//! of itself, and what the clients got.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use kelson_api::etcdserverpb as pb;

use super::load::Load;
use crate::compare::{self, Server};

const MIB: f64 = (1 << 20) as f64;

/// One second.
#[derive(Clone, Default)]
pub(crate) struct Sample {
    pub(crate) seconds: f64,
    pub(crate) rss_mib: f64,
    pub(crate) state_mib: f64,
    pub(crate) wal_mib: f64,
    pub(crate) db_mib: f64,
    pub(crate) in_use_mib: f64,
    pub(crate) puts: f64,
    pub(crate) p50_ms: f64,
    pub(crate) p99_ms: f64,
    pub(crate) cpu_percent: f64,
    pub(crate) threads: f64,
    pub(crate) files: f64,
}

/// A figure by name.
pub(crate) struct Column {
    pub(crate) name: &'static str,
    pub(crate) of: fn(&Sample) -> f64,
    /// Whether it must level off.
    pub(crate) is_judged: bool,
}

const fn column(name: &'static str, is_judged: bool, of: fn(&Sample) -> f64) -> Column {
    Column { name, of, is_judged }
}

pub(crate) const COLUMNS: [Column; 11] = [
    column("RSS MiB", true, |s| s.rss_mib),
    column("state files MiB", true, |s| s.state_mib),
    column("log files MiB", true, |s| s.wal_mib),
    column("db size MiB", true, |s| s.db_mib),
    column("in use MiB", false, |s| s.in_use_mib),
    column("writes/s", false, |s| s.puts),
    column("p50 ms", false, |s| s.p50_ms),
    column("p99 ms", false, |s| s.p99_ms),
    column("CPU %", false, |s| s.cpu_percent),
    column("threads", false, |s| s.threads),
    column("open files", false, |s| s.files),
];

/// Takes samples of one server.
pub(crate) struct Sampler {
    pid: u32,
    member: PathBuf,
    load: Arc<Load>,
    last: Option<(Instant, f64)>,
}

impl Sampler {
    pub(crate) fn new(server: &Server, load: Arc<Load>) -> Self {
        let member = server.dir.join("data").join("member");
        Self { pid: server.child.id(), member, load, last: None }
    }

    /// What is true now, and what happened since the last call.
    pub(crate) async fn take(&mut self, seconds: f64) -> Result<Sample, String> {
        let status = self.load.maintenance().status(pb::StatusRequest {}).await;
        let status = status.map_err(|status| format!("status: {status}"))?.into_inner();
        let mut latencies = self.load.take_latencies();
        latencies.sort_unstable();
        let rank = |share: usize| {
            let at = (latencies.len() * share / 100).min(latencies.len().saturating_sub(1));
            latencies.get(at).map_or(0.0, |micros| f64::from(*micros) / 1e3)
        };
        let (now, cpu) = (Instant::now(), compare::cpu_seconds(self.pid));
        let (since, used) = self.last.replace((now, cpu)).map_or((1.0, 0.0), |(then, before)| {
            (now.duration_since(then).as_secs_f64().max(1e-3), cpu - before)
        });
        let count = |what: &str| {
            let entries = fs::read_dir(format!("/proc/{}/{what}", self.pid));
            entries.map_or(0, Iterator::count) as f64
        };
        Ok(Sample {
            seconds,
            rss_mib: compare::rss_mib(self.pid) as f64,
            state_mib: disk(&self.member.join("state")),
            wal_mib: disk(&self.member.join("wal")),
            db_mib: status.db_size as f64 / MIB,
            in_use_mib: status.db_size_in_use as f64 / MIB,
            puts: latencies.len() as f64 / since,
            p50_ms: rank(50),
            p99_ms: rank(99),
            cpu_percent: used / since * 100.0,
            threads: count("task"),
            files: count("fd"),
        })
    }
}

fn disk(dir: &Path) -> f64 {
    compare::disk_mib(dir) as f64
}

/// All samples as a table for other programs.
pub(crate) fn csv(samples: &[Sample]) -> String {
    let names: Vec<&str> = COLUMNS.iter().map(|column| column.name).collect();
    let mut text = format!("seconds,{}\n", names.join(","));
    for sample in samples {
        let figures = COLUMNS.iter().map(|column| format!("{:.2}", (column.of)(sample)));
        let figures: Vec<String> = figures.collect();
        text += &format!("{:.1},{}\n", sample.seconds, figures.join(","));
    }
    text
}
