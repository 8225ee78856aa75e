//! Faults of the membership: members that come and go under load, by the documented way (learner,
//! then voter; a dead member goes first). Commands and other faults use the same steps.

use std::io;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::{Fault, Hurt, Scene};
use crate::client::Client;
use crate::cluster::peer_url;
use crate::run::Run;

/// A learner of a small store is in step within seconds; of a large one within minutes.
const CATCH_UP: Duration = Duration::from_secs(600);

pub(super) async fn install(fault: Fault, run: &Run, scene: &Scene) -> io::Result<Hurt> {
    let mut hurt = Hurt::new(&[]);
    match fault {
        Fault::Grow => enter(run, &mut hurt).await?,
        Fault::Shrink => part(run, &mut hurt, scene.follower).await,
        Fault::Replace => {
            enter(run, &mut hurt).await?;
            part(run, &mut hurt, scene.leader).await;
        }
        other => unreachable!("{} is no fault of the membership", other.name()),
    }
    Ok(hurt)
}

pub(super) async fn undo(fault: Fault, run: &Run, hurt: &mut Hurt) -> io::Result<()> {
    match fault {
        Fault::Grow => {
            let new = hurt.members[0];
            part(run, hurt, new).await;
            Ok(())
        }
        Fault::Shrink => enter(run, hurt).await,
        _ => Ok(()),
    }
}

/// A fresh member joins, at a place where nobody was before.
async fn enter(run: &Run, hurt: &mut Hurt) -> io::Result<()> {
    let Some(new) = run.fresh() else {
        hurt.doubt("no place is left for another member");
        return Ok(());
    };
    hurt.members.push(new);
    match join(run, new).await? {
        Ok(()) => hurt.add(&format!("member {new} joined")),
        Err(error) => {
            hurt.doubt(error.clone());
            run.finding(format!("member {new} cannot join: {error}"));
        }
    }
    Ok(())
}

async fn part(run: &Run, hurt: &mut Hurt, old: usize) {
    match leave(run, old).await {
        Ok(()) => hurt.add(&format!("member {old} left")),
        Err(error) => {
            hurt.doubt(error.clone());
            run.finding(format!("member {old} cannot leave: {error}"));
        }
    }
}

/// Replaces a member that does not come back. It goes first: adding beside a dead member would make a
/// quorum harder to reach.
pub(super) async fn exchange(run: &Run, hurt: &mut Hurt, old: usize) -> io::Result<()> {
    part(run, hurt, old).await;
    enter(run, hurt).await
}

/// Adds a member as a learner, starts it and promotes it once it is in step.
pub(crate) async fn join(run: &Run, new: usize) -> io::Result<Result<(), String>> {
    let members = run.load.members.read().clone();
    let id = match add(&members, new).await {
        Ok(id) => id,
        Err(status) => return Ok(Err(format!("member add: {status}"))),
    };
    let mut peers = members.clone();
    peers.push(new);
    run.cluster.lock().start(new, &peers, true)?;
    run.monitor.added(new, id);
    run.monitor.watch(new);
    let promoted = promote(run, &members, new, id).await;
    if promoted.is_ok() {
        run.load.members.write().push(new);
        run.watchers.skip(new, run.compacted.load(Ordering::Relaxed));
        run.watchers.watch(new);
    }
    Ok(promoted)
}

/// Adds a learner and gives its id. Members that were started lately are refused as unhealthy for some
/// seconds, and an answer that was lost may have been yes: the list of members then tells.
async fn add(members: &[usize], new: usize) -> Result<u64, tonic::Status> {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(30);
    loop {
        let client = Client::new(members[0], Duration::from_secs(10));
        let refusal = match client.member_add(peer_url(new), true).await {
            Ok(added) => {
                let id = added.member.map(|member| member.id);
                return id.ok_or_else(|| tonic::Status::internal("the answer names no member"));
            }
            Err(status) => status,
        };
        if tokio::time::Instant::now() > deadline {
            return Err(refusal);
        }
        if !passing(&refusal) {
            match client.member_at(&peer_url(new)).await {
                Ok(Some(id)) => return Ok(id),
                Ok(None) if refusal.code() != tonic::Code::DeadlineExceeded => return Err(refusal),
                Ok(None) | Err(_) => {}
            }
        }
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
}

/// Refusals that time heals; the load may have a learner of its own for a while.
fn passing(status: &tonic::Status) -> bool {
    ["unhealthy cluster", "too many learner"].iter().any(|text| status.message().contains(text))
}

/// Asks for the promotion until the learner is ready, as an operator would.
async fn promote(run: &Run, members: &[usize], new: usize, id: u64) -> Result<(), String> {
    let deadline = tokio::time::Instant::now() + CATCH_UP;
    let (mut turn, mut unknown) = (0, 0);
    loop {
        let client = Client::new(members[turn % members.len()], Duration::from_secs(10));
        turn += 1;
        let refusal = match client.member_promote(id).await {
            Ok(()) => return Ok(()),
            Err(status) => status,
        };
        // An answer that was lost may have been yes.
        if turn > 1 && refusal.message() == "etcdserver: can only promote a learner member" {
            return Ok(());
        }
        // A new leader may still have to apply its addition; who is unknown for longer is gone.
        unknown += usize::from(refusal.code() == tonic::Code::NotFound);
        if unknown > 10 {
            return Err(format!("promote: {refusal}"));
        }
        if tokio::time::Instant::now() > deadline {
            return Err(format!("promote: still {refusal} after {CATCH_UP:?}"));
        }
        if let Some(status) = run.cluster.lock().ended(new) {
            return Err(format!("promote: {refusal}; it ended itself: {status}"));
        }
        if !refusal.message().contains("in sync") {
            run.say(&format!("promote: {refusal}"));
        }
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
}

/// Removes a member, through another one, and ends its process.
pub(crate) async fn leave(run: &Run, old: usize) -> Result<(), String> {
    remove(run, old).await?;
    // A removed member stops by itself; that is what an operator waits for.
    if run.ended(old, Duration::from_secs(10)).await.is_none() {
        run.finding(format!("member {old} still runs 10 s after its removal"));
    }
    run.cluster.lock().kill(old).map_err(|error| error.to_string())
}

/// Removes a member, whether it can hear of it or not.
pub(crate) async fn remove(run: &Run, old: usize) -> Result<(), String> {
    let id = run.monitor.id(old).ok_or("its member id was never seen")?;
    let rest: Vec<usize> =
        run.load.members.read().iter().copied().filter(|member| *member != old).collect();
    let through = *rest.last().ok_or("it is the only member")?;
    run.load.members.write().retain(|member| *member != old);
    run.watchers.leave(old);
    run.cluster.lock().excuse(old);
    let mut answer = Err("never asked".to_owned());
    // A leader that is removed may take the answer with it: then a second request says not found.
    for _ in 0..20 {
        let client = Client::new(through, Duration::from_secs(10));
        match client.member_remove(id).await {
            Ok(()) => answer = Ok(()),
            Err(status) if status.code() == tonic::Code::NotFound => answer = Ok(()),
            Err(status) => answer = Err(format!("member remove: {status}")),
        }
        if answer.is_ok() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    answer
}
