//! Who leads: asks every member for its status many times a second and remembers each change. It
//! knows nothing of load or faults; faults ask it for their victim, reports for leader changes.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use crate::client::Client;
use crate::history::{Clock, Recorder};

/// Time between two questions to one member.
const EVERY: Duration = Duration::from_millis(100);

/// A member's view of the leadership, recorded when it changes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Sighting {
    pub(crate) at: u64,
    /// Who said it.
    pub(crate) member: usize,
    pub(crate) term: u64,
    /// Member id of the leader it knows, 0 for none.
    pub(crate) leader: u64,
}

/// Watches the leadership of one cluster.
pub(crate) struct Monitor {
    clock: Clock,
    sightings: Recorder<Sighting>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Last answer of each member.
    views: BTreeMap<usize, Sighting>,
    /// Member id to place.
    places: BTreeMap<u64, usize>,
    version: String,
}

impl Monitor {
    pub(crate) fn new(clock: Clock, sightings: Recorder<Sighting>) -> Arc<Self> {
        Arc::new(Self { clock, sightings, state: Mutex::default() })
    }

    pub(crate) fn sightings(&self) -> &Recorder<Sighting> {
        &self.sightings
    }

    /// Writes what was recorded to its file.
    pub(crate) fn flush(&self) -> std::io::Result<()> {
        self.sightings.all().map(drop)
    }

    /// Starts asking one member, until the run ends.
    pub(crate) fn watch(self: &Arc<Self>, member: usize) -> tokio::task::JoinHandle<()> {
        let this = self.clone();
        tokio::spawn(async move {
            let mut client = Client::new(member, Duration::from_millis(400));
            loop {
                match client.status().await {
                    Ok(status) => this.note(member, &status),
                    Err(_) => client = Client::new(member, Duration::from_millis(400)),
                }
                tokio::time::sleep(EVERY).await;
            }
        })
    }

    /// Learns the id of a member from the answer that added it. etcd may promote a member, and be told
    /// to remove it again, seconds before it answers for itself.
    pub(crate) fn added(&self, member: usize, id: u64) {
        self.state.lock().places.insert(id, member);
    }

    fn note(&self, member: usize, status: &kelson_api::etcdserverpb::StatusResponse) {
        let id = status.header.map_or(0, |header| header.member_id);
        let sighting = Sighting {
            at: self.clock.now(),
            member,
            term: status.raft_term,
            leader: status.leader,
        };
        let mut state = self.state.lock();
        // A member that was restored from a snapshot has another id.
        state.places.retain(|known, place| *place != member || *known == id);
        state.places.insert(id, member);
        if state.version.is_empty() {
            state.version.clone_from(&status.version);
        }
        let before = state.views.insert(member, sighting.clone());
        if before.is_none_or(|old| (old.term, old.leader) != (sighting.term, sighting.leader)) {
            self.sightings.add(sighting);
        }
    }

    /// The leader that the newest term has, as far as any member said within the last second.
    pub(crate) fn leader(&self) -> Option<usize> {
        let now = self.clock.now();
        let state = self.state.lock();
        let fresh = state.views.values().filter(|view| now - view.at < 1_000_000_000);
        let newest = fresh.filter(|view| view.leader != 0).max_by_key(|view| view.term)?;
        state.places.get(&newest.leader).copied()
    }

    /// Waits for a leader that also says of itself that it leads.
    pub(crate) async fn settled(&self, within: Duration) -> Option<usize> {
        let deadline = tokio::time::Instant::now() + within;
        loop {
            if let Some(leader) = self.leader().filter(|leader| self.confirms(*leader)) {
                return Some(leader);
            }
            if tokio::time::Instant::now() > deadline {
                return None;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    fn confirms(&self, member: usize) -> bool {
        let now = self.clock.now();
        let state = self.state.lock();
        state.views.get(&member).is_some_and(|view| {
            now - view.at < 1_000_000_000 && state.places.get(&view.leader) == Some(&member)
        })
    }

    /// Member id of a place.
    pub(crate) fn id(&self, member: usize) -> Option<u64> {
        let state = self.state.lock();
        state.places.iter().find(|(_, place)| **place == member).map(|(id, _)| *id)
    }

    /// The version that the members report.
    pub(crate) fn version(&self) -> String {
        self.state.lock().version.clone()
    }

    /// How many terms got a leader between two moments: 0 for a calm cluster.
    pub(crate) fn changes(&self, from: u64, to: u64) -> usize {
        self.sightings.with(|all| {
            let led = |sighting: &&Sighting| sighting.leader != 0;
            let known = all.iter().filter(led).filter(|seen| seen.at <= from);
            let known = known.map(|seen| seen.term).max().unwrap_or(0);
            let mut new: Vec<u64> = all
                .iter()
                .filter(led)
                .filter(|seen| seen.at > from && seen.at <= to && seen.term > known)
                .map(|seen| seen.term)
                .collect();
            new.sort_unstable();
            new.dedup();
            new.len()
        })
    }
}
