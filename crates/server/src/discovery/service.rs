//! `--discovery-token` and `--discovery-endpoints`: members that do not know each other meet at a
//! running etcd. Under `/_etcd/registry/<token>/` an operator has put the size of the cluster; each
//! member registers its URLs there and waits until so many have; the first ones, in the order of
//! their registration, are the cluster. Keys and values are those of etcd's v3 discovery.

use std::time::Duration;

use http::uri::PathAndQuery;
use hyper_util::rt::TokioIo;
use kelson_api::etcdserverpb::kv_client::KvClient;
use kelson_api::etcdserverpb::watch_client::WatchClient;
use kelson_api::etcdserverpb::watch_request::RequestUnion;
use kelson_api::etcdserverpb::{PutRequest, RangeRequest, WatchCreateRequest, WatchRequest};
use kelson_api::mvccpb::KeyValue;
use kelson_raft::bootstrap_member_id;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::{Channel, Endpoint, Uri};
use tonic::{Code, Request, Status};

use super::{DiscoveryError, Members};
use crate::config::{Config, TlsSettings};
use crate::dial::Dial;

/// Root of all that discovery stores.
const ROOT: &str = "/_etcd/registry";

/// First and longest pause before a failed step is tried again.
const PAUSE_MIN: Duration = Duration::from_secs(1);
const PAUSE_MAX: Duration = Duration::from_secs(32);

/// Most registrations that are looked at; far more than a cluster has members.
const REGISTERED_MAX: i64 = 1000;

/// Registers this member and waits until the cluster is complete.
///
/// # Errors
/// The service does not know the token, the cluster is full, or a registration is unreadable. A
/// service that does not answer is asked again for ever, as in etcd.
///
/// # Cancel safety
/// A registration that was made stays.
pub async fn discover(config: &Config) -> Result<Members, DiscoveryError> {
    let session = Session::new(config)?;
    let size = session.patiently(|| session.size()).await?;
    let found = session.patiently(|| session.registered()).await?;
    let position = found.iter().position(|registered| registered.id == session.id);
    if position.unwrap_or(found.len()) >= size {
        return Err(DiscoveryError("discovery: cluster is full".to_owned()));
    }
    if position.is_none() {
        session.patiently(|| session.register()).await?;
    }
    tracing::info!(size, "registered at the discovery service; waiting for the other members");
    let found = session.patiently(|| session.complete(size)).await?;
    if !found.iter().take(size).any(|registered| registered.id == session.id) {
        return Err(DiscoveryError("discovery: cluster is full".to_owned()));
    }
    let texts: Vec<&str> = found.iter().take(size).map(|found| found.text.as_str()).collect();
    tracing::info!(members = texts.join(","), "discovered the members of the cluster");
    parse(&texts.join(","))
}

/// One member that wants to be part of the cluster.
struct Registered {
    id: String,
    /// `name=url,name=url`.
    text: String,
    at: i64,
}

/// `etcdserverpb.AuthenticateRequest`, which this program itself does not serve yet.
#[derive(Clone, PartialEq, prost::Message)]
struct Login {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(string, tag = "2")]
    password: String,
}

/// `etcdserverpb.AuthenticateResponse` without its header.
#[derive(Clone, PartialEq, prost::Message)]
struct LoggedIn {
    #[prost(string, tag = "2")]
    token: String,
}

/// Why a step did not succeed.
enum Failure {
    /// The service may answer another time.
    Again(String),
    Final(DiscoveryError),
}

impl From<Status> for Failure {
    fn from(status: Status) -> Self {
        let text = format!("{:?}: {}", status.code(), status.message());
        match status.code() {
            Code::InvalidArgument | Code::PermissionDenied | Code::Unauthenticated => {
                Self::Final(DiscoveryError(format!("discovery: {text}")))
            }
            _ => Self::Again(text),
        }
    }
}

struct Session<'a> {
    config: &'a Config,
    channel: Channel,
    /// This member's id and registration.
    id: String,
    text: String,
}

impl<'a> Session<'a> {
    fn new(config: &'a Config) -> Result<Self, DiscoveryError> {
        let failed = |error: &dyn std::fmt::Display| DiscoveryError(format!("discovery: {error}"));
        let urls: Vec<String> =
            config.initial_advertise_peer_urls.iter().map(ToString::to_string).collect();
        let id = format!("{:x}", bootstrap_member_id(&urls, &config.discovery_token));
        let texts: Vec<String> = urls.iter().map(|url| format!("{}={url}", config.name)).collect();
        let settings = TlsSettings {
            cert_file: config.discovery_cert.clone(),
            key_file: config.discovery_key.clone(),
            trusted_ca_file: config.discovery_cacert.clone(),
            // Without authorities of its own: nothing is verified.
            auto_tls: config.discovery_insecure_skip_tls_verify,
            ..TlsSettings::default()
        };
        let dial = Dial::new(config, &settings).map_err(|error| failed(&error))?;
        let channel = channel(config, &dial).map_err(|error| failed(&error))?;
        Ok(Self { config, channel, id, text: texts.join(",") })
    }

