//! The other members: where they are, who they say they are, and the connections to them. Each has
//! three connections, so that heartbeats and votes never queue behind entries, nor entries behind a
//! snapshot. It carries no message itself (see `network` and `peer_service`) and decides nothing but
//! who may speak.
//!
//! Every call names cluster, sender and receiver, and both sides name their data directory. A member
//! whose directory was emptied would otherwise vote against what it had promised: measured, that loses
//! acknowledged writes. It is refused in both directions instead.
//!
//! One room of over 600 lines: who may speak is checked against what the connections know, and the
//! other way round.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use futures::future::BoxFuture;
use hyper_util::rt::TokioIo;
use kelson_api::peer::peer_client::PeerClient;
use kelson_storage::sabotage::{self, Variant};
use kelson_storage::{Identity, Reader};
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tonic::metadata::{Ascii, MetadataMap, MetadataValue};
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, Endpoint, Uri};
use tonic::{Request, Response, Status};

use crate::types::Vote;

/// Metadata of every call between members. Ids are lower-case hex.
const CLUSTER: &str = "kelson-cluster";
const SENDER: &str = "kelson-from";
const RECEIVER: &str = "kelson-to";
/// Name of the sender's data directory, in requests and in replies.
const STORAGE: &str = "kelson-storage";
/// Index of the receiver's last log entry, in the reply that opens a stream of entries.
const LAST: &str = "kelson-last";
/// In a refusal: the sender was removed from the cluster. In a call: the receiver was.
const REMOVED: &str = "kelson-removed";

/// Flow control windows: what may be under way to one member. Unit: bytes.
const STREAM_WINDOW: u32 = 8 << 20;
const CONNECTION_WINDOW: u32 = 16 << 20;
/// Largest message between members: a batch of entries is cut at 1 MiB, but one entry may be as large
/// as the largest request.
pub(crate) const MESSAGE_MAX: usize = 1 << 30;

/// A byte stream to another member.
pub trait PeerIo: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> PeerIo for T {}

/// How a connection to a peer URL is made. TLS, if any, is inside; a connector that never returns is
/// given up after the election timeout.
pub type PeerConnector =
    Arc<dyn Fn(String) -> BoxFuture<'static, io::Result<Box<dyn PeerIo>>> + Send + Sync>;

/// A channel to another member that says who is calling.
pub type PeerChannel = InterceptedService<Channel, Credentials>;

/// Plain TCP, for `http` URLs only.
pub fn plain_connector() -> PeerConnector {
    Arc::new(|url: String| {
        Box::pin(async move {
            let unsuited =
                || io::Error::new(io::ErrorKind::InvalidInput, format!("{url} is not http"));
            let address = url.strip_prefix("http://").ok_or_else(unsuited)?;
            let stream = TcpStream::connect(address.trim_end_matches('/')).await?;
            stream.set_nodelay(true)?;
            Ok(Box::new(stream) as Box<dyn PeerIo>)
        })
    })
}

