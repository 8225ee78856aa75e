//! The life of a mirror: compare, watch the source from where the target stands, replay, and compare
//! again at the end. One task does all of it in turn, so the target never runs ahead of what was
//! understood, and a message of the watch is the most that is held in memory.

use std::time::{Duration, Instant};

use kelson_api::etcdserverpb::{
    WatchCreateRequest, WatchProgressRequest, WatchRequest, WatchResponse,
    watch_request::RequestUnion,
};
use kelson_api::mvccpb::Event;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

use super::args::Settings;
use super::door::Door;
use super::leases::Leases;
use super::replay;

/// Time between two looks at the leases and two questions how far the source is.
const LOOK: Duration = Duration::from_secs(1);
/// Time between two lines about the progress.
const TELL: Duration = Duration::from_secs(5);
/// A watch that says nothing for so long, not even its progress, is opened anew.
const SILENCE: Duration = Duration::from_secs(30);
/// Times that a watch may end before it brought anything.
const OPENINGS: u32 = 30;
/// Events of one revision that came in parts. Far above what a server can do in one revision.
const EVENTS_MAX: usize = 10_000_000;

/// Why the loop came to its end.
enum End {
    /// A signal.
    Asked,
    /// Both hold the same, and nothing else was wanted.
    Level,
}

/// Signals that end a mirror in order.
struct Stop {
    interrupt: Signal,
    terminate: Signal,
}

impl Stop {
    fn listen() -> Result<Stop, String> {
        let listen = |kind| signal(kind).map_err(|error| format!("cannot take signals: {error}"));
        let (interrupt, terminate) = (SignalKind::interrupt(), SignalKind::terminate());
        Ok(Stop { interrupt: listen(interrupt)?, terminate: listen(terminate)? })
    }

    async fn asked(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}

struct Mirror {
    source: Door,
    target: Door,
    leases: Leases,
    settings: Settings,
    /// Revision of the target.
    stands: i64,
    /// Newest known revision of the source.
    known: i64,
    /// Changes of the revision that is still coming.
    coming: Vec<Event>,
    replayed: u64,
    told: (Instant, u64),
    compared: Instant,
}

/// A stream of what happens in the source.
struct Following {
    requests: mpsc::Sender<WatchRequest>,
    responses: Streaming<WatchResponse>,
    heard: Instant,
}

/// Runs until a signal, or until both are equal if that is wanted. Returns what to say at the end.
///
/// # Errors
/// What made the mirror impossible, or how both differ at the end.
pub(super) async fn run(settings: Settings) -> Result<String, String> {
    let mut stop = Stop::listen()?;
    let mut source = Door::open(settings.source.clone()).await?;
    let mut target = Door::open(settings.target.clone()).await?;
    let (known, stands) = (source.revision().await?, target.revision().await?);
    let now = Instant::now();
    let mut mirror = Mirror {
        source,
        target,
        leases: Leases::default(),
        settings,
        stands,
        known,
        coming: Vec::new(),
        replayed: 0,
        told: (now, 0),
        compared: now,
    };
    mirror.begin().await?;
    let end = mirror.follow(&mut stop).await?;
    mirror.finish(&end).await
}

impl Mirror {
    /// Makes sure that the target holds an earlier state of the source.
    async fn begin(&mut self) -> Result<(), String> {
        let (stands, known) = (self.stands, self.known);
        if stands > known {
            return Err(format!(
                "the target is at revision {stands}, the source only at {known}: it holds something \
                 else. Restore a snapshot of the source into it"
            ));
        }
        eprintln!("the target is at revision {stands}, the source at {known}");
        if stands == 1 {
            let keys = self.target.count(b"\0", b"\0").await?;
            if keys > 0 {
                return Err(format!("the target is at revision 1 and has {keys} keys: it is odd"));
            }
            return Ok(());
        }
        match self.compare(stands).await? {
            None => Ok(()),
            Some(difference) => Err(format!(
                "both differ at revision {stands}: {difference}. The target must be empty or hold an \
                 earlier state of the source"
            )),
        }
    }

