//! The Cluster service: lists and changes members. Every answer carries revision 0 in its header,
//! as etcd's does. What can be known here is checked here, in etcd's order: URLs, and with
//! `--strict-reconfig-check` that the change cannot cost the quorum. Ids, names taken and whether a
//! learner has caught up are decided where the change is carried out.

use std::sync::Arc;
use std::time::{Duration, Instant};

use kelson_api::Error;
use kelson_api::etcdserverpb::cluster_server::Cluster;
use kelson_api::etcdserverpb::{
    Member, MemberAddRequest, MemberAddResponse, MemberListRequest, MemberListResponse,
    MemberPromoteRequest, MemberPromoteResponse, MemberRemoveRequest, MemberRemoveResponse,
    MemberUpdateRequest, MemberUpdateResponse,
};
use kelson_raft::{MemberChange, Node};
use kelson_storage::Reader;
use tonic::{Request, Response, Status};

use super::gate::Gate;
use crate::app::App;
use crate::header::header;
use crate::housekeeping::probe::{self, Probes};
use crate::limits::Limits;
use crate::metrics::Metrics;
use crate::peer_urls;

/// How long a member must have been connected to count for a change. Source: etcd's
/// `HealthInterval`, less what a probe may see it late: etcd knows of a connection when it is made.
const STEADY: Duration = Duration::from_secs(5).saturating_sub(probe::RETRY);

/// Serves membership.
pub(super) struct ClusterService {
    node: Node,
    reader: Reader,
    limits: Arc<Limits>,
    metrics: Arc<Metrics>,
    probes: Arc<Probes>,
    gate: Gate,
}

impl ClusterService {
    pub(super) fn new(app: &App) -> Self {
        Self {
            node: app.node.clone(),
            reader: app.reader.clone(),
            limits: Arc::clone(&app.limits),
            metrics: Arc::clone(&app.metrics),
            probes: Arc::clone(&app.probes),
            gate: Gate::new(app),
        }
    }

    /// The members and how they are connected to this one.
    fn view(&self) -> View {
        let own = self.node.status().member_id;
        let now = Instant::now();
        let active_since = |id| self.probes.active_since(id);
        let connection = |member: &Member| match active_since(member.id) {
            _ if member.id == own => Connection::Steady,
            // One that runs may not have been reached yet; one that never ran is down for sure.
            None if is_started(member) && self.probes.is_unknown(member.id, now) => {
                Connection::Fresh
            }
            None => Connection::Down,
            Some(since) if now.duration_since(since) >= STEADY => Connection::Steady,
            Some(_) => Connection::Fresh,
        };
        let members = self.reader.members();
        let connections = members.iter().map(connection).collect();
        View { own, members, connections, is_strict: self.limits.strict_reconfig_check }
    }

    /// The members after a change, by ascending id.
    fn members(&self) -> Vec<Member> {
        let mut members = self.reader.members();
        members.sort_unstable_by_key(|member| member.id);
        members
    }
}

/// How a member is connected to this one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Connection {
    Down,
    /// For less than [`STEADY`], or not known yet.
    Fresh,
    Steady,
}

/// What the checks look at.
struct View {
    own: u64,
    members: Vec<Member>,
    /// One per member.
    connections: Vec<Connection>,
    is_strict: bool,
}

fn quorum(voters: usize) -> usize {
    voters / 2 + 1
}

fn is_started(member: &Member) -> bool {
    !member.name.is_empty()
}

impl View {
    fn find(&self, id: u64) -> Result<(&Member, Connection), Error> {
        let mut known = self.members.iter().zip(&self.connections);
        let found = known.find(|(member, _)| member.id == id).ok_or(Error::MemberNotFound)?;
        Ok((found.0, *found.1))
    }

    fn voters(&self) -> impl Iterator<Item = (&Member, Connection)> {
        let all = self.members.iter().zip(self.connections.iter().copied());
        all.filter(|(member, _)| !member.is_learner)
    }

    fn steady_voters(&self) -> usize {
        self.voters().filter(|(_, connection)| *connection == Connection::Steady).count()
    }

