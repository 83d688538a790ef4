//! What a check finds, and the sums over it.

use alloc::string::String;
use serde::{Deserialize, Serialize};

/// What is to be repaired.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Repair {
    /// Space that is counted as used and is not.
    Leaks,
    /// Whatever can be repaired.
    All,
}

/// One thing that a check has to say.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// How bad it is.
    pub severity: Severity,
    /// What it is, one line. May quote the image, so the host escapes it.
    pub text: String,
}

/// How bad a [`Finding`] is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Severity {
    /// The metadata contradicts itself: data may be lost.
    Corruption,
    /// Space is wasted.
    Leak,
    /// Something could not be checked.
    Error,
    /// What was found is being repaired, by the plan that comes with the report.
    Repaired,
    /// Worth knowing, not counted: more than qemu-img looks at.
    Warning,
}

/// The sums of a check, named as in qemu-img's JSON. A unit is the format's
/// (cluster, grain, block).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// Things that could not be checked.
    pub check_errors: u64,
    /// End of the last unit in use, in bytes from the start of the file.
    pub image_end_offset: Option<u64>,
    /// Units of the virtual disk.
    pub total_clusters: u64,
    /// Units that hold data.
    pub allocated_clusters: u64,
    /// Units that do not follow their predecessor in the file.
    pub fragmented_clusters: u64,
    /// Units that are compressed.
    pub compressed_clusters: u64,
    /// Contradictions that remain.
    pub corruptions: u64,
    /// Wasted units that remain.
    pub leaks: u64,
    /// Contradictions that the plan of the answer repairs.
    pub corruptions_fixed: u64,
    /// Wasted units that the plan of the answer frees.
    pub leaks_fixed: u64,
}
