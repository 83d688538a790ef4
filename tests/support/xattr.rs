//! Extended attributes.
#![allow(unsafe_code)]

use nix::errno::Errno;
use std::ffi::CString;
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

/// The value of an extended attribute.
pub fn xattr(path: &Path, name: &str) -> io::Result<String> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let name = CString::new(name)?;
    let mut value = vec![0_u8; 64 << 10];
    // SAFETY: both strings end with a zero byte, and the length is that of the
    // buffer.
    let len = unsafe {
        libc::getxattr(
            path.as_ptr(),
            name.as_ptr(),
            value.as_mut_ptr().cast(),
            value.len(),
        )
    };
    value.truncate(usize::try_from(Errno::result(len)?).unwrap());
    Ok(String::from_utf8(value).expect("text"))
}