    fn started_voters(&self) -> usize {
        self.voters().filter(|(member, _)| is_started(member)).count()
    }

    fn check_add(&self, request: &MemberAddRequest, max_learners: usize) -> Result<(), Error> {
        let urls = peer_urls::parse(&request.peer_ur_ls)?;
        if self.is_strict {
            let (voters, started) = (self.voters().count(), self.started_voters());
            let is_covered = request.is_learner || started >= quorum(voters + 1);
            // The second member of a cluster is always let in: there is no other way to grow.
            if !(is_covered || started == 1 && voters == 1) {
                return Err(Error::NotEnoughStartedMembers);
            }
            // Asked of learners too, as in etcd: they are meant to be promoted.
            if voters > 1 && self.steady_voters() < quorum(voters + 1) {
                return Err(Error::UnhealthyCluster);
            }
        }
        self.check_urls_free(None, &urls)?;
        let learners = self.members.iter().filter(|member| member.is_learner).count();
        if request.is_learner && learners >= max_learners {
            return Err(Error::TooManyLearners);
        }
        Ok(())
    }

    fn check_remove(&self, id: u64) -> Result<(), Error> {
        let (member, connection) = self.find(id)?;
        if !self.is_strict || member.is_learner {
            return Ok(());
        }
        let left = self.voters().filter(|(member, _)| member.id != id);
        let started = left.filter(|(member, _)| is_started(member)).count();
        let voters = self.voters().count();
        if started < quorum(voters - 1) {
            return Err(Error::NotEnoughStartedMembers);
        }
        // A member that is down takes no part in the quorum, so its removal costs nothing.
        if id != self.own && connection == Connection::Down {
            return Ok(());
        }
        if self.steady_voters().saturating_sub(1) < 1 + (voters - 1) / 2 {
            return Err(Error::UnhealthyCluster);
        }
        Ok(())
    }

    /// Checks new peer URLs of a member.
    fn check_update(&self, request: &MemberUpdateRequest) -> Result<(), Error> {
        let (member, _) = self.find(request.id)?;
        let urls = peer_urls::parse(&request.peer_ur_ls)?;
        self.check_urls_free(Some(member.id), &urls)
    }

    fn check_promote(&self, id: u64) -> Result<(), Error> {
        let (member, _) = self.find(id)?;
        if !member.is_learner {
            return Err(Error::MemberNotLearner);
        }
        // The learner itself counts as started: it has caught up, or it is refused later.
        if self.is_strict && self.started_voters() + 1 < quorum(self.voters().count() + 1) {
            return Err(Error::NotEnoughStartedMembers);
        }
        Ok(())
    }

    fn check_urls_free(&self, except: Option<u64>, urls: &[String]) -> Result<(), Error> {
        let others = self.members.iter().filter(|member| Some(member.id) != except);
        let taken = others.flat_map(|member| &member.peer_ur_ls).any(|url| urls.contains(url));
        if taken { Err(Error::PeerUrlExists) } else { Ok(()) }
    }
}

#[tonic::async_trait]
impl Cluster for ClusterService {
    async fn member_add(
        &self,
        request: Request<MemberAddRequest>,
    ) -> Result<Response<MemberAddResponse>, Status> {
        let (caller, request) = self.gate.take(request)?;
        // As in etcd, what is wrong with URLs is said to anybody.
        peer_urls::parse(&request.peer_ur_ls)?;
        caller.admin().await?;
        self.view().check_add(&request, self.limits.max_learners)?;
        let peer_urls = peer_urls::parse(&request.peer_ur_ls)?;
        let change = MemberChange::Add { peer_urls, is_learner: request.is_learner };
        let id = self.node.change_members(change).await?;
        let members = self.members();
        let member = members.iter().find(|member| member.id == id).cloned();
        let header = Some(header(&self.node, 0));
        Ok(Response::new(MemberAddResponse { header, member, members }))
    }

