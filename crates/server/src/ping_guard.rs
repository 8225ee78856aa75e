//! Ends connections whose clients ping too often, as gRPC servers in Go do: the client is told
//! GOAWAY `too_many_pings`, which makes a gRPC client ping less on its next connection. It stands
//! between a socket and the HTTP/2 library, reads frame headers as they pass in both directions
//! and changes nothing until the connection is to end. It never looks into a payload, and leaves
//! connections that do not begin with HTTP/2 alone.

use std::collections::HashSet;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// What an HTTP/2 client sends first.
const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Pings that may come too early before the connection ends. Source: grpc-go.
const STRIKES_MAX: u32 = 2;

/// How seldom a client without open calls may ping. Source: grpc-go.
const IDLE_MIN_TIME: Duration = Duration::from_secs(2 * 3600);

/// The least time between pings when the flag is 0. Source: grpc-go's own default.
const DEFAULT_MIN_TIME: Duration = Duration::from_secs(300);

/// Length, type, flags and stream of a frame.
const FRAME_HEADER: usize = 9;
const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
/// ACK of a ping, END_STREAM of data and headers.
const FLAG_1: u8 = 1;

const ENHANCE_YOUR_CALM: u32 = 11;
const DEBUG_DATA: &[u8] = b"too_many_pings";

/// A socket whose pings are judged.
pub(crate) struct PingGuard<S> {
    stream: S,
    /// `None` if nothing is judged: the connection is not HTTP/2.
    judge: Option<Judge>,
    /// What is left to say before the connection ends, once it is to end.
    farewell: Option<Vec<u8>>,
}

impl<S> PingGuard<S> {
    /// Judges the pings of `stream` by the least time between two; 0 means the default.
    pub(crate) fn new(stream: S, min_time: Duration) -> Self {
        let min_time = if min_time.is_zero() { DEFAULT_MIN_TIME } else { min_time };
        Self { stream, judge: Some(Judge::new(min_time)), farewell: None }
    }
}

impl<S: AsyncWrite + Unpin> PingGuard<S> {
    /// Says goodbye and closes our side. Only between two frames of our own.
    fn poll_farewell(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        while let Some(left) = self.farewell.as_mut().filter(|left| !left.is_empty()) {
            let written = ready!(Pin::new(&mut self.stream).poll_write(context, left))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            left.drain(..written);
        }
        Pin::new(&mut self.stream).poll_shutdown(context)
    }

