//! What each command does to the lab. Signals are sent at once and answered when the process has
//! ended; changes of membership run beside the loop and come back to it as [`Done`].

use std::time::{Duration, Instant};

use rustix::process::Signal;

use super::args::MEMBERS_MAX;
use super::command::{Action, Command, Who};
use super::folder::{Entry, name};
use super::host::{Done, Host, Reply};
use super::{cluster, hints};

/// Longest answer to `wait`.
const WAIT_TIMEOUT: Duration = Duration::from_secs(60);
/// Shells that may wait at one time.
const WAITING_MAX: usize = 64;

impl Host {
    /// Does what is asked; the answer goes to `reply`, now or when it is done.
    pub(crate) fn act(&mut self, command: Command, reply: Reply) {
        match command {
            Command::Status { json } => {
                let view = self.view();
                self.show(reply, if json { view.json() } else { view.text() });
            }
            Command::Lines => {
                let lines = hints::lines(&self.folder, self.certs.as_ref());
                self.show(reply, lines);
            }
            Command::Quit => self.quit(Some(reply)),
            _ if self.is_quitting() => self.reply(reply, Err("the lab is ending".to_owned())),
            Command::Wait if self.waiting.len() < WAITING_MAX => {
                self.waiting.push((Instant::now() + WAIT_TIMEOUT, reply));
            }
            Command::Wait => self.reply(reply, Err("too many shells wait already".to_owned())),
            Command::Add { learner } => self.add(learner, reply),
            Command::Heal(None) => {
                let numbers: Vec<u16> = self.members.keys().copied().collect();
                let healed = numbers.into_iter().filter(|number| self.links.heal(*number));
                let names: Vec<String> = healed.map(name).collect();
                let told = if names.is_empty() {
                    "nothing was isolated".to_owned()
                } else {
                    format!("{} healed", names.join(", "))
                };
                self.reply(reply, Ok(told));
            }
            Command::Heal(Some(who)) => match self.find(who) {
                Ok(number) if self.links.heal(number) => {
                    self.reply(reply, Ok(format!("{} healed", name(number))));
                }
                Ok(number) => self.reply(reply, Err(format!("{} is not isolated", name(number)))),
                Err(text) => self.reply(reply, Err(text)),
            },
            Command::StartAll => {
                let told = self.start_ended();
                self.reply(reply, told);
            }
            Command::On(action, who) => match self.find(who) {
                Ok(number) => self.on(action, number, reply),
                Err(text) => self.reply(reply, Err(text)),
            },
        }
    }

    fn find(&self, who: Who) -> Result<u16, String> {
        match who {
            Who::Leader => self.leader_number().ok_or_else(|| "there is no leader now".to_owned()),
            Who::Number(number) if self.members.contains_key(&number) => Ok(number),
            Who::Number(number) => {
                let names: Vec<String> = self.members.keys().map(|known| name(*known)).collect();
                Err(format!("there is no {}; the members are {}", name(number), names.join(" ")))
            }
        }
    }

    fn on(&mut self, action: Action, number: u16, reply: Reply) {
        let told = match action {
            Action::Kill | Action::Stop | Action::Restart => {
                return self.stop_process(action, number, reply);
            }
            Action::Promote => return self.promote(number, reply),
            Action::Remove => return self.remove(number, reply),
            Action::Start => self.start_again(number),
            Action::Pause => self.freeze(number, true),
            Action::Resume => self.freeze(number, false),
            Action::Isolate if self.links.is_isolated(number) => {
                Err(format!("{} is isolated already", name(number)))
            }
            Action::Isolate => {
                self.links.isolate(number);
                Ok(format!("{} isolated", name(number)))
            }
        };
        self.reply(reply, told);
    }

    /// Ends a process; the answer waits for its end, and for the start after it.
    fn stop_process(&mut self, action: Action, number: u16, reply: Reply) {
        if action == Action::Restart
            && self.members.get(&number).is_some_and(|member| member.process.is_none())
        {
            let told = self.start_again(number);
            return self.reply(reply, told);
        }
        let Some(member) = self.members.get_mut(&number) else { return };
        let Some(process) = &member.process else {
            return self.reply(reply, Err(format!("{} does not run", name(number))));
        };
        if action == Action::Kill {
            process.signal(Signal::KILL);
        } else {
            process.signal(Signal::TERM);
            // A paused member would never act on it.
            process.signal(Signal::CONT);
            member.stopping = true;
        }
        member.restart = action == Action::Restart;
        member.waiting.push(reply);
    }

    fn start_ended(&mut self) -> Result<String, String> {
        let ended = self.members.iter().filter(|(_, member)| member.process.is_none());
        let ended: Vec<u16> = ended.map(|(number, _)| *number).collect();
        if ended.is_empty() {
            return Ok("all members run".to_owned());
        }
        let started: Result<Vec<_>, _> =
            ended.into_iter().map(|number| self.start_again(number)).collect();
        Ok(started?.join(", "))
    }

