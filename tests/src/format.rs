//! How answers look in golden scripts: everything a client can see, except ids, terms and times that
//! differ from run to run. Those are reduced to "set" or "not set".

use kelson_api::etcdserverpb::{
    DeleteRangeResponse, Member, PutResponse, RangeResponse, ResponseHeader, TxnResponse,
    WatchResponse, response_op::Response,
};
use kelson_api::mvccpb::{Event, KeyValue, event::EventType};

/// Bytes as text; long runs are shortened to head and length.
pub fn text(bytes: &[u8]) -> String {
    if bytes.len() > 80 {
        return format!("{}...({} bytes)", text(&bytes[..8]), bytes.len());
    }
    let mut out = String::new();
    for byte in bytes {
        match byte {
            0 => out.push_str("\\0"),
            0x21..=0x7e => out.push(char::from(*byte)),
            other => out.push_str(&format!("\\x{other:02x}")),
        }
    }
    if out.is_empty() { "\"\"".into() } else { out }
}

/// `rev=3`, with a note for each of the three ids that is not set.
pub fn header(header: Option<&ResponseHeader>) -> String {
    let Some(header) = header else { return "no header".into() };
    let mut out = format!("rev={}", header.revision);
    let ids = (header.cluster_id != 0, header.member_id != 0, header.raft_term != 0);
    match ids {
        (true, true, true) => {}
        (false, false, false) => out.push_str(" (revision only)"),
        other => out.push_str(&format!(" (ids set: {other:?})")),
    }
    out
}

/// `key=value@mod create=.. version=.. lease=..`.
pub fn kv(kv: &KeyValue) -> String {
    let mut out = format!(
        "{}={} mod={} create={} version={}",
        text(&kv.key),
        text(&kv.value),
        kv.mod_revision,
        kv.create_revision,
        kv.version
    );
    if kv.lease != 0 {
        out.push_str(&format!(" lease={}", kv.lease));
    }
    out
}

/// A range answer, one line per key.
pub fn range(response: &RangeResponse) -> Vec<String> {
    let mut head = format!("{} count={}", header(response.header.as_ref()), response.count);
    if response.more {
        head.push_str(" more");
    }
    let mut out = vec![head];
    out.extend(response.kvs.iter().map(|pair| format!("  {}", kv(pair))));
    out
}

/// A put answer.
pub fn put(response: &PutResponse) -> Vec<String> {
    let mut out = vec![header(response.header.as_ref())];
    out.extend(response.prev_kv.iter().map(|pair| format!("  prev {}", kv(pair))));
    out
}

/// A delete answer.
pub fn delete(response: &DeleteRangeResponse) -> Vec<String> {
    let mut out =
        vec![format!("{} deleted={}", header(response.header.as_ref()), response.deleted)];
    out.extend(response.prev_kvs.iter().map(|pair| format!("  prev {}", kv(pair))));
    out
}

/// A transaction answer with its operations indented.
pub fn txn(response: &TxnResponse) -> Vec<String> {
    let mut out =
        vec![format!("{} succeeded={}", header(response.header.as_ref()), response.succeeded)];
    for op in &response.responses {
        let (name, lines) = match &op.response {
            Some(Response::ResponseRange(inner)) => ("range", range(inner)),
            Some(Response::ResponsePut(inner)) => ("put", put(inner)),
            Some(Response::ResponseDeleteRange(inner)) => ("del", delete(inner)),
            Some(Response::ResponseTxn(inner)) => ("txn", txn(inner)),
            None => ("nothing", vec![String::new()]),
        };
        for (i, line) in lines.iter().enumerate() {
            let lead = if i == 0 { format!("{name}: ") } else { String::new() };
            out.push(format!("  {lead}{line}"));
        }
    }
    out
}

/// One watch response, events indented.
pub fn watch(response: &WatchResponse) -> Vec<String> {
    let mut head = format!("id={} {}", response.watch_id, header(response.header.as_ref()));
    for (set, name) in [
        (response.created, "created"),
        (response.canceled, "canceled"),
        (response.fragment, "fragment"),
    ] {
        if set {
            head.push_str(&format!(" {name}"));
        }
    }
    if response.compact_revision != 0 {
        head.push_str(&format!(" compact_revision={}", response.compact_revision));
    }
    if !response.cancel_reason.is_empty() {
        head.push_str(&format!(" reason={:?}", response.cancel_reason));
    }
    let mut out = vec![head];
    out.extend(response.events.iter().map(event));
    out
}

fn event(event: &Event) -> String {
    let kind = EventType::try_from(event.r#type).map_or("?", |kind| kind.as_str_name());
    let pair = event.kv.as_ref().map_or("no kv".into(), kv);
    let prev = event.prev_kv.as_ref().map_or(String::new(), |pair| format!(" | prev {}", kv(pair)));
    format!("  {kind} {pair}{prev}")
}

/// Members without ids and ports.
pub fn members(members: &[Member]) -> Vec<String> {
    members
        .iter()
        .map(|member| {
            format!(
                "  member name={} peers={} clients={} learner={}",
                member.name,
                member.peer_ur_ls.len(),
                member.client_ur_ls.len(),
                member.is_learner
            )
        })
        .collect()
}

/// `error: Code "text"`.
pub fn status(status: &tonic::Status) -> Vec<String> {
    vec![format!("error: {:?} {:?}", status.code(), status.message())]
}
