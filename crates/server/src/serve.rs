//! The life of the process: binds the listeners, starts the member, wires services to sockets,
//! waits for a signal, and takes everything down in order. It is the only place that knows all
//! rooms of this crate, and it handles no request itself.

use std::path::Path;
use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use http::Request;
use hyper::body::Incoming;
use kelson_api::command::{MemberPublish, command::Op};
use kelson_raft::{Node, NodeConfig, StartError};
use kelson_storage::Reader;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tonic::Status;

use crate::app::App;
use crate::callers::{Callers, Tokens};
use crate::config::{Config, TlsSettings, Url};
use crate::dial::Dial;
use crate::discovery::{self, DiscoveryError, dns::Resolver};
use crate::gateway::Gateway;
use crate::grpc_layer::GrpcService;
use crate::housekeeping::corruption::{self, Inconsistent};
use crate::housekeeping::{self, Housekeeping, leadership};
use crate::http::{HttpService, Surface};
use crate::listen::{ConnectionLimit, ConnectionRules, Listener, OverTls};
use crate::metrics::Metrics;
use crate::metrics::peers::TrafficByUrl;
use crate::peer_layer::PeerService;

use crate::shutdown::{Asked, Shutdown, Signals};
use crate::tls::{Acceptor, TlsError, ensure_self_signed};
use crate::version::{ETCD_VERSION, KELSON_VERSION};
use crate::{notify, replace, services};

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
    /// Auth tokens cannot be had as the flag wants them.
    #[error("{0}")]
    Tokens(String),
    /// The member cannot start.
    #[error(transparent)]
    Start(#[from] StartError),
    /// The members of the cluster to be founded cannot be found.
    #[error(transparent)]
    Discovery(#[from] DiscoveryError),
    /// This member's data are not those of the others.
    #[error(transparent)]
    Inconsistent(#[from] Inconsistent),
    /// The space of removed data cannot be given back.
    #[error("defragmentation at the start failed: {0}")]
    Defragment(String),
    /// The system refuses a signal handler.
    #[error("cannot handle signals: {0}")]
    Signals(std::io::Error),
}

/// A member that cannot come back says what to run instead, beside the reason that ends it.
fn tell_how_to_replace(config: &Config, error: &StartError) {
    if let Some(commands) = replace::commands(config, error) {
        tracing::error!(
            run = commands,
            "this member cannot be used any more: run these commands with ENDPOINTS set to client \
             URLs of the other members, then start it with --initial-cluster-state=existing and the \
             --initial-cluster that `member add` printed"
        );
    }
}

/// Why the process ends although nothing went wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// A signal asked for it.
    Asked(Asked),
    /// The cluster has removed this member for good.
    Removed,
}

/// Runs the member until a signal asks for its end or the cluster removes it. Everything is down and
/// on disk when it returns.
///
/// # Errors
/// Nothing is served and nothing is left running.
pub async fn run(mut config: Config) -> Result<End, ServeError> {
    let mut signals = Signals::new().map_err(ServeError::Signals)?;
    announce(&config);
    make_self_signed(&mut config)?;
    let tokens = Tokens::from_flag(&config.auth_token).map_err(ServeError::Tokens)?;
    let traffic = TrafficByUrl::default();
    let dial = Dial::new(&config, &config.peer_tls)?.counting(traffic.clone());
    let server = Server::start(&config)?;
    let started = tokio::select! {
        started = server.start_member(&config, &dial, traffic, tokens) => Ok(started?),
        asked = signals.asked() => Err(asked),
    };
    let member = match started {
        Ok(member) => member,
        Err(asked) => {
            server.stop(None, End::Asked(asked)).await;
            return Ok(End::Asked(asked));
        }
    };
    let mut removed = member.app.node.removed();
    // Its sender lives as long as the member.
    let removed = async move { drop(removed.wait_for(|removed| *removed).await) };
    let served = tokio::select! {
        error = server.serve_member(&member, &config) => Err(error),
        asked = signals.asked() => Ok(End::Asked(asked)),
        () = removed => Ok(End::Removed),
    };
    let end = match &served {
        Ok(end) => *end,
        Err(_) => End::Asked(Asked::Terminate),
    };
    server.stop(Some(member), end).await;
    served
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
        "snapshot-catchup-entries" = config.snapshot_catchup_entries,
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
    /// Holds the services once the member may serve clients.
    grpc: watch::Sender<Option<GrpcService>>,
    /// Holds what other members are answered with, as soon as the member runs.
    peer_grpc: watch::Sender<Option<PeerService>>,
    app: Arc<OnceLock<App>>,
    http: HttpService,
    rules: ConnectionRules,
    metrics: Arc<Metrics>,
    shutdown: Shutdown,
    tasks: JoinSet<()>,
    /// The listeners of other members end last: what clients still wait for needs them.
    peer_shutdown: Shutdown,
    peer_tasks: JoinSet<()>,
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
        let clients = Listener::bind_all(&config.listen_client_urls, config, client_tls.as_ref());
        let clients =
            clients.map_err(|(url, source)| ServeError::Listen { url: url.to_string(), source })?;
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
            server.serve_metrics(listener);
        }
        for listener in peers {
            server.serve_peers(listener, !config.peer_tls.skip_client_san_verification);
        }
        Ok(server)
    }

    fn new(config: &Config) -> Self {
        let metrics = Arc::new(Metrics::new(config.metrics == "extensive"));
        let app = Arc::new(OnceLock::new());
        let grpc = watch::Sender::new(None);
        let gateway = Gateway::new(grpc.subscribe(), config.limits().max_decoding_bytes());
        Self {
            grpc,
            peer_grpc: watch::Sender::new(None),
            http: HttpService::new(config, Arc::clone(&metrics), Arc::clone(&app), gateway),
            app,
            rules: ConnectionRules::new(config),
            metrics,
            shutdown: Shutdown::default(),
            tasks: JoinSet::new(),
            peer_shutdown: Shutdown::default(),
            peer_tasks: JoinSet::new(),
            client_addresses: Vec::new(),
        }
    }

    fn serve_clients(&mut self, listener: Listener, role: ClientRole, limit: &ConnectionLimit) {
        let address = listener.local_addr().map(|address| address.to_string());
        let address = address.unwrap_or_else(|| listener.url().to_string());
        let (is_plain, is_tls) = listener.serves();
        let kinds = [(is_plain, false), (is_tls, true)];
        let served = kinds.into_iter().filter(|(is_served, _)| *is_served);
        self.client_addresses.extend(served.map(|(_, is_tls)| (address.clone(), is_tls)));
        let (http, grpc) = (self.http.clone(), self.grpc.subscribe());
        let handler = move |request: Request<Incoming>| {
            let (http, mut grpc) = (http.clone(), grpc.clone());
            let is_tls = request.extensions().get::<OverTls>().is_some();
            let takes_grpc = match role {
                ClientRole::Both => GrpcService::is_grpc(&request),
                ClientRole::GrpcOnly => true,
                ClientRole::HttpOnly => false,
            };
            async move {
                if !takes_grpc {
                    return http.call(Surface::Client { is_tls }, request).await;
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

    fn serve_metrics(&mut self, listener: Listener) {
        let http = self.http.clone();
        let handler = move |request: Request<Incoming>| {
            let http = http.clone();
            async move { http.call(Surface::Metrics, request).await }
        };
        let rules = self.rules.without_ping_limit();
        self.tasks.spawn(listener.serve(rules, None, self.shutdown.clone(), handler));
    }

    fn serve_peers(&mut self, listener: Listener, checks_addresses: bool) {
        let (http, grpc) = (self.http.clone(), self.peer_grpc.subscribe());
        let handler = move |request: Request<Incoming>| {
            let http = http.clone();
            let is_grpc = GrpcService::is_grpc(&request);
            let service = is_grpc.then(|| grpc.borrow().clone());
            async move {
                match service {
                    None => http.call(Surface::Peer, request).await,
                    Some(Some(service)) => service.call(request).await,
                    Some(None) => Status::unavailable("the member is starting").into_http(),
                }
            }
        };
        let mut rules = self.rules.of_peers();
        if checks_addresses {
            rules = rules.checking_addresses();
        }
        let shutdown = self.peer_shutdown.clone();
        self.peer_tasks.spawn(listener.serve(rules, None, shutdown, handler));
    }

    /// Opens the data, or finds the cluster to join or found, and starts to answer other members.
    async fn start_member(
        &self,
        config: &Config,
        dial: &Dial,
        traffic: TrafficByUrl,
        tokens: Tokens,
    ) -> Result<Member, ServeError> {
        let started = Node::start(node_config(config, dial).await?).await;
        let (node, reader) = started.inspect_err(|error| tell_how_to_replace(config, error))?;
        defragment_at_start(config, &reader).await?;
        let callers = Callers::new(node.clone(), reader.clone()).with_flags(tokens, config);
        let app = App {
            node,
            reader,
            callers: Arc::new(callers),
            limits: Arc::new(config.limits()),
            metrics: Arc::clone(&self.metrics),
            stopping: self.shutdown.stopping(),
            probes: Arc::default(),
            traffic,
        };
        let housekeeping = housekeeping::start(&app, &housekeeping::Checks::new(config));
        let routes = app.node.peer_routes();
        let routes = routes.add_service(services::side::server(&app, housekeeping.lessor()));
        self.peer_grpc.send_replace(Some(PeerService::new(routes, &app)));
        // A server starts one member, so this is the first and only value.
        let _is_first = self.app.set(app.clone());
        Ok(Member { app, housekeeping })
    }

    /// Tells the cluster about this member once it has caught up, lets gRPC calls of clients through,
    /// and then waits for ever. Returns only why it must not serve.
    async fn serve_member(&self, member: &Member, config: &Config) -> ServeError {
        let app = &member.app;
        if app.node.ready().await.is_err() {
            // Only a member that was stopped is never ready.
            return std::future::pending().await;
        }
        if config.feature_gates.enabled("InitialCorruptCheck")
            && let Err(error) = corruption::check_at_start(app).await
        {
            return error.into();
        }
        // What was read back from the log may be older than any token lasts.
        app.reader.forget_tokens();
        // As with etcd, the first answer that a client gets knows this member's name.
        publish(app, config).await;
        let routes = services::routes(app, member.housekeeping.lessor());
        let slow = app.limits.warning_unary_request_duration;
        let metrics = Arc::clone(&self.metrics);
        let grpc = GrpcService::new(routes, metrics, self.shutdown.clone(), slow);
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
        if let Err(error) = notify::notify("READY=1") {
            tracing::warn!(%error, "cannot tell the service manager that the member is ready");
        }
        std::future::pending().await
    }

    /// Takes everything down: leadership goes first, so that the cluster need not wait for an
    /// election; no new requests, those in flight end, connections close; housekeeping stops, and
    /// the member writes its last checkpoint. Other members are answered until it has.
    async fn stop(mut self, member: Option<Member>, end: End) {
        match end {
            End::Asked(asked) => {
                tracing::info!(signal = asked.name(), "received signal; shutting down");
            }
            End::Removed => {
                let error = "the member has been permanently removed from the cluster";
                tracing::warn!(error, "server error");
                tracing::warn!("data-dir used by this member must be removed");
            }
        }
        if let Some(Member { app, .. }) = &member {
            leadership::hand_over(app).await;
        }
        self.shutdown.ask();
        self.shutdown.drained().await;
        tokio::time::sleep(FLUSH_TIME).await;
        self.shutdown.close();
        while self.tasks.join_next().await.is_some() {}
        if let Some(Member { app, housekeeping }) = member {
            housekeeping.stop().await;
            app.node.shutdown().await;
        }
        self.peer_shutdown.ask();
        self.peer_shutdown.close();
        while self.peer_tasks.join_next().await.is_some() {}
        tracing::info!("closed etcd server");
    }
}

/// The first members by the flags; nobody if the data directory knows already.
async fn first_members(config: &Config) -> Result<discovery::Members, ServeError> {
    if config.has_data() {
        // Names and URLs of the flags no longer count, but must still be readable.
        return config.cluster_members().map_err(ServeError::Settings);
    }
    if !config.discovery_endpoints.is_empty() {
        return Ok(discovery::service::discover(config).await?);
    }
    if !config.discovery_srv.is_empty() {
        let resolver = Resolver::from_system()
            .map_err(|error| DiscoveryError(format!("cannot read /etc/resolv.conf: {error}")))?;
        return Ok(discovery::srv::discover(config, &resolver).await?);
    }
    config.cluster_members().map_err(ServeError::Settings)
}

/// The member's own settings.
async fn node_config(config: &Config, dial: &Dial) -> Result<NodeConfig, ServeError> {
    let mut storage = kelson_storage::Options::new(&config.data_dir);
    let limits = config.limits();
    storage.compaction_batch_limit = limits.compaction_batch_limit;
    storage.compaction_sleep = limits.compaction_sleep_interval;
    storage.slow_apply = limits.warning_apply_duration;
    if !config.backend_batch_interval.is_zero() {
        storage.checkpoint_interval = config.backend_batch_interval;
    }
    let initial_cluster = first_members(config).await?;
    let advertise_peer_urls = if config.has_data() {
        texts(&config.initial_advertise_peer_urls)
    } else {
        config.own_peer_urls(&initial_cluster).map_err(ServeError::Settings)?
    };
    // As in etcd, discovery makes a cluster's ids its own by the token of the discovery.
    let token = match config.discovery_token.as_str() {
        "" => &config.initial_cluster_token,
        token => token,
    };
    Ok(NodeConfig {
        name: config.name.clone(),
        data_dir: config.data_dir.clone().into(),
        initial_cluster,
        initial_cluster_token: token.to_owned(),
        advertise_peer_urls,
        initial_state_existing: config.initial_cluster_state == "existing",
        heartbeat: config.heartbeat(),
        election: config.election(),
        unsafe_no_fsync: config.unsafe_no_fsync,
        max_request_bytes: config.max_request_bytes,
        snapshot_catchup_entries: config.snapshot_catchup_entries,
        force_new_cluster: config.force_new_cluster,
        learners_max: config.max_learners,
        etcd_wal_dir: (!config.wal_dir.is_empty()).then(|| config.wal_dir.clone().into()),
        connect: dial.connector(),
        storage,
        ..NodeConfig::with_defaults(&config.data_dir)
    })
}

/// Tells the cluster this member's name and client URLs. Repeats until it succeeds.
async fn publish(app: &App, config: &Config) {
    let id = app.node.status().member_id;
    let client_urls = texts(&config.advertise_client_urls);
    let storage_uuid = Bytes::copy_from_slice(&app.node.storage_uuid());
    loop {
        let message = MemberPublish {
            id,
            name: config.name.clone(),
            client_urls: client_urls.clone(),
            storage_uuid: storage_uuid.clone(),
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
}

/// Gives the space of removed data back to the system before anybody is served, if the flag asks for
/// it and there is so much of it.
///
/// # Errors
/// `Defragment`, with the reason.
async fn defragment_at_start(config: &Config, reader: &Reader) -> Result<(), ServeError> {
    let threshold = config.bootstrap_defrag_threshold_megabytes.saturating_mul(1024 * 1024);
    if threshold == 0 {
        return Ok(());
    }
    let sizes = reader.sizes();
    let unused = u64::try_from(sizes.total.saturating_sub(sizes.in_use)).unwrap_or(0);
    if unused < threshold {
        tracing::info!(
            "current-db-size-bytes" = sizes.total,
            "current-db-size-in-use-bytes" = sizes.in_use,
            "bootstrap-defrag-threshold-bytes" = threshold,
            "Skipping defragmentation"
        );
        return Ok(());
    }
    let reader = reader.clone();
    let done = tokio::task::spawn_blocking(move || (reader.defragment(), reader.sizes())).await;
    let (result, after) = done.map_err(|_| ServeError::Defragment("the task died".to_owned()))?;
    result.map_err(|error| ServeError::Defragment(error.to_string()))?;
    tracing::info!(
        "previous-db-size-bytes" = sizes.total,
        "current-db-size-bytes" = after.total,
        "finished defragmenting"
    );
    Ok(())
}
