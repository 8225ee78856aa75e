//! Errors planted in what watchers saw and in the lives of leases and locks, one per kind, with the
//! rules that may name each.

use super::plant::{Kind, everywhere, pick};
use super::plant_loads::{Planted, kind, lose_one};
use crate::call::TxnOp;
use crate::check::Rule;
use crate::history::{
    Call, Detail, Event, History, Op, Outcome, Row, Spec, WatchRecord, WatchWhat,
};
use crate::rng::Rng;
use crate::workload::FENCED;
use crate::workload::Workload::{Lease, Lock, Watch};

pub(super) const KINDS: &[Kind] = &[
    kind(Watch, "watch: filtered event sent", &[Rule::WatchFilter], filtered_sent),
    kind(Watch, "watch: asked-for event dropped", &[Rule::WatchGap], side_dropped),
    kind(Watch, "watch: wrong previous value", &[Rule::WatchContent], side_previous),
    kind(Watch, "watch: no previous value", &[Rule::WatchContent], side_no_previous),
    kind(Watch, "watch: wrong value", &[Rule::WatchContent], side_value),
    kind(Watch, "watch: wrong create revision", &[Rule::WatchContent], side_create),
    kind(Watch, "watch: event of a revision missing", &[Rule::WatchContent], side_part),
    kind(Watch, "watch: event from before", &[Rule::WatchOrder], side_before),
    kind(Watch, "watch: progress too far", &[Rule::WatchProgress], side_progress),
    kind(Lease, "lease: ended early", &[Rule::LeaseEarly], lease_early),
    kind(Lease, "lease: ended late", &[Rule::LeaseLate], lease_late),
    kind(Lease, "lease: renewed after its end", &[Rule::LeaseRisen], lease_renewed),
    kind(Lease, "lease: used after its end", &[Rule::LeaseRisen], lease_used),
    kind(Lease, "lease: a key outlives it", &[Rule::LeaseEnd], lease_leaves_key),
    kind(Lock, "lock: effect without the lock", &[Rule::LockBroken], effect_unlocked),
    kind(Lock, "lock: effect of an earlier holder", &[Rule::LockBroken], effect_late),
];

/// A stream of a watcher that came and went, with a record of events that fits.
fn side<'a>(
    history: &'a mut History,
    rng: &mut Rng,
    fits: impl Fn(&Spec, &[Event]) -> bool,
) -> Option<(usize, &'a mut Vec<WatchRecord>)> {
    let mut specs = std::collections::HashMap::new();
    let mut places = Vec::new();
    for (index, record) in history.watches.iter().enumerate() {
        match &record.what {
            WatchWhat::Started { spec, .. } if !spec.is_base() => {
                specs.insert(record.stream, spec.clone());
            }
            WatchWhat::Events { events, more: false, .. } => {
                let spec = specs.get(&record.stream);
                places.extend(spec.filter(|spec| fits(spec, events)).map(|_| index));
            }
            _ => {}
        }
    }
    let at = rng.below(places.len().max(1) as u64) as usize;
    Some((*places.get(at)?, &mut history.watches))
}

fn events(record: &mut WatchRecord) -> Option<&mut Vec<Event>> {
    match &mut record.what {
        WatchWhat::Events { events, .. } => Some(events),
        _ => None,
    }
}

fn filtered_sent(history: &mut History, rng: &mut Rng) -> Planted {
    let (at, watches) = side(history, rng, |spec, events| {
        !spec.no_put && events.iter().any(|event| event.put.is_some())
    })?;
    let stream = watches[at].stream;
    let started = watches.iter_mut().find_map(|record| match &mut record.what {
        WatchWhat::Started { spec, .. } if record.stream == stream => Some(spec),
        _ => None,
    })?;
    started.no_put = true;
    Some(())
}

/// A revision in the middle of a response goes missing.
fn side_dropped(history: &mut History, rng: &mut Rng) -> Planted {
    let (at, watches) =
        side(history, rng, |spec, events| !spec.fragment && events_of(events).len() > 1)?;
    let events = events(&mut watches[at])?;
    let gone = events[0].revision;
    let later = events.iter().map(|event| event.revision).find(|other| *other != gone)?;
    let last = events.last()?.revision;
    let middle = if later == last { gone } else { later };
    events.retain(|event| event.revision != middle);
    Some(())
}

