//! The life of the process: binds the listeners, starts the member, wires services to sockets,
//! waits for a signal, and takes everything down in order. It is the only place that knows all
//! rooms of this crate, and it handles no request itself.

use std::path::Path;
use std::sync::{Arc, OnceLock};

use http::Request;
use hyper::body::Incoming;
use kelson_api::command::{MemberPublish, command::Op};
use kelson_raft::{Node, NodeConfig, StartError};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tonic::Status;

use crate::app::App;
use crate::config::{Config, TlsSettings, Url};
use crate::grpc_layer::GrpcService;
use crate::housekeeping::{self, Housekeeping};
use crate::http::{HttpService, Surface};
use crate::listen::{ConnectionLimit, ConnectionRules, Listener};
use crate::metrics::Metrics;
use crate::shutdown::{Asked, Shutdown, Signals};
use crate::tls::{Acceptor, TlsError, ensure_self_signed};
use crate::version::{ETCD_VERSION, KELSON_VERSION};
use crate::{notify, services};

/// Pause between two attempts to tell the cluster this member's name and client URLs.
const PUBLISH_RETRY: std::time::Duration = std::time::Duration::from_millis(500);

/// Time for answers to leave their sockets after the last request has ended.
const FLUSH_TIME: std::time::Duration = std::time::Duration::from_millis(50);

/// Why the process could not start serving.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// A certificate or key cannot be used.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// A listen address cannot be had.
    #[error("cannot listen on {url}: {source}")]
    Listen {
        /// The URL.
        url: String,
        /// Why.
        source: std::io::Error,
    },
    /// The settings of the first start are wrong.
    #[error("{0}")]
    Settings(String),
    /// The member cannot start.
    #[error(transparent)]
    Start(#[from] StartError),
    /// The system refuses a signal handler.
    #[error("cannot handle signals: {0}")]
    Signals(std::io::Error),
}

/// Runs the member until a signal asks for its end, and returns that signal. Everything is down
/// and on disk when it returns.
///
/// # Errors
/// Nothing is served and nothing is left running.
pub async fn run(mut config: Config) -> Result<Asked, ServeError> {
    let mut signals = Signals::new().map_err(ServeError::Signals)?;
    announce(&config);
    make_self_signed(&mut config)?;
    let server = Server::start(&config)?;
    let member = tokio::select! {
        started = server.start_member(&config) => started?,
        asked = signals.asked() => {
            tracing::info!(signal = asked.name(), "received signal; shutting down");
            server.stop(None).await;
            return Ok(asked);
        }
    };
    let publish = tokio::spawn(publish(member.app.clone(), config));
    let asked = signals.asked().await;
    tracing::info!(signal = asked.name(), "received signal; shutting down");
    publish.abort();
    server.stop(Some(member)).await;
    Ok(asked)
}

/// Tells the log who starts, with the settings that explain most reports.
fn announce(config: &Config) {
    tracing::info!(
        "etcd-version" = ETCD_VERSION,
        "kelson-version" = KELSON_VERSION,
        name = config.name,
        "data-dir" = config.data_dir,
        "listen-peer-urls" = texts(&config.listen_peer_urls).join(","),
        "listen-client-urls" = texts(&config.listen_client_urls).join(","),
        "listen-metrics-urls" = texts(&config.listen_metrics_urls).join(","),
        "advertise-client-urls" = texts(&config.advertise_client_urls).join(","),
        "initial-cluster" = config.initial_cluster,
        "initial-cluster-state" = config.initial_cluster_state,
        "starting an etcd server"
    );
    let has_certificate = !config.client_tls.cert_file.is_empty();
    for url in config.listen_client_urls.iter().filter(|url| has_certificate && !url.is_tls()) {
        tracing::warn!(
            "client-url" = %url,
            "scheme is http or unix while cert and key files are present; ignoring them"
        );
    }
}

fn make_self_signed(config: &mut Config) -> Result<(), TlsError> {
    let data_dir = Path::new(&config.data_dir).to_owned();
    let years = config.self_signed_cert_validity;
    if config.client_tls.auto_tls && config.client_tls.cert_file.is_empty() {
        let urls = config.listen_client_urls.clone();
        ensure_self_signed(&mut config.client_tls, &data_dir, "client", &urls, years)?;
    }
    if config.peer_tls.auto_tls && config.peer_tls.cert_file.is_empty() {
        let urls = config.listen_peer_urls.clone();
        ensure_self_signed(&mut config.peer_tls, &data_dir, "peer", &urls, years)?;
    }
    Ok(())
}

fn texts(urls: &[Url]) -> Vec<String> {
    urls.iter().map(ToString::to_string).collect()
}

