//! A disk in memory that remembers every call, fails on demand and can lose power.
//!
//! It is the second implementation of [`Disk`], for tests and simulation; production never makes
//! one. Its model of the medium: what was synced survives, of all else any subset of whole pages
//! may survive, and an unsynced creation, renaming or removal happened entirely or not at all, in
//! order. Pages of one file are 4096 bytes, and a torn write can also stop inside a page.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;

use super::disk::{Disk, LogFile};

const PAGE: u64 = 4096;

/// One call that changed something, in the order of execution.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Call {
    /// A file was made or emptied; the number names it from then on.
    Create(PathBuf, usize),
    /// Bytes were written to a file.
    Write(usize, u64, Vec<u8>),
    /// A file was synced.
    SyncData(usize),
    /// A name was changed.
    Rename(PathBuf, PathBuf),
    /// A name was removed.
    Remove(PathBuf),
    /// The names in a directory were synced.
    SyncDir(PathBuf),
    /// Something that the test noted, such as an acknowledgement.
    Note(u64),
}

/// What survives of unsynced bytes.
#[derive(Clone, Copy, Debug)]
pub enum Crash {
    /// Nothing that was not synced.
    Lost,
    /// Everything, as after the end of the process alone.
    Kept,
    /// Each unsynced piece of a page by the toss of a coin, seeded.
    Torn(u64),
}

/// Faults that happen from now on.
#[derive(Clone, Copy, Debug, Default)]
pub struct Faults {
    /// Every fdatasync fails.
    pub sync_fails: bool,
    /// No file can be created and none can grow.
    pub full: bool,
    /// A write takes at most this many bytes.
    pub write_bytes_max: Option<usize>,
}

#[derive(Default)]
struct State {
    files: Vec<Vec<u8>>,
    names: BTreeMap<PathBuf, usize>,
    calls: Vec<Call>,
    faults: Faults,
    /// Files and names before the calls, all of it durable.
    base: Option<Box<Base>>,
}

/// Bytes of all files by number, and their names.
type Base = (Vec<Vec<u8>>, BTreeMap<PathBuf, usize>);

/// A disk in memory; clones are the same disk.
#[derive(Clone, Default)]
pub struct SimDisk(Arc<Mutex<State>>);

struct SimFile {
    disk: SimDisk,
    number: usize,
}

impl SimDisk {
    /// An empty disk without faults.
    pub fn new() -> SimDisk {
        SimDisk::default()
    }

    /// Sets the faults of all later calls.
    pub fn set_faults(&self, faults: Faults) {
        self.0.lock().faults = faults;
    }

    /// Adds a note to the calls, in order with them.
    pub fn note(&self, number: u64) {
        self.0.lock().calls.push(Call::Note(number));
    }

    /// All calls so far that changed something.
    pub fn calls(&self) -> Vec<Call> {
        self.0.lock().calls.clone()
    }

    /// Bytes of a file, if it exists.
    pub fn bytes(&self, path: &Path) -> Option<Vec<u8>> {
        let state = self.0.lock();
        state.names.get(path).map(|&number| state.files[number].clone())
    }

    /// Puts a file there, as if it had always been there.
    pub fn put(&self, path: impl Into<PathBuf>, bytes: Vec<u8>) {
        let mut state = self.0.lock();
        state.files.push(bytes);
        let number = state.files.len() - 1;
        state.names.insert(path.into(), number);
    }

    /// Paths of all files.
    pub fn paths(&self) -> Vec<PathBuf> {
        self.0.lock().names.keys().cloned().collect()
    }

    /// The files of one moment on a disk of their own, without faults and history.
    pub fn copy(&self) -> SimDisk {
        let state = self.0.lock();
        let (files, names) = (state.files.clone(), state.names.clone());
        SimDisk(Arc::new(Mutex::new(State { files, names, ..State::default() })))
    }

    /// The disk that a power cut after these calls leaves, starting from an empty one.
    pub fn after(calls: &[Call], crash: Crash) -> SimDisk {
        Image::default().after(calls, crash)
    }

