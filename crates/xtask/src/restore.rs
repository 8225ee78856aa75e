//! The way back: a snapshot of the server under test, restored by etcdutl, has to start a real etcd
//! that holds the same history. It never looks into the snapshot itself.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::interop::{Server, free_ports};
use crate::peers::capture;

/// A saved snapshot and the hash that its server gave for the same revision.
pub(crate) struct Saved {
    file: PathBuf,
    hash: String,
}

/// Saves a snapshot of a server that nobody writes to now.
pub(crate) fn save(server: &Server, peers: &Path, dir: &Path) -> Result<Saved, String> {
    let file = dir.join("moved.db");
    let mut save = Command::new(peers.join("etcdctl"));
    save.args(["snapshot", "save"]).arg(&file).arg("--endpoints").arg(server.endpoint());
    capture(&mut save)?;
    Ok(Saved { file, hash: hash(server, peers)? })
}

/// Restores the snapshot, starts etcd on it and compares its hash over all keys and revisions.
pub(crate) fn prove(saved: &Saved, peers: &Path, dir: &Path) -> Result<(), String> {
    let data = dir.join("moved");
    let mut restore = Command::new(peers.join("etcdutl"));
    restore.args(["snapshot", "restore"]).arg(&saved.file).arg("--data-dir").arg(&data);
    capture(&mut restore)?;
    let etcd = peers.join("etcd");
    let server = Server::start_on(&etcd, &data, &dir.join("moved.log"), free_ports()?)?;
    server.wait_ready(peers)?;
    let moved = hash(&server, peers)?;
    if moved == saved.hash {
        return Ok(());
    }
    Err(format!("the server under test has {}, etcd on its snapshot {moved}", saved.hash))
}

/// Hash with the revisions it covers, without the header, whose ids are those of another cluster.
fn hash(server: &Server, peers: &Path) -> Result<String, String> {
    let mut hash = Command::new(peers.join("etcdctl"));
    hash.args(["endpoint", "hashkv", "-w", "json", "--endpoints"]).arg(server.endpoint());
    let text = capture(&mut hash)?;
    let start = text.find("\"hash\":").ok_or_else(|| format!("no hash in {text:?}"))?;
    Ok(text[start..].trim_end().to_string())
}