/// Listeners being served and what they share. Connections are taken from the beginning, so that
/// clients see a living member while it reads its data; gRPC calls wait until it has.
struct Server {
    /// Holds the services once the member runs.
    grpc: watch::Sender<Option<GrpcService>>,
    app: Arc<OnceLock<App>>,
    http: HttpService,
    rules: ConnectionRules,
    metrics: Arc<Metrics>,
    shutdown: Shutdown,
    tasks: JoinSet<()>,
    /// Client addresses and whether they are encrypted, for the log.
    client_addresses: Vec<(String, bool)>,
}

/// What a client listener answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ClientRole {
    Both,
    GrpcOnly,
    HttpOnly,
}

/// The member and its housekeeping.
struct Member {
    app: App,
    housekeeping: Housekeeping,
}

impl Server {
    /// Binds and serves all listen URLs. A taken address stops the start before data are touched.
    fn start(config: &Config) -> Result<Self, ServeError> {
        let acceptor = |settings: &TlsSettings| match settings.cert_file.as_str() {
            "" => Ok(None),
            _ => Acceptor::new(settings, config).map(|acceptor| Some(Arc::new(acceptor))),
        };
        let client_tls = acceptor(&config.client_tls)?;
        let peer_tls = acceptor(&config.peer_tls)?;
        let bind = |urls: &[Url], tls: &Option<Arc<Acceptor>>| {
            let bind_one = |url: &Url| {
                Listener::bind(url, config, tls.as_ref())
                    .map_err(|source| ServeError::Listen { url: url.to_string(), source })
            };
            urls.iter().map(bind_one).collect::<Result<Vec<_>, _>>()
        };
        let clients = bind(&config.listen_client_urls, &client_tls)?;
        let http_clients = bind(&config.listen_client_http_urls, &client_tls)?;
        let metrics_listeners = bind(&config.listen_metrics_urls, &client_tls)?;
        let peers = bind(&config.listen_peer_urls, &peer_tls)?;

        let mut server = Self::new(config);
        let is_split = !http_clients.is_empty();
        let role = if is_split { ClientRole::GrpcOnly } else { ClientRole::Both };
        let limit = ConnectionLimit::from_open_files();
        for listener in clients {
            server.serve_clients(listener, role, &limit);
        }
        for listener in http_clients {
            server.serve_clients(listener, ClientRole::HttpOnly, &limit);
        }
        for listener in metrics_listeners {
            server.serve_http(listener, Surface::Metrics);
        }
        for listener in peers {
            server.serve_http(listener, Surface::Peer);
        }
        Ok(server)
    }

    fn new(config: &Config) -> Self {
        let metrics = Arc::new(Metrics::new(config.metrics == "extensive"));
        let app = Arc::new(OnceLock::new());
        Self {
            grpc: watch::Sender::new(None),
            http: HttpService::new(config, Arc::clone(&metrics), Arc::clone(&app)),
            app,
            rules: ConnectionRules::new(config),
            metrics,
            shutdown: Shutdown::default(),
            tasks: JoinSet::new(),
            client_addresses: Vec::new(),
        }
    }

    fn serve_clients(&mut self, listener: Listener, role: ClientRole, limit: &ConnectionLimit) {
        let is_tls = listener.url().is_tls();
        let address = listener.local_addr().map(|address| address.to_string());
        let address = address.unwrap_or_else(|| listener.url().to_string());
        self.client_addresses.push((address, is_tls));
        let (http, grpc) = (self.http.clone(), self.grpc.subscribe());
        let handler = move |request: Request<Incoming>| {
            let (http, mut grpc) = (http.clone(), grpc.clone());
            let takes_grpc = match role {
                ClientRole::Both => GrpcService::is_grpc(&request),
                ClientRole::GrpcOnly => true,
                ClientRole::HttpOnly => false,
            };
            async move {
                if !takes_grpc {
                    return http.call(Surface::Client { is_tls }, &request).await;
                }
                let ready = grpc.wait_for(Option::is_some).await;
                let service = ready.ok().and_then(|service| service.clone());
                match service {
                    Some(service) => service.call(request).await,
                    // The process ended before the member had started.
                    None => Status::from(kelson_api::Error::Stopped).into_http(),
                }
            }
        };
        let (rules, limit) = (self.rules.clone(), Some(limit.clone()));
        self.tasks.spawn(listener.serve(rules, limit, self.shutdown.clone(), handler));
    }

    fn serve_http(&mut self, listener: Listener, surface: Surface) {
        let http = self.http.clone();
        let handler = move |request: Request<Incoming>| {
            let http = http.clone();
            async move { http.call(surface, &request).await }
        };
        let rules = self.rules.clone();
        self.tasks.spawn(listener.serve(rules, None, self.shutdown.clone(), handler));
    }

