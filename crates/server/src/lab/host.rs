//! The lab's one loop: it owns the members' processes, takes commands and reports one at a time, and
//! shows the result. What a command does stands in `actions`; this file keeps the state true and
//! ends everything in order.
//!
//! Processes are started here only, by the thread that called [`run`]: the kernel's death signal
//! (`process`) follows that thread.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use rustix::process::Signal;
use rustls::ClientConfig;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{MissedTickBehavior, interval};
use tonic::transport::Channel;

use super::certs::Certs;
use super::control::{Answer as Told, Control, Request};
use super::folder::{Entry, Folder, Ports, name};
use super::fsync::FsyncTimes;
use super::links::{Link, Links};
use super::probe::{Answer, PERIOD, Probe, Report};
use super::process::Process;
use super::screen::{Front, Input};
use super::view::{NO_LEADER, Row, View};
use super::{control, dial, hints};

/// An answer that is older than this no longer tells what a member is.
const FRESH: Duration = Duration::from_secs(2);
/// Longest time for all members to stop in order; the server's own limit is half of it.
const STOP_TIMEOUT: Duration = Duration::from_secs(15);
/// Being told to end again after this time means: now.
const IMPATIENT: Duration = Duration::from_secs(1);
/// Events that the view can look back on.
const EVENTS_MAX: usize = 200;
/// Reports, requests and results that wait for the loop; their senders wait when it is full.
const QUEUE_LEN: usize = 64;

/// Where the answer to a command goes.
pub(crate) enum Reply {
    /// To another shell.
    Shell(oneshot::Sender<Told>),
    /// To this lab's own terminal or output.
    Here,
    /// To nobody: what happens is only noted.
    Nobody,
}

/// The result of work that the loop did not wait for.
pub(crate) enum Done {
    /// A new member is in the cluster's list and may start.
    Added {
        /// Its number and what it must start with.
        entry: Entry,
        /// It becomes a voter later.
        promote: bool,
        /// Who asked.
        reply: Reply,
    },
    /// A member is out of the list.
    Removed {
        /// Its number.
        number: u16,
        /// Who asked.
        reply: Reply,
    },
    /// Anything else that ended: a text to show.
    Told {
        /// The text.
        told: Told,
        /// Who asked.
        reply: Reply,
    },
}

/// One member as the lab holds it.
pub(crate) struct Member {
    pub(crate) entry: Entry,
    pub(crate) ports: Ports,
    pub(crate) process: Option<Process>,
    /// How the last process ended.
    pub(crate) ended: String,
    /// SIGTERM was sent.
    pub(crate) stopping: bool,
    /// Start again once it has ended.
    pub(crate) restart: bool,
    /// Who waits for its end.
    pub(crate) waiting: Vec<Reply>,
    pub(crate) channel: Channel,
    answer: Option<Answer>,
    /// When the answer came; nothing since the process started if `None`.
    answered: Option<Instant>,
    fsync: FsyncTimes,
    _link: Link,
    _probe: Probe,
}

/// The lab.
pub(crate) struct Host {
    pub(crate) folder: Folder,
    pub(crate) certs: Option<Certs>,
    tls: Option<Arc<ClientConfig>>,
    pub(crate) links: Links,
    pub(crate) members: BTreeMap<u16, Member>,
    /// Membership changes under way; `wait` waits for them too.
    pub(crate) changing: usize,
    /// Shells that wait for everything to serve, each with its deadline.
    pub(crate) waiting: Vec<(Instant, Reply)>,
    reports: mpsc::Sender<Report>,
    pub(crate) done: mpsc::Sender<Done>,
    /// When the end was first asked for.
    quitting: Option<Instant>,
    quit_replies: Vec<Reply>,
    led: (u64, u64),
    front: Front,
}