/// What this member says of itself with each call to one other member.
#[derive(Clone, Debug)]
pub struct Credentials {
    values: [(&'static str, MetadataValue<Ascii>); 4],
}

impl Credentials {
    pub(crate) fn new(from: Identity, storage_uuid: [u8; 16], to: u64) -> Credentials {
        Credentials {
            values: [
                (CLUSTER, ascii(&format!("{:x}", from.cluster_id))),
                (SENDER, ascii(&format!("{:x}", from.member_id))),
                (RECEIVER, ascii(&format!("{to:x}"))),
                (STORAGE, ascii(&hex(&storage_uuid))),
            ],
        }
    }
}

impl Interceptor for Credentials {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        for (name, value) in &self.values {
            request.metadata_mut().insert(*name, value.clone());
        }
        Ok(request)
    }
}

fn ascii(text: &str) -> MetadataValue<Ascii> {
    text.parse().expect("hex digits are ASCII")
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Connections to one member.
pub(crate) struct Link {
    id: u64,
    /// Entries and forwarded commands.
    bulk: PeerChannel,
    /// Heartbeats, votes, read indexes.
    control: PeerChannel,
    /// Snapshots.
    snapshot: PeerChannel,
    /// Since when every call was answered.
    active_since: Mutex<Option<Instant>>,
    /// Highest index that this member said to have on disk and that was committed then.
    kept: AtomicU64,
    /// What it said to have on disk to this member as the leader by that vote, committed or not.
    matched: Matched,
    /// A refusal was logged and nothing has gone well since.
    is_complaining: AtomicBool,
    counters: Mutex<PeerCounters>,
}

/// Samples kept between two collections of metrics.
const SAMPLES: usize = 4096;

/// What was counted about one member since the start of this process.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PeerCounters {
    /// Calls to the member that failed.
    pub send_failures: u64,
    /// Heartbeats among them.
    pub heartbeat_failures: u64,
    /// Snapshots on their way to the member now.
    pub snapshots_sending: u64,
    /// Snapshots that it took.
    pub snapshots_sent: u64,
    /// Snapshots that it did not take.
    pub snapshot_send_failures: u64,
    /// Snapshots on their way from the member now.
    pub snapshots_receiving: u64,
    /// Snapshots taken from it.
    pub snapshots_received: u64,
    /// Snapshots from it that were not taken.
    pub snapshot_receive_failures: u64,
    /// Round trips of heartbeats since the counters were last taken.
    pub round_trips: Vec<Duration>,
    /// Durations of sent snapshots since the counters were last taken.
    pub snapshot_send_times: Vec<Duration>,
    /// Durations of received snapshots since the counters were last taken.
    pub snapshot_receive_times: Vec<Duration>,
}

/// Up to which index a member said to have the log of the last leader it was asked about.
#[derive(Default)]
struct Matched(Mutex<Option<(Vote, u64)>>);

impl Matched {
    fn note(&self, vote: &Vote, index: u64) {
        let mut matched = self.0.lock();
        match &mut *matched {
            Some((known, highest)) if known == vote => *highest = (*highest).max(index),
            _ => *matched = Some((*vote, index)),
        }
    }

    /// The index noted, if a member that does not have the entry at `index` takes it back.
    fn contradicted(&self, vote: &Vote, index: u64) -> Option<u64> {
        let matched = *self.0.lock();
        matched.filter(|(known, had)| known == vote && index <= *had).map(|(_, had)| had)
    }
}

/// Which way a snapshot goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    Out,
    In,
}

impl Link {
    pub(crate) fn bulk(&self) -> PeerClient<PeerChannel> {
        client(&self.bulk)
    }

    pub(crate) fn control(&self) -> PeerClient<PeerChannel> {
        client(&self.control)
    }

    pub(crate) fn snapshot(&self) -> PeerClient<PeerChannel> {
        client(&self.snapshot)
    }

    /// A call was answered.
    pub(crate) fn note_alive(&self) {
        self.active_since.lock().get_or_insert_with(Instant::now);
        if self.is_complaining.swap(false, Ordering::Relaxed) {
            tracing::info!("remote-peer-id" = format!("{:x}", self.id), "peer became active");
        }
    }

    /// A call failed.
    pub(crate) fn note_failure(&self, status: &Status) {
        *self.active_since.lock() = None;
        self.counters.lock().send_failures += 1;
        if !self.is_complaining.swap(true, Ordering::Relaxed) {
            tracing::warn!(
                "remote-peer-id" = format!("{:x}", self.id),
                error = status.message(),
                "peer became inactive"
            );
        }
    }

    /// A heartbeat was answered after so long, or not at all.
    pub(crate) fn note_heartbeat(&self, round_trip: Option<Duration>) {
        let mut counters = self.counters.lock();
        match round_trip {
            Some(took) => sample(&mut counters.round_trips, took),
            None => counters.heartbeat_failures += 1,
        }
    }

    pub(crate) fn note_snapshot_begun(&self, way: Way) {
        let mut counters = self.counters.lock();
        match way {
            Way::Out => counters.snapshots_sending += 1,
            Way::In => counters.snapshots_receiving += 1,
        }
    }

    /// A snapshot ended: `took` so long, or failed.
    pub(crate) fn note_snapshot_ended(&self, way: Way, took: Option<Duration>) {
        let mut counters = self.counters.lock();
        let counters = &mut *counters;
        let (under_way, done, failed, times) = match way {
            Way::Out => (
                &mut counters.snapshots_sending,
                &mut counters.snapshots_sent,
                &mut counters.snapshot_send_failures,
                &mut counters.snapshot_send_times,
            ),
            Way::In => (
                &mut counters.snapshots_receiving,
                &mut counters.snapshots_received,
                &mut counters.snapshot_receive_failures,
                &mut counters.snapshot_receive_times,
            ),
        };
        *under_way -= 1;
        match took {
            Some(took) => {
                *done += 1;
                sample(times, took);
            }
            None => *failed += 1,
        }
    }

