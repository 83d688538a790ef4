//! Text that comes from an image or a guest, made fit for a terminal and a log.

/// Bytes after which such a text is cut.
const MAX_TEXT: usize = 256;
/// What stands where a text was cut.
const MARK: char = '…';

/// Escapes deceptive characters and the backslash, and cuts the result at 256
/// bytes.
pub fn escape(text: &str) -> String {
    fit(text, MAX_TEXT - MARK.len_utf8(), |c| {
        c == '\\' || is_deceptive(c)
    })
}

/// Escapes deceptive characters, and cuts the result at `max` bytes, the mark of
/// the cut not counted. Backslashes stay: this is for texts that are escaped in part already.
pub fn escape_deceptive(text: &str, max: usize) -> String {
    fit(text, max, is_deceptive)
}

/// At most `max` bytes of a text once escaped, and a mark where it was cut.
fn fit(text: &str, max: usize, must_escape: impl Fn(char) -> bool) -> String {
    let mut out = String::new();
    for c in text.chars() {
        let piece: String = match must_escape(c) {
            true => c.escape_default().collect(),
            false => c.into(),
        };
        if out.len() + piece.len() > max {
            out.push(MARK);
            break;
        }
        out.push_str(&piece);
    }
    out
}

/// Control characters, and what hides or reorders text on a terminal: blanks
/// other than the space, marks of direction, joiners, the byte-order mark.
fn is_deceptive(c: char) -> bool {
    (c.is_whitespace() && c != ' ')
        || c.is_control()
        || matches!(c, '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{200b}'..='\u{200f}'
            | '\u{202a}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}'
            | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}')
}

#[cfg(test)]
mod tests {
    use super::escape;

    #[test]
    fn ordinary_text_stays() {
        assert_eq!(escape("Größe: 3 GiB"), "Größe: 3 GiB");
    }

    #[test]
    fn control_and_direction_characters_are_escaped() {
        assert_eq!(escape("\x1b[2J\n\u{202e}\\"), r"\u{1b}[2J\n\u{202e}\\");
    }

    #[test]
    fn a_long_text_is_cut_at_256_bytes_and_says_so() {
        let cut = escape(&"x".repeat(1000));
        assert_eq!(cut, format!("{}…", "x".repeat(253)));
    }
}
