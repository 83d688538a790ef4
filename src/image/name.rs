//! What a file's name alone says about its format.
//!
//! A mount trusts names, not content, wherever a name says anything: a guest
//! that writes another format's header into its raw disk changes nothing.

use instar_guest::Format;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

/// What a name says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NameRule {
    /// A raw disk, always: never probed.
    Raw,
    /// An image of this format, or unusable.
    Must(Format),
    /// Nothing: an image only if a header is found, and never raw.
    Probe,
}

/// Reads the extension, whatever its case.
pub fn format_of_name(name: &OsStr) -> NameRule {
    let name = name.as_bytes();
    let extension = match name.iter().rposition(|&byte| byte == b'.') {
        // A leading dot hides a file, it does not start an extension.
        Some(dot) if dot > 0 => name[dot + 1..].to_ascii_lowercase(),
        _ => return NameRule::Probe,
    };
    match extension.as_slice() {
        b"raw" | b"img" | b"iso" | b"dd" => NameRule::Raw,
        b"qcow2" => NameRule::Must(Format::Qcow2),
        b"vmdk" => NameRule::Must(Format::Vmdk),
        b"vhd" | b"vpc" => NameRule::Must(Format::Vhd),
        b"vhdx" => NameRule::Must(Format::Vhdx),
        _ => NameRule::Probe,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_extension_decides_and_nothing_else() {
        let table = [
            ("disk.raw", NameRule::Raw),
            ("disk.img", NameRule::Raw),
            ("cd.ISO", NameRule::Raw),
            ("d.dd", NameRule::Raw),
            ("a.qcow2", NameRule::Must(Format::Qcow2)),
            ("a.raw.QCow2", NameRule::Must(Format::Qcow2)),
            ("a.vmdk", NameRule::Must(Format::Vmdk)),
            ("a.vhd", NameRule::Must(Format::Vhd)),
            ("a.vpc", NameRule::Must(Format::Vhd)),
            ("a.vhdx", NameRule::Must(Format::Vhdx)),
            ("a.qcow2.bak", NameRule::Probe),
            ("raw", NameRule::Probe),
            (".qcow2", NameRule::Probe),
            ("disk.", NameRule::Probe),
            ("", NameRule::Probe),
        ];
        for (name, rule) in table {
            assert_eq!(format_of_name(OsStr::new(name)), rule, "{name}");
        }
    }
}
