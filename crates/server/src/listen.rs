//! Sockets and connections: binds the listen URLs, accepts within the limit of open files, shakes
//! hands with TLS, and serves HTTP/1 and HTTP/2 on each connection. What a request means is the
//! business of the handler it is given. Some lines over 600: a connection's way from the socket to the
//! handler is read in one piece.

use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use http::{Request, Response};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpSocket, TcpStream, UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use crate::callers::ClientName;
use crate::config::{Config, Url};
use crate::ping_guard::PingGuard;
use crate::shutdown::Shutdown;
use crate::tls::Acceptor;

/// How long a listen address may stay taken: for some milliseconds after a process was killed and
/// reaped, Linux still holds its listening sockets, and a supervisor may be that quick.
const ADDRESS_WAIT_MAX: Duration = Duration::from_secs(1);

/// Pause between two attempts.
const ADDRESS_RETRY: Duration = Duration::from_millis(10);

/// Open files kept back from client connections, for the store, the log and peers. Source: etcd.
const RESERVED_FILES: u64 = 150;

/// Connections waiting to be accepted; the system cuts it to `net.core.somaxconn`.
const BACKLOG: u32 = 4096;

/// Longest TLS handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// TLS handshakes at the same time; more wait for their turn, so that a storm of new connections
/// leaves processor time to those that are established.
const HANDSHAKES_MAX: usize = 512;

/// First byte of a TLS handshake; no request begins with it.
const TLS_HANDSHAKE: u8 = 0x16;

/// Longest wait for the headers of an HTTP/1 request.
const HEADER_TIMEOUT: Duration = Duration::from_secs(30);

/// TCP probes to quiet clients start after this and repeat at this interval.
const TCP_KEEPALIVE: Duration = Duration::from_secs(15);

/// HTTP/2 flow control windows for what clients send: at most one request of the default size
/// limit several times over per stream, and a few such streams per connection.
const STREAM_WINDOW_BYTES: u32 = 8 * 1024 * 1024;
const CONNECTION_WINDOW_BYTES: u32 = 16 * 1024 * 1024;

/// Response bytes buffered per stream before its service waits.
const SEND_BUFFER_BYTES: usize = 1024 * 1024;

/// Streams a client may have reset before we looked at them. Clients that cancel many watches at
/// once are normal, so it is far above the library's default.
const RESET_STREAMS_MAX: usize = 4096;

/// A response of ours.
pub type HttpResponse = Response<tonic::body::Body>;

/// Marks requests that came over TLS.
#[derive(Clone, Copy, Debug)]
pub struct OverTls;

/// How a connection is served, from the flags.
#[derive(Clone, Debug)]
pub struct ConnectionRules {
    max_concurrent_streams: u32,
    keepalive_interval: Option<Duration>,
    keepalive_timeout: Duration,
    /// Least time between pings of a client; `None` lets them ping as they like.
    ping_min_time: Option<Duration>,
    /// Refuse certificates that are not for the address they come from.
    checks_addresses: bool,
    /// Whose connections these are, for the log.
    endpoint: &'static str,
}

impl ConnectionRules {
    /// Rules from the flags.
    #[must_use]
    pub fn new(config: &Config) -> Self {
        let interval = config.grpc_keepalive_interval;
        let timeout = config.grpc_keepalive_timeout;
        let is_on = !interval.is_zero() && !timeout.is_zero();
        Self {
            max_concurrent_streams: config.max_concurrent_streams,
            keepalive_interval: is_on.then_some(interval),
            keepalive_timeout: timeout,
            ping_min_time: Some(config.grpc_keepalive_min_time),
            checks_addresses: false,
            endpoint: "client",
        }
    }

    /// The same rules for listeners that serve no gRPC: their clients may ping as they like.
    #[must_use]
    pub fn without_ping_limit(&self) -> Self {
        Self { ping_min_time: None, ..self.clone() }
    }

