//! `snapshot restore`: a new member from a snapshot file. Every member of the new cluster is made from
//! the same file with the same list of members, each on its own, and they find the same ids, the same
//! first membership and the same beginning of the log. Runs while no member does; knows no flags.

use std::path::PathBuf;

use kelson_api::etcdserverpb::Member;
use kelson_storage::etcd::{
    Database, Digest, EtcdFileError, ImportError, Imported, Plan, Target, check_digest, import,
};
use kelson_storage::{Identity, LogId as Position, OpenError};

use crate::codec;
use crate::config::NodeConfig;
use crate::error::StartError;
use crate::seed::{self, SeedError};
use crate::types::Vote;

/// Term of everything that a restored member begins with, as with etcd's tools.
const FIRST_TERM: u64 = 1;

/// What to restore, and whose member it becomes.
#[derive(Clone, Debug, Default)]
pub struct Restore {
    /// The snapshot file.
    pub snapshot: PathBuf,
    /// Take a file without a digest, or with another one.
    pub skip_hash_check: bool,
    /// `--bump-revision`: by how much the revision goes up; the old ones are then compacted.
    pub bump_revision: Option<u64>,
    /// `--name`.
    pub name: String,
    /// `--initial-cluster`: name and peer URLs of each member.
    pub initial_cluster: Vec<(String, Vec<String>)>,
    /// `--initial-cluster-token`.
    pub initial_cluster_token: String,
    /// `--initial-advertise-peer-urls`.
    pub advertise_peer_urls: Vec<String>,
    /// The directory to be made.
    pub data_dir: PathBuf,
}

/// Why nothing was restored. The target is as it was.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The description of the cluster contradicts itself.
    #[error(transparent)]
    Settings(#[from] StartError),
    /// The snapshot cannot be read.
    #[error(transparent)]
    File(#[from] EtcdFileError),
    /// A file copied from a data directory.
    #[error("snapshot missing hash but --skip-hash-check=false")]
    NoDigest,
    /// It is not what was saved.
    #[error(
        "expected sha256 {}, got {}: the file has changed since it was saved",
        hex(expected),
        hex(found)
    )]
    WrongDigest {
        /// What stands behind the file.
        expected: [u8; 32],
        /// What the file has.
        found: [u8; 32],
    },
    /// The state cannot be filled.
    #[error(transparent)]
    Import(#[from] ImportError),
    /// The target is not empty, in use, or cannot be written.
    #[error(transparent)]
    Target(#[from] OpenError),
    /// Identity or log cannot be written.
    #[error(transparent)]
    Seed(#[from] SeedError),
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Restores one member. Blocking. `progress` is told now and then how much is done.
///
/// # Errors
/// See [`RestoreError`].
pub fn restore(
    asked: &Restore,
    progress: &mut dyn FnMut(Imported),
) -> Result<(Identity, Imported), RestoreError> {
    let described = NodeConfig {
        name: asked.name.clone(),
        initial_cluster: asked.initial_cluster.clone(),
        initial_cluster_token: asked.initial_cluster_token.clone(),
        advertise_peer_urls: asked.advertise_peer_urls.clone(),
        ..NodeConfig::with_defaults(&asked.data_dir)
    };
    let (identity, peers) = described.bootstrap()?;
    let members = peers.into_iter().map(|(id, peer)| {
        let (name, peer_ur_ls) = (peer.name, peer.peer_urls);
        (id, Member { id, name, peer_ur_ls, ..Member::default() })
    });
    let members = members.collect();
    let target = Target::empty(&asked.data_dir)?;
    if !asked.skip_hash_check {
        match check_digest(&asked.snapshot)? {
            Digest::Fits => {}
            Digest::Missing => return Err(RestoreError::NoDigest),
            Digest::Differs { expected, found } => {
                return Err(RestoreError::WrongDigest { expected, found });
            }
        }
    }
    let database = Database::open(&asked.snapshot)?;
    let membership = seed::membership(&members)?;
    // One entry per member, as if each had been added by one.
    let applied = Position { term: FIRST_TERM, index: members.len() as u64 };
    let plan = Plan {
        applied,
        membership: codec::encode_membership(&membership),
        members: members.into_values().collect(),
        raise: asked.bump_revision,
        ..Plan::default()
    };
    let imported = import(&database, target.dir()?, plan, progress)?;
    let vote = Vote::new(FIRST_TERM, identity.member_id);
    seed::write(&target, identity, &vote, applied, Vec::new())?;
    target.finish()?;
    Ok((identity, imported))
}
