//! Sizes: the grammar in which people write them and the text in which people
//! read them, both as qemu-img has them.

use std::fmt;

/// Why a text is not a size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SizeError {
    /// Not a number with an optional fraction and suffix.
    Grammar,
    /// A number above what 64 bits hold.
    Range,
}

/// Reads a size in bytes.
///
/// Decimal with an optional fraction and an optional suffix `b k M G T P E` in
/// either case (powers of 1024), or hexadecimal without either. A fraction needs
/// a suffix above `b` and rounds half up. Blanks and a `+` may lead, a `-` may
/// not. Exponents (`1e3`), double suffixes (`1kb`) and the empty text are errors.
pub fn parse(text: &str) -> Result<u64, SizeError> {
    let text = text.trim_start_matches(|c: char| c.is_ascii_whitespace() || c == '\x0b');
    if let Some(number) = text.strip_prefix('-') {
        return Err(below_zero(number));
    }
    let text = text.strip_prefix('+').unwrap_or(text);
    if let Some(digits) = text.strip_prefix("0x").or(text.strip_prefix("0X")) {
        return number(digits, 16);
    }
    let (whole, rest) = split_digits(text);
    let (fraction, rest) = match rest.strip_prefix('.') {
        Some(rest) => split_digits(rest),
        None => ("", rest),
    };
    if whole.is_empty() && fraction.is_empty() {
        return Err(SizeError::Grammar);
    }
    let unit = unit(rest)?;
    let whole = match whole {
        "" => 0,
        digits => number(digits, 10)?,
    };
    scale(whole, Fraction::of(fraction), unit)
}

/// A plain negative number is one that is out of range.
fn below_zero(number: &str) -> SizeError {
    match split_digits(number) {
        ("", _) => SizeError::Grammar,
        (_, "") => SizeError::Range,
        _ => SizeError::Grammar,
    }
}

/// Splits after the leading decimal digits.
fn split_digits(text: &str) -> (&str, &str) {
    let end = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    text.split_at(end)
}

/// Digits only: a sign that the standard parser would take is an error.
fn number(digits: &str, radix: u32) -> Result<u64, SizeError> {
    if digits.is_empty() || !digits.chars().all(|c| c.is_digit(radix)) {
        return Err(SizeError::Grammar);
    }
    u64::from_str_radix(digits, radix).map_err(|_| SizeError::Range)
}

/// The number of bytes that a suffix stands for.
fn unit(suffix: &str) -> Result<u64, SizeError> {
    const UNITS: &str = "BKMGTPE";
    let mut letters = suffix.chars();
    match (letters.next(), letters.next()) {
        (None, _) => Ok(1),
        (Some(letter), None) => UNITS
            .find(letter.to_ascii_uppercase())
            .map(|power| 1 << (10 * power))
            .ok_or(SizeError::Grammar),
        _ => Err(SizeError::Grammar),
    }
}

/// The part behind the point, in units of 2^-64, so that scaling it is exact.
struct Fraction(u64);

impl Fraction {
    fn of(digits: &str) -> Self {
        const TWO_TO_64: f64 = 18_446_744_073_709_551_616.0;
        let value: f64 = format!("0.{digits}0").parse().unwrap_or(0.0);
        let nonzero = digits.bytes().any(|digit| digit != b'0');
        // The conversion saturates; and what is not zero stays so, because a
        // fraction of bytes is an error however small it is.
        Self(((value * TWO_TO_64) as u64).max(u64::from(nonzero)))
    }
}

/// `(whole + fraction) * unit`, rounded half up.
fn scale(whole: u64, fraction: Fraction, unit: u64) -> Result<u64, SizeError> {
    if unit == 1 && fraction.0 != 0 {
        return Err(SizeError::Grammar);
    }
    let scaled = u128::from(fraction.0) * u128::from(unit);
    let rounded = (scaled + (1 << 63)) >> 64;
    let bytes = u128::from(whole) * u128::from(unit) + rounded;
    u64::try_from(bytes).map_err(|_| SizeError::Range)
}

/// A size as `resize` takes it: absolute, or relative to the current one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NewSize {
    /// This many bytes.
    To(u64),
    /// This many bytes more.
    Grow(u64),
    /// This many bytes less.
    Shrink(u64),
}

impl NewSize {
    /// Reads a size with an optional `+` or `-` in front.
    pub fn parse(text: &str) -> Result<Self, SizeError> {
        match text.as_bytes().first() {
            Some(b'+') => parse(&text[1..]).map(Self::Grow),
            Some(b'-') => parse(&text[1..]).map(Self::Shrink),
            Some(_) | None => parse(text).map(Self::To),
        }
    }

    /// The size in bytes that a disk of `current` bytes gets, or `None` where it
    /// would not be positive or not fit into 63 bits.
    pub fn from(self, current: u64) -> Option<u64> {
        let size = match self {
            Self::To(size) => size,
            Self::Grow(by) => current.checked_add(by)?,
            Self::Shrink(by) => current.checked_sub(by)?,
        };
        (size > 0 && i64::try_from(size).is_ok()).then_some(size)
    }
}

/// A size for people, such as `64 MiB`: three significant digits, and the next
/// unit from 1000 on, so that no number has four digits.
#[derive(Clone, Copy, Debug)]
pub struct Human(pub u64);

impl fmt::Display for Human {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [&str; 7] = ["", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"];
        let fits = |step: &usize| u128::from(self.0) >= 1000 << (10 * (step - 1));
        let step = (1..UNITS.len()).rfind(fits).unwrap_or(0);
        let unit = UNITS[step];
        let value = self.0 as f64 / (1u64 << (10 * step)) as f64;
        write!(f, "{} {unit}B", ThreeDigits(value))
    }
}