fn events_of(events: &[Event]) -> Vec<&[Event]> {
    events.chunk_by(|a, b| a.revision == b.revision).collect()
}

fn side_event(
    history: &mut History,
    rng: &mut Rng,
    fits: impl Fn(&Spec, &Event) -> bool,
    change: impl Fn(&mut Event),
) -> Planted {
    let (at, watches) =
        side(history, rng, |spec, events| events.iter().any(|event| fits(spec, event)))?;
    let stream = watches[at].stream;
    let spec = watches.iter().find_map(|record| match &record.what {
        WatchWhat::Started { spec, .. } if record.stream == stream => Some(spec.clone()),
        _ => None,
    })?;
    let event = events(&mut watches[at])?.iter_mut().find(|event| fits(&spec, event))?;
    change(event);
    Some(())
}

fn side_previous(history: &mut History, rng: &mut Rng) -> Planted {
    side_event(
        history,
        rng,
        |_, event| event.before.is_some(),
        |event| event.before.iter_mut().for_each(|row| row.value.push('?')),
    )
}

fn side_no_previous(history: &mut History, rng: &mut Rng) -> Planted {
    side_event(history, rng, |_, event| event.before.is_some(), |event| event.before = None)
}

fn side_put(history: &mut History, rng: &mut Rng, change: fn(&mut Row)) -> Planted {
    side_event(
        history,
        rng,
        |_, event| event.put.is_some(),
        |event| event.put.iter_mut().for_each(change),
    )
}

fn side_value(history: &mut History, rng: &mut Rng) -> Planted {
    side_put(history, rng, |row| row.value.push('?'))
}

fn side_create(history: &mut History, rng: &mut Rng) -> Planted {
    side_put(history, rng, |row| row.create -= 1)
}

fn side_part(history: &mut History, rng: &mut Rng) -> Planted {
    let whole = |events: &[Event]| events_of(events).iter().any(|group| group.len() > 1);
    let (at, watches) = side(history, rng, |_, events| whole(events))?;
    let events = events(&mut watches[at])?;
    let place = events.windows(2).position(|pair| pair[0].revision == pair[1].revision)?;
    events.remove(place);
    Some(())
}

fn side_before(history: &mut History, rng: &mut Rng) -> Planted {
    let (at, watches) = side(history, rng, |_, _| true)?;
    let (stream, first) = (watches[at].stream, events(&mut watches[at])?[0].revision);
    let started = watches.iter_mut().find_map(|record| match &mut record.what {
        WatchWhat::Started { from, .. } if record.stream == stream => Some(from),
        _ => None,
    })?;
    *started = first + 1;
    Some(())
}

fn side_progress(history: &mut History, rng: &mut Rng) -> Planted {
    let (at, watches) = side(history, rng, |spec, _| !spec.fragment)?;
    let revision = events(&mut watches[at])?[0].revision;
    let early = WatchRecord { what: WatchWhat::Progress { revision }, ..watches[at].clone() };
    watches.insert(at, early);
    Some(())
}

/// Ends of leases by themselves: lease, revision, first sight, number of keys.
fn ends(history: &History) -> Vec<(i64, i64, u64, usize)> {
    let revoked = |lease: i64| {
        history
            .ops
            .iter()
            .any(|op| op.call == Call::Revoke { lease } && op.outcome != Outcome::Fail)
    };
    let deleted = |key: &str| {
        let maybe = |op: &Op| op.outcome != Outcome::Fail;
        history
            .ops
            .iter()
            .any(|op| maybe(op) && matches!(&op.call, Call::Delete { key: own } if own == key))
    };
    let known = |lease: i64| history.ops.iter().any(|op| op.detail.lease == lease);
    let mut found = Vec::new();
    for record in history.watches.iter().filter(|record| record.member == 1) {
        let WatchWhat::Events { events, .. } = &record.what else { continue };
        for group in events_of(events) {
            let lease = group[0].before.as_ref().map_or(0, |row| row.lease);
            let end = group.iter().all(|event| event.put.is_none());
            let single = group.len() == 1 && deleted(&group[0].key);
            if lease != 0 && end && !single && !revoked(lease) && known(lease) {
                let seen = |record: &&WatchRecord| match &record.what {
                    WatchWhat::Events { events, .. } => {
                        events.iter().any(|event| event.revision == group[0].revision)
                    }
                    _ => false,
                };
                let seen = history.watches.iter().filter(seen).map(|record| record.at).min();
                found.push((lease, group[0].revision, seen.unwrap_or(0), group.len()));
            }
        }
    }
    found
}