    /// The member said to have everything up to `index` on disk, all of it committed: it may never
    /// have less again.
    pub(crate) fn note_kept(&self, index: u64) {
        self.kept.fetch_max(index, Ordering::AcqRel);
    }

    /// # Errors
    /// The member says to have less than it once had: its directory was replaced by an older copy.
    fn check_kept(&self, metadata: &MetadataMap) -> Result<(), Status> {
        let text = metadata.get(LAST).and_then(|value| value.to_str().ok());
        let Some(last) = text.and_then(|text| text.parse::<u64>().ok()) else { return Ok(()) };
        let kept = self.kept.load(Ordering::Acquire);
        let is_lost = last < kept && !sabotage::is(Variant::OlderCopyAccepted);
        if is_lost { Err(self.lost(kept)) } else { Ok(()) }
    }

    /// The member said to have everything up to `index` of the log of the leader by that vote, which
    /// is this member: it may not have less again while that leads.
    pub(crate) fn note_matched(&self, vote: &Vote, index: u64) {
        self.matched.note(vote, index);
    }

    /// # Errors
    /// The entry at `index`, which the member says not to have, is one that it said to have. openraft
    /// must not hear of it: it takes that for a fault of its own and ends.
    pub(crate) fn check_conflict(&self, vote: &Vote, index: u64) -> Result<(), Status> {
        match self.matched.contradicted(vote, index) {
            Some(had) if !sabotage::is(Variant::OlderCopyAccepted) => Err(self.lost(had)),
            _ => Ok(()),
        }
    }

    fn lost(&self, had: u64) -> Status {
        Status::failed_precondition(lost_text(self.id, had))
    }
}

/// For the operator, on both sides: a member has less than it said to have.
pub(crate) fn lost_text(member: u64, had: u64) -> String {
    format!(
        "member {member:x} had its log up to {had} and now has less: its data directory was replaced \
         by an older copy, or its disk lost what it had synced; remove it with `etcdctl member remove \
         {member:x}` and add it again with an empty directory"
    )
}

fn sample(samples: &mut Vec<Duration>, took: Duration) {
    if samples.len() < SAMPLES {
        samples.push(took);
    }
}

fn client(channel: &PeerChannel) -> PeerClient<PeerChannel> {
    PeerClient::new(channel.clone())
        .max_decoding_message_size(MESSAGE_MAX)
        .max_encoding_message_size(MESSAGE_MAX)
}

/// All other members. Clones share them.
#[derive(Clone)]
pub(crate) struct Peers {
    inner: Arc<Inner>,
}

struct Inner {
    identity: Identity,
    storage_uuid: [u8; 16],
    reader: Reader,
    connect: PeerConnector,
    election: Duration,
    /// Peer URLs as far as consensus or the flags have told; the members table goes before them.
    told: Mutex<BTreeMap<u64, Vec<String>>>,
    /// One per member ever spoken to; members are few and ids are not reused.
    links: Mutex<BTreeMap<u64, Arc<Link>>>,
    removed: watch::Sender<bool>,
}

impl Peers {
    pub(crate) fn new(
        identity: Identity,
        storage_uuid: [u8; 16],
        reader: Reader,
        connect: PeerConnector,
        election: Duration,
    ) -> Peers {
        let removed = watch::Sender::new(reader.removed_members().contains(&identity.member_id));
        let (told, links) = (Mutex::default(), Mutex::default());
        let inner =
            Inner { identity, storage_uuid, reader, connect, election, told, links, removed };
        Peers { inner: Arc::new(inner) }
    }

    /// True once this member is known to be removed from the cluster.
    pub(crate) fn removed(&self) -> &watch::Sender<bool> {
        &self.inner.removed
    }

    /// Learns where a member is.
    pub(crate) fn tell(&self, id: u64, urls: &[String]) {
        if !urls.is_empty() {
            self.inner.told.lock().insert(id, urls.to_vec());
        }
    }