    /// Repeats a step until it succeeds or cannot.
    async fn patiently<T, F>(&self, step: impl Fn() -> F) -> Result<T, DiscoveryError>
    where
        F: Future<Output = Result<T, Failure>>,
    {
        let mut pause = PAUSE_MIN;
        loop {
            match step().await {
                Ok(value) => return Ok(value),
                Err(Failure::Final(error)) => return Err(error),
                Err(Failure::Again(text)) => {
                    tracing::warn!(error = text, "the discovery service fails; trying again");
                    tokio::time::sleep(pause).await;
                    pause = PAUSE_MAX.min(2 * pause);
                }
            }
        }
    }

    async fn request<T>(&self, message: T) -> Result<Request<T>, Failure> {
        let mut request = Request::new(message);
        request.set_timeout(self.config.discovery_request_timeout);
        if self.config.discovery_user.is_empty() {
            return Ok(request);
        }
        // etcd takes `user:password` in the user flag too.
        let (user, inline) = match self.config.discovery_user.split_once(':') {
            Some((user, password)) => (user, password),
            None => (self.config.discovery_user.as_str(), ""),
        };
        let given = self.config.discovery_password.as_str();
        let password = if given.is_empty() { inline } else { given };
        let login = Login { name: user.to_owned(), password: password.to_owned() };
        let token: Result<MetadataValue<Ascii>, _> = self.log_in(login).await?.parse();
        let unsuited =
            |_| Failure::Final(DiscoveryError("discovery: the auth token is no text".to_owned()));
        request.metadata_mut().insert("token", token.map_err(unsuited)?);
        Ok(request)
    }

    async fn log_in(&self, login: Login) -> Result<String, Failure> {
        let mut client = tonic::client::Grpc::new(self.channel.clone());
        let ready = client.ready().await;
        ready.map_err(|error| Failure::Again(error.to_string()))?;
        let path = PathAndQuery::from_static("/etcdserverpb.Auth/Authenticate");
        let codec = tonic_prost::ProstCodec::<Login, LoggedIn>::default();
        let answer = client.unary(Request::new(login), path, codec).await?;
        Ok(answer.into_inner().token)
    }

    fn key(&self, tail: &str) -> String {
        format!("{ROOT}/{}/{tail}", self.config.discovery_token)
    }

    async fn size(&self) -> Result<usize, Failure> {
        let refuse = |text: &str| Failure::Final(DiscoveryError(format!("discovery: {text}")));
        let range = RangeRequest { key: self.key("_config/size").into(), ..Default::default() };
        let request = self.request(range).await?;
        let answer = KvClient::new(self.channel.clone()).range(request).await?.into_inner();
        let stored = answer.kvs.first().ok_or_else(|| refuse("size key not found"))?;
        let size = std::str::from_utf8(&stored.value).ok().and_then(|text| text.parse().ok());
        size.filter(|size| *size > 0).ok_or_else(|| refuse("size key is bad"))
    }

    /// Who has registered, first come first, with the revision that this is true at.
    async fn registered_at(&self) -> Result<(Vec<Registered>, i64), Failure> {
        let prefix = self.key("members/");
        let range = RangeRequest {
            range_end: end_of_prefix(&prefix).into(),
            key: prefix.clone().into(),
            limit: REGISTERED_MAX,
            ..Default::default()
        };
        let request = self.request(range).await?;
        let answer = KvClient::new(self.channel.clone()).range(request).await?.into_inner();
        let revision = answer.header.map_or(0, |header| header.revision);
        let mut found = Vec::new();
        for kv in &answer.kvs {
            found.push(registration(&prefix, kv).map_err(Failure::Final)?);
        }
        found.sort_by_key(|registered| registered.at);
        Ok((found, revision))
    }

    async fn registered(&self) -> Result<Vec<Registered>, Failure> {
        Ok(self.registered_at().await?.0)
    }

    async fn register(&self) -> Result<(), Failure> {
        let put = PutRequest {
            key: self.key(&format!("members/{}", self.id)).into(),
            value: self.text.clone().into(),
            ..Default::default()
        };
        let request = self.request(put).await?;
        KvClient::new(self.channel.clone()).put(request).await?;
        Ok(())
    }

    /// Waits until `size` members are registered.
    async fn complete(&self, size: usize) -> Result<Vec<Registered>, Failure> {
        loop {
            let (found, revision) = self.registered_at().await?;
            if found.len() >= size {
                return Ok(found);
            }
            tracing::info!(found = found.len(), size, "waiting for members to register");
            self.change_after(revision).await?;
        }
    }

