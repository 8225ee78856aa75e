//! Whether all members have the same data: three comparisons that run where this member leads, and
//! one before a member serves. Every member chains a hash over each entry that it applies, which
//! costs nothing to compare and is always on; hashes of the whole key space also find what was
//! damaged later, and run as etcd's flags say. A member that differs gets the CORRUPT alarm through
//! the log. Nothing is repaired here.

use std::collections::BTreeMap;
use std::time::Duration;

use kelson_api::command::command::Op;
use kelson_api::etcdserverpb::alarm_request::AlarmAction;
use kelson_api::etcdserverpb::{AlarmRequest, AlarmType, HashKvRequest, HashKvResponse};
use kelson_api::peer::ChainRequest;
use kelson_api::peer::side_client::SideClient;
use kelson_storage::HashKv;
use kelson_storage::sabotage::{self, Variant};
use tokio::time::{Instant, MissedTickBehavior};

use crate::app::App;

/// Time between two comparisons of the chains.
const CHAIN_INTERVAL: Duration = Duration::from_secs(5);

/// Longest wait for another member to hash its key space.
const HASH_TIMEOUT: Duration = Duration::from_secs(300);

/// Longest wait for this member to apply what another one has applied.
const CATCH_UP_TIMEOUT: Duration = Duration::from_secs(1);

/// Attempts to get a hash of a member that has not yet applied the revision, and the pause between.
const HASH_ATTEMPTS: usize = 3;
const HASH_PAUSE: Duration = Duration::from_millis(500);

/// This member's data are not those of the others, so it must not serve.
#[derive(Debug, thiserror::Error)]
#[error("found data inconsistency with peers ({0}); replace the data directory of the wrong one")]
pub struct Inconsistent(String);

/// Compares the chains of all members with the leader's, until it is dropped.
pub(super) async fn compare_chains(app: App) {
    let mut tick = ticker(CHAIN_INTERVAL);
    loop {
        tick.tick().await;
        if !app.node.status().is_leader {
            continue;
        }
        let mut verdicts = BTreeMap::new();
        for member in others(&app) {
            if let Some(verdict) = compare_chain(&app, member).await {
                verdicts.insert(member, verdict);
            }
        }
        accuse(&app, &verdicts).await;
    }
}

