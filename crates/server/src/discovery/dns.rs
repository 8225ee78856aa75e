//! A small DNS client for what the system's resolver calls cannot ask: SRV and PTR records. Speaks
//! UDP and, for answers that are cut, TCP, to the servers of `/etc/resolv.conf`. It caches nothing
//! and follows no delegation: that is the work of the server it asks.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};

/// Time for one server to answer one query. Source: the default of resolv.conf.
const TIMEOUT: Duration = Duration::from_secs(5);

/// Rounds over all servers. Source: the default of resolv.conf.
const ATTEMPTS: usize = 2;

/// Name servers that are asked at most. Source: resolv.conf.
const SERVERS_MAX: usize = 3;

const PORT: u16 = 53;
const CLASS_IN: u16 = 1;
const TYPE_PTR: u16 = 12;
const TYPE_SRV: u16 = 33;

/// Longest text of a name.
const NAME_MAX: usize = 255;

/// A service at a host.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Srv {
    /// Lower is preferred.
    pub priority: u16,
    /// Share among equals.
    pub weight: u16,
    /// Port.
    pub port: u16,
    /// Host without the final dot.
    pub target: String,
}

/// Asks the system's name servers.
#[derive(Clone, Debug)]
pub struct Resolver {
    servers: Vec<SocketAddr>,
}

impl Resolver {
    /// The servers of `/etc/resolv.conf`; this machine if there are none.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn from_system() -> io::Result<Self> {
        Ok(Self::of(&std::fs::read_to_string("/etc/resolv.conf")?))
    }

    /// Asks this server only.
    #[must_use]
    pub fn with_server(server: SocketAddr) -> Self {
        Self { servers: vec![server] }
    }

    fn of(text: &str) -> Self {
        let mut servers: Vec<SocketAddr> = text
            .lines()
            .filter_map(|line| {
                let mut words = line.split_ascii_whitespace();
                let address = (words.next() == Some("nameserver")).then(|| words.next())??;
                Some(SocketAddr::new(address.parse().ok()?, PORT))
            })
            .take(SERVERS_MAX)
            .collect();
        if servers.is_empty() {
            servers.push(SocketAddr::new(Ipv4Addr::LOCALHOST.into(), PORT));
        }
        Self { servers }
    }

    /// All SRV records of `_service._tcp.domain`, preferred ones first.
    ///
    /// # Errors
    /// No server gave an answer, or there is no such name.
    pub async fn services(&self, service: &str, domain: &str) -> io::Result<Vec<Srv>> {
        let name = format!("_{service}._tcp.{}", domain.trim_end_matches('.'));
        let answer = self.ask(&name, TYPE_SRV).await?;
        let mut found: Vec<Srv> = answer.into_iter().filter_map(Record::srv).collect();
        found.sort();
        if found.is_empty() {
            return Err(io::Error::new(
                io::ErrorKind::NotFound,
                format!("no SRV record of {name}"),
            ));
        }
        Ok(found)
    }

    /// The host names of an address, without final dots.
    ///
    /// # Errors
    /// As [`Resolver::services`].
    pub async fn names_of(&self, address: IpAddr) -> io::Result<Vec<String>> {
        let answer = self.ask(&reverse_name(address), TYPE_PTR).await?;
        Ok(answer.into_iter().filter_map(Record::ptr).collect())
    }

    async fn ask(&self, name: &str, kind: u16) -> io::Result<Vec<Record>> {
        let mut last = io::Error::new(io::ErrorKind::NotFound, "no name server");
        for _ in 0..ATTEMPTS {
            for server in &self.servers {
                let asked = tokio::time::timeout(TIMEOUT, ask_one(*server, name, kind)).await;
                match asked.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())) {
                    Ok(records) => return Ok(records),
                    // A definite answer of one server is not asked of another.
                    Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(error),
                    Err(error) => last = error,
                }
            }
        }
        Err(io::Error::new(last.kind(), format!("lookup {name}: {last}")))
    }
}

async fn ask_one(server: SocketAddr, name: &str, kind: u16) -> io::Result<Vec<Record>> {
    let id = random_id();
    let query = encode(id, name, kind)?;
    let any: SocketAddr =
        if server.is_ipv4() { ([0, 0, 0, 0], 0).into() } else { ([0_u16; 8], 0).into() };
    let socket = UdpSocket::bind(any).await?;
    socket.connect(server).await?;
    socket.send(&query).await?;
    let mut buffer = vec![0; 65_535];
    loop {
        let len = socket.recv(&mut buffer).await?;
        match decode(&buffer[..len], id, name, kind) {
            Ok(Answer::Records(records)) => return Ok(records),
            Ok(Answer::Cut) => return ask_by_tcp(server, &query, id, name, kind).await,
            Ok(Answer::None(text)) => return Err(io::Error::new(io::ErrorKind::NotFound, text)),
            Ok(Answer::Failed(text)) => return Err(io::Error::other(text)),
            // Not an answer to this query; the right one may still come.
            Err(Malformed) => {}
        }
    }
}

