//! Runs script commands against one endpoint over raw gRPC and renders the answers. Watch and
//! keepalive streams stay open between commands under the names that the script gives them. `start
//! NAME COMMAND` runs any command beside the script: `waits NAME` sees that it has no answer yet,
//! `join NAME` shows the answer, `cancel NAME` takes the call back. Over 600 lines, because every
//! command and the way its answer is shown stand side by side.

mod auth;

use std::collections::BTreeMap;
use std::time::Duration;

use futures::future::BoxFuture;
use kelson_api::etcdserverpb as pb;
use kelson_api::health::{HealthCheckRequest, health_client::HealthClient};
use pb::auth_client::AuthClient;
use pb::cluster_client::ClusterClient;
use pb::kv_client::KvClient;
use pb::lease_client::LeaseClient;
use pb::maintenance_client::MaintenanceClient;
use pb::watch_client::WatchClient;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Channel;
use tonic::{Status, Streaming};

use self::auth::{Credentials, Door, role_command, switch, text, user_command};
use crate::parse::{self, Words};
use crate::{contest, format, json};

/// How long `recv` waits for each message it expects.
const RECV_TIMEOUT: Duration = Duration::from_secs(8);
/// How long a new stream may take to answer at all.
const HEADERS_TIMEOUT: Duration = Duration::from_secs(3);
/// How long any command may take as a whole.
const CALL_TIMEOUT: Duration = Duration::from_secs(20);
/// How long `quiet` listens.
const QUIET: Duration = Duration::from_millis(400);
/// How long a call may take to reach the server.
const STARTED: Duration = Duration::from_millis(200);
const MESSAGE_MAX: usize = i32::MAX as usize;

struct WatchStream {
    requests: Option<mpsc::Sender<pb::WatchRequest>>,
    responses: Streaming<pb::WatchResponse>,
}

/// One script's session.
pub struct Session {
    authority: String,
    channel: Channel,
    /// By the name of their user.
    tokens: BTreeMap<String, String>,
    credentials: Credentials,
    streams: BTreeMap<String, WatchStream>,
    started: BTreeMap<String, JoinHandle<Vec<String>>>,
    observers: BTreeMap<String, mpsc::Receiver<Vec<String>>>,
}

type Lines = Result<Vec<String>, Status>;

impl Session {
    /// Connects lazily; a restarted server is reached again on the next call.
    pub fn new(endpoint: &str) -> Session {
        let channel = Channel::from_shared(endpoint.to_string())
            .expect("the endpoint is a URL")
            .connect_lazy();
        let authority = endpoint.trim_start_matches("http://").to_string();
        Session {
            authority,
            channel,
            tokens: BTreeMap::new(),
            credentials: Credentials::default(),
            streams: BTreeMap::new(),
            started: BTreeMap::new(),
            observers: BTreeMap::new(),
        }
    }

    /// Connects to a member that was started again. Open streams are gone, tokens are kept.
    pub fn reconnect(&mut self, endpoint: &str) {
        let fresh = Session::new(endpoint);
        let tokens = std::mem::take(&mut self.tokens);
        let credentials = std::mem::take(&mut self.credentials);
        *self = Session { tokens, credentials, ..fresh };
    }

    fn door(&self) -> Door {
        InterceptedService::new(self.channel.clone(), self.credentials.clone())
    }

    /// Runs one command line and returns what came back; a call without an answer ends after 20 s.
    pub async fn run(&mut self, line: &str) -> Vec<String> {
        tokio::time::timeout(CALL_TIMEOUT, self.dispatch(line))
            .await
            .unwrap_or_else(|_| vec!["no answer in time".into()])
    }

    async fn dispatch(&mut self, line: &str) -> Vec<String> {
        if let Some(request) = line.strip_prefix("json ") {
            return json::command(&self.authority, request).await;
        }
        if let Some(rest) = line.strip_prefix("start ") {
            let (name, command) = rest.split_once(' ').expect("start NAME COMMAND");
            return self.start(name, command).await;
        }
        let mut words = Words::new(line);
        let name = words.string().expect("a command has a name");
        let lines = match name.as_str() {
            "waits" | "join" | "cancel" => self.started_command(&name, &mut words).await,
            "observe" | "seen" => self.observe_command(&name, &mut words).await,
            name if contest::COMMANDS.contains(&name) => {
                contest::run(&self.channel, name, &mut words).await
            }
            "w" => self.watch_command(&mut words).await,
            "recv" | "recvset" | "sum" | "quiet" | "close" => {
                self.stream_command(&name, &mut words).await
            }
            "grant" | "revoke" | "keepalive" | "ttl" | "leases" => {
                self.lease_command(&name, &mut words).await
            }
            "range" | "stream" | "put" | "fill" | "del" | "txn" | "compact" => {
                self.kv_command(&name, &mut words).await
            }
            "auth" | "user" | "role" | "login" | "as" => self.auth_command(&name, &mut words).await,
            _ => self.other_command(&name, &mut words).await,
        };
        lines.unwrap_or_else(|status| format::status(&status))
    }

