//! A large database and a fresh member that must catch up with it: fills the store outside of the
//! recorded keys, then measures put latency idle and during the transfer, and the memory of the
//! sender and of the receiver. It shares the run of `jepsen replace`.

use std::io;
use std::time::Duration;

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use serde::Serialize;

use crate::client::Client;
use crate::cluster::Memory;
use crate::history::{Recorder, SPARSE};
use crate::nemesis::Done;
use crate::nemesis::member::join;
use crate::report::Extra;
use crate::rng::Rng;
use crate::run::{Run, Spread, Step};

/// Bytes of one value; a database of few large rows would hide what an index costs.
const VALUE: usize = 4 << 10;
/// Rows per transaction while filling: etcd's default bound is 128 operations.
const BATCH: u64 = 100;
/// Transactions in flight while filling.
const FLIGHT: usize = 4;
/// Small writes after the fill, so that the log no longer reaches back to the start and a fresh
/// member needs the state itself.
const AFTER: u64 = 12_000;
/// Rest between the fill and the first measurement.
const REST: Duration = Duration::from_secs(60);
/// How long the latency is measured before anything happens.
const IDLE: Duration = Duration::from_secs(20);
/// How long memory is watched after the catch-up.
const SETTLE: Duration = Duration::from_secs(20);
/// The latency is told for each such part of the catch-up, too: it has phases.
const WINDOW: Duration = Duration::from_secs(10);
/// Measured puts per second.
const RATE: u64 = 100;
/// What the latency may grow by, and what memory may grow by.
const FACTOR: f64 = 3.0;
const GROWTH: u64 = 300 << 20;

/// Fills the store and lets a member catch up.
pub(crate) async fn catch_up(run: &Run, mib: u64) -> io::Result<Extra> {
    std::fs::write(run.dir.join(SPARSE), "keys beside those that are watched were written\n")?;
    let rows = (mib << 20) / VALUE as u64;
    run.say(&format!("filling {mib} MiB: {rows} rows of {VALUE} bytes"));
    let samples = Peaks::start(run, [0, 0])?;
    let filled = tokio::select! {
        filled = fill(run, rows) => filled,
        never = samples.watch() => never,
    };
    if let Err(error) = filled {
        run.finding(format!("filling the store: {error}"));
        return Ok(Vec::new());
    }
    // Puts stalled for some hundred milliseconds within the first minute after a fill; that is neither
    // idle nor the work of the transfer.
    tokio::time::sleep(REST).await;
    let Some(leader) = run.monitor.settled(Duration::from_secs(30)).await else {
        run.finding("no leader after filling the store".into());
        return Ok(Vec::new());
    };
    run.say("measuring puts while nothing else happens");
    let idle = Puts::start(run, leader);
    tokio::time::sleep(IDLE).await;
    let idle = idle.stop().await;
    let before = run.cluster.lock().memory(leader).unwrap_or_default();
    let new = run.plan.members + run.plan.spare;
    let (from, start) = (run.clock.seconds(), run.clock.now());
    run.say(&format!("member {new} joins; the leader is {leader}"));
    let busy = Puts::start(run, leader);
    let samples = Peaks::start(run, [leader, new])?;
    let joined = tokio::select! {
        joined = join(run, new) => joined?,
        never = samples.watch() => never,
    };
    let busy = busy.stop().await;
    run.say(&format!("put p99 by {} s: {}", WINDOW.as_secs(), busy.by_window()));
    let (idle, busy) = (idle.spread(), busy.spread());
    if let Err(error) = joined {
        run.finding(format!("member {new} did not catch up: {error}"));
        return Ok(Vec::new());
    }
    let seconds = run.clock.seconds() - from;
    run.steps.add(Step {
        name: format!("member {new} catches up {mib} MiB"),
        from,
        to: run.clock.seconds(),
        writes: run.writes(start, run.clock.now()),
        recovery: run.converge(Duration::from_secs(60)).await,
        ..Default::default()
    });
    // The receiver may still be digesting.
    tokio::select! {
        () = tokio::time::sleep(SETTLE) => {}
        () = samples.watch() => {}
    }
    let settled = run.cluster.lock().memory(new).unwrap_or_default();
    let (sender, receiver) = samples.peaks();
    let growth = |peak: Memory, base: Memory| peak.anonymous.saturating_sub(base.anonymous);
    let grown = [growth(sender, before), growth(receiver, settled)];
    judge(run, &idle, &busy, grown);
    Ok(rows_of(seconds, &idle, &busy, [before, sender, receiver, settled], grown))
}

