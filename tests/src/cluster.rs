//! Several member processes that make one cluster on this machine: started, stopped, killed and added
//! one by one, real etcd or Kelson alike. Processes are killed when the handle is dropped.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use kelson_api::etcdserverpb as pb;
use pb::maintenance_client::MaintenanceClient;
use tonic::transport::Channel;

use crate::server::{free_port, http_ok};

/// How long something that must happen may take on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// A cluster and its directory.
pub struct Cluster {
    binary: PathBuf,
    dir: tempfile::TempDir,
    scheme: &'static str,
    extra: Vec<String>,
    members: Vec<Member>,
}

/// What is special about where a member runs.
#[derive(Clone, Default)]
pub struct Place {
    /// Its data directory, else one that goes with the cluster.
    pub data_dir: Option<PathBuf>,
    /// Further environment variables.
    pub env: Vec<(&'static str, PathBuf)>,
}

struct Member {
    client_port: u16,
    peer_port: u16,
    place: Place,
    /// How it finds the others at its first start.
    initial: Vec<String>,
    child: Option<Child>,
}

impl Cluster {
    /// Starts a cluster of this many members and waits until each serves. `scheme` is that of the
    /// peer URLs.
    pub fn start(binary: &Path, size: usize, scheme: &'static str, extra: &[String]) -> Cluster {
        let mut cluster = Cluster::of(binary, size, scheme, extra);
        let list = cluster.list(&(0..size).collect::<Vec<_>>());
        cluster.found(&[format!("--initial-cluster={list}")]);
        cluster
    }

    /// As [`Cluster::start`], one member at each of these places.
    pub fn start_at(binary: &Path, places: Vec<Place>, extra: &[String]) -> Cluster {
        let mut cluster = Cluster::of(binary, places.len(), "http", extra);
        for (member, place) in cluster.members.iter_mut().zip(places) {
            member.place = place;
        }
        let list = cluster.list(&(0..cluster.members.len()).collect::<Vec<_>>());
        cluster.found(&[format!("--initial-cluster={list}")]);
        cluster
    }

    /// As [`Cluster::start`], but members find each other by these flags.
    pub fn start_finding(binary: &Path, size: usize, flags: &[String]) -> Cluster {
        let mut cluster = Cluster::of(binary, size, "http", &[]);
        cluster.found(flags);
        cluster
    }

    /// Makes room for this many members; no process yet. Each gets its data, and then is started by
    /// [`Cluster::spawn_finding`].
    pub fn reserved(binary: &Path, size: usize) -> Cluster {
        Cluster::of(binary, size, "http", &[])
    }

    /// Runs another program from the next start of a member on.
    pub fn become_of(&mut self, binary: &Path) {
        self.binary = binary.to_path_buf();
    }

    /// The `--initial-cluster` of all members.
    pub fn initial_cluster(&self) -> String {
        self.list(&(0..self.members.len()).collect::<Vec<_>>())
    }

    fn of(binary: &Path, size: usize, scheme: &'static str, extra: &[String]) -> Cluster {
        let dir = tempfile::Builder::new().prefix("kelson-cluster-").tempdir().expect("temp dir");
        let mut cluster = Cluster {
            binary: binary.to_path_buf(),
            dir,
            scheme,
            extra: extra.to_vec(),
            members: Vec::new(),
        };
        for _ in 0..size {
            cluster.reserve();
        }
        cluster
    }

    fn found(&mut self, flags: &[String]) {
        for index in 0..self.members.len() {
            self.members[index].initial = flags.to_vec();
            self.spawn(index);
        }
        (0..self.members.len()).for_each(|index| self.wait_ready(index));
    }

    /// Makes room for one more member: ports and a name, no process yet. Returns its index.
    pub fn reserve(&mut self) -> usize {
        let (client_port, peer_port) = (free_port(), free_port());
        let (place, initial) = (Place::default(), Vec::new());
        self.members.push(Member { client_port, peer_port, place, initial, child: None });
        self.members.len() - 1
    }

