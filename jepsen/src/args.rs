//! Command-line words: `--name value`, `--name=value` and switches. Every word must be used by the
//! command; a left-over is an error, so no option is ever ignored.

/// The words after the command.
pub(crate) struct Args {
    words: Vec<String>,
}

impl Args {
    pub(crate) fn new(words: impl Iterator<Item = String>) -> Self {
        // `--name=value` and `--name value` mean the same, except for flags handed on to members.
        let split = |word: String| match word.split_once('=') {
            Some((name, value)) if name.starts_with("--") => {
                vec![name.to_owned(), value.to_owned()]
            }
            _ => vec![word],
        };
        let mut flat = Vec::new();
        let mut raw = false;
        for word in words {
            let next_raw = word == "--flag";
            flat.extend(if raw { vec![word] } else { split(word) });
            raw = next_raw;
        }
        Self { words: flat }
    }

    fn take(&mut self, name: &str) -> Result<Option<String>, String> {
        let Some(at) = self.words.iter().position(|word| word.strip_prefix("--") == Some(name))
        else {
            return Ok(None);
        };
        if at + 1 == self.words.len() {
            return Err(format!("--{name} needs a value"));
        }
        self.words.remove(at);
        Ok(Some(self.words.remove(at)))
    }

    pub(crate) fn text(&mut self, name: &str, default: &str) -> Result<String, String> {
        Ok(self.take(name)?.unwrap_or_else(|| default.to_owned()))
    }

    pub(crate) fn number(&mut self, name: &str, default: u64) -> Result<u64, String> {
        match self.take(name)? {
            None => Ok(default),
            Some(text) => text.parse().map_err(|_| format!("--{name}: {text:?} is no number")),
        }
    }

    /// All values of an option that may be given many times.
    pub(crate) fn many(&mut self, name: &str) -> Vec<String> {
        std::iter::from_fn(|| self.take(name).ok().flatten()).collect()
    }

    pub(crate) fn switch(&mut self, name: &str) -> bool {
        let at = self.words.iter().position(|word| word.strip_prefix("--") == Some(name));
        at.map(|at| self.words.remove(at)).is_some()
    }

    /// The next word that is no option.
    pub(crate) fn word(&mut self) -> Option<String> {
        let at = self.words.iter().position(|word| !word.starts_with("--"))?;
        Some(self.words.remove(at))
    }

    /// The first word, if it is no option.
    pub(crate) fn leading(&mut self) -> Option<String> {
        let plain = self.words.first().is_some_and(|word| !word.starts_with("--"));
        plain.then(|| self.words.remove(0))
    }

    /// All words must have been used.
    pub(crate) fn done(self) -> Result<(), String> {
        match self.words.first() {
            None => Ok(()),
            Some(word) => Err(format!("unknown word {word:?}")),
        }
    }

    /// All words, to hand on to another command.
    pub(crate) fn rest(self) -> Vec<String> {
        self.words
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(words: &[&str]) -> Args {
        Args::new(words.iter().map(|word| (*word).to_owned()))
    }

    #[test]
    fn both_spellings_of_a_value_mean_the_same() {
        for words in [&["--rounds", "7"][..], &["--rounds=7"]] {
            let mut args = args(words);
            assert_eq!(args.number("rounds", 50), Ok(7));
            assert_eq!(args.done(), Ok(()));
        }
    }

    #[test]
    fn flags_for_members_are_handed_on_whole() {
        let mut args = args(&["--flag=--snapshot-count=5", "--flag", "--log-level=debug"]);
        assert_eq!(args.many("flag"), ["--snapshot-count=5", "--log-level=debug"]);
        assert_eq!(args.done(), Ok(()));
    }

    #[test]
    fn what_no_command_uses_is_an_error() {
        let mut args = args(&["--round", "7"]);
        assert_eq!(args.number("rounds", 50), Ok(50));
        assert!(args.done().is_err());
    }
}