fn judge(run: &Run, idle: &Spread, busy: &Spread, grown: [u64; 2]) {
    if busy.p99 > FACTOR * idle.p99 {
        run.finding(format!(
            "put p99 {:.1} ms while a member caught up, {:.1} ms idle",
            busy.p99 * 1e3,
            idle.p99 * 1e3
        ));
    }
    for (side, grown) in ["sender", "receiver"].iter().zip(grown) {
        if grown > GROWTH {
            run.finding(format!("the {side} grew by {} MiB", grown >> 20));
        }
    }
}

fn rows_of(
    seconds: f64,
    idle: &Spread,
    busy: &Spread,
    [before, sender, receiver, settled]: [Memory; 4],
    grown: [u64; 2],
) -> Extra {
    let mib = |bytes: u64| (bytes >> 20) as f64;
    let row = |name: &str, value: f64, unit: &str| (name.to_owned(), value, unit.to_owned());
    vec![
        row("catch-up from add to promotion", seconds, "s"),
        row("put p99 idle", idle.p99 * 1e3, "ms"),
        row("put p99 during catch-up", busy.p99 * 1e3, "ms"),
        row("put median idle", idle.median * 1e3, "ms"),
        row("put median during catch-up", busy.median * 1e3, "ms"),
        row("put max during catch-up", busy.max * 1e3, "ms"),
        row("puts measured during catch-up", busy.count as f64, ""),
        row("sender, memory before (no mapped files)", mib(before.anonymous), "MiB"),
        row("sender, growth at most", mib(grown[0]), "MiB"),
        row("sender, resident at most", mib(sender.resident), "MiB"),
        row("receiver, memory after settling (no mapped files)", mib(settled.anonymous), "MiB"),
        row("receiver, peak above that", mib(grown[1]), "MiB"),
        row("receiver, resident at most", mib(receiver.resident), "MiB"),
    ]
}

async fn fill(run: &Run, rows: u64) -> Result<(), String> {
    let leader = run.monitor.leader().ok_or("no leader")?;
    let client = Client::new(leader, Duration::from_secs(60));
    let mut rng = Rng::fork(run.plan.seed, 99);
    let mut flying = FuturesUnordered::new();
    let batch = |number: u64, rng: &mut Rng| {
        let until = ((number + 1) * BATCH).min(rows);
        let value = |rng: &mut Rng| -> Vec<u8> {
            // Bytes that no compression shrinks.
            (0..VALUE / 8).flat_map(|_| rng.next().to_le_bytes()).collect()
        };
        (number * BATCH..until).map(|row| (format!("bulk/{row:09}"), value(rng))).collect()
    };
    let batches = rows.div_ceil(BATCH);
    for number in 0..batches {
        if flying.len() >= FLIGHT {
            finished(flying.next().await)?;
        }
        let rows: Vec<(String, Vec<u8>)> = batch(number, &mut rng);
        let client = client.clone();
        flying.push(async move { client.put_all(rows).await });
        if number % (batches / 10).max(1) == 0 {
            run.say(&format!("filled {} %", number * 100 / batches));
        }
    }
    while let Some(answer) = flying.next().await {
        finished(Some(answer))?;
    }
    let small = futures::stream::iter(0..AFTER).map(|number| {
        let (client, key) = (client.clone(), format!("small/{}", number % 100));
        async move { client.put(&key, b"small").await }
    });
    let mut small = small.buffer_unordered(64);
    while let Some(answer) = small.next().await {
        finished(Some(answer))?;
    }
    Ok(())
}

