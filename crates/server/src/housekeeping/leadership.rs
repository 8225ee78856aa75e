//! Who leads, as far as this member can give it away: it hands leadership on when it stops, and when
//! it leads and the others cannot reach it. A member calls by connections of its own, so a rule of a
//! firewall, or a certificate, may keep every call from a leader whose own calls go through. Left
//! alone it stays leader, and whoever asks another member waits in vain. It grants no vote.

use std::time::{Duration, Instant};

use tokio::time::MissedTickBehavior;

use crate::app::App;

/// Time between two looks.
const LOOK: Duration = Duration::from_secs(1);

/// Every member calls every other once a second, or tries to (see `probe`). After this long without a
/// call it is taken to be unable to.
const SILENCE: Duration = Duration::from_secs(4);

/// Looks whether the others reach this member while it leads, until it is dropped.
pub(super) async fn run(app: App) {
    let mut tick = tokio::time::interval(LOOK);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut last_look = Instant::now();
    // The term that this member leads, and since when it has been looking out for calls.
    let mut leads: Option<(u64, Instant)> = None;
    loop {
        tick.tick().await;
        let now = Instant::now();
        // Who did not run could not be reached.
        let has_run = now.duration_since(last_look) < 2 * LOOK;
        last_look = now;
        let status = app.node.status();
        let since = match leads {
            Some((term, since)) if has_run && term == status.term => since,
            _ => now,
        };
        leads = status.is_leader.then_some((status.term, since));
        let Some(silent_since) = now.checked_sub(SILENCE) else { continue };
        if leads.is_none() || since > silent_since {
            continue;
        }
        let voters = app.node.voters();
        let silent = |id| app.probes.only_answers(id, silent_since);
        if is_unreached(&voters, status.member_id, silent) {
            tracing::warn!(
                silence = ?SILENCE,
                "the other voters answer this member and cannot reach it: handing leadership on; \
                 look at what keeps them from its peer URLs (--initial-advertise-peer-urls)"
            );
            hand_over(&app).await;
            leads = None;
        }
    }
}

/// Whether those voters that only answer could do without this member: they are a majority.
fn is_unreached(voters: &[u64], own: u64, only_answers: impl Fn(u64) -> bool) -> bool {
    let silent = voters.iter().filter(|id| **id != own && only_answers(**id)).count();
    2 * silent > voters.len()
}

/// Hands leadership to the connected voter that has most of the log, if this member leads and there
/// is one; to the next if that does not take it.
pub(crate) async fn hand_over(app: &App) {
    let status = app.node.status();
    if !status.is_leader {
        return;
    }
    let matched = app.node.matched();
    let others = app.node.voters().into_iter().filter(|id| *id != status.member_id);
    let mut others: Vec<u64> = others.filter(|id| app.node.active_since(*id).is_some()).collect();
    others.sort_by_key(|id| std::cmp::Reverse(matched.get(id).copied().unwrap_or(0)));
    if others.is_empty() && app.node.voters().len() > 1 {
        tracing::warn!("leadership transfer failed: no other voter answers");
    }
    for target in others {
        let target_id = format!("{target:x}");
        match app.node.move_leader(target).await {
            Ok(()) => {
                tracing::info!("transferee-member-id" = target_id, "leadership transfer finished");
                return;
            }
            // Somebody else leads: that is as good.
            Err(kelson_api::Error::NotLeader) => return,
            Err(error) => tracing::warn!(
                "transferee-member-id" = target_id,
                %error,
                "leadership transfer failed"
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_leader_goes_only_if_the_silent_can_do_without_it() {
        let three = [1, 2, 3];
        assert!(is_unreached(&three, 1, |_| true));
        assert!(!is_unreached(&three, 1, |id| id == 2), "the other one calls, or is away");
        assert!(!is_unreached(&[1, 2], 1, |_| true), "one of two elects nobody");
        assert!(!is_unreached(&[1], 1, |_| true));
        let five = [1, 2, 3, 4, 5];
        assert!(is_unreached(&five, 5, |id| id < 4));
        assert!(!is_unreached(&five, 5, |id| id < 3));
    }
}
