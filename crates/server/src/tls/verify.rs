//! Who may connect: the chain check of rustls, then etcd's rules on top of it: serial numbers
//! that the CRL lists and names that the flags allow. Built anew whenever one of the files
//! changes; it reads no file during a handshake.

use std::collections::HashSet;
use std::sync::Arc;

use rustls::client::danger::HandshakeSignatureValid;
use rustls::client::verify_server_name;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{ParsedCertificate, WebPkiClientVerifier};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, RootCertStore,
    SignatureScheme,
};
use rustls_pki_types::CertificateRevocationListDer;
use rustls_pki_types::pem::PemObject;
use x509_parser::prelude::{ASN1Time, CertificateRevocationList, FromDer, X509Certificate};

use super::{TlsError, read_certificates, read_file};
use crate::config::TlsSettings;

/// Text of the refusal of a certificate with other names than the allowed ones.
const NOT_ALLOWED: &str = "client certificate authentication failed";

/// The chain check and the rules after it.
#[derive(Debug)]
pub(super) struct ClientVerifier {
    chain: Arc<dyn ClientCertVerifier>,
    roots: Roots,
    revoked_serials: HashSet<Vec<u8>>,
    names: NameRules,
}

/// Which names a certificate must carry; none means any.
#[derive(Debug)]
pub(super) struct NameRules {
    allowed_cn: Vec<String>,
    allowed_hostname: Vec<ServerName<'static>>,
}

impl ClientVerifier {
    /// Reads authorities and revoked serial numbers.
    ///
    /// # Errors
    /// A file that cannot be read or used.
    pub(super) fn read(
        settings: &TlsSettings,
        provider: &Arc<CryptoProvider>,
    ) -> Result<Arc<dyn ClientCertVerifier>, TlsError> {
        let path = &settings.trusted_ca_file;
        let roots = read_roots(path)?;
        let store = Arc::clone(&roots.store);
        let chain = WebPkiClientVerifier::builder_with_provider(store, Arc::clone(provider))
            .build()
            .map_err(|error| TlsError::Content {
                path: path.clone(),
                what: "authority",
                reason: error.to_string(),
            })?;
        let revoked_serials = match settings.crl_file.as_str() {
            "" => HashSet::new(),
            path => revoked_serials(path)?,
        };
        let names = NameRules::new(settings)?;
        Ok(Arc::new(Self { chain, roots, revoked_serials, names }))
    }

    fn check_revocation(&self, certificate: &CertificateDer<'_>) -> Result<(), Error> {
        if self.revoked_serials.is_empty() {
            return Ok(());
        }
        let (_, parsed) = X509Certificate::from_der(certificate)
            .map_err(|_| Error::InvalidCertificate(CertificateError::BadEncoding))?;
        if self.revoked_serials.contains(parsed.raw_serial()) {
            return Err(Error::InvalidCertificate(CertificateError::Revoked));
        }
        Ok(())
    }
}

/// The authorities of a file.
#[derive(Debug)]
pub(super) struct Roots {
    pub(super) store: Arc<RootCertStore>,
    /// The same as they stand in the file.
    certificates: Vec<CertificateDer<'static>>,
}

/// What a certificate is shown for.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Usage {
    Client,
    Server,
}

/// The authorities of a PEM file.
///
/// # Errors
/// The file cannot be read, or none of its certificates can be used.
pub(super) fn read_roots(path: &str) -> Result<Roots, TlsError> {
    let mut store = RootCertStore::empty();
    let certificates = read_certificates(path)?;
    let (added, _) = store.add_parsable_certificates(certificates.iter().cloned());
    if added == 0 {
        return Err(TlsError::Content {
            path: path.to_owned(),
            what: "authority",
            reason: "no certificate in it can be parsed".to_owned(),
        });
    }
    Ok(Roots { store: Arc::new(store), certificates })
}