    /// The same rules for the connections of other members.
    #[must_use]
    pub fn of_peers(&self) -> Self {
        Self { endpoint: "peer", ..self.without_ping_limit() }
    }

    /// The same rules, and certificates must be for the address that they come from.
    #[must_use]
    pub fn checking_addresses(&self) -> Self {
        Self { checks_addresses: true, ..self.clone() }
    }

    fn builder(&self) -> auto::Builder<TokioExecutor> {
        let mut builder = auto::Builder::new(TokioExecutor::new());
        builder.http1().timer(TokioTimer::new()).header_read_timeout(HEADER_TIMEOUT);
        builder
            .http2()
            .timer(TokioTimer::new())
            .max_concurrent_streams(self.max_concurrent_streams)
            .initial_stream_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .max_send_buf_size(SEND_BUFFER_BYTES)
            .max_pending_accept_reset_streams(RESET_STREAMS_MAX)
            .max_local_error_reset_streams(RESET_STREAMS_MAX)
            .keep_alive_interval(self.keepalive_interval)
            .keep_alive_timeout(self.keepalive_timeout);
        builder
    }
}

/// How many client connections may be open, shared by all client listeners.
#[derive(Clone, Debug)]
pub struct ConnectionLimit(Arc<Semaphore>);

impl ConnectionLimit {
    /// Raises the soft limit of open files to the hard one and keeps [`RESERVED_FILES`] of it
    /// back.
    #[must_use]
    pub fn from_open_files() -> Self {
        use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
        let limit = getrlimit(Resource::Nofile);
        let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
        let files = match setrlimit(Resource::Nofile, raised) {
            Ok(()) => limit.maximum,
            Err(_) => limit.current,
        };
        let files = files.unwrap_or(u64::from(u32::MAX));
        let connections = files.saturating_sub(RESERVED_FILES).max(1);
        let connections = usize::try_from(connections).unwrap_or(usize::MAX);
        Self(Arc::new(Semaphore::new(connections.min(Semaphore::MAX_PERMITS))))
    }
}

/// A bound socket.
#[derive(Debug)]
pub struct Listener {
    socket: Socket,
    tls: Option<Arc<Acceptor>>,
    /// Connections without TLS are served although there is a certificate.
    takes_plain: bool,
    url: Url,
}

#[derive(Debug)]
enum Socket {
    Tcp(TcpListener),
    Unix(UnixListener),
}

impl Listener {
    /// Binds one listen URL; `tls` is used when the URL asks for it.
    ///
    /// # Errors
    /// The address is taken, is not ours, or a name does not resolve.
    pub fn bind(url: &Url, config: &Config, tls: Option<&Arc<Acceptor>>) -> io::Result<Self> {
        let socket = if url.is_unix() {
            // A socket file of a process that died would be in the way.
            let _was_absent = std::fs::remove_file(url.host());
            Socket::Unix(UnixListener::bind(url.host())?)
        } else {
            Socket::Tcp(bind_tcp_patiently(url, config.socket_reuse_port)?)
        };
        Ok(Self { socket, tls: acceptor(url, tls)?, takes_plain: !url.is_tls(), url: url.clone() })
    }

    /// As [`Listener::bind`] for all URLs, where two may name one TCP address with and without TLS:
    /// the first byte of a connection tells which it is.
    ///
    /// # Errors
    /// As `bind`, with the URL.
    pub fn bind_all(
        urls: &[Url],
        config: &Config,
        tls: Option<&Arc<Acceptor>>,
    ) -> Result<Vec<Self>, (Url, io::Error)> {
        let mut bound: Vec<Self> = Vec::with_capacity(urls.len());
        for url in urls {
            let failed = |error| (url.clone(), error);
            match bound.iter_mut().find(|other| other.has_address_of(url)) {
                Some(other) => other.join(url, tls).map_err(failed)?,
                None => bound.push(Self::bind(url, config, tls).map_err(failed)?),
            }
        }
        Ok(bound)
    }

