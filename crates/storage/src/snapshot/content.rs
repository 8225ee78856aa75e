//! What stands in each bucket of a snapshot file, apart from the rows. Names and encodings are those
//! of etcd 3.6 and later. It does no I/O.

use std::collections::BTreeMap;

use kelson_api::Message;
use kelson_api::etcdserverpb::Member;

use crate::keys::{Tables, encode_lease, revision_bytes};
use crate::types::RevisionKey;

/// The bucket of the rows.
pub(crate) const KEY_BUCKET: &str = "key";

/// Storage version of a store whose cluster version is not agreed yet.
const OLDEST_STORAGE_VERSION: &str = "3.6.0";

/// Pairs of one bucket by key.
pub(crate) type Bucket = BTreeMap<Vec<u8>, Vec<u8>>;

/// All buckets by name; the one of the rows is there and empty.
pub(crate) struct Buckets(pub(crate) BTreeMap<&'static str, Bucket>);

/// Entries of the `meta` bucket that differ between members of equal content.
pub(crate) fn is_left_out_of_hash(bucket: &str, key: &[u8]) -> bool {
    bucket == "meta" && matches!(key, b"consistent_index" | b"term" | b"storageVersion")
}

impl Buckets {
    pub(crate) fn new(tables: &Tables) -> Self {
        let leases = tables.leases.iter().map(|lease| {
            let id = lease.id.to_be_bytes().to_vec();
            (id, encode_lease(lease))
        });
        let alarms = tables.alarms.iter().map(|alarm| (alarm.encode_to_vec(), Vec::new()));
        let members = tables.members.iter().map(|member| (hex(member.id), member_json(member)));
        let removed = tables.removed.iter().map(|id| (hex(*id), b"removed".to_vec()));
        let version = tables.cluster_version.iter();
        let version = version.map(|text| (b"clusterVersion".to_vec(), text.clone().into_bytes()));
        let users = tables.auth.users.iter();
        let users = users.map(|user| (user.name.to_vec(), user.encode_to_vec()));
        let roles = tables.auth.roles.iter();
        let roles = roles.map(|role| (role.name.to_vec(), role.encode_to_vec()));
        Self(BTreeMap::from([
            ("alarm", alarms.collect()),
            ("auth", auth(tables)),
            ("authRoles", roles.collect()),
            ("authUsers", users.collect()),
            ("cluster", version.collect()),
            (KEY_BUCKET, Bucket::new()),
            ("lease", leases.collect()),
            ("members", members.collect()),
            ("members_removed", removed.collect()),
            ("meta", meta(tables)),
        ]))
    }
}

/// A store that never knew users says so as etcd does: revision 1 and nothing else.
fn auth(tables: &Tables) -> Bucket {
    let revision = tables.auth.revision().to_be_bytes().to_vec();
    let mut auth = Bucket::from([(b"authRevision".to_vec(), revision)]);
    if let Some(enabled) = tables.auth.enabled {
        auth.insert(b"authEnabled".to_vec(), vec![u8::from(enabled)]);
    }
    auth
}

fn meta(tables: &Tables) -> Bucket {
    let mut meta = Bucket::from([
        (b"consistent_index".to_vec(), tables.applied.index.to_be_bytes().to_vec()),
        (b"term".to_vec(), tables.applied.term.to_be_bytes().to_vec()),
        (b"confState".to_vec(), conf_state(&tables.members)),
        (b"storageVersion".to_vec(), storage_version(tables).into_bytes()),
    ]);
    let compactions = [
        (b"scheduledCompactRev".as_slice(), tables.scheduled_compaction),
        (b"finishedCompactRev", tables.finished_compaction),
    ];
    for (name, revision) in compactions {
        if let Some(main) = revision {
            meta.insert(name.to_vec(), revision_bytes(RevisionKey { main, sub: 0 }, false));
        }
    }
    meta
}

/// Major and minor of the cluster version.
fn storage_version(tables: &Tables) -> String {
    let version = tables.cluster_version.as_deref().unwrap_or(OLDEST_STORAGE_VERSION);
    let mut parts = version.split('.');
    match (parts.next(), parts.next()) {
        (Some(major), Some(minor)) => format!("{major}.{minor}.0"),
        _ => OLDEST_STORAGE_VERSION.to_owned(),
    }
}

fn hex(id: u64) -> Vec<u8> {
    format!("{id:x}").into_bytes()
}

fn conf_state(members: &[Member]) -> Vec<u8> {
    let ids = |learner: bool| {
        let ids = members.iter().filter(|member| member.is_learner == learner);
        let mut ids: Vec<u64> = ids.map(|member| member.id).collect();
        ids.sort_unstable();
        let ids: Vec<String> = ids.iter().map(u64::to_string).collect();
        ids.join(",")
    };
    let (voters, learners) = (ids(false), ids(true));
    let learners =
        if learners.is_empty() { learners } else { format!("\"learners\":[{learners}],") };
    format!("{{\"voters\":[{voters}],{learners}\"auto_leave\":false}}").into_bytes()
}

/// A member as etcd's JSON has it; empty fields are absent.
fn member_json(member: &Member) -> Vec<u8> {
    let urls = |urls: &[String]| serde_json::Value::from(urls.to_vec()).to_string();
    let mut json = format!("{{\"id\":{},\"peerURLs\":{}", member.id, urls(&member.peer_ur_ls));
    if member.is_learner {
        json += ",\"isLearner\":true";
    }
    if !member.name.is_empty() {
        json += &format!(",\"name\":{}", serde_json::Value::from(member.name.as_str()));
    }
    if !member.client_ur_ls.is_empty() {
        json += &format!(",\"clientURLs\":{}", urls(&member.client_ur_ls));
    }
    json += "}";
    json.into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::{LeaseRow, LogId};

    #[test]
    fn members_and_conf_state_are_etcds_json() {
        let voter = Member {
            id: 10,
            name: "a\"b".to_owned(),
            peer_ur_ls: vec!["http://127.0.0.1:2380".to_owned()],
            client_ur_ls: vec!["http://127.0.0.1:2379".to_owned()],
            is_learner: false,
        };
        let learner = Member {
            id: u64::MAX,
            name: String::new(),
            peer_ur_ls: vec!["http://x:1".to_owned()],
            client_ur_ls: Vec::new(),
            is_learner: true,
        };
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("text");
        assert_eq!(
            text(member_json(&voter)),
            r#"{"id":10,"peerURLs":["http://127.0.0.1:2380"],"name":"a\"b","clientURLs":["http://127.0.0.1:2379"]}"#
        );
        assert_eq!(
            text(member_json(&learner)),
            r#"{"id":18446744073709551615,"peerURLs":["http://x:1"],"isLearner":true}"#
        );
        assert_eq!(
            text(conf_state(&[learner, voter.clone()])),
            r#"{"voters":[10],"learners":[18446744073709551615],"auto_leave":false}"#
        );
        assert_eq!(text(conf_state(&[voter])), r#"{"voters":[10],"auto_leave":false}"#);
    }

    #[test]
    fn tables_become_the_ten_buckets() {
        let tables = Tables {
            applied: LogId { term: 2, index: 9 },
            leases: vec![LeaseRow { id: 77, ttl: 300, remaining_ttl: 0 }],
            cluster_version: Some("3.7.1".to_owned()),
            scheduled_compaction: Some(5),
            ..Tables::default()
        };
        let Buckets(buckets) = Buckets::new(&tables);
        assert_eq!(buckets.len(), 10);
        assert_eq!(buckets["lease"][77_u64.to_be_bytes().as_slice()], b"\x08\x4d\x10\xac\x02");
        let meta = &buckets["meta"];
        assert_eq!(meta[b"storageVersion".as_slice()], b"3.7.0");
        assert_eq!(meta[b"scheduledCompactRev".as_slice()], b"\0\0\0\0\0\0\0\x05_\0\0\0\0\0\0\0\0");
        assert!(!meta.contains_key(b"finishedCompactRev".as_slice()));
        assert_eq!(meta[b"consistent_index".as_slice()], 9_u64.to_be_bytes());
        assert_eq!(buckets["auth"].len(), 1);
    }
}
