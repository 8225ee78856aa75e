//! The load: clients that each speak to one member, one operation at a time, and record what came
//! back. They never retry and never share a process number between two operations in flight; the
//! commands start and stop them. What they call is drawn by the workloads, one module each.

mod append;
mod cache;
mod compact;
mod kube;
mod lease;
mod lock;
mod members;
mod mixed;
mod range;
mod register;
mod set;
mod sidewatch;
mod txn;
mod watch;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::{Mutex, RwLock};

use crate::call::Range;
use crate::client::Client;
use crate::cluster::Target;
use crate::history::{Call, Clock, Detail, Note, Op, Outcome, Recorder};
use crate::rng::Rng;
use crate::run::Plan;
use crate::watcher::Watchers;

pub(crate) use compact::PREFIX as COMPACTED;
pub(crate) use kube::REGISTRY;
pub(crate) use lock::{FENCED, LOCK, PLAIN, fence};
pub(crate) use set::SETS;
pub(crate) use txn::{ACCOUNTS, BANK, START, balance};
pub(crate) use watch::PREFIX as WATCHED;

/// What the clients do to the store.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Workload {
    /// Puts, transactions, compares, deletes and reads of a few keys and of all.
    #[default]
    Mixed,
    /// Puts, reads and compares of single keys, never crowded: what the second judge sees best.
    Register,
    /// Unique elements added to one value; none may get lost.
    Set,
    /// Transactions on lists that are read and appended to.
    Append,
    /// Reads of ranges with all their options, also of the past and page by page.
    Range,
    /// Transfers between accounts, and transactions of many steps.
    Txn,
    /// Watchers of all kinds that come and go.
    Watch,
    /// Leases that are kept alive, revoked and left, and the keys on them.
    Lease,
    /// A lock made of a lease and a key, and effects fenced by it.
    Lock,
    /// What kube-apiserver does.
    Kube,
    /// Compaction, and reads around the compacted revision.
    Compact,
    /// Members added and removed, as clients see it.
    Members,
}

impl Workload {
    pub(crate) const ALL: [Self; 12] = [
        Self::Mixed,
        Self::Register,
        Self::Set,
        Self::Append,
        Self::Range,
        Self::Txn,
        Self::Watch,
        Self::Lease,
        Self::Lock,
        Self::Kube,
        Self::Compact,
        Self::Members,
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Mixed => "mixed",
            Self::Register => "register",
            Self::Set => "set",
            Self::Append => "append",
            Self::Range => "range",
            Self::Txn => "txn",
            Self::Watch => "watch",
            Self::Lease => "lease",
            Self::Lock => "lock",
            Self::Kube => "kube",
            Self::Compact => "compact",
            Self::Members => "members",
        }
    }

    /// The workload of this name.
    pub(crate) fn named(name: &str) -> Result<Self, String> {
        Self::ALL.into_iter().find(|workload| workload.name() == name).ok_or_else(|| {
            let names = Self::ALL.map(Self::name).join(", ");
            format!("no workload {name:?}; there are {names}")
        })
    }

    /// Flags that members need so that this workload sees all that it looks at.
    pub(crate) fn flags(self) -> &'static [&'static str] {
        match self {
            // By default progress is told every ten minutes. Answers are cut at half a MiB more than the
            // largest request.
            Self::Watch => {
                &["--watch-progress-notify-interval=500ms", "--max-request-bytes=850000"]
            }
            Self::Kube => &["--watch-progress-notify-interval=500ms"],
            // Else faults would keep it from changing the members most of the time.
            Self::Members => &["--strict-reconfig-check=false"],
            _ => &[],
        }
    }

    /// The part of one client, counted from 0.
    pub(crate) fn script(self, keys: u64, client: usize) -> Box<dyn Script> {
        match self {
            Self::Mixed => Box::new(mixed::Mixed { keys }),
            Self::Register => Box::new(register::Register { keys }),
            Self::Set => Box::new(set::Set::default()),
            Self::Append => Box::new(append::Append::default()),
            Self::Range => Box::new(range::Ranges::default()),
            Self::Txn => Box::new(txn::Txns::default()),
            Self::Watch => Box::new(watch::Watch),
            Self::Lease => Box::new(lease::Leases::default()),
            Self::Lock => Box::new(lock::Lock::default()),
            Self::Kube => Box::new(kube::Kube::default()),
            Self::Compact => Box::new(compact::Compact),
            Self::Members => Box::new(members::Members { keys, admin: client == 0, learner: None }),
        }
    }
}