    fn has_address_of(&self, url: &Url) -> bool {
        let is_tcp = !self.url.is_unix() && !url.is_unix();
        is_tcp && (self.url.host(), self.url.port()) == (url.host(), url.port()) && url.port() != 0
    }

    fn join(&mut self, url: &Url, tls: Option<&Arc<Acceptor>>) -> io::Result<()> {
        self.takes_plain |= !url.is_tls();
        if let Some(tls) = acceptor(url, tls)? {
            self.tls = Some(tls);
        }
        Ok(())
    }

    /// Whether it serves connections without TLS, with TLS.
    #[must_use]
    pub fn serves(&self) -> (bool, bool) {
        (self.takes_plain, self.tls.is_some())
    }

    /// The URL it was bound to.
    #[must_use]
    pub fn url(&self) -> &Url {
        &self.url
    }

    /// The address the system gave; `None` for a local socket.
    #[must_use]
    pub fn local_addr(&self) -> Option<SocketAddr> {
        match &self.socket {
            Socket::Tcp(listener) => listener.local_addr().ok(),
            Socket::Unix(_) => None,
        }
    }

    /// Serves connections until the end is asked for, then returns; connections go on until they
    /// are drained or closed.
    pub async fn serve<H, F>(
        self,
        rules: ConnectionRules,
        limit: Option<ConnectionLimit>,
        shutdown: Shutdown,
        handler: H,
    ) where
        H: Fn(Request<Incoming>) -> F + Clone + Send + Sync + 'static,
        F: Future<Output = HttpResponse> + Send + 'static,
    {
        let builder = Arc::new(rules.builder());
        let handshakes = Arc::new(Semaphore::new(HANDSHAKES_MAX));
        loop {
            let (stream, permit) = tokio::select! {
                biased;
                () = shutdown.asked() => break,
                accepted = self.accept(limit.as_ref()) => accepted,
            };
            let connection = Connection {
                builder: Arc::clone(&builder),
                handshakes: Arc::clone(&handshakes),
                tls: self.tls.clone(),
                takes_plain: self.takes_plain,
                ping_min_time: rules.ping_min_time,
                checks_addresses: rules.checks_addresses,
                endpoint: rules.endpoint,
                shutdown: shutdown.clone(),
                handler: handler.clone(),
                _permit: permit,
            };
            tokio::spawn(connection.run(stream));
        }
        if let Socket::Unix(_) = self.socket {
            let _was_absent = std::fs::remove_file(self.url.host());
        }
    }

