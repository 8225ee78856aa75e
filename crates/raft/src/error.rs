//! Why a member cannot start, and how it dies. Errors that clients see are rows of
//! `kelson_api::Error`; here are only those that an operator sees.

use std::fmt::Display;

use crate::codec::DecodeError;

/// Why [`crate::Node::start`] failed. Nothing is left running.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Two members of `--initial-cluster` have the same URLs.
    #[error("--initial-cluster has the peer URLs of {0:?} twice: each member needs its own")]
    SameUrls(String),
    /// No member of the cluster to be joined answers.
    #[error(
        "cannot fetch cluster info from peer urls: could not retrieve cluster information from the \
         given URLs: {0}"
    )]
    NoClusterInfo(String),
    /// `--initial-cluster` is not the cluster that is running.
    #[error("error validating peerURLs: {0}")]
    OtherCluster(String),
    /// A first start, although the cluster knows this member.
    #[error(
        "member {0:x} has already been bootstrapped: its data directory was lost; remove the member \
         from the cluster and add it again"
    )]
    AlreadyBootstrapped(u64),
    /// The cluster has removed this member for good.
    #[error("member {0:x} has been permanently removed from the cluster")]
    Removed(u64),
    /// `--initial-cluster` does not mention `--name`.
    #[error("--initial-cluster does not mention this member, whose --name is {0:?}")]
    NotInInitialCluster(String),
    /// `--initial-cluster` and `--initial-advertise-peer-urls` disagree.
    #[error(
        "--initial-cluster has {listed:?} for {name:?}, --initial-advertise-peer-urls has \
         {advertised:?}"
    )]
    PeerUrlsDiffer {
        /// `--name`.
        name: String,
        /// URLs in `--initial-cluster`.
        listed: Vec<String>,
        /// URLs in `--initial-advertise-peer-urls`.
        advertised: Vec<String>,
    },
    /// A first start was cut short and repeated with other flags.
    #[error(
        "the data directory was prepared for member {stored:x}, but the flags describe member \
         {described:x}: start with the flags of the first start, or with an empty directory"
    )]
    OtherMember {
        /// Id in the data directory.
        stored: u64,
        /// Id that the flags give.
        described: u64,
    },
    /// Election and heartbeat do not fit together, or a similar mistake.
    #[error("consensus settings: {0}")]
    Settings(String),
    /// State on disk contains entries that the log does not.
    #[error(
        "the log ends at {log}, but the state has applied {state}: the log was lost or replaced; \
         restore a snapshot, or replace this member"
    )]
    LogLost {
        /// Last index of the log.
        log: u64,
        /// Applied index of the state.
        state: u64,
    },
    /// The log begins behind the state, so entries between them are gone.
    #[error(
        "the state has applied {state}, but the log begins after {log}: the state was lost or \
         replaced; restore a snapshot, or replace this member"
    )]
    StateLost {
        /// Last index that was purged from the log.
        log: u64,
        /// Applied index of the state.
        state: u64,
    },
    /// The data of an etcd cannot be taken over.
    #[error("take over the data of etcd: {0}")]
    Adopt(#[from] crate::adopt::AdoptError),
    /// The log cannot be opened.
    #[error("open the log: {0}")]
    Log(#[from] kelson_storage::log::LogError),
    /// The state or the data directory cannot be opened.
    #[error("open the data directory: {0}")]
    Store(#[from] kelson_storage::OpenError),
    /// What this member stored cannot be used; which member it is, its directory still tells.
    #[error("{source}")]
    Unusable {
        /// Its id.
        member: u64,
        /// Why.
        source: Box<StartError>,
    },
    /// Bytes in the log or the state that cannot be ours.
    #[error("read the log: {0}")]
    Decode(#[from] DecodeError),
    /// The consensus library gave up.
    #[error("start consensus: {0}")]
    Consensus(String),
    /// The system has no randomness or no threads.
    #[error("{0}")]
    System(String),
}

impl StartError {
    /// Adds the id of the member whose directory it is.
    pub(crate) fn of(self, member: Option<u64>) -> Self {
        match member {
            Some(member) => Self::Unusable { member, source: Box::new(self) },
            None => self,
        }
    }

    /// The member that it is about, where that is known.
    pub fn member(&self) -> Option<u64> {
        match self {
            Self::Unusable { member, .. } => Some(*member),
            Self::AlreadyBootstrapped(member) => Some(*member),
            _ => None,
        }
    }

    /// True if what the member had acknowledged is damaged or gone, so that in a cluster it can only
    /// be replaced.
    pub fn is_loss(&self) -> bool {
        use kelson_storage::OpenError;
        use kelson_storage::log::LogError;
        match self {
            Self::Unusable { source, .. } => source.is_loss(),
            Self::AlreadyBootstrapped(_) | Self::LogLost { .. } | Self::StateLost { .. } => true,
            Self::Decode(_) => true,
            // A file that is not ours by its first bytes lies where only ours are: they have changed.
            Self::Log(error) => matches!(
                error,
                LogError::Corrupt { .. }
                    | LogError::Missing { .. }
                    | LogError::NoVote { .. }
                    | LogError::Foreign { .. }
            ),
            Self::Store(error) => matches!(error, OpenError::Damaged { .. }),
            _ => false,
        }
    }
}

/// Ends the process: durability or determinism can no longer be promised. Never returns, runs no
/// destructors, so that nothing is written after the failure.
pub(crate) fn abort(doing: &str, cause: &dyn Display) -> ! {
    tracing::error!(doing, %cause, "fatal: the process ends to protect the data");
    std::process::abort()
}