    /// Starts the process of a reserved member that the cluster has been told of. `others` are the
    /// members that the cluster has beside it.
    pub fn join(&mut self, index: usize, others: &[usize]) {
        let named: Vec<usize> = others.iter().copied().chain([index]).collect();
        self.members[index].initial = vec![
            format!("--initial-cluster={}", self.list(&named)),
            "--initial-cluster-state=existing".to_owned(),
        ];
        self.spawn(index);
    }

    /// Starts the process of a reserved member that finds others by these flags.
    pub fn spawn_finding(&mut self, index: usize, flags: &[String]) {
        self.members[index].initial = flags.to_vec();
        self.spawn(index);
    }

    fn list(&self, members: &[usize]) -> String {
        let list: Vec<String> =
            members.iter().map(|i| format!("m{i}={}", self.peer_url(*i))).collect();
        list.join(",")
    }

    /// The peer URL of a member.
    pub fn peer_url(&self, index: usize) -> String {
        format!("{}://127.0.0.1:{}", self.scheme, self.members[index].peer_port)
    }

    /// The client endpoint of a member.
    pub fn endpoint(&self, index: usize) -> String {
        format!("http://127.0.0.1:{}", self.members[index].client_port)
    }

    /// A channel to a member; it connects again by itself.
    pub fn channel(&self, index: usize) -> Channel {
        Channel::from_shared(self.endpoint(index)).expect("a URL").connect_lazy()
    }

    /// The port that a member serves clients on.
    pub fn client_port(&self, index: usize) -> u16 {
        self.members[index].client_port
    }

    /// The data directory of a member.
    pub fn data_dir(&self, index: usize) -> PathBuf {
        let own = self.dir.path().join(format!("data{index}"));
        self.members[index].place.data_dir.clone().unwrap_or(own)
    }

    /// The file that holds what a member logs.
    pub fn log_path(&self, index: usize) -> PathBuf {
        self.dir.path().join(format!("log{index}"))
    }

    /// Starts the process of a member, again if it ran before.
    pub fn spawn(&mut self, index: usize) {
        self.spawn_with(index, &[]);
    }

    /// As [`Cluster::spawn`], with further flags this time.
    pub fn spawn_with(&mut self, index: usize, flags: &[String]) {
        let log = std::fs::OpenOptions::new().create(true).append(true).open(self.log_path(index));
        let (client, peer) = (self.endpoint(index), self.peer_url(index));
        let mut command = Command::new(&self.binary);
        command
            .arg(format!("--name=m{index}"))
            .arg(format!("--data-dir={}", self.data_dir(index).display()))
            .arg(format!("--listen-client-urls={client}"))
            .arg(format!("--advertise-client-urls={client}"))
            .arg(format!("--listen-peer-urls={peer}"))
            .arg(format!("--initial-advertise-peer-urls={peer}"))
            .args(&self.members[index].initial)
            .args(&self.extra)
            .args(flags)
            .envs(self.members[index].place.env.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log.expect("open the log file"));
        let child = command.spawn();
        let child = child.unwrap_or_else(|e| panic!("start {}: {e}", self.binary.display()));
        self.members[index].child = Some(child);
    }

    /// Waits until a member serves linearizable reads.
    pub fn wait_ready(&mut self, index: usize) {
        self.try_ready(index).unwrap_or_else(|log| panic!("member {index}: {log}"));
    }

    /// Waits until this path of a member answers 200.
    pub fn wait_for(&mut self, index: usize, path: &str) {
        self.try_wait_for(index, path).unwrap_or_else(|log| panic!("member {index}: {log}"));
    }

    /// As [`Cluster::wait_ready`]; `Err` holds the end of its log if it ended or took too long.
    pub fn try_ready(&mut self, index: usize) -> Result<(), String> {
        self.try_wait_for(index, "/health?exclude=NOSPACE&exclude=CORRUPT")
    }

