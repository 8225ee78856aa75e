//! Who gets through the TLS handshake, and with which certificate: client certificates that are
//! missing, foreign, revoked or of another name, and files that change under a running listener.

use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kelson_server::config::{Command, Config, load};
use kelson_server::listen::{ConnectionRules, Listener, OverTls};
use kelson_server::shutdown::Shutdown;
use kelson_server::tls::{Acceptor, ensure_self_signed};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose,
    RevokedCertParams, SerialNumber, date_time_ymd,
};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

/// An authority with its certificate as PEM.
struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

fn authority(name: &str) -> Authority {
    let key = KeyPair::generate().expect("a key");
    let mut params = CertificateParams::new(Vec::new()).expect("parameters");
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let pem = params.self_signed(&key).expect("a certificate").pem();
    Authority { issuer: Issuer::new(params, key), pem }
}

impl Authority {
    /// Certificate and key for a name, with a serial number of its own.
    fn issue(&self, cn: &str, host: &str, serial: u64) -> (String, String) {
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::new(vec![host.to_owned()]).expect("parameters");
        params.distinguished_name.push(DnType::CommonName, cn);
        params.serial_number = Some(SerialNumber::from(serial));
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let certificate = params.signed_by(&key, &self.issuer).expect("a certificate");
        (certificate.pem(), key.serialize_pem())
    }

    fn revoke(&self, serial: u64) -> String {
        let revoked = RevokedCertParams {
            serial_number: SerialNumber::from(serial),
            revocation_time: date_time_ymd(2024, 1, 1),
            reason_code: None,
            invalidity_date: None,
        };
        let params = CertificateRevocationListParams {
            this_update: date_time_ymd(2024, 1, 1),
            next_update: date_time_ymd(2044, 1, 1),
            crl_number: SerialNumber::from(1),
            issuing_distribution_point: None,
            revoked_certs: vec![revoked],
            key_identifier_method: KeyIdMethod::Sha256,
        };
        params.signed_by(&self.issuer).expect("a list").pem().expect("PEM")
    }
}

/// A directory with the files of one server.
struct Files {
    directory: tempfile::TempDir,
}

impl Files {
    fn new(ca: &Authority) -> Self {
        let files = Self { directory: tempfile::tempdir().expect("a directory") };
        files.write("ca.crt", &ca.pem);
        files.write_server(ca, 1);
        files
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.directory.path().join(name), text).expect("written");
    }

    fn write_server(&self, ca: &Authority, serial: u64) {
        let (cert, key) = ca.issue("server", "localhost", serial);
        self.write("server.crt", &cert);
        self.write("server.key", &key);
    }

    fn path(&self, name: &str) -> String {
        self.directory.path().join(name).display().to_string()
    }

    /// Settings with these files and further arguments.
    fn config(&self, more: &[String]) -> Config {
        let mut arguments = vec![
            format!("--cert-file={}", self.path("server.crt")),
            format!("--key-file={}", self.path("server.key")),
            "--listen-client-urls=https://127.0.0.1:0".to_owned(),
            "--advertise-client-urls=https://127.0.0.1:2379".to_owned(),
        ];
        arguments.extend_from_slice(more);
        match load(&arguments, []).expect("settings") {
            Command::Run(loaded) => loaded.config,
            other => panic!("expected settings, got {other:?}"),
        }
    }

    fn client_auth(&self) -> Vec<String> {
        vec!["--client-cert-auth".to_owned(), format!("--trusted-ca-file={}", self.path("ca.crt"))]
    }
}

/// A listener that answers `ok` to everything, until dropped.
struct Server {
    address: SocketAddr,
    shutdown: Shutdown,
}

