//! Small histories made by hand, right and wrong, in `jepsen/corpus`: one file each, which says on its
//! first line what the judges must find, neither more nor less.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::check::judge;
use crate::history::{Final, History, Note, Op, Sighting, WatchRecord};

/// One line of a file.
#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum Line {
    /// The rules that are broken, none for a right history.
    Expect {
        rules: BTreeSet<String>,
        #[serde(rename = "why")]
        _why: String,
    },
    Op(Op),
    Watch(WatchRecord),
    Note(Note),
    Final(Final),
    Leader(Sighting),
}

/// Judges all files; gives how many there are, and what was judged wrong.
pub(super) fn check() -> Result<(usize, Vec<String>), String> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus");
    let error = |error: std::io::Error| format!("{}: {error}", folder.display());
    let files = std::fs::read_dir(&folder).map_err(error)?;
    let mut files: Vec<PathBuf> = files.filter_map(|file| Some(file.ok()?.path())).collect();
    files.sort();
    let mut wrong = Vec::new();
    for file in &files {
        let name = file.display();
        let text = std::fs::read_to_string(file).map_err(|error| format!("{name}: {error}"))?;
        let (expected, history) = read(&text).map_err(|error| format!("{name}: {error}"))?;
        let violations = judge(&history);
        let found = violations.iter().map(|violation| format!("{:?}", violation.rule)).collect();
        if expected != found {
            wrong.push(format!("{name}: should break {expected:?}, found {violations:?}"));
        }
    }
    Ok((files.len(), wrong))
}

fn read(text: &str) -> Result<(BTreeSet<String>, History), String> {
    let mut history = History::default();
    let mut expected = None;
    for (number, line) in text.lines().enumerate() {
        let line = serde_json::from_str(line);
        match line.map_err(|error| format!("line {}: {error}", number + 1))? {
            Line::Expect { rules, .. } => expected = Some(rules),
            Line::Op(op) => history.ops.push(op),
            Line::Watch(record) => history.watches.push(record),
            Line::Note(note) => history.notes.push(note),
            Line::Final(last) => history.finals.push(last),
            Line::Leader(sighting) => history.leaders.push(sighting),
        }
    }
    Ok((expected.ok_or("no line says what to expect")?, history))
}

#[cfg(test)]
mod tests {
    #[test]
    fn every_history_of_the_corpus_is_judged_as_it_says() {
        let (files, wrong) = super::check().expect("the corpus can be read");
        assert!(files > 10, "{files} files prove little");
        assert_eq!(wrong, Vec::<String>::new());
    }
}