async fn ask_by_tcp(
    server: SocketAddr,
    query: &[u8],
    id: u16,
    name: &str,
    kind: u16,
) -> io::Result<Vec<Record>> {
    let mut stream = TcpStream::connect(server).await?;
    let len = u16::try_from(query.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    stream.write_all(&[&len.to_be_bytes()[..], query].concat()).await?;
    let len = stream.read_u16().await?;
    let mut buffer = vec![0; usize::from(len)];
    stream.read_exact(&mut buffer).await?;
    match decode(&buffer, id, name, kind) {
        Ok(Answer::Records(records)) => Ok(records),
        Ok(Answer::None(text)) => Err(io::Error::new(io::ErrorKind::NotFound, text)),
        Ok(Answer::Failed(text)) => Err(io::Error::other(text)),
        Ok(Answer::Cut) | Err(Malformed) => Err(io::ErrorKind::InvalidData.into()),
    }
}

/// A number an outsider cannot guess, from the randomness that every hash map is seeded with.
fn random_id() -> u16 {
    use std::hash::{BuildHasher, Hasher};
    let hash = std::collections::hash_map::RandomState::new().build_hasher().finish();
    (hash & 0xffff) as u16
}

fn reverse_name(address: IpAddr) -> String {
    match address {
        IpAddr::V4(address) => {
            let [a, b, c, d] = address.octets();
            format!("{d}.{c}.{b}.{a}.in-addr.arpa")
        }
        IpAddr::V6(address) => {
            let octets = address.octets();
            let nibbles = octets.iter().rev().map(|o| format!("{:x}.{:x}.", o & 15, o >> 4));
            nibbles.collect::<String>() + "ip6.arpa"
        }
    }
}

/// One query that asks for recursion.
fn encode(id: u16, name: &str, kind: u16) -> io::Result<Vec<u8>> {
    let mut message = Vec::with_capacity(512);
    message.extend_from_slice(&id.to_be_bytes());
    message.extend_from_slice(&[1, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
    let bad_name = || io::Error::new(io::ErrorKind::InvalidInput, format!("bad name {name:?}"));
    if name.len() > NAME_MAX - 2 {
        return Err(bad_name());
    }
    for label in name.split('.') {
        if label.is_empty() || label.len() > 63 {
            return Err(bad_name());
        }
        message.push(label.len() as u8);
        message.extend_from_slice(label.as_bytes());
    }
    message.push(0);
    message.extend_from_slice(&kind.to_be_bytes());
    message.extend_from_slice(&CLASS_IN.to_be_bytes());
    Ok(message)
}

/// A record of the kind that was asked for, decoded as far as names go.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Record {
    Srv(Srv),
    Ptr(String),
}

impl Record {
    fn srv(self) -> Option<Srv> {
        if let Self::Srv(srv) = self { Some(srv) } else { None }
    }

    fn ptr(self) -> Option<String> {
        if let Self::Ptr(name) = self { Some(name) } else { None }
    }
}

#[derive(Debug, PartialEq)]
enum Answer {
    Records(Vec<Record>),
    /// Too long for UDP.
    Cut,
    /// There is no such name.
    None(String),
    /// The server could not find out.
    Failed(String),
}

/// The bytes are no answer to the query.
#[derive(Debug, PartialEq)]
struct Malformed;

fn decode(message: &[u8], id: u16, asked: &str, kind: u16) -> Result<Answer, Malformed> {
    let mut cursor = Cursor { message, at: 0 };
    let (got, flags) = (cursor.u16()?, cursor.u16()?);
    let (questions, answers) = (cursor.u16()?, cursor.u16()?);
    cursor.skip(4)?;
    if got != id || flags & 0x8000 == 0 || questions != 1 {
        return Err(Malformed);
    }
    let (name, of_kind) = (cursor.name()?, cursor.u16()?);
    cursor.skip(2)?;
    if !name.eq_ignore_ascii_case(asked) || of_kind != kind {
        return Err(Malformed);
    }
    match flags & 15 {
        0 => {}
        3 => return Ok(Answer::None(format!("no such host: {asked}"))),
        code => return Ok(Answer::Failed(format!("the name server answers with code {code}"))),
    }
    if flags & 0x0200 != 0 {
        return Ok(Answer::Cut);
    }
    let mut records = Vec::new();
    for _ in 0..answers {
        cursor.name()?;
        let (of_kind, class) = (cursor.u16()?, cursor.u16()?);
        cursor.skip(4)?;
        let len = usize::from(cursor.u16()?);
        let end = cursor.at.checked_add(len).filter(|end| *end <= message.len());
        let end = end.ok_or(Malformed)?;
        if class == CLASS_IN && of_kind == kind {
            records.push(cursor.record(kind)?);
        }
        cursor.at = end;
    }
    Ok(Answer::Records(records))
}

/// Reads a message from left to right; every step checks that there is something to read.
struct Cursor<'a> {
    message: &'a [u8],
    at: usize,
}

impl Cursor<'_> {
    fn skip(&mut self, bytes: usize) -> Result<(), Malformed> {
        self.at = self.at.checked_add(bytes).ok_or(Malformed)?;
        if self.at > self.message.len() { Err(Malformed) } else { Ok(()) }
    }

    fn u8(&mut self) -> Result<u8, Malformed> {
        let byte = *self.message.get(self.at).ok_or(Malformed)?;
        self.at += 1;
        Ok(byte)
    }

    fn u16(&mut self) -> Result<u16, Malformed> {
        Ok(u16::from_be_bytes([self.u8()?, self.u8()?]))
    }

    fn record(&mut self, kind: u16) -> Result<Record, Malformed> {
        if kind == TYPE_PTR {
            return Ok(Record::Ptr(self.name()?));
        }
        let (priority, weight, port) = (self.u16()?, self.u16()?, self.u16()?);
        Ok(Record::Srv(Srv { priority, weight, port, target: self.name()? }))
    }

    /// A name, which may end in a reference to an earlier one. References only ever go back, so a
    /// hostile message cannot make this run for ever.
    fn name(&mut self) -> Result<String, Malformed> {
        let mut name = String::new();
        let mut after = None;
        let mut earliest = self.at;
        loop {
            let len = self.u8()?;
            match len & 0xc0 {
                0 if len == 0 => break,
                0 => {
                    let end = self.at + usize::from(len);
                    let label = self.message.get(self.at..end).ok_or(Malformed)?;
                    let label = std::str::from_utf8(label).map_err(|_| Malformed)?;
                    if !name.is_empty() {
                        name.push('.');
                    }
                    name.push_str(label);
                    self.at = end;
                }
                0xc0 => {
                    let target = usize::from(len & 0x3f) << 8 | usize::from(self.u8()?);
                    after.get_or_insert(self.at);
                    if target >= earliest {
                        return Err(Malformed);
                    }
                    earliest = target;
                    self.at = target;
                }
                _ => return Err(Malformed),
            }
            if name.len() > NAME_MAX {
                return Err(Malformed);
            }
        }
        self.at = after.unwrap_or(self.at);
        Ok(name)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// An answer with these SRV records; targets refer to the question's domain where they can.
    fn answer(query: &[u8], flags: u16, records: &[(u16, u16, u16, &str)]) -> Vec<u8> {
        let mut message = query.to_vec();
        message[2..4].copy_from_slice(&(0x8180 | flags).to_be_bytes());
        message[6..8].copy_from_slice(&(records.len() as u16).to_be_bytes());
        for (priority, weight, port, target) in records {
            message.extend_from_slice(&[0xc0, 12, 0, 33, 0, 1, 0, 0, 0, 9]);
            let mut data = Vec::new();
            for number in [priority, weight, port] {
                data.extend_from_slice(&number.to_be_bytes());
            }
            for label in target.split('.') {
                data.push(label.len() as u8);
                data.extend_from_slice(label.as_bytes());
            }
            data.push(0);
            message.extend_from_slice(&(data.len() as u16).to_be_bytes());
            message.extend_from_slice(&data);
        }
        message
    }

    /// Records of a name: priority, weight, port, target.
    type Records = (&'static str, Vec<(u16, u16, u16, &'static str)>);

    /// A name server that knows SRV records by name and answers by UDP and TCP on one port.
    pub(crate) async fn serve(known: Vec<Records>, cuts_udp: bool) -> SocketAddr {
        let socket = UdpSocket::bind("127.0.0.1:0").await.expect("a socket");
        let address = socket.local_addr().expect("an address");
        let listener = tokio::net::TcpListener::bind(address).await.expect("the same port");
        let reply = move |query: &[u8]| {
            let name = Cursor { message: query, at: 12 }.name().expect("a name");
            match known.iter().find(|(of, _)| *of == name) {
                Some((_, records)) => answer(query, 0, records),
                None => answer(query, 3, &[]),
            }
        };
        let by_udp = reply.clone();
        tokio::spawn(async move {
            let mut buffer = [0; 512];
            while let Ok((len, from)) = socket.recv_from(&mut buffer).await {
                // An answer to somebody else's question must not be taken.
                let mut stray = by_udp(&buffer[..len]);
                stray[0] ^= 0xff;
                let _ = socket.send_to(&stray, from).await;
                let right = if cuts_udp {
                    answer(&buffer[..len], 0x200, &[])
                } else {
                    by_udp(&buffer[..len])
                };
                let _ = socket.send_to(&right, from).await;
            }
        });
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let len = stream.read_u16().await.expect("a length");
                let mut query = vec![0; usize::from(len)];
                stream.read_exact(&mut query).await.expect("a query");
                let message = reply(&query);
                let framed = [&(message.len() as u16).to_be_bytes()[..], &message].concat();
                stream.write_all(&framed).await.expect("written");
            }
        });
        address
    }

    #[tokio::test]
    async fn services_come_by_udp_and_by_tcp_when_cut() {
        for cuts_udp in [false, true] {
            let name = "_etcd-server._tcp.example.com";
            let records = vec![(1, 0, 2380, "b.example.com"), (0, 5, 2381, "a.example.com")];
            let resolver = Resolver::with_server(serve(vec![(name, records)], cuts_udp).await);
            let found = resolver.services("etcd-server", "example.com.").await.expect("found");
            let found: Vec<_> = found.iter().map(|srv| (srv.port, srv.target.as_str())).collect();
            assert_eq!(found, [(2381, "a.example.com"), (2380, "b.example.com")]);
            let error = resolver.services("other", "example.com").await.expect_err("unknown");
            assert!(cuts_udp || error.kind() == io::ErrorKind::NotFound, "{error}");
        }
    }

    #[test]
    fn damaged_answers_are_refused_and_never_followed_for_ever() {
        let query = encode(7, "_s._tcp.d", TYPE_SRV).expect("a query");
        let whole = answer(&query, 0, &[(1, 2, 3, "host.d"), (4, 5, 6, "other.d")]);
        assert!(decode(&whole, 7, "_s._tcp.d", TYPE_SRV).is_ok());
        assert_eq!(decode(&whole, 8, "_s._tcp.d", TYPE_SRV), Err(Malformed));
        assert_eq!(decode(&whole, 7, "_x._tcp.d", TYPE_SRV), Err(Malformed));
        for len in 0..whole.len() {
            assert_eq!(decode(&whole[..len], 7, "_s._tcp.d", TYPE_SRV), Err(Malformed), "{len}");
        }
        // Any byte may be wrong: what comes out may differ, but it comes.
        for at in 0..whole.len() {
            for value in [0, 1, 0x3f, 0xc0, 0xff] {
                let mut bad = whole.clone();
                bad[at] = value;
                let _any = decode(&bad, 7, "_s._tcp.d", TYPE_SRV);
            }
        }
        let mut turning = query.clone();
        turning[12..14].copy_from_slice(&[0xc0, 12]);
        assert_eq!(Cursor { message: &turning, at: 12 }.name(), Err(Malformed));
    }

    #[test]
    fn servers_come_from_the_systems_file() {
        let of = |text: &str| Resolver::of(text).servers;
        let found = of("# c\nsearch x\nnameserver 192.0.2.1\nnameserver ::1\nnameserver bad\n");
        assert_eq!(found, ["192.0.2.1:53".parse().expect("one"), "[::1]:53".parse().expect("two")]);
        assert_eq!(of(""), ["127.0.0.1:53".parse().expect("one")]);
    }

    #[test]
    fn addresses_turn_into_names() {
        let of = |text: &str| reverse_name(text.parse().expect("an address"));
        assert_eq!(of("192.0.2.7"), "7.2.0.192.in-addr.arpa");
        assert!(of("2001:db8::1").starts_with("1.0.0.0.") && of("::1").ends_with(".ip6.arpa"));
        assert!(of("2001:db8::1").ends_with("8.b.d.0.1.0.0.2.ip6.arpa"));
    }
}
