//! `jepsen run`: one workload for a while on a cluster that nobody hurts.

use std::time::Duration;

use crate::args::Args;
use crate::run::{Plan, Run, inside};
use crate::workload::{Shape, Workload};

pub(crate) fn run(mut args: Args) -> Result<bool, String> {
    let workload = Workload::named(&args.text("workload", Workload::Mixed.name())?)?;
    let mut plan = Plan::from_args(workload.name(), &mut args)?;
    let seconds = args.number("seconds", 30)?;
    let rate = args.number("rate", 300)?;
    args.done()?;
    plan.extra.extend(workload.flags().iter().map(|flag| (*flag).to_owned()));
    let verdict = inside(&plan.clone(), async |fabric| {
        let run = Run::start(plan, fabric).await?;
        run.begin(Shape { workload, rate, ..Shape::default() });
        tokio::time::sleep(Duration::from_secs(seconds)).await;
        run.finish(Vec::new()).await
    });
    verdict.map(|verdict| verdict.valid()).map_err(|error| error.to_string())
}
