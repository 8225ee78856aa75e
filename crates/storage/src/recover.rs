//! Opening the state: finds the current generation of the database, reads everything back, checks it,
//! and starts the persister. Nothing is taken on trust: each value has a checksum, and all rows
//! together must have the tally of the last checkpoint. A damaged database is set aside, never
//! repaired; the state is then rebuilt from the log if the log still has everything.
//!
//! `state/CURRENT` names the generation, a directory of its own beside it. A generation that the file
//! does not name is an unfinished creation or rewrite and is removed.
//! Some lines over 600: what is believed and what is refused is decided in one place.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use bytes::Bytes;
use kelson_api::etcdserverpb::{AlarmMember, Member};
use rustix::thread::Pid;

use crate::auth::AuthRows;
use crate::chain::Chain;
use crate::dir::{make_dir, replace_file, sync_dir};
use crate::disk::{free_bytes, used_bytes};
use crate::engine::sled::{SledBackend, check_files};
use crate::engine::{Backend, EngineError};
use crate::failpoint;
use crate::keys::{self, SCHEMA_VERSION, Tables, Tally};
use crate::open::OpenError;
use crate::persist::copy::Copy;
use crate::persist::{DurableLog, PersistConfig, Persister, Place, Signals, Start};
use crate::types::{Fatal, LeaseRow, LogId, Row};

/// First line of `CURRENT`.
const MAGIC: &str = "kelson state 1";
/// Pairs after which the rows among them are handed over while everything is read back.
const CHUNK_ROWS: usize = 1024;
/// ... or this many bytes of them, so that large rows do not fill the memory.
const CHUNK_BYTES: usize = 1 << 20;
/// Chunks between the reading thread and the one that builds the index.
const CHUNKS_AHEAD: usize = 8;
/// Longest silence of the database while it is read: a disk may hang.
const SILENCE_MAX: Duration = Duration::from_secs(120);
/// Longest time that it may compute without giving a chunk, however slow the disk and large the state.
/// On some kinds of damage it looks for a page for ever that another has taken the place of. A chunk
/// takes milliseconds; one out of a leaf of the largest values, a second or so.
const COMPUTES_MAX: Duration = Duration::from_secs(10);
/// How often that is looked at.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Longest wait for the lock of a database.
const LOCK_WAIT_MAX: Duration = Duration::from_secs(10);
/// A rewrite must free this many bytes, two blocks, and a quarter of the files, to be worth it.
const REWRITE_GAIN_MIN: u64 = 8 << 10;
/// What must be free beside a second copy of the state, for the log goes on meanwhile: what a full
/// disk does to a database in the making is an error, and errors of it end the process.
const REWRITE_ROOM: u64 = 256 << 20;

/// What the database says apart from its rows.
#[derive(Debug, Default)]
pub(crate) struct Recovered {
    pub(crate) applied: LogId,
    pub(crate) chain: Chain,
    pub(crate) installed: LogId,
    pub(crate) membership: Option<(LogId, Bytes)>,
    pub(crate) leases: Vec<LeaseRow>,
    pub(crate) alarms: Vec<AlarmMember>,
    pub(crate) members: Vec<Member>,
    pub(crate) removed: Vec<u64>,
    pub(crate) uuids: Vec<(u64, Bytes)>,
    pub(crate) auth: AuthRows,
    pub(crate) cluster_version: Option<String>,
    pub(crate) scheduled_compaction: Option<i64>,
    pub(crate) finished_compaction: Option<i64>,
    /// The current revision is at least this: a compaction may have removed the newest row.
    pub(crate) current_revision_floor: i64,
}

impl From<Tables> for Recovered {
    fn from(tables: Tables) -> Self {
        let floor = tables.scheduled_compaction.max(tables.finished_compaction).unwrap_or(1).max(1);
        Self {
            applied: tables.applied,
            chain: chain_of(&tables),
            installed: tables.installed,
            membership: tables.membership,
            leases: tables.leases,
            alarms: tables.alarms,
            members: tables.members,
            removed: tables.removed,
            uuids: tables.uuids,
            auth: tables.auth,
            cluster_version: tables.cluster_version,
            scheduled_compaction: tables.scheduled_compaction,
            finished_compaction: tables.finished_compaction,
            current_revision_floor: floor,
        }
    }
}

