//! Golden bytes: the format on disk, as docs/STORAGE_FORMAT.md promises it. If this test has to
//! change, the format version has to change too.

mod log_support;

use bytes::Bytes;
use kelson_storage::log::{Entry, SimDisk};
use log_support::*;

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// crc32c bit by bit, from its definition (reflected polynomial 0x82f63b78).
fn crc32c(parts: &[&[u8]]) -> u32 {
    let mut crc = !0u32;
    for byte in parts.concat() {
        crc ^= u32::from(byte);
        for _ in 0..8 {
            crc = (crc >> 1) ^ (0x82f6_3b78 & (crc & 1).wrapping_neg());
        }
    }
    !crc
}

#[test]
fn every_record_type_has_its_golden_bytes() {
    let disk = SimDisk::new();
    let opened = open(&disk).expect("a new log");
    let log = &opened.log;
    wait(|done| log.save_vote(Bytes::from_static(b"vote"), done)).expect("the vote");
    let payload = Bytes::from_static(b"hello log");
    append(log, vec![Entry { id: id(2, 1), kind: 3, payload: payload.clone() }]);
    append(log, vec![Entry { id: id(2, 2), kind: 0, payload: Bytes::new() }]);
    wait(|done| log.truncate_after(1, done)).expect("the truncation");
    wait(|done| log.purge(id(2, 1), done)).expect("the purge");
    log.hint_committed(id(3, 2));
    append(log, vec![Entry { id: id(3, 2), kind: 1, payload }]);
    log.shutdown();
    let bytes = disk.bytes(&segment(1)).expect("the first segment");
    let mut golden = GOLDEN.iter();
    let mut next = |from: usize, to: usize| {
        let (what, expected) = golden.next().expect("a golden line");
        assert_eq!(hex(&bytes[from..to]), expected.replace(' ', ""), "{what}");
        to
    };
    let mut at = next(0, 64);
    for record_bytes in [40, 48, 32, 32, 32, 48, 32, 32] {
        at = next(at, at + record_bytes);
    }
    assert!(bytes[at..].iter().all(|&byte| byte == 0));
}

#[test]
fn checksums_follow_the_document() {
    let disk = SimDisk::new();
    let log = new_log(&disk);
    append(&log, vec![entry(5, 1, 21)]);
    log.shutdown();
    let bytes = disk.bytes(&segment(1)).expect("the first segment");
    assert_eq!(bytes[60..64], crc32c(&[&bytes[..60]]).to_le_bytes());
    // The vote "first" takes 64..104; the entry follows with 32 + 24 bytes.
    let record = &bytes[104..160];
    let seed: &[&[u8]] = &[&1u64.to_le_bytes(), &[7; 16], &record[..4]];
    let crc = crc32c(&[seed, &[&record[8..]]].concat());
    assert_eq!(record[4..8], crc.to_le_bytes());
    let check = crc32c(&[seed, &[&record[8..10], &record[12..32]]].concat());
    let folded = (check >> 16) as u16 ^ check as u16;
    assert_eq!(record[10..12], folded.to_le_bytes());
}

const GOLDEN: [(&str, &str); 9] = [
    (
        "header",
        "4b454c53 4e4c4f47 01000000 40000000 01000000 00000000 01000000 00000000 07070707 \
         07070707 07070707 07070707 00400000 00000000 00000000 a251353d",
    ),
    (
        "vote",
        "04000000 4d482464 020087a6 40000000 00000000 00000000 00000000 00000000 766f7465 \
         00000000",
    ),
    (
        "entry",
        "09000000 d2ac65a8 0103e328 68000000 02000000 00000000 01000000 00000000 68656c6c \
         6f206c6f 67000000 00000000",
    ),
    (
        "entry without payload",
        "00000000 89b93627 01005086 98000000 02000000 00000000 02000000 00000000",
    ),
    ("truncate after", "00000000 69b025cc 03005606 b8000000 00000000 00000000 01000000 00000000"),
    ("purge", "00000000 a8f24b06 040078c9 d8000000 02000000 00000000 01000000 00000000"),
    (
        "entry after the purge",
        "09000000 121817da 01015ab3 f8000000 03000000 00000000 02000000 00000000 68656c6c \
         6f206c6f 67000000 00000000",
    ),
    ("committed hint", "00000000 3f5d83ee 050097ed f8000000 03000000 00000000 02000000 00000000"),
    ("close", "00000000 708bbe52 0600ad38 48010000 00000000 00000000 00000000 00000000"),
];
