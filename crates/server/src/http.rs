//! Plain HTTP beside gRPC: health for probes, versions, metrics, and the few paths of the peer port
//! that tools look at. Paths, bodies and codes are those of etcd. It reads state and changes none.

mod health;

use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use http::header::{self, HeaderName, HeaderValue};
use http::{Method, Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::Incoming;
use serde_json::json;

use crate::app::App;
use crate::callers::ClientName;
use crate::config::{Config, FeatureGates};
use crate::gateway::Gateway;
use crate::listen::HttpResponse;
use crate::metrics::{Metrics, sources};
use crate::version::ETCD_VERSION;

/// Why the gateway refuses a client whose certificate names a user. Source: etcd.
const NAME_IS_IGNORED: &str = "CommonName of client sending a request against gateway will be ignored \
                               and not used as expected";

/// Which listener a request came in by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Surface {
    /// `--listen-client-urls` and `--listen-client-http-urls`; whether it is encrypted.
    Client {
        /// TLS proves the name the client meant, so the Host header needs no check.
        is_tls: bool,
    },
    /// `--listen-metrics-urls`.
    Metrics,
    /// `--listen-peer-urls`.
    Peer,
}

/// The handlers and what they read.
#[derive(Clone)]
pub struct HttpService {
    shared: Arc<Shared>,
}

struct Shared {
    /// Set once the member runs; health says so until then.
    app: Arc<OnceLock<App>>,
    metrics: Arc<Metrics>,
    gates: FeatureGates,
    /// `None` if a flag turns it off.
    gateway: Option<Gateway>,
    /// The common name in a client's certificate is a user for gRPC.
    takes_certificates: bool,
    cors: Vec<String>,
    host_whitelist: Vec<String>,
}

impl HttpService {
    /// Handlers over the member that `app` will hold, and over the gateway to its services.
    #[must_use]
    pub fn new(
        config: &Config,
        metrics: Arc<Metrics>,
        app: Arc<OnceLock<App>>,
        gateway: Gateway,
    ) -> Self {
        Self {
            shared: Arc::new(Shared {
                app,
                metrics,
                gates: config.feature_gates.clone(),
                gateway: config.enable_grpc_gateway.then_some(gateway),
                takes_certificates: config.client_tls.client_cert_auth,
                cors: config.cors.clone(),
                host_whitelist: config.host_whitelist.clone(),
            }),
        }
    }

    /// Answers one request.
    ///
    /// # Cancel safety
    /// Nothing is left behind when dropped.
    pub async fn call(&self, surface: Surface, request: Request<Incoming>) -> HttpResponse {
        let shared = &self.shared;
        let Surface::Client { is_tls } = surface else {
            return self.route(surface, &request).await;
        };
        if !is_tls && !shared.allows_host(&request) {
            let text = "the Host header of the request is not in --host-whitelist";
            return error(StatusCode::MISDIRECTED_REQUEST, text);
        }
        if is_tls && shared.ignores_name(&request) {
            // Before everything else, as in etcd: even a page that only asks whether it may ask.
            return error(StatusCode::BAD_REQUEST, NAME_IS_IGNORED);
        }
        let allowed = shared.allowed_origin(&request);
        let mut response = if request.method() == Method::OPTIONS {
            Response::new(body(""))
        } else {
            self.serve_client(surface, request).await
        };
        if let Some(origin) = allowed {
            add_cors(&mut response, origin);
        }
        response
    }

    async fn serve_client(&self, surface: Surface, request: Request<Incoming>) -> HttpResponse {
        let path = request.uri().path();
        match &self.shared.gateway {
            Some(gateway) if Gateway::below_root(path).is_some() => gateway.call(request).await,
            Some(_) if path == "/v3" => redirect("/v3/"),
            _ => self.route(surface, &request).await,
        }
    }

    async fn route<B>(&self, surface: Surface, request: &Request<B>) -> HttpResponse {
        let shared = &self.shared;
        let path = request.uri().path();
        let is_peer = surface == Surface::Peer;
        let is_client = matches!(surface, Surface::Client { .. });
        match path {
            "/version" if is_peer || is_client => shared.version(request.method()),
            "/members" if is_peer => shared.members(request.method()),
            "/health" if !is_peer => health::health(shared, request).await,
            "/metrics" if !is_peer => shared.metrics_page(request.method()),
            "/debug/vars" if is_client => shared.debug_vars(request.method()),
            _ if !is_peer => match health::checks_of(path) {
                Some(checks) => health::report(shared, request, checks).await,
                None => not_found(),
            },
            _ => not_found(),
        }
    }
}

/// A member as the peer port shows it; fields in etcd's order.
#[derive(serde::Serialize)]
struct MemberRow {
    id: u64,
    #[serde(rename = "peerURLs")]
    peer_urls: Vec<String>,
    #[serde(rename = "isLearner", skip_serializing_if = "std::ops::Not::not")]
    is_learner: bool,
    name: String,
    #[serde(rename = "clientURLs")]
    client_urls: Vec<String>,
}

impl From<kelson_api::etcdserverpb::Member> for MemberRow {
    fn from(member: kelson_api::etcdserverpb::Member) -> Self {
        Self {
            id: member.id,
            peer_urls: member.peer_ur_ls,
            is_learner: member.is_learner,
            name: member.name,
            client_urls: member.client_ur_ls,
        }
    }
}

impl Shared {
    fn version(&self, method: &Method) -> HttpResponse {
        if method != Method::GET {
            return method_not_allowed();
        }
        let cluster = self.app.get().and_then(|app| app.reader.cluster_version());
        let storage = cluster.clone().unwrap_or_else(|| "unknown".to_owned());
        let cluster = cluster.unwrap_or_else(|| "not_decided".to_owned());
        // Written by hand to keep etcd's order of fields.
        let text = format!(
            "{{\"etcdserver\":\"{ETCD_VERSION}\",\"etcdcluster\":\"{cluster}\",\
             \"storage\":\"{storage}\"}}"
        );
        with_type("application/json", text)
    }

