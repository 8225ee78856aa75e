//! The JSON gateway from outside: requests over plain HTTP/1.1 and their answers as golden scripts show
//! them. Spaces between tokens are taken out, since etcd's library puts them in by chance, and what
//! differs from run to run (ids, terms, sizes, ports) is shown as `"set"`.

use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::parse::option;

/// How long a stream may be silent before it is taken for quiet.
const QUIET: Duration = Duration::from_millis(700);

/// Headers that scripts show.
const SHOWN: [&str; 8] = [
    "access-control-allow-headers",
    "access-control-allow-methods",
    "access-control-allow-origin",
    "allow",
    "content-type",
    "grpc-metadata-content-type",
    "location",
    "x-content-type-options",
];

/// Runs `[METHOD] [lines=N] [header=NAME:VALUE]... [headers] /PATH BODY`: `lines` waits for so many
/// only, `headers` shows those that count instead of the body.
pub async fn command(authority: &str, request: &str) -> Vec<String> {
    let start =
        if request.starts_with('/') { 0 } else { request.find(" /").map_or(0, |at| at + 1) };
    let (options, rest) = request.split_at(start);
    let (path, body) = rest.split_once(' ').unwrap_or((rest, ""));
    let mut wanted = Ask { method: "POST", path, headers: Vec::new(), body, lines: None };
    let mut shows_headers = false;
    for word in options.split_whitespace() {
        match option(word) {
            ("lines", count) => wanted.lines = Some(count.parse().expect("lines=N")),
            ("header", header) => wanted.headers.push(header.replacen(':', ": ", 1)),
            ("headers", _) => shows_headers = true,
            (method, _) => wanted.method = method,
        }
    }
    match ask(authority, &wanted).await {
        Ok(answer) if shows_headers => show_headers(&answer),
        Ok(answer) => show(&answer),
        Err(error) => vec![error],
    }
}

/// What one request looks like.
pub struct Ask<'a> {
    /// `POST` for all methods of the gateway.
    pub method: &'a str,
    /// Path, with its leading slash.
    pub path: &'a str,
    /// `Name: value` each.
    pub headers: Vec<String>,
    /// The body.
    pub body: &'a str,
    /// Lines of the answer to wait for; `None` waits for its end.
    pub lines: Option<usize>,
}

/// An answer, or as much of it as was asked for.
pub struct Answer {
    /// HTTP status.
    pub status: u16,
    /// Names in lower case, and values.
    pub headers: Vec<(String, String)>,
    /// The body without its transfer coding.
    pub body: Vec<u8>,
}

/// Sends a request to `authority` and reads the answer.
///
/// # Errors
/// The connection broke, or what came is no HTTP.
pub async fn ask(authority: &str, ask: &Ask<'_>) -> Result<Answer, String> {
    let explain = |error: std::io::Error| format!("connection: {error}");
    let mut stream = TcpStream::connect(authority).await.map_err(explain)?;
    let Ask { method, path, body, .. } = ask;
    let mut head = format!("{method} {path} HTTP/1.1\r\nConnection: close\r\n");
    if !ask.headers.iter().any(|header| header.to_lowercase().starts_with("host:")) {
        head.push_str(&format!("Host: {authority}\r\n"));
    }
    for header in &ask.headers {
        head.push_str(&format!("{header}\r\n"));
    }
    head.push_str(&format!("Content-Length: {}\r\n\r\n{body}", body.len()));
    stream.write_all(head.as_bytes()).await.map_err(explain)?;
    let mut bytes = Vec::new();
    loop {
        let found = parse(&bytes);
        let enough = match (&found, ask.lines) {
            (Some(answer), Some(lines)) => count_lines(&answer.body) >= lines,
            _ => false,
        };
        let mut piece = [0; 4096];
        let wait = if ask.lines.is_some() { QUIET } else { Duration::from_secs(15) };
        let read = if enough {
            Ok(Ok(0))
        } else {
            tokio::time::timeout(wait, stream.read(&mut piece)).await
        };
        match read {
            Ok(Ok(0)) | Err(_) => return found.ok_or_else(|| "no answer".to_owned()),
            Ok(Ok(len)) => bytes.extend_from_slice(&piece[..len]),
            Ok(Err(error)) => return Err(explain(error)),
        }
    }
}

fn count_lines(body: &[u8]) -> usize {
    body.iter().filter(|byte| **byte == b'\n').count()
}

