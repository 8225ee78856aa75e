//! What a disk holds after a prefix of recorded calls: as the kernel shows it, which is what the end
//! of the process leaves, and as the medium has it, which is what a power cut leaves. The rules of the
//! medium are those of README.md, section "The disk", and no other code knows them. Nothing here does
//! I/O.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::rng::Rng;
use crate::trace::Call;

/// What a disk writes whole or not at all. Unit: bytes.
pub const SECTOR: u64 = 512;
/// What a killed process may have had written of a larger write. Unit: bytes.
const PAGE: u64 = 4096;

/// How a run ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut {
    /// The process is killed between two calls: all calls took effect.
    Kill,
    /// The process is killed within the call that comes next, a write of several pages, some of which
    /// are written.
    KillWithin,
    /// The power fails; nothing survives that was not synced.
    PowerNone,
    /// The power fails; everything survives, synced or not: the same files as after a kill.
    PowerAll,
    /// The power fails; the seed says what survives of all that was not synced.
    PowerSome(u64),
}

/// Names and contents of an image, to tell whether another one is the same.
pub type ImageKey = Vec<(String, u64)>;

/// A directory tree. Two images with equal keys are equal.
pub struct Image {
    /// Paths of directories, parents first.
    pub dirs: Vec<String>,
    /// Paths of files and their bytes.
    pub files: Vec<(String, Arc<Vec<u8>>)>,
    /// Names and contents; `None` if drawn by a seed.
    pub key: Option<ImageKey>,
}

/// The bytes of a file; the stamp is new after each change.
#[derive(Clone, Default)]
struct Content {
    bytes: Arc<Vec<u8>>,
    stamp: u64,
}

/// A change of a file that is not durable yet.
#[derive(Clone)]
enum Change {
    Write(u64, Arc<Vec<u8>>),
    SetLen(u64),
}

#[derive(Clone, Default)]
struct FileState {
    live: Content,
    durable: Content,
    pending: Vec<Change>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Entry {
    File(u32),
    Dir(usize),
}

#[derive(Clone)]
enum NameChange {
    Put(String, Entry),
    Remove(String),
    Rename(String, String),
}

type Names = BTreeMap<String, Entry>;

#[derive(Clone, Default)]
struct DirState {
    live: Names,
    durable: Names,
    pending: Vec<NameChange>,
}

/// The disk below one directory, which itself is durable and was empty.
pub struct Disk {
    files: BTreeMap<u32, FileState>,
    /// The first one is the root.
    dirs: Vec<DirState>,
    stamps: u64,
}

impl Default for Disk {
    fn default() -> Self {
        Self { files: BTreeMap::new(), dirs: vec![DirState::default()], stamps: 0 }
    }
}

impl Disk {
    /// Carries out a call.
    ///
    /// # Errors
    /// It is about a file or directory that is not there: the trace is not complete.
    pub fn apply(&mut self, call: &Call) -> Result<(), String> {
        match call {
            Call::MakeDir(path) => {
                self.dirs.push(DirState::default());
                self.put(path, Entry::Dir(self.dirs.len() - 1))
            }
            Call::Create(path, file) => {
                self.files.insert(*file, FileState::default());
                self.put(path, Entry::File(*file))
            }
            Call::Write(file, offset, bytes) => {
                self.change(*file, Change::Write(*offset, Arc::new(bytes.clone())))
            }
            Call::SetLen(file, len) => self.change(*file, Change::SetLen(*len)),
            Call::Punch(file, offset, len) => self.punch(*file, *offset, *len),
            Call::Sync(file) => {
                sync_file(self.file(*file)?);
                Ok(())
            }
            Call::SyncDir(path) => {
                let dir = self.dir(path)?;
                sync_dir(&mut self.dirs[dir]);
                Ok(())
            }
            Call::SyncAll => {
                self.files.values_mut().for_each(sync_file);
                self.dirs.iter_mut().for_each(sync_dir);
                Ok(())
            }
            Call::Rename(from, to) => self.rename(from, to),
            Call::Unlink(path) | Call::RemoveDir(path) => {
                self.name(path, |name, _| Ok(NameChange::Remove(name)))
            }
            Call::SyncRange(_) | Call::Mark(_) => Ok(()),
        }
    }

