//! Finding the members of a cluster that is about to start, without listing them: from DNS (`srv`)
//! or from a running etcd that collects those who want to form it (`service`). Both only turn flags
//! into the list that `--initial-cluster` would have held; a member that has data never comes here.

pub mod dns;
pub mod service;
pub mod srv;

/// Why the members could not be found.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct DiscoveryError(pub String);

/// Name and peer URLs of each first member.
pub type Members = Vec<(String, Vec<String>)>;
