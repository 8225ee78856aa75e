//! Command-line words: `--name value` or `--name=value`. Every word must be used; a left-over is an
//! error, so no option is ever ignored.

/// The words after the command.
pub struct Args {
    words: Vec<String>,
}

impl Args {
    /// Takes them apart.
    pub fn new(words: impl Iterator<Item = String>) -> Self {
        let split = |word: String| match word.split_once('=') {
            Some((name, value)) if name.starts_with("--") => {
                vec![name.to_owned(), value.to_owned()]
            }
            _ => vec![word],
        };
        Self { words: words.flat_map(split).collect() }
    }

    /// The value of an option, if it is given.
    pub fn take(&mut self, name: &str) -> Result<Option<String>, String> {
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

    /// Whether an option without a value is given.
    pub fn take_flag(&mut self, name: &str) -> bool {
        let at = self.words.iter().position(|word| word.strip_prefix("--") == Some(name));
        at.map(|at| self.words.remove(at)).is_some()
    }

    /// A number, if it is given.
    pub fn number(&mut self, name: &str) -> Result<Option<u64>, String> {
        let parse =
            |text: String| text.parse().map_err(|_| format!("--{name}: {text:?} is no number"));
        self.take(name)?.map(parse).transpose()
    }

    /// All words must have been used.
    pub fn done(self) -> Result<(), String> {
        match self.words.first() {
            None => Ok(()),
            Some(word) => Err(format!("unknown word {word:?}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_spellings_mean_the_same_and_left_overs_are_errors() {
        for words in [&["--seed", "7"][..], &["--seed=7"]] {
            let mut args = Args::new(words.iter().map(|word| (*word).to_owned()));
            assert_eq!(args.number("from"), Ok(None));
            assert_eq!(args.number("seed"), Ok(Some(7)));
            assert_eq!(args.done(), Ok(()));
        }
        let mut args = Args::new(["--seed", "x", "--sed", "1"].map(str::to_owned).into_iter());
        assert!(args.number("seed").is_err());
        assert!(args.done().is_err());
    }
}