    fn members(&self, method: &Method) -> HttpResponse {
        if method != Method::GET {
            return method_not_allowed();
        }
        let Some(app) = self.app.get() else {
            return error(StatusCode::SERVICE_UNAVAILABLE, "the member is starting");
        };
        let members: Vec<_> = app.reader.members().into_iter().map(MemberRow::from).collect();
        let text = serde_json::to_string(&members).expect("numbers and texts always serialize");
        let mut response = with_type("application/json", format!("{text}\n"));
        let cluster = format!("{:x}", app.node.status().cluster_id);
        if let Ok(value) = HeaderValue::from_str(&cluster) {
            response.headers_mut().insert(HeaderName::from_static("x-etcd-cluster-id"), value);
        }
        response
    }

    fn metrics_page(&self, method: &Method) -> HttpResponse {
        if method != Method::GET && method != Method::HEAD {
            return method_not_allowed();
        }
        if let Some(app) = self.app.get() {
            self.metrics.peers.refresh(app);
        }
        // Sources first: some of them move metrics of the registry.
        let found = sources::collect(self.app.get(), &self.gates);
        let text = self.metrics.render(found);
        with_type("text/plain; version=0.0.4; charset=utf-8", text)
    }

    /// The few variables that have a meaning here; `memstats` is Go's and stays empty.
    fn debug_vars(&self, method: &Method) -> HttpResponse {
        if method != Method::GET {
            return method_not_allowed();
        }
        use rustix::process::{Resource, getrlimit};
        let arguments: Vec<String> =
            std::env::args_os().map(|text| text.to_string_lossy().into_owned()).collect();
        let status = self.app.get().map(|app| app.node.status());
        let raft = status.map(|status| {
            json!({
                "id": format!("{:x}", status.member_id),
                "term": status.term,
                "lead": status.leader.map_or("0".to_owned(), |id| format!("{id:x}")),
                "commit": status.committed_index,
                "applied": status.applied_index,
            })
        });
        let variables = json!({
            "cmdline": arguments,
            "memstats": {},
            "file_descriptor_limit": getrlimit(Resource::Nofile).current,
            "raft.status": raft,
        });
        with_type("application/json; charset=utf-8", format!("{variables}\n"))
    }

    /// What browsers are told of who may call: everybody, or the page's own origin if it is in the
    /// list; `None` if it is not.
    fn allowed_origin<B>(&self, request: &Request<B>) -> Option<HeaderValue> {
        if self.cors.is_empty() || self.cors.iter().any(|known| known == "*") {
            return Some(HeaderValue::from_static("*"));
        }
        let origin = request.headers().get(header::ORIGIN)?;
        let text = origin.to_str().ok()?;
        self.cors.iter().any(|known| known == text).then(|| origin.clone())
    }

    /// Whether a client of the gateway may take itself for the user whom its certificate names. It is
    /// not: the gateway knows users by tokens alone.
    fn ignores_name<B>(&self, request: &Request<B>) -> bool {
        let is_gateway = Gateway::below_root(request.uri().path()).is_some();
        let name = request.extensions().get::<ClientName>();
        let is_on = || self.app.get().is_some_and(|app| app.reader.is_auth_enabled());
        is_gateway
            && self.gateway.is_some()
            && self.takes_certificates
            && name.is_some_and(|name| !name.0.is_empty())
            && is_on()
    }

    fn allows_host<B>(&self, request: &Request<B>) -> bool {
        if self.host_whitelist.iter().any(|host| host == "*") {
            return true;
        }
        let from_header = request.headers().get(header::HOST).and_then(|host| host.to_str().ok());
        let host = request.uri().host().or(from_header).unwrap_or_default();
        let host = match host.rsplit_once(':') {
            Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => name,
            _ => host,
        };
        let host = host.trim_start_matches('[').trim_end_matches(']');
        self.host_whitelist.iter().any(|known| known == host)
    }
}

fn add_cors(response: &mut HttpResponse, origin: HeaderValue) {
    let headers = response.headers_mut();
    headers.insert(
        header::ACCESS_CONTROL_ALLOW_METHODS,
        HeaderValue::from_static("POST, GET, OPTIONS, PUT, DELETE"),
    );
    headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin);
    headers.insert(
        header::ACCESS_CONTROL_ALLOW_HEADERS,
        HeaderValue::from_static("accept, content-type, authorization"),
    );
}

fn body(content: impl Into<Bytes>) -> tonic::body::Body {
    tonic::body::Body::new(Full::new(content.into()))
}

fn with_type(content_type: &'static str, content: impl Into<Bytes>) -> HttpResponse {
    let mut response = Response::new(body(content));
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}

/// An error as Go's `http.Error` writes it: the text, a newline, and no guessing of its type.
fn error(status: StatusCode, text: &str) -> HttpResponse {
    let mut response = with_type("text/plain; charset=utf-8", format!("{text}\n"));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}

fn redirect(to: &'static str) -> HttpResponse {
    let mut response = Response::new(body(""));
    *response.status_mut() = StatusCode::TEMPORARY_REDIRECT;
    response.headers_mut().insert(header::LOCATION, HeaderValue::from_static(to));
    response
}

fn not_found() -> HttpResponse {
    error(StatusCode::NOT_FOUND, "404 page not found")
}

fn method_not_allowed() -> HttpResponse {
    let mut response = error(StatusCode::METHOD_NOT_ALLOWED, "Method Not Allowed");
    response.headers_mut().insert(header::ALLOW, HeaderValue::from_static("GET"));
    response
}
