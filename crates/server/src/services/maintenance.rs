//! The Maintenance service: status, alarms, hashes, defragmentation, snapshots, leadership. Status
//! and the hashes speak of this member alone and need no quorum; alarms are agreed on.

use std::sync::Arc;

use kelson_api::Error;
use kelson_api::command::command::Op;
use kelson_api::etcdserverpb::maintenance_server::Maintenance;
use kelson_api::etcdserverpb::{
    AlarmMember, AlarmRequest, AlarmResponse, AlarmType, DefragmentRequest, DefragmentResponse,
    DowngradeInfo, DowngradeRequest, DowngradeResponse, HashKvRequest, HashKvResponse, HashRequest,
    HashResponse, MoveLeaderRequest, MoveLeaderResponse, SnapshotRequest, StatusRequest,
    StatusResponse,
};
use kelson_raft::Node;
use kelson_storage::{Reader, Reply};
use tonic::{Request, Response, Status};

use super::blocking::Blocking;
use super::gate::Gate;
use super::{downgrade, mismatched, snapshot};
use crate::app::App;
use crate::header::header;
use crate::limits::Limits;
use crate::metrics::Metrics;
use crate::version::{ETCD_CLUSTER_VERSION, ETCD_VERSION};

/// Serves what operators and their tools ask for.
pub(super) struct MaintenanceService {
    node: Node,
    reader: Reader,
    limits: Arc<Limits>,
    metrics: Arc<Metrics>,
    gate: Gate,
    blocking: Blocking,
    snapshots: snapshot::Places,
}

impl MaintenanceService {
    pub(super) fn new(app: &App) -> Self {
        Self {
            node: app.node.clone(),
            reader: app.reader.clone(),
            limits: Arc::clone(&app.limits),
            metrics: Arc::clone(&app.metrics),
            gate: Gate::new(app),
            blocking: Blocking::new(),
            snapshots: snapshot::Places::new(),
        }
    }

    /// Format version of the store: follows the cluster version.
    fn storage_version(&self) -> String {
        self.reader.cluster_version().unwrap_or_else(|| ETCD_CLUSTER_VERSION.to_owned())
    }
}

/// An alarm as the Status answer shows it; monitoring looks for parts of this text.
fn alarm_text(alarm: &AlarmMember) -> String {
    let mut text = String::new();
    if alarm.member_id != 0 {
        text.push_str(&format!("memberID:{} ", alarm.member_id));
    }
    match AlarmType::try_from(alarm.alarm) {
        Ok(AlarmType::None) => {}
        Ok(kind) => text.push_str(&format!("alarm:{} ", kind.as_str_name())),
        Err(_) => text.push_str(&format!("alarm:{} ", alarm.alarm)),
    }
    text
}

#[tonic::async_trait]
impl Maintenance for MaintenanceService {
    async fn alarm(
        &self,
        request: Request<AlarmRequest>,
    ) -> Result<Response<AlarmResponse>, Status> {
        let (caller, request) = self.gate.take(request)?;
        let outcome = caller.propose(Op::Alarm(request)).await?;
        match outcome.result? {
            Reply::Alarm(mut response) => {
                response.header = Some(header(&self.node, outcome.revision));
                Ok(Response::new(response))
            }
            other => Err(mismatched("Alarm", &other)),
        }
    }

    async fn status(
        &self,
        request: Request<StatusRequest>,
    ) -> Result<Response<StatusResponse>, Status> {
        let caller = self.gate.unary(request.metadata(), request.extensions(), true)?;
        caller.anybody().await?;
        let status = self.node.status();
        let sizes = self.reader.sizes();
        let mut errors = Vec::new();
        if status.leader.is_none() {
            errors.push(Error::NoLeader.text().to_owned());
        }
        errors.extend(self.reader.alarms().iter().map(alarm_text));
        Ok(Response::new(StatusResponse {
            header: Some(header(&self.node, self.reader.revision())),
            version: ETCD_VERSION.to_owned(),
            db_size: sizes.total,
            leader: status.leader.unwrap_or(0),
            raft_index: status.committed_index,
            raft_term: status.term,
            raft_applied_index: status.applied_index,
            errors,
            db_size_in_use: sizes.in_use,
            is_learner: status.is_learner,
            storage_version: self.storage_version(),
            db_size_quota: self.limits.quota_backend_bytes,
            downgrade_info: Some(DowngradeInfo::default()),
        }))
    }

