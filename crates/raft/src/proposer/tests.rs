//! Tests of admission and packing, without consensus behind them.

use kelson_api::etcdserverpb::PutRequest;
use kelson_storage::log::LogOptions;
use tempfile::TempDir;

use super::*;

/// A proposer without consensus behind it: what is queued stays queued.
struct Rig {
    proposer: Arc<Proposer>,
    log: Log,
    _dir: TempDir,
    _status: watch::Sender<Status>,
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.log.shutdown();
    }
}

fn rig(timeout: Duration) -> Rig {
    let dir = tempfile::tempdir().expect("make a directory");
    let opened = Log::open(LogOptions::new(dir.path().join("wal"), [1; 16]));
    let log = opened.expect("open a new log").log;
    let progress = Arc::new(Progress::new(1, 0, Default::default(), Default::default()));
    let (_status, status) = watch::channel(Status::initial(2, 1, 0));
    let limits = Limits { max_request_bytes: 1_000_000, timeout };
    let proposer = Proposer::new(1, limits, Arc::default(), progress, log.clone(), status);
    Rig { proposer, log, _dir: dir, _status }
}

#[test]
fn a_second_start_within_a_second_takes_other_request_ids() {
    let start = |millis: u64| first_request_id(Duration::from_millis(1_800_000_000_000 + millis));
    // As many requests as nobody can make between the two.
    assert!(start(1) + 500_000 < start(2));
    assert_ne!(first_request_id(Duration::ZERO), 0, "0 is nobody's");
}

fn put(value_bytes: usize) -> Op {
    Op::Put(PutRequest { value: vec![0; value_bytes].into(), ..PutRequest::default() })
}

fn queued(request_id: u64, value_bytes: usize) -> Queued {
    let command = Command { request_id, origin: 1, asker: None, op: Some(put(value_bytes)) };
    let bytes = command.encoded_len();
    Queued { command, bytes }
}

impl Rig {
    /// Queues a command whose caller waits as long as the returned receiver lives.
    fn enqueue(
        &self,
        id: u64,
        bytes: usize,
        urgency: Urgency,
    ) -> tokio::sync::oneshot::Receiver<crate::waiters::Answered> {
        let deadline = Instant::now() + Duration::from_secs(3600);
        let receiver = self.proposer.waiters.add(id, deadline, 0);
        self.proposer.enqueue(queued(id, bytes), urgency).expect("there is room");
        receiver
    }

    fn next_ids(&self) -> Vec<u64> {
        let batch = self.proposer.next_batch().unwrap_or_default();
        batch.iter().map(|queued| queued.command.request_id).collect()
    }
}

#[tokio::test]
async fn full_queues_turn_callers_away() {
    let rig = rig(Duration::from_secs(60));
    for id in 0..URGENT_QUEUE as u64 {
        rig.proposer.enqueue(queued(id, 0), Urgency::Urgent).expect("below the bound");
    }
    let over = rig.proposer.enqueue(queued(0, 0), Urgency::Urgent);
    assert_eq!(over, Err(Error::TooManyRequests));
    rig.proposer.enqueue(queued(0, 0), Urgency::Normal).expect("the other queue has room");
    // Nobody waits for any of them, so none is proposed and all room comes back.
    assert!(rig.next_ids().is_empty());
    assert_eq!(rig.proposer.bytes_in_flight.load(Ordering::Relaxed), 0);
}

#[tokio::test]
async fn a_long_apply_gap_stops_clients_before_housekeeping() {
    let rig = rig(Duration::from_secs(60));
    rig.proposer.progress.set_committed(APPLY_GAP);
    assert_eq!(rig.proposer.admit(1, Urgency::Normal), Ok(()));
    rig.proposer.progress.set_committed(APPLY_GAP + 1);
    assert_eq!(rig.proposer.admit(1, Urgency::Normal), Err(Error::TooManyRequests));
    assert_eq!(rig.proposer.admit(1, Urgency::Urgent), Ok(()));
    rig.proposer.progress.set_committed(2 * APPLY_GAP + 1);
    assert_eq!(rig.proposer.admit(1, Urgency::Urgent), Err(Error::TooManyRequests));
}

