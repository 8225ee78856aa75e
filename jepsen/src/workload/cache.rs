//! A cache of all objects as kube-apiserver keeps it, one per member: filled from pages at one
//! revision, then kept up by a watch from the next one. It records what it holds at revisions that
//! the watch says are complete, and begins anew after every break.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use kelson_api::etcdserverpb as pb;
use pb::watch_request::RequestUnion;

use super::Load;
use super::kube::{PAGE, REGISTRY, next_page};
use crate::call::Range;
use crate::client::{Client, revision};
use crate::history::{Call, Event, Note, Outcome, Row, Spec, WatchWhat};
use crate::watcher::{Watchers, create, open};
use crate::wire::event;

/// Progress is asked for this often, as for a consistent read from the cache.
const ASK: Duration = Duration::from_millis(100);
/// Questions for progress between two records of the contents.
const RECORD: u64 = 5;

/// Keeps a cache of one member until the load ends.
pub(super) async fn keep(load: Arc<Load>, watchers: Arc<Watchers>, member: usize) {
    while !load.stopped() && load.members.read().contains(&member) {
        if let Some((rows, revision)) = list(&load, member).await {
            let stream = watchers.stream();
            let mut cache = Cache { load: &load, watchers: &watchers, member, stream, rows };
            if let Err(error) = cache.follow(revision + 1).await {
                watchers.record(stream, member, WatchWhat::Ended { error });
            }
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

/// All objects, page by page, at the revision of the first page; none if a page fails.
async fn list(load: &Load, member: usize) -> Option<(BTreeMap<String, Row>, i64)> {
    let client = Client::new(member, Duration::from_secs(2));
    let process = load.process();
    let mut page = Range { limit: PAGE, ..Range::prefix(REGISTRY) };
    let mut rows = BTreeMap::new();
    loop {
        let op = load.perform(&client, process, member, Call::Range(page.clone())).await;
        if op.outcome != Outcome::Ok {
            return None;
        }
        let revision = if page.revision > 0 { page.revision } else { op.revision };
        rows.extend(op.rows.iter().map(|row| (row.key.clone(), row.clone())));
        match next_page(&page, &op) {
            Some(next) => page = next,
            None => return Some((rows, revision)),
        }
    }
}

struct Cache<'a> {
    load: &'a Load,
    watchers: &'a Watchers,
    member: usize,
    stream: u64,
    rows: BTreeMap<String, Row>,
}

impl Cache<'_> {
    async fn follow(&mut self, from: i64) -> Result<(), String> {
        let all = Range::prefix(REGISTRY);
        let spec = Spec { key: all.key, end: all.end, ..Spec::default() };
        let (mut asks, mut answers) = open(self.member, create(&spec, from, 0)).await?;
        self.record(WatchWhat::Started { from, spec });
        let (mut asked, mut tick) = (0, tokio::time::interval(ASK));
        while !self.load.stopped() {
            let response = tokio::select! {
                message = answers.message() => message.map_err(|status| format!("{status:?}"))?,
                _ = tick.tick() => {
                    let request = RequestUnion::ProgressRequest(pb::WatchProgressRequest {});
                    // A full queue means that the member reads slowly; it is asked again later.
                    asks.try_send(pb::WatchRequest { request_union: Some(request) }).ok();
                    asked += 1;
                    continue;
                }
            };
            let Some(response) = response else { return Err("closed by the member".into()) };
            if response.canceled {
                let revision = response.compact_revision;
                if revision > 0 {
                    self.record(WatchWhat::Compacted { revision });
                    return Ok(());
                }
                return Err(response.cancel_reason);
            }
            if self.take(&response)? && asked >= RECORD {
                asked = 0;
                self.contents(revision(response.header));
            }
        }
        Ok(())
    }

    /// Takes one response; true if it says that the cache is complete up to its revision. What the
    /// apiserver ends a watch for, and etcd may send, is an error: the cache begins anew.
    fn take(&mut self, response: &pb::WatchResponse) -> Result<bool, String> {
        let header = revision(response.header);
        if response.events.is_empty() {
            if !response.created {
                self.record(WatchWhat::Progress { revision: header });
            }
            return Ok(!response.created);
        }
        let events: Vec<Event> = response.events.iter().map(event).collect();
        let applied = events.iter().try_for_each(|event| self.apply(event));
        self.record(WatchWhat::Events { revision: header, events, more: response.fragment });
        applied.map(|()| false)
    }

    fn apply(&mut self, event: &Event) -> Result<(), String> {
        let created = event.put.as_ref().is_some_and(|row| row.create == row.modified);
        if !created && event.before.is_none() {
            let (member, at) = (self.member, self.load.clock.now());
            let text = format!("no previous value of {} at {}", event.key, event.revision);
            if self.load.previous_may_be_gone {
                let (revision, key) = (event.revision, event.key.clone());
                self.load.notes.add(Note::PreviousGone { member, at, revision, key });
                return Err(text);
            }
            self.load.notes.add(Note::CacheBroken { member, at, text });
        }
        match &event.put {
            Some(row) => self.rows.insert(event.key.clone(), row.clone()),
            None => self.rows.remove(&event.key),
        };
        Ok(())
    }

    fn contents(&self, revision: i64) {
        let rows = self.rows.values().cloned().collect();
        let at = self.load.clock.now();
        self.load.notes.add(Note::Cache { member: self.member, at, revision, rows });
    }

    fn record(&self, what: WatchWhat) {
        self.watchers.record(self.stream, self.member, what);
    }
}
