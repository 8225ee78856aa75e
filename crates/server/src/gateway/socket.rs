//! Streams of the JSON gateway over WebSocket: each message that comes is a piece of the request
//! body, each line of the answer goes out as one text message. It is there for browsers, which can
//! neither send a body piece by piece nor set headers: a token comes as a subprotocol or a cookie.

use bytes::Bytes;
use futures::{SinkExt, StreamExt};
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, header};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tokio_tungstenite::tungstenite::protocol::{Message, Role, WebSocketConfig};

use super::{Lines, Pieces};
use crate::listen::HttpResponse;

/// Messages that may wait to be read by the service; the client is slowed down beyond it. One, for each
/// may be as long as a request may be.
const WAITING_MAX: usize = 1;

/// Whether a request asks for a WebSocket connection.
pub(super) fn is_asked_for<B>(request: &Request<B>) -> bool {
    let has = |name: header::HeaderName, token: &str| {
        let values = request.headers().get_all(name).iter();
        values
            .filter_map(|value| value.to_str().ok())
            .any(|value| value.split(',').any(|part| part.trim().eq_ignore_ascii_case(token)))
    };
    has(header::CONNECTION, "upgrade") && has(header::UPGRADE, "websocket")
}

/// What to answer a handshake with, and the headers that the request behind it has.
///
/// # Errors
/// The handshake is not one: the status to refuse it with.
pub(super) fn accept<B>(request: &Request<B>) -> Result<(HttpResponse, HeaderMap), StatusCode> {
    if request.method() != Method::GET {
        return Err(StatusCode::METHOD_NOT_ALLOWED);
    }
    let headers = request.headers();
    let is_version = headers.get(header::SEC_WEBSOCKET_VERSION).is_some_and(|it| it == "13");
    let key = headers.get(header::SEC_WEBSOCKET_KEY).filter(|key| !key.is_empty());
    let (true, Some(key)) = (is_version, key) else { return Err(StatusCode::BAD_REQUEST) };
    let accepted = HeaderValue::try_from(derive_accept_key(key.as_bytes()));
    let accepted = accepted.map_err(|_| StatusCode::BAD_REQUEST)?;
    let mut response = Response::new(tonic::body::Body::empty());
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let answer = response.headers_mut();
    answer.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
    answer.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
    answer.insert(header::SEC_WEBSOCKET_ACCEPT, accepted);
    let protocol = headers.get(header::SEC_WEBSOCKET_PROTOCOL).and_then(|it| it.to_str().ok());
    if protocol.is_some_and(|protocol| protocol.starts_with("Bearer")) {
        answer.insert(header::SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static("Bearer"));
    }
    Ok((response, passed_on(headers, protocol)))
}

/// The few headers that a request over WebSocket keeps, and the token from where a browser can put it.
fn passed_on(headers: &HeaderMap, protocol: Option<&str>) -> HeaderMap {
    let mut kept = HeaderMap::new();
    for name in [header::ORIGIN, header::REFERER] {
        if let Some(value) = headers.get(&name) {
            kept.insert(name, value.clone());
        }
    }
    let token = protocol.and_then(|protocol| protocol.split_once("Bearer,"));
    let token = token.map(|(_, token)| token.trim_matches(' ').to_owned());
    let token = cookie(headers, "token").or(token);
    let bearer = token.and_then(|token| HeaderValue::try_from(format!("Bearer {token}")).ok());
    if let Some(bearer) = bearer {
        kept.insert(header::AUTHORIZATION, bearer);
    }
    kept
}

fn cookie(headers: &HeaderMap, name: &str) -> Option<String> {
    let values = headers.get_all(header::COOKIE).iter().filter_map(|value| value.to_str().ok());
    let mut pairs = values.flat_map(|value| value.split(';')).map(str::trim);
    pairs.find_map(|pair| Some(pair.strip_prefix(name)?.strip_prefix('=')?.to_owned()))
}

/// Serves a connection once it has changed its protocol: `serve` makes the lines of the answer from
/// the pieces of the request. Returns when either side is done.
pub(super) async fn run<F>(
    mut request: Request<Incoming>,
    message_bytes_max: usize,
    _place: OwnedSemaphorePermit,
    serve: F,
) where
    F: FnOnce(Pieces) -> Lines + Send,
{
    let stream = match hyper::upgrade::on(&mut request).await {
        Ok(upgraded) => TokioIo::new(upgraded),
        Err(error) => return tracing::debug!(%error, "no WebSocket connection"),
    };
    let config = WebSocketConfig::default()
        .max_message_size(Some(message_bytes_max))
        .max_frame_size(Some(message_bytes_max));
    let socket = WebSocketStream::from_raw_socket(stream, Role::Server, Some(config)).await;
    let (mut outgoing, mut incoming) = socket.split();
    let (pieces, waiting) = mpsc::channel::<Bytes>(WAITING_MAX);
    let mut lines = serve(ReceiverStream::new(waiting).boxed());
    let read = async move {
        while let Some(Ok(message)) = incoming.next().await {
            if !matches!(message, Message::Text(_) | Message::Binary(_)) {
                continue;
            }
            let mut piece = message.into_data().to_vec();
            // Two values must not run into one.
            piece.push(b'\n');
            if pieces.send(piece.into()).await.is_err() {
                // Nobody reads requests any more; what the client says only keeps it connected.
                continue;
            }
        }
    };
    let write = async move {
        while let Some(line) = lines.next().await {
            let text = line.trim_end_matches('\n').to_owned();
            if outgoing.send(Message::text(text)).await.is_err() {
                return;
            }
        }
        let _already_gone = outgoing.send(Message::Close(None)).await;
        let _already_gone = outgoing.close().await;
    };
    tokio::select! {
        () = read => {}
        () = write => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn handshake(headers: &[(&str, &str)]) -> Request<()> {
        let mut request = Request::get("http://x/v3/watch");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        request.body(()).expect("a request")
    }

    const ASKING: [(&str, &str); 4] = [
        ("connection", "keep-alive, Upgrade"),
        ("upgrade", "websocket"),
        ("sec-websocket-version", "13"),
        ("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ=="),
    ];

    #[test]
    fn a_handshake_is_answered_as_the_standard_says() {
        let request = handshake(&ASKING);
        assert!(is_asked_for(&request));
        let (response, kept) = accept(&request).expect("accepted");
        assert_eq!(response.status(), 101);
        assert_eq!(response.headers()["sec-websocket-accept"], "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
        assert!(kept.is_empty());
        assert!(!is_asked_for(&handshake(&ASKING[1..])));
        assert_eq!(accept(&handshake(&ASKING[..3])).err(), Some(StatusCode::BAD_REQUEST));
    }

    #[test]
    fn a_token_comes_as_subprotocol_or_cookie() {
        let kept = |name, value| {
            let headers = [ASKING.to_vec(), vec![(name, value), ("origin", "o")]].concat();
            let (response, kept) = accept(&handshake(&headers)).expect("accepted");
            assert_eq!(kept["origin"], "o");
            let protocol = response.headers().get("sec-websocket-protocol").cloned();
            (kept.get("authorization").cloned(), protocol)
        };
        let value = |text: &'static str| Some(HeaderValue::from_static(text));
        let both = (value("Bearer abc.1"), value("Bearer"));
        assert_eq!(kept("sec-websocket-protocol", "Bearer, abc.1"), both);
        assert_eq!(kept("sec-websocket-protocol", "Bearer,abc.1"), both);
        assert_eq!(kept("sec-websocket-protocol", "other"), (None, None));
        assert_eq!(kept("cookie", "a=b; token=xyz"), (value("Bearer xyz"), None));
    }
}
