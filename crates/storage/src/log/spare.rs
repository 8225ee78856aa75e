//! The helper thread that keeps one segment ready ahead of the writer.
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
use super::segment::{SPARE_NAME, Segment, UNFINISHED_NAME};

/// Zeros written between two syncs: small enough that the writer's fdatasync does not queue long.
const FILL_STEP_BYTES: usize = 1 << 20;

/// Pause after a failed attempt to make or remove a file (most likely the disk is full).
const RETRY: Duration = Duration::from_millis(500);

#[derive(Default)]
struct State {
    ready: Option<Arc<dyn LogFile>>,
    /// Purged segments, oldest first. Bounded by the number of segments that existed.
    retired: VecDeque<Segment>,
    /// The writer has taken the spare and not renamed it yet: its name is not free.
    taken: bool,
    failed: bool,
    stop: bool,
}

impl State {
    fn spare_wanted(&self) -> bool {
        self.ready.is_none() && !self.taken
    }
}

fn has_work(state: &State) -> bool {
    !state.retired.is_empty() || state.spare_wanted()
}

/// The spare segment, shared by the writer, the helper thread and callers that ask for room.
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

    /// Takes the spare, waiting at most this long for it.
    pub(super) fn take(&self, wait: Duration) -> Option<Arc<dyn LogFile>> {
        let mut state = self.state.lock();
        if state.ready.is_none() && !wait.is_zero() {
            self.changed.wait_for(&mut state, wait);
        }
        let spare = state.ready.take();
        state.taken |= spare.is_some();
        spare
    }

    /// Tells the helper that the spare has got its new name and the next one is wanted.
    pub(super) fn renamed(&self) {
        self.state.lock().taken = false;
        self.changed.notify_all();
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
        state.ready.is_some() || !state.failed
    }

    pub(super) fn stop(&self) {
        self.state.lock().stop = true;
        self.changed.notify_all();
    }

    /// Body of the helper thread.
    pub(super) fn run(&self) {
        loop {
            let mut state = self.state.lock();
            while !state.stop && (state.failed || !has_work(&state)) {
                if !state.failed {
                    self.changed.wait(&mut state);
                } else if self.changed.wait_for(&mut state, RETRY).timed_out() {
                    break;
                }
            }
            if state.stop {
                return;
            }
            let retired = state.retired.pop_front();
            let spare_wanted = state.spare_wanted();
            drop(state);
            self.step(retired, spare_wanted);
        }
    }

    fn step(&self, retired: Option<Segment>, spare_wanted: bool) {
        let result = match &retired {
            Some(segment) if spare_wanted && segment.bytes == self.segment_bytes => {
                self.recycle(segment).map(Some)
            }
            Some(segment) => self.remove(segment).map(|()| None),
            None if spare_wanted => self.make().map(Some),
            None => Ok(None),
        };
        let mut state = self.state.lock();
        match result {
            Ok(made) => {
                if state.failed {
                    tracing::info!("the log can make segments again");
                }
                state.failed = false;
                if made.is_some() {
                    state.ready = made;
                }
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

    fn recycle(&self, segment: &Segment) -> io::Result<Arc<dyn LogFile>> {
        match self.disk.rename(&segment.path, &self.dir.join(SPARE_NAME)) {
            // A second attempt, after the sync of the directory failed.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            other => other?,
        }
        self.disk.sync_dir(&self.dir)?;
        Ok(Arc::clone(&segment.file))
    }

    fn remove(&self, segment: &Segment) -> io::Result<()> {
        match self.disk.remove(&segment.path) {
            // A second attempt, after the sync of the directory failed.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            other => other?,
        }
        self.disk.sync_dir(&self.dir)
    }

    fn make(&self) -> io::Result<Arc<dyn LogFile>> {
        let unfinished = self.dir.join(UNFINISHED_NAME);
        let made = fill(self.disk.as_ref(), &unfinished, self.segment_bytes).and_then(|file| {
            self.disk.rename(&unfinished, &self.dir.join(SPARE_NAME))?;
            self.disk.sync_dir(&self.dir)?;
            Ok(file)
        });
        if made.is_err() {
            // Gives the blocks back: a full disk must not be kept full by half a spare.
            let _ = self.disk.remove(&unfinished);
        }
        made
    }

    /// Takes over the spare that an earlier run left behind, if it has the right length.
    pub(super) fn adopt(&self) -> io::Result<()> {
        let path = self.dir.join(SPARE_NAME);
        let file = self.disk.open(&path)?;
        if file.size()? == self.segment_bytes {
            self.state.lock().ready = Some(file);
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
