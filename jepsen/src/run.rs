//! One run from end to end: network, members, load, watchers and monitor, then healing, the last
//! questions, the judgment and the files. Commands only say what happens in between.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicUsize, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use serde::Serialize;
use tokio::task::JoinHandle;

use kelson_image::Kind;

use crate::args::Args;
use crate::attack::FaultRecord;
use crate::capture::CAPTURE;
use crate::check::{self, Violation};
use crate::client::{Client, PREFIX, get, list};
use crate::cluster::{Cluster, Setup, Target};
use crate::fabric::{CONTROLLER, Fabric};
use crate::history::{Call, Clock, Final, History, Outcome, Recorder, SPARSE};
use crate::monitor::Monitor;
use crate::watcher::Watchers;
use crate::workload::{self, Load, Shape};
use crate::{report, sys};

/// What a command asks of a run.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    /// Name of the command, part of the directory's name.
    pub(crate) name: String,
    pub(crate) target: Target,
    pub(crate) bin: PathBuf,
    /// Members at the start.
    pub(crate) members: usize,
    /// Places in the network for members that come later.
    pub(crate) spare: usize,
    /// Further flags for the members.
    pub(crate) extra: Vec<String>,
    pub(crate) seed: u64,
    pub(crate) store: PathBuf,
    /// Keep data directories even when nothing is wrong.
    pub(crate) keep: bool,
    /// Send linearizable reads as serializable ones, to see the checks find stale answers.
    pub(crate) local_reads: bool,
    /// The run directory, where it is not to be named after the command and the seed.
    pub(crate) into: Option<PathBuf>,
    /// Members' data lie on file systems of their own.
    pub(crate) disk: Option<Kind>,
    /// The library that is preloaded into members.
    pub(crate) shim: Option<PathBuf>,
    /// No namespaces: everything on the loopback device.
    pub(crate) rootless: bool,
}

impl Plan {
    /// Reads the flags that all commands share.
    pub(crate) fn from_args(name: &str, args: &mut Args) -> Result<Self, String> {
        let target = match args.text("target", "kelson")?.as_str() {
            "kelson" => Target::Kelson,
            "etcd" => Target::Etcd,
            other => return Err(format!("--target is kelson or etcd, not {other:?}")),
        };
        let default = target.default_bin().display().to_string();
        let members = args.number("members", 3)? as usize;
        if !(1..=7).contains(&members) {
            return Err("--members is 1 to 7".into());
        }
        let time = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        let time = time.map_or(1, |since| since.as_millis() as u64);
        let store = std::env::temp_dir().join("kelson-jepsen").display().to_string();
        let into = args.text("into", "")?;
        Ok(Self {
            name: name.to_owned(),
            target,
            bin: PathBuf::from(args.text("bin", &default)?),
            members,
            spare: 0,
            extra: args.many("flag"),
            seed: args.number("seed", time)?,
            store: PathBuf::from(args.text("store", &store)?),
            keep: args.switch("keep-data"),
            local_reads: args.switch("sabotage-local-reads"),
            into: (!into.is_empty()).then(|| PathBuf::from(into)),
            disk: None,
            shim: None,
            rootless: false,
        })
    }
}

/// A fault or another step of a run, as the report tells it.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct Step {
    pub(crate) name: String,
    /// Seconds since the run began.
    pub(crate) from: f64,
    pub(crate) to: f64,
    /// Packets that the network dropped meanwhile.
    pub(crate) dropped: u64,
    /// Writes acknowledged meanwhile.
    pub(crate) writes: usize,
    /// Seconds from healing until every member served again.
    pub(crate) recovery: Option<f64>,
    /// Terms that got a leader in the ten seconds after healing.
    pub(crate) changes: Option<usize>,
    pub(crate) note: String,
}

/// A cluster under observation.
pub(crate) struct Run {
    pub(crate) plan: Plan,
    pub(crate) dir: PathBuf,
    pub(crate) clock: Clock,
    pub(crate) fabric: Fabric,
    pub(crate) cluster: Mutex<Cluster>,
    pub(crate) load: Arc<Load>,
    pub(crate) watchers: Arc<Watchers>,
    pub(crate) monitor: Arc<Monitor>,
    pub(crate) steps: Recorder<Step>,
    pub(crate) faults: Recorder<FaultRecord>,
    /// What commands found wrong beside the history.
    pub(crate) findings: Mutex<Vec<String>>,
    /// What was to be tested and was not.
    gaps: Mutex<Vec<String>>,
    /// The place of the member that joins next.
    next: AtomicUsize,
    /// Revisions before this one may be gone.
    pub(crate) compacted: AtomicI64,
    clients: Mutex<Vec<JoinHandle<()>>>,
}

