//! Values of creation options, in the grammar that QEMU gives them.
//!
//! Options arrive as the user typed them, `-o key=value`. The messages are
//! QEMU's, so that scripts which match them keep working.

use crate::error::{Failure, FailureKind};
use crate::proto::Preallocation;
use alloc::format;
use alloc::string::String;

/// The refusal of an option that a format does not have.
pub fn unknown(key: &str) -> Failure {
    invalid(format!("Invalid parameter '{key}'"))
}

/// A refused option.
pub fn invalid(message: impl Into<String>) -> Failure {
    Failure::new(FailureKind::InvalidRequest, message)
}

/// `on`, `yes`, `true`, `y`, or their opposites.
pub fn switch(key: &str, value: &str) -> Result<bool, Failure> {
    match value {
        "on" | "yes" | "true" | "y" => Ok(true),
        "off" | "no" | "false" | "n" => Ok(false),
        _ => Err(invalid(format!("Parameter '{key}' expects 'on' or 'off'"))),
    }
}

/// A number in the notation of C: decimal, `0x` hexadecimal or `0` octal.
pub fn number(key: &str, value: &str) -> Result<u64, Failure> {
    let parsed = if let Some(digits) = strip_hex(value) {
        u64::from_str_radix(digits, 16)
    } else if let Some(digits) = value.strip_prefix('0').filter(|rest| !rest.is_empty()) {
        u64::from_str_radix(digits, 8)
    } else {
        value.parse()
    };
    parsed
        .ok()
        .filter(|_| value.starts_with(|c: char| c.is_ascii_digit()))
        .ok_or_else(|| invalid(format!("Parameter '{key}' expects a number")))
}

/// A size in bytes: a decimal number, perhaps with a fraction, and a suffix for
/// a power of 1024; or a hexadecimal number without suffix.
pub fn size(key: &str, value: &str) -> Result<u64, Failure> {
    parse_size(value).ok_or_else(|| {
        invalid(match is_out_of_range(value) {
            true => format!("Value '{value}' is out of range for parameter '{key}'"),
            false => format!(
                "Parameter '{key}' expects a non-negative number below 2^64\n\
                 Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\n\
                 and exabytes, respectively."
            ),
        })
    })
}

/// How much is allocated at once. What `value` means for the format is the
/// format's to say.
pub fn preallocation(value: &str) -> Option<Preallocation> {
    match value {
        "off" => Some(Preallocation::Off),
        "metadata" => Some(Preallocation::Metadata),
        "falloc" => Some(Preallocation::Falloc),
        "full" => Some(Preallocation::Full),
        _ => None,
    }
}

fn strip_hex(value: &str) -> Option<&str> {
    value.strip_prefix("0x").or(value.strip_prefix("0X"))
}

fn parse_size(value: &str) -> Option<u64> {
    if let Some(digits) = strip_hex(value) {
        let valid = digits.starts_with(|c: char| c.is_ascii_hexdigit());
        return u64::from_str_radix(digits, 16).ok().filter(|_| valid);
    }
    let end = value.find(|c: char| !c.is_ascii_digit());
    let (whole, rest) = value.split_at_checked(end.unwrap_or(value.len()))?;
    let (fraction, suffix) = match rest.strip_prefix('.') {
        Some(rest) => {
            let end = rest.find(|c: char| !c.is_ascii_digit());
            rest.split_at_checked(end.unwrap_or(rest.len()))?
        }
        None => ("", rest),
    };
    if whole.is_empty() && fraction.is_empty() {
        return None;
    }
    let unit = 1u64 << unit_bits(suffix)?;
    let whole: u64 = if whole.is_empty() {
        0
    } else {
        whole.parse().ok()?
    };
    whole
        .checked_mul(unit)?
        .checked_add(fraction_of(fraction, unit)?)
}

/// Whether a size that is none is a plain number, too small or too large.
fn is_out_of_range(value: &str) -> bool {
    let digits = match value.strip_prefix('-') {
        Some(digits) => digits,
        None => value.trim_end_matches(|c: char| unit_bits(c.encode_utf8(&mut [0; 4])).is_some()),
    };
    !digits.is_empty()
        && value.len() - digits.len() < 2
        && digits.bytes().all(|b| b.is_ascii_digit())
}

fn unit_bits(suffix: &str) -> Option<u32> {
    match suffix {
        "" | "b" | "B" => Some(0),
        "k" | "K" => Some(10),
        "m" | "M" => Some(20),
        "g" | "G" => Some(30),
        "t" | "T" => Some(40),
        "p" | "P" => Some(50),
        "e" | "E" => Some(60),
        _ => None,
    }
}

/// `0.digits` of `unit`, rounded to the nearest byte; bytes have no fractions.
fn fraction_of(digits: &str, unit: u64) -> Option<u64> {
    let digits = digits.trim_end_matches('0');
    if digits.is_empty() {
        return Some(0);
    }
    if unit == 1 {
        return None;
    }
    let (mut value, mut scale) = (0u128, 1u128);
    for digit in digits.bytes().take(18) {
        value = value * 10 + u128::from(digit - b'0');
        scale *= 10;
    }
    u64::try_from((value * u128::from(unit) + scale / 2) / scale).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_follow_qemu_grammar() {
        let cases = [
            ("65536", Some(65536)),
            ("64k", Some(65536)),
            ("64K", Some(65536)),
            ("1.5k", Some(1536)),
            (".5M", Some(1 << 19)),
            ("2M", Some(2 << 20)),
            ("1b", Some(1)),
            ("0x1000", Some(4096)),
            ("16E", None),
            ("1e3", None),
            ("4kb", None),
            ("", None),
            (".", None),
            ("1.5", None),
            ("-1", None),
            ("+1", None),
            (" 1", None),
            ("0x", None),
            ("0x+1", None),
        ];
        for (text, expected) in cases {
            assert_eq!(size("cluster_size", text).ok(), expected, "{text}");
        }
    }

    #[test]
    fn a_plain_number_that_does_not_fit_is_told_as_such() {
        for (text, expected) in [
            ("-1", true),
            ("16E", true),
            ("18446744073709551616", true),
            ("1e3", false),
            ("4kk", false),
            ("-1k", false),
            ("-", false),
            ("k", false),
            ("1é", false),
        ] {
            let told = size("cluster_size", text).unwrap_err().message;
            assert_eq!(told.contains("out of range"), expected, "{text}: {told}");
        }
    }

    #[test]
    fn numbers_are_decimal_hexadecimal_or_octal_without_suffix() {
        let cases = [
            ("16", Some(16)),
            ("0x10", Some(16)),
            ("020", Some(16)),
            ("0", Some(0)),
            ("1k", None),
            ("a", None),
            ("+1", None),
            ("", None),
        ];
        for (text, expected) in cases {
            assert_eq!(number("refcount_bits", text).ok(), expected, "{text}");
        }
    }

    #[test]
    fn a_switch_is_on_or_off() {
        assert_eq!(switch("lazy_refcounts", "yes"), Ok(true));
        assert_eq!(switch("lazy_refcounts", "n"), Ok(false));
        assert_eq!(
            switch("lazy_refcounts", "1").unwrap_err().message,
            "Parameter 'lazy_refcounts' expects 'on' or 'off'"
        );
    }
}
