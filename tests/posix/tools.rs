//! Programs and system calls that the proofs use.
#![allow(unsafe_code)]

use nix::errno::Errno;
use nix::sys::mman::{MapFlags, MsFlags, ProtFlags, mmap, msync, munmap};
use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

pub use crate::xattr::xattr;

/// Runs a program and answers what it printed; it must succeed.
#[track_caller]
pub fn run<A: AsRef<OsStr>>(program: &str, arguments: &[A]) -> String {
    run_for(PATIENCE, program, arguments)
}

/// The same for a program that may take so long.
#[track_caller]
pub fn run_for<A: AsRef<OsStr>>(patience: Duration, program: &str, arguments: &[A]) -> String {
    let output = output_within(patience, program, arguments);
    let text = text_of(&output);
    assert!(
        output.status.success(),
        "{program} {}: {}\n{text}",
        words(arguments),
        output.status
    );
    text
}

/// Runs a program that must fail with that exit status; answers what it printed.
#[track_caller]
pub fn fails<A: AsRef<OsStr>>(code: i32, program: &str, arguments: &[A]) -> String {
    let output = output(program, arguments);
    let text = text_of(&output);
    assert_eq!(
        output.status.code(),
        Some(code),
        "{program} {}\n{text}",
        words(arguments)
    );
    text
}

/// How long a program may take.
const PATIENCE: Duration = Duration::from_secs(60);

fn output<A: AsRef<OsStr>>(program: &str, arguments: &[A]) -> Output {
    output_within(PATIENCE, program, arguments)
}

fn output_within<A: AsRef<OsStr>>(patience: Duration, program: &str, arguments: &[A]) -> Output {
    Command::new("timeout")
        .args([&patience.as_secs().to_string(), program])
        .args(arguments)
        .env("LC_ALL", "C")
        .env_remove("INSTAR_LOG")
        .output()
        .unwrap_or_else(|error| panic!("{program}: {error}"))
}

fn text_of(output: &Output) -> String {
    let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.push_str(&String::from_utf8_lossy(&output.stderr));
    text
}

fn words<A: AsRef<OsStr>>(arguments: &[A]) -> String {
    let words: Vec<_> = arguments
        .iter()
        .map(|word| word.as_ref().to_string_lossy())
        .collect();
    words.join(" ")
}

/// Bytes without a pattern, the same for the same seed.
pub fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

/// The errno of a call that must fail.
#[track_caller]
pub fn errno<T>(result: io::Result<T>) -> Errno {
    let error = result.err().expect("the call must fail");
    Errno::from_raw(error.raw_os_error().expect("a system call's error"))
}

/// A call that must fail because the daemon is gone.
#[track_caller]
pub fn assert_dead<T>(result: io::Result<T>) {
    let errno = errno(result);
    assert!(
        [Errno::ENOTCONN, Errno::ECONNABORTED].contains(&errno),
        "{errno}"
    );
}

/// `lseek` for data or a hole.
pub fn seek(file: &File, offset: u64, whence: libc::c_int) -> io::Result<u64> {
    let offset = libc::off_t::try_from(offset).unwrap();
    // SAFETY: the call takes numbers only.
    let found = unsafe { libc::lseek(file.as_raw_fd(), offset, whence) };
    Ok(u64::try_from(Errno::result(found)?).unwrap())
}

/// `fallocate`.
pub fn fallocate(file: &File, mode: libc::c_int, offset: u64, len: u64) -> io::Result<()> {
    let offset = libc::off_t::try_from(offset).unwrap();
    let len = libc::off_t::try_from(len).unwrap();
    // SAFETY: the call takes numbers only.
    let result = unsafe { libc::fallocate(file.as_raw_fd(), mode, offset, len) };
    Ok(Errno::result(result).map(drop)?)
}

