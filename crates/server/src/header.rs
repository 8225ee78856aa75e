//! The header of every answer: who answered, in which term, at which store revision. It reads the
//! member's status and nothing else; which revision belongs into it is the service's decision.

use kelson_api::etcdserverpb::ResponseHeader;
use kelson_raft::Node;

/// Builds the header of an answer given now by this member.
///
/// `revision` is the store revision that the answer speaks of; 0 where etcd leaves it out.
#[must_use]
pub fn header(node: &Node, revision: i64) -> ResponseHeader {
    let status = node.status();
    ResponseHeader {
        cluster_id: status.cluster_id,
        member_id: status.member_id,
        revision,
        raft_term: status.term,
    }
}