    /// The disk that a power cut leaves after so many of its calls.
    pub fn cut(&self, calls: usize, crash: Crash) -> SimDisk {
        let state = self.0.lock();
        let (durable, names) = state.base.as_deref().cloned().unwrap_or_default();
        let pending = vec![Vec::new(); durable.len()];
        let image = Image { durable, pending, names, ..Image::default() };
        image.after(&state.calls[..calls.min(state.calls.len())], crash)
    }
}

/// Files and names as they are on the medium, beside what only the cache knows.
#[derive(Default)]
struct Image {
    durable: Vec<Vec<u8>>,
    pending: Vec<Vec<(u64, Vec<u8>)>>,
    names: BTreeMap<PathBuf, usize>,
    name_calls: Vec<Call>,
    coin: Coin,
}

impl Image {
    fn after(mut self, calls: &[Call], crash: Crash) -> SimDisk {
        self.coin = Coin::new(crash);
        for call in calls {
            self.apply(call);
        }
        self.power_cut(crash)
    }

    fn apply(&mut self, call: &Call) {
        match call {
            Call::Create(_, number) => {
                self.durable.resize(number + 1, Vec::new());
                self.pending.resize(number + 1, Vec::new());
                self.name_calls.push(call.clone());
            }
            Call::Write(number, offset, bytes) => {
                self.pending[*number].push((*offset, bytes.clone()));
            }
            Call::SyncData(number) => {
                for (offset, bytes) in std::mem::take(&mut self.pending[*number]) {
                    overwrite(&mut self.durable[*number], offset, &bytes);
                }
            }
            Call::Rename(..) | Call::Remove(_) => self.name_calls.push(call.clone()),
            Call::SyncDir(_) => {
                for call in std::mem::take(&mut self.name_calls) {
                    apply_name(&mut self.names, &call);
                }
            }
            Call::Note(_) => {}
        }
    }

    fn power_cut(mut self, crash: Crash) -> SimDisk {
        for (file, pending) in self.durable.iter_mut().zip(&self.pending) {
            for (offset, bytes) in pending {
                for (at, piece) in pieces(*offset, bytes) {
                    let kept = self.coin.piece(piece.len());
                    overwrite(file, at, &piece[..kept]);
                }
            }
        }
        let kept = match crash {
            Crash::Lost => 0,
            Crash::Kept => self.name_calls.len(),
            Crash::Torn(_) => self.coin.below(self.name_calls.len() as u64 + 1) as usize,
        };
        for call in &self.name_calls[..kept] {
            apply_name(&mut self.names, call);
        }
        let base = Some(Box::new((self.durable.clone(), self.names.clone())));
        let state = State { files: self.durable, names: self.names, base, ..State::default() };
        SimDisk(Arc::new(Mutex::new(state)))
    }
}

fn apply_name(names: &mut BTreeMap<PathBuf, usize>, call: &Call) {
    match call {
        Call::Create(path, number) => {
            names.insert(path.clone(), *number);
        }
        Call::Rename(from, to) => {
            if let Some(number) = names.remove(from) {
                names.insert(to.clone(), number);
            }
        }
        Call::Remove(path) => {
            names.remove(path);
        }
        Call::Write(..) | Call::SyncData(_) | Call::SyncDir(_) | Call::Note(_) => {}
    }
}

/// Cuts a write at page borders.
fn pieces(offset: u64, mut bytes: &[u8]) -> Vec<(u64, &[u8])> {
    let (mut at, mut pieces) = (offset, Vec::new());
    while !bytes.is_empty() {
        let step = ((PAGE - at % PAGE) as usize).min(bytes.len());
        pieces.push((at, &bytes[..step]));
        bytes = &bytes[step..];
        at += step as u64;
    }
    pieces
}

fn overwrite(file: &mut Vec<u8>, offset: u64, bytes: &[u8]) {
    if bytes.is_empty() {
        return;
    }
    let (start, end) = (offset as usize, offset as usize + bytes.len());
    if file.len() < end {
        file.resize(end, 0);
    }
    file[start..end].copy_from_slice(bytes);
}

