//! The faults of a schedule, as the driver carries them out: how each begins, what it waits for, how it
//! ends, and which links it keeps shut. It draws none and judges nothing.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::time::Duration;

use kelson_raft::MemberChange;

use super::driver::Driver;
use super::schedule::{Break, Fault, Step};
use super::world::{Slot, Task, name, url};

/// How long a fault waits for its occasion. Unit: milliseconds.
const OCCASION: u64 = 6_000;
/// Longest time of a message. Unit: milliseconds.
pub(super) const NORMAL: u64 = 4;
/// The same while a transfer is waited for, that is to be broken off in its middle.
const SLOW: u64 = 30;

impl Driver {
    pub(super) fn begin(&mut self, step: &Step) {
        self.say(&format!("fault {step}"));
        let ends = self.now + step.lasts;
        let mut happens = true;
        match &step.fault {
            Fault::Split(side) => self.cut_sides(side, true),
            Fault::OneWay(from, to) => self.cut_way(*from, *to, true),
            Fault::Link(a, b) => {
                self.cut_way(*a, *b, true);
                self.cut_way(*b, *a, true);
            }
            Fault::Hold(a, b) => {
                self.held.insert((*a, *b));
                self.refresh_links();
            }
            // It takes effect with the others of its kind, below.
            Fault::Latency(_) => {}
            Fault::Ring(order) => {
                let ring = self.present(order);
                happens = self.cut_ring(&ring, true);
                if happens {
                    self.count(&step.fault);
                    self.active.push((ends, Fault::Ring(ring)));
                }
                return;
            }
            Fault::Loss(one_in) => self.sim.set_fail_rate(1.0 / *one_in as f64),
            Fault::Kill(member) | Fault::Away(member) => {
                happens = self.take_down(*member, false, ends)
            }
            Fault::Power(members) => {
                let down = members.iter().filter(|it| self.take_down(**it, true, ends)).count();
                happens = down > 0;
            }
            Fault::SlowDisk(member, most) => {
                self.world.slots[*member].lock().disk.set_slowness(Some(*most));
            }
            Fault::BreakTransfer(_) => {
                self.active.push((self.now + OCCASION, step.fault.clone()));
                self.refresh_latency();
                return;
            }
            // Whoever is asked counts them when they are done.
            Fault::Add => return self.ask(Task::Add(url(self.world.run.members))),
            Fault::Promote => return self.change_spare(MemberChange::Promote, &step.fault),
            Fault::Remove => return self.change_spare(MemberChange::Remove, &step.fault),
        }
        if happens {
            self.count(&step.fault);
            self.active.push((ends, step.fault.clone()));
            self.refresh_latency();
        }
    }

    fn count(&self, fault: &Fault) {
        self.world.count(fault.kind());
    }

    pub(super) fn end_faults(&mut self) {
        let now = self.now;
        let (over, active): (Vec<_>, _) =
            std::mem::take(&mut self.active).into_iter().partition(|(ends, _)| *ends <= now);
        self.active = active;
        for (_, fault) in over {
            self.end(&fault);
        }
        let (due, later): (Vec<_>, _) =
            std::mem::take(&mut self.restarts).into_iter().partition(|(at, _)| *at <= now);
        self.restarts = later;
        for (_, member) in due {
            self.start(member);
        }
    }

    pub(super) fn end(&mut self, fault: &Fault) {
        match fault {
            Fault::Split(side) => self.cut_sides(side, false),
            Fault::OneWay(from, to) => self.cut_way(*from, *to, false),
            Fault::Link(a, b) => {
                self.cut_way(*a, *b, false);
                self.cut_way(*b, *a, false);
            }
            Fault::Hold(a, b) => {
                self.held.remove(&(*a, *b));
                self.sim.release(name(*a), name(*b));
                self.refresh_links();
            }
            Fault::Latency(_) => self.refresh_latency(),
            Fault::BreakTransfer(_) => return self.refresh_latency(),
            Fault::Ring(ring) => {
                self.cut_ring(ring, false);
            }
            Fault::Loss(_) => {
                self.sim.set_fail_rate(0.0);
                self.refresh_links();
            }
            Fault::SlowDisk(member, _) => {
                self.world.slots[*member].lock().disk.set_slowness(None);
            }
            // Restarts have their own list; the others have no end, or had no occasion.
            _ => return,
        }
        self.say(&format!("over {fault:?}"));
    }

    /// Faults that wait for something to happen.
    pub(super) fn take_occasions(&mut self) {
        let waits = |fault: &Fault| matches!(fault, Fault::BreakTransfer(_));
        let Some(at) = self.active.iter().position(|(_, fault)| waits(fault)) else { return };
        let Some((sender, receiver)) = self.transfer() else { return };
        let (_, fault) = self.active.remove(at);
        self.say(&format!("a transfer from m{sender} to m{receiver} is under way"));
        let until = self.now + 500 + self.rng.below(2_000);
        let happens = match fault {
            Fault::BreakTransfer(Break::Sender) => self.take_down(sender, true, until),
            Fault::BreakTransfer(Break::Receiver) => self.take_down(receiver, true, until),
            _ => {
                let link = Fault::Link(sender, receiver);
                self.cut_way(sender, receiver, true);
                self.cut_way(receiver, sender, true);
                self.active.push((until, link));
                true
            }
        };
        self.refresh_latency();
        if happens {
            self.count(&fault);
        }
    }