    /// The next connection. Errors of a single one (it was reset meanwhile) are skipped; when
    /// the system is out of files, waiting a little is all that helps.
    async fn accept(
        &self,
        limit: Option<&ConnectionLimit>,
    ) -> (Stream, Option<OwnedSemaphorePermit>) {
        let permit = match limit {
            None => None,
            Some(ConnectionLimit(permits)) => Arc::clone(permits).acquire_owned().await.ok(),
        };
        loop {
            let accepted = match &self.socket {
                Socket::Tcp(listener) => listener.accept().await.map(|(s, _)| Stream::tcp(s)),
                Socket::Unix(listener) => listener.accept().await.map(|(s, _)| Stream::Unix(s)),
            };
            match accepted {
                Ok(stream) => return (stream, permit),
                Err(error) => {
                    tracing::warn!(%error, url = %self.url, "cannot accept a connection");
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
            }
        }
    }
}

/// What shakes hands on a URL, if that asks for it.
fn acceptor(url: &Url, tls: Option<&Arc<Acceptor>>) -> io::Result<Option<Arc<Acceptor>>> {
    if !url.is_tls() {
        return Ok(None);
    }
    let text = || format!("{url} asks for TLS, but there is no certificate");
    let missing = || io::Error::new(io::ErrorKind::InvalidInput, text());
    tls.cloned().map(Some).ok_or_else(missing)
}

/// Binds a TCP address. As in Go, SO_REUSEADDR is always set and an IPv4 address of a name is
/// preferred.
fn bind_tcp(url: &Url, reuse_port: bool) -> io::Result<TcpListener> {
    let host = if url.host().is_empty() { "::" } else { url.host() };
    let addresses: Vec<SocketAddr> = (host, url.port()).to_socket_addrs()?.collect();
    let ipv4 = addresses.iter().find(|address| address.is_ipv4());
    let address = *ipv4.or(addresses.first()).ok_or(io::ErrorKind::AddrNotAvailable)?;
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    socket.set_reuseaddr(true)?;
    socket.set_reuseport(reuse_port)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

/// As [`bind_tcp`], again for a moment while the address is taken.
fn bind_tcp_patiently(url: &Url, reuse_port: bool) -> io::Result<TcpListener> {
    let deadline = Instant::now() + ADDRESS_WAIT_MAX;
    loop {
        match bind_tcp(url, reuse_port) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && Instant::now() < deadline => {
                std::thread::sleep(ADDRESS_RETRY);
            }
            result => return result,
        }
    }
}

/// One connection and all it needs.
struct Connection<H> {
    builder: Arc<auto::Builder<TokioExecutor>>,
    handshakes: Arc<Semaphore>,
    tls: Option<Arc<Acceptor>>,
    takes_plain: bool,
    ping_min_time: Option<Duration>,
    checks_addresses: bool,
    endpoint: &'static str,
    shutdown: Shutdown,
    handler: H,
    /// Given back when the connection ends.
    _permit: Option<OwnedSemaphorePermit>,
}

impl<H, F> Connection<H>
where
    H: Fn(Request<Incoming>) -> F + Clone + Send + Sync + 'static,
    F: Future<Output = HttpResponse> + Send + 'static,
{
    async fn run(self, stream: Stream) {
        let _open = self.shutdown.connection();
        let (peer, address) = (stream.peer(), stream.address());
        let Some(tls) = &self.tls else {
            return self.serve(stream, None, false).await;
        };
        if self.takes_plain {
            match tokio::time::timeout(HEADER_TIMEOUT, stream.begins_with_handshake()).await {
                Ok(Ok(true)) => {}
                Ok(Ok(false)) => return self.serve(stream, None, false).await,
                // Gone, or silent for too long.
                Ok(Err(_)) | Err(_) => return,
            }
        }
        let handshake = async {
            // The semaphore is never closed.
            let _turn = self.handshakes.acquire().await;
            TlsAcceptor::from(tls.current()).accept(stream).await
        };
        let rejected = match tokio::time::timeout(HANDSHAKE_TIMEOUT, handshake).await {
            Ok(Ok(stream)) => match self.check(&stream, address).await {
                Ok(()) => {
                    let name = client_name(&stream);
                    return self.serve(stream, name, true).await;
                }
                Err(error) => error,
            },
            Ok(Err(error)) => error.to_string(),
            Err(_) => "the TLS handshake took too long".to_owned(),
        };
        tracing::warn!(
            "remote-addr" = peer,
            error = rejected,
            "rejected connection on {} endpoint",
            self.endpoint
        );
    }

    /// Checks a shown certificate against where it comes from.
    async fn check(
        &self,
        stream: &TlsStream<Stream>,
        address: Option<SocketAddr>,
    ) -> Result<(), String> {
        let shown = stream.get_ref().1.peer_certificates().and_then(|chain| chain.first());
        match (shown, address) {
            (Some(certificate), Some(address)) if self.checks_addresses => {
                crate::tls::check_address(certificate, address.ip()).await
            }
            _ => Ok(()),
        }
    }

    async fn serve<S>(&self, stream: S, name: Option<ClientName>, is_tls: bool)
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        match self.ping_min_time {
            Some(min_time) => {
                self.serve_on(PingGuard::new(stream, min_time), name, is_tls).await;
            }
            None => self.serve_on(stream, name, is_tls).await,
        }
    }

