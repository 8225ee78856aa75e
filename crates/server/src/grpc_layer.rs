//! What happens to every gRPC call around its service: counting by method, code and bytes, and
//! the caller's deadline. It reads frame headers but no message, and it never changes what a
//! service answers.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use bytes::{Buf, Bytes};
use http::{HeaderMap, Request, Response};
use hyper::body::{Body, Frame, SizeHint};
use tonic::service::Routes;
use tonic::{Code, Status};
use tower::ServiceExt;

use crate::config::show_duration;
use crate::metrics::Metrics;
use crate::metrics::grpc::{CANCELED, CODES, MethodMetrics};
use crate::shutdown::{RequestGuard, Shutdown};

/// Most different texts of `client-api-version` that become label values; others count as
/// `unknown`, so that clients cannot grow the registry.
const CLIENT_VERSIONS_MAX: usize = 16;

/// All gRPC services behind their counters.
#[derive(Clone)]
pub struct GrpcService {
    routes: Routes,
    metrics: Arc<Metrics>,
    shutdown: Shutdown,
    client_versions: Arc<parking_lot::Mutex<Vec<String>>>,
    /// Unary calls that take longer are logged.
    slow: Duration,
}

impl GrpcService {
    /// Puts the counters around `routes`; unary calls over `slow` are logged.
    #[must_use]
    pub fn new(routes: Routes, metrics: Arc<Metrics>, shutdown: Shutdown, slow: Duration) -> Self {
        let routes = routes.prepare();
        Self { routes, metrics, shutdown, client_versions: Arc::default(), slow }
    }

    /// Whether a request is gRPC rather than plain HTTP.
    #[must_use]
    pub fn is_grpc<B>(request: &Request<B>) -> bool {
        let content_type = request.headers().get(http::header::CONTENT_TYPE);
        request.version() == http::Version::HTTP_2
            && content_type.is_some_and(|value| value.as_bytes().starts_with(b"application/grpc"))
    }

    /// Answers one call.
    ///
    /// # Cancel safety
    /// Dropping it, as happens when the client resets the stream, drops the service's own future
    /// and counts the call as canceled.
    pub async fn call<B>(&self, request: Request<B>) -> Response<tonic::body::Body>
    where
        B: Body<Data = Bytes> + Send + Unpin + 'static,
        B::Error: Into<tonic::codegen::StdError>,
    {
        let path = request.uri().path().to_owned();
        let Some(call) = Call::start(&self.metrics, &path, &self.shutdown, self.slow) else {
            // No method of ours: the services' own fallback says so, and nothing is counted.
            let answer = self.routes.clone().oneshot(request.map(tonic::body::Body::new)).await;
            return answer.unwrap_or_else(|never| match never {});
        };
        self.count_client(call.method().kind, request.headers());
        let deadline = timeout_of(request.headers());
        let received = self.metrics.network_client_grpc_received_bytes.clone();
        let messages = call.method().received.clone();
        let request = request.map(|body| {
            tonic::body::Body::new(CountedRequest {
                body,
                frames: Frames::default(),
                messages,
                bytes: received,
            })
        });
        let response = self.routes.clone().oneshot(request);
        let answer = match deadline {
            None => response.await,
            // Nobody waits for it any more, so it is not begun.
            Some(Duration::ZERO) => Ok(out_of_time()),
            Some(limit) => match tokio::time::timeout(limit, response).await {
                Ok(answer) => answer,
                Err(_) => Ok(out_of_time()),
            },
        };
        let response = answer.unwrap_or_else(|never| match never {});
        // An answer without messages carries its code in the headers and has no trailers.
        let code = code_of(response.headers());
        let mut body = CountedResponse { body: None, frames: Frames::default(), call };
        if let Some(code) = code {
            body.call.finish(code);
        }
        response.map(|inner| {
            body.body = Some(inner);
            tonic::body::Body::new(body)
        })
    }