/// The chain of a state; one that has none begins it.
fn chain_of(tables: &Tables) -> Chain {
    tables.chain.unwrap_or(Chain::beginning(tables.applied.index))
}

/// What opening needs to know.
pub(crate) struct RecoverConfig {
    pub(crate) persist: PersistConfig,
    /// Everything up to here is gone from the log.
    pub(crate) log_purged: LogId,
}

/// Opens the state in `place`, creating it if there is none. `fresh` makes the receiver of the rows,
/// `row` gives it one row, in revision order; if the database turns out damaged on the way and the
/// log can rebuild it, a second receiver is made and stays empty.
///
/// # Errors
/// See `OpenError`. A damaged database is set aside under another name or left as it is; never
/// changed.
pub(crate) fn recover<L>(
    place: &Place,
    mut config: RecoverConfig,
    durable: impl DurableLog,
    fresh: impl Fn() -> L,
    mut row: impl FnMut(&mut L, &Row) -> Result<(), Fatal>,
) -> Result<(L, Recovered, Persister), OpenError> {
    make_dir(&place.state_dir)?;
    config.persist.place = Some(place.clone());
    let mut receiver = fresh();
    let mut newest = 0;
    let opened = match current_generation(place) {
        Ok(Some(dir)) => {
            remove_other_generations(place);
            let take = |next: &Row| {
                newest = next.key.main;
                row(&mut receiver, next)
            };
            read_back(&dir, place.cache_bytes, take).map(Some)
        }
        Ok(None) => Ok(None),
        Err(trouble) => Err(trouble),
    };
    let (dir, backend, tables) = match opened {
        Ok(Some(opened)) => opened,
        Ok(None) => {
            let purged = config.log_purged;
            if purged.index > 0 {
                let reason =
                    format!("it is missing, and the log begins after entry {}", purged.index);
                return Err(damaged(&place.state_dir, reason));
            }
            if fs::read_dir(&place.state_dir).is_ok_and(|mut entries| entries.next().is_some()) {
                tracing::warn!(
                    path = %current_path(place).display(),
                    "the file is missing, so the state was never finished; it is rebuilt from the log"
                );
            }
            create(place)?
        }
        Err(trouble) => {
            set_aside(place, trouble, config.log_purged)?;
            (receiver, newest) = (fresh(), 0);
            create(place)?
        }
    };
    if tables.applied.index < config.log_purged.index {
        let reason = format!(
            "it ends at entry {} of the log, which begins after entry {}",
            tables.applied.index, config.log_purged.index
        );
        return Err(damaged(&dir, reason));
    }
    let compacted = tables.scheduled_compaction.max(tables.finished_compaction).unwrap_or(1);
    let at = Start {
        applied: tables.applied,
        revision: newest.max(compacted).max(1),
        tally: tables.tally,
        scheduled: tables.scheduled_compaction.max(tables.finished_compaction).unwrap_or(-1),
        chain: chain_of(&tables),
        signals: Signals::new(tables.applied, tables.finished_compaction.unwrap_or(-1)),
        generation_dir: Some(dir),
    };
    let persister = Persister::start(backend, config.persist, durable, at)
        .map_err(|error| OpenError::io("start threads for", &place.state_dir, error))?;
    Ok((receiver, tables.into(), persister))
}

/// Reads the current generation and closes it again; `None` if there is none. Nothing is set aside.
///
/// # Errors
/// `Damaged`.
pub(crate) fn examine(
    place: &Place,
    row: impl FnMut(&Row) -> Result<(), Fatal>,
) -> Result<Option<(PathBuf, Tables)>, OpenError> {
    let found = |trouble: Trouble| damaged(&trouble.path, trouble.reason);
    let Some(dir) = current_generation(place).map_err(found)? else { return Ok(None) };
    let (dir, backend, tables) = read_back(&dir, place.cache_bytes, row).map_err(found)?;
    backend.close();
    Ok(Some((dir, tables)))
}

/// A database that cannot be used.
struct Trouble {
    path: PathBuf,
    reason: String,
    /// Another try may end well, and nothing may be set aside.
    is_final: bool,
}

impl Trouble {
    fn new(path: &Path, reason: impl ToString) -> Self {
        Self { path: path.to_owned(), reason: reason.to_string(), is_final: false }
    }
}

fn damaged(path: &Path, reason: String) -> OpenError {
    let advice = "remove this member from the cluster, delete its data directory and add it anew, \
                  or restore the directory from a snapshot";
    OpenError::Damaged { path: path.to_owned(), reason, advice }
}