    async fn start(&mut self, name: &str, command: &str) -> Vec<String> {
        let mut session = Session::new(&format!("http://{}", self.authority));
        session.channel = self.channel.clone();
        session.credentials = self.credentials.clone();
        let command = command.to_owned();
        self.started.insert(name.to_owned(), tokio::spawn(alone(session, command)));
        // It is on its way before the script goes on.
        tokio::time::sleep(STARTED).await;
        vec![]
    }

    async fn started_command(&mut self, name: &str, words: &mut Words) -> Lines {
        let call = words.string().expect("the call is named");
        let started = self.started.get_mut(&call).expect("the call was started");
        Ok(match name {
            "waits" => match tokio::time::timeout(QUIET, started).await {
                Err(_) => vec!["waits".into()],
                Ok(lines) => lines.expect("the call does not panic"),
            },
            "join" => match tokio::time::timeout(RECV_TIMEOUT, started).await {
                Err(_) => vec!["no answer".into()],
                Ok(lines) => lines.expect("the call does not panic"),
            },
            _ => {
                started.abort();
                // The server hears of it a moment later.
                tokio::time::sleep(STARTED).await;
                vec![]
            }
        })
    }

    async fn observe_command(&mut self, name: &str, words: &mut Words) -> Lines {
        let observer = words.string().expect("the observer is named");
        if name == "observe" {
            let (channel, election) = (self.channel.clone(), words.bytes());
            let (told, seen) = mpsc::channel(64);
            tokio::spawn(async move {
                // Headers come with the first leader.
                let mut stream = match contest::observe(&channel, election).await {
                    Ok(stream) => stream,
                    Err(status) => return drop(told.send(format::status(&status)).await),
                };
                while told.send(contest::seen(&mut stream).await).await.is_ok() {}
            });
            self.observers.insert(observer, seen);
            tokio::time::sleep(STARTED).await;
            return Ok(vec![]);
        }
        let seen = self.observers.get_mut(&observer).expect("the observer was opened");
        let wait = if words.is_empty() { RECV_TIMEOUT } else { QUIET };
        Ok(match tokio::time::timeout(wait, seen.recv()).await {
            Ok(lines) => lines.unwrap_or_default(),
            Err(_) => vec!["quiet".into()],
        })
    }

    fn kv(&self) -> KvClient<Door> {
        KvClient::new(self.door()).max_decoding_message_size(MESSAGE_MAX)
    }

    async fn kv_command(&mut self, name: &str, words: &mut Words) -> Lines {
        let mut kv = self.kv();
        Ok(match name {
            "range" => format::range(kv.range(parse::range(words)).await?.get_ref()),
            "stream" => {
                let mut chunks = kv.range_stream(parse::range(words)).await?.into_inner();
                let mut whole = pb::RangeResponse::default();
                let mut headers = 0;
                while let Some(chunk) = chunks.message().await? {
                    let part = chunk.range_response.unwrap_or_default();
                    whole.kvs.extend(part.kvs);
                    headers += usize::from(part.header.is_some());
                    (whole.header, whole.more, whole.count) = (part.header, part.more, part.count);
                }
                let mut lines = format::range(&whole);
                // Only the last message has one.
                if headers != 1 {
                    lines.push(format!("{headers} messages with a header"));
                }
                lines
            }
            "put" => format::put(kv.put(parse::put(words)).await?.get_ref()),
            "del" => format::delete(kv.delete_range(parse::delete(words)).await?.get_ref()),
            "txn" => format::txn(kv.txn(parse::txn(words)).await?.get_ref()),
            "fill" => {
                let (keys, prefix) = (words.number(), words.string().unwrap_or_default());
                // Few keys come in order; many in any order, for the sake of slow machines.
                let at_once = if keys > 100 { 100 } else { 1 };
                let puts = futures::stream::iter(0..keys).map(|i| {
                    let mut kv = kv.clone();
                    let key = format!("{prefix}{i:05}").into();
                    async move { kv.put(pb::PutRequest { key, ..Default::default() }).await }
                });
                let mut puts = futures::StreamExt::buffer_unordered(puts, at_once);
                while let Some(answer) = puts.next().await {
                    answer?;
                }
                vec![]
            }
            _ => {
                let revision = words.number();
                let physical = words.string().is_some_and(|word| word == "physical");
                let request = pb::CompactionRequest { revision, physical };
                vec![format::header(kv.compact(request).await?.get_ref().header.as_ref())]
            }
        })
    }

