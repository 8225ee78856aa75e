//! The door to the failpoints (feature `failpoints`): gofail's HTTP protocol on the address in
//! `GOFAIL_HTTP`, and what `GOFAIL_FAILPOINTS` arms from the start. It runs on a thread and a runtime
//! of its own, so that it answers while the member sleeps at one of its places.

use std::convert::Infallible;
use std::net::TcpListener;

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use kelson_storage::failpoint;

/// Longest term that is read.
const TERM_BYTES_MAX: usize = 4096;

/// Arms what the environment asks for and opens the door, if it names one.
///
/// # Errors
/// A term is malformed, or the address cannot be listened on.
pub fn start() -> Result<(), String> {
    if let Ok(terms) = std::env::var("GOFAIL_FAILPOINTS") {
        failpoint::arm_all(&terms).map_err(|reason| format!("GOFAIL_FAILPOINTS: {reason}"))?;
    }
    let Ok(address) = std::env::var("GOFAIL_HTTP") else { return Ok(()) };
    let failed = |error: std::io::Error| format!("GOFAIL_HTTP={address}: {error}");
    let listener = TcpListener::bind(&address).map_err(failed)?;
    listener.set_nonblocking(true).map_err(failed)?;
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(failed)?;
    let serve = move || runtime.block_on(accept(listener));
    let thread = std::thread::Builder::new().name("failpoints".into()).spawn(serve);
    tracing::warn!(address, "failpoints may be armed by anybody who reaches this address");
    thread.map(drop).map_err(failed)
}

async fn accept(listener: TcpListener) {
    let Ok(listener) = tokio::net::TcpListener::from_std(listener) else { return };
    while let Ok((stream, _)) = listener.accept().await {
        // One at a time: nobody needs more, and none can pile up.
        let connection = hyper::server::conn::http1::Builder::new()
            .keep_alive(false)
            .serve_connection(TokioIo::new(stream), service_fn(answer));
        if let Err(error) = connection.await {
            tracing::debug!(%error, "a connection to the failpoints failed");
        }
    }
}

async fn answer(request: Request<Incoming>) -> Result<Response<Full<Bytes>>, Infallible> {
    let (parts, body) = request.into_parts();
    let name = parts.uri.path().trim_start_matches('/').to_owned();
    let bad = |reason: String| (StatusCode::BAD_REQUEST, reason);
    let result = match parts.method {
        Method::PUT => match Limited::new(body, TERM_BYTES_MAX).collect().await {
            Ok(term) => arm(&name, &String::from_utf8_lossy(&term.to_bytes())).map_err(bad),
            Err(error) => Err(bad(format!("the term cannot be read: {error}"))),
        },
        Method::DELETE => failpoint::disarm(&name).map(|()| String::new()).map_err(bad),
        Method::GET => show(&name).map_err(|reason| (StatusCode::NOT_FOUND, reason)),
        _ => Err((StatusCode::METHOD_NOT_ALLOWED, "Method not allowed".to_owned())),
    };
    let (status, text) = match result {
        Ok(text) if text.is_empty() => (StatusCode::NO_CONTENT, text),
        Ok(text) => (StatusCode::OK, text),
        Err((status, reason)) => (status, format!("{reason}\n")),
    };
    let mut response = Response::new(Full::new(text.into()));
    *response.status_mut() = status;
    Ok(response)
}

fn arm(name: &str, terms: &str) -> Result<String, String> {
    if name.eq_ignore_ascii_case("failpoints") {
        failpoint::arm_all(terms)?;
    } else {
        failpoint::arm(name, terms)?;
    }
    Ok(String::new())
}

fn show(name: &str) -> Result<String, String> {
    if name.is_empty() {
        let line = |name: &&str| {
            let (term, _) = failpoint::asked(name).unwrap_or_default();
            format!("{name}={term}\n")
        };
        return Ok(failpoint::NAMES.iter().map(line).collect());
    }
    match name.strip_suffix("/count") {
        Some(name) => failpoint::asked(name).map(|(_, count)| count.to_string()),
        None => failpoint::asked(name).map(|(term, _)| format!("{term}\n")),
    }
}
