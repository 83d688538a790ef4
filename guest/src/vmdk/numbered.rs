//! Names of extents that are told apart by a number: `disk-s002.vmdk`.

use alloc::format;
use alloc::string::String;

/// A name that others continue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Numbered<'a> {
    stem: &'a str,
    digits: usize,
    value: u64,
    suffix: &'a str,
}

impl<'a> Numbered<'a> {
    /// Reads a name as VMware programs and QEMU make them, without a directory.
    pub fn read(name: &'a str) -> Option<Self> {
        let (stem, suffix) = match name.rfind('.') {
            Some(dot) => name.split_at(dot),
            None => (name, ""),
        };
        let digits = stem.len() - stem.trim_end_matches(|c: char| c.is_ascii_digit()).len();
        let (stem, number) = stem.split_at_checked(stem.len() - digits)?;
        let is_plain = (stem.ends_with("-s") || stem.ends_with("-f"))
            && !name.contains(['/', '\\', '"', '\u{fffd}']);
        let value = number.parse().ok()?;
        is_plain.then_some(Self {
            stem,
            digits,
            value,
            suffix,
        })
    }

    /// The `nth` name behind this one.
    pub fn nth(&self, nth: u64) -> Option<String> {
        let Self {
            stem,
            digits,
            suffix,
            ..
        } = *self;
        let value = self.value.checked_add(nth)?;
        Some(format!("{stem}{value:0digits$}{suffix}"))
    }

    /// What all names have in common that differ in their numbers only.
    pub fn family(&self) -> (&'a str, &'a str) {
        (self.stem, self.suffix)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_go_on_with_as_many_digits() {
        let nth = |name, nth| Numbered::read(name).and_then(|name| name.nth(nth));
        assert_eq!(nth("a-s009.vmdk", 1).as_deref(), Some("a-s010.vmdk"));
        assert_eq!(nth("a.b-f999.vmdk", 2).as_deref(), Some("a.b-f1001.vmdk"));
        assert_eq!(nth("-s1", 0).as_deref(), Some("-s1"));
        for name in [
            "a.vmdk",
            "a-s.vmdk",
            "a-x1.vmdk",
            "b/a-s1.vmdk",
            "a-s1\"",
            "",
        ] {
            assert_eq!(Numbered::read(name), None, "{name}");
        }
        assert_eq!(nth("a-s18446744073709551615", 1), None);
    }
}
