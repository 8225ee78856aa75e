//! The load: clients that each speak to one member, one operation at a time, and record what came
//! back. They never retry and never share a process number between two operations in flight; the
//! commands start and stop them. What they call is drawn by the workloads, one module each.

mod mixed;
mod register;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::{Mutex, RwLock};

use crate::client::Client;
use crate::history::{Call, Clock, Op, Outcome, Recorder};
use crate::rng::Rng;
use crate::run::Plan;

/// What the clients do to the store.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Workload {
    /// Puts, transactions, compares, deletes and reads of a few keys and of all.
    #[default]
    Mixed,
    /// Puts, reads and compares of single keys, never crowded: what the second judge sees best.
    Register,
}

impl Workload {
    pub(crate) const ALL: [Self; 2] = [Self::Mixed, Self::Register];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Mixed => "mixed",
            Self::Register => "register",
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
            Self::Mixed | Self::Register => &[],
        }
    }

    /// The part of one client.
    pub(crate) fn script(self, shape: &Shape) -> Box<dyn Script> {
        match self {
            Self::Mixed => Box::new(mixed::Mixed { keys: shape.keys }),
            Self::Register => Box::new(register::Register { keys: shape.keys }),
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
}

impl Board {
    /// Remembers the mod revisions that an answer shows.
    fn note(&mut self, op: &Op) {
        if op.outcome != Outcome::Ok {
            return;
        }
        for row in &op.rows {
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
}

/// What all clients of a run share.
pub(crate) struct Load {
    pub(crate) clock: Clock,
    pub(crate) ops: Recorder<Op>,
    /// Members that clients may speak to at the moment.
    pub(crate) members: RwLock<Vec<usize>>,
    pub(crate) seed: u64,
    /// Linearizable reads are asked as serializable ones: the checks must notice.
    sabotage: bool,
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
    pub(crate) fn new(clock: Clock, ops: Recorder<Op>, members: Vec<usize>, plan: &Plan) -> Self {
        Self {
            clock,
            ops,
            members: RwLock::new(members),
            seed: plan.seed,
            sabotage: plan.local_reads,
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
            },
        };
        self.ops.add(op.clone());
        op
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
        _ => None,
    }
}

/// Starts the clients; the handles end after `Load::stop`.
pub(crate) fn start(load: &Arc<Load>, shape: Shape) -> Vec<tokio::task::JoinHandle<()>> {
    (0..shape.clients).map(|index| tokio::spawn(client(load.clone(), shape, index))).collect()
}

async fn client(load: Arc<Load>, shape: Shape, index: usize) {
    let mut rng = Rng::fork(load.seed, index as u64);
    let mut script = shape.workload.script(&shape);
    let mut process = load.process();
    let mut number = 0;
    let mut connection: Option<(usize, Client)> = None;
    let pause = Duration::from_secs(1) * shape.clients as u32 / shape.rate.max(1) as u32;
    while !load.stop.load(Ordering::Relaxed) {
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
        script.learn(&op, &mut load.board.lock());
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
