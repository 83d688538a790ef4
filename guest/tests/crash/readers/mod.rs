//! Readers of disks that were written from the specifications alone. They are
//! stricter than qemu-img, or read another copy, and share nothing with the
//! engine.

pub mod qcow2;
pub mod vhd;
pub mod vhdx;
pub mod vmdk;

/// Bytes of a sector.
const SECTOR: u64 = 512;

/// Fails with a text where something does not hold.
fn hold(holds: bool, text: impl FnOnce() -> String) -> Result<(), String> {
    if holds { Ok(()) } else { Err(text()) }
}

/// Ranges of a file that are in use, each for one thing only.
#[derive(Default)]
struct Uses(Vec<(u64, u64, String)>);

impl Uses {
    fn add(&mut self, offset: u64, len: u64, what: impl Into<String>) {
        self.0.push((offset, offset + len, what.into()));
    }

    /// Whether all lie inside a file of a length, and none on another.
    fn check(mut self, file_len: u64) -> Result<(), String> {
        self.0.sort();
        for (start, end, what) in &self.0 {
            hold(*end <= file_len, || {
                format!("{what} at {start:#x}..{end:#x} is past the end, {file_len:#x}")
            })?;
        }
        for pair in self.0.windows(2) {
            let ((start, end, one), (next, _, other)) = (&pair[0], &pair[1]);
            hold(end <= next, || {
                format!("{one} at {start:#x}..{end:#x} and {other} at {next:#x} overlap")
            })?;
        }
        Ok(())
    }
}
