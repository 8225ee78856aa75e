//! Deliberately broken variants of the product. Each breaks one promise in one place, so that a test
//! which claims to guard that promise can be shown to notice (`jepsen mutants`). They exist only with
//! the cargo feature `sabotage`; without it [`is`] is a constant `false`, and nothing of the table
//! below gets into the program. It stands here because every crate that has something to break names
//! this one. It decides nothing but whether a variant is the chosen one.

/// What is broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Variant {
    /// 1
    LocalReads,
    /// 1
    LateReaders,
    /// 2
    UnprovenLeader,
    /// 3
    SkipFsync,
    /// 3
    AckBeforeCommit,
    /// 4
    VoteNotSynced,
    /// 4
    VoteForgotten,
    /// 5
    LateRefusal,
    /// 6
    ForwardedTwice,
    /// 7
    RevisionPerChange,
    /// 8
    RevisionForgotten,
    /// 8
    AppliedBehind,
    /// 9
    ApplyReadsClock,
    /// 10
    EventDropped,
    /// 10
    EventRepeated,
    /// 10
    RevisionSplit,
    /// 10
    EventsLostAtInstall,
    /// 11
    CompactedSilently,
    /// 12
    ProgressEarly,
    /// 13
    PrevKvNow,
    /// 13
    CreatedAgain,
    /// 14
    KeepAliveForgotten,
    /// 14
    LeaseForever,
    /// 14
    LeaseIdReused,
    /// 14
    LeaseTtlForgotten,
    /// 14
    LeaseKeysForgotten,
    /// 15
    KeysOutliveLease,
    /// 15
    FenceIgnored,
    /// 16
    CompactionTooFar,
    /// 16
    ReadBelowCompaction,
    /// 17
    SlowElection,
    /// 18
    SlowReconnect,
    /// 18
    FormerTransferStays,
    /// 19
    LogChecksumIgnored,
    /// 19
    DivergenceUnseen,
    /// 20
    WriteErrorSwallowed,
    /// 21
    WipedAccepted,
    /// 21
    OlderCopyAccepted,
    /// 22
    BlankVoter,
    /// 23
    WallClock,
    /// 24
    SnapshotWithoutLeases,
    /// 24
    InstallInPieces,
    /// 25
    SlowWatcherBlocks,
    /// 26
    HeaderAhead,
    /// 26
    MoreForgotten,
    /// 27
    NestedUnchecked,
    /// 27
    PrevKvUnchecked,
    /// 27
    AttachUnchecked,
    /// 27
    WatchUnchecked,
    /// 28
    OldRightsAccepted,
    /// 28
    TokenOutlivesPassword,
    /// 28
    AuthOffAtStart,
}

/// Whether this variant was chosen for this process.
#[cfg(not(feature = "sabotage"))]
#[must_use]
pub const fn is(_variant: Variant) -> bool {
    false
}

/// Refuses a variant that does not exist; there is none in this build.
///
/// # Errors
/// Never.
#[cfg(not(feature = "sabotage"))]
pub const fn check() -> Result<Option<&'static str>, String> {
    Ok(None)
}

#[cfg(feature = "sabotage")]
pub use build::{check, is};

/// True or false, as the clock says: for what must never depend on it.
#[must_use]
pub fn coin() -> bool {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.is_ok_and(|since| since.subsec_micros() % 2 == 1)
}

#[cfg(feature = "sabotage")]
mod build {
    //! The table, and who was chosen.

    use std::sync::OnceLock;

    use super::Variant;
    use super::Variant as V;

    /// Names the variant of a process.
    const VARIABLE: &str = "KELSON_SABOTAGE";

