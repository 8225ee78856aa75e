//! `timeline.html`: a run as one picture that needs nothing else, violating operations first. Lanes
//! are a member's clients, bands behind them the faults; below are latency and availability of the
//! whole run. It draws what was recorded and judges nothing; its size has a bound whatever the run's.

mod lanes;
mod plots;

use std::fmt::Write as _;

use crate::attack::FaultRecord;
use crate::check::Violation;
use crate::history::{History, Op, Outcome};

/// Width of all pictures, and of the names left of them. Unit: pixels.
const WIDTH: f64 = 1200.0;
const LEFT: f64 = 110.0;

/// Violating operations in the table.
const NAMED_MAX: usize = 60;
/// Operations drawn in one picture of lanes; of more every so many is left out.
const DRAWN_MAX: usize = 3_000;
/// The violating part of a run is shown with this much before and after it. Unit: seconds.
const AROUND: f64 = 1.0;
/// No more than this of it. Unit: seconds.
const PART_MAX: f64 = 10.0;

const STYLE: &str = "body{font:14px sans-serif;margin:20px;color:#222}svg{display:block;margin:8px 0}\
table{border-collapse:collapse}td,th{padding:2px 8px;border-bottom:1px solid #ddd;text-align:left}\
.proof{color:#a00;font-family:monospace;white-space:pre-wrap}text{font:11px sans-serif;fill:#444}";

/// What is drawn.
pub(crate) struct Picture<'a> {
    pub(crate) title: &'a str,
    pub(crate) verdict: &'a str,
    pub(crate) history: &'a History,
    pub(crate) violations: &'a [Violation],
    /// Findings and gaps, in words.
    pub(crate) remarks: &'a [String],
    pub(crate) faults: &'a [FaultRecord],
}

/// A stretch of time and where it lies in a picture. Unit: seconds.
#[derive(Clone, Copy)]
struct Span {
    from: f64,
    to: f64,
}

impl Span {
    fn x(self, at: f64) -> f64 {
        let share = (at - self.from) / (self.to - self.from).max(1e-9);
        LEFT + share.clamp(0.0, 1.0) * (WIDTH - LEFT)
    }

    fn touches(self, from: f64, to: f64) -> bool {
        from <= self.to && to >= self.from
    }
}

/// The whole file.
pub(crate) fn html(picture: &Picture<'_>) -> String {
    let ops = &picture.history.ops;
    let guilty = guilty(ops, picture.violations);
    let mut out = format!(
        "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"/><title>{0}</title>\
         <style>{STYLE}</style></head><body>\n<h1>{0}: {1}</h1>\n",
        escape(picture.title),
        escape(picture.verdict)
    );
    for violation in picture.violations {
        line(&mut out, &violation.to_string());
    }
    picture.remarks.iter().for_each(|remark| line(&mut out, remark));
    if !guilty.is_empty() {
        out += "<h2>The operations that prove it</h2>\n";
        table(&mut out, &guilty.iter().map(|at| &ops[*at]).collect::<Vec<_>>());
        let part = part(&guilty.iter().map(|at| &ops[*at]).collect::<Vec<_>>());
        let what = format!("From {:.1} s to {:.1} s", part.from, part.to);
        writeln!(out, "<h2>{what}</h2>").expect("a string takes all");
        out += &lanes::svg(picture, &guilty, part);
    }
    let end = ops.iter().map(|op| seconds(op.end)).fold(1.0, f64::max);
    let whole = Span { from: 0.0, to: end };
    out += "<h2>Latency</h2>\n";
    out += &plots::latency(picture, &guilty, whole);
    out += "<h2>Answers per second</h2>\n";
    out += &plots::availability(picture, whole);
    out += "<h2>The whole run</h2>\n";
    out += &lanes::svg(picture, &guilty, whole);
    out += "<h2>Faults</h2>\n";
    faults(&mut out, picture.faults);
    out + "</body></html>\n"
}

fn line(out: &mut String, text: &str) {
    writeln!(out, "<p class=\"proof\">{}</p>", escape(text)).expect("a string takes all");
}

