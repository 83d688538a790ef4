//! How a program for the sandbox is built: shared by the root package's build
//! script and by the tests, which build programs of their own.
//!
//! Nothing but the stable toolchain and the host's own target is needed.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What to build and where.
pub struct Recipe<'a> {
    /// The cargo to run.
    pub cargo: OsString,
    /// Directory of the root package.
    pub root: &'a Path,
    /// Target directory for this build alone, so that it waits for no other.
    pub target_dir: &'a Path,
    /// Package that has the binary; the binary has its name.
    pub package: &'a str,
    /// The id that the program shows its host, in hexadecimal.
    pub build_id: &'a str,
}

const TARGET: &str = "x86_64-unknown-linux-gnu";

impl Recipe<'_> {
    /// Builds the program and returns the path of its ELF file.
    pub fn build(&self) -> Result<PathBuf, String> {
        let status = self
            .command()
            .status()
            .map_err(|error| format!("{} cannot be run: {error}", self.cargo.display()))?;
        if !status.success() {
            return Err(format!("building {} failed: {status}", self.package));
        }
        Ok(self
            .target_dir
            .join(TARGET)
            .join("guest")
            .join(self.package))
    }

    fn command(&self) -> Command {
        let mut cargo = Command::new(&self.cargo);
        cargo
            .current_dir(self.root)
            .args(["build", "--profile", "guest", "--target", TARGET])
            .args(["--package", self.package, "--bin", self.package])
            .args(["--features", "vm", "--target-dir"])
            .arg(self.target_dir)
            .env("INSTAR_BUILD_ID", self.build_id)
            .env("CARGO_ENCODED_RUSTFLAGS", self.rustflags());
        // These would make the program depend on how the outer build was
        // started, or run it through a lint.
        for name in [
            "RUSTFLAGS",
            "CARGO_BUILD_TARGET",
            "CARGO_TARGET_DIR",
            "RUSTC_WORKSPACE_WRAPPER",
            "CLIPPY_ARGS",
        ] {
            cargo.env_remove(name);
        }
        cargo
    }

    fn rustflags(&self) -> String {
        let script = self.root.join("guest/guest.ld");
        let mut flags = vec!["-Crelocation-model=static".to_owned()];
        for arg in ["-nostartfiles", "-nostdlib", "-static", "-no-pie"] {
            flags.push(format!("-Clink-arg={arg}"));
        }
        flags.push(format!(
            "-Clink-arg=-Wl,-T,{},--build-id=none",
            script.display()
        ));
        flags.join("\u{1f}")
    }
}