    async fn lease_command(&mut self, name: &str, words: &mut Words) -> Lines {
        let mut lease = LeaseClient::new(self.door());
        Ok(match name {
            "grant" => {
                let ttl = words.number();
                let asked = words
                    .string()
                    .map(|word| parse::option(&word).1.parse::<i64>().expect("id= takes a number"));
                let request = pb::LeaseGrantRequest { ttl, id: asked.unwrap_or(0) };
                let answer = lease.lease_grant(request).await?.into_inner();
                let id = match asked {
                    Some(_) => answer.id.to_string(),
                    None => format!("positive:{}", answer.id > 0),
                };
                vec![format!(
                    "{} id={id} ttl={} error={:?}",
                    format::header(answer.header.as_ref()),
                    answer.ttl,
                    answer.error
                )]
            }
            "revoke" => {
                let request = pb::LeaseRevokeRequest { id: words.number() };
                let answer = lease.lease_revoke(request).await?.into_inner();
                vec![format::header(answer.header.as_ref())]
            }
            "keepalive" => {
                let mut ids = Vec::new();
                while !words.is_empty() {
                    ids.push(pb::LeaseKeepAliveRequest { id: words.number() });
                }
                let expected = ids.len();
                // The request side stays open: etcd ends the stream early otherwise.
                let requests = tokio_stream::iter(ids).chain(tokio_stream::pending());
                let mut answers = lease.lease_keep_alive(requests).await?.into_inner();
                let mut lines = Vec::new();
                while lines.len() < expected {
                    let Some(answer) = answers.message().await? else { break };
                    let header = format::header(answer.header.as_ref());
                    lines.push(format!("{header} id={} ttl={}", answer.id, answer.ttl));
                }
                lines
            }
            "ttl" => {
                let id = words.number();
                let keys = words.string().is_some_and(|word| word == "keys");
                let request = pb::LeaseTimeToLiveRequest { id, keys };
                let mut answer = lease.lease_time_to_live(request).await?.into_inner();
                answer.keys.sort();
                // The remaining time depends on the moment: only its plausibility is shown.
                let left = match answer.ttl {
                    ttl if ttl < 0 => ttl.to_string(),
                    ttl => format!("within:{}", ttl <= answer.granted_ttl),
                };
                let keys: Vec<_> = answer.keys.iter().map(|key| format::text(key)).collect();
                vec![format!(
                    "{} id={} ttl={left} granted={} keys={keys:?}",
                    format::header(answer.header.as_ref()),
                    answer.id,
                    answer.granted_ttl
                )]
            }
            _ => {
                let answer = lease.lease_leases(pb::LeaseLeasesRequest {}).await?.into_inner();
                let ids: Vec<_> = answer.leases.iter().map(|lease| lease.id).collect();
                vec![format!("{} ids={ids:?}", format::header(answer.header.as_ref()))]
            }
        })
    }

