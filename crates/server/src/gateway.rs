//! The JSON gateway: etcd's API over plain HTTP, below `/v3/`. A request body is one JSON value, or
//! several for a method that takes a stream; an answer is one, or a line for each message. Calls go
//! to the services of this process with all their checks, counters and limits; here only the form
//! changes. `routes` has the paths, `values`, `read` and `json` the form, `call` the way to the
//! services, `socket` the same over WebSocket.

mod call;
pub(crate) mod json;
pub(crate) mod read;
pub(crate) mod routes;
mod socket;
pub(crate) mod values;

use std::sync::Arc;

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::stream::{self, BoxStream};
use futures::{FutureExt, Stream, StreamExt};
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use tokio::sync::{Semaphore, oneshot, watch};
use tonic::{Code, Status};

use self::call::Replies;
use self::routes::Route;
use self::values::{Malformed, Values};
use crate::grpc_layer::GrpcService;
use crate::listen::HttpResponse;

/// Path below which all methods are.
const ROOT: &str = "/v3/";

/// The same in old clients.
const OLD_ROOT: &str = "/v3beta/";

/// WebSocket connections at the same time; they no longer count as connections of the listener.
const SOCKETS_MAX: usize = 1024;

/// The pieces in which a request body comes. Ends early if the client breaks off.
type Pieces = BoxStream<'static, Bytes>;

/// The lines of an answer.
type Lines = BoxStream<'static, String>;

/// The gateway of a member. Cloning shares it.
#[derive(Clone)]
pub struct Gateway {
    /// Holds the services once the member may serve clients.
    grpc: watch::Receiver<Option<GrpcService>>,
    /// Longest JSON value of a request: bytes are a third longer in it, and some room is for names.
    value_bytes_max: usize,
    sockets: Arc<Semaphore>,
}

impl Gateway {
    /// A gateway to services that may come later; requests wait for them. `message_bytes_max` is the
    /// longest request that the services take.
    #[must_use]
    pub fn new(grpc: watch::Receiver<Option<GrpcService>>, message_bytes_max: usize) -> Self {
        Self {
            grpc,
            value_bytes_max: message_bytes_max.saturating_mul(2),
            sockets: Arc::new(Semaphore::new(SOCKETS_MAX)),
        }
    }

    /// The part of a path that names a method; `None` if the path is not the gateway's.
    #[must_use]
    pub fn below_root(path: &str) -> Option<&str> {
        path.strip_prefix(ROOT).or_else(|| path.strip_prefix(OLD_ROOT))
    }

    /// Answers one request whose path is below the root.
    ///
    /// # Cancel safety
    /// Dropping it cancels the call of the service.
    pub async fn call(&self, request: Request<Incoming>) -> HttpResponse {
        let path = Self::below_root(request.uri().path()).unwrap_or_default();
        let Some(route) = routes::find(path) else {
            return refusal(&Status::not_found("Not Found"));
        };
        if socket::is_asked_for(&request) {
            return self.upgrade(route, request);
        }
        if request.method() != Method::POST {
            return refusal(&Status::unimplemented("Method Not Allowed"));
        }
        let (parts, body) = request.into_parts();
        let (pieces, mut broken) = pieces_of(body);
        let begun = tokio::select! {
            begun = self.begin(route, &parts.headers, pieces) => begun,
            () = &mut broken => Err(Status::cancelled("context canceled")),
        };
        match begun {
            Err(status) => refusal(&status),
            Ok(Begun::Ended) => Response::new(tonic::body::Body::empty()),
            Ok(Begun::Whole(text)) => answer(StatusCode::OK, Full::new(Bytes::from(text))),
            Ok(Begun::Stream(lines)) => {
                let lines = lines.take_until(broken);
                let frames = lines.map(|line| Ok::<_, Status>(Frame::data(Bytes::from(line))));
                answer(StatusCode::OK, StreamBody::new(frames))
            }
        }
    }

