//! TLS of the listeners: certificates that are read again when their files change, client
//! certificates that must come from a trusted authority and carry allowed names, and the version
//! and cipher rules of the flags. It accepts no connection itself (see `listen`). Sessions are
//! never resumed, since a resumed one would skip the checks of names and revocations. Outgoing
//! connections have their settings in `dial`.

mod dial;
mod san;
mod self_signed;
mod verify;

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use parking_lot::Mutex;
use rustls::crypto::CryptoProvider;
use rustls::crypto::ring::{cipher_suite, default_provider};
use rustls::server::NoServerSessionStorage;
use rustls::{ServerConfig, SupportedCipherSuite, SupportedProtocolVersion, version};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};

pub use dial::Dialer;
pub(crate) use san::check_address;
pub use self_signed::ensure_self_signed;
pub(crate) use verify::common_name;

use crate::config::{Config, TlsSettings};

/// TLS 1.2 suites that can be used, by IANA name. Go's own list of the safe ones.
const SUITES: [(&str, SupportedCipherSuite); 8] = [
    (
        "TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256",
        cipher_suite::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256,
    ),
    (
        "TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384",
        cipher_suite::TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384,
    ),
    (
        "TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256",
        cipher_suite::TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256,
    ),
    (
        "TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305",
        cipher_suite::TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256,
    ),
    ("TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256", cipher_suite::TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256),
    ("TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384", cipher_suite::TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384),
    (
        "TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256",
        cipher_suite::TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256,
    ),
    (
        "TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305",
        cipher_suite::TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256,
    ),
];

/// Suites that etcd takes but that are too weak to be offered here: without forward secrecy or
/// in CBC mode. A list that names them with others is accepted, they are left out.
const WEAK_SUITES: [&str; 12] = [
    "TLS_RSA_WITH_AES_128_CBC_SHA",
    "TLS_RSA_WITH_AES_256_CBC_SHA",
    "TLS_RSA_WITH_AES_128_CBC_SHA256",
    "TLS_RSA_WITH_AES_128_GCM_SHA256",
    "TLS_RSA_WITH_AES_256_GCM_SHA384",
    "TLS_RSA_WITH_3DES_EDE_CBC_SHA",
    "TLS_ECDHE_RSA_WITH_AES_128_CBC_SHA",
    "TLS_ECDHE_RSA_WITH_AES_128_CBC_SHA256",
    "TLS_ECDHE_RSA_WITH_AES_256_CBC_SHA",
    "TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA",
    "TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA256",
    "TLS_ECDHE_ECDSA_WITH_AES_256_CBC_SHA",
];

/// Why TLS cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// The file.
        path: String,
        /// Why.
        source: std::io::Error,
    },
    /// A file holds nothing usable.
    #[error("{path} holds no {what}: {reason}")]
    Content {
        /// The file.
        path: String,
        /// What was looked for.
        what: &'static str,
        /// Why it was not found.
        reason: String,
    },
    /// Certificate, key and rules do not fit together.
    #[error("certificate {cert} and key {key}: {source}")]
    Mismatch {
        /// Certificate file.
        cert: String,
        /// Key file.
        key: String,
        /// Why.
        source: rustls::Error,
    },
    /// A self-signed certificate cannot be made.
    #[error("cannot make a self-signed certificate: {0}")]
    SelfSigned(#[from] rcgen::Error),
}

/// Checks names of cipher suites.
///
/// # Errors
/// `unexpected TLS cipher suite "X"` for a name etcd does not take, and a text of our own when
/// none of the names can be offered.
pub fn check_cipher_suites(names: &[String]) -> Result<(), String> {
    let usable = |name: &str| SUITES.iter().any(|(known, _)| *known == name);
    for name in names {
        if !usable(name) && !WEAK_SUITES.contains(&name.as_str()) {
            return Err(format!("unexpected TLS cipher suite \"{name}\""));
        }
    }
    if !names.is_empty() && !names.iter().any(|name| usable(name)) {
        return Err(
            "none of the suites in --cipher-suites is safe enough to be offered: name one \
                    with ECDHE and GCM or CHACHA20"
                .to_owned(),
        );
    }
    Ok(())
}

/// What the flags allow on any connection.
#[derive(Clone, Debug)]
struct Rules {
    provider: Arc<CryptoProvider>,
    versions: Vec<&'static SupportedProtocolVersion>,
}

impl Rules {
    fn new(config: &Config) -> Self {
        let mut provider = default_provider();
        if !config.cipher_suites.is_empty() {
            warn_about_weak_suites(&config.cipher_suites);
            let named = |suite: &SupportedCipherSuite| {
                let mut names = config.cipher_suites.iter();
                suite.tls13().is_some()
                    || names.any(|name| SUITES.iter().any(|(n, s)| n == name && s == suite))
            };
            provider.cipher_suites.retain(named);
        }
        let versions = versions(&config.tls_min_version, &config.tls_max_version);
        Self { provider: Arc::new(provider), versions }
    }
}

/// TLS of one listener; hands out the settings that fit the files of this moment.
#[derive(Debug)]
pub struct Acceptor {
    settings: TlsSettings,
    rules: Rules,
    loaded: Mutex<Loaded<ServerConfig>>,
}

/// What the files held when they were last read.
#[derive(Debug)]
struct Loaded<C> {
    stamps: Vec<Option<Stamp>>,
    config: Arc<C>,
}

