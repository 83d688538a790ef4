//! Reading a file straight into guest memory, which the guest may be changing
//! at the same time and which therefore is never a Rust slice.

#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use vm_memory::VolatileSlice;

/// Fills `dst` from `offset` on; what lies past the end of the file is zero.
pub(crate) fn read_at(file: &File, offset: u64, dst: VolatileSlice<'_>) -> io::Result<()> {
    let mut done = 0;
    while done < dst.len() {
        let rest = dst.offset(done).map_err(io::Error::other)?;
        match pread(file, offset + done as u64, &rest)? {
            0 => {
                zero(&rest);
                break;
            }
            n => done += n,
        }
    }
    Ok(())
}

fn pread(file: &File, offset: u64, dst: &VolatileSlice<'_>) -> io::Result<usize> {
    let offset = i64::try_from(offset).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?;
    let guard = dst.ptr_guard_mut();
    loop {
        // SAFETY: the guard keeps `dst.len()` bytes of memory at its address
        // valid for writes while it lives, which is longer than the call, and
        // the kernel writes no more than that many. No reference to the memory
        // is made.
        let n = unsafe { libc::pread(file.as_raw_fd(), guard.as_ptr().cast(), dst.len(), offset) };
        match usize::try_from(n) {
            Ok(n) => return Ok(n),
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
}

fn zero(dst: &VolatileSlice<'_>) {
    const ZEROES: [u8; 4096] = [0; 4096];
    let mut rest = *dst;
    while !rest.is_empty() {
        let n = rest.len().min(ZEROES.len());
        rest.copy_from(&ZEROES[..n]);
        match rest.offset(n) {
            Ok(next) => rest = next,
            Err(_) => break,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    #[test]
    fn the_end_of_the_file_is_followed_by_zeroes() {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[7; 5000], 0).unwrap();
        let mut memory = vec![1u8; 10000];
        read_at(&file, 100, VolatileSlice::from(&mut memory[..])).unwrap();
        let mut expected = vec![7; 4900];
        expected.resize(10000, 0);
        assert_eq!(memory, expected);
    }
}
