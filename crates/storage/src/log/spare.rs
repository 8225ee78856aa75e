//! The helper thread that keeps a segment ready ahead of the writer.
//!
//! It fills a new file with zeros, or takes a purged segment over by renaming it, so that the writer
//! overwrites blocks that exist: then fdatasync does not wait for the file system's journal. It also
//! removes purged segments, always the oldest first, so that a crash never leaves a gap. It never
//! touches a segment that is in use.

use std::collections::VecDeque;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

use super::disk::{Disk, LogFile, write_all};
use super::segment::{SPARES_MAX, Segment, UNFINISHED_NAME, spare_name};

/// Zeros written between two syncs: small enough that the writer's fdatasync does not queue long.
const FILL_STEP_BYTES: usize = 1 << 20;

/// Pause after a failed attempt to make or remove a file (most likely the disk is full).
const RETRY: Duration = Duration::from_millis(500);

/// A file that is ready to become the next segment.
pub(super) struct Spare {
    /// Its name until then.
    pub(super) path: PathBuf,
    pub(super) file: Arc<dyn LogFile>,
}

#[derive(Default)]
struct State {
    /// At most [`SPARES_MAX`]. One is made if there is none; more come only from recycling, so that
    /// a log that is purged as fast as it grows never fills a new file.
    ready: VecDeque<Spare>,
    /// Purged segments, oldest first. Bounded by the number of segments that existed.
    retired: VecDeque<Segment>,
    /// Name of a spare that the writer has taken and not renamed yet.
    taken: Option<PathBuf>,
    failed: bool,
    stop: bool,
    /// The helper thread waits for something to do.
    is_idle: bool,
}

impl State {
    fn has_work(&self) -> bool {
        !self.retired.is_empty() || self.ready.is_empty()
    }

    /// A name for one more spare, if there may be one.
    fn free_name(&self, dir: &Path) -> Option<PathBuf> {
        if self.ready.len() >= SPARES_MAX {
            return None;
        }
        // One more than the limit, for the name that the writer is about to give up.
        let mut names = (0..=SPARES_MAX).map(|slot| dir.join(spare_name(slot)));
        names.find(|name| {
            self.taken.as_ref() != Some(name) && !self.ready.iter().any(|it| it.path == *name)
        })
    }
}

/// The spare segments, shared by the writer, the helper thread and callers that ask for room.
pub(super) struct Spares {
    state: Mutex<State>,
    changed: Condvar,
    disk: Arc<dyn Disk>,
    dir: PathBuf,
    segment_bytes: u64,
}

impl Spares {
    pub(super) fn new(disk: Arc<dyn Disk>, dir: PathBuf, segment_bytes: u64) -> Spares {
        let (state, changed) = (Mutex::default(), Condvar::new());
        Spares { state, changed, disk, dir, segment_bytes }
    }

    /// Takes a spare, waiting at most this long for one.
    pub(super) fn take(&self, wait: Duration) -> Option<Spare> {
        let mut state = self.state.lock();
        if state.ready.is_empty() && !wait.is_zero() {
            self.changed.wait_for(&mut state, wait);
        }
        let spare = state.ready.pop_front()?;
        state.taken = Some(spare.path.clone());
        drop(state);
        self.changed.notify_all();
        Some(spare)
    }

    /// Tells that the spare has got its new name.
    pub(super) fn renamed(&self) {
        self.state.lock().taken = None;
    }

    /// Hands over purged segments, oldest first.
    pub(super) fn retire(&self, segments: Vec<Segment>) {
        if !segments.is_empty() {
            self.state.lock().retired.extend(segments);
            self.changed.notify_all();
        }
    }

    /// False when no further segment could be made at the last attempt.
    pub(super) fn can_grow(&self) -> bool {
        let state = self.state.lock();
        !state.ready.is_empty() || !state.failed
    }

    /// Waits until the helper thread has nothing to do, or cannot do it.
    pub(super) fn settle(&self) {
        let mut state = self.state.lock();
        while !state.stop && !(state.is_idle && (state.failed || !state.has_work())) {
            self.changed.wait(&mut state);
        }
    }