impl Server {
    fn start(config: &Config) -> Self {
        let acceptor = Arc::new(Acceptor::new(&config.client_tls, config).expect("TLS"));
        let url = &config.listen_client_urls[0];
        let listener = Listener::bind(url, config, Some(&acceptor)).expect("bound");
        let address = listener.local_addr().expect("an address");
        let shutdown = Shutdown::default();
        let handler =
            |_request| async { http::Response::new(tonic::body::Body::new("ok".to_owned())) };
        let rules = ConnectionRules::new(config);
        tokio::spawn(listener.serve(rules, None, shutdown.clone(), handler));
        Self { address, shutdown }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shutdown.ask();
        self.shutdown.close();
    }
}

fn client(roots: &str, identity: Option<&(String, String)>) -> ClientConfig {
    let mut store = RootCertStore::empty();
    for root in CertificateDer::pem_slice_iter(roots.as_bytes()) {
        store.add(root.expect("a certificate")).expect("a root");
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_root_certificates(store);
    let Some((cert, key)) = identity else { return builder.with_no_client_auth() };
    let chain = CertificateDer::pem_slice_iter(cert.as_bytes())
        .collect::<Result<Vec<_>, _>>()
        .expect("a chain");
    let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).expect("a key");
    builder.with_client_auth_cert(chain, key).expect("an identity")
}

/// Asks once; gives the answer's body and the serial number of the server's certificate.
async fn ask(server: &Server, config: ClientConfig) -> std::io::Result<(String, Vec<u8>)> {
    let stream = TcpStream::connect(server.address).await?;
    let name = ServerName::try_from("localhost").expect("a name");
    let mut stream = TlsConnector::from(Arc::new(config)).connect(name, stream).await?;
    let request = b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";
    stream.write_all(request).await?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await?;
    let certificates = stream.get_ref().1.peer_certificates().expect("a certificate");
    let serial = serial_of(&certificates[0]);
    let text = String::from_utf8(answer).expect("text");
    let body = text.rsplit("\r\n\r\n").next().unwrap_or_default().to_owned();
    Ok((body, serial))
}

/// The serial number: the first INTEGER of one small byte in the certificates made above.
fn serial_of(certificate: &CertificateDer<'_>) -> Vec<u8> {
    use x509_parser::prelude::{FromDer, X509Certificate};
    X509Certificate::from_der(certificate).expect("a certificate").1.raw_serial().to_vec()
}

async fn is_let_in(server: &Server, config: ClientConfig) -> bool {
    ask(server, config).await.is_ok_and(|(body, _)| body == "ok")
}

#[tokio::test]
async fn without_client_auth_anyone_who_trusts_us_gets_in() {
    let ca = authority("ca");
    let server = Server::start(&Files::new(&ca).config(&[]));
    assert!(is_let_in(&server, client(&ca.pem, None)).await);
    assert!(!is_let_in(&server, client(&authority("other").pem, None)).await);
}

#[tokio::test]
async fn client_certificates_are_demanded_and_verified() {
    let (ca, other) = (authority("ca"), authority("other"));
    let files = Files::new(&ca);
    let server = Server::start(&files.config(&files.client_auth()));
    assert!(is_let_in(&server, client(&ca.pem, Some(&ca.issue("c", "c", 7)))).await);
    assert!(!is_let_in(&server, client(&ca.pem, None)).await);
    assert!(!is_let_in(&server, client(&ca.pem, Some(&other.issue("c", "c", 7)))).await);
}

#[tokio::test]
async fn a_trusted_authority_alone_demands_certificates() {
    let ca = authority("ca");
    let files = Files::new(&ca);
    let config = files.config(&files.client_auth()[1..]);
    let server = Server::start(&config);
    assert!(!is_let_in(&server, client(&ca.pem, None)).await);
    assert!(is_let_in(&server, client(&ca.pem, Some(&ca.issue("c", "c", 7)))).await);
}

