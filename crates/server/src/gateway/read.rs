//! Reads JSON as messages, by the rules of protobuf's JSON mapping and the options that etcd sets for
//! its gateway: names as in the .proto files or in camel case, 64-bit numbers as text or number,
//! enums by name or number, unknown fields passed over. It is own code because clients see what is
//! wrong in the words of protobuf for Go, with the place. The grammar was checked by `values`.

use std::collections::BTreeSet;

use base64::Engine;
use base64::alphabet;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use bytes::Bytes;
use prost_reflect::prost::Message;
use prost_reflect::{
    Cardinality, DynamicMessage, EnumDescriptor, FieldDescriptor, Kind, MessageDescriptor, Value,
};
use tonic::Status;

/// Messages within one another: the services read a hundred below the outermost one.
const DEPTH_MAX: usize = 101;

/// Reads one JSON value as this message, and gives its bytes.
///
/// # Errors
/// InvalidArgument, with the place of the fault.
pub(crate) fn to_protobuf(message: &MessageDescriptor, value: &[u8]) -> Result<Bytes, Status> {
    let mut reader = Reader { text: value, at: 0, depth: 0 };
    match reader.message(message) {
        Ok(message) => Ok(message.encode_to_vec().into()),
        Err(fault) => Err(Status::invalid_argument(format!("proto: {fault}"))),
    }
}

/// A token: a scalar as it is written, or the mark that begins or ends something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Token<'a> {
    text: &'a [u8],
    at: usize,
}

impl Token<'_> {
    fn is(&self, text: &[u8]) -> bool {
        self.text == text
    }

    fn shown(&self) -> String {
        String::from_utf8_lossy(self.text).into_owned()
    }
}

struct Reader<'a> {
    text: &'a [u8],
    at: usize,
    depth: usize,
}

