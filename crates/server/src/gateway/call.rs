//! Calls of our own services in the process: a request as gRPC would bring it, with its frames and
//! headers, handed to the same services with the same counters and limits. Nothing goes through a
//! socket, so no certificate and no address is seen at the other end.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use futures::stream::BoxStream;
use futures::{Stream, StreamExt};
use http::{HeaderMap, HeaderName, HeaderValue, Request, header};
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Frame;
use tonic::{Code, Status};

use crate::grpc_layer::GrpcService;

/// Flag and length in front of each message.
const FRAME_HEADER: usize = 5;

/// Calls a method. The requests end the stream of requests when they end.
pub(super) async fn call(
    service: &GrpcService,
    path: &str,
    headers: HeaderMap,
    requests: impl Stream<Item = Bytes> + Send + 'static,
) -> Replies {
    let frames = requests.map(|message| Ok::<_, Status>(Frame::data(framed(&message))));
    let frames: BoxStream<'static, Result<Frame<Bytes>, Status>> = frames.boxed();
    let mut request = Request::new(tonic::body::Body::new(StreamBody::new(frames)));
    *request.method_mut() = http::Method::POST;
    *request.version_mut() = http::Version::HTTP_2;
    // Paths come from the descriptors, so they always parse.
    *request.uri_mut() = path.parse().unwrap_or_default();
    *request.headers_mut() = headers;
    let grpc = HeaderValue::from_static("application/grpc");
    request.headers_mut().insert(header::CONTENT_TYPE, grpc);
    request.headers_mut().insert(header::TE, HeaderValue::from_static("trailers"));
    let (parts, body) = service.call(request).await.into_parts();
    let status = Status::from_header_map(&parts.headers);
    Replies { body, bytes: BytesMut::new(), status }
}

fn framed(message: &Bytes) -> Bytes {
    let mut frame = BytesMut::with_capacity(FRAME_HEADER + message.len());
    frame.put_u8(0);
    // A message is limited far below 4 GiB.
    frame.put_u32(u32::try_from(message.len()).unwrap_or(u32::MAX));
    frame.put_slice(message);
    frame.freeze()
}

/// What a call answers. Dropping it cancels the call.
pub(super) struct Replies {
    body: tonic::body::Body,
    bytes: BytesMut,
    /// How the call ended, once that is known.
    status: Option<Status>,
}

impl Replies {
    /// The next message; `None` when the call has ended well.
    ///
    /// # Errors
    /// How it ended otherwise.
    ///
    /// # Cancel safety
    /// Nothing is lost when dropped.
    pub(super) async fn next(&mut self) -> Result<Option<Bytes>, Status> {
        loop {
            if let Some(message) = self.take() {
                return Ok(Some(message));
            }
            if let Some(status) = &self.status {
                return if status.code() == Code::Ok { Ok(None) } else { Err(status.clone()) };
            }
            match self.body.frame().await {
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) => self.bytes.extend_from_slice(&data),
                    Err(frame) => {
                        self.status = frame.trailers_ref().and_then(Status::from_header_map);
                    }
                },
                Some(Err(status)) => self.status = Some(status),
                None => self.status = Some(Status::internal("the call ended without a status")),
            }
        }
    }

    fn take(&mut self) -> Option<Bytes> {
        let mut header = self.bytes.get(..FRAME_HEADER)?;
        header.advance(1);
        let len = header.get_u32() as usize;
        if self.bytes.len() < FRAME_HEADER + len {
            return None;
        }
        self.bytes.advance(FRAME_HEADER);
        Some(self.bytes.split_to(len).freeze())
    }
}

/// Headers that HTTP knows for all purposes; services see them under a name of the gateway's. Source:
/// grpc-gateway.
const PERMANENT: [&str; 24] = [
    "accept",
    "accept-charset",
    "accept-language",
    "accept-ranges",
    "authorization",
    "cache-control",
    "content-type",
    "cookie",
    "date",
    "expect",
    "from",
    "host",
    "if-match",
    "if-modified-since",
    "if-none-match",
    "if-schedule-tag-match",
    "if-unmodified-since",
    "max-forwards",
    "origin",
    "pragma",
    "referer",
    "user-agent",
    "via",
    "warning",
];

/// What a client means for the service by a header of this prefix.
const METADATA: &str = "grpc-metadata-";

/// The metadata that the headers of an HTTP request mean.
///
/// # Errors
/// InvalidArgument: a malformed timeout, or a binary header that is no base64.
pub(super) fn metadata(headers: &HeaderMap) -> Result<HeaderMap, Status> {
    let mut metadata = HeaderMap::new();
    for (name, value) in headers {
        let is_text = value.as_bytes().iter().all(|byte| (0x20..=0x7e).contains(byte));
        if name == header::AUTHORIZATION && is_text {
            metadata.append(header::AUTHORIZATION, value.clone());
        }
        let passed = if PERMANENT.contains(&name.as_str()) {
            format!("grpcgateway-{name}")
        } else if let Some(passed) = name.as_str().strip_prefix(METADATA) {
            passed.to_owned()
        } else {
            continue;
        };
        if passed.ends_with("-bin") {
            check_binary(name, value)?;
        }
        if let (true, Some(passed)) = (is_text, allowed(&passed)) {
            metadata.append(passed, value.clone());
        }
    }
    // A client without it must be known for one of the gateway's, too.
    let accept = HeaderName::from_static("grpcgateway-accept");
    metadata.entry(accept).or_insert(HeaderValue::from_static("*/*"));
    let timeout = headers.get("grpc-timeout").map(timeout_of).transpose()?.flatten();
    if let Some(timeout) = timeout {
        metadata.insert("grpc-timeout", timeout);
    }
    Ok(metadata)
}