/// Moves a damaged state out of the way if the log can rebuild it.
fn set_aside(place: &Place, trouble: Trouble, log_purged: LogId) -> Result<(), OpenError> {
    let Trouble { path, reason, is_final } = trouble;
    if is_final || log_purged.index > 0 {
        return Err(damaged(&path, reason));
    }
    let member_dir = place.state_dir.parent().unwrap_or(Path::new("."));
    let bad = (1..).map(|n: u32| member_dir.join(format!("state.bad-{n}")));
    let bad = bad.into_iter().find(|path| !path.exists()).expect("numbers do not run out");
    tracing::error!(
        path = %path.display(), reason, moved_to = %bad.display(),
        "the state is damaged; it is set aside and rebuilt from the log"
    );
    fs::rename(&place.state_dir, &bad)
        .map_err(|error| OpenError::io("set aside", &place.state_dir, error))?;
    sync_dir(member_dir)?;
    make_dir(&place.state_dir)
}

pub(crate) type Opened = (PathBuf, Box<dyn Backend>, Tables);

/// A new generation that has replaced the old one.
type Rewritten = Option<(PathBuf, Box<dyn Backend>)>;

/// Makes an empty database. It counts only once all of it is on disk and `CURRENT` names it.
fn create(place: &Place) -> Result<Opened, OpenError> {
    remove_other_generations(place);
    let dir = first_generation(place);
    let failed = |error: EngineError| OpenError::io("create", &dir, io::Error::other(error));
    let mut backend = SledBackend::open(&dir, place.cache_bytes).map_err(failed)?;
    let closing = keys::encode_checkpoint(LogId::default(), Chain::default(), Tally::default());
    backend.write(closing.to_vec()).and_then(|()| backend.flush()).map_err(failed)?;
    sync_tree(&dir).map_err(|error| OpenError::io("sync", &dir, error))?;
    name_current(place, &dir)?;
    let tables = Tables { chain: Some(Chain::default()), ..Tables::default() };
    Ok((dir, Box::new(backend), tables))
}

/// The directory of the first generation of a new state.
pub(crate) fn first_generation(place: &Place) -> PathBuf {
    place.state_dir.join(generation_name(1))
}

fn generation_name(number: u64) -> String {
    format!("{number:016x}")
}

fn current_path(place: &Place) -> PathBuf {
    place.state_dir.join("CURRENT")
}

/// Makes a generation the current one. It must be on disk as a whole.
pub(crate) fn name_current(place: &Place, dir: &Path) -> Result<(), OpenError> {
    sync_dir(&place.state_dir)?;
    let name = dir.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let body = format!("{MAGIC}\n{name}\n");
    let crc = crc32c::crc32c(body.as_bytes());
    replace_file(&current_path(place), format!("{body}{crc:08x}\n").as_bytes())
}

/// The generation that `CURRENT` names; `None` if nothing was ever finished here.
fn current_generation(place: &Place) -> Result<Option<PathBuf>, Trouble> {
    let path = current_path(place);
    let text = match fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Trouble::new(&path, error)),
    };
    let is_whole =
        |body: &&str| text[body.len()..] == format!("{:08x}\n", crc32c::crc32c(body.as_bytes()));
    // The checksum is nine bytes with its line feed.
    let body = text.len().checked_sub(9).and_then(|len| text.get(..len)).filter(is_whole);
    let body = body.ok_or_else(|| Trouble::new(&path, "it is not as it was written"))?;
    let mut lines = body.lines();
    let (magic, name) = (lines.next(), lines.next());
    if magic.is_some_and(|line| line != MAGIC) {
        let reason = "it was written by a newer version of Kelson";
        return Err(Trouble { is_final: true, ..Trouble::new(&path, reason) });
    }
    let name = name.ok_or_else(|| Trouble::new(&path, "it does not name a generation"))?;
    let dir = place.state_dir.join(name);
    if !dir.is_dir() {
        return Err(Trouble::new(&dir, "it is missing"));
    }
    Ok(Some(dir))
}

