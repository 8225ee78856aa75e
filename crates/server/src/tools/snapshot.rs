//! `snapshot status`, `snapshot restore` and `export`. What a snapshot holds and what a member
//! begins with is known below; here flags become a request, and the outcome becomes text.

use std::path::{Path, PathBuf};

use clap::ArgMatches;
use clap::parser::ValueSource;
use kelson_raft::{Export, Restore};
use kelson_server::config::{Config, Url, Value as _, parse_members};
use kelson_storage::etcd::{Database, Digest, EtcdVersion, Imported, check_digest};
use kelson_storage::offline::Stopped;
use serde_json::Value;

use super::print::{self, Column};
use super::{Failure, offline};

/// Name of a member that gives none.
const DEFAULT_NAME: &str = "default";

/// The one file that a command is about.
pub(super) fn file(matches: &ArgMatches, command: &str) -> Result<PathBuf, Failure> {
    let mut files = matches.get_many::<String>("filename").into_iter().flatten();
    match (files.next(), files.next()) {
        (Some(file), None) => Ok(PathBuf::from(file)),
        _ => Err(Failure::arguments(format!("{command} requires exactly one argument"))),
    }
}

pub(super) fn status(matches: &ArgMatches) -> Result<(), Failure> {
    let path = file(matches, "snapshot status")?;
    print::check_format(matches)?;
    offline::must_exist(&path)?;
    let database = Database::open(&path).map_err(Failure::new)?;
    let status = database.status().map_err(Failure::new)?;
    if let Digest::Differs { .. } = check_digest(&path).map_err(Failure::new)? {
        return Err(Failure::new(format!(
            "{} is not what was saved: its sha256 differs from the one at its end",
            path.display()
        )));
    }
    let column = |title, field, json, shown, exact| Column { title, field, json, shown, exact };
    let (keys, size) = (status.total_key, status.total_size);
    let columns = [
        column("hash", "Hash", "hash", format!("{:x}", status.hash), Value::from(status.hash)),
        column(
            "revision",
            "Revision",
            "revision",
            status.revision.to_string(),
            Value::from(status.revision),
        ),
        column("total keys", "Keys", "totalKey", keys.to_string(), Value::from(keys)),
        column("total size", "Size", "totalSize", print::human(size), Value::from(size)),
        column("version", "Version", "version", status.version.clone(), status.version.into()),
    ];
    print::answer(matches, &columns)
}

pub(super) fn restore(matches: &ArgMatches) -> Result<(), Failure> {
    let snapshot = file(matches, "snapshot restore")?;
    let bump = matches.get_one::<u64>("bump-revision").copied().filter(|by| *by > 0);
    let flag = |name: &str| matches.get_one::<bool>(name).copied().unwrap_or_default();
    if bump.is_some() != flag("mark-compacted") {
        return Err(Failure::arguments("--mark-compacted required if --revision-bump > 0"));
    }
    offline::must_exist(&snapshot)?;
    tell_of_unused(matches);
    let asked = Restore {
        snapshot,
        skip_hash_check: flag("skip-hash-check"),
        bump_revision: bump,
        ..describe(matches)?
    };
    say(&format!("restoring {} into {}", asked.snapshot.display(), asked.data_dir.display()));
    let mut tell = offline::Teller::default();
    let done = kelson_raft::restore(&asked, &mut |done| tell.tell(done));
    let (identity, imported) = done.map_err(Failure::new)?;
    let Imported { rows, revision, compacted, leases, users, .. } = imported;
    say(&format!(
        "restored member {:x} of cluster {:x}: revision {revision}, compacted {compacted}, {rows} \
         rows, {leases} leases, {users} users; start it with --data-dir={}",
        identity.member_id,
        identity.cluster_id,
        asked.data_dir.display()
    ));
    Ok(())
}

/// The way out: `kelson export`.
pub(super) fn export(matches: &ArgMatches) -> Result<(), Failure> {
    let text = |name: &str| matches.get_one::<String>(name).cloned().unwrap_or_default();
    let stopped = offline::open(Path::new(&text("data-dir")))?;
    offline::tell_if_behind(&stopped)?;
    let is_given = matches.value_source("initial-cluster") == Some(ValueSource::CommandLine);
    let restore = match is_given {
        true => describe(matches)?,
        false => alone(&stopped, text("initial-cluster-token"))?,
    };
    let asked = Export {
        name: restore.name,
        initial_cluster: restore.initial_cluster,
        initial_cluster_token: restore.initial_cluster_token,
        advertise_peer_urls: restore.advertise_peer_urls,
        version: match text("etcd-version").as_str() {
            "3.4" | "3.5" => EtcdVersion::V3_5,
            "3.6" => EtcdVersion::V3_6,
            _ => EtcdVersion::V3_7,
        },
        target: text("to").into(),
    };
    let identity = kelson_raft::export(&stopped, &asked).map_err(Failure::new)?;
    let list: Vec<String> = asked
        .initial_cluster
        .iter()
        .flat_map(|(name, urls)| urls.iter().map(move |url| format!("{name}={url}")))
        .collect();
    say(&format!(
        "made member {:x} of a new cluster {:x}, revision {}; start etcd with --data-dir={} --name={} \
         --initial-cluster={} and its own --initial-advertise-peer-urls",
        identity.member_id,
        identity.cluster_id,
        stopped.reader.revision(),
        asked.target.display(),
        asked.name,
        list.join(",")
    ));
    Ok(())
}

