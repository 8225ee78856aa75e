//! The bodies of the fuzz targets `wire_to_command` and `gateway_json` for a bounded time on fixed
//! seeds, and with the first one step further: what it lets through is applied to a store, which must
//! neither fail nor go back.
//!
//! `KELSON_FUZZ_SECONDS` sets the time, `KELSON_FUZZ_SEED` repeats one seed.

use std::time::{Duration, Instant};

use bytes::Bytes;
use kelson_api::Message;
use kelson_api::command::Command;
use kelson_api::command::command::Op;
use kelson_api::etcdserverpb::compare::TargetUnion;
use kelson_api::etcdserverpb::request_op::Request;
use kelson_api::etcdserverpb::{
    AlarmRequest, CompactionRequest, Compare, DeleteRangeRequest, LeaseGrantRequest,
    LeaseRevokeRequest, PutRequest, RangeRequest, RequestOp, TxnRequest,
};
use kelson_server::fuzz::{auth_token, gateway_json, wire_to_command};
use kelson_storage::log::{Durable, DurablePublisher};
use kelson_storage::{DataDir, LogId, Options, Reply, Store};

/// A small generator, so that a seed names an input for ever.
struct Random(u64);

impl Random {
    fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % bound
    }

    fn chance(&mut self, of: u64) -> bool {
        self.below(of) == 0
    }

    /// Few keys, so that requests meet; now and then an empty or an odd one.
    fn key(&mut self) -> Bytes {
        match self.below(12) {
            0 => Bytes::new(),
            1 => Bytes::from_static(b"\0"),
            _ => Bytes::from(vec![b'a' + self.below(6) as u8]),
        }
    }

    fn number(&mut self) -> i64 {
        match self.below(8) {
            0 => i64::MIN,
            1 => i64::MAX,
            2 => -1,
            _ => i64::try_from(self.below(40)).expect("small"),
        }
    }

    fn put(&mut self) -> PutRequest {
        PutRequest {
            key: self.key(),
            value: Bytes::from(vec![b'v'; self.below(20) as usize]),
            lease: if self.chance(3) { self.number() } else { 0 },
            prev_kv: self.chance(2),
            ignore_value: self.chance(10),
            ignore_lease: self.chance(10),
        }
    }

    fn range(&mut self) -> RangeRequest {
        RangeRequest {
            key: self.key(),
            range_end: self.key(),
            limit: self.number(),
            revision: if self.chance(2) { self.number() } else { 0 },
            sort_order: self.below(4) as i32,
            sort_target: self.below(6) as i32,
            keys_only: self.chance(3),
            count_only: self.chance(3),
            min_mod_revision: if self.chance(4) { self.number() } else { 0 },
            ..RangeRequest::default()
        }
    }

    fn delete(&mut self) -> DeleteRangeRequest {
        DeleteRangeRequest { key: self.key(), range_end: self.key(), prev_kv: self.chance(2) }
    }

    fn compare(&mut self) -> Compare {
        let target_union = match self.below(4) {
            0 => None,
            1 => Some(TargetUnion::Value(self.key())),
            2 => Some(TargetUnion::Version(self.number())),
            _ => Some(TargetUnion::ModRevision(self.number())),
        };
        Compare {
            result: self.below(5) as i32,
            target: self.below(6) as i32,
            key: self.key(),
            range_end: if self.chance(3) { self.key() } else { Bytes::new() },
            target_union,
        }
    }

    fn txn(&mut self, depth: u64) -> TxnRequest {
        let ops =
            |random: &mut Self| (0..random.below(4)).map(|_| random.op(depth)).collect::<Vec<_>>();
        let (success, failure) = (ops(self), ops(self));
        TxnRequest {
            compare: (0..self.below(3)).map(|_| self.compare()).collect(),
            success,
            failure,
        }
    }

    fn op(&mut self, depth: u64) -> RequestOp {
        let request = match self.below(if depth > 0 { 8 } else { 7 }) {
            0 if self.chance(4) => None,
            0..=2 => Some(Request::RequestPut(self.put())),
            3 | 4 => Some(Request::RequestRange(self.range())),
            5 | 6 => Some(Request::RequestDeleteRange(self.delete())),
            _ => Some(Request::RequestTxn(self.txn(depth - 1))),
        };
        RequestOp { request }
    }

    /// A well-formed request with its kind before it, sometimes damaged.
    fn input(&mut self) -> Vec<u8> {
        let kind = self.below(8) as u8;
        let bytes = match kind {
            0 => self.put().encode_to_vec(),
            1 => self.delete().encode_to_vec(),
            2 => self.txn(4).encode_to_vec(),
            3 => self.range().encode_to_vec(),
            4 => {
                let revision = self.number();
                CompactionRequest { revision, physical: self.chance(2) }.encode_to_vec()
            }
            5 => LeaseGrantRequest { ttl: self.number(), id: self.number() }.encode_to_vec(),
            6 => LeaseRevokeRequest { id: self.number() }.encode_to_vec(),
            _ => {
                // Seldom: an alarm refuses everything until it is cleared.
                let (action, alarm) = (self.below(4) as i32, self.below(30) as i32);
                AlarmRequest { action, member_id: self.below(2), alarm }.encode_to_vec()
            }
        };
        let mut input = [vec![kind], bytes].concat();
        if self.chance(3) {
            for _ in 0..=self.below(3) {
                let at = self.below(input.len() as u64) as usize;
                match self.below(3) {
                    0 => input[at] ^= 1 << self.below(8),
                    1 => input.truncate(at.max(1)),
                    _ => input.insert(at, self.below(256) as u8),
                }
            }
        }
        input
    }
}