    /// Makes the call and waits for the first that it says.
    async fn begin(
        &self,
        route: &'static Route,
        headers: &HeaderMap,
        pieces: Pieces,
    ) -> Result<Begun, Status> {
        let metadata = call::metadata(headers)?;
        let mut reader = Reader { route, pieces, values: Values::new(self.value_bytes_max) };
        let service = self.service().await?;
        let path = &route.grpc_path;
        let mut replies = if route.takes_stream {
            call::call(&service, path, metadata, reader.messages()).await
        } else {
            let message = reader.message().await?.unwrap_or_default();
            call::call(&service, path, metadata, stream::iter([message])).await
        };
        let Some(first) = replies.next().await? else { return Ok(Begun::Ended) };
        let first = json::to_json(&route.output, first)?;
        if !route.gives_stream {
            // The status follows the message; the call has not ended before.
            while replies.next().await?.is_some() {}
            return Ok(Begun::Whole(first));
        }
        let first = stream::iter([json::line("result", &first)]);
        Ok(Begun::Stream(first.chain(lines(route, replies)).boxed()))
    }

    async fn service(&self) -> Result<GrpcService, Status> {
        let mut grpc = self.grpc.clone();
        let ready = grpc.wait_for(Option::is_some).await;
        // Without a sender the process ended before the member had started.
        let service = ready.ok().and_then(|service| service.clone());
        service.ok_or_else(|| kelson_api::Error::Stopped.into())
    }

    /// Answers a handshake and serves the connection from then on.
    fn upgrade(&self, route: &'static Route, request: Request<Incoming>) -> HttpResponse {
        let Ok(place) = Arc::clone(&self.sockets).try_acquire_owned() else {
            return refusal(&Status::unavailable("too many WebSocket connections"));
        };
        let (response, headers) = match socket::accept(&request) {
            Ok(accepted) => accepted,
            Err(code) => return refuse_handshake(code),
        };
        let gateway = self.clone();
        let bytes_max = self.value_bytes_max;
        tokio::spawn(socket::run(request, bytes_max, place, move |pieces| {
            gateway.lines(route, headers, pieces)
        }));
        response
    }

    /// The whole answer as lines, whatever it is.
    fn lines(self, route: &'static Route, headers: HeaderMap, pieces: Pieces) -> Lines {
        let begun = async move { self.begin(route, &headers, pieces).await };
        stream::once(begun)
            .flat_map(|begun| match begun {
                Err(status) => one_line(json::of_status(&status)),
                Ok(Begun::Ended) => stream::empty().boxed(),
                Ok(Begun::Whole(text)) => one_line(text),
                Ok(Begun::Stream(lines)) => lines,
            })
            .boxed()
    }
}

fn one_line(text: String) -> Lines {
    stream::iter([text]).boxed()
}

/// What a call says first.
enum Begun {
    /// It has ended without a message.
    Ended,
    /// The only message, as JSON.
    Whole(String),
    /// The first line and all that follow.
    Stream(Lines),
}

/// Reads messages out of a request body.
struct Reader {
    route: &'static Route,
    pieces: Pieces,
    values: Values,
}

impl Reader {
    /// The next message; `None` at the end of the body.
    async fn message(&mut self) -> Result<Option<Bytes>, Status> {
        let value = loop {
            if let Some(value) = self.values.next().map_err(malformed)? {
                break value;
            }
            match self.pieces.next().await {
                Some(piece) => self.values.push(&piece),
                None => match self.values.end().map_err(malformed)? {
                    Some(value) => break value,
                    None => return Ok(None),
                },
            }
        };
        read::to_protobuf(&self.route.input, &value).map(Some)
    }

    /// All messages. As in etcd, one that cannot be read ends the requests, not the call.
    fn messages(self) -> impl Stream<Item = Bytes> + Send + 'static {
        stream::unfold(self, |mut reader| async move {
            match reader.message().await {
                Ok(message) => message.map(|message| (message, reader)),
                Err(status) => {
                    tracing::debug!(%status, "a request of a stream cannot be read");
                    None
                }
            }
        })
    }
}

fn malformed(fault: Malformed) -> Status {
    let code = match fault {
        Malformed::TooLarge(..) => Code::ResourceExhausted,
        _ => Code::InvalidArgument,
    };
    Status::new(code, fault.to_string())
}