/// The member as it is, without the others.
fn alone(stopped: &Stopped, initial_cluster_token: String) -> Result<Restore, Failure> {
    let own = stopped.data_dir.identity().map(|identity| identity.member_id);
    let row = stopped.reader.members().into_iter().find(|member| Some(member.id) == own);
    let row = row.filter(|row| !row.peer_ur_ls.is_empty());
    let row = row.ok_or_else(|| {
        Failure::new(
            "the member does not know its own peer URLs: give --name, --initial-cluster and \
                      --initial-advertise-peer-urls",
        )
    })?;
    let name = if row.name.is_empty() { DEFAULT_NAME.to_owned() } else { row.name };
    Ok(Restore {
        initial_cluster: vec![(name.clone(), row.peer_ur_ls.clone())],
        name,
        initial_cluster_token,
        advertise_peer_urls: row.peer_ur_ls,
        ..Restore::default()
    })
}

/// Progress and notes go where etcd's tools log.
fn say(text: &str) {
    eprintln!("{text}");
}

fn tell_of_unused(matches: &ArgMatches) {
    if matches.get_one::<String>("wal-dir").is_some_and(|dir| !dir.is_empty()) {
        say(
            "warning: --wal-dir has no effect: the log lives in the data directory, whose place in one \
             file system lets a member appear in one step",
        );
    }
    if matches.contains_id("initial-memory-map-size")
        && matches.get_one::<u64>("initial-memory-map-size").is_some()
    {
        say("warning: --initial-memory-map-size has no effect: no file is mapped into memory");
    }
}

/// Who is restored, and in which company.
fn describe(matches: &ArgMatches) -> Result<Restore, Failure> {
    let text = |name: &str| matches.get_one::<String>(name).cloned().unwrap_or_default();
    let initial_cluster = parse_members(&text("initial-cluster")).map_err(Failure::new)?;
    let urls = text("initial-advertise-peer-urls");
    // Parsed by the same rules as in the list of members.
    let own = parse_members(
        &urls.split(',').map(|url| format!("own={url}")).collect::<Vec<_>>().join(","),
    );
    let own = own.map_err(Failure::new)?.pop().map(|(_, urls)| urls).unwrap_or_default();
    let name = match matches.get_one::<String>("name").filter(|name| !name.is_empty()) {
        Some(name) => name.clone(),
        None => inferred_name(&initial_cluster, &own),
    };
    let config = Config {
        name: name.clone(),
        initial_advertise_peer_urls: Vec::<Url>::parse(&urls).map_err(Failure::new)?,
        ..Config::default()
    };
    // As they stand in the list, where host names may be resolved already.
    let advertise_peer_urls = config.own_peer_urls(&initial_cluster).map_err(Failure::new)?;
    let data_dir = match matches.get_one::<String>("data-dir").filter(|dir| !dir.is_empty()) {
        Some(dir) => dir.clone(),
        None => format!("{name}.etcd"),
    };
    Ok(Restore {
        name,
        initial_cluster,
        initial_cluster_token: text("initial-cluster-token"),
        advertise_peer_urls,
        data_dir: Path::new(&data_dir).to_owned(),
        ..Restore::default()
    })
}

/// The name that the list has for these URLs. etcd's tools refuse such a call.
fn inferred_name(members: &[(String, Vec<String>)], own: &[String]) -> String {
    let is_listed = members.iter().any(|(name, _)| name == DEFAULT_NAME);
    let sorted = |urls: &[String]| {
        let mut urls = urls.to_vec();
        urls.sort_unstable();
        urls
    };
    let found = members.iter().find(|(_, urls)| sorted(urls) == sorted(own));
    match found {
        Some((name, _)) if !is_listed => {
            say(&format!("--name is not given: taking {name:?}, which has these peer URLs"));
            name.clone()
        }
        _ => DEFAULT_NAME.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_inferred_only_where_the_default_is_not_meant() {
        let url = |n: u16| vec![format!("http://10.0.0.{n}:2380")];
        let members = [("m1".to_owned(), url(1)), ("m2".to_owned(), url(2))];
        assert_eq!(inferred_name(&members, &url(2)), "m2");
        assert_eq!(inferred_name(&members, &url(3)), "default");
        let members = [("default".to_owned(), url(1)), ("m2".to_owned(), url(2))];
        assert_eq!(inferred_name(&members, &url(2)), "default");
    }
}