/// Removes generations that `CURRENT` does not name. What cannot be removed is tried again at the
/// next start.
pub(crate) fn remove_other_generations(place: &Place) {
    let current = current_generation(place).ok().flatten();
    let Ok(entries) = fs::read_dir(&place.state_dir) else { return };
    for path in entries.flatten().map(|entry| entry.path()) {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let is_generation = name.len() == 16 && name.bytes().all(|b| b.is_ascii_hexdigit());
        if is_generation
            && current.as_ref() != Some(&path)
            && let Err(error) = fs::remove_dir_all(&path)
        {
            tracing::warn!(path = %path.display(), %error, "cannot remove an unused state");
        }
    }
}

/// Syncs every file and directory below `dir`: the database does not do so for all it creates.
pub(crate) fn sync_tree(dir: &Path) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() { sync_tree(&path)? } else { fs::File::open(&path)?.sync_all()? }
    }
    fs::File::open(dir)?.sync_all()
}

/// What the reading thread sends.
enum Message {
    /// The database is open, and this thread reads it.
    Reads(Pid),
    Rows(Vec<Row>),
    Done(Box<dyn Backend>, Box<Tables>),
    Failed(String, bool),
}

/// Reads a whole generation back and checks it, as at a start.
pub(crate) fn load(
    dir: &Path,
    cache_bytes: u64,
    row: impl FnMut(&Row) -> Result<(), Fatal>,
) -> Result<Opened, EngineError> {
    read_back(dir, cache_bytes, row)
        .map_err(|trouble| EngineError { doing: "read back", cause: trouble.reason })
}

/// Reads a whole generation on a thread of its own, which may be left behind if it never ends.
fn read_back(
    dir: &Path,
    cache_bytes: u64,
    mut row: impl FnMut(&Row) -> Result<(), Fatal>,
) -> Result<Opened, Trouble> {
    let (out, messages) = sync_channel(CHUNKS_AHEAD);
    let path = dir.to_owned();
    let thread = std::thread::Builder::new().name("state-open".into());
    let thread = thread.spawn(move || {
        // Before the database is opened, which would make what is missing.
        let opened = check_files(&path).and_then(|()| open_patiently(&path, cache_bytes));
        let message = match opened {
            Ok(backend) => {
                let _ = out.send(Message::Reads(rustix::thread::gettid()));
                read_all(Box::new(backend), &out)
            }
            Err(error) => Message::Failed(error.to_string(), is_busy(&error)),
        };
        // Nobody waits any more if the silence was too long.
        let _ = out.send(message);
    });
    thread.map_err(|error| Trouble { is_final: true, ..Trouble::new(dir, error) })?;
    listen(dir, &messages, &mut row)
}

/// Opens a database whose last user may just be leaving: the threads of a closed one give its lock
/// back a little later.
pub(crate) fn open_patiently(path: &Path, cache_bytes: u64) -> Result<SledBackend, EngineError> {
    let until = Instant::now() + LOCK_WAIT_MAX;
    loop {
        match SledBackend::open(path, cache_bytes) {
            Err(error) if is_busy(&error) && Instant::now() < until => {
                std::thread::sleep(Duration::from_millis(10));
            }
            other => return other,
        }
    }
}

/// Another process, or an earlier handle of this one, still uses the files.
fn is_busy(error: &EngineError) -> bool {
    error.cause.contains("temporarily unavailable") || error.cause.contains("WouldBlock")
}

fn listen(
    dir: &Path,
    messages: &Receiver<Message>,
    row: &mut dyn FnMut(&Row) -> Result<(), Fatal>,
) -> Result<Opened, Trouble> {
    // A thread that goes on for ever may only be left behind by a process that ends.
    let endless = |reason| Err(Trouble { is_final: true, ..Trouble::new(dir, reason) });
    let (mut reads, mut computed, mut heard) = (None, None, Instant::now());
    loop {
        match messages.recv_timeout(LOOK_EVERY) {
            Err(RecvTimeoutError::Timeout) => {
                let used = reads.and_then(thread_time);
                let more = used
                    .zip(computed)
                    .is_some_and(|(used, before)| used.saturating_sub(before) > COMPUTES_MAX);
                if more {
                    return endless("reading it goes round in circles");
                }
                if heard.elapsed() > SILENCE_MAX {
                    return endless("reading it does not end");
                }
                computed = computed.or(used);
                continue;
            }
            Ok(Message::Reads(thread)) => reads = Some(thread),
            Ok(Message::Rows(rows)) => {
                let taken = rows.iter().try_for_each(&mut *row);
                taken.map_err(|fatal| Trouble::new(dir, fatal))?;
            }
            Ok(Message::Done(backend, tables)) => return Ok((dir.to_owned(), backend, *tables)),
            Ok(Message::Failed(reason, is_final)) => {
                return Err(Trouble { is_final, ..Trouble::new(dir, reason) });
            }
            Err(RecvTimeoutError::Disconnected) => {
                return Err(Trouble::new(dir, "reading it panicked"));
            }
        }
        (computed, heard) = (None, Instant::now());
    }
}

