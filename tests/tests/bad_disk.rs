//! A full disk, and files that were damaged while the member was down: it refuses with a clear reason
//! or recovers cleanly. It never panics, never hangs and never answers wrongly.

use std::path::{Path, PathBuf};
use std::time::Duration;

use kelson_api::etcdserverpb as pb;
use kelson_tests::image::{self, Image, Kind};
use kelson_tests::ledger::Ledger;
use kelson_tests::runtime;
use kelson_tests::server::{Server, kelson_binary};
use pb::kv_client::KvClient;

async fn write_for(ledger: &mut Ledger, endpoint: &str, millis: u64) {
    let load = ledger.start(endpoint, 4);
    tokio::time::sleep(Duration::from_millis(millis)).await;
    ledger.finish(load).await;
}

fn files(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).expect("a data directory is readable") {
        let path = entry.expect("an entry is readable").path();
        if path.is_dir() { found.extend(files(&path)) } else { found.push(path) }
    }
    found.sort();
    found
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).expect("make a directory");
    for entry in std::fs::read_dir(from).expect("a data directory is readable") {
        let entry = entry.expect("an entry is readable");
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy(&entry.path(), &target);
        } else {
            std::fs::copy(entry.path(), target).expect("copy a file");
        }
    }
}

#[derive(Clone, Copy, Debug)]
enum Damage {
    FlippedByte(u64),
    CutTail,
    Zeroed,
    Missing,
}

fn damage(file: &Path, kind: Damage) -> bool {
    let mut bytes = std::fs::read(file).expect("read a file");
    if bytes.is_empty() {
        return false;
    }
    match kind {
        Damage::FlippedByte(percent) => {
            // Somewhere in the used part: behind it lies only zero fill.
            let used = bytes.iter().rposition(|byte| *byte != 0).unwrap_or(0);
            let at = used * percent as usize / 100;
            bytes[at] ^= 0x10;
        }
        Damage::CutTail => {
            let used = bytes.iter().rposition(|byte| *byte != 0).unwrap_or(0);
            bytes.truncate(used.saturating_sub(3));
        }
        Damage::Zeroed => {
            let end = bytes.len().min(4096);
            bytes[..end].fill(0);
        }
        Damage::Missing => {
            std::fs::remove_file(file).expect("remove a file");
            return true;
        }
    }
    std::fs::write(file, bytes).expect("write a file");
    true
}

#[test]
fn every_damaged_file_is_refused_or_recovered() {
    let runtime = runtime();
    let mut server = Server::start(&kelson_binary(), &[]);
    let mut ledger = Ledger::default();
    runtime.block_on(write_for(&mut ledger, &server.endpoint(), 800));
    std::thread::sleep(Duration::from_millis(1500));
    runtime.block_on(write_for(&mut ledger, &server.endpoint(), 300));
    server.stop();
    let data = server.data_dir();
    let pristine = tempfile::tempdir().expect("temp dir");
    copy(&data, &pristine.path().join("data"));
    let kinds = [
        Damage::FlippedByte(30),
        Damage::FlippedByte(99),
        Damage::CutTail,
        Damage::Zeroed,
        Damage::Missing,
    ];
    let (mut refused, mut recovered) = (0, 0);
    for name in files(&data) {
        let name = name.strip_prefix(&data).expect("below the directory").to_path_buf();
        for kind in kinds {
            std::fs::remove_dir_all(&data).expect("clear the directory");
            copy(&pristine.path().join("data"), &data);
            if !damage(&data.join(&name), kind) {
                continue;
            }
            let _ = std::fs::remove_file(server.log_path());
            match server.try_spawn() {
                Ok(()) => {
                    let verdict = runtime.block_on(ledger.judge(&server.endpoint()));
                    verdict.unwrap_or_else(|violation| {
                        panic!("{kind:?} in {} went unnoticed: {violation}", name.display())
                    });
                    server.kill();
                    recovered += 1;
                }
                Err(log) => {
                    let clear = !log.contains("panicked") && !log.contains("hangs");
                    assert!(clear, "{kind:?} in {}: {log}", name.display());
                    assert!(
                        log.contains("exit status: 1"),
                        "{kind:?} in {}: {log}",
                        name.display()
                    );
                    refused += 1;
                }
            }
        }
    }
    println!("{refused} refused, {recovered} recovered");
    assert!(refused > 0 && recovered > 0, "{refused} refused, {recovered} recovered");
}