/// Runs a lab until it is told to end, and its members with it.
///
/// # Errors
/// A text for the user; nothing is left running.
pub(crate) async fn run(folder: Folder, plain: bool) -> Result<(), String> {
    let (reports, mut reports_rx) = mpsc::channel(QUEUE_LEN);
    let (done, mut done_rx) = mpsc::channel(QUEUE_LEN);
    let (requests, mut requests_rx) = mpsc::channel(QUEUE_LEN);
    let failed = |error: std::io::Error| format!("cannot handle signals: {error}");
    let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(failed)?;
    let mut hangup = signal(SignalKind::hangup()).map_err(failed)?;
    let mut child = signal(SignalKind::child()).map_err(failed)?;

    let socket = control::listen(&folder.path, requests)?;
    let mut host = Host::new(folder, reports, done)?;
    host.start_all().await?;
    super::say(&host.banner());
    let mut inputs = host.front.open(plain)?;
    let mut ticks = interval(PERIOD);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    while !host.finished() {
        // What ends things comes first; reports come last, as they never stop.
        tokio::select! {
            biased;
            _ = terminate.recv() => host.quit(None),
            _ = interrupt.recv() => host.quit(None),
            _ = hangup.recv() => host.quit(None),
            _ = child.recv() => host.reap(),
            Some(input) = inputs.recv() => host.input(input),
            Some(Request { command, reply }) = requests_rx.recv() => {
                host.act(command, Reply::Shell(reply));
            }
            Some(done) = done_rx.recv() => host.take_done(done).await,
            _ = ticks.tick() => host.tick(),
            Some(report) = reports_rx.recv() => host.take_report(report),
        }
    }
    host.end(socket).await;
    Ok(())
}

impl Host {
    fn new(
        folder: Folder,
        reports: mpsc::Sender<Report>,
        done: mpsc::Sender<Done>,
    ) -> Result<Self, String> {
        let certs = folder.record.tls.then(|| Certs::ensure(folder.tls_dir())).transpose()?;
        let tls = certs.as_ref().map(Certs::client_config).transpose()?;
        Ok(Self {
            folder,
            certs,
            tls,
            links: Links::default(),
            members: BTreeMap::new(),
            changing: 0,
            waiting: Vec::new(),
            reports,
            done,
            quitting: None,
            quit_replies: Vec::new(),
            led: (0, 0),
            front: Front::default(),
        })
    }

    async fn start_all(&mut self) -> Result<(), String> {
        for entry in self.folder.record.members.clone() {
            self.enlist(entry).await?;
        }
        let numbers: Vec<u16> = self.members.keys().copied().collect();
        numbers.into_iter().try_for_each(|number| self.start(number).map(drop))
    }

    /// Opens a member's link and begins to ask it; its process is not started yet.
    pub(crate) async fn enlist(&mut self, entry: Entry) -> Result<(), String> {
        let number = entry.number;
        let ports = self.folder.record.ports(number);
        let link = self.links.open(number, ports.advertised, ports.peer).await?;
        let probe = Probe::start(number, ports, self.tls.clone(), self.reports.clone());
        let member = Member {
            entry,
            ports,
            process: None,
            ended: "not started".to_owned(),
            stopping: false,
            restart: false,
            waiting: Vec::new(),
            channel: dial::channel(ports.client, self.tls.clone()),
            answer: None,
            answered: None,
            fsync: FsyncTimes::default(),
            _link: link,
            _probe: probe,
        };
        self.members.insert(number, member);
        Ok(())
    }

    /// Starts a member's process and returns its pid.
    pub(crate) fn start(&mut self, number: u16) -> Result<u32, String> {
        let member = self.members.get_mut(&number).ok_or("no such member")?;
        let process = Process::start(&self.folder, &member.entry, self.certs.as_ref())?;
        let pid = process.pid();
        member.process = Some(process);
        (member.stopping, member.restart, member.answered) = (false, false, None);
        self.links.set_pid(number, Some(pid));
        Ok(pid)
    }

