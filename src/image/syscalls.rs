//! System calls that the standard library and `nix` do not offer: reading
//! without waiting, and the start of writing back.

#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;

/// Reads what is in memory of the file from `offset` on; answers how many bytes.
/// Where that is none the call fails with `EAGAIN`, or is 0 at the end of the file.
pub(crate) fn read_at_once(file: &File, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
    let offset = i64::try_from(offset).map_err(|_| io::Error::from_raw_os_error(libc::EFBIG))?;
    let vector = libc::iovec {
        iov_base: buf.as_mut_ptr().cast(),
        iov_len: buf.len(),
    };
    // SAFETY: the vector is one piece of memory that `buf` lends for writing
    // for longer than the call takes, and the kernel writes no more than that.
    let n = unsafe { libc::preadv2(file.as_raw_fd(), &vector, 1, offset, libc::RWF_NOWAIT) };
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}

/// Has the kernel begin to write a range of the file to disk. Waits for none of it
/// and promises nothing; what fails then, fails the next sync as well.
pub(crate) fn begin_sync(file: &File, range: Range<u64>) {
    let offset = i64::try_from(range.start);
    let len = i64::try_from(range.end.saturating_sub(range.start));
    let (Ok(offset), Ok(len)) = (offset, len) else {
        return;
    };
    // SAFETY: the call takes numbers only.
    unsafe {
        libc::sync_file_range(file.as_raw_fd(), offset, len, libc::SYNC_FILE_RANGE_WRITE);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    #[test]
    fn what_was_just_written_is_read_at_once_up_to_the_end() {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[7; 5000], 0).unwrap();
        begin_sync(&file, 0..5000);
        let mut buf = [0; 1000];
        match read_at_once(&file, 4000, &mut buf) {
            Ok(len) => assert_eq!((len, buf), (1000, [7; 1000])),
            // The filesystem knows no such reads, as tmpfs.
            Err(error) => return assert_eq!(error.raw_os_error(), Some(libc::EOPNOTSUPP)),
        }
        assert_eq!(read_at_once(&file, 4001, &mut buf).unwrap(), 999);
    }
}