fn finished<T>(answer: Option<Result<T, tonic::Status>>) -> Result<(), String> {
    match answer {
        Some(Err(status)) => Err(status.to_string()),
        Some(Ok(_)) | None => Ok(()),
    }
}

/// Puts at a steady rate, each started on time whether or not those before have come back.
struct Puts {
    done: Done,
    task: tokio::task::JoinHandle<Took>,
}

/// When puts began, since the first, and how long they took. Unit: seconds.
#[derive(Default)]
struct Took(Vec<(f64, f64)>);

impl Took {
    fn spread(&self) -> Spread {
        Spread::of(self.0.iter().map(|(_, took)| *took).collect())
    }

    fn by_window(&self) -> String {
        let window = |(at, _): &(f64, f64)| (at / WINDOW.as_secs_f64()) as u64;
        let windows = self.0.chunk_by(|one, other| window(one) == window(other));
        let p99 = |part: &[(f64, f64)]| {
            let spread = Spread::of(part.iter().map(|(_, took)| *took).collect());
            format!("{:.0}", spread.p99 * 1e3)
        };
        format!("{} ms", windows.map(p99).collect::<Vec<_>>().join(" "))
    }
}

impl Puts {
    fn start(run: &Run, member: usize) -> Self {
        let done = Done::default();
        let stop = done.clone();
        let seed = run.plan.seed;
        let task = tokio::spawn(async move {
            let client = Client::new(member, Duration::from_secs(30));
            let mut rng = Rng::fork(seed, 55);
            let mut ticks = tokio::time::interval(Duration::from_secs(1) / RATE as u32);
            let mut flying = Vec::new();
            let begun = std::time::Instant::now();
            while !stop.get() {
                ticks.tick().await;
                let (client, key) = (client.clone(), format!("timed/{}", rng.below(1000)));
                flying.push(tokio::spawn(async move {
                    let start = std::time::Instant::now();
                    let answer = client.put(&key, &[b'x'; 256]).await;
                    let at = start.duration_since(begun).as_secs_f64();
                    answer.is_ok().then(|| (at, start.elapsed().as_secs_f64()))
                }));
            }
            let took = futures::future::join_all(flying).await.into_iter().flatten().flatten();
            Took(took.collect())
        });
        Self { done, task }
    }

    async fn stop(self) -> Took {
        self.done.set();
        self.task.await.unwrap_or_default()
    }
}

/// The largest memory of two members while something goes on; samples of all members go to a file.
struct Peaks<'a> {
    run: &'a Run,
    members: [usize; 2],
    peaks: parking_lot::Mutex<[Memory; 2]>,
    samples: Recorder<Sample>,
}

/// Memory of one member at one moment, in MiB.
#[derive(Clone, Serialize)]
struct Sample {
    at: f64,
    member: usize,
    resident: u64,
    anonymous: u64,
}

impl<'a> Peaks<'a> {
    fn start(run: &'a Run, members: [usize; 2]) -> io::Result<Self> {
        let samples = Recorder::create(&run.dir.join(format!("memory-{}.jsonl", members[1])))?;
        Ok(Self { run, members, peaks: parking_lot::Mutex::default(), samples })
    }

    /// Samples for ever; dropped when the other side of a select is done.
    async fn watch<T>(&self) -> T {
        loop {
            // Bound first: the loop's head would hold the lock that its body takes.
            let running = self.run.cluster.lock().running();
            for member in running {
                let Some(now) = self.run.cluster.lock().memory(member) else { continue };
                let mut peaks = self.peaks.lock();
                if let Some(index) = self.members.iter().position(|known| *known == member) {
                    peaks[index].resident = peaks[index].resident.max(now.resident);
                    peaks[index].anonymous = peaks[index].anonymous.max(now.anonymous);
                }
                let at = self.run.clock.seconds();
                let (resident, anonymous) = (now.resident >> 20, now.anonymous >> 20);
                self.samples.add(Sample { at, member, resident, anonymous });
            }
            tokio::time::sleep(Duration::from_millis(250)).await;
        }
    }

    fn peaks(&self) -> (Memory, Memory) {
        let peaks = self.peaks.lock();
        (peaks[0], peaks[1])
    }
}