    async fn serve_on<S>(&self, stream: S, name: Option<ClientName>, is_tls: bool)
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let handler = self.handler.clone();
        let service = service_fn(move |mut request: Request<Incoming>| {
            if let Some(name) = &name {
                request.extensions_mut().insert(name.clone());
            }
            if is_tls {
                request.extensions_mut().insert(OverTls);
            }
            let answer = handler(request);
            async move { Ok::<_, Infallible>(answer.await) }
        });
        let connection = self.builder.serve_connection_with_upgrades(TokioIo::new(stream), service);
        let mut connection = std::pin::pin!(connection);
        let ended = tokio::select! {
            ended = connection.as_mut() => ended,
            () = self.shutdown.asked() => {
                connection.as_mut().graceful_shutdown();
                tokio::select! {
                    ended = connection.as_mut() => ended,
                    () = self.shutdown.closed() => Ok(()),
                }
            }
        };
        if let Err(error) = ended {
            tracing::debug!(%error, "connection ended");
        }
    }
}

/// The common name in the certificate that the client showed; the acceptor has verified it.
fn client_name(stream: &TlsStream<Stream>) -> Option<ClientName> {
    let shown = stream.get_ref().1.peer_certificates()?.first()?;
    crate::tls::common_name(shown).map(|name| ClientName(name.into()))
}

/// An accepted stream.
enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Stream {
    fn tcp(stream: TcpStream) -> Self {
        let keepalive = TcpKeepalive::new().with_time(TCP_KEEPALIVE).with_interval(TCP_KEEPALIVE);
        let options = stream
            .set_nodelay(true)
            .and_then(|()| SockRef::from(&stream).set_tcp_keepalive(&keepalive));
        if let Err(error) = options {
            tracing::debug!(%error, "cannot set options of a connection");
        }
        Self::Tcp(stream)
    }

    /// Whether the other side begins with a TLS handshake; waits for its first byte and leaves it
    /// there.
    async fn begins_with_handshake(&self) -> io::Result<bool> {
        let mut first = [0];
        match self {
            Self::Tcp(stream) => {
                Ok(stream.peek(&mut first).await? == 1 && first == [TLS_HANDSHAKE])
            }
            // One path has one listener.
            Self::Unix(_) => Ok(true),
        }
    }

    /// Where it comes from; nowhere for a local socket.
    fn address(&self) -> Option<SocketAddr> {
        match self {
            Self::Tcp(stream) => stream.peer_addr().ok(),
            Self::Unix(_) => None,
        }
    }

    fn peer(&self) -> String {
        match self {
            Self::Tcp(stream) => {
                stream.peer_addr().map_or_else(|_| String::new(), |address| address.to_string())
            }
            Self::Unix(_) => "@".to_owned(),
        }
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_read(context, buffer),
            Self::Unix(stream) => Pin::new(stream).poll_read(context, buffer),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_write(context, bytes),
            Self::Unix(stream) => Pin::new(stream).poll_write(context, bytes),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_flush(context),
            Self::Unix(stream) => Pin::new(stream).poll_flush(context),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_shutdown(context),
            Self::Unix(stream) => Pin::new(stream).poll_shutdown(context),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffers: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_write_vectored(context, buffers),
            Self::Unix(stream) => Pin::new(stream).poll_write_vectored(context, buffers),
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_address_that_is_let_go_within_a_moment_is_had() {
        let held = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = held.local_addr().expect("an address");
        let url = Url::parse(&format!("http://{address}")).expect("a URL");
        let release = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(100));
            drop(held);
        });
        Listener::bind(&url, &Config::default(), None).expect("the address");
        release.join().expect("the holder");
    }
}
