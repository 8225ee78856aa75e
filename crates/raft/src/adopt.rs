//! The first start on the data directory of an etcd: member, cluster, vote, log and state become ours,
//! with the same ids, terms and indexes. What etcd's database holds becomes the state; every entry of
//! its log behind that, committed or not, becomes an entry of our log. So a member forgets nothing that
//! it promised, and the members of a cluster may be taken over one after the other: they agree on the
//! rest among themselves, like members that were restarted. etcd's files are moved aside, unchanged.
//!
//! It decides nothing about what is committed, and it runs before anything else of a start.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use kelson_api::Message;
use kelson_api::command::command::Op;
use kelson_api::command::{Batch, Command, MembersChange};
use kelson_api::etcdserverpb::Member;
use kelson_storage::etcd::{
    ConfChange, ConfChangeKind, Database, EtcdEntry, EtcdFileError, EtcdLog, ImportError, Imported,
    Imprint, Payload as EtcdPayload, Plan, Target, finish_adoption, import, is_etcd_dir, read_wal,
};
use kelson_storage::{Identity, LogId as Position, OpenError, log};

use crate::codec;
use crate::seed::{self, SeedError};
use crate::types::{Commands, Entry, Payload, Vote, raft_log_id};

/// Pause between two lines about the progress.
const TELL_EVERY: Duration = Duration::from_secs(2);

