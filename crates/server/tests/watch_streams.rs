//! What one client sees on its watch stream, case by case: the rules of etcd's Watch call.

mod watch_support;

use std::time::Duration;

use futures::FutureExt;
use kelson_api::Error;
use kelson_api::etcdserverpb::{WatchCreateRequest, WatchRequest, WatchResponse};
use kelson_server::watch::Tuning;
use tokio::task::yield_now;
use tonic::{Code, Status};

use watch_support::{Client, World, brief, create, header_revision, is_progress};

fn from(key: &str, range_end: &str, start_revision: i64) -> WatchCreateRequest {
    WatchCreateRequest { start_revision, ..create(key, range_end) }
}

async fn created(client: &mut Client, request: WatchCreateRequest) -> WatchResponse {
    client.create(request);
    let response = client.next().await;
    assert!(response.created && !response.canceled, "{response:?}");
    response
}

/// Nothing comes, however often all tasks get their turn.
async fn assert_silent(client: &mut Client) {
    for _ in 0..50 {
        assert_eq!(client.poll(), None);
        yield_now().await;
    }
}

#[tokio::test]
async fn live_events_come_one_response_per_revision() {
    let world = World::new(1000, Tuning::default());
    world.model.put("a", "0");
    let mut client = world.client();
    let response = created(&mut client, create("a", "c")).await;
    assert_eq!((response.watch_id, header_revision(&response)), (0, 2));
    world.model.apply(&[("b", Some("1")), ("z", Some("1")), ("a", Some("1"))]);
    world.model.put("z", "2");
    world.model.apply(&[("a", None)]);
    let response = client.next().await;
    assert_eq!(brief(&response), [("b".into(), 3), ("a".into(), 3)]);
    assert_eq!(header_revision(&response), 3);
    let header = response.header.expect("a header");
    assert_eq!((header.cluster_id, header.member_id, header.raft_term), (11, 22, 3));
    let response = client.next().await;
    assert_eq!((brief(&response), header_revision(&response)), (vec![("a".into(), 5)], 5));
    assert_eq!(response.events[0].r#type, 1);
    assert_eq!(response.events[0].prev_kv, None);
    assert_silent(&mut client).await;
}

/// Events after the created response are live ones, even if they were applied before the hub has
/// heard of the watcher.
#[tokio::test]
async fn what_follows_the_creation_is_live() {
    let world = World::new(1000, Tuning::default());
    for _ in 0..3 {
        world.model.put("a", "past");
    }
    let mut client = world.client();
    client.create(from("a", "", 3));
    client.create(create("a", ""));
    assert_eq!(header_revision(&client.next().await), 4);
    assert_eq!(header_revision(&client.next().await), 4);
    for _ in 0..3 {
        world.model.put("a", "live");
    }
    let mut seen = Vec::new();
    for _ in 0..7 {
        let response = client.next().await;
        let revisions: Vec<i64> = brief(&response).into_iter().map(|(_, rev)| rev).collect();
        if revisions == [3, 4] {
            assert_eq!((response.watch_id, header_revision(&response)), (0, 7));
        } else {
            assert_eq!(revisions, [header_revision(&response)]);
        }
        seen.push((response.watch_id, revisions));
    }
    seen.sort();
    let live = |id| [5, 6, 7].map(|revision| (id, vec![revision]));
    let mut expected = vec![(0, vec![3, 4])];
    expected.extend(live(0));
    expected.extend(live(1));
    assert_eq!(seen, expected);
}

#[tokio::test]
async fn a_failed_create_has_no_watch_id() {
    let world = World::new(1000, Tuning::default());
    let mut client = world.client();
    created(&mut client, WatchCreateRequest { watch_id: 7, ..create("a", "") }).await;
    let refused = [
        (
            WatchCreateRequest { watch_id: 7, ..create("a", "") },
            "mvcc: duplicate watch ID provided on the WatchStream",
        ),
        (create("b", "a"), "mvcc: watcher range is empty"),
        (create("b", "b"), "mvcc: watcher range is empty"),
        (from("a", "", -1), "etcdserver: mvcc: required revision has been compacted"),
    ];
    for (request, reason) in refused {
        client.create(request);
        let response = client.next().await;
        assert!(response.created && response.canceled);
        assert_eq!((response.watch_id, response.cancel_reason.as_str()), (-1, reason));
        assert_eq!((response.compact_revision, header_revision(&response)), (0, 1));
    }
    assert_eq!(created(&mut client, create("", "\0")).await.watch_id, 0);
    assert_eq!(created(&mut client, create("a", "")).await.watch_id, 1);
    world.model.put("q", "1");
    assert_eq!(client.next().await.watch_id, 0);
    assert_silent(&mut client).await;
}

#[tokio::test]
async fn the_past_comes_first_then_the_present() {
    for ring_len in [1, 1000] {
        let world = World::new(ring_len, Tuning { join_gap: 2, ..Tuning::default() });
        for number in 0..6 {
            world.model.put("a", &number.to_string());
        }
        let mut client = world.client();
        let response = created(&mut client, from("a", "", 3)).await;
        assert_eq!(header_revision(&response), 7);
        let mut seen = Vec::new();
        while seen.len() < 5 {
            let response = client.next().await;
            assert_eq!(header_revision(&response), 7);
            seen.extend(brief(&response).into_iter().map(|(_, revision)| revision));
        }
        assert_eq!(seen, [3, 4, 5, 6, 7]);
        world.model.put("a", "live");
        let response = client.next().await;
        assert_eq!((brief(&response), header_revision(&response)), (vec![("a".into(), 8)], 8));
        assert_silent(&mut client).await;
    }
}

#[tokio::test]
async fn a_future_start_waits_in_silence() {
    let world = World::new(1000, Tuning::default());
    let mut client = world.client();
    created(&mut client, from("a", "", 4)).await;
    client.ask_progress();
    world.model.put("a", "1");
    world.model.put("a", "2");
    client.ask_progress();
    assert_silent(&mut client).await;
    world.model.put("a", "3");
    assert_eq!(brief(&client.next().await), [("a".into(), 4)]);
    client.ask_progress();
    let response = client.next().await;
    assert!(is_progress(&response) && header_revision(&response) == 4);
}

#[tokio::test]
async fn a_start_below_the_compaction_is_created_then_canceled() {
    let world = World::new(1, Tuning { join_gap: 0, ..Tuning::default() });
    for _ in 0..8 {
        world.model.put("a", "x");
    }
    world.model.compact(5);
    let mut client = world.client();
    created(&mut client, from("a", "", 4)).await;
    let response = client.next().await;
    assert!(response.canceled && !response.created);
    assert_eq!((response.watch_id, response.compact_revision), (0, 5));
    assert_eq!((header_revision(&response), response.cancel_reason.as_str()), (0, ""));
    client.cancel(0);
    assert_silent(&mut client).await;
    assert_eq!(created(&mut client, from("a", "", 5)).await.watch_id, 1);
    let response = client.next().await;
    assert_eq!(brief(&response)[0], ("a".into(), 5));
    // The canceled watcher does not keep the stream from being synced.
    client.until_progress(9).await;
}

#[tokio::test]
async fn filters_and_prev_kv_are_per_watcher() {
    for ring_len in [1, 1000] {
        let world = World::new(ring_len, Tuning { join_gap: 1, ..Tuning::default() });
        world.model.put("a", "1");
        world.model.put("a", "2");
        world.model.apply(&[("a", None)]);
        world.model.put("a", "3");
        let mut client = world.client();
        let request = WatchCreateRequest { prev_kv: true, filters: vec![0], ..from("a", "", 1) };
        created(&mut client, request).await;
        let response = client.next().await;
        assert_eq!(brief(&response), [("a".into(), 4)]);
        let prev_kv = response.events[0].prev_kv.as_ref().expect("the state before the delete");
        assert_eq!((prev_kv.value.as_ref(), prev_kv.mod_revision), (&b"2"[..], 3));
        let request = WatchCreateRequest { prev_kv: true, filters: vec![1, 5], ..from("a", "", 1) };
        created(&mut client, request).await;
        client.until_progress(5).await;
        world.model.put("a", "4");
        let response = client.next().await;
        assert_eq!((response.watch_id, brief(&response)), (1, vec![("a".into(), 6)]));
        let prev_kv = response.events[0].prev_kv.as_ref().expect("the state before the put");
        assert_eq!(prev_kv.value.as_ref(), b"3");
    }
}

#[tokio::test]
async fn canceling_is_answered_and_final() {
    let world = World::new(1000, Tuning::default());
    let mut client = world.client();
    created(&mut client, create("a", "")).await;
    client.cancel(9);
    client.send_raw(Ok(WatchRequest { request_union: None }));
    client.cancel(0);
    let response = client.next().await;
    assert!(response.canceled && response.cancel_reason.is_empty());
    assert_eq!((response.watch_id, header_revision(&response)), (0, 1));
    world.model.put("a", "1");
    assert_silent(&mut client).await;
    // The id may be used again by name, and only new events come.
    created(&mut client, WatchCreateRequest { watch_id: -3, ..create("a", "") }).await;
    world.model.put("a", "2");
    assert_eq!(client.next().await.watch_id, -3);
    assert_eq!(world.hub.stats().watchers(), 1);
}

#[tokio::test]
async fn canceling_while_catching_up_ends_it() {
    let tuning = Tuning { join_gap: 0, slice_revisions: 1, ..Tuning::default() };
    let world = World::new(1, tuning);
    for _ in 0..500 {
        world.model.put("a", "x");
    }
    let mut client = world.client();
    created(&mut client, from("a", "", 2)).await;
    assert_eq!(brief(&client.next().await), [("a".into(), 2)]);
    assert_eq!(world.hub.stats().slow_watchers(), 1);
    client.ask_progress();
    client.cancel(0);
    loop {
        let response = client.next().await;
        assert!(!is_progress(&response), "a lagging watcher allows no progress answer");
        if response.canceled {
            break;
        }
    }
    assert_silent(&mut client).await;
    assert_eq!((world.hub.stats().slow_watchers(), world.hub.stats().watchers()), (0, 0));
}

#[tokio::test]
async fn compaction_overtakes_a_lagging_watcher() {
    let tuning = Tuning { join_gap: 0, slice_revisions: 3, ..Tuning::default() };
    let world = World::new(1, tuning);
    for _ in 0..50 {
        world.model.put("a", "x");
    }
    let mut client = world.client();
    created(&mut client, from("a", "", 2)).await;
    let mut seen = brief(&client.next().await);
    world.model.compact(40);
    let canceled = loop {
        let response = client.next().await;
        if response.canceled {
            break response;
        }
        seen.extend(brief(&response));
    };
    assert_eq!((canceled.compact_revision, header_revision(&canceled)), (40, 0));
    let revisions: Vec<i64> = seen.into_iter().map(|(_, revision)| revision).collect();
    let expected: Vec<i64> = (2..2 + revisions.len() as i64).collect();
    assert_eq!(revisions, expected);
    assert!(revisions.len() < 38);
}

#[tokio::test]
async fn big_responses_are_cut_only_for_those_who_allow_it() {
    let mut world = World::new(1000, Tuning::default());
    world.options.fragment_bytes = 1000;
    let mut client = world.client();
    created(&mut client, WatchCreateRequest { fragment: true, ..create("k", "l") }).await;
    created(&mut client, create("k", "l")).await;
    let keys: Vec<String> = (0..20).map(|number| format!("k{number:02}")).collect();
    let value = "v".repeat(150);
    let changes: Vec<_> = keys.iter().map(|key| (key.as_str(), Some(value.as_str()))).collect();
    world.model.apply(&changes);
    let mut joined = Vec::new();
    let mut pieces = 0;
    loop {
        let response = client.next().await;
        assert_eq!((response.watch_id, header_revision(&response)), (0, 2));
        joined.extend(brief(&response));
        pieces += 1;
        if !response.fragment {
            break;
        }
    }
    assert!(pieces > 2);
    let whole = client.next().await;
    assert_eq!((whole.watch_id, whole.fragment), (1, false));
    assert_eq!(brief(&whole), joined);
    assert_eq!(joined.len(), 20);
}

#[tokio::test]
async fn progress_needs_watchers() {
    let world = World::new(1000, Tuning::default());
    let mut client = world.client();
    client.ask_progress();
    assert_silent(&mut client).await;
    created(&mut client, create("a", "")).await;
    world.model.put("other", "1");
    client.ask_progress();
    let response = client.next().await;
    assert!(is_progress(&response));
    assert_eq!((response.watch_id, header_revision(&response)), (-1, 2));
    // An answer per request, also right behind a create.
    client.create(create("b", ""));
    client.ask_progress();
    client.ask_progress();
    assert!(client.next().await.created);
    assert!(is_progress(&client.next().await) && is_progress(&client.next().await));
    assert_silent(&mut client).await;
}

#[tokio::test]
async fn idle_watchers_hear_of_progress() {
    let mut world = World::new(1000, Tuning::default());
    world.options.progress_interval = Duration::from_millis(100);
    let mut client = world.client();
    let notified = |key| WatchCreateRequest { progress_notify: true, ..create(key, "") };
    created(&mut client, notified("a")).await;
    created(&mut client, create("b", "")).await;
    created(&mut client, WatchCreateRequest { start_revision: 99, ..notified("c") }).await;
    world.model.put("x", "1");
    for _ in 0..2 {
        let response = client.next().await;
        assert!(is_progress(&response));
        assert_eq!((response.watch_id, header_revision(&response)), (0, 2));
    }
}

#[tokio::test]
async fn a_slow_stream_leaves_the_hub_and_loses_nothing() {
    for (ring_len, tuning) in [
        (10_000, Tuning { queue_len: 4, ..Tuning::default() }),
        (3, Tuning { queue_len: 4, join_gap: 1, slice_revisions: 7, ..Tuning::default() }),
        (10_000, Tuning { queue_bytes: 10, ..Tuning::default() }),
    ] {
        let world = World::new(ring_len, tuning);
        let mut slow = world.client();
        let mut quick = world.client();
        created(&mut slow, create("a", "b")).await;
        created(&mut quick, create("a", "b")).await;
        for number in 0..100 {
            world.model.put(&format!("a{number}"), "value");
            assert_eq!(brief(&quick.next().await).len(), 1);
        }
        assert!(world.hub.stats().streams_overflowed() > 0);
        let responses = slow.until_progress(101).await;
        let seen: Vec<i64> = responses.iter().flat_map(brief).map(|(_, rev)| rev).collect();
        assert_eq!(seen, (2..=101).collect::<Vec<i64>>());
        world.model.put("a", "live again");
        assert_eq!(header_revision(&slow.next().await), 102);
        assert_eq!(header_revision(&quick.next().await), 102);
        assert_eq!(world.hub.stats().pending_events(), 0);
    }
}

#[tokio::test]
async fn a_feed_that_starts_anew_loses_nothing() {
    let world = World::new(1000, Tuning::default());
    let mut client = world.client();
    created(&mut client, create("a", "")).await;
    client.until_progress(1).await;
    for _ in 0..5 {
        world.model.put("a", "x");
    }
    // The hub has not run since: what it finds is a feed that no longer knows these revisions.
    world.model.restart_feed();
    let responses = client.until_progress(6).await;
    let seen: Vec<i64> = responses.iter().flat_map(brief).map(|(_, rev)| rev).collect();
    assert_eq!(seen, [2, 3, 4, 5, 6]);
    world.model.put("a", "live");
    assert_eq!(header_revision(&client.next().await), 7);
}

#[tokio::test]
async fn a_hole_in_the_feed_loses_nothing() {
    let world = World::new(1000, Tuning::default());
    let mut client = world.client();
    created(&mut client, create("a", "")).await;
    client.until_progress(1).await;
    world.model.punch_hole();
    for _ in 0..5 {
        world.model.put("a", "x");
    }
    let responses = client.until_progress(6).await;
    let seen: Vec<i64> = responses.iter().flat_map(brief).map(|(_, rev)| rev).collect();
    assert_eq!(seen, [2, 3, 4, 5, 6]);
}

/// The feed still knows the state before the event at the compaction revision, but it is not told.
#[tokio::test]
async fn the_event_at_the_compaction_has_no_state_before_it() {
    let world = World::new(1000, Tuning::default());
    for _ in 0..5 {
        world.model.put("a", "x");
    }
    world.model.compact(4);
    let mut client = world.client();
    created(&mut client, WatchCreateRequest { prev_kv: true, ..from("a", "", 4) }).await;
    let response = client.next().await;
    assert_eq!(brief(&response).len(), 3);
    let with_prev_kv = response.events.iter().map(|event| event.prev_kv.is_some());
    assert!(with_prev_kv.eq([false, true, true]));
}

#[tokio::test]
async fn compaction_during_a_read_cancels_rather_than_hides_the_state_before() {
    let world = World::new(1, Tuning { join_gap: 0, ..Tuning::default() });
    for _ in 0..10 {
        world.model.put("a", "x");
    }
    for (compacted, is_overtaken) in [(3, false), (4, true)] {
        world.model.compact_after_read(compacted);
        let mut client = world.client();
        created(&mut client, WatchCreateRequest { prev_kv: true, ..from("a", "", 3) }).await;
        let response = client.next().await;
        assert_eq!(response.canceled, is_overtaken, "{response:?}");
        if !is_overtaken {
            // Only the event at the compaction revision itself may come without.
            let with_prev_kv = response.events.iter().map(|event| event.prev_kv.is_some());
            assert!(with_prev_kv.eq((3..=11).map(|revision| revision > 3)));
        }
    }
}

#[tokio::test]
async fn the_stream_ends_as_its_cause_says() {
    let world = World::new(1000, Tuning::default());
    let mut client = world.client();
    created(&mut client, create("a", "")).await;
    client.cancel(0);
    assert!(client.next().await.canceled);
    client.half_close();
    assert!(client.ending().await.is_ok());

    let mut client = world.client();
    client.send_raw(Err(Status::from(Error::WatchCanceled)));
    let status = client.ending().await.expect_err("the client canceled");
    assert_eq!((status.code(), status.message()), (Code::Cancelled, "etcdserver: watch canceled"));

    let status = Status::from(Error::NoLeader);
    let mut client = world.client_that_ends(futures::future::ready(status).boxed());
    let status = client.ending().await.expect_err("there is no leader");
    assert_eq!((status.code(), status.message()), (Code::Unavailable, "etcdserver: no leader"));
    assert_eq!((world.hub.stats().watchers(), world.hub.stats().streams()), (0, 0));
}

/// As etcd does: one-shot clients close their side and listen on.
#[tokio::test]
async fn watchers_outlive_the_clients_side_of_the_stream() {
    let world = World::new(1000, Tuning::default());
    let mut client = world.client();
    client.create(create("a", ""));
    client.ask_progress();
    client.half_close();
    assert!(client.next().await.created);
    assert!(is_progress(&client.next().await));
    world.model.put("a", "1");
    assert_eq!(brief(&client.next().await), [("a".into(), 2)]);
    assert_silent(&mut client).await;
}

#[tokio::test]
async fn streams_end_with_the_hub() {
    let world = World::new(1000, Tuning::default());
    let mut client = world.client();
    created(&mut client, create("a", "")).await;
    client.until_progress(1).await;
    world.task.abort();
    let status = client.ending().await.expect_err("the hub is gone");
    let expected = (Code::Unavailable, "etcdserver: server stopped");
    assert_eq!((status.code(), status.message()), expected);
}

#[tokio::test]
async fn a_dropped_stream_leaves_no_trace() {
    let world = World::new(1000, Tuning::default());
    let mut clients: Vec<Client> = (0..10).map(|_| world.client()).collect();
    for client in &mut clients {
        created(client, create("a", "")).await;
        client.until_progress(1).await;
    }
    world.model.put("a", "1");
    yield_now().await;
    assert_eq!((world.hub.stats().streams(), world.hub.stats().watchers()), (10, 10));
    clients.clear();
    let stats = world.hub.stats();
    assert_eq!((stats.streams(), stats.watchers(), stats.pending_events()), (0, 0, 0));
}

#[tokio::test]
async fn a_thousand_watchers_of_one_key_share_its_bytes() {
    let world = World::new(1000, Tuning::default());
    let mut clients: Vec<Client> = (0..1000).map(|_| world.client()).collect();
    for client in &mut clients {
        created(client, create("a", "")).await;
    }
    for revision in 2..12 {
        world.model.put("a", "value");
        for client in &mut clients {
            assert_eq!(brief(&client.next().await), [("a".into(), revision)]);
        }
    }
    assert_eq!(world.hub.stats().events_sent(), 10_000);
    assert_eq!(world.hub.stats().streams_overflowed(), 0);
}

#[tokio::test]
async fn many_watchers_on_one_stream_each_get_theirs() {
    let world = World::new(1000, Tuning::default());
    let mut client = world.client();
    for number in 0..300 {
        created(&mut client, create(&format!("k{number:03}"), "k300")).await;
    }
    client.until_progress(1).await;
    world.model.apply(&[("k010", Some("x")), ("k299", Some("x"))]);
    let mut ids = Vec::new();
    for _ in 0..300 {
        let response = client.next().await;
        assert_eq!(response.events.len(), if response.watch_id <= 10 { 2 } else { 1 });
        ids.push(response.watch_id);
    }
    assert_eq!(ids, (0..300).collect::<Vec<i64>>());
}
