//! The built binary as scripts and service managers see it: exit codes, `--version`, `--help`,
//! death by signal, and the messages that go with them.

use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Output};

mod process;

fn run(arguments: &[&str]) -> Output {
    process::command().args(arguments).output().expect("the binary runs")
}

fn code(arguments: &[&str]) -> Option<i32> {
    run(arguments).status.code()
}

#[test]
fn version_and_help_succeed_on_standard_output() {
    let version = run(&["--version"]);
    assert_eq!(version.status.code(), Some(0));
    let text = String::from_utf8(version.stdout).expect("text");
    assert!(text.starts_with("etcd Version: 3.7.3\nGit SHA: "), "{text}");
    for argument in ["--help", "-h"] {
        let help = run(&[argument]);
        assert_eq!(help.status.code(), Some(0));
        let text = String::from_utf8(help.stdout).expect("text");
        assert!(text.contains("  --listen-client-urls http://localhost:2379\n"), "{text}");
    }
}

#[test]
fn mistakes_end_with_the_codes_of_etcd() {
    let directory = tempfile::tempdir().expect("a directory");
    let data = format!("--data-dir={}", directory.path().join("data").display());
    assert_eq!(code(&["--no-such-flag"]), Some(2));
    assert_eq!(code(&["--snapshot-count=many"]), Some(2));
    assert_eq!(code(&["stray"]), Some(1));
    assert_eq!(code(&["--election-timeout=200", &data]), Some(1));
    assert_eq!(code(&["--config-file=/nonexistent"]), Some(1));
    let bad_certificate = [
        &data,
        "--cert-file=/nonexistent.crt",
        "--key-file=/nonexistent.key",
        "--listen-client-urls=https://127.0.0.1:0",
        "--advertise-client-urls=https://127.0.0.1:1",
        "--listen-peer-urls=http://127.0.0.1:0",
    ];
    assert_eq!(code(&bad_certificate), Some(1));
    assert!(!directory.path().join("data").exists(), "nothing was started");
}

#[test]
fn a_variable_beside_its_flag_ends_with_1_and_says_which() {
    let output =
        process::command().arg("--name=a").env("ETCD_NAME", "a").output().expect("the binary runs");
    assert_eq!(output.status.code(), Some(1));
    let log = String::from_utf8(output.stderr).expect("text");
    let line: serde_json::Value = serde_json::from_str(log.trim()).expect("one JSON line");
    assert_eq!(line["environment-variable"], "ETCD_NAME");
    assert!(line["msg"].as_str().is_some_and(|text| text.starts_with("conflicting environment")));
}

#[test]
fn a_taken_address_ends_with_1() {
    let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
    let url = format!("http://{}", taken.local_addr().expect("an address"));
    let directory = tempfile::tempdir().expect("a directory");
    let listen = format!("--listen-client-urls={url}");
    let advertise = format!("--advertise-client-urls={url}");
    let data = format!("--data-dir={}", directory.path().display());
    let peer = "--listen-peer-urls=http://127.0.0.1:0";
    assert_eq!(code(&[&listen, &advertise, &data, peer]), Some(1));
}

#[test]
fn signals_end_the_process_after_a_graceful_stop() {
    for (name, number) in [("TERM", 15), ("INT", 2)] {
        let mut server = process::Server::start(&[]);
        let id = server.child.id().to_string();
        let sent = Command::new("kill").args(["-s", name, &id]).status().expect("kill runs");
        assert!(sent.success());
        let status = server.child.wait().expect("the process ends");
        assert_eq!(status.signal(), Some(number), "{name}: {status:?}");
        let log = server.log();
        assert!(log.contains("received signal; shutting down"), "{log}");
        assert!(log.contains("closed etcd server"), "{log}");
    }
}

#[test]
fn a_data_directory_that_cannot_be_made_ends_with_1_and_says_why() {
    let file = tempfile::NamedTempFile::new().expect("a file");
    let below = file.path().join("data");
    let output = run(&[
        &format!("--data-dir={}", below.display()),
        "--listen-client-urls=http://127.0.0.1:0",
        "--advertise-client-urls=http://127.0.0.1:1",
        "--listen-peer-urls=http://127.0.0.1:0",
    ]);
    assert_eq!(output.status.code(), Some(1));
    let log = String::from_utf8(output.stderr).expect("text");
    let said = format!("cannot create directory {}: Not a directory", below.display());
    assert!(log.contains(&said), "{log}");
}

/// The storage engine would run `sync`, which waits for all disks of the machine.
#[test]
fn a_start_runs_no_program_that_lies_in_the_path() {
    let directory = tempfile::tempdir().expect("a directory");
    let program = directory.path().join("sync");
    std::fs::write(&program, "#!/bin/sh\n: > \"$0.was-run\"\n").expect("a program");
    let all = std::fs::Permissions::from_mode(0o755);
    std::fs::set_permissions(&program, all).expect("it can be run");
    let path = directory.path().to_str().expect("text");
    let server = process::Server::start_with(&[], &[("PATH", path)]);
    assert!(!directory.path().join("sync.was-run").exists(), "the member ran it");
    assert!(!server.log().contains("sync command"), "{}", server.log());
}

#[test]
fn a_second_process_on_the_same_data_ends_with_1() {
    let server = process::Server::start(&[]);
    let data = format!("--data-dir={}", server.data_dir().display());
    let other = run(&[
        &data,
        "--listen-client-urls=http://127.0.0.1:0",
        "--advertise-client-urls=http://127.0.0.1:1",
        "--listen-peer-urls=http://127.0.0.1:0",
    ]);
    assert_eq!(other.status.code(), Some(1), "{}", String::from_utf8_lossy(&other.stderr));
}

#[test]
fn the_service_manager_hears_when_the_member_serves() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("notify");
    let manager = std::os::unix::net::UnixDatagram::bind(&path).expect("a socket");
    manager.set_read_timeout(Some(process::PATIENCE)).expect("a timeout");
    let text = path.display().to_string();
    let _server = process::Server::start_with(&[], &[("NOTIFY_SOCKET", &text)]);
    let mut buffer = [0; 64];
    let len = manager.recv(&mut buffer).expect("a message");
    assert_eq!(&buffer[..len], b"READY=1");
}
