//! Text that comes from an image or a guest, made fit for a terminal and a log.

/// Bytes after which such a text is cut.
const MAX_TEXT: usize = 256;

/// Escapes control characters and what could reorder a line, and cuts the
/// result at 256 bytes.
pub fn escape(text: &str) -> String {
    let mut out = String::new();
    for c in text.chars() {
        let printable = c == ' ' || (!c.is_whitespace() && !c.is_control() && !is_format(c));
        let escaped: String = if printable && c != '\\' {
            c.to_string()
        } else {
            c.escape_default().collect()
        };
        if out.len() + escaped.len() > MAX_TEXT - '…'.len_utf8() {
            out.push('…');
            break;
        }
        out.push_str(&escaped);
    }
    out
}

/// Invisible characters: marks of direction, joiners, the byte-order mark.
fn is_format(c: char) -> bool {
    matches!(c, '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{200b}'..='\u{200f}'
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
