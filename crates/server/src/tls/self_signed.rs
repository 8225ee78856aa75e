//! `--auto-tls`: a self-signed certificate below the data directory, made once and used again at
//! every start. It encrypts and proves nothing about who is at the other end.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;
use std::time::SystemTime;

use rcgen::{CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, KeyPair};

use super::TlsError;
use crate::config::{TlsSettings, Url};

/// Days of a year for the certificate's end; a day off in leap years does not matter.
const YEAR_SECONDS: u64 = 365 * 24 * 3600;

/// Sets `cert_file` and `key_file` to `<data_dir>/fixtures/<side>/{cert,key}.pem`, making both
/// when they are not there. ECDSA P-256 where etcd takes P-521: clients know it as well and the
/// handshake is far cheaper.
///
/// # Errors
/// The directory or the files cannot be written.
pub fn ensure_self_signed(
    settings: &mut TlsSettings,
    data_dir: &Path,
    side: &str,
    urls: &[Url],
    validity_years: u32,
) -> Result<(), TlsError> {
    let directory = data_dir.join("fixtures").join(side);
    let (cert, key) = (directory.join("cert.pem"), directory.join("key.pem"));
    settings.cert_file = cert.display().to_string();
    settings.key_file = key.display().to_string();
    if cert.exists() && key.exists() {
        tracing::info!("cert-file" = settings.cert_file, "using the self-signed certificate");
        return Ok(());
    }
    let failed = |path: &Path| {
        let path = path.display().to_string();
        move |source| TlsError::Read { path, source }
    };
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&directory)
        .map_err(failed(&directory))?;
    let (cert_pem, key_pem) = make(urls, validity_years)?;
    write(&key, &key_pem).map_err(failed(&key))?;
    write(&cert, &cert_pem).map_err(failed(&cert))?;
    tracing::warn!(
        "cert-file" = settings.cert_file,
        "created a self-signed certificate: clients cannot tell this member from another"
    );
    Ok(())
}

fn make(urls: &[Url], validity_years: u32) -> Result<(String, String), TlsError> {
    let mut hosts: Vec<String> = urls.iter().map(|url| url.host().to_owned()).collect();
    hosts.retain(|host| !host.is_empty() && !host.starts_with('/'));
    hosts.sort();
    hosts.dedup();
    let mut params = CertificateParams::new(hosts)?;
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::OrganizationName, "etcd");
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    let now = SystemTime::now();
    let lifetime = std::time::Duration::from_secs(YEAR_SECONDS * u64::from(validity_years));
    params.not_before = now.into();
    params.not_after = (now + lifetime).into();
    let key = KeyPair::generate()?;
    let certificate = params.self_signed(&key)?;
    Ok((certificate.pem(), key.serialize_pem()))
}

fn write(path: &Path, text: &str) -> std::io::Result<()> {
    let mut file =
        OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()
}
