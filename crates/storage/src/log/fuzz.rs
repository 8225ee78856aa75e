//! The body of the fuzz target `log_segment`: arbitrary bytes as a log.
//!
//! Shared by fuzz/ and by tests/fuzz_short.rs. It promises nothing but that no bytes make the log
//! panic, and that what is accepted once is accepted again with the same contents.

use std::path::Path;
use std::sync::Arc;

use super::record::{RecordType, encode};
use super::segment::{Header, SEGMENT_HEADER, segment_path};
use super::{Log, LogError, LogOptions, SimDisk};
use crate::types::LogId;

const SEGMENT_BYTES: u64 = 16 << 10;

/// Opens arbitrary bytes as a segment, in three ways: as they are, as the records behind a good
/// header, and as a script of well-formed records in any order (checksums hide most of the code
/// from random bytes).
pub fn fuzz_segment(data: &[u8]) {
    let header = Header {
        sequence: 1 + u64::from(data.first().is_some_and(|byte| byte % 2 == 1)),
        first_index: data.get(1).map_or(1, |&byte| u64::from(byte % 4)),
        identity: [7; 16],
        bytes: SEGMENT_BYTES,
    };
    open(&header, data.to_vec());
    let mut records = header.encode().to_vec();
    records.extend_from_slice(data);
    records.resize(SEGMENT_BYTES as usize, 0);
    open(&header, records);
    open(&header, scripted(&header, data));
}

fn open(header: &Header, bytes: Vec<u8>) {
    let dir = Path::new("/log");
    let disk = SimDisk::new();
    disk.put(segment_path(dir, header.sequence), bytes);
    let options = LogOptions {
        segment_bytes: SEGMENT_BYTES,
        tail_bytes: 1 << 10,
        fsync: true,
        ..LogOptions::new(dir, header.identity)
    };
    let contents = || -> Result<_, LogError> {
        let opened = Log::open_on(options.clone(), Arc::new(disk.clone()))?;
        let entries = opened.log.read(opened.log.first_index(), u64::MAX, usize::MAX)?;
        Ok((opened.vote.clone(), opened.purged, opened.last, entries))
    };
    if let Ok(first) = contents() {
        let again = contents().expect("what was accepted once is accepted again");
        assert_eq!(first, again, "reopening changes nothing");
    }
}

/// Five bytes make one record: type, term, index, payload length, batch.
fn scripted(header: &Header, data: &[u8]) -> Vec<u8> {
    let mut bytes = header.encode().to_vec();
    for chunk in data.chunks_exact(5).take(200) {
        let Some(record_type) = RecordType::from_byte(chunk[0] % 7) else { break };
        let id = LogId { term: u64::from(chunk[1] % 4), index: u64::from(chunk[2] % 8) };
        let payload = vec![chunk[3]; usize::from(chunk[3] % 32)];
        let batch = if chunk[4] % 2 == 0 { SEGMENT_HEADER } else { bytes.len() } as u32;
        encode(&mut bytes, header.seed(), batch, (record_type, chunk[4]), id, &payload);
    }
    bytes.resize(SEGMENT_BYTES as usize, 0);
    bytes
}
