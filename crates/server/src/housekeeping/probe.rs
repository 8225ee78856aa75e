//! Asks every other member once a second which version it runs, and one that does not answer ten times
//! a second and whenever it calls. The answers say three things: since when each member is connected,
//! how long the way there and back takes, and which versions the cluster has; the questions of others
//! say who can reach this member. It decides nothing; member changes, metrics, the cluster version and
//! `leadership` read it. One that was removed is told so once.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use kelson_api::peer::VersionRequest;
use kelson_api::peer::side_client::SideClient;
use kelson_raft::Node;
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::task::JoinSet;

use crate::app::App;

/// Time between two questions to a member that does not answer: member changes count from the first
/// answer, so it must not come a second late. Source: how often etcd dials a peer.
pub const RETRY: Duration = Duration::from_millis(100);

/// One that answers is asked each second.
const TICKS_PER_ROUND: u64 = 10;

/// How long one that never answered is not taken to be down: after a start the first connection may
/// need some attempts.
const UNKNOWN: Duration = Duration::from_secs(1);

/// Longest wait for an answer. Source: etcd's read timeout of peer connections.
const ANSWER_TIME: Duration = Duration::from_secs(5);

/// What is known of the other members.
#[derive(Default)]
pub struct Probes {
    members: Mutex<BTreeMap<u64, Probe>>,
    /// Told when a member that is not known to be connected has called.
    heard: Notify,
}

#[derive(Clone, Debug, Default)]
struct Probe {
    /// When it was asked first.
    first_asked: Option<Instant>,
    /// Since when every question was answered.
    active_since: Option<Instant>,
    /// When it asked here last.
    last_heard: Option<Instant>,
    /// The last answer.
    version: Option<String>,
}

impl Probes {
    /// Since when a member has answered every question; `None` if it did not answer the last one.
    #[must_use]
    pub fn active_since(&self, member: u64) -> Option<Instant> {
        self.members.lock().get(&member)?.active_since
    }

    /// Whether a member that has not answered yet may still do so: it was asked for less than a second.
    #[must_use]
    pub fn is_unknown(&self, member: u64, now: Instant) -> bool {
        let members = self.members.lock();
        let Some(probe) = members.get(&member) else { return true };
        let asked = probe.first_asked.map_or(Duration::ZERO, |asked| now.duration_since(asked));
        probe.version.is_none() && asked < UNKNOWN
    }

    /// The version that a member said it runs, the last time that it answered.
    #[must_use]
    pub fn version(&self, member: u64) -> Option<String> {
        self.members.lock().get(&member)?.version.clone()
    }

    /// A member has called, so it can be asked now.
    pub(crate) fn heard(&self, member: u64, now: Instant) {
        let is_active = {
            let mut members = self.members.lock();
            let probe = members.entry(member).or_default();
            probe.last_heard = Some(now);
            probe.active_since.is_some()
        };
        if !is_active {
            self.heard.notify_one();
        }
    }

    /// Whether a member answers and has itself not called since then, as it should once a second.
    pub(super) fn only_answers(&self, member: u64, since: Instant) -> bool {
        let members = self.members.lock();
        let Some(probe) = members.get(&member) else { return false };
        probe.active_since.is_some() && probe.last_heard.is_none_or(|heard| heard < since)
    }

    /// Forgets all members but these, and returns whom it forgot.
    fn retain(&self, known: &[u64]) -> Vec<u64> {
        let mut members = self.members.lock();
        let gone = members.keys().copied().filter(|id| !known.contains(id)).collect();
        members.retain(|id, _| known.contains(id));
        gone
    }

    fn asked(&self, member: u64, now: Instant) {
        self.members.lock().entry(member).or_default().first_asked.get_or_insert(now);
    }

    fn answered(&self, member: u64, version: String, now: Instant) {
        let mut members = self.members.lock();
        let probe = members.entry(member).or_default();
        probe.active_since.get_or_insert(now);
        probe.version = Some(version);
    }

    /// Returns whether the member was connected until now.
    fn failed(&self, member: u64) -> bool {
        let mut members = self.members.lock();
        members.entry(member).or_default().active_since.take().is_some()
    }
}

/// Asks until it is dropped.
pub(super) async fn run(app: App) {
    let mut tick = tokio::time::interval(RETRY);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    // One question per member at most, so that a silent one delays nobody's turn but its own.
    let mut asking = JoinSet::new();
    let mut asked = BTreeSet::new();
    let mut ticks = 0_u64;
    loop {
        let is_tick = tokio::select! {
            _ = tick.tick() => true,
            () = app.probes.heard.notified() => false,
        };
        while let Some(answered) = asking.try_join_next() {
            match answered {
                Ok(member) => drop(asked.remove(&member)),
                Err(error) => tracing::error!(%error, "asking a member failed"),
            }
        }
        let own = app.node.status().member_id;
        let members = app.reader.members().into_iter().map(|member| member.id);
        let others: Vec<u64> = members.filter(|id| *id != own).collect();
        for member in app.probes.retain(&others) {
            asking.spawn(bid_farewell(app.clone(), member));
        }
        let is_round = is_tick && ticks.is_multiple_of(TICKS_PER_ROUND);
        ticks += u64::from(is_tick);
        for member in others {
            let is_due = is_round || app.probes.active_since(member).is_none();
            if is_due && asked.insert(member) {
                app.probes.asked(member, Instant::now());
                asking.spawn(ask(app.clone(), own, member));
            }
        }
    }
}