/// Certificate and key of an authority that shows itself, in force until that year.
fn self_signed(year: i32, usages: &[ExtendedKeyUsagePurpose]) -> (String, String) {
    let key = KeyPair::generate().expect("a key");
    let mut params = CertificateParams::new(vec!["localhost".to_owned()]).expect("parameters");
    params.distinguished_name.push(DnType::CommonName, "root");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.not_after = date_time_ymd(year, 1, 1);
    params.extended_key_usages = usages.to_vec();
    (params.self_signed(&key).expect("a certificate").pem(), key.serialize_pem())
}

#[tokio::test]
async fn a_trusted_authority_may_be_its_own_client() {
    use ExtendedKeyUsagePurpose::{ClientAuth, ServerAuth};
    let ca = authority("ca");
    let files = Files::new(&ca);
    let server = Server::start(&files.config(&files.client_auth()));
    for (year, usages, is_taken) in [
        (2090, vec![], true),
        (2090, vec![ClientAuth], true),
        (2090, vec![ServerAuth], false),
        (2020, vec![], false),
    ] {
        let identity = self_signed(year, &usages);
        let config = || client(&ca.pem, Some(&identity));
        files.write("ca.crt", &ca.pem);
        assert!(!is_let_in(&server, config()).await, "nobody trusts it");
        files.write("ca.crt", &format!("{}{}", ca.pem, identity.0));
        assert_eq!(is_let_in(&server, config()).await, is_taken, "{year} {usages:?}");
    }
    // Its key, not the certificate that everybody can read, is what counts.
    let (identity, other) = (self_signed(2090, &[]), self_signed(2090, &[]));
    files.write("ca.crt", &identity.0);
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let stolen = client_with_foreign_key(&provider, &ca.pem, &identity.0, &other.1);
    assert!(!is_let_in(&server, stolen).await);
    assert!(is_let_in(&server, client(&ca.pem, Some(&identity))).await);
}

/// A client that shows a certificate without having its key.
fn client_with_foreign_key(
    provider: &Arc<rustls::crypto::CryptoProvider>,
    roots: &str,
    certificate: &str,
    key: &str,
) -> ClientConfig {
    let mut store = RootCertStore::empty();
    store.add(CertificateDer::from_pem_slice(roots.as_bytes()).expect("PEM")).expect("a root");
    let chain = vec![CertificateDer::from_pem_slice(certificate.as_bytes()).expect("PEM")];
    let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).expect("a key");
    let key = provider.key_provider.load_private_key(key).expect("a key");
    let shown = Arc::new(rustls::sign::CertifiedKey::new(chain, key));
    ClientConfig::builder_with_provider(Arc::clone(provider))
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_root_certificates(store)
        .with_client_cert_resolver(Arc::new(rustls::sign::SingleCertAndKey::from(shown)))
}

#[tokio::test]
async fn one_address_serves_with_and_without_tls() {
    let ca = authority("ca");
    let files = Files::new(&ca);
    let port = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = port.local_addr().expect("an address");
    drop(port);
    let config = files.config(&[
        format!("--listen-client-urls=http://{address},https://{address}"),
        format!("--advertise-client-urls=http://{address},https://{address}"),
    ]);
    let acceptor = Arc::new(Acceptor::new(&config.client_tls, &config).expect("TLS"));
    let urls = &config.listen_client_urls;
    let mut bound = Listener::bind_all(urls, &config, Some(&acceptor)).expect("bound");
    assert_eq!(bound.len(), 1);
    let listener = bound.remove(0);
    assert_eq!(listener.serves(), (true, true));
    let shutdown = Shutdown::default();
    let handler = |request: http::Request<hyper::body::Incoming>| async move {
        let is_tls = request.extensions().get::<OverTls>().is_some();
        http::Response::new(tonic::body::Body::new(if is_tls { "tls" } else { "plain" }.to_owned()))
    };
    let rules = ConnectionRules::new(&config);
    tokio::spawn(listener.serve(rules, None, shutdown.clone(), handler));
    let server = Server { address, shutdown };
    let (body, _) = ask(&server, client(&ca.pem, None)).await.expect("an answer");
    assert_eq!(body, "tls");
    let mut stream = TcpStream::connect(address).await.expect("connected");
    let request = b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";
    stream.write_all(request).await.expect("sent");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.expect("an answer");
    assert!(answer.ends_with("plain"), "{answer}");
}

