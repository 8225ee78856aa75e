//! Latency of single operations, and how many were answered in each second.

use std::fmt::Write as _;

use super::{DRAWN_MAX, LEFT, Picture, Span, WIDTH, axis, bands, color, open, seconds};
use crate::history::Outcome;

const HEIGHT: f64 = 180.0;
/// Bars of the availability plot; a longer run has wider ones.
const BARS_MAX: f64 = 300.0;

/// A point per operation, from 0.1 ms to 10 s on a logarithmic scale.
pub(super) fn latency(picture: &Picture<'_>, guilty: &[usize], span: Span) -> String {
    let ops = &picture.history.ops;
    let mut out = open(HEIGHT) + &bands(picture.faults, span, HEIGHT) + &axis(span, HEIGHT);
    let y = |millis: f64| {
        let share = ((millis.max(0.1).log10() + 1.0) / 5.0).min(1.0);
        HEIGHT - share * (HEIGHT - 18.0)
    };
    for (name, millis) in [("1 ms", 1.0), ("10 ms", 10.0), ("100 ms", 100.0), ("1 s", 1e3)] {
        let at = y(millis);
        writeln!(
            out,
            "<text x=\"60\" y=\"{:.1}\">{name}</text>\
             <line x1=\"{LEFT}\" y1=\"{at:.1}\" x2=\"{WIDTH}\" y2=\"{at:.1}\" stroke=\"#ddd\"/>",
            at + 4.0,
        )
        .expect("a string takes all");
    }
    let step = ops.len().div_ceil(DRAWN_MAX).max(1);
    for (at, op) in ops.iter().enumerate() {
        let named = guilty.contains(&at);
        if at % step != 0 && !named {
            continue;
        }
        let (x, y) = (span.x(seconds(op.end)), y((seconds(op.end) - seconds(op.start)) * 1e3));
        let (radius, outline) = if named { (4, " stroke=\"#d00\"") } else { (1, "") };
        let color = color(op);
        writeln!(
            out,
            "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"{radius}\" fill=\"{color}\"{outline}/>"
        )
        .expect("a string takes all");
    }
    out + "</svg>\n"
}

/// Answers, failures and unknown outcomes in each second, one above the other.
pub(super) fn availability(picture: &Picture<'_>, span: Span) -> String {
    let ops = &picture.history.ops;
    let width = (span.to / BARS_MAX).max(1.0).ceil();
    let mut counts = vec![[0_u32; 3]; (span.to / width) as usize + 1];
    for op in ops {
        let column = match op.outcome {
            Outcome::Ok => 0,
            Outcome::Unknown => 1,
            Outcome::Fail => 2,
        };
        counts[(seconds(op.end) / width) as usize][column] += 1;
    }
    let most = counts.iter().map(|count| count.iter().sum::<u32>()).max().unwrap_or(1).max(1);
    let mut out = open(HEIGHT) + &bands(picture.faults, span, HEIGHT) + &axis(span, HEIGHT);
    let per_second = f64::from(most) / width;
    writeln!(out, "<text x=\"50\" y=\"24\">{per_second:.0} / s</text>")
        .expect("a string takes all");
    for (number, count) in counts.iter().enumerate() {
        let from = span.x(number as f64 * width);
        let wide = (span.x((number + 1) as f64 * width) - from - 0.5).max(0.5);
        let mut base = HEIGHT;
        for (part, fill) in count.iter().zip(["#4a9d5b", "#f29a2e", "#b9b9b9"]) {
            let high = f64::from(*part) / f64::from(most) * (HEIGHT - 18.0);
            base -= high;
            if *part > 0 {
                writeln!(
                    out,
                    "<rect x=\"{from:.1}\" y=\"{base:.1}\" width=\"{wide:.1}\" \
                     height=\"{high:.1}\" fill=\"{fill}\"/>"
                )
                .expect("a string takes all");
            }
        }
    }
    out + "</svg>\n"
}
