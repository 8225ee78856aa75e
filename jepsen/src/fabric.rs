//! The network between members: every packet of every member passes through this process, which may
//! drop, delay, repeat or slow it, per direction of each pair. It never changes a packet and never
//! looks above IP; commands set its rules, members and clients feel them. Without root there is only
//! the loopback device, with an address for each member and nothing that can be hurt.

use std::collections::BinaryHeap;
use std::io::{self, Read, Write};
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use crate::capture::Capture;
use crate::rng::Rng;
use crate::sys;

/// The harness's own place in the network; members are numbered from 1.
pub(crate) const CONTROLLER: usize = 0;

/// Bytes that one direction may hold back (delay, rate) before packets are dropped, as a router would.
const LINK_BUFFER: usize = 16 << 20;

/// The largest packet a TUN device hands over.
const PACKET: usize = 65_536;

/// What happens to packets of one direction.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Rule {
    /// Nothing passes.
    pub(crate) cut: bool,
    /// Share of packets lost, 0 to 1.
    pub(crate) loss: f64,
    /// Share of packets delivered twice, 0 to 1.
    pub(crate) duplicate: f64,
    /// Held back this long.
    pub(crate) delay: Duration,
    /// Up to this much longer, drawn per packet, so packets overtake each other.
    pub(crate) jitter: Duration,
    /// Bytes per second, none for no bound.
    pub(crate) rate: Option<u64>,
}

/// One direction between two places.
struct Link {
    rule: Mutex<(Rule, Instant)>,
    held: AtomicUsize,
    passed: AtomicU64,
    dropped: AtomicU64,
}

/// A packet that waits for its time.
struct Held {
    due: Instant,
    sequence: u64,
    link: usize,
    to: usize,
    packet: Vec<u8>,
}

impl PartialEq for Held {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}
impl Eq for Held {}
impl PartialOrd for Held {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Held {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        // The heap gives the largest first; the earliest must be it.
        (other.due, other.sequence).cmp(&(self.due, self.sequence))
    }
}

struct Shared {
    places: usize,
    links: Vec<Link>,
    tuns: Vec<std::fs::File>,
    /// Bounded by `LINK_BUFFER` per direction.
    waiting: Mutex<(BinaryHeap<Held>, u64)>,
    wake: Condvar,
    capture: OnceLock<Capture>,
}

/// The network of one run. Dropping it does not stop its threads: they live as long as the process,
/// like the namespaces.
#[derive(Clone)]
pub(crate) struct Fabric {
    shared: Arc<Shared>,
    namespaces: Vec<Arc<OwnedFd>>,
}

/// The first three bytes of all addresses, once a network was made.
static NETWORK: OnceLock<[u8; 3]> = OnceLock::new();

/// The address of a place. In namespaces it is of a network reserved for documentation, so that no
/// machine lives there; all runs may use the same. On the loopback device each run has its own.
pub(crate) fn address(place: usize) -> Ipv4Addr {
    let [a, b, c] = *NETWORK.get_or_init(|| [198, 51, 100]);
    Ipv4Addr::new(a, b, c, place as u8 + 1)
}

impl Fabric {
    /// Makes the controller's place and `members` more and starts carrying packets.
    pub(crate) fn new(members: usize, seed: u64) -> io::Result<Self> {
        let places = members + 1;
        let mut namespaces = Vec::new();
        let mut tuns = Vec::new();
        for place in 0..places {
            let island = sys::island(address(place))?;
            namespaces.push(Arc::new(island.namespace));
            tuns.push(island.tun);
        }
        let links = (0..places * places)
            .map(|_| Link {
                rule: Mutex::new((Rule::default(), Instant::now())),
                held: AtomicUsize::new(0),
                passed: AtomicU64::new(0),
                dropped: AtomicU64::new(0),
            })
            .collect();
        let shared = Arc::new(Shared {
            places,
            links,
            tuns,
            waiting: Mutex::default(),
            wake: Condvar::new(),
            capture: OnceLock::new(),
        });
        for place in 0..places {
            let shared = shared.clone();
            let rng = Rng::fork(seed, 1000 + place as u64);
            std::thread::Builder::new()
                .name(format!("wire-{place}"))
                .spawn(move || carry(&shared, place, rng))?;
        }
        let timer = shared.clone();
        std::thread::Builder::new().name("wire-delay".into()).spawn(move || release(&timer))?;
        Ok(Self { shared, namespaces })
    }

    /// The loopback device, which carries packets by itself. Nothing can be done to it.
    pub(crate) fn loopback() -> Self {
        let [.., high, low] = std::process::id().to_be_bytes();
        // Not 127.0.0.x, where other programs listen.
        NETWORK.set([127, high | 0x40, low]).ok();
        let shared = Shared {
            places: 0,
            links: Vec::new(),
            tuns: Vec::new(),
            waiting: Mutex::default(),
            wake: Condvar::new(),
            capture: OnceLock::new(),
        };
        Self { shared: Arc::new(shared), namespaces: Vec::new() }
    }

    /// Moves the calling thread, and all that it starts, into a place.
    pub(crate) fn enter(&self, place: usize) -> io::Result<()> {
        sys::enter(&self.namespaces[place])
    }

