//! What the tests need of the machine: why something is missing, and the
//! sandboxes that are tried.

use libtest_mimic::{Completion, Failed, Trial};
use std::sync::OnceLock;

/// What a test body answers.
pub type Outcome = Result<(), String>;

/// A test that reports itself as ignored where `missing` has a reason.
pub fn trial(
    name: impl Into<String>,
    missing: Option<String>,
    body: impl FnOnce() -> Outcome + Send + 'static,
) -> Trial {
    Trial::ignorable_test(name, move || match missing {
        Some(reason) => Ok(Completion::ignored_with(reason)),
        None => body().map(|()| Completion::Completed).map_err(Failed::from),
    })
}

/// The sandboxes to try: both, unless the environment names one. With each goes
/// the reason why it cannot be tried here, if there is one.
pub fn sandboxes() -> Vec<(&'static str, Option<String>)> {
    let only = std::env::var("INSTAR_ISOLATION").unwrap_or_default();
    [
        ("kvm", instar::sandbox::probe_kvm()),
        ("process", instar::sandbox::probe_process()),
    ]
    .into_iter()
    .filter(|(name, _)| !["kvm", "process"].contains(&only.as_str()) || only == *name)
    .map(|(name, probe)| (name, probe.err().map(|error| error.to_string())))
    .collect()
}

/// The qemu-img that tests ask: the one that `INSTAR_QEMU_IMG` names, or that of
/// the machine.
pub fn qemu_img() -> &'static str {
    static PROGRAM: OnceLock<String> = OnceLock::new();
    PROGRAM.get_or_init(|| {
        let named = std::env::var("INSTAR_QEMU_IMG").ok();
        // Tests run it in folders of their own.
        let path = |name: String| match std::fs::canonicalize(&name) {
            Ok(path) if name.contains('/') => path.display().to_string(),
            _ => name,
        };
        named.map_or_else(|| "qemu-img".to_owned(), path)
    })
}

/// The version of that qemu-img, such as `10.0.2`.
pub fn qemu_img_version() -> Result<String, String> {
    let program = qemu_img();
    let said = std::process::Command::new(program)
        .arg("--version")
        .output();
    let said = said.map_err(|error| format!("{program}: {error}"))?;
    let text = String::from_utf8_lossy(&said.stdout);
    let version = text.split_whitespace().nth(2);
    version
        .map(str::to_owned)
        .ok_or_else(|| format!("{program} does not say its version: {text}"))
}

/// Why one of these programs cannot be run, if that is so.
pub fn missing_program(programs: &[&str]) -> Option<String> {
    programs.iter().find_map(|&program| {
        let program = match program {
            "qemu-img" => qemu_img(),
            program => program,
        };
        let found = std::process::Command::new(program)
            .arg("--version")
            .output()
            .is_ok();
        (!found).then(|| format!("{program} is not installed"))
    })
}

/// Why a device cannot be used, if that is so.
pub fn missing_device(path: &str) -> Option<String> {
    let opened = std::fs::File::options().read(true).write(true).open(path);
    opened.err().map(|error| format!("{path}: {error}"))
}

/// Why nothing can be mounted here, if that is so.
pub fn missing_for_mounts() -> Option<String> {
    let helper = || match nix::unistd::geteuid().is_root() {
        true => None,
        false => missing_program(&["fusermount3"]),
    };
    missing_device("/dev/fuse").or_else(helper)
}

/// Why texts and answers of qemu-img cannot be compared with, if that is so:
/// they are those of version 10.
pub fn missing_qemu_img_10() -> Option<String> {
    let number = match qemu_img_version() {
        Ok(number) => number,
        Err(why) => return Some(why),
    };
    (!number.starts_with("10.")).then(|| format!("qemu-img {number} is not version 10"))
}