#[tokio::test]
async fn names_are_checked_after_the_chain() {
    let ca = authority("ca");
    let files = Files::new(&ca);
    for (flag, good, bad) in [
        ("--client-cert-allowed-cn=alice,bob", ("bob", "h"), ("eve", "alice")),
        ("--client-cert-allowed-hostname=alice.example", ("x", "alice.example"), ("alice", "h")),
    ] {
        let mut arguments = files.client_auth();
        arguments.push(flag.to_owned());
        let server = Server::start(&files.config(&arguments));
        let identity = ca.issue(good.0, good.1, 7);
        assert!(is_let_in(&server, client(&ca.pem, Some(&identity))).await, "{flag}");
        let identity = ca.issue(bad.0, bad.1, 8);
        assert!(!is_let_in(&server, client(&ca.pem, Some(&identity))).await, "{flag}");
    }
}

#[tokio::test]
async fn revoked_serial_numbers_are_refused_once_the_list_names_them() {
    let ca = authority("ca");
    let files = Files::new(&ca);
    files.write("crl.pem", &ca.revoke(99));
    let mut arguments = files.client_auth();
    arguments.push(format!("--client-crl-file={}", files.path("crl.pem")));
    let server = Server::start(&files.config(&arguments));
    let (kept, revoked) = (ca.issue("k", "k", 7), ca.issue("r", "r", 42));
    assert!(is_let_in(&server, client(&ca.pem, Some(&revoked))).await);
    files.write("crl.pem", &format!("{}{}", ca.revoke(99), ca.revoke(42)));
    assert!(!is_let_in(&server, client(&ca.pem, Some(&revoked))).await);
    assert!(is_let_in(&server, client(&ca.pem, Some(&kept))).await);
}

#[tokio::test]
async fn renewed_files_are_used_without_a_restart() {
    let (ca, next) = (authority("ca"), authority("next"));
    let files = Files::new(&ca);
    let server = Server::start(&files.config(&files.client_auth()));
    let identity = ca.issue("c", "c", 7);
    let serial = ask(&server, client(&ca.pem, Some(&identity))).await.expect("an answer").1;
    assert_eq!(serial, [1]);

    files.write_server(&ca, 2);
    let serial = ask(&server, client(&ca.pem, Some(&identity))).await.expect("an answer").1;
    assert_eq!(serial, [2]);

    // Half of a renewal: the certificate is new, the key is not. The old pair goes on.
    let (cert, key) = ca.issue("server", "localhost", 3);
    files.write("server.crt", &cert);
    let serial = ask(&server, client(&ca.pem, Some(&identity))).await.expect("an answer").1;
    assert_eq!(serial, [2]);
    files.write("server.key", &key);
    let serial = ask(&server, client(&ca.pem, Some(&identity))).await.expect("an answer").1;
    assert_eq!(serial, [3]);

    // Another authority for clients.
    files.write("ca.crt", &next.pem);
    assert!(!is_let_in(&server, client(&ca.pem, Some(&identity))).await);
    assert!(is_let_in(&server, client(&ca.pem, Some(&next.issue("c", "c", 7)))).await);
}