/// How a run ended.
#[derive(Clone, Debug)]
pub(crate) struct Verdict {
    pub(crate) violations: Vec<Violation>,
    pub(crate) findings: Vec<String>,
    /// What was to be tested and was not: such a run has not passed.
    pub(crate) gaps: Vec<String>,
}

impl Verdict {
    /// True if nothing was seen broken.
    pub(crate) fn unbroken(&self) -> bool {
        self.violations.is_empty() && self.findings.is_empty()
    }

    pub(crate) fn valid(&self) -> bool {
        self.unbroken() && self.gaps.is_empty()
    }

    /// In one word.
    pub(crate) fn word(&self) -> &'static str {
        match (self.unbroken(), self.gaps.is_empty()) {
            (false, _) => "VIOLATED",
            (true, false) => "NOT COVERED",
            (true, true) => "valid",
        }
    }

    /// As a command ends: an error where nothing was broken and not all was tested.
    pub(crate) fn end(&self) -> Result<bool, String> {
        match self.gaps.first().filter(|_| self.unbroken()) {
            Some(gap) => Err(format!("not all was tested: {gap}")),
            None => Ok(self.unbroken()),
        }
    }
}

/// Makes the network, moves this thread into the controller's place and runs `work` on a runtime all
/// of whose threads are born there.
pub(crate) fn inside<T>(
    plan: &Plan,
    work: impl AsyncFnOnce(Fabric) -> io::Result<T>,
) -> io::Result<T> {
    let fabric = if plan.rootless {
        Fabric::loopback()
    } else {
        let fabric = Fabric::new(plan.members + plan.spare, plan.seed)
            .map_err(|error| io::Error::other(format!("network namespaces need root: {error}")))?;
        fabric.enter(CONTROLLER)?;
        fabric
    };
    if plan.disk.is_some() {
        sys::own_mounts()
            .map_err(|error| io::Error::other(format!("mounting images needs root: {error}")))?;
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let result = runtime.block_on(work(fabric));
    runtime.shutdown_timeout(Duration::from_secs(1));
    result
}

impl Run {
    /// Starts the members and waits until each serves.
    pub(crate) async fn start(plan: Plan, fabric: Fabric) -> io::Result<Self> {
        let named = format!("{}-{}-{}", plan.name, plan.target.name(), plan.seed);
        let dir = plan.into.clone().unwrap_or_else(|| plan.store.join(named));
        std::fs::create_dir_all(&dir)?;
        println!("run directory {}", dir.display());
        report::describe(&plan, &dir)?;
        let setup = Setup {
            target: plan.target,
            bin: plan.bin.clone(),
            extra: plan.extra.clone(),
            dir: dir.clone(),
            disk: plan.disk,
            shim: plan.shim.clone(),
        };
        let mut cluster = Cluster::new(setup, fabric.clone())?;
        let members: Vec<usize> = (1..=plan.members).collect();
        for member in &members {
            cluster.start(*member, &members, false)?;
        }
        let clock = Clock::start();
        let file = |name: &str| dir.join(name);
        let ops = Recorder::create(&file("history.jsonl"))?;
        let notes = Recorder::create(&file("notes.jsonl"))?;
        let load = Arc::new(Load::new(clock, ops, notes, members.clone(), &plan));
        let watchers = Watchers::new(clock, Recorder::create(&file("watch.jsonl"))?);
        let monitor = Monitor::new(clock, Recorder::create(&file("leaders.jsonl"))?);
        let steps = Recorder::create(&file("steps.jsonl"))?;
        let faults = Recorder::create(&file("faults.jsonl"))?;
        let run = Self {
            next: AtomicUsize::new(plan.members + 1),
            compacted: AtomicI64::new(0),
            plan,
            dir,
            clock,
            fabric,
            cluster: Mutex::new(cluster),
            load,
            watchers,
            monitor,
            steps,
            faults,
            findings: Mutex::default(),
            gaps: Mutex::default(),
            clients: Mutex::default(),
        };
        for member in &members {
            run.monitor.watch(*member);
        }
        let ready = tokio::select! {
            ready = run.converge(Duration::from_secs(30)) => ready,
            never = run.first_death() => never,
        };
        let leader = match ready {
            Some(_) => run.monitor.settled(Duration::from_secs(10)).await,
            None => None,
        };
        if leader.is_none() {
            run.cluster.lock().stop(true)?;
            let logs = run.dir.display();
            return Err(io::Error::other(format!("the members never served; logs in {logs}")));
        }
        Ok(run)
    }

    /// Starts watchers on all members and the load.
    pub(crate) fn begin(&self, shape: Shape) {
        for member in self.load.members.read().iter() {
            self.watchers.watch(*member);
        }
        *self.clients.lock() = workload::start(&self.load, &self.watchers, shape);
    }

    /// Comes back with nothing when a member has ended by itself.
    async fn first_death(&self) -> Option<f64> {
        while self.cluster.lock().deaths().is_empty() {
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        None
    }

    /// Says something on the screen, with the time of the run.
    pub(crate) fn say(&self, text: &str) {
        println!("{:8.1} s  {text}", self.clock.seconds());
        io::stdout().flush().ok();
    }

    pub(crate) fn finding(&self, text: String) {
        self.say(&format!("FOUND: {text}"));
        self.findings.lock().push(text);
    }

    /// Something was to be tested and was not.
    pub(crate) fn gap(&self, text: String) {
        self.say(&format!("NOT COVERED: {text}"));
        self.gaps.lock().push(text);
    }

    /// A place where no member was before, if the plan has one left.
    pub(crate) fn fresh(&self) -> Option<usize> {
        let place = self.next.fetch_add(1, Ordering::Relaxed);
        (place <= self.plan.members + self.plan.spare).then_some(place)
    }

    /// Waits for a member to end by itself.
    pub(crate) async fn ended(&self, member: usize, within: Duration) -> Option<ExitStatus> {
        let deadline = tokio::time::Instant::now() + within;
        loop {
            let status = self.cluster.lock().ended(member);
            if status.is_some() || tokio::time::Instant::now() > deadline {
                return status;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Waits until a member answers a linearizable read.
    pub(crate) async fn serves(&self, member: usize, within: Duration) -> Option<()> {
        let deadline = tokio::time::Instant::now() + within;
        loop {
            let client = Client::new(member, Duration::from_secs(1));
            if client.range(get(PREFIX, false)).await.is_ok() {
                return Some(());
            }
            if tokio::time::Instant::now() > deadline {
                return None;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Writes acknowledged between two moments.
    pub(crate) fn writes(&self, from: u64, to: u64) -> usize {
        self.load
            .ops
            .with(|ops| ops.iter().filter(|op| op.wrote() && op.end >= from && op.end < to).count())
    }

    /// Waits until every running member answers a linearizable read and, from what it has itself, a
    /// revision that is not older. Gives the time it took, or none if that never came.
    pub(crate) async fn converge(&self, within: Duration) -> Option<f64> {
        let start = self.clock.seconds();
        let deadline = tokio::time::Instant::now() + within;
        loop {
            if self.converged().await {
                return Some(self.clock.seconds() - start);
            }
            if tokio::time::Instant::now() > deadline {
                return None;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    async fn converged(&self) -> bool {
        let running = self.cluster.lock().running();
        let members = self.load.members.read().clone();
        let mut newest = 0;
        for local in [false, true] {
            for member in members.iter().filter(|member| running.contains(member)) {
                let client = Client::new(*member, Duration::from_secs(1));
                let Ok(answer) = client.range(get(PREFIX, local)).await else { return false };
                if local && answer.revision < newest {
                    return false;
                }
                newest = newest.max(answer.revision);
            }
        }
        members.iter().all(|member| running.contains(member))
    }

    /// Ends the load, lets the cluster heal, asks the last questions, judges and writes the report.
    pub(crate) async fn finish(&self, summary: report::Extra) -> io::Result<Verdict> {
        self.fabric.heal();
        self.load.stop();
        let clients = std::mem::take(&mut *self.clients.lock());
        futures::future::join_all(clients).await;
        if self.converge(Duration::from_secs(60)).await.is_none() {
            self.finding("not all members serve a minute after the last fault".into());
        }
        self.mark_end().await;
        let finals = self.finals().await;
        self.watchers.stop();
        let lines = Recorder::create(&self.dir.join("finals.jsonl"))?;
        finals.iter().for_each(|last| lines.add(last.clone()));
        let history = History {
            ops: self.load.ops.all()?,
            watches: self.watchers.records().all()?,
            finals: lines.all()?,
            notes: self.load.notes.all()?,
            leaders: self.monitor.sightings().all()?,
            sparse: self.dir.join(SPARSE).exists(),
        };
        for (member, status) in self.cluster.lock().deaths() {
            self.finding(format!("member {member} ended by itself: {status}"));
        }
        for alarm in self.cluster.lock().alarms().into_iter().take(10) {
            self.finding(format!("log of {alarm}"));
        }
        let violations = check::judge(&history);
        if !self.faults.all()?.is_empty() {
            self.uncovered(&history);
        }
        let (findings, gaps) = (self.findings.lock().clone(), self.gaps.lock().clone());
        let verdict = Verdict { violations, findings, gaps };
        self.steps.all()?;
        self.monitor.flush()?;
        let keep = self.plan.keep || !verdict.unbroken();
        self.cluster.lock().stop(keep)?;
        if !keep {
            std::fs::remove_file(self.dir.join(CAPTURE)).ok();
        }
        report::write(self, &history, &verdict, summary)?;
        Ok(verdict)
    }

    /// Every kind of operation must have succeeded once; but a learner that never started is never
    /// promoted.
    fn uncovered(&self, history: &History) {
        for (kind, [ok, fail, unknown]) in tally(history) {
            if ok == 0 && kind != "member-promote" {
                self.gap(format!("no {kind} succeeded: {fail} failed, {unknown} unknown"));
            }
        }
    }

    /// Writes a last recorded value, so that the newest revision is one that watchers are sent.
    async fn mark_end(&self) {
        for _ in 0..10 {
            let member = self.load.members.read()[0];
            let client = Client::new(member, Duration::from_secs(5));
            let process = self.load.process();
            // A new value each time: one without an answer may still take effect.
            let call = Call::Put { key: format!("{PREFIX}end"), value: format!("{process}.end") };
            if self.load.perform(&client, process, member, call).await.outcome == Outcome::Ok {
                return;
            }
        }
        self.finding("ten writes at the end were not answered".into());
    }

    /// What every member holds at one revision.
    async fn finals(&self) -> Vec<Final> {
        let mut finals = Vec::new();
        let members = self.load.members.read().clone();
        let mut revision = 0;
        for member in &members {
            let client = Client::new(*member, Duration::from_secs(5));
            if let Ok(answer) = client.range(get(PREFIX, false)).await {
                revision = answer.revision.max(revision);
            }
        }
        self.watched(&members, revision).await;
        for member in members {
            match self.last_words(member, revision).await {
                Ok(last) => finals.push(last),
                Err(status) => self.finding(format!("member {member}, last questions: {status}")),
            }
        }
        finals
    }

    /// Gives the watchers half a minute to come to the end.
    async fn watched(&self, members: &[usize], revision: i64) {
        for _ in 0..300 {
            if members.iter().all(|member| self.watchers.reached(*member) >= revision) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    async fn last_words(&self, member: usize, revision: i64) -> Result<Final, tonic::Status> {
        // Hashing reads the whole store.
        let client = Client::new(member, Duration::from_secs(120));
        let hash = client.hash_kv(revision).await?;
        let mut all = list(PREFIX, true);
        all.revision = revision;
        let rows = client.range(all).await?.rows;
        Ok(Final {
            member,
            revision,
            hash: hash.hash,
            compacted: hash.compact_revision,
            rows,
            watched: self.watchers.reached(member),
        })
    }
}

/// Percentiles of a set of numbers, by nearest rank.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(crate) struct Spread {
    pub(crate) count: usize,
    pub(crate) median: f64,
    pub(crate) p99: f64,
    pub(crate) max: f64,
}

impl Spread {
    pub(crate) fn of(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        let Some(last) = values.last() else { return Self::default() };
        let rank = |share: f64| {
            let index = (share * values.len() as f64).ceil() as usize;
            values[index.clamp(1, values.len()) - 1]
        };
        Self { count: values.len(), median: rank(0.5), p99: rank(0.99), max: *last }
    }
}

/// Operations of a history by kind and outcome: ok, fail, unknown.
pub(crate) fn tally(history: &History) -> std::collections::BTreeMap<&'static str, [usize; 3]> {
    let mut table: std::collections::BTreeMap<&'static str, [usize; 3]> = Default::default();
    for op in &history.ops {
        let column = match op.outcome {
            Outcome::Ok => 0,
            Outcome::Fail => 1,
            Outcome::Unknown => 2,
        };
        table.entry(op.call.kind()).or_default()[column] += 1;
    }
    table
}

/// The folder of a run as given on the command line must exist.
pub(crate) fn existing(path: &str) -> Result<&Path, String> {
    let path = Path::new(path);
    if path.is_dir() { Ok(path) } else { Err(format!("no run directory at {}", path.display())) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_values_that_were_measured() {
        let spread = Spread::of((1..=50).map(f64::from).collect());
        assert_eq!((spread.median, spread.p99, spread.max), (25.0, 50.0, 50.0));
        let two = Spread::of(vec![2.0, 1.0]);
        assert_eq!((two.count, two.median, two.p99), (2, 1.0, 2.0));
    }
}
