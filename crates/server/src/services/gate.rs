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
    /// # Errors
    /// As [`Gate::unary`].
    pub fn stream(
        &self,
        metadata: &MetadataMap,
        extensions: &Extensions,
        learner_serves: bool,
    ) -> Result<(Caller, LeaderWatch), Error> {
        let required = self.admit(metadata, learner_serves)?;
        let leader = LeaderWatch { gate: self.clone(), required, misses: 0 };
        Ok((self.callers.caller(metadata, extensions), leader))
    }

    /// Returns whether the client requires a leader.
    fn admit(&self, metadata: &MetadataMap, learner_serves: bool) -> Result<bool, Error> {
        let status = self.node.status();
        if status.is_learner && !learner_serves {
            return Err(Error::NotSupportedForLearner);
        }
        let version = metadata.get("client-api-version");
        if version.is_some_and(|text| std::str::from_utf8(text.as_bytes()).is_err()) {
            return Err(Error::InvalidClientApiVersion);
        }
        let required = metadata.get("hasleader").is_some_and(|text| text.as_bytes() == b"true");
        if required && status.leader.is_none() {
            return Err(Error::NoLeader);
        }
        Ok(required)
    }
}

/// Tells an open stream that it must end: its member has been without a leader for too long, or
/// the server stops.
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