    fn file(&mut self, file: u32) -> Result<&mut FileState, String> {
        self.files.get_mut(&file).ok_or_else(|| format!("file {file} was never made"))
    }

    fn change(&mut self, file: u32, change: Change) -> Result<(), String> {
        self.stamps += 1;
        let stamp = self.stamps;
        let state = self.file(file)?;
        carry_out(Arc::make_mut(&mut state.live.bytes), &change);
        state.live.stamp = stamp;
        state.pending.push(change);
        Ok(())
    }

    /// A hole reads as zeros and never makes a file longer.
    fn punch(&mut self, file: u32, offset: u64, len: u64) -> Result<(), String> {
        let size = self.file(file)?.live.bytes.len() as u64;
        let len = size.saturating_sub(offset).min(len) as usize;
        self.change(file, Change::Write(offset, Arc::new(vec![0; len])))
    }

    fn dir(&self, path: &str) -> Result<usize, String> {
        let mut at = 0;
        for name in path.split('/').filter(|name| !name.is_empty()) {
            match self.dirs[at].live.get(name) {
                Some(Entry::Dir(dir)) => at = *dir,
                _ => return Err(format!("{path:?} is no directory")),
            }
        }
        Ok(at)
    }

    fn put(&mut self, path: &str, entry: Entry) -> Result<(), String> {
        self.name(path, |name, _| Ok(NameChange::Put(name, entry)))
    }

    fn rename(&mut self, from: &str, to: &str) -> Result<(), String> {
        let (_, to) = to.rsplit_once('/').unwrap_or(("", to));
        self.name(from, |name, names| {
            let is_there = names.contains_key(&name);
            is_there
                .then(|| NameChange::Rename(name, to.to_owned()))
                .ok_or("it is not there".into())
        })
    }

    fn name(
        &mut self,
        path: &str,
        change: impl FnOnce(String, &Names) -> Result<NameChange, String>,
    ) -> Result<(), String> {
        let (dir, name) = path.rsplit_once('/').unwrap_or(("", path));
        let dir = self.dir(dir)?;
        let dir = &mut self.dirs[dir];
        let change =
            change(name.to_owned(), &dir.live).map_err(|text| format!("{path}: {text}"))?;
        carry_out_name(&mut dir.live, &change);
        dir.pending.push(change);
        Ok(())
    }

    /// What is found after a cut here; `next` is the call that did not take place. `None` if the cut
    /// makes no sense at this place.
    pub fn image(&self, cut: Cut, next: Option<&Call>) -> Option<Image> {
        match cut {
            Cut::Kill | Cut::PowerAll => {
                Some(self.tree(&|_, dir| dir.live.clone(), &|_, file| file.live.clone(), true))
            }
            Cut::PowerNone => Some(self.tree(
                &|_, dir| dir.durable.clone(),
                &|_, file| file.durable.clone(),
                true,
            )),
            Cut::KillWithin => self.within(next?),
            Cut::PowerSome(seed) => self.some(seed),
        }
    }

    fn within(&self, next: &Call) -> Option<Image> {
        let Call::Write(written, offset, bytes) = next else { return None };
        // Up to a border of pages near the middle.
        let end = (offset + bytes.len() as u64 / 2).next_multiple_of(PAGE);
        let part = end.checked_sub(*offset).filter(|part| *part < bytes.len() as u64)?;
        let part = Change::Write(*offset, Arc::new(bytes[..part as usize].to_vec()));
        let content = |number: u32, file: &FileState| {
            let mut content = file.live.clone();
            if number == *written {
                carry_out(Arc::make_mut(&mut content.bytes), &part);
            }
            content
        };
        Some(self.tree(&|_, dir| dir.live.clone(), &content, false))
    }

