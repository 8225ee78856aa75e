//! Power cut under concurrent writes on real ext4 and xfs: whatever was not synced is gone, and still
//! every acknowledged write is there. With `--unsafe-no-fsync` the same test must find losses, which
//! proves that it can. `KELSON_POWER_ROUNDS` changes the number of cuts per file system.

use std::time::Duration;

use kelson_tests::image::{self, Image, Kind};
use kelson_tests::ledger::Ledger;
use kelson_tests::runtime;
use kelson_tests::server::{Server, kelson_binary};

fn cut_and_judge(kind: Kind, rounds: u64, flags: &[String]) -> Result<usize, String> {
    let runtime = runtime();
    let mut image = Image::new(kind, 768);
    let mut server = Server::start_on(&kelson_binary(), flags, image.mount_point().join("data"));
    let mut ledger = Ledger::default();
    for round in 0..rounds {
        let endpoint = server.endpoint();
        runtime.block_on(async {
            let load = ledger.start(&endpoint, 8);
            let millis = 30 + (round.wrapping_mul(2_654_435_761) >> 7) % 1500;
            tokio::time::sleep(Duration::from_millis(millis)).await;
            image.cut_power();
            // Whatever is acknowledged after the cut would be a lie as well: let it try.
            tokio::time::sleep(Duration::from_millis(50)).await;
            server.kill();
            ledger.finish(load).await;
        });
        image.unmount();
        image.mount();
        server.try_spawn().map_err(|log| format!("round {round}: does not start: {log}"))?;
        let verdict = runtime.block_on(ledger.judge(&server.endpoint()));
        verdict.map_err(|violation| format!("round {round}: {violation}"))?;
    }
    server.kill();
    image.unmount();
    Ok(ledger.acknowledged())
}

#[test]
fn nothing_acknowledged_is_lost_on_ext4() {
    let kind = Kind::Ext4;
    image::nothing_is_lost(kind, |flags| cut_and_judge(kind, image::rounds(12), flags));
}

#[test]
fn nothing_acknowledged_is_lost_on_xfs() {
    let kind = Kind::Xfs;
    image::nothing_is_lost(kind, |flags| cut_and_judge(kind, image::rounds(12), flags));
}

#[test]
fn without_fsync_the_same_test_finds_losses() {
    image::losses_are_found(|flags| cut_and_judge(Kind::Ext4, 6, flags));
}