    /// Returns when a registration came after the revision.
    async fn change_after(&self, revision: i64) -> Result<(), Failure> {
        let prefix = self.key("members/");
        let create = WatchCreateRequest {
            range_end: end_of_prefix(&prefix).into(),
            key: prefix.into(),
            start_revision: revision + 1,
            ..Default::default()
        };
        let create = WatchRequest { request_union: Some(RequestUnion::CreateRequest(create)) };
        // Kept open: a stream whose client side ends may be ended by the server too.
        let requests = tokio_stream::StreamExt::chain(
            tokio_stream::once(create),
            tokio_stream::pending::<WatchRequest>(),
        );
        let mut request = self.request(requests).await?;
        // The wait for others has no end.
        request.metadata_mut().remove("grpc-timeout");
        let mut events = WatchClient::new(self.channel.clone()).watch(request).await?.into_inner();
        while let Some(message) = events.message().await? {
            if message.canceled {
                return Err(Failure::Again(message.cancel_reason));
            }
            if !message.events.is_empty() {
                return Ok(());
            }
        }
        Err(Failure::Again("the watch ended".to_owned()))
    }
}

/// A channel that tries the endpoints in turn.
fn channel(config: &Config, dial: &Dial) -> Result<Channel, tonic::transport::Error> {
    let endpoints: Vec<String> =
        config.discovery_endpoints.iter().map(with_scheme(config)).collect();
    let dial = dial.clone();
    let connector = tower::service_fn(move |_: Uri| {
        let (dial, endpoints) = (dial.clone(), endpoints.clone());
        async move {
            let mut failure = std::io::Error::other("no endpoint");
            for endpoint in &endpoints {
                match dial.open(endpoint).await {
                    Ok(stream) => return Ok(TokioIo::new(stream)),
                    Err(error) => failure = error,
                }
            }
            Err(failure)
        }
    });
    let endpoint = Endpoint::from_static("http://discovery")
        .connect_timeout(config.discovery_dial_timeout)
        .http2_keep_alive_interval(config.discovery_keepalive_time.max(Duration::from_secs(1)))
        .keep_alive_timeout(config.discovery_keepalive_timeout.max(Duration::from_secs(1)));
    Ok(endpoint.connect_with_connector_lazy(connector))
}

/// Endpoints may be written without a scheme; then `--discovery-insecure-transport` decides.
fn with_scheme(config: &Config) -> impl Fn(&String) -> String {
    let scheme = if config.discovery_insecure_transport { "http" } else { "https" };
    move |text| {
        if text.contains("://") { text.clone() } else { format!("{scheme}://{text}") }
    }
}

fn registration(prefix: &str, kv: &KeyValue) -> Result<Registered, DiscoveryError> {
    let bad = || DiscoveryError("discovery: a registration is not text".to_owned());
    let key = std::str::from_utf8(&kv.key).map_err(|_| bad())?;
    let text = std::str::from_utf8(&kv.value).map_err(|_| bad())?;
    let id = key.strip_prefix(prefix).ok_or_else(bad)?;
    Ok(Registered { id: id.to_owned(), text: text.to_owned(), at: kv.create_revision })
}

/// The first key behind all that begin with a prefix.
fn end_of_prefix(prefix: &str) -> Vec<u8> {
    let mut end = prefix.as_bytes().to_vec();
    // Prefixes here end in a slash, which can be raised by one.
    if let Some(last) = end.last_mut() {
        *last += 1;
    }
    end
}

fn parse(text: &str) -> Result<Members, DiscoveryError> {
    crate::config::parse_members(text).map_err(|error| {
        DiscoveryError(format!("discovery: the registrations make no cluster: {error}"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registrations_become_members() {
        let members = parse("a=http://h1:1,b=http://h2:1,a=http://h1:2").expect("a cluster");
        let urls = |list: &[&str]| list.iter().map(ToString::to_string).collect::<Vec<_>>();
        let expected = [
            ("a".to_owned(), urls(&["http://h1:1", "http://h1:2"])),
            ("b".to_owned(), urls(&["http://h2:1"])),
        ];
        assert_eq!(members, expected);
        assert!(parse("a=http://h1:1,b=http://h1:1").is_err(), "two members at one URL");
        let kv = |key: &'static str, value: &'static [u8]| KeyValue {
            key: key.into(),
            value: value.into(),
            create_revision: 9,
            ..Default::default()
        };
        let found = registration("/r/t/members/", &kv("/r/t/members/8e", b"a=http://h:1"));
        let found = found.expect("a registration");
        assert_eq!((found.id.as_str(), found.text.as_str(), found.at), ("8e", "a=http://h:1", 9));
        assert!(registration("/r/t/members/", &kv("/r/t/members/8e", b"\xff")).is_err());
        assert!(registration("/r/t/members/", &kv("/r/x", b"a=http://h:1")).is_err());
    }

    #[test]
    fn a_prefix_ends_before_its_neighbor() {
        assert_eq!(end_of_prefix("/a/"), b"/a0");
    }
}