    /// Each variant, its name, the claim of jepsen/claims.md that it breaks, and what it does.
    const TABLE: &[(Variant, &str, u8, &str)] = &[
        (V::LocalReads, "local-reads", 1, "a follower answers linearizable reads from its state"),
        (V::LateReaders, "late-readers", 1, "a read takes the proof of a round begun before it"),
        (V::UnprovenLeader, "unproven-leader", 2, "a leader answers reads without asking a quorum"),
        (V::SkipFsync, "skip-fsync", 3, "the log is written and never synced"),
        (V::AckBeforeCommit, "ack-before-commit", 3, "a put is answered before it is agreed on"),
        (V::VoteNotSynced, "vote-not-synced", 4, "a vote is given before it is on disk"),
        (V::VoteForgotten, "vote-forgotten", 4, "only the first vote of a process is written"),
        (V::LateRefusal, "late-refusal", 5, "now and then a put that was applied is refused"),
        (V::ForwardedTwice, "forwarded-twice", 6, "a slow leader is sent the same batch again"),
        (V::RevisionPerChange, "revision-per-change", 7, "each change of a txn gets a revision"),
        (V::RevisionForgotten, "revision-forgotten", 8, "a start begins one revision too low"),
        (V::AppliedBehind, "applied-behind", 8, "a checkpoint's position is older than its rows"),
        (V::ApplyReadsClock, "apply-reads-clock", 9, "the version of a key depends on the clock"),
        (V::EventDropped, "event-dropped", 10, "every 16th revision reaches no live watcher"),
        (V::EventRepeated, "event-repeated", 10, "history is read again from the last revision on"),
        (V::RevisionSplit, "revision-split", 10, "each event is a response of its own"),
        (
            V::EventsLostAtInstall,
            "events-lost-at-install",
            10,
            "a received state takes watchers with it, past what they have not seen",
        ),
        (V::CompactedSilently, "compacted-silently", 11, "a watch skips what is compacted"),
        (V::ProgressEarly, "progress-early", 12, "progress is told past the events in the queue"),
        (V::PrevKvNow, "prev-kv-now", 13, "a watcher gets the new state as the one before"),
        (V::CreatedAgain, "created-again", 13, "every put looks like a creation to watchers"),
        (V::KeepAliveForgotten, "keepalive-forgotten", 14, "a renewed lease keeps its old end"),
        (V::LeaseForever, "lease-forever", 14, "a new leader never ends the leases it found"),
        (V::LeaseIdReused, "lease-id-reused", 14, "a lease is granted again under a live id"),
        (V::LeaseTtlForgotten, "lease-ttl-forgotten", 14, "after a start leases have one second"),
        (V::LeaseKeysForgotten, "lease-keys-forgotten", 14, "after a start leases have no keys"),
        (V::KeysOutliveLease, "keys-outlive-lease", 15, "a lease ends without its keys"),
        (V::FenceIgnored, "fence-ignored", 15, "a compare of the create revision always holds"),
        (V::CompactionTooFar, "compaction-too-far", 16, "what the compaction must keep goes too"),
        (V::ReadBelowCompaction, "read-below-compaction", 16, "a read just below is answered"),
        (V::SlowElection, "slow-election", 17, "followers wait twelve times as long"),
        (V::SlowReconnect, "slow-reconnect", 18, "a member that was away waits for a minute"),
        (
            V::FormerTransferStays,
            "former-transfer-stays",
            18,
            "a transfer whose sender died keeps the next one out",
        ),
        (V::LogChecksumIgnored, "log-checksum-ignored", 19, "damaged log records are believed"),
        (V::DivergenceUnseen, "divergence-unseen", 19, "members never differ, whatever they hold"),
        (V::WriteErrorSwallowed, "write-error-swallowed", 20, "failed writes of the log pass"),
        (V::WipedAccepted, "wiped-accepted", 21, "nobody looks whose data directory it is"),
        (V::OlderCopyAccepted, "older-copy-accepted", 21, "a member may have less than it had"),
        (V::BlankVoter, "blank-voter", 22, "a learner is promoted whatever it lacks"),
        (V::WallClock, "wall-clock", 23, "leases end when the wall clock says so"),
        (V::SnapshotWithoutLeases, "snapshot-without-leases", 24, "a sent state has no leases"),
        (V::InstallInPieces, "install-in-pieces", 24, "a state is in force before it is whole"),
        (V::SlowWatcherBlocks, "slow-watcher-blocks", 25, "all wait for the slowest watcher"),
        (V::HeaderAhead, "header-ahead", 26, "a serializable read claims a later revision"),
        (V::MoreForgotten, "more-forgotten", 26, "a read of the past does not say that it was cut"),
        (V::NestedUnchecked, "nested-unchecked", 27, "what is nested in a txn needs no right"),
        (V::PrevKvUnchecked, "prev-kv-unchecked", 27, "who may write is shown the old value"),
        (V::AttachUnchecked, "attach-unchecked", 27, "any lease may be given to a key"),
        (V::WatchUnchecked, "watch-unchecked", 27, "whoever has a token may watch everything"),
        (V::OldRightsAccepted, "old-rights-accepted", 28, "nobody looks how old a right is"),
        (
            V::TokenOutlivesPassword,
            "token-outlives-password",
            28,
            "tokens stay good when their password has been changed",
        ),
        (V::AuthOffAtStart, "auth-off-at-start", 28, "after a start users do not count"),
    ];

    static CHOSEN: OnceLock<Result<Option<Variant>, String>> = OnceLock::new();

    fn chosen() -> &'static Result<Option<Variant>, String> {
        CHOSEN.get_or_init(|| {
            let Some(name) = std::env::var_os(VARIABLE).filter(|name| !name.is_empty()) else {
                return Ok(None);
            };
            let found = TABLE.iter().find(|(_, known, ..)| *known == name);
            found
                .map(|(variant, ..)| Some(*variant))
                .ok_or_else(|| refusal(&name.to_string_lossy()))
        })
    }

    fn refusal(name: &str) -> String {
        let line = |(_, name, claim, what): &(Variant, &str, u8, &str)| {
            format!("{name:24} {claim:2}  {what}\n")
        };
        let list: String = TABLE.iter().map(line).collect();
        format!("{VARIABLE}={name} is no variant; choose one of these (name, claim, what):\n{list}")
    }

    /// Whether this variant was chosen for this process; a name that is none chooses nothing.
    #[must_use]
    pub fn is(variant: Variant) -> bool {
        matches!(chosen(), Ok(Some(chosen)) if *chosen == variant)
    }

    /// The name of the chosen variant.
    ///
    /// # Errors
    /// The name is none of the table, which the text lists.
    pub fn check() -> Result<Option<&'static str>, String> {
        let variant = chosen().as_ref().map_err(Clone::clone)?;
        let name = |variant| TABLE.iter().find(|(known, ..)| *known == variant).map(|row| row.1);
        Ok(variant.and_then(name))
    }

    #[cfg(test)]
    mod tests {
        use std::collections::BTreeSet;

        use super::*;

        #[test]
        fn names_are_unique_and_a_stranger_is_told_all_of_them() {
            let names: BTreeSet<&str> = TABLE.iter().map(|row| row.1).collect();
            assert_eq!(names.len(), TABLE.len());
            let text = refusal("stranger");
            assert!(names.iter().all(|name| text.contains(name)), "{text}");
        }
    }
}
