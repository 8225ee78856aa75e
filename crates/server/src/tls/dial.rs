//! TLS of connections to other members: our certificate as the client's, the authorities of
//! `--peer-trusted-ca-file` for theirs, and the rules on names. With `--peer-auto-tls` certificates
//! prove nothing and are not checked, as in etcd. It opens no socket (see `dial` of this crate).

use std::path::Path;
use std::sync::Arc;

use parking_lot::Mutex;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{WebPkiServerVerifier, verify_server_name};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{ClientConfig, DigitallySignedStruct, Error, SignatureScheme};

use super::verify::{NameRules, Roots, Usage, read_roots};
use super::{Loaded, Rules, TlsError, read_certificates, read_key, stamps};
use crate::config::{Config, TlsSettings};

/// Where systems keep the authorities that everybody trusts; the first file that is there counts.
const SYSTEM_AUTHORITIES: [&str; 4] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
];

/// TLS of outgoing connections; hands out the settings that fit the files of this moment.
#[derive(Debug)]
pub struct Dialer {
    settings: TlsSettings,
    rules: Rules,
    loaded: Mutex<Loaded<ClientConfig>>,
}

impl Dialer {
    /// Reads all files once, so that a bad one stops the start.
    ///
    /// # Errors
    /// Any file that cannot be read or used.
    pub fn new(settings: &TlsSettings, config: &Config) -> Result<Self, TlsError> {
        let rules = Rules::new(config);
        let stamps = stamps(settings);
        let client = read(settings, &rules)?;
        let loaded = Mutex::new(Loaded { stamps, config: Arc::new(client) });
        Ok(Self { settings: settings.clone(), rules, loaded })
    }

    /// The settings for the next handshake, with changed files read again.
    ///
    /// Reads a few small files at most, so it may be called on an async worker.
    #[must_use]
    pub fn current(&self) -> Arc<ClientConfig> {
        self.loaded.lock().refresh(&self.settings, || read(&self.settings, &self.rules))
    }
}

/// Builds the settings from the files as they are now.
fn read(settings: &TlsSettings, rules: &Rules) -> Result<ClientConfig, TlsError> {
    let (cert, key) = match settings.client_cert_file.as_str() {
        "" => (&settings.cert_file, &settings.key_file),
        _ => (&settings.client_cert_file, &settings.client_key_file),
    };
    let mismatch = |source| TlsError::Mismatch { cert: cert.clone(), key: key.clone(), source };
    let builder = ClientConfig::builder_with_provider(Arc::clone(&rules.provider))
        .with_protocol_versions(&rules.versions)
        .map_err(mismatch)?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Verifier::read(settings, rules)?));
    let mut config = match cert.as_str() {
        "" => builder.with_no_client_auth(),
        _ => builder
            .with_client_auth_cert(read_certificates(cert)?, read_key(key)?)
            .map_err(mismatch)?,
    };
    config.alpn_protocols = vec![b"h2".to_vec()];
    // A resumed session would skip the check of names.
    config.resumption = rustls::client::Resumption::disabled();
    Ok(config)
}

/// The check of the other member's certificate.
#[derive(Debug)]
struct Verifier {
    /// None: any certificate will do.
    chain: Option<(Arc<WebPkiServerVerifier>, Roots)>,
    names: NameRules,
    provider: Arc<CryptoProvider>,
}

impl Verifier {
    fn read(settings: &TlsSettings, rules: &Rules) -> Result<Self, TlsError> {
        let names = NameRules::new(settings)?;
        let provider = Arc::clone(&rules.provider);
        let path = match settings.trusted_ca_file.as_str() {
            "" if settings.auto_tls => return Ok(Self { chain: None, names, provider }),
            "" => system_authorities(),
            path => path.to_owned(),
        };
        let roots = read_roots(&path)?;
        let store = Arc::clone(&roots.store);
        let chain = WebPkiServerVerifier::builder_with_provider(store, Arc::clone(&provider))
            .build()
            .map_err(|error| TlsError::Content {
                path,
                what: "authority",
                reason: error.to_string(),
            })?;
        Ok(Self { chain: Some((chain, roots)), names, provider })
    }
}

fn system_authorities() -> String {
    let named = std::env::var("SSL_CERT_FILE").unwrap_or_default();
    if !named.is_empty() {
        return named;
    }
    let mut known = SYSTEM_AUTHORITIES.iter();
    let found = known.find(|path| Path::new(path).exists());
    (*found.unwrap_or(&SYSTEM_AUTHORITIES[0])).to_owned()
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let Some((chain, roots)) = &self.chain else { return Ok(ServerCertVerified::assertion()) };
        let verified =
            chain.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now);
        let verified = match verified {
            Err(_) if roots.contain(end_entity, Usage::Server, now) => {
                verify_server_name(&ParsedCertificate::try_from(end_entity)?, server_name)?;
                ServerCertVerified::assertion()
            }
            verified => verified?,
        };
        self.names.check(end_entity)?;
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let known = &self.provider.signature_verification_algorithms;
        verify_tls12_signature(message, cert, dss, known)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let known = &self.provider.signature_verification_algorithms;
        verify_tls13_signature(message, cert, dss, known)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