    async fn watch_command(&mut self, words: &mut Words) -> Lines {
        use pb::watch_request::RequestUnion;
        let stream = words.string().expect("w STREAM create|cancel|progress|empty");
        let action = words.string().expect("w STREAM create|cancel|progress|empty");
        let request_union = match action.as_str() {
            "create" => Some(RequestUnion::CreateRequest(parse::watch_create(words))),
            "cancel" => {
                let request = pb::WatchCancelRequest { watch_id: words.number() };
                Some(RequestUnion::CancelRequest(request))
            }
            "progress" => Some(RequestUnion::ProgressRequest(pb::WatchProgressRequest {})),
            "empty" => None,
            other => panic!("w knows no action {other:?}"),
        };
        let request = pb::WatchRequest { request_union };
        if let Some(open) = self.streams.get(&stream) {
            let requests = open.requests.as_ref().expect("the stream was closed by the script");
            let sent = requests.send(request).await;
            return Ok(if sent.is_ok() { vec![] } else { vec!["the stream has ended".into()] });
        }
        // The first request goes ahead: etcd sends no headers before it has something to say.
        let (requests, outgoing) = mpsc::channel(64);
        requests.send(request).await.expect("the receiver is at hand");
        let mut client = WatchClient::new(self.door()).max_decoding_message_size(MESSAGE_MAX);
        let opening = client.watch(ReceiverStream::new(outgoing));
        let pending = tokio::time::timeout(HEADERS_TIMEOUT, opening).await;
        let Ok(opened) = pending else { return Ok(vec!["no headers".into()]) };
        let responses = opened?.into_inner();
        self.streams.insert(stream, WatchStream { requests: Some(requests), responses });
        Ok(vec![])
    }

    async fn stream_command(&mut self, name: &str, words: &mut Words) -> Lines {
        let stream_name = words.string().expect("the stream is named");
        let mut lines = Vec::new();
        let Some(stream) = self.streams.get_mut(&stream_name) else {
            return Ok(vec!["the stream never opened".into()]);
        };
        match name {
            "recv" | "recvset" => {
                let messages = if words.is_empty() { 1 } else { words.number() };
                let mut received = Vec::new();
                for _ in 0..messages {
                    let message = stream.responses.message();
                    received.push(match tokio::time::timeout(RECV_TIMEOUT, message).await {
                        Err(_) => vec!["nothing came".into()],
                        Ok(Ok(Some(response))) => format::watch(&response),
                        Ok(Ok(None)) => vec!["end of stream".into()],
                        Ok(Err(status)) => format::status(&status),
                    });
                }
                // Watchers of one stream are served in any order.
                if name == "recvset" {
                    received.sort();
                }
                lines.extend(received.into_iter().flatten());
            }
            "sum" => lines.push(sum(&mut stream.responses, words.number()).await?),
            "quiet" => match tokio::time::timeout(QUIET, stream.responses.message()).await {
                Err(_) => lines.push("quiet".into()),
                Ok(Ok(Some(response))) => lines.extend(format::watch(&response)),
                Ok(Ok(None)) => lines.push("end of stream".into()),
                Ok(Err(status)) => lines.extend(format::status(&status)),
            },
            _ => stream.requests = None,
        }
        Ok(lines)
    }

    async fn auth_command(&mut self, name: &str, words: &mut Words) -> Lines {
        let mut auth = AuthClient::new(self.door());
        match name {
            "auth" => switch(&mut auth, words).await,
            "user" => user_command(&mut auth, words).await,
            "role" => role_command(&mut auth, words).await,
            "login" => {
                let (name, password) = (text(words), text(words));
                let request = pb::AuthenticateRequest { name: name.clone(), password };
                let answer = auth.authenticate(request).await?.into_inner();
                let shape = answer.token.split_once('.').is_some_and(|(word, index)| {
                    word.len() == 16
                        && word.chars().all(|c| c.is_ascii_alphabetic())
                        && index.parse::<u64>().is_ok_and(|index| index > 0)
                });
                self.tokens.insert(name, answer.token);
                Ok(vec![format!("{} token={shape}", format::header(answer.header.as_ref()))])
            }
            _ => {
                let how = text(words);
                let token = |tokens: &BTreeMap<String, String>, name: &str| {
                    tokens.get(name).expect("login comes first").clone()
                };
                let (name, value) = match how.as_str() {
                    "nobody" => {
                        self.credentials = Credentials::default();
                        return Ok(vec![]);
                    }
                    "token" => ("token", text(words)),
                    "header" => ("authorization", text(words)),
                    "bearer" => {
                        let token = token(&self.tokens, &text(words));
                        ("authorization", format!("Bearer {token}"))
                    }
                    user => ("token", token(&self.tokens, user)),
                };
                let value = value.parse().expect("a token is ASCII");
                self.credentials = Credentials(Some((name, value)));
                Ok(vec![])
            }
        }
    }

