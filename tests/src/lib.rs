//! Test harness: starts members as processes, speaks gRPC to them and runs golden scripts. It looks
//! at Kelson only from outside, through the same doors that any client of etcd uses, so that every
//! check can be pointed at a real etcd as well.

pub mod client;
pub mod cluster;
pub mod contest;
pub mod forge;
pub mod format;
pub mod image;
pub mod json;
pub mod ledger;
pub mod parse;
pub mod pings;
pub mod script;
pub mod server;
pub mod tools;
pub mod users;
pub mod watch;
