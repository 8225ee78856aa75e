//! Changes what a stopped member has in its log so that nothing shows it: the record's checksum is made
//! to fit. That is how a defect or a broken machine would make one member differ from the others.
//! The layout is that of docs/STORAGE_FORMAT.md.

use std::path::Path;

/// Bytes of a segment's and of a record's header.
const SEGMENT_HEADER: usize = 64;
const RECORD_HEADER: usize = 32;
const ENTRY: u8 = 1;

/// Replaces one text by another of the same length in the entry that contains it, and forgets the
/// state, so that the next start makes it anew from the changed log.
pub fn forge(data_dir: &Path, old: &str, new: &str) {
    assert_eq!(old.len(), new.len(), "the record keeps its length");
    let member = data_dir.join("member");
    let files = std::fs::read_dir(member.join("wal")).expect("a log").flatten();
    let mut forged = 0;
    for path in files.map(|file| file.path()).filter(|path| is_segment(path)) {
        let mut bytes = std::fs::read(&path).expect("a segment");
        let seed = seed(&bytes);
        while let Some(at) = find(&bytes, old.as_bytes()) {
            let start = record_around(&bytes, at, seed).expect("the text lies in an entry");
            bytes[at..at + new.len()].copy_from_slice(new.as_bytes());
            let sum = checksum(&bytes, start, seed).expect("its length has not changed");
            bytes[start + 4..start + 8].copy_from_slice(&sum.to_le_bytes());
            forged += 1;
        }
        std::fs::write(&path, bytes).expect("written");
    }
    assert!(forged > 0, "{old} is in no log file");
    std::fs::remove_dir_all(member.join("state")).expect("the state is removed");
}

fn is_segment(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "wal")
}

fn find(bytes: &[u8], text: &[u8]) -> Option<usize> {
    bytes.windows(text.len()).position(|window| window == text)
}

/// Start value of all checksums of a segment.
fn seed(bytes: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&bytes[16..24]), &bytes[32..48])
}

fn checksum(bytes: &[u8], start: usize, seed: u32) -> Option<u32> {
    let header = bytes.get(start..start + RECORD_HEADER)?;
    let len = u32::from_le_bytes(header[..4].try_into().expect("four bytes")) as usize;
    let body = bytes.get(start + RECORD_HEADER..)?.get(..len.next_multiple_of(8))?;
    let sum = crc32c::crc32c_append(seed, &header[..4]);
    Some(crc32c::crc32c_append(crc32c::crc32c_append(sum, &header[8..]), body))
}

/// The start of the valid entry that a place lies in.
fn record_around(bytes: &[u8], at: usize, seed: u32) -> Option<usize> {
    let starts = (SEGMENT_HEADER..=at).rev().filter(|start| start % 8 == 0);
    starts.into_iter().find(|start| {
        let stored = bytes.get(start + 4..start + 8).and_then(|sum| sum.try_into().ok());
        bytes.get(start + 8) == Some(&ENTRY)
            && checksum(bytes, *start, seed) == stored.map(u32::from_le_bytes)
    })
}