    async fn defragment(
        &self,
        request: Request<DefragmentRequest>,
    ) -> Result<Response<DefragmentResponse>, Status> {
        let (caller, _) = self.gate.take(request)?;
        caller.admin().await?;
        let reader = self.reader.clone();
        self.metrics.disk_defrag_inflight.set(1);
        let timer = self.metrics.disk_backend_defrag_duration.start_timer();
        let result = self.blocking.run(move || reader.defragment()).await;
        timer.observe_duration();
        self.metrics.disk_defrag_inflight.set(0);
        result?.map_err(|error| {
            tracing::error!(%error, "defragmentation failed");
            Status::unknown(error.to_string())
        })?;
        Ok(Response::new(DefragmentResponse { header: None }))
    }

    async fn hash(&self, request: Request<HashRequest>) -> Result<Response<HashResponse>, Status> {
        let (caller, _) = self.gate.take(request)?;
        caller.admin().await?;
        let reader = self.reader.clone();
        let timer = self.metrics.mvcc_hash_duration.start_timer();
        let result = self.blocking.run(move || reader.hash()).await?;
        timer.observe_duration();
        let hash = result.map_err(|error| {
            tracing::error!(%error, "hashing the store failed");
            Status::unknown(error.to_string())
        })?;
        let header = Some(header(&self.node, self.reader.revision()));
        Ok(Response::new(HashResponse { header, hash }))
    }

    async fn hash_kv(
        &self,
        request: Request<HashKvRequest>,
    ) -> Result<Response<HashKvResponse>, Status> {
        let (caller, request) = self.gate.take(request)?;
        caller.admin().await?;
        let reader = self.reader.clone();
        let revision = request.revision;
        let timer = self.metrics.mvcc_hash_rev_duration.start_timer();
        let result = self.blocking.run(move || reader.hash_kv(revision)).await?;
        timer.observe_duration();
        let hashed = result?;
        Ok(Response::new(HashKvResponse {
            header: Some(header(&self.node, self.reader.revision())),
            hash: hashed.hash,
            compact_revision: hashed.compact_revision,
            hash_revision: hashed.hash_revision,
        }))
    }

    type SnapshotStream = snapshot::Pieces;

    async fn snapshot(
        &self,
        request: Request<SnapshotRequest>,
    ) -> Result<Response<Self::SnapshotStream>, Status> {
        let (caller, leader) =
            self.gate.stream(request.metadata(), request.extensions(), true).await?;
        caller.admin().await?;
        let version = self.storage_version();
        let reader = self.reader.clone();
        let pieces = snapshot::start(&self.snapshots, reader, &self.metrics, version, leader);
        Ok(Response::new(pieces.await))
    }

    async fn move_leader(
        &self,
        request: Request<MoveLeaderRequest>,
    ) -> Result<Response<MoveLeaderResponse>, Status> {
        let (caller, request) = self.gate.take(request)?;
        caller.admin().await?;
        if !self.node.status().is_leader {
            return Err(Error::NotLeader.into());
        }
        let target = request.target_id;
        let voter = self.reader.members().iter().any(|m| m.id == target && !m.is_learner);
        if !voter {
            return Err(Error::BadLeaderTransferee.into());
        }
        // Handing leadership to its holder is done already.
        if target != self.node.status().member_id {
            self.node.move_leader(target).await?;
        }
        Ok(Response::new(MoveLeaderResponse { header: None }))
    }

    async fn downgrade(
        &self,
        request: Request<DowngradeRequest>,
    ) -> Result<Response<DowngradeResponse>, Status> {
        let (caller, request) = self.gate.take(request)?;
        caller.admin().await?;
        let stored = self.reader.cluster_version();
        let version = downgrade::answer(request.action, &request.version, stored.as_deref())?;
        let header = Some(header(&self.node, self.reader.revision()));
        Ok(Response::new(DowngradeResponse { header, version }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn alarms_read_as_monitoring_expects() {
        let text = |member_id, alarm| alarm_text(&AlarmMember { member_id, alarm });
        assert_eq!(
            text(5_662_688_015_068_518_467, 1),
            "memberID:5662688015068518467 alarm:NOSPACE "
        );
        assert_eq!(text(7, 2), "memberID:7 alarm:CORRUPT ");
        assert_eq!(text(0, 1), "alarm:NOSPACE ");
        assert_eq!(text(7, 9), "memberID:7 alarm:9 ");
    }
}
