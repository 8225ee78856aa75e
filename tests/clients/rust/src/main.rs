//! Drives the store with the `etcd-client` crate: put, get, delete, transaction, watch, lease, lock,
//! election and, where AUTH is set, users.
//! It never prints anything on success; the first surprise ends it with a message and status 1.

use std::time::Duration;

use etcd_client::{
    Client, Compare, CompareOp, ConnectOptions, DeleteOptions, EventType, GetOptions, LockOptions,
    Permission, ProclaimOptions, PutOptions, ResignOptions, SortOrder, SortTarget, Txn, TxnOp,
    WatchOptions,
};

const PREFIX: &str = "client-rust/";

#[tokio::main]
async fn main() {
    let endpoint = std::env::var("ENDPOINT").expect("ENDPOINT names the store");
    let work = check(endpoint);
    let outcome = tokio::time::timeout(Duration::from_secs(60), work).await;
    let failure = match outcome {
        Ok(Ok(())) => return,
        Ok(Err(error)) => error.to_string(),
        Err(_) => "not done after 60 s".to_string(),
    };
    eprintln!("{failure}");
    std::process::exit(1);
}

type Outcome = Result<(), Box<dyn std::error::Error>>;

async fn check(endpoint: String) -> Outcome {
    let mut client = Client::connect([endpoint.clone()], None).await?;
    client.delete(PREFIX, Some(DeleteOptions::new().with_prefix())).await?;
    keys(&mut client).await?;
    transactions(&mut client).await?;
    watches(&mut client).await?;
    leases(&mut client).await?;
    errors(&mut client).await?;
    let mut other = Client::connect([endpoint.clone()], None).await?;
    locks(&mut client, &mut other).await?;
    elections(&mut client, &mut other).await?;
    if std::env::var_os("AUTH").is_some() {
        users(&mut client, &endpoint).await?;
    }
    Ok(())
}

async fn keys(client: &mut Client) -> Outcome {
    let first = revision(client.put(key("a"), "1", None).await?.header());
    let put = client.put(key("a"), "2", Some(PutOptions::new().with_prev_key())).await?;
    assert_eq!(revision(put.header()), first + 1, "a put raises the revision by one");
    assert_eq!(put.prev_key().map(|kv| kv.value()), Some(&b"1"[..]), "the previous value");
    client.put(key("b"), "x", None).await?;
    let sorted = GetOptions::new()
        .with_prefix()
        .with_limit(1)
        .with_sort(SortTarget::Key, SortOrder::Descend);
    let got = client.get(PREFIX, Some(sorted)).await?;
    assert_eq!((got.count(), got.more(), got.kvs().len()), (2, true, 1), "a limited list");
    assert_eq!(got.kvs()[0].key(), key("b").as_bytes(), "descending order");
    let old = client.get(key("a"), Some(GetOptions::new().with_revision(first))).await?;
    assert_eq!(old.kvs()[0].value(), b"1", "the value at an old revision");
    let gone = client.delete(PREFIX, Some(DeleteOptions::new().with_prefix())).await?;
    assert_eq!(gone.deleted(), 2, "keys deleted");
    Ok(())
}

async fn transactions(client: &mut Client) -> Outcome {
    let create = Txn::new()
        .when([Compare::create_revision(key("t"), CompareOp::Equal, 0)])
        .and_then([TxnOp::put(key("t"), "first", None)])
        .or_else([TxnOp::get(key("t"), None)]);
    assert!(client.txn(create.clone()).await?.succeeded(), "the first create");
    let second = client.txn(create).await?;
    assert!(!second.succeeded(), "the second create");
    let responses = second.op_responses();
    let etcd_client::TxnOpResponse::Get(found) = &responses[0] else {
        return Err(format!("a read answered with {responses:?}").into());
    };
    assert_eq!(found.kvs()[0].value(), b"first", "the value found by the transaction");
    Ok(())
}