/// Whether a member's chain is the same as here; `None` if it cannot be said now.
async fn compare_chain(app: &App, member: u64) -> Option<Verdict> {
    let mut side = SideClient::new(app.node.peer_channel(member));
    let asked = side.chain(ChainRequest { index: 0 });
    let answer = tokio::time::timeout(app.limits.election_timeout, asked).await;
    let theirs = answer.ok()?.ok()?.into_inner();
    if theirs.hash == 0 || theirs.since != app.reader.chain_since() {
        return None;
    }
    let deadline = Instant::now() + CATCH_UP_TIMEOUT;
    while app.reader.applied().index < theirs.index {
        if Instant::now() >= deadline {
            return None;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    // None: the member is so far behind that nobody here remembers.
    let ours = app.reader.chain_at(theirs.index)?;
    if ours == theirs.hash || sabotage::is(Variant::DivergenceUnseen) {
        return Some(Verdict::Same);
    }
    tracing::error!(
        "remote-peer-id" = format!("{member:x}"),
        index = theirs.index,
        ours = format!("{ours:x}"),
        theirs = format!("{:x}", theirs.hash),
        "found different hash chains of applied entries"
    );
    Some(Verdict::Differs)
}

/// Compares the hashes of all members' key spaces every so often.
pub(super) async fn compare_hashes(app: App, every: Duration) {
    let mut tick = ticker(every);
    tick.tick().await;
    loop {
        tick.tick().await;
        compare_once(&app).await;
    }
}

/// Compares the hashes of all members' key spaces once after each compaction.
pub(super) async fn compare_after_compactions(app: App, every: Duration) {
    let mut tick = ticker(every);
    let mut checked = app.reader.compacted();
    loop {
        tick.tick().await;
        let compacted = app.reader.compacted();
        if compacted > checked && app.node.status().is_leader {
            compare_once(&app).await;
            checked = compacted;
        }
    }
}

async fn compare_once(app: &App) {
    let members = others(app);
    if members.is_empty() || !app.node.status().is_leader {
        return;
    }
    let Some(ours) = hash_here(app, 0).await else { return };
    let mut answers = BTreeMap::new();
    for member in members {
        if let Some(answer) = hash_there(app, member, ours.hash_revision).await {
            answers.insert(member, answer);
        }
    }
    // What others may have is only known after everything committed is applied here.
    if app.node.read_barrier().await.is_err() || !app.node.status().is_leader {
        return;
    }
    let here = Here { ours, revision: app.reader.revision(), compacted: app.reader.compacted() };
    let mut verdicts = BTreeMap::new();
    for (member, answer) in answers {
        if let Some(verdict) = here.judge(&answer) {
            if verdict == Verdict::Differs {
                report(member, &here.ours, &answer);
            }
            verdicts.insert(member, verdict);
        }
    }
    tracing::info!(
        revision = here.ours.hash_revision,
        members = verdicts.len(),
        "finished peer corruption check"
    );
    accuse(app, &verdicts).await;
}

fn report(member: u64, ours: &HashKv, theirs: &HashKvResponse) {
    tracing::error!(
        "remote-peer-id" = format!("{member:x}"),
        revision = ours.hash_revision,
        "local-compact-revision" = ours.compact_revision,
        "local-hash" = ours.hash,
        "remote-compact-revision" = theirs.compact_revision,
        "remote-hash" = theirs.hash,
        "found different hash values from remote peer"
    );
}

/// Compares this member's data with those of all members that answer, before it serves.
///
/// # Errors
/// Another member has another hash at the same revision.
pub(crate) async fn check_at_start(app: &App) -> Result<(), Inconsistent> {
    let members = others(app);
    if members.is_empty() {
        return Ok(());
    }
    let Some(ours) = hash_here(app, 0).await else { return Ok(()) };
    let revision = ours.hash_revision;
    tracing::info!(revision, "starting initial corruption check");
    let mut differing = Vec::new();
    for member in members {
        let Some(theirs) = hash_there(app, member, revision).await else { continue };
        if theirs.compact_revision == ours.compact_revision && theirs.hash != ours.hash {
            report(member, &ours, &theirs);
            differing.push(format!("{member:x}"));
        }
    }
    if differing.is_empty() {
        tracing::info!("initial corruption checking passed; no corruption");
        return Ok(());
    }
    Err(Inconsistent(format!("at revision {revision} with {}", differing.join(", "))))
}

/// The hash of this member's key space.
async fn hash_here(app: &App, revision: i64) -> Option<HashKv> {
    let reader = app.reader.clone();
    let hashed = tokio::task::spawn_blocking(move || reader.hash_kv(revision)).await;
    match hashed {
        Ok(Ok(hashed)) => Some(hashed),
        Ok(Err(error)) => {
            tracing::warn!(%error, "cannot hash the key space for a comparison");
            None
        }
        Err(error) => {
            tracing::error!(%error, "hashing the key space ended unexpectedly");
            None
        }
    }
}

/// The hash of another member's key space at a revision; `None` if it does not say.
async fn hash_there(app: &App, member: u64, revision: i64) -> Option<HashKvResponse> {
    for attempt in 0..HASH_ATTEMPTS {
        if attempt > 0 {
            tokio::time::sleep(HASH_PAUSE).await;
        }
        let mut side = SideClient::new(app.node.peer_channel(member));
        let asked = side.hash_kv(HashKvRequest { revision });
        match tokio::time::timeout(HASH_TIMEOUT, asked).await {
            Ok(Ok(answer)) => return Some(answer.into_inner()),
            // It is behind and may catch up.
            Ok(Err(status)) if status.code() == tonic::Code::OutOfRange => {}
            Ok(Err(status)) => {
                let member = format!("{member:x}");
                let error = status.message();
                tracing::info!("remote-peer-id" = member, error, "no hash from another member");
                return None;
            }
            Err(_) => return None,
        }
    }
    None
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Same,
    Differs,
}

/// What the leader has, to judge others by.
struct Here {
    ours: HashKv,
    /// After everything that was committed when the others answered.
    revision: i64,
    compacted: i64,
}

impl Here {
    /// `None` where hashes cannot be compared because one side has compacted more.
    fn judge(&self, theirs: &HashKvResponse) -> Option<Verdict> {
        let their_revision = theirs.header.as_ref().map_or(0, |header| header.revision);
        if their_revision > self.revision || theirs.compact_revision > self.compacted {
            // It has applied what was never committed.
            return Some(Verdict::Differs);
        }
        if theirs.compact_revision != self.ours.compact_revision {
            return None;
        }
        let is_same = theirs.hash == self.ours.hash || sabotage::is(Variant::DivergenceUnseen);
        Some(if is_same { Verdict::Same } else { Verdict::Differs })
    }
}

/// Who is to blame: those that differ from the leader, or the leader itself when it stands against
/// most of those that could be compared.
fn blamed(own: u64, verdicts: &BTreeMap<u64, Verdict>) -> Vec<u64> {
    let of = |verdict| move |found: &(&u64, &Verdict)| *found.1 == verdict;
    let differing: Vec<u64> =
        verdicts.iter().filter(of(Verdict::Differs)).map(|(id, _)| *id).collect();
    let same = 1 + verdicts.iter().filter(of(Verdict::Same)).count();
    if differing.len() > same { vec![own] } else { differing }
}

/// Raises the alarm for those to blame.
async fn accuse(app: &App, verdicts: &BTreeMap<u64, Verdict>) {
    for member_id in blamed(app.node.status().member_id, verdicts) {
        let alarm = AlarmType::Corrupt as i32;
        let alarms = app.reader.alarms();
        if alarms.iter().any(|row| row.member_id == member_id && row.alarm == alarm) {
            continue;
        }
        let member = format!("{member_id:x}");
        tracing::error!("member-id" = member, "raising the CORRUPT alarm: its data differ");
        let action = AlarmAction::Activate as i32;
        let request = AlarmRequest { action, member_id, alarm };
        if let Err(error) = app.node.propose_urgent(Op::Alarm(request)).await {
            tracing::error!("member-id" = member, %error, "cannot raise the CORRUPT alarm yet");
        }
    }
}

fn others(app: &App) -> Vec<u64> {
    let own = app.node.status().member_id;
    let members = app.reader.members().into_iter();
    // One that never started has nothing to compare.
    let started = members.filter(|member| member.id != own && !member.name.is_empty());
    started.map(|member| member.id).collect()
}

fn ticker(every: Duration) -> tokio::time::Interval {
    let mut tick = tokio::time::interval(every);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    tick
}

#[cfg(test)]
mod tests {
    use kelson_api::etcdserverpb::ResponseHeader;

    use super::*;

    #[test]
    fn the_minority_is_to_blame_and_the_leader_is_right_in_doubt() {
        use Verdict::{Differs, Same};
        let accused = |list: &[Verdict]| {
            let verdicts = (2..).zip(list.iter().copied()).collect();
            blamed(1, &verdicts)
        };
        assert_eq!(accused(&[]), Vec::<u64>::new());
        assert_eq!(accused(&[Same, Same]), Vec::<u64>::new());
        assert_eq!(accused(&[Same, Differs]), [3]);
        assert_eq!(accused(&[Differs]), [2]);
        assert_eq!(accused(&[Differs, Differs]), [1]);
        assert_eq!(accused(&[Differs, Differs, Same, Same]), [2, 3]);
    }

    #[test]
    fn hashes_are_compared_only_at_equal_compactions() {
        let ours = HashKv { hash: 5, hash_revision: 10, compact_revision: 3 };
        let here = Here { ours, revision: 12, compacted: 4 };
        let answer = |revision, compact_revision, hash| HashKvResponse {
            header: Some(ResponseHeader { revision, ..Default::default() }),
            hash,
            compact_revision,
            hash_revision: 10,
        };
        assert_eq!(here.judge(&answer(11, 3, 5)), Some(Verdict::Same));
        assert_eq!(here.judge(&answer(11, 3, 6)), Some(Verdict::Differs));
        assert_eq!(here.judge(&answer(12, 4, 6)), None);
        assert_eq!(here.judge(&answer(10, -1, 6)), None);
        assert_eq!(here.judge(&answer(13, 3, 5)), Some(Verdict::Differs));
        assert_eq!(here.judge(&answer(12, 5, 5)), Some(Verdict::Differs));
    }
}
