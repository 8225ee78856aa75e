//! Connections between members over turmoil's network: what `kelson_raft` is given to dial with, and the
//! listener that serves it. It loses nothing by itself; the network does.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use kelson_raft::{PeerConnector, PeerIo};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tonic::service::Routes;
use tonic::transport::Server;
use tonic::transport::server::Connected;
use turmoil::net::{TcpListener, TcpStream};

/// Dials `http://host:port`.
pub(super) fn connector() -> PeerConnector {
    Arc::new(|url: String| {
        Box::pin(async move {
            let address = url.trim_start_matches("http://").to_owned();
            Ok(Box::new(TcpStream::connect(address).await?) as Box<dyn PeerIo>)
        })
    })
}

/// Serves the member that runs on this host, until the host ends.
pub(super) async fn serve(routes: Routes) -> turmoil::Result {
    let listener = TcpListener::bind(("0.0.0.0", 2380)).await?;
    let incoming = futures::stream::unfold(listener, |listener| async {
        let accepted = listener.accept().await.map(|(stream, _)| Io(stream));
        Some((accepted, listener))
    });
    Server::builder().add_routes(routes).serve_with_incoming(incoming).await?;
    Ok(())
}

struct Io(TcpStream);

impl Connected for Io {
    type ConnectInfo = ();

    fn connect_info(&self) {}
}

impl AsyncRead for Io {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(context, buffer)
    }
}

impl AsyncWrite for Io {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(context)
    }
}
