//! Connections to other members, by URL: TCP or local socket, TLS as the peer flags say. It knows
//! neither members nor messages, only how to open a byte stream; the raft door decides when.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use futures::future::BoxFuture;
use kelson_raft::{PeerConnector, PeerIo};
use parking_lot::Mutex;
use rustls::pki_types::ServerName;
use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::TlsConnector;

use crate::config::{Config, TlsSettings, Url};
use crate::metrics::peers::{Traffic, TrafficByUrl};
use crate::tls::{Dialer, TlsError};

/// Longest wait for one address to accept.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);

/// Longest TLS handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);

/// TCP probes to a quiet peer start after this and repeat at this interval.
const TCP_KEEPALIVE: Duration = Duration::from_secs(10);

/// Opens connections with one side's TLS settings. Clones share the files they have read.
#[derive(Clone)]
pub struct Dial {
    shared: Arc<Shared>,
    traffic: TrafficByUrl,
}

struct Shared {
    config: Config,
    settings: TlsSettings,
    /// None until the first connection that needs it, unless files are named.
    dialer: Mutex<Option<Arc<Dialer>>>,
}

impl Dial {
    /// Reads the files that the settings name, so that a bad one stops the start.
    ///
    /// # Errors
    /// A file that cannot be read or used.
    pub fn new(config: &Config, settings: &TlsSettings) -> Result<Self, TlsError> {
        let names_files = !settings.cert_file.is_empty() || !settings.trusted_ca_file.is_empty();
        let needs_tls = names_files && config_speaks_tls(config);
        let dialer = needs_tls.then(|| Dialer::new(settings, config).map(Arc::new)).transpose()?;
        let dialer = Mutex::new(dialer);
        let (config, settings) = (config.clone(), settings.clone());
        let shared = Arc::new(Shared { config, settings, dialer });
        Ok(Self { shared, traffic: TrafficByUrl::default() })
    }

    /// The same, and what passes is counted there.
    #[must_use]
    pub fn counting(self, traffic: TrafficByUrl) -> Self {
        Self { traffic, ..self }
    }

    /// In the form that the raft door takes.
    #[must_use]
    pub fn connector(&self) -> PeerConnector {
        let dial = self.clone();
        Arc::new(move |url| {
            let dial = dial.clone();
            let connecting: BoxFuture<'static, io::Result<Box<dyn PeerIo>>> =
                Box::pin(async move {
                    let stream = dial.open(&url).await?;
                    let traffic = dial.traffic.for_url(&url);
                    Ok(Box::new(Counted { stream, traffic }) as Box<dyn PeerIo>)
                });
            connecting
        })
    }

    /// Opens a stream to a URL: `http`, `https`, `unix` or `unixs`.
    ///
    /// # Errors
    /// The URL is malformed, nobody accepts in time, or the handshake fails.
    ///
    /// # Cancel safety
    /// Dropping it closes what was opened.
    pub async fn open(&self, url: &str) -> io::Result<Box<dyn PeerIo>> {
        let invalid = |text| io::Error::new(io::ErrorKind::InvalidInput, text);
        let url = Url::parse(url.trim_end_matches('/')).map_err(invalid)?;
        if url.is_unix() {
            let stream = in_time(CONNECT_TIMEOUT, UnixStream::connect(url.host())).await?;
            // A path is no name that a certificate could be for.
            return self.encrypt(&url, "localhost", stream).await;
        }
        let stream = connect(url.host(), url.port()).await?;
        self.encrypt(&url, url.host(), stream).await
    }

    async fn encrypt<S: PeerIo + 'static>(
        &self,
        url: &Url,
        name: &str,
        stream: S,
    ) -> io::Result<Box<dyn PeerIo>> {
        if !url.is_tls() {
            return Ok(Box::new(stream));
        }
        let name = ServerName::try_from(name.to_owned())
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
        let connector = TlsConnector::from(self.dialer()?.current());
        Ok(Box::new(in_time(HANDSHAKE_TIMEOUT, connector.connect(name, stream)).await?))
    }

    fn dialer(&self) -> io::Result<Arc<Dialer>> {
        let mut dialer = self.shared.dialer.lock();
        if let Some(dialer) = &*dialer {
            return Ok(Arc::clone(dialer));
        }
        let Shared { settings, config, .. } = &*self.shared;
        let made = Arc::new(Dialer::new(settings, config).map_err(io::Error::other)?);
        *dialer = Some(Arc::clone(&made));
        Ok(made)
    }
}

/// A stream whose bytes are counted.
struct Counted {
    stream: Box<dyn PeerIo>,
    traffic: Arc<Traffic>,
}

impl AsyncRead for Counted {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let polled = Pin::new(&mut self.stream).poll_read(context, buffer);
        self.traffic.received(buffer.filled().len() - before);
        polled
    }
}

impl AsyncWrite for Counted {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = ready!(Pin::new(&mut self.stream).poll_write(context, bytes))?;
        self.traffic.sent(written);
        Poll::Ready(Ok(written))
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = ready!(Pin::new(&mut self.stream).poll_write_vectored(context, bytes))?;
        self.traffic.sent(written);
        Poll::Ready(Ok(written))
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

/// Whether any URL of the flags asks for TLS; certificates beside plain URLs are ignored, as in etcd.
fn config_speaks_tls(config: &Config) -> bool {
    let urls = config.listen_peer_urls.iter().chain(&config.initial_advertise_peer_urls);
    urls.clone().any(Url::is_tls) || config.initial_cluster.contains("https://")
}

/// The first address of a host that accepts.
async fn connect(host: &str, port: u16) -> io::Result<TcpStream> {
    let mut failure = io::Error::new(io::ErrorKind::NotFound, format!("{host} has no address"));
    for address in tokio::net::lookup_host((host, port)).await? {
        match in_time(CONNECT_TIMEOUT, TcpStream::connect(address)).await {
            Ok(stream) => {
                stream.set_nodelay(true)?;
                let probes = TcpKeepalive::new().with_time(TCP_KEEPALIVE);
                let probes = probes.with_interval(TCP_KEEPALIVE);
                SockRef::from(&stream).set_tcp_keepalive(&probes)?;
                return Ok(stream);
            }
            Err(error) => failure = error,
        }
    }
    Err(failure)
}

async fn in_time<T>(limit: Duration, work: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    tokio::time::timeout(limit, work).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}
