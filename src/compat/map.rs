//! What `map` prints.

use std::fmt::Write as _;

/// A guest range as `map` reports it. Offsets and lengths are bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Guest offset of the first byte.
    pub start: u64,
    /// Length.
    pub length: u64,
    /// Which layer of the backing chain decides: 0 is the image itself.
    pub depth: usize,
    /// Whether that layer says anything about the range.
    pub present: bool,
    /// Whether the range is known to read as zeroes.
    pub zero: bool,
    /// Whether the range occupies data in a file.
    pub data: bool,
    /// Whether that data is compressed.
    pub compressed: bool,
    /// Where the data, or the place reserved for it, begins in the file.
    pub offset: Option<u64>,
}

impl Entry {
    /// Whether the two print as one: the next one continues this one.
    fn continued_by(&self, next: &Self) -> bool {
        let state = |entry: &Self| {
            (
                entry.depth,
                entry.present,
                entry.zero,
                entry.data,
                entry.compressed,
            )
        };
        let places_continue = match (self.offset, next.offset) {
            (Some(this), Some(next)) => this.checked_add(self.length) == Some(next),
            (None, None) => true,
            _ => false,
        };
        state(self) == state(next) && places_continue
    }
}

/// Joins neighbours that print as one.
pub fn merge(entries: impl IntoIterator<Item = Entry>) -> Vec<Entry> {
    let mut merged: Vec<Entry> = Vec::new();
    for entry in entries {
        match merged.last_mut() {
            Some(last) if last.continued_by(&entry) => last.length += entry.length,
            _ => merged.push(entry),
        }
    }
    merged
}

/// One line of JSON per entry, as programs read it. An empty range prints one
/// entry of length 0 at `start`.
pub fn json(entries: &[Entry], start: u64) -> String {
    let nothing = [Entry {
        start,
        length: 0,
        depth: 0,
        present: false,
        zero: false,
        data: false,
        compressed: false,
        offset: None,
    }];
    let entries = match entries {
        [] => &nothing,
        entries => entries,
    };
    let lines: Vec<String> = entries.iter().map(json_line).collect();
    format!("[{}]\n", lines.join(",\n"))
}

fn json_line(entry: &Entry) -> String {
    let offset = match entry.offset {
        Some(offset) => format!(", \"offset\": {offset}"),
        None => String::new(),
    };
    format!(
        "{{ \"start\": {}, \"length\": {}, \"depth\": {}, \"present\": {}, \"zero\": {}, \
         \"data\": {}, \"compressed\": {}{offset}}}",
        entry.start,
        entry.length,
        entry.depth,
        entry.present,
        entry.zero,
        entry.data,
        entry.compressed,
    )
}

/// The table for people: data that is not known to be zero, with the file that
/// holds it (`files[depth]`).
#[derive(Debug, PartialEq, Eq)]
pub struct Table {
    /// The lines, up to the first entry that has no place in a file.
    pub text: String,
    /// Whether that is all of it.
    pub complete: bool,
}

/// See [`Table`].
pub fn human(entries: &[Entry], files: &[String]) -> Table {
    let mut text = format!(
        "{:<16}{:<16}{:<16}{}\n",
        "Offset", "Length", "Mapped to", "File"
    );
    for entry in entries.iter().filter(|entry| entry.data && !entry.zero) {
        let Some(offset) = entry.offset else {
            return Table {
                text,
                complete: false,
            };
        };
        let file = files.get(entry.depth).map_or("", String::as_str);
        // Writing to a string cannot fail.
        let _ = writeln!(
            text,
            "{:<16}{:<16}{:<16}{file}",
            hex(entry.start),
            hex(entry.length),
            hex(offset)
        );
    }
    Table {
        text,
        complete: true,
    }
}

/// C's `%#x`: zero has no prefix.
fn hex(number: u64) -> String {
    match number {
        0 => "0".to_owned(),
        number => format!("{number:#x}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn data(start: u64, length: u64, offset: Option<u64>) -> Entry {
        Entry {
            start,
            length,
            depth: 0,
            present: true,
            zero: false,
            data: true,
            compressed: offset.is_none(),
            offset,
        }
    }

    fn hole(start: u64, length: u64) -> Entry {
        Entry {
            present: false,
            zero: true,
            data: false,
            compressed: false,
            ..data(start, length, None)
        }
    }

    #[test]
    fn neighbours_merge_only_where_state_and_place_continue() {
        let entries = [
            data(0, 10, Some(100)),
            data(10, 10, Some(110)),
            data(20, 10, Some(200)),
            hole(30, 5),
            hole(35, 5),
        ];
        assert_eq!(
            merge(entries),
            [
                data(0, 20, Some(100)),
                data(20, 10, Some(200)),
                hole(30, 10)
            ]
        );
    }

    #[test]
    fn json_is_one_entry_per_line() {
        let entries = [data(0, 512, Some(0)), hole(512, 512)];
        assert_eq!(
            json(&entries, 0),
            "[{ \"start\": 0, \"length\": 512, \"depth\": 0, \"present\": true, \"zero\": false, \
             \"data\": true, \"compressed\": false, \"offset\": 0},\n\
             { \"start\": 512, \"length\": 512, \"depth\": 0, \"present\": false, \"zero\": true, \
             \"data\": false, \"compressed\": false}]\n"
        );
    }

    #[test]
    fn an_empty_range_is_one_empty_entry() {
        assert_eq!(
            json(&[], 7),
            "[{ \"start\": 7, \"length\": 0, \"depth\": 0, \"present\": false, \"zero\": false, \
             \"data\": false, \"compressed\": false}]\n"
        );
    }

    #[test]
    fn the_table_ends_at_data_without_a_place() {
        let files = ["a.qcow2".to_owned()];
        let header = "Offset          Length          Mapped to       File\n";
        let row = "0x10000         0x10000         0               a.qcow2\n";
        let first = data(0x10000, 0x10000, Some(0));
        let entries = [hole(0, 0x10000), first, data(0x20000, 0x10000, None)];
        assert_eq!(
            human(&entries, &files),
            Table {
                text: format!("{header}{row}"),
                complete: false
            }
        );
        assert_eq!(
            human(&entries[..2], &files),
            Table {
                text: format!("{header}{row}"),
                complete: true
            }
        );
    }
}
