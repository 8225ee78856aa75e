//! Texts of flags, environment and config file turned into values by Go's rules (numbers with
//! base prefixes, `1m30s`, `T`/`FALSE`), since scripts and manifests were written for a Go
//! program. It knows no flag by name and does no I/O.

use std::time::Duration;

use super::url::Url;

/// What kind of text a flag takes; booleans may stand without a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Any text.
    Text,
    /// `true`, `false` and Go's other spellings.
    Bool,
    /// A whole number.
    Number,
    /// Go duration text such as `1m30s`; in a config file also whole nanoseconds.
    Duration,
    /// Comma separated.
    List,
}

/// A type that a flag can have.
pub trait Value: Sized {
    /// How it is written.
    const KIND: Kind;
    /// Parses flag text; the error says what is wrong without naming the flag.
    ///
    /// # Errors
    /// Any text that Go's flag package would refuse for the type.
    fn parse(text: &str) -> Result<Self, String>;
    /// The text that would parse to this value.
    fn show(&self) -> String;
}

impl Value for String {
    const KIND: Kind = Kind::Text;
    fn parse(text: &str) -> Result<Self, String> {
        Ok(text.to_owned())
    }
    fn show(&self) -> String {
        self.clone()
    }
}

impl Value for bool {
    const KIND: Kind = Kind::Bool;
    fn parse(text: &str) -> Result<Self, String> {
        match text {
            "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok(true),
            "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok(false),
            _ => Err("parse error".to_owned()),
        }
    }
    fn show(&self) -> String {
        self.to_string()
    }
}

macro_rules! number {
    ($($type:ty),*) => {$(
        impl Value for $type {
            const KIND: Kind = Kind::Number;
            fn parse(text: &str) -> Result<Self, String> {
                let wide = parse_integer(text).ok_or("parse error")?;
                Self::try_from(wide).map_err(|_| "value out of range".to_owned())
            }
            fn show(&self) -> String {
                self.to_string()
            }
        }
    )*};
}
number!(i64, u64, u32, usize);

impl Value for Duration {
    const KIND: Kind = Kind::Duration;
    fn parse(text: &str) -> Result<Self, String> {
        parse_duration(text).ok_or_else(|| "parse error".to_owned())
    }
    fn show(&self) -> String {
        show_duration(*self)
    }
}

impl Value for Vec<String> {
    const KIND: Kind = Kind::List;
    fn parse(text: &str) -> Result<Self, String> {
        Ok(split_list(text).map(str::to_owned).collect())
    }
    fn show(&self) -> String {
        self.join(",")
    }
}

impl Value for Vec<Url> {
    const KIND: Kind = Kind::List;
    fn parse(text: &str) -> Result<Self, String> {
        let mut urls = split_list(text).map(Url::parse).collect::<Result<Self, _>>()?;
        urls.sort();
        urls.dedup();
        Ok(urls)
    }
    fn show(&self) -> String {
        self.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
    }
}

/// The parts of a comma separated list without surrounding blanks; empty text is an empty list.
fn split_list(text: &str) -> impl Iterator<Item = &str> {
    text.split(',').map(str::trim).filter(|part| !part.is_empty())
}

/// Parses an integer as Go does with base 0: `0x`, `0o`, `0b`, a leading `0` for octal, and `_`
/// between digits.
fn parse_integer(text: &str) -> Option<i128> {
    let (negative, digits) = match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    let lower = digits.to_ascii_lowercase();
    let (radix, body) = match lower.get(..2) {
        Some("0x") => (16, &lower[2..]),
        Some("0o") => (8, &lower[2..]),
        Some("0b") => (2, &lower[2..]),
        Some(_) if lower.starts_with('0') => (8, &lower[1..]),
        _ => (10, lower.as_str()),
    };
    if body.is_empty() || body.starts_with(['+', '-']) || body.ends_with('_') {
        return None;
    }
    let value = i128::from_str_radix(&body.replace('_', ""), radix).ok()?;
    Some(if negative { -value } else { value })
}

/// Parses Go duration text: `0`, or decimal numbers each with a unit. Negative durations mean
/// nothing to any of our flags and are refused.
#[must_use]
pub fn parse_duration(text: &str) -> Option<Duration> {
    let mut rest = text.strip_prefix('+').unwrap_or(text);
    if rest == "0" {
        return Some(Duration::ZERO);
    }
    if rest.is_empty() {
        return None;
    }
    let mut nanos: u128 = 0;
    while !rest.is_empty() {
        let number_len = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let (number, tail) = rest.split_at(number_len);
        let unit_len = tail.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(tail.len());
        let (unit, after) = tail.split_at(unit_len);
        nanos = nanos.checked_add(scaled(number, unit_nanos(unit)?)?)?;
        rest = after;
    }
    u64::try_from(nanos).ok().filter(|nanos| *nanos <= i64::MAX as u64).map(Duration::from_nanos)
}

