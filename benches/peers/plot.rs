//! The figure of what was measured through the mount: speed in parts of the null
//! filesystem's, drawn by hand, as it is a few rectangles and words.

use crate::through::Row;
use std::fmt::Write;
use std::fs;
use std::io;
use std::path::Path;
use std::time::Duration;

/// Lengths are in the figure's units, which are pixels where it is not scaled.
const WIDTH: f64 = 760.0;
/// Where the bars begin.
const LEFT: f64 = 350.0;
/// The length of a bar as fast as the null filesystem.
const FULL: f64 = 200.0;
/// The longest bar; what is faster is cut off there, and its number says how
/// fast it is.
const LONGEST: f64 = 350.0;
const BAR: f64 = 9.0;
/// From one row to the next, and the room that a headline takes.
const ROW: f64 = 28.0;
const HEAD: f64 = 34.0;

/// Colours that show on light and on dark ground; the words follow the reader's
/// choice.
const STYLE: &str = "text{font:12px sans-serif;fill:#333}.h{font-weight:bold}.n{font-size:10px}\
                     .o{fill:#2f81f7}.t{fill:#d29922}.z{stroke:#888;stroke-dasharray:3 3}\
                     @media(prefers-color-scheme:dark){text{fill:#ccc}}";

/// Draws the rows of some formats.
pub fn draw(tables: &[(&str, Vec<Row>)]) -> io::Result<()> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("doc/speed.svg");
    fs::write(&path, figure(tables).map_err(io::Error::other)?)?;
    println!("{} is drawn", path.display());
    Ok(())
}

fn figure(tables: &[(&str, Vec<Row>)]) -> Result<String, std::fmt::Error> {
    let mut body = String::new();
    let mut y = HEAD;
    key(&mut body)?;
    for (format, rows) in tables {
        writeln!(
            body,
            r#"<text class="h" x="8" y="{}">{format}</text>"#,
            y + 20.0
        )?;
        let top = y + HEAD - 6.0;
        y += HEAD;
        for &(name, times) in rows {
            row(&mut body, y, &name.replace('`', ""), times)?;
            y += ROW;
        }
        let x = LEFT + FULL;
        writeln!(
            body,
            r#"<line class="z" x1="{x}" y1="{top}" x2="{x}" y2="{}"/>"#,
            y - 4.0
        )?;
    }
    Ok(format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {0}\" width=\"{WIDTH}\" \
         height=\"{0}\">\n<style>{STYLE}</style>\n{body}</svg>\n",
        y + 8.0
    ))
}

/// What the colours mean.
fn key(body: &mut String) -> std::fmt::Result {
    for (x, class, name) in [(8.0, "o", "instar"), (80.0, "t", "qemu-storage-daemon")] {
        writeln!(
            body,
            r#"<rect class="{class}" x="{x}" y="10" width="12" height="{BAR}"/><text x="{}" y="19">{name}</text>"#,
            x + 18.0
        )?;
    }
    let x = LEFT + FULL;
    writeln!(
        body,
        r#"<text x="{x}" y="19" text-anchor="middle">speed of a FUSE filesystem that does nothing else</text>"#
    )
}

fn row(body: &mut String, y: f64, name: &str, times: [Duration; 3]) -> std::fmt::Result {
    let [ours, theirs, null] = times.map(|time| time.as_secs_f64());
    writeln!(body, r#"<text x="16" y="{}">{name}</text>"#, y + 13.0)?;
    for (index, class, time) in [(0.0, "o", ours), (1.0, "t", theirs)] {
        let speed = null / time;
        let (top, len) = (y + index * (BAR + 1.0), (speed * FULL).min(LONGEST));
        writeln!(
            body,
            r#"<rect class="{class}" x="{LEFT}" y="{top}" width="{len:.0}" height="{BAR}"/><text class="n" x="{:.0}" y="{}">{:.0} %</text>"#,
            LEFT + len + 4.0,
            top + BAR,
            100.0 * speed
        )?;
    }
    Ok(())
}
