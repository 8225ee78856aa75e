//! Snapshots as openraft sees them: a position that state has reached, or a state received from
//! another member. State on disk is its own snapshot, so building one copies nothing. Sending reads
//! the store at one position in chunks; neither side ever holds it in memory. What the chunks contain
//! is the storage crate's business.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use futures::SinkExt;
use futures::channel::mpsc;
use kelson_api::peer::{SnapshotHeader, SnapshotPart, SnapshotReply, snapshot_part::Part};
use kelson_storage::log::Log;
use kelson_storage::{LogId as Position, Reader, Received, Receiver, Transfer, TransferError};
use openraft::RaftSnapshotBuilder;
use parking_lot::Mutex;
use tokio::sync::Semaphore;
use tonic::{Status, Streaming};

use crate::background::{Background, blocking};
use crate::codec;
use crate::peers::{Link, Peers, Way};
use crate::throttle::{Fsyncs, Steady, Throttle};
use crate::turn::{Room, Turn, Turns};
use crate::types::{Raft, Snapshot, SnapshotMeta, StoredMembership, TypeConfig, Vote, raft_log_id};
use crate::wire;

/// Snapshots sent at a time: they compete with clients for disk and network.
const AT_A_TIME: usize = 2;
/// Chunks read ahead of the network.
const AHEAD: usize = 4;
/// Time that a receiver may take for its last step, in which it makes everything durable.
const FINISH_TIME: Duration = Duration::from_secs(300);
/// Time without any chunk after which a receiver gives up.
const CHUNK_TIME: Duration = Duration::from_secs(30);

/// What openraft hands around as a snapshot.
pub(crate) enum SnapshotHandle {
    /// The local state.
    Own,
    /// A state that was received, verified and made durable beside the local one.
    Received(Box<Received>),
}

pub(crate) fn at(applied: Position, membership: StoredMembership) -> Snapshot {
    let meta = SnapshotMeta { last_log_id: raft_log_id(applied), last_membership: membership };
    Snapshot { meta, snapshot: SnapshotHandle::Own }
}

/// Waits until the state as of the builder's making is durable, then names it.
pub(crate) struct SnapshotBuilder {
    pub(crate) applied: Position,
    pub(crate) membership: StoredMembership,
    pub(crate) reader: Reader,
}

impl RaftSnapshotBuilder<TypeConfig> for SnapshotBuilder {
    type SnapshotData = SnapshotHandle;

    async fn build_snapshot(&mut self) -> io::Result<Snapshot> {
        let mut durable = self.reader.durable_applied();
        durable.wait_for(|durable| *durable >= self.applied).await.map_err(io::Error::other)?;
        Ok(at(self.applied, self.membership.clone()))
    }
}

/// Snapshots under way from and to this member. Clones share them.
#[derive(Clone)]
pub(crate) struct Transfers {
    reader: Reader,
    log: Log,
    room: Arc<Semaphore>,
    /// Index of each transfer, waiting ones included: the log behind it must stay.
    under_way: Arc<Mutex<BTreeMap<u64, u64>>>,
    next: Arc<AtomicU64>,
    incoming: Turns,
    is_simulated: bool,
}

/// Keeps the log behind one transfer.
struct UnderWay {
    transfers: Transfers,
    id: u64,
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.transfers.under_way.lock().remove(&self.id);
    }
}

impl Transfers {
    pub(crate) fn new(reader: Reader, log: Log, is_simulated: bool) -> Transfers {
        Transfers {
            reader,
            log,
            room: Arc::new(Semaphore::new(AT_A_TIME)),
            under_way: Arc::default(),
            next: Arc::default(),
            incoming: Turns::new(),
            is_simulated,
        }
    }

    /// The lowest index whose successors a receiver will still need.
    pub(crate) fn needed_from(&self) -> Option<u64> {
        self.under_way.lock().values().min().copied()
    }

    /// Lets transfers wait until it is dropped.
    #[cfg(test)]
    pub(crate) async fn fill_the_room(&self) -> tokio::sync::OwnedSemaphorePermit {
        let all = self.room.clone().acquire_many_owned(AT_A_TIME as u32);
        all.await.expect("the semaphore is never closed")
    }

    fn begin(&self, from: u64) -> UnderWay {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        self.under_way.lock().insert(id, from);
        UnderWay { transfers: self.clone(), id }
    }
}

