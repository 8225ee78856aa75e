//! What etcd keeps in its database: the ten buckets of 3.4 to 3.7 with their encodings, the summary
//! that `snapshot status` prints, and the hash of the key space. Reads only; nothing here knows our
//! own state. Stands between `bolt` and `import`.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::File;
use std::io::Read;
use std::path::Path;

use kelson_api::Message;
use kelson_api::authpb::{Role, User};
use kelson_api::etcdserverpb::{AlarmMember, Member};
use rustix::fs::{FlockOperation, flock};
use sha2::Digest as _;

use super::EtcdFileError;
use super::bolt::{Bolt, Bucket};
use crate::auth::AuthRows;
use crate::hash::HashKv;
use crate::keys::{decode_lease, parse_revision};
use crate::mvcc::apply::TTL_MAX;
use crate::mvcc::row;
use crate::types::{LeaseRow, LogId, RevisionKey};

/// Bytes of the digest behind a snapshot.
const DIGEST_LEN: u64 = 32;
/// A file whose length leaves this remainder has a digest, as etcd's tools see it.
const SECTOR: u64 = 512;
/// No store counts so far, and it leaves room to count on: indexes, terms, revisions of users.
pub(super) const COUNT_MAX: u64 = u64::MAX / 4;

/// An open database.
#[derive(Debug)]
pub struct Database {
    bolt: Bolt,
    buckets: BTreeMap<Vec<u8>, Bucket>,
}

/// What `etcdutl snapshot status` prints.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DatabaseStatus {
    /// CRC-32C of all names, keys and values.
    pub hash: u32,
    /// Revision of the last row.
    pub revision: i64,
    /// Keys that are not deleted.
    pub total_key: u64,
    /// Size of the database without its digest. Unit: bytes.
    pub total_size: u64,
    /// `storageVersion`; empty before etcd 3.6.
    pub version: String,
}

/// The digest behind a snapshot file.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Digest {
    /// It is that of the file.
    Fits,
    /// There is none: the file was copied from a data directory.
    Missing,
    /// The file is not what was saved.
    Differs {
        /// What stands behind the file.
        expected: [u8; 32],
        /// What the file has.
        found: [u8; 32],
    },
}

/// Compactions that the database knows.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Compactions {
    /// In force for readers.
    pub scheduled: Option<i64>,
    /// Carried out.
    pub finished: Option<i64>,
}

/// Everything but the rows.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Imprint {
    /// The last applied entry of etcd's log. The term is 0 in files of 3.4.
    pub applied: LogId,
    /// Compactions.
    pub compactions: Compactions,
    /// Leases by ascending id.
    pub leases: Vec<LeaseRow>,
    /// Alarms that are on.
    pub alarms: Vec<AlarmMember>,
    /// Members of the cluster that it belonged to, by ascending id.
    pub members: Vec<Member>,
    /// Ids of former members.
    pub removed: Vec<u64>,
    /// `clusterVersion`; empty if never agreed.
    pub cluster_version: String,
    pub(crate) auth: AuthRows,
}

/// A row as it stands in the file.
#[derive(Debug)]
pub(super) struct FileRow<'a> {
    pub(super) key: RevisionKey,
    pub(super) tombstone: bool,
    /// Marshalled `KeyValue`; empty in the row that `--bump-revision` writes.
    pub(super) kv: &'a [u8],
}

/// A member in etcd's JSON.
#[derive(serde::Deserialize)]
struct MemberJson {
    id: u64,
    #[serde(rename = "peerURLs", default)]
    peer_urls: Option<Vec<String>>,
    #[serde(rename = "isLearner", default)]
    is_learner: bool,
    #[serde(default)]
    name: String,
    #[serde(rename = "clientURLs", default)]
    client_urls: Option<Vec<String>>,
}

/// Reads a member from etcd's JSON.
pub(super) fn parse_member(json: &[u8]) -> Option<Member> {
    let member: MemberJson = serde_json::from_slice(json).ok()?;
    Some(Member {
        id: member.id,
        name: member.name,
        peer_ur_ls: member.peer_urls.unwrap_or_default(),
        client_ur_ls: member.client_urls.unwrap_or_default(),
        is_learner: member.is_learner,
    })
}