    fn banner(&self) -> String {
        let record = &self.folder.record;
        let count = record.members.len();
        let members = if count == 1 { "one member" } else { "members" };
        let number = if count == 1 { String::new() } else { format!("{count} ") };
        format!(
            "kelson lab in {}: {number}{members}{}; logs are in the same folder\n\n{}",
            self.folder.path.display(),
            if record.tls { " with TLS" } else { "" },
            hints::lines(&self.folder, self.certs.as_ref()),
        )
    }

    /// Everything as it is now.
    pub(crate) fn view(&self) -> View {
        let names: BTreeMap<u64, String> = self
            .members
            .values()
            .filter_map(|member| Some((member.answer?.id, name(member.entry.number))))
            .collect();
        let fresh = self.members.values().filter(|member| member.is_fresh());
        let highest =
            fresh.filter_map(|member| member.answer).map(|answer| answer.raft_index).max();
        let rows = self.members.values().map(|member| self.row(member, &names, highest));
        let (term, leader) = self.leader().unwrap_or_default();
        View {
            dir: self.folder.path.display().to_string(),
            tls: self.folder.record.tls,
            leader: names.get(&leader).cloned(),
            term,
            members: rows.collect(),
        }
    }

    fn row(&self, member: &Member, names: &BTreeMap<u64, String>, highest: Option<u64>) -> Row {
        let answers = member.is_fresh();
        let isolated = self.links.is_isolated(member.entry.number);
        let seen = member.process.as_ref().and_then(Process::look);
        let mut row = Row {
            number: member.entry.number,
            name: name(member.entry.number),
            client_url: self.folder.record.url(member.ports.client),
            pid: member.process.as_ref().map(Process::pid),
            state: member.state(isolated, seen.is_some_and(|seen| seen.stopped)),
            answers,
            isolated,
            resident_bytes: seen.map(|seen| seen.resident_bytes),
            ..Row::default()
        };
        row.set_fsync(member.fsync);
        let Some(answer) = member.answer else { return row };
        row.id = Some(format!("{:x}", answer.id));
        row.role = answers.then(|| match answer {
            Answer { is_learner: true, .. } => "learner",
            Answer { leader: 0, .. } => NO_LEADER.unwrap_or_default(),
            Answer { id, leader, .. } if id == leader => "leader",
            _ => "follower",
        });
        row.leader = names.get(&answer.leader).filter(|_| answers).cloned();
        row.term = Some(answer.term);
        row.revision = Some(answer.revision);
        row.raft_index = Some(answer.raft_index);
        row.applied_index = Some(answer.applied_index);
        row.lag = highest.map(|highest| highest.saturating_sub(answer.applied_index));
        row.db_bytes = Some(answer.db_bytes);
        row
    }

    /// Term and id of the member that answers and calls itself leader in the highest term.
    pub(crate) fn leader(&self) -> Option<(u64, u64)> {
        let fresh = self.members.values().filter(|member| member.is_fresh());
        let leaders = fresh.filter_map(|member| member.answer).filter(|a| a.leader == a.id);
        leaders.map(|answer| (answer.term, answer.id)).max()
    }

    /// Number of that member.
    pub(crate) fn leader_number(&self) -> Option<u16> {
        let (_, id) = self.leader()?;
        let is_it = |member: &&Member| member.answer.is_some_and(|answer| answer.id == id);
        self.members.values().find(is_it).map(|member| member.entry.number)
    }

    /// Members that can be expected to serve: they run, are not paused and not cut off.
    fn expected(&self) -> impl Iterator<Item = &Member> {
        self.members.values().filter(|member| {
            let stopped = |process: &Process| process.look().is_none_or(|seen| seen.stopped);
            let runs = member.process.as_ref().is_some_and(|process| !stopped(process));
            runs && !member.stopping && !self.links.is_isolated(member.entry.number)
        })
    }

    /// A member through which the cluster's API can be asked, `but` if there is another.
    pub(crate) fn channel(&self, but: Option<u16>) -> Option<Channel> {
        let leader = self.leader_number();
        let rank = |member: &&Member| {
            let number = Some(member.entry.number);
            (number == but, number != leader)
        };
        self.expected()
            .filter(|member| member.is_fresh())
            .min_by_key(rank)
            .map(|member| member.channel.clone())
    }