    async fn member_remove(
        &self,
        request: Request<MemberRemoveRequest>,
    ) -> Result<Response<MemberRemoveResponse>, Status> {
        let (caller, request) = self.gate.take(request)?;
        caller.admin().await?;
        let id = request.id;
        self.view().check_remove(id)?;
        self.node.change_members(MemberChange::Remove(id)).await?;
        let header = Some(header(&self.node, 0));
        Ok(Response::new(MemberRemoveResponse { header, members: self.members() }))
    }

    async fn member_update(
        &self,
        request: Request<MemberUpdateRequest>,
    ) -> Result<Response<MemberUpdateResponse>, Status> {
        let (caller, request) = self.gate.take(request)?;
        caller.admin().await?;
        self.view().check_update(&request)?;
        let change = MemberChange::Update { id: request.id, peer_urls: request.peer_ur_ls };
        self.node.change_members(change).await?;
        let header = Some(header(&self.node, 0));
        Ok(Response::new(MemberUpdateResponse { header, members: self.members() }))
    }

    async fn member_list(
        &self,
        request: Request<MemberListRequest>,
    ) -> Result<Response<MemberListResponse>, Status> {
        let (caller, request) = self.gate.take(request)?;
        if request.linearizable {
            self.node.read_barrier().await?;
        }
        caller.anybody().await?;
        let header = Some(header(&self.node, 0));
        Ok(Response::new(MemberListResponse { header, members: self.members() }))
    }

