//! Leases of the source, with the same ids and times on the target. The target's would end while
//! nobody renews them there, so the mirror does; one that has ended in the source is ended here when
//! its keys are gone, which they are by then. No revision comes of any of this.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use futures::StreamExt;
use kelson_api::etcdserverpb::{
    LeaseGrantRequest, LeaseKeepAliveRequest, LeaseLeasesRequest, LeaseRevokeRequest,
    LeaseTimeToLiveRequest,
};

use super::door::Door;

/// Questions under way at a time, in the first look at a cluster with many leases.
const AT_ONCE: usize = 64;
/// Time of a lease that had ended in the source before anybody could ask; its keys go soon.
const ENDED_TTL: i64 = 60;

/// Leases that the target has.
#[derive(Default)]
pub(super) struct Leases {
    kept: BTreeMap<i64, Kept>,
}

struct Kept {
    /// Seconds, as granted.
    ttl: i64,
    renewed: Instant,
}

impl Leases {
    /// How many there are.
    pub(super) fn len(&self) -> usize {
        self.kept.len()
    }

    /// Makes sure that a lease is there before a key is put on it.
    pub(super) async fn need(
        &mut self,
        id: i64,
        source: &mut Door,
        target: &mut Door,
    ) -> Result<(), String> {
        if id == 0 || self.kept.contains_key(&id) {
            return Ok(());
        }
        let ttl = times(source, &[id]).await?.get(&id).copied().unwrap_or(ENDED_TTL);
        self.grant(id, ttl, target).await
    }

    /// Takes over what was granted in the source since the last look, ends what has ended there, and
    /// renews what is due. `is_level`: the target has every change that the source had when asked.
    pub(super) async fn follow(
        &mut self,
        source: &mut Door,
        target: &mut Door,
        is_level: bool,
    ) -> Result<(), String> {
        if self.kept.is_empty() {
            self.adopt(target).await?;
        }
        let there = all(source).await?;
        let new: Vec<i64> =
            there.iter().filter(|id| !self.kept.contains_key(id)).copied().collect();
        for (id, ttl) in times(source, &new).await? {
            self.grant(id, ttl, target).await?;
        }
        if is_level {
            let over: Vec<i64> =
                self.kept.keys().filter(|id| !there.contains(id)).copied().collect();
            for id in over {
                revoke(target, id).await?;
                self.kept.remove(&id);
            }
        }
        self.renew(target).await
    }

    /// Those that a restored snapshot brought.
    async fn adopt(&mut self, target: &mut Door) -> Result<(), String> {
        let ids: Vec<i64> = all(target).await?.into_iter().collect();
        let renewed = Instant::now();
        for (id, ttl) in times(target, &ids).await? {
            self.kept.insert(id, Kept { ttl, renewed });
        }
        Ok(())
    }

    async fn grant(&mut self, id: i64, ttl: i64, target: &mut Door) -> Result<(), String> {
        let since = Instant::now();
        loop {
            let request = LeaseGrantRequest { id, ttl };
            match target.lease().lease_grant(Door::timed(request)).await {
                Ok(_) => break,
                // An attempt that seemed to fail had gone through.
                Err(status) if status.message().contains("lease already exists") => break,
                Err(status) => target.again(&status, since).await?,
            }
        }
        self.kept.insert(id, Kept { ttl, renewed: Instant::now() });
        Ok(())
    }

    /// Renews each lease when a third of its time has passed.
    async fn renew(&mut self, target: &mut Door) -> Result<(), String> {
        let is_due =
            |kept: &Kept| kept.renewed.elapsed() >= Duration::from_secs(kept.ttl.max(0) as u64) / 3;
        let due: Vec<i64> =
            self.kept.iter().filter(|(_, kept)| is_due(kept)).map(|(id, _)| *id).collect();
        if due.is_empty() {
            return Ok(());
        }
        let since = Instant::now();
        loop {
            match keep_alive(target, &due).await {
                Ok(()) => break,
                Err(status) => target.again(&status, since).await?,
            }
        }
        let now = Instant::now();
        for id in due {
            if let Some(kept) = self.kept.get_mut(&id) {
                kept.renewed = now;
            }
        }
        Ok(())
    }
}

async fn keep_alive(target: &Door, ids: &[i64]) -> Result<(), tonic::Status> {
    let requests: Vec<_> = ids.iter().map(|id| LeaseKeepAliveRequest { id: *id }).collect();
    let stream = Door::timed(futures::stream::iter(requests));
    let mut answers = target.lease().lease_keep_alive(stream).await?.into_inner();
    for _ in ids {
        // A lease that is gone has an answer, too: its next key would be refused, loudly.
        if answers.message().await?.is_none() {
            return Err(tonic::Status::unavailable("the renewals ended early"));
        }
    }
    Ok(())
}

async fn all(door: &mut Door) -> Result<BTreeSet<i64>, String> {
    let since = Instant::now();
    loop {
        match door.lease().lease_leases(Door::timed(LeaseLeasesRequest {})).await {
            Ok(reply) => {
                let leases = reply.into_inner().leases;
                return Ok(leases.into_iter().map(|lease| lease.id).collect());
            }
            Err(status) => door.again(&status, since).await?,
        }
    }
}

/// Granted times of those leases that are still there. Unit: seconds.
async fn times(door: &mut Door, ids: &[i64]) -> Result<BTreeMap<i64, i64>, String> {
    let since = Instant::now();
    loop {
        let client = door.lease();
        let asking = futures::stream::iter(ids.iter().copied()).map(|id| {
            let mut client = client.clone();
            async move {
                let request = LeaseTimeToLiveRequest { id, keys: false };
                client.lease_time_to_live(Door::timed(request)).await
            }
        });
        let answers: Vec<_> = asking.buffered(AT_ONCE).collect().await;
        let mut found = BTreeMap::new();
        let mut failed = None;
        for answer in answers {
            match answer.map(tonic::Response::into_inner) {
                Ok(reply) if reply.ttl > 0 => {
                    found.insert(reply.id, reply.granted_ttl);
                }
                Ok(_) => {}
                Err(status) if status.message().contains("lease not found") => {}
                Err(status) => failed = Some(status),
            }
        }
        match failed {
            None => return Ok(found),
            Some(status) => door.again(&status, since).await?,
        }
    }
}

async fn revoke(target: &mut Door, id: i64) -> Result<(), String> {
    let since = Instant::now();
    loop {
        match target.lease().lease_revoke(Door::timed(LeaseRevokeRequest { id })).await {
            Ok(_) => return Ok(()),
            Err(status) if status.message().contains("lease not found") => return Ok(()),
            Err(status) => target.again(&status, since).await?,
        }
    }
}
