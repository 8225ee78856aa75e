//! The Cluster service: lists and changes members. Every answer carries revision 0 in its header,
//! as etcd's does. A member that would have to be reached over the network is refused before
//! anything is proposed: this program runs clusters of one member so far.

use std::sync::Arc;

use kelson_api::Error;
use kelson_api::command::MembersChange;
use kelson_api::command::command::Op;
use kelson_api::etcdserverpb::cluster_server::Cluster;
use kelson_api::etcdserverpb::{
    Member, MemberAddRequest, MemberAddResponse, MemberListRequest, MemberListResponse,
    MemberPromoteRequest, MemberPromoteResponse, MemberRemoveRequest, MemberRemoveResponse,
    MemberUpdateRequest, MemberUpdateResponse,
};
use kelson_raft::Node;
use kelson_storage::{Reader, Reply};
use tonic::{Request, Response, Status};

use super::gate::Gate;
use super::mismatched;
use crate::app::App;
use crate::header::header;
use crate::limits::Limits;
use crate::peer_urls;

/// Serves membership.
pub(super) struct ClusterService {
    node: Node,
    reader: Reader,
    limits: Arc<Limits>,
    gate: Gate,
}

impl ClusterService {
    pub(super) fn new(app: &App) -> Self {
        Self {
            node: app.node.clone(),
            reader: app.reader.clone(),
            limits: Arc::clone(&app.limits),
            gate: Gate::new(app),
        }
    }
}

/// Checks an addition as far as one member can.
fn check_add(members: &[Member], request: &MemberAddRequest, limits: &Limits) -> Result<(), Error> {
    let urls = peer_urls::parse(&request.peer_ur_ls)?;
    check_urls_free(members, None, &urls)?;
    let learners = members.iter().filter(|member| member.is_learner).count();
    if request.is_learner && learners >= limits.max_learners {
        return Err(Error::TooManyLearners);
    }
    Err(Error::NotCapable)
}

/// Checks a removal as far as one member can: the last voter stays.
fn check_remove(members: &[Member], id: u64, limits: &Limits) -> Result<(), Error> {
    if !members.iter().any(|member| member.id == id) {
        return Err(Error::MemberNotFound);
    }
    if limits.strict_reconfig_check {
        let left = members.iter().filter(|member| !member.is_learner && member.id != id);
        let started = left.clone().filter(|member| !member.name.is_empty()).count();
        if started < left.count() / 2 + 1 {
            return Err(Error::NotEnoughStartedMembers);
        }
    }
    Err(Error::NotCapable)
}

/// Checks new peer URLs of a member; returns its row with them.
fn check_update(members: &[Member], request: &MemberUpdateRequest) -> Result<Member, Error> {
    let member = members.iter().find(|member| member.id == request.id);
    let member = member.ok_or(Error::MemberNotFound)?;
    let urls = peer_urls::parse(&request.peer_ur_ls)?;
    check_urls_free(members, Some(member.id), &urls)?;
    Ok(Member { peer_ur_ls: request.peer_ur_ls.clone(), ..member.clone() })
}

/// Checks a promotion as far as one member can.
fn check_promote(members: &[Member], id: u64) -> Result<(), Error> {
    let member = members.iter().find(|member| member.id == id).ok_or(Error::MemberNotFound)?;
    Err(if member.is_learner { Error::NotCapable } else { Error::MemberNotLearner })
}

fn check_urls_free(members: &[Member], except: Option<u64>, urls: &[String]) -> Result<(), Error> {
    let others = members.iter().filter(|member| Some(member.id) != except);
    let taken = others.flat_map(|member| &member.peer_ur_ls).any(|url| urls.contains(url));
    if taken { Err(Error::PeerUrlExists) } else { Ok(()) }
}

#[tonic::async_trait]
impl Cluster for ClusterService {
    async fn member_add(
        &self,
        request: Request<MemberAddRequest>,
    ) -> Result<Response<MemberAddResponse>, Status> {
        self.gate.unary(request.metadata(), false)?;
        check_add(&self.reader.members(), request.get_ref(), &self.limits)?;
        Err(Error::NotCapable.into())
    }

    async fn member_remove(
        &self,
        request: Request<MemberRemoveRequest>,
    ) -> Result<Response<MemberRemoveResponse>, Status> {
        self.gate.unary(request.metadata(), false)?;
        check_remove(&self.reader.members(), request.get_ref().id, &self.limits)?;
        Err(Error::NotCapable.into())
    }

