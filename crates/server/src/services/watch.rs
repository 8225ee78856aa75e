//! The gRPC service `etcdserverpb.Watch`: admits a stream, gives it to `watch::WatchStream`, and
//! decides with which status it ends. It is registered by hand instead of through the generated
//! stub, because its codec sends events that are encoded already. It holds no watchers itself.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures::future::BoxFuture;
use futures::{FutureExt, Stream, StreamExt};
use kelson_api::Error;
use kelson_api::etcdserverpb::WatchRequest;
use kelson_storage::sabotage::{self, Variant};
use tokio::sync::watch;
use tonic::body::Body;
use tonic::server::{Grpc, NamedService, StreamingService};
use tonic::{Code, Request, Response, Status, Streaming};
use tower::Service;

use super::gate::{Gate, LeaderWatch};
use super::wire::translate;
use crate::app::App;
use crate::callers::Caller;
use crate::metrics::Metrics;
use crate::watch::{
    Ends, Hub, HubHandle, Member, Permit, Response as WatchReply, StreamOptions, Tuning,
    WatchCodec, WatchStats, WatchStream,
};

/// How often the metrics are brought up to date.
const METRICS_INTERVAL: Duration = Duration::from_secs(1);

/// Responses of one stream.
type Replies = Pin<Box<dyn Stream<Item = Result<WatchReply, Status>> + Send>>;

/// The Watch service of the member of `app`. To be called once per process, inside the runtime: it
/// starts the hub, which ends with the store.
#[must_use]
pub fn server(app: &App) -> WatchServer {
    let member = Member { node: app.node.clone(), reader: app.reader.clone() };
    let (hub, handle) = Hub::new(member.clone(), Tuning::default());
    tokio::spawn(run_hub(hub, app.stopping.clone()));
    tokio::spawn(show_stats(handle.stats().clone(), app.metrics.clone(), app.stopping.clone()));
    let options = StreamOptions {
        fragment_bytes: app.limits.max_decoding_bytes(),
        progress_interval: app.limits.progress_notify_interval,
    };
    let service = WatchService {
        member,
        hub: handle,
        options,
        gate: Gate::new(app),
        stopping: app.stopping.clone(),
    };
    WatchServer { service: Arc::new(service), max_decoding_bytes: app.limits.max_decoding_bytes() }
}

/// Runs the hub until the server stops; then nothing here holds on to the member any more.
async fn run_hub(hub: Hub<Member>, mut stopping: watch::Receiver<bool>) {
    tokio::select! {
        () = hub.run() => {}
        _ = stopping.wait_for(|stopping| *stopping) => {}
    }
}

/// What every stream is given.
struct WatchService {
    member: Member,
    hub: HubHandle,
    options: StreamOptions,
    gate: Gate,
    stopping: watch::Receiver<bool>,
}

impl WatchService {
    async fn watch(
        &self,
        request: Request<Streaming<WatchRequest>>,
    ) -> Result<Response<Replies>, Status> {
        let (metadata, extensions, requests) = request.into_parts();
        let (caller, leader) = self.gate.stream(&metadata, &extensions, false).await?;
        let ends = ends(leader, self.stopping.clone());
        let requests = requests.map(|request| request.map_err(why_unreadable));
        let (member, hub) = (self.member.clone(), self.hub.clone());
        let stream = WatchStream::new(member, hub, self.options, requests, ends);
        let stream = stream.checked_by(permit(caller));
        Ok(Response::new(Box::pin(stream.responses())))
    }
}

/// Asks at each create request anew, as etcd does: what was allowed once goes on.
fn permit(caller: Caller) -> Permit {
    let caller = Arc::new(caller);
    Box::new(move |key, range_end| {
        let caller = Arc::clone(&caller);
        async move {
            if sabotage::is(Variant::WatchUnchecked) {
                return caller.anybody().await;
            }
            caller.reads(&key, &range_end).await.map(drop)
        }
        .boxed()
    })
}

/// Resolves when the stream has to end from our side.
fn ends(mut leader: LeaderWatch, mut stopping: watch::Receiver<bool>) -> Ends {
    async move {
        tokio::select! {
            () = leader.lost() => Error::NoLeader.into(),
            // An error means that the one who would say it is gone: the server stops, too.
            _ = stopping.wait_for(|stopping| *stopping) => Error::Stopped.into(),
        }
    }
    .boxed()
}

/// The status of a stream whose requests cannot be read any more. A client that cancels its call,
/// or whose connection breaks, did just that; bytes that are no request keep their own status.
fn why_unreadable(status: Status) -> Status {
    match status.code() {
        Code::Cancelled | Code::Unknown => Error::WatchCanceled.into(),
        _ => translate(status),
    }
}

/// Copies the counters into the metrics page until the server stops.
async fn show_stats(
    stats: Arc<WatchStats>,
    metrics: Arc<Metrics>,
    mut stopping: watch::Receiver<bool>,
) {
    let mut events_shown = 0;
    let mut timer = tokio::time::interval(METRICS_INTERVAL);
    loop {
        tokio::select! {
            _ = timer.tick() => {}
            _ = stopping.wait_for(|stopping| *stopping) => return,
        }
        metrics.mvcc_watch_stream.set(stats.streams());
        metrics.mvcc_watcher.set(stats.watchers());
        metrics.mvcc_slow_watcher.set(stats.slow_watchers());
        metrics.mvcc_pending_events.set(stats.pending_events());
        let events = stats.events_sent();
        metrics.mvcc_events.inc_by(events - events_shown);
        events_shown = events;
    }
}

/// The service as the router takes it. Cloning shares it.
#[derive(Clone)]
pub struct WatchServer {
    service: Arc<WatchService>,
    max_decoding_bytes: usize,
}

impl WatchServer {
    /// Counters of all watch streams.
    #[must_use]
    pub fn stats(&self) -> Arc<WatchStats> {
        self.service.hub.stats().clone()
    }
}

impl NamedService for WatchServer {
    const NAME: &'static str = "etcdserverpb.Watch";
}

/// The only method.
struct WatchMethod(Arc<WatchService>);

impl StreamingService<WatchRequest> for WatchMethod {
    type Response = WatchReply;
    type ResponseStream = Replies;
    type Future = BoxFuture<'static, Result<Response<Replies>, Status>>;

    fn call(&mut self, request: Request<Streaming<WatchRequest>>) -> Self::Future {
        let service = Arc::clone(&self.0);
        async move { service.watch(request).await }.boxed()
    }
}

impl<B> Service<http::Request<B>> for WatchServer
where
    B: tonic::codegen::Body + Send + 'static,
    B::Error: Into<tonic::codegen::StdError> + Send + 'static,
{
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<B>) -> Self::Future {
        if request.uri().path() != "/etcdserverpb.Watch/Watch" {
            // The layer around all services puts the method's name into the text.
            return async { Ok(Status::unimplemented("").into_http()) }.boxed();
        }
        let method = WatchMethod(self.service.clone());
        let max_decoding_bytes = self.max_decoding_bytes;
        async move {
            let mut grpc = Grpc::new(WatchCodec).max_decoding_message_size(max_decoding_bytes);
            Ok(grpc.streaming(method, request).await)
        }
        .boxed()
    }
}
