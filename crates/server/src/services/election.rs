//! The Election service: whoever has the oldest of the keys under a name leads, and the value of
//! that key is what it proclaims. It keeps no leader itself; `contest` has the rules.

use bytes::Bytes;
use kelson_api::Error;
use kelson_api::etcdserverpb::request_op::Request as Operation;
use kelson_api::etcdserverpb::{
    DeleteRangeRequest, PutRequest, ResponseHeader, TxnRequest, WatchCreateRequest,
};
use kelson_api::mvccpb::KeyValue;
use kelson_api::mvccpb::event::EventType;
use kelson_api::v3electionpb::election_server::Election;
use kelson_api::v3electionpb::{
    CampaignRequest, CampaignResponse, LeaderKey, LeaderRequest, LeaderResponse, ProclaimRequest,
    ProclaimResponse, ResignRequest, ResignResponse,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use super::contest::{self, Asker, Contender, Contests, Lost, created_at, op};
use super::gate::Gate;
use crate::app::App;

/// Leaders that may wait for one observer; the service goes on when there is room.
const OBSERVED_MAX: usize = 16;

/// Serves elections.
pub(super) struct ElectionService {
    gate: Gate,
    contests: Contests,
}

impl ElectionService {
    pub(super) fn new(app: &App, contests: Contests) -> Self {
        Self { gate: Gate::new(app), contests }
    }

    fn asker<T>(&self, request: &Request<T>) -> Result<Asker, Status> {
        // The services that are asked ask who calls.
        let _anybody = self.gate.unary(request.metadata(), request.extensions(), false)?;
        Ok(self.contests.asker(request))
    }
}

fn not_leader() -> Status {
    Status::unknown("election: not leader")
}

fn given(leader: Option<LeaderKey>) -> Result<LeaderKey, Status> {
    leader.ok_or_else(|| Status::unknown("\"leader\" field must be provided"))
}

/// Puts a new value under the leader's key, if it still is the leader's.
async fn proclaim(
    asker: &Asker,
    key: Bytes,
    revision: i64,
    lease: i64,
    value: Bytes,
) -> Result<Option<ResponseHeader>, Status> {
    let compare = vec![created_at(&key, revision)];
    let put = PutRequest { key, value, lease, ..Default::default() };
    let success = vec![op(Operation::RequestPut(put))];
    let answer = asker.txn(TxnRequest { compare, success, failure: Vec::new() }).await?;
    if answer.succeeded { Ok(answer.header) } else { Err(not_leader()) }
}

#[tonic::async_trait]
impl Election for ElectionService {
    type ObserveStream = ReceiverStream<Result<LeaderResponse, Status>>;

    async fn campaign(
        &self,
        request: Request<CampaignRequest>,
    ) -> Result<Response<CampaignResponse>, Status> {
        let asker = self.asker(&request)?;
        let CampaignRequest { name, lease, value } = request.into_inner();
        let lease = asker.lease(lease).await?;
        let entered = Contender::enter(asker.clone(), &name, lease, value.clone());
        let mut contender = entered.await?;
        let (key, rev) = (contender.key.clone(), contender.revision);
        if contender.found_value.as_ref().is_some_and(|found| *found != value) {
            proclaim(&asker, key.clone(), rev, contender.lease_id(), value).await?;
        }
        // A leader without a key would be one of two: unlike etcd's, this service tells it so.
        contender.turn().await.map_err(|lost| match lost {
            Lost::Expired => not_leader(),
            Lost::Failed(status) => status,
        })?;
        contender.won();
        let leader = LeaderKey { name, key, rev, lease: contender.lease_id() };
        let header = contender.header;
        Ok(Response::new(CampaignResponse { header, leader: Some(leader) }))
    }

    async fn proclaim(
        &self,
        request: Request<ProclaimRequest>,
    ) -> Result<Response<ProclaimResponse>, Status> {
        let asker = self.asker(&request)?;
        let ProclaimRequest { leader, value } = request.into_inner();
        let LeaderKey { key, rev, lease, .. } = given(leader)?;
        let lease = asker.lease(lease).await?.id;
        let header = proclaim(&asker, key, rev, lease, value).await?;
        Ok(Response::new(ProclaimResponse { header }))
    }

    async fn leader(
        &self,
        request: Request<LeaderRequest>,
    ) -> Result<Response<LeaderResponse>, Status> {
        let asker = self.asker(&request)?;
        let prefix = contest::prefix(&request.get_ref().name);
        let (header, kv) = asker.oldest(&prefix, 0).await?;
        if kv.is_none() {
            return Err(Status::unknown("election: no leader"));
        }
        Ok(Response::new(LeaderResponse { header, kv }))
    }

    async fn observe(
        &self,
        request: Request<LeaderRequest>,
    ) -> Result<Response<Self::ObserveStream>, Status> {
        let (metadata, extensions) = (request.metadata(), request.extensions());
        let (_anybody, mut leader) = self.gate.stream(metadata, extensions, false).await?;
        let asker = self.contests.asker(&request);
        let prefix = contest::prefix(&request.get_ref().name);
        let (seen, observed) = mpsc::channel(OBSERVED_MAX);
        tokio::spawn(async move {
            let status = tokio::select! {
                status = observe(&asker, &prefix, &seen) => status,
                error = leader.ended() => error.into(),
                () = seen.closed() => return,
            };
            // The client may be gone by now.
            let _unheard = seen.send(Err(status)).await;
        });
        Ok(Response::new(ReceiverStream::new(observed)))
    }

    async fn resign(
        &self,
        request: Request<ResignRequest>,
    ) -> Result<Response<ResignResponse>, Status> {
        let asker = self.asker(&request)?;
        let LeaderKey { key, rev, .. } = given(request.into_inner().leader)?;
        let compare = vec![created_at(&key, rev)];
        let delete = DeleteRangeRequest { key, ..Default::default() };
        let success = vec![op(Operation::RequestDeleteRange(delete))];
        let answer = asker.txn(TxnRequest { compare, success, failure: Vec::new() }).await?;
        Ok(Response::new(ResignResponse { header: answer.header }))
    }
}

/// What a client was told last, which is not repeated when a watch has to begin anew. Another key is
/// always news: its value may be older than the last one of the leader before it.
#[derive(Default)]
struct Told {
    key: Bytes,
    revision: i64,
}

type Seen = mpsc::Sender<Result<LeaderResponse, Status>>;

/// Tells of the leader and of every change of it, in order. Returns only why it cannot go on.
async fn observe(asker: &Asker, prefix: &Bytes, seen: &Seen) -> Status {
    let (mut told, mut at) = (Told::default(), 0);
    loop {
        match observe_one(asker, prefix, seen, &mut told, at).await {
            Ok(next) => at = next,
            // What was between is gone: on from the newest.
            Err(status) if at > 0 && status.message() == Error::Compacted.text() => at = 0,
            Err(status) => return status,
        }
    }
}

/// Tells of the one who led at a revision (with 0, at the newest) and its values until its key is
/// gone, and gives the revision to go on from; 0 if a compaction took away what came next.
async fn observe_one(
    asker: &Asker,
    prefix: &Bytes,
    seen: &Seen,
    told: &mut Told,
    at: i64,
) -> Result<i64, Status> {
    let (header, kv) = asker.oldest(prefix, at).await?;
    let header = header.map(|header| match at {
        0 => header,
        // The newest revision knows more than is told here.
        revision => ResponseHeader { revision, ..header },
    });
    let from = header.as_ref().map_or(0, |header| header.revision) + 1;
    let (header, kv) = match kv {
        Some(kv) => (header, kv),
        None => match first_put(asker, prefix, from).await? {
            Some(put) => put,
            None => return Ok(0),
        },
    };
    let from = header.as_ref().map_or(0, |header| header.revision) + 1;
    let key = kv.key.clone();
    tell(seen, header, kv, told).await?;
    let create = WatchCreateRequest { key, start_revision: from, ..Default::default() };
    let mut responses = asker.watch(vec![create]).await?;
    while let Some(response) = contest::next(&mut responses).await? {
        for event in response.events {
            let Some(kv) = event.kv else { continue };
            if event.r#type == EventType::Delete as i32 {
                return Ok(kv.mod_revision);
            }
            tell(seen, response.header, kv, told).await?;
        }
    }
    Ok(0)
}

