//! The load: clients that each speak to one member, one operation at a time, and record what came
//! back. They never retry and never share a process number between two operations in flight; the
//! commands start and stop them.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::{Mutex, RwLock};

use crate::client::{Client, PREFIX};
use crate::history::{Call, Clock, Op, Outcome, Recorder};
use crate::rng::Rng;
use crate::run::Plan;

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
    /// Newest mod revision seen per key, so that some compares hold. Bounded by the keys.
    seen: Mutex<HashMap<String, i64>>,
    stop: AtomicBool,
}

/// How the load looks.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    pub(crate) clients: usize,
    pub(crate) keys: u64,
    /// Operations per second, all clients together: an upper bound.
    pub(crate) rate: u64,
    /// No answer within this is an unknown outcome.
    pub(crate) timeout: Duration,
}

impl Default for Shape {
    fn default() -> Self {
        Self { clients: 10, keys: 15, rate: 300, timeout: Duration::from_secs(2) }
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
            seen: Mutex::default(),
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

    fn learn(&self, op: &Op) {
        if op.outcome != Outcome::Ok {
            return;
        }
        let mut seen = self.seen.lock();
        for row in &op.rows {
            seen.insert(row.key.clone(), row.modified);
        }
        if op.wrote() {
            for (key, _) in op.call.puts() {
                seen.insert(key.to_owned(), op.revision);
            }
            if let Call::Delete { key } = &op.call {
                seen.insert(key.clone(), 0);
            }
        }
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
        let call = draw(&load, &mut rng, shape.keys, &format!("{process}.{number}"));
        let op = load.perform(&client, process, at, call).await;
        load.learn(&op);
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

/// Draws the next call. Every written value is unique, which the checks rely on.
fn draw(load: &Load, rng: &mut Rng, keys: u64, value: &str) -> Call {
    let number = rng.below(keys);
    let key = format!("{PREFIX}{number}");
    let value = value.to_owned();
    match rng.below(100) {
        0..25 => Call::Put { key, value },
        25..33 => {
            // A transaction may not put one key twice.
            let other = format!("{PREFIX}{}", (number + 1 + rng.below(keys - 1)) % keys);
            let second = format!("{value}.b");
            Call::PutTwo { first: (key, value), second: (other, second) }
        }
        33..55 => {
            let expect = load.seen.lock().get(&key).copied().unwrap_or(0);
            Call::Cas { key, expect, value }
        }
        55..61 => Call::Delete { key },
        61..78 => Call::Get { key, serializable: false },
        78..86 => Call::Get { key, serializable: true },
        86..94 => Call::List { serializable: false },
        _ => Call::List { serializable: true },
    }
}
