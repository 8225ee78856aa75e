//! The way to one of the two clusters: its endpoints, its TLS, its users, and the few questions that
//! are asked of both. It retries only what changes nothing; changes are the business of `replay`.

use std::sync::Arc;
use std::time::{Duration, Instant};

use hyper_util::rt::TokioIo;
use kelson_api::etcdserverpb::auth_client::AuthClient;
use kelson_api::etcdserverpb::kv_client::KvClient;
use kelson_api::etcdserverpb::lease_client::LeaseClient;
use kelson_api::etcdserverpb::maintenance_client::MaintenanceClient;
use kelson_api::etcdserverpb::watch_client::WatchClient;
use kelson_api::etcdserverpb::{
    AuthStatusRequest, AuthenticateRequest, CompactionRequest, HashKvRequest, HashKvResponse,
    RangeRequest,
};
use kelson_server::config::{Config, TlsSettings};
use kelson_server::dial::Dial;
use parking_lot::Mutex;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, Endpoint, Uri};
use tonic::{Code, Request, Status};

use super::args::Side;

/// Longest wait for one answer. HashKV reads everything, so it is not short.
const ANSWER_TIME: Duration = Duration::from_secs(60);
/// How long a cluster may be away before this program gives up.
const PATIENCE: Duration = Duration::from_secs(120);
/// Pause before somebody else is asked.
const PAUSE: Duration = Duration::from_millis(200);
/// Largest message taken from a server: a range of one key, a revision of many.
const MESSAGE_MAX: usize = 512 << 20;

pub(super) type Line = InterceptedService<Channel, Token>;

/// What proves who is calling; replaced when it has expired.
#[derive(Clone, Default)]
pub(super) struct Token(Arc<Mutex<Option<MetadataValue<Ascii>>>>);

impl Interceptor for Token {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(token) = &*self.0.lock() {
            request.metadata_mut().insert("token", token.clone());
        }
        Ok(request)
    }
}

/// One cluster.
pub(super) struct Door {
    side: Side,
    lines: Vec<Channel>,
    token: Token,
    current: usize,
}

impl Door {
    /// Reads the TLS files and learns who answers.
    pub(super) async fn open(side: Side) -> Result<Door, String> {
        let settings = TlsSettings {
            cert_file: side.cert.clone(),
            key_file: side.key.clone(),
            trusted_ca_file: side.cacert.clone(),
            ..TlsSettings::default()
        };
        let dial = Dial::new(&Config::default(), &settings)
            .map_err(|error| format!("{}: {error}", side.name))?;
        let lines = side.endpoints.iter().map(|url| line(url, &dial)).collect::<Result<_, _>>()?;
        let mut door = Door { side, lines, token: Token::default(), current: 0 };
        door.log_in().await?;
        door.revision().await?;
        Ok(door)
    }

    fn line(&self) -> Line {
        InterceptedService::new(self.lines[self.current].clone(), self.token.clone())
    }

    pub(super) fn kv(&self) -> KvClient<Line> {
        KvClient::new(self.line()).max_decoding_message_size(MESSAGE_MAX)
    }

    pub(super) fn lease(&self) -> LeaseClient<Line> {
        LeaseClient::new(self.line()).max_decoding_message_size(MESSAGE_MAX)
    }

    pub(super) fn watch(&self) -> WatchClient<Line> {
        WatchClient::new(self.line()).max_decoding_message_size(MESSAGE_MAX)
    }

    fn maintenance(&self) -> MaintenanceClient<Line> {
        MaintenanceClient::new(self.line())
    }

    /// A request that ends in time.
    pub(super) fn timed<T>(message: T) -> Request<T> {
        let mut request = Request::new(message);
        request.set_timeout(ANSWER_TIME);
        request
    }

    /// Gets a token if this side has a user. A refusal is final.
    async fn log_in(&mut self) -> Result<(), String> {
        let Some((name, password)) = self.side.user.clone() else { return Ok(()) };
        let since = Instant::now();
        loop {
            let request = AuthenticateRequest { name: name.clone(), password: password.clone() };
            *self.token.0.lock() = None;
            let mut client = AuthClient::new(self.line());
            match client.authenticate(Self::timed(request)).await {
                Ok(reply) => {
                    let token = reply.into_inner().token.parse();
                    *self.token.0.lock() =
                        Some(token.map_err(|_| self.text("sent a token that is no text"))?);
                    return Ok(());
                }
                Err(status) => self.after(&status, since).await?,
            }
        }
    }