    async fn other_command(&mut self, name: &str, words: &mut Words) -> Lines {
        let mut maintenance = MaintenanceClient::new(self.door());
        Ok(match name {
            "status" => {
                let answer = maintenance.status(pb::StatusRequest {}).await?.into_inner();
                let errors: Vec<_> = answer.errors.iter().map(|error| strip_ids(error)).collect();
                vec![format!(
                    "{} leader={} learner={} index={} applied={} quota={} size={} errors={errors:?} \
                     downgrade={:?}",
                    format::header(answer.header.as_ref()),
                    answer.leader != 0,
                    answer.is_learner,
                    answer.raft_index > 0,
                    answer.raft_applied_index > 0,
                    answer.db_size_quota,
                    answer.db_size >= answer.db_size_in_use,
                    answer.downgrade_info.map(|info| (info.enabled, info.target_version)),
                )]
            }
            "alarm" => alarm(&mut maintenance, words).await?,
            "hashkv" => {
                let revision = if words.is_empty() { 0 } else { words.number() };
                let answer =
                    maintenance.hash_kv(pb::HashKvRequest { revision }).await?.into_inner();
                vec![format!(
                    "{} hash={} compact={} at={}",
                    format::header(answer.header.as_ref()),
                    answer.hash,
                    answer.compact_revision,
                    answer.hash_revision
                )]
            }
            "hash" => {
                let answer = maintenance.hash(pb::HashRequest {}).await?.into_inner();
                vec![format!(
                    "{} nonzero={}",
                    format::header(answer.header.as_ref()),
                    answer.hash != 0
                )]
            }
            "defrag" => {
                let answer = maintenance.defragment(pb::DefragmentRequest {}).await?.into_inner();
                vec![format::header(answer.header.as_ref())]
            }
            "moveleader" => {
                let target_id = match words.string().as_deref() {
                    Some("self") => {
                        let status = maintenance.status(pb::StatusRequest {}).await?.into_inner();
                        status.header.map_or(0, |header| header.member_id)
                    }
                    id => id.and_then(|id| id.parse().ok()).expect("moveleader ID|self"),
                };
                let request = pb::MoveLeaderRequest { target_id };
                let answer = maintenance.move_leader(request).await?.into_inner();
                vec![format::header(answer.header.as_ref())]
            }
            "downgrade" => {
                let action = words.number() as i32;
                let version = words.string().unwrap_or_default();
                let request = pb::DowngradeRequest { action, version };
                let answer = maintenance.downgrade(request).await?.into_inner();
                vec![format::header(answer.header.as_ref())]
            }
            "snapshot" => snapshot(&mut maintenance).await?,
            "health" => {
                let service = words.string().unwrap_or_default();
                let mut health = HealthClient::new(self.door());
                let answer = health.check(HealthCheckRequest { service }).await?.into_inner();
                vec![format!("{:?}", answer.status())]
            }
            "members" => {
                let linearizable = words.is_empty();
                let request = pb::MemberListRequest { linearizable };
                let mut cluster = ClusterClient::new(self.door());
                let answer = cluster.member_list(request).await?.into_inner();
                let mut lines = vec![format::header(answer.header.as_ref())];
                lines.extend(format::members(&answer.members));
                lines
            }
            "memberadd" | "memberremove" | "memberpromote" | "memberupdate" => {
                member_change(&mut ClusterClient::new(self.door()), name, words).await?
            }
            "sleep" => {
                tokio::time::sleep(Duration::from_millis(words.number() as u64)).await;
                vec![]
            }
            "pings" => {
                let authority = self.authority.clone();
                let most = words.number().unsigned_abs();
                let told = crate::pings::idle_pings(&authority, most).await;
                vec![told.unwrap_or_else(|error| format!("the connection ended: {error}"))]
            }
            "unknown" => unknown(&self.channel, words).await?,
            other => panic!("no command is named {other:?}"),
        })
    }
}

/// Runs one command in a session of its own.
fn alone(mut session: Session, command: String) -> BoxFuture<'static, Vec<String>> {
    Box::pin(async move { session.run(&command).await })
}

/// Receives until `wanted` events have come, however they are packed: how many and from where to
/// where, with a note if they are not in order.
async fn sum(responses: &mut Streaming<pb::WatchResponse>, wanted: i64) -> Result<String, Status> {
    let (mut events, mut first, mut last, mut ordered, mut largest) = (0, 0, 0, true, 0);
    while events < wanted {
        let message = tokio::time::timeout(RECV_TIMEOUT, responses.message()).await;
        let Ok(Some(response)) = message.unwrap_or(Ok(None)) else { break };
        let mut revisions = std::collections::BTreeSet::new();
        for revision in response.events.iter().flat_map(|event| &event.kv).map(|kv| kv.mod_revision)
        {
            first = if events == 0 { revision } else { first };
            ordered &= revision >= last;
            last = revision;
            events += 1;
            revisions.insert(revision);
        }
        largest = largest.max(revisions.len());
    }
    let bounded = largest <= 1000;
    Ok(format!("events={events} from={first} to={last} ordered={ordered} bounded={bounded}"))
}