/// `copy_file_range` inside one file, whole.
pub fn copy_range(file: &File, from: u64, to: u64, len: u64) -> io::Result<()> {
    let mut done = 0;
    while done < len {
        let mut from = libc::off_t::try_from(from + done).unwrap();
        let mut to = libc::off_t::try_from(to + done).unwrap();
        let rest = usize::try_from(len - done).unwrap();
        let fd = file.as_raw_fd();
        // SAFETY: both offsets live longer than the call.
        let copied = unsafe { libc::copy_file_range(fd, &mut from, fd, &mut to, rest, 0) };
        match Errno::result(copied)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            copied => done += copied as u64,
        }
    }
    Ok(())
}

/// Lets a range of a file be used through a shared mapping, and makes the file
/// have what was written there.
pub fn mapped<T>(file: &File, offset: u64, len: u64, act: impl FnOnce(&mut [u8]) -> T) -> T {
    let page = 4096;
    let start = offset / page * page;
    let (skip, len) = (
        usize::try_from(offset - start).unwrap(),
        usize::try_from(len).unwrap(),
    );
    let whole = NonZeroUsize::new(skip + len).unwrap();
    let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    let start = libc::off_t::try_from(start).unwrap();
    // SAFETY: a mapping at a new address.
    let map = unsafe { mmap(None, whole, access, MapFlags::MAP_SHARED, file, start) }.unwrap();
    // SAFETY: the mapping has these bytes, and nothing else knows its address.
    let bytes = unsafe { std::slice::from_raw_parts_mut(map.cast::<u8>().as_ptr(), whole.get()) };
    let answer = act(&mut bytes[skip..]);
    // SAFETY: the mapping, whole.
    unsafe { msync(map, whole.get(), MsFlags::MS_SYNC) }.unwrap();
    // SAFETY: the mapping, whole; the slice is not used any more.
    unsafe { munmap(map, whole.get()) }.unwrap();
    answer
}

/// Waits for something that another process does, for as long as a broken
/// program may take to do it.
#[track_caller]
pub fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < Duration::from_secs(30), "never: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// A loop device over a file, detached at the end.
pub struct LoopDevice(pub PathBuf);

impl LoopDevice {
    /// Attaches it.
    pub fn attach(file: &Path) -> Self {
        let device = run(
            "losetup",
            &[OsStr::new("-f"), OsStr::new("--show"), file.as_os_str()],
        );
        Self(PathBuf::from(device.trim()))
    }

    /// Size in bytes.
    pub fn size(&self) -> u64 {
        let size = run("blockdev", &[OsStr::new("--getsize64"), self.0.as_os_str()]);
        size.trim().parse().unwrap()
    }

    /// The file that it shows, as the kernel knows it; nothing for a free one.
    pub fn backing_file(&self) -> String {
        std::fs::read_to_string(self.attribute()).unwrap_or_default()
    }

    /// Detaches it, and waits until it is.
    pub fn detach(self) {
        let backing = self.attribute();
        drop(self);
        eventually("the loop device is free", || !backing.exists());
    }

    fn attribute(&self) -> PathBuf {
        let name = self.0.file_name().unwrap().to_str().unwrap();
        PathBuf::from(format!("/sys/block/{name}/loop/backing_file"))
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let _ = output("losetup", &[OsStr::new("-d"), self.0.as_os_str()]);
    }
}

/// A filesystem that is mounted, unmounted at the end.
pub struct Mounted(pub PathBuf);

impl Mounted {
    /// Mounts a block device read-write.
    pub fn new(device: &Path, at: PathBuf) -> Self {
        std::fs::create_dir(&at).unwrap();
        run("mount", &[device, &at]);
        Self(at)
    }
}

impl Mounted {
    /// Unmounts it. Another test may be starting a process, which has a copy of
    /// every descriptor until it runs its program.
    #[track_caller]
    pub fn unmount(self) {
        eventually("the filesystem is not in use", || {
            output("umount", &[&self.0]).status.success()
        });
        std::fs::remove_dir(&self.0).unwrap();
        std::mem::forget(self);
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = output("umount", &[&self.0]);
    }
}
