//! What `map` prints.

use super::version::QemuVersion;
use instar_guest::FileNo;

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
    /// The file of that layer, and where in it the data, or the place reserved
    /// for it, begins.
    pub at: Option<(FileNo, u64)>,
}

impl Entry {
    /// Whether the two print as one: the next one continues this one.
    fn continued_by(&self, next: &Self, version: QemuVersion) -> bool {
        let state = |entry: &Self| {
            (
                entry.depth,
                entry.present && version.shows_present(),
                entry.zero,
                entry.data,
                entry.compressed && version.shows_compressed(),
            )
        };
        let places_continue = match (self.at, next.at) {
            (Some((this_file, this)), Some((next_file, next))) => {
                this_file == next_file && this.checked_add(self.length) == Some(next)
            }
            (None, None) => true,
            _ => false,
        };
        state(self) == state(next) && places_continue
    }
}

/// Joins neighbours that print as one, as they come.
#[derive(Debug, Default)]
pub struct Joiner {
    last: Option<Entry>,
    version: QemuVersion,
}

impl Joiner {
    /// For what this version prints.
    pub fn new(version: QemuVersion) -> Self {
        Self {
            last: None,
            version,
        }
    }

    /// Takes the next entry; answers the one before, if nothing more joins it.
    pub fn push(&mut self, entry: Entry) -> Option<Entry> {
        match &mut self.last {
            Some(last) if last.continued_by(&entry, self.version) => {
                last.length += entry.length;
                None
            }
            last => last.replace(entry),
        }
    }

    /// The last entry.
    pub fn finish(self) -> Option<Entry> {
        self.last
    }
}

/// What programs read: a list with one entry per line.
#[derive(Debug, Default)]
pub struct Json {
    lines: u64,
    version: QemuVersion,
}

impl Json {
    /// As this version prints it.
    pub fn new(version: QemuVersion) -> Self {
        Self { lines: 0, version }
    }

    /// The text of the next entry.
    pub fn entry(&mut self, entry: &Entry) -> String {
        self.lines += 1;
        let before = if self.lines == 1 { "[" } else { ",\n" };
        format!("{before}{}", json_line(entry, self.version))
    }

    /// The text after the last entry. An empty range that begins at `start`
    /// shows as one entry of length 0.
    pub fn end(mut self, start: u64) -> String {
        let nothing = match self.lines {
            0 => self.entry(&Entry {
                start,
                length: 0,
                depth: 0,
                present: false,
                zero: false,
                data: false,
                compressed: false,
                at: None,
            }),
            _ => String::new(),
        };
        nothing + "]\n"
    }
}

fn json_line(entry: &Entry, version: QemuVersion) -> String {
    let present = version
        .shows_present()
        .then_some(("present", entry.present));
    let compressed = version.shows_compressed();
    let compressed = compressed.then_some(("compressed", entry.compressed));
    let members = [("zero", entry.zero), ("data", entry.data)];
    let mut line = format!(
        "{{ \"start\": {}, \"length\": {}, \"depth\": {}",
        entry.start, entry.length, entry.depth
    );
    for (key, value) in present.into_iter().chain(members).chain(compressed) {
        line.push_str(&format!(", \"{key}\": {value}"));
    }
    if let Some((_, offset)) = entry.at {
        line.push_str(&format!(", \"offset\": {offset}"));
    }
    line + "}"
}

/// The first line of the table for people.
pub fn header() -> String {
    row("Offset", "Length", "Mapped to", "File")
}

/// Data that has no place in a file, which the table cannot show.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unmappable;

/// The line of the table for an entry: none where it is known to be zero.
/// `name` is the name of a file of a layer.
pub fn table_row<'a>(
    entry: &Entry,
    name: impl Fn(usize, FileNo) -> &'a str,
) -> Result<String, Unmappable> {
    if entry.zero || !entry.data {
        return Ok(String::new());
    }
    let (file, offset) = entry.at.ok_or(Unmappable)?;
    Ok(row(
        &hex(entry.start),
        &hex(entry.length),
        &hex(offset),
        name(entry.depth, file),
    ))
}

fn row(offset: &str, length: &str, place: &str, file: &str) -> String {
    format!("{offset:<16}{length:<16}{place:<16}{file}\n")
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

    const OTHER: FileNo = FileNo(1);

    fn data(start: u64, length: u64, offset: Option<u64>) -> Entry {
        Entry {
            start,
            length,
            depth: 0,
            present: true,
            zero: false,
            data: true,
            compressed: offset.is_none(),
            at: offset.map(|offset| (FileNo::IMAGE, offset)),
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
    fn neighbours_join_only_where_state_and_place_continue() {
        let entries = [
            data(0, 10, Some(100)),
            data(10, 10, Some(110)),
            data(20, 10, Some(200)),
            hole(30, 5),
            hole(35, 5),
            data(40, 10, Some(300)),
            Entry {
                at: Some((OTHER, 310)),
                ..data(50, 10, None)
            },
        ];
        let mut joiner = Joiner::default();
        let mut joined: Vec<Entry> = entries
            .into_iter()
            .filter_map(|entry| joiner.push(entry))
            .collect();
        joined.extend(joiner.finish());
        assert_eq!(
            joined,
            [
                data(0, 20, Some(100)),
                data(20, 10, Some(200)),
                hole(30, 10),
                data(40, 10, Some(300)),
                Entry {
                    at: Some((OTHER, 310)),
                    ..data(50, 10, None)
                },
            ]
        );
    }

    #[test]
    fn json_is_one_entry_per_line() {
        let mut json = Json::new(QemuVersion::CURRENT);
        let text = json.entry(&data(0, 512, Some(0))) + &json.entry(&hole(512, 512));
        assert_eq!(
            text + &json.end(0),
            "[{ \"start\": 0, \"length\": 512, \"depth\": 0, \"present\": true, \"zero\": false, \
             \"data\": true, \"compressed\": false, \"offset\": 0},\n\
             { \"start\": 512, \"length\": 512, \"depth\": 0, \"present\": false, \"zero\": true, \
             \"data\": false, \"compressed\": false}]\n"
        );
    }

    #[test]
    fn an_empty_range_is_one_empty_entry() {
        assert_eq!(
            Json::new(QemuVersion::CURRENT).end(7),
            "[{ \"start\": 7, \"length\": 0, \"depth\": 0, \"present\": false, \"zero\": false, \
             \"data\": false, \"compressed\": false}]\n"
        );
    }

    #[test]
    fn the_table_shows_data_that_has_a_place() {
        let name = |depth, file| match (depth, file) {
            (0, FileNo::IMAGE) => "a.vmdk",
            (0, OTHER) => "a-s001.vmdk",
            _ => "",
        };
        assert_eq!(
            header(),
            "Offset          Length          Mapped to       File\n"
        );
        assert_eq!(
            table_row(&data(0x10000, 0x20000, Some(0)), name),
            Ok("0x10000         0x20000         0               a.vmdk\n".to_owned())
        );
        let other = Entry {
            at: Some((OTHER, 512)),
            ..data(512, 512, Some(0))
        };
        assert_eq!(
            table_row(&other, name),
            Ok("0x200           0x200           0x200           a-s001.vmdk\n".to_owned())
        );
        assert_eq!(table_row(&hole(0, 0x10000), name), Ok(String::new()));
        assert_eq!(table_row(&data(0, 512, None), name), Err(Unmappable));
    }
}