/// The pieces of a body, and what tells that its client broke off within it: an answer that has
/// nothing to say would not notice.
fn pieces_of(body: Incoming) -> (Pieces, BoxFuture<'static, ()>) {
    let (broke, broken) = oneshot::channel();
    let reading = (body.into_data_stream(), broke);
    let pieces = stream::unfold(reading, |(mut body, broke)| async move {
        match body.next().await? {
            Ok(piece) => Some((piece, (body, broke))),
            Err(_) => {
                let _answered = broke.send(());
                None
            }
        }
    });
    let broken = async move {
        if broken.await.is_err() {
            // The body came to its end.
            std::future::pending().await
        }
    };
    (pieces.boxed(), broken.boxed())
}

/// The lines of all further messages, and of the error that ends them, if it is one.
fn lines(route: &'static Route, replies: Replies) -> impl Stream<Item = String> + Send + 'static {
    stream::unfold(Some(replies), move |replies| async move {
        let mut replies = replies?;
        let next = match replies.next().await {
            Ok(None) => return None,
            Ok(Some(message)) => json::to_json(&route.output, message),
            Err(status) => Err(status),
        };
        Some(match next {
            Ok(text) => (json::line("result", &text), Some(replies)),
            Err(status) => (json::line("error", &json::of_status(&status)), None),
        })
    })
}

fn answer<B>(code: StatusCode, body: B) -> HttpResponse
where
    B: hyper::body::Body<Data = Bytes> + Send + 'static,
    B::Error: Into<tonic::codegen::StdError>,
{
    let mut response = Response::new(tonic::body::Body::new(body));
    *response.status_mut() = code;
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    if code == StatusCode::OK {
        let grpc = HeaderValue::from_static("application/grpc");
        headers.insert("grpc-metadata-content-type", grpc);
    }
    response
}

/// A call that ended before it said anything.
fn refusal(status: &Status) -> HttpResponse {
    let mut response = answer(http_code(status.code()), Full::new(json::of_status(status).into()));
    if status.code() == Code::Unauthenticated
        && let Ok(text) = HeaderValue::from_str(status.message())
    {
        response.headers_mut().insert(header::WWW_AUTHENTICATE, text);
    }
    response
}

fn refuse_handshake(code: StatusCode) -> HttpResponse {
    let text = code.canonical_reason().unwrap_or_default();
    let mut response =
        Response::new(tonic::body::Body::new(Full::new(Bytes::from(format!("{text}\n")))));
    *response.status_mut() = code;
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    headers.insert(header::SEC_WEBSOCKET_VERSION, HeaderValue::from_static("13"));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}

/// How HTTP says what gRPC says. Source: grpc-gateway.
fn http_code(code: Code) -> StatusCode {
    match code {
        Code::Ok => StatusCode::OK,
        // Of a client that has gone away; without a name in the library.
        Code::Cancelled => StatusCode::from_u16(499).unwrap_or(StatusCode::BAD_REQUEST),
        Code::InvalidArgument | Code::FailedPrecondition | Code::OutOfRange => {
            StatusCode::BAD_REQUEST
        }
        Code::DeadlineExceeded => StatusCode::GATEWAY_TIMEOUT,
        Code::NotFound => StatusCode::NOT_FOUND,
        Code::AlreadyExists | Code::Aborted => StatusCode::CONFLICT,
        Code::PermissionDenied => StatusCode::FORBIDDEN,
        Code::Unauthenticated => StatusCode::UNAUTHORIZED,
        Code::ResourceExhausted => StatusCode::TOO_MANY_REQUESTS,
        Code::Unimplemented => StatusCode::NOT_IMPLEMENTED,
        Code::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
        Code::Unknown | Code::Internal | Code::DataLoss => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_become_those_of_http() {
        let told = |code| http_code(Code::from_i32(code)).as_u16();
        let codes: Vec<u16> = (0..17).map(told).collect();
        let expected =
            [200, 499, 500, 400, 504, 404, 409, 403, 429, 400, 409, 400, 501, 500, 503, 500, 401];
        assert_eq!(codes, expected);
    }

    #[test]
    fn old_paths_are_known() {
        assert_eq!(Gateway::below_root("/v3/kv/put"), Some("kv/put"));
        assert_eq!(Gateway::below_root("/v3beta/kv/put"), Some("kv/put"));
        assert_eq!(Gateway::below_root("/v3/"), Some(""));
        assert_eq!(Gateway::below_root("/v3"), None);
        assert_eq!(Gateway::below_root("/health"), None);
    }
}