/// A store of its own that applies what comes.
struct Applied {
    store: Store,
    index: u64,
    revision: i64,
    /// The log's end of the durable index: without it the store would take the log for closed.
    _log: DurablePublisher,
    _dir: tempfile::TempDir,
}

impl Applied {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        DataDir::open(dir.path()).expect("a data directory");
        let (durable, log) = Durable::manual(u64::MAX);
        let options = Options::new(dir.path());
        let (store, reader) = kelson_storage::open(&options, durable).expect("a store");
        Self { revision: reader.revision(), store, index: 0, _log: log, _dir: dir }
    }

    fn apply(&mut self, command: Command) {
        self.index += 1;
        let id = LogId { term: 1, index: self.index };
        let mut outcomes =
            self.store.apply(id, std::slice::from_ref(&command)).expect("no command is fatal");
        let outcome = outcomes.pop().expect("one command, one outcome");
        let raised = outcome.revision - self.revision;
        assert!(raised == 0 || raised == 1, "{command:?} moved the revision by {raised}");
        assert!(outcome.result.is_ok() || raised == 0, "a refusal changes nothing: {command:?}");
        if let (Some(Op::Txn(request)), Ok(Reply::Txn(answer))) = (&command.op, &outcome.result) {
            let branch = if answer.succeeded { &request.success } else { &request.failure };
            assert_eq!(answer.responses.len(), branch.len(), "one answer per operation");
        }
        self.revision = outcome.revision;
    }
}

/// Prints the seed if something panics.
struct Seed(u64);

impl Drop for Seed {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("failed; repeat with KELSON_FUZZ_SEED={}", self.0);
        }
    }
}

/// Pieces of what clients send to the JSON gateway, right and wrong.
const PIECES: &[&str] = &[
    "{",
    "}",
    "[",
    "]",
    ":",
    ",",
    " ",
    "\n",
    "\"",
    "null",
    "true",
    "-1",
    "1.5e3",
    "\"7\"",
    "01",
    "x",
    "\"\\u00e9\"",
    "\"\\ud800\"",
    "\"YQ==\"",
    "\"_-8\"",
    "{\"key\":\"YQ==\"}",
    "\"key\":",
    "\"limit\":",
    "\"success\":[",
    "{\"request_put\":{",
    "\"requestTxn\":{",
    "\"create_request\":{",
    "\"ID\":",
    "\"filters\":[\"NOPUT\",1]",
    "\"sort_order\":\"DESCEND\"",
    "\"nothing\":[{\"a\":\"}\"}]",
    "\"peerURLs\":[\"http://x\"]",
    "\"name\":\"<&>\"",
    "\"range_end\":\"AA\"",
    "\"memberID\":18446744073709551615",
];

