//! Connections from the lab to a member: a gRPC channel, with the lab's client certificate where
//! there is TLS, and a plain GET for metrics. Nothing here waits without a limit.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use rustls_pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tonic::transport::{Channel, Endpoint};

/// Longest time to connect.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// Longest answer that is read: a member has about 100 KiB of metrics.
const ANSWER_BYTES_MAX: u64 = 4 << 20;

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<S: AsyncRead + AsyncWrite + Send + Unpin> Stream for S {}

/// A channel that connects when it is used, again and again if need be. Needs a runtime.
pub(crate) fn channel(address: SocketAddr, tls: Option<Arc<ClientConfig>>) -> Channel {
    let connect = tower::service_fn(move |_| {
        let tls = tls.clone();
        async move { connect(address, tls).await.map(TokioIo::new) }
    });
    Endpoint::from_shared(format!("http://{address}"))
        .expect("an address makes a URL")
        .connect_timeout(CONNECT_TIMEOUT)
        .connect_with_connector_lazy(connect)
}

async fn connect(
    address: SocketAddr,
    tls: Option<Arc<ClientConfig>>,
) -> io::Result<Box<dyn Stream>> {
    let stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    let Some(tls) = tls else { return Ok(Box::new(stream)) };
    let name = ServerName::IpAddress(address.ip().into());
    Ok(Box::new(TlsConnector::from(tls).connect(name, stream).await?))
}

/// The body of a plain GET.
///
/// # Errors
/// No connection, no answer with status 200, or one that is too long.
pub(crate) async fn get(address: SocketAddr, path: &str) -> io::Result<String> {
    let mut stream = TcpStream::connect(address).await?;
    // Version 1.0 asks for a plain body that ends with the connection.
    stream.write_all(format!("GET {path} HTTP/1.0\r\nHost: {address}\r\n\r\n").as_bytes()).await?;
    let mut answer = String::new();
    stream.take(ANSWER_BYTES_MAX).read_to_string(&mut answer).await?;
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
    if head.split(' ').nth(1) != Some("200") {
        return Err(io::Error::other("no answer with status 200"));
    }
    Ok(body.to_owned())
}
