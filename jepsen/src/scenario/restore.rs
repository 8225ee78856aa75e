//! The scenario of an operator who brings a cluster back from a snapshot while watchers hold on to it.
//! It never keeps what members had on disk: each starts from the snapshot alone.

use std::io;

use super::{cast, note, recovered, wait};
use crate::call::Range;
use crate::client::{Client, PREFIX, get};
use crate::history::{Call, Detail, Op, Outcome, WatchWhat};
use crate::nemesis::admin::{PATIENCE, fetch};
use crate::run::Run;

/// How far `--bump-revision` moves the revisions on: farther than they come in a scenario.
const BUMP: i64 = 100_000;

/// The whole cluster is restored twice. At first as it was, so that every watcher goes on where it
/// stopped; then with its revisions moved on and all before compacted, so that every watcher must be told.
pub(super) async fn restore(run: &Run) -> io::Result<()> {
    for bump in [0, BUMP] {
        let members = run.load.members.read().clone();
        let from = run.clock.seconds();
        cast(run).await?;
        // Nothing may be acknowledged behind the snapshot, or the restore would rightly lose it.
        apart(run, &members);
        wait(2.0).await;
        let (source, newest) = newest(&members).await?;
        let bytes = fetch(source).await.map_err(io::Error::other)?;
        let file = run.dir.join(format!("restore-{bump}.db"));
        std::fs::write(&file, bytes)?;
        for member in &members {
            run.cluster.lock().kill(*member)?;
        }
        run.fabric.heal();
        let asked = run.clock.now();
        for member in &members {
            let command = run.cluster.lock().restore(*member, &members, &file, bump)?;
            tool(command).await?;
        }
        if bump > 0 {
            // Part of the history, for it decides which reads and watches may be refused.
            run.load.ops.add(compacted(run, asked, newest + bump));
            run.compacted.store(newest + bump, std::sync::atomic::Ordering::Relaxed);
        }
        for member in &members {
            run.cluster.lock().restart(*member)?;
        }
        std::fs::remove_file(&file)?;
        let what = format!("restored at revision {newest}, moved on by {bump}");
        note(run, &what, from, &members);
        recovered(run, "after the restore").await?;
        history(run, &members, newest, bump > 0).await;
        wait(4.0).await;
    }
    let told = run.watchers.records().with(|all| {
        all.iter().filter(|one| matches!(one.what, WatchWhat::Compacted { .. })).count()
    });
    run.say(&format!("{told} watches were told that history is gone"));
    if told < run.load.members.read().len() {
        run.gap(format!("only {told} watches were told that history is gone"));
    }
    Ok(())
}

fn apart(run: &Run, members: &[usize]) {
    for (at, one) in members.iter().enumerate() {
        members[at + 1..].iter().for_each(|other| run.fabric.cut(*one, *other));
    }
}

/// Who holds most, and up to which revision.
async fn newest(members: &[usize]) -> io::Result<(usize, i64)> {
    let mut best = None;
    for member in members {
        let answer = Client::new(*member, PATIENCE).range(get(PREFIX, true)).await;
        let answer = answer.map_err(|status| {
            io::Error::other(format!("member {member} does not read alone: {status}"))
        })?;
        best = best.max(Some((answer.revision, *member)));
    }
    let (revision, member) = best.ok_or_else(|| io::Error::other("no member"))?;
    Ok((member, revision))
}

/// Runs the tool of operators to its end.
async fn tool(mut command: std::process::Command) -> io::Result<()> {
    let output = tokio::task::spawn_blocking(move || command.output()).await??;
    match output.status.success() {
        true => Ok(()),
        false => {
            let said = String::from_utf8_lossy(&output.stderr);
            Err(io::Error::other(format!("snapshot restore: {}: {said}", output.status)))
        }
    }
}

/// What `--mark-compacted` did, as if a client had asked for it.
fn compacted(run: &Run, start: u64, revision: i64) -> Op {
    Op {
        process: run.load.process(),
        member: 1,
        call: Call::Compact { revision },
        start,
        end: run.clock.now(),
        outcome: Outcome::Ok,
        error: None,
        revision,
        succeeded: true,
        rows: Vec::new(),
        detail: Detail::default(),
    }
}

/// Reads what was before the snapshot, through every member: the judges know the answer.
async fn history(run: &Run, members: &[usize], newest: i64, gone: bool) {
    for member in members {
        let (client, process) = (Client::new(*member, PATIENCE), run.load.process());
        let range = Range { revision: (newest - 5).max(1), ..Range::prefix(PREFIX) };
        let op = run.load.perform(&client, process, *member, Call::Range(range)).await;
        let refused = op.error.as_deref().is_some_and(|error| error.contains("compacted"));
        if gone != refused || (!gone && op.outcome != Outcome::Ok) {
            let answer = op.error.unwrap_or_else(|| "an answer".into());
            run.finding(format!(
                "member {member}, asked for revision {} behind a restore, gives: {answer}",
                newest - 5
            ));
        }
    }
}