/// One client's part in a workload: it draws calls and learns from what came of them. It never calls
/// anybody itself, so that made-up histories are drawn by the same code as real runs.
pub(crate) trait Script: Send {
    /// The next call. Every value written must begin with that of the turn, which is unique.
    fn draw(&mut self, turn: &mut Turn<'_>) -> Call;

    /// What came of the last call.
    fn learn(&mut self, op: &Op, board: &mut Board);
}

/// What a client has at hand when it draws a call.
pub(crate) struct Turn<'a> {
    pub(crate) rng: &'a mut Rng,
    pub(crate) board: &'a mut Board,
    /// Unique to this turn.
    pub(crate) value: String,
}

/// What the clients of a run tell each other. They draw from it; no check relies on it.
#[derive(Debug, Default)]
pub(crate) struct Board {
    /// Newest mod revision seen per key, so that some compares hold. Bounded by the keys.
    seen: HashMap<String, i64>,
    /// Newest revision in any answer.
    pub(crate) revision: i64,
    /// Newest revision that any watcher was sent: nothing newer is compacted.
    pub(crate) watched: i64,
    /// Newest revision that was compacted for sure.
    compacted: i64,
    /// Number of the set in use.
    set: u64,
    /// Lists in use, and how many there ever were.
    lists: Vec<String>,
    lists_made: u64,
    /// Learners that were ever asked for.
    learners: usize,
    /// To be recorded by whoever runs the script.
    pub(crate) notes: Vec<Note>,
}

impl Board {
    /// Remembers the revisions that an answer shows.
    pub(crate) fn note(&mut self, op: &Op) {
        if op.outcome != Outcome::Ok {
            return;
        }
        self.revision = self.revision.max(op.revision);
        for row in op.shown() {
            self.seen.insert(row.key.clone(), row.modified);
        }
        if op.wrote() {
            for (key, _) in op.call.puts() {
                self.seen.insert(key.to_owned(), op.revision);
            }
            if let Call::Delete { key } = &op.call {
                self.seen.insert(key.clone(), 0);
            }
        }
    }

    /// The newest mod revision of a key that anybody saw, 0 for none.
    fn modified(&self, key: &str) -> i64 {
        self.seen.get(key).copied().unwrap_or(0)
    }

    /// A revision to compact to: some way back, and shown by some watcher.
    fn old_revision(&self, rng: &mut Rng) -> i64 {
        (self.revision - rng.below(60) as i64).min(self.watched).max(1)
    }
}

/// What all clients of a run share.
pub(crate) struct Load {
    pub(crate) clock: Clock,
    pub(crate) ops: Recorder<Op>,
    pub(crate) notes: Recorder<Note>,
    /// Members that clients may speak to at the moment.
    pub(crate) members: RwLock<Vec<usize>>,
    pub(crate) seed: u64,
    /// Linearizable reads are asked as serializable ones: the checks must notice.
    sabotage: bool,
    /// etcd's API lets previous values be missing that are compacted; Kelson sends them all the same.
    previous_may_be_gone: bool,
    processes: AtomicU64,
    board: Mutex<Board>,
    stop: AtomicBool,
}

/// How the load looks.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    pub(crate) workload: Workload,
    pub(crate) clients: usize,
    pub(crate) keys: u64,
    /// Operations per second, all clients together: an upper bound.
    pub(crate) rate: u64,
    /// No answer within this is an unknown outcome.
    pub(crate) timeout: Duration,
}

impl Default for Shape {
    fn default() -> Self {
        Self {
            workload: Workload::Mixed,
            clients: 10,
            keys: 15,
            rate: 300,
            timeout: Duration::from_secs(2),
        }
    }
}

impl Load {
    pub(crate) fn new(
        clock: Clock,
        ops: Recorder<Op>,
        notes: Recorder<Note>,
        members: Vec<usize>,
        plan: &Plan,
    ) -> Self {
        Self {
            clock,
            ops,
            notes,
            members: RwLock::new(members),
            seed: plan.seed,
            sabotage: plan.local_reads,
            previous_may_be_gone: plan.target == Target::Etcd,
            processes: AtomicU64::new(1),
            board: Mutex::default(),
            stop: AtomicBool::new(false),
        }
    }

    /// A process number that nobody had before.
    pub(crate) fn process(&self) -> u64 {
        self.processes.fetch_add(1, Ordering::Relaxed)
    }

