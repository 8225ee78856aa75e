//! The packets of a run, for whoever wants to see what was on the wire around a violation: a pcap
//! file of raw IP packets, cut to their first bytes, delivered or not. It never holds up a packet:
//! what it cannot take is counted and left out.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// The file in a run directory; it stays when something was violated.
pub(crate) const CAPTURE: &str = "packets.pcap";

/// Bytes kept of a packet: headers and the first of what they carry.
const KEPT: usize = 160;
/// Packets that wait to be written: 3 MiB.
const QUEUE: usize = 16_384;
/// The file ends here. Unit: bytes.
const FILE_MAX: usize = 512 << 20;

/// Raw IPv4 packets, in the numbers of that format.
const LINK_RAW: u32 = 228;

struct Packet {
    at: SystemTime,
    length: u32,
    bytes: Vec<u8>,
}

/// Takes packets from the threads that carry them.
#[derive(Clone)]
pub(crate) struct Capture {
    queue: SyncSender<Packet>,
    missed: Arc<AtomicU64>,
}

impl Capture {
    pub(crate) fn create(path: &Path) -> io::Result<Self> {
        let mut file = BufWriter::new(File::create(path)?);
        file.write_all(&header())?;
        let (queue, packets) = sync_channel(QUEUE);
        std::thread::Builder::new().name("capture".into()).spawn(move || {
            // A full disk costs the capture, not the run.
            write(file, &packets).ok();
        })?;
        Ok(Self { queue, missed: Arc::default() })
    }

    pub(crate) fn take(&self, packet: &[u8]) {
        let bytes = packet[..packet.len().min(KEPT)].to_vec();
        let packet = Packet { at: SystemTime::now(), length: packet.len() as u32, bytes };
        if self.queue.try_send(packet).is_err() {
            self.missed.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Packets that were not written.
    pub(crate) fn missed(&self) -> u64 {
        self.missed.load(Ordering::Relaxed)
    }
}

/// Version 2.4 with microseconds, this machine's byte order.
fn header() -> Vec<u8> {
    let mut header = 0xa1b2_c3d4_u32.to_ne_bytes().to_vec();
    header.extend([2_u16, 4].iter().flat_map(|number| number.to_ne_bytes()));
    let rest = [0, 0, KEPT as u32, LINK_RAW];
    header.extend(rest.iter().flat_map(|number| number.to_ne_bytes()));
    header
}

fn record(packet: &Packet) -> Vec<u8> {
    let since = packet.at.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
    let words =
        [since.as_secs() as u32, since.subsec_micros(), packet.bytes.len() as u32, packet.length];
    let mut record: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
    record.extend(&packet.bytes);
    record
}

fn write(mut file: BufWriter<File>, packets: &Receiver<Packet>) -> io::Result<()> {
    let mut written = 0;
    loop {
        // Flushed in every lull, so that the file is whole when the run ends.
        let packet = match packets.recv_timeout(Duration::from_millis(200)) {
            Ok(packet) => packet,
            Err(std::sync::mpsc::RecvTimeoutError::Timeout) => {
                file.flush()?;
                continue;
            }
            Err(std::sync::mpsc::RecvTimeoutError::Disconnected) => return file.flush(),
        };
        let record = record(&packet);
        written += record.len();
        if written > FILE_MAX {
            return file.flush();
        }
        file.write_all(&record)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_has_both_lengths_and_no_more_bytes_than_are_kept() {
        let bytes = vec![7; KEPT];
        let packet =
            Packet { at: UNIX_EPOCH + Duration::from_micros(1_500_000), length: 900, bytes };
        let record = record(&packet);
        let word =
            |at: usize| u32::from_ne_bytes(record[at..at + 4].try_into().expect("four bytes"));
        assert_eq!((word(0), word(4), word(8), word(12)), (1, 500_000, KEPT as u32, 900));
        assert_eq!(record.len(), 16 + KEPT);
        assert_eq!(header().len(), 24);
    }
}
