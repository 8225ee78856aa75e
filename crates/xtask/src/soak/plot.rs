//! The plot of a soak as SVG: a panel for memory, one for files, one for the rate of writes and one
//! for their latency, over the same time. Written by hand, since four polylines need no library.

use std::fmt::Write;

use super::sample::{COLUMNS, Sample};

const WIDTH: f64 = 900.0;
const LEFT: f64 = 60.0;
const RIGHT: f64 = 130.0;
const PANEL: f64 = 150.0;
const GAP: f64 = 34.0;
/// Points per line; more could not be told apart.
const POINTS: usize = 450;

/// Names of the columns that share a panel, with its title.
const PANELS: [(&str, &[&str]); 4] = [
    ("memory, MiB", &["RSS MiB"]),
    ("files, MiB", &["state files MiB", "log files MiB", "in use MiB"]),
    ("writes per second", &["writes/s"]),
    ("latency of writes, ms", &["p50 ms", "p99 ms"]),
];
const COLORS: [&str; 3] = ["#1f6feb", "#d9480f", "#2b8a3e"];

/// Something that happened at a time: its second and its kind.
pub(crate) type Mark = (f64, &'static str);

/// Draws all panels. Marks become thin vertical lines in the first two, by kind.
pub(crate) fn svg(samples: &[Sample], marks: &[Mark]) -> String {
    let height = PANELS.len() as f64 * (PANEL + GAP) + 30.0;
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" \
         font-family=\"sans-serif\" font-size=\"11\">\n\
         <rect width=\"{WIDTH}\" height=\"{height}\" fill=\"#ffffff\"/>\n"
    );
    let end = samples.last().map_or(1.0, |sample| sample.seconds.max(1.0));
    for (place, (title, names)) in PANELS.iter().enumerate() {
        let top = 24.0 + place as f64 * (PANEL + GAP);
        let marks = if place < 2 { marks } else { &[] };
        panel(&mut out, samples, &Frame { top, end, title, names }, marks);
    }
    let (x, y) = (LEFT + (WIDTH - LEFT - RIGHT) / 2.0, height - 6.0);
    let legend = "seconds; grey: a compaction was asked for; green: a snapshot was streamed";
    let _ = writeln!(out, "<text x=\"{x}\" y=\"{y}\" text-anchor=\"middle\">{legend}</text>");
    out += "</svg>\n";
    out
}

struct Frame<'a> {
    top: f64,
    /// The last second.
    end: f64,
    title: &'a str,
    names: &'a [&'a str],
}

fn panel(out: &mut String, samples: &[Sample], frame: &Frame, marks: &[Mark]) {
    let columns = COLUMNS.iter().filter(|column| frame.names.contains(&column.name));
    let columns: Vec<_> = columns.collect();
    let values = columns.iter().flat_map(|column| samples.iter().map(column.of));
    let most = round_up(values.fold(1.0, f64::max));
    let right = WIDTH - RIGHT;
    let x = |seconds: f64| LEFT + seconds / frame.end * (right - LEFT);
    let y = |value: f64| frame.top + PANEL * (1.0 - value / most);
    // Writing to a string cannot fail.
    let _ = writeln!(out, "<text x=\"{LEFT}\" y=\"{}\">{}</text>", frame.top - 6.0, frame.title);
    for (second, kind) in marks.iter().filter(|(second, _)| *second <= frame.end) {
        let color = if *kind == "snapshot" { "#69db7c" } else { "#d0d4d9" };
        let (x, top, bottom) = (x(*second), frame.top, frame.top + PANEL);
        let _ = writeln!(
            out,
            "<path d=\"M{x:.1} {top:.1}V{bottom:.1}\" stroke=\"{color}\" stroke-width=\"1\"/>"
        );
    }
    for step in 0..=4 {
        let value = most * f64::from(step) / 4.0;
        let (line, label) = (y(value), LEFT - 6.0);
        let _ = writeln!(
            out,
            "<path d=\"M{LEFT} {line:.1}H{right}\" stroke=\"#c4c9cf\" stroke-width=\"0.5\"/>\
             <text x=\"{label}\" y=\"{:.1}\" text-anchor=\"end\">{value}</text>",
            line + 4.0
        );
        let second = frame.end * f64::from(step) / 4.0;
        let _ = writeln!(
            out,
            "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{second:.0}</text>",
            x(second),
            frame.top + PANEL + 14.0
        );
    }
    for ((column, color), row) in columns.iter().zip(COLORS).zip(0..) {
        let points = thin(samples, column.of).into_iter();
        let points: Vec<String> =
            points.map(|(second, value)| format!("{:.1},{:.1}", x(second), y(value))).collect();
        let _ = writeln!(
            out,
            "<polyline fill=\"none\" stroke=\"{color}\" stroke-width=\"1.3\" points=\"{}\"/>\
             <text x=\"{}\" y=\"{}\" fill=\"{color}\">{}</text>",
            points.join(" "),
            right + 8.0,
            frame.top + 12.0 + f64::from(row) * 15.0,
            column.name
        );
    }
}

/// As many points as can be told apart; of those that fall together the largest, so that no peak is
/// lost.
fn thin(samples: &[Sample], of: fn(&Sample) -> f64) -> Vec<(f64, f64)> {
    let together = samples.len().div_ceil(POINTS).max(1);
    let largest = |part: &[Sample]| part.iter().map(of).fold(0.0, f64::max);
    samples.chunks(together).map(|part| (part[0].seconds, largest(part))).collect()
}

/// The next number of the form 1, 2, 4 or 8 times a power of ten.
fn round_up(value: f64) -> f64 {
    let power = 10_f64.powf(value.log10().floor());
    let steps = [1.0, 2.0, 4.0, 8.0, 10.0].map(|step| step * power);
    steps.into_iter().find(|step| *step >= value).unwrap_or(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_axis_ends_at_a_round_number() {
        for (value, end) in [(1.0, 1.0), (3.0, 4.0), (530.0, 800.0), (801.0, 1000.0)] {
            assert!((round_up(value) - end).abs() < 1e-9, "{value}");
        }
    }

    #[test]
    fn peaks_survive_thinning() {
        let at = |n: i32| Sample {
            seconds: f64::from(n),
            rss_mib: if n == 777 { 9.0 } else { 1.0 },
            ..Sample::default()
        };
        let samples: Vec<Sample> = (0..3000).map(at).collect();
        let thinned = thin(&samples, |sample| sample.rss_mib);
        assert!(thinned.len() <= POINTS);
        assert!(thinned.iter().any(|(_, value)| *value > 8.0));
        let drawn = svg(&samples, &[(10.0, "snapshot")]);
        assert_eq!(drawn.matches("<polyline").count(), 7);
    }
}