    /// Makes one call and records it, whatever comes back.
    pub(crate) async fn perform(
        &self,
        client: &Client,
        process: u64,
        member: usize,
        call: Call,
    ) -> Op {
        let start = self.clock.now();
        let answer = match sabotaged(&call).filter(|_| self.sabotage) {
            Some(weaker) => client.call(&weaker).await,
            None => client.call(&call).await,
        };
        let end = self.clock.now();
        let op = match answer {
            Ok(answer) => Op {
                process,
                member,
                call,
                start,
                end,
                outcome: Outcome::Ok,
                error: None,
                revision: answer.revision,
                succeeded: answer.succeeded,
                rows: answer.rows,
                detail: answer.detail,
            },
            Err(refusal) => Op {
                process,
                member,
                call,
                start,
                end,
                outcome: refusal.outcome,
                error: Some(refusal.text),
                revision: 0,
                succeeded: false,
                rows: Vec::new(),
                detail: Detail::default(),
            },
        };
        self.ops.add(op.clone());
        op
    }

    /// Lets a script learn, and records what it has to say.
    fn learn(&self, script: &mut dyn Script, op: &Op) {
        let mut board = self.board.lock();
        script.learn(op, &mut board);
        board.notes.drain(..).for_each(|note| self.notes.add(note));
    }

    /// True when the clients are to end.
    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// Ends all clients after the operations they are in.
    pub(crate) fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// A read as it is sent when members are to look as if they answered from what they have.
fn sabotaged(call: &Call) -> Option<Call> {
    match call {
        Call::Get { key, .. } => Some(Call::Get { key: key.clone(), serializable: true }),
        Call::List { .. } => Some(Call::List { serializable: true }),
        Call::Range(range) => Some(Call::Range(Range { serializable: true, ..range.clone() })),
        _ => None,
    }
}

/// Starts the clients and what the workload needs beside them; the handles end after `Load::stop`.
pub(crate) fn start(
    load: &Arc<Load>,
    watchers: &Arc<Watchers>,
    shape: Shape,
) -> Vec<tokio::task::JoinHandle<()>> {
    let mut tasks: Vec<_> =
        (0..shape.clients).map(|index| tokio::spawn(client(load.clone(), shape, index))).collect();
    tasks.push(tokio::spawn(tell_watched(load.clone(), watchers.clone())));
    match shape.workload {
        Workload::Watch | Workload::Compact => {
            let workload = shape.workload;
            let wander =
                |number| sidewatch::wander(load.clone(), watchers.clone(), workload, number);
            tasks.extend((0..WANDERERS).map(|number| tokio::spawn(wander(number))));
        }
        Workload::Kube => {
            let members = load.members.read().clone();
            let keep = |member| cache::keep(load.clone(), watchers.clone(), member);
            tasks.extend(members.into_iter().map(|member| tokio::spawn(keep(member))));
        }
        _ => {}
    }
    tasks
}

/// Watchers that come and go, each with up to three watches on a stream.
const WANDERERS: u64 = 6;

/// Tells the clients how far the watchers are.
async fn tell_watched(load: Arc<Load>, watchers: Arc<Watchers>) {
    while !load.stopped() {
        load.board.lock().watched = watchers.newest();
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn client(load: Arc<Load>, shape: Shape, index: usize) {
    let mut rng = Rng::fork(load.seed, index as u64);
    let mut script = shape.workload.script(shape.keys, index);
    let mut process = load.process();
    let mut number = 0;
    let mut connection: Option<(usize, Client)> = None;
    let pause = Duration::from_secs(1) * shape.clients as u32 / shape.rate.max(1) as u32;
    while !load.stopped() {
        // Between half and one and a half of the mean, so that clients do not march in step.
        tokio::time::sleep(pause.mul_f64(0.5 + rng.below(1000) as f64 / 1000.0)).await;
        let member = {
            let members = load.members.read();
            members[index % members.len()]
        };
        let (at, client) =
            connection.take().unwrap_or_else(|| (member, Client::new(member, shape.timeout)));
        number += 1;
        let value = format!("{process}.{number}");
        let call = {
            let board = &mut load.board.lock();
            script.draw(&mut Turn { rng: &mut rng, board, value })
        };
        let op = load.perform(&client, process, at, call).await;
        load.learn(&mut *script, &op);
        match op.outcome {
            // The member may have been taken out of the cluster meanwhile.
            Outcome::Ok if at == member => connection = Some((at, client)),
            Outcome::Ok => {}
            // A new connection: the old one may lie in a long TCP back-off.
            Outcome::Fail => tokio::time::sleep(Duration::from_millis(50)).await,
            Outcome::Unknown => process = load.process(),
        }
    }
}
