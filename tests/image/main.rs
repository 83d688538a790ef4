//! Open images through the whole stack - host, sandbox, engine - over images
//! that qemu-img makes, judged by qemu-img: content, locks, named files,
//! creation, resizing, writing, repairs.

mod create;
mod lab;
mod locks;
#[allow(dead_code)] // Shared: not every test binary needs all of it.
#[path = "../support/machine.rs"]
mod machine;
mod named;
mod resize;
mod resting;
mod several;
mod write;

use instar::sandbox::{Config, Isolation, Pool};
use lab::{Case, VARIANTS};
use libtest_mimic::{Arguments, Trial};
use machine::{missing_program, sandboxes, trial};
use std::process::ExitCode;
use std::sync::Arc;

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    let tools = missing_program(&["qemu-img", "qemu-io"]);
    let no_root = (!nix::unistd::getuid().is_root()).then(|| "needs root".to_string());
    let mut trials: Vec<Trial> = Vec::new();
    for (sandbox, missing) in sandboxes() {
        let missing = missing.or_else(|| tools.clone());
        for variant in VARIANTS {
            for (name, body) in lab::PER_VARIANT.iter().chain(resting::PER_VARIANT) {
                let name = format!("{sandbox}/{name}/{}", variant.name);
                let body = move || body(&pool(sandbox)?, variant);
                trials.push(trial(name, missing.clone(), body));
            }
        }
        let cases = [
            locks::CASES,
            named::CASES,
            create::CASES,
            resize::CASES,
            resting::CASES,
            several::CASES,
            write::CASES,
        ];
        let as_root = [named::AS_ROOT, write::AS_ROOT].concat();
        let missing_root = missing.clone().or_else(|| no_root.clone());
        trials.extend(
            cases
                .concat()
                .into_iter()
                .map(|case| plain(sandbox, &missing, case)),
        );
        trials.extend(
            as_root
                .into_iter()
                .map(|case| plain(sandbox, &missing_root, case)),
        );
    }
    libtest_mimic::run(&arguments, trials).exit_code()
}

fn plain(sandbox: &'static str, missing: &Option<String>, (name, body): Case) -> Trial {
    let body = move || body(&pool(sandbox)?);
    trial(format!("{sandbox}/{name}"), missing.clone(), body)
}

fn pool(sandbox: &str) -> Result<Arc<Pool>, String> {
    let isolation: Isolation = sandbox.parse().map_err(|error| format!("{error}"))?;
    let config = Config {
        isolation,
        ..Config::default()
    };
    Pool::new(config).map_err(|error| error.to_string())
}
