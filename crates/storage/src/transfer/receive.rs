//! The receiving side: checks each chunk and writes it into a generation that nobody reads yet. It
//! never touches the live generation or the file that names it; what it made is removed when it is
//! dropped, or at the next start.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;

use super::TransferError;
use super::wire::{Chunk, Content, Head, Totals, next_pair};
use crate::disk;
use crate::engine::{Backend, EngineError};
use crate::failpoint;
use crate::keys::{self, Pair, SCHEMA_VERSION, Tables, Tally};
use crate::mvcc::row;
use crate::persist::copy::Copy;
use crate::persist::{Claim, Place, Signals, Start};
use crate::reader::Reader;
use crate::recover::{self, open_patiently};
use crate::sabotage::{self, Variant};
use crate::store::{Loaded, Loader};
use crate::types::LogId;

/// Pairs that are written and flushed together, and bytes: little, for a burst is what clients of
/// this machine feel.
const STEP_PAIRS: usize = 4096;
const STEP_BYTES: usize = 1 << 20;

/// Opens the database of a draft, again and again.
type Open = Box<dyn FnMut() -> Result<Box<dyn Backend>, EngineError> + Send>;

/// A generation in the making. Dropping it removes it.
struct Draft {
    place: Place,
    dir: PathBuf,
    copy: Copy<Open>,
    /// Pairs of the next step.
    waiting: Vec<Pair>,
    waiting_bytes: usize,
    /// The finished generation, opened as a state.
    finished: Option<Box<dyn Backend>>,
    is_kept: bool,
    _claim: Claim,
}

impl Draft {
    fn new(place: &Place) -> Result<Self, TransferError> {
        let claim = place.claim().ok_or(TransferError::Busy)?;
        if disk::is_low(&place.state_dir) {
            return Err(TransferError::NoSpace);
        }
        let next = recover::next_generation(place)?;
        let (_, dir) = next.ok_or_else(|| TransferError::Storage("there is no state".into()))?;
        let (path, cache_bytes) = (dir.clone(), place.cache_bytes);
        let open: Open = Box::new(move || Ok(Box::new(open_patiently(&path, cache_bytes)?)));
        Ok(Self {
            copy: Copy::begin(open, cache_bytes)?,
            place: place.clone(),
            dir,
            waiting: Vec::new(),
            waiting_bytes: 0,
            finished: None,
            is_kept: false,
            _claim: claim,
        })
    }

