//! The command language of the golden scripts: words, options `name=value`, and nested transactions
//! `txn if(mod(a)=0) then(put a 1; range a) else(range a)`. Words may be quoted; `\0`, `\n`, `\xNN`
//! are escapes. It only builds requests; `client` sends them.

use bytes::Bytes;
use kelson_api::etcdserverpb::{
    Compare, DeleteRangeRequest, PutRequest, RangeRequest, RequestOp, TxnRequest,
    WatchCreateRequest,
    compare::{CompareResult, CompareTarget, TargetUnion},
    range_request::{SortOrder, SortTarget},
    request_op::Request,
};

/// Words of a line. Brackets, `;` and `,` stand alone outside quotes.
pub fn words(line: &str) -> Vec<Word> {
    let mut found = Vec::new();
    let mut chars = line.chars().peekable();
    let mut current: Option<Vec<u8>> = None;
    while let Some(c) = chars.next() {
        match c {
            ' ' | '\t' => found.extend(current.take().map(Word::Text)),
            '(' | ')' | ';' | ',' => {
                found.extend(current.take().map(Word::Text));
                found.push(Word::Mark(c));
            }
            '"' => {
                let text = current.get_or_insert_default();
                while let Some(c) = chars.next() {
                    match c {
                        '"' => break,
                        '\\' => escape(&mut chars, text),
                        other => text.extend(other.to_string().as_bytes()),
                    }
                }
            }
            '\\' => escape(&mut chars, current.get_or_insert_default()),
            other => current.get_or_insert_default().extend(other.to_string().as_bytes()),
        }
    }
    found.extend(current.take().map(Word::Text));
    found
}

fn escape(chars: &mut std::iter::Peekable<std::str::Chars<'_>>, out: &mut Vec<u8>) {
    match chars.next().expect("an escape needs a character") {
        '0' => out.push(0),
        'n' => out.push(b'\n'),
        'x' => {
            let digits: String = chars.by_ref().take(2).collect();
            out.push(u8::from_str_radix(&digits, 16).expect("\\x needs two hex digits"));
        }
        other => out.extend(other.to_string().as_bytes()),
    }
}

/// One token of a script line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Word {
    /// A word, unescaped.
    Text(Vec<u8>),
    /// One of `( ) ; ,`.
    Mark(char),
}

/// Reads the words of one command.
pub struct Words {
    words: std::collections::VecDeque<Word>,
}

impl Words {
    /// Splits a line.
    pub fn new(line: &str) -> Words {
        Words { words: words(line).into() }
    }

    /// True when nothing is left.
    pub fn is_empty(&self) -> bool {
        self.words.is_empty()
    }

    /// The next word if it is plain text.
    pub fn text(&mut self) -> Option<Vec<u8>> {
        match self.words.front() {
            Some(Word::Text(_)) => match self.words.pop_front() {
                Some(Word::Text(text)) => Some(text),
                _ => unreachable!("the front was looked at"),
            },
            _ => None,
        }
    }

    /// The next word as a string.
    pub fn string(&mut self) -> Option<String> {
        self.text().map(|text| String::from_utf8(text).expect("option words are UTF-8"))
    }

    /// The next word as bytes for a key or value; empty when missing.
    pub fn bytes(&mut self) -> Bytes {
        self.text().unwrap_or_default().into()
    }

    /// The next word as a number.
    pub fn number(&mut self) -> i64 {
        let word = self.string().expect("a number is missing");
        word.parse().unwrap_or_else(|_| panic!("{word:?} is no number"))
    }

    /// Takes the mark if it is next.
    pub fn mark(&mut self, mark: char) -> bool {
        let next = self.words.front() == Some(&Word::Mark(mark));
        if next {
            self.words.pop_front();
        }
        next
    }

    fn expect_mark(&mut self, mark: char) {
        assert!(self.mark(mark), "{mark:?} expected before {:?}", self.words);
    }

    /// A positional word that is not an option (`name=value` or a known flag).
    pub fn positional(&mut self) -> Option<Bytes> {
        match self.words.front() {
            Some(Word::Text(text)) if !is_option(text) => Some(self.bytes()),
            _ => None,
        }
    }
}

const FLAGS: [&str; 11] = [
    "prev_kv",
    "ignore_value",
    "ignore_lease",
    "serializable",
    "keys_only",
    "count_only",
    "physical",
    "keys",
    "fragment",
    "progress_notify",
    "learner",
];

const OPTIONS: [&str; 16] = [
    "limit",
    "rev",
    "order",
    "target",
    "min_mod",
    "max_mod",
    "min_create",
    "max_create",
    "lease",
    "id",
    "from",
    "filters",
    "n",
    "alarm",
    "member",
    "repeat",
];

