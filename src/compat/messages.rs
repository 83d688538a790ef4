//! Messages that programs may look for in qemu-img's output. They stand behind
//! the program's name and a colon.

use super::size::SizeError;
use super::version::QemuVersion;

/// What `resize` prints when it is done.
pub const RESIZED: &str = "Image resized.\n";

/// A shrink without the option that allows it.
pub const USE_SHRINK: &str = "Use the --shrink option to perform a shrink operation.";
/// The warning that goes with it.
pub const SHRINK_WARNING: &str = "Shrinking an image will delete all data beyond the shrunken \
     image's end. Before performing such an operation, make sure there is no important data there.";
/// A preallocation mode with a size that is not larger.
pub const PREALLOCATION_GROWS: &str = "Preallocation can only be used for growing images";
/// A size of zero or below, or above what is possible.
pub const SIZE_NOT_POSITIVE: &str = "New image size must be positive";
/// A check that could not look at everything.
pub const CHECK_FAILED: &str = "Check failed";
/// `map` for people met data that has no place in a file.
pub const UNMAPPABLE: &str = "File contains external, encrypted or compressed clusters.";

/// The mapping of an encrypted image was asked for.
pub const ENCRYPTED: &str = "Parameter 'encrypt.key-secret' is required for cipher; keys are not \
     supported: decrypt the image with 'qemu-img convert' first";

/// The three lines that follow a file name when a raw image was probed and is
/// about to be written.
pub fn probed_raw(file: &str) -> String {
    format!(
        "WARNING: Image format was not specified for '{file}' and probing guessed raw.
         Automatically detecting the format is dangerous for raw images, write operations on block 0 will be restricted.
         Specify the 'raw' format explicitly to remove the restrictions.\n"
    )
}

/// The greatest size in bytes that qemu gives a disk.
pub const MAX_SIZE: u64 = 0x7fff_ffff_c000_0000;

/// A size above [`MAX_SIZE`].
pub fn size_too_large(size: u64) -> String {
    format!("offset({size}) exceeds maximum({MAX_SIZE})")
}

/// A size for `resize`, without the sign that makes it relative, or for `-o
/// size=` that is none.
pub fn bad_new_size(text: &str, error: SizeError) -> String {
    match error {
        SizeError::Grammar => "Parameter 'size' expects a non-negative number below 2^64
Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-
and exabytes, respectively."
            .to_owned(),
        SizeError::Range => format!("Value '{text}' is out of range for parameter 'size'"),
    }
}

/// A number argument that is none, or is above 2^63 - 1. `program` is the name
/// before the second line that older versions have.
pub fn bad_number(
    what: &str,
    text: &str,
    error: SizeError,
    version: QemuVersion,
    program: &str,
) -> String {
    match error {
        SizeError::Grammar if version.explains_commands() => {
            let stop = if version.has_words_of_10() { "." } else { "" };
            format!("Invalid {what} specified: '{text}'{stop}")
        }
        SizeError::Grammar => format!(
            "Invalid {what} specified. You may use k, M, G, T, P or E suffixes for
{program}: kilobytes, megabytes, gigabytes, terabytes, petabytes and exabytes."
        ),
        SizeError::Range => format!(
            "Invalid {what} specified. Must be between 0 and {}.",
            i64::MAX
        ),
    }
}
