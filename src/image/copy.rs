//! Copying ranges between files, or within one, without filling holes.

use super::effects::{CHUNK, zero};
use nix::errno::Errno;
use nix::unistd::{Whence, lseek};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;

/// Copies `len` bytes of `source` at `from` to `to` in `file`, which gets longer
/// if needed. The ranges do not overlap where both files are the same one.
pub(crate) fn copy(source: &File, from: u64, file: &File, to: u64, len: u64) -> io::Result<()> {
    let end = from + len;
    let place = |at: u64| to + (at - from);
    let mut next = from;
    while next < end {
        let data = next_data(source, next..end)?;
        leave_hole(file, place(next)..place(data.start))?;
        copy_data(source, data.clone(), file, place(data.start))?;
        next = data.end;
    }
    Ok(())
}

/// The first data in a range; an empty range at its end where there is none.
/// Where the filesystem knows nothing of holes, everything is data.
fn next_data(file: &File, range: Range<u64>) -> io::Result<Range<u64>> {
    let seek = |at: u64, whence| match lseek(file, at as i64, whence) {
        Ok(found) => Ok(Some((found as u64).min(range.end))),
        Err(Errno::ENXIO) => Ok(Some(range.end)),
        Err(Errno::EINVAL | Errno::EOPNOTSUPP) => Ok(None),
        Err(error) => Err(io::Error::from(error)),
    };
    let Some(start) = seek(range.start, Whence::SeekData)? else {
        return Ok(range);
    };
    if start == range.end {
        return Ok(start..start);
    }
    let end = seek(start, Whence::SeekHole)?.unwrap_or(range.end);
    Ok(start..end)
}

/// Makes a range read as zeroes; one that is a hole or past the end already does.
fn leave_hole(file: &File, range: Range<u64>) -> io::Result<()> {
    if range.is_empty() {
        return Ok(());
    }
    let data = next_data(file, range.clone())?;
    if !data.is_empty() {
        return zero(file, data.start, range.end - data.start);
    }
    match file.metadata()?.len() < range.end {
        true => file.set_len(range.end),
        false => Ok(()),
    }
}

fn copy_data(source: &File, data: Range<u64>, file: &File, to: u64) -> io::Result<()> {
    let len = data.end - data.start;
    let mut buf = vec![0; CHUNK.min(len as usize)];
    let mut done = 0;
    while done < len {
        let n = (len - done).min(CHUNK as u64) as usize;
        source.read_exact_at(&mut buf[..n], data.start + done)?;
        file.write_all_at(&buf[..n], to + done)?;
        done += n as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt as _;

    const MIB: u64 = 1 << 20;

    fn file(data: &[(u64, &[u8])], len: u64) -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(len).unwrap();
        for (offset, bytes) in data {
            file.write_all_at(bytes, *offset).unwrap();
        }
        file
    }

    fn content(file: &File) -> Vec<u8> {
        let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
        file.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    }

    #[test]
    fn holes_stay_holes_and_data_arrives() {
        let source = file(&[(MIB + 5, b"data"), (3 * MIB, b"more")], 4 * MIB);
        let target = file(&[], 100);
        copy(&source, 512, &target, 100, 4 * MIB - 512).unwrap();
        let mut expected = vec![0; 100];
        expected.extend_from_slice(&content(&source)[512..]);
        assert!(content(&target) == expected);
        assert!(target.metadata().unwrap().blocks() * 512 < MIB);
    }

    #[test]
    fn a_hole_covers_what_was_there() {
        let source = file(&[(0, b"begin"), (2 * MIB, b"end")], 2 * MIB + 3);
        let target = file(&[(0, &[7; 3 << 20])], 3 * MIB);
        copy(&source, 0, &target, 10, 2 * MIB + 3).unwrap();
        let mut expected = vec![7; 3 << 20];
        expected[10..][..(2 << 20) + 3].copy_from_slice(&content(&source));
        assert!(content(&target) == expected);
    }

    #[test]
    fn a_hole_at_the_end_makes_the_file_longer() {
        let source = file(&[], MIB);
        let target = file(&[], 0);
        copy(&source, 0, &target, 0, MIB).unwrap();
        assert_eq!(target.metadata().unwrap().len(), MIB);
    }

    #[test]
    fn data_longer_than_one_chunk_moves_within_a_file() {
        let bytes: Vec<u8> = (0..CHUNK * 2 + 100).map(|at| (at % 251) as u8).collect();
        let both = file(&[(0, &bytes)], bytes.len() as u64);
        let len = bytes.len() as u64 - 7;
        copy(&both, 7, &both, 8 * MIB, len).unwrap();
        assert!(content(&both)[8 << 20..] == bytes[7..]);
    }
}