    fn count_client(&self, kind: &str, headers: &HeaderMap) {
        let kind = if kind == "unary" { "unary" } else { "stream" };
        let version = headers.get("client-api-version").and_then(|value| value.to_str().ok());
        let requests = &self.metrics.server_client_requests;
        let Some(version) = version.filter(|text| !text.is_empty()) else {
            return requests.with_label_values(&[kind, "unknown"]).inc();
        };
        let mut known = self.client_versions.lock();
        if !known.iter().any(|text| text == version) {
            if known.len() >= CLIENT_VERSIONS_MAX || version.len() > 16 {
                return requests.with_label_values(&[kind, "unknown"]).inc();
            }
            known.push(version.to_owned());
        }
        drop(known);
        requests.with_label_values(&[kind, version]).inc();
    }
}

fn out_of_time() -> Response<tonic::body::Body> {
    Status::deadline_exceeded("context deadline exceeded").into_http()
}

/// Code in `grpc-status`; a number out of range counts as Unknown.
fn code_of(headers: &HeaderMap) -> Option<usize> {
    let text = headers.get("grpc-status")?.to_str().ok()?;
    let code = text.parse::<usize>().ok().filter(|code| *code < CODES.len());
    Some(code.unwrap_or(Code::Unknown as usize))
}

/// The caller's time limit: up to eight digits and a unit. A malformed one is no limit.
fn timeout_of(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get("grpc-timeout")?.to_str().ok()?;
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    let value = (digits.len() <= 8).then(|| digits.parse::<u64>().ok())??;
    Some(match unit {
        "H" => Duration::from_secs(value * 3600),
        "M" => Duration::from_secs(value * 60),
        "S" => Duration::from_secs(value),
        "m" => Duration::from_millis(value),
        "u" => Duration::from_micros(value),
        "n" => Duration::from_nanos(value),
        _ => return None,
    })
}

/// One call from start to end; counted as handled exactly once, at the latest when dropped.
struct Call {
    metrics: Arc<Metrics>,
    path: String,
    started: Instant,
    slow: Duration,
    is_finished: bool,
    /// Unary calls hold up a graceful end.
    _guard: Option<RequestGuard>,
}

impl Call {
    fn start(
        metrics: &Arc<Metrics>,
        path: &str,
        shutdown: &Shutdown,
        slow: Duration,
    ) -> Option<Self> {
        let method = metrics.grpc.method(path)?;
        method.started.inc();
        let guard = (method.kind == "unary").then(|| shutdown.request());
        Some(Self {
            metrics: Arc::clone(metrics),
            path: path.to_owned(),
            started: Instant::now(),
            slow,
            is_finished: false,
            _guard: guard,
        })
    }

    fn method(&self) -> &MethodMetrics {
        self.metrics.grpc.method(&self.path).expect("a call is made for a known path only")
    }

    fn finish(&mut self, code: usize) {
        if std::mem::replace(&mut self.is_finished, true) {
            return;
        }
        let method = self.method();
        method.handled[code].inc();
        if let Some(duration) = &method.duration {
            duration.observe(code == Code::Ok as usize, self.started);
        }
        if let Some(handling) = &method.handling {
            handling.observe(self.started.elapsed().as_secs_f64());
        }
        let took = self.started.elapsed();
        if method.kind == "unary" && took > self.slow && !self.slow.is_zero() {
            tracing::warn!(
                method = self.path,
                code = CODES[code],
                "time spent" = show_duration(took),
                "request stats"
            );
        }
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        self.finish(CANCELED);
    }
}

/// Counts messages in a byte stream of gRPC frames: a flag byte, a length of four bytes, and the
/// message.
#[derive(Default)]
struct Frames {
    header: [u8; 5],
    header_len: usize,
    body_left: usize,
}

impl Frames {
    /// Messages whose header is complete with these bytes.
    fn count(&mut self, mut bytes: &[u8]) -> u64 {
        let mut messages = 0;
        while !bytes.is_empty() {
            if self.body_left > 0 {
                let skip = self.body_left.min(bytes.len());
                self.body_left -= skip;
                bytes.advance(skip);
                continue;
            }
            let take = (self.header.len() - self.header_len).min(bytes.len());
            self.header[self.header_len..self.header_len + take].copy_from_slice(&bytes[..take]);
            self.header_len += take;
            bytes.advance(take);
            if self.header_len == self.header.len() {
                let [_, a, b, c, d] = self.header;
                self.body_left = u32::from_be_bytes([a, b, c, d]) as usize;
                self.header_len = 0;
                messages += 1;
            }
        }
        messages
    }
}