/// Sends the state as it is now and returns the receiver's vote. It may be newer than what openraft
/// asked for: the receiver then has more than openraft counts on, never less. `from` is the index that
/// openraft asked for.
pub(crate) async fn send(
    transfers: &Transfers,
    peers: &Peers,
    link: &Link,
    vote: &Vote,
    from: u64,
) -> Result<Vote, Status> {
    // openraft goes on with the log behind what it asked for. If that were gone by then, it would send
    // the state again, and again.
    let _kept = transfers.begin(from);
    let _turn = transfers.room.acquire().await.expect("the semaphore is never closed");
    let mut counted = Counted::begin(link, Way::Out);
    let result = stream_state(transfers, peers, link, vote).await;
    counted.is_done = result.is_ok();
    result
}

/// Counts a snapshot under way, however it ends.
struct Counted<'a> {
    link: &'a Link,
    way: Way,
    begun: Instant,
    is_done: bool,
}

impl<'a> Counted<'a> {
    fn begin(link: &'a Link, way: Way) -> Self {
        link.note_snapshot_begun(way);
        Counted { link, way, begun: Instant::now(), is_done: false }
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        let took = self.is_done.then(|| self.begun.elapsed());
        self.link.note_snapshot_ended(self.way, took);
    }
}

async fn stream_state(
    transfers: &Transfers,
    peers: &Peers,
    link: &Link,
    vote: &Vote,
) -> Result<Vote, Status> {
    let begun = Instant::now();
    let reader = transfers.reader.clone();
    let opened = blocking(transfers.is_simulated, move || reader.transfer()).await;
    let transfer = opened
        .map_err(|error| Status::internal(error.to_string()))?
        .map_err(|fatal| Status::internal(fatal.to_string()))?;
    let applied = transfer.applied();
    let header = header(&transfer, vote)?;
    tracing::info!(index = applied.index, "sending database snapshot");

    let (parts, stream) = mpsc::channel(AHEAD);
    let transfer = Background::start(transfer, transfers.is_simulated)?;
    let mut client = link.snapshot();
    // Either ends when the other does: a stream without a reader takes nothing.
    let feeding = feed(&transfer, header, parts, &transfers.log);
    let (answer, fed) = futures::future::join(client.snapshot(stream), feeding).await;
    let reply = peers.check_answer(link, answer)?;
    fed?;
    tracing::info!(index = applied.index, took = ?begun.elapsed(), "sent database snapshot");
    wire::vote(reply.ballot.as_ref())
}

pub(crate) fn header(transfer: &Transfer, vote: &Vote) -> Result<SnapshotPart, Status> {
    let Some((at, membership)) = transfer.membership() else {
        return Err(Status::internal("the state to be sent has no membership"));
    };
    let header = SnapshotHeader {
        leader: Some(wire::ballot(vote)),
        applied: Some(wire::placed(transfer.applied())),
        membership,
        membership_at: Some(wire::placed(at)),
        size_hint: 0,
    };
    Ok(SnapshotPart { part: Some(Part::Header(header)) })
}

/// Reads chunks and hands them to the network, no faster than allowed.
async fn feed(
    transfer: &Background<Transfer>,
    header: SnapshotPart,
    mut parts: mpsc::Sender<SnapshotPart>,
    log: &Log,
) -> Result<(), Status> {
    let now = || tokio::time::Instant::now().into_std();
    let gone = |_| Status::internal("the receiver closed the stream");
    let mut throttle = Throttle::begin(Fsyncs::of(&log.stats()), now());
    parts.send(header).await.map_err(gone)?;
    loop {
        let chunk = transfer.step(Transfer::next_chunk).await?;
        let chunk = chunk.map_err(|fatal| Status::internal(fatal.to_string()))?;
        let Some(chunk) = chunk else { return Ok(()) };
        let bytes = chunk.len() as u64;
        parts.send(SnapshotPart { part: Some(Part::Chunk(chunk)) }).await.map_err(gone)?;
        let asleep = now();
        let wait = throttle.sent(bytes, || Fsyncs::of(&log.stats()), asleep);
        transfer.rest(wait).await?;
        throttle.overslept(now().duration_since(asleep).saturating_sub(wait));
    }
}