/// Why a directory of etcd was not taken over. It is as it was.
#[derive(Debug, thiserror::Error)]
pub enum AdoptError {
    /// A file of etcd.
    #[error(transparent)]
    File(#[from] EtcdFileError),
    /// Something that cannot be taken over as it is.
    #[error("{0}")]
    Refused(String),
    /// The state cannot be filled.
    #[error(transparent)]
    Import(#[from] ImportError),
    /// The new directory cannot be made.
    #[error(transparent)]
    Dir(#[from] OpenError),
    /// Identity or log cannot be written.
    #[error(transparent)]
    Seed(#[from] SeedError),
}

/// Takes a directory of etcd over, if it is one. `wal_dir` is where that etcd kept its log, if not in
/// the directory. Blocking, for seconds per million keys.
///
/// # Errors
/// See [`AdoptError`].
pub(crate) fn adopt(data_dir: &Path, wal_dir: Option<&Path>) -> Result<(), AdoptError> {
    if finish_adoption(data_dir)? {
        tracing::info!(path = %data_dir.display(), "finished taking over the data of etcd");
    }
    if !is_etcd_dir(data_dir) {
        return Ok(());
    }
    let member_dir = data_dir.join("member");
    let begun = Instant::now();
    tracing::info!(path = %member_dir.display(), "found data of etcd; taking them over");
    let source = Source::read(&member_dir, wal_dir)?;
    let target = Target::beside_etcd(data_dir)?;
    let imported = source.write(&target)?;
    target.finish()?;
    tracing::info!(
        revision = imported.revision,
        rows = imported.rows,
        leases = imported.leases,
        users = imported.users,
        kept = %data_dir.join("member.etcd").display(),
        took = ?begun.elapsed(),
        "took over the data of etcd; its files were kept, unchanged"
    );
    Ok(())
}

/// Everything that etcd's files say, but for the rows.
struct Source {
    database: Database,
    imprint: Imprint,
    log: EtcdLog,
    applied: Position,
    members: BTreeMap<u64, Member>,
}

impl Source {
    fn read(member_dir: &Path, wal_dir: Option<&Path>) -> Result<Self, AdoptError> {
        let path = member_dir.join("snap").join("db");
        if !path.exists() {
            return Err(AdoptError::Refused(format!(
                "{} is missing: etcd has never finished a start in this directory; delete it to \
                 start with an empty store, or restore a snapshot",
                path.display()
            )));
        }
        let database = Database::open_locked(&path)?;
        let imprint = database.imprint()?;
        let own = member_dir.join("wal");
        let wal_dir: PathBuf = match wal_dir {
            Some(elsewhere) if !own.exists() => elsewhere.to_owned(),
            _ => own,
        };
        let log = read_wal(&wal_dir, imprint.applied.index)?;
        let applied = applied(&path, &imprint, &log)?;
        let members: BTreeMap<u64, Member> =
            imprint.members.iter().map(|member| (member.id, member.clone())).collect();
        if !members.contains_key(&log.member_id) {
            return Err(AdoptError::Refused(format!(
                "{} does not list the member {:x} that the log belongs to: the cluster has removed \
                 it, or it never finished joining; delete {} and add the member anew",
                path.display(),
                log.member_id,
                member_dir.display()
            )));
        }
        refuse_open_changes(&log, &members)?;
        Ok(Self { database, imprint, log, applied, members })
    }

    fn write(mut self, target: &Target) -> Result<Imported, AdoptError> {
        let membership = seed::membership(&self.members)?;
        let version = std::mem::take(&mut self.imprint.cluster_version);
        let plan = Plan {
            applied: self.applied,
            membership: codec::encode_membership(&membership),
            members: self.members.values().cloned().collect(),
            removed: std::mem::take(&mut self.imprint.removed),
            cluster_version: (!version.is_empty()).then_some(version),
            raise: None,
        };
        let mut told = Instant::now();
        let mut tell = |done: Imported| {
            if told.elapsed() >= TELL_EVERY {
                told = Instant::now();
                tracing::info!(
                    rows = done.rows,
                    bytes = done.bytes,
                    revision = done.revision,
                    "taking over the data of etcd"
                );
            }
        };
        let imported = import(&self.database, target.dir()?, plan, &mut tell)?;
        let identity = Identity { cluster_id: self.log.cluster_id, member_id: self.log.member_id };
        let voted_for = if self.log.vote == 0 { self.log.member_id } else { self.log.vote };
        let term = self.log.term.max(self.log.last.term).max(self.applied.term);
        // Without a vote in its term the member has one now, for itself: it promises less, not more.
        let vote = Vote::new(term, voted_for);
        let entries = std::mem::take(&mut self.log.entries);
        let entries = entries.into_iter().map(|entry| convert(entry, &mut self.members));
        let entries = entries.collect::<Result<Vec<_>, _>>()?;
        seed::write(target, identity, &vote, self.applied, entries)?;
        Ok(imported)
    }
}

/// The last entry that the database contains.
fn applied(path: &Path, imprint: &Imprint, log: &EtcdLog) -> Result<Position, AdoptError> {
    if imprint.applied.index == 0 {
        return Err(AdoptError::Refused(format!(
            "{} does not say which entry of the log it ends with: start etcd on it once and stop it \
             in order, or restore it with `kelson snapshot restore --skip-hash-check`",
            path.display()
        )));
    }
    if let Some(at) = log.at_position {
        return Ok(at);
    }
    match imprint.applied.term {
        0 => Err(AdoptError::Refused(format!(
            "the log no longer has entry {}, with which {} ends: start etcd once, stop it in order \
             and try again",
            imprint.applied.index,
            path.display()
        ))),
        _ => Ok(imprint.applied),
    }
}

/// etcd counts a new member's vote when it applies the change, we do when it is in the log. Both are
/// safe; half of a cluster with the one rule and half with the other is not.
fn refuse_open_changes(log: &EtcdLog, members: &BTreeMap<u64, Member>) -> Result<(), AdoptError> {
    let is_change = |entry: &&EtcdEntry| matches!(entry.payload, EtcdPayload::Members(_));
    let open = log.entries.iter().filter(is_change).find(|entry| entry.id.index > log.commit);
    match open {
        Some(entry) if members.len() > 1 => Err(AdoptError::Refused(format!(
            "entry {} of the log changes the members and is not known to be committed: start etcd on \
             all members, wait until the change is through, and stop them in order",
            entry.id.index
        ))),
        _ => Ok(()),
    }
}

/// An entry of etcd's log as one of ours.
fn convert(
    entry: EtcdEntry,
    members: &mut BTreeMap<u64, Member>,
) -> Result<log::Entry, AdoptError> {
    let index = entry.id.index;
    let members_change = |op| {
        let command = Command { op: Some(op), ..Command::default() };
        Commands(Batch { commands: vec![command] }.encode_to_vec().into())
    };
    let payload = match entry.payload {
        EtcdPayload::Blank => Payload::Blank,
        // Here it is wrapped more deeply than in etcd's log, and what can be read there may be too deep.
        EtcdPayload::Commands(batch) if Batch::decode(batch.clone()).is_err() => {
            return Err(AdoptError::Refused(format!(
                "entry {index} of etcd's log has too many transactions within one another: start etcd \
                 once and stop it in order, so that the entry is in its database"
            )));
        }
        EtcdPayload::Commands(batch) => Payload::Commands(Commands(batch)),
        EtcdPayload::Members(change) => match change_members(change, members) {
            Some(change) => Payload::Membership(
                seed::membership(members)?,
                members_change(Op::MembersChange(change)),
            ),
            // etcd refuses it when it is applied, and so changes nothing.
            None => Payload::Blank,
        },
    };
    let log_id = raft_log_id(entry.id);
    let log_id = log_id.ok_or_else(|| AdoptError::Refused("the log has an entry 0".to_owned()))?;
    Ok(codec::encode_entry(&Entry { log_id, payload }))
}

/// Carries a change of members out; `None` if etcd would refuse it.
fn change_members(
    change: ConfChange,
    members: &mut BTreeMap<u64, Member>,
) -> Option<MembersChange> {
    let id = change.member_id;
    let known = members.get(&id).cloned();
    let is_taken = |urls: &[String]| {
        let mut others = members.values().filter(|member| member.id != id);
        others.any(|member| member.peer_ur_ls.iter().any(|url| urls.contains(url)))
    };
    let put = match (change.kind, known, change.member) {
        (ConfChangeKind::Remove, Some(_), _) => {
            members.remove(&id);
            return Some(MembersChange { put: Vec::new(), remove: vec![id] });
        }
        (ConfChangeKind::AddVoter, Some(known), _) if change.is_promote && known.is_learner => {
            Member { is_learner: false, ..known }
        }
        (ConfChangeKind::AddVoter | ConfChangeKind::AddLearner, None, Some(new))
            if !change.is_promote && !is_taken(&new.peer_ur_ls) =>
        {
            Member { is_learner: change.kind == ConfChangeKind::AddLearner, ..new }
        }
        (ConfChangeKind::Update, Some(known), Some(new)) if !is_taken(&new.peer_ur_ls) => {
            Member { peer_ur_ls: new.peer_ur_ls, ..known }
        }
        _ => return None,
    };
    members.insert(id, put.clone());
    Some(MembersChange { put: vec![put], remove: Vec::new() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(id: u64, is_learner: bool) -> Member {
        let peer_ur_ls = vec![format!("http://127.0.0.1:{id}")];
        Member { id, peer_ur_ls, is_learner, ..Member::default() }
    }

    fn change(kind: ConfChangeKind, about: Member, is_promote: bool) -> ConfChange {
        ConfChange { kind, member_id: about.id, member: Some(about), is_promote }
    }

    #[test]
    fn changes_of_members_follow_etcds_rules() {
        let mut members = BTreeMap::from([(1, member(1, false))]);
        let added = change(ConfChangeKind::AddLearner, member(2, true), false);
        assert!(change_members(added.clone(), &mut members).is_some());
        assert!(members[&2].is_learner);
        assert_eq!(change_members(added, &mut members), None, "it is there already");
        let promoted = change(ConfChangeKind::AddVoter, member(2, false), true);
        assert!(change_members(promoted.clone(), &mut members).is_some());
        assert!(!members[&2].is_learner);
        assert_eq!(change_members(promoted, &mut members), None, "it is a voter already");
        let twin = Member { id: 3, ..member(2, false) };
        let twin = change(ConfChangeKind::AddVoter, twin, false);
        assert_eq!(change_members(twin, &mut members), None, "its URL is taken");
        let moved = Member { peer_ur_ls: vec!["http://new:1".to_owned()], ..member(2, false) };
        let moved = change(ConfChangeKind::Update, moved, false);
        assert!(change_members(moved, &mut members).is_some());
        assert_eq!(members[&2].peer_ur_ls, ["http://new:1"]);
        let removed = change(ConfChangeKind::Remove, member(2, false), false);
        let done = change_members(removed.clone(), &mut members).expect("it is there");
        assert_eq!(done.remove, [2]);
        assert_eq!(change_members(removed, &mut members), None, "it is gone already");
        assert_eq!(members.keys().copied().collect::<Vec<_>>(), [1]);
    }
}
