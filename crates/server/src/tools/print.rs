//! What the tools print, in the four formats of etcd's tools.

use std::io::Write;

use clap::ArgMatches;

use super::Failure;

/// Writes to standard output; a reader that has gone away is no failure.
pub(super) fn out(text: &str) {
    let _reader_is_gone = std::io::stdout().write_all(text.as_bytes());
}

/// One column of an answer: its names in tables, with fields, and in JSON; the value in tables and in
/// JSON.
pub(super) struct Column {
    pub(super) title: &'static str,
    pub(super) field: &'static str,
    pub(super) json: &'static str,
    /// As tables and lines show it.
    pub(super) shown: String,
    /// As JSON and fields have it.
    pub(super) exact: serde_json::Value,
}

/// Prints an answer of one row.
pub(super) fn answer(matches: &ArgMatches, columns: &[Column]) -> Result<(), Failure> {
    let format = matches.get_one::<String>("write-out").map_or("simple", String::as_str);
    out(&match format {
        "json" => json(columns),
        "fields" => fields(columns),
        "table" => table(columns),
        "simple" => simple(columns),
        other => return Err(Failure::feature(format!("{other} not supported as output format"))),
    });
    Ok(())
}

/// Whether `answer` will print at all; asked before the work.
pub(super) fn check_format(matches: &ArgMatches) -> Result<(), Failure> {
    match matches.get_one::<String>("write-out").map(String::as_str) {
        Some("protobuf") => Err(Failure::feature("protobuf not supported as output format")),
        _ => Ok(()),
    }
}

fn simple(columns: &[Column]) -> String {
    let shown: Vec<&str> = columns.iter().map(|column| column.shown.as_str()).collect();
    format!("{}\n", shown.join(", "))
}

fn json(columns: &[Column]) -> String {
    // In this order, which a map would not keep.
    let pairs: Vec<String> =
        columns.iter().map(|column| format!("\"{}\":{}", column.json, column.exact)).collect();
    format!("{{{}}}\n", pairs.join(","))
}

fn fields(columns: &[Column]) -> String {
    let mut text = String::new();
    for column in columns {
        let value = match &column.exact {
            serde_json::Value::String(value) => value.clone(),
            other => other.to_string(),
        };
        text += &format!("\"{}\" : {value}\n", column.field);
    }
    text
}

fn table(columns: &[Column]) -> String {
    let widths = columns.iter().map(|column| column.title.len().max(column.shown.len()));
    let widths: Vec<usize> = widths.collect();
    let line = |left: &str, cross: &str, right: &str| {
        let bars: Vec<String> = widths.iter().map(|width| "─".repeat(width + 2)).collect();
        format!("{left}{}{right}\n", bars.join(cross))
    };
    let cells = |cell: &dyn Fn(&Column, usize) -> String| {
        let cells: Vec<String> = columns.iter().zip(&widths).map(|(c, w)| cell(c, *w)).collect();
        format!("│ {} │\n", cells.join(" │ "))
    };
    let title = |column: &Column, width: usize| format!("{:^width$}", column.title.to_uppercase());
    let value = |column: &Column, width: usize| format!("{:>width$}", column.shown);
    [line("┌", "┬", "┐"), cells(&title), line("├", "┼", "┤"), cells(&value), line("└", "┴", "┘")]
        .concat()
}

/// A size as etcd's tools write it: `20 kB`, `1.5 MB`.
pub(super) fn human(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["B", "kB", "MB", "GB", "TB", "PB", "EB"];
    if bytes < 10 {
        return format!("{bytes} B");
    }
    let mut unit = 0;
    let mut size = bytes as f64;
    while size >= 1000.0 && unit + 1 < UNITS.len() {
        size /= 1000.0;
        unit += 1;
    }
    let size = (size * 10.0 + 0.5).floor() / 10.0;
    match size < 10.0 {
        true => format!("{size:.1} {}", UNITS[unit]),
        false => format!("{size:.0} {}", UNITS[unit]),
    }
}

#[cfg(test)]
mod tests {
    use super::human;

    #[test]
    fn sizes_are_written_like_etcds() {
        let cases = [
            (0, "0 B"),
            (9, "9 B"),
            (10, "10 B"),
            (999, "999 B"),
            (20_480, "20 kB"),
            (1_540_000, "1.5 MB"),
            (9_960_000, "10 MB"),
            (82_854_982, "83 MB"),
        ];
        for (bytes, text) in cases {
            assert_eq!(human(bytes), text);
        }
    }
}