fn pick_end(history: &History, rng: &mut Rng) -> Option<(i64, i64, u64, usize)> {
    let ends = ends(history);
    ends.get(rng.below(ends.len().max(1) as u64) as usize).copied()
}

/// Adds a renewal that was answered.
fn renew(history: &mut History, lease: i64, start: u64) {
    let mut op = history.ops[0].clone();
    op.call = Call::KeepAlive { lease };
    (op.outcome, op.error, op.succeeded, op.revision) = (Outcome::Ok, None, true, 1);
    (op.start, op.end, op.process) = (start, start + 1_000, 1_000_000);
    op.rows.clear();
    op.detail = Detail { ttl: 2, ..Default::default() };
    history.ops.push(op);
}

fn lease_early(history: &mut History, rng: &mut Rng) -> Planted {
    let (lease, revision, mut seen, _) = pick_end(history, rng)?;
    let answers = history.ops.iter().filter(|op| op.revision == revision).map(|op| op.end);
    seen = answers.min().map_or(seen, |at| at.min(seen));
    renew(history, lease, seen - 500_000_000);
    Some(())
}

fn lease_late(history: &mut History, rng: &mut Rng) -> Planted {
    let (lease, ..) = pick_end(history, rng)?;
    // As if all that was ever done for it had been done a minute before.
    for op in &mut history.ops {
        // A renewal that came too late shows the end.
        let refused = op.outcome == Outcome::Ok && !op.succeeded;
        let renewed = matches!(op.call, Call::KeepAlive { lease: own } if own == lease) && !refused;
        if renewed || op.detail.lease == lease {
            op.start -= 60_000_000_000;
            op.end -= 60_000_000_000;
        }
    }
    Some(())
}

fn lease_renewed(history: &mut History, rng: &mut Rng) -> Planted {
    let (lease, _, seen, _) = pick_end(history, rng)?;
    renew(history, lease, seen + 8_000_000_000);
    Some(())
}

fn lease_used(history: &mut History, rng: &mut Rng) -> Planted {
    let (lease, ended, ..) = pick_end(history, rng)?;
    let index = pick(history, rng, |op| {
        op.wrote() && op.revision > ended && matches!(op.call, Call::Txn(_))
    })?;
    let revision = history.ops[index].revision;
    let Call::Txn(txn) = &mut history.ops[index].call else { return None };
    for step in &mut txn.success {
        if let TxnOp::Put { lease: own, .. } = step {
            *own = lease;
        }
    }
    everywhere(history, revision, |events| {
        let of = events.iter_mut().filter(|event| event.revision == revision);
        of.filter_map(|event| event.put.as_mut()).for_each(|row| row.lease = lease);
    });
    Some(())
}

fn lease_leaves_key(history: &mut History, rng: &mut Rng) -> Planted {
    let ends: Vec<_> = ends(history).into_iter().filter(|(.., keys)| *keys > 2).collect();
    let (_, revision, ..) = *ends.get(rng.below(ends.len().max(1) as u64) as usize)?;
    lose_one(history, revision);
    Some(())
}

/// Gives a fenced effect another fence, in the history and in the log.
fn refence(history: &mut History, rng: &mut Rng, change: i64) -> Planted {
    let fenced = |op: &Op| op.wrote() && op.call.puts().iter().any(|(key, _)| *key == FENCED);
    let index = pick(history, rng, fenced)?;
    let revision = history.ops[index].revision;
    let Call::Txn(txn) = &mut history.ops[index].call else { return None };
    let other = |value: &str| {
        let (fence, rest) = value.split_once(' ')?;
        Some(format!("{} {rest}", fence.parse::<i64>().ok()? + change))
    };
    for step in &mut txn.success {
        if let TxnOp::Put { value, .. } = step {
            *value = other(value)?;
        }
    }
    everywhere(history, revision, |events| {
        let of = events.iter_mut().filter(|event| event.revision == revision);
        for row in of.filter_map(|event| event.put.as_mut()) {
            row.value = other(&row.value).unwrap_or_default();
        }
    });
    Some(())
}

fn effect_unlocked(history: &mut History, rng: &mut Rng) -> Planted {
    refence(history, rng, 1)
}

fn effect_late(history: &mut History, rng: &mut Rng) -> Planted {
    refence(history, rng, -1)
}
