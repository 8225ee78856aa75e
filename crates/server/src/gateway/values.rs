//! Cuts a stream of bytes into JSON values, and says what is wrong with one that is none in the words
//! of Go's decoder, since those are what etcd's clients get to see. It checks the grammar only; what
//! a value means is the business of `json`. It holds one value at most, up to a limit.

use bytes::{Bytes, BytesMut};

/// Arrays and objects within one another. Source: Go's decoder.
const DEPTH_MAX: usize = 10_000;

/// Why there is no further value.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Malformed {
    /// A byte that may not stand where it stands.
    #[error("invalid character {} {}", quoted(*.byte), .place)]
    Byte {
        /// The byte.
        byte: u8,
        /// Where it stands.
        place: &'static str,
    },
    /// The stream ends within a value.
    #[error("unexpected EOF")]
    Cut,
    /// More than [`DEPTH_MAX`].
    #[error("exceeded max depth")]
    TooDeep,
    /// More bytes than the limit.
    #[error("grpc: received message larger than max ({0} vs. {1})")]
    TooLarge(usize, usize),
}

/// A byte as Go shows it in such messages.
fn quoted(byte: u8) -> String {
    match byte {
        b'\'' => r"'\''".to_owned(),
        b'"' => "'\"'".to_owned(),
        b'\\' => r"'\\'".to_owned(),
        0x07 => r"'\a'".to_owned(),
        0x08 => r"'\b'".to_owned(),
        b'\t' => r"'\t'".to_owned(),
        b'\n' => r"'\n'".to_owned(),
        0x0b => r"'\v'".to_owned(),
        0x0c => r"'\f'".to_owned(),
        b'\r' => r"'\r'".to_owned(),
        0..0x20 | 0x7f => format!("'\\x{byte:02x}'"),
        // Read as a character of Latin-1; those that do not print are shown by number.
        0x80..=0xa0 | 0xad => format!("'\\u{byte:04x}'"),
        _ => format!("'{}'", char::from(byte)),
    }
}

const BEGIN_VALUE: &str = "looking for beginning of value";
const BEGIN_KEY: &str = "looking for beginning of object key string";

/// What may come next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    Value,
    ValueOrEnd,
    Key,
    KeyOrEnd,
    Colon,
    CommaOrEnd,
    InString,
    Escape,
    /// Hexadecimal digits that are missing.
    Hex(u8),
    /// The rest of `true`, `false` or `null`, and how much of it was read.
    Literal(&'static [u8], usize),
    /// A minus was read.
    Minus,
    /// A zero: no digit may follow.
    Zero,
    Digits,
    Point,
    Fraction,
    Exponent,
    ExponentSign,
    ExponentDigits,
}

/// An array or object that is open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Open {
    Array,
    /// In front of the colon.
    Key,
    /// Behind the colon.
    Member,
}

/// The cutter.
pub(crate) struct Values {
    bytes: BytesMut,
    /// Bytes of `bytes` that were looked at.
    seen: usize,
    next: Next,
    open: Vec<Open>,
    is_begun: bool,
    bytes_max: usize,
}

impl Values {
    /// Values of `bytes_max` bytes at most.
    pub(crate) fn new(bytes_max: usize) -> Self {
        Self {
            bytes: BytesMut::new(),
            seen: 0,
            next: Next::Value,
            open: Vec::new(),
            is_begun: false,
            bytes_max,
        }
    }

    /// Takes more of the stream.
    pub(crate) fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// The next whole value; `None` if more bytes are needed for it.
    ///
    /// # Errors
    /// What follows is no value. The stream is to be given up then.
    pub(crate) fn next(&mut self) -> Result<Option<Bytes>, Malformed> {
        while let Some(&byte) = self.bytes.get(self.seen) {
            if !self.is_begun {
                if is_space(byte) {
                    self.bytes = self.bytes.split_off(1);
                    continue;
                }
                self.is_begun = true;
            }
            if self.open.is_empty() && self.is_number_over(byte) {
                // A number ends only with what follows it, which must not touch it.
                if is_space(byte) {
                    return Ok(Some(self.cut()));
                }
                return Err(Malformed::Byte { byte, place: self.place_behind_number() });
            }
            self.seen += 1;
            if self.seen > self.bytes_max {
                return Err(Malformed::TooLarge(self.bytes.len(), self.bytes_max));
            }
            if self.step(byte)? {
                return Ok(Some(self.cut()));
            }
        }
        Ok(None)
    }

    /// The value that the end of the stream ends.
    ///
    /// # Errors
    /// It is not whole.
    pub(crate) fn end(&mut self) -> Result<Option<Bytes>, Malformed> {
        if let Some(value) = self.next()? {
            return Ok(Some(value));
        }
        if !self.is_begun {
            return Ok(None);
        }
        if self.open.is_empty() && self.is_number_over(b' ') {
            return Ok(Some(self.cut()));
        }
        Err(Malformed::Cut)
    }

    fn cut(&mut self) -> Bytes {
        let value = self.bytes.split_to(self.seen).freeze();
        (self.seen, self.next, self.is_begun) = (0, Next::Value, false);
        value
    }