    /// How both differ at a revision that both have; nothing if they do not. What the source has
    /// compacted is compacted in the target first, since it counts.
    async fn compare(&mut self, revision: i64) -> Result<Option<String>, String> {
        self.compared = Instant::now();
        let there = self.source.hash(revision).await.map_err(|text| lost(&text))?;
        let mut here = self.target.hash(revision).await?;
        if there.compact_revision > here.compact_revision {
            self.target.compact(there.compact_revision).await?;
            here = self.target.hash(revision).await?;
        }
        if (there.hash, there.compact_revision) == (here.hash, here.compact_revision) {
            eprintln!(
                "revision {revision} is the same in both: hash {}, compacted up to {}",
                here.hash, here.compact_revision
            );
            return Ok(None);
        }
        Ok(Some(format!(
            "hash {} in the source, {} in the target; compacted up to {} and {}",
            there.hash, here.hash, there.compact_revision, here.compact_revision
        )))
    }

    async fn follow(&mut self, stop: &mut Stop) -> Result<End, String> {
        let mut openings = 0;
        loop {
            let since = Instant::now();
            let failed = match self.watch().await {
                Ok(following) => {
                    let before = self.stands;
                    let ended = self.listen(following, stop).await?;
                    openings = if self.stands > before { 0 } else { openings + 1 };
                    match ended {
                        Ok(end) => return Ok(end),
                        Err(status) => status,
                    }
                }
                Err(status) => {
                    openings += 1;
                    status
                }
            };
            if openings > OPENINGS {
                return Err(self.source.text(&format!("its watches end: {}", failed.message())));
            }
            eprintln!("{}", self.source.text(&format!("the watch ended: {}", failed.message())));
            // What came of a revision that was not whole comes again.
            self.coming.clear();
            self.source.again(&failed, since).await?;
        }
    }

    /// A watch of everything behind what the target has.
    async fn watch(&mut self) -> Result<Following, Status> {
        let (requests, waiting) = mpsc::channel(4);
        let create = WatchCreateRequest {
            key: "\0".into(),
            range_end: "\0".into(),
            start_revision: self.stands + 1,
            fragment: true,
            ..WatchCreateRequest::default()
        };
        let union = Some(RequestUnion::CreateRequest(create));
        // There is room: nothing was sent yet.
        let _ = requests.try_send(WatchRequest { request_union: union });
        let responses = self.source.watch().watch(ReceiverStream::new(waiting)).await?.into_inner();
        Ok(Following { requests, responses, heard: Instant::now() })
    }

