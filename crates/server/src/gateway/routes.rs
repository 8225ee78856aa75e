//! The paths of the JSON gateway: below `/v3/`, each names one method of etcd's services. Everything
//! else about a method, its messages and whether they stream, comes from the descriptors, so a
//! service only has to be served to be reached here.

use std::collections::HashMap;
use std::sync::LazyLock;

use kelson_api::ETCD_DESCRIPTORS;
use prost_reflect::{DescriptorPool, MessageDescriptor};

/// Path without its `/v3/`, service, method. Source: etcd 3.7, whose RangeStream has none.
const PATHS: &[(&str, &str, &str)] = &[
    ("kv/range", "etcdserverpb.KV", "Range"),
    ("kv/put", "etcdserverpb.KV", "Put"),
    ("kv/deleterange", "etcdserverpb.KV", "DeleteRange"),
    ("kv/txn", "etcdserverpb.KV", "Txn"),
    ("kv/compaction", "etcdserverpb.KV", "Compact"),
    ("watch", "etcdserverpb.Watch", "Watch"),
    ("lease/grant", "etcdserverpb.Lease", "LeaseGrant"),
    ("lease/revoke", "etcdserverpb.Lease", "LeaseRevoke"),
    ("kv/lease/revoke", "etcdserverpb.Lease", "LeaseRevoke"),
    ("lease/keepalive", "etcdserverpb.Lease", "LeaseKeepAlive"),
    ("lease/timetolive", "etcdserverpb.Lease", "LeaseTimeToLive"),
    ("kv/lease/timetolive", "etcdserverpb.Lease", "LeaseTimeToLive"),
    ("lease/leases", "etcdserverpb.Lease", "LeaseLeases"),
    ("kv/lease/leases", "etcdserverpb.Lease", "LeaseLeases"),
    ("cluster/member/add", "etcdserverpb.Cluster", "MemberAdd"),
    ("cluster/member/remove", "etcdserverpb.Cluster", "MemberRemove"),
    ("cluster/member/update", "etcdserverpb.Cluster", "MemberUpdate"),
    ("cluster/member/list", "etcdserverpb.Cluster", "MemberList"),
    ("cluster/member/promote", "etcdserverpb.Cluster", "MemberPromote"),
    ("maintenance/alarm", "etcdserverpb.Maintenance", "Alarm"),
    ("maintenance/status", "etcdserverpb.Maintenance", "Status"),
    ("maintenance/defragment", "etcdserverpb.Maintenance", "Defragment"),
    ("maintenance/hash", "etcdserverpb.Maintenance", "Hash"),
    ("maintenance/hashkv", "etcdserverpb.Maintenance", "HashKV"),
    ("maintenance/snapshot", "etcdserverpb.Maintenance", "Snapshot"),
    ("maintenance/transfer-leadership", "etcdserverpb.Maintenance", "MoveLeader"),
    ("maintenance/downgrade", "etcdserverpb.Maintenance", "Downgrade"),
    ("auth/enable", "etcdserverpb.Auth", "AuthEnable"),
    ("auth/disable", "etcdserverpb.Auth", "AuthDisable"),
    ("auth/status", "etcdserverpb.Auth", "AuthStatus"),
    ("auth/authenticate", "etcdserverpb.Auth", "Authenticate"),
    ("auth/user/add", "etcdserverpb.Auth", "UserAdd"),
    ("auth/user/get", "etcdserverpb.Auth", "UserGet"),
    ("auth/user/list", "etcdserverpb.Auth", "UserList"),
    ("auth/user/delete", "etcdserverpb.Auth", "UserDelete"),
    ("auth/user/changepw", "etcdserverpb.Auth", "UserChangePassword"),
    ("auth/user/grant", "etcdserverpb.Auth", "UserGrantRole"),
    ("auth/user/revoke", "etcdserverpb.Auth", "UserRevokeRole"),
    ("auth/role/add", "etcdserverpb.Auth", "RoleAdd"),
    ("auth/role/get", "etcdserverpb.Auth", "RoleGet"),
    ("auth/role/list", "etcdserverpb.Auth", "RoleList"),
    ("auth/role/delete", "etcdserverpb.Auth", "RoleDelete"),
    ("auth/role/grant", "etcdserverpb.Auth", "RoleGrantPermission"),
    ("auth/role/revoke", "etcdserverpb.Auth", "RoleRevokePermission"),
    ("lock/lock", "v3lockpb.Lock", "Lock"),
    ("lock/unlock", "v3lockpb.Lock", "Unlock"),
    ("election/campaign", "v3electionpb.Election", "Campaign"),
    ("election/proclaim", "v3electionpb.Election", "Proclaim"),
    ("election/leader", "v3electionpb.Election", "Leader"),
    ("election/observe", "v3electionpb.Election", "Observe"),
    ("election/resign", "v3electionpb.Election", "Resign"),
];

/// A method behind a path.
pub(crate) struct Route {
    /// Its path in gRPC, `/service/method`.
    pub(crate) grpc_path: String,
    pub(crate) input: MessageDescriptor,
    pub(crate) output: MessageDescriptor,
    /// The request body may hold several messages.
    pub(crate) takes_stream: bool,
    /// The answer is a line per message.
    pub(crate) gives_stream: bool,
}

static ROUTES: LazyLock<HashMap<&str, Route>> = LazyLock::new(|| {
    let pool = DescriptorPool::decode(ETCD_DESCRIPTORS).expect("generated with the messages");
    let route = |(path, service, method): &(&'static str, &str, &str)| {
        let service = pool.get_service_by_name(service).expect("a service of proto/etcd");
        let method = service.methods().find(|known| known.name() == *method);
        let method = method.expect("a method of proto/etcd");
        let route = Route {
            grpc_path: format!("/{}/{}", service.full_name(), method.name()),
            input: method.input(),
            output: method.output(),
            takes_stream: method.is_client_streaming(),
            gives_stream: method.is_server_streaming(),
        };
        (*path, route)
    };
    PATHS.iter().map(route).collect()
});

/// The method behind a path without its `/v3/`.
pub(crate) fn find(path: &str) -> Option<&'static Route> {
    ROUTES.get(path)
}

/// The route with this number, for whoever wants to go through all of them.
pub(crate) fn nth(number: usize) -> &'static Route {
    let (path, ..) = PATHS[number % PATHS.len()];
    &ROUTES[path]
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_method_but_one_has_a_path() {
        let served: BTreeSet<&str> =
            PATHS.iter().map(|(path, ..)| ROUTES[path].grpc_path.as_str()).collect();
        let pool = DescriptorPool::decode(ETCD_DESCRIPTORS).expect("descriptors");
        let methods = pool.services().filter(|service| service.package_name() != "grpc.health.v1");
        let methods = methods.flat_map(|service| service.methods().collect::<Vec<_>>());
        let paths: BTreeSet<String> = methods
            .map(|method| format!("/{}/{}", method.parent_service().full_name(), method.name()))
            .collect();
        let missing: Vec<_> = paths.iter().filter(|path| !served.contains(path.as_str())).collect();
        assert_eq!(missing, ["/etcdserverpb.KV/RangeStream"]);
    }

    #[test]
    fn streams_are_known_from_the_descriptors() {
        let kind = |path| find(path).map(|route| (route.takes_stream, route.gives_stream));
        assert_eq!(kind("kv/range"), Some((false, false)));
        assert_eq!(kind("watch"), Some((true, true)));
        assert_eq!(kind("election/observe"), Some((false, true)));
        assert_eq!(kind("kv/rangestream"), None);
    }
}
