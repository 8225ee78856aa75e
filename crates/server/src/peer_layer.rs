//! What happens to every gRPC call of another member around its service: its bytes are counted for
//! the member that it says to come from. Whether it may call at all is decided by the services.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes};
use http::{HeaderMap, Request, Response};
use hyper::body::{Body, Frame, Incoming, SizeHint};
use prometheus::IntCounter;
use tonic::Status;
use tonic::service::Routes;
use tower::ServiceExt;

use crate::app::App;

/// Names the calling member, in lower-case hex (crates/raft/src/peers.rs).
const SENDER: &str = "kelson-from";

/// The services for other members.
#[derive(Clone)]
pub struct PeerService {
    routes: Routes,
    app: App,
}

impl PeerService {
    /// Puts the counters around `routes`.
    #[must_use]
    pub fn new(routes: Routes, app: &App) -> Self {
        Self { routes: routes.prepare(), app: app.clone() }
    }

    /// Answers one call.
    ///
    /// # Cancel safety
    /// Dropping it drops the service's own future.
    pub async fn call(&self, request: Request<Incoming>) -> Response<tonic::body::Body> {
        let routes = self.routes.clone();
        let Some(member) = self.sender(request.headers()) else {
            let answer = routes.oneshot(request.map(tonic::body::Body::new)).await;
            return answer.unwrap_or_else(|never| match never {});
        };
        let peers = &self.app.metrics.peers;
        let bytes = peers.received_bytes.with_label_values(&[&member]);
        let request = request.map(|body| tonic::body::Body::new(Counted { body, bytes }));
        let answer = routes.oneshot(request).await;
        let bytes = peers.sent_bytes.with_label_values(&[&member]);
        let response = answer.unwrap_or_else(|never| match never {});
        response.map(|body| tonic::body::Body::new(Counted { body, bytes }))
    }

    /// The calling member, if it is one: strangers must not make labels.
    fn sender(&self, headers: &HeaderMap) -> Option<String> {
        let text = headers.get(SENDER)?.to_str().ok()?;
        let id = u64::from_str_radix(text, 16).ok()?;
        let known = self.app.reader.members().iter().any(|member| member.id == id);
        known.then(|| format!("{id:x}"))
    }
}

/// A body whose bytes are counted as they pass.
struct Counted<B> {
    body: B,
    bytes: IntCounter,
}

impl<B> Body for Counted<B>
where
    B: Body<Data = Bytes> + Unpin,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(context));
        if let Some(Ok(frame)) = &frame
            && let Some(data) = frame.data_ref()
        {
            self.bytes.inc_by(data.remaining() as u64);
        }
        Poll::Ready(frame.map(|frame| frame.map_err(|error| Status::from_error(error.into()))))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
