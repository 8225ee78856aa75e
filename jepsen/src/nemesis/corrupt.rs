//! Damage to the files of one stopped follower, which then starts again. It must notice, never answer
//! wrongly, and either heal from its peers or end with words that say what to do; then it is replaced.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::member::exchange;
use super::{Fault, Hurt, Scene};
use crate::cluster::Target;
use crate::rng::Rng;
use crate::run::Run;

const PAGE: usize = 4096;

/// A damaged member has come to an end, one way or the other, within this.
const DECIDES: Duration = Duration::from_secs(60);

/// A log under load has enough in it after this.
const FILLS: Duration = Duration::from_secs(20);

/// Words of a member that has noticed damage.
const NOTICED: [&str; 9] = [
    "corrupt",
    "damaged",
    "set aside",
    "rebuilt",
    "missing",
    "mismatch",
    "checksum",
    "shorter",
    "panic",
];

pub(super) async fn install(fault: Fault, run: &Run, scene: &Scene) -> io::Result<Hurt> {
    let member = scene.follower;
    let data = run.cluster.lock().data(member);
    // Right after a start there is little to damage.
    for _ in 0..FILLS.as_millis() / 200 {
        if log(&data)?.is_some() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    let mut cluster = run.cluster.lock();
    cluster.kill(member)?;
    let done = damage(fault, &data, &mut Rng::fork(scene.draw, 0));
    cluster.restart(member)?;
    match done? {
        Some(what) => {
            cluster.excuse(member);
            Ok(Hurt::noted(&[member], format!("member {member}: {what}")))
        }
        None => Ok(Hurt::skipped(format!("member {member} has nothing to damage yet"))),
    }
}

/// Does the damage and says what it is; nothing if there is too little to damage.
fn damage(fault: Fault, data: &Path, rng: &mut Rng) -> io::Result<Option<String>> {
    if fault == Fault::FlipState {
        return flip_state(data, rng);
    }
    if fault == Fault::MissingFile {
        return remove(data, rng);
    }
    let Some((path, bytes)) = log(data)? else { return Ok(None) };
    let file = File::options().write(true).open(&path)?;
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    // Behind the header and well before the end, so that good records follow.
    let at = PAGE + rng.below((bytes.len() * 3 / 4 - PAGE) as u64) as usize;
    let what = match fault {
        Fault::FlipLog => {
            let at = (at..bytes.len()).find(|at| bytes[*at] != 0).unwrap_or(at);
            file.write_all_at(&[bytes[at] ^ (1 << rng.below(8))], at as u64)?;
            format!("a bit of byte {at} of {name}")
        }
        Fault::TruncatedTail => {
            file.set_len(at as u64)?;
            format!("{name} cut to {at} bytes")
        }
        Fault::ZeroedPage => {
            let at = at / PAGE * PAGE;
            file.write_all_at(&[0; PAGE], at as u64)?;
            format!("zeros at {at} of {name}")
        }
        other => unreachable!("{} is no damage", other.name()),
    };
    Ok(Some(what))
}

/// The newest log file that has enough in it, and its bytes up to the last that is not zero.
fn log(data: &Path) -> io::Result<Option<(PathBuf, Vec<u8>)>> {
    for path in files(&data.join("member/wal"))?.into_iter().rev() {
        if path.extension().is_none_or(|extension| extension != "wal") {
            continue;
        }
        let mut bytes = std::fs::read(&path)?;
        let used = bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
        bytes.truncate(used);
        if used > 4 * PAGE {
            return Ok(Some((path, bytes)));
        }
    }
    Ok(None)
}

/// Where the state lies, in either program.
fn state(data: &Path) -> PathBuf {
    let ours = data.join("member/state");
    if ours.exists() { ours } else { data.join("member/snap") }
}

/// One bit in every page that holds anything.
fn flip_state(data: &Path, rng: &mut Rng) -> io::Result<Option<String>> {
    let mut flipped = 0;
    // The name of the live state has a checksum of its own; it is the data that are tested here.
    let all = files(&state(data))?;
    for path in
        all.into_iter().filter(|path| path.file_name().is_some_and(|name| name != "CURRENT"))
    {
        let bytes = std::fs::read(&path)?;
        let file = File::options().write(true).open(&path)?;
        for (number, page) in bytes.chunks(PAGE).enumerate() {
            let start = rng.below(page.len() as u64) as usize;
            let used = (start..page.len()).find(|at| page[*at] != 0);
            let Some(at) = used.or_else(|| page.iter().position(|byte| *byte != 0)) else {
                continue;
            };
            let flip = page[at] ^ (1 << rng.below(8));
            file.write_all_at(&[flip], (number * PAGE + at) as u64)?;
            flipped += 1;
        }
    }
    Ok((flipped > 0).then(|| format!("a bit in each of {flipped} pages of the state")))
}

/// Removes a file of the log, or one of the state, that has anything in it.
fn remove(data: &Path, rng: &mut Rng) -> io::Result<Option<String>> {
    let logs = files(&data.join("member/wal"))?;
    let mut all: Vec<PathBuf> =
        logs.into_iter().filter(|path| path.extension().is_some_and(|end| end == "wal")).collect();
    all.extend(files(&state(data))?);
    all.retain(|path| path.metadata().is_ok_and(|metadata| metadata.len() > 0));
    if all.is_empty() {
        return Ok(None);
    }
    let path = rng.pick(&all);
    std::fs::remove_file(path)?;
    let short = path.strip_prefix(data).unwrap_or(path);
    Ok(Some(format!("{} is missing", short.display())))
}

/// All files below a directory, by name; none if it does not exist.
fn files(dir: &Path) -> io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    if !dir.exists() {
        return Ok(found);
    }
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() {
            found.extend(files(&path)?);
        } else {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

/// Waits for what the member makes of it, and replaces it if it refused.
pub(super) async fn undo(run: &Run, hurt: &mut Hurt) -> io::Result<()> {
    let member = hurt.members[0];
    let ended = tokio::select! {
        ended = run.ended(member, DECIDES) => ended,
        Some(_) = run.serves(member, DECIDES) => None,
    };
    let log = run.cluster.lock().last_log(member).to_lowercase();
    let noticed = NOTICED.iter().any(|word| log.contains(word));
    let ours = run.plan.target == Target::Kelson;
    let Some(status) = ended else {
        if run.serves(member, Duration::from_secs(5)).await.is_none() {
            run.finding(format!(
                "member {member} neither serves nor ends, {DECIDES:?} after damage"
            ));
            return exchange(run, hurt, member).await;
        }
        hurt.add(if noticed { "noticed and healed" } else { "served, and nothing was noticed" });
        // Without the newest log of the state's metadata it is an earlier checkpoint, as after a crash
        // in the midst of an opening: the log brings it up, without a word and rightly.
        let is_earlier = hurt.note.contains("metadata/log_");
        if !noticed && ours && !is_earlier {
            run.finding(format!("{}: the member serves and its log tells nothing", hurt.note));
        }
        return Ok(());
    };
    hurt.add(&format!("refused: {status}"));
    let advised = log.contains("member remove ") && log.contains("member add ");
    if ours && !advised {
        run.finding(format!("{}: its log does not say what to do", hurt.note));
    }
    exchange(run, hurt, member).await
}