    fn put(&mut self, pair: Pair) -> Result<(), TransferError> {
        self.waiting_bytes += pair.0.len() + pair.1.len();
        self.waiting.push(pair);
        if self.waiting.len() >= STEP_PAIRS || self.waiting_bytes >= STEP_BYTES {
            self.flush()?;
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<(), TransferError> {
        // The engine does not survive a full disk.
        if disk::is_low(&self.dir) {
            return Err(TransferError::NoSpace);
        }
        if sabotage::is(Variant::InstallInPieces) {
            let named = recover::name_current(&self.place, &self.dir);
            named.map_err(|error| TransferError::Storage(error.to_string()))?;
        }
        self.waiting_bytes = 0;
        Ok(self.copy.put(std::mem::take(&mut self.waiting))?)
    }

    /// Everything on disk, names included.
    fn sync(&mut self) -> Result<(), TransferError> {
        self.flush()?;
        self.copy.close();
        recover::sync_tree(&self.dir).map_err(|error| {
            TransferError::Storage(format!("sync {}: {error}", self.dir.display()))
        })
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if self.is_kept {
            return;
        }
        self.copy.close();
        if let Some(backend) = self.finished.take() {
            backend.close();
        }
        if let Err(error) = fs::remove_dir_all(&self.dir) {
            // The next start tries again.
            tracing::warn!(path = %self.dir.display(), %error, "cannot remove a part of a state");
        }
    }
}

/// What may come next.
enum Stage {
    Head,
    /// Tables, until the first row.
    Tables(Begun),
    Rows(Begun),
    /// The trailer was there and fitted.
    Complete(Begun),
    Failed,
}

/// What is known since the head.
struct Begun {
    head: Head,
    transfer: u64,
    /// Key of the last pair.
    last: Bytes,
    totals: Totals,
    tally: Tally,
}

/// Takes in a state from another member. All methods block. It must be dropped before the store is
/// closed.
pub struct Receiver {
    draft: Draft,
    stage: Stage,
    number: u64,
}

impl Reader {
    /// Prepares to receive a state, in files beside the live ones. One at a time. Blocking.
    ///
    /// # Errors
    /// `Busy`, `NoSpace`, or `Storage` if the files cannot be made.
    pub fn receive(&self) -> Result<Receiver, TransferError> {
        let draft = Draft::new(&self.state.home.place)?;
        Ok(Receiver { draft, stage: Stage::Head, number: 0 })
    }
}

impl Receiver {
    /// Takes the next chunk. Blocking: it writes and sometimes flushes. After an error nothing more
    /// is taken.
    ///
    /// # Errors
    /// See `TransferError`.
    pub fn take(&mut self, chunk: Bytes) -> Result<(), TransferError> {
        let stage = std::mem::replace(&mut self.stage, Stage::Failed);
        self.stage = self.step(stage, chunk)?;
        self.number += 1;
        Ok(())
    }

    fn bad(&self, reason: impl ToString) -> TransferError {
        TransferError::BadChunk { number: self.number, reason: reason.to_string() }
    }

    fn step(&mut self, stage: Stage, chunk: Bytes) -> Result<Stage, TransferError> {
        if matches!(stage, Stage::Failed) {
            return Err(TransferError::Incomplete);
        }
        let chunk = Chunk::decode(chunk).map_err(|reason| self.bad(reason))?;
        if chunk.number != self.number {
            return Err(self.bad(format!("it is number {}", chunk.number)));
        }
        match (stage, chunk.content) {
            (Stage::Head, Content::Head(head)) => self.begin(head, chunk.transfer),
            (Stage::Tables(begun) | Stage::Rows(begun), _) if begun.transfer != chunk.transfer => {
                Err(self.bad("it belongs to another transfer"))
            }
            (Stage::Tables(begun), Content::Pairs(pairs)) => {
                let is_row = pairs.get(8).is_some_and(|table| keys::is_row(&[*table]));
                if is_row {
                    return self.rows(begun, pairs).map(Stage::Rows);
                }
                self.tables(begun, pairs).map(Stage::Tables)
            }
            (Stage::Rows(begun), Content::Pairs(pairs)) => self.rows(begun, pairs).map(Stage::Rows),
            (Stage::Tables(begun) | Stage::Rows(begun), Content::Trailer(trailer)) => {
                if begun.totals.trailer() != trailer {
                    return Err(self.bad("what was received is not what was sent"));
                }
                Ok(Stage::Complete(begun))
            }
            _ => Err(self.bad("it is out of order")),
        }
    }

    fn begin(&self, head: Head, transfer: u64) -> Result<Stage, TransferError> {
        if head.schema > SCHEMA_VERSION {
            let (found, known) = (head.schema, SCHEMA_VERSION);
            return Err(TransferError::NewerVersion { found, known });
        }
        if head.revision < 1 {
            return Err(self.bad("its revision is none"));
        }
        let (totals, tally) = (Totals::new(&head), Tally::default());
        Ok(Stage::Tables(Begun { head, transfer, last: Bytes::new(), totals, tally }))
    }

    fn tables(&mut self, mut begun: Begun, pairs: Bytes) -> Result<Begun, TransferError> {
        begun.totals.add(&pairs);
        self.each_pair(pairs, &mut begun, |begun, key, value| {
            begun.totals.tables += 1;
            if keys::is_row(key) || keys::is_own(key) {
                return Err("it has a pair that does not belong there".into());
            }
            Tables::default().take(key, value).map_err(|malformed| malformed.to_string())
        })?;
        Ok(begun)
    }

    fn rows(&mut self, mut begun: Begun, pairs: Bytes) -> Result<Begun, TransferError> {
        if begun.totals.rows == 0 {
            // Rows come before tables on disk.
            begun.last = Bytes::new();
        }
        begun.totals.add(&pairs);
        self.each_pair(pairs, &mut begun, |begun, key, value| {
            begun.totals.rows += 1;
            begun.tally.add(key, value);
            let row = keys::decode_row(key, value.clone());
            let row = row.map_err(|malformed| malformed.to_string())?;
            if row.key.main > begun.head.revision {
                return Err("it has a row of a later revision".into());
            }
            let is_sound = row::parse(&row.kv).is_some() && u32::try_from(row.key.sub).is_ok();
            if is_sound { Ok(()) } else { Err("it has a row that is no key-value record".into()) }
        })?;
        Ok(begun)
    }

    /// Checks and writes all pairs of a chunk.
    fn each_pair(
        &mut self,
        mut rest: Bytes,
        begun: &mut Begun,
        mut check: impl FnMut(&mut Begun, &Bytes, &Bytes) -> Result<(), String>,
    ) -> Result<(), TransferError> {
        while let Some((key, value)) = next_pair(&mut rest).map_err(|reason| self.bad(reason))? {
            if key <= begun.last {
                return Err(self.bad("its pairs are not in order"));
            }
            check(begun, &key, &value).map_err(|reason| self.bad(reason))?;
            self.draft.put((key.to_vec(), value.to_vec()))?;
            begun.last = key;
        }
        // Copied: it is a slice of the whole chunk.
        begun.last = Bytes::copy_from_slice(&begun.last);
        Ok(())
    }

    /// Makes what was received durable, reads it back from disk, checks it again and builds the
    /// index of it. Blocking, for seconds per million keys.
    ///
    /// # Errors
    /// `Incomplete` if the last chunk was not there yet, `BadChunk` if the chunks are sound but make
    /// no state, `Storage` if the files cannot be written or read back.
    pub fn finish(self) -> Result<Received, TransferError> {
        self.finish_paced(|_| ())
    }

    /// As [`Receiver::finish`]. `read` is told the bytes of each row that is read back, and may wait a
    /// little so that others of this machine get their turn.
    ///
    /// # Errors
    /// As [`Receiver::finish`].
    pub fn finish_paced(mut self, mut read: impl FnMut(usize)) -> Result<Received, TransferError> {
        failpoint::hit("raftBeforeSaveSnap");
        let stage = std::mem::replace(&mut self.stage, Stage::Failed);
        let Stage::Complete(begun) = stage else { return Err(TransferError::Incomplete) };
        let Head { applied, chain, revision, .. } = begun.head;
        self.draft.put(keys::encode_installed(applied))?;
        for pair in keys::encode_checkpoint(applied, chain, begun.tally) {
            self.draft.put(pair)?;
        }
        self.draft.sync()?;
        let mut loader = Loader::new();
        let cache_bytes = self.draft.place.cache_bytes;
        let (_, backend, tables) = recover::load(&self.draft.dir, cache_bytes, |row| {
            read(row.kv.len());
            loader.row(row)
        })?;
        self.draft.finished = Some(backend);
        let tally = tables.tally;
        let scheduled = tables.scheduled_compaction.max(tables.finished_compaction).unwrap_or(-1);
        let loaded = loader.finish(tables.into());
        if (loaded.applied(), loaded.chain(), tally) != (applied, chain, begun.tally) {
            return Err(EngineError { doing: "read back", cause: "it differs".to_owned() }.into());
        }
        if loaded.revision() != revision {
            let found = loaded.revision();
            return Err(self.bad(format!("revision {revision} is missing, the newest is {found}")));
        }
        failpoint::hit("raftAfterSaveSnap");
        Ok(Received { draft: self.draft, loaded, tally, scheduled })
    }
}

/// A state that is on disk as a whole and checked, to be installed. Dropping it removes it.
pub struct Received {
    draft: Draft,
    loaded: Loaded,
    tally: Tally,
    scheduled: i64,
}

impl Received {
    /// The last entry that the state contains.
    pub fn applied(&self) -> LogId {
        self.loaded.applied()
    }

    /// The store revision of the state.
    pub fn revision(&self) -> i64 {
        self.loaded.revision()
    }

    /// The raft membership that the state contains, and where it was agreed.
    pub fn membership(&self) -> Option<(LogId, Bytes)> {
        self.loaded.membership()
    }

    /// Takes it apart to be installed: what goes into memory, and how its persister starts. The files
    /// are no longer removed with it, since they may be the live ones from now on; what is left over
    /// keeps others from making a generation.
    pub(super) fn into_parts(
        self,
        signals: Arc<Signals>,
    ) -> Result<(Loaded, Box<dyn Backend>, Start, impl Sized), TransferError> {
        let Self { mut draft, loaded, tally, scheduled } = self;
        let backend = draft.finished.take().ok_or(TransferError::Incomplete)?;
        draft.is_kept = true;
        let start = Start {
            applied: loaded.applied(),
            revision: loaded.revision(),
            tally,
            chain: loaded.chain(),
            scheduled,
            signals,
            generation_dir: Some(draft.dir.clone()),
        };
        Ok((loaded, backend, start, draft))
    }

    /// The directory of the state to be installed, and where it lies.
    pub(super) fn place(&self) -> (&Place, &Path) {
        (&self.draft.place, &self.draft.dir)
    }
}