/// A request body that counts what the client sends.
struct CountedRequest<B> {
    body: B,
    frames: Frames,
    messages: prometheus::IntCounter,
    bytes: prometheus::IntCounter,
}

impl<B: Body<Data = Bytes> + Unpin> Body for CountedRequest<B> {
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(context));
        if let Some(Ok(frame)) = &frame
            && let Some(data) = frame.data_ref()
        {
            self.bytes.inc_by(data.len() as u64);
            let messages = self.frames.count(data);
            self.messages.inc_by(messages);
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// A response body that counts what is sent and sees the code in its trailers.
struct CountedResponse {
    body: Option<tonic::body::Body>,
    frames: Frames,
    call: Call,
}

impl Body for CountedResponse {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = &mut *self;
        let Some(body) = &mut this.body else { return Poll::Ready(None) };
        let frame = ready!(Pin::new(body).poll_frame(context));
        match &frame {
            Some(Ok(frame)) => {
                if let Some(data) = frame.data_ref() {
                    let sent = &this.call.metrics.network_client_grpc_sent_bytes;
                    sent.inc_by(data.len() as u64);
                    let messages = this.frames.count(data);
                    this.call.method().sent.inc_by(messages);
                } else if let Some(code) = frame.trailers_ref().and_then(code_of) {
                    this.call.finish(code);
                }
            }
            Some(Err(status)) => this.call.finish(status.code() as usize),
            None => {}
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.as_ref().is_none_or(Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.body.as_ref().map_or(SizeHint::with_exact(0), Body::size_hint)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_counted_however_they_are_cut() {
        let mut bytes = Vec::new();
        for len in [0u32, 3, 300] {
            bytes.push(0);
            bytes.extend(len.to_be_bytes());
            bytes.extend(vec![7; len as usize]);
        }
        for size in [1, 2, 4, 5, 7, 64, bytes.len()] {
            let mut frames = Frames::default();
            let total: u64 = bytes.chunks(size).map(|part| frames.count(part)).sum();
            assert_eq!(total, 3, "cut into {size}");
        }
    }

    #[test]
    fn timeouts_follow_the_grpc_grammar() {
        let of = |text: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert("grpc-timeout", http::HeaderValue::from_static(text));
            timeout_of(&headers)
        };
        assert_eq!(of("100m"), Some(Duration::from_millis(100)));
        assert_eq!(of("99999999S"), Some(Duration::from_secs(99_999_999)));
        assert_eq!(of("1H"), Some(Duration::from_secs(3600)));
        for bad in ["", "S", "100", "123456789S", "1x", "-1S"] {
            assert_eq!(of(bad), None, "{bad}");
        }
        assert_eq!(timeout_of(&HeaderMap::new()), None);
    }

    #[test]
    fn codes_out_of_range_are_unknown() {
        let mut headers = HeaderMap::new();
        assert_eq!(code_of(&headers), None);
        headers.insert("grpc-status", http::HeaderValue::from_static("14"));
        assert_eq!(code_of(&headers), Some(14));
        headers.insert("grpc-status", http::HeaderValue::from_static("99"));
        assert_eq!(code_of(&headers), Some(2));
    }

    #[test]
    fn a_dropped_call_is_counted_as_canceled_once() {
        let metrics = Arc::new(Metrics::new(false));
        let (shutdown, slow) = (Shutdown::default(), Duration::from_secs(60));
        let path = "/etcdserverpb.Watch/Watch";
        drop(Call::start(&metrics, path, &shutdown, slow).expect("a known path"));
        let mut call = Call::start(&metrics, path, &shutdown, slow).expect("a known path");
        call.finish(0);
        drop(call);
        let method = metrics.grpc.method(path).expect("a known path");
        assert_eq!(method.started.get(), 2);
        assert_eq!(method.handled[CANCELED].get(), 1);
        assert_eq!(method.handled[0].get(), 1);
        assert!(Call::start(&metrics, "/x/Y", &shutdown, slow).is_none());
    }
}