    /// Opens the data and waits until the member has caught up with its own log; then lets gRPC
    /// calls through.
    async fn start_member(&self, config: &Config) -> Result<Member, ServeError> {
        let (node, reader) = Node::start(node_config(config)?).await?;
        let app = App {
            node,
            reader,
            limits: Arc::new(config.limits()),
            metrics: Arc::clone(&self.metrics),
            stopping: self.shutdown.stopping(),
        };
        let housekeeping = housekeeping::start(&app);
        let routes = services::routes(&app, housekeeping.lessor());
        let slow = app.limits.warning_unary_request_duration;
        let metrics = Arc::clone(&self.metrics);
        let grpc = GrpcService::new(routes, metrics, self.shutdown.clone(), slow);
        // A server starts one member, so this is the first and only value.
        let _is_first = self.app.set(app.clone());
        self.grpc.send_replace(Some(grpc));
        tracing::info!("ready to serve client requests");
        for (address, is_tls) in &self.client_addresses {
            if *is_tls {
                tracing::info!(address, "serving client traffic securely");
            } else {
                tracing::warn!(
                    address,
                    "serving client traffic insecurely; this is strongly discouraged!"
                );
            }
        }
        Ok(Member { app, housekeeping })
    }

    /// Takes everything down: no new requests, those in flight end, connections close,
    /// housekeeping stops, and the member hands over and writes its last checkpoint.
    async fn stop(mut self, member: Option<Member>) {
        self.shutdown.ask();
        self.shutdown.drained().await;
        tokio::time::sleep(FLUSH_TIME).await;
        self.shutdown.close();
        while self.tasks.join_next().await.is_some() {}
        if let Some(Member { app, housekeeping }) = member {
            housekeeping.stop().await;
            hand_over(&app.node).await;
            app.node.shutdown().await;
        }
        tracing::info!("closed etcd server");
    }
}

/// The member's own settings.
fn node_config(config: &Config) -> Result<NodeConfig, ServeError> {
    let mut storage = kelson_storage::Options::new(&config.data_dir);
    let limits = config.limits();
    storage.compaction_batch_limit = limits.compaction_batch_limit;
    storage.compaction_sleep = limits.compaction_sleep_interval;
    if !config.backend_batch_interval.is_zero() {
        storage.checkpoint_interval = config.backend_batch_interval;
    }
    Ok(NodeConfig {
        name: config.name.clone(),
        data_dir: config.data_dir.clone().into(),
        initial_cluster: config.cluster_members().map_err(ServeError::Settings)?,
        initial_cluster_token: config.initial_cluster_token.clone(),
        advertise_peer_urls: texts(&config.initial_advertise_peer_urls),
        initial_state_existing: config.initial_cluster_state == "existing",
        heartbeat: config.heartbeat(),
        election: config.election(),
        unsafe_no_fsync: config.unsafe_no_fsync,
        max_request_bytes: config.max_request_bytes,
        snapshot_catchup_entries: config.snapshot_catchup_entries,
        storage,
    })
}

/// Tells the cluster this member's name and client URLs, then the service manager that it is
/// ready. Repeats until it succeeds.
async fn publish(app: App, config: Config) {
    let id = app.node.status().member_id;
    let client_urls = texts(&config.advertise_client_urls);
    loop {
        let message = MemberPublish {
            id,
            name: config.name.clone(),
            client_urls: client_urls.clone(),
            ..Default::default()
        };
        match app.node.propose(Op::MemberPublish(message)).await {
            Ok(outcome) if outcome.result.is_ok() => break,
            Ok(outcome) => tracing::warn!(result = ?outcome.result, "cannot publish the member"),
            Err(error) => tracing::warn!(%error, "cannot publish the member; trying again"),
        }
        tokio::time::sleep(PUBLISH_RETRY).await;
    }
    tracing::info!(
        "local-member-id" = format!("{id:x}"),
        "local-member-name" = config.name,
        "client-urls" = client_urls.join(","),
        "published local member to cluster through raft"
    );
    if let Err(error) = notify::notify("READY=1") {
        tracing::warn!(%error, "cannot tell the service manager that the member is ready");
    }
}

/// Hands leadership to another voter, if there is one, so that the cluster need not wait for an
/// election.
async fn hand_over(node: &Node) {
    let status = node.status();
    if !status.is_leader {
        return;
    }
    let voters = node.reader().members().into_iter().filter(|member| !member.is_learner);
    let Some(target) = voters.map(|member| member.id).find(|id| *id != status.member_id) else {
        return;
    };
    if let Err(error) = node.move_leader(target).await {
        tracing::warn!(%error, "cannot hand over leadership before stopping");
    }
}
