//! What a run did to its files: storage calls in the order in which the kernel carried them out, and
//! between them the marks by which the run says what it asked and what it was told. A trace can be
//! kept in a file, so that a cut that failed can be made again. Paths are relative to the data
//! directory. It holds data only and knows nothing of disks.

use std::fs::File;
use std::io::{self, BufRead, BufReader, BufWriter, Read, Write};
use std::path::Path;

/// First line of a trace file.
const MAGIC: &str = "kelson storage trace 1";
/// A longer line or block in a trace file is not one of ours. Unit: bytes.
const BLOCK_MAX: usize = 1 << 30;

/// One call that changed files, or made something durable.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Call {
    /// A directory was made.
    MakeDir(String),
    /// A file that was not there before; the number names it from then on, whatever its path.
    Create(String, u32),
    /// Bytes were written at an offset.
    Write(u32, u64, Vec<u8>),
    /// A file was cut or lengthened with zeros.
    SetLen(u32, u64),
    /// A hole was punched: offset and length.
    Punch(u32, u64, u64),
    /// `fsync` or `fdatasync` of a file.
    Sync(u32),
    /// `sync_file_range`: no promise that survives a power cut.
    SyncRange(u32),
    /// `fsync` of a directory.
    SyncDir(String),
    /// `sync`, `syncfs`: everything.
    SyncAll,
    /// A file or directory got another name in the same directory.
    Rename(String, String),
    /// A name of a file was removed.
    Unlink(String),
    /// An empty directory was removed.
    RemoveDir(String),
    /// What the run said: no call of the store.
    Mark(String),
}

impl Call {
    /// Name of the kind, for tables.
    pub fn kind(&self) -> &'static str {
        match self {
            Call::MakeDir(_) => "mkdir",
            Call::Create(..) => "create",
            Call::Write(..) => "write",
            Call::SetLen(..) => "set length",
            Call::Punch(..) => "punch hole",
            Call::Sync(_) => "sync of a file",
            Call::SyncRange(_) => "sync_file_range",
            Call::SyncDir(_) => "sync of a directory",
            Call::SyncAll => "sync of all",
            Call::Rename(..) => "rename",
            Call::Unlink(_) => "unlink",
            Call::RemoveDir(_) => "rmdir",
            Call::Mark(_) => "mark",
        }
    }

    /// The call in a few words, without its bytes.
    pub fn summary(&self) -> String {
        match self {
            Call::Write(file, offset, bytes) => {
                format!("write {} bytes to file {file} at {offset}", bytes.len())
            }
            Call::SetLen(file, len) => format!("set length of file {file} to {len}"),
            Call::Punch(file, offset, len) => {
                format!("punch {len} bytes of file {file} at {offset}")
            }
            Call::Create(path, file) => format!("create {path} as file {file}"),
            Call::Sync(file) | Call::SyncRange(file) => format!("{} {file}", self.kind()),
            Call::Rename(from, to) => format!("rename {from} to {to}"),
            Call::MakeDir(path) | Call::SyncDir(path) => format!("{} {path}", self.kind()),
            Call::Unlink(path) | Call::RemoveDir(path) => format!("{} {path}", self.kind()),
            Call::Mark(text) => format!("mark {text:?}"),
            Call::SyncAll => self.kind().to_owned(),
        }
    }
}

/// Writes a trace to a file.
pub fn save(path: &Path, calls: &[Call]) -> io::Result<()> {
    let mut out = BufWriter::new(File::create(path)?);
    writeln!(out, "{MAGIC}")?;
    for call in calls {
        save_call(&mut out, call)?;
    }
    out.flush()
}

fn save_call(out: &mut impl Write, call: &Call) -> io::Result<()> {
    match call {
        Call::MakeDir(path) => block(out, "mkdir", path.as_bytes()),
        Call::Create(path, file) => block(out, &format!("create {file}"), path.as_bytes()),
        Call::Write(file, offset, bytes) => block(out, &format!("write {file} {offset}"), bytes),
        Call::SetLen(file, len) => block(out, &format!("length {file} {len}"), &[]),
        Call::Punch(file, offset, len) => block(out, &format!("punch {file} {offset} {len}"), &[]),
        Call::Sync(file) => block(out, &format!("sync {file}"), &[]),
        Call::SyncRange(file) => block(out, &format!("range {file}"), &[]),
        Call::SyncDir(path) => block(out, "syncdir", path.as_bytes()),
        Call::SyncAll => block(out, "syncall", &[]),
        Call::Rename(from, to) => block(
            out,
            &format!("rename {}", from.len()),
            [from.as_bytes(), to.as_bytes()].concat().as_slice(),
        ),
        Call::Unlink(path) => block(out, "unlink", path.as_bytes()),
        Call::RemoveDir(path) => block(out, "rmdir", path.as_bytes()),
        Call::Mark(text) => block(out, "mark", text.as_bytes()),
    }
}

