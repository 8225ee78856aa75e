//! Which cuts are made at a place, and their names on command lines and in reports.

use crate::disk::Cut;
use crate::rng::Rng;

/// Which kinds of cut are made.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Only {
    /// Both.
    All,
    /// The process is killed.
    Kill,
    /// The power fails.
    Power,
}

/// The cuts of an enumeration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    /// Which kinds.
    pub only: Only,
    /// Random subsets of what was not synced, at each place.
    pub subsets: u64,
    /// One cut by name instead of all.
    pub one: Option<String>,
}

impl Choice {
    /// Name and cut of each that is made after so many calls.
    pub fn at(&self, seed: u64, place: usize) -> Vec<(String, Cut)> {
        let mut cuts = Vec::new();
        if self.only != Only::Power {
            cuts.push(("kill".to_owned(), Cut::Kill));
            cuts.push(("kill-within".to_owned(), Cut::KillWithin));
        }
        if self.only != Only::Kill {
            cuts.push(("power-none".to_owned(), Cut::PowerNone));
            cuts.push(("power-all".to_owned(), Cut::PowerAll));
            for subset in 0..self.subsets {
                let draw = Rng::fork(seed ^ subset.rotate_left(32), place as u64).draw();
                cuts.push((format!("power-some-{subset}"), Cut::PowerSome(draw)));
            }
        }
        cuts.retain(|(name, _)| self.one.as_ref().is_none_or(|one| one == name));
        cuts
    }

    /// The choice in words, for the arguments of a worker.
    pub fn to_words(&self) -> [String; 3] {
        let only = match self.only {
            Only::All => "all",
            Only::Kill => "kill",
            Only::Power => "power",
        };
        let one = self.one.clone().unwrap_or_else(|| "-".to_owned());
        [only.to_owned(), self.subsets.to_string(), one]
    }

    /// The choice that these words say.
    pub fn from_words(words: &[String]) -> Result<Self, String> {
        let [only, subsets, one] = words else { return Err("three words make a choice".into()) };
        let only = match only.as_str() {
            "all" => Only::All,
            "kill" => Only::Kill,
            "power" => Only::Power,
            other => return Err(format!("--only {other:?} is neither kill nor power")),
        };
        let subsets = subsets.parse().map_err(|_| format!("{subsets:?} is no number"))?;
        let one = (one != "-").then(|| one.clone());
        Ok(Self { only, subsets, one })
    }
}
