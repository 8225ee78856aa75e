//! Faults of the wall clock, through the preloaded library. The monotonic clock stays right: it is the
//! machine's, and jumps of it are pauses.

use std::io;
use std::time::Duration;

use super::{Fault, Hurt, Repeat, Scene, dismiss, order};
use crate::page::{Count, Order};
use crate::run::Run;

const HOUR_NS: i64 = 3_600_000_000_000;
/// How long a strobed clock stays right and wrong.
const STROBE: Duration = Duration::from_millis(200);

pub(super) fn install(fault: Fault, run: &Run, scene: &Scene) -> io::Result<Hurt> {
    let shift =
        |members: &[usize], value| order(run, members, Order::ShiftClock, value, Count::ClockReads);
    match fault {
        Fault::ClockBack => shift(&[scene.leader], -HOUR_NS),
        Fault::ClockForward => shift(&[scene.leader], HOUR_NS),
        Fault::ClockStrobe => {
            let mut hurt = shift(&scene.members, HOUR_NS)?;
            let cluster = run.cluster.lock();
            let pages = hurt.members.iter().filter_map(|member| cluster.page(*member));
            let pages = pages.map(crate::page::Page::again).collect::<io::Result<Vec<_>>>()?;
            let mut ahead = false;
            let turn = move |on: bool| {
                ahead ^= on;
                let off = if ahead { HOUR_NS } else { -HOUR_NS };
                let value = if on { off } else { 0 };
                // The file stays open; a write of eight bytes into it does not fail.
                pages.iter().for_each(|page| page.set(Order::ShiftClock, value).unwrap_or(()));
            };
            hurt.repeat = Some(Repeat::start(STROBE, turn));
            Ok(hurt)
        }
        other => unreachable!("{} is no fault of the clock", other.name()),
    }
}

pub(super) fn undo(run: &Run, hurt: &mut Hurt) -> io::Result<()> {
    dismiss(run, hurt, Count::ClockReads)
}
