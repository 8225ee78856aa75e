//! The URLs that members listen on and advertise: scheme, host, port, nothing else. Parsed by
//! etcd's rules so that a typo is refused with the text operators know. It resolves names only
//! when asked to compare two sets of URLs.

use std::fmt;
use std::net::{IpAddr, ToSocketAddrs};

/// How a URL is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Scheme {
    /// TCP in the clear.
    Http,
    /// TCP with TLS.
    Https,
    /// A local socket in the clear.
    Unix,
    /// A local socket with TLS.
    Unixs,
}

/// One listen or advertise URL.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Url {
    /// The text as given; URLs sort and compare by it, as etcd's do.
    text: String,
    scheme: Scheme,
    /// Host without brackets; for local sockets the whole path.
    host: String,
    port: u16,
}

impl Url {
    /// Parses one URL.
    ///
    /// # Errors
    /// The text etcd gives for a wrong scheme, a missing port or a path.
    pub fn parse(text: &str) -> Result<Self, String> {
        let scheme_error = || format!("URL scheme must be http, https, unix, or unixs: {text}");
        let (scheme, rest) = text.split_once("://").ok_or_else(scheme_error)?;
        let scheme = match scheme.to_ascii_lowercase().as_str() {
            "http" => Scheme::Http,
            "https" => Scheme::Https,
            "unix" => Scheme::Unix,
            "unixs" => Scheme::Unixs,
            _ => return Err(scheme_error()),
        };
        if matches!(scheme, Scheme::Unix | Scheme::Unixs) {
            return Ok(Self { text: text.to_owned(), scheme, host: rest.to_owned(), port: 0 });
        }
        if rest.contains(['/', '?', '#']) {
            return Err(format!("URL must not contain a path: {text}"));
        }
        let form = || format!("URL address does not have the form \"host:port\": {text}");
        let (host, port) = split_host_port(rest).ok_or_else(form)?;
        let port = port.parse().map_err(|_| form())?;
        Ok(Self { text: text.to_owned(), scheme, host: host.to_owned(), port })
    }

    /// Scheme.
    #[must_use]
    pub fn scheme(&self) -> Scheme {
        self.scheme
    }

    /// Host without brackets; empty means all addresses. For local sockets the path.
    #[must_use]
    pub fn host(&self) -> &str {
        &self.host
    }

    /// TCP port; 0 for local sockets.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Whether connections to it are encrypted.
    #[must_use]
    pub fn is_tls(&self) -> bool {
        matches!(self.scheme, Scheme::Https | Scheme::Unixs)
    }

    /// Whether it names a local socket.
    #[must_use]
    pub fn is_unix(&self) -> bool {
        matches!(self.scheme, Scheme::Unix | Scheme::Unixs)
    }

    /// The address to bind: an IP, `localhost` or a local socket, as etcd demands, since a DNS
    /// name may resolve to several or to foreign addresses.
    ///
    /// # Errors
    /// `expected IP in URL for binding (<url>)` for any other host.
    pub fn check_bindable(&self) -> Result<(), String> {
        let is_fine = self.is_unix()
            || self.host.is_empty()
            || self.host == "localhost"
            || self.host.split('%').next().is_some_and(|host| host.parse::<IpAddr>().is_ok());
        is_fine.then_some(()).ok_or_else(|| format!("expected IP in URL for binding ({self})"))
    }
}

impl fmt::Display for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// Splits `host:port` or `[v6]:port`; a bare IPv6 address has too many colons and is refused.
fn split_host_port(text: &str) -> Option<(&str, &str)> {
    if let Some(rest) = text.strip_prefix('[') {
        let (host, tail) = rest.split_once(']')?;
        return Some((host, tail.strip_prefix(':')?));
    }
    let (host, port) = text.rsplit_once(':')?;
    (!host.contains(':')).then_some((host, port))
}

/// Whether two lists name the same endpoints: by text, else after resolving host names, as one
/// side is often written with names and the other with addresses.
#[must_use]
pub(super) fn same_endpoints(left: &[Url], right: &[Url]) -> bool {
    if left.len() != right.len() {
        return false;
    }
    let sorted = |urls: &[Url]| {
        let mut texts: Vec<String> = urls.iter().map(ToString::to_string).collect();
        texts.sort();
        texts
    };
    sorted(left) == sorted(right) || resolved(left).is_some_and(|l| Some(l) == resolved(right))
}

fn resolved(urls: &[Url]) -> Option<Vec<(Scheme, String)>> {
    let mut all = Vec::with_capacity(urls.len());
    for url in urls {
        if url.is_unix() {
            all.push((url.scheme, url.host.clone()));
            continue;
        }
        let mut addresses = (url.host.as_str(), url.port).to_socket_addrs().ok()?;
        all.push((url.scheme, addresses.next()?.to_string()));
    }
    all.sort();
    Some(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accepts_what_manifests_contain() {
        for text in [
            "http://localhost:2379",
            "https://10.0.0.1:2380",
            "https://[::1]:2379",
            "http://0.0.0.0:4001",
            "unix:///run/etcd.sock",
            "unixs://etcd.sock",
            "http://:2379",
        ] {
            let url = Url::parse(text).expect(text);
            assert_eq!(url.to_string(), text);
            assert_eq!(url.check_bindable(), Ok(()));
        }
        assert_eq!(Url::parse("https://[::1]:2379").expect("a URL").host(), "::1");
        assert_eq!(Url::parse("unix:///run/etcd.sock").expect("a URL").host(), "/run/etcd.sock");
    }

    #[test]
    fn refuses_with_the_known_texts() {
        let cases = [
            ("localhost:2379", "URL scheme must be http, https, unix, or unixs: localhost:2379"),
            ("ftp://a:1", "URL scheme must be http, https, unix, or unixs: ftp://a:1"),
            ("http://a", "URL address does not have the form \"host:port\": http://a"),
            ("http://a:1/x", "URL must not contain a path: http://a:1/x"),
            ("http://::1:1", "URL address does not have the form \"host:port\": http://::1:1"),
            ("http://a:x", "URL address does not have the form \"host:port\": http://a:x"),
        ];
        for (text, error) in cases {
            assert_eq!(Url::parse(text), Err(error.to_owned()));
        }
        assert_eq!(
            Url::parse("http://example.com:2379").expect("a URL").check_bindable(),
            Err("expected IP in URL for binding (http://example.com:2379)".to_owned())
        );
    }

    #[test]
    fn names_and_addresses_of_one_host_are_the_same_endpoint() {
        let url = |text: &str| vec![Url::parse(text).expect("a URL")];
        let name = url("http://localhost:2380");
        let resolved = ("localhost", 2380).to_socket_addrs().expect("localhost").next();
        let address = url(&format!("http://{}", resolved.expect("an address")));
        assert!(same_endpoints(&name, &address));
        assert!(!same_endpoints(&name, &url("https://localhost:2380")));
        assert!(!same_endpoints(&name, &url("http://localhost:2381")));
    }
}