fn is_option(word: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(word) else { return false };
    FLAGS.contains(&text) || text.split_once('=').is_some_and(|(name, _)| OPTIONS.contains(&name))
}

/// `name=value` or a bare flag (value empty).
pub fn option(word: &str) -> (&str, &str) {
    word.split_once('=').unwrap_or((word, ""))
}

fn int(value: &str) -> i64 {
    value.parse().unwrap_or_else(|_| panic!("{value:?} is no number"))
}

/// `range KEY [END] [options]`.
pub fn range(words: &mut Words) -> RangeRequest {
    let key = words.bytes();
    let range_end = words.positional().unwrap_or_default();
    let mut request = RangeRequest { key, range_end, ..Default::default() };
    while let Some(word) = words.string() {
        let (name, value) = option(&word);
        match name {
            "limit" => request.limit = int(value),
            "rev" => request.revision = int(value),
            "order" => {
                request.sort_order = SortOrder::from_str_name(value)
                    .map_or_else(|| int(value) as i32, |order| order as i32);
            }
            "target" => {
                request.sort_target = SortTarget::from_str_name(value)
                    .map_or_else(|| int(value) as i32, |target| target as i32);
            }
            "serializable" => request.serializable = true,
            "keys_only" => request.keys_only = true,
            "count_only" => request.count_only = true,
            "min_mod" => request.min_mod_revision = int(value),
            "max_mod" => request.max_mod_revision = int(value),
            "min_create" => request.min_create_revision = int(value),
            "max_create" => request.max_create_revision = int(value),
            other => panic!("range knows no option {other:?}"),
        }
    }
    request
}

/// `put KEY [VALUE] [options]`; `repeat=N` makes the value N times as long.
pub fn put(words: &mut Words) -> PutRequest {
    let key = words.bytes();
    let value = words.positional().unwrap_or_default();
    let mut request = PutRequest { key, value, ..Default::default() };
    while let Some(word) = words.string() {
        let (name, value) = option(&word);
        match name {
            "lease" => request.lease = int(value),
            "prev_kv" => request.prev_kv = true,
            "ignore_value" => request.ignore_value = true,
            "ignore_lease" => request.ignore_lease = true,
            "repeat" => request.value = request.value.repeat(int(value) as usize).into(),
            other => panic!("put knows no option {other:?}"),
        }
    }
    request
}

/// `del KEY [END] [prev_kv]`.
pub fn delete(words: &mut Words) -> DeleteRangeRequest {
    let key = words.bytes();
    let range_end = words.positional().unwrap_or_default();
    let mut request = DeleteRangeRequest { key, range_end, prev_kv: false };
    while let Some(word) = words.string() {
        match word.as_str() {
            "prev_kv" => request.prev_kv = true,
            other => panic!("del knows no option {other:?}"),
        }
    }
    request
}

/// The rest of `w STREAM create KEY [END] [options]`.
pub fn watch_create(words: &mut Words) -> WatchCreateRequest {
    let key = words.positional().unwrap_or_default();
    let range_end = words.positional().unwrap_or_default();
    let mut request = WatchCreateRequest { key, range_end, ..Default::default() };
    while let Some(word) = words.string() {
        let (name, value) = option(&word);
        let number = || value.parse::<i64>().expect("the option takes a number");
        match name {
            "from" => request.start_revision = number(),
            "id" => request.watch_id = number(),
            "prev_kv" => request.prev_kv = true,
            "fragment" => request.fragment = true,
            "progress_notify" => request.progress_notify = true,
            "filters" => {
                request.filters = value
                    .split('+')
                    .map(|filter| match filter {
                        "noput" => 0,
                        "nodelete" => 1,
                        other => other.parse().expect("noput, nodelete or a number"),
                    })
                    .collect();
            }
            other => panic!("create knows no option {other:?}"),
        }
    }
    request
}

/// `txn [if(compare, ...)] [then(op; ...)] [else(op; ...)]`.
pub fn txn(words: &mut Words) -> TxnRequest {
    let mut request = TxnRequest::default();
    while let Some(part) = words.string() {
        words.expect_mark('(');
        match part.as_str() {
            "if" => request.compare = compares(words),
            "then" => request.success = ops(words),
            "else" => request.failure = ops(words),
            other => panic!("txn knows no part {other:?}"),
        }
    }
    request
}

