//! Crash points: records every storage call of a real run of one member, makes the files that a kill or
//! a power cut after each of them would leave, starts a member on them and judges what it found. It
//! stands outside of everything: it knows the storage only by its public doors and its system calls.
//! Simulated clusters (`cluster`) are the other half: whole members with a network, disks and a clock
//! that obey a seed.

pub mod args;
pub mod cluster;
pub mod cuts;
pub mod disk;
pub mod enumerate;
pub mod flaw;
pub mod image;
pub mod member;
pub mod model;
pub mod plan;
pub mod promise;
pub mod record;
pub mod recover;
pub mod rng;
pub mod run;
mod sys;
pub mod trace;
pub mod worker;
