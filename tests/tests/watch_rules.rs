//! Watchers of one member under concurrent writes: from the beginning, from the past, and asked for
//! progress all the while. Each sees the history that the writers made, every event once and right; a
//! watcher that takes nothing stops nobody. `KELSON_BIN` names another binary.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use kelson_api::etcdserverpb as pb;
use kelson_tests::run;
use kelson_tests::server::{Server, kelson_binary};
use kelson_tests::watch::{Watcher, Written, judge, progress};
use pb::kv_client::KvClient;
use pb::request_op::Request as Op;
use tonic::transport::Channel;

const WRITERS: usize = 4;
/// Each makes one revision. Together more than a new watcher may be behind and still be live.
const COMMANDS: usize = 700;
const PATIENCE: Duration = Duration::from_secs(60);

fn channel(server: &Server) -> Channel {
    Channel::from_shared(server.endpoint()).expect("a URL").connect_lazy()
}

fn put(key: &str, value: &str) -> Op {
    let (key, value) = (key.to_owned().into(), value.to_owned().into());
    Op::RequestPut(pb::PutRequest { key, value, ..Default::default() })
}

fn delete(key: &str) -> Op {
    Op::RequestDeleteRange(pb::DeleteRangeRequest {
        key: key.to_owned().into(),
        ..Default::default()
    })
}

/// Writes on keys of its own: puts, and transactions that change up to three keys.
async fn write(channel: Channel, writer: usize, done: Arc<AtomicUsize>) -> Written {
    let mut kv = KvClient::new(channel);
    let mut written = Written::new();
    let key = |number: usize| format!("{writer}/{}", number % 5);
    for number in 0..COMMANDS {
        let value = format!("{writer}.{number}");
        let mut changes = vec![(key(number), Some(value.clone()))];
        if number % 4 == 3 {
            // These two were put by the commands before.
            changes.push((key(number + 4), Some(format!("{value}+"))));
            changes.push((key(number + 3), None));
        }
        let ops = changes.iter().map(|(key, value)| match value {
            Some(value) => put(key, value),
            None => delete(key),
        });
        let success = ops.map(|op| pb::RequestOp { request: Some(op) }).collect();
        let txn = pb::TxnRequest { success, ..Default::default() };
        let answer = kv.txn(txn).await.expect("a txn").into_inner();
        let mut responses = answer.responses.into_iter().filter_map(|response| response.response);
        let deleted = responses.find_map(|response| match response {
            pb::response_op::Response::ResponseDeleteRange(response) => Some(response.deleted),
            _ => None,
        });
        if deleted == Some(0) {
            changes.pop();
        }
        let revision = answer.header.expect("a header").revision;
        assert!(written.insert(revision, changes).is_none(), "revision {revision} twice");
        done.fetch_add(1, Ordering::Relaxed);
    }
    written
}

#[test]
fn every_watcher_sees_the_history_that_was_written() {
    run(async {
        let server = Server::start(&kelson_binary(), &[]);
        let done = Arc::new(AtomicUsize::new(0));
        let mut watchers = vec![Watcher::open(&channel(&server), 1).await];
        let questions = watchers[0].questions();
        let asking = tokio::spawn(async move {
            while questions.send(progress()).await.is_ok() {
                tokio::time::sleep(Duration::from_millis(3)).await;
            }
        });
        let writers: Vec<_> = (0..WRITERS)
            .map(|writer| tokio::spawn(write(channel(&server), writer, done.clone())))
            .collect();
        let last = 1 + (WRITERS * COMMANDS) as i64;
        let collecting = tokio::spawn(async move {
            let mut first = watchers.remove(0);
            first.until(last, PATIENCE).await
        });
        let mut late = Vec::new();
        for part in 1..=4 {
            while done.load(Ordering::Relaxed) < part * WRITERS * COMMANDS / 4 {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
            let mut watcher = Watcher::open(&channel(&server), 2).await;
            late.push(tokio::spawn(async move { watcher.until(last, PATIENCE).await }));
        }
        let mut written = Written::new();
        for writer in writers {
            written.extend(writer.await.expect("a writer does not panic"));
        }
        assert_eq!(written.len(), WRITERS * COMMANDS, "two writers got one revision");
        assert!(written.keys().copied().eq(2..=last), "revisions were left out");
        let live = collecting.await.expect("no panic").expect("the live watcher");
        asking.abort();
        let told = live.iter().filter(|response| response.events.is_empty()).count();
        assert!(told > 10, "progress was told {told} times only");
        judge(&live, &written, 1).expect("the live watcher");
        for (number, watcher) in late.into_iter().enumerate() {
            let seen = watcher.await.expect("no panic").expect("a late watcher");
            judge(&seen, &written, 2).unwrap_or_else(|why| panic!("late watcher {number}: {why}"));
        }
    });
}

#[test]
fn a_watcher_that_takes_nothing_stops_nobody() {
    run(async {
        let server = Server::start(&kelson_binary(), &[]);
        let idle = Watcher::open(&channel(&server), 1).await;
        let mut other = Watcher::open(&channel(&server), 1).await;
        let seeing = tokio::spawn(async move { other.until(401, 4 * PATIENCE).await });
        let mut kv = KvClient::new(channel(&server));
        let value = "v".repeat(100_000);
        for number in 0..400 {
            let Op::RequestPut(put) = put(&format!("{}", number % 7), &value) else { continue };
            let answer = tokio::time::timeout(PATIENCE / 2, kv.put(put)).await;
            answer.expect("a put waits for a watcher").expect("a put");
        }
        // However long the writes took, the other watcher is hardly behind them.
        let seen = tokio::time::timeout(PATIENCE / 4, seeing).await;
        let seen = seen.expect("the watcher beside the idle one gets nothing");
        let seen = seen.expect("no panic").expect("the watcher beside the idle one");
        assert_eq!(seen.iter().map(|response| response.events.len()).sum::<usize>(), 400);
        drop(idle);
    });
}