    /// The ticket for starting a process in a place.
    pub(crate) fn namespace(&self, place: usize) -> Option<Arc<OwnedFd>> {
        self.namespaces.get(place).cloned()
    }

    /// From now on all packets are written down as well.
    pub(crate) fn capture(&self, capture: Capture) {
        self.shared.capture.set(capture).ok();
    }

    /// Packets that were not written down although they should have been.
    pub(crate) fn missed(&self) -> u64 {
        self.shared.capture.get().map_or(0, Capture::missed)
    }

    /// Sets the rule for packets from one place to another.
    pub(crate) fn set(&self, from: usize, to: usize, rule: Rule) {
        self.shared.links[from * self.shared.places + to].rule.lock().0 = rule;
    }

    /// Cuts both directions.
    pub(crate) fn cut(&self, one: usize, other: usize) {
        let rule = Rule { cut: true, ..Rule::default() };
        self.set(one, other, rule);
        self.set(other, one, rule);
    }

    /// Removes every rule.
    pub(crate) fn heal(&self) {
        for link in &self.shared.links {
            link.rule.lock().0 = Rule::default();
        }
    }

    /// Packets passed and dropped since the start, over all directions.
    pub(crate) fn counts(&self) -> (u64, u64) {
        let sum = |pick: fn(&Link) -> &AtomicU64| {
            self.shared.links.iter().map(|link| pick(link).load(Ordering::Relaxed)).sum()
        };
        (sum(|link| &link.passed), sum(|link| &link.dropped))
    }
}

/// Reads what a place sends, for ever.
fn carry(shared: &Shared, from: usize, mut rng: Rng) {
    let mut buffer = vec![0; PACKET];
    loop {
        // A device that is gone means that the process ends.
        let Ok(length) = (&shared.tuns[from]).read(&mut buffer) else { return };
        if let Some(to) = destination(&buffer[..length], shared.places) {
            pass(shared, from, to, &buffer[..length], &mut rng);
        }
    }
}

/// The place an IPv4 packet is for; anything else (IPv6 chatter) is none of ours.
fn destination(packet: &[u8], places: usize) -> Option<usize> {
    if packet.len() < 20 || packet[0] >> 4 != 4 || packet[16..19] != address(0).octets()[..3] {
        return None;
    }
    let place = usize::from(packet[19]).checked_sub(1)?;
    (place < places).then_some(place)
}

/// Applies the rule of a direction to one packet.
fn pass(shared: &Shared, from: usize, to: usize, packet: &[u8], rng: &mut Rng) {
    if let Some(capture) = shared.capture.get() {
        capture.take(packet);
    }
    let index = from * shared.places + to;
    let link = &shared.links[index];
    let now = Instant::now();
    let (rule, mut due) = {
        let mut guard = link.rule.lock();
        let rule = guard.0;
        let mut due = now;
        if let Some(rate) = rule.rate.filter(|_| !rule.cut) {
            // The line is busy until the packets before this one have left.
            due = guard.1.max(now)
                + Duration::from_secs_f64(packet.len() as f64 / rate.max(1) as f64);
            guard.1 = due;
        }
        (rule, due)
    };
    if rule.cut || rng.chance(rule.loss) {
        link.dropped.fetch_add(1, Ordering::Relaxed);
        return;
    }
    due += rule.delay;
    if !rule.jitter.is_zero() {
        due += Duration::from_nanos(rng.below(rule.jitter.as_nanos() as u64));
    }
    for _ in 0..1 + u32::from(rng.chance(rule.duplicate)) {
        link.passed.fetch_add(1, Ordering::Relaxed);
        if due <= now {
            deliver(shared, to, packet);
        } else if link.held.fetch_add(packet.len(), Ordering::Relaxed) > LINK_BUFFER {
            link.held.fetch_sub(packet.len(), Ordering::Relaxed);
            link.dropped.fetch_add(1, Ordering::Relaxed);
        } else {
            let mut waiting = shared.waiting.lock();
            waiting.1 += 1;
            let sequence = waiting.1;
            waiting.0.push(Held { due, sequence, link: index, to, packet: packet.to_vec() });
            shared.wake.notify_one();
        }
    }
}

fn deliver(shared: &Shared, to: usize, packet: &[u8]) {
    // A full receive queue drops the packet, as any network may.
    (&shared.tuns[to]).write_all(packet).ok();
}

/// Lets delayed packets go at their time, for ever.
fn release(shared: &Shared) {
    loop {
        let held = {
            let mut waiting = shared.waiting.lock();
            loop {
                match waiting.0.peek().map(|held| held.due) {
                    None => shared.wake.wait(&mut waiting),
                    Some(due) if due > Instant::now() => {
                        shared.wake.wait_until(&mut waiting, due);
                    }
                    Some(_) => break,
                }
            }
            waiting.0.pop().expect("peeked under the same lock")
        };
        shared.links[held.link].held.fetch_sub(held.packet.len(), Ordering::Relaxed);
        deliver(shared, held.to, &held.packet);
    }
}