impl Roots {
    /// Whether the certificate itself is one of these, in force and meant for that usage. The chain
    /// check refuses an authority as anybody's own certificate; Go, and so etcd, takes a
    /// self-signed one that the operator named as trusted. Who has its key could sign any other.
    pub(super) fn contain(
        &self,
        certificate: &CertificateDer<'_>,
        usage: Usage,
        now: UnixTime,
    ) -> bool {
        if !self.certificates.iter().any(|root| root.as_ref() == certificate.as_ref()) {
            return false;
        }
        let Ok((_, parsed)) = X509Certificate::from_der(certificate) else { return false };
        let seconds = i64::try_from(now.as_secs()).unwrap_or(i64::MAX);
        let is_in_force =
            ASN1Time::from_timestamp(seconds).is_ok_and(|now| parsed.validity().is_valid_at(now));
        let is_meant = match parsed.extended_key_usage() {
            Ok(None) => true,
            Ok(Some(usages)) => {
                let meant = match usage {
                    Usage::Client => usages.value.client_auth,
                    Usage::Server => usages.value.server_auth,
                };
                meant || usages.value.any
            }
            Err(_) => false,
        };
        is_in_force && is_meant
    }
}

impl NameRules {
    /// The rules of the flags.
    ///
    /// # Errors
    /// An allowed host name that is none.
    pub(super) fn new(settings: &TlsSettings) -> Result<Self, TlsError> {
        let parse = |name: &String| {
            ServerName::try_from(name.clone()).map_err(|error| TlsError::Content {
                path: name.clone(),
                what: "allowed host name",
                reason: error.to_string(),
            })
        };
        let allowed_hostname =
            settings.allowed_hostname.iter().map(parse).collect::<Result<_, _>>()?;
        Ok(Self { allowed_cn: settings.allowed_cn.clone(), allowed_hostname })
    }

    /// Checks the names of a certificate whose chain is good.
    ///
    /// # Errors
    /// None of its names is allowed.
    pub(super) fn check(&self, certificate: &CertificateDer<'_>) -> Result<(), Error> {
        let refused = || Error::General(NOT_ALLOWED.to_owned());
        if !self.allowed_cn.is_empty() {
            let cn = common_name(certificate).ok_or_else(refused)?;
            if !self.allowed_cn.contains(&cn) {
                return Err(refused());
            }
        }
        if !self.allowed_hostname.is_empty() {
            let parsed = ParsedCertificate::try_from(certificate)?;
            let mut names = self.allowed_hostname.iter();
            if !names.any(|name| verify_server_name(&parsed, name).is_ok()) {
                return Err(refused());
            }
        }
        Ok(())
    }
}

impl ClientCertVerifier for ClientVerifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.chain.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let verified = match self.chain.verify_client_cert(end_entity, intermediates, now) {
            Err(_) if self.roots.contain(end_entity, Usage::Client, now) => {
                ClientCertVerified::assertion()
            }
            verified => verified?,
        };
        self.check_revocation(end_entity)?;
        self.names.check(end_entity)?;
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.chain.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.chain.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.chain.supported_verify_schemes()
    }
}

/// The subject's common name; the last one, as Go reads it.
pub(crate) fn common_name(certificate: &CertificateDer<'_>) -> Option<String> {
    let (_, parsed) = X509Certificate::from_der(certificate).ok()?;
    let name = parsed.subject().iter_common_name().last()?;
    name.as_str().ok().map(str::to_owned)
}

/// Serial numbers in a CRL file, PEM or DER. As in etcd only the numbers count: neither the
/// list's signature nor its issuer is looked at, since the operator named the file.
fn revoked_serials(path: &str) -> Result<HashSet<Vec<u8>>, TlsError> {
    let content = |reason: String| TlsError::Content {
        path: path.to_owned(),
        what: "revocation list",
        reason,
    };
    let bytes = read_file(path)?;
    let pem = CertificateRevocationListDer::pem_slice_iter(&bytes)
        .collect::<Result<Vec<_>, _>>()
        .unwrap_or_default();
    let lists = if pem.is_empty() { vec![bytes.as_slice().into()] } else { pem };
    let mut serials = HashSet::new();
    for list in lists {
        let list: &CertificateRevocationListDer<'_> = &list;
        let (_, parsed) = CertificateRevocationList::from_der(list.as_ref())
            .map_err(|error| content(error.to_string()))?;
        serials.extend(parsed.iter_revoked_certificates().map(|entry| entry.raw_serial().to_vec()));
    }
    Ok(serials)
}