    /// Bytes that may still be written before the farewell; 0 between two frames.
    fn rest_of_frame(&self) -> usize {
        self.judge.as_ref().map_or(0, |judge| judge.outbound.rest())
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for PingGuard<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.farewell.is_some() {
            if this.rest_of_frame() > 0 {
                // The writer ends its frame first; it is polled as long as it has any of it.
                return Poll::Pending;
            }
            // Without bytes this is the end of the stream: the library lets go of its calls.
            return this.poll_farewell(context);
        }
        let before = buffer.filled().len();
        ready!(Pin::new(&mut this.stream).poll_read(context, buffer))?;
        if let Some(judge) = &mut this.judge {
            match judge.received(&buffer.filled()[before..], Instant::now()) {
                Verdict::Fine => {}
                Verdict::NotHttp2 => this.judge = None,
                Verdict::TooManyPings => this.farewell = Some(judge.farewell()),
            }
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for PingGuard<S> {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let mut bytes = bytes;
        if this.farewell.is_some() {
            bytes = &bytes[..bytes.len().min(this.rest_of_frame())];
            if bytes.is_empty() {
                ready!(this.poll_farewell(context))?;
                return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
            }
        }
        let written = ready!(Pin::new(&mut this.stream).poll_write(context, bytes))?;
        if let Some(judge) = &mut this.judge {
            judge.sent(&bytes[..written]);
        }
        Poll::Ready(Ok(written))
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(context)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffers: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        if self.farewell.is_some() {
            let first = buffers.iter().find(|part| !part.is_empty());
            return self.poll_write(context, first.map_or(&[], |part| part));
        }
        let this = self.get_mut();
        let written = ready!(Pin::new(&mut this.stream).poll_write_vectored(context, buffers))?;
        if let Some(judge) = &mut this.judge {
            let mut left = written;
            for part in buffers {
                let part = &part[..part.len().min(left)];
                judge.sent(part);
                left -= part.len();
            }
        }
        Poll::Ready(Ok(written))
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    Fine,
    NotHttp2,
    TooManyPings,
}

/// The rules, apart from any socket.
struct Judge {
    min_time: Duration,
    /// How much of the preface has come.
    preface: usize,
    inbound: Frames,
    outbound: Frames,
    /// Calls that are not answered to the end. Bounded by the streams that the library allows: it
    /// resets what is beyond.
    open: HashSet<u32>,
    newest: u32,
    last_ping: Option<Instant>,
    strikes: u32,
    /// We have sent something since the last ping, so the next one is no mischief.
    has_sent: bool,
}

impl Judge {
    fn new(min_time: Duration) -> Self {
        Self {
            min_time,
            preface: 0,
            inbound: Frames::default(),
            outbound: Frames::default(),
            open: HashSet::new(),
            newest: 0,
            last_ping: None,
            strikes: 0,
            has_sent: false,
        }
    }

    fn received(&mut self, bytes: &[u8], now: Instant) -> Verdict {
        let expected = &PREFACE[self.preface..];
        let (start, bytes) = bytes.split_at(bytes.len().min(expected.len()));
        if !expected.starts_with(start) {
            return Verdict::NotHttp2;
        }
        self.preface += start.len();
        let mut inbound = std::mem::take(&mut self.inbound);
        let mut is_too_much = false;
        inbound.scan(bytes, |frame| match frame.kind {
            PING if frame.flags & FLAG_1 == 0 => is_too_much |= self.ping(now),
            HEADERS if frame.stream > self.newest => {
                self.newest = frame.stream;
                self.open.insert(frame.stream);
            }
            RST_STREAM => {
                self.open.remove(&frame.stream);
            }
            _ => {}
        });
        self.inbound = inbound;
        if is_too_much { Verdict::TooManyPings } else { Verdict::Fine }
    }

    fn sent(&mut self, bytes: &[u8]) {
        let (open, has_sent) = (&mut self.open, &mut self.has_sent);
        self.outbound.scan(bytes, |frame| {
            let is_answer = frame.kind == DATA || frame.kind == HEADERS;
            *has_sent |= is_answer;
            if frame.kind == RST_STREAM || is_answer && frame.flags & FLAG_1 != 0 {
                open.remove(&frame.stream);
            }
        });
    }

    /// Takes note of a ping; true if it is one too many.
    fn ping(&mut self, now: Instant) -> bool {
        let last = self.last_ping.replace(now);
        if std::mem::take(&mut self.has_sent) {
            self.strikes = 0;
            return false;
        }
        let min_time = if self.open.is_empty() { IDLE_MIN_TIME } else { self.min_time };
        if last.is_some_and(|last| now.saturating_duration_since(last) < min_time) {
            self.strikes += 1;
        }
        self.strikes > STRIKES_MAX
    }

    /// The GOAWAY frame that names the reason.
    fn farewell(&self) -> Vec<u8> {
        let length = u32::try_from(8 + DEBUG_DATA.len()).expect("a short text");
        let mut frame = length.to_be_bytes()[1..].to_vec();
        frame.extend([GOAWAY, 0, 0, 0, 0, 0]);
        frame.extend(self.newest.to_be_bytes());
        frame.extend(ENHANCE_YOUR_CALM.to_be_bytes());
        frame.extend(DEBUG_DATA);
        frame
    }
}

/// Follows the frames of one direction, however they are cut.
#[derive(Default)]
struct Frames {
    header: [u8; FRAME_HEADER],
    header_len: usize,
    payload_left: usize,
}

struct FrameHeader {
    kind: u8,
    flags: u8,
    stream: u32,
}

impl Frames {
    fn scan(&mut self, mut bytes: &[u8], mut found: impl FnMut(FrameHeader)) {
        while !bytes.is_empty() {
            let skip = self.payload_left.min(bytes.len());
            self.payload_left -= skip;
            bytes = &bytes[skip..];
            let take = (FRAME_HEADER - self.header_len).min(bytes.len());
            self.header[self.header_len..self.header_len + take].copy_from_slice(&bytes[..take]);
            self.header_len += take;
            bytes = &bytes[take..];
            if self.header_len == FRAME_HEADER {
                let [a, b, c, kind, flags, d, e, f, g] = self.header;
                self.payload_left = u32::from_be_bytes([0, a, b, c]) as usize;
                self.header_len = 0;
                let stream = u32::from_be_bytes([d, e, f, g]) & (u32::MAX >> 1);
                found(FrameHeader { kind, flags, stream });
            }
        }
    }

    /// Bytes that the frame under way is known to lack; 0 between two frames.
    fn rest(&self) -> usize {
        match self.header_len {
            0 => self.payload_left,
            partial => FRAME_HEADER - partial,
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
        let mut bytes = u32::try_from(payload.len()).expect("short").to_be_bytes()[1..].to_vec();
        bytes.extend([kind, flags]);
        bytes.extend(stream.to_be_bytes());
        bytes.extend(payload);
        bytes
    }

    fn ping() -> Vec<u8> {
        frame(PING, 0, 0, &[7; 8])
    }

    fn judge() -> Judge {
        let mut judge = Judge::new(Duration::from_secs(5));
        assert_eq!(judge.received(PREFACE, Instant::now()), Verdict::Fine);
        judge
    }

    /// Pings at these seconds until one is too many.
    fn pings_at(judge: &mut Judge, start: Instant, seconds: &[u64]) -> Option<usize> {
        seconds.iter().position(|second| {
            judge.received(&ping(), start + Duration::from_secs(*second)) == Verdict::TooManyPings
        })
    }

    #[test]
    fn an_idle_client_may_hardly_ping() {
        assert_eq!(pings_at(&mut judge(), Instant::now(), &[0, 10, 20, 30, 40]), Some(3));
        let hours: Vec<u64> = (0..10).map(|hour| hour * 7201).collect();
        assert_eq!(pings_at(&mut judge(), Instant::now(), &hours), None);
    }

    #[test]
    fn a_client_with_calls_may_ping_at_the_interval() {
        let mut judge = judge();
        judge.received(&frame(HEADERS, 4, 1, b"call"), Instant::now());
        let regular: Vec<u64> = (0..100).map(|n| n * 5).collect();
        let start = Instant::now();
        assert_eq!(pings_at(&mut judge, start, &regular), None);
        let later = start + Duration::from_secs(495);
        assert_eq!(pings_at(&mut judge, later, &[1, 2, 3, 4]), Some(2));
    }

    #[test]
    fn pings_after_an_answer_are_forgiven_and_the_end_of_the_last_call_is_idle() {
        let mut judge = judge();
        let start = Instant::now();
        for stream in (1..40).step_by(2) {
            judge.received(&frame(HEADERS, 4, stream, b"call"), start);
            judge.sent(&frame(HEADERS, 4, stream, b"head"));
            judge.sent(&frame(DATA, 0, stream, b"answer"));
            judge.sent(&frame(HEADERS, 5, stream, b"end"));
            assert_eq!(judge.received(&ping(), start), Verdict::Fine);
        }
        assert!(judge.open.is_empty());
        // An acknowledgment is no ping, nor are ours.
        for _ in 0..10 {
            assert_eq!(judge.received(&frame(PING, FLAG_1, 0, &[0; 8]), start), Verdict::Fine);
            judge.sent(&frame(PING, 0, 0, &[0; 8]));
        }
        assert_eq!(pings_at(&mut judge, start, &[10, 20, 30]), Some(2));
    }

    #[test]
    fn reset_calls_are_over() {
        let mut judge = judge();
        judge.received(&frame(HEADERS, 4, 1, b"call"), Instant::now());
        judge.received(&frame(HEADERS, 4, 3, b"call"), Instant::now());
        judge.received(&frame(RST_STREAM, 0, 1, &[0; 4]), Instant::now());
        judge.sent(&frame(RST_STREAM, 0, 3, &[0; 4]));
        // Trailers of a call that is over open no new one.
        judge.received(&frame(HEADERS, 5, 3, b"late"), Instant::now());
        assert!(judge.open.is_empty());
    }

    #[test]
    fn frames_are_followed_however_they_are_cut() {
        let mut bytes = PREFACE.to_vec();
        bytes.extend(frame(4, 0, 0, &[0; 6]));
        bytes.extend(frame(HEADERS, 4, 1, &[PING; 300]));
        for _ in 0..4 {
            bytes.extend(frame(DATA, 0, 1, &[PING; 100]));
            bytes.extend(ping());
        }
        for size in 1..=40 {
            let mut judge = Judge::new(Duration::from_secs(5));
            let now = Instant::now();
            let verdicts: Vec<_> = bytes.chunks(size).map(|it| judge.received(it, now)).collect();
            let too_many = verdicts.iter().position(|it| *it == Verdict::TooManyPings);
            assert_eq!(too_many, Some((bytes.len() - 8 - 1) / size), "cut into {size}");
        }
    }

    #[test]
    fn other_protocols_are_let_alone() {
        let mut judge = Judge::new(Duration::from_secs(5));
        assert_eq!(judge.received(b"P", Instant::now()), Verdict::Fine);
        assert_eq!(judge.received(b"OST / HTTP/1.1", Instant::now()), Verdict::NotHttp2);
    }

    #[tokio::test]
    async fn the_farewell_waits_for_the_end_of_a_frame() {
        let (mut client, socket) = tokio::io::duplex(1 << 16);
        let mut guard = PingGuard::new(socket, Duration::from_secs(5));
        let answer = frame(DATA, 0, 1, &[1; 100]);
        guard.write_all(&answer[..40]).await.expect("write");
        client.write_all(PREFACE).await.expect("write");
        // What we send is no excuse here: the strikes come after it.
        for _ in 0..5 {
            client.write_all(&ping()).await.expect("write");
        }
        let mut buffer = [0; 1024];
        assert!(guard.read(&mut buffer).await.expect("read") > PREFACE.len());
        let more = [&answer[40..], &answer[..]].concat();
        let error = guard.write_all(&more).await.expect_err("the connection is over");
        assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
        assert_eq!(guard.read(&mut buffer).await.expect("end"), 0);
        drop(guard);
        let mut all = Vec::new();
        client.read_to_end(&mut all).await.expect("read");
        let (first, rest) = all.split_at(answer.len());
        assert_eq!(first, answer);
        let mut goaway = vec![0, 0, 8 + 14, GOAWAY, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 11];
        goaway.extend(b"too_many_pings");
        assert_eq!(rest, goaway);
    }
}
