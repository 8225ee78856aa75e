//! What every call must pass before its service looks at it: a learner serves next to nothing,
//! the client's API version must be text, and a client that asks for a leader gets one or an
//! error. What it lets through comes with its caller, of whom the service must ask what he may do. It
//! reads the member's status only; requests themselves are checked by `validate`.

use std::sync::Arc;
use std::time::Duration;

use kelson_api::Error;
use kelson_raft::Node;
use tokio::sync::watch;
use tonic::metadata::MetadataMap;
use tonic::{Extensions, Request};

use crate::app::App;
use crate::callers::{Caller, Callers};

/// Election timeouts without a leader after which a stream that requires one is ended.
const MISSES_MAX: u32 = 3;

/// Admits calls to this member.
#[derive(Clone)]
pub struct Gate {
    node: Node,
    callers: Arc<Callers>,
    election: Duration,
    stopping: watch::Receiver<bool>,
}

impl Gate {
    /// A gate in front of the member of `app`.
    #[must_use]
    pub fn new(app: &App) -> Self {
        Self {
            node: app.node.clone(),
            callers: Arc::clone(&app.callers),
            election: app.limits.election_timeout,
            stopping: app.stopping.clone(),
        }
    }

    /// Admits a unary call. `learner_serves` says whether a learner answers this request.
    ///
    /// # Errors
    /// `NotSupportedForLearner`, `InvalidClientApiVersion`, `NoLeader`.
    pub fn unary(
        &self,
        metadata: &MetadataMap,
        extensions: &Extensions,
        learner_serves: bool,
    ) -> Result<Caller, Error> {
        self.admit(metadata, learner_serves)?;
        Ok(self.callers.caller(metadata, extensions))
    }

    /// Admits a unary call that no learner serves, and gives its caller and the message in it.
    ///
    /// # Errors
    /// As [`Gate::unary`].
    pub fn take<T>(&self, request: Request<T>) -> Result<(Caller, T), Error> {
        let caller = self.unary(request.metadata(), request.extensions(), false)?;
        Ok((caller, request.into_inner()))
    }

    /// Admits a stream; beside the caller it returns what tells later when a required leader is gone.
    ///
    /// A stream that requires a leader waits for one as long as an open one would stay without. etcd
    /// refuses it at once, which ends watches for good whenever leadership moves: clients whose
    /// member stops come to another that has not heard of the new leader yet, and to them
    /// `no leader` is the one failure of a watch that they do not try again.
    ///
    /// # Errors
    /// As [`Gate::unary`], and `Stopped` when the server stops meanwhile.
    ///
    /// # Cancel safety
    /// Dropping the future has no effect.
    pub async fn stream(
        &self,
        metadata: &MetadataMap,
        extensions: &Extensions,
        learner_serves: bool,
    ) -> Result<(Caller, LeaderWatch), Error> {
        let required = self.may_ask(metadata, learner_serves)?;
        let leader = LeaderWatch { gate: self.clone(), required, misses: 0 };
        if required {
            self.leader(leader.clone()).await?;
        }
        Ok((self.callers.caller(metadata, extensions), leader))
    }

    /// Returns once the member knows a leader.
    async fn leader(&self, mut patience: LeaderWatch) -> Result<(), Error> {
        let mut status = self.node.watch_status();
        tokio::select! {
            known = status.wait_for(|status| status.leader.is_some()) => match known {
                Ok(_) => Ok(()),
                Err(_) => Err(Error::Stopped),
            },
            error = patience.ended() => Err(error),
        }
    }

    fn admit(&self, metadata: &MetadataMap, learner_serves: bool) -> Result<(), Error> {
        let required = self.may_ask(metadata, learner_serves)?;
        if required && self.node.status().leader.is_none() {
            return Err(Error::NoLeader);
        }
        Ok(())
    }

    /// Returns whether the client requires a leader.
    fn may_ask(&self, metadata: &MetadataMap, learner_serves: bool) -> Result<bool, Error> {
        if self.node.status().is_learner && !learner_serves {
            return Err(Error::NotSupportedForLearner);
        }
        let version = metadata.get("client-api-version");
        if version.is_some_and(|text| std::str::from_utf8(text.as_bytes()).is_err()) {
            return Err(Error::InvalidClientApiVersion);
        }
        Ok(metadata.get("hasleader").is_some_and(|text| text.as_bytes() == b"true"))
    }
}

/// Tells an open stream that it must end: its member has been without a leader for too long, or
/// the server stops.
#[derive(Clone)]
pub struct LeaderWatch {
    gate: Gate,
    required: bool,
    misses: u32,
}

impl LeaderWatch {
    /// Returns after three election timeouts in a row without a leader, if the client required
    /// one; never otherwise.
    ///
    /// # Cancel safety
    /// Dropping the future keeps the count of misses; calling again goes on with it.
    pub async fn lost(&mut self) {
        if !self.required {
            return std::future::pending().await;
        }
        while self.misses < MISSES_MAX {
            tokio::time::sleep(self.gate.election).await;
            let lost = self.gate.node.status().leader.is_none();
            self.misses = if lost { self.misses + 1 } else { 0 };
        }
    }

    /// Returns why the stream must end, once it must: as [`LeaderWatch::lost`], or `Stopped` when
    /// the server stops.
    ///
    /// # Cancel safety
    /// As [`LeaderWatch::lost`].
    pub async fn ended(&mut self) -> Error {
        let mut stopping = self.gate.stopping.clone();
        tokio::select! {
            // A closed channel means that the process is past telling: the server stops too.
            _ = stopping.wait_for(|stopping| *stopping) => Error::Stopped,
            () = self.lost() => Error::NoLeader,
        }
    }
}