/// A small random number generator (xorshift), so that a seed gives the same disk for ever.
#[derive(Default)]
enum Coin {
    #[default]
    Never,
    Always,
    Random(u64),
}

impl Coin {
    fn new(crash: Crash) -> Coin {
        match crash {
            Crash::Lost => Coin::Never,
            Crash::Kept => Coin::Always,
            Crash::Torn(seed) => Coin::Random(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1),
        }
    }

    /// How many bytes of a piece survive: none, all, or (one time in eight) a part.
    fn piece(&mut self, bytes: usize) -> usize {
        match self {
            Coin::Never => 0,
            Coin::Always => bytes,
            Coin::Random(_) => match self.below(8) {
                0..=3 => bytes,
                4 => self.below(bytes as u64) as usize,
                _ => 0,
            },
        }
    }

    fn below(&mut self, bound: u64) -> u64 {
        let Coin::Random(state) = self else { return 0 };
        *state ^= *state << 13;
        *state ^= *state >> 7;
        *state ^= *state << 17;
        (*state >> 11) % bound.max(1)
    }
}

impl Disk for SimDisk {
    fn create_dir(&self, _dir: &Path) -> io::Result<()> {
        Ok(())
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<String>> {
        let state = self.0.lock();
        let inside = state.names.keys().filter(|path| path.parent() == Some(dir));
        let names = inside.filter_map(|path| path.file_name());
        Ok(names.map(|name| name.to_string_lossy().into_owned()).collect())
    }

    fn create(&self, path: &Path) -> io::Result<Arc<dyn LogFile>> {
        let mut state = self.0.lock();
        if state.faults.full {
            return Err(io::ErrorKind::StorageFull.into());
        }
        let number = state.files.len();
        state.files.push(Vec::new());
        state.names.insert(path.to_owned(), number);
        state.calls.push(Call::Create(path.to_owned(), number));
        Ok(Arc::new(SimFile { disk: self.clone(), number }))
    }

    fn open(&self, path: &Path) -> io::Result<Arc<dyn LogFile>> {
        let number = self.0.lock().names.get(path).copied();
        let number = number.ok_or(io::ErrorKind::NotFound)?;
        Ok(Arc::new(SimFile { disk: self.clone(), number }))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut state = self.0.lock();
        let number = state.names.remove(from).ok_or(io::ErrorKind::NotFound)?;
        state.names.insert(to.to_owned(), number);
        state.calls.push(Call::Rename(from.to_owned(), to.to_owned()));
        Ok(())
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        let mut state = self.0.lock();
        state.names.remove(path).ok_or(io::ErrorKind::NotFound)?;
        state.calls.push(Call::Remove(path.to_owned()));
        Ok(())
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        self.0.lock().calls.push(Call::SyncDir(dir.to_owned()));
        Ok(())
    }
}

impl LogFile for SimFile {
    fn size(&self) -> io::Result<u64> {
        Ok(self.disk.0.lock().files[self.number].len() as u64)
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let state = self.disk.0.lock();
        let bytes = state.files[self.number].get(offset as usize..).unwrap_or(&[]);
        let read = bytes.len().min(buffer.len());
        buffer[..read].copy_from_slice(&bytes[..read]);
        Ok(read)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<usize> {
        let mut state = self.disk.0.lock();
        let taken = state.faults.write_bytes_max.unwrap_or(usize::MAX).min(bytes.len());
        let grows = offset as usize + taken > state.files[self.number].len();
        if state.faults.full && grows {
            return Err(io::ErrorKind::StorageFull.into());
        }
        overwrite(&mut state.files[self.number], offset, &bytes[..taken]);
        state.calls.push(Call::Write(self.number, offset, bytes[..taken].to_vec()));
        Ok(taken)
    }

    fn sync_data(&self) -> io::Result<()> {
        let mut state = self.disk.0.lock();
        if state.faults.sync_fails {
            return Err(io::Error::other("injected: fdatasync fails"));
        }
        state.calls.push(Call::SyncData(self.number));
        Ok(())
    }
}