#[tokio::test]
async fn bytes_in_flight_are_bounded() {
    let rig = rig(Duration::from_secs(60));
    rig.proposer.bytes_in_flight.store(BYTES_IN_FLIGHT - 10, Ordering::Relaxed);
    assert_eq!(rig.proposer.admit(10, Urgency::Normal), Ok(()));
    assert_eq!(rig.proposer.admit(11, Urgency::Normal), Err(Error::TooManyRequests));
    assert_eq!(rig.proposer.admit(1_000_001, Urgency::Normal), Err(Error::RequestTooLarge));
}

#[tokio::test]
async fn batches_take_urgent_first_and_end_at_their_bounds() {
    let rig = rig(Duration::from_secs(60));
    let mut callers = Vec::new();
    for id in 0..300 {
        callers.push(rig.enqueue(id, 1, Urgency::Normal));
    }
    callers.push(rig.enqueue(1000, 1, Urgency::Urgent));
    let first = rig.next_ids();
    assert_eq!(first.len(), BATCH_COMMANDS);
    assert_eq!(first[..3], [1000, 0, 1]);
    assert_eq!(rig.next_ids(), (255..300).collect::<Vec<u64>>());
    // One that is larger than a batch goes alone.
    for (id, bytes) in [(1, 10), (2, BATCH_BYTES + 1), (3, 10)] {
        callers.push(rig.enqueue(2000 + id, bytes, Urgency::Normal));
    }
    assert_eq!([rig.next_ids(), rig.next_ids(), rig.next_ids()], [[2001], [2002], [2003]]);
    assert!(rig.proposer.next_batch().is_none());
}

#[tokio::test]
async fn a_queued_command_dies_with_its_caller() {
    let rig = rig(Duration::from_secs(60));
    let mut leaving = Box::pin(rig.proposer.propose(None, put(1), Urgency::Normal));
    assert!(futures::poll!(&mut leaving).is_pending());
    let _staying = rig.enqueue(7, 1, Urgency::Normal);
    drop(leaving);
    assert_eq!(rig.next_ids(), [7]);
}

#[tokio::test]
async fn without_a_leader_a_proposal_is_surely_not_accepted() {
    let rig = rig(Duration::ZERO);
    let expiring = tokio::spawn(rig.proposer.clone().expire());
    let outcome = rig.proposer.propose(None, put(1), Urgency::Normal).await;
    assert_eq!(outcome.expect_err("nobody leads"), Error::ProposalNotAccepted);
    assert!(rig.proposer.next_batch().is_none(), "and is not proposed later");
    rig.proposer.close();
    expiring.await.expect("ends after close");
    let outcome = rig.proposer.propose(None, put(1), Urgency::Normal).await;
    assert_eq!(outcome.expect_err("closed"), Error::Stopped);
}

#[tokio::test]
async fn refused_entries_go_first_and_discarded_ones_are_unknown() {
    use openraft::errors::ForwardToLeader;
    let rig = rig(Duration::from_secs(60));
    let mut callers: Vec<_> = (1..=3).map(|id| rig.enqueue(id, 1, Urgency::Normal)).collect();
    let batch = |batch: Vec<Queued>| Batch {
        commands: batch.into_iter().map(|queued| queued.command).collect(),
    };
    let taken = batch(rig.proposer.next_batch().expect("three wait"));
    let _late = rig.enqueue(4, 1, Urgency::Normal);
    rig.proposer.refused(ForwardToLeader::empty().into(), taken);
    let again = rig.proposer.next_batch().expect("they came back");
    let ids: Vec<u64> = again.iter().map(|queued| queued.command.request_id).collect();
    assert_eq!(ids, [1, 2, 3, 4]);
    let discarded = ClientWriteError::LogEntryDiscarded(ForwardToLeader::empty());
    rig.proposer.refused(discarded, batch(again));
    let answer = callers[0].try_recv().expect("answered");
    assert_eq!(answer.expect_err("unknown"), Error::TimeoutLeaderFailure);
}