/// A line of words, the last one the number of bytes that follow it.
fn block(out: &mut impl Write, words: &str, bytes: &[u8]) -> io::Result<()> {
    writeln!(out, "{words} {}", bytes.len())?;
    out.write_all(bytes)
}

/// Reads a trace from a file.
pub fn load(path: &Path) -> Result<Vec<Call>, String> {
    let failed = |error: io::Error| format!("cannot read the trace {}: {error}", path.display());
    let mut input = BufReader::new(File::open(path).map_err(failed)?);
    let mut line = String::new();
    input.read_line(&mut line).map_err(failed)?;
    if line.trim_end() != MAGIC {
        return Err(format!("{} is no storage trace of this version", path.display()));
    }
    let mut calls = Vec::new();
    loop {
        line.clear();
        if input.read_line(&mut line).map_err(failed)? == 0 {
            return Ok(calls);
        }
        let malformed = || format!("{}: call {} is malformed", path.display(), calls.len());
        let words: Vec<&str> = line.trim_end().split(' ').collect();
        let len = words.last().and_then(|word| word.parse().ok()).filter(|len| *len <= BLOCK_MAX);
        let mut bytes = vec![0; len.ok_or_else(malformed)?];
        input.read_exact(&mut bytes).map_err(failed)?;
        let call = parse(&words[..words.len() - 1], bytes).ok_or_else(malformed)?;
        calls.push(call);
    }
}

fn parse(words: &[&str], bytes: Vec<u8>) -> Option<Call> {
    let number = |at: usize| words.get(at)?.parse::<u64>().ok();
    let file = || u32::try_from(number(1)?).ok();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).ok();
    Some(match *words.first()? {
        "mkdir" => Call::MakeDir(text(bytes)?),
        "create" => Call::Create(text(bytes)?, file()?),
        "write" => Call::Write(file()?, number(2)?, bytes),
        "length" => Call::SetLen(file()?, number(2)?),
        "punch" => Call::Punch(file()?, number(2)?, number(3)?),
        "sync" => Call::Sync(file()?),
        "range" => Call::SyncRange(file()?),
        "syncdir" => Call::SyncDir(text(bytes)?),
        "syncall" => Call::SyncAll,
        "rename" => {
            let both = text(bytes)?;
            let (from, to) = both.split_at_checked(usize::try_from(number(1)?).ok()?)?;
            Call::Rename(from.to_owned(), to.to_owned())
        }
        "unlink" => Call::Unlink(text(bytes)?),
        "rmdir" => Call::RemoveDir(text(bytes)?),
        "mark" => Call::Mark(text(bytes)?),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trace_comes_back_as_it_was() {
        let calls = vec![
            Call::MakeDir("member".into()),
            Call::Create("member/a b".into(), 7),
            Call::Write(7, 4096, b"bytes\nwith a line".to_vec()),
            Call::SetLen(7, 3),
            Call::Punch(7, 1, 2),
            Call::Sync(7),
            Call::SyncRange(7),
            Call::SyncDir("member".into()),
            Call::SyncDir(String::new()),
            Call::SyncAll,
            Call::Rename("member/a b".into(), "member/c".into()),
            Call::Unlink("member/c".into()),
            Call::RemoveDir("member".into()),
            Call::Mark("told 3".into()),
        ];
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("trace");
        save(&path, &calls).expect("writes");
        assert_eq!(load(&path).expect("reads"), calls);
        std::fs::write(&path, "something else\n").expect("writes");
        assert!(load(&path).is_err());
        std::fs::write(&path, format!("{MAGIC}\nwrite 1 0\n")).expect("writes");
        assert!(load(&path).expect_err("half a call").contains("call 0"));
    }
}
