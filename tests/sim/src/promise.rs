//! What a run had asked and had been told at some place of its trace, and whether what a member found
//! after a cut there keeps to it. It looks at no file.

use crate::trace::Call;

/// What was asked, and what was promised.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Promise {
    /// Newest operation that was proposed, and newest that was acknowledged.
    pub proposed: u64,
    /// All operations up to here were acknowledged.
    pub told: u64,
    /// A received state that holds these operations together, from the first to the last.
    pub jump: Option<(u64, u64)>,
    /// Newest vote that was asked for, and that is on disk.
    pub vote: u64,
    /// The newest vote that is on disk.
    pub voted: u64,
    /// Entries that were written and not yet cut off.
    pub strangers: u64,
    /// Newest purge that was asked for.
    pub purge: u64,
    /// Newest purge that is on disk.
    pub purged: u64,
}

/// What a member found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// The last operation that it has.
    pub last: u64,
    /// Its newest vote.
    pub vote: u64,
    /// Its log begins behind this entry.
    pub purged: u64,
    /// Entries behind the last operation that were cut off, or were to be.
    pub strangers: u64,
}

impl Promise {
    /// Takes in the next call of a trace.
    ///
    /// # Errors
    /// A mark that no run makes.
    pub fn see(&mut self, call: &Call) -> Result<(), String> {
        let Call::Mark(text) = call else { return Ok(()) };
        let unknown = || format!("the trace has a mark {text:?}");
        let mut words = text.split(' ');
        let word = words.next().unwrap_or_default();
        let numbers: Result<Vec<u64>, _> = words.map(str::parse).collect();
        match (word, numbers.map_err(|_| unknown())?.as_slice()) {
            ("propose", [to]) => self.proposed = *to,
            ("told", [to]) => self.told = *to,
            ("install", [from, to]) => {
                (self.proposed, self.purge) = (*to, *to);
                self.jump = Some((*from, *to));
            }
            ("vote", [term]) => self.vote = *term,
            ("voted", [term]) => self.voted = *term,
            ("strangers", [count]) => self.strangers = *count,
            ("purge", [upto]) => self.purge = *upto,
            ("purged", [upto]) => self.purged = *upto,
            ("step", [_]) | ("opened", []) => {}
            _ => return Err(unknown()),
        }
        Ok(())
    }

    /// Says what a member that found this has lost or made up.
    pub fn judge(&self, found: &Found) -> Result<(), String> {
        let Found { last, vote, purged, strangers } = *found;
        if last < self.told {
            return Err(format!(
                "operation {} was acknowledged, the last found is {last}",
                self.told
            ));
        }
        if last > self.proposed {
            return Err(format!(
                "operation {last} is there, the last proposed is {}",
                self.proposed
            ));
        }
        if let Some((from, to)) = self.jump.filter(|(from, to)| (*from..*to).contains(&last)) {
            return Err(format!(
                "of the received state {from} to {to} a part is there, up to {last}"
            ));
        }
        if !(self.voted..=self.vote).contains(&vote) {
            let (voted, asked) = (self.voted, self.vote);
            return Err(format!("the vote is {vote}, {voted} was given and {asked} asked for"));
        }
        if !(self.purged..=self.purge).contains(&purged) {
            let (upto, asked) = (self.purged, self.purge);
            return Err(format!(
                "the log begins after {purged}; purged to {upto}, asked to {asked}"
            ));
        }
        if strangers > self.strangers {
            return Err(format!("{strangers} entries are back that were cut off"));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn promise(marks: &[&str]) -> Promise {
        let mut promise = Promise::default();
        let see = |mark: &&str| promise.see(&Call::Mark((*mark).to_owned())).expect("known");
        marks.iter().for_each(see);
        promise
    }

    #[test]
    fn whatever_was_promised_must_be_found_and_no_more() {
        let promise =
            promise(&["vote 2", "voted 2", "propose 5", "told 3", "purge 2", "purged 2", "vote 3"]);
        let good = Found { last: 4, vote: 2, purged: 2, strangers: 0 };
        assert_eq!(promise.judge(&good), Ok(()));
        for bad in [
            Found { last: 2, ..good.clone() },
            Found { last: 6, ..good.clone() },
            Found { vote: 1, ..good.clone() },
            Found { vote: 4, ..good.clone() },
            Found { purged: 1, ..good.clone() },
            Found { purged: 3, ..good.clone() },
            Found { strangers: 1, ..good },
        ] {
            assert!(promise.judge(&bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_received_state_is_there_wholly_or_not_at_all() {
        let promise = promise(&["propose 5", "told 5", "install 6 9"]);
        let found = |last| Found { last, ..Found::default() };
        let verdicts: Vec<_> = (4..11).map(|last| promise.judge(&found(last)).is_ok()).collect();
        assert_eq!(verdicts, [false, true, false, false, false, true, false]);
    }

    #[test]
    fn a_mark_that_no_run_makes_is_refused() {
        for mark in ["", "told", "told x", "purged 1 2", "hello 1"] {
            assert!(Promise::default().see(&Call::Mark(mark.into())).is_err(), "{mark:?}");
        }
    }
}
