//! What the tests need of the machine: why something is missing, and the
//! sandboxes that are tried.

use libtest_mimic::{Completion, Failed, Trial};

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

/// Why one of these programs cannot be run, if that is so.
pub fn missing_program(programs: &[&str]) -> Option<String> {
    programs.iter().find_map(|program| {
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
    let version = std::process::Command::new("qemu-img")
        .arg("--version")
        .output();
    let Ok(version) = version else {
        return Some("qemu-img is not installed".to_owned());
    };
    let text = String::from_utf8_lossy(&version.stdout);
    let number = text.split_whitespace().nth(2).unwrap_or("unknown");
    (!number.starts_with("10.")).then(|| format!("qemu-img {number} is not version 10"))
}