fn table(out: &mut String, ops: &[&Op]) {
    *out += "<table><tr><th>from s</th><th>to s</th><th>process</th><th>member</th><th>outcome</th>\
             <th>revision</th><th>call</th></tr>\n";
    for op in ops.iter().take(NAMED_MAX) {
        writeln!(
            out,
            "<tr><td>{:.4}</td><td>{:.4}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td></tr>",
            seconds(op.start),
            seconds(op.end),
            op.process,
            op.member,
            word(op.outcome),
            op.revision,
            escape(&call(op)),
        )
        .expect("a string takes all");
    }
    *out += "</table>\n";
}

fn faults(out: &mut String, faults: &[FaultRecord]) {
    *out += "<table><tr><th>from s</th><th>to s</th><th>fault</th><th>leader</th><th>members</th>\
             <th>note</th></tr>\n";
    for fault in faults {
        writeln!(
            out,
            "<tr><td>{:.1}</td><td>{:.1}</td><td>{}</td><td>{}</td><td>{:?}</td><td>{}</td></tr>",
            fault.from,
            fault.to,
            escape(&fault.fault),
            fault.leader,
            fault.members,
            escape(&fault.note),
        )
        .expect("a string takes all");
    }
    *out += "</table>\n";
}

/// Faults as bands behind a picture of that height.
fn bands(faults: &[FaultRecord], span: Span, height: f64) -> String {
    let mut out = String::new();
    for fault in faults.iter().filter(|fault| span.touches(fault.from, fault.to)) {
        let (from, to) = (span.x(fault.from), span.x(fault.to));
        let width = (to - from).max(1.0);
        let name = escape(&fault.fault);
        writeln!(
            out,
            "<rect x=\"{from:.1}\" y=\"14\" width=\"{width:.1}\" height=\"{:.0}\" fill=\"#f4e3c3\" \
             fill-opacity=\"0.6\"><title>{name}</title></rect>\
             <text x=\"{from:.1}\" y=\"11\">{name}</text>",
            height - 14.0,
        )
        .expect("a string takes all");
    }
    out
}

/// Seconds below a picture.
fn axis(span: Span, height: f64) -> String {
    let mut out = String::new();
    for tick in 0..=10 {
        let at = span.from + (span.to - span.from) * f64::from(tick) / 10.0;
        let x = span.x(at);
        writeln!(
            out,
            "<line x1=\"{x:.1}\" y1=\"14\" x2=\"{x:.1}\" y2=\"{height:.0}\" stroke=\"#ddd\"/>\
             <text x=\"{:.1}\" y=\"{:.0}\">{at:.1} s</text>",
            (x - 14.0).min(WIDTH - 34.0),
            height + 12.0,
        )
        .expect("a string takes all");
    }
    out
}

fn open(height: f64) -> String {
    let height = height + 18.0;
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH:.0}\" height=\"{height:.0}\" \
         viewBox=\"0 0 {WIDTH:.0} {height:.0}\">\n"
    )
}

/// Places of the operations that the proofs name, in their order and without repetition.
fn guilty(ops: &[Op], violations: &[Violation]) -> Vec<usize> {
    let mut found = Vec::new();
    for (start, process) in violations.iter().flat_map(|violation| named(&violation.proof)) {
        let same = |op: &Op| op.process == process && (seconds(op.start) - start).abs() < 2e-4;
        if let Some(at) = ops.iter().position(same)
            && !found.contains(&at)
        {
            found.push(at);
        }
    }
    found
}

/// Start and process of each operation in a proof: `[12.0410-12.0443 process 7 member 2 ...]`.
fn named(proof: &str) -> Vec<(f64, u64)> {
    let one = |part: &str| {
        let (start, rest) = part.split_once('-')?;
        let (_, rest) = rest.split_once(" process ")?;
        let digits = rest.split(|letter: char| !letter.is_ascii_digit()).next()?;
        Some((start.parse().ok()?, digits.parse().ok()?))
    };
    proof.split('[').skip(1).filter_map(one).collect()
}

