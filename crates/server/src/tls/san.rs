//! Whether a connecting member may show its certificate from where it stands: the address of the
//! connection must be one the certificate is for, by IP address or through a host name. Runs after
//! the handshake, because it may ask DNS. Rules as in etcd.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use rustls::pki_types::CertificateDer;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::discovery::dns::Resolver;

/// Longest wait for the addresses of all names in one certificate.
const LOOKUP_TIMEOUT: Duration = Duration::from_secs(5);

/// Checks the certificate's names against the address that it came from. One without names may come
/// from anywhere: then only the chain counts.
///
/// # Errors
/// Why the connection must be refused.
///
/// # Cancel safety
/// Safe.
pub(crate) async fn check_address(
    certificate: &CertificateDer<'_>,
    from: IpAddr,
) -> Result<(), String> {
    let names = names_of(certificate)?;
    let from = from.to_canonical();
    if names.addresses.is_empty() && names.hosts.is_empty() {
        return Ok(());
    }
    if names.addresses.contains(&from) {
        return Ok(());
    }
    if names.hosts.is_empty() {
        let named: Vec<String> = names.addresses.iter().map(IpAddr::to_string).collect();
        return Err(format!("x509: certificate is valid for {}, not {from}", named.join(", ")));
    }
    match tokio::time::timeout(LOOKUP_TIMEOUT, is_one_of(from, &names.hosts)).await {
        Ok(true) => Ok(()),
        Ok(false) => {
            Err(format!("tls: \"{from}\" does not match any of DNSNames {:?}", names.hosts))
        }
        Err(_) => {
            Err(format!("the names {:?} of the certificate take too long to resolve", names.hosts))
        }
    }
}

#[derive(Debug, Default, PartialEq)]
struct Names {
    addresses: Vec<IpAddr>,
    hosts: Vec<String>,
}

fn names_of(certificate: &CertificateDer<'_>) -> Result<Names, String> {
    let parsed = X509Certificate::from_der(certificate);
    let (_, parsed) = parsed.map_err(|error| format!("the certificate is unreadable: {error}"))?;
    let extension = parsed.subject_alternative_name();
    let extension = extension.map_err(|error| format!("its names are unreadable: {error}"))?;
    let mut names = Names::default();
    for name in extension.iter().flat_map(|extension| &extension.value.general_names) {
        match name {
            GeneralName::DNSName(host) => names.hosts.push((*host).to_owned()),
            GeneralName::IPAddress(bytes) => names.addresses.extend(address_of(bytes)),
            _ => {}
        }
    }
    Ok(names)
}

fn address_of(bytes: &[u8]) -> Option<IpAddr> {
    let v4 = || <[u8; 4]>::try_from(bytes).ok().map(|b| IpAddr::V4(Ipv4Addr::from(b)));
    let v6 = || <[u8; 16]>::try_from(bytes).ok().map(|b| IpAddr::V6(Ipv6Addr::from(b)));
    v4().or_else(v6)
}

/// Whether one of the host names resolves to the address, or a name of the address fits one with a
/// wildcard.
async fn is_one_of(address: IpAddr, hosts: &[String]) -> bool {
    for host in hosts {
        if host.starts_with("*.") {
            continue;
        }
        let Ok(mut found) = tokio::net::lookup_host((host.as_str(), 0)).await else { continue };
        if found.any(|found| found.ip().to_canonical() == address) {
            return true;
        }
    }
    if !hosts.iter().any(|host| host.starts_with("*.")) {
        return false;
    }
    let Ok(resolver) = Resolver::from_system() else { return false };
    let names = resolver.names_of(address).await.unwrap_or_default();
    let mut wildcards = hosts.iter().filter_map(|host| host.strip_prefix('*'));
    wildcards.any(|suffix| names.iter().any(|name| fits(name, suffix)))
}

/// Whether a name is one label and then the suffix, which begins with a dot.
fn fits(name: &str, suffix: &str) -> bool {
    let Some((_, rest)) = name.split_once('.') else { return false };
    suffix.strip_prefix('.').is_some_and(|suffix| rest.eq_ignore_ascii_case(suffix))
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, KeyPair};

    use super::*;

    fn certificate(names: &[&str]) -> CertificateDer<'static> {
        let names = names.iter().map(ToString::to_string).collect::<Vec<_>>();
        let params = CertificateParams::new(names).expect("parameters");
        let key = KeyPair::generate().expect("a key");
        params.self_signed(&key).expect("a certificate").der().clone()
    }

    #[tokio::test]
    async fn the_address_must_be_in_the_certificate() {
        let address = |text: &str| text.parse::<IpAddr>().expect("an address");
        let (local, other) = (address("127.0.0.1"), address("192.0.2.7"));
        assert_eq!(check_address(&certificate(&[]), other).await, Ok(()));
        let by_address = certificate(&["127.0.0.1", "::1"]);
        assert_eq!(check_address(&by_address, local).await, Ok(()));
        assert_eq!(check_address(&by_address, address("::ffff:127.0.0.1")).await, Ok(()));
        assert_eq!(check_address(&by_address, address("::1")).await, Ok(()));
        assert!(check_address(&by_address, other).await.is_err());
        let by_name = certificate(&["localhost"]);
        assert_eq!(check_address(&by_name, local).await, Ok(()));
        let refused = check_address(&by_name, other).await.expect_err("another address");
        assert!(refused.contains("does not match any of DNSNames"), "{refused}");
    }

    #[test]
    fn a_wildcard_stands_for_one_label() {
        assert!(fits("a.example.com", ".example.com"));
        assert!(fits("a.Example.COM", ".example.com"));
        assert!(!fits("a.b.example.com", ".example.com"));
        assert!(!fits("example.com", ".example.com"));
        assert!(!fits("localhost", ".example.com"));
    }
}
