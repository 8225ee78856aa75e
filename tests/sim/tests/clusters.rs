//! Simulated clusters: a fixed set of seeds breaks no rule, a seed gives the same run again, and errors
//! that are planted are found.

use std::path::Path;
use std::process::{Command, Output};

fn turmoil(words: &[&str]) -> Output {
    broken_turmoil("", words)
}

/// With a broken variant of the product; empty is none.
fn broken_turmoil(variant: &str, words: &[&str]) -> Output {
    let keep = tempfile::tempdir().expect("a directory");
    Command::new(env!("CARGO_BIN_EXE_kelson-sim"))
        .env("KELSON_SABOTAGE", variant)
        .arg("turmoil")
        .args(words)
        .arg("--keep")
        .arg(keep.path())
        .output()
        .expect("run it")
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// The number between two words of a line.
fn number(line: &str, before: &str, after: &str) -> u64 {
    let (_, rest) = line.split_once(before).unwrap_or_else(|| panic!("no {before:?}: {line}"));
    let (number, _) = rest.split_once(after).unwrap_or_else(|| panic!("no {after:?}: {line}"));
    number.parse().unwrap_or_else(|_| panic!("no number behind {before:?}: {line}"))
}

#[test]
fn a_fixed_set_of_seeds_breaks_no_rule() {
    let output = turmoil(&["--seeds", "9..18"]);
    let text = said(&output);
    assert!(output.status.success(), "{text}");
    let last = text.lines().last().unwrap_or_default();
    assert!(last.contains("violations 0"), "{last}");
    // Clients that are never answered see no broken promise.
    let operations = number(last, "operations ", " (");
    let unknown = number(last, " (", " unknown");
    let reads = number(last, " unknown, ", " linearizable reads");
    assert!(operations >= 9 * 1_000, "{last}");
    assert!(unknown * 20 < operations, "{last}");
    assert!(reads * 5 > operations, "{last}");
    // A set in which these do not happen proves nothing of them.
    let kinds = [
        "split",
        "one-way",
        "link",
        "hold",
        "latency",
        "loss",
        "kill",
        "power-one",
        "power-many",
        "away",
        "slow-disk",
        "break-transfer",
        "add",
        "promote",
        "remove",
    ];
    for kind in kinds {
        assert!(last.contains(&format!("{kind} ")), "no {kind}: {last}");
    }
}

#[test]
fn five_members_break_no_rule() {
    let output = turmoil(&["--seeds", "6..8", "--members", "5", "--seconds", "10"]);
    let text = said(&output);
    assert!(output.status.success(), "{text}");
    assert!(text.contains("ring "), "no ring: {text}");
}

fn trace(seed: &str, path: &Path) -> Vec<u8> {
    let path_text = path.to_str().expect("it is text");
    let output = turmoil(&["--seed", seed, "--seconds", "12", "--trace", path_text]);
    assert!(output.status.success(), "{}", said(&output));
    std::fs::read(path).expect("a trace")
}

#[test]
fn the_same_seed_twice_gives_the_same_trace() {
    let dir = tempfile::tempdir().expect("a directory");
    for seed in ["1", "3"] {
        let first = trace(seed, &dir.path().join("first"));
        let second = trace(seed, &dir.path().join("second"));
        assert!(first.len() > 10_000, "a trace of {} bytes", first.len());
        assert!(first == second, "seed {seed} gave two runs");
    }
    let other = trace("2", &dir.path().join("other"));
    assert!(other != trace("3", &dir.path().join("again")), "two seeds gave one run");
}

/// Each within these seeds, and by the rule that it breaks.
#[test]
fn planted_errors_are_found() {
    for (flaw, seeds, rule) in [
        ("no-sync", "2..4", "does not start"),
        ("early-ack", "2..4", "members differ at entry"),
        ("local-reads", "1..3", "a read was stale"),
        ("panic", "1..2", "panicked at"),
    ] {
        let output = turmoil(&["--seeds", seeds, "--flaw", flaw]);
        let text = said(&output);
        assert_eq!(output.status.code(), Some(1), "{flaw} passed: {text}");
        let found = |line: &str| line.starts_with("VIOLATION seed ") && line.contains(rule);
        assert!(text.lines().any(found), "{flaw}: no {rule:?}: {text}");
        let again = "again: kelson-sim turmoil --seed ";
        assert!(text.contains(again), "{text}");
    }
}

/// Broken variants of the members, each within these seeds, and found by the rule that it breaks.
#[cfg(feature = "sabotage")]
#[test]
fn broken_variants_are_found() {
    for (variant, seeds, rule) in [
        ("local-reads", "1..3", "a read was stale"),
        ("skip-fsync", "2..4", "does not start"),
        ("vote-forgotten", "1..3", "it forgot its vote"),
        ("revision-forgotten", "1..3", "members differ"),
        ("applied-behind", "1..3", "members differ"),
        ("former-transfer-stays", "8..18", "not whole"),
        ("lease-ttl-forgotten", "1..3", "members hold different leases"),
    ] {
        assert!(broken_turmoil("", &["--seeds", seeds]).status.success(), "{seeds} is broken");
        let text = said(&broken_turmoil(variant, &["--seeds", seeds]));
        let found = |line: &str| line.starts_with("VIOLATION seed ") && line.contains(rule);
        assert!(text.lines().any(found), "{variant}: no {rule:?}: {text}");
        assert!(text.contains(&format!("again: KELSON_SABOTAGE={variant} ")), "{text}");
    }
}

#[test]
fn a_failing_schedule_shrinks() {
    let output = turmoil(&["--seed", "4", "--flaw", "no-sync", "--shrink"]);
    let text = said(&output);
    assert_eq!(output.status.code(), Some(1), "{text}");
    let at = text.find("smallest schedule").expect("it shrinks");
    let steps = text[at..].lines().skip(1).take_while(|line| !line.contains("again:"));
    let steps: Vec<&str> = steps.collect();
    assert_eq!(steps.len(), 1, "one power cut is enough: {steps:?}");
    assert!(steps[0].contains("Power") || steps[0].contains("BreakTransfer"), "{steps:?}");
}

#[test]
fn wrong_words_are_refused() {
    for words in [
        &["--seeds", "5"][..],
        &["--seeds", "9..1"],
        &["--seeds", "7..7"],
        &["--members", "4"],
        &["--flaw", "none"],
        &["--seconds", "1"],
        &["--colour", "red"],
    ] {
        assert_eq!(turmoil(words).status.code(), Some(2), "{words:?}");
    }
}
