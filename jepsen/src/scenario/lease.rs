//! Scenarios of leases. Each lease has a key of its own, outside what the load writes; it must live as
//! long as its owner was promised, and not much longer.

use std::io;
use std::time::{Duration, Instant};

use kelson_api::etcdserverpb as pb;
use pb::kv_client::KvClient;
use pb::lease_client::LeaseClient;
use tonic::Status;
use tonic::transport::{Channel, Endpoint};

use super::{cast, note, recovered, wait};
use crate::client::{Client, get};
use crate::fabric;
use crate::page::Order;
use crate::run::Run;

/// Time to live of all leases here. Unit: seconds.
const TTL: u64 = 5;
/// A new leader starts the time anew, and an election takes its time.
const LATE: Duration = Duration::from_secs(TTL + 10);

fn channel(member: usize) -> Channel {
    Endpoint::from_shared(format!("http://{}:2379", fabric::address(member)))
        .expect("an address is a valid URI")
        .connect_timeout(Duration::from_secs(1))
        .timeout(Duration::from_secs(5))
        .connect_lazy()
}

/// A lease that nobody renews, and its key.
struct Held {
    key: String,
    /// Before the grant was asked for: the promise cannot have begun earlier.
    asked: Instant,
}

async fn grant(member: usize, number: usize) -> Result<Held, Status> {
    let asked = Instant::now();
    let request = pb::LeaseGrantRequest { ttl: TTL as i64, id: 0 };
    let lease = LeaseClient::new(channel(member)).lease_grant(request).await?.into_inner();
    let key = format!("leased/{number}");
    let put = pb::PutRequest {
        key: key.clone().into(),
        value: "held".into(),
        lease: lease.id,
        ..Default::default()
    };
    KvClient::new(channel(member)).put(put).await?;
    Ok(Held { key, asked })
}

/// Watches a key through a member until it is gone; it may not go early nor stay for long.
async fn outlive(run: &Run, held: &Held, through: usize) {
    let client = Client::new(through, Duration::from_secs(2));
    loop {
        let begun = Instant::now();
        if let Ok(answer) = client.range(get(&held.key, false)).await {
            // The promise runs at least to here, as seen by whoever asked for it.
            let kept = Instant::now().duration_since(held.asked) > Duration::from_secs(TTL);
            if answer.rows.is_empty() {
                let age = held.asked.elapsed().as_secs_f64();
                run.say(&format!("{} is gone after {age:.2} s", held.key));
                if !kept {
                    run.finding(format!(
                        "{}: the lease of {TTL} s ended after {age:.2} s",
                        held.key
                    ));
                }
                return;
            }
        }
        if begun.duration_since(held.asked) > LATE {
            run.finding(format!("{}: the lease of {TTL} s has not ended after {LATE:?}", held.key));
            return;
        }
        wait(0.02).await;
    }
}

/// The leader is killed at different moments of a lease's life.
pub(super) async fn leader_change(run: &Run) -> io::Result<()> {
    for (round, moment) in [0.5, 3.0, 4.8].into_iter().enumerate() {
        let (leader, others) = cast(run).await?;
        let held = grant(leader, round).await.map_err(io::Error::other)?;
        wait(moment).await;
        let from = run.clock.seconds();
        run.cluster.lock().kill(leader)?;
        outlive(run, &held, others[0]).await;
        run.cluster.lock().restart(leader)?;
        note(run, "the leader of a lease is gone", from, &[leader]);
        recovered(run, "after the end of the leader").await?;
    }
    Ok(())
}

/// The wall clock of the leader jumps an hour ahead, then an hour back, in the life of leases.
pub(super) async fn clock(run: &Run) -> io::Result<()> {
    const HOUR_NS: i64 = 3_600_000_000_000;
    for (round, jump) in [HOUR_NS, -HOUR_NS].into_iter().enumerate() {
        let (leader, others) = cast(run).await?;
        let held = grant(leader, round).await.map_err(io::Error::other)?;
        wait(1.0).await;
        let from = run.clock.seconds();
        let set = |value| {
            let cluster = run.cluster.lock();
            let page = cluster.page(leader).ok_or_else(|| io::Error::other("no page"))?;
            if !page.alive()? {
                return Err(io::Error::other("the leader runs without the preloaded library"));
            }
            page.set(Order::ShiftClock, value)
        };
        set(jump)?;
        outlive(run, &held, others[0]).await;
        set(0)?;
        note(run, "the leader's wall clock is an hour off", from, &[leader]);
        recovered(run, "after the jump of the clock").await?;
    }
    Ok(())
}