/// Takes a snapshot from the leader: writes it beside the local state, verifies it, and has consensus
/// install it. Ends the one that was being received before.
pub(crate) async fn receive(
    raft: &Raft,
    transfers: &Transfers,
    link: &Link,
    mut parts: Streaming<SnapshotPart>,
) -> Result<SnapshotReply, Status> {
    let mut counted = Counted::begin(link, Way::In);
    let Some(Part::Header(header)) = next_part(&mut parts).await? else {
        return Err(Status::invalid_argument("a snapshot begins with a header"));
    };
    let vote = wire::vote(header.leader.as_ref())?;
    let membership = codec::decode_membership(header.membership.clone())
        .map_err(|error| Status::invalid_argument(error.to_string()))?;
    let membership_at = wire::log_id(header.membership_at.as_ref());
    let applied = wire::storage_position(header.applied.as_ref());
    // Whatever becomes of this transfer, its room is free only when its files are gone or in force.
    let (mut turn, room) = transfers.incoming.take(vote).await?;
    tracing::info!(index = applied.index, "receiving database snapshot");
    let begun = Instant::now();
    let (received, _room) = write(transfers, &mut parts, &mut turn, room).await?;
    if received.applied() != applied {
        return Err(Status::data_loss(
            "the snapshot is not of the position that it was said to be",
        ));
    }
    // Consensus goes by the header, later starts by the state: they must not differ.
    let said = (wire::storage_position(header.membership_at.as_ref()), header.membership);
    if received.membership() != Some(said) {
        return Err(Status::data_loss("the snapshot has other members than it was said to have"));
    }
    tracing::info!(index = applied.index, took = ?begun.elapsed(), "received database snapshot");
    let meta = SnapshotMeta {
        last_log_id: raft_log_id(applied),
        last_membership: StoredMembership::new(membership_at, membership),
    };
    let snapshot = Snapshot { meta, snapshot: SnapshotHandle::Received(Box::new(received)) };
    let response = raft.install_full_snapshot(vote, snapshot).await;
    let response = response.map_err(|fatal| Status::unavailable(fatal.to_string()))?;
    counted.is_done = true;
    Ok(SnapshotReply { ballot: Some(wire::ballot(&response.vote)) })
}

async fn next_part(parts: &mut Streaming<SnapshotPart>) -> Result<Option<Part>, Status> {
    let late = |_| Status::deadline_exceeded("the snapshot stopped coming");
    let part = tokio::time::timeout(CHUNK_TIME, parts.message()).await.map_err(late)??;
    match part {
        None => Ok(None),
        Some(SnapshotPart { part: Some(part) }) => Ok(Some(part)),
        Some(SnapshotPart { part: None }) => {
            Err(Status::invalid_argument("an empty part of a snapshot"))
        }
    }
}

/// What a transfer to this member holds. The files are dropped before the room.
struct Intake {
    receiver: Option<Receiver>,
    room: Option<Room>,
}

/// Writes all chunks as they come. A newer transfer ends it as long as chunks are missing; then it is
/// only a matter of this machine.
async fn write(
    transfers: &Transfers,
    parts: &mut Streaming<SnapshotPart>,
    turn: &mut Turn,
    room: Room,
) -> Result<(Received, Room), Status> {
    let intake = Intake { receiver: None, room: Some(room) };
    let intake = Background::start(intake, transfers.is_simulated)?;
    tokio::select! {
        taken = take_all(&transfers.reader, parts, &intake) => taken?,
        ended = turn.ended() => return Err(ended),
    }
    let late = |_| Status::deadline_exceeded("the snapshot could not be made durable in time");
    let finishing = tokio::time::timeout(FINISH_TIME, intake.step(finish));
    finishing.await.map_err(late)??.map_err(bad)
}

fn bad(error: TransferError) -> Status {
    Status::data_loss(error.to_string())
}

async fn take_all(
    reader: &Reader,
    parts: &mut Streaming<SnapshotPart>,
    intake: &Background<Intake>,
) -> Result<(), Status> {
    let reader = reader.clone();
    let begin = move |intake: &mut Intake| reader.receive().map(|it| intake.receiver = Some(it));
    intake.step(begin).await?.map_err(bad)?;
    while let Some(part) = next_part(parts).await? {
        let Part::Chunk(chunk) = part else {
            return Err(Status::invalid_argument("a second header in a snapshot"));
        };
        let take = |intake: &mut Intake| match &mut intake.receiver {
            Some(receiver) => receiver.take(chunk),
            None => Err(TransferError::Incomplete),
        };
        intake.step(take).await?.map_err(bad)?;
    }
    Ok(())
}

/// Without the last chunk the receiver refuses what it has, and it is taken away.
fn finish(intake: &mut Intake) -> Result<(Received, Room), TransferError> {
    let (Some(receiver), Some(room)) = (intake.receiver.take(), intake.room.take()) else {
        return Err(TransferError::Incomplete);
    };
    let mut steady = Steady::begin(Instant::now());
    let read = |bytes| std::thread::sleep(steady.took(bytes as u64, Instant::now()));
    // On failure the files are gone when this returns, and only then the room is.
    let received = receiver.finish_paced(read)?;
    Ok((received, room))
}
