//! The lab's own CA and certificates, for `--tls`: made once per lab, valid for this machine's
//! loopback names only. They protect a lab, not a real cluster: the CA's key lies beside them.

use std::fs::{self, DirBuilder, File};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa,
    KeyPair, KeyUsagePurpose,
};
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};

/// A lab may be brought back years later.
const LIFETIME: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
/// Clocks of containers may stand a little behind.
const BEFORE: Duration = Duration::from_secs(3600);

/// Where the files lie.
#[derive(Clone, Debug)]
pub(crate) struct Certs {
    dir: PathBuf,
}

impl Certs {
    /// Uses what is in `dir`, or makes all of it when the last file to be written is missing.
    ///
    /// # Errors
    /// A text for the user.
    pub(crate) fn ensure(dir: PathBuf) -> Result<Self, String> {
        let certs = Self { dir };
        if !certs.ca().exists() {
            certs.make().map_err(|error| {
                format!("cannot make certificates in {}: {error}", certs.dir.display())
            })?;
        }
        Ok(certs)
    }

    /// The CA's certificate.
    pub(crate) fn ca(&self) -> PathBuf {
        self.dir.join("ca.pem")
    }

    /// Certificate of `server`, `peer` or `client`.
    pub(crate) fn cert(&self, whose: &str) -> PathBuf {
        self.dir.join(format!("{whose}.pem"))
    }

    /// Its private key.
    pub(crate) fn key(&self, whose: &str) -> PathBuf {
        self.dir.join(format!("{whose}-key.pem"))
    }

    fn make(&self) -> Result<(), Box<dyn std::error::Error>> {
        let old = fs::remove_dir_all(&self.dir);
        if let Err(error) = old.as_ref()
            && error.kind() != std::io::ErrorKind::NotFound
        {
            old?;
        }
        DirBuilder::new().mode(0o700).create(&self.dir)?;
        let mut params = named("kelson lab CA", &[])?;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let ca = CertifiedIssuer::self_signed(params, KeyPair::generate()?)?;
        write(&self.dir.join("ca-key.pem"), &ca.key().serialize_pem())?;
        for whose in ["server", "peer", "client"] {
            let mut params = named(&format!("kelson lab {whose}"), &names(whose))?;
            params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
            params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
            if whose != "client" {
                params.extended_key_usages.push(ExtendedKeyUsagePurpose::ServerAuth);
            }
            let key = KeyPair::generate()?;
            write(&self.key(whose), &key.serialize_pem())?;
            write(&self.cert(whose), &params.signed_by(&key, &ca)?.pem())?;
        }
        write(&self.ca(), &ca.pem())?;
        Ok(())
    }

    /// What the lab itself shows and trusts when it asks a member.
    ///
    /// # Errors
    /// A text for the user: a file is missing or damaged.
    pub(crate) fn client_config(&self) -> Result<Arc<ClientConfig>, String> {
        let build = || -> Result<ClientConfig, Box<dyn std::error::Error>> {
            let mut roots = RootCertStore::empty();
            roots.add(CertificateDer::from_pem_file(self.ca())?)?;
            let chain = vec![CertificateDer::from_pem_file(self.cert("client"))?];
            let key = PrivateKeyDer::from_pem_file(self.key("client"))?;
            let provider = Arc::new(rustls::crypto::ring::default_provider());
            let mut config = ClientConfig::builder_with_provider(provider)
                .with_safe_default_protocol_versions()?
                .with_root_certificates(roots)
                .with_client_auth_cert(chain, key)?;
            config.alpn_protocols = vec![b"h2".to_vec()];
            Ok(config)
        };
        let config = build().map_err(|error| {
            format!("cannot use the certificates in {}: {error}", self.dir.display())
        })?;
        Ok(Arc::new(config))
    }
}

fn names(whose: &str) -> Vec<String> {
    let names: &[&str] = if whose == "client" { &[] } else { &["localhost", "127.0.0.1", "::1"] };
    names.iter().map(ToString::to_string).collect()
}

fn named(common_name: &str, names: &[String]) -> Result<CertificateParams, rcgen::Error> {
    let mut params = CertificateParams::new(names)?;
    params.distinguished_name.push(DnType::CommonName, common_name);
    let now = SystemTime::now();
    params.not_before = (now - BEFORE).into();
    params.not_after = (now + LIFETIME).into();
    Ok(params)
}

fn write(path: &Path, text: &str) -> std::io::Result<()> {
    let mut file = File::options().write(true).create_new(true).mode(0o600).open(path)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn certificates_are_made_once_and_fit() {
        let temp = tempfile::tempdir().expect("temp dir");
        let dir = temp.path().join("tls");
        let certs = Certs::ensure(dir.clone()).expect("made");
        certs.client_config().expect("usable");
        let before = fs::read(certs.ca()).expect("read");
        let again = Certs::ensure(dir.clone()).expect("found");
        assert_eq!(fs::read(again.ca()).expect("read"), before);

        // Cut off before the end: everything is made again, nothing is mixed.
        fs::remove_file(again.ca()).expect("remove");
        let fresh = Certs::ensure(dir).expect("made again");
        assert_ne!(fs::read(fresh.ca()).expect("read"), before);
        fresh.client_config().expect("usable");
    }
}