/// Decimal text times a whole scale, cut to whole units.
fn scaled(number: &str, scale: u128) -> Option<u128> {
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() && fraction.is_empty() || fraction.contains('.') {
        return None;
    }
    // More digits than a nanosecond of an hour needs add nothing and could overflow.
    let fraction = &fraction[..fraction.len().min(15)];
    let mut total = match whole {
        "" => 0,
        digits => digits.parse::<u64>().ok().map(u128::from)?.checked_mul(scale)?,
    };
    if !fraction.is_empty() {
        let power = 10u128.pow(u32::try_from(fraction.len()).ok()?);
        total += fraction.parse::<u128>().ok()?.checked_mul(scale)? / power;
    }
    Some(total)
}

fn unit_nanos(unit: &str) -> Option<u128> {
    Some(match unit {
        "ns" => 1,
        "us" | "\u{b5}s" | "\u{3bc}s" => 1_000,
        "ms" => 1_000_000,
        "s" => 1_000_000_000,
        "m" => 60_000_000_000,
        "h" => 3_600_000_000_000,
        _ => return None,
    })
}

/// Go's text of a duration: `10m0s`, `1.5s`, `100ms`.
#[must_use]
pub fn show_duration(duration: Duration) -> String {
    let nanos = duration.as_nanos();
    if nanos == 0 {
        return "0s".to_owned();
    }
    if nanos < 1_000_000_000 {
        let (scale, unit) = match nanos {
            0..1_000 => (1, "ns"),
            1_000..1_000_000 => (1_000, "\u{b5}s"),
            _ => (1_000_000, "ms"),
        };
        return format!("{}{unit}", decimal(nanos, scale));
    }
    let (hours, minutes) = (nanos / 3_600_000_000_000, nanos / 60_000_000_000 % 60);
    let seconds = decimal(nanos % 60_000_000_000, 1_000_000_000);
    match (hours, minutes) {
        (0, 0) => format!("{seconds}s"),
        (0, _) => format!("{minutes}m{seconds}s"),
        _ => format!("{hours}h{minutes}m{seconds}s"),
    }
}

/// `value / scale` with as many decimals as are not zero; `scale` is a power of ten.
fn decimal(value: u128, scale: u128) -> String {
    let (whole, part) = (value / scale, value % scale);
    if part == 0 {
        return whole.to_string();
    }
    let digits = scale.ilog10() as usize;
    let fraction = format!("{part:0digits$}");
    format!("{whole}.{}", fraction.trim_end_matches('0'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_follow_go() {
        let cases = [
            ("0", 0),
            ("5s", 5_000_000_000),
            ("1m30s", 90_000_000_000),
            ("100ms", 100_000_000),
            ("1.5h", 5_400_000_000_000),
            (".5s", 500_000_000),
            ("1h0m0.25s", 3_600_250_000_000),
            ("7us", 7_000),
            ("0s", 0),
        ];
        for (text, nanos) in cases {
            assert_eq!(parse_duration(text), Some(Duration::from_nanos(nanos)), "{text}");
        }
        for bad in ["", "+", "5", "s", "-1s", "1x", "1.2.3s", ".s", "1s2", "99999999999h", "five"] {
            assert_eq!(parse_duration(bad), None, "{bad}");
        }
    }

    #[test]
    fn durations_are_shown_as_go_shows_them() {
        let cases =
            [(600_000, "10m0s"), (1_500, "1.5s"), (100, "100ms"), (7_200_000, "2h0m0s"), (0, "0s")];
        for (millis, text) in cases {
            assert_eq!(show_duration(Duration::from_millis(millis)), text);
        }
        assert_eq!(show_duration(Duration::from_nanos(1_500)), "1.5\u{b5}s");
    }

    #[test]
    fn numbers_follow_go_with_base_zero() {
        let cases = [("10", 10), ("0x10", 16), ("010", 8), ("0b11", 3), ("1_000", 1000), ("0", 0)];
        for (text, value) in cases {
            assert_eq!(u64::parse(text), Ok(value), "{text}");
        }
        assert_eq!(i64::parse("-1"), Ok(-1));
        for bad in ["", "-", "ten", "1.5", "0x", "--1", "1_"] {
            assert!(i64::parse(bad).is_err(), "{bad}");
        }
        assert!(u32::parse("4294967296").is_err());
        assert!(u64::parse("-1").is_err());
    }

    #[test]
    fn lists_drop_blanks_and_empty_parts() {
        assert_eq!(Vec::<String>::parse(" a, b,,c "), Ok(vec!["a".into(), "b".into(), "c".into()]));
        assert_eq!(Vec::<String>::parse(""), Ok(vec![]));
    }
}