    /// True when all expected members answer and follow one of them; an error when none runs.
    fn settled(&self) -> Result<bool, String> {
        let expected: Vec<&Member> = self.expected().collect();
        let starting = self.members.values().any(|member| member.restart);
        if expected.is_empty() && !starting && self.changing == 0 {
            return Err("no member runs that could serve".to_owned());
        }
        let answers: Vec<Answer> =
            expected.iter().filter(|m| m.is_fresh()).filter_map(|m| m.answer).collect();
        let leader = answers.first().map(|answer| answer.leader);
        let agree = answers.iter().all(|answer| Some(answer.leader) == leader)
            && answers.iter().any(|answer| Some(answer.id) == leader);
        Ok(agree && answers.len() == expected.len() && !starting && self.changing == 0)
    }

    /// Looks for members that have ended.
    fn reap(&mut self) {
        let numbers: Vec<u16> = self.members.keys().copied().collect();
        for number in numbers {
            let Some(member) = self.members.get_mut(&number) else { continue };
            let Some(how) = member.process.as_mut().and_then(Process::ended) else { continue };
            member.process = None;
            member.ended.clone_from(&how);
            (member.stopping, member.answered) = (false, None);
            let (restart, replies) = (member.restart, std::mem::take(&mut member.waiting));
            self.links.set_pid(number, None);
            let name = name(number);
            let told = if restart && self.quitting.is_none() {
                self.start(number).map(|pid| format!("{name} restarted as process {pid}"))
            } else {
                Ok(format!("{name} {how}"))
            };
            if replies.is_empty() {
                self.event(&match &told {
                    Ok(text) | Err(text) => text.clone(),
                });
            }
            replies.into_iter().for_each(|reply| self.reply(reply, told.clone()));
        }
    }

    fn take_report(&mut self, report: Report) {
        let Some(member) = self.members.get_mut(&report.number) else { return };
        if let Some(times) = report.fsync {
            member.fsync = times;
        }
        if let (Some(answer), true) = (report.answer, member.process.is_some()) {
            // The question may have been under way while the process was replaced; the next
            // report corrects it.
            member.answer = Some(answer);
            member.answered = Some(Instant::now());
        }
        let led = self.leader().unwrap_or_default();
        if led != self.led && led.0 >= self.led.0 && led.1 != 0 {
            self.led = led;
            if let Some(number) = self.leader_number() {
                self.event(&format!("{} leads in term {}", name(number), led.0));
            }
        }
    }

    fn tick(&mut self) {
        self.reap();
        self.answer_waiting();
        if self.quitting.is_some_and(|since| since.elapsed() > STOP_TIMEOUT) {
            self.signal_all(Signal::KILL);
        }
        if self.front.is_screen() {
            let view = self.view();
            self.draw(&view);
        }
    }

    fn answer_waiting(&mut self) {
        if self.waiting.is_empty() {
            return;
        }
        let settled = self.settled();
        let now = Instant::now();
        for (deadline, reply) in std::mem::take(&mut self.waiting) {
            match &settled {
                Ok(true) => {
                    let summary = self.view().summary();
                    self.show(reply, summary);
                }
                Err(text) => self.reply(reply, Err(text.clone())),
                Ok(false) if now > deadline => {
                    let text = format!("not all members serve yet:\n{}", self.view().text());
                    self.reply(reply, Err(text));
                }
                Ok(false) => self.waiting.push((deadline, reply)),
            }
        }
    }

    fn input(&mut self, input: Input) {
        let view = self.view();
        if let Some(asked) = self.front.take(input, &view) {
            match asked {
                Ok(command) => self.act(command, Reply::Here),
                Err(text) => self.reply(Reply::Here, Err(text)),
            }
        }
        self.draw(&view);
    }