    /// Whether a number is whole that this byte does not belong to.
    fn is_number_over(&self, byte: u8) -> bool {
        match self.next {
            Next::Zero => !matches!(byte, b'.' | b'e' | b'E'),
            Next::Digits => !matches!(byte, b'0'..=b'9' | b'.' | b'e' | b'E'),
            Next::Fraction => !matches!(byte, b'0'..=b'9' | b'e' | b'E'),
            Next::ExponentDigits => !byte.is_ascii_digit(),
            _ => false,
        }
    }

    fn place_behind_number(&self) -> &'static str {
        match self.open.last() {
            None => "after top-level value",
            Some(Open::Array) => "after array element",
            Some(Open::Key) => "after object key",
            Some(Open::Member) => "after object key:value pair",
        }
    }

    /// Takes one byte of a value. True if it is the last one.
    fn step(&mut self, byte: u8) -> Result<bool, Malformed> {
        if self.is_number_over(byte) {
            self.next = Next::CommaOrEnd;
        }
        let bad = |place| Err(Malformed::Byte { byte, place });
        match self.next {
            Next::Value | Next::ValueOrEnd if is_space(byte) => {}
            Next::ValueOrEnd if byte == b']' => return Ok(self.close()),
            Next::Value | Next::ValueOrEnd => return self.begin(byte).map(|()| false),
            Next::Key | Next::KeyOrEnd | Next::Colon | Next::CommaOrEnd if is_space(byte) => {}
            Next::KeyOrEnd if byte == b'}' => return Ok(self.close()),
            Next::Key | Next::KeyOrEnd if byte == b'"' => self.next = Next::InString,
            Next::Key | Next::KeyOrEnd => return bad(BEGIN_KEY),
            Next::Colon if byte == b':' => {
                if let Some(last) = self.open.last_mut() {
                    *last = Open::Member;
                }
                self.next = Next::Value;
            }
            Next::Colon => return bad("after object key"),
            Next::CommaOrEnd => match (self.open.last_mut(), byte) {
                (Some(Open::Array), b',') => self.next = Next::Value,
                (Some(Open::Array), b']') | (Some(Open::Member), b'}') => return Ok(self.close()),
                (Some(open @ Open::Member), b',') => {
                    *open = Open::Key;
                    self.next = Next::Key;
                }
                _ => return bad(self.place_behind_number()),
            },
            Next::InString => match byte {
                b'"' => return Ok(self.whole()),
                b'\\' => self.next = Next::Escape,
                0..0x20 => return bad("in string literal"),
                _ => {}
            },
            Next::Escape => match byte {
                b'b' | b'f' | b'n' | b'r' | b't' | b'\\' | b'/' | b'"' => {
                    self.next = Next::InString
                }
                b'u' => self.next = Next::Hex(4),
                _ => return bad("in string escape code"),
            },
            Next::Hex(left) if byte.is_ascii_hexdigit() => {
                self.next = if left == 1 { Next::InString } else { Next::Hex(left - 1) };
            }
            Next::Hex(_) => return bad(r"in \u hexadecimal character escape"),
            Next::Literal(word, read) => {
                if byte != word[read] {
                    return bad(literal_place(word, read));
                }
                if read + 1 == word.len() {
                    return Ok(self.whole());
                }
                self.next = Next::Literal(word, read + 1);
            }
            _ => self.number(byte)?,
        }
        Ok(false)
    }

    fn begin(&mut self, byte: u8) -> Result<(), Malformed> {
        self.next = match byte {
            b'{' => self.nest(Open::Key, Next::KeyOrEnd)?,
            b'[' => self.nest(Open::Array, Next::ValueOrEnd)?,
            b'"' => Next::InString,
            b'-' => Next::Minus,
            b'0' => Next::Zero,
            b'1'..=b'9' => Next::Digits,
            b't' => Next::Literal(b"true", 1),
            b'f' => Next::Literal(b"false", 1),
            b'n' => Next::Literal(b"null", 1),
            _ => return Err(Malformed::Byte { byte, place: BEGIN_VALUE }),
        };
        Ok(())
    }

    fn nest(&mut self, open: Open, next: Next) -> Result<Next, Malformed> {
        if self.open.len() >= DEPTH_MAX {
            return Err(Malformed::TooDeep);
        }
        self.open.push(open);
        Ok(next)
    }

    fn number(&mut self, byte: u8) -> Result<(), Malformed> {
        let bad = |place| Err(Malformed::Byte { byte, place });
        self.next = match (self.next, byte) {
            (Next::Minus, b'0') => Next::Zero,
            (Next::Minus, b'1'..=b'9') => Next::Digits,
            (Next::Minus, _) => return bad("in numeric literal"),
            (Next::Digits, b'0'..=b'9') => Next::Digits,
            (Next::Zero | Next::Digits, b'.') => Next::Point,
            (Next::Point | Next::Fraction, b'0'..=b'9') => Next::Fraction,
            (Next::Point, _) => return bad("after decimal point in numeric literal"),
            (Next::Zero | Next::Digits | Next::Fraction, _) => Next::Exponent,
            (Next::Exponent, b'+' | b'-') => Next::ExponentSign,
            (_, b'0'..=b'9') => Next::ExponentDigits,
            _ => return bad("in exponent of numeric literal"),
        };
        Ok(())
    }

    /// A string or literal is whole. True if it was all.
    fn whole(&mut self) -> bool {
        self.next = match self.open.last() {
            None => return true,
            Some(Open::Key) => Next::Colon,
            Some(_) => Next::CommaOrEnd,
        };
        false
    }

    /// An array or object is whole. True if it was all.
    fn close(&mut self) -> bool {
        self.open.pop();
        self.next = Next::CommaOrEnd;
        self.open.is_empty()
    }
}

