//! Identifiers, as they lie on disk and as text.

use core::fmt;

/// An identifier in the order of the file: the first three groups of its text
/// are little-endian.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Guid(pub [u8; 16]);

impl Guid {
    /// The absent one.
    pub const ZERO: Self = Self([0; 16]);

    /// The identifier whose text has these digits.
    pub const fn new(digits: u128) -> Self {
        Self::from_text_order(digits.to_be_bytes())
    }

    /// The identifier whose text has these bytes in this order.
    pub const fn from_text_order(text: [u8; 16]) -> Self {
        let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = text;
        Self([d, c, b, a, f, e, h, g, i, j, k, l, m, n, o, p])
    }

    /// The bytes in the order of the text. The order is its own inverse.
    fn text_order(self) -> [u8; 16] {
        Self::from_text_order(self.0).0
    }

    /// The identifier that a text says, with or without braces.
    pub fn parse(text: &str) -> Option<Self> {
        let text = text.trim();
        let inner = text.strip_prefix('{').and_then(|t| t.strip_suffix('}'));
        let mut digits = 0u128;
        let mut groups = inner.unwrap_or(text).split('-');
        for len in [8, 4, 4, 4, 12] {
            let group = groups.next()?;
            let is_hex = group.bytes().all(|byte| byte.is_ascii_hexdigit());
            if group.len() != len || !is_hex {
                return None;
            }
            digits = digits << (4 * len) | u128::from_str_radix(group, 16).ok()?;
        }
        groups.next().is_none().then(|| Self::new(digits))
    }
}

impl fmt::Display for Guid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, byte) in self.text_order().into_iter().enumerate() {
            if matches!(at, 4 | 6 | 8 | 10) {
                f.write_str("-")?;
            }
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::string::ToString;

    #[test]
    fn the_first_three_groups_are_little_endian_on_disk() {
        let guid = Guid::parse("{2DC27766-F623-4200-9D64-115E9BFD4A08}").unwrap();
        assert_eq!(guid.0[..8], [0x66, 0x77, 0xc2, 0x2d, 0x23, 0xf6, 0, 0x42]);
        assert_eq!(guid.to_string(), "2dc27766-f623-4200-9d64-115e9bfd4a08");
        assert_eq!(guid, super::super::format::region::BAT);
    }

    #[test]
    fn other_texts_are_no_identifiers() {
        for text in [
            "",
            "2dc27766",
            "2dc27766-f623-4200-9d64-115e9bfd4a0",
            "2dc27766-f623-4200-9d64-115e9bfd4a08-",
            "+dc27766-f623-4200-9d64-115e9bfd4a08",
        ] {
            assert_eq!(Guid::parse(text), None, "{text}");
        }
    }
}