/// What a thread of this process has computed so far; nothing where the system does not tell.
fn thread_time(thread: Pid) -> Option<Duration> {
    let path = format!("/proc/self/task/{}/stat", thread.as_raw_nonzero());
    let text = fs::read_to_string(path).ok()?;
    // The name of the thread, in brackets, may hold blanks; the times are the 12th and 13th behind it.
    let (_, fields) = text.rsplit_once(") ")?;
    let mut times = fields.split(' ').skip(11).map_while(|field| field.parse::<u64>().ok());
    let ticks = times.next()?.saturating_add(times.next()?);
    let in_a_second = rustix::param::clock_ticks_per_second().max(1);
    Some(Duration::from_millis(ticks.saturating_mul(1_000) / in_a_second))
}

/// Reads and checks every pair.
fn read_all(mut backend: Box<dyn Backend>, out: &SyncSender<Message>) -> Message {
    let (mut tables, mut tally) = (Tables::default(), Tally::default());
    let (mut rows, mut bytes, mut pairs) = (Vec::with_capacity(CHUNK_ROWS), 0, 0);
    let mut bad = None;
    let scanned = backend.scan_all(&mut |key, value| {
        pairs += 1;
        let taken = if keys::is_row(&key) {
            tally.add(&key, &value);
            bytes += value.len();
            keys::decode_row(&key, value).map(|row| rows.push(row))
        } else {
            tables.take(&key, &value)
        };
        if let Err(malformed) = taken {
            bad = Some(format!("{malformed} at key {key:02x?}"));
            return false;
        }
        // A chunk may be empty: it also says that reading goes on.
        if pairs == CHUNK_ROWS || bytes >= CHUNK_BYTES {
            (pairs, bytes) = (0, 0);
            let chunk = std::mem::replace(&mut rows, Vec::with_capacity(CHUNK_ROWS));
            return out.send(Message::Rows(chunk)).is_ok();
        }
        true
    });
    let trouble = match (scanned, bad, tables.schema) {
        (Err(error), ..) => Some((error.to_string(), false)),
        (_, Some(reason), _) => Some((reason, false)),
        (.., None) => Some(("it holds no checkpoint".to_owned(), false)),
        (.., Some(schema)) if schema > SCHEMA_VERSION => {
            Some((format!("layout {schema} is newer than {SCHEMA_VERSION}"), true))
        }
        _ if tally != tables.tally => {
            let (found, noted) = (tally.rows, tables.tally.rows);
            Some((format!("its {found} rows are not the {noted} of the last checkpoint"), false))
        }
        _ => None,
    };
    match trouble {
        // Not closed: closing would flush, and a failed last flush ends the process.
        Some((reason, is_final)) => Message::Failed(reason, is_final),
        None if !rows.is_empty() && out.send(Message::Rows(rows)).is_err() => {
            Message::Failed("nobody listens".to_owned(), true)
        }
        None => Message::Done(backend, Box::new(tables)),
    }
}

/// Copies all pairs into a new generation and makes it the current one, if the files have grown well
/// beyond what they hold. Returns its directory and handle.
pub(crate) fn rewrite(place: &Place, old: &mut dyn Backend) -> Result<Rewritten, EngineError> {
    let Some((current, dir)) = next_generation(place)? else { return Ok(None) };
    let before = used_bytes(&current);
    if free_bytes(&place.state_dir) < before + REWRITE_ROOM {
        tracing::warn!(
            before,
            "the disk has no room for a second copy of the state; not rewritten"
        );
        return Ok(None);
    }
    failpoint::hit("defragBeforeCopy");
    let open = || open_patiently(&dir, place.cache_bytes).map(|open| Box::new(open) as Box<_>);
    let mut copy = Copy::begin(open, place.cache_bytes)?;
    copy.put_all(old)?;
    let fresh = copy.finish()?;
    failpoint::hit("defragBeforeRename");
    let after = used_bytes(&dir);
    if before.saturating_sub(after) < REWRITE_GAIN_MIN.max(before / 4) {
        fresh.close();
        fs::remove_dir_all(&dir).map_err(|error| failed(&error))?;
        return Ok(None);
    }
    sync_tree(&dir).map_err(|error| failed(&error))?;
    name_current(place, &dir).map_err(|error| failed(&error))?;
    Ok(Some((dir, fresh)))
}