    /// Replays what a watch says until it ends. The inner error is the watch's own.
    async fn listen(
        &mut self,
        mut following: Following,
        stop: &mut Stop,
    ) -> Result<Result<End, Status>, String> {
        let mut look = tokio::time::interval(LOOK);
        look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                biased;
                () = stop.asked() => return Ok(Ok(End::Asked)),
                _ = look.tick() => {
                    if self.look(&following).await? {
                        return Ok(Ok(End::Level));
                    }
                    if following.heard.elapsed() > SILENCE {
                        return Ok(Err(Status::unavailable("nothing came any more")));
                    }
                }
                message = following.responses.message() => match message {
                    Ok(Some(response)) => {
                        following.heard = Instant::now();
                        if let Err(status) = self.take(response).await? {
                            return Ok(Err(status));
                        }
                    }
                    Ok(None) => return Ok(Err(Status::unavailable("the server closed it"))),
                    Err(status) => return Ok(Err(status)),
                },
            }
        }
    }

    /// What is done once a second. True if there is nothing left to do.
    async fn look(&mut self, following: &Following) -> Result<bool, String> {
        let union = Some(RequestUnion::ProgressRequest(WatchProgressRequest {}));
        // A question that waits already is as good.
        let _ = following.requests.try_send(WatchRequest { request_union: union });
        self.known = self.known.max(self.source.revision().await?);
        let is_level = self.stands >= self.known;
        self.leases.follow(&mut self.source, &mut self.target, is_level).await?;
        self.tell();
        let interval = self.settings.check_interval;
        let is_due = is_level && !interval.is_zero() && self.compared.elapsed() >= interval;
        if is_due && let Some(difference) = self.compare(self.stands).await? {
            return Err(format!("both differ at revision {}: {difference}", self.stands));
        }
        Ok(is_level && self.settings.is_once)
    }

    fn tell(&mut self) {
        let (when, count) = self.told;
        if when.elapsed() < TELL {
            return;
        }
        let rate = (self.replayed - count) as f64 / when.elapsed().as_secs_f64();
        eprintln!(
            "revision {} of {}, {} behind, {rate:.0} revisions/s, {} leases",
            self.stands,
            self.known,
            (self.known - self.stands).max(0),
            self.leases.len()
        );
        self.told = (Instant::now(), self.replayed);
    }

    /// Replays the whole revisions of a message; the inner error ends the watch.
    async fn take(&mut self, response: WatchResponse) -> Result<Result<(), Status>, String> {
        if response.compact_revision > 0 {
            return Err(lost(&self.source.text(&format!(
                "it has compacted up to revision {}, the target stands at {}",
                response.compact_revision, self.stands
            ))));
        }
        if response.canceled {
            return Ok(Err(Status::unavailable(response.cancel_reason)));
        }
        self.known = self.known.max(response.header.map_or(0, |header| header.revision));
        self.coming.extend(response.events);
        if self.coming.len() > EVENTS_MAX {
            return Err(self.source.text("a revision has more changes than can be held"));
        }
        // A revision is whole when the next one begins, or the message is not a part of one.
        while let Some(revision) = self.coming.first().map(revision) {
            let end = self.coming.iter().position(|event| self::revision(event) != revision);
            let Some(end) = end.or_else(|| (!response.fragment).then_some(self.coming.len()))
            else {
                break;
            };
            let events: Vec<Event> = self.coming.drain(..end).collect();
            self.replay(revision, &events).await?;
        }
        Ok(Ok(()))
    }

    async fn replay(&mut self, revision: i64, events: &[Event]) -> Result<(), String> {
        if revision != self.stands + 1 {
            return Err(self
                .source
                .text(&format!("revision {revision} follows {}: some are missing", self.stands)));
        }
        for lease in events.iter().filter_map(|event| event.kv.as_ref()).map(|kv| kv.lease) {
            self.leases.need(lease, &mut self.source, &mut self.target).await?;
        }
        replay::apply(&mut self.target, revision, events).await?;
        self.stands = revision;
        self.replayed += 1;
        Ok(())
    }

    async fn finish(&mut self, end: &End) -> Result<String, String> {
        let known = self.source.revision().await?;
        if known != self.stands {
            let way = match end {
                End::Asked => "stopped",
                End::Level => "caught up, but the source went on",
            };
            return Err(format!(
                "{way}: the target is at revision {}, the source at {known}; nobody may move yet",
                self.stands
            ));
        }
        if let Some(difference) = self.compare(known).await? {
            return Err(format!("both differ at revision {known}: {difference}"));
        }
        let (there, here) = (self.source.auth_revision().await, self.target.auth_revision().await);
        if there != here {
            eprintln!(
                "users or roles may differ (revision {there:?} and {here:?}): they are not followed"
            );
        }
        Ok(format!("both hold revision {known}: clients can move to the target"))
    }
}

fn revision(event: &Event) -> i64 {
    event.kv.as_ref().map_or(0, |kv| kv.mod_revision)
}

/// The source no longer has what the target lacks.
fn lost(text: &str) -> String {
    if !text.contains("compacted") {
        return text.to_owned();
    }
    format!(
        "{text}. What the target lacks is gone: restore a newer snapshot of the source into it, and keep \
         compaction away meanwhile (kube-apiserver: --etcd-compaction-interval=0)"
    )
}
