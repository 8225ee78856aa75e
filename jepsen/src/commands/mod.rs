//! One module per command.

pub(crate) mod both;
pub(crate) mod failover;
pub(crate) mod replace;
pub(crate) mod run;
pub(crate) mod smoke;
pub(crate) mod storm;
pub(crate) mod wiped;