    /// As [`Cluster::wait_for`]; `Err` holds the end of its log if it ended or took too long.
    pub fn try_wait_for(&mut self, index: usize, path: &str) -> Result<(), String> {
        let deadline = Instant::now() + PATIENCE;
        while !http_ok(self.members[index].client_port, path) {
            let child = self.members[index].child.as_mut().expect("it was started");
            if let Some(status) = child.try_wait().expect("wait for the member") {
                return Err(format!("it ended with {status}:\n{}", self.log_tail(index)));
            }
            if Instant::now() >= deadline {
                return Err(format!("no {path}:\n{}", self.log_tail(index)));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// SIGKILL, at once.
    pub fn kill(&mut self, index: usize) {
        if let Some(mut child) = self.members[index].child.take() {
            let _already_gone = child.kill();
            child.wait().expect("reap the member");
        }
    }

    /// SIGTERM, and waits for the end.
    pub fn stop(&mut self, index: usize) {
        self.signal(index, rustix::process::Signal::TERM);
        self.wait_end(index);
    }

    /// Lets a member stand still until [`Cluster::resume`]. Returns once all its threads do: on a busy
    /// machine some run on for a while after the signal, long enough to acknowledge a write.
    pub fn pause(&self, index: usize) {
        use rustix::process::{WaitId, WaitIdOptions, waitid};
        let pid = self.signal(index, rustix::process::Signal::STOP);
        let stopped = WaitIdOptions::STOPPED | WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
        waitid(WaitId::Pid(pid), stopped).expect("wait for the member");
    }

    /// Lets a paused member go on.
    pub fn resume(&self, index: usize) {
        self.signal(index, rustix::process::Signal::CONT);
    }

    fn signal(&self, index: usize, signal: rustix::process::Signal) -> rustix::process::Pid {
        let child = self.members[index].child.as_ref().expect("it runs");
        let pid = rustix::process::Pid::from_child(child);
        rustix::process::kill_process(pid, signal).expect("send a signal");
        pid
    }

    /// Waits until a member's process has ended by itself, and tells how.
    pub fn wait_end(&mut self, index: usize) -> std::process::ExitStatus {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let child = self.members[index].child.as_mut().expect("it runs");
            if let Some(status) = child.try_wait().expect("wait for the member") {
                self.members[index].child = None;
                return status;
            }
            let is_late = Instant::now() >= deadline;
            assert!(!is_late, "member {index} does not end:\n{}", self.log_tail(index));
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// The member that says to lead, once one does.
    pub async fn leader(&self) -> usize {
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            for index in 0..self.members.len() {
                let asked = async {
                    let mut client = MaintenanceClient::new(self.channel(index));
                    client.status(pb::StatusRequest {}).await
                };
                let Ok(Ok(answer)) = tokio::time::timeout(Duration::from_secs(2), asked).await
                else {
                    continue;
                };
                let status = answer.into_inner();
                let own = status.header.as_ref().map_or(0, |header| header.member_id);
                if self.members[index].child.is_some() && own != 0 && status.leader == own {
                    return index;
                }
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        panic!("no leader within {PATIENCE:?}");
    }

    /// Id of a member, by its own word.
    pub async fn id(&self, index: usize) -> u64 {
        let mut client = MaintenanceClient::new(self.channel(index));
        let status = client.status(pb::StatusRequest {}).await.expect("a status").into_inner();
        status.header.expect("a header").member_id
    }

    /// Last part of a member's log, for failure messages.
    pub fn log_tail(&self, index: usize) -> String {
        let text = std::fs::read_to_string(self.log_path(index)).unwrap_or_default();
        let tail: Vec<&str> = text.lines().rev().take(30).collect();
        tail.into_iter().rev().collect::<Vec<_>>().join("\n")
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        (0..self.members.len()).for_each(|index| self.kill(index));
    }
}
