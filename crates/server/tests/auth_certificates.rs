//! Who a client is by its certificate: with `--client-cert-auth` the common name is a user, unless the
//! call brings a token or comes through the gateway.

use std::sync::{Arc, OnceLock};

use kelson_api::authpb::{Permission, UserAddOptions};
use kelson_api::etcdserverpb::auth_client::AuthClient;
use kelson_api::etcdserverpb::kv_client::KvClient;
use kelson_api::etcdserverpb::*;
use kelson_raft::{Node, NodeConfig};
use kelson_server::app::App;
use kelson_server::callers::{Callers, Tokens};
use kelson_server::config::{Command, Config, load};
use kelson_server::gateway::Gateway;
use kelson_server::grpc_layer::GrpcService;
use kelson_server::housekeeping::Checks;
use kelson_server::http::{HttpService, Surface};
use kelson_server::listen::{ConnectionRules, Listener};
use kelson_server::metrics::Metrics;
use kelson_server::shutdown::Shutdown;
use kelson_server::tls::Acceptor;
use kelson_server::{housekeeping, services};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tonic::transport::{Channel, Endpoint, Uri};
use tonic::{Code, Request, Status};

/// An authority, and its certificate as PEM.
fn authority() -> (Issuer<'static, KeyPair>, String) {
    let key = KeyPair::generate().expect("a key");
    let mut params = CertificateParams::new(Vec::new()).expect("parameters");
    params.distinguished_name.push(DnType::CommonName, "ca");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    let pem = params.self_signed(&key).expect("a certificate").pem();
    (Issuer::new(params, key), pem)
}

/// Certificate and key; `None` = the certificate names nobody.
fn issue(issuer: &Issuer<'_, KeyPair>, cn: Option<&str>) -> (String, String) {
    let key = KeyPair::generate().expect("a key");
    let mut params = CertificateParams::new(vec!["localhost".to_owned()]).expect("parameters");
    params.distinguished_name = rcgen::DistinguishedName::new();
    if let Some(cn) = cn {
        params.distinguished_name.push(DnType::CommonName, cn);
    }
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    (params.signed_by(&key, issuer).expect("a certificate").pem(), key.serialize_pem())
}

/// A member behind a listener with TLS.
struct Member {
    issuer: Issuer<'static, KeyPair>,
    ca: String,
    address: std::net::SocketAddr,
    shutdown: Shutdown,
    _housekeeping: housekeeping::Housekeeping,
    _stop: tokio::sync::watch::Sender<bool>,
    _dir: tempfile::TempDir,
}

impl Member {
    async fn start(more: &[&str]) -> Member {
        let dir = tempfile::tempdir().expect("a directory");
        let (issuer, ca) = authority();
        let (cert, key) = issue(&issuer, Some("server"));
        let file = |name: &str, text: &str| {
            let path = dir.path().join(name);
            std::fs::write(&path, text).expect("written");
            path.display().to_string()
        };
        let mut arguments = vec![
            format!("--cert-file={}", file("server.crt", &cert)),
            format!("--key-file={}", file("server.key", &key)),
            format!("--trusted-ca-file={}", file("ca.crt", &ca)),
            "--bcrypt-cost=4".to_owned(),
            "--listen-client-urls=https://127.0.0.1:0".to_owned(),
            "--advertise-client-urls=https://127.0.0.1:2379".to_owned(),
        ];
        arguments.extend(more.iter().map(ToString::to_string));
        let config: Config = match load(&arguments, []).expect("settings") {
            Command::Run(loaded) => loaded.config,
            other => panic!("expected settings, got {other:?}"),
        };
        let node = NodeConfig::with_defaults(dir.path().join("data"));
        let (node, reader) = Node::start(node).await.expect("the member starts");
        let tokens = Tokens::from_flag(&config.auth_token).expect("simple tokens");
        let callers = Callers::new(node.clone(), reader.clone()).with_flags(tokens, &config);
        let (stop, stopping) = tokio::sync::watch::channel(false);
        let metrics = Arc::new(Metrics::new(false));
        let app = App {
            node,
            reader,
            callers: Arc::new(callers),
            limits: Arc::new(config.limits()),
            metrics: Arc::clone(&metrics),
            stopping,
            probes: Arc::default(),
            traffic: Default::default(),
        };
        let housekeeping = housekeeping::start(&app, &Checks::default());
        let routes = services::routes(&app, housekeeping.lessor());
        let shutdown = Shutdown::default();
        let slow = std::time::Duration::from_secs(60);
        let grpc = GrpcService::new(routes, Arc::clone(&metrics), shutdown.clone(), slow);
        let (_services, ready) = tokio::sync::watch::channel(Some(grpc.clone()));
        let gateway = Gateway::new(ready, config.limits().max_decoding_bytes());
        let http = HttpService::new(&config, metrics, Arc::new(OnceLock::from(app)), gateway);
        let acceptor = Arc::new(Acceptor::new(&config.client_tls, &config).expect("TLS"));
        let url = &config.listen_client_urls[0];
        let listener = Listener::bind(url, &config, Some(&acceptor)).expect("bound");
        let address = listener.local_addr().expect("an address");
        let handler = move |request| {
            let (grpc, http) = (grpc.clone(), http.clone());
            async move {
                match GrpcService::is_grpc(&request) {
                    true => grpc.call(request).await,
                    false => http.call(Surface::Client { is_tls: true }, request).await,
                }
            }
        };
        let rules = ConnectionRules::new(&config);
        tokio::spawn(listener.serve(rules, None, shutdown.clone(), handler));
        Member {
            issuer,
            ca,
            address,
            shutdown,
            _housekeeping: housekeeping,
            _stop: stop,
            _dir: dir,
        }
    }

