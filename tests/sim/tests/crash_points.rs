//! The enumeration of a short run, and the proof that it finds what is wrong: deliberate errors in the
//! trace and in the recovery, each of which must be found.

use std::path::Path;
use std::process::Command;
use std::sync::OnceLock;

use kelson_sim::cuts::{Choice, Only};
use kelson_sim::enumerate::{Extent, Report, Violation, enumerate, kinds, prepare, record};
use kelson_sim::flaw::{FLAWS, Flaw};
use kelson_sim::image::{check_complete, fast_dir};
use kelson_sim::plan::Scale;
use kelson_sim::record::Recorder;
use kelson_sim::recover::Sabotage;
use kelson_sim::trace::Call;
use kelson_sim::worker::Task;

const SCALE: Scale = Scale { seed: 1, operations: 150 };

fn program() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_kelson-sim"))
}

/// One recording serves all tests.
fn calls() -> &'static [Call] {
    static CALLS: OnceLock<Vec<Call>> = OnceLock::new();
    CALLS.get_or_init(|| record(program(), SCALE).expect("a run is recorded completely"))
}

fn cut(calls: &[Call], sabotage: Sabotage, extent: impl FnOnce(Extent) -> Extent) -> Report {
    let home = tempfile::tempdir_in(fast_dir()).expect("a directory");
    let choice = Choice { only: Only::All, subsets: 1, one: None };
    let task = Task { home: home.path().to_owned(), scale: SCALE, choice, sabotage };
    prepare(&task, calls).expect("the run can be judged");
    let extent = extent(Extent::all(calls, 2));
    enumerate(program(), &task, extent, &|_| ()).expect("the workers work")
}

#[test]
fn every_cut_of_a_short_run_leaves_a_member_that_keeps_its_word() {
    let report = cut(calls(), Sabotage::None, |all| all);
    assert_eq!(report.violations, []);
    // These are made everywhere, the others only where there is something to lose, or to break off.
    for cut in ["kill", "power-none", "power-all"] {
        assert_eq!(report.cuts.get(cut), Some(&(calls().len() as u64 + 1)), "{cut}: {report:?}");
    }
    for cut in ["kill-within", "power-some-0"] {
        assert!(report.cuts.get(cut).is_some_and(|count| *count > 0), "no {cut}: {report:?}");
    }
    assert!(report.images > calls().len() as u64 / 2, "{report:?}");
    let kinds = kinds(calls());
    for kind in ["create", "write", "rename", "unlink", "mkdir", "rmdir", "sync of a directory"] {
        assert!(kinds.contains_key(kind), "the run has no {kind}: {kinds:?}");
    }
}

/// Whether an error can hurt depends on the order in which the threads of a run came to their calls, so
/// it may need another recording.
const RECORDINGS: usize = 4;

/// What was seen of an error that was planted in a recording, if anything was.
fn noticed(flaw: Flaw, calls: &[Call]) -> Option<Violation> {
    let planted = flaw.plant(calls)?;
    let same = calls.iter().zip(&planted).take_while(|(a, b)| a == b).count();
    let report = cut(&planted, Sabotage::None, |all| Extent {
        places: (same, all.places.1),
        violations_max: 1,
        ..all
    });
    report.violations.into_iter().next()
}

#[test]
fn every_planted_error_is_found() {
    for flaw in FLAWS {
        let again = || noticed(flaw, &record(program(), SCALE).expect("a run is recorded"));
        let found = noticed(flaw, calls()).or_else(|| (1..RECORDINGS).find_map(|_| again()));
        let found = found.unwrap_or_else(|| panic!("nobody noticed {flaw:?} in {RECORDINGS} runs"));
        println!("{flaw:?}: call {} {}: {}", found.place, found.cut, found.text);
    }
}

#[test]
fn a_recovery_that_forgets_the_log_is_found() {
    let report = cut(calls(), Sabotage::SkipReplay, |all| Extent {
        places: (all.places.1 / 2, all.places.1),
        violations_max: 1,
        ..all
    });
    let found = report.violations.first().expect("operations are missing");
    assert!(found.text.contains("acknowledged"), "{found:?}");
}

#[test]
fn a_member_that_ends_its_process_is_a_violation_and_not_the_end() {
    let middle = calls().len() / 2;
    let places = (middle, middle + 4);
    let report = cut(calls(), Sabotage::Die, |all| Extent { places, workers: 1, ..all });
    let found: Vec<usize> = report.violations.iter().map(|violation| violation.place).collect();
    assert_eq!(found, (middle..=middle + 4).collect::<Vec<_>>(), "each place has its own");
    assert!(report.violations[0].text.contains("ended its process"), "{report:?}");
}

#[test]
fn an_enumeration_without_a_cut_has_tested_nothing() {
    let dir = tempfile::tempdir().expect("a directory");
    let trace = dir.path().join("trace");
    kelson_sim::trace::save(&trace, calls()).expect("it is kept");
    // Behind the last call there is none to be cut off within.
    let end = calls().len().to_string();
    let words = ["--operations", "150", "--cut", "kill-within", "--from", &end, "--to", &end];
    let output = Command::new(program())
        .args(["crash-points", "--trace"])
        .arg(&trace)
        .args(words)
        .output()
        .expect("run it");
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert!(said.contains("no cut was made"), "{said}");
}

fn script(text: &str) -> Result<(), String> {
    let home = tempfile::tempdir_in(fast_dir()).expect("a directory");
    let root = home.path().join("disk");
    std::fs::create_dir(&root).expect("makes it");
    let mut recorder = Recorder::new(&root, &home.path().join("marks")).expect("finds it");
    let code = recorder.run(Command::new("sh").args(["-c", text]).current_dir(&root))?;
    assert_eq!(code, 0, "{text}");
    check_complete(&recorder.into_calls(), &root)
}

#[test]
fn a_recording_of_any_program_is_complete() {
    script("mkdir -p a/b; echo one > a/x; echo two >> a/x; echo 3 > a/b/y; mv a/x a/z")
        .expect("whole");
    script("echo long text > x; echo - > x; rm x; mkdir d; rmdir d; (echo sub > z)")
        .expect("whole");
    script("head -c 100000 /dev/zero | tr '\\0' x > x; dd if=/dev/zero of=x bs=7 seek=3 count=2 conv=notrunc,fsync")
        .expect("whole");
    script("head -c 5000 /dev/zero > x; truncate -s 70 x; truncate -s 9000 x; echo end >> x")
        .expect("whole");
}

#[test]
fn calls_that_are_not_understood_are_refused() {
    for text in ["echo 1 > x; ln x y", "ln -s x y", "mkdir a; echo 1 > x; mv x a/x"] {
        let refused = script(text).expect_err(text);
        assert!(refused.contains("does not know"), "{text}: {refused}");
    }
}

#[test]
fn a_flaw_changes_the_trace_and_no_content_of_the_run() {
    for flaw in FLAWS {
        let planted = flaw.plant(calls()).expect("there is room for it");
        assert_ne!(planted, calls(), "{flaw:?}");
        let count = |calls: &[Call]| calls.iter().filter(|c| matches!(c, Call::Mark(_))).count();
        assert_eq!(count(&planted), count(calls()), "{flaw:?} keeps what the run said");
        assert!(!matches!(flaw, Flaw::ToldFirst) || planted.len() == calls().len());
    }
}