fn is_space(byte: u8) -> bool {
    matches!(byte, b' ' | b'\t' | b'\r' | b'\n')
}

fn literal_place(word: &[u8], read: usize) -> &'static str {
    match (word, read) {
        (b"true", 1) => "in literal true (expecting 'r')",
        (b"true", 2) => "in literal true (expecting 'u')",
        (b"true", _) => "in literal true (expecting 'e')",
        (b"false", 1) => "in literal false (expecting 'a')",
        (b"false", 2) => "in literal false (expecting 'l')",
        (b"false", 3) => "in literal false (expecting 's')",
        (b"false", _) => "in literal false (expecting 'e')",
        (_, 1) => "in literal null (expecting 'u')",
        _ => "in literal null (expecting 'l')",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All values of a text that comes in pieces of this size, and how it ends.
    fn cut(text: &[u8], size: usize) -> (Vec<String>, Option<String>) {
        let mut values = Values::new(1 << 20);
        let mut found = Vec::new();
        let mut take = |values: &mut Values, is_end: bool| loop {
            let next = if is_end { values.end() } else { values.next() };
            match next {
                Ok(Some(value)) => found.push(String::from_utf8_lossy(&value).into_owned()),
                Ok(None) => return None,
                Err(error) => return Some(error.to_string()),
            }
        };
        for piece in text.chunks(size) {
            values.push(piece);
            if let Some(error) = take(&mut values, false) {
                return (found, Some(error));
            }
        }
        let error = take(&mut values, true);
        (found, error)
    }

    #[test]
    fn values_are_found_however_the_stream_is_cut() {
        let text = b" {\"a\": [1, -2.5e+3, \"x\\\"\\u00e9{\", {}]}{}\n[]true null 12 0.5 \"s\"7";
        let whole = [
            "{\"a\": [1, -2.5e+3, \"x\\\"\\u00e9{\", {}]}",
            "{}",
            "[]",
            "true",
            "null",
            "12",
            "0.5",
            "\"s\"",
            "7",
        ];
        for size in [1, 2, 3, 7, text.len()] {
            assert_eq!(cut(text, size), (whole.map(str::to_owned).to_vec(), None), "{size}");
        }
        assert_eq!(cut(b" \n", 1), (vec![], None));
    }

    /// Recorded from etcd 3.7.3.
    #[test]
    fn faults_read_as_in_go() {
        for (text, expected) in [
            ("{", "unexpected EOF"),
            ("{\"a", "unexpected EOF"),
            ("tru", "unexpected EOF"),
            ("-", "unexpected EOF"),
            ("key=1", "invalid character 'k' looking for beginning of value"),
            ("{a:1}", "invalid character 'a' looking for beginning of object key string"),
            ("{\"a\" 1}", "invalid character '1' after object key"),
            ("{\"a\":1 \"b\"}", "invalid character '\"' after object key:value pair"),
            ("{\"a\":1,}", "invalid character '}' looking for beginning of object key string"),
            ("[1 2]", "invalid character '2' after array element"),
            ("[01]", "invalid character '1' after array element"),
            ("1x", "invalid character 'x' after top-level value"),
            ("'a'", "invalid character '\\'' looking for beginning of value"),
            ("{\"a\":nul}", "invalid character '}' in literal null (expecting 'l')"),
            ("\"\\q\"", "invalid character 'q' in string escape code"),
            ("\"\\u12g4\"", "invalid character 'g' in \\u hexadecimal character escape"),
            ("\"a\nb\"", "invalid character '\\n' in string literal"),
            ("[1.x]", "invalid character 'x' after decimal point in numeric literal"),
            ("[1e]", "invalid character ']' in exponent of numeric literal"),
            ("[-x]", "invalid character 'x' in numeric literal"),
            ("\u{e4}", "invalid character '\u{c3}' looking for beginning of value"),
        ] {
            assert_eq!(cut(text.as_bytes(), 1), (vec![], Some(expected.to_owned())), "{text}");
        }
    }

    #[test]
    fn a_value_is_limited_in_size_and_depth() {
        let mut values = Values::new(10);
        values.push(b"[1,2,3,4,5,6,7]");
        assert!(matches!(values.next(), Err(Malformed::TooLarge(..))));
        let deep = vec![b'['; DEPTH_MAX + 1];
        assert_eq!(cut(&deep, deep.len()).1.as_deref(), Some("exceeded max depth"));
    }
}