async fn watches(client: &mut Client) -> Outcome {
    let from = revision(client.put(key("w"), "0", None).await?.header());
    let options = WatchOptions::new().with_prefix().with_start_revision(from).with_prev_key();
    let mut stream = client.watch(key("w"), Some(options)).await?;
    client.put(key("w"), "1", None).await?;
    client.delete(key("w"), None).await?;
    let mut seen = Vec::new();
    let mut watch_id = -1;
    while seen.len() < 3 {
        let response = stream.message().await?.ok_or("the watch ended early")?;
        watch_id = response.watch_id();
        for event in response.events() {
            let kv = event.kv().ok_or("an event without a key")?;
            seen.push((event.event_type(), kv.mod_revision() - from, kv.value().to_vec()));
        }
    }
    let want = [
        (EventType::Put, 0, b"0".to_vec()),
        (EventType::Put, 1, b"1".to_vec()),
        (EventType::Delete, 2, Vec::new()),
    ];
    assert_eq!(seen, want, "events of the watch");
    stream.cancel(watch_id).await?;
    while let Some(response) = stream.message().await? {
        if response.canceled() {
            return Ok(());
        }
    }
    Err("the stream ended without confirming the cancellation".into())
}

async fn leases(client: &mut Client) -> Outcome {
    let lease = client.lease_grant(60, None).await?.id();
    client.put(key("l"), "", Some(PutOptions::new().with_lease(lease))).await?;
    let (mut keeper, mut answers) = client.lease_keep_alive(lease).await?;
    keeper.keep_alive().await?;
    let kept = answers.message().await?.ok_or("the keep-alive stream ended")?;
    assert_eq!(kept.ttl(), 60, "the time to live after a keep-alive");
    let options = etcd_client::LeaseTimeToLiveOptions::new().with_keys();
    let left = client.lease_time_to_live(lease, Some(options)).await?;
    assert_eq!(left.keys(), [key("l").into_bytes()], "keys of the lease");
    client.lease_revoke(lease).await?;
    assert_eq!(client.get(key("l"), None).await?.count(), 0, "the key after the revocation");

    let short = client.lease_grant(2, None).await?.id();
    client.put(key("s"), "", Some(PutOptions::new().with_lease(short))).await?;
    while client.get(key("s"), None).await?.count() != 0 {
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    Ok(())
}

async fn errors(client: &mut Client) -> Outcome {
    let refused = client.put("", "", None).await.expect_err("an empty key has to be refused");
    let etcd_client::Error::GRpcStatus(status) = refused else {
        return Err(format!("an empty key gave {refused}").into());
    };
    assert_eq!(status.message(), "etcdserver: key is not provided", "the text for an empty key");
    Ok(())
}

/// A lock is the server's service: the second client waits for the first one's release.
async fn locks(client: &mut Client, other: &mut Client) -> Outcome {
    let first = client.lease_grant(30, None).await?.id();
    let second = other.lease_grant(30, None).await?.id();
    let under = |lease| Some(LockOptions::new().with_lease(lease));
    let held = client.lock(key("lock"), under(first)).await?.key().to_vec();
    assert!(held.starts_with(key("lock/").as_bytes()), "the key of the lock");
    let owner = client.get(held.clone(), None).await?;
    assert_eq!(owner.kvs()[0].lease(), first, "the lease of the lock");
    let mut waiter = other.clone();
    let waiting = tokio::spawn(async move {
        waiter.lock(key("lock"), under(second)).await.map(|answer| answer.key().to_vec())
    });
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert!(!waiting.is_finished(), "a lock that is held was given");
    client.unlock(held.clone()).await?;
    let next = waiting.await??;
    assert_ne!(next, held, "the next owner's key");
    assert_eq!(client.get(held, None).await?.count(), 0, "the first owner's key");
    other.lease_revoke(second).await?;
    assert_eq!(client.get(next, None).await?.count(), 0, "the key after the end of its lease");
    client.lease_revoke(first).await?;
    Ok(())
}

async fn elections(client: &mut Client, other: &mut Client) -> Outcome {
    let first = client.lease_grant(30, None).await?.id();
    let second = other.lease_grant(30, None).await?.id();
    let nobody = client.leader(key("election")).await.expect_err("nobody leads yet");
    assert_eq!(text(nobody)?, "election: no leader", "the text for no leader");
    let won = client.campaign(key("election"), "one", first).await?;
    // The call is answered with the first leader, so there has to be one.
    let mut observed = other.observe(key("election")).await?;
    let leader = won.leader().ok_or("a campaign without a leader")?.clone();
    assert_eq!(leader.lease(), first, "the lease of the leader");
    let mut candidate = other.clone();
    let waiting =
        tokio::spawn(async move { candidate.campaign(key("election"), "two", second).await });
    let mut seen = Vec::new();
    seen.push(next_leader(&mut observed).await?);
    let of = |leader| Some(ProclaimOptions::new().with_leader(leader));
    client.proclaim("one again", of(leader.clone())).await?;
    seen.push(next_leader(&mut observed).await?);
    assert!(!waiting.is_finished(), "two leaders at once");
    client.resign(Some(ResignOptions::new().with_leader(leader.clone()))).await?;
    let next = waiting.await??;
    seen.push(next_leader(&mut observed).await?);
    assert_eq!(seen, ["one", "one again", "two"], "leaders seen");
    let late = client.proclaim("late", of(leader)).await.expect_err("its term has ended");
    assert_eq!(text(late)?, "election: not leader", "the text for a late proclamation");
    let next = next.leader().ok_or("a campaign without a leader")?.clone();
    other.resign(Some(ResignOptions::new().with_leader(next))).await?;
    client.lease_revoke(first).await?;
    other.lease_revoke(second).await?;
    Ok(())
}

async fn next_leader(
    observed: &mut etcd_client::ObserveStream,
) -> Result<String, Box<dyn std::error::Error>> {
    let response = observed.message().await?.ok_or("the observation ended")?;
    let kv = response.kv().ok_or("a leader without a key")?;
    Ok(kv.value_str()?.to_string())
}

/// Leaves the store without users again.
async fn users(client: &mut Client, endpoint: &str) -> Outcome {
    let own = key("own/");
    client.role_add("rust-role").await?;
    let permission = Permission::read_write(own.clone()).with_prefix();
    client.role_grant_permission("rust-role", permission).await?;
    client.user_add("rust-user", "pw", None).await?;
    client.user_grant_role("rust-user", "rust-role").await?;
    client.user_add("root", "secret", None).await?;
    client.user_grant_role("root", "root").await?;
    client.auth_enable().await?;
    let of = |name: &str, password: &str| Some(ConnectOptions::new().with_user(name, password));
    let mut root = Client::connect([endpoint], of("root", "secret")).await?;
    let mut user = Client::connect([endpoint], of("rust-user", "pw")).await?;
    user.put(format!("{own}a"), "1", None).await?;
    let denied = user.put(key("a"), "1", None).await.expect_err("outside the permission");
    assert_eq!(text(denied)?, "etcdserver: permission denied", "the text for no permission");
    let nobody = client.get(key("a"), None).await.expect_err("nobody's read");
    assert_eq!(text(nobody)?, "etcdserver: user name is empty", "the text for no name");
    let users = root.user_list().await?;
    assert_eq!(users.users(), ["root", "rust-user"], "users");
    root.auth_disable().await?;
    client.user_delete("rust-user").await?;
    client.user_delete("root").await?;
    client.role_delete("rust-role").await?;
    Ok(())
}

/// The server's own text of a refusal.
fn text(error: etcd_client::Error) -> Result<String, Box<dyn std::error::Error>> {
    match error {
        etcd_client::Error::GRpcStatus(status) => Ok(status.message().to_string()),
        other => Err(other.into()),
    }
}

fn key(name: &str) -> String {
    format!("{PREFIX}{name}")
}

fn revision(header: Option<&etcd_client::ResponseHeader>) -> i64 {
    header.expect("every answer has a header").revision()
}