/// The stretch around the operations of the first proof.
fn part(guilty: &[&Op]) -> Span {
    let first = guilty.first().map_or(0.0, |op| seconds(op.start));
    let near = guilty.iter().filter(|op| (seconds(op.start) - first).abs() < PART_MAX / 2.0);
    let (mut from, mut to) = (first, first);
    for op in near {
        from = from.min(seconds(op.start));
        to = to.max(seconds(op.end));
    }
    Span { from: (from - AROUND).max(0.0), to: (to + AROUND).min(from + PART_MAX) }
}

fn seconds(nanos: u64) -> f64 {
    nanos as f64 / 1e9
}

fn word(outcome: Outcome) -> &'static str {
    match outcome {
        Outcome::Ok => "ok",
        Outcome::Fail => "fail",
        Outcome::Unknown => "unknown",
    }
}

fn color(op: &Op) -> &'static str {
    match (op.outcome, op.call.is_write()) {
        (Outcome::Unknown, _) => "#f29a2e",
        (Outcome::Fail, _) => "#b9b9b9",
        (Outcome::Ok, true) => "#4a9d5b",
        (Outcome::Ok, false) => "#6aa9e9",
    }
}

/// What was called, cut to a readable length.
fn call(op: &Op) -> String {
    let text = serde_json::to_string(&op.call).expect("calls are plain data");
    let mut short: String = text.chars().take(140).collect();
    if let Some(error) = &op.error {
        short.push_str(" -> ");
        short.extend(error.chars().take(100));
    }
    short
}

fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for letter in text.chars() {
        match letter {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            letter if letter.is_control() => out.push(' '),
            letter => out.push(letter),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::Rule;
    use crate::history::Call;
    use crate::nemesis::{Class, Outcome as Became};

    fn op(number: u64) -> Op {
        let outcome = [Outcome::Ok, Outcome::Fail, Outcome::Unknown][number as usize % 3];
        Op {
            process: number % 7,
            member: 1 + number as usize % 3,
            call: Call::Put { key: "k/<&\">".into(), value: number.to_string() },
            start: number * 1_000_000,
            end: number * 1_000_000 + 900_000,
            outcome,
            error: (outcome != Outcome::Ok).then(|| "<none> & \"none\"".into()),
            revision: number as i64,
            succeeded: true,
            rows: Vec::new(),
            detail: Default::default(),
        }
    }

    fn drawn(count: u64) -> String {
        let history = History { ops: (0..count).map(op).collect(), ..History::default() };
        let proof = "[0.0080-0.0089 process 1 member 3 revision 8] put <k>".to_owned();
        let violations = [Violation { rule: Rule::Stale, proof }];
        let fault = FaultRecord {
            entry: 0,
            fault: "kill & \"more\"".into(),
            class: Class::Process,
            from: 0.001,
            to: 0.02,
            leader: 1,
            members: vec![1],
            outcome: Became::Installed,
            note: "<note>".into(),
        };
        html(&Picture {
            title: "a <run>",
            verdict: "VIOLATED",
            history: &history,
            violations: &violations,
            remarks: &[],
            faults: &[fault],
        })
    }

    /// Every element is closed by its own end, and nothing is fetched from anywhere.
    #[test]
    fn the_file_is_well_formed_and_needs_nothing_else() {
        let text = drawn(500);
        let body = text.strip_prefix("<!DOCTYPE html>").expect("a document");
        let mut open = Vec::new();
        for tag in body.split('<').skip(1) {
            let (tag, rest) = tag.split_once('>').expect("a tag ends");
            assert!(!rest.contains('>'), "a bare bracket behind {tag}");
            let name = tag.trim_matches('/').split_whitespace().next().expect("a name");
            if tag.starts_with('/') {
                assert_eq!(open.pop(), Some(name), "{tag}");
            } else if !tag.ends_with('/') {
                open.push(name);
            }
        }
        assert_eq!(open, Vec::<&str>::new());
        assert!(!text.contains("src=") && !text.contains("href="));
    }

    #[test]
    fn what_a_proof_names_is_outlined_in_red() {
        let text = drawn(500);
        assert!(text.contains("stroke=\"#d00\""));
        assert!(text.find("The operations that prove it") < text.find("Latency"));
    }

    #[test]
    fn the_size_has_a_bound() {
        assert!(drawn(60_000).len() < 4 << 20);
    }
}