/// C's `%0.3g` for a value that is not negative.
struct ThreeDigits(f64);

impl fmt::Display for ThreeDigits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Scientific form with two decimals rounds once and shows the exponent
        // that the rounded value has.
        let rounded = format!("{:.2e}", self.0);
        let (digits, exponent) = rounded.split_once('e').unwrap_or((&rounded, "0"));
        match exponent.parse::<i32>().unwrap_or(0) {
            exponent @ 3.. => write!(f, "{}e+{exponent:02}", without_zeroes(digits)),
            exponent => {
                let decimals = usize::try_from(2 - exponent).unwrap_or(0);
                let fixed = format!("{:.decimals$}", self.0);
                f.write_str(without_zeroes(&fixed))
            }
        }
    }
}

/// Removes zeroes at the end of a fraction, and a point that is left alone.
fn without_zeroes(number: &str) -> &str {
    if number.contains('.') {
        number.trim_end_matches('0').trim_end_matches('.')
    } else {
        number
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What qemu-img 10.0 makes of each text.
    #[test]
    fn sizes_read_as_qemu_img_reads_them() {
        let cases = [
            ("0", 0),
            ("1", 1),
            ("1b", 1),
            ("1B", 1),
            ("1k", 1024),
            ("1K", 1024),
            ("64M", 64 << 20),
            ("1g", 1 << 30),
            ("2T", 2 << 40),
            ("1P", 1 << 50),
            ("1e", 1 << 60),
            ("7E", 7 << 60),
            ("1.5G", 3 << 29),
            ("1.k", 1024),
            (".5M", 512 << 10),
            ("1.", 1),
            ("1.0", 1),
            ("0.0", 0),
            ("0x100000", 1 << 20),
            ("0X1e", 30),
            ("010M", 10 << 20),
            (" 1M", 1 << 20),
            ("\t1k", 1024),
            ("+1M", 1 << 20),
            ("1.4999k", 1536),
            ("0.0005k", 1),
            ("1.00048828125k", 1025),
            ("0.00000000000000000000000000000000000001M", 0),
            ("1.5e", 3 << 59),
            ("18446744073709551615", u64::MAX),
        ];
        for (text, bytes) in cases {
            assert_eq!(parse(text), Ok(bytes), "{text:?}");
        }
    }

    #[test]
    fn what_is_no_size_is_refused() {
        let grammar = [
            "", "k", ".", ".k", "1e3", "1kb", "1 M", "1.5b", "1.5", "0x", "0x10k", "0x1.8k",
            "0x1p", "1.5k ", "1.e1", "1.5E+3", "0b1", "inf", "nan", "-1M", "-", "-x", "1.5.5k",
            "1é", "++1", "+-1",
        ];
        for text in grammar {
            assert_eq!(parse(text), Err(SizeError::Grammar), "{text:?}");
        }
        for text in [
            "16E",
            "-1",
            "-0",
            "18446744073709551616",
            "0x10000000000000000",
        ] {
            assert_eq!(parse(text), Err(SizeError::Range), "{text:?}");
        }
    }

    #[test]
    fn a_sign_makes_a_size_relative() {
        assert_eq!(NewSize::parse("4M"), Ok(NewSize::To(4 << 20)));
        assert_eq!(NewSize::parse("+4M"), Ok(NewSize::Grow(4 << 20)));
        assert_eq!(NewSize::parse("++4M"), Ok(NewSize::Grow(4 << 20)));
        assert_eq!(NewSize::parse("-4M"), Ok(NewSize::Shrink(4 << 20)));
        assert_eq!(NewSize::parse("-0"), Ok(NewSize::Shrink(0)));
        assert_eq!(NewSize::parse("+-4M"), Err(SizeError::Grammar));
        assert_eq!(NewSize::parse("-"), Err(SizeError::Grammar));
    }

    #[test]
    fn a_new_size_is_positive_and_below_two_to_63() {
        assert_eq!(NewSize::To(512).from(7), Some(512));
        assert_eq!(NewSize::Grow(5).from(7), Some(12));
        assert_eq!(NewSize::Shrink(5).from(7), Some(2));
        for (size, current) in [
            (NewSize::To(0), 7),
            (NewSize::To(1 << 63), 7),
            (NewSize::Shrink(7), 7),
            (NewSize::Shrink(8), 7),
            (NewSize::Grow(u64::MAX), 7),
            (NewSize::Grow(i64::MAX as u64), 1),
        ] {
            assert_eq!(size.from(current), None, "{size:?} from {current}");
        }
    }

    #[test]
    fn human_sizes_have_three_digits_and_round_half_to_even() {
        let cases = [
            (0, "0 B"),
            (1, "1 B"),
            (999, "999 B"),
            (1000, "0.977 KiB"),
            (1023, "0.999 KiB"),
            (1024, "1 KiB"),
            (1152, "1.12 KiB"),
            (1408, "1.38 KiB"),
            (100_352, "98 KiB"),
            (1_023_590, "1e+03 KiB"),
            (1_024_000, "0.977 MiB"),
            (197_120, "192 KiB"),
            (2_297_856, "2.19 MiB"),
            (64 << 20, "64 MiB"),
            (3 << 29, "1.5 GiB"),
            (1 << 40, "1 TiB"),
            (i64::MAX as u64, "8 EiB"),
        ];
        for (bytes, text) in cases {
            assert_eq!(Human(bytes).to_string(), text, "{bytes}");
        }
    }
}