impl Random {
    /// A body for the gateway behind the bytes that name its path and how it is cut.
    fn body(&mut self) -> Vec<u8> {
        let mut body = vec![self.below(256) as u8, self.below(256) as u8];
        // Now and then something that is right as a whole.
        if self.chance(3) {
            body.push(b'{');
            for number in 0..self.below(3) {
                let piece = PIECES[20 + self.below(PIECES.len() as u64 - 20) as usize];
                body.extend(if number > 0 { &b","[..] } else { b"" });
                body.extend(piece.as_bytes());
            }
            body.push(b'}');
        }
        for _ in 0..self.below(12) {
            body.extend(PIECES[self.below(PIECES.len() as u64) as usize].as_bytes());
        }
        if self.chance(4) {
            let at = self.below(body.len() as u64) as usize;
            body[at] = self.below(256) as u8;
        }
        body
    }
}

#[test]
fn bodies_for_the_gateway_are_refused_or_read() {
    let only = std::env::var("KELSON_FUZZ_SEED").ok();
    let only = only.map(|seed| seed.parse().expect("KELSON_FUZZ_SEED is a number"));
    let seconds = std::env::var("KELSON_FUZZ_SECONDS").ok().and_then(|it| it.parse().ok());
    let until = Instant::now() + Duration::from_secs(seconds.unwrap_or(4));
    let (mut seeds, mut read) = (0, 0);
    while seeds == 0 || only.is_none() && Instant::now() < until {
        let seed = Seed(only.unwrap_or(seeds));
        let mut random = Random::new(seed.0);
        for _ in 0..2000 {
            read += gateway_json(&random.body());
        }
        seeds += 1;
    }
    println!("seeds 0 to {}, {read} requests", seeds - 1);
    assert!(read > 100, "hardly anything is read");
}

#[test]
fn what_clients_send_is_refused_or_applied() {
    let only = std::env::var("KELSON_FUZZ_SEED").ok();
    let only = only.map(|seed| seed.parse().expect("KELSON_FUZZ_SEED is a number"));
    let seconds = std::env::var("KELSON_FUZZ_SECONDS").ok().and_then(|it| it.parse().ok());
    let until = Instant::now() + Duration::from_secs(seconds.unwrap_or(8));
    let (mut seeds, mut applied) = (0, 0);
    while seeds == 0 || only.is_none() && Instant::now() < until {
        let seed = Seed(only.unwrap_or(seeds));
        let mut random = Random::new(seed.0);
        let mut state = Applied::new();
        for _ in 0..2000 {
            if let Some(command) = wire_to_command(&random.input()) {
                state.apply(command);
                applied += 1;
            }
        }
        state.store.shutdown();
        seeds += 1;
    }
    println!("seeds 0 to {}, {applied} commands", seeds - 1);
    assert!(applied > 100, "hardly anything passes the checks");
}

/// Something like a token, a set of claims or a key, often damaged.
fn credentials(random: &mut Random) -> Vec<u8> {
    let texts: [&[u8]; 8] = [
        b"Bearer abcdefghijklmnop.17",
        b"abcdefghijklmnop.18446744073709551616",
        br#"{"username":"ann","revision":3,"exp":4000000000}"#,
        br#"{"username":"ann","revision":-1e300,"exp":1e400,"nbf":null}"#,
        br#"{"username":7,"revision":"3"}"#,
        include_bytes!("keys/ec_private_sec1.pem"),
        include_bytes!("keys/rsa_public.pem"),
        b"eyJhbGciOiJIUzI1NiJ9.e30.AAAA",
    ];
    let mut input = vec![random.below(2) as u8];
    input.extend_from_slice(texts[random.below(texts.len() as u64) as usize]);
    for _ in 0..random.below(5) {
        let at = random.below(input.len() as u64) as usize;
        match random.below(3) {
            0 => input[at] = random.below(256) as u8,
            1 => input.truncate(at.max(1)),
            _ => input.insert(at, random.below(256) as u8),
        }
    }
    input
}

#[test]
fn credentials_are_refused_or_read() {
    let only = std::env::var("KELSON_FUZZ_SEED").ok();
    let only = only.map(|seed| seed.parse().expect("KELSON_FUZZ_SEED is a number"));
    let seconds = std::env::var("KELSON_FUZZ_SECONDS").ok().and_then(|it| it.parse().ok());
    let until = Instant::now() + Duration::from_secs(seconds.unwrap_or(4));
    let mut seeds = 0;
    while seeds == 0 || only.is_none() && Instant::now() < until {
        let seed = Seed(only.unwrap_or(seeds));
        let mut random = Random::new(seed.0);
        for _ in 0..500 {
            auth_token(&credentials(&mut random));
        }
        seeds += 1;
    }
    println!("seeds 0 to {}", seeds - 1);
}
