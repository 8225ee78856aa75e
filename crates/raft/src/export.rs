//! `kelson export`: the state of a stopped member as the data directory of an etcd. Like `restore` it
//! makes one member of a new cluster: for several, it is run once for each on the same state.

use std::path::PathBuf;

use kelson_api::etcdserverpb::Member;
use kelson_storage::etcd::{EtcdVersion, Founding};
use kelson_storage::offline::Stopped;
use kelson_storage::{Identity, OpenError};

use crate::config::NodeConfig;
use crate::error::StartError;

/// Whose directory is to be made.
#[derive(Clone, Debug, Default)]
pub struct Export {
    /// `--name`.
    pub name: String,
    /// `--initial-cluster`: name and peer URLs of each member.
    pub initial_cluster: Vec<(String, Vec<String>)>,
    /// `--initial-cluster-token`.
    pub initial_cluster_token: String,
    /// `--initial-advertise-peer-urls`.
    pub advertise_peer_urls: Vec<String>,
    /// For which etcd.
    pub version: EtcdVersion,
    /// The directory to be made.
    pub target: PathBuf,
}

/// Why nothing was made.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// The description of the cluster contradicts itself.
    #[error(transparent)]
    Settings(#[from] StartError),
    /// The state cannot be read, or the target not be written.
    #[error(transparent)]
    Files(#[from] OpenError),
}

/// Makes the directory. Blocking.
///
/// # Errors
/// See [`ExportError`].
pub fn export(stopped: &Stopped, asked: &Export) -> Result<Identity, ExportError> {
    let described = NodeConfig {
        name: asked.name.clone(),
        initial_cluster: asked.initial_cluster.clone(),
        initial_cluster_token: asked.initial_cluster_token.clone(),
        advertise_peer_urls: asked.advertise_peer_urls.clone(),
        ..NodeConfig::with_defaults(&asked.target)
    };
    let (identity, peers) = described.bootstrap()?;
    let members = peers.into_iter().map(|(id, peer)| {
        let (name, peer_ur_ls) = (peer.name, peer.peer_urls);
        Member { id, name, peer_ur_ls, ..Member::default() }
    });
    let founding = Founding { identity, members: members.collect(), version: asked.version };
    kelson_storage::etcd::export(&stopped.reader, &founding, &asked.target)?;
    Ok(identity)
}
