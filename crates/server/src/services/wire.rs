//! Makes the transport speak like grpc-go: clients and scripts match on its texts for messages
//! that are too large or not protobuf, and for unknown services and methods. It rewrites only
//! statuses that tonic itself made; a status made by a service passes untouched.

use std::convert::Infallible;
use std::task::{Context, Poll};

use futures::future::BoxFuture;
use http::{HeaderMap, Request, Response};
use tonic::{Code, Status};
use tower::{Layer, Service};

/// Every service this server knows, for the difference between an unknown method and an unknown
/// service. Kept beside `services::routes`.
pub(super) const SERVICES: [&str; 8] = [
    "etcdserverpb.KV",
    "etcdserverpb.Watch",
    "etcdserverpb.Lease",
    "etcdserverpb.Cluster",
    "etcdserverpb.Maintenance",
    "v3lockpb.Lock",
    "v3electionpb.Election",
    "grpc.health.v1.Health",
];

/// Words by which tonic reports a frame above the limit; two numbers follow them.
const TOO_LARGE: &str = "Error, decoded message length too large: found ";
/// What stands between the two numbers.
const TOO_LARGE_LIMIT: &str = " bytes, the limit is: ";
/// Words by which prost reports bytes that are not the message.
const NOT_PROTOBUF: &str = "failed to decode Protobuf message: ";

/// Gives a status that was read from a request stream the text that grpc-go would give it.
#[must_use]
pub fn translate(status: Status) -> Status {
    let text = status.message();
    if let Some((size, limit)) = too_large(text) {
        return Status::resource_exhausted(format!(
            "grpc: received message larger than max ({size} vs. {limit})"
        ));
    }
    if let Some(cause) = text.strip_prefix(NOT_PROTOBUF) {
        return Status::internal(format!("grpc: error unmarshalling request: {cause}"));
    }
    status
}

/// The two numbers of tonic's complaint about a frame that is too large.
fn too_large(text: &str) -> Option<(u64, u64)> {
    let (size, limit) = text.strip_prefix(TOO_LARGE)?.split_once(TOO_LARGE_LIMIT)?;
    Some((size.parse().ok()?, limit.strip_suffix(" bytes")?.parse().ok()?))
}

/// What to say about a call that nobody serves.
fn unserved(path: &str) -> Status {
    let Some((service, method)) = path.trim_start_matches('/').rsplit_once('/') else {
        return Status::unimplemented(format!("malformed method name: {path:?}"));
    };
    if SERVICES.contains(&service) {
        Status::unimplemented(format!("unknown method {method} for service {service}"))
    } else {
        Status::unimplemented(format!("unknown service {service}"))
    }
}

/// The status that should stand in place of the one in these headers, if any.
fn replacement(path: &str, headers: &HeaderMap) -> Option<Status> {
    // A call that runs has no status in its headers; this is the answer for nearly all calls.
    let code = headers.get(Status::GRPC_STATUS)?;
    if code == "0" {
        return None;
    }
    let status = Status::from_header_map(headers)?;
    if status.code() == Code::Unimplemented && status.message().is_empty() {
        return Some(unserved(path));
    }
    let translated = translate(status.clone());
    (translated.message() != status.message()).then_some(translated)
}

/// Puts [`GrpcTexts`] around the services.
#[derive(Clone, Copy, Debug)]
pub(super) struct GrpcTextsLayer;

impl<S> Layer<S> for GrpcTextsLayer {
    type Service = GrpcTexts<S>;

    fn layer(&self, inner: S) -> Self::Service {
        GrpcTexts { inner }
    }
}

/// Rewrites the statuses of answers that consist of headers only.
#[derive(Clone, Debug)]
pub(super) struct GrpcTexts<S> {
    inner: S,
}

impl<S, B, R> Service<Request<B>> for GrpcTexts<S>
where
    S: Service<Request<B>, Response = Response<R>, Error = Infallible>,
    S::Future: Send + 'static,
    R: Default,
{
    type Response = Response<R>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Self::Response, Self::Error>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let uri = request.uri().clone();
        let answer = self.inner.call(request);
        Box::pin(async move {
            let response = answer.await?;
            let status = replacement(uri.path(), response.headers());
            Ok(status.map_or(response, |status| status.into_http()))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn in_headers(status: &Status) -> HeaderMap {
        status.clone().into_http::<()>().headers().clone()
    }

    #[test]
    fn texts_of_the_transport_become_grpc_go_s() {
        let text = format!("{TOO_LARGE}3145728{TOO_LARGE_LIMIT}2097152 bytes");
        let large = Status::out_of_range(text);
        let told = replacement("/etcdserverpb.KV/Put", &in_headers(&large)).expect("rewritten");
        assert_eq!(told.code(), Code::ResourceExhausted);
        assert_eq!(told.message(), "grpc: received message larger than max (3145728 vs. 2097152)");

        let garbage = Status::internal("failed to decode Protobuf message: invalid tag value: 0");
        let told = replacement("/etcdserverpb.KV/Put", &in_headers(&garbage)).expect("rewritten");
        assert_eq!(told.code(), Code::Internal);
        assert_eq!(told.message(), "grpc: error unmarshalling request: invalid tag value: 0");
    }

    #[test]
    fn unserved_calls_are_named() {
        let nothing = in_headers(&Status::unimplemented(""));
        let told = |path| replacement(path, &nothing).expect("rewritten").message().to_owned();
        assert_eq!(
            told("/etcdserverpb.KV/Frob"),
            "unknown method Frob for service etcdserverpb.KV"
        );
        assert_eq!(told("/foo.Bar/Baz"), "unknown service foo.Bar");
        assert_eq!(told("/nothing"), "malformed method name: \"/nothing\"");
    }

    #[test]
    fn the_services_own_statuses_pass() {
        for status in [
            Status::unimplemented("RangeStream does not support revision filters"),
            Status::out_of_range("etcdserver: mvcc: required revision has been compacted"),
            Status::ok(""),
        ] {
            assert!(replacement("/etcdserverpb.KV/Range", &in_headers(&status)).is_none());
        }
        assert!(replacement("/etcdserverpb.KV/Range", &HeaderMap::new()).is_none());
    }

    /// The words are tonic's and prost's own: this fails when one of them changes its text.
    #[test]
    fn prost_still_uses_the_words() {
        use kelson_api::Message as _;
        let bytes: &[u8] = &[0x0a, 0x05, 1];
        let error = kelson_api::etcdserverpb::PutRequest::decode(bytes).expect_err("cut short");
        assert!(error.to_string().starts_with(NOT_PROTOBUF), "{error}");
    }
}