impl<'a> Reader<'a> {
    /// The next token. Marks that only separate (`:` and `,`) are passed over.
    fn next(&mut self) -> Token<'a> {
        let skipped = |byte: &&u8| matches!(**byte, b' ' | b'\t' | b'\r' | b'\n' | b',' | b':');
        self.at += self.text[self.at..].iter().take_while(skipped).count();
        let start = self.at;
        let rest = &self.text[start..];
        let len = match rest.first() {
            None => 0,
            Some(b'{' | b'}' | b'[' | b']') => 1,
            Some(b'"') => string_len(rest),
            Some(_) => {
                let ends = |byte: &u8| {
                    matches!(byte, b' ' | b'\t' | b'\r' | b'\n' | b',' | b':' | b'}' | b']')
                };
                rest.iter().position(ends).unwrap_or(rest.len())
            }
        };
        self.at += len;
        Token { text: &rest[..len], at: start }
    }

    /// The next token, which will be read again.
    fn peek(&mut self) -> Token<'a> {
        let before = self.at;
        let token = self.next();
        self.at = before;
        token
    }

    /// Passes over a whole value, however deep.
    fn skip(&mut self) {
        let mut open = 0usize;
        loop {
            let token = self.next();
            match token.text {
                b"{" | b"[" => open += 1,
                b"}" | b"]" => open = open.saturating_sub(1),
                _ => {}
            }
            if open == 0 || token.text.is_empty() {
                return;
            }
        }
    }

    /// A place as clients are told it: lines and characters from 1 on.
    fn place(&self, at: usize) -> String {
        let before = &self.text[..at];
        let line = before.iter().filter(|byte| **byte == b'\n').count() + 1;
        let start = before.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
        let column = String::from_utf8_lossy(&before[start..]).chars().count() + 1;
        format!("(line {line}:{column})")
    }

    fn fault(&self, token: Token<'_>, text: &str) -> String {
        format!("{}: {text}", self.place(token.at))
    }

    fn unexpected(&self, token: Token<'_>) -> String {
        format!("syntax error {}: unexpected token {}", self.place(token.at), token.shown())
    }

    fn message(&mut self, descriptor: &MessageDescriptor) -> Result<DynamicMessage, String> {
        let start = self.next();
        if !start.is(b"{") {
            return Err(self.unexpected(start));
        }
        if self.depth >= DEPTH_MAX {
            return Err("exceeded max recursion depth".to_owned());
        }
        self.depth += 1;
        let mut message = DynamicMessage::new(descriptor.clone());
        let (mut fields, mut oneofs) = (BTreeSet::new(), BTreeSet::new());
        loop {
            let name = self.next();
            if name.is(b"}") || name.text.is_empty() {
                break;
            }
            let text = self.string(name)?;
            let field = descriptor.get_field_by_json_name(&text);
            let Some(field) = field.or_else(|| descriptor.get_field_by_name(&text)) else {
                self.skip();
                continue;
            };
            if !fields.insert(field.number()) {
                return Err(self.fault(name, &format!("duplicate field {}", name.shown())));
            }
            if self.peek().is(b"null") {
                self.skip();
                continue;
            }
            if let Some(oneof) = field.containing_oneof()
                && !oneofs.insert(oneof.full_name().to_owned())
            {
                let (shown, oneof) = (name.shown(), oneof.full_name());
                let fault = format!("error parsing {shown}, oneof {oneof} is already set");
                return Err(self.fault(name, &fault));
            }
            if let Some(value) = self.field(&field)? {
                message.set_field(&field, value);
            }
        }
        self.depth -= 1;
        Ok(message)
    }

    /// The value of a field; `None` for a name of an enum that nobody knows.
    fn field(&mut self, field: &FieldDescriptor) -> Result<Option<Value>, String> {
        if field.cardinality() != Cardinality::Repeated {
            return self.one(field);
        }
        let start = self.next();
        if !start.is(b"[") {
            return Err(self.unexpected(start));
        }
        let mut values = Vec::new();
        while !matches!(self.peek().text, b"]" | b"") {
            values.extend(self.one(field)?);
        }
        self.next();
        Ok(Some(Value::List(values)))
    }

    fn one(&mut self, field: &FieldDescriptor) -> Result<Option<Value>, String> {
        let kind = field.kind();
        if let Kind::Message(descriptor) = &kind {
            return self.message(descriptor).map(|message| Some(Value::Message(message)));
        }
        let token = self.next();
        let text = if token.text.first() == Some(&b'"') { Some(self.string(token)?) } else { None };
        let value = match &kind {
            Kind::Bool if token.is(b"true") => Some(Value::Bool(true)),
            Kind::Bool if token.is(b"false") => Some(Value::Bool(false)),
            Kind::String => text.map(Value::String),
            Kind::Bytes => text.and_then(|text| bytes_of(&text)).map(Value::Bytes),
            Kind::Int64 => {
                integer(token, text).and_then(|it| Some(Value::I64(it.try_into().ok()?)))
            }
            Kind::Uint64 => {
                integer(token, text).and_then(|it| Some(Value::U64(it.try_into().ok()?)))
            }
            Kind::Int32 => {
                integer(token, text).and_then(|it| Some(Value::I32(it.try_into().ok()?)))
            }
            Kind::Uint32 => {
                integer(token, text).and_then(|it| Some(Value::U32(it.try_into().ok()?)))
            }
            Kind::Enum(known) => match text {
                Some(name) => return Ok(named(known, &name)),
                None => integer(token, None)
                    .and_then(|number| Some(Value::EnumNumber(number.try_into().ok()?))),
            },
            // The API has fields of no other kind; a test goes through all of them.
            _ => None,
        };
        let fault = || {
            let (kind, name) = (kind_name(&kind), field.json_name());
            let fault = format!("invalid value for {kind} field {name}: {}", token.shown());
            self.fault(token, &fault)
        };
        value.map(Some).ok_or_else(fault)
    }

    /// What a string means.
    fn string(&self, token: Token<'_>) -> Result<String, String> {
        let inside = token.text.get(1..token.text.len().saturating_sub(1)).unwrap_or_default();
        let wrong = |text: &str| format!("syntax error {}: {text}", self.place(token.at));
        if !inside.contains(&b'\\') {
            let text = std::str::from_utf8(inside).map_err(|_| wrong("invalid UTF-8 in string"))?;
            return Ok(text.to_owned());
        }
        if std::str::from_utf8(inside).is_err() {
            return Err(wrong("invalid UTF-8 in string"));
        }
        // What is left are escapes without a character: half of a pair.
        serde_json::from_slice(token.text).map_err(|_| wrong("invalid escape code in string"))
    }
}

