//! Operations as bars in lanes, one per member and client.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use super::{
    DRAWN_MAX, Picture, Span, WIDTH, axis, bands, call, color, escape, open, seconds, word,
};
use crate::history::{Op, Outcome};

/// Height of a lane. Unit: pixels.
const LANE: f64 = 13.0;
/// Clients of one member that have a lane of their own; others share the last.
const SLOTS_MAX: usize = 12;

pub(super) fn svg(picture: &Picture<'_>, guilty: &[usize], span: Span) -> String {
    let ops = &picture.history.ops;
    let slots = slots(ops);
    let lanes = lanes(ops, &slots);
    let height = 14.0 + lanes.len() as f64 * LANE;
    let mut out = open(height) + &bands(picture.faults, span, height) + &axis(span, height);
    for ((member, slot), lane) in &lanes {
        let y = 14.0 + (*lane as f64 + 0.8) * LANE;
        writeln!(out, "<text x=\"2\" y=\"{y:.1}\">member {member} client {slot}</text>")
            .expect("a string takes all");
    }
    let inside: Vec<usize> = (0..ops.len())
        .filter(|at| span.touches(seconds(ops[*at].start), seconds(ops[*at].end)))
        .collect();
    let step = inside.len().div_ceil(DRAWN_MAX).max(1);
    // The guilty last, so that nothing lies above them.
    let plain = inside.iter().step_by(step).filter(|at| !guilty.contains(at));
    let named = inside.iter().filter(|at| guilty.contains(at));
    for at in plain.chain(named) {
        let op = &ops[*at];
        let lane = lanes[&(op.member, slots[*at])];
        bar(&mut out, op, lane, span, guilty.contains(at));
    }
    if step > 1 {
        let (of, x) = (inside.len(), WIDTH - 210.0);
        writeln!(
            out,
            "<text x=\"{x:.0}\" y=\"{:.0}\">one of {step} operations drawn, of {of}</text>",
            height - 3.0
        )
        .expect("a string takes all");
    }
    out + "</svg>\n"
}

fn bar(out: &mut String, op: &Op, lane: usize, span: Span, guilty: bool) {
    let (from, to) = (span.x(seconds(op.start)), span.x(seconds(op.end)));
    let outline = if guilty { " stroke=\"#d00\" stroke-width=\"2\"" } else { "" };
    writeln!(
        out,
        "<rect x=\"{from:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{:.1}\" fill=\"{}\"{outline}>\
         <title>{:.4}-{:.4} s process {} revision {} {}: {}</title></rect>",
        15.0 + lane as f64 * LANE,
        (to - from).max(1.2),
        LANE - 3.0,
        color(op),
        seconds(op.start),
        seconds(op.end),
        op.process,
        op.revision,
        word(op.outcome),
        escape(&call(op)),
    )
    .expect("a string takes all");
}

/// The client behind each operation. A client whose operation ended unknown goes on under another
/// process number: that one takes its place.
fn slots(ops: &[Op]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..ops.len()).collect();
    order.sort_by_key(|at| ops[*at].start);
    let mut known: BTreeMap<(usize, u64), usize> = BTreeMap::new();
    let mut last: BTreeMap<usize, Vec<(u64, Outcome)>> = BTreeMap::new();
    let mut slots = vec![0; ops.len()];
    for at in order {
        let op = &ops[at];
        let ends = last.entry(op.member).or_default();
        let slot = *known.entry((op.member, op.process)).or_insert_with(|| {
            let free =
                |(end, outcome): &(u64, Outcome)| *outcome == Outcome::Unknown && *end <= op.start;
            ends.iter().position(free).unwrap_or(ends.len()).min(SLOTS_MAX - 1)
        });
        if slot == ends.len() {
            ends.push((op.end, op.outcome));
        }
        ends[slot] = (op.end, op.outcome);
        slots[at] = slot;
    }
    slots
}

fn lanes(ops: &[Op], slots: &[usize]) -> BTreeMap<(usize, usize), usize> {
    let keys: std::collections::BTreeSet<(usize, usize)> =
        ops.iter().zip(slots).map(|(op, slot)| (op.member, *slot)).collect();
    keys.into_iter().enumerate().map(|(lane, key)| (key, lane)).collect()
}