    /// The settings of a client with a certificate for this name.
    fn client(&self, cn: Option<&str>, protocol: &str) -> TlsConnector {
        let (cert, key) = issue(&self.issuer, cn);
        let mut roots = RootCertStore::empty();
        for root in CertificateDer::pem_slice_iter(self.ca.as_bytes()) {
            roots.add(root.expect("a certificate")).expect("a root");
        }
        let chain = CertificateDer::pem_slice_iter(cert.as_bytes()).collect::<Result<Vec<_>, _>>();
        let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).expect("a key");
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .expect("versions")
            .with_root_certificates(roots)
            .with_client_auth_cert(chain.expect("a chain"), key)
            .expect("an identity");
        config.alpn_protocols = vec![protocol.as_bytes().to_vec()];
        TlsConnector::from(Arc::new(config))
    }

    /// A connection with a certificate for this name.
    async fn connect(&self, cn: Option<&str>) -> Channel {
        let (connector, address) = (self.client(cn, "h2"), self.address);
        let connect = move |_: Uri| {
            let connector = connector.clone();
            async move {
                let stream = TcpStream::connect(address).await?;
                let name = ServerName::try_from("localhost").expect("a name");
                let stream = connector.connect(name, stream).await?;
                Ok::<_, std::io::Error>(hyper_util::rt::TokioIo::new(stream))
            }
        };
        let endpoint = Endpoint::from_static("http://localhost");
        endpoint.connect_with_connector(tower::service_fn(connect)).await.expect("it connects")
    }

    /// The answer to a request of HTTP/1.1 by a client with a certificate for this name: head and body.
    async fn http(&self, cn: Option<&str>, head: &str, body: &str) -> (String, String) {
        let stream = TcpStream::connect(self.address).await.expect("connected");
        let name = ServerName::try_from("localhost").expect("a name");
        let connector = self.client(cn, "http/1.1");
        let mut stream = connector.connect(name, stream).await.expect("a handshake");
        let text = format!(
            "{head} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {}\r\n\r\n\
             {body}",
            body.len()
        );
        stream.write_all(text.as_bytes()).await.expect("sent");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.expect("an answer");
        let (head, body) = answer.split_once("\r\n\r\n").expect("head and body");
        (head.to_owned(), body.to_owned())
    }

    /// The users root, with a password, and ann, who has none and may do what she likes with `a`.
    async fn make_users(&self, channel: &Channel) {
        let mut auth = AuthClient::new(channel.clone());
        let options = Some(UserAddOptions { no_password: true });
        let ann = AuthUserAddRequest { name: "ann".into(), options, ..Default::default() };
        auth.user_add(ann).await.expect("a new user");
        let (name, password) = ("root".to_owned(), "secret".to_owned());
        let root = AuthUserAddRequest { name, password, ..Default::default() };
        auth.user_add(root).await.expect("a new user");
        auth.role_add(AuthRoleAddRequest { name: "a".into() }).await.expect("a new role");
        let perm = Permission { perm_type: 2, key: "a".into(), range_end: Default::default() };
        let allow = AuthRoleGrantPermissionRequest { name: "a".into(), perm: Some(perm) };
        auth.role_grant_permission(allow).await.expect("a permission");
        for (user, role) in [("ann", "a"), ("root", "root")] {
            let grant = AuthUserGrantRoleRequest { user: user.into(), role: role.into() };
            auth.user_grant_role(grant).await.expect("granted");
        }
        auth.auth_enable(AuthEnableRequest {}).await.expect("auth on");
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        self.shutdown.ask();
        self.shutdown.close();
    }
}