fn strip_ids(text: &str) -> String {
    let words = text.split_whitespace().map(|word| match word.split_once(':') {
        Some(("memberID", _)) => "memberID:ID",
        _ => word,
    });
    words.collect::<Vec<_>>().join(" ")
}

async fn alarm(client: &mut MaintenanceClient<Door>, words: &mut Words) -> Lines {
    let action = match words.string().as_deref() {
        Some("get") => 0,
        Some("activate") => 1,
        Some("deactivate") => 2,
        other => panic!("alarm get|activate|deactivate, not {other:?}"),
    };
    let mut request = pb::AlarmRequest { action, ..Default::default() };
    while let Some(word) = words.string() {
        let (name, value) = parse::option(&word);
        let number = || value.parse::<u64>().expect("the option takes a number");
        match name {
            "alarm" => request.alarm = number() as i32,
            "member" => request.member_id = number(),
            other => panic!("alarm knows no option {other:?}"),
        }
    }
    let mut answer = client.alarm(request).await?.into_inner();
    // etcd keeps alarms in a map: their order means nothing.
    answer.alarms.sort_by_key(|row| (row.member_id, row.alarm));
    let mut lines = vec![format::header(answer.header.as_ref())];
    lines.extend(
        answer
            .alarms
            .iter()
            .map(|row| format!("  member={} {}", row.member_id, row.alarm().as_str_name())),
    );
    Ok(lines)
}

async fn snapshot(client: &mut MaintenanceClient<Door>) -> Lines {
    let mut stream = client.snapshot(pb::SnapshotRequest {}).await?.into_inner();
    let (mut total, mut last, mut remaining, mut largest) = (0, 0, 0, 0);
    while let Some(part) = stream.message().await? {
        total += part.blob.len();
        last = part.blob.len();
        largest = largest.max(last);
        remaining = part.remaining_bytes;
        if let Some(header) = part.header {
            return Ok(vec![format!("unexpected {}", format::header(Some(&header)))]);
        }
    }
    Ok(vec![format!(
        "size%512={} chunks at most 32768: {} last={last} remaining={remaining}",
        total % 512,
        largest <= 32768
    )])
}

async fn member_change(client: &mut ClusterClient<Door>, name: &str, words: &mut Words) -> Lines {
    let header = match name {
        "memberadd" => {
            let mut request = pb::MemberAddRequest::default();
            while let Some(word) = words.string() {
                match word.as_str() {
                    "learner" => request.is_learner = true,
                    url => request.peer_ur_ls.push(url.into()),
                }
            }
            client.member_add(request).await?.into_inner().header
        }
        "memberremove" => {
            let request = pb::MemberRemoveRequest { id: words.number() as u64 };
            client.member_remove(request).await?.into_inner().header
        }
        "memberpromote" => {
            let request = pb::MemberPromoteRequest { id: words.number() as u64 };
            client.member_promote(request).await?.into_inner().header
        }
        _ => {
            let id = words.number() as u64;
            let peer_ur_ls = std::iter::from_fn(|| words.string()).collect();
            let request = pb::MemberUpdateRequest { id, peer_ur_ls };
            client.member_update(request).await?.into_inner().header
        }
    };
    Ok(vec![format::header(header.as_ref())])
}

/// `unknown /package.Service/Method`: a call that no server knows.
async fn unknown(channel: &Channel, words: &mut Words) -> Lines {
    let path = words.string().expect("unknown PATH");
    let mut grpc = tonic::client::Grpc::new(channel.clone());
    grpc.ready().await.map_err(|e| Status::unavailable(e.to_string()))?;
    let path = path.parse().map_err(|_| Status::internal("the path is malformed"))?;
    let request = tonic::Request::new(pb::StatusRequest {});
    let codec = tonic_prost::ProstCodec::<_, pb::StatusResponse>::default();
    grpc.unary(request, path, codec).await?;
    Ok(vec!["answered".into()])
}
