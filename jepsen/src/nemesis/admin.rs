//! What administrators do to a cluster that serves: compact, defragment, take a snapshot, disarm
//! alarms. But for compactions these calls are no part of a history; their effect on it must be none.

use std::sync::atomic::Ordering;
use std::time::Duration;

use kelson_api::etcdserverpb as pb;
use pb::maintenance_client::MaintenanceClient;
use sha2::{Digest, Sha256};
use tonic::Status;
use tonic::transport::{Channel, Endpoint};

use super::{Fault, Hurt};
use crate::client::Client;
use crate::fabric;
use crate::history::Call;
use crate::run::Run;

/// An administrator waits this long for an answer.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// Bytes of the digest at the end of a snapshot.
const DIGEST: usize = 32;

pub(super) async fn install(fault: Fault, run: &Run) -> Hurt {
    let done = match fault {
        Fault::Compact => compact(run).await,
        Fault::Defrag => defragment(run).await,
        Fault::SnapshotSave => snapshot(run).await,
        other => unreachable!("{} is no task of administrators", other.name()),
    };
    match done {
        Ok(note) => Hurt::noted(&[], note),
        Err(reason) => {
            let mut hurt = Hurt::new(&[]);
            hurt.doubt(reason);
            hurt
        }
    }
}

fn channel(member: usize) -> Channel {
    Endpoint::from_shared(format!("http://{}:2379", fabric::address(member)))
        .expect("an address is a valid URI")
        .connect_timeout(Duration::from_secs(1))
        .timeout(PATIENCE)
        .connect_lazy()
}

fn members(run: &Run) -> Vec<usize> {
    run.load.members.read().clone()
}

/// Compacts as far as every watcher has read, so that none is thrown off its stream.
async fn compact(run: &Run) -> Result<String, String> {
    let members = members(run);
    let read = || members.iter().map(|member| run.watchers.reached(*member)).min().unwrap_or(0);
    let mut tries = 0;
    while read() <= run.compacted.load(Ordering::Relaxed).max(1) {
        tries += 1;
        if tries > 100 {
            return Err("the watchers have seen nothing new for ten seconds".into());
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let read = read();
    // Before it is asked for: without an answer it may be done all the same.
    run.compacted.fetch_max(read, Ordering::Relaxed);
    // Part of the history: it decides which reads may be refused.
    let client = Client::new(members[0], PATIENCE);
    let call = Call::Compact { revision: read };
    let op = run.load.perform(&client, run.load.process(), members[0], call).await;
    match op.error {
        None => Ok(format!("up to revision {read}")),
        Some(error) => Err(format!("compact: {error}")),
    }
}

async fn defragment(run: &Run) -> Result<String, String> {
    for member in members(run) {
        let mut maintenance = MaintenanceClient::new(channel(member));
        let done = maintenance.defragment(pb::DefragmentRequest {}).await;
        done.map_err(|status| format!("defragment member {member}: {status}"))?;
    }
    Ok("all members".into())
}

/// Takes a snapshot of the leader and compares its digest, as `etcdutl snapshot restore` would.
pub(crate) async fn snapshot(run: &Run) -> Result<String, String> {
    let member = run.monitor.leader().unwrap_or(members(run)[0]);
    let bytes = fetch(member).await?;
    let Some(length) = bytes.len().checked_sub(DIGEST) else {
        return Err(format!("a snapshot of {} bytes", bytes.len()));
    };
    let (data, digest) = bytes.split_at(length);
    if Sha256::digest(data)[..] != *digest {
        run.finding(format!("a snapshot of member {member} does not fit its digest"));
    }
    Ok(format!("{length} bytes from member {member}"))
}

/// A snapshot as a member sends it, with its digest at the end.
pub(crate) async fn fetch(member: usize) -> Result<Vec<u8>, String> {
    let mut maintenance = MaintenanceClient::new(channel(member));
    let trouble = |status: Status| format!("snapshot of member {member}: {status}");
    let answer = maintenance.snapshot(pb::SnapshotRequest {}).await.map_err(trouble)?;
    let (mut stream, mut bytes) = (answer.into_inner(), Vec::new());
    while let Some(part) = stream.message().await.map_err(trouble)? {
        bytes.extend_from_slice(&part.blob);
    }
    Ok(bytes)
}

/// Takes back all alarms; gives their number.
pub(super) async fn disarm(run: &Run) -> Result<usize, Status> {
    let members = members(run);
    let mut tries = 0;
    loop {
        let member = members[tries % members.len()];
        tries += 1;
        match disarm_through(member).await {
            Err(_) if tries < 3 * members.len() => {
                tokio::time::sleep(Duration::from_millis(500)).await;
            }
            answer => return answer,
        }
    }
}

async fn disarm_through(member: usize) -> Result<usize, Status> {
    let mut maintenance = MaintenanceClient::new(channel(member));
    let ask = |action: pb::alarm_request::AlarmAction, member_id, alarm| pb::AlarmRequest {
        action: action as i32,
        member_id,
        alarm,
    };
    let all = maintenance.alarm(ask(pb::alarm_request::AlarmAction::Get, 0, 0)).await?;
    let alarms = all.into_inner().alarms;
    for alarm in &alarms {
        let action = pb::alarm_request::AlarmAction::Deactivate;
        maintenance.alarm(ask(action, alarm.member_id, alarm.alarm)).await?;
    }
    Ok(alarms.len())
}
