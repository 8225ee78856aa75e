//! The end of a soak: is every acknowledged write there, and nothing else? It only reads.

use std::time::{Duration, Instant};

use kelson_api::etcdserverpb as pb;

use super::load::{Known, Load};
use super::values;
use crate::compare;

/// Keys per page.
const PAGE: i64 = 1000;

/// Content of the whole store at one revision.
#[derive(PartialEq, Debug)]
pub(crate) struct Hash {
    pub(crate) revision: i64,
    hash: u32,
    compacted: i64,
}

/// The hash at the newest revision.
pub(crate) async fn hash(load: &Load) -> Result<Hash, String> {
    hash_at(load, 0).await
}

pub(crate) async fn hash_at(load: &Load, revision: i64) -> Result<Hash, String> {
    let answer = load.maintenance().hash_kv(pb::HashKvRequest { revision }).await;
    let answer = answer.map_err(|status| format!("hash at {revision}: {status}"))?.into_inner();
    Ok(Hash {
        revision: answer.hash_revision,
        hash: answer.hash,
        compacted: answer.compact_revision,
    })
}

/// What counts the open watch streams on the metrics page.
const STREAMS: &str = "etcd_debugging_mvcc_watch_stream_total";
/// Longest wait until the server has noticed that all watches were given up.
const STREAMS_GONE: Duration = Duration::from_secs(15);

/// Waits until the server holds no watch stream any more: each would keep the events that wait in it.
pub(crate) async fn no_streams(port: u16) -> Result<(), String> {
    let until = Instant::now() + STREAMS_GONE;
    loop {
        let read = tokio::task::spawn_blocking(move || compare::page(port, "/metrics"));
        let page = read.await.map_err(|error| format!("read the metrics: {error}"))?;
        let page = page.ok_or("the metrics page does not answer")?;
        let open = streams(&page).ok_or_else(|| format!("the metrics lack {STREAMS}"))?;
        if open == 0.0 {
            return Ok(());
        }
        if Instant::now() > until {
            return Err(format!("{open} watch streams are left after all watches were given up"));
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}

fn streams(page: &str) -> Option<f64> {
    page.lines().find_map(|line| line.strip_prefix(STREAMS)?.trim().parse().ok())
}

/// Compares all keys of the writers with what they know.
pub(crate) async fn verify(load: &Load, ledger: &[Known], when: &str) -> Result<(), String> {
    let mut expected: Vec<&Known> = ledger.iter().filter(|known| known.mod_revision > 0).collect();
    expected.sort_by_key(|known| known.number);
    let mut expected = expected.into_iter();
    let mut from = values::PREFIX.as_bytes().to_vec();
    let mut count = 0;
    loop {
        let request = pb::RangeRequest {
            key: from.into(),
            range_end: values::end_of(values::PREFIX).into(),
            limit: PAGE,
            ..Default::default()
        };
        let page = load.kv(0).range(request).await;
        let page = page.map_err(|status| format!("read {when}: {status}"))?.into_inner();
        for kv in &page.kvs {
            let name = String::from_utf8_lossy(&kv.key);
            let Some(known) = expected.next() else {
                return Err(format!("{when}: {name} should not be there"));
            };
            if values::number(&kv.key) != Some(known.number) {
                let missing = values::key(known.number);
                return Err(format!("{when}: {missing} is not there, but {name}"));
            }
            let is_right = kv.mod_revision == known.mod_revision
                && kv.value == values::value(known.number, known.version);
            if !is_right {
                let (found, wanted) = (kv.mod_revision, known.mod_revision);
                return Err(format!("{when}: {name} is of revision {found}, not {wanted}"));
            }
            count += 1;
        }
        match page.kvs.last() {
            Some(last) if page.more => from = [last.key.as_ref(), &[0]].concat(),
            _ => break,
        }
    }
    if let Some(known) = expected.next() {
        return Err(format!("{when}: {} is not there", values::key(known.number)));
    }
    println!("{count} keys {when} hold what was acknowledged last");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn open_streams_are_read_from_the_metrics() {
        let page = format!("# TYPE {STREAMS} gauge\n{STREAMS} 3\nother 1\n");
        assert_eq!(streams(&page), Some(3.0));
        assert_eq!(streams("other 1\n"), None);
    }
}
