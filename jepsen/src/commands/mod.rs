//! One module per command.

pub(crate) mod both;
pub(crate) mod failover;
pub(crate) mod known_bad;
pub(crate) mod matrix;
pub(crate) mod mutants;
pub(crate) mod replace;
pub(crate) mod replay;
pub(crate) mod report;
pub(crate) mod run;
pub(crate) mod scenario;
pub(crate) mod shrink;
pub(crate) mod smoke;
pub(crate) mod soak;
pub(crate) mod storm;
pub(crate) mod wiped;