/// The first key that is put under the prefix from a revision on, with a header of that revision;
/// `None` if the watch must begin anew.
async fn first_put(
    asker: &Asker,
    prefix: &Bytes,
    from: i64,
) -> Result<Option<(Option<ResponseHeader>, KeyValue)>, Status> {
    let create = WatchCreateRequest {
        key: prefix.clone(),
        range_end: contest::prefix_end(prefix),
        start_revision: from,
        ..Default::default()
    };
    let mut responses = asker.watch(vec![create]).await?;
    while let Some(response) = contest::next(&mut responses).await? {
        let is_put = |event: &kelson_api::mvccpb::Event| event.r#type == EventType::Put as i32;
        let put = response.events.into_iter().find(is_put).and_then(|event| event.kv);
        if let Some(kv) = put {
            let revision = kv.mod_revision;
            let header = response.header.map(|header| ResponseHeader { revision, ..header });
            return Ok(Some((header, kv)));
        }
    }
    Ok(None)
}

async fn tell(
    seen: &Seen,
    header: Option<ResponseHeader>,
    kv: KeyValue,
    told: &mut Told,
) -> Result<(), Status> {
    let new = Told { key: kv.key.clone(), revision: kv.mod_revision };
    if told.key == new.key && told.revision >= new.revision {
        return Ok(());
    }
    *told = new;
    let gone = |_| Status::cancelled("context canceled");
    seen.send(Ok(LeaderResponse { header, kv: Some(kv) })).await.map_err(gone)
}
