//! `--discovery-srv`: the members of a new cluster from SRV records, `_etcd-server-ssl._tcp` for
//! https and `_etcd-server._tcp` for http. Records hold no names, so every member but this one gets
//! a number; ids come from URLs alone and are the same on all members.

use std::net::SocketAddr;

use super::dns::{Resolver, Srv};
use super::{DiscoveryError, Members};
use crate::config::{Config, Scheme, Url};

/// Finds the members by the flags.
///
/// # Errors
/// Neither name has records, or this member is not among them.
pub async fn discover(config: &Config, resolver: &Resolver) -> Result<Members, DiscoveryError> {
    let mut members = Members::new();
    let mut failures = Vec::new();
    let suffix = match config.discovery_srv_name.as_str() {
        "" => String::new(),
        name => format!("-{name}"),
    };
    let mut next_name = 0;
    for (scheme, service) in [("https", "etcd-server-ssl"), ("http", "etcd-server")] {
        let service = format!("{service}{suffix}");
        match resolver.services(&service, &config.discovery_srv).await {
            Ok(found) => add(config, scheme, &found, &mut next_name, &mut members).await?,
            Err(error) => {
                tracing::info!(service, %error, "no SRV records of this kind");
                failures.push(format!("{service}: {error}"));
            }
        }
    }
    if members.is_empty() {
        let text = failures.join("; ");
        return Err(DiscoveryError(format!("couldn't resolve during SRV discovery ({text})")));
    }
    if !members.iter().any(|(name, _)| *name == config.name) {
        let text = format!("cannot find local etcd member \"{}\" in SRV records", config.name);
        return Err(DiscoveryError(text));
    }
    Ok(members)
}

async fn add(
    config: &Config,
    scheme: &str,
    found: &[Srv],
    next_name: &mut usize,
    members: &mut Members,
) -> Result<(), DiscoveryError> {
    for srv in found {
        let address = addresses(&srv.target, srv.port).await;
        let own = own_url(config, srv, &address).await;
        if let Some(url) = own
            && matches!(url.scheme(), Scheme::Https) != (scheme == "https")
        {
            let text = format!("bootstrap at {url} from DNS for {scheme}://{}", srv.target);
            return Err(DiscoveryError(format!("{text}: the schemes differ")));
        }
        let name = match own {
            Some(_) => config.name.clone(),
            None => {
                *next_name += 1;
                (*next_name - 1).to_string()
            }
        };
        let url = format!("{scheme}://{}:{}", srv.target, srv.port);
        tracing::info!(name, url, "got bootstrap from DNS");
        match members.iter_mut().find(|(known, _)| *known == name) {
            Some((_, urls)) => urls.push(url),
            None => members.push((name, vec![url])),
        }
    }
    Ok(())
}

/// The advertised URL that a record speaks of: the same host, or one at the same address.
async fn own_url<'a>(config: &'a Config, srv: &Srv, found: &[SocketAddr]) -> Option<&'a Url> {
    for url in &config.initial_advertise_peer_urls {
        let is_same = url.port() == srv.port && url.host().eq_ignore_ascii_case(&srv.target);
        if is_same || addresses(url.host(), url.port()).await.iter().any(|a| found.contains(a)) {
            return Some(url);
        }
    }
    None
}

/// Where a host is; nowhere if it does not resolve.
async fn addresses(host: &str, port: u16) -> Vec<SocketAddr> {
    tokio::net::lookup_host((host, port)).await.map(Iterator::collect).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::super::dns::tests::serve;
    use super::*;

    fn config(arguments: &[&str]) -> Config {
        let arguments: Vec<String> = arguments.iter().map(ToString::to_string).collect();
        match crate::config::load(&arguments, []).expect("settings") {
            crate::config::Command::Run(loaded) => loaded.config,
            other => panic!("expected settings, got {other:?}"),
        }
    }

    #[tokio::test]
    async fn this_member_is_found_by_its_address_and_others_are_numbered() {
        let records = vec![
            (0, 0, 2380, "a.example.invalid"),
            (0, 0, 2381, "localhost"),
            (0, 0, 2382, "b.example.invalid"),
        ];
        let server = serve(vec![("_etcd-server-blue._tcp.example.com", records)], false).await;
        let resolver = Resolver::with_server(server);
        let mut flags = vec![
            "--name=me",
            "--initial-advertise-peer-urls=http://127.0.0.1:2381",
            "--discovery-srv=example.com",
            "--discovery-srv-name=blue",
        ];
        let members = discover(&config(&flags), &resolver).await.expect("found");
        let url = |text: &str| vec![text.to_owned()];
        let expected = [
            ("0".to_owned(), url("http://a.example.invalid:2380")),
            ("me".to_owned(), url("http://localhost:2381")),
            ("1".to_owned(), url("http://b.example.invalid:2382")),
        ];
        assert_eq!(members, expected);

        flags[1] = "--initial-advertise-peer-urls=http://127.0.0.1:9999";
        let error = discover(&config(&flags), &resolver).await.expect_err("a stranger");
        assert_eq!(error.0, "cannot find local etcd member \"me\" in SRV records");
        flags[3] = "--discovery-srv-name=red";
        let error = discover(&config(&flags), &resolver).await.expect_err("no records");
        assert!(error.0.starts_with("couldn't resolve during SRV discovery"), "{error}");
    }
}