/// Length of the string that these bytes begin with, its quotes included.
fn string_len(bytes: &[u8]) -> usize {
    let mut at = 1;
    while at < bytes.len() {
        match bytes[at] {
            b'"' => return at + 1,
            b'\\' => at += 2,
            _ => at += 1,
        }
    }
    bytes.len()
}

fn named(known: &EnumDescriptor, name: &str) -> Option<Value> {
    known.get_value_by_name(name).map(|value| Value::EnumNumber(value.number()))
}

fn kind_name(kind: &Kind) -> &'static str {
    match kind {
        Kind::Bool => "bool",
        Kind::String => "string",
        Kind::Bytes => "bytes",
        Kind::Int64 => "int64",
        Kind::Uint64 => "uint64",
        Kind::Int32 => "int32",
        Kind::Uint32 => "uint32",
        Kind::Enum(_) => "enum",
        _ => "unknown",
    }
}

/// Bytes in base64, of either alphabet, with or without padding.
fn bytes_of(text: &str) -> Option<Bytes> {
    let is_url = text.contains(['-', '_']);
    let padding = match text.len() % 4 {
        0 => DecodePaddingMode::RequireCanonical,
        _ => DecodePaddingMode::RequireNone,
    };
    let config = GeneralPurposeConfig::new()
        .with_decode_allow_trailing_bits(true)
        .with_decode_padding_mode(padding);
    let alphabet = if is_url { &alphabet::URL_SAFE } else { &alphabet::STANDARD };
    GeneralPurpose::new(alphabet, config).decode(text).ok().map(Bytes::from)
}

/// A whole number, as a number or in a string; `1.0` and `1e3` are whole, too.
fn integer(token: Token<'_>, text: Option<String>) -> Option<i128> {
    let number = match &text {
        Some(text) => text.as_str(),
        None => std::str::from_utf8(token.text).ok()?,
    };
    let (sign, digits) = match number.strip_prefix('-') {
        Some(digits) => (-1, digits),
        None => (1, number),
    };
    let (digits, exponent) = match digits.split_once(['e', 'E']) {
        Some((digits, exponent)) => {
            let unsigned = exponent.strip_prefix(['+', '-']).unwrap_or(exponent);
            if !is_digits(unsigned) {
                return None;
            }
            (digits, exponent.parse::<i64>().ok()?)
        }
        None => (digits, 0),
    };
    let (whole, fraction) = match digits.split_once('.') {
        Some((whole, fraction)) if is_digits(fraction) => (whole, fraction),
        Some(_) => return None,
        None => (digits, ""),
    };
    if !is_digits(whole) || whole.len() > 1 && whole.starts_with('0') {
        return None;
    }
    let all = format!("{whole}{fraction}");
    let all = all.trim_start_matches('0');
    let significant = all.trim_end_matches('0');
    if significant.is_empty() {
        return Some(0);
    }
    let trimmed = i64::try_from(all.len() - significant.len()).ok()?;
    let zeros = exponent.checked_sub(i64::try_from(fraction.len()).ok()?)?.checked_add(trimmed)?;
    // Nothing longer fits into 64 bits.
    let zeros = u32::try_from(zeros).ok().filter(|zeros| *zeros < 20)?;
    if significant.len() > 20 {
        return None;
    }
    // Twenty digits with nineteen zeros are too much even here.
    significant.parse::<i128>().ok()?.checked_mul(sign * 10i128.pow(zeros))
}

fn is_digits(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit())
}

#[cfg(test)]
mod tests {
    use super::super::{json, routes};
    use super::*;

    /// What becomes of a request that is read and shown again.
    fn again(path: &str, text: &str) -> Result<String, String> {
        let route = routes::find(path).expect("a route");
        let bytes = to_protobuf(&route.input, text.as_bytes());
        let bytes = bytes.map_err(|status| status.message().to_owned())?;
        Ok(json::to_json(&route.input, bytes).expect("shown"))
    }