fn failed(cause: &dyn std::fmt::Display) -> EngineError {
    EngineError { doing: "make a new state", cause: cause.to_string() }
}

/// The directories of the current generation and of one to be made, which does not exist. The caller
/// has the claim to make one.
pub(crate) fn next_generation(place: &Place) -> Result<Option<(PathBuf, PathBuf)>, EngineError> {
    let current = current_generation(place).map_err(|trouble| failed(&trouble.reason))?;
    let Some(current) = current else { return Ok(None) };
    let name = current.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let number = u64::from_str_radix(&name, 16).map_err(|error| failed(&error))?;
    let dir = place.state_dir.join(generation_name(number + 1));
    if dir.exists() {
        fs::remove_dir_all(&dir).map_err(|error| failed(&error))?;
    }
    Ok(Some((current, dir)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::{MetaChange, RevisionKey};

    const CACHE: u64 = 1 << 20;

    fn copy(from: &Path, to: &Path) {
        fs::remove_dir_all(to).ok();
        fs::create_dir(to).expect("makes a directory");
        for entry in fs::read_dir(from).expect("lists").flatten() {
            fs::copy(entry.path(), to.join(entry.file_name())).expect("copies");
        }
    }

    fn write(dir: &Path, round: i64) {
        let mut backend = Box::new(open_patiently(dir, CACHE).expect("opens"));
        // Whole leaves are rewritten, so they move to places of others.
        for part in 0..20 {
            let pair = |n: i64| {
                let kv = Bytes::from(format!("{}", n ^ round));
                let key = RevisionKey { main: n, sub: 0 };
                keys::encode_row(&Row { key, tombstone: false, kv })
            };
            backend.write((part * 500..part * 500 + 500).map(pair).collect()).expect("writes");
            backend.flush().expect("flushes");
        }
        backend.close();
    }

    /// The metadata are those of another moment than the pages: what is found where a page should lie is
    /// whole, and another page. The engine looks again and again.
    #[test]
    fn a_database_that_is_read_for_ever_is_refused() {
        let temp = tempfile::tempdir().expect("a directory");
        let (dir, old) = (temp.path().join("database"), temp.path().join("metadata"));
        write(&dir, 1);
        copy(&dir.join("metadata"), &old);
        for round in 2..4 {
            write(&dir, round);
        }
        copy(&old, &dir.join("metadata"));
        let error = load(&dir, CACHE, |_| Ok(())).map(drop).expect_err("refuses");
        assert_eq!(error.cause, "reading it goes round in circles");
    }

    /// Silence would count against it, however much there is to read.
    #[test]
    fn what_is_no_row_is_told_of_too() {
        let temp = tempfile::tempdir().expect("a directory");
        let mut backend = Box::new(open_patiently(temp.path(), CACHE).expect("opens"));
        let lease = |id| MetaChange::LeasePut(LeaseRow { id, ttl: 60, remaining_ttl: 0 });
        let leases = 5 * CHUNK_ROWS as i64;
        for id in 1..=leases {
            backend.write(keys::encode_meta(&lease(id)).puts).expect("writes");
        }
        let closing = keys::encode_checkpoint(LogId::default(), Chain::default(), Tally::default());
        backend.write(closing.to_vec()).expect("writes");
        let (out, messages) = sync_channel(64);
        let Message::Done(_, tables) = read_all(backend, &out) else { panic!("it is whole") };
        assert_eq!(tables.leases.len() as i64, leases);
        let told = messages.try_iter().count();
        assert!(told >= 5, "{told} messages");
    }

    #[test]
    fn the_time_that_a_thread_computes_is_known() {
        let time = thread_time(rustix::thread::gettid()).expect("the system tells");
        // Asking is computing.
        while thread_time(rustix::thread::gettid()).expect("it tells") == time {}
        assert_eq!(thread_time(Pid::INIT), None, "no thread of this process");
    }
}