    async fn member_update(
        &self,
        request: Request<MemberUpdateRequest>,
    ) -> Result<Response<MemberUpdateResponse>, Status> {
        self.gate.unary(request.metadata(), false)?;
        let member = check_update(&self.reader.members(), request.get_ref())?;
        let change = MembersChange { put: vec![member], remove: Vec::new() };
        let outcome = self.node.propose(Op::MembersChange(change)).await?;
        match outcome.result? {
            Reply::Members(members) => {
                let header = Some(header(&self.node, 0));
                Ok(Response::new(MemberUpdateResponse { header, members }))
            }
            other => Err(mismatched("MemberUpdate", &other)),
        }
    }

    async fn member_list(
        &self,
        request: Request<MemberListRequest>,
    ) -> Result<Response<MemberListResponse>, Status> {
        self.gate.unary(request.metadata(), false)?;
        if request.get_ref().linearizable {
            self.node.read_barrier().await?;
        }
        let mut members = self.reader.members();
        members.sort_unstable_by_key(|member| member.id);
        let header = Some(header(&self.node, 0));
        Ok(Response::new(MemberListResponse { header, members }))
    }

    async fn member_promote(
        &self,
        request: Request<MemberPromoteRequest>,
    ) -> Result<Response<MemberPromoteResponse>, Status> {
        self.gate.unary(request.metadata(), false)?;
        check_promote(&self.reader.members(), request.get_ref().id)?;
        Err(Error::NotCapable.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(id: u64, name: &str, url: &str, is_learner: bool) -> Member {
        Member {
            id,
            name: name.to_owned(),
            peer_ur_ls: vec![url.to_owned()],
            client_ur_ls: vec!["http://127.0.0.1:2379".to_owned()],
            is_learner,
        }
    }

    fn alone() -> Vec<Member> {
        vec![member(1, "a", "http://127.0.0.1:2380", false)]
    }

    fn add(urls: &[&str], is_learner: bool) -> MemberAddRequest {
        let peer_ur_ls = urls.iter().map(|url| (*url).to_owned()).collect();
        MemberAddRequest { peer_ur_ls, is_learner }
    }

    #[test]
    fn an_addition_is_checked_in_order() {
        let limits = Limits::default();
        let check = |request| check_add(&alone(), &request, &limits);
        assert_eq!(check(add(&[], false)), Err(Error::MemberBadUrls));
        assert_eq!(check(add(&["127.0.0.1:2380"], false)), Err(Error::MemberBadUrls));
        assert_eq!(check(add(&["http://127.0.0.1:2380"], true)), Err(Error::PeerUrlExists));
        assert_eq!(check(add(&["http://127.0.0.1:9"], false)), Err(Error::NotCapable));
        let mut members = alone();
        members.push(member(2, "", "http://127.0.0.1:2382", true));
        let second = add(&["http://127.0.0.1:9"], true);
        assert_eq!(check_add(&members, &second, &limits), Err(Error::TooManyLearners));
    }

    #[test]
    fn the_last_voter_stays() {
        let limits = Limits::default();
        assert_eq!(check_remove(&alone(), 9, &limits), Err(Error::MemberNotFound));
        assert_eq!(check_remove(&alone(), 1, &limits), Err(Error::NotEnoughStartedMembers));
    }

    #[test]
    fn an_update_changes_peer_urls_only() {
        let update = |id, urls: &[&str]| MemberUpdateRequest {
            id,
            peer_ur_ls: urls.iter().map(|url| (*url).to_owned()).collect(),
        };
        let mut members = alone();
        members.push(member(2, "b", "http://127.0.0.1:2382", false));
        let refused = |request| check_update(&members, &request).expect_err("refused");
        assert_eq!(refused(update(9, &["http://127.0.0.1:9"])), Error::MemberNotFound);
        assert_eq!(refused(update(1, &[])), Error::MemberBadUrls);
        assert_eq!(refused(update(1, &["http://127.0.0.1:2382"])), Error::PeerUrlExists);
        let same = check_update(&members, &update(1, &["http://127.0.0.1:2380"]));
        assert_eq!(same, Ok(members[0].clone()));
        let moved = check_update(&members, &update(1, &["http://127.0.0.1:9"])).expect("valid");
        assert_eq!(moved.peer_ur_ls, ["http://127.0.0.1:9"]);
        assert_eq!(moved.client_ur_ls, members[0].client_ur_ls);
        assert_eq!((moved.name.as_str(), moved.is_learner), ("a", false));
    }

    #[test]
    fn only_learners_are_promoted() {
        assert_eq!(check_promote(&alone(), 9), Err(Error::MemberNotFound));
        assert_eq!(check_promote(&alone(), 1), Err(Error::MemberNotLearner));
    }
}