    pub(super) fn stop(&self) {
        self.state.lock().stop = true;
        self.changed.notify_all();
    }

    /// Body of the helper thread.
    pub(super) fn run(&self) {
        loop {
            let mut state = self.state.lock();
            while !state.stop && (state.failed || !state.has_work()) {
                state.is_idle = true;
                self.changed.notify_all();
                if !state.failed {
                    self.changed.wait(&mut state);
                } else if self.changed.wait_for(&mut state, RETRY).timed_out() {
                    break;
                }
            }
            state.is_idle = false;
            if state.stop {
                return;
            }
            let retired = state.retired.pop_front();
            let name = state.free_name(&self.dir);
            let none_ready = state.ready.is_empty();
            drop(state);
            self.step(retired, name, none_ready);
        }
    }

    fn step(&self, retired: Option<Segment>, name: Option<PathBuf>, none_ready: bool) {
        let result = match (&retired, name) {
            (Some(segment), Some(name)) if segment.bytes == self.segment_bytes => {
                self.recycle(segment, name).map(Some)
            }
            (Some(segment), _) => self.remove(segment).map(|()| None),
            (None, Some(name)) if none_ready => self.make(name).map(Some),
            (None, _) => Ok(None),
        };
        let mut state = self.state.lock();
        match result {
            Ok(made) => {
                if state.failed {
                    tracing::info!("the log can make segments again");
                }
                state.failed = false;
                state.ready.extend(made);
            }
            Err(error) => {
                if !state.failed {
                    tracing::warn!(%error, dir = %self.dir.display(), "prepare a log segment");
                }
                state.failed = true;
                // Kept in front: removing a newer segment first could leave a gap.
                if let Some(segment) = retired {
                    state.retired.push_front(segment);
                }
            }
        }
        self.changed.notify_all();
    }

    fn recycle(&self, segment: &Segment, name: PathBuf) -> io::Result<Spare> {
        match self.disk.rename(&segment.path, &name) {
            // A second attempt, after the sync of the directory failed.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            other => other?,
        }
        self.disk.sync_dir(&self.dir)?;
        Ok(Spare { path: name, file: Arc::clone(&segment.file) })
    }

    fn remove(&self, segment: &Segment) -> io::Result<()> {
        match self.disk.remove(&segment.path) {
            // A second attempt, after the sync of the directory failed.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            other => other?,
        }
        self.disk.sync_dir(&self.dir)
    }

    fn make(&self, name: PathBuf) -> io::Result<Spare> {
        let unfinished = self.dir.join(UNFINISHED_NAME);
        let made = fill(self.disk.as_ref(), &unfinished, self.segment_bytes).and_then(|file| {
            self.disk.rename(&unfinished, &name)?;
            self.disk.sync_dir(&self.dir)?;
            Ok(Spare { path: name, file })
        });
        if made.is_err() {
            // Gives the blocks back: a full disk must not be kept full by half a spare.
            let _ = self.disk.remove(&unfinished);
        }
        made
    }

    /// Takes over a spare that an earlier run left behind, if it has the right length.
    pub(super) fn adopt(&self, path: PathBuf) -> io::Result<()> {
        let file = self.disk.open(&path)?;
        if file.size()? == self.segment_bytes {
            self.state.lock().ready.push_back(Spare { path, file });
            return Ok(());
        }
        drop(file);
        self.disk.remove(&path)
    }
}

/// Makes a file of this length whose blocks are all written and durable.
pub(super) fn fill(disk: &dyn Disk, path: &Path, bytes: u64) -> io::Result<Arc<dyn LogFile>> {
    let file = disk.create(path)?;
    let zeros = vec![0; FILL_STEP_BYTES.min(bytes as usize)];
    let mut offset = 0;
    while offset < bytes {
        let step = (bytes - offset).min(zeros.len() as u64);
        write_all(file.as_ref(), &zeros[..step as usize], offset)?;
        file.sync_data()?;
        offset += step;
    }
    Ok(file)
}
