//! Bare HTTP/2 pings, which no gRPC client would send so often: shows when a server has enough.

use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const ACK: u8 = 1;
/// How long to listen for a goodbye after an answer.
const QUIET: Duration = Duration::from_millis(200);

fn frame(kind: u8, flags: u8, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).expect("a short payload");
    let mut bytes = length.to_be_bytes()[1..].to_vec();
    bytes.extend([kind, flags, 0, 0, 0, 0]);
    bytes.extend(payload);
    bytes
}

/// Pings without any call, each after the answer to the one before, `most` times at most.
pub async fn idle_pings(authority: &str, most: u64) -> std::io::Result<String> {
    let mut stream = TcpStream::connect(authority).await?;
    stream.write_all(PREFACE).await?;
    stream.write_all(&frame(SETTINGS, 0, &[])).await?;
    for sent in 1..=most {
        stream.write_all(&frame(PING, 0, &[1; 8])).await?;
        let mut said = answer(&mut stream).await?;
        if said.is_none() {
            // The last ping may be answered before the goodbye.
            let more = tokio::time::timeout(QUIET, answer(&mut stream)).await;
            said = more.unwrap_or(Ok(None))?;
        }
        if let Some(goaway) = said {
            return Ok(format!("ping {sent}: {goaway}"));
        }
    }
    Ok(format!("{most} pings"))
}

/// Reads until a ping is answered (`None`) or the server says goodbye.
async fn answer(stream: &mut TcpStream) -> std::io::Result<Option<String>> {
    loop {
        let mut header = [0; 9];
        stream.read_exact(&mut header).await?;
        let [a, b, c, kind, flags, ..] = header;
        let mut payload = vec![0; u32::from_be_bytes([0, a, b, c]) as usize];
        stream.read_exact(&mut payload).await?;
        match kind {
            PING if flags & ACK != 0 => return Ok(None),
            SETTINGS if flags & ACK == 0 => stream.write_all(&frame(SETTINGS, ACK, &[])).await?,
            GOAWAY => {
                let code = payload.get(4..8).map_or(&payload[..0], |code| code);
                let text = String::from_utf8_lossy(payload.get(8..).unwrap_or_default());
                return Ok(Some(format!("goaway code={code:?} text={text:?}")));
            }
            _ => {}
        }
    }
}