#[test]
fn a_full_disk_refuses_writes_and_loses_nothing() {
    if !image::available() {
        println!("not root: no small disk can be mounted here");
        return;
    }
    let runtime = runtime();
    let mut image = Image::new(Kind::Ext4, 400);
    let mut server = Server::start_on(&kelson_binary(), &[], image.mount_point().join("data"));
    let mut ledger = Ledger::default();
    runtime.block_on(write_for(&mut ledger, &server.endpoint(), 300));
    let filler = image.mount_point().join("filler");
    fill(&filler);
    // Writers go on until they are refused.
    runtime.block_on(write_for(&mut ledger, &server.endpoint(), 3000));
    server.kill();
    // Still full: it starts, or says clearly why not.
    if let Err(log) = server.try_spawn() {
        assert!(!log.contains("panicked") && !log.contains("hangs"), "{log}");
    }
    server.kill();
    std::fs::remove_file(&filler).expect("make room again");
    server.try_spawn().expect("it starts once there is room");
    let verdict = runtime.block_on(ledger.judge(&server.endpoint()));
    verdict.expect("nothing acknowledged was lost");
    server.kill();
    image.unmount();
}

/// Writes zeros until the disk is full.
fn fill(path: &Path) {
    use std::io::Write;
    let mut file = std::fs::File::create(path).expect("make the filler");
    let mut chunk = vec![1_u8; 1 << 20];
    while !chunk.is_empty() {
        if file.write_all(&chunk).is_err() {
            chunk.truncate(chunk.len() / 2);
        }
    }
    let _ = file.sync_all();
}

/// Changes one character of a text in the log of a stopped member; checksums are left as they are.
fn change_in_log(data_dir: &Path, text: &str) {
    let logs = files(&data_dir.join("member/wal"));
    for path in logs.iter().filter(|path| path.extension().is_some_and(|it| it == "wal")) {
        let mut bytes = std::fs::read(path).expect("read a log file");
        let found = bytes.windows(text.len()).position(|window| window == text.as_bytes());
        if let Some(at) = found {
            bytes[at] ^= 1;
            return std::fs::write(path, bytes).expect("write a log file");
        }
    }
    panic!("{text} is in no log file");
}

#[test]
fn a_damaged_entry_that_a_start_needs_is_not_believed() {
    // No checkpoint comes: after kill -9 everything is read from the log.
    let flags = ["--backend-batch-interval=1h".to_owned()];
    let mut server = Server::start(&kelson_binary(), &flags);
    let runtime = runtime();
    let channel = |server: &Server| {
        tonic::transport::Channel::from_shared(server.endpoint()).expect("a URL").connect_lazy()
    };
    let put = |number: usize| pb::PutRequest {
        key: format!("key-{number}").into(),
        value: format!("needle-{number:04}").into(),
        ..Default::default()
    };
    runtime.block_on(async {
        let mut kv = KvClient::new(channel(&server));
        for number in 0..50 {
            kv.put(put(number)).await.expect("a put");
        }
    });
    server.kill();
    change_in_log(&server.data_dir(), "needle-0020");
    match server.try_spawn() {
        Err(log) => {
            assert!(log.contains("exit status: 1") && log.contains(".wal"), "{log}");
        }
        Ok(()) => runtime.block_on(async {
            let mut kv = KvClient::new(channel(&server));
            let range = pb::RangeRequest { key: "key-20".into(), ..Default::default() };
            let found = kv.range(range).await.expect("a range").into_inner().kvs;
            panic!("started on a damaged log and answers {found:?}");
        }),
    }
}
