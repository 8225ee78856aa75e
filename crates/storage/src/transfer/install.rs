//! Puts a received state into force. The file that names the current generation is replaced first,
//! then memory: a crash before that leaves the old state, one after it the new one, both whole. It
//! never waits for the old state to be let go.

use super::Received;
use crate::failpoint;
use crate::persist::Persister;
use crate::recover::name_current;
use crate::store::Store;
use crate::types::Fatal;

impl Store {
    /// Replaces the whole state by a received one; durable when this returns. Readers, the feed and
    /// all signals stay valid and tell of the new state: its history, leases, alarms, members. What is
    /// in force later than here in the log must be emptied by the caller afterwards, never before.
    /// Blocking, but short: two syncs of small files.
    ///
    /// # Errors
    /// The state is older than what is applied, or the files or threads fail. It is not known then
    /// which state is in force; the caller ends the process, and the next start finds one of them
    /// whole.
    pub fn install(&mut self, received: Received) -> Result<(), Fatal> {
        let (applied, incoming) = (self.applied(), received.applied());
        if incoming.index < applied.index {
            let text = format!("a state of entry {} cannot replace", incoming.index);
            return Err(Fatal(format!("{text} that of entry {}", applied.index)));
        }
        failpoint::hit("raftBeforeApplySnap");
        let home = &self.state().home;
        let (place, dir) = received.place();
        if place.state_dir != home.place.state_dir {
            return Err(Fatal("the received state belongs to another store".to_owned()));
        }
        let (place, dir) = (place.clone(), dir.to_owned());
        let signals = self.state().persister().signals();
        let (loaded, backend, start, _claim) =
            received.into_parts(signals).map_err(|error| Fatal(error.to_string()))?;
        name_current(&place, &dir).map_err(|error| Fatal(error.to_string()))?;
        failpoint::hit("applyBeforeOpenSnapshot");
        let persister =
            Persister::start(backend, home.persist.clone(), home.durable.clone(), start)
                .map_err(|error| Fatal(format!("cannot start the state threads: {error}")))?;
        tracing::info!(index = incoming.index, from = applied.index, "installed a received state");
        self.replace(loaded, persister)?;
        failpoint::hit("raftAfterApplySnap");
        Ok(())
    }
}
