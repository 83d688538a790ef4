//! Commands to which older versions of qemu-img say something that instar does not
//! follow, each with its reason.

/// Before the version; the test; the beginning of the command, or all of them
/// where it is empty.
type Known = ((u32, u32), &'static str, &'static str);

const SIX: (u32, u32) = (6, 0);
const TEN: (u32, u32) = (10, 0);

const KNOWN: &[Known] = &[
    // The image uses what that version does not have.
    (SIX, "info-extended-l2-zstd", ""),
    (SIX, "map-extended-l2", ""),
    (SIX, "qcow2 compressed by another method", ""),
    (SIX, "create-qcow2-options", ""),
    (SIX, "create-vmdk", "create -f vmdk -o toolsversion"),
    // A long name leaves no blank behind it.
    (SIX, "info-snapshots", "info snapshots.qcow2"),
    // It opens an image to show it, with all its files.
    (SIX, "info-dirty-lazy-refcounts", ""),
    (SIX, "info-without-data-file", ""),
    // Sizes read as C reads them, and other words for bad values.
    (SIX, "map-usage", "map -s 1e3"),
    (SIX, "resize-sizes", "resize -f raw disk 1e3"),
    (SIX, "create-usage", "create -f qcow2 new"),
    (SIX, "create-qcow2-refused", ""),
    (SIX, "create-vmdk-refused", ""),
    (SIX, "create-vpc", "create -f vpc -o subformat=bogus"),
    (SIX, "create-vhdx", "create -f vhdx -o subformat=bogus"),
    (SIX, "info-usage", "info ."),
    (SIX, "resize-usage", "resize . "),
    (SIX, "create-overlay", "create -f qcow2 -b . "),
    (SIX, "create-preallocated", "create -f raw"),
    // A missing format of the backing file is a warning.
    (SIX, "create-overlay", "create -f qcow2 -b base.qcow2 top"),
    (SIX, "create-overlay", "create -f qcow2 -u -b nowhere top"),
    (SIX, "create-vmdk-overlay", "create -f vmdk -b below top"),
    // Reserved bits are not looked at, and compressed data begins at a sector.
    (SIX, "qcow2, reserved bits of data", ""),
    (SIX, "qcow2, reserved bits of a table", ""),
    (SIX, "qcow2, reserved bits of counts", ""),
    (SIX, "qcow2, table at no cluster", ""),
    // The wrong argument is named, or the first mistake is another one.
    (TEN, "info-usage", "info -xU"),
    (TEN, "resize-usage", "resize --preallocation"),
    (TEN, "resize-usage", "resize base.qcow2 --bogus"),
    (TEN, "check-usage", "check --cache"),
    // Numbers below zero, and too large ones.
    (TEN, "map-usage", "map -s -1"),
    (TEN, "create-usage", "create -f qcow2 new -- -"),
    (
        TEN,
        "create-qcow2-refused",
        "create -f qcow2 -o cluster_size=-1",
    ),
    (TEN, "create-qcow2-refused", "create -f qcow2 -o size=-1"),
    (TEN, "resize-sizes", "resize -f raw disk +-1"),
    (
        TEN,
        "resize-sizes",
        "resize -f raw disk 9223372036854775807",
    ),
];

/// Whether a version is known to say something else to a command of a test.
pub fn is_known(version: &str, test: &str, line: &str) -> bool {
    let mut numbers = version.split('.').map(|part| part.parse().unwrap_or(0));
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    KNOWN.iter().any(|&(before, name, beginning)| {
        version < before && name == test && line.starts_with(beginning)
    })
}