    /// The connections to a member; they are opened by the first call.
    pub(crate) fn link(&self, id: u64) -> Arc<Link> {
        let mut links = self.inner.links.lock();
        links.entry(id).or_insert_with(|| Arc::new(self.inner.clone().open(id))).clone()
    }

    /// Since when a member has answered every call.
    pub(crate) fn active_since(&self, id: u64) -> Option<Instant> {
        let link = self.inner.links.lock().get(&id).cloned();
        link.and_then(|link| *link.active_since.lock())
    }

    /// What was counted, by member; samples are taken out.
    pub(crate) fn take_counters(&self) -> Vec<(u64, PeerCounters)> {
        let links = self.inner.links.lock();
        let take = |(id, link): (&u64, &Arc<Link>)| {
            let mut counters = link.counters.lock();
            let taken = counters.clone();
            counters.round_trips.clear();
            counters.snapshot_send_times.clear();
            counters.snapshot_receive_times.clear();
            (*id, taken)
        };
        links.iter().map(take).collect()
    }

    pub(crate) fn channel(&self, id: u64) -> PeerChannel {
        self.link(id).control.clone()
    }

    /// Checks who sent a call, and that it is meant for this member.
    ///
    /// # Errors
    /// `FailedPrecondition`, with a text for the operator: other cluster, other receiver, a removed
    /// sender, a sender whose data directory is not the one it had.
    pub(crate) fn check_sender(&self, metadata: &MetadataMap) -> Result<u64, Status> {
        let inner = &self.inner;
        let id = |name| {
            let text = metadata.get(name).and_then(|value| value.to_str().ok());
            text.and_then(|text| u64::from_str_radix(text, 16).ok()).ok_or_else(|| {
                Status::invalid_argument(format!("the call between members has no valid {name}"))
            })
        };
        let (cluster, from, to) = (id(CLUSTER)?, id(SENDER)?, id(RECEIVER)?);
        let Identity { cluster_id, member_id } = inner.identity;
        if cluster != cluster_id {
            return Err(Status::failed_precondition(format!(
                "cluster ID mismatch: member {from:x} belongs to cluster {cluster:x}, this one to \
                 {cluster_id:x}"
            )));
        }
        if to != member_id {
            return Err(Status::failed_precondition(format!(
                "member {from:x} looks for member {to:x} here, but this is {member_id:x}: check the \
                 peer URLs"
            )));
        }
        if inner.reader.removed_members().contains(&from) {
            let mut refusal = Status::failed_precondition(format!(
                "member {from:x} has been permanently removed from the cluster"
            ));
            refusal.metadata_mut().insert(REMOVED, ascii("1"));
            return Err(refusal);
        }
        self.check_storage(from, metadata)?;
        if metadata.contains_key(REMOVED) {
            inner.removed.send_replace(true);
        }
        Ok(from)
    }

    /// Checks the answer of a member: its data directory must be the one it had.
    pub(crate) fn check_answer<T>(
        &self,
        link: &Link,
        answer: Result<Response<T>, Status>,
    ) -> Result<T, Status> {
        let checked = answer.and_then(|answer| {
            self.check_storage(link.id, answer.metadata())?;
            link.check_kept(answer.metadata())?;
            Ok(answer.into_inner())
        });
        match &checked {
            Ok(_) => link.note_alive(),
            Err(status) => {
                link.note_failure(status);
                self.check_refusal(status);
            }
        }
        checked
    }

    /// A call that tells its receiver that it was removed.
    pub(crate) fn farewell<T>(message: T) -> Request<T> {
        let mut request = Request::new(message);
        request.metadata_mut().insert(REMOVED, ascii("1"));
        request
    }

    /// Learns from a refused call whether this member was removed.
    pub(crate) fn check_refusal(&self, status: &Status) {
        if status.metadata().contains_key(REMOVED) {
            self.inner.removed.send_replace(true);
        }
    }

    /// A reply that names this member's data directory.
    pub(crate) fn answer<T>(&self, message: T) -> Response<T> {
        let mut response = Response::new(message);
        let uuid = ascii(&hex(&self.inner.storage_uuid));
        response.metadata_mut().insert(STORAGE, uuid);
        response
    }

    /// The reply that opens a stream of entries: says besides how far this member's log reaches.
    pub(crate) fn answer_stream<T>(&self, stream: T, last: u64) -> Response<T> {
        let mut response = self.answer(stream);
        response.metadata_mut().insert(LAST, ascii(&last.to_string()));
        response
    }