    /// After a failed question: turns to another endpoint, or gives up. Never returns `Ok` for an
    /// answer that would be the same again.
    pub(super) async fn after(&mut self, status: &Status, since: Instant) -> Result<(), String> {
        let may_pass = [Code::Unavailable, Code::DeadlineExceeded, Code::Cancelled, Code::Unknown];
        if !may_pass.contains(&status.code()) || since.elapsed() > PATIENCE {
            return Err(self.text(status.message()));
        }
        self.current = (self.current + 1) % self.lines.len();
        tokio::time::sleep(PAUSE).await;
        Ok(())
    }

    /// The same for a call that may be asked without a token any more.
    pub(super) async fn again(&mut self, status: &Status, since: Instant) -> Result<(), String> {
        let expired = status.code() == Code::Unauthenticated && self.side.user.is_some();
        if expired && since.elapsed() < PATIENCE {
            return self.log_in().await;
        }
        self.after(status, since).await
    }

    /// A text about this side, with its endpoint.
    pub(super) fn text(&self, what: &str) -> String {
        format!("{} ({}): {what}", self.side.name, self.side.endpoints[self.current])
    }

    /// The newest revision, agreed upon.
    pub(super) async fn revision(&mut self) -> Result<i64, String> {
        let since = Instant::now();
        loop {
            let request = RangeRequest { key: "\0".into(), limit: 1, ..RangeRequest::default() };
            match self.kv().range(Self::timed(request)).await {
                Ok(reply) => {
                    let header = reply.into_inner().header;
                    return header
                        .map(|header| header.revision)
                        .ok_or_else(|| self.text("answers without a header"));
                }
                Err(status) => self.again(&status, since).await?,
            }
        }
    }

    /// Keys in a range at the newest revision.
    pub(super) async fn count(&mut self, key: &[u8], range_end: &[u8]) -> Result<i64, String> {
        let since = Instant::now();
        loop {
            let request = RangeRequest {
                key: key.to_vec().into(),
                range_end: range_end.to_vec().into(),
                count_only: true,
                ..RangeRequest::default()
            };
            match self.kv().range(Self::timed(request)).await {
                Ok(reply) => return Ok(reply.into_inner().count),
                Err(status) => self.again(&status, since).await?,
            }
        }
    }

    /// The hash of everything up to a revision, on the member that is asked at present.
    pub(super) async fn hash(&mut self, revision: i64) -> Result<HashKvResponse, String> {
        let since = Instant::now();
        loop {
            // A member that lags does not know the revision yet; a linearizable read makes it catch up.
            self.revision().await?;
            let request = HashKvRequest { revision };
            match self.maintenance().hash_kv(Self::timed(request)).await {
                Ok(reply) => return Ok(reply.into_inner()),
                Err(status) => self.again(&status, since).await?,
            }
        }
    }

    /// Forgets what lies below a revision, as the source has done.
    pub(super) async fn compact(&mut self, revision: i64) -> Result<(), String> {
        let since = Instant::now();
        loop {
            let request = CompactionRequest { revision, physical: true };
            match self.kv().compact(Self::timed(request)).await {
                Ok(_) => return Ok(()),
                // An attempt that seemed to fail had gone through.
                Err(status) if status.message().contains("has been compacted") => return Ok(()),
                Err(status) => self.again(&status, since).await?,
            }
        }
    }

    /// Version of users and roles; none where it cannot be had.
    pub(super) async fn auth_revision(&mut self) -> Option<u64> {
        let mut client = AuthClient::new(self.line());
        let reply = client.auth_status(Self::timed(AuthStatusRequest {})).await;
        reply.ok().map(|reply| reply.into_inner().auth_revision)
    }
}

fn line(url: &str, dial: &Dial) -> Result<Channel, String> {
    let bad = |error: &dyn std::fmt::Display| format!("{url}: {error}");
    // The connector knows where to go and how; the endpoint's own URL only names the host.
    let host = url.split_once("://").map_or(url, |(_, host)| host).trim_end_matches('/');
    let endpoint = Endpoint::from_shared(format!("http://{host}")).map_err(|error| bad(&error))?;
    let (dial, url) = (dial.clone(), url.to_owned());
    let connect = tower::service_fn(move |_: Uri| {
        let (dial, url) = (dial.clone(), url.clone());
        async move { dial.open(&url).await.map(TokioIo::new) }
    });
    Ok(endpoint.connect_with_connector_lazy(connect))
}