    fn draw(&mut self, view: &View) {
        // A terminal can go away without a signal; nobody can see or use the lab then.
        if !self.front.draw(view) && !self.is_quitting() {
            self.quit(None);
        }
    }

    /// Gives an answer to whoever asked, and notes what was done.
    pub(crate) fn reply(&mut self, reply: Reply, told: Told) {
        match reply {
            Reply::Here => {
                if let Ok(text) = &told {
                    self.front.note(stamped(text), EVENTS_MAX);
                }
                self.front.tell(told);
            }
            Reply::Nobody => match &told {
                Ok(text) | Err(text) => self.event(text),
            },
            Reply::Shell(shell) => {
                if let Ok(text) = &told {
                    self.event(text.lines().next().unwrap_or_default());
                }
                // The shell may have been interrupted.
                let _gone = shell.send(told);
            }
        }
    }

    /// Answers a question of another shell; nothing has happened, so nothing is noted.
    pub(crate) fn show(&mut self, reply: Reply, text: String) {
        match reply {
            Reply::Here => self.front.show(text),
            Reply::Nobody => {}
            Reply::Shell(shell) => {
                let _gone = shell.send(Ok(text));
            }
        }
    }

    /// Notes that something happened.
    pub(crate) fn event(&mut self, text: &str) {
        self.front.event(stamped(text), EVENTS_MAX);
    }

    /// Asks all members to stop; asked again after a while, kills them.
    pub(crate) fn quit(&mut self, reply: Option<Reply>) {
        self.quit_replies.extend(reply);
        if let Some(since) = self.quitting {
            // A closed terminal sends its signal twice.
            if since.elapsed() > IMPATIENT {
                self.signal_all(Signal::KILL);
            }
            return;
        }
        self.quitting = Some(Instant::now());
        self.event("stopping all members");
        self.signal_all(Signal::TERM);
        // A paused member would never act on it.
        self.signal_all(Signal::CONT);
        for member in self.members.values_mut() {
            (member.stopping, member.restart) = (member.process.is_some(), false);
        }
    }

    /// The end was asked for.
    pub(crate) fn is_quitting(&self) -> bool {
        self.quitting.is_some()
    }

    fn signal_all(&self, signal: Signal) {
        let processes = self.members.values().filter_map(|member| member.process.as_ref());
        processes.for_each(|process| process.signal(signal));
    }

    fn finished(&self) -> bool {
        self.quitting.is_some() && self.members.values().all(|member| member.process.is_none())
    }

    async fn end(mut self, socket: Control) {
        self.front.close();
        let dir = self.folder.path.display().to_string();
        let text = format!("all members have stopped; 'kelson lab --dir {dir}' brings them back");
        super::say(&text);
        let replies = std::mem::take(&mut self.quit_replies);
        // The folder is free before anyone hears of the end and starts the next lab.
        drop(self);
        for reply in replies {
            if let Reply::Shell(shell) = reply {
                let _gone = shell.send(Ok(text.clone()));
            }
        }
        socket.drain().await;
    }
}

/// A text with the time of day in front, in UTC as in the members' logs.
fn stamped(text: &str) -> String {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    let seconds = now.map_or(0, |since| since.as_secs()) % 86_400;
    let (hour, minute, second) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    format!("{hour:02}:{minute:02}:{second:02} {text}")
}

impl Member {
    /// It runs and has answered lately.
    pub(crate) fn is_fresh(&self) -> bool {
        self.process.is_some() && self.answered.is_some_and(|at| at.elapsed() < FRESH)
    }

    fn state(&self, isolated: bool, stopped: bool) -> String {
        let state = match () {
            () if self.process.is_none() => self.ended.as_str(),
            () if stopped => "paused",
            () if self.stopping => "stopping",
            () if self.is_fresh() && isolated => return "isolated".to_owned(),
            () if self.is_fresh() => "running",
            () if self.answered.is_some() => "silent",
            () => "starting",
        };
        if isolated { format!("{state}, isolated") } else { state.to_owned() }
    }
}
