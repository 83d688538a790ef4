//! QEMU's image locks: programs that use one image at the same time see each
//! other, instar and QEMU alike.
//!
//! A permission i is announced by read locks on single bytes of the image, held
//! by the open file description: byte 100+i says "I use it", byte 200+i "I do
//! not let others use it". Whoever has announced itself probes with
//! `F_OFD_GETLK` whether another description holds the opposite bytes. Because
//! announcing comes before probing, of two openers at least one sees the other.
//! (QEMU, block/file-posix.c and docs/devel on image locking.)

use super::Access;
use super::error::{ErrorKind, Fault};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use std::fs::File;
use std::io;
use std::path::Path;

/// First byte of "I use permission i".
const USED: i64 = 100;
/// First byte of "I do not share permission i".
const UNSHARED: i64 = 200;
/// QEMU's names of the permissions, by number.
const NAMES: [&str; 4] = ["consistent read", "write", "write unchanged", "resize"];

/// A set of locks: permissions by number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LockSet {
    used: &'static [usize],
    unshared: &'static [usize],
}

impl LockSet {
    /// Reading facts while others may read and not write.
    pub const INFO: Self = Self {
        used: &[],
        unshared: &[1, 3],
    };
    /// Reading content.
    pub const READ: Self = Self {
        used: &[0],
        unshared: &[1, 3],
    };
    /// Writing. QEMU lets two writers of a raw image in; instar does not.
    pub const WRITE: Self = Self {
        used: &[0, 1, 3],
        unshared: &[1, 3],
    };
    /// Overwriting an existing file by a new image.
    pub const CREATE: Self = Self {
        used: &[1, 3],
        unshared: &[3],
    };

    /// The set that an access takes.
    pub fn of(access: Access) -> Self {
        match access {
            Access::Info => Self::INFO,
            Access::Read => Self::READ,
            Access::Write => Self::WRITE,
        }
    }

    fn bytes(self) -> impl Iterator<Item = i64> {
        let used = self.used.iter().map(|&i| USED + i as i64);
        used.chain(self.unshared.iter().map(|&i| UNSHARED + i as i64))
    }

    /// Announces and probes. On a conflict nothing stays locked.
    pub fn take(self, file: &File, path: &Path) -> Result<(), Fault> {
        let taken = self.announce(file).and_then(|()| self.probe(file, path));
        if taken.is_err() {
            // The conflict is the news; a failing unlock changes nothing in it,
            // and closing the file, which follows, unlocks as well.
            let _ = release(file);
        }
        taken
    }

    fn announce(self, file: &File) -> Result<(), Fault> {
        for byte in self.bytes() {
            set(file, byte, 1, libc::F_RDLCK)
                .map_err(|error| Fault::os(format_args!("Failed to lock byte {byte}"), error))?;
        }
        Ok(())
    }

    fn probe(self, file: &File, path: &Path) -> Result<(), Fault> {
        for &i in self.used {
            if held_by_another(file, UNSHARED + i as i64)? {
                return Err(conflict(
                    format!("Failed to get \"{}\" lock", NAMES[i]),
                    path,
                ));
            }
        }
        for &i in self.unshared {
            if held_by_another(file, USED + i as i64)? {
                return Err(conflict(
                    format!("Failed to get shared \"{}\" lock", NAMES[i]),
                    path,
                ));
            }
        }
        Ok(())
    }
}

/// Gives up every lock that any set takes.
pub(crate) fn release(file: &File) -> io::Result<()> {
    let span = UNSHARED - USED + NAMES.len() as i64;
    set(file, USED, span, libc::F_UNLCK)
}

fn conflict(message: String, path: &Path) -> Fault {
    Fault::new(ErrorKind::Locked, message).with_hint(format!(
        "Is another process using the image [{}]?",
        path.display()
    ))
}

fn range(start: i64, len: i64, kind: i32) -> libc::flock {
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: start,
        l_len: len,
        l_pid: 0,
    }
}

fn set(file: &File, start: i64, len: i64, kind: i32) -> io::Result<()> {
    let lock = range(start, len, kind);
    retry(|| fcntl(file, FcntlArg::F_OFD_SETLK(&lock)))
}

fn held_by_another(file: &File, byte: i64) -> Result<bool, Fault> {
    let mut lock = range(byte, 1, libc::F_WRLCK);
    retry(|| fcntl(file, FcntlArg::F_OFD_GETLK(&mut lock))).map_err(|error| {
        Fault::os(
            format_args!("Failed to probe the lock on byte {byte}"),
            error,
        )
    })?;
    Ok(lock.l_type != libc::F_UNLCK as libc::c_short)
}

fn retry(mut call: impl FnMut() -> Result<i32, Errno>) -> io::Result<()> {
    loop {
        match call() {
            Ok(_) => return Ok(()),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;

    fn image() -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        std::fs::write(&path, [0; 4096]).unwrap();
        (dir, path)
    }

    fn open(path: &Path) -> File {
        File::options().read(true).write(true).open(path).unwrap()
    }

    /// The message with which `second` is refused while `first` is held.
    fn refusal(first: LockSet, second: LockSet) -> Option<String> {
        let (_dir, path) = image();
        let (one, two) = (open(&path), open(&path));
        first.take(&one, &path).unwrap();
        let fault = second.take(&two, &path).err()?;
        assert_eq!(fault.kind, ErrorKind::Locked);
        assert_eq!(
            fault.hint.unwrap(),
            format!("Is another process using the image [{}]?", path.display())
        );
        // What the refused opener had announced is gone again.
        assert!(!held_by_another(&one, 100).unwrap());
        Some(fault.message)
    }

    #[test]
    fn every_pair_of_sets_meets_as_in_qemu() {
        use LockSet as L;
        let write = || Some("Failed to get \"write\" lock".to_string());
        let shared = || Some("Failed to get shared \"write\" lock".to_string());
        assert_eq!(refusal(L::INFO, L::INFO), None);
        assert_eq!(refusal(L::INFO, L::READ), None);
        assert_eq!(refusal(L::INFO, L::WRITE), write());
        assert_eq!(refusal(L::READ, L::WRITE), write());
        assert_eq!(refusal(L::WRITE, L::WRITE), write());
        assert_eq!(refusal(L::WRITE, L::READ), shared());
        assert_eq!(refusal(L::WRITE, L::INFO), shared());
        assert_eq!(refusal(L::WRITE, L::CREATE), write());
        assert_eq!(refusal(L::CREATE, L::INFO), shared());
        assert_eq!(refusal(L::READ, L::CREATE), write());
        assert_eq!(
            refusal(L::CREATE, L::CREATE),
            Some("Failed to get \"resize\" lock".into())
        );
    }

    #[test]
    fn released_locks_let_the_next_writer_in() {
        let (_dir, path) = image();
        let (one, two) = (open(&path), open(&path));
        LockSet::WRITE.take(&one, &path).unwrap();
        release(&one).unwrap();
        LockSet::WRITE.take(&two, &path).unwrap();
    }

    #[test]
    fn closing_the_description_releases_its_locks() {
        let (_dir, path) = image();
        let one = open(&path);
        LockSet::WRITE.take(&one, &path).unwrap();
        drop(one);
        LockSet::WRITE.take(&open(&path), &path).unwrap();
    }
}
