//! Question: how many entries a second does the raft log make durable, for small and large entries
//! and for one to many appends in flight, and how near is that to what the device can do?
//!
//! Ceiling: one append in flight cannot beat the bare fdatasync of the same group, which overwrites
//! 4 KiB of a zero-filled file in the same directory; many in flight share one fdatasync, so they
//! should reach (fdatasyncs per second) x (appends in flight) until the processor or the bandwidth
//! of the disk ends it. `KELSON_BENCH_DIR` names the directory; without it the target directory.

use std::fs::OpenOptions;
use std::hint::black_box;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use bytes::Bytes;
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use kelson_storage::LogId;
use kelson_storage::log::{Entry, Log, LogOptions};

/// Entries between two purges: the log then recycles its segments, as it does in production.
const PURGE_EVERY: u64 = 20_000;

fn bench_dir() -> PathBuf {
    let dir = std::env::var_os("KELSON_BENCH_DIR").map(PathBuf::from);
    dir.unwrap_or_else(|| PathBuf::from(env!("CARGO_TARGET_TMPDIR")))
}

/// Keeps a number of appends in flight: each answer makes room for the next one.
struct Load {
    log: Log,
    payload: Bytes,
    next: u64,
    answers: (Sender<()>, Receiver<()>),
}

impl Load {
    fn new(log: Log, bytes: usize) -> Load {
        let (sender, receiver) = channel();
        let vote = sender.clone();
        log.save_vote(
            Bytes::from_static(b"vote"),
            Box::new(move |result| {
                result.expect("the vote is saved");
                vote.send(()).expect("the bench is waiting");
            }),
        );
        receiver.recv().expect("the vote is saved");
        Load { log, payload: Bytes::from(vec![0x5A; bytes]), next: 1, answers: (sender, receiver) }
    }

    fn run(&mut self, appends: u64, in_flight: u64) -> Duration {
        let begun = Instant::now();
        let first = appends.min(in_flight);
        (0..first).for_each(|_| self.append());
        for done in 0..appends {
            self.answers.1.recv().expect("every append is answered");
            if done + first < appends {
                self.append();
            }
        }
        begun.elapsed()
    }

    fn append(&mut self) {
        let id = LogId { term: 1, index: self.next };
        let sender = self.answers.0.clone();
        let done = move |result: Result<(), _>| {
            result.expect("the append is durable");
            sender.send(()).expect("the bench is waiting");
        };
        let entry = Entry { id, kind: 0, payload: self.payload.clone() };
        self.log.append(vec![entry], Box::new(done));
        if self.next.is_multiple_of(PURGE_EVERY) {
            let upto = LogId { term: 1, index: self.next - PURGE_EVERY / 2 };
            self.log.purge(upto, Box::new(|result| result.expect("the purge is durable")));
        }
        self.next += 1;
    }
}

fn log_append(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("log_append");
    group.sample_size(20).measurement_time(Duration::from_secs(4));
    group.warm_up_time(Duration::from_secs(1));
    group.throughput(Throughput::Elements(1));
    let dir = tempfile::tempdir_in(bench_dir()).expect("a directory to write in");
    let bare = bare_file(&dir.path().join("bare"));
    let block = [0x5A; 4096];
    let mut blocks = (0..BARE_BLOCKS).cycle();
    group.bench_function("bare fdatasync of 4 KiB", |bencher| {
        bencher.iter(|| {
            let offset = blocks.next().expect("the blocks are endless") * 4096;
            bare.write_all_at(black_box(&block), offset).expect("the block is written");
            bare.sync_data().expect("the block is durable");
        });
    });
    for bytes in [128, 1024, 4096] {
        for in_flight in [1, 64, 512] {
            let dir = tempfile::tempdir_in(bench_dir()).expect("a directory to write in");
            let opened = Log::open(LogOptions::new(dir.path().join("wal"), [1; 16]));
            let mut load = Load::new(opened.expect("a new log opens").log, bytes);
            let id = BenchmarkId::new(format!("{bytes} bytes"), format!("{in_flight} in flight"));
            group.bench_function(id, |bencher| {
                bencher.iter_custom(|appends| load.run(appends, in_flight));
            });
            load.log.shutdown();
        }
    }
    group.finish();
}

const BARE_BLOCKS: u64 = 4096;

/// A file whose blocks are all written, as those of a log segment are.
fn bare_file(path: &std::path::Path) -> std::fs::File {
    let mut options = OpenOptions::new();
    let file = options.read(true).write(true).create_new(true).open(path).expect("a new file");
    for block in 0..BARE_BLOCKS {
        file.write_all_at(&[0; 4096], block * 4096).expect("the file is filled");
    }
    file.sync_all().expect("the file is durable");
    file
}

criterion_group!(benches, log_append);
criterion_main!(benches);
