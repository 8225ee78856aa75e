//! kill -9 at random moments under concurrent writes: nothing acknowledged is lost, nothing appears
//! that was not written, and the history stays whole. `KELSON_CRASH_ROUNDS` changes the 200 rounds.

use std::time::Duration;

use kelson_tests::ledger::Ledger;
use kelson_tests::runtime;
use kelson_tests::server::{Server, kelson_binary};

#[test]
fn every_acknowledged_write_survives_kill_9() {
    let rounds: u64 = std::env::var("KELSON_CRASH_ROUNDS")
        .map_or(200, |text| text.parse().expect("KELSON_CRASH_ROUNDS is a number"));
    let runtime = runtime();
    // Checkpoints come every 20 ms instead of every second, so that a kill often falls into one and
    // a restart stands on a state as well as on the log.
    let flags = ["--backend-batch-interval=20ms".to_string()];
    let mut server = Server::start(&kelson_binary(), &flags);
    let mut ledger = Ledger::default();
    for round in 0..rounds {
        let endpoint = server.endpoint();
        runtime.block_on(async {
            let load = ledger.start(&endpoint, 8);
            // A fixed sequence: the round alone decides the moment.
            let millis = 20 + (round.wrapping_mul(2_654_435_761) >> 7) % 180;
            tokio::time::sleep(Duration::from_millis(millis)).await;
            server.kill();
            ledger.finish(load).await;
        });
        server.spawn();
        // The whole history is judged again and again, ever larger; every tenth round keeps it quick.
        if round % 10 == 9 || round + 1 == rounds {
            let verdict = runtime.block_on(ledger.judge(&server.endpoint()));
            verdict.unwrap_or_else(|violation| panic!("round {round}: {violation}"));
        }
    }
    println!("{rounds} kills, {} acknowledged writes, all there", ledger.acknowledged());
    assert!(ledger.acknowledged() > rounds as usize, "the writers hardly wrote");
}