    async fn member_promote(
        &self,
        request: Request<MemberPromoteRequest>,
    ) -> Result<Response<MemberPromoteResponse>, Status> {
        let (caller, request) = self.gate.take(request)?;
        caller.admin().await?;
        let id = request.id;
        let promoting = async {
            self.view().check_promote(id)?;
            self.node.change_members(MemberChange::Promote(id)).await
        };
        if let Err(error) = promoting.await {
            let failures = &self.metrics.peers.promote_failures;
            failures.with_label_values(&[error.text()]).inc();
            return Err(error.into());
        }
        self.metrics.peers.promote_successes.inc();
        let header = Some(header(&self.node, 0));
        Ok(Response::new(MemberPromoteResponse { header, members: self.members() }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Connection::{Down, Fresh, Steady};

    fn member(id: u64, name: &str, is_learner: bool) -> Member {
        Member {
            id,
            name: name.to_owned(),
            peer_ur_ls: vec![format!("http://127.0.0.1:{}", 2380 + id)],
            client_ur_ls: vec!["http://127.0.0.1:2379".to_owned()],
            is_learner,
        }
    }

    /// Started voters 1.. as connected; this one is 1.
    fn voters(connections: &[Connection]) -> View {
        let members = (1..).zip(connections).map(|(id, _)| member(id, "m", false)).collect();
        View { own: 1, members, connections: connections.to_vec(), is_strict: true }
    }

    fn with(mut view: View, member: Member, connection: Connection) -> View {
        view.members.push(member);
        view.connections.push(connection);
        view
    }

    fn add(url: &str, is_learner: bool) -> MemberAddRequest {
        let peer_ur_ls = if url.is_empty() { Vec::new() } else { vec![url.to_owned()] };
        MemberAddRequest { peer_ur_ls, is_learner }
    }

    const FREE: &str = "http://127.0.0.1:9";

    #[test]
    fn an_addition_is_checked_in_order() {
        let alone = voters(&[Steady]);
        let check = |view: &View, url, is_learner| view.check_add(&add(url, is_learner), 1);
        assert_eq!(check(&alone, "", false), Err(Error::MemberBadUrls));
        assert_eq!(check(&alone, "127.0.0.1:2380", false), Err(Error::MemberBadUrls));
        assert_eq!(check(&alone, "http://127.0.0.1:2381", true), Err(Error::PeerUrlExists));
        assert_eq!(check(&alone, FREE, false), Ok(()));
        let learning = with(voters(&[Steady]), member(2, "", true), Down);
        assert_eq!(check(&learning, FREE, true), Err(Error::TooManyLearners));
        assert_eq!(check(&learning, FREE, false), Ok(()));
        // Whether the cluster can bear it goes before whether the URL is free.
        let waiting = with(voters(&[Steady]), member(2, "", false), Down);
        let taken = "http://127.0.0.1:2381";
        assert_eq!(check(&waiting, taken, false), Err(Error::NotEnoughStartedMembers));
        assert_eq!(check(&waiting, taken, true), Err(Error::UnhealthyCluster));
    }

    #[test]
    fn a_voter_is_added_only_where_a_quorum_is_steady() {
        let check =
            |connections: &[Connection]| voters(connections).check_add(&add(FREE, false), 1);
        assert_eq!(check(&[Steady, Steady]), Ok(()));
        assert_eq!(check(&[Steady, Fresh]), Err(Error::UnhealthyCluster));
        assert_eq!(check(&[Steady, Steady, Steady]), Ok(()));
        assert_eq!(check(&[Steady, Steady, Down]), Err(Error::UnhealthyCluster));
        assert_eq!(check(&[Steady, Steady, Steady, Down]), Ok(()));
        let mut lax = voters(&[Steady, Down, Down]);
        lax.is_strict = false;
        assert_eq!(lax.check_add(&add(FREE, false), 1), Ok(()));
        let learner =
            |connections: &[Connection]| voters(connections).check_add(&add(FREE, true), 1);
        assert_eq!(learner(&[Steady, Steady, Steady]), Ok(()));
        assert_eq!(learner(&[Steady, Steady, Down]), Err(Error::UnhealthyCluster));
    }

    #[test]
    fn a_removal_must_leave_a_quorum() {
        assert_eq!(voters(&[Steady]).check_remove(9), Err(Error::MemberNotFound));
        assert_eq!(voters(&[Steady]).check_remove(1), Err(Error::NotEnoughStartedMembers));
        let three = voters(&[Steady, Steady, Down]);
        assert_eq!(three.check_remove(3), Ok(()), "it is down already");
        assert_eq!(three.check_remove(2), Err(Error::UnhealthyCluster));
        assert_eq!(three.check_remove(1), Err(Error::UnhealthyCluster));
        assert_eq!(voters(&[Steady, Steady, Steady]).check_remove(1), Ok(()));
        assert_eq!(voters(&[Steady, Steady]).check_remove(2), Ok(()));
        let unstarted = with(voters(&[Steady, Steady]), member(3, "", false), Down);
        assert_eq!(unstarted.check_remove(3), Ok(()));
        assert_eq!(unstarted.check_remove(2), Err(Error::NotEnoughStartedMembers));
        let learning = with(voters(&[Steady, Down]), member(3, "", true), Down);
        assert_eq!(learning.check_remove(3), Ok(()));
    }

    #[test]
    fn an_update_needs_free_urls() {
        let view = voters(&[Steady, Down]);
        let update = |id, url: &str| {
            let peer_ur_ls = add(url, false).peer_ur_ls;
            view.check_update(&MemberUpdateRequest { id, peer_ur_ls })
        };
        assert_eq!(update(9, FREE), Err(Error::MemberNotFound));
        assert_eq!(update(1, ""), Err(Error::MemberBadUrls));
        assert_eq!(update(1, "http://127.0.0.1:2382"), Err(Error::PeerUrlExists));
        assert_eq!(update(1, "http://127.0.0.1:2381"), Ok(()), "its own");
        assert_eq!(update(1, FREE), Ok(()));
    }

    #[test]
    fn only_learners_are_promoted_and_only_where_enough_have_started() {
        assert_eq!(voters(&[Steady]).check_promote(9), Err(Error::MemberNotFound));
        assert_eq!(voters(&[Steady]).check_promote(1), Err(Error::MemberNotLearner));
        let learning = || with(voters(&[Steady]), member(2, "l", true), Steady);
        assert_eq!(learning().check_promote(2), Ok(()));
        let waiting = with(learning(), member(3, "", false), Down);
        assert_eq!(waiting.check_promote(2), Ok(()), "two of three");
        let more = with(waiting, member(4, "", false), Down);
        assert_eq!(more.check_promote(2), Err(Error::NotEnoughStartedMembers));
    }
}