impl<C> Loaded<C> {
    /// The settings for the next handshake. When a file has changed, all are read again; should one
    /// be unusable (half written, or key and certificate of two ages), the old settings go on and
    /// the next handshake tries again.
    fn refresh(
        &mut self,
        settings: &TlsSettings,
        read: impl FnOnce() -> Result<C, TlsError>,
    ) -> Arc<C> {
        let stamps = stamps(settings);
        if self.stamps != stamps {
            match read() {
                Ok(config) => {
                    tracing::info!("cert-file" = settings.cert_file, "loaded changed TLS files");
                    *self = Loaded { stamps, config: Arc::new(config) };
                }
                Err(error) => tracing::warn!(
                    %error,
                    "cannot load changed TLS files; the previous ones stay in use"
                ),
            }
        }
        Arc::clone(&self.config)
    }
}

/// What tells one content of a file from another without reading it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Stamp {
    modified: Option<SystemTime>,
    len: u64,
    inode: u64,
}

impl Acceptor {
    /// Reads all files once, so that a bad one stops the start.
    ///
    /// # Errors
    /// Any file that cannot be read or used.
    pub fn new(settings: &TlsSettings, config: &Config) -> Result<Self, TlsError> {
        let rules = Rules::new(config);
        let stamps = stamps(settings);
        let server = read(settings, &rules)?;
        let loaded = Mutex::new(Loaded { stamps, config: Arc::new(server) });
        Ok(Self { settings: settings.clone(), rules, loaded })
    }

    /// The settings for the next handshake, with changed files read again.
    ///
    /// Reads a few small files at most, so it may be called on an async worker.
    #[must_use]
    pub fn current(&self) -> Arc<ServerConfig> {
        self.loaded.lock().refresh(&self.settings, || read(&self.settings, &self.rules))
    }
}

fn warn_about_weak_suites(names: &[String]) {
    let weak: Vec<&str> =
        names.iter().map(String::as_str).filter(|name| WEAK_SUITES.contains(name)).collect();
    if !weak.is_empty() {
        tracing::warn!(suites = weak.join(","), "weak cipher suites are not offered");
    }
}

fn versions(min: &str, max: &str) -> Vec<&'static SupportedProtocolVersion> {
    let mut versions = Vec::new();
    if max != "TLS1.2" {
        versions.push(&version::TLS13);
    }
    if min != "TLS1.3" {
        versions.push(&version::TLS12);
    }
    versions
}

fn stamps(settings: &TlsSettings) -> Vec<Option<Stamp>> {
    let files = [
        &settings.cert_file,
        &settings.key_file,
        &settings.client_cert_file,
        &settings.client_key_file,
        &settings.trusted_ca_file,
        &settings.crl_file,
    ];
    let stamp = |path: &&String| {
        use std::os::unix::fs::MetadataExt;
        let found = fs::metadata(path).ok()?;
        Some(Stamp { modified: found.modified().ok(), len: found.len(), inode: found.ino() })
    };
    files.iter().map(stamp).collect()
}

/// Builds the settings from the files as they are now.
fn read(settings: &TlsSettings, rules: &Rules) -> Result<ServerConfig, TlsError> {
    let Rules { provider, versions } = rules;
    let mismatch = |source| TlsError::Mismatch {
        cert: settings.cert_file.clone(),
        key: settings.key_file.clone(),
        source,
    };
    let chain = read_certificates(&settings.cert_file)?;
    let key = read_key(&settings.key_file)?;
    let builder = ServerConfig::builder_with_provider(Arc::clone(provider))
        .with_protocol_versions(versions)
        .map_err(mismatch)?;
    let demands_certificate = settings.client_cert_auth || !settings.trusted_ca_file.is_empty();
    let builder = if demands_certificate {
        builder.with_client_cert_verifier(verify::ClientVerifier::read(settings, provider)?)
    } else {
        builder.with_no_client_auth()
    };
    let mut config = builder.with_single_cert(chain, key).map_err(mismatch)?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(config)
}

/// All certificates of a PEM file.
fn read_certificates(path: &str) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let content = |reason| TlsError::Content { path: path.to_owned(), what: "certificate", reason };
    let pem = read_file(path)?;
    let found = CertificateDer::pem_slice_iter(&pem)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| content(error.to_string()))?;
    if found.is_empty() {
        return Err(content("no PEM section CERTIFICATE".to_owned()));
    }
    Ok(found)
}

fn read_key(path: &str) -> Result<PrivateKeyDer<'static>, TlsError> {
    PrivateKeyDer::from_pem_slice(&read_file(path)?).map_err(|error| TlsError::Content {
        path: path.to_owned(),
        what: "private key",
        reason: error.to_string(),
    })
}

fn read_file(path: &str) -> Result<Vec<u8>, TlsError> {
    fs::read(Path::new(path)).map_err(|source| TlsError::Read { path: path.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(list: &[&str]) -> Vec<String> {
        list.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn cipher_names_follow_go() {
        assert_eq!(check_cipher_suites(&[]), Ok(()));
        assert_eq!(
            check_cipher_suites(&names(&[
                "TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256",
                "TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305",
                "TLS_RSA_WITH_AES_128_CBC_SHA",
            ])),
            Ok(())
        );
        assert_eq!(
            check_cipher_suites(&names(&["TLS_AES_128_GCM_SHA256"])),
            Err("unexpected TLS cipher suite \"TLS_AES_128_GCM_SHA256\"".to_owned())
        );
        assert!(check_cipher_suites(&names(&["TLS_RSA_WITH_AES_128_CBC_SHA"])).is_err());
    }

    #[test]
    fn version_limits_choose_the_versions() {
        assert_eq!(versions("TLS1.2", "").len(), 2);
        assert_eq!(versions("TLS1.3", ""), vec![&version::TLS13]);
        assert_eq!(versions("TLS1.2", "TLS1.2"), vec![&version::TLS12]);
    }
}