/// A name that clients may give to metadata: none that belongs to the call itself.
fn allowed(name: &str) -> Option<HeaderName> {
    let is_own = name.starts_with("grpc-") || matches!(name, "content-type" | "te" | "user-agent");
    if is_own { None } else { HeaderName::try_from(name).ok() }
}

fn check_binary(name: &HeaderName, value: &HeaderValue) -> Result<(), Status> {
    use base64::Engine;
    use base64::engine::general_purpose::{STANDARD, STANDARD_NO_PAD};
    let bytes = value.as_bytes();
    let decoded = match bytes.len() % 4 {
        0 => STANDARD.decode(bytes),
        _ => STANDARD_NO_PAD.decode(bytes),
    };
    let Err(error) = decoded else { return Ok(()) };
    let place = match error {
        base64::DecodeError::InvalidByte(place, _) => place,
        base64::DecodeError::InvalidLastSymbol(place, _) => place,
        _ => bytes.len(),
    };
    let name = canonical(name.as_str());
    Err(Status::invalid_argument(format!(
        "invalid binary header {name}: illegal base64 data at input byte {place}"
    )))
}

/// A header's name as Go writes it: each word with a capital.
fn canonical(name: &str) -> String {
    let mut is_first = true;
    let letters = name.chars().map(|letter| {
        let shown = if is_first { letter.to_ascii_uppercase() } else { letter };
        is_first = letter == '-';
        shown
    });
    letters.collect()
}

/// A timeout in the grammar of gRPC, which allows eight digits; `None` for no timeout.
fn timeout_of(value: &HeaderValue) -> Result<Option<HeaderValue>, Status> {
    let text = value.to_str().unwrap_or_default();
    let bad = || Status::invalid_argument(format!("invalid grpc-timeout: {text}"));
    let (digits, unit) = text.split_at_checked(text.len().saturating_sub(1)).ok_or_else(bad)?;
    let mut count: i64 = digits.parse().map_err(|_| bad())?;
    let units = ["n", "u", "m", "S", "M", "H"];
    let steps = [1000, 1000, 1000, 60, 60];
    let mut place = units.iter().position(|known| *known == unit).ok_or_else(bad)?;
    while count > 99_999_999 {
        let Some(step) = steps.get(place) else { return Ok(None) };
        (count, place) = (count / step, place + 1);
    }
    if count == 0 {
        return Ok(None);
    }
    let text = format!("{}{}", count.max(0), units[place]);
    Ok(HeaderValue::try_from(text).ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(headers: &[(&'static str, &'static str)]) -> Result<Vec<(String, String)>, String> {
        let headers = headers
            .iter()
            .map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value)));
        let metadata = metadata(&headers.collect()).map_err(|s| s.message().to_owned())?;
        let shown = metadata
            .iter()
            .map(|(name, value)| (name.to_string(), value.to_str().expect("text").to_owned()));
        let mut shown: Vec<_> = shown.collect();
        shown.sort();
        Ok(shown)
    }

    fn pair(name: &str, value: &str) -> (String, String) {
        (name.to_owned(), value.to_owned())
    }

    #[test]
    fn headers_become_metadata_as_in_the_gateway_of_etcd() {
        let shown = of(&[
            ("authorization", "token"),
            ("accept", "text/html"),
            ("grpc-metadata-hasleader", "true"),
            ("grpc-metadata-grpc-timeout", "1S"),
            ("x-other", "1"),
        ]);
        let expected = vec![
            pair("authorization", "token"),
            pair("grpcgateway-accept", "text/html"),
            pair("grpcgateway-authorization", "token"),
            pair("hasleader", "true"),
        ];
        assert_eq!(shown, Ok(expected));
        let bad = of(&[("grpc-metadata-x-bin", "!")]);
        let text = "invalid binary header Grpc-Metadata-X-Bin: illegal base64 data at input byte 0";
        assert_eq!(bad, Err(text.to_owned()));
    }

    #[test]
    fn timeouts_keep_to_the_grammar() {
        let timeout = |text| of(&[("accept", "a"), ("grpc-timeout", text)]);
        let value = |text| {
            let shown = timeout(text).expect("valid").into_iter();
            shown.into_iter().find(|(name, _)| name == "grpc-timeout").map(|(_, value)| value)
        };
        assert_eq!(value("5S").as_deref(), Some("5S"));
        assert_eq!(value("100000000n").as_deref(), Some("100000u"));
        assert_eq!(value("-1S").as_deref(), Some("0S"));
        assert_eq!(timeout("0n").expect("valid").len(), 1, "no timeout");
        for bad in ["x", "5", "S", "", "5x"] {
            assert_eq!(timeout(bad), Err(format!("invalid grpc-timeout: {bad}")));
        }
    }

    #[test]
    fn frames_are_put_together_however_they_come() {
        let mut replies =
            Replies { body: tonic::body::Body::empty(), bytes: BytesMut::new(), status: None };
        let bytes = [framed(&Bytes::from_static(b"one")), framed(&Bytes::new())].concat();
        let mut found = Vec::new();
        for byte in bytes {
            replies.bytes.put_u8(byte);
            found.extend(replies.take());
        }
        assert_eq!(found, ["one", ""]);
    }
}