/// Compares a snapshot file with the digest behind it. Reads the whole file.
///
/// # Errors
/// It cannot be read.
pub fn check_digest(path: &Path) -> Result<Digest, EtcdFileError> {
    let failed = |error| EtcdFileError::io("read", path, error);
    let mut file = File::open(path).map_err(|error| EtcdFileError::io("open", path, error))?;
    let bytes = file.metadata().map_err(failed)?.len();
    if bytes % SECTOR != DIGEST_LEN {
        return Ok(Digest::Missing);
    }
    let mut hash = sha2::Sha256::new();
    let mut left = bytes - DIGEST_LEN;
    let mut buffer = vec![0; 1 << 20];
    while left > 0 {
        let wanted = usize::try_from(left).unwrap_or(buffer.len()).min(buffer.len());
        file.read_exact(&mut buffer[..wanted]).map_err(failed)?;
        hash.update(&buffer[..wanted]);
        left -= wanted as u64;
    }
    let mut expected = [0; DIGEST_LEN as usize];
    file.read_exact(&mut expected).map_err(failed)?;
    let found: [u8; 32] = hash.finalize().into();
    Ok(if found == expected { Digest::Fits } else { Digest::Differs { expected, found } })
}

impl Database {
    /// Opens a database for reading.
    ///
    /// # Errors
    /// It is no bbolt file, or its first pages are damaged; the rest is looked at when it is read.
    pub fn open(path: &Path) -> Result<Self, EtcdFileError> {
        let bolt = Bolt::open(path)?;
        let buckets = bolt.buckets()?;
        Ok(Self { bolt, buckets })
    }

    /// As [`Database::open`]; as long as it is open, etcd cannot use the file.
    ///
    /// # Errors
    /// As above; `InUse` if an etcd runs on it.
    pub fn open_locked(path: &Path) -> Result<Self, EtcdFileError> {
        let database = Self::open(path)?;
        match flock(database.bolt.file(), FlockOperation::NonBlockingLockShared) {
            // Read again: it may have changed before the lock was there.
            Ok(()) => Ok(Self { buckets: database.bolt.buckets()?, bolt: database.bolt }),
            Err(rustix::io::Errno::WOULDBLOCK) => {
                Err(EtcdFileError::InUse { path: path.to_owned() })
            }
            Err(error) => Err(EtcdFileError::io("lock", path, error.into())),
        }
    }

    /// The file.
    pub fn path(&self) -> &Path {
        self.bolt.path()
    }

    fn content(&self, bucket: &str, key: &[u8], reason: impl Into<String>) -> EtcdFileError {
        EtcdFileError::Content {
            path: self.bolt.path().to_owned(),
            bucket: bucket.to_owned(),
            key: key.escape_ascii().to_string(),
            reason: reason.into(),
        }
    }

    /// All pairs of a bucket in key order; none if it is missing.
    fn pairs(
        &self,
        bucket: &str,
        each: impl FnMut(&[u8], &[u8]) -> Result<(), EtcdFileError>,
    ) -> Result<(), EtcdFileError> {
        match self.buckets.get(bucket.as_bytes()) {
            Some(found) => self.bolt.for_each(found, each),
            None => Ok(()),
        }
    }