#[tokio::test]
async fn versions_and_suites_of_the_flags_are_kept() {
    let ca = authority("ca");
    let files = Files::new(&ca);
    let versions = |only| {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut store = RootCertStore::empty();
        store.add(CertificateDer::from_pem_slice(ca.pem.as_bytes()).expect("PEM")).expect("root");
        ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[only])
            .expect("versions")
            .with_root_certificates(store)
            .with_no_client_auth()
    };
    let newest = Server::start(&files.config(&["--tls-min-version=TLS1.3".to_owned()]));
    assert!(is_let_in(&newest, versions(&rustls::version::TLS13)).await);
    assert!(!is_let_in(&newest, versions(&rustls::version::TLS12)).await);

    // The test certificates are ECDSA, so a suite for RSA alone leaves nothing for TLS 1.2.
    let suite = "--cipher-suites=TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256".to_owned();
    let rsa_only = Server::start(&files.config(&[suite]));
    assert!(is_let_in(&rsa_only, versions(&rustls::version::TLS13)).await);
    assert!(!is_let_in(&rsa_only, versions(&rustls::version::TLS12)).await);
}

#[tokio::test]
async fn clients_without_alpn_and_with_it_are_served() {
    let ca = authority("ca");
    let server = Server::start(&Files::new(&ca).config(&[]));
    let mut http1 = client(&ca.pem, None);
    http1.alpn_protocols = vec![b"http/1.1".to_vec()];
    assert!(is_let_in(&server, http1).await);
    let mut h2 = client(&ca.pem, None);
    h2.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    let stream = TcpStream::connect(server.address).await.expect("connected");
    let name = ServerName::try_from("localhost").expect("a name");
    let stream = TlsConnector::from(Arc::new(h2)).connect(name, stream).await.expect("a handshake");
    assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
}

#[tokio::test]
async fn silent_clients_do_not_hold_up_others() {
    let ca = authority("ca");
    let server = Server::start(&Files::new(&ca).config(&[]));
    let mut silent = Vec::new();
    for _ in 0..20 {
        silent.push(TcpStream::connect(server.address).await.expect("connected"));
    }
    let started = Instant::now();
    assert!(is_let_in(&server, client(&ca.pem, None)).await);
    // Far below the ten seconds after which silent ones are sent away.
    assert!(started.elapsed() < Duration::from_secs(8));
    drop(silent);
}

#[tokio::test]
async fn self_signed_certificates_are_made_once() {
    use std::os::unix::fs::PermissionsExt;
    let directory = tempfile::tempdir().expect("a directory");
    let arguments = [
        "--auto-tls".to_owned(),
        "--listen-client-urls=https://127.0.0.1:0".to_owned(),
        "--advertise-client-urls=https://127.0.0.1:2379".to_owned(),
    ];
    let Command::Run(loaded) = load(&arguments, []).expect("settings") else {
        panic!("expected settings")
    };
    let mut config = loaded.config;
    let make = |config: &mut Config, directory: &Path| {
        let urls = config.listen_client_urls.clone();
        ensure_self_signed(&mut config.client_tls, directory, "client", &urls, 1).expect("made");
    };
    make(&mut config, directory.path());
    let first = fs::read_to_string(&config.client_tls.cert_file).expect("a certificate");
    let mode = fs::metadata(&config.client_tls.key_file).expect("a key").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    assert!(config.client_tls.cert_file.ends_with("fixtures/client/cert.pem"));
    make(&mut config, directory.path());
    let second = fs::read_to_string(&config.client_tls.cert_file).expect("a certificate");
    assert_eq!(first, second);
    // It is good enough to be served; nobody trusts it.
    let server = Server::start(&config);
    assert!(!is_let_in(&server, client(&authority("ca").pem, None)).await);
}

#[test]
fn unusable_files_stop_the_start() {
    let ca = authority("ca");
    let files = Files::new(&ca);
    let config = files.config(&[]);
    files.write("server.key", "nothing");
    assert!(Acceptor::new(&config.client_tls, &config).is_err());
    files.write("server.key", &ca.issue("x", "x", 5).1);
    assert!(Acceptor::new(&config.client_tls, &config).is_err(), "a key of another certificate");
    fs::remove_file(files.path("server.crt")).expect("removed");
    assert!(Acceptor::new(&config.client_tls, &config).is_err());
}