    /// Sender and receiver of a state of which something has arrived and something is still to come.
    fn transfer(&self) -> Option<(usize, usize)> {
        let id_of = |slot: &Slot| slot.running.as_ref().map(|it| it.node.status().member_id);
        let ids: Vec<_> = self.world.slots.iter().map(|slot| id_of(&slot.lock())).collect();
        let member = |id: u64| ids.iter().position(|known| *known == Some(id));
        let mut sending = BTreeSet::new();
        let mut receiving = BTreeSet::new();
        for (own, slot) in self.world.slots.iter().enumerate() {
            let slot = slot.lock();
            let Some(running) = &slot.running else { continue };
            for (id, counters) in running.node.take_peer_counters() {
                let Some(other) = member(id) else { continue };
                if counters.snapshots_sending > 0 {
                    sending.insert((own, other));
                }
                if counters.snapshots_receiving > 0 && has_draft(&slot.dir) {
                    receiving.insert((other, own));
                }
            }
        }
        sending.intersection(&receiving).next().copied()
    }

    /// Hands a task to some member that runs.
    fn ask(&mut self, task: Task) {
        let first = self.rng.below(self.world.run.members as u64) as usize;
        let order = (0..self.world.run.members).map(|at| (first + at) % self.world.run.members);
        for member in order {
            if let Some(running) = &self.world.slots[member].lock().running {
                // A member that has ended meanwhile does nothing.
                let _ = running.tasks.send(task);
                return;
            }
        }
    }

    fn change_spare(&mut self, change: fn(u64) -> MemberChange, fault: &Fault) {
        let slot = self.world.slots[self.world.run.members].lock();
        let id = slot.running.as_ref().map(|it| it.node.status().member_id);
        drop(slot);
        if let Some(id) = id {
            self.ask(Task::Change(change(id), fault.kind()));
        }
    }

    // The network.

    /// The slowest that is asked for. Who waits for a transfer needs it to take a while: a state of a
    /// few kilobytes is there within milliseconds.
    pub(super) fn refresh_latency(&mut self) {
        let most = self.active.iter().map(|(_, fault)| match fault {
            Fault::Latency(most) => *most,
            Fault::BreakTransfer(_) => SLOW,
            _ => NORMAL,
        });
        let most = most.max().unwrap_or(NORMAL);
        self.sim.set_max_message_latency(Duration::from_millis(most));
    }

    /// Those of these members that are to run.
    fn present(&self, order: &[usize]) -> Vec<usize> {
        let is_wanted = |member: &&usize| self.world.slots[**member].lock().is_wanted;
        order.iter().filter(is_wanted).copied().collect()
    }

    /// Cuts, or opens, all links but those between neighbours. Says whether there are any.
    fn cut_ring(&mut self, ring: &[usize], is_cut: bool) -> bool {
        let ways = strangers(ring);
        for (from, to) in &ways {
            self.cut_way(*from, *to, is_cut);
        }
        !ways.is_empty()
    }

    pub(super) fn cut_sides(&mut self, side: &[usize], is_cut: bool) {
        for member in side {
            for other in (0..self.world.slots.len()).filter(|other| !side.contains(other)) {
                self.cut_way(*member, other, is_cut);
                self.cut_way(other, *member, is_cut);
            }
        }
    }

    fn cut_way(&mut self, from: usize, to: usize, is_cut: bool) {
        let count = self.cut.entry((from, to)).or_default();
        *count = if is_cut { *count + 1 } else { count.saturating_sub(1) };
        let count = *count;
        if is_cut && count == 1 {
            self.sim.partition_oneway(name(from), name(to));
        } else if count == 0 {
            self.refresh_links();
        }
    }

    /// Opens what nothing keeps shut.
    pub(super) fn refresh_links(&self) {
        let members = self.world.slots.len();
        let is_cut = |way: (usize, usize)| self.cut.get(&way).is_some_and(|count| *count > 0);
        for a in 0..members {
            for b in a + 1..members {
                let is_held = self.held.contains(&(a, b)) || self.held.contains(&(b, a));
                if is_held {
                    self.sim.hold(name(a), name(b));
                } else {
                    self.sim.repair(name(a), name(b));
                }
                for (from, to) in [(a, b), (b, a)] {
                    if is_cut((from, to)) {
                        self.sim.partition_oneway(name(from), name(to));
                    }
                }
            }
        }
    }
}

/// Whether a member has files of a second state beside its own: the head of a transfer has arrived.
fn has_draft(dir: &Path) -> bool {
    let names = fs::read_dir(dir.join("member/state")).into_iter().flatten().flatten();
    names.filter(|name| name.path().is_dir()).count() > 1
}

/// The ways between members of a ring that are no neighbours, both directions of each.
fn strangers(ring: &[usize]) -> Vec<(usize, usize)> {
    let count = ring.len();
    let mut ways = Vec::new();
    for (at, from) in ring.iter().enumerate() {
        for (place, to) in ring.iter().enumerate() {
            let apart = at.abs_diff(place);
            if apart > 1 && apart < count - 1 {
                ways.push((*from, *to));
            }
        }
    }
    ways
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn in_a_ring_each_keeps_two_neighbours() {
        for count in 4..7 {
            let ring: Vec<usize> = (0..count).rev().collect();
            let ways = strangers(&ring);
            let mut lost: BTreeMap<usize, usize> = BTreeMap::new();
            for (from, to) in &ways {
                assert!(ways.contains(&(*to, *from)), "one way of {from} and {to} is open");
                *lost.entry(*from).or_default() += 1;
            }
            assert!(lost.values().all(|lost| *lost == count - 3), "{count}: {lost:?}");
            assert_eq!(lost.len(), count);
        }
        assert!(strangers(&[0, 1, 2]).is_empty(), "of three each is the other's neighbour");
    }
}
