//! Which format a file has, from its first and last bytes.
//!
//! Formats that instar knows by name but does not handle are refused: taken for
//! raw, their headers would be shown to a guest as its disk, and the next write
//! would destroy the image.

use crate::bytes::slice;
use crate::error::{Failure, FailureKind};
use crate::proto::Format;
use alloc::format;

/// The format of a file, or a refusal that names the format found. `head` is
/// the file's first 64 KiB, `tail` its last 4 KiB, or all of a shorter file.
pub fn probe(head: &[u8], tail: &[u8]) -> Result<Format, Failure> {
    if head.starts_with(b"QFI\xfb\0\0\0\x01") {
        return Err(refuse("qcow (version 1)"));
    }
    if head.starts_with(b"QFI\xfb") {
        return Ok(Format::Qcow2);
    }
    if let Some(name) = foreign(head) {
        return Err(refuse(name));
    }
    let found = [
        (Format::Vhdx, head.starts_with(b"vhdxfile")),
        (Format::Vhd, head.starts_with(b"conectix")),
        (
            Format::Vmdk,
            head.starts_with(b"KDMV") || is_vmdk_descriptor(head),
        ),
        (Format::Vhd, has_vhd_footer(tail)),
    ];
    let format = found.into_iter().find(|&(_, is_it)| is_it);
    Ok(format.map_or(Format::Raw, |(format, _)| format))
}

fn refuse(name: &str) -> Failure {
    Failure::new(
        FailureKind::Unsupported,
        format!(
            "the image is in {name} format, which is not supported; convert it with `qemu-img \
             convert -O qcow2`, or name its real format with -f"
        ),
    )
}

/// The name of a known format that instar does not handle.
fn foreign(head: &[u8]) -> Option<&'static str> {
    const AT_START: [(&[u8], &str); 6] = [
        (b"COWD", "VMDK (COWD)"),
        (b"\xbe\xba\xfe\xca\0\0\0\0", "VMDK (seSparse)"),
        (b"QED\0", "QED"),
        (b"LUKS\xba\xbe", "LUKS"),
        (b"WithoutFreeSpace", "parallels"),
        (b"WithouFreSpacExt", "parallels"),
    ];
    /// VDI's signature follows a text that its makers choose freely.
    const VDI: (usize, &[u8]) = (0x40, b"\x7f\x10\xda\xbe");

    let at_start = AT_START
        .iter()
        .find(|(magic, _)| head.starts_with(magic))
        .map(|&(_, name)| name);
    at_start.or_else(|| (slice(head, VDI.0, VDI.1.len()) == Ok(VDI.1)).then_some("VDI"))
}

/// A text that begins with comments and blank lines, then `version=1` to `3`.
fn is_vmdk_descriptor(head: &[u8]) -> bool {
    const COMMENT: &[u8] = b"# disk descriptorfile";
    if head
        .get(..COMMENT.len())
        .is_some_and(|start| start.eq_ignore_ascii_case(COMMENT))
    {
        return true;
    }
    head.split(|&byte| byte == b'\n')
        .map(<[u8]>::trim_ascii)
        .find(|line| !line.is_empty() && !line.starts_with(b"#"))
        .is_some_and(|line| {
            matches!(
                line.to_ascii_lowercase().as_slice(),
                b"version=1" | b"version=2" | b"version=3"
            )
        })
}

/// The footer is the last sector; Virtual PC before 2004 wrote 511 bytes of it.
fn has_vhd_footer(tail: &[u8]) -> bool {
    [512, 511].iter().any(|len| {
        tail.len()
            .checked_sub(*len)
            .and_then(|at| tail.get(at..))
            .is_some_and(|footer| footer.starts_with(b"conectix"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec;

    fn refusal(head: &[u8]) -> alloc::string::String {
        let failure = probe(head, &[]).unwrap_err();
        assert_eq!(failure.kind, FailureKind::Unsupported);
        failure.message
    }

    #[test]
    fn formats_are_known_by_their_first_bytes() {
        for (head, format) in [
            (&b"QFI\xfb\0\0\0\x03"[..], Format::Qcow2),
            (b"QFI\xfb\0\0\0\x02", Format::Qcow2),
            (b"KDMV\x01\0\0\0", Format::Vmdk),
            (b"# Disk DescriptorFile\nversion=1\n", Format::Vmdk),
            (b"# a comment\n\n  version=3\n", Format::Vmdk),
            (b"conectix\0\0\0\x02", Format::Vhd),
            (b"vhdxfileq\0", Format::Vhdx),
        ] {
            assert_eq!(probe(head, &[]), Ok(format));
        }
    }

    #[test]
    fn unknown_and_empty_files_are_raw() {
        assert_eq!(probe(&[], &[]), Ok(Format::Raw));
        assert_eq!(probe(&[0; 4096], &[0; 4096]), Ok(Format::Raw));
    }

    #[test]
    fn known_formats_are_refused_by_name_and_never_raw() {
        for (head, name) in [
            (&b"QFI\xfb\0\0\0\x01"[..], "qcow (version 1)"),
            (b"COWD\x01\0\0\0", "VMDK (COWD)"),
            (b"\xbe\xba\xfe\xca\0\0\0\0\x01", "VMDK (seSparse)"),
            (b"QED\0\0\0\x01\0", "QED"),
            (b"LUKS\xba\xbe\0\x01", "LUKS"),
            (b"WithoutFreeSpace", "parallels"),
            (b"WithouFreSpacExt", "parallels"),
        ] {
            let message = refusal(head);
            assert!(message.contains(&format!("in {name} format")), "{message}");
        }
    }

    #[test]
    fn vdi_is_known_by_its_signature_after_the_text() {
        let mut head = vec![b'x'; 512];
        head[0x40..0x44].copy_from_slice(&0xbeda_107f_u32.to_le_bytes());
        assert!(refusal(&head).contains("in VDI format"));
    }

    #[test]
    fn a_fixed_vhd_is_known_by_its_footer() {
        for len in [512, 511] {
            let mut tail = vec![0; 4096];
            let at = tail.len() - len;
            tail[at..at + 8].copy_from_slice(b"conectix");
            assert_eq!(probe(&[0; 512], &tail), Ok(Format::Vhd));
        }
    }
}