/// Tells a member that was removed, which no leader calls any more, and returns it.
async fn bid_farewell(app: App, member: u64) -> u64 {
    if app.reader.removed_members().contains(&member) {
        let mut client = SideClient::new(app.node.peer_channel(member));
        let told = client.version(Node::farewell(VersionRequest {}));
        // If it does not hear this, it is refused when it asks.
        let _answer = tokio::time::timeout(ANSWER_TIME, told).await;
    }
    member
}

/// Asks one member and returns it.
async fn ask(app: App, own: u64, member: u64) -> u64 {
    let started = Instant::now();
    let mut client = SideClient::new(app.node.peer_channel(member));
    let asked = client.version(VersionRequest {});
    let answer = tokio::time::timeout(ANSWER_TIME, asked).await;
    let peers = &app.metrics.peers;
    let to = format!("{member:x}");
    match answer {
        Ok(Ok(answer)) => {
            peers.round_trip.with_label_values(&[&to]).observe(started.elapsed().as_secs_f64());
            app.probes.answered(member, answer.into_inner().etcd_version, Instant::now());
        }
        Ok(Err(_)) | Err(_) => {
            if let Ok(Err(refusal)) = &answer {
                app.node.check_refusal(refusal);
            }
            if app.probes.failed(member) {
                peers.disconnected.with_label_values(&[&format!("{own:x}"), &to]).inc();
            }
        }
    }
    member
}

/// All other members with their ids and whether they are connected, for the metrics.
#[must_use]
pub fn connections(app: &App) -> Vec<(u64, bool)> {
    let own = app.node.status().member_id;
    let members = app.reader.members().into_iter().map(|member| member.id);
    let others = members.filter(|id| *id != own);
    others.map(|id| (id, app.probes.active_since(id).is_some())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_failure_starts_the_time_anew() {
        let probes = Probes::default();
        let start = Instant::now();
        assert_eq!(probes.active_since(7), None);
        assert!(!probes.failed(7), "it never was connected");
        probes.answered(7, "3.7.1".to_owned(), start);
        probes.answered(7, "3.7.3".to_owned(), start + Duration::from_secs(1));
        assert_eq!(probes.active_since(7), Some(start));
        assert!(probes.failed(7));
        assert_eq!((probes.active_since(7), probes.version(7)), (None, Some("3.7.3".to_owned())));
        probes.answered(8, "3.7.3".to_owned(), start);
        assert_eq!(probes.retain(&[8, 9]), [7]);
        assert_eq!(probes.retain(&[8, 9]), [0_u64; 0], "once");
        assert_eq!(probes.version(7), None);
    }

    #[test]
    fn one_that_never_answered_is_unknown_for_a_second() {
        let probes = Probes::default();
        let start = Instant::now();
        assert!(probes.is_unknown(7, start), "it was not asked yet");
        probes.asked(7, start);
        assert!(!probes.failed(7));
        probes.asked(7, start + Duration::from_millis(900));
        assert!(probes.is_unknown(7, start + Duration::from_millis(999)));
        assert!(!probes.is_unknown(7, start + UNKNOWN), "asked for a second");
        probes.asked(8, start);
        probes.answered(8, "3.7.3".to_owned(), start);
        assert!(probes.failed(8));
        assert!(!probes.is_unknown(8, start), "it answered, and does no more");
    }

    #[test]
    fn one_that_answers_and_does_not_call_is_told_from_one_that_is_away() {
        let probes = Probes::default();
        let start = Instant::now();
        let second = Duration::from_secs(1);
        assert!(!probes.only_answers(7, start), "nothing is known");
        probes.heard(7, start);
        assert!(!probes.only_answers(7, start + second), "it calls and does not answer");
        probes.answered(7, "3.7.3".to_owned(), start);
        assert!(!probes.only_answers(7, start), "it called just then");
        assert!(probes.only_answers(7, start + second));
        probes.answered(8, "3.7.3".to_owned(), start);
        assert!(probes.only_answers(8, start), "it never called");
        assert!(probes.failed(8));
        assert!(!probes.only_answers(8, start), "it is away");
    }

    #[tokio::test]
    async fn a_call_of_one_that_is_not_connected_wakes_who_asks() {
        let probes = Probes::default();
        let woken = || tokio::time::timeout(Duration::from_millis(10), probes.heard.notified());
        let now = Instant::now();
        probes.answered(7, "3.7.3".to_owned(), now);
        probes.heard(7, now);
        assert!(woken().await.is_err(), "it is known to be connected");
        probes.heard(8, now);
        assert!(woken().await.is_ok(), "never asked");
        assert!(probes.failed(7));
        probes.heard(7, now);
        assert!(woken().await.is_ok(), "silent before, and now it calls");
    }
}