    fn start_again(&mut self, number: u16) -> Result<String, String> {
        let member = self.members.get(&number).ok_or("no such member")?;
        if let Some(process) = &member.process {
            return Err(format!("{} runs already as process {}", name(number), process.pid()));
        }
        let pid = self.start(number)?;
        Ok(format!("{} started as process {pid}", name(number)))
    }

    fn freeze(&mut self, number: u16, pause: bool) -> Result<String, String> {
        let name = name(number);
        let member = self.members.get(&number).ok_or("no such member")?;
        let process = member.process.as_ref().ok_or_else(|| format!("{name} does not run"))?;
        let paused = process.look().is_some_and(|seen| seen.stopped);
        match (pause, paused) {
            (true, true) => Err(format!("{name} is paused already")),
            (false, false) => Err(format!("{name} is not paused")),
            _ => {
                process.signal(if pause { Signal::STOP } else { Signal::CONT });
                Ok(format!("{name} {}", if pause { "paused" } else { "resumed" }))
            }
        }
    }

    /// Asks the cluster for a new member, beside the loop.
    fn add(&mut self, learner: bool, reply: Reply) {
        if self.members.len() + self.changing >= MEMBERS_MAX {
            return self.reply(reply, Err(format!("a lab has {MEMBERS_MAX} members at most")));
        }
        let Some(channel) = self.channel(None) else {
            return self.reply(reply, Err("no member answers that could be asked".to_owned()));
        };
        // The number is used up even if the cluster refuses: no name ever means two members.
        let number = match self.folder.reserve() {
            Ok(number) => number,
            Err(text) => return self.reply(reply, Err(text)),
        };
        let peer_url = self.peer_url(number);
        self.beside(async move {
            match cluster::add(channel, &name(number), &peer_url, true).await {
                Ok(initial_cluster) => {
                    let entry = Entry { number, initial_cluster, joined: true };
                    Done::Added { entry, promote: !learner, reply }
                }
                Err(text) => {
                    let told = Err(format!("cannot add {}: {text}", name(number)));
                    Done::Told { told, reply }
                }
            }
        });
    }

    fn promote(&mut self, number: u16, reply: Reply) {
        let Some(channel) = self.channel(None) else {
            return self.reply(reply, Err("no member answers that could be asked".to_owned()));
        };
        let peer_url = self.peer_url(number);
        self.beside(async move {
            let told = match cluster::promote(channel, &peer_url).await {
                Ok(()) => Ok(format!("{} has a vote", name(number))),
                Err(text) => Err(format!("cannot promote {}: {text}", name(number))),
            };
            Done::Told { told, reply }
        });
    }

    fn remove(&mut self, number: u16, reply: Reply) {
        if self.members.len() == 1 {
            return self.reply(reply, Err("the last member cannot be removed".to_owned()));
        }
        let Some(channel) = self.channel(Some(number)) else {
            return self.reply(reply, Err("no member answers that could be asked".to_owned()));
        };
        let peer_url = self.peer_url(number);
        self.beside(async move {
            match cluster::remove(channel, &peer_url).await {
                Ok(()) => Done::Removed { number, reply },
                Err(text) => {
                    let told = Err(format!("cannot remove {}: {text}", name(number)));
                    Done::Told { told, reply }
                }
            }
        });
    }

    fn peer_url(&self, number: u16) -> String {
        self.folder.record.url(self.folder.record.ports(number).advertised)
    }

    /// Runs `work` beside the loop, which takes the result.
    fn beside(&mut self, work: impl Future<Output = Done> + Send + 'static) {
        self.changing += 1;
        let results = self.done.clone();
        tokio::spawn(async move {
            // The loop is gone when the lab has ended.
            let _ended = results.send(work.await).await;
        });
    }

    /// Takes the result of work beside the loop.
    pub(crate) async fn take_done(&mut self, done: Done) {
        self.changing = self.changing.saturating_sub(1);
        let (reply, told) = match done {
            Done::Told { told, reply } => (reply, told),
            Done::Added { entry, promote, reply } => {
                (reply, self.begin_added(entry, promote).await)
            }
            Done::Removed { number, reply } => (reply, self.forget(number)),
        };
        self.reply(reply, told);
    }

    async fn begin_added(&mut self, entry: Entry, promote: bool) -> Result<String, String> {
        let number = entry.number;
        self.folder.record.members.push(entry.clone());
        self.folder.save()?;
        self.enlist(entry).await?;
        if self.is_quitting() {
            return Ok(format!("{} added; it starts with the lab", name(number)));
        }
        let pid = self.start(number)?;
        let mut text = format!("{} added as a learner, process {pid}", name(number));
        if promote {
            self.promote(number, Reply::Nobody);
            text.push_str("; it gets a vote once it has caught up");
        }
        Ok(text)
    }

    fn forget(&mut self, number: u16) -> Result<String, String> {
        self.links.heal(number);
        self.links.set_pid(number, None);
        if let Some(member) = self.members.remove(&number)
            && let Some(mut process) = member.process
        {
            process.kill();
            let told = Ok(format!("{} is gone", name(number)));
            member.waiting.into_iter().for_each(|reply| self.reply(reply, told.clone()));
        }
        self.folder.forget(number)?;
        Ok(format!("{} removed and its data deleted", name(number)))
    }
}