    fn some(&self, seed: u64) -> Option<Image> {
        let is_clean = self.files.values().all(|file| file.pending.is_empty())
            && self.dirs.iter().all(|dir| dir.pending.is_empty());
        if is_clean {
            return None;
        }
        let names = |number: usize, dir: &DirState| {
            // Other streams than those of files.
            let mut rng = Rng::fork(seed, !(number as u64));
            let kept = rng.below(dir.pending.len() as u64 + 1) as usize;
            let mut names = dir.durable.clone();
            dir.pending[..kept].iter().for_each(|change| carry_out_name(&mut names, change));
            names
        };
        let content = |number: u32, file: &FileState| {
            let bytes = surviving(file, &mut Rng::fork(seed, u64::from(number)));
            Content { bytes: Arc::new(bytes), stamp: 0 }
        };
        Some(self.tree(&names, &content, false))
    }

    fn tree(
        &self,
        names: &dyn Fn(usize, &DirState) -> Names,
        content: &dyn Fn(u32, &FileState) -> Content,
        has_key: bool,
    ) -> Image {
        let mut image = Image { dirs: Vec::new(), files: Vec::new(), key: None };
        let mut key = Vec::new();
        let mut open = vec![(String::new(), 0)];
        while let Some((prefix, dir)) = open.pop() {
            for (name, entry) in names(dir, &self.dirs[dir]) {
                let path = if prefix.is_empty() { name } else { format!("{prefix}/{name}") };
                match entry {
                    Entry::Dir(dir) => {
                        key.push((path.clone(), u64::MAX));
                        image.dirs.push(path.clone());
                        open.push((path, dir));
                    }
                    Entry::File(number) => {
                        let Content { bytes, stamp } = content(number, &self.files[&number]);
                        key.push((path.clone(), stamp));
                        image.files.push((path, bytes));
                    }
                }
            }
        }
        key.sort();
        image.key = has_key.then_some(key);
        image
    }
}

fn sync_file(file: &mut FileState) {
    if file.pending.is_empty() {
        return;
    }
    let durable = Arc::make_mut(&mut file.durable.bytes);
    file.pending.drain(..).for_each(|change| carry_out(durable, &change));
    file.durable.stamp = file.live.stamp;
}

fn sync_dir(dir: &mut DirState) {
    dir.durable.clone_from(&dir.live);
    dir.pending.clear();
}

fn carry_out(bytes: &mut Vec<u8>, change: &Change) {
    match change {
        Change::Write(offset, written) if !written.is_empty() => {
            let (start, end) = (*offset as usize, *offset as usize + written.len());
            if bytes.len() < end {
                bytes.resize(end, 0);
            }
            bytes[start..end].copy_from_slice(written);
        }
        Change::Write(..) => {}
        Change::SetLen(len) => bytes.resize(*len as usize, 0),
    }
}

fn carry_out_name(names: &mut Names, change: &NameChange) {
    match change {
        NameChange::Put(name, entry) => drop(names.insert(name.clone(), *entry)),
        NameChange::Remove(name) => drop(names.remove(name)),
        NameChange::Rename(from, to) => {
            if let Some(entry) = names.remove(from) {
                names.insert(to.clone(), entry);
            }
        }
    }
}

/// What survives of one file: its length is one of those that it had since the last sync, and each
/// sector has one of the contents that it had since then, independently of all others.
fn surviving(file: &FileState, rng: &mut Rng) -> Vec<u8> {
    let mut bytes = file.durable.bytes.as_ref().clone();
    if file.pending.is_empty() {
        return bytes;
    }
    let lengths = file.pending.len() as u64 + 1;
    let (kept_lengths, mood) = match rng.below(4) {
        0 => (0, Mood::None),
        1 => (lengths - 1, Mood::All),
        _ => (rng.below(lengths), Mood::Mixed(rng.draw())),
    };
    let mut len = bytes.len() as u64;
    let mut lasting = len;
    let mut seen = BTreeMap::new();
    for (at, change) in file.pending.iter().enumerate() {
        match change {
            Change::Write(offset, written) => {
                len = len.max(offset + written.len() as u64);
                for (start, piece) in sectors(*offset, written) {
                    let before: &mut u64 = seen.entry(start / SECTOR).or_default();
                    if mood.keeps(start / SECTOR, *before, file.pending.len() as u64) {
                        carry_out(&mut bytes, &Change::Write(start, Arc::new(piece.to_vec())));
                    }
                    *before += 1;
                }
            }
            Change::SetLen(new) => {
                len = *new;
                if (at as u64) < kept_lengths {
                    bytes.resize(bytes.len().min(*new as usize), 0);
                }
            }
        }
        if at as u64 + 1 == kept_lengths {
            lasting = len;
        }
    }
    bytes.resize(lasting as usize, 0);
    bytes
}

/// How the sectors of a file fare.
enum Mood {
    None,
    All,
    Mixed(u64),
}

impl Mood {
    /// Whether the next write to a sector survives, `before` of which have touched it already. Of the
    /// writes to one sector the first ones survive: the later content holds the earlier.
    fn keeps(&self, sector: u64, before: u64, most: u64) -> bool {
        match self {
            Mood::None => false,
            Mood::All => true,
            Mood::Mixed(seed) => {
                let mut rng = Rng::fork(*seed, sector);
                match rng.below(5) {
                    0 | 1 => false,
                    2 | 3 => true,
                    _ => before < rng.below(most + 1),
                }
            }
        }
    }
}

/// Cuts a write at the borders of sectors.
fn sectors(offset: u64, mut bytes: &[u8]) -> Vec<(u64, &[u8])> {
    let (mut at, mut pieces) = (offset, Vec::new());
    while !bytes.is_empty() {
        let step = ((SECTOR - at % SECTOR) as usize).min(bytes.len());
        pieces.push((at, &bytes[..step]));
        bytes = &bytes[step..];
        at += step as u64;
    }
    pieces
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(calls: &[Call]) -> Disk {
        let mut disk = Disk::default();
        calls.iter().for_each(|call| disk.apply(call).expect("the calls fit together"));
        disk
    }

    fn bytes(disk: &Disk, cut: Cut, path: &str) -> Option<Vec<u8>> {
        let image = disk.image(cut, None)?;
        image.files.iter().find(|file| file.0 == path).map(|file| file.1.to_vec())
    }

    fn file(len: usize) -> Vec<Call> {
        vec![
            Call::Create("a".into(), 0),
            Call::SyncDir(String::new()),
            Call::Write(0, 0, vec![1; len]),
            Call::Sync(0),
        ]
    }

    #[test]
    fn a_name_needs_a_sync_of_its_directory_and_bytes_one_of_their_file() {
        let mut calls =
            vec![Call::Create("a".into(), 0), Call::Write(0, 0, vec![1]), Call::Sync(0)];
        assert_eq!(bytes(&after(&calls), Cut::PowerNone, "a"), None);
        assert_eq!(bytes(&after(&calls), Cut::Kill, "a"), Some(vec![1]));
        calls.push(Call::SyncDir(String::new()));
        calls.push(Call::Write(0, 1, vec![2]));
        assert_eq!(bytes(&after(&calls), Cut::PowerNone, "a"), Some(vec![1]));
        assert_eq!(bytes(&after(&calls), Cut::PowerAll, "a"), Some(vec![1, 2]));
        calls.push(Call::SyncRange(0));
        assert_eq!(bytes(&after(&calls), Cut::PowerNone, "a"), Some(vec![1]));
        calls.push(Call::SyncAll);
        assert_eq!(bytes(&after(&calls), Cut::PowerNone, "a"), Some(vec![1, 2]));
    }

    #[test]
    fn a_file_that_was_removed_comes_back_with_its_durable_bytes() {
        let mut calls = file(3);
        calls.extend([Call::Write(0, 0, vec![2; 3]), Call::Unlink("a".into())]);
        assert_eq!(bytes(&after(&calls), Cut::Kill, "a"), None);
        assert_eq!(bytes(&after(&calls), Cut::PowerNone, "a"), Some(vec![1; 3]));
    }

    #[test]
    fn a_renamed_file_has_one_of_its_names() {
        let mut calls = file(3);
        calls.push(Call::Rename("a".into(), "b".into()));
        let disk = after(&calls);
        let mut seen = std::collections::BTreeSet::new();
        for seed in 0..50 {
            let image = disk.image(Cut::PowerSome(seed), None).expect("something is open");
            let names: Vec<_> = image.files.iter().map(|file| file.0.clone()).collect();
            assert_eq!(names.len(), 1);
            seen.extend(names);
        }
        assert_eq!(seen.len(), 2, "both are drawn");
        assert!(disk.image(Cut::Kill, None).is_some_and(|image| image.files[0].0 == "b"));
    }

    #[test]
    fn unsynced_sectors_survive_each_by_itself_and_whole() {
        let mut calls = file(4 * SECTOR as usize);
        calls.push(Call::Write(0, 100, vec![2; 3 * SECTOR as usize]));
        let disk = after(&calls);
        let mut patterns = std::collections::BTreeSet::new();
        for seed in 0..200 {
            let found = bytes(&disk, Cut::PowerSome(seed), "a").expect("its name is durable");
            assert_eq!(found.len(), 4 * SECTOR as usize);
            assert!(found[..100].iter().all(|byte| *byte == 1), "outside of the write");
            let pattern: Vec<bool> = (0..4)
                .map(|n| {
                    let start = if n == 0 { 100 } else { n * SECTOR as usize };
                    let end = ((n + 1) * SECTOR as usize).min(100 + 3 * SECTOR as usize);
                    let sector = &found[start..end];
                    assert!(sector.iter().all(|byte| *byte == sector[0]), "torn in a sector");
                    sector[0] == 2
                })
                .collect();
            patterns.insert(pattern);
        }
        assert!(patterns.len() >= 12, "{} of 16 patterns", patterns.len());
    }

    #[test]
    fn a_cut_within_a_write_leaves_whole_pages_of_it() {
        let calls = file(1);
        let next = Call::Write(0, 0, vec![2; 5 * PAGE as usize]);
        let disk = after(&calls);
        let image = disk.image(Cut::KillWithin, Some(&next)).expect("it is long");
        assert_eq!(image.files[0].1.as_ref(), &vec![2; 3 * PAGE as usize]);
        let short = Call::Write(0, 0, vec![2; 100]);
        assert!(disk.image(Cut::KillWithin, Some(&short)).is_none());
    }

    #[test]
    fn a_file_cut_short_has_its_old_length_or_the_new_one() {
        let mut calls = file(3);
        calls.extend([Call::SetLen(0, 1), Call::Write(0, 1, vec![5])]);
        let disk = after(&calls);
        for seed in 0..100 {
            let found = bytes(&disk, Cut::PowerSome(seed), "a").expect("its name is durable");
            let possible: [&[u8]; 5] = [&[1, 1, 1], &[1, 5, 1], &[1], &[1, 0], &[1, 5]];
            assert!(possible.contains(&found.as_slice()), "{found:?}");
        }
    }

    #[test]
    fn calls_about_things_that_are_not_there_are_refused() {
        for call in [
            Call::Sync(3),
            Call::Write(3, 0, vec![1]),
            Call::SyncDir("x".into()),
            Call::Rename("x".into(), "y".into()),
            Call::Create("x/y".into(), 1),
        ] {
            assert!(Disk::default().apply(&call).is_err(), "{call:?}");
        }
    }
}
