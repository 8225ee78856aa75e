//! Named places at which a test may stop or slow the process, with the names and the language of
//! etcd's failpoints (gofail), so that etcd's own robustness suite can drive them. They exist only
//! with the cargo feature `failpoints`; without it these functions are empty. It stands here
//! because every crate that has such a place names this one; `kelson_server` serves the HTTP door.
//! docs/TESTING.md tells what each name means here.

/// A place is passed: the process ends, or this thread sleeps, if that was asked for.
#[cfg(not(feature = "failpoints"))]
#[inline(always)]
pub fn hit(_name: &'static str) {}

/// As [`hit`], for places that must not block a thread: the caller sleeps for what comes back.
#[cfg(not(feature = "failpoints"))]
#[inline(always)]
pub fn delay(_name: &'static str) -> Option<std::time::Duration> {
    None
}

/// As [`hit`], around the save of log records: until the thread goes on, [`save_sleeps`] is true.
#[cfg(not(feature = "failpoints"))]
#[inline(always)]
pub fn hit_in_save(_name: &'static str) {}

/// Whether a save of log records sleeps, see [`hit_in_save`]: readers wait as long.
#[cfg(not(feature = "failpoints"))]
#[inline(always)]
#[must_use]
pub fn save_sleeps() -> bool {
    false
}

#[cfg(feature = "failpoints")]
pub use armed::*;

#[cfg(feature = "failpoints")]
mod armed {
    use std::collections::BTreeMap;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;

    use parking_lot::Mutex;

    /// The names that are listed, in order.
    pub const NAMES: [&str; 22] = [
        "afterCommit",
        "afterStartDBTxn",
        "afterWritebackBuf",
        "beforeApplyOneConfChange",
        "beforeCommit",
        "beforeSendWatchResponse",
        "beforeStartDBTxn",
        "beforeWritebackBuf",
        "commitAfterPreCommitHook",
        "commitBeforePreCommitHook",
        "compactAfterCommitBatch",
        "compactAfterCommitScheduledCompact",
        "compactAfterSetFinishedCompact",
        "compactBeforeCommitBatch",
        "compactBeforeCommitScheduledCompact",
        "compactBeforeSetFinishedCompact",
        "defragBeforeCopy",
        "defragBeforeRename",
        "raftAfterSave",
        "raftBeforeFollowerSend",
        "raftBeforeLeaderSend",
        "raftBeforeSave",
    ];

    /// Places around an installed state. They can be armed and are not listed: etcd's suite takes a
    /// listed one for passed once a member has missed a second or two of writes, and such a member is
    /// still brought up from the log here.
    pub const UNLISTED: [&str; 6] = [
        "applyBeforeOpenSnapshot",
        "raftAfterApplySnap",
        "raftAfterSaveSnap",
        "raftAfterWALRelease",
        "raftBeforeApplySnap",
        "raftBeforeSaveSnap",
    ];

    #[derive(Clone, Debug)]
    struct Armed {
        /// As it was written.
        text: String,
        /// How often it may still act; `None` = always.
        left: Option<u32>,
        action: Action,
        /// How often it acted.
        count: u64,
    }

    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    enum Action {
        Panic,
        Sleep(Duration),
    }

    static ARMED: Mutex<BTreeMap<&'static str, Armed>> = Mutex::new(BTreeMap::new());
    /// Saves of log records that sleep now.
    static SLEEPING_SAVES: AtomicUsize = AtomicUsize::new(0);

    /// A place is passed: the process ends, or this thread sleeps, if that was asked for.
    pub fn hit(name: &'static str) {
        if let Some(time) = delay(name) {
            std::thread::sleep(time);
        }
    }

    /// As [`hit`], around the save of log records: until the thread goes on, [`save_sleeps`] is true.
    pub fn hit_in_save(name: &'static str) {
        if let Some(time) = delay(name) {
            SLEEPING_SAVES.fetch_add(1, Ordering::SeqCst);
            std::thread::sleep(time);
            SLEEPING_SAVES.fetch_sub(1, Ordering::SeqCst);
        }
    }

    /// Whether a save of log records sleeps, see [`hit_in_save`]. Readers wait as long: in etcd one
    /// loop saves and answers them, and its suite lets a client write again after a failure only once
    /// a read succeeded. Without the wait every client leaves a handful of writes unanswered in a
    /// sleep, and the suite's search finds no end.
    #[must_use]
    pub fn save_sleeps() -> bool {
        SLEEPING_SAVES.load(Ordering::SeqCst) > 0
    }

    /// As [`hit`], for places that must not block a thread: the caller sleeps for what comes back.
    pub fn delay(name: &'static str) -> Option<Duration> {
        debug_assert!(NAMES.contains(&name) || UNLISTED.contains(&name), "{name}");
        let mut all = ARMED.lock();
        let armed = all.get_mut(name)?;
        match &mut armed.left {
            Some(0) => return None,
            Some(left) => *left -= 1,
            None => {}
        }
        armed.count += 1;
        match armed.action {
            // As a crash: no destructor runs and nothing is flushed.
            Action::Panic => {
                eprintln!("kelson: failpoint {name}: panic");
                std::process::abort();
            }
            Action::Sleep(time) => Some(time),
        }
    }

    /// Arms a place: `panic`, `sleep(20)` (milliseconds), `sleep("1s")`, `off`, or `3*` before one of
    /// them for the first three times only.
    ///
    /// # Errors
    /// There is no such place, or the term is none of these.
    pub fn arm(name: &str, term: &str) -> Result<(), String> {
        let name = known(name)?;
        let text = term.trim();
        let (left, action) = match text.split_once('*') {
            None => (None, text),
            Some((count, action)) => {
                let count = count.parse().map_err(|_| refused(text))?;
                (Some(count), action)
            }
        };
        let armed = parse(action).ok_or_else(|| refused(text))?;
        let mut all = ARMED.lock();
        match armed {
            None => all.remove(name),
            Some(action) => {
                all.insert(name, Armed { text: text.to_owned(), left, action, count: 0 })
            }
        };
        Ok(())
    }

    /// Arms what `GOFAIL_FAILPOINTS` asks for: `name=term;name=term`.
    ///
    /// # Errors
    /// As [`arm`].
    pub fn arm_all(text: &str) -> Result<(), String> {
        for part in text.split(';').filter(|part| !part.trim().is_empty()) {
            let (name, term) = part.split_once('=').ok_or_else(|| refused(part))?;
            arm(name.trim(), term)?;
        }
        Ok(())
    }

    /// Lets a place be.
    ///
    /// # Errors
    /// There is no such place, or nothing was asked of it.
    pub fn disarm(name: &str) -> Result<(), String> {
        let name = known(name)?;
        let was = ARMED.lock().remove(name);
        was.map(drop).ok_or_else(|| "failpoint: failpoint is disabled".to_owned())
    }

    /// What is asked of a place, empty if nothing, and how often it acted since then.
    ///
    /// # Errors
    /// There is no such place.
    pub fn asked(name: &str) -> Result<(String, u64), String> {
        let name = known(name)?;
        let all = ARMED.lock();
        Ok(all.get(name).map_or_else(Default::default, |armed| (armed.text.clone(), armed.count)))
    }

    fn known(name: &str) -> Result<&'static str, String> {
        let found = NAMES.iter().chain(&UNLISTED).find(|known| **known == name);
        found.copied().ok_or_else(|| format!("failpoint: failpoint does not exist: {name:?}"))
    }

    fn refused(text: &str) -> String {
        format!("failpoint: {text:?} is none of panic, sleep(ms), sleep(\"1s\"), off, N*term")
    }

    /// `None`: no action; `Some(None)`: off.
    #[allow(clippy::option_option, reason = "both have a name here")]
    fn parse(action: &str) -> Option<Option<Action>> {
        if action == "off" {
            return Some(None);
        }
        if action == "panic" || action.starts_with("panic(") {
            return Some(Some(Action::Panic));
        }
        let time = action.strip_prefix("sleep(")?.strip_suffix(')')?;
        let quoted = time.strip_prefix('"').and_then(|rest| rest.strip_suffix('"'));
        let millis = match quoted {
            None => time.parse::<u64>().ok()?,
            Some(text) => match text.strip_suffix("ms") {
                Some(millis) => millis.parse().ok()?,
                None => text.strip_suffix('s')?.parse::<u64>().ok()?.checked_mul(1000)?,
            },
        };
        Some(Some(Action::Sleep(Duration::from_millis(millis))))
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn terms_are_understood_or_refused() {
            let sleep = |millis| Some(Some(Action::Sleep(Duration::from_millis(millis))));
            for (text, action) in [
                ("off", Some(None)),
                ("panic", Some(Some(Action::Panic))),
                ("panic(\"x\")", Some(Some(Action::Panic))),
                ("sleep(20)", sleep(20)),
                ("sleep(\"150ms\")", sleep(150)),
                ("sleep(\"1s\")", sleep(1000)),
                ("sleep(1s)", None),
                ("sleep(\"1\")", None),
                ("sleep(99999999999999999999)", None),
                ("sleep(\"18446744073709551615s\")", None),
                ("return(1)", None),
                ("", None),
            ] {
                assert_eq!(parse(text), action, "{text}");
            }
            for (name, term) in [("nowhere", "panic"), ("raftAfterSave", "x*panic")] {
                assert!(arm(name, term).is_err(), "{name} {term}");
            }
        }

        #[test]
        fn a_place_acts_as_often_as_was_asked() {
            arm_all(" beforeCommit = 2*sleep(0) ; ").expect("it is well formed");
            hit("beforeCommit");
            assert_eq!(delay("beforeCommit"), Some(Duration::ZERO));
            assert_eq!(delay("beforeCommit"), None);
            let asked_for = asked("beforeCommit").expect("it exists");
            assert_eq!(asked_for, ("2*sleep(0)".to_owned(), 2));
            disarm("beforeCommit").expect("it is armed");
            assert!(disarm("beforeCommit").is_err());
            assert_eq!(asked("beforeCommit").expect("it exists"), (String::new(), 0));
        }
    }
}
