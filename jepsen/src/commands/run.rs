//! `jepsen run`: one workload against faults of the classes asked for, by a schedule that is drawn
//! from the seed and written down first. `--smoke` is the short form that every change should pass,
//! `--rootless` the one that needs no privileges.

use std::path::Path;
use std::time::Duration;

use kelson_image::Kind;

use crate::args::Args;
use crate::attack;
use crate::capture::{CAPTURE, Capture};
use crate::cluster::Target;
use crate::nemesis::{Class, Fault};
use crate::page;
use crate::run::{Plan, Run, inside};
use crate::schedule::{self, Schedule};
use crate::workload::{Shape, Workload};

/// Operations per second asked for; the machine may give less.
const RATE: u64 = 300;

pub(crate) fn run(mut args: Args) -> Result<bool, String> {
    if args.switch("matrix") {
        return super::matrix::run(args);
    }
    let smoke = args.switch("smoke");
    let workload = Workload::named(&args.text("workload", Workload::Mixed.name())?)?;
    let name = if smoke { "run-smoke".into() } else { format!("run-{}", workload.name()) };
    let mut plan = Plan::from_args(&name, &mut args)?;
    plan.rootless = args.switch("rootless");
    let seconds = args.number("seconds", 30)?;
    let rate = args.number("rate", RATE)?;
    let faults = wanted(&mut args, smoke, plan.rootless)?;
    let written = args.text("schedule", "")?;
    let disk = args.text("disk", "auto")?;
    args.done()?;
    let planned =
        if written.is_empty() { None } else { Some(Schedule::load(Path::new(&written))?) };
    let faults = match &planned {
        Some(schedule) => schedule.faults()?,
        None => faults,
    };
    equip(&mut plan, &faults, &disk)?;
    let schedule = match planned {
        Some(schedule) => schedule,
        None if smoke => Schedule::once(&plan, &faults),
        None => Schedule::draw(&plan, &faults, seconds),
    };
    for left in &schedule.left_out {
        println!("left out: {}: {}", left.fault, left.reason);
    }
    let wanted = schedule.faults()?;
    plan.spare = wanted.iter().map(|fault| fault.spares()).sum();
    if plan.members + plan.spare > 200 {
        return Err("--seconds: the network has 200 places for members that join".into());
    }
    plan.extra.extend(workload.flags().iter().map(|flag| (*flag).to_owned()));
    let shape = Shape { workload, rate, ..Shape::default() };
    carry_out(plan, &schedule, shape, Duration::from_secs(seconds))
}

fn carry_out(
    plan: Plan,
    schedule: &Schedule,
    shape: Shape,
    time: Duration,
) -> Result<bool, String> {
    let verdict = inside(&plan.clone(), async |fabric| {
        let run = Run::start(plan, fabric).await?;
        schedule.save(&run.dir.join("schedule.json"))?;
        run.fabric.capture(Capture::create(&run.dir.join(CAPTURE))?);
        run.begin(shape);
        if schedule.entries.is_empty() {
            // Without faults it is a run as well: the load alone.
            tokio::time::sleep(time).await;
        }
        let measured = attack::carry_out(&run, schedule).await?;
        run.finish(measured).await
    });
    verdict.map_err(|error| error.to_string())?.end()
}

/// The faults that the words ask for: by name, by class, or all that there are for such a run.
fn wanted(args: &mut Args, smoke: bool, rootless: bool) -> Result<Vec<Fault>, String> {
    let (names, classes) = (args.many("fault"), args.many("class"));
    let none = args.switch("calm");
    if smoke {
        return match names.is_empty() && classes.is_empty() && !none {
            true => Ok(schedule::SMOKE.to_vec()),
            false => Err("--smoke has its own faults: leave out --fault, --class, --calm".into()),
        };
    }
    if none {
        return Ok(Vec::new());
    }
    let classes: Result<Vec<Class>, String> =
        classes.iter().map(|name| Class::named(name)).collect();
    let classes = classes?;
    let from: Vec<Fault> = match classes.is_empty() {
        true if rootless => Fault::of(Class::Process),
        true => Fault::all().collect(),
        false => classes.into_iter().flat_map(Fault::of).collect(),
    };
    Fault::named(&names, &from)
}

/// Gives members the disks and the library that the faults need.
fn equip(plan: &mut Plan, faults: &[Fault], disk: &str) -> Result<(), String> {
    let image = faults.iter().any(|fault| fault.needs_image()) && !plan.rootless;
    plan.disk = match disk {
        "ext4" => Some(Kind::Ext4),
        "xfs" => Some(Kind::Xfs),
        "none" => None,
        "auto" if !image => None,
        "auto" if plan.seed.is_multiple_of(2) => Some(Kind::Ext4),
        "auto" => Some(Kind::Xfs),
        other => return Err(format!("--disk is ext4, xfs, none or auto, not {other:?}")),
    };
    let page = faults.iter().any(|fault| fault.needs_page()) && !plan.rootless;
    if page && plan.target == Target::Kelson {
        plan.shim = Some(page::library()?);
    }
    Ok(())
}