    fn check_storage(&self, id: u64, metadata: &MetadataMap) -> Result<(), Status> {
        // Not known before the member has published it for the first time.
        let Some(known) = self.inner.reader.storage_uuid(id) else { return Ok(()) };
        let told = metadata.get(STORAGE).and_then(|value| value.to_str().ok()).unwrap_or_default();
        if told == hex(&known) || sabotage::is(Variant::WipedAccepted) {
            return Ok(());
        }
        Err(Status::failed_precondition(format!(
            "member {id:x} has another data directory than before, so it may have lost what it \
             promised: remove it with `etcdctl member remove {id:x}` and add it again as a new member"
        )))
    }
}

impl Inner {
    fn open(self: Arc<Self>, id: u64) -> Link {
        let credentials = Credentials::new(self.identity, self.storage_uuid, id);
        let open = || InterceptedService::new(self.clone().channel(id), credentials.clone());
        Link {
            id,
            bulk: open(),
            control: open(),
            snapshot: open(),
            active_since: Mutex::new(None),
            kept: AtomicU64::new(0),
            matched: Matched::default(),
            is_complaining: AtomicBool::new(false),
            counters: Mutex::default(),
        }
    }

    fn channel(self: Arc<Self>, id: u64) -> Channel {
        let election = self.election;
        let endpoint = Endpoint::from_shared(format!("http://member-{id:x}"))
            .expect("hex digits make a host name")
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            // A peer that is gone without a word is noticed although nothing is sent.
            .http2_keep_alive_interval(election / 2)
            .keep_alive_timeout(election)
            .keep_alive_while_idle(true);
        endpoint.connect_with_connector_lazy(tower::service_fn(move |_: Uri| {
            let inner = self.clone();
            async move { inner.connect(id).await.map(TokioIo::new) }
        }))
    }

    /// Tries the member's URLs in turn.
    async fn connect(&self, id: u64) -> io::Result<Box<dyn PeerIo>> {
        let mut failure = io::Error::new(
            io::ErrorKind::NotFound,
            format!("no peer URL of member {id:x} is known"),
        );
        for url in self.urls(id) {
            match tokio::time::timeout(self.election, (self.connect)(url.clone())).await {
                Ok(Ok(stream)) => return Ok(stream),
                Ok(Err(error)) => failure = io::Error::new(error.kind(), format!("{url}: {error}")),
                Err(_) => {
                    let text = format!("{url}: no connection within {:?}", self.election);
                    failure = io::Error::new(io::ErrorKind::TimedOut, text);
                }
            }
        }
        Err(failure)
    }

    fn urls(&self, id: u64) -> Vec<String> {
        let members = self.reader.members();
        let listed = members.into_iter().find(|member| member.id == id);
        let mut urls = listed.map(|member| member.peer_ur_ls).unwrap_or_default();
        // A member that is behind may not know of a move yet that consensus knows of.
        for told in self.told.lock().get(&id).into_iter().flatten() {
            if !urls.contains(told) {
                urls.push(told.clone());
            }
        }
        urls
    }
}

/// Whether a failed call surely never reached the other side.
pub(crate) fn never_sent(status: &Status) -> bool {
    let mut cause = std::error::Error::source(status);
    while let Some(error) = cause {
        if error.is::<tonic::ConnectError>() {
            return true;
        }
        cause = error.source();
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_acknowledged_to_a_leader_is_not_taken_back() {
        let (first, second) = (Vote::new_committed(1, 7), Vote::new_committed(2, 7));
        let matched = Matched::default();
        assert_eq!(matched.contradicted(&first, 1), None, "nothing was said yet");
        matched.note(&first, 5);
        matched.note(&first, 3);
        assert_eq!(matched.contradicted(&first, 6), None, "it never said to have this");
        assert_eq!(matched.contradicted(&first, 5), Some(5));
        assert_eq!(matched.contradicted(&first, 1), Some(5));
        // Another leader may have had what was not committed removed.
        assert_eq!(matched.contradicted(&second, 5), None);
        matched.note(&second, 2);
        assert_eq!(matched.contradicted(&second, 3), None);
        assert_eq!(matched.contradicted(&second, 2), Some(2));
    }
}