/// Puts a key with one more header.
async fn put(
    channel: &Channel,
    key: &str,
    header: Option<(&'static str, &str)>,
) -> Result<(), Status> {
    let put = PutRequest { key: key.to_owned().into(), ..Default::default() };
    let mut request = Request::new(put);
    if let Some((name, value)) = header {
        request.metadata_mut().insert(name, value.parse().expect("ASCII"));
    }
    KvClient::new(channel.clone()).put(request).await.map(drop)
}

fn said(result: Result<(), Status>) -> String {
    result.expect_err("refused").message().to_owned()
}

#[tokio::test]
async fn the_common_name_is_the_user() {
    let member = Member::start(&["--client-cert-auth"]).await;
    let ann = member.connect(Some("ann")).await;
    member.make_users(&ann).await;
    put(&ann, "a", None).await.expect("her key");
    assert_eq!(said(put(&ann, "b", None).await), "etcdserver: permission denied");
    let root = member.connect(Some("root")).await;
    put(&root, "b", None).await.expect("root may do all");
    let users = AuthClient::new(root.clone()).user_list(AuthUserListRequest {}).await;
    assert_eq!(users.expect("a list").into_inner().users, ["ann", "root"]);
    let other = member.connect(Some("eve")).await;
    assert_eq!(said(put(&other, "a", None).await), "etcdserver: permission denied");
    let list = AuthClient::new(other).user_list(AuthUserListRequest {}).await;
    assert_eq!(list.expect_err("refused").message(), "etcdserver: user name not found");
    let unnamed = member.connect(None).await;
    assert!(put(&unnamed, "a", None).await.is_err(), "nobody's certificate");
}

#[tokio::test]
async fn a_token_counts_more_than_a_certificate() {
    let member = Member::start(&["--client-cert-auth"]).await;
    let ann = member.connect(Some("ann")).await;
    member.make_users(&ann).await;
    let login = AuthenticateRequest { name: "root".into(), password: "secret".into() };
    let token = AuthClient::new(ann.clone()).authenticate(login).await.expect("a token");
    let token = token.into_inner().token;
    put(&ann, "b", Some(("token", &token))).await.expect("she speaks for root");
    let wrong = put(&ann, "a", Some(("token", "aaaaaaaaaaaaaaaa.1"))).await;
    assert_eq!(wrong.expect_err("refused").code(), Code::Unauthenticated);
    let login = AuthenticateRequest { name: "ann".into(), password: String::new() };
    let none = AuthClient::new(ann.clone()).authenticate(login).await.expect_err("no password");
    let text = "auth: authentication failed, password was given for no password user";
    assert_eq!((none.code(), none.message()), (Code::Unknown, text));
}

#[tokio::test]
async fn the_gateways_certificate_is_nobodys() {
    let member = Member::start(&["--client-cert-auth"]).await;
    let ann = member.connect(Some("ann")).await;
    member.make_users(&ann).await;
    let through = put(&ann, "a", Some(("grpcgateway-accept", "application/json"))).await;
    assert_eq!(said(through), "etcdserver: user name is empty");
}

/// Recorded from etcd 3.7.3.
const IGNORED: &str = "CommonName of client sending a request against gateway will be ignored and not \
                       used as expected\n";

#[tokio::test]
async fn the_gateway_refuses_clients_that_trust_in_their_names() {
    let member = Member::start(&["--client-cert-auth"]).await;
    let read = "POST /v3/kv/range";
    let (head, _) = member.http(Some("ann"), read, r#"{"key":"YQ=="}"#).await;
    assert!(head.starts_with("HTTP/1.1 200"), "without users, names do not matter: {head}");
    member.make_users(&member.connect(Some("ann")).await).await;
    for (name, path) in [
        ("ann", read),
        ("eve", "POST /v3beta/kv/range"),
        ("ann", "OPTIONS /v3/kv/range"),
        ("ann", "GET /v3/nothing"),
    ] {
        let (head, body) = member.http(Some(name), path, r#"{"key":"YQ=="}"#).await;
        assert!(head.starts_with("HTTP/1.1 400"), "{path}: {head}");
        assert!(head.contains("text/plain") && !head.contains("access-control"), "{head}");
        assert_eq!(body, IGNORED);
    }
    let (head, _) = member.http(Some("ann"), "GET /version", "").await;
    assert!(head.starts_with("HTTP/1.1 200"), "that is not the gateway: {head}");
    let login = r#"{"name":"root","password":"secret"}"#;
    let (head, body) = member.http(None, "POST /v3/auth/authenticate", login).await;
    assert!(head.starts_with("HTTP/1.1 200") && body.contains("token"), "nobody's: {head} {body}");
}

#[tokio::test]
async fn the_gateway_takes_any_certificate_unless_names_are_users() {
    let member = Member::start(&[]).await;
    let ann = member.connect(Some("ann")).await;
    member.make_users(&ann).await;
    let login = r#"{"name":"root","password":"secret"}"#;
    let (head, body) = member.http(Some("ann"), "POST /v3/auth/authenticate", login).await;
    assert!(head.starts_with("HTTP/1.1 200") && body.contains("token"), "{head} {body}");
}

#[tokio::test]
async fn certificates_name_nobody_unless_the_flag_says_so() {
    let member = Member::start(&[]).await;
    let ann = member.connect(Some("ann")).await;
    member.make_users(&ann).await;
    assert_eq!(said(put(&ann, "a", None).await), "etcdserver: user name is empty");
}