fn compares(words: &mut Words) -> Vec<Compare> {
    let mut found = Vec::new();
    while !words.mark(')') {
        if words.mark(',') {
            continue;
        }
        found.push(compare(words));
    }
    found
}

/// `target(KEY [END]) OP VALUE`; `OP` one of `= != < >` or `op=N` for an enum value of one's own.
/// `nothing` as value sends no operand.
fn compare(words: &mut Words) -> Compare {
    let name = words.string().expect("a compare names its target");
    words.expect_mark('(');
    let key = words.bytes();
    let range_end = words.bytes();
    words.expect_mark(')');
    let op = words.string().expect("a compare has an operator");
    let result = match op.as_str() {
        "=" => CompareResult::Equal as i32,
        "!=" => CompareResult::NotEqual as i32,
        "<" => CompareResult::Less as i32,
        ">" => CompareResult::Greater as i32,
        other => int(other.strip_prefix("op=").expect("operator is = != < > or op=N")) as i32,
    };
    let operand = words.text().expect("a compare has an operand");
    // `version/value` compares the version but sends an operand of another kind.
    let (target, kind) = name.split_once('/').unwrap_or((&name, &name));
    let target = match target {
        "version" => CompareTarget::Version as i32,
        "create" => CompareTarget::Create as i32,
        "mod" => CompareTarget::Mod as i32,
        "value" => CompareTarget::Value as i32,
        "lease" => CompareTarget::Lease as i32,
        other => int(other) as i32,
    };
    let number = || int(std::str::from_utf8(&operand).expect("a number is UTF-8"));
    let target_union = match kind {
        _ if operand == b"nothing" => None,
        "version" => Some(TargetUnion::Version(number())),
        "create" => Some(TargetUnion::CreateRevision(number())),
        "mod" => Some(TargetUnion::ModRevision(number())),
        "lease" => Some(TargetUnion::Lease(number())),
        _ => Some(TargetUnion::Value(operand.clone().into())),
    };
    Compare { result, target, key, range_end, target_union }
}

fn ops(words: &mut Words) -> Vec<RequestOp> {
    let mut found = Vec::new();
    let mut inner: std::collections::VecDeque<Word> = Default::default();
    let mut depth = 0;
    loop {
        let word = words.words.pop_front().expect("a bracket is not closed");
        match word {
            Word::Mark(')') if depth == 0 => {
                push_op(&mut found, inner);
                return found;
            }
            Word::Mark(';') if depth == 0 => {
                push_op(&mut found, std::mem::take(&mut inner));
                continue;
            }
            Word::Mark('(') => depth += 1,
            Word::Mark(')') => depth -= 1,
            _ => {}
        }
        inner.push_back(word);
    }
}

fn push_op(found: &mut Vec<RequestOp>, words: std::collections::VecDeque<Word>) {
    let mut words = Words { words };
    let Some(name) = words.string() else { return };
    // `each N put k%` writes many operations in one line; `%` is replaced by 0..N.
    if name == "each" {
        let times = words.number();
        for i in 0..times {
            let one = words.words.iter().map(|word| number_word(word, i)).collect();
            push_op(found, one);
        }
        return;
    }
    let request = match name.as_str() {
        "range" => Some(Request::RequestRange(range(&mut words))),
        "put" => Some(Request::RequestPut(put(&mut words))),
        "del" => Some(Request::RequestDeleteRange(delete(&mut words))),
        "txn" => Some(Request::RequestTxn(txn(&mut words))),
        "empty" => None,
        other => panic!("no operation is named {other:?}"),
    };
    found.push(RequestOp { request });
}

fn number_word(word: &Word, i: i64) -> Word {
    match word {
        Word::Mark(mark) => Word::Mark(*mark),
        Word::Text(text) => {
            let digits = i.to_string();
            let mut out = Vec::new();
            for byte in text {
                if *byte == b'%' { out.extend(digits.as_bytes()) } else { out.push(*byte) }
            }
            Word::Text(out)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nested_transactions_parse() {
        let mut words = Words::new(
            r#"txn if(mod(a) = 0, value("b") != "x;y") then(put a 1; txn then(del b c prev_kv)) else(range a \0 limit=2)"#,
        );
        words.string();
        let request = txn(&mut words);
        assert_eq!(request.compare.len(), 2);
        assert_eq!(request.success.len(), 2);
        let Some(Request::RequestTxn(inner)) = &request.success[1].request else { panic!() };
        assert_eq!(inner.success.len(), 1);
        let Some(Request::RequestRange(range)) = &request.failure[0].request else { panic!() };
        assert_eq!((range.range_end.as_ref(), range.limit), (&b"\0"[..], 2));
    }
}