fn parse(bytes: &[u8]) -> Option<Answer> {
    let end = bytes.windows(4).position(|window| window == b"\r\n\r\n")?;
    let head = String::from_utf8_lossy(&bytes[..end]).into_owned();
    let mut lines = head.split("\r\n");
    let status = lines.next()?.split(' ').nth(1)?.parse().ok()?;
    let headers: Vec<(String, String)> = lines
        .filter_map(|line| line.split_once(": "))
        .map(|(name, value)| (name.to_lowercase(), value.to_owned()))
        .collect();
    let rest = &bytes[end + 4..];
    let is_chunked = headers
        .iter()
        .any(|(name, value)| name == "transfer-encoding" && value.eq_ignore_ascii_case("chunked"));
    let body = if is_chunked { unchunk(rest) } else { rest.to_vec() };
    Some(Answer { status, headers, body })
}

fn unchunk(mut bytes: &[u8]) -> Vec<u8> {
    let mut body = Vec::new();
    while let Some(end) = bytes.windows(2).position(|window| window == b"\r\n") {
        let len = String::from_utf8_lossy(&bytes[..end]).into_owned();
        let Ok(len) = usize::from_str_radix(len.trim(), 16) else { break };
        let rest = &bytes[end + 2..];
        body.extend_from_slice(&rest[..len.min(rest.len())]);
        bytes = rest.get(len + 2..).unwrap_or_default();
        if len == 0 {
            break;
        }
    }
    body
}

/// Status and body as a script shows them.
pub fn show(answer: &Answer) -> Vec<String> {
    let body = String::from_utf8_lossy(&answer.body).into_owned();
    let mut lines = vec![format!("HTTP {}", answer.status)];
    let shown = |line: &str| if line.starts_with('{') { normal(line) } else { line.to_owned() };
    lines.extend(body.lines().map(|line| format!("  {}", shown(line))));
    lines
}

/// Status and the headers that count.
pub fn show_headers(answer: &Answer) -> Vec<String> {
    let mut lines = vec![format!("HTTP {}", answer.status)];
    let mut shown: Vec<_> =
        answer.headers.iter().filter(|(name, _)| SHOWN.contains(&name.as_str())).collect();
    shown.sort();
    lines.extend(shown.into_iter().map(|(name, value)| format!("  {name}: {value}")));
    lines
}

/// Names whose values differ from run to run.
const MASKED: [&str; 10] = [
    "cluster_id",
    "member_id",
    "raft_term",
    "raftTerm",
    "raftIndex",
    "raftAppliedIndex",
    "dbSize",
    "dbSizeInUse",
    "blob",
    "remaining_bytes",
];

/// A line of JSON without spaces between tokens and without what differs from run to run.
pub fn normal(line: &str) -> String {
    let is_time_left = line.contains("\"grantedTTL\"");
    let mut out = String::new();
    let mut name = String::new();
    let mut chars = line.chars();
    let mut is_value = false;
    while let Some(c) = chars.next() {
        match c {
            '"' => {
                let text = string(&mut chars);
                let masked = is_value
                    && (MASKED.contains(&name.as_str())
                        || name == "TTL" && is_time_left
                        || differs(&text));
                let shown = if masked { "set" } else { &text };
                out.push_str(&format!("\"{shown}\""));
                if !is_value {
                    name = text;
                }
            }
            ' ' | '\t' => {}
            other => {
                is_value = match other {
                    ':' | '[' => true,
                    '{' | ',' => false,
                    _ => is_value,
                };
                out.push(other);
            }
        }
    }
    out
}

fn differs(text: &str) -> bool {
    let is_id = text.len() > 15 && text.bytes().all(|byte| byte.is_ascii_digit());
    let is_version = text.split('.').count() == 3
        && text.split('.').all(|part| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit()));
    is_id || is_version || text.starts_with("http://127.0.0.1:")
}

/// The rest of a string, as it is written; the library of etcd separates its name from what it says
/// by one of two kinds of space.
fn string(chars: &mut std::str::Chars<'_>) -> String {
    let mut text = String::new();
    while let Some(c) = chars.next() {
        match c {
            '"' => break,
            '\\' => {
                text.push(c);
                text.extend(chars.next());
            }
            '\u{a0}' => text.push(' '),
            other => text.push(other),
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_and_spaces_are_taken_out() {
        let line =
            r#"{"header": {"cluster_id":"1", "revision":"2"},"ID":"1234567890123456","key":"a b"}"#;
        let shown = r#"{"header":{"cluster_id":"set","revision":"2"},"ID":"set","key":"a b"}"#;
        assert_eq!(normal(line), shown);
        assert_eq!(
            normal("{\"message\":\"proto:\u{a0}x \\\" y\"}"),
            r#"{"message":"proto: x \" y"}"#
        );
        assert_eq!(normal(r#"{"u":["http://127.0.0.1:5"]}"#), r#"{"u":["set"]}"#);
    }

    #[test]
    fn chunks_are_put_together() {
        assert_eq!(unchunk(b"3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n"), b"abcde");
        assert_eq!(unchunk(b"5\r\nab"), b"ab");
    }
}