    #[test]
    fn names_numbers_and_bytes_are_read_in_all_their_forms() {
        for (text, expected) in [
            (r#"{"key":"YQ==","range_end":"Yg"}"#, r#"{"key":"YQ==","range_end":"Yg=="}"#),
            (r#"{"rangeEnd":"-_8="}"#, r#"{"range_end":"+/8="}"#),
            (r#"{"limit":"3","revision":4}"#, r#"{"limit":"3","revision":"4"}"#),
            (r#"{"limit":3.0,"sort_order":2}"#, r#"{"limit":"3","sort_order":"DESCEND"}"#),
            (r#"{"limit":"12e2","revision":-1500E-2}"#, r#"{"limit":"1200","revision":"-15"}"#),
            (r#"{"sort_order":"NONE","keys_only":false,"limit":0}"#, "{}"),
            (r#"{"sort_order":"UPWARDS","limit":1}"#, r#"{"limit":"1"}"#),
            (r#"{"sort_target":7,"nothing":{"x":[1,"}"]},"key":null}"#, r#"{"sort_target":7}"#),
            (r#"{"limit":"-9223372036854775808"}"#, r#"{"limit":"-9223372036854775808"}"#),
            (" { \"key\" :\n\"YQ\\u003d\\u003d\" } ", r#"{"key":"YQ=="}"#),
        ] {
            assert_eq!(again("kv/range", text).as_deref(), Ok(expected), "{text}");
        }
        let txn = r#"{"compare":[{"result":"NOT_EQUAL","target":"LEASE","key":"YQ==","lease":"0"}],
                     "success":[{"request_txn":{"failure":[{"requestPut":{"key":"Yg=="}}]}}]}"#;
        let shown = "{\"compare\":[{\"result\":\"NOT_EQUAL\",\"target\":\"LEASE\",\"key\":\"YQ==\",\
                     \"lease\":\"0\"}],\"success\":[{\"request_txn\":{\"failure\":[{\"request_put\":\
                     {\"key\":\"Yg==\"}}]}}]}";
        assert_eq!(again("kv/txn", txn).as_deref(), Ok(shown));
    }

    /// Beyond what tests/scripts/gateway/errors records.
    #[test]
    fn what_is_not_the_message_is_refused_with_its_place() {
        for (text, expected) in [
            ("{\n \"key\": 1}", "proto: (line 2:9): invalid value for bytes field key: 1"),
            (
                "{\"nothing\":\"\u{e4}\",\"limit\":\"1 \"}",
                "proto: (line 1:24): invalid value for int64 field limit: \"1 \"",
            ),
            (
                "{\"limit\":99999999999999999999e19}",
                "proto: (line 1:10): invalid value for int64 field limit: 99999999999999999999e19",
            ),
            ("{\"limit\":1e400}", "proto: (line 1:10): invalid value for int64 field limit: 1e400"),
            (
                "{\"limit\":\"01\"}",
                "proto: (line 1:10): invalid value for int64 field limit: \"01\"",
            ),
            (
                "{\"key\":\"\\ud800\"}",
                "proto: syntax error (line 1:8): invalid escape code in string",
            ),
        ] {
            assert_eq!(again("kv/range", text), Err(expected.to_owned()), "{text}");
        }
        let latin =
            to_protobuf(&routes::nth(0).input, b"{\"key\":\"\xe4\"}").expect_err("no UTF-8");
        assert!(latin.message().ends_with("invalid UTF-8 in string"), "{latin}");
        let nested = |levels: usize| {
            let level = "{\"success\":[{\"request_txn\":".repeat(levels);
            format!("{level}{{}}{}", "}]}".repeat(levels))
        };
        assert_eq!(again("kv/txn", &nested(50)), Ok(nested(50)), "as deep as the services read");
        let too_deep = again("kv/txn", &nested(51));
        assert_eq!(too_deep, Err("proto: exceeded max recursion depth".to_owned()));
        let deep = "{\"success\":[{\"request_txn\":".repeat(100);
        assert_eq!(again("kv/txn", &deep), Err("proto: exceeded max recursion depth".to_owned()));
    }

    #[test]
    fn every_kind_of_field_can_be_read() {
        let pool = routes::nth(0).input.parent_pool();
        let messages = pool.all_messages().filter(|message| !message.is_map_entry());
        for field in messages.flat_map(|message| message.fields().collect::<Vec<_>>()) {
            let is_message = matches!(field.kind(), Kind::Message(_));
            assert!(is_message || kind_name(&field.kind()) != "unknown", "{}", field.full_name());
        }
    }
}
