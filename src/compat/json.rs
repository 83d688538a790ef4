//! JSON in the layout that qemu-img prints: four blanks per level, one member
//! per line, an empty list or object on two lines, and everything outside
//! printable ASCII escaped.

use serde_json::Value;
use std::fmt::Write as _;

/// The text of a value, without a line end after it. The order of members is
/// that of insertion.
pub fn pretty(value: &Value) -> String {
    let mut text = String::new();
    write_value(&mut text, value, 0);
    text
}

fn write_value(out: &mut String, value: &Value, level: usize) {
    match value {
        Value::Object(members) => {
            let lines = members.iter().map(|(key, value)| (Some(key), value));
            write_block(out, ['{', '}'], lines, level);
        }
        Value::Array(items) => {
            let lines = items.iter().map(|value| (None, value));
            write_block(out, ['[', ']'], lines, level);
        }
        Value::String(text) => write_string(out, text),
        Value::Null | Value::Bool(_) | Value::Number(_) => out.push_str(&value.to_string()),
    }
}

fn write_block<'a>(
    out: &mut String,
    [open, close]: [char; 2],
    lines: impl Iterator<Item = (Option<&'a String>, &'a Value)>,
    level: usize,
) {
    out.push(open);
    for (number, (key, value)) in lines.enumerate() {
        if number > 0 {
            out.push(',');
        }
        new_line(out, level + 1);
        if let Some(key) = key {
            write_string(out, key);
            out.push_str(": ");
        }
        write_value(out, value, level + 1);
    }
    new_line(out, level);
    out.push(close);
}

fn new_line(out: &mut String, level: usize) {
    out.push('\n');
    out.extend(std::iter::repeat_n("    ", level));
}

fn write_string(out: &mut String, text: &str) {
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            ' '..='~' => out.push(c),
            _ => {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    // Writing to a string cannot fail.
                    let _ = write!(out, "\\u{unit:04X}");
                }
            }
        }
    }
    out.push('"');
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_layout_is_qemus() {
        let value = json!({"b": [], "a": {"x": {}, "n": 1}, "list": [true, "t"]});
        let text = r#"{
    "b": [
    ],
    "a": {
        "x": {
        },
        "n": 1
    },
    "list": [
        true,
        "t"
    ]
}"#;
        assert_eq!(pretty(&value), text);
    }

    #[test]
    fn strings_are_escaped_to_printable_ascii() {
        let text = "q\" b\\ s/ \u{8}\u{c}\n\r\t \u{1b} \u{7f} äÖ €";
        assert_eq!(
            pretty(&Value::from(text)),
            r#""q\" b\\ s/ \b\f\n\r\t \u001B \u007F \u00E4\u00D6 \u20AC""#
        );
        assert_eq!(pretty(&Value::from("🦀")), r#""\uD83E\uDD80""#);
    }
}
