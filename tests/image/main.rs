//! Open images through the whole stack - host, sandbox, engine - over images
//! that qemu-img makes, judged by qemu-img: content, locks, named files,
//! creation, resizing, writing.

mod create;
mod lab;
mod locks;
#[path = "../support/machine.rs"]
mod machine;
mod named;
mod resize;
mod write;

use instar::sandbox::{Config, Isolation, Pool};
use lab::VARIANTS;
use libtest_mimic::{Arguments, Trial};
use machine::{missing_program, sandboxes, trial};
use std::process::ExitCode;
use std::sync::Arc;

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    let tools = missing_program(&["qemu-img", "qemu-io"]);
    let mut trials: Vec<Trial> = Vec::new();
    for (sandbox, missing) in sandboxes() {
        let missing = missing.or_else(|| tools.clone());
        let mut add =
            |name: String, body: Box<dyn FnOnce(&Arc<Pool>) -> machine::Outcome + Send>| {
                let body = move || body(&pool(sandbox)?);
                trials.push(trial(format!("{sandbox}/{name}"), missing.clone(), body));
            };
        for variant in VARIANTS {
            for (name, body) in lab::PER_VARIANT {
                add(
                    format!("{name}/{}", variant.name),
                    Box::new(move |pool| body(pool, variant)),
                );
            }
        }
        for (name, body) in [
            locks::CASES,
            named::CASES,
            create::CASES,
            resize::CASES,
            write::CASES,
        ]
        .concat()
        {
            add(name.to_string(), Box::new(move |pool| body(pool)));
        }
    }
    libtest_mimic::run(&arguments, trials).exit_code()
}

fn pool(sandbox: &str) -> Result<Arc<Pool>, String> {
    let isolation: Isolation = sandbox.parse().map_err(|error| format!("{error}"))?;
    let config = Config {
        isolation,
        ..Config::default()
    };
    Pool::new(config).map_err(|error| error.to_string())
}
