//! Which test must catch which broken variant. The cheapest certain test is named, not every test that
//! would notice; jepsen/claims.md tells what each is there for.

/// A test that can be run against any binary.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Test {
    /// Golden scripts whose path contains this text.
    Script(&'static str),
    /// One test of the integration tests: file, name.
    Cargo(&'static str, &'static str),
    /// A command of this program.
    Jepsen(&'static [&'static str]),
    /// Seeds of simulated clusters, in the build of the simulation that can be broken.
    Sim(&'static str),
}

/// A variant of the sabotage build and what must notice it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mutant {
    pub(crate) variant: &'static str,
    pub(crate) test: Test,
}

const fn of(variant: &'static str, test: Test) -> Mutant {
    Mutant { variant, test }
}

const SAME: Test = Test::Cargo("promises", "members_that_were_told_the_same_hold_the_same");
const ALONE: Test =
    Test::Cargo("promises", "a_lone_member_answers_no_read_and_acknowledges_no_write");
const WATCHERS: Test =
    Test::Cargo("watch_rules", "every_watcher_sees_the_history_that_was_written");
const TRANSFER: Test = Test::Cargo("promises", "watches_and_leases_go_through_a_state_transfer");
const FENCED: Test = Test::Cargo("promises", "a_former_holder_of_a_lock_is_fenced_off");
const THIN: Test = Test::Jepsen(&["storm", "--only", "thin-follower", "--seconds", "10"]);
const DELAY: Test = Test::Jepsen(&["smoke", "--only", "delay-50-ms", "--seconds", "8"]);

/// All of them, in the order of the claims.
pub(crate) const MUTANTS: [Mutant; 52] = [
    of("local-reads", ALONE),
    of("late-readers", THIN),
    of("unproven-leader", ALONE),
    of(
        "skip-fsync",
        Test::Cargo("cluster_disk", "nothing_is_acknowledged_while_a_majority_cannot_sync"),
    ),
    of("ack-before-commit", ALONE),
    of(
        "vote-not-synced",
        Test::Cargo("cluster_disk", "nobody_is_elected_by_votes_that_are_not_on_disk"),
    ),
    of("vote-forgotten", Test::Cargo("promises", "a_vote_survives_the_end_of_the_process")),
    of("late-refusal", DELAY),
    of("forwarded-twice", Test::Cargo("promises", "a_leader_that_stands_still_gets_a_write_once")),
    of("revision-per-change", WATCHERS),
    of("revision-forgotten", Test::Script("kv/restart")),
    of("applied-behind", Test::Cargo("crash", "every_acknowledged_write_survives_kill_9")),
    of("apply-reads-clock", SAME),
    of("event-dropped", WATCHERS),
    of("event-repeated", WATCHERS),
    of("revision-split", WATCHERS),
    of("events-lost-at-install", TRANSFER),
    of("compacted-silently", Test::Script("watch/compaction")),
    of("progress-early", WATCHERS),
    of("prev-kv-now", WATCHERS),
    of("created-again", WATCHERS),
    of("keepalive-forgotten", Test::Cargo("cluster", "leases_live_through_any_member")),
    of("lease-forever", Test::Cargo("promises", "a_lease_ends_in_time_whoever_leads")),
    of("lease-id-reused", Test::Script("lease/basics")),
    of("lease-ttl-forgotten", Test::Script("kv/restart")),
    of("lease-keys-forgotten", Test::Script("kv/restart")),
    of("keys-outlive-lease", FENCED),
    of("fence-ignored", FENCED),
    of("compaction-too-far", Test::Script("kv/compact")),
    of("read-below-compaction", Test::Script("kv/compact")),
    of(
        "slow-election",
        Test::Cargo("promises", "a_majority_goes_on_within_seconds_without_the_leader"),
    ),
    of(
        "slow-reconnect",
        Test::Cargo("promises", "a_member_that_was_away_serves_again_within_seconds"),
    ),
    of("former-transfer-stays", Test::Sim("8..18")),
    of(
        "log-checksum-ignored",
        Test::Cargo("bad_disk", "a_damaged_entry_that_a_start_needs_is_not_believed"),
    ),
    of("divergence-unseen", Test::Cargo("cluster", "a_member_with_other_data_is_found_and_named")),
    of("write-error-swallowed", Test::Cargo("power_loss", "nothing_acknowledged_is_lost_on_ext4")),
    of("wiped-accepted", Test::Cargo("cluster", "a_member_that_lost_its_data_is_refused")),
    of(
        "older-copy-accepted",
        Test::Cargo("cluster", "a_member_with_an_older_copy_of_its_data_ends_and_hurts_nobody"),
    ),
    of("blank-voter", Test::Cargo("promises", "a_learner_that_lacks_the_log_gets_no_vote")),
    of("wall-clock", Test::Cargo("clock", "jumps_of_the_wall_clock_change_nothing")),
    of("snapshot-without-leases", TRANSFER),
    of(
        "install-in-pieces",
        Test::Cargo("promises", "a_member_killed_while_it_receives_a_state_comes_back"),
    ),
    of(
        "slow-watcher-blocks",
        Test::Cargo("watch_rules", "a_watcher_that_takes_nothing_stops_nobody"),
    ),
    of("header-ahead", Test::Script("kv/range")),
    of("more-forgotten", Test::Script("kv/range")),
    of("nested-unchecked", Test::Cargo("auth_matrix", "nesting_hides_no_operation")),
    of("prev-kv-unchecked", Test::Cargo("auth_matrix", "prev_kv_is_a_read")),
    of("attach-unchecked", Test::Cargo("auth_matrix", "no_key_is_attached_to_a_lease_of_others")),
    of("watch-unchecked", Test::Cargo("auth_matrix", "a_watch_of_one_key_shows_one_key")),
    of(
        "old-rights-accepted",
        Test::Cargo("auth_tokens", "signed_tokens_are_checked_by_whoever_has_the_key"),
    ),
    of("token-outlives-password", Test::Script("auth/tokens")),
    of("auth-off-at-start", Test::Cargo("auth_tokens", "users_survive_a_crash_and_an_orderly_end")),
];