    /// All rows in revision order.
    pub(super) fn rows(
        &self,
        mut each: impl FnMut(FileRow<'_>) -> Result<(), EtcdFileError>,
    ) -> Result<(), EtcdFileError> {
        self.pairs("key", |key, kv| {
            let parsed = parse_revision(key);
            let (revision, tombstone) =
                parsed.ok_or_else(|| self.content("key", key, "it is no revision"))?;
            each(FileRow { key: revision, tombstone, kv })
        })
    }

    /// The summary. Reads everything, and keeps every key that is not deleted in memory.
    ///
    /// # Errors
    /// The file is damaged, or not one of etcd.
    pub fn status(&self) -> Result<DatabaseStatus, EtcdFileError> {
        let mut status = DatabaseStatus {
            hash: 0,
            revision: 0,
            total_key: 0,
            total_size: self.bolt.bytes(),
            version: String::new(),
        };
        if !self.buckets.contains_key(b"meta".as_slice()) {
            return Err(self.content("meta", b"", "the bucket is missing: no database of etcd"));
        }
        let mut live = HashSet::new();
        let mut hash = 0;
        for (name, bucket) in &self.buckets {
            hash = crc32c::crc32c_append(hash, name);
            let is_rows = name == b"key";
            self.bolt.for_each(bucket, |key, value| {
                hash = crc32c::crc32c_append(crc32c::crc32c_append(hash, key), value);
                if is_rows {
                    let parsed = parse_revision(key);
                    let (revision, tombstone) =
                        parsed.ok_or_else(|| self.content("key", key, "it is no revision"))?;
                    let malformed = || self.content("key", key, "it is no key-value record");
                    let parsed = row::parse(value).ok_or_else(malformed)?;
                    let key = &value[parsed.key];
                    status.revision = revision.main;
                    match tombstone {
                        true => live.remove(key),
                        false => live.insert(key.to_vec()),
                    };
                } else if name == b"meta" && key == b"storageVersion" {
                    status.version = String::from_utf8_lossy(value).into_owned();
                }
                Ok(())
            })?;
        }
        (status.hash, status.total_key) = (hash, live.len() as u64);
        Ok(status)
    }

    /// The hash of the key space at a revision, 0 = the newest, as etcd computes it.
    ///
    /// # Errors
    /// The file is damaged, or the revision is compacted or of the future.
    pub fn hash_kv(&self, revision: i64) -> Result<HashKv, EtcdFileError> {
        let Compactions { scheduled, finished } = self.meta()?.1;
        let compacted = scheduled.max(finished).unwrap_or(-1);
        let mut newest = compacted.max(1);
        self.rows(|row| {
            newest = newest.max(row.key.main);
            Ok(())
        })?;
        let at = if revision == 0 { newest } else { revision };
        if at > newest {
            return Err(EtcdFileError::Asked("mvcc: required revision is a future revision"));
        }
        if at < compacted {
            return Err(EtcdFileError::Asked("mvcc: required revision has been compacted"));
        }
        let kept = self.kept(at)?;
        let mut hash = crc32c::crc32c(b"key");
        self.rows(|row| {
            let is_superseded = row.key.main <= compacted
                && !kept.is_empty()
                && !kept.contains(&(row.key.main, row.key.sub));
            let is_compacted_deletion = row.tombstone && row.key.main == compacted;
            if row.key.main <= at && !is_superseded && !is_compacted_deletion {
                let key = crate::keys::revision_bytes(row.key, row.tombstone);
                hash = crc32c::crc32c_append(crc32c::crc32c_append(hash, &key), row.kv);
            }
            Ok(())
        })?;
        Ok(HashKv { hash, hash_revision: at, compact_revision: compacted })
    }

    /// Places of the rows that readers at a revision see.
    fn kept(&self, at: i64) -> Result<HashSet<(i64, i64)>, EtcdFileError> {
        let mut newest: HashMap<Vec<u8>, (i64, i64)> = HashMap::new();
        self.rows(|row| {
            if row.key.main > at {
                return Ok(());
            }
            // The row that `--bump-revision` leaves counts as an empty key, as it does in etcd.
            let parsed = row::parse(row.kv).ok_or_else(|| self.bad_row(row.key))?;
            let key = &row.kv[parsed.key];
            if row.tombstone {
                newest.remove(key);
            } else {
                newest.insert(key.to_vec(), (row.key.main, row.key.sub));
            }
            Ok(())
        })?;
        Ok(newest.into_values().collect())
    }

    pub(super) fn bad_row(&self, key: RevisionKey) -> EtcdFileError {
        let key = format!("{}_{}", key.main, key.sub);
        self.content("key", key.as_bytes(), "it is no key-value record")
    }

    /// Position of the last applied entry, and the compactions.
    fn meta(&self) -> Result<(LogId, Compactions), EtcdFileError> {
        let (mut applied, mut compactions) = (LogId::default(), Compactions::default());
        self.pairs("meta", |key, value| {
            let number = || count(value).ok_or_else(|| self.content("meta", key, "no number"));
            let revision = || {
                let parsed = parse_revision(value).map(|(revision, _)| revision.main);
                parsed.map(Some).ok_or_else(|| self.content("meta", key, "it is no revision"))
            };
            match key {
                b"consistent_index" => applied.index = number()?,
                b"term" => applied.term = number()?,
                b"scheduledCompactRev" => compactions.scheduled = revision()?,
                b"finishedCompactRev" => compactions.finished = revision()?,
                // Among them `confState`, which says the same as the members.
                _ => {}
            }
            Ok(())
        })?;
        Ok((applied, compactions))
    }

    /// Everything but the rows, in memory.
    ///
    /// # Errors
    /// The file is damaged, or holds what no etcd of 3.4 to 3.7 writes.
    pub fn imprint(&self) -> Result<Imprint, EtcdFileError> {
        let (applied, compactions) = self.meta()?;
        let mut imprint = Imprint { applied, compactions, ..Imprint::default() };
        self.pairs("lease", |key, value| {
            let id: Result<[u8; 8], _> = key.try_into();
            let id = id.map_err(|_| self.content("lease", key, "it is no lease id"))?;
            let lease = decode_lease(i64::from_be_bytes(id), value).ok().filter(is_lease);
            imprint.leases.push(lease.ok_or_else(|| self.content("lease", key, "it is no lease"))?);
            Ok(())
        })?;
        self.pairs("alarm", |key, _| {
            let alarm = AlarmMember::decode(key);
            imprint.alarms.push(alarm.map_err(|_| self.content("alarm", key, "no alarm"))?);
            Ok(())
        })?;
        self.pairs("members", |key, value| {
            let member = parse_member(value).filter(|member| hex_id(key) == Some(member.id));
            let member = member.ok_or_else(|| self.content("members", key, "it is no member"))?;
            imprint.members.push(member);
            Ok(())
        })?;
        imprint.members.sort_unstable_by_key(|member| member.id);
        self.pairs("members_removed", |key, _| {
            let id = hex_id(key);
            let id = id.ok_or_else(|| self.content("members_removed", key, "no member id"))?;
            imprint.removed.push(id);
            Ok(())
        })?;
        self.pairs("cluster", |key, value| {
            if key == b"clusterVersion" {
                let version = str::from_utf8(value).ok().filter(|version| is_version(version));
                let version = version.ok_or_else(|| self.content("cluster", key, "no version"))?;
                imprint.cluster_version = version.to_owned();
            }
            Ok(())
        })?;
        imprint.auth = self.auth()?;
        Ok(imprint)
    }

    fn auth(&self) -> Result<AuthRows, EtcdFileError> {
        let mut auth = AuthRows::default();
        self.pairs("auth", |key, value| {
            match key {
                b"authEnabled" => {
                    auth.enabled = Some(match value {
                        [1] => true,
                        [0] => false,
                        // Taken for "off", it would let everybody in.
                        _ => return Err(self.content("auth", key, "it is neither 0 nor 1")),
                    });
                }
                b"authRevision" => {
                    let number = count(value);
                    let number = number.ok_or_else(|| self.content("auth", key, "no revision"))?;
                    // 0 = none yet; etcd counts from 1.
                    auth.revision = (number > 0).then_some(number);
                }
                _ => {}
            }
            Ok(())
        })?;
        self.pairs("authUsers", |key, value| {
            let user = User::decode(value).ok().filter(|user| is_name(key, &user.name));
            let user = user.ok_or_else(|| self.content("authUsers", key, "it is no user"))?;
            auth.users.push(user);
            Ok(())
        })?;
        self.pairs("authRoles", |key, value| {
            let role = Role::decode(value).ok().filter(|role| is_name(key, &role.name));
            let role = role.ok_or_else(|| self.content("authRoles", key, "it is no role"))?;
            auth.roles.push(role);
            Ok(())
        })?;
        Ok(auth)
    }
}

/// Eight bytes as a number that can still be counted on.
fn count(bytes: &[u8]) -> Option<u64> {
    bytes.try_into().map(u64::from_be_bytes).ok().filter(|count| *count <= COUNT_MAX)
}

/// Whether etcd would have granted it.
fn is_lease(lease: &LeaseRow) -> bool {
    let times = 0..=TTL_MAX;
    lease.id != 0 && times.contains(&lease.ttl) && times.contains(&lease.remaining_ttl)
}

/// Whether it is a number of three parts, as `3.7.0`.
fn is_version(text: &str) -> bool {
    let parts = text.split('.').filter(|part| part.parse::<u32>().is_ok());
    parts.count() == 3 && text.matches('.').count() == 2
}

/// Whether a user or a role stands below its own name.
fn is_name(key: &[u8], name: &[u8]) -> bool {
    key == name && !name.is_empty() && str::from_utf8(name).is_ok()
}

fn hex_id(key: &[u8]) -> Option<u64> {
    u64::from_str_radix(str::from_utf8(key).ok()?, 16).ok()
}
